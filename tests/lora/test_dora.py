"""Tests of videox.lora.dora: DoRA and LoRA+ train, resume bit-identically, and diffusers loads what is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import forkserver
import pytest
import runs
import tiny
import torch
from launches import BackendRuns, exit_codes, output_of
from safetensors import safe_open
from safetensors.torch import load_file

from videox.errors import UserError
from videox.lora.adapters import (
    AdaptedTensors,
    Lora,
    add_adapters,
    base_name,
    initial_values,
    peft_name,
    public_name,
)
from videox.lora.dora import compute_norms_in_float32, initial_magnitudes
from videox.lora.kinds import lora_type
from videox.lora.targets import adapter_sizes, choose_targets
from videox.optim.build import loraplus_groups
from videox.weights.safetensors_io import StoredTensors

STEPS, RANK, ALPHA = 4, 4, 6.0
DORA = {"lora_rank": RANK, "lora_alpha": ALPHA, "lora_type": "dora", "loraplus_ratio": 4, "learning_rate": "1e-2"}
FILE = "pytorch_lora_weights.safetensors"


def dora_of(folder: Path) -> tuple[Lora, StoredTensors]:
    stored = StoredTensors(folder)
    targets = choose_targets(stored.shapes(), runs.train_script().LORA_TARGETS, ["attn1", "ffn"])
    return Lora(RANK, ALPHA, 0.0, targets, dora=True), stored


def expected_weights(base: dict[str, torch.Tensor], file: Path) -> dict[str, torch.Tensor]:
    """Return all weights with a DoRA applied, by the paper's formula in float64."""
    adapters = {name.removeprefix("transformer."): tensor.double() for name, tensor in load_file(file).items()}
    merged = {name: tensor.double() for name, tensor in base.items()}
    for target in {name.split(".lora_")[0] for name in adapters}:
        a, b = (adapters[f"{target}.lora_{half}.weight"] for half in "AB")
        adapted = merged[f"{target}.weight"] + ALPHA / RANK * b @ a
        magnitude = adapters[f"{target}.lora_magnitude_vector"] / adapted.norm(dim=1)
        merged[f"{target}.weight"] = magnitude[:, None] * adapted
    return merged


def test_new_adapters_do_not_change_the_output(tmp_path: Path) -> None:
    folder = tiny.build_wan_t2v(tmp_path) / "transformer"
    lora, stored = dora_of(folder)
    values = initial_values(lora, stored, 7)
    values |= initial_magnitudes(lora, stored, values, resumed=False)
    draw = torch.Generator().manual_seed(0)
    model = diffusers.WanTransformer3DModel.from_pretrained(folder)
    inputs = (torch.randn(1, 16, 1, 8, 8, generator=draw), torch.ones(1), torch.randn(1, 5, model.config.text_dim))
    before = model(*inputs).sample
    add_adapters(model, lora, values, device=torch.device("cpu"), dtype=torch.float32)
    compute_norms_in_float32(model)
    assert torch.allclose(model(*inputs).sample, before, atol=1e-5)
    names = dict(model.named_parameters())
    assert {name for name, parameter in names.items() if parameter.requires_grad} == set(values)
    assert sum(adapter_sizes(stored.shapes(), lora.targets, RANK, dora=True).values()) == sum(
        value.numel() for value in values.values()
    )
    adapted = AdaptedTensors(stored, values)
    for name, parameter in names.items():
        assert peft_name(public_name(name)) == name and adapted.shape(name) == tuple(parameter.shape)
        assert torch.equal(adapted[name], parameter) and (name in values or base_name(name) in stored)
    resumed = initial_magnitudes(lora, stored, values, resumed=True)
    assert {name: tensor.shape for name, tensor in resumed.items()} == {
        name: tensor.shape for name, tensor in values.items() if "magnitude" in name
    }


