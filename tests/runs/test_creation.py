"""Tests of sharded model creation: a transformer is sharded while it is loaded, and trains like one loaded in full."""

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
from launches import launcher_environment
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

from videox.distributed.accelerator import make_accelerator
from videox.distributed.collectives import backward
from videox.engine.base import Engine
from videox.engine.fsdp import FsdpEngine
from videox.errors import MODEL, UserError
from videox.models.component import load_checked
from videox.models.configured import Component
from videox.models.folder import has_nonfinite, load_strictly
from videox.models.meta_init import build_meta_model, is_sharded
from videox.models.transformer import load_transformer
from videox.optim.build import choose_trainable, make_optimizer, parameter_groups
from videox.weights.safetensors_io import StoredTensors, write_config

SIZES = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 32, "freq_dim": 256,
    "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32,
}  # fmt: skip
LARGE = {**SIZES, "num_attention_heads": 12, "attention_head_dim": 64, "ffn_dim": 3072, "num_layers": 11}
SPARE = 20_000_000  # bytes of temporary memory that a load may need
MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
STEPS = 3
WORLD = 2


def write_transformer(folder: Path, sizes: dict, max_shard_size: str) -> Path:
    """Write a float32 transformer in several shards, with values that bfloat16 cannot represent."""
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


# -------------------------------------------------------------------------------------------------------- in the ranks


