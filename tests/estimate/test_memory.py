"""Tests of videox.estimate.memory: the estimated states equal the bytes that the engines allocate."""

from __future__ import annotations

import gc
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import forkserver
import launches
import pytest
import torch
from accelerate import Accelerator
from networks import CONFIGS, SMALL_WAN, blocks_of, build_transformer, model_inputs

from videox.distributed.accelerator import make_accelerator
from videox.distributed.collectives import accumulate, backward
from videox.engine.base import Engine
from videox.engine.ddp import DdpEngine
from videox.engine.fsdp import FsdpEngine
from videox.estimate.flops import cross_attention_network
from videox.estimate.memory import (
    SAFE_SHARE,
    BlockWeights,
    Encoders,
    Memory,
    MemorySetup,
    Parameters,
    checkpoint_size,
    memory_of,
    moved_to_host,
    pinned_bytes,
    state_bytes,
)
from videox.lora.adapters import Lora
from videox.lora.targets import adapter_sizes, choose_targets
from videox.models.transformer import attach_adapters
from videox.optim.build import choose_trainable, make_optimizer, parameter_groups
from videox.optim.registry import moments_of

GIB, RANK = 2**30, 4
SIZES = {**SMALL_WAN, "num_layers": 2}
FOURTEEN = Parameters(14_288_491_584, 14_288_491_584, 351_000_000, 247_000_000)
ENCODERS = Encoders({"text_encoder": 11 * 10**9, "vae": 5 * 10**8}, vae_peak=4e9)
SETUP = MemorySetup(
    "zero2", 8, 8, half=True, recompute_share=1.0, offload_encoders=True, workers=8, tokens=21_504, batch=1, zero={}
)


def parameters_of(model: torch.nn.Module) -> Parameters:
    counts = [sum(p.numel() for p in block.parameters()) for block in blocks_of(model)]
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Parameters(total, trained, max(counts), total - sum(counts))


def allocated_bytes(engine: Engine, given: Sequence[torch.Tensor]) -> Counter[str]:
    """Return bytes by dtype of all tensors, gradients included, without the network's buffers and `given`.

    Buffers are looked up at each call, because the address of a replaced buffer may be reused by another tensor.
    """
    gc.collect()
    found = {}
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter) and o.device.type == "cpu"]
    tensors += [p.grad for p in engine.network.parameters() if p.grad is not None]
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and tensor.numel() > 1:
            found[storage.data_ptr()] = (str(tensor.dtype).removeprefix("torch."), storage.nbytes())
    others = {t.untyped_storage().data_ptr() for t in (*engine.network.buffers(), *given)}
    counted: Counter[str] = Counter()
    for pointer, (dtype, size) in found.items():
        counted[dtype] += size if pointer not in others else 0
    return counted


