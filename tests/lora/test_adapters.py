"""Serves who trains a LoRA: small files that every loader takes, on a base that nothing changes, in every backend."""

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
    choose_targets,
    initial_values,
    peft_name,
    public_name,
)
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
EXPECTED = {  # of two blocks of each kind
    "wan2.1 normal": {f"blocks.{n}.{layer}" for n in (0, 1) for layer in WAN_LAYERS},
    "wan2.1 i2v": {
        f"blocks.{n}.{layer}" for n in (0, 1) for layer in (*WAN_LAYERS, "attn2.add_k_proj", "attn2.add_v_proj")
    },
    "hunyuanvideo normal": {
        f"{blocks}.{n}.{layer}" for blocks, layers in HUNYUAN_LAYERS.items() for n in (0, 1) for layer in layers
    },
}


# ----------------------------------------------------------------------------------------------------- what is adapted


def family_targets(kind: str) -> dict[str, Sequence[str]]:
    return runs.train_script(kind.split()[0]).ADAPTED


@pytest.mark.parametrize("kind", EXPECTED)
def test_the_defaults_are_attention_and_feed_forward_of_every_block(tmp_path: Path, kind: str) -> None:
    stored = StoredTensors(MODEL_BUILDERS[kind](tmp_path) / "transformer")
    found = choose_targets(stored.shapes(), family_targets(kind), None)
    assert set(found) == EXPECTED[kind] and len(found) == len(set(found))
    everything = choose_targets(stored.shapes(), family_targets(kind), ["to_q"])
    assert {name for name in everything if name.startswith("context_embedder")} == (
        set() if kind.startswith("wan") else {"context_embedder.token_refiner.refiner_blocks.0.attn.to_q"}
    )


def test_a_pattern_that_matches_nothing_is_named(tmp_path: Path) -> None:
    stored = StoredTensors(tiny.build_wan_t2v(tmp_path) / "transformer")
    with pytest.raises(
        UserError, match=r"--lora_target_modules: 'to_qq' matches no linear layer\. Fix: try to_q"
    ) as no:
        choose_targets(stored.shapes(), family_targets("wan2.1 normal"), ["attn1", "to_qq"])
    assert no.value.exit_code == 2
    with pytest.raises(UserError, match="matches no linear layer"):
        choose_targets(stored.shapes(), family_targets("wan2.1 normal"), ["o_q"])  # no part of a name
    with pytest.raises(UserError, match="norm2"):  # a module without a linear layer
        choose_targets(stored.shapes(), family_targets("wan2.1 normal"), ["norm2"])


def test_a_new_adapter_changes_nothing_and_is_drawn_by_key(tmp_path: Path) -> None:
    folder = tiny.build_wan_t2v(tmp_path) / "transformer"
    stored, draw = StoredTensors(folder), torch.Generator().manual_seed(0)
    lora = Lora(RANK, ALPHA, 0.0, choose_targets(stored.shapes(), family_targets("wan2.1 normal"), None))
    values = initial_values(lora, stored, 7)
    again, other = initial_values(lora, stored, 7), initial_values(lora, stored, 8)
    assert all(torch.equal(again[name], value) for name, value in values.items())
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


# ------------------------------------------------------------------------------------------------------- loaded again


def adapters(path: Path) -> dict[str, torch.Tensor]:
    """Returns a file's tensors by public name, without its prefix."""
    return {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}


