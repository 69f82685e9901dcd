"""Serves whoever trains a model larger than one process may hold: it is divided when it is made, and trains alike."""

from __future__ import annotations

import ctypes
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from math import prod
from pathlib import Path

import forkserver
import pytest
import torch
from accelerate import Accelerator
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from test_backends import variables
from torch import nn
from torch.distributed.tensor import DTensor

from videox.distributed.accelerator import backward, make_accelerator
from videox.engine.base import Engine
from videox.engine.fsdp import FsdpEngine
from videox.errors import MODEL, UserError
from videox.models.component import Component, load_whole
from videox.models.folder import has_not_finite, load_strictly
from videox.models.meta_init import is_divided, skeleton
from videox.models.transformer import load_transformer
from videox.optim.build import choose_trainable, make_optimizer, parameter_groups
from videox.weights.safetensors_io import StoredTensors, write_config

SIZES = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 32, "freq_dim": 256,
    "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32,
}  # fmt: skip
LARGE = {**SIZES, "num_attention_heads": 12, "attention_head_dim": 64, "ffn_dim": 3072, "num_layers": 11}
SPARE = 20_000_000  # bytes that a load may take beside what it keeps
MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
STEPS = 3
WORLD = 2


def write_transformer(folder: Path, sizes: dict, max_shard_size: str) -> Path:
    """Writes a float32 transformer in several shards, with values that bfloat16 cannot hold."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        WanTransformer3DModel(**sizes).save_pretrained(folder, max_shard_size=max_shard_size)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_transformer(tmp_path_factory.mktemp("small") / "transformer", SIZES, "40KB")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_transformer(tmp_path_factory.mktemp("large") / "transformer", LARGE, "150MB")


# -------------------------------------------------------------------------------------------- in the processes


def engine_of(accelerator: Accelerator, model: nn.Module, stored: StoredTensors | None, patterns: list[str]) -> Engine:
    full, half = choose_trainable(model, patterns, [])

    def optimizer(parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
        groups = parameter_groups(parameters, full, half)
        return make_optimizer(groups, learning_rate=1e-3, betas=(0.9, 0.999), weight_decay=0.01, epsilon=1e-8)

    if accelerator.state.deepspeed_plugin is None:
        return FsdpEngine(accelerator, model, model.blocks, optimizer, stored=stored)
    from videox.engine.deepspeed import DeepSpeedEngine

    settings = {"max_grad_norm": 0.05, "batch_size": 1, "micro_batches": 1, "output_dir": Path()}
    return DeepSpeedEngine(accelerator, model, optimizer, stored=stored, **settings)


def train_steps(accelerator: Accelerator, engine: Engine) -> list[str]:
    """Returns the losses of a few steps on this process's own samples, to the last bit."""
    random = torch.Generator().manual_seed(accelerator.process_index)
    losses = []
    for _ in range(STEPS):
        noisy, target = torch.randn(2, 1, 16, 2, 8, 8, generator=random)
        text, timestep = torch.randn(1, 7, 32, generator=random), 1000 * torch.rand(1, generator=random)
        loss = torch.nn.functional.mse_loss(engine.model(noisy, timestep, text, return_dict=False)[0], target)
        backward(accelerator, engine.model, loss / accelerator.num_processes)
        update = engine.update(loss=loss.detach(), empty=False, limit=lambda norm: torch.full_like(norm, 0.05))
        assert update.applied
        losses += [loss.item().hex(), update.grad_norm.item().hex()]
    return losses