def add_adapters(model: torch.nn.Module, accelerator: Accelerator) -> list[str]:
    """Add adapters to the attention and return the names of the trainable parameters."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    targets = choose_targets(shapes, {}, ["attn1"])
    values = {}
    for target in targets:
        outputs, inputs = shapes[f"{target}.weight"]
        values[f"{target}.lora_A.default.weight"] = torch.full((RANK, inputs), 0.01)
        values[f"{target}.lora_B.default.weight"] = torch.zeros(outputs, RANK)
    assert sum(adapter_sizes(shapes, targets, RANK).values()) == sum(value.numel() for value in values.values())
    return attach_adapters(model, Lora(RANK, float(RANK), 0.0, targets), values, accelerator)


def measure() -> int:
    """Train two steps and write the allocated bytes after the backward pass."""
    accelerator, backend = make_accelerator("bf16")
    model, trained = build_transformer(SIZES), os.environ["TRAINED"]
    optimizer, half = "adamw" if trained == "lora" else trained, list[str]()
    if trained == "lora":
        full = add_adapters(model.to(torch.float32 if backend.name == "fsdp1" else torch.bfloat16), accelerator)
    else:
        full, half = choose_trainable(model.to(torch.float32 if trained == "adamw" else torch.bfloat16), ["."], [])
    parameters = parameters_of(model)

    def optimizer_over(named):
        groups = parameter_groups(named, full, half)
        settings = {"betas": (0.9, 0.99), "weight_decay": 0.0, "epsilon": 1e-8}
        return make_optimizer(groups, learning_rate=1e-3, name=optimizer, **settings)

    sample, _ = model_inputs(SIZES, side=4, frames=1)
    given = [tensor for tensor in sample.values() if isinstance(tensor, torch.Tensor)]
    engine: Engine
    if backend.engine == "deepspeed":
        from videox.engine.deepspeed import DeepSpeedEngine, DeepSpeedSettings

        settings = DeepSpeedSettings(max_grad_norm=1.0, batch_size=1, micro_batches=1)
        engine = DeepSpeedEngine(accelerator, model, optimizer_over, settings=settings, output_dir=Path())
    elif backend.engine == "fsdp":
        engine = FsdpEngine(accelerator, model, blocks_of(model), optimizer_over)
    else:
        engine = DdpEngine(accelerator, model, optimizer_over)
    engine.set_lr(1e-3)
    for _ in range(2):
        with accumulate(accelerator, engine.model, True):
            backward(accelerator, engine.model, engine.model(**sample)[0].square().mean())
        after_backward = allocated_bytes(engine, given)
        engine.update(loss=torch.ones(()), empty=False, limit=lambda norm: norm)
    record = {"parameters": vars(parameters), "full": after_backward, "backend": backend.name}
    if backend.name == "ddp":
        record["views"] = [engine.model.gradient_as_bucket_view, not engine.model.forward_sync_buffers]
    Path(os.environ["MEASURED"]).with_suffix(f".{accelerator.process_index}").write_text(json.dumps(record))
    return 0


SLOW = [("zero3", "adamw"), ("fsdp1", "adamw"), ("zero2", "lora"), ("fsdp1", "lora"), ("ddp", "adamw_bf16")]


@pytest.mark.parametrize(
    ("backend", "trained"),
    [("ddp", "adamw"), ("zero2", "adamw"), ("ddp", "lora"), *(pytest.param(*s, marks=pytest.mark.slow) for s in SLOW)],
)
def test_states_equal_the_allocations_of_the_engines(backend: str, trained: str, tmp_path: Path) -> None:
    ranks = forkserver.shared().start_ranks(
        2, [], tmp_path / "log", entry_points=["tests.estimate.test_memory:measure"] * 2,
        environment={**launches.launcher_environment(backend, "wan2.1 normal", 2), "MEASURED": str(tmp_path / "found"), "TRAINED": trained},
    )  # fmt: skip
    for rank in ranks:
        rank.wait()
    assert [rank.code for rank in ranks] == [0, 0], launches.output_of(ranks)
    assert "broadcast_buffers" not in launches.output_of(ranks), "torch has deprecated the argument"
    for rank in range(2):
        found = json.loads((tmp_path / f"found.{rank}").read_text())
        setup = MemorySetup(
            backend, 2, 2, half=True, recompute_share=0, offload_encoders=False, workers=0, tokens=0, batch=1, zero={},
            optimizer="adamw" if trained == "lora" else trained, lora_rank=RANK if trained == "lora" else 0,
        )  # fmt: skip
        assert found.get("views", [True]) in ([True], [True, True]), "gradients are stored twice, or buffers are sent"
        parameters = Parameters(**found["parameters"])
        states = state_bytes(parameters, setup)
        half = found["full"].get("bfloat16", 0)
        if backend == "zero3":  # in addition to its shard, small weights are whole, and there is a bucket
            assert half >= states.pop("weights")
        else:
            rounded = states["weights"] + states["gradients"] if trained == "adamw_bf16" else 0
            frozen = (
                2 * (parameters.total - parameters.trainable) if setup.frozen_bytes == 2 and trained == "lora" else 0
            )
            wanted = states["weights"] if backend == "zero2" else rounded + frozen
            assert half == pytest.approx(wanted, abs=64)
            states["weights"] -= wanted
        # alignment of flat shards; the adapters are not evenly split between the two halves of a block
        slack = 4 * parameters.trainable if (backend, trained) == ("fsdp1", "lora") else 4 * 64
        assert found["full"]["float32"] == pytest.approx(sum(states.values()), abs=slack)


def memory(setup: MemorySetup, parameters: Parameters = FOURTEEN):
    network = cross_attention_network(CONFIGS["Wan2.1-T2V-14B"], text_tokens=512, image_tokens=0, half=setup.half)
    return memory_of(parameters, network, ENCODERS, setup)


@pytest.mark.parametrize(("name", "weight"), [("adamw_offload", 4), ("adamw_bf16_offload", 2)])
def test_offloaded_moments_leave_weights_and_gradients_on_the_gpu(name: str, weight: int) -> None:
    setup = replace(SETUP, backend="single", processes=1, per_host=1, optimizer=moments_of(name))
    there, here = memory(setup), memory(replace(setup, optimizer=name))
    assert {item: size for item, size in here.states.items() if size} == {
        "weights": weight * FOURTEEN.total, "gradients": weight * FOURTEEN.total
    }  # fmt: skip
    assert here.host["offloaded optimizer"] == there.states["optimizer"] == 8 * FOURTEEN.total
    assert checkpoint_size(FOURTEEN, setup) == checkpoint_size(FOURTEEN, replace(setup, optimizer=name))


def test_only_the_largest_phase_counts() -> None:
    found = memory(SETUP)
    phases = [sum(phase.values()) for phase in found.phases.values()]
    assert found.total() < sum(found.states.values()) * 1.05 + sum(phases) * 1.05 + 2e9
    assert found.total() > sum(found.states.values()) + max(phases)
    items = found.items()
    assert items["weights"] == 2 * FOURTEEN.total and items["masters"] == 4 * FOURTEEN.total / 8


def test_a_cache_needs_no_encoders_during_training() -> None:
    without, cached = (memory(replace(SETUP, offload_encoders=False, cached=cached)) for cached in (False, True))
    assert without.states["encoders"] == ENCODERS.total() and "encoders" not in cached.states
    assert without.total() > cached.total()
    # the encoders run before the transformer is loaded: only what they need beyond its states counts
    small = Parameters(10**6, 10**6, 10**5, 10**5)
    before = memory(replace(SETUP, offload_encoders=False, cached=True, tokens=64), small)
    states = sum(before.states.values())
    assert before.phases["encoding"]["encoding"] + states == ENCODERS.total() + ENCODERS.vae_peak


def test_the_vae_encodes_at_most_a_micro_batch_at_a_time() -> None:
    def encoding(mini_batch: int, batch: int) -> float:
        setup = replace(SETUP, offload_encoders=False, vae_mini_batch=mini_batch, batch=batch)
        return memory(setup).phases["encoding"]["encoding"] / ENCODERS.vae_peak

    assert [encoding(32, 1), encoding(1, 4), encoding(3, 4), encoding(32, 4)] == [1, 1, 3, 4]


def test_the_items_at_the_peak_add_up_to_the_total() -> None:
    for setup in (SETUP, replace(SETUP, backend="zero3"), replace(SETUP, tokens=64, offload_encoders=False)):
        found = memory(setup)
        assert sum(found.at_peak().values()) == pytest.approx(found.total())


def test_more_shards_never_need_more_memory() -> None:
    for backend in ("zero2", "zero3", "fsdp1"):
        few, many = (MemorySetup(backend, n, 8, True, 1.0, True, 8, 21_504, 1, {}) for n in (8, 16))
        assert memory(many).total() < memory(few).total()


def test_a_checkpoint_of_the_published_14b_is_170_gigabytes() -> None:
    single = replace(SETUP, backend="single")
    assert checkpoint_size(FOURTEEN, single) / 1e9 == pytest.approx(171.5, abs=0.1)
    assert checkpoint_size(FOURTEEN, replace(single, ema_device="cpu")) == checkpoint_size(FOURTEEN, single) * 16 / 12


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_offloaded_inputs_move_from_the_gpu_to_the_host(share: float) -> None:
    """Of 40 recomputed blocks, or 20, the last one's input stays, and three are on the GPU at a time."""
    setup = replace(SETUP, recompute_share=share, batch=2)
    there, here = memory(setup), memory(replace(setup, offload_activations=True))
    one = 2 * 5120 * 2 * setup.tokens  # two samples in bfloat16
    moved = int(40 * share) - 1
    assert there.phases["training"]["activations"] - here.phases["training"]["activations"] == (moved - 3) * one
    assert here.host == {**there.host, "offloaded activations": setup.per_host * moved * pinned_bytes(one)}
    assert one <= pinned_bytes(one) < 2 * one and math.log2(pinned_bytes(one)).is_integer()