def changes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns alpha / rank * B A in float32, by target."""
    targets = {name.split(".lora_")[0] for name in tensors}
    halves = {t: [tensors[f"{t}.lora_{half}.weight"].float() for half in "BA"] for t in sorted(targets)}
    return {target: ALPHA / RANK * b @ a for target, (b, a) in halves.items()}


def loaded(ground: BackendRuns, folder: Path) -> Any:
    """Returns diffusers' transformer after the family's pipeline has loaded a LoRA into it."""
    model = getattr(diffusers, TRANSFORMER_CLASSES[ground.family]).from_pretrained(ground.model / "transformer")
    pipeline_class = PIPELINES[ground.kind]
    others = dict.fromkeys({*pipeline_class._get_signature_keys(pipeline_class)[0]} - {"transformer", "scheduler"})
    pipeline = pipeline_class.from_pretrained(ground.model, **others, transformer=model)
    pipeline.load_lora_weights(folder)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    return model


def check_loads(ground: BackendRuns, folder: Path) -> None:
    """Checks that diffusers makes W + alpha / rank * B A of a LoRA, and of everything else what the base has."""
    base, change = runs.read_weights(ground.model / "transformer"), changes(adapters(folder / FILE))
    assert set(change) == EXPECTED[ground.kind]
    assert all(delta.abs().max() > 1e-4 for delta in change.values())
    found = loaded(ground, folder).state_dict()
    assert found.keys() == base.keys()
    for name, tensor in found.items():
        wanted = base[name] + change.get(name.removesuffix(".weight"), 0)
        assert torch.allclose(tensor, wanted, rtol=0, atol=1e-5), name


def check_files(folder: Path) -> None:
    """Checks the adapters of a finished run and of its checkpoints."""
    last = adapters(folder / f"checkpoint-{STEPS}" / FILE)
    assert {tensor.dtype for tensor in last.values()} == {torch.float32}
    exported = adapters(folder / FILE)
    assert all(torch.equal(last[name].bfloat16(), tensor) for name, tensor in exported.items())
    assert exported.keys() == last.keys()
    with safe_open(folder / FILE, "pt") as file:
        said = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (said["transformer.r"], said["transformer.lora_alpha"]) == (RANK, ALPHA)
    assert not (folder / "transformer").exists()
    for step in (STEPS // 2, STEPS):
        checkpoint = folder / f"checkpoint-{step}"
        assert verify(checkpoint, hashes=True) == []
        assert not (checkpoint / "transformer").exists()
        assert kept_elsewhere(checkpoint) <= set(last), "a checkpoint holds frozen weights"


def kept_elsewhere(checkpoint: Path) -> set[str]:
    """Returns the names of the weights in the backend's own files."""
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


def test_one_process_trains_adapters_alone_and_diffusers_loads_them(wan: BackendRuns) -> None:
    assert [line["step"] for line in forkserver.read_steps(wan.baseline)] == [1, 2, 3, 4]
    check_files(wan.baseline)
    check_loads(wan, wan.baseline)
    check_loads(wan, wan.baseline / f"checkpoint-{STEPS}")


def test_a_resumed_lora_repeats_its_dropout_and_its_average(wan: BackendRuns, tmp_path: Path) -> None:
    asked = {"lora_dropout": 0.3, "use_ema": True, "gradient_accumulation_steps": 2}
    before = runs.train(wan.flags(tmp_path / "run", **asked))
    assert before.code == 0, before.stderr
    unbroken = shutil.copytree(tmp_path / "run", tmp_path / "unbroken")
    again = runs.train(wan.flags(tmp_path / "run", resume_from_checkpoint=tmp_path / "run" / "checkpoint-2", **asked))
    assert again.code == 0, again.stderr
    assert forkserver.read_steps(tmp_path / "run") == forkserver.read_steps(unbroken)
    for name in (FILE, f"checkpoint-4/{FILE}", f"checkpoint-4/transformer_ema/{FILE}", f"transformer_ema/{FILE}"):
        assert (tmp_path / "run" / name).read_bytes() == (unbroken / name).read_bytes(), name
    assert before.losses != [line["loss"] for line in forkserver.read_steps(wan.baseline)]  # dropout is in them
    average, weights = (adapters(unbroken / "checkpoint-4" / name / FILE) for name in ("transformer_ema", ""))
    assert not all(torch.equal(average[name], weights[name]) for name in weights)


def refused(wan: BackendRuns, folder: Path, **changes: object) -> str:
    outcome = runs.train(wan.flags(folder, **changes))
    assert outcome.code != 0 and outcome.stderr.count("\n") == 1, outcome.stderr
    return outcome.stderr


