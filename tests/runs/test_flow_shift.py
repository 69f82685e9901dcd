"""Tests of the flow shift in real runs: one value in training, held-out loss and sample clips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import originals
import pytest
import runs
import tiny

import videox.training.build
import videox.training.sampling
import videox.training.validation_loss
from videox.models.config_files import SHIPPED_YAML
from videox.models.scheduler import scheduler_shift

QUICK = {
    "mixed_precision": "no", "gradient_checkpointing": None, "tokenizer_max_length": 16, "max_train_steps": 2,
    "checkpointing_steps": 2, "low_vram": None,
}  # fmt: skip
SMALL = {"image_sample_size": 64, "video_sample_n_frames": 5, "validation_rows": 1, "validation_prompts": ["a cat"]}
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_dataset(tmp_path_factory.mktemp("data"))


def record_shifts(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[float]]:
    """Record the shifts that draw sigmas, measure the held-out loss and sample; nothing is replaced."""
    seen: dict[str, set[float]] = {"training": set(), "held-out": set(), "samples": set()}
    draw, fixed = videox.training.build.draw_sigmas, videox.training.validation_loss.fixed_sigmas
    sample = videox.training.sampling._sample

    def recorded_draw(draws: Any, shift: float, steps: int) -> Any:
        seen["training"].add(shift)
        return draw(draws, shift, steps)

    def recorded_fixed(count: int, shift: float, window: Any) -> Any:
        seen["held-out"].add(shift)
        return fixed(count, shift, window)

    def recorded_sample(pipeline: Any, *arguments: Any) -> Any:
        seen["samples"].add(scheduler_shift(pipeline.scheduler.config, Path()))
        return sample(pipeline, *arguments)

    monkeypatch.setattr(videox.training.build, "draw_sigmas", recorded_draw)
    monkeypatch.setattr(videox.training.validation_loss, "fixed_sigmas", recorded_fixed)
    monkeypatch.setattr(videox.training.sampling, "_sample", recorded_sample)
    return seen


@pytest.mark.parametrize(
    ("family", "layout", "flag", "shift"),
    [
        ("wan2.1", "diffusers", 6.0, 6.0),
        pytest.param("wan2.1", "diffusers", None, 3.0, marks=slow),
        pytest.param("wan2.1", "original", None, 5.0, marks=slow),
        pytest.param("wan2.1", "original", 2.0, 2.0, marks=slow),
        pytest.param("hunyuanvideo", "diffusers", None, 7.0, marks=slow),
        pytest.param("hunyuanvideo", "diffusers", 4.0, 4.0, marks=slow),
    ],
)
def test_training_held_out_loss_and_samples_have_one_shift(
    metadata: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    family: str, layout: str, flag: float | None, shift: float,
) -> None:  # fmt: skip
    build = tiny.build_wan_t2v if family == "wan2.1" else tiny.build_hunyuan_t2v
    model = build(tmp_path / "model")
    if layout == "original":
        model = originals.build_wan(tmp_path / "original", model)
    seen = record_shifts(monkeypatch)
    flags = {**QUICK, **SMALL, "max_train_steps": 1, "flow_shift": flag}
    outcome = runs.train(
        runs.train_flags(family, model, metadata, tmp_path / "run", **flags), runs.train_script(family)
    )
    assert outcome.code == 0, outcome.stderr
    assert seen == {"training": {shift}, "held-out": {shift}, "samples": {shift}}
    source = {"original": "wan_civitai.yaml: the model's folder has none"}.get(
        layout, "the model's scheduler/scheduler_config.json"
    )
    assert f"flow shift  {shift:g} ({'--flow_shift' if flag else source})" in outcome.stdout
    assert json.loads((outcome.folder / "args.json").read_text())["resolved"]["shift"] == shift
    assert f"the model was trained at {16 if family == 'wan2.1' else 24} fps" in outcome.stdout
    assert not [line for line in outcome.stderr.splitlines() if "no sample at" in line]


@slow
def test_the_flag_trains_as_the_shipped_yaml(metadata: Path, tmp_path: Path) -> None:
    """5.0 from the yaml was the value of every Wan2.1 before there was the flag."""
    model = tiny.build_wan_t2v(tmp_path / "model")
    losses = []
    for number, changes in enumerate(({"flow_shift": 5.0}, {"config_path": SHIPPED_YAML}, {})):
        flags = {**QUICK, "max_train_steps": 10, "checkpointing_steps": 10, **changes}
        outcome = runs.train(runs.wan_flags(model, metadata, tmp_path / f"run-{number}", **flags))
        assert outcome.code == 0, outcome.stderr
        losses.append(outcome.losses)
    assert losses[0] == losses[1] and len(losses[0]) == 10
    assert losses[2] != losses[0]


@slow
def test_a_resumed_run_keeps_its_shift(metadata: Path, tmp_path: Path) -> None:
    model = tiny.build_wan_t2v(tmp_path / "model")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    steps = {**QUICK, "max_train_steps": 4}
    through = runs.train(runs.wan_flags(model, metadata, whole, **steps))
    runs.train(runs.wan_flags(model, metadata, parts, **QUICK))
    flags = {**steps, "resume_from_checkpoint": "latest", "flow_shift": 9.0}
    resumed = runs.train(runs.wan_flags(model, metadata, parts, **flags))
    assert resumed.code == 0, resumed.stderr
    assert "flow shift 9 (--flow_shift) has no effect on a resumed run, which keeps 3" in resumed.stdout
    assert resumed.losses == through.losses and len(resumed.losses) == 4
    manifest = json.loads((parts / "checkpoint-4/manifest.json").read_text(encoding="utf-8"))
    assert manifest["description"]["shift"] == 3.0
