"""Tests of videox.run.verification: the hashes of a checkpoint are checked by all ranks, each a share of the files."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from crashes import gather_single, publish_all

from tests.run.test_lifecycle import run_ranks
from videox.errors import UserError
from videox.run import checkpoint as checkpoints
from videox.run.checkpoint import verify
from videox.run.lifecycle import open_run
from videox.run.verification import SharedVerification


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return publish_all(tmp_path / "run", 1, 2)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_every_file_is_hashed_once_by_some_rank(run: Path, monkeypatch: pytest.MonkeyPatch, world_size: int) -> None:
    hashed: list[Path] = []
    digest = checkpoints._digest
    monkeypatch.setattr(checkpoints, "_digest", lambda path: (hashed.append(path), digest(path))[1])

    def enter(rank: int, gather: Callable[[object], list[object]]) -> object:
        with open_run(run, resume="latest", verify=True, is_main=rank == 0, gather=gather) as opened:
            return opened.resume, opened.notes

    results = run_ranks(enter, world_size)
    assert all(result == results[0] for result in results)
    (resume, notes), files = results[0], checkpoints.read_manifest(run / "checkpoint-2")["files"]
    assert resume.step == 2 and sorted(hashed) == sorted(run / "checkpoint-2" / name for name in files)
    (line,) = [note for note in notes if "hashes verified" in note]
    assert line.startswith(f"checkpoint-2: hashes verified ({len(files)} files, 0.00 GB, ")


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_damaged_checkpoint_is_named_on_all_ranks_and_an_older_one_is_used(run: Path, world_size: int) -> None:
    path = run / "checkpoint-2" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")

    def enter(rank: int, gather: Callable[[object], list[object]], resume: str, verify: bool = True) -> object:
        with open_run(run, resume=resume, verify=verify, is_main=rank == 0, gather=gather) as opened:
            return opened.resume.step, opened.notes

    for step, notes in run_ranks(lambda *given: enter(*given, "latest"), world_size):
        assert step == 1 and any("optimizer.safetensors differs from what was saved" in note for note in notes)
    for refused in run_ranks(lambda *given: enter(*given, "checkpoint-2"), world_size):
        assert isinstance(refused, UserError) and "optimizer.safetensors differs" in refused.what
    assert [step for step, _ in run_ranks(lambda *given: enter(*given, "latest", verify=False), world_size)] == (
        [2] * world_size
    )


@pytest.mark.slow
def test_a_bit_or_the_end_of_any_file_is_missed_by_no_check(run: Path) -> None:
    """Of each file: 30 places with one bit turned, 10 lengths. The manifest is one of the files."""
    sound, random_ = run / "checkpoint-2", random.Random(0)
    damaged = shutil.copytree(sound, run / "damaged")
    checks = SharedVerification(gather_single, hashes=True)
    assert verify(damaged, hashes=True) == [] == checks.check(damaged)
    tried = 0
    for path in sorted(file for file in damaged.rglob("*") if file.is_file()):
        content = path.read_bytes()
        places = random_.sample(range(8 * len(content)), min(30, 8 * len(content)))
        mutants = [
            bytes(byte ^ (1 << bit % 8 if at == bit // 8 else 0) for at, byte in enumerate(content)) for bit in places
        ]
        mutants += [content[:end] for end in random_.sample(range(len(content)), min(10, len(content)))]
        for mutant in mutants:
            path.write_bytes(mutant)
            problems = checks.check(damaged)
            assert problems and any(path.name in problem for problem in problems), path
            tried += 1
        path.write_bytes(content)
    assert tried >= 150 and checks.check(damaged) == []
