"""Tests of videox.training.memory_check: an out-of-memory error names the phase in which it was raised."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import pytest
import runs
import tiny
import torch
import transformers

import videox.training.build
from videox.device import memory_phase
from videox.distributed import collectives
from videox.engine.ddp import DdpEngine
from videox.errors import FLAGS, UserError
from videox.shapes import Bucket
from videox.training.checkpointing import Checkpointer
from videox.training.memory_check import HINTS, OTHERWISE, explain_oom, name_batch

QUICK = {"max_train_steps": 1, "num_train_epochs": None, "validation_rows": 1, "gradient_checkpointing": False}


class Place(NamedTuple):
    """Where torch.OutOfMemoryError is raised (owner, name), and the phase that the line must name."""

    owner: Any
    name: str
    phase: str


PLACES = (
    Place(diffusers.AutoencoderKLWan, "encode", "the VAE"),
    Place(transformers.UMT5EncoderModel, "forward", "the text encoder"),
    Place(videox.training.build, "load_transformer", "loading the model"),
    Place(videox.training.build, "choose_trainable", "placing weights and optimizer"),
    Place(diffusers.WanTransformer3DModel, "forward", "validation"),
    Place(DdpEngine, "update", "the optimizer step"),
    Place(DdpEngine, "save", "a save"),
    Place(Checkpointer, "_export_final", "the export"),
)  # fmt: skip
BATCH: Any = {"bucket": Bucket(5, 32, 48), "rows": [0, 1]}
ALSO_IN_TEST = ("the VAE", "validation", "a save")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("oom")
    return tiny.build_wan_t2v(folder / "model"), tiny.make_dataset(folder / "data")


def raise_oom(*arguments: object, **settings: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize(
    "place",
    [pytest.param(p, id=p.phase, marks=[] if p.phase in ALSO_IN_TEST else pytest.mark.slow) for p in PLACES],
)
def test_the_phase_is_named(
    place: Place, files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place.owner, place.name, raise_oom)
    outcome = runs.train(runs.wan_flags(*files, tmp_path / "out", **QUICK))
    assert outcome.code == FLAGS
    line = outcome.stderr.strip().splitlines()[-1]
    assert f"GPU memory: out of memory (OOM) in {place.phase}" in line and "2.00 GiB" in line
    assert HINTS.get(place.phase, OTHERWISE) in line
    assert outcome.status["error"] == line


@pytest.mark.slow
def test_loading_a_checkpoint_is_named(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = runs.train(runs.wan_flags(*files, tmp_path / "out", **QUICK))
    assert first.code == 0, first.stderr
    monkeypatch.setattr(DdpEngine, "load", raise_oom)
    flags = {**QUICK, "max_train_steps": 2, "resume_from_checkpoint": "latest"}
    outcome = runs.train(runs.wan_flags(*files, tmp_path / "out", **flags))
    assert "out of memory (OOM) in loading the checkpoint" in outcome.stderr.strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["the forward pass", "the backward pass"])
def test_a_pass_is_named_with_its_micro_batch(
    phase: str, files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if phase == "the forward pass":
        monkeypatch.setattr(diffusers.WanTransformer3DModel, "forward", raise_oom)
    else:
        monkeypatch.setattr(torch.Tensor, "backward", raise_oom)
    flags = {**QUICK, "validation_rows": 0}
    outcome = runs.train(runs.wan_flags(*files, tmp_path / "out", **flags))
    assert f"out of memory (OOM) in {phase} of the micro-batch 1 x " in outcome.stderr.strip().splitlines()[-1]


def test_the_innermost_phase_counts_and_the_type_stays() -> None:
    with pytest.raises(torch.OutOfMemoryError) as error, memory_phase("validation"), memory_phase("the VAE"):
        raise_oom()
    assert error.value.phase == "the VAE"
    with pytest.raises(UserError) as refused, explain_oom(), name_batch(BATCH), memory_phase("the backward pass"):
        raise_oom()
    assert "in the backward pass of the micro-batch 2 x 5 x 32 x 48 (24 tokens)" in refused.value.what
    with pytest.raises(ValueError, match="other"), explain_oom(), name_batch(BATCH), memory_phase("the VAE"):
        raise ValueError("other errors pass")


def test_the_backward_pass_has_its_own_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "backward", raise_oom)
    with runs.restored_process_state():
        accelerator, model = runs.Accelerator(cpu=True), torch.nn.Linear(2, 1)
        with pytest.raises(torch.OutOfMemoryError) as error, collectives.accumulate(accelerator, model, True):
            collectives.backward(accelerator, model, model(torch.ones(2)).sum())
    assert error.value.phase == "the backward pass"