def build_engine(
    accelerator: Accelerator, model: nn.Module, stored: StoredTensors | None, patterns: list[str]
) -> Engine:
    full, half = choose_trainable(model, patterns, [])

    def optimizer(parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
        groups = parameter_groups(parameters, full, half)
        return make_optimizer(groups, learning_rate=1e-3, betas=(0.9, 0.999), weight_decay=0.01, epsilon=1e-8)

    if accelerator.state.deepspeed_plugin is None:
        return FsdpEngine(accelerator, model, model.blocks, optimizer, stored=stored)
    from videox.engine.deepspeed import DeepSpeedEngine, DeepSpeedSettings

    settings = DeepSpeedSettings(max_grad_norm=0.05, batch_size=1, micro_batches=1)
    return DeepSpeedEngine(accelerator, model, optimizer, stored=stored, settings=settings, output_dir=Path())


def train_steps(accelerator: Accelerator, engine: Engine) -> list[str]:
    """Return loss and gradient norm of a few steps on samples of this rank, as exact hexadecimal floats."""
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


def local_sizes(model: nn.Module) -> dict[str, list[int]]:
    """Return [elements in the module's own tensor, elements of this rank's shard] of each parameter."""
    sizes = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            shard = parameter.to_local()
            sizes[name] = [shard.numel(), shard.untyped_storage().nbytes() // shard.itemsize]
        else:
            sizes[name] = [parameter.numel(), parameter.ds_tensor.numel()]
    return sizes


def anonymous_bytes() -> int:
    """Return the anonymous memory of this process, which no file backs, in bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class PeakMemory:
    """Context that samples the peak anonymous memory of this process over that at its start, in bytes."""

    def __enter__(self) -> PeakMemory:
        assert ctypes.CDLL(None).mallopt(
            MMAP_THRESHOLD, 131072
        )  # same as MALLOC_MMAP_THRESHOLD_=131072: freed memory is returned at once
        self.before, self.peak, self._on = anonymous_bytes(), 0, True
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while self._on:
            self.peak = max(self.peak, anonymous_bytes() - self.before)
            time.sleep(0.002)

    def __exit__(self, *raised: object) -> None:
        self._on = False
        self._thread.join()


@contextmanager
def from_pretrained_forbidden() -> Iterator[None]:
    """Make WanTransformer3DModel.from_pretrained fail."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the transformer was loaded in full")

    before = WanTransformer3DModel.__dict__.get("from_pretrained")
    WanTransformer3DModel.from_pretrained = fail
    try:
        yield
    finally:
        if before is None:
            del WanTransformer3DModel.from_pretrained


def examine() -> int:
    """Entry point of a rank: train a model loaded "full", "sharded", or both in turn, and write a report as JSON."""
    folder, out, modes, patterns = json.loads(sys.argv[1])
    accelerator, _ = make_accelerator("bf16")
    stored = StoredTensors(Path(folder))
    report: dict[str, dict] = {}
    for mode in modes:
        with PeakMemory() as load, from_pretrained_forbidden() if mode == "sharded" else nullcontext():
            if mode == "sharded":
                model = load_transformer(WanTransformer3DModel, Component(Path(folder), {}), accelerator)
            else:
                model = load_checked(WanTransformer3DModel, Component(Path(folder), {}))
            assert is_sharded(model) == (mode == "sharded")
            unsharded = [parameter.numel() for parameter in model.parameters() if not parameter.is_meta]
            created = load.peak
            engine = build_engine(accelerator, model, stored if mode == "sharded" else None, patterns)
        report[mode] = {
            "created": created,
            "opened": load.peak,
            "unsharded at creation": sum(unsharded),
            "sizes": local_sizes(engine.network),
            "buffers": {name: buffer.tolist() for name, buffer in model.named_buffers()},
            "checkpoint_bytes": engine.checkpoint_bytes,
            "config": {key: value for key, value in json.loads(engine.config).items() if key != "_name_or_path"},
        }
        equal = [torch.equal(value, stored[name].float()) for name, value in engine.weights()]
        assert accelerator.process_index or (all(equal) and len(equal) == len(stored))
        report[mode]["losses"] = train_steps(accelerator, engine)
        report[mode]["trained"] = [value.double().sum().item().hex() for _, value in engine.weights()]
        del engine, model
    Path(f"{out}-{accelerator.process_index}.json").write_text(json.dumps(report))
    return 0


def run_examine(
    backend: str, folder: Path, out: Path, modes: list[str], patterns: list[str]
) -> list[forkserver.TrainerProcess]:
    """Run `examine` on several ranks and return them when they have ended."""
    ranks = forkserver.shared().start_ranks(
        WORLD,
        [json.dumps([str(folder), str(out), modes, patterns])],
        out.with_suffix(".log"),
        entry_points=["tests.runs.test_creation:examine"] * WORLD,
        environment=launcher_environment(backend, "wan2.1 normal", WORLD),
    )
    for rank in ranks:
        rank.wait()
    return ranks


def reports_of(backend: str, folder: Path, out: Path, modes: list[str], patterns: list[str]) -> list[dict]:
    """Run `examine` on several ranks and return their reports."""
    ranks = run_examine(backend, folder, out, modes, patterns)
    assert [rank.code for rank in ranks] == [0] * WORLD, "\n".join(rank.output()[-4000:] for rank in ranks)
    return [json.loads(Path(f"{out}-{rank}.json").read_text()) for rank in range(WORLD)]


# -------------------------------------------------------------------------------------------------------- in the tests


def check_equal(reports: list[dict], folder: Path) -> None:
    """Check that a sharded load has no unsharded parameter, and the buffers, shards and steps of a full load."""
    loaded = load_strictly(WanTransformer3DModel, folder, torch_dtype=torch.float32)
    buffers = {name: buffer.tolist() for name, buffer in loaded.named_buffers()}
    assert buffers
    for rank in reports:
        full, sharded = rank["full"], rank["sharded"]
        assert sharded["unsharded at creation"] == 0
        assert sharded["buffers"] == buffers
        for name in ("sizes", "losses", "trained", "checkpoint_bytes", "config"):
            assert sharded[name] == full[name], name
    check_shards([rank["sharded"] for rank in reports], StoredTensors(folder))


def check_shards(reports: list[dict], stored: StoredTensors) -> None:
    """Check that every parameter is sharded: shards of equal size, which add up to the parameter plus padding."""
    for name in stored:
        total = prod(stored.shape(name))
        own, shards = zip(*(rank["sizes"][name] for rank in reports), strict=True)
        assert sum(own) <= total, name  # a DTensor counts its shard, DeepSpeed's placeholder nothing
        assert len(set(shards)) == 1, name
        rows = 1 if max(own) == 0 else total // stored.shape(name)[0]  # DTensors are sharded by rows
        assert total <= sum(shards) < total + WORLD * rows, name


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["zero3", "fsdp2"])
def test_sharded_creation_is_bit_identical_to_a_full_load(small: Path, tmp_path: Path, backend: str) -> None:
    reports = reports_of(backend, small, tmp_path / "found", ["full", "sharded"], ["attn1", "ffn"])
    check_equal(reports, small)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["zero3", "fsdp2"])
def test_files_of_another_dtype_are_read_equally(
    small: Path, tmp_path: Path, backend: str, dtype: torch.dtype
) -> None:
    folder = tmp_path / "transformer"
    folder.mkdir()
    (folder / "config.json").write_bytes((small / "config.json").read_bytes())
    tensors = {name: tensor.to(dtype) for name, tensor in StoredTensors(small).items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    check_equal(reports_of(backend, folder, tmp_path / "found", ["full", "sharded"], ["."]), folder)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["zero3", "fsdp2"])
