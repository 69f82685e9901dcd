"""Checks of runs under a launch recipe: training equals the baseline, checkpoint files, resume, export, conversion."""

from __future__ import annotations

import sys
from pathlib import Path

import diffusers
import forkserver
import pytest
import runs
import torch
from launches import TRANSFORMER_CLASSES, BackendRuns, exit_codes, output_of

from videox.run.checkpoint import read_manifest, verify
from videox.weights.safetensors_io import StoredTensors

CHECKPOINT_FILES = {  # stems in a checkpoint, without manifest, trainer state, columns and configuration
    "plain": {"transformer", "optimizer"},
    "ddp": {"transformer", "optimizer"},
    "zero2": {"transformer", "pytorch_model", "latest", "zero_to_fp32.py", "zero_to_torch.py"},
    "zero3": {"pytorch_model", "latest", "zero_to_fp32.py", "zero_to_torch.py"},
    "fsdp1": {"pytorch_model_fsdp_0", "optimizer_0"},
    "fsdp2": {"pytorch_model_fsdp_0", "optimizer_0"},
}


def backend_of(recipe: str) -> str:
    """Return the backend that a launch recipe results in."""
    return {"plain": "single"}.get(recipe, recipe)


def weight_change(model: Path, trained: Path, place: str = "transformer") -> torch.Tensor:
    """Return the difference of all parameters after and before training, as one float32 vector.

    place: of the weights in the model.
    """
    before, after = StoredTensors(model / place), StoredTensors(trained)
    assert set(before) == set(after)
    return torch.cat([(after[name].float() - before[name].float()).flatten() for name in sorted(before)])


def check_matches_baseline(setup: BackendRuns, folder: Path) -> None:
    """Check that a run used the same samples as the baseline on one process and learned the same."""
    found, wanted = forkserver.read_steps(folder), forkserver.read_steps(setup.baseline)
    for name in ("step", "rows", "buckets", "lr", "tokens"):
        assert [line[name] for line in found] == [line[name] for line in wanted], name
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in wanted], abs=0.02)
    assert [line["grad_norm"] for line in found] == pytest.approx([line["grad_norm"] for line in wanted], rel=0.02)
    a, b = (weight_change(setup.model, run / setup.place, setup.place) for run in (folder, setup.baseline))
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.99
    assert float(a.norm() / b.norm()) == pytest.approx(1, abs=0.02)
    validated = [runs.read_lines(run / "validation.jsonl") for run in (folder, setup.baseline)]
    assert [line["loss"] for line in validated[0]] == pytest.approx([line["loss"] for line in validated[1]], abs=0.02)


def check_checkpoint(setup: BackendRuns, recipe: str, folder: Path, world_size: int = 2) -> None:
    """Check the files of the last checkpoint, its manifest, and that the export is its float32 weights, cast."""
    checkpoint = folder / f"checkpoint-{setup.steps}"
    assert verify(checkpoint, hashes=True) == []
    manifest = read_manifest(checkpoint)
    assert (manifest["world_size"], manifest["description"]["backend"]) == (world_size, backend_of(recipe))
    common = {
        "manifest.json",
        "trainer_state.json",
        "columns.safetensors",
        *(["config.json"] if recipe not in ("plain", "ddp") else []),
    }
    assert {path.name for path in checkpoint.iterdir()} == CHECKPOINT_FILES[recipe] | common
    if "transformer" in CHECKPOINT_FILES[recipe]:
        fp32_params = runs.read_weights(checkpoint / "transformer")
        exported = runs.read_weights(folder / setup.place)
        assert {tensor.dtype for tensor in fp32_params.values()} == {torch.float32}
        assert all(torch.equal(fp32_params[name].to(t.dtype), t) for name, t in exported.items())


def check_resume_repeats(setup: BackendRuns, folder: Path) -> None:
    """Check that the second half of a run, trained again after a resume, is bit-identical to the first time."""
    again = [line for line in forkserver.read_steps(folder) if line["step"] > setup.steps // 2]
    (superseded,) = folder.glob("superseded-*")
    before = forkserver.read_steps(superseded)
    assert [line["step"] for line in before] == list(range(setup.steps // 2 + 1, setup.steps + 1))
    assert again == before
    # the export of the superseded run is kept only where it differs
    assert not (folder / f"{setup.place}-superseded").exists()


def check_export(setup: BackendRuns, folder: Path) -> None:
    """Check that diffusers loads the exported transformer and that all weights are finite."""
    model = getattr(diffusers, TRANSFORMER_CLASSES[setup.family]).from_pretrained(folder / setup.place)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def convert_checkpoint(folder: Path, step: int) -> runs.Outcome:
    """Convert a checkpoint with scripts/zero_to_bf16.py, called with the published flags."""
    checkpoint = folder / f"checkpoint-{step}"
    outputs = checkpoint.with_name(f"{checkpoint.name}-outputs")
    command = [sys.executable, "scripts/zero_to_bf16.py", str(checkpoint), str(outputs)]
    outcome = runs.run_command([*command, "--max_shard_size", "80GB", "--safe_serialization"], outputs)
    assert outcome.code == 0, outcome.stdout + outcome.stderr
    return outcome


def check_launch(setup: BackendRuns, recipe: str, folder: Path, world_size: int = 2, **changes: object) -> None:
    """Check that the launcher flags of a recipe select its backend, and that training runs to the end."""
    outcome = setup.launch(recipe, folder, world_size, **changes)
    assert outcome.code == 0, outcome.stdout[-2000:] + outcome.stderr[-6000:]
    assert f"backend     {backend_of(recipe)} (" in outcome.stdout
    assert f"processes   {world_size}\n" in outcome.stdout


def check_resume(setup: BackendRuns, recipe: str, folder: Path, world_size: int = 2, **changes: object) -> None:
    """Check that a finished run, resumed from its middle, repeats its second half."""
    halfway = folder / f"checkpoint-{setup.steps // 2}"
    ranks = setup.run_ranks(recipe, folder, world_size, resume_from_checkpoint=halfway, **changes)
    assert exit_codes(ranks) == [0] * world_size, output_of(ranks)
    assert f"backend     {backend_of(recipe)} (" in ranks[0].output()
    check_resume_repeats(setup, folder)