def sizes_here(model: nn.Module) -> dict[str, list[int]]:
    """Returns [elements that the module itself holds, elements of this process's shard] of each parameter."""
    found = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            shard = parameter.to_local()
            found[name] = [shard.numel(), shard.untyped_storage().nbytes() // shard.itemsize]
        else:
            found[name] = [parameter.numel(), parameter.ds_tensor.numel()]
    return found


def anonymous() -> int:
    """Returns the bytes of this process's memory that no file backs."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Sampled:
    """The most anonymous memory that this process takes while it is entered, over what it had before; bytes."""

    def __enter__(self) -> Sampled:
        assert ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 131072)  # as MALLOC_MMAP_THRESHOLD_=131072 in the environment
        self.before, self.most, self._on = anonymous(), 0, True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while self._on:
            self.most = max(self.most, anonymous() - self.before)
            time.sleep(0.002)

    def __exit__(self, *raised: object) -> None:
        self._on = False
        self._thread.join()


@contextmanager
def nothing_loaded_whole() -> Iterator[None]:
    """Fails whoever loads a transformer by from_pretrained."""

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("the transformer was loaded whole")

    before = WanTransformer3DModel.__dict__.get("from_pretrained")
    WanTransformer3DModel.from_pretrained = refused
    try:
        yield
    finally:
        if before is None:
            del WanTransformer3DModel.from_pretrained


def examine() -> int:
    """Trains a model, loaded whole, divided from its creation, or both in turn; writes what there is to compare."""
    folder, out, ways, patterns = json.loads(sys.argv[1])
    accelerator, _ = make_accelerator("bf16")
    stored = StoredTensors(Path(folder))
    report: dict[str, dict] = {}
    for way in ways:
        with Sampled() as load, nothing_loaded_whole() if way == "divided" else nullcontext():
            if way == "divided":
                model = load_transformer(WanTransformer3DModel, Component(Path(folder), {}), accelerator)
            else:
                model = load_whole(WanTransformer3DModel, Component(Path(folder), {}))
            assert is_divided(model) == (way == "divided")
            at_creation = [parameter.numel() for parameter in model.parameters() if not parameter.is_meta]
            created = load.most
            engine = engine_of(accelerator, model, stored if way == "divided" else None, patterns)
        report[way] = {
            "created": created,
            "opened": load.most,
            "whole at creation": sum(at_creation),
            "sizes": sizes_here(engine.network),
            "buffers": {name: buffer.tolist() for name, buffer in model.named_buffers()},
            "checkpoint_bytes": engine.checkpoint_bytes,
            "config": {key: value for key, value in json.loads(engine.config).items() if key != "_name_or_path"},
        }
        exact = [torch.equal(value, stored[name].float()) for name, value in engine.weights()]
        assert accelerator.process_index or (all(exact) and len(exact) == len(stored))
        report[way]["losses"] = train_steps(accelerator, engine)
        report[way]["trained"] = [value.double().sum().item().hex() for _, value in engine.weights()]
        del engine, model
    Path(f"{out}-{accelerator.process_index}.json").write_text(json.dumps(report))
    return 0


def started(backend: str, folder: Path, out: Path, ways: list[str], patterns: list[str]) -> list[forkserver.Trainer]:
    """Has `examine` run in several processes and returns them when they have ended."""
    ranks = forkserver.shared().start_ranks(
        WORLD,
        [json.dumps([str(folder), str(out), ways, patterns])],
        out.with_suffix(".log"),
        work=["tests.runs.test_creation:examine"] * WORLD,
        environment=variables(backend, "wan2.1 normal", WORLD),
    )
    for rank in ranks:
        rank.wait()
    return ranks


def examined(backend: str, folder: Path, out: Path, ways: list[str], patterns: list[str]) -> list[dict]:
    """Returns what the processes found, by rank."""
    ranks = started(backend, folder, out, ways, patterns)
    assert [rank.code for rank in ranks] == [0] * WORLD, "\n".join(rank.said()[-4000:] for rank in ranks)
    return [json.loads(Path(f"{out}-{rank}.json").read_text()) for rank in range(WORLD)]


# -------------------------------------------------------------------------------------------------- and outside


def check_alike(found: list[dict], folder: Path) -> None:
    """Checks that a divided transformer has nothing whole, and buffers, shards and steps as one that was loaded."""
    loaded = load_strictly(WanTransformer3DModel, folder, torch_dtype=torch.float32)
    buffers = {name: buffer.tolist() for name, buffer in loaded.named_buffers()}
    assert buffers
    for rank in found:
        whole, divided = rank["whole"], rank["divided"]
        assert divided["whole at creation"] == 0
        assert divided["buffers"] == buffers
        for name in ("sizes", "losses", "trained", "checkpoint_bytes", "config"):
            assert divided[name] == whole[name], name
    check_shards([rank["divided"] for rank in found], StoredTensors(folder))


def check_shards(found: list[dict], stored: StoredTensors) -> None:
    """Checks that every parameter is divided: all shards equally large, and together the whole with its padding."""
    for name in stored:
        whole = prod(stored.shape(name))
        own, kept = zip(*(rank["sizes"][name] for rank in found), strict=True)
        assert sum(own) <= whole, name  # of a DTensor its shard's, under DeepSpeed nothing
        assert len(set(kept)) == 1, name
        rows = 1 if max(own) == 0 else whole // stored.shape(name)[0]  # DTensors are divided by rows
        assert whole <= sum(kept) < whole + WORLD * rows, name


@pytest.mark.parametrize("backend", ["zero3", "fsdp2"])
def test_a_divided_transformer_is_the_whole_one_to_the_bit(small: Path, tmp_path: Path, backend: str) -> None:
    found = examined(backend, small, tmp_path / "found", ["whole", "divided"], ["attn1", "ffn"])
    check_alike(found, small)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["zero3", "fsdp2"])
def test_files_of_another_dtype_are_read_alike(small: Path, tmp_path: Path, backend: str, dtype: torch.dtype) -> None:
    folder = tmp_path / "transformer"
    folder.mkdir()
    (folder / "config.json").write_bytes((small / "config.json").read_bytes())
    tensors = {name: tensor.to(dtype) for name, tensor in StoredTensors(small).items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    check_alike(examined(backend, folder, tmp_path / "found", ["whole", "divided"], ["."]), folder)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["zero3", "fsdp2"])
def test_a_process_keeps_its_share_of_a_large_transformer_alone(large: Path, tmp_path: Path, backend: str) -> None:
    stored = StoredTensors(large)
    sizes = {name: prod(stored.shape(name)) for name in stored}
    total = sum(sizes.values())
    assert total > 100_000_000
    divided = examined(backend, large, tmp_path / "divided", ["divided"], ["."])
    whole = examined(backend, large, tmp_path / "whole", ["whole"], ["."])
    check_shards([rank["divided"] for rank in divided], stored)
    # ZeRO-3 creates weights in bfloat16 and takes its float32 masters later; FSDP2's shards are the float32 masters
    moment, width = ("created", 2) if backend == "zero3" else ("opened", 4)
    for a, b in zip(divided, whole, strict=True):
        assert a["divided"]["losses"] == b["whole"]["losses"]
        assert a["divided"]["trained"] == b["whole"]["trained"]
        assert a["divided"]["whole at creation"] == 0
        taken = a["divided"][moment]
        print(f"{backend}: {taken / 1e6:.0f} MB of {width * total / 1e6:.0f} MB in all")
        assert width * total / WORLD < taken <= width * total / WORLD + width * max(sizes.values()) + SPARE


# ---------------------------------------------------------------------------------------------------- refusals


def damaged(small: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Writes the small transformer in one file after change(its tensors)."""
    folder.mkdir()
    (folder / "config.json").write_bytes((small / "config.json").read_bytes())
    tensors = {name: tensor.clone() for name, tensor in StoredTensors(small).items()}
    change(tensors)
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    return folder


DAMAGE: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "missing": lambda tensors: tensors.pop("proj_out.weight"),
    "unexpected": lambda tensors: tensors.update({"stray.weight": torch.ones(2)}),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_does_not_fit_is_refused_in_the_same_words(small: Path, tmp_path: Path, kind: str) -> None:
    folder = damaged(small, tmp_path / "transformer", DAMAGE[kind])
    lines = []
    for load, source in ((skeleton, StoredTensors(folder)), (load_whole, Component(folder, {}))):
        with pytest.raises(UserError) as refused:
            load(WanTransformer3DModel, source)
        assert refused.value.exit_code == MODEL
        lines.append(refused.value.line())
    assert lines[0] == lines[1]
    assert f"1 {kind} keys" in lines[0]


def test_a_shape_or_a_configuration_that_does_not_fit_is_refused(small: Path, tmp_path: Path) -> None:
    folder = damaged(small, tmp_path / "shape", lambda tensors: tensors.update({"proj_out.bias": torch.ones(3)}))
    with pytest.raises(UserError, match=r"1 mismatched keys for WanTransformer3DModel, first proj_out\.bias"):
        skeleton(WanTransformer3DModel, StoredTensors(folder))
    folder = damaged(small, tmp_path / "config", len)
    write_config(folder, {"_class_name": "WanTransformer3DModel", "num_layers": "two"})
    with pytest.raises(UserError, match="does not load as WanTransformer3DModel"):
        skeleton(WanTransformer3DModel, StoredTensors(folder))
    with pytest.raises(UserError, match=r"has no diffusion_pytorch_model\.safetensors"):
        skeleton(WanTransformer3DModel, StoredTensors(tmp_path / "nothing"))


def test_keys_that_diffusers_passes_over_are_passed_over(small: Path, tmp_path: Path) -> None:
    spare = {"blocks.0.attn2.norm_added_q.weight": torch.ones(24)}
    folder = damaged(small, tmp_path / "transformer", lambda tensors: tensors.update(spare))
    load_whole(WanTransformer3DModel, Component(folder, {}))
    model = skeleton(WanTransformer3DModel, StoredTensors(folder))
    assert is_divided(model)
    assert not any(buffer.is_meta for buffer in model.buffers())


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_value_that_is_not_finite_is_found_wherever_it_is(dtype: torch.dtype, value: str) -> None:
    for place in range(5):
        tensor = torch.zeros(5, dtype=dtype)
        assert not has_not_finite(tensor)
        tensor[place] = float(value)
        assert has_not_finite(tensor)
    assert not has_not_finite(torch.zeros(0, 3, dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["zero3", "fsdp2"])
def test_what_one_process_finds_all_refuse(small: Path, tmp_path: Path, backend: str) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["proj_out.weight"][-1, -1] = float("nan")  # in the last process's slice alone

    folder = damaged(small, tmp_path / "transformer", spoil)
    ranks = started(backend, folder, tmp_path / "found", ["divided"], ["."])
    assert [rank.code for rank in ranks] == [MODEL] * WORLD, "\n".join(rank.said()[-4000:] for rank in ranks)
    assert "proj_out.weight holds values that are not finite" in ranks[0].said()
