"""Tests of videox.run.branch: a run that continues from another folder's checkpoint keeps the curves before it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from videox.run.branch import BEFORE, copy_curves, earlier_lines


def write(folder: Path, name: str, steps: range, run: str = "one") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "args.json").write_text(json.dumps({"resolved": {"run": run}}), encoding="utf-8")
    lines = "".join(json.dumps({"step": step, "loss": 1 / step if step else 1.0}) + "\n" for step in steps)
    (folder / name).write_text(lines, encoding="utf-8")
    return folder


def steps_of(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in earlier_lines(path)]


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    folder = write(tmp_path / "origin", "metrics.jsonl", range(1, 9))
    write(folder, "validation.jsonl", range(0, 9, 2))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    return folder


def test_the_curves_up_to_the_checkpoint_are_copied_and_the_origin_is_only_read(origin: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in origin.iterdir()}
    branch = tmp_path / "branch"
    branch.mkdir()
    copy_curves(origin / "checkpoint-4", branch, 4, "one")
    assert steps_of(branch / "metrics.jsonl") == [1, 2, 3, 4]
    assert steps_of(branch / "validation.jsonl") == [0, 2, 4]
    assert [path.name for path in branch.iterdir()] == [BEFORE]  # its own records are not touched
    assert {path.name: path.read_bytes() for path in origin.iterdir()} == before

    write(branch, "metrics.jsonl", range(5, 7))
    assert steps_of(branch / "metrics.jsonl") == [1, 2, 3, 4, 5, 6]
    second = tmp_path / "second"
    second.mkdir()
    copy_curves(branch / "checkpoint-6", second, 6, "one")  # a branch of a branch
    assert steps_of(second / "metrics.jsonl") == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("case", ["within the folder", "a folder with records", "another run", "a checkpoint alone"])
def test_nothing_is_copied_from_anything_but_the_same_run(origin: Path, tmp_path: Path, case: str) -> None:
    output_dir, run = tmp_path / "branch", "other" if case == "another run" else "one"
    output_dir.mkdir()
    if case == "within the folder":
        output_dir = origin
    if case == "a folder with records":
        write(output_dir, "metrics.jsonl", range(5, 6))
    if case == "a checkpoint alone":
        (origin / "args.json").unlink()
    copy_curves(origin / "checkpoint-4", output_dir, 4, run)
    assert not (output_dir / BEFORE).exists()
