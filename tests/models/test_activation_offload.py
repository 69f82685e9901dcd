"""Tests of videox.models.activation_offload: gradients are bit-identical, and inputs of blocks are on the host."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from networks import SMALL_CONFIGS, blocks_of, build_transformer, model_inputs
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from videox.models.activation_checkpoint import checkpoint_blocks
from videox.models.activation_offload import HostBuffers, HostOffload
from videox.models.recompute import Recompute

CPU = torch.device("cpu")


def gradients(model: Any, given: dict[str, Any]) -> list[Tensor | None]:
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16):
        prediction = model(**given)[0]
    prediction.float().square().mean().backward()
    return [parameter.grad for parameter in model.parameters()]


def same(one: list[Tensor | None], other: list[Tensor | None]) -> bool:
    return all(
        torch.equal(a, b) if a is not None and b is not None else a is b for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize(
    ("name", "keep"),
    [
        ("text", ""),
        pytest.param("image", "attention", marks=pytest.mark.slow),
        pytest.param("joint", "", marks=pytest.mark.slow),
        ("joint, first frame replaced", "attention"),
    ],
)
def test_gradients_are_bit_identical_and_inputs_are_on_the_host(name: str, keep: str) -> None:
    config = SMALL_CONFIGS[name]
    model: Any = build_transformer(config).train()
    given, tokens = model_inputs(config, text := 512 if config.get("image_dim") else 8, side=4, frames=2)
    model.enable_gradient_checkpointing()
    expected = gradients(model, given)
    offload, width = HostOffload(CPU), 2 * config["num_attention_heads"] * config["attention_head_dim"]
    # blocks of one stream return latents and text in one tensor; the last block's inputs stay
    together = config.get("num_single_layers", 2) - 2
    checkpoint_blocks(model, blocks_of(model), lambda *_: Recompute(1.0, keep), offload)
    for step in range(1, 3):  # the second step uses the buffers of the first one
        assert same(gradients(model, given), expected)
        assert offload.moved_bytes == step * width * ((len(blocks_of(model)) - 1) * tokens + together * text)
        gc.collect()
        assert offload.buffers.free_bytes() == offload.moved_bytes // step


@pytest.mark.slow
@pytest.mark.parametrize("name", ["text", "joint"])
def test_between_the_passes_only_the_last_blocks_input_is_on_the_device(name: str) -> None:
    model: Any = build_transformer(SMALL_CONFIGS[name]).train()
    given, _ = model_inputs(SMALL_CONFIGS[name], 8, side=4, frames=2)
    blocks = blocks_of(model)

    def inputs_alive(offload: HostOffload | None) -> list[bool]:
        found: list[StorageWeakRef] = []
        checkpoint_blocks(model, blocks, lambda *_: Recompute(1.0), offload)
        hooks = [
            block.register_forward_pre_hook(
                lambda _, inputs: found.append(StorageWeakRef(inputs[0].untyped_storage()))
            )
            for block in blocks
        ]
        with torch.autocast("cpu", torch.bfloat16):
            prediction = model(**given)[0]
        for hook in hooks:
            hook.remove()
        assert prediction.requires_grad
        gc.collect()
        return [not storage.expired() for storage in found]

    assert inputs_alive(None) == [True] * len(blocks)
    assert inputs_alive(HostOffload(CPU)) == [False] * (len(blocks) - 1) + [True]


def test_views_of_the_same_memory_move_together_and_keep_their_strides() -> None:
    """As the latents and the text that HunyuanVideo's blocks of one stream cut from one tensor."""
    offload = HostOffload(CPU)
    weight = torch.randn(2, 5, 4, requires_grad=True)

    def loss(around: bool) -> Tensor:
        both = weight.exp()
        latents, text, transposed = both[:, :3], both[:, 3:], both.transpose(1, 2)
        with offload.around(latents) if around else nullcontext():
            result = checkpoint(
                lambda *parts: sum(part.square().sum() for part in parts),
                latents,
                text,
                transposed,
                use_reentrant=False,
            )
        assert result.requires_grad
        return result

    expected = torch.autograd.grad(loss(False), weight)[0]
    assert torch.equal(torch.autograd.grad(loss(True), weight)[0], expected)
    assert offload.moved_bytes == 2 * 5 * 4 * 4


def test_a_small_part_of_a_large_tensor_stays() -> None:
    offload = HostOffload(CPU)
    weight = torch.randn(100, 4, requires_grad=True)
    part = weight.exp()[:10]
    with offload.around(part):
        part.square().sum().backward()
    assert offload.moved_bytes == 0 and weight.grad is not None


def test_a_graph_without_a_backward_pass_gives_its_buffers_back() -> None:
    offload = HostOffload(CPU)
    weight = torch.randn(8, requires_grad=True)
    moved = weight.exp()
    with offload.around(moved):
        result = moved.square()
    assert offload.buffers.free_bytes() == 0
    del result
    gc.collect()
    assert offload.buffers.free_bytes() == 32


def test_buffers_do_not_grow_with_the_number_of_sizes() -> None:
    buffers = HostBuffers(pinned=False)
    for size in (10, 40, 20, 30, 50, 45, 7, 60):
        taken = [buffers.take(size) for _ in range(3)]
        assert all(buffer.numel() >= size for buffer in taken)
        assert len({buffer.data_ptr() for buffer in taken}) == 3
        for buffer in taken:
            buffers.give_back(buffer)
    assert buffers.free_bytes() <= 3 * 60
