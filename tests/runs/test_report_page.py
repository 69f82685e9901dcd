"""Tests of report.html of real runs: what they write for it, that training is the same, and the page of a failure."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
from run_folders import Parsed

from videox.tracking.jsonl import read_lines
from videox.training import data as data_pipeline

FLAGS = {
    "mixed_precision": "no", "tokenizer_max_length": 16, "lr_warmup_steps": 0, "num_train_epochs": None,
    "validation_rows": 1, "validation_steps": 2, "validation_epochs": 0, "checkpointing_steps": 2,
    "validation_prompts": ["a rabbit <b>walks</b>"], "max_train_steps": 4,
}  # fmt: skip


def page_with(folder: Path, words: str) -> str:
    """Return the text of a run's page as soon as it has these words: its process may outlast the run."""
    end = time.monotonic() + 240
    text = ""
    while time.monotonic() < end:
        page = folder / "report.html"
        text = "".join(Parsed(page.read_text(encoding="utf-8")).text) if page.exists() else ""
        if words in text:
            return text
        time.sleep(0.2)
    raise AssertionError(f"no page with {words!r}: {text[:2000]}")


def pictures_of(folder: Path, count: int) -> list[Path]:
    """Wait for the pictures of the rows: the program goes on by itself, at the lowest priority, after the run."""
    end = time.monotonic() + 120
    while True:
        found = [path for path in (folder / "report_files").glob("row-*.webp") if path.stat().st_size]
        if len(found) >= count or time.monotonic() > end:
            return found
        time.sleep(0.2)


def numbers(outcome: runs.Outcome) -> list[tuple[float, float, list[int]]]:
    return [(line["loss"], line["grad_norm"], line["rows"]) for line in outcome.metrics]


@pytest.mark.slow
def test_a_run_writes_its_page_and_trains_the_same(tmp_path: Path) -> None:
    model, metadata = tiny.build_wan_t2v(tmp_path / "model"), tiny.make_dataset(tmp_path / "data", copies=2)
    with (metadata.parent / "broken.mp4").open("wb") as file:
        file.write(b"not a clip")
    rows = json.loads(metadata.read_text(encoding="utf-8"))
    metadata.write_text(json.dumps([*rows, {"file_path": "broken.mp4", "text": "none"}]), encoding="utf-8")
    without = runs.train(runs.wan_flags(model, metadata, tmp_path / "off", **FLAGS))
    outcome = runs.train(runs.wan_flags(model, metadata, tmp_path / "on", **FLAGS, report_seconds=1))
    assert (without.code, outcome.code) == (0, 0), outcome.stderr
    assert numbers(outcome) == numbers(without) and outcome.validation == without.validation
    assert not {"report.html", "report_files", "data_report.json"} & {path.name for path in without.folder.iterdir()}

    folder = outcome.folder
    text = page_with(folder, "finished")
    for words in (
        "4 of 4",
        "a rabbit <b>walks</b>",
        "Rows that are not trained: 1",
        "broken.mp4",
        "Held-out rows: 1",
        "step 4",
    ):
        assert words in text, words
    data = json.loads((folder / "data_report.json").read_text(encoding="utf-8"))
    assert sum(data["fates"].values()) == data["rows"] == len(rows) + 1 and data["fates"]["held_out"] == 1
    assert len(data["clips"]) == data["clips_total"] == len(rows)
    assert {clip["row"] for clip in data["clips"] if clip["fate"] == "held_out"} == {
        row["row"] for row in data["held_out"]
    }
    assert len(pictures_of(folder, len(rows))) == len(rows)
    assert [event["event"] for event in read_lines(without.folder / "events.jsonl")] == ["launch", "end"]

    # the page is no part of a run's name: a resume may switch it off, and records what else changed
    changes = {"max_train_steps": 6, "resume_from_checkpoint": "latest"}
    resumed = runs.train(runs.wan_flags(model, metadata, folder, **{**FLAGS, **changes}))
    assert resumed.code == 0, resumed.stderr
    first, _, launch, end = read_lines(folder / "events.jsonl")
    assert (first["step"], launch["step"], end["step"], end["state"]) == (0, 4, 6, "finished")
    assert launch["resumed_from"].endswith("checkpoint-4") and "resumed_from" not in first
    assert "--max_train_steps was 4 and is 6 from this step on" in launch["changed"]
    assert launch["command"].startswith("python ") and launch["processes"] == 1


@pytest.mark.slow
def test_a_run_that_fails_says_why_on_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, real_loader = tiny.build_wan_t2v(tmp_path / "model"), data_pipeline.BatchLoader
    metadata = tiny.make_dataset(tmp_path / "data", tuple((f"{number}.png", 64, 64, 0, 0.0) for number in range(16)))

    def build_then_delete(*arguments: Any, **settings: Any) -> Any:
        loader = real_loader(*arguments, **settings)
        for number in range(11):  # ten unreadable rows are always allowed
            (metadata.parent / f"{number}.png").unlink()
        return loader

    monkeypatch.setattr(data_pipeline, "BatchLoader", build_then_delete)
    flags = {**FLAGS, "validation_prompts": None, "validation_rows": None, "max_bad_fraction": 0, "report_seconds": 1}
    flags |= {"train_batch_size": 16, "image_sample_size": 64, "vae_mini_batch": 16}
    outcome = runs.train(runs.wan_flags(model, metadata, tmp_path / "out", **flags))
    assert outcome.code == 3, outcome.stderr
    text = page_with(outcome.folder, "ended with an error")
    assert outcome.status["error"] in text and "could not be read during training: 11" in text
    assert read_lines(outcome.folder / "events.jsonl")[-1]["state"] == "failed"
