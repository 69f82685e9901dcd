"""Tests with runs of earlier versions: their checkpoints resume, and their plans are the same, in today's code.

Each archive in tests/data holds the run folder of ten steps of a tiny Wan2.1 with one checkpoint, checkpoint-4:

- golden_wan.tar.gz: full fine-tuning, written before the modules were moved into packages; also the data set and the
  model of both runs.
- golden_wan_lora.tar.gz: a LoRA with EMA, validation and a latent cache, written before the index had a version for
  each media format; also the cache.
- golden_wan_strata.tar.gz: a LoRA with up to four samples per step and the logit_normal density beside
  --uniform_sampling, written before timesteps moved from step to step; also the timesteps of all samples.
"""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import pytest
import runs
import tiny

ARCHIVES = {
    "full": ("golden_wan.tar.gz",),
    "lora": ("golden_wan.tar.gz", "golden_wan_lora.tar.gz"),
    "strata": ("golden_wan.tar.gz", "golden_wan_strata.tar.gz"),
}
STEPS = 10


def extract(names: tuple[str, ...], folder: Path) -> None:
    """Extract archives over each other; only the last one's run folder is kept."""
    for name in names:
        with tarfile.open(tiny.ROOT / "tests" / "data" / name) as archive:
            members = [m for m in archive.getmembers() if name == names[-1] or not m.name.startswith("run")]
            archive.extractall(folder, members, filter="data")
    for path in folder.glob("data/*"):  # the cache's keys have modification times; these were whole seconds
        os.utime(path, (seconds := int(path.stat().st_mtime), seconds))


def timesteps_of(outcome: runs.Outcome, step: int) -> list[float]:
    paths = sorted((outcome.folder / f"dump/step-{step}").glob("*.safetensors"))
    return [timestep for path in paths for timestep in runs.read_dump(path)["timestep"].tolist()]


@pytest.mark.parametrize("kind", ARCHIVES)
def test_checkpoint_of_an_earlier_version_resumes(kind: str, tmp_path: Path) -> None:
    extract(ARCHIVES[kind], tmp_path)
    recorded = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    asked = json.loads((tmp_path / "run/args.json").read_text())["asked"]
    cached = sorted(path.name for path in tmp_path.glob("cache/*"))
    asked |= {
        "pretrained_model_name_or_path": str(tmp_path / "model"),
        "train_data_meta": str(tmp_path / "data/metadata.json"),
        "train_data_dir": None,
        "output_dir": str(tmp_path / "run"),
        "resume_from_checkpoint": "latest",
        "latent_cache": str(tmp_path / "cache") if cached else None,
    }
    del asked["config_path"]  # a path of the tree that wrote it; the shipped file is the default
    asked["dump_steps"] = list(range(5, STEPS + 1)) if kind == "strata" else []
    outcome = runs.train(runs.to_argv({name: value for name, value in asked.items() if value != []}))
    assert outcome.code == 0, outcome.stderr
    if kind == "strata":  # of a version that took the model's own shift
        recorded_draws = json.loads((tmp_path / "run/timesteps.json").read_text())[4:]
        assert [timesteps_of(outcome, step) for step in asked["dump_steps"]] == recorded_draws
    else:
        assert "flow shift  5 (checkpoint-4: a resumed run keeps its own)" in outcome.stdout
        unused = "flow shift 3 (the model's scheduler/scheduler_config.json) has no effect on a resumed run"
        assert unused in outcome.stdout
    resumed = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in resumed] == list(range(1, STEPS + 1))
    for name in ("rows", "buckets", "tokens", "lr"):
        assert [line[name] for line in resumed] == [line[name] for line in recorded], name
    # Bitwise equal on the machine that wrote it; other processors round differently.
    assert [line["loss"] for line in resumed] == pytest.approx([line["loss"] for line in recorded], rel=1e-3)
    assert sorted(path.name for path in tmp_path.glob("cache/*")) == cached, "samples were encoded again"
