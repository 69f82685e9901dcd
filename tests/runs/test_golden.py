"""Tests with a run of an earlier version: its checkpoint resumes, and its plan is the same, in today's code.

tests/data/golden_wan.tar.gz holds the data set, the model and the run folder of ten steps of a tiny Wan2.1, written
before the modules were moved into packages, with checkpoint-4 as the only checkpoint.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import runs
import tiny

ARCHIVE = tiny.ROOT / "tests" / "data" / "golden_wan.tar.gz"
STEPS = 10


def test_checkpoint_of_an_earlier_version_resumes(tmp_path: Path) -> None:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    recorded = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    asked = json.loads((tmp_path / "run/args.json").read_text())["asked"]
    asked |= {
        "pretrained_model_name_or_path": str(tmp_path / "model"),
        "train_data_meta": str(tmp_path / "data/metadata.json"),
        "train_data_dir": None,
        "output_dir": str(tmp_path / "run"),
        "resume_from_checkpoint": "latest",
    }
    del asked["config_path"]  # a path of the tree that wrote it; the shipped file is the default
    outcome = runs.train(runs.to_argv({name: value for name, value in asked.items() if value != []}))
    assert outcome.code == 0, outcome.stderr
    resumed = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in resumed] == list(range(1, STEPS + 1))
    for name in ("rows", "buckets", "tokens", "lr"):
        assert [line[name] for line in resumed] == [line[name] for line in recorded], name
    # Bitwise equal on the machine that wrote it; other processors round differently.
    assert [line["loss"] for line in resumed] == pytest.approx([line["loss"] for line in recorded], rel=1e-3)