def test_what_would_change_a_resumed_lora_is_refused(wan: BackendRuns, tmp_path: Path) -> None:
    folder = shutil.copytree(wan.baseline, tmp_path / "run")
    asked = {"resume_from_checkpoint": folder / "checkpoint-2", "gradient_accumulation_steps": 2}
    line = refused(wan, folder, **asked, lora_alpha=8)
    assert "--lora_alpha: 8, checkpoint-2 has 6.0" in line
    line = refused(wan, folder, **asked, optimizer="came")
    assert "--optimizer: came, and checkpoint-2 was saved with adamw" in line
    line = refused(wan, folder, **asked, lora_rank=8)
    assert "checkpoint-2 is from a LoRA of rank 4, this run is a LoRA of rank 8. Fix: pass --lora_rank 4" in line
    line = refused(wan, folder, **asked, lora_rank=None, lora_alpha=None)
    assert "checkpoint-2 is from a LoRA of rank 4, this run is full fine-tuning" in line
    line = refused(wan, folder, **asked, lora_target_modules=["attn1"])
    assert "blocks.0.attn2.to_k differs" in line
    other = shutil.copytree(wan.model / "transformer", tmp_path / "other")
    weights = runs.read_weights(other)
    weights["blocks.1.ffn.net.2.weight"] += 1e-3
    save_file(weights, other / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    line = refused(wan, folder, **asked, transformer_path=other)
    assert "checkpoint-2 was trained on another base model" in line


def test_a_lora_begins_with_another_whatever_its_alpha(wan: BackendRuns, tmp_path: Path) -> None:
    asked = {"max_train_steps": 1, "lr_warmup_steps": 1, "lora_alpha": 16, "export_dtype": "fp32"}  # a rate of 0
    for source in (wan.baseline / f"checkpoint-{STEPS}", wan.baseline / f"checkpoint-{STEPS}" / FILE):
        folder = tmp_path / f"from-{source.suffix}"
        outcome = runs.train(wan.flags(folder, init_lora_from=source, **asked))
        assert outcome.code == 0, outcome.stderr
        assert "starts from the LoRA" in outcome.stdout
        wanted, found = changes(adapters(wan.baseline / "checkpoint-4" / FILE)), changes(adapters(folder / FILE))
        assert all(torch.allclose(found[n] * (16 / ALPHA), w, rtol=1e-5, atol=1e-7) for n, w in wanted.items())
    line = refused(wan, tmp_path / "rank", init_lora_from=wan.baseline, lora_rank=2)
    assert "Fix: pass --lora_rank 4" in line
    line = refused(wan, tmp_path / "layers", init_lora_from=wan.baseline, lora_target_modules=["attn1"])
    assert "tensors that this run does not" in line
    (tmp_path / "damaged.safetensors").write_bytes(b"no header of safetensors, and longer than eight bytes")
    (tmp_path / "pickled.pt").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    assert "damaged.safetensors cannot be read" in refused(
        wan, tmp_path / "damaged", init_lora_from=tmp_path / "damaged.safetensors"
    )
    assert "a pickle may contain code" in refused(wan, tmp_path / "pickled", init_lora_from=tmp_path / "pickled.pt")
    line = refused(wan, tmp_path / "none", init_lora_from=tmp_path)
    assert "cannot be read" in line


def test_what_else_comfyui_is_given_changes_the_same(wan: BackendRuns, tmp_path: Path) -> None:
    outcome = runs.train(wan.flags(tmp_path / "run", export_layouts=["comfyui"], export_dtype="fp32"))
    assert outcome.code == 0, outcome.stderr
    theirs = tmp_path / "run" / "pytorch_lora_weights_comfyui.safetensors"
    state = diffusers.WanPipeline.lora_state_dict(theirs.parent, weight_name=theirs.name)
    mine = changes(adapters(tmp_path / "run" / FILE))
    for target, change in mine.items():
        a, b = (state[f"transformer.{target}.lora_{half}.weight"] for half in "AB")
        assert torch.allclose(b @ a, change, atol=1e-6), target  # alpha is in its tensors
    again = runs.train(wan.flags(tmp_path / "again", init_lora_from=theirs, max_train_steps=1, export_dtype="fp32"))
    assert again.code == 0, again.stderr


def test_flags_that_a_lora_has_not_or_needs(wan: BackendRuns, tmp_path: Path) -> None:
    for flag, value in (
        ("lora_alpha", 4),
        ("lora_target_modules", ["attn1"]),
        ("lora_dropout", 0.1),
        ("init_lora_from", tmp_path),
    ):
        none = {"lora_rank": None, "lora_alpha": None, flag: value}
        assert f"--{flag}: there is no LoRA without --lora_rank" in refused(wan, tmp_path / "none", **none)
    assert "a LoRA trains its adapters alone" in refused(wan, tmp_path / "none", trainable_modules=["attn1"])
    assert "--save_whole_weights" in refused(wan, tmp_path / "none", save_whole_weights=True)
    assert "--export_layouts" in refused(wan, tmp_path / "none", export_layouts=["original"])


# ------------------------------------------------------------------------------------------------------ every backend


@pytest.fixture(scope="module", params=PIPELINES)
def ground(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BackendRuns:
    return BackendRuns(tmp_path_factory.mktemp("ground"), request.param, STEPS, **LORA)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["plain", "ddp", "zero2", "zero3", "fsdp1", "fsdp2"])
def test_every_backend_trains_keeps_and_resumes_adapters(ground: BackendRuns, tmp_path: Path, backend: str) -> None:
    folder, processes = tmp_path / "run", 1 if backend == "plain" else 2
    asked = {"gradient_accumulation_steps": 2 // processes}
    ranks = ground.run_ranks(backend, folder, processes, lora_dropout=0, **asked)
    assert exit_codes(ranks) == [0] * processes, output_of(ranks)
    found, wanted = forkserver.read_steps(folder), forkserver.read_steps(ground.baseline)
    assert [line["rows"] for line in found] == [line["rows"] for line in wanted]
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in wanted], abs=0.02)
    assert [line["grad_norm"] for line in found] == pytest.approx([line["grad_norm"] for line in wanted], rel=0.03)
    moved, alone = (changes(adapters(run / f"checkpoint-{STEPS}" / FILE)) for run in (folder, ground.baseline))
    a, b = (torch.cat([change.flatten() for change in part.values()]) for part in (moved, alone))
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.97
    assert float(a.norm() / b.norm()) == pytest.approx(1, abs=0.05)
    check_files(folder)
    check_loads(ground, folder)
    last = (folder / f"checkpoint-{STEPS}" / FILE).read_bytes()
    half = folder / f"checkpoint-{STEPS // 2}"
    ranks = ground.run_ranks(backend, folder, processes, resume_from_checkpoint=half, **asked)
    assert exit_codes(ranks) == [0] * processes, output_of(ranks)
    (superseded,) = folder.glob("superseded-*")
    assert forkserver.read_steps(superseded) == [line for line in forkserver.read_steps(folder) if line["step"] > STEPS // 2]
    assert (folder / f"checkpoint-{STEPS}" / FILE).read_bytes() == last


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", "zero2", "zero3", "fsdp1", "fsdp2"])
def test_an_adapter_has_dropout_average_samples_and_another_number_of_processes(
    wan: BackendRuns, tmp_path: Path, backend: str
) -> None:
    asked = {"lora_dropout": 0.2, "use_ema": True, "validate_ema": True, "validation_prompts": ["a red fox"]}
    folder = tmp_path / "run"
    ranks = wan.run_ranks(backend, folder, **asked)
    assert exit_codes(ranks) == [0, 0], output_of(ranks)
    assert len(list((folder / "samples").glob("*.mp4"))) == 2
    name = f"checkpoint-{STEPS}/transformer_ema/{FILE}"
    average, steps = adapters(folder / name), forkserver.read_steps(folder)
    half = folder / f"checkpoint-{STEPS // 2}"
    ranks = wan.run_ranks(backend, folder, resume_from_checkpoint=half, **asked)
    assert exit_codes(ranks) == [0, 0], output_of(ranks)
    assert forkserver.read_steps(folder) == steps
    assert all(torch.equal(average[key], tensor) for key, tensor in adapters(folder / name).items())
    # one process alone is not launched as several, and is of the same kind
    recipe = "plain" if backend == "ddp" else backend
    alone = wan.run_ranks(recipe, folder, 1, resume_from_checkpoint=half, gradient_accumulation_steps=2, **asked)
    assert exit_codes(alone) == [0], output_of(alone)
    found = [line["loss"] for line in forkserver.read_steps(folder)]
    assert found == pytest.approx([line["loss"] for line in steps], abs=0.02)
    check_loads(wan, folder)