def test_nothing_is_offloaded_without_recomputed_blocks() -> None:
    setup = replace(SETUP, recompute_share=0.0)
    assert memory(replace(setup, offload_activations=True)) == memory(setup)


# Of Wan2.1 14B: four square matrices in each of two attentions, and two of the feed-forward part; their rows.
LINEAR = 8 * 5120**2 + 2 * 5120 * 13_824
ROWS = 9 * 5120 + 13_824
BLOCK = BlockWeights(LINEAR + 100_000, LINEAR, ROWS, 5120 * 13_824)
ADAPTERS = 77_000_000
ADAPTED = Parameters(
    40 * BLOCK.elements + 247_000_000 + ADAPTERS, ADAPTERS, BLOCK.elements, 247_000_000, (BLOCK,) * 40
)
SMALL_CARD = replace(SETUP, backend="ddp", lora_rank=32)


def adapted(**changes: Any) -> Memory:
    setup = replace(SMALL_CARD, **changes)
    network = cross_attention_network(CONFIGS["Wan2.1-T2V-14B"], text_tokens=512, image_tokens=0, half=True)
    return memory_of(ADAPTED, replace(network, frozen=True), ENCODERS, setup)


@pytest.mark.parametrize(
    ("precision", "in_linear"),
    [("fp8", LINEAR + 4 * ROWS), ("int8", LINEAR + 4 * ROWS), ("nf4", LINEAR / 2 + 4 * LINEAR / 64)],
)
def test_quantised_blocks_take_their_bytes_and_one_layer_in_bfloat16(precision: str, in_linear: float) -> None:
    there, here = adapted(), adapted(base_precision=precision)
    saved = 40 * (2 * LINEAR - in_linear)
    assert there.states["weights"] - here.states["weights"] == pytest.approx(saved)
    more = here.phases["training"]["communication"] - there.phases["training"]["communication"]
    assert more == 2 * BLOCK.largest
    frozen = 2 * 247_000_000 + 40 * (in_linear + 2 * 100_000)
    assert here.host["loading"] == pytest.approx(8 * (frozen + 4 * ADAPTERS) + ENCODERS.total())


