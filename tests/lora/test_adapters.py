"""Tests of videox.lora: every backend trains only the adapters, and other loaders read the files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import forkserver
import pytest
import runs
import tiny
import torch
from launches import MODEL_BUILDERS, TRANSFORMER_CLASSES, BackendRuns, exit_codes, output_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader

import videox.lora.adapters
from videox.errors import UserError
from videox.lora.adapters import (
    AdaptedTensors,
    Lora,
    base_name,
    initial_values,
    peft_name,
    public_name,
)
from videox.lora.targets import choose_targets
from videox.run.checkpoint import verify
from videox.weights.deepspeed_reader import read_zero
from videox.weights.safetensors_io import StoredTensors

STEPS, RANK, ALPHA = 4, 4, 6.0
LORA = {"lora_rank": RANK, "lora_alpha": ALPHA, "learning_rate": "1e-2"}
FILE = "pytorch_lora_weights.safetensors"
PIPELINES = {
    "wan2.1 normal": diffusers.WanPipeline,
    "wan2.1 i2v": diffusers.WanImageToVideoPipeline,
    "hunyuanvideo normal": diffusers.HunyuanVideoPipeline,
}
WAN_LAYERS = (
    *(f"attn{n}.{name}" for n in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")), "ffn.net.0.proj", "ffn.net.2",
)  # fmt: skip
HUNYUAN_LAYERS = {
    "transformer_blocks": (
        *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")),
        *(f"attn.add_{name}_proj" for name in "qkv"),
        *(f"{name}.net.{layer}" for name in ("ff", "ff_context") for layer in ("0.proj", "2")),
    ),
    "single_transformer_blocks": (*(f"attn.to_{name}" for name in "qkv"), "proj_mlp", "proj_out"),
}
EXPECTED = {  # the models have two blocks of each kind
    "wan2.1 normal": {f"blocks.{n}.{layer}" for n in (0, 1) for layer in WAN_LAYERS},
    "wan2.1 i2v": {
        f"blocks.{n}.{layer}" for n in (0, 1) for layer in (*WAN_LAYERS, "attn2.add_k_proj", "attn2.add_v_proj")
    },
    "hunyuanvideo normal": {
        f"{blocks}.{n}.{layer}" for blocks, layers in HUNYUAN_LAYERS.items() for n in (0, 1) for layer in layers
    },
}


# ------------------------------------------------------------------------------------------------------ target layers


def family_targets(kind: str) -> dict[str, Sequence[str]]:
    return runs.train_script(kind.split()[0]).LORA_TARGETS


@pytest.mark.parametrize("kind", EXPECTED)
def test_default_targets_are_attention_and_feed_forward_of_every_block(tmp_path: Path, kind: str) -> None:
    stored = StoredTensors(MODEL_BUILDERS[kind](tmp_path) / "transformer")
    actual = choose_targets(stored.shapes(), family_targets(kind), None)
    assert set(actual) == EXPECTED[kind] and len(actual) == len(set(actual))
    everywhere = choose_targets(stored.shapes(), family_targets(kind), ["to_q"])
    assert {name for name in everywhere if name.startswith("context_embedder")} == (
        set() if kind.startswith("wan") else {"context_embedder.token_refiner.refiner_blocks.0.attn.to_q"}
    )


def test_a_pattern_without_a_match_is_an_error(tmp_path: Path) -> None:
    stored = StoredTensors(tiny.build_wan_t2v(tmp_path) / "transformer")
    with pytest.raises(
        UserError, match=r"--lora_target_modules: 'to_qq' matches no linear layer\. Fix: try to_q"
    ) as no:
        choose_targets(stored.shapes(), family_targets("wan2.1 normal"), ["attn1", "to_qq"])
    assert no.value.exit_code == 2
    with pytest.raises(UserError, match="matches no linear layer"):
        choose_targets(stored.shapes(), family_targets("wan2.1 normal"), ["o_q"])  # not a complete component of a name
    with pytest.raises(UserError, match="norm2"):  # a module without a linear layer
        choose_targets(stored.shapes(), family_targets("wan2.1 normal"), ["norm2"])


def test_a_new_adapter_does_not_change_the_output_and_is_drawn_by_key(tmp_path: Path) -> None:
    folder = tiny.build_wan_t2v(tmp_path) / "transformer"
    stored, draw = StoredTensors(folder), torch.Generator().manual_seed(0)
    lora = Lora(RANK, ALPHA, 0.0, choose_targets(stored.shapes(), family_targets("wan2.1 normal"), None))
    values = initial_values(lora, stored, 7)
    resumed, other = initial_values(lora, stored, 7), initial_values(lora, stored, 8)
    assert all(torch.equal(resumed[name], value) for name, value in values.items())
    for name, value in values.items():
        bound = value.shape[1] ** -0.5
        assert not value.any() if ".lora_B." in name else 0.5 * bound < value.abs().max() <= bound
        assert torch.equal(other[name], value) is (".lora_B." in name)
    inputs = (torch.randn(1, 16, 1, 8, 8, generator=draw), torch.ones(1), torch.randn(1, 5, 16, generator=draw))
    model = diffusers.WanTransformer3DModel.from_pretrained(folder)
    inputs = (*inputs[:2], torch.randn(1, 5, model.config.text_dim, generator=draw))
    before = model(*inputs).sample
    videox.lora.adapters.add_adapters(model, lora, values, device=torch.device("cpu"), dtype=torch.float32)
    assert torch.equal(model(*inputs).sample, before)
    names = dict(model.named_parameters())
    assert {name for name, parameter in names.items() if parameter.requires_grad} == set(values)
    adapted = AdaptedTensors(stored, values)
    for name, parameter in names.items():
        assert peft_name(public_name(name)) == name and adapted.shape(name) == tuple(parameter.shape)
        assert torch.equal(adapted[name], parameter) and (name in values or base_name(name) in stored)
    assert len(list(adapted)) == len(adapted) == len(names)


# ------------------------------------------------------------------------------------------------------------ loading


def adapters(path: Path) -> dict[str, torch.Tensor]:
    """Return a file's tensors by public name, without the prefix."""
    return {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}