def test_a_rank_needs_memory_for_its_shard_only(large: Path, tmp_path: Path, backend: str) -> None:
    stored = StoredTensors(large)
    sizes = {name: prod(stored.shape(name)) for name in stored}
    total = sum(sizes.values())
    assert total > 100_000_000
    sharded = reports_of(backend, large, tmp_path / "sharded", ["sharded"], ["."])
    full = reports_of(backend, large, tmp_path / "full", ["full"], ["."])
    check_shards([rank["sharded"] for rank in sharded], stored)
    # ZeRO-3 creates bfloat16 weights and adds its float32 parameters later; the shards of FSDP2 are float32
    phase, itemsize = ("created", 2) if backend == "zero3" else ("opened", 4)
    for a, b in zip(sharded, full, strict=True):
        assert a["sharded"]["losses"] == b["full"]["losses"]
        assert a["sharded"]["trained"] == b["full"]["trained"]
        assert a["sharded"]["unsharded at creation"] == 0
        used = a["sharded"][phase]
        print(f"{backend}: {used / 1e6:.0f} MB of {itemsize * total / 1e6:.0f} MB in total")
        assert itemsize * total / WORLD < used <= itemsize * total / WORLD + itemsize * max(sizes.values()) + SPARE


# ------------------------------------------------------------------------------------------------------------ refusals


def write_damaged(small: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Write the small transformer in one file, after change(tensors)."""
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
def test_both_loaders_refuse_wrong_keys_with_the_same_message(small: Path, tmp_path: Path, kind: str) -> None:
    folder = write_damaged(small, tmp_path / "transformer", DAMAGE[kind])
    lines = []
    for load, source in ((build_meta_model, StoredTensors(folder)), (load_checked, Component(folder, {}))):
        with pytest.raises(UserError) as error:
            load(WanTransformer3DModel, source)
        assert error.value.exit_code == MODEL
        lines.append(error.value.line())
    assert lines[0] == lines[1]
    assert f"1 {kind} key for" in lines[0]


def test_a_wrong_shape_or_configuration_is_refused(small: Path, tmp_path: Path) -> None:
    folder = write_damaged(small, tmp_path / "shape", lambda tensors: tensors.update({"proj_out.bias": torch.ones(3)}))
    with pytest.raises(UserError, match=r"1 mismatched key for WanTransformer3DModel, first proj_out\.bias"):
        build_meta_model(WanTransformer3DModel, StoredTensors(folder))
    folder = write_damaged(small, tmp_path / "config", len)
    write_config(folder, {"_class_name": "WanTransformer3DModel", "num_layers": "two"})
    with pytest.raises(UserError, match="does not load as WanTransformer3DModel"):
        build_meta_model(WanTransformer3DModel, StoredTensors(folder))
    with pytest.raises(UserError, match=r"has no diffusion_pytorch_model\.safetensors"):
        build_meta_model(WanTransformer3DModel, StoredTensors(tmp_path / "nothing"))


def test_keys_that_diffusers_ignores_are_ignored(small: Path, tmp_path: Path) -> None:
    spare = {"blocks.0.attn2.norm_added_q.weight": torch.ones(24)}
    folder = write_damaged(small, tmp_path / "transformer", lambda tensors: tensors.update(spare))
    load_checked(WanTransformer3DModel, Component(folder, {}))
    model = build_meta_model(WanTransformer3DModel, StoredTensors(folder))
    assert is_sharded(model)
    assert not any(buffer.is_meta for buffer in model.buffers())


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_nonfinite_value_is_found_at_every_position(dtype: torch.dtype, value: str) -> None:
    for place in range(5):
        tensor = torch.zeros(5, dtype=dtype)
        assert not has_nonfinite(tensor)
        tensor[place] = float(value)
        assert has_nonfinite(tensor)
    assert not has_nonfinite(torch.zeros(0, 3, dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["zero3", "fsdp2"])
def test_a_nonfinite_shard_of_one_rank_is_refused_by_all(small: Path, tmp_path: Path, backend: str) -> None:
    def add_nan(tensors: dict[str, torch.Tensor]) -> None:
        tensors["proj_out.weight"][-1, -1] = float("nan")  # only in the shard of the last rank

    folder = write_damaged(small, tmp_path / "transformer", add_nan)
    ranks = run_examine(backend, folder, tmp_path / "found", ["sharded"], ["."])
    assert [rank.code for rank in ranks] == [MODEL] * WORLD, "\n".join(rank.output()[-4000:] for rank in ranks)
    assert "proj_out.weight contains values that are not finite" in ranks[0].output()
