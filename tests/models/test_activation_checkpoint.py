"""Tests of videox.models.activation_checkpoint: only the selected blocks of a real Wan run twice, with equal
gradients.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import WanTransformer3DModel
from hypothesis import given
from hypothesis import strategies as st
from networks import SMALL_CONFIGS, blocks_of, build_transformer, model_inputs
from torch.utils._python_dispatch import TorchDispatchMode

from videox.diffusion.flow_matching import keyed_noise
from videox.models.activation_checkpoint import (
    checkpoint_blocks,
    is_attention_forward,
)
from videox.models.recompute import Recompute, select_blocks

LAYERS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_wan_t2v(tmp_path_factory.mktemp("wan"), layers=LAYERS)


def load(folder: Path) -> WanTransformer3DModel:
    return WanTransformer3DModel.from_pretrained(folder, subfolder="transformer").train()


def step(model: WanTransformer3DModel) -> tuple[torch.Tensor, dict[str, torch.Tensor], list[int]]:
    """Run a forward and a backward pass; return (output, gradients, how often each block ran forward)."""
    runs: Counter[int] = Counter()
    hooks = [
        block.register_forward_pre_hook(lambda *_, number=number: runs.update([number]))
        for number, block in enumerate(model.blocks)
    ]
    latents, text = keyed_noise(1, (2, 16, 2, 4, 6)), keyed_noise(2, (2, 8, 32))
    output = model(latents, torch.tensor([500.0, 20.0]), text, return_dict=False)[0]
    (output - keyed_noise(3, output.shape)).square().mean().backward()
    for hook in hooks:
        hook.remove()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return output.detach(), gradients, [runs[number] for number in range(len(model.blocks))]


@pytest.mark.parametrize("share", [0.0, 0.125, 0.25, 0.3, 0.5, 0.75, 0.9, 1.0])
def test_selected_blocks_run_forward_twice(folder: Path, share: float) -> None:
    model = load(folder)
    checkpoint_blocks(model, model.blocks, lambda *_: Recompute(share))
    runs = step(model)[2]
    twice = [number for number, count in enumerate(runs) if count == 2]
    assert twice == select_blocks(LAYERS, share)
    assert len(twice) == math.floor(share * LAYERS + 0.5)
    assert sorted(set(runs) - {2}) in ([], [1])


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_gradients_are_bit_identical(folder: Path, share: float) -> None:
    plain, selected = load(folder), load(folder)
    checkpoint_blocks(selected, selected.blocks, lambda *_: Recompute(share))
    expected, actual = step(plain), step(selected)
    assert torch.equal(expected[0], actual[0])
    assert expected[1].keys() == actual[1].keys()
    assert all(torch.equal(expected[1][name], actual[1][name]) for name in expected[1])


def test_share_of_one_equals_diffusers_gradient_checkpointing(folder: Path) -> None:
    reference, model = load(folder), load(folder)
    reference.enable_gradient_checkpointing()
    checkpoint_blocks(model, model.blocks, lambda *_: Recompute(1.0))
    assert step(reference)[2] == step(model)[2] == [2] * LAYERS


def test_fewer_activations_are_stored(folder: Path) -> None:
    def stored_elements(share: float) -> int:
        model, sizes = load(folder), []
        checkpoint_blocks(model, model.blocks, lambda *_: Recompute(share))
        own = {parameter.data_ptr() for parameter in model.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.data_ptr() not in own:
                sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            latents, text = keyed_noise(1, (1, 16, 2, 4, 6)), keyed_noise(2, (1, 8, 32))
            model(latents, torch.tensor([500.0]), text, return_dict=False)
        return sum(sizes)

    none, half, every = stored_elements(0.0), stored_elements(0.5), stored_elements(1.0)
    assert every < 0.3 * none
    assert half == pytest.approx((none + every) / 2, rel=0.05)


@given(st.integers(1, 60), st.floats(0, 1))
def test_selected_blocks_are_evenly_spaced(count: int, share: float) -> None:
    selected = select_blocks(count, share)
    assert all(0 <= block < count for block in selected)
    assert sorted(set(selected)) == selected
    assert abs(len(selected) - count * share) <= 0.5 + 1e-9
    for block in range(count):  # at every block the count differs from the exact share by at most half a block
        so_far = sum(1 for number in selected if number <= block)
        assert abs(so_far - (block + 1) * share) <= 0.5 + 1e-9


def select_blocks_originally(count: int, share: float) -> list[int]:
    """Block i is selected when (i + 1) * share reaches the next half, as in the original trainer."""
    threshold, actual = 0.5, []
    for block in range(count):
        if (block + 1) * share >= threshold:
            threshold += 1
            actual.append(block)
    return actual


@given(st.integers(1, 60), st.integers(0, 16).map(lambda sixteenths: sixteenths / 16))
def test_selected_blocks_are_those_of_the_original_trainer(count: int, share: float) -> None:
    assert select_blocks(count, share) == select_blocks_originally(count, share)


class CountAttention(TorchDispatchMode):
    """Counts forward passes of attention, also those of a recomputation."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, function, types, inputs=(), settings=None):
        self.calls += is_attention_forward(function.name())
        return function(*inputs, **(settings or {}))