def test_a_lora_becomes_a_dora_with_the_same_output(tmp_path: Path) -> None:
    lora, stored = dora_of(tiny.build_wan_t2v(tmp_path) / "transformer")
    values = initial_values(lora, stored, 7)
    values = {
        name: torch.randn(value.shape, generator=torch.Generator().manual_seed(1)) for name, value in values.items()
    }
    magnitudes = initial_magnitudes(lora, stored, values, resumed=False)
    for target in lora.targets:
        a, b = (values[peft_name(f"{target}.lora_{half}.weight")] for half in "AB")
        norm = (stored[f"{target}.weight"].double() + lora.scale * b.double() @ a.double()).norm(dim=1)
        assert torch.allclose(magnitudes[peft_name(f"{target}.lora_magnitude_vector")].double(), norm, rtol=1e-5)


def test_bfloat16_weights_have_float32_norms(tmp_path: Path) -> None:
    lora, stored = dora_of(tiny.build_wan_t2v(tmp_path) / "transformer")
    values = initial_values(lora, stored, 7)
    values |= initial_magnitudes(lora, stored, values, resumed=False)
    model = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "transformer", torch_dtype=torch.bfloat16)
    add_adapters(model, lora, values, device=torch.device("cpu"), dtype=torch.float32)
    layer = model.blocks[0].attn1.to_q
    inputs = torch.randn(3, layer.in_features, dtype=torch.bfloat16)

    def difference() -> float:
        with torch.autocast("cpu", torch.bfloat16):
            return float((layer(inputs).float() - layer.base_layer(inputs).float()).abs().max())

    compute_norms_in_float32(model)
    assert difference() < 1e-2
    dora_layer = layer.lora_magnitude_vector["default"]
    norms = dora_layer.get_weight_norm(layer.base_layer.weight, torch.zeros_like(layer.base_layer.weight), scaling=1.0)
    assert norms.dtype is torch.float32
    assert torch.allclose(norms, layer.base_layer.weight.double().norm(dim=1).float(), rtol=1e-6)


def test_loraplus_has_a_group_of_b_matrices() -> None:
    parameters = {
        name: torch.nn.Parameter(torch.zeros(2, 2))
        for name in ("x.lora_A.default.weight", "x.lora_B.default.weight", "x.lora_magnitude_vector.default.weight")
    }
    a, b, magnitude = parameters.values()
    assert loraplus_groups(parameters, list(parameters), 1) == [{"params": [a, b, magnitude], "rate_factor": 1.0}]
    groups = loraplus_groups(parameters, list(parameters), 16.0)
    assert groups == [{"params": [a, magnitude], "rate_factor": 1.0}, {"params": [b], "rate_factor": 16.0}]


def test_other_adapters_are_refused_by_name() -> None:
    assert [lora_type(name) for name in ("lora", "dora")] == ["lora", "dora"]
    for name, shown in (("lokr", "LoKr"), ("LoHa", "LoHa"), ("lyra", "'lyra' is not known")):
        with pytest.raises(UserError, match=f"--lora_type: {shown}.*Fix: use lora or dora"):
            lora_type(name)


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> BackendRuns:
    return BackendRuns(tmp_path_factory.mktemp("wan"), "wan2.1 normal", STEPS, **DORA, export_dtype="fp32",
                       use_ema=True, export_layouts=["merged"])  # fmt: skip


