"""Tests of videox.lora.extract: the LoRA nearest to the difference of two models, and the error that is printed."""

from __future__ import annotations

import math
from pathlib import Path

import originals
import pytest
import tiny
import torch
from exports import export, header, refusal
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from videox.lora.extract import low_rank
from videox.weights.reader import open_tensors

RANK = 4
BUILDERS = {"wan": tiny.build_wan_t2v, "hunyuan": tiny.build_hunyuan_t2v}


def perturbed(folder: Path, rank: int | None, *, norms: bool = False) -> dict[str, Tensor]:
    """Add a difference of this rank (None: full) to each linear layer of a transformer's weights."""
    draw, state = torch.Generator().manual_seed(1), originals.weights(folder)
    for name, tensor in state.items():
        if tensor.ndim == 2 and name.endswith(".weight"):
            left = torch.randn(tensor.shape[0], rank or min(tensor.shape), generator=draw)
            state[name] = tensor + 0.1 * left @ torch.randn(left.shape[1], tensor.shape[1], generator=draw)
        elif norms and name.endswith("norm2.weight"):
            state[name] = tensor + 0.01
    return state


def write_model(folder: Path, base: Path, state: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    save_file(state, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(("family", "layout"), [("wan", "diffusers"), ("wan", "comfyui"), ("hunyuan", "kohya")])
def test_a_difference_of_low_rank_is_extracted_completely(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, layout: str
) -> None:
    """Merged into the base model again, it gives the tuned model; the base may be in the original layout."""
    model = BUILDERS[family](tmp_path / "model")
    base = model / "transformer"
    tuned = write_model(tmp_path / "tuned", base, perturbed(base, RANK))
    if layout == "comfyui":
        export(base, tmp_path / "base.safetensors", "--layout", "original")
    other = tmp_path / "base.safetensors" if layout == "comfyui" else model
    output = tmp_path / "lora.safetensors"
    assert export(tuned, output, "--layout", layout, "--extract_lora", RANK, other) == 0
    printed = capsys.readouterr().out
    error = float(printed.split("error of rank 4: ")[1].split(" %")[0])
    assert error < 0.001 and "not in the LoRA" not in printed, printed
    export(output, tmp_path / "merged", "--layout", "diffusers", "--base", model)
    merged, wanted = originals.weights(tmp_path / "merged"), originals.weights(tuned)
    for name, tensor in wanted.items():
        assert torch.allclose(merged[name], tensor, rtol=0, atol=1e-4 * max(1.0, float(tensor.abs().max()))), name
    fields = header(output)
    assert fields["ss_network_dim"] == fields["ss_network_alpha"] == f"{RANK}"
    assert fields["modelspec.architecture"].endswith("/lora") and "ss_steps" not in fields


def test_the_error_is_that_of_the_best_approximation_and_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.build_wan_t2v(tmp_path / "model")
    base = model / "transformer"
    tuned = write_model(tmp_path / "tuned", base, perturbed(base, None, norms=True))
    before, after = originals.weights(base), originals.weights(tuned)
    whole = rest = 0.0
    for name, tensor in after.items():
        if tensor.ndim == 2 and name.endswith(".weight"):
            values = torch.linalg.svdvals((tensor - before[name]).double()).square()
            whole, rest = whole + float(values.sum()), rest + float(values[RANK:].sum())
    output = tmp_path / "lora.safetensors"
    export(tuned, output, "--layout", "diffusers", "--extract_lora", RANK, model, "--dtype", "bf16")
    printed = capsys.readouterr().out
    error = float(printed.split("error of rank 4: ")[1].split(" %")[0]) / 100
    assert error == pytest.approx(math.sqrt(rest / whole), rel=0.01)
    assert "note: not in the LoRA: 2 other tensors that differ" in printed and "blocks.0.norm2.weight" in printed
    state = load_file(output)
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert {len(tensor) for name, tensor in state.items() if ".lora_A." in name} == {RANK}


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 400), st.integers(1, 60), st.integers(1, 12), st.integers(0, 99))
def test_low_rank_is_optimal_for_every_shape(outputs: int, inputs: int, rank: int, seed: int) -> None:
    """Within one percent, also where the randomized decomposition is used; ranks above the matrix's add zeros."""
    draw = torch.Generator().manual_seed(seed)
    decay = torch.logspace(0, -3, inputs)  # singular values as of a trained difference
    matrix = torch.randn(outputs, inputs, generator=draw) * decay
    a, b = low_rank(matrix, rank)
    assert a.shape == (rank, inputs) and b.shape == (outputs, rank)
    best = torch.linalg.svdvals(matrix.double())[rank:].square().sum().sqrt()
    error = (matrix.double() - b.double() @ a.double()).norm()
    assert error <= 1.01 * best + 1e-5 * matrix.double().norm()
    again = low_rank(matrix, rank)
    assert torch.equal(again[0], a) and torch.equal(again[1], b)


def test_what_cannot_be_extracted_is_refused(tmp_path: Path) -> None:
    wan, hunyuan = tiny.build_wan_t2v(tmp_path / "wan"), tiny.build_hunyuan_t2v(tmp_path / "hunyuan")
    base, new = wan / "transformer", tmp_path / "new.safetensors"
    ask = ["--layout", "diffusers", "--extract_lora"]
    assert "has no linear layer that differs" in refusal(base, new, *ask, 4, wan)
    assert "is not the base of" in refusal(base, new, *ask, 4, hunyuan)
    assert "'0' is not a rank" in refusal(base, new, *ask, 0, wan)
    assert "'four' is not a rank" in refusal(base, new, *ask, "four", wan)
    assert "original is not a layout" in refusal(base, new, "--layout", "original", "--extract_lora", 4, wan)
    assert "does not exist" in refusal(base, new, *ask, 4, tmp_path / "nope")
    tuned = write_model(tmp_path / "tuned", base, perturbed(base, RANK))
    export(tuned, new, *ask, 4, wan)
    assert "is a LoRA already" in refusal(new, tmp_path / "again.safetensors", *ask, 4, wan)
    assert "exists" in refusal(tuned, new, *ask, 4, wan)
    shallow = tiny.build_wan_t2v(tmp_path / "shallow", layers=1)
    line = refusal(tuned, tmp_path / "other.safetensors", *ask, 4, shallow)
    assert "blocks.1" in line and "only" in line
    assert len(open_tensors(tuned)) > 0