def lora_updates(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return alpha / rank * B A in float32, by target."""
    targets = {name.split(".lora_")[0] for name in tensors}
    halves = {t: [tensors[f"{t}.lora_{half}.weight"].float() for half in "BA"] for t in sorted(targets)}
    return {target: ALPHA / RANK * b @ a for target, (b, a) in halves.items()}


def fused_transformer(backend_runs: BackendRuns, folder: Path) -> Any:
    """Return diffusers' transformer after the family's pipeline has fused a LoRA into it."""
    model = getattr(diffusers, TRANSFORMER_CLASSES[backend_runs.family]).from_pretrained(
        backend_runs.model / "transformer"
    )
    pipeline_class = PIPELINES[backend_runs.kind]
    others = dict.fromkeys({*pipeline_class._get_signature_keys(pipeline_class)[0]} - {"transformer", "scheduler"})
    pipeline = pipeline_class.from_pretrained(backend_runs.model, **others, transformer=model)
    pipeline.load_lora_weights(folder)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    return model


def check_loads(backend_runs: BackendRuns, folder: Path) -> None:
    """Check that diffusers computes W + alpha / rank * B A for adapted weights and keeps all other weights of the
    base.
    """
    base, update = runs.read_weights(backend_runs.model / "transformer"), lora_updates(adapters(folder / FILE))
    assert set(update) == EXPECTED[backend_runs.kind]
    assert all(delta.abs().max() > 1e-4 for delta in update.values())
    actual = fused_transformer(backend_runs, folder).state_dict()
    assert actual.keys() == base.keys()
    for name, tensor in actual.items():
        expected = base[name] + update.get(name.removesuffix(".weight"), 0)
        assert torch.allclose(tensor, expected, rtol=0, atol=1e-5), name


def check_files(folder: Path) -> None:
    """Check the adapters of a finished run and of its checkpoints."""
    last = adapters(folder / f"checkpoint-{STEPS}" / FILE)
    assert {tensor.dtype for tensor in last.values()} == {torch.float32}
    exported = adapters(folder / FILE)
    assert all(torch.equal(last[name].bfloat16(), tensor) for name, tensor in exported.items())
    assert exported.keys() == last.keys()
    with safe_open(folder / FILE, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (metadata["transformer.r"], metadata["transformer.lora_alpha"]) == (RANK, ALPHA)
    assert not (folder / "transformer").exists()
    for step in (STEPS // 2, STEPS):
        checkpoint = folder / f"checkpoint-{step}"
        assert verify(checkpoint, hashes=True) == []
        assert not (checkpoint / "transformer").exists()
        assert names_in_backend_files(checkpoint) <= set(last), "a checkpoint contains frozen weights"


def names_in_backend_files(checkpoint: Path) -> set[str]:
    """Return the names of the weights in the backend's own checkpoint files."""
    if (checkpoint / "pytorch_model").is_dir():
        names = {tensor.name for tensor in read_zero(checkpoint / "pytorch_model").tensors}
    elif (checkpoint / "pytorch_model_fsdp_0").is_dir():
        keys = FileSystemReader(checkpoint / "pytorch_model_fsdp_0").read_metadata().state_dict_metadata
        names = {name.removeprefix("model.") for name in keys}
    else:
        names = {name.rpartition("/")[0] for name in load_file(checkpoint / "optimizer" / "optimizer.safetensors")}
    return {public_name(name) for name in names}


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> BackendRuns:
    return BackendRuns(tmp_path_factory.mktemp("wan"), "wan2.1 normal", STEPS, **LORA)


def test_one_process_trains_only_adapters_and_diffusers_loads_them(wan: BackendRuns) -> None:
    assert [line["step"] for line in forkserver.read_steps(wan.baseline)] == [1, 2, 3, 4]
    check_files(wan.baseline)
    check_loads(wan, wan.baseline)
    check_loads(wan, wan.baseline / f"checkpoint-{STEPS}")


def test_lora_resume_is_bit_identical_with_dropout_and_ema(wan: BackendRuns, tmp_path: Path) -> None:
    flags = {"lora_dropout": 0.3, "use_ema": True, "gradient_accumulation_steps": 2}
    before = runs.train(wan.flags(tmp_path / "run", **flags))
    assert before.code == 0, before.stderr
    unbroken = shutil.copytree(tmp_path / "run", tmp_path / "unbroken")
    resumed = runs.train(
        wan.flags(tmp_path / "run", resume_from_checkpoint=tmp_path / "run" / "checkpoint-2", **flags)
    )
    assert resumed.code == 0, resumed.stderr
    assert forkserver.read_steps(tmp_path / "run") == forkserver.read_steps(unbroken)
    for name in (FILE, f"checkpoint-4/{FILE}", f"checkpoint-4/transformer_ema/{FILE}", f"transformer_ema/{FILE}"):
        assert (tmp_path / "run" / name).read_bytes() == (unbroken / name).read_bytes(), name
    assert before.losses != [
        line["loss"] for line in forkserver.read_steps(wan.baseline)
    ]  # dropout changes the losses
    average, weights = (adapters(unbroken / "checkpoint-4" / name / FILE) for name in ("transformer_ema", ""))
    assert not all(torch.equal(average[name], weights[name]) for name in weights)


def error_line(wan: BackendRuns, folder: Path, **lora_updates: object) -> str:
    outcome = runs.train(wan.flags(folder, **lora_updates))
    assert outcome.code != 0 and outcome.stderr.count("\n") == 1, outcome.stderr
    return outcome.stderr


def test_changed_settings_are_an_error_on_resume(wan: BackendRuns, tmp_path: Path) -> None:
    folder = shutil.copytree(wan.baseline, tmp_path / "run")
    flags = {"resume_from_checkpoint": folder / "checkpoint-2", "gradient_accumulation_steps": 2}
    line = error_line(wan, folder, **flags, lora_alpha=8)
    assert "--lora_alpha: 8, checkpoint-2 has 6.0" in line
    line = error_line(wan, folder, **flags, optimizer="came")
    assert "--optimizer: came, but checkpoint-2 was saved with adamw" in line
    line = error_line(wan, folder, **flags, lora_rank=8)
    assert "checkpoint-2 is from a LoRA of rank 4, this run is a LoRA of rank 8. Fix: pass --lora_rank 4" in line
    line = error_line(wan, folder, **flags, lora_rank=None, lora_alpha=None)
    assert "checkpoint-2 is from a LoRA of rank 4, this run is full fine-tuning" in line
    line = error_line(wan, folder, **flags, lora_target_modules=["attn1"])
    assert "blocks.0.attn2.to_k differs" in line
    other = shutil.copytree(wan.model / "transformer", tmp_path / "other")
    weights = runs.read_weights(other)
    weights["blocks.1.ffn.net.2.weight"] += 1e-3
    save_file(weights, other / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    line = error_line(wan, folder, **flags, transformer_path=other)
    assert "checkpoint-2 was trained on another base model" in line


def test_a_lora_starts_from_another_with_any_alpha(wan: BackendRuns, tmp_path: Path) -> None:
    flags = {
        "max_train_steps": 1,
        "lr_warmup_steps": 1,
        "lora_alpha": 16,
        "export_dtype": "fp32",
    }  # the learning rate is 0
    for source in (wan.baseline / f"checkpoint-{STEPS}", wan.baseline / f"checkpoint-{STEPS}" / FILE):
        folder = tmp_path / f"from-{source.suffix}"
        outcome = runs.train(wan.flags(folder, init_lora_from=source, **flags))
        assert outcome.code == 0, outcome.stderr
        assert "starts from the LoRA" in outcome.stdout
        expected, actual = (
            lora_updates(adapters(wan.baseline / "checkpoint-4" / FILE)),
            lora_updates(adapters(folder / FILE)),
        )
        assert all(torch.allclose(actual[n] * (16 / ALPHA), w, rtol=1e-5, atol=1e-7) for n, w in expected.items())
    line = error_line(wan, tmp_path / "rank", init_lora_from=wan.baseline, lora_rank=2)
    assert "Fix: pass --lora_rank 4" in line
    line = error_line(wan, tmp_path / "layers", init_lora_from=wan.baseline, lora_target_modules=["attn1"])
    assert "tensors that this run does not" in line
    (tmp_path / "damaged.safetensors").write_bytes(b"no header of safetensors, and longer than eight bytes")
    (tmp_path / "pickled.pt").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    assert "damaged.safetensors is truncated or damaged" in error_line(
        wan, tmp_path / "damaged", init_lora_from=tmp_path / "damaged.safetensors"
    )
    assert "a pickle may contain code" in error_line(wan, tmp_path / "pickled", init_lora_from=tmp_path / "pickled.pt")
    line = error_line(wan, tmp_path / "none", init_lora_from=tmp_path)
    assert "cannot be read" in line


@pytest.mark.slow
def test_comfyui_export_has_the_same_update(wan: BackendRuns, tmp_path: Path) -> None:
    outcome = runs.train(wan.flags(tmp_path / "run", export_layouts=["comfyui"], export_dtype="fp32"))
    assert outcome.code == 0, outcome.stderr
    path = tmp_path / "run" / "pytorch_lora_weights_comfyui.safetensors"
    state = diffusers.WanPipeline.lora_state_dict(path.parent, weight_name=path.name)
    updates = lora_updates(adapters(tmp_path / "run" / FILE))
    for target, update in updates.items():
        a, b = (state[f"transformer.{target}.lora_{half}.weight"] for half in "AB")
        assert torch.allclose(b @ a, update, atol=1e-6), (
            target
        )  # diffusers' converter has multiplied alpha into the tensors
    resumed = runs.train(wan.flags(tmp_path / "again", init_lora_from=path, max_train_steps=1, export_dtype="fp32"))
    assert resumed.code == 0, resumed.stderr


def test_flag_conflicts_of_lora_are_errors(wan: BackendRuns, tmp_path: Path) -> None:
    for flag, value in (
        ("lora_alpha", 4),
        ("lora_target_modules", ["attn1"]),
        ("lora_dropout", 0.1),
        ("init_lora_from", tmp_path),
    ):
        none = {"lora_rank": None, "lora_alpha": None, flag: value}
        assert f"--{flag}: there is no LoRA without --lora_rank" in error_line(wan, tmp_path / "none", **none)
    assert "a LoRA run trains its adapters only" in error_line(wan, tmp_path / "none", trainable_modules=["attn1"])
    assert "--save_whole_weights" in error_line(wan, tmp_path / "none", save_whole_weights=True)
    assert "--export_layouts" in error_line(wan, tmp_path / "none", export_layouts=["original"])


# ------------------------------------------------------------------------------------------------------ every backend


@pytest.fixture(scope="module", params=PIPELINES)
def backend_runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BackendRuns:
    return BackendRuns(tmp_path_factory.mktemp("ground"), request.param, STEPS, **LORA)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["plain", "ddp", "zero2", "zero3", "fsdp1", "fsdp2"])
def test_every_backend_trains_saves_and_resumes_adapters(
    backend_runs: BackendRuns, tmp_path: Path, backend: str
) -> None:
    folder, processes = tmp_path / "run", 1 if backend == "plain" else 2
    flags = {"gradient_accumulation_steps": 2 // processes}
    ranks = backend_runs.run_ranks(backend, folder, processes, lora_dropout=0, **flags)
    assert exit_codes(ranks) == [0] * processes, output_of(ranks)
    actual, expected = forkserver.read_steps(folder), forkserver.read_steps(backend_runs.baseline)
    assert [line["rows"] for line in actual] == [line["rows"] for line in expected]
    assert [line["loss"] for line in actual] == pytest.approx([line["loss"] for line in expected], abs=0.02)
    assert [line["grad_norm"] for line in actual] == pytest.approx([line["grad_norm"] for line in expected], rel=0.03)
    trained, single = (
        lora_updates(adapters(run / f"checkpoint-{STEPS}" / FILE)) for run in (folder, backend_runs.baseline)
    )
    a, b = (torch.cat([update.flatten() for update in part.values()]) for part in (trained, single))
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.97
    assert float(a.norm() / b.norm()) == pytest.approx(1, abs=0.05)
    check_files(folder)
    check_loads(backend_runs, folder)
    last = (folder / f"checkpoint-{STEPS}" / FILE).read_bytes()
    half = folder / f"checkpoint-{STEPS // 2}"
    ranks = backend_runs.run_ranks(backend, folder, processes, resume_from_checkpoint=half, **flags)
    assert exit_codes(ranks) == [0] * processes, output_of(ranks)
    (superseded,) = folder.glob("superseded-*")
    assert forkserver.read_steps(superseded) == [
        line for line in forkserver.read_steps(folder) if line["step"] > STEPS // 2
    ]
    assert (folder / f"checkpoint-{STEPS}" / FILE).read_bytes() == last


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", "zero2", "zero3", "fsdp1", "fsdp2"])
def test_lora_with_dropout_ema_samples_and_another_world_size(wan: BackendRuns, tmp_path: Path, backend: str) -> None:
    flags = {"lora_dropout": 0.2, "use_ema": True, "validate_ema": True, "validation_prompts": ["a red fox"]}
    folder = tmp_path / "run"
    ranks = wan.run_ranks(backend, folder, **flags)
    assert exit_codes(ranks) == [0, 0], output_of(ranks)
    assert len(list((folder / "samples").glob("*.mp4"))) == 2
    name = f"checkpoint-{STEPS}/transformer_ema/{FILE}"
    average, steps = adapters(folder / name), forkserver.read_steps(folder)
    half = folder / f"checkpoint-{STEPS // 2}"
    ranks = wan.run_ranks(backend, folder, resume_from_checkpoint=half, **flags)
    assert exit_codes(ranks) == [0, 0], output_of(ranks)
    assert forkserver.read_steps(folder) == steps
    assert all(torch.equal(average[key], tensor) for key, tensor in adapters(folder / name).items())
    # a single process under DDP is the backend "plain"
    resume_backend = "plain" if backend == "ddp" else backend
    single = wan.run_ranks(
        resume_backend, folder, 1, resume_from_checkpoint=half, gradient_accumulation_steps=2, **flags
    )
    assert exit_codes(single) == [0], output_of(single)
    actual = [line["loss"] for line in forkserver.read_steps(folder)]
    assert actual == pytest.approx([line["loss"] for line in steps], abs=0.02)
    check_loads(wan, folder)