@pytest.mark.parametrize(
    ("name", "half"),
    [("text", False), ("text", True), ("image", True), ("joint", True), ("joint, first frame replaced", True)],
)
def test_kept_attention_runs_once_and_gradients_are_bit_identical(name: str, half: bool) -> None:
    config = SMALL_CONFIGS[name]
    model: Any = build_transformer(config).train()
    given, _ = model_inputs(config, 512 if config.get("image_dim") else 9, side=4, frames=2)
    joint = "joint" in name
    attentions = len(blocks_of(model)) * (1 if joint else 3 if config.get("image_dim") else 2)
    alone = len(blocks_of(model))  # self-attention
    outside = config.get("num_refiner_layers", 0)  # of the text, which is not recomputed

    def run() -> tuple[list[torch.Tensor | None], int]:
        model.zero_grad(set_to_none=True)
        with CountAttention() as counted:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                prediction = model(**given)[0]
            prediction.float().square().mean().backward()
        return [parameter.grad for parameter in model.parameters()], counted.calls

    model.enable_gradient_checkpointing()
    expected, calls = run()
    assert calls == 2 * attentions + outside
    cases = {"": 2 * attentions, "self_attention": 2 * attentions - alone, "attention": attentions}
    for keep, counted in cases.items():
        checkpoint_blocks(model, blocks_of(model), lambda *_, keep=keep: Recompute(1.0, keep))
        actual, calls = run()
        assert calls == counted + outside, keep
        for one, other in zip(expected, actual, strict=True):
            assert (one is None and other is None) or torch.equal(one, other)


def test_operators_of_attention_are_recognized() -> None:
    """Names of forward passes as torch, flash-attn, FlashAttention-3, diffusers and xformers register them."""
    for name in (
        "aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_fused_attention_overrideable", "flash_attn::_flash_attn_forward",
        "flash_attn_3::fwd", "_diffusers_flash_attn_3::_flash_attn_forward", "xformers_flash::flash_fwd",
        "xformers_python::_fmha_cutlass_fwd",
    ):  # fmt: skip
        assert is_attention_forward(name), name
    for name in (
        "aten::mm", "aten::_scaled_dot_product_flash_attention_backward", "flash_attn::_flash_attn_backward",
        "flash_attn_3::bwd", "xformers_flash::flash_bwd", "aten::native_layer_norm",
    ):  # fmt: skip
        assert not is_attention_forward(name), name


def test_what_is_recomputed_may_depend_on_the_micro_batch(folder: Path) -> None:
    model, asked = load(folder), list[tuple[int, int]]()

    def choose(samples: int, tokens: int) -> Recompute:
        asked.append((samples, tokens))
        return Recompute(0.5 if samples == 2 else 0.0)

    checkpoint_blocks(model, model.blocks, choose)
    assert step(model)[2].count(2) == LAYERS // 2
    assert set(asked) == {(2, 2 * 2 * 3)}


def test_blocks_that_are_wrapped_are_found(folder: Path) -> None:
    """As FSDP1 wraps them: the model's list then has the wrappers."""

    class Wrapper(torch.nn.Module):
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *inputs: Any) -> Any:
            return self.module(*inputs)

    plain, wrapped = load(folder), load(folder)
    blocks = list(wrapped.blocks)
    checkpoint_blocks(wrapped, blocks, lambda *_: Recompute(0.5))
    checkpoint_blocks(plain, plain.blocks, lambda *_: Recompute(0.5))
    for number, block in enumerate(blocks):
        wrapped.blocks[number] = Wrapper(block)
    assert step(wrapped)[2] == step(plain)[2]
    assert step(plain)[2].count(2) == LAYERS // 2