def check_files(wan: BackendRuns, folder: Path) -> None:
    """Check that diffusers and the merged export compute the paper's formula with the adapters of a finished run."""
    base = runs.read_weights(wan.model / "transformer")
    expected = expected_weights(base, folder / FILE)
    assert sum(not torch.allclose(expected[name].float(), base[name], atol=1e-4) for name in base) == 20  # of 2 blocks
    merged = runs.read_weights(folder / "transformer_merged")
    assert merged.keys() == base.keys()
    assert all(torch.allclose(merged[name].double(), expected[name], atol=1e-6) for name in merged)
    with safe_open(folder / FILE, "pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["transformer.use_dora"] is True
    model = diffusers.WanTransformer3DModel.from_pretrained(wan.model / "transformer")
    others = dict.fromkeys({"tokenizer", "text_encoder", "vae", "transformer_2"})
    pipeline = diffusers.WanPipeline.from_pretrained(wan.model, **others, transformer=model)
    pipeline.load_lora_weights(folder)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    fused = model.state_dict()
    assert fused.keys() == base.keys()
    assert all(torch.allclose(fused[name].double(), expected[name], atol=1e-5) for name in fused)


@pytest.mark.slow
def test_diffusers_and_the_merged_model_equal_the_formula(wan: BackendRuns) -> None:
    check_files(wan, wan.baseline)
    for folder in (wan.baseline / f"checkpoint-{STEPS}", wan.baseline / f"checkpoint-{STEPS}" / "transformer_ema"):
        assert any("lora_magnitude_vector" in name for name in load_file(folder / FILE))


@pytest.mark.slow
def test_resume_is_bit_identical(wan: BackendRuns, tmp_path: Path) -> None:
    folder = shutil.copytree(wan.baseline, tmp_path / "run")
    flags = {"gradient_accumulation_steps": 2, "resume_from_checkpoint": folder / "checkpoint-2"}
    outcome = runs.train(wan.flags(folder, **flags))
    assert outcome.code == 0, outcome.stderr
    assert "DoRA        rank 4, alpha 6" in outcome.stdout and "B learns 4 times as fast as A" in outcome.stdout
    assert forkserver.read_steps(folder) == forkserver.read_steps(wan.baseline)
    for name in (f"checkpoint-4/{FILE}", f"checkpoint-4/transformer_ema/{FILE}"):
        assert (folder / name).read_bytes() == (wan.baseline / name).read_bytes(), name
    for name in (FILE, f"transformer_ema/{FILE}"):  # their headers have the name of the run's folder
        actual, expected = load_file(folder / name), load_file(wan.baseline / name)
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[key], expected[key]) for key in expected), name
    for change, message in (
        ({"lora_type": "lora"}, "--lora_type: lora, checkpoint-2 is a dora. Fix: pass --lora_type dora"),
        ({"loraplus_ratio": 8}, "--loraplus_ratio: 8, checkpoint-2 has 4"),
        ({"export_layouts": ["comfyui"]}, "--export_layouts: comfyui: a DoRA is written for diffusers, or merged"),
    ):
        outcome = runs.train(wan.flags(folder, **flags, **change))
        assert outcome.code != 0 and message in outcome.stderr, outcome.stderr


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["plain", "ddp", "zero2", "fsdp1", "fsdp2"])
def test_every_backend_trains_saves_and_resumes(wan: BackendRuns, tmp_path: Path, backend: str) -> None:
    folder, processes = tmp_path / "run", 1 if backend == "plain" else 2
    flags = {"gradient_accumulation_steps": 2 // processes}
    ranks = wan.run_ranks(backend, folder, processes, **flags)
    assert exit_codes(ranks) == [0] * processes, output_of(ranks)
    actual, expected = forkserver.read_steps(folder), forkserver.read_steps(wan.baseline)
    assert [line["loss"] for line in actual] == pytest.approx([line["loss"] for line in expected], abs=0.02)
    assert [line["grad_norm"] for line in actual] == pytest.approx([line["grad_norm"] for line in expected], rel=0.05)
    base = runs.read_weights(wan.model / "transformer")
    changes = [
        torch.cat([(t - base[n]).flatten() for n, t in expected_weights(base, run / f"checkpoint-4/{FILE}").items()])
        for run in (folder, wan.baseline)
    ]
    assert torch.nn.functional.cosine_similarity(*changes, dim=0) > 0.97
    check_files(wan, folder)
    last, half = (folder / f"checkpoint-{STEPS}" / FILE).read_bytes(), folder / f"checkpoint-{STEPS // 2}"
    ranks = wan.run_ranks(backend, folder, processes, resume_from_checkpoint=half, **flags)
    assert exit_codes(ranks) == [0] * processes, output_of(ranks)
    assert forkserver.read_steps(folder) == actual
    assert (folder / f"checkpoint-{STEPS}" / FILE).read_bytes() == last


@pytest.mark.slow
def test_zero3_is_refused_before_weights_are_loaded(wan: BackendRuns, tmp_path: Path) -> None:
    ranks = wan.run_ranks("zero3", tmp_path / "run", 1)
    assert "--lora_type dora: peft reads a layer's weights after ZeRO-3 has released them" in ranks[0].error_line()
