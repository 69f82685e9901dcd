"""Full fine-tuning with --stream_blocks: equal numbers, resume in both directions, EMA, validation and export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
import torch

BLOCKS = 4
SETTINGS = {
    "tokenizer_max_length": 16, "num_train_epochs": None, "lr_warmup_steps": 0, "gradient_checkpointing": True,
    "gradient_accumulation_steps": 2, "mixed_precision": "bf16", "optimizer": "adamw_offload", "validation_rows": 1,
}  # fmt: skip
KINDS = {
    "wan2.1 normal": (tiny.build_wan_t2v, {"layers": BLOCKS}),
    "wan2.1 i2v": (tiny.build_wan_i2v, {"layers": BLOCKS}),
    "hunyuanvideo normal": (tiny.build_hunyuan_t2v, {}),
    "hunyuanvideo i2v": (tiny.build_hunyuan_i2v, {}),
}


def train(folder: Path, output: Path, kind: str = "wan2.1 normal", steps: int = 4, **changes: Any) -> runs.Outcome:
    """Run a training with a model of four blocks; folder: of models and data."""
    family, mode = kind.split()
    build, sizes = KINDS[kind]
    model = folder / kind.replace(" ", "-")
    if not model.is_dir():
        build(model, **sizes)
    data = folder / "data" / "metadata.json"
    metadata = data if data.is_file() else tiny.make_dataset(folder / "data", copies=2)
    settings = {**SETTINGS, "train_mode": mode, "max_train_steps": steps, "checkpointing_steps": steps // 2, **changes}
    if (family, mode) == ("wan2.1", "i2v"):
        settings["tokenizer_max_length"] = None  # a model with an image embedder takes 512
    flags = runs.train_flags(family, model, metadata, output, **settings)
    outcome = runs.train(flags, runs.train_script(family))
    assert outcome.code == 0, outcome.stderr
    return outcome


def numbers(outcome: runs.Outcome) -> list[tuple[float, float]]:
    return [(record["loss"], record["grad_norm"]) for record in outcome.metrics]


def held_out(outcome: runs.Outcome) -> list[dict[str, Any]]:
    """Return the held-out losses, that of an EMA included, of each validation."""
    return [{key: value for key, value in row.items() if "loss" in key} for row in outcome.validation]


def assert_alike(found: runs.Outcome, expected: runs.Outcome) -> None:
    assert numbers(found) == numbers(expected)
    assert held_out(found) == held_out(expected) != []
    for folder in ("transformer", *(["transformer_ema"] if (expected.folder / "transformer_ema").is_dir() else [])):
        weights, wanted = (runs.read_weights(outcome.folder / folder) for outcome in (found, expected))
        assert weights.keys() == wanted.keys() and all(torch.equal(weights[key], wanted[key]) for key in wanted)


def test_a_run_that_is_resumed_with_streamed_blocks_is_bit_identical(tmp_path: Path) -> None:
    """A resident run of two steps, and its second step again with streamed blocks, which are then validated."""
    resident = train(tmp_path, tmp_path / "run", steps=2)
    weights, expected = runs.read_weights(resident.folder / "transformer"), (numbers(resident), held_out(resident))
    resume = {"stream_blocks": "all", "resume_from_checkpoint": resident.folder / "checkpoint-1"}
    streamed = train(tmp_path, resident.folder, steps=2, **resume)
    assert f"streaming  {BLOCKS} of {BLOCKS} blocks: their weights and gradients rest in " in streamed.stdout
    assert numbers(streamed) == expected[0] and held_out(streamed)[-1] == expected[1][-1]
    exported = runs.read_weights(streamed.folder / "transformer")
    assert exported.keys() == weights.keys() and all(torch.equal(exported[key], weights[key]) for key in weights)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ten_losses_and_resumed_runs_are_bit_identical(tmp_path: Path, kind: str) -> None:
    """Of a streamed and a resident run; each is stopped after five steps, and goes on as the other one."""
    resident = train(tmp_path, tmp_path / "resident", kind, 10)
    streamed = train(tmp_path, tmp_path / "streamed", kind, 10, stream_blocks="all", offload_activations=True)
    assert f"streaming  {BLOCKS} of {BLOCKS} blocks: their weights and gradients rest in " in streamed.stdout
    assert_alike(streamed, resident)
    names = {
        json.loads((o.folder / "checkpoint-10/trainer_state.json").read_text())["run"] for o in (resident, streamed)
    }
    assert len(names) == 1
    for outcome, changes in ((resident, {"stream_blocks": "all"}), (streamed, {})):
        checkpoint = outcome.folder / "checkpoint-5"
        resumed = train(tmp_path, outcome.folder, kind, 10, resume_from_checkpoint=checkpoint, **changes)
        assert_alike(resumed, resident)


@pytest.mark.slow
def test_weights_in_bfloat16_and_an_ema_are_bit_identical(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"optimizer": "adamw_bf16_offload"}
    ema: dict[str, Any] = {"use_ema": True, "ema_device": "cpu", "validate_ema": True}
    for name, more in (("bf16", changes), ("ema", ema)):
        resident = train(tmp_path, tmp_path / name, **more)
        assert_alike(train(tmp_path, tmp_path / f"{name}-streamed", stream_blocks="all", **more), resident)


@pytest.mark.slow
def test_some_blocks_are_streamed_and_auto_streams_what_does_not_fit(tmp_path: Path) -> None:
    resident = train(tmp_path, tmp_path / "resident")
    for name, changes, line in (
        ("some", {"stream_blocks": 3}, f"streaming  3 of {BLOCKS} blocks"),
        ("roomy", {"stream_blocks": "auto"}, "streaming  no block: by the estimate all of them fit"),
        ("tight", {"stream_blocks": "auto", "gpu_memory": 1}, f"streaming  {BLOCKS} of {BLOCKS} blocks"),
    ):
        outcome = train(tmp_path, tmp_path / name, **changes)
        assert line in outcome.stdout
        assert_alike(outcome, resident)