def test_streamed_blocks_rest_on_the_host_once_and_two_of_them_are_on_the_gpu() -> None:
    there, here = adapted(), adapted(streamed=40)
    block = 2 * BLOCK.elements
    assert there.states["weights"] - here.states["weights"] == 38 * block
    assert here.host == {**there.host, "streamed blocks": 40 * block}  # for eight processes
    half = adapted(streamed=20, base_precision="int8")
    quantised = LINEAR + 4 * ROWS + 2 * 100_000
    assert half.host["streamed blocks"] == pytest.approx(20 * quantised)
    assert here.states["gradients"] == half.states["gradients"] == 4 * ADAPTERS


def test_streamed_blocks_that_are_trained_have_their_gradients_on_the_host_too() -> None:
    """Of two weights and two gradients of a block on the GPU; the optimizer in host memory is as large as before."""
    block = replace(BLOCK, trained=BLOCK.elements)
    total = 40 * block.elements + 247_000_000
    parameters = Parameters(total, total, block.elements, 247_000_000, (block,) * 40)
    setup = replace(SETUP, backend="single", processes=1, per_host=1, optimizer="adamw_bf16_offload", cached=True)
    network = cross_attention_network(CONFIGS["Wan2.1-T2V-14B"], text_tokens=512, image_tokens=0, half=True)
    there, here = (memory_of(parameters, network, ENCODERS, replace(setup, streamed=count)) for count in (0, 40))
    assert there.states["weights"] == there.states["gradients"] == 2 * total
    assert here.states["weights"] == here.states["gradients"] == 2 * (247_000_000 + 2 * block.elements)
    assert here.phases["training"] == there.phases["training"]
    in_blocks = 2.0 * 40 * block.elements
    assert here.host == {**there.host, "streamed blocks": in_blocks, "streamed gradients": in_blocks}
    assert moved_to_host(here.host)["streamed gradients"] == in_blocks
    saved = there.without("encoding").total() - here.without("encoding").total()
    assert saved == pytest.approx(
        1.05 * 4 * 38 * block.elements
    )  # weights and gradients of 38 blocks, and 5 % fragments


def test_a_14b_lora_fits_small_cards_with_streamed_or_quantised_blocks() -> None:
    """At 49x512x512 (13,312 tokens), the encoders' outputs cached, as in docs/speed.md."""
    setup = {"backend": "single", "processes": 1, "per_host": 1, "tokens": 13_312, "cached": True}
    setup |= {"offload_activations": True}
    sizes = {
        "bf16": adapted(**setup), "int8": adapted(**setup, base_precision="int8"),
        "nf4": adapted(**setup, base_precision="nf4"), "streamed": adapted(**setup, streamed=40),
        "streamed nf4": adapted(**setup, streamed=40, base_precision="nf4"),
    }  # fmt: skip
    total = {name: memory.without("encoding").total() / GIB for name, memory in sizes.items()}
    assert total["bf16"] > 32 > total["int8"] > 22 > total["nf4"] > SAFE_SHARE * 16
    assert SAFE_SHARE * 12 > total["streamed"] > total["streamed nf4"] > 8


def test_kept_attention_takes_memory_that_grows_with_its_outputs() -> None:
    """At 14B and 32,760 tokens an output of 5120 bfloat16 channels and the sums of 40 heads, of 39 blocks."""
    setup = replace(SETUP, tokens=32_760, recompute_share=1.0)
    full, own, every = (
        memory(replace(setup, keep=keep)).phases["training"]["activations"]
        for keep in ("", "self_attention", "attention")
    )
    output = 32_760 * (5120 * 2 + 40 * 4)
    assert own - full == pytest.approx(39 * output) and every - full == pytest.approx(2 * 39 * output)
    assert own - full == pytest.approx(12.5 * 2**30, rel=0.02)
