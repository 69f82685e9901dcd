"""Tests of videox.estimate.flops: FLOPs and saved bytes equal what torch counts in the real classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from networks import (
    CONFIGS,
    IMAGE_TOKENS,
    SMALL_CONFIGS,
    TEXT_TOKENS,
    blocks_of,
    build_transformer,
    is_joint,
    model_inputs,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from videox.estimate.flops import Network, cross_attention_network, joint_attention_network
from videox.estimate.peak_memory import peak_bytes
from videox.models.activation_checkpoint import checkpoint_blocks
from videox.models.recompute import Recompute, select_blocks


def network(config: Mapping[str, Any], *, half: bool = True, text: int = TEXT_TOKENS) -> Network:
    if is_joint(config):
        return joint_attention_network(config, text_tokens=text, half=half)
    return cross_attention_network(
        config, text_tokens=text, image_tokens=IMAGE_TOKENS if config.get("image_dim") else 0, half=half
    )


def on_meta(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in given.items()}


def count_flops(model: nn.Module, given: dict[str, Any], backward: bool) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        prediction = model(**given)[0]
        if backward:
            prediction.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", SMALL_CONFIGS)
def test_flops_equal_torchs_count(name: str) -> None:
    config = SMALL_CONFIGS[name]
    # the image branch of cross-attention assumes 512 text tokens
    given, tokens = model_inputs(config, text := 512 if config.get("image_dim") else TEXT_TOKENS)
    found = network(config, text=text)
    with torch.device("meta"):
        model = build_transformer(config)
    assert count_flops(model, on_meta(given), backward=False) == pytest.approx(found.forward(tokens), rel=1e-9)
    assert count_flops(model, on_meta(given), backward=True) == pytest.approx(found.forward_backward(tokens), rel=1e-9)
    assert found.forward_backward_polynomial()(tokens) == pytest.approx(found.forward_backward(tokens), rel=1e-12)


def test_flops_with_a_timestep_for_each_token_equal_torchs_count() -> None:
    config = SMALL_CONFIGS["text"]
    given, tokens = model_inputs(config, by_token=True)
    found = cross_attention_network(
        config, text_tokens=TEXT_TOKENS, image_tokens=0, half=True, timestep_per_token=True
    )
    with torch.device("meta"):
        model = build_transformer(config)
    for backward, computed in ((False, found.forward(tokens)), (True, found.forward_backward(tokens))):
        assert count_flops(model, on_meta(given), backward=backward) == pytest.approx(computed, rel=1e-9)
    assert found.forward(tokens) > 1.02 * network(config).forward(tokens)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Wan2.1-T2V-1.3B", "HunyuanVideo"])
def test_frozen_weights_have_no_flops_for_their_gradients(name: str) -> None:
    """Only a bias of the first block is trained: it needs no matrix product itself, but nearly all gradients."""
    config = CONFIGS[name]
    given, tokens = model_inputs(config)
    found = network(config)
    with torch.device("meta"):
        model = build_transformer(config).requires_grad_(False)
        blocks_of(model)[0].get_submodule("attn1" if "Wan" in name else "attn").to_q.bias.requires_grad_(True)
    counted_all = count_flops(model, on_meta(given), backward=True)
    assert counted_all == pytest.approx(replace(found, frozen=True).forward_backward(tokens), rel=0.03)
    assert counted_all < 0.8 * found.forward_backward(tokens)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["text", "joint"])
def test_recomputed_flops_equal_torchs_additional_count(name: str) -> None:
    config = SMALL_CONFIGS[name]
    given, tokens = model_inputs(config)
    found = network(config)
    with torch.device("meta"):
        model: Any = build_transformer(config)
    for share in (1.0, 0.5):
        chosen = select_blocks(len(blocks_of(model)), share)
        checkpoint_blocks(model, blocks_of(model), lambda *_, share=share: Recompute(share))
        more = found.forward_backward(tokens) + found.recompute(tokens, chosen)
        assert count_flops(model.train(), on_meta(given), backward=True) == pytest.approx(more, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "tokens", "linear", "attention"),
    [
        ("Wan2.1-T2V-1.3B", 13312, 33.5, 33.9), ("Wan2.1-T2V-1.3B", 32760, 82.1, 200.9),
        ("Wan2.1-T2V-1.3B", 75600, 189.2, 1060.6), ("Wan2.1-T2V-14B", 13312, 320.5, 150.8),
        ("Wan2.1-T2V-14B", 32760, 785.4, 892.9), ("Wan2.1-T2V-14B", 75600, 1809.7, 4713.7),
        ("HunyuanVideo", 13312, 184.4, 135.7), ("HunyuanVideo", 32760, 448.7, 803.7),
        ("HunyuanVideo", 75600, 1030.8, 4242.4),
    ],
)  # fmt: skip
def test_published_sizes(name: str, tokens: int, linear: float, attention: float) -> None:
    """TFLOPs of a forward pass, counted independently: linear layers, and attention of all kinds."""
    text = 256 if is_joint(CONFIGS[name]) else 512
    found = network(CONFIGS[name], text=text)
    assert found.forward(tokens) / 1e12 == pytest.approx(linear + attention, abs=0.11, rel=1e-3)
    assert found.forward_backward(tokens) == pytest.approx(3 * found.forward(tokens), rel=1e-3)


# ------------------------------------------------------------------------------------------------ saved and peak bytes


def measure_saved_bytes(model: nn.Module, run: Callable[[], Any]) -> int:
    """Return the bytes that autograd saves in a forward pass, each storage once, without weights and their copies.

    Of a recomputed block these are its inputs, which its checkpoint stores outside of autograd.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    shapes = {tuple(p.shape) for p in model.parameters() if p.ndim > 1}
    shapes |= {tuple(reversed(shape)) for shape in shapes}
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own and tuple(tensor.shape) not in shapes:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def note(block: nn.Module, given: tuple[Any, ...]) -> None:
        del block
        for value in given:
            for tensor in value if isinstance(value, tuple) else (value,):
                if isinstance(tensor, Tensor):
                    keep(tensor)

    hooks = [block.register_forward_pre_hook(note) for block in blocks_of(model)]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        prediction = run()
    for hook in hooks:
        hook.remove()
    del prediction
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


@pytest.mark.parametrize("half", [True, False], ids=["bf16", "float32"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["text", "joint"])
def test_saved_bytes_equal_those_of_autograd(name: str, share: float, half: bool) -> None:
    config = SMALL_CONFIGS[name]
    given, tokens = model_inputs(config, side=32)
    model: Any = build_transformer(config).train()
    chosen = select_blocks(len(blocks_of(model)), share)
    if share:
        checkpoint_blocks(model, blocks_of(model), lambda *_: Recompute(share))

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return model(**given)[0]

    assert network(config, half=half).saved_bytes(tokens, chosen) == pytest.approx(
        measure_saved_bytes(model, run), rel=0.1
    )


@pytest.mark.parametrize("half", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["bf16", "float32"])
@pytest.mark.parametrize("share", [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
def test_saved_bytes_with_a_timestep_for_each_token_equal_those_of_autograd(share: float, half: bool) -> None:
    config = SMALL_CONFIGS["text"]
    given, tokens = model_inputs(config, side=32, by_token=True)
    if half:
        given["encoder_hidden_states"] = given["encoder_hidden_states"].bfloat16()
    model: Any = build_transformer(config).train()
    chosen = select_blocks(len(blocks_of(model)), share)
    if share:
        checkpoint_blocks(model, blocks_of(model), lambda *_: Recompute(share))

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return model(**given)[0]

    found = cross_attention_network(
        config, text_tokens=TEXT_TOKENS, image_tokens=0, half=half, timestep_per_token=True
    )
    assert found.saved_bytes(tokens, chosen) == pytest.approx(measure_saved_bytes(model, run), rel=0.02)


def measure_peak_bytes(
    config: Mapping[str, Any], share: float, *, cast: bool, keep: str = "", by_token: bool = False
) -> tuple[int, int]:
    """Return (bytes, tokens): the peak of forward and backward pass of a 720p clip, on tensors without data.

    Weights, their copies and their gradients are left out.
    """
    with FakeTensorMode():
        model: Any = build_transformer(config).train()
        if not cast:  # as an engine that keeps bfloat16 weights
            for parameter in model.parameters():
                parameter.data = parameter.data.bfloat16()
        if share:
            checkpoint_blocks(model, blocks_of(model), lambda *_: Recompute(share, keep))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        text = 256 if is_joint(config) else 512
        given, _ = model_inputs(config, text)
        given["hidden_states"] = torch.randn(1, config["in_channels"], 21, 90, 160)
        if by_token:
            given["timestep"] = torch.full((1, 21 * 45 * 80), 500.0)
            given["encoder_hidden_states"] = given["encoder_hidden_states"].bfloat16()
        shapes = {tuple(p.shape) for p in model.parameters() if p.ndim > 1}

        def run() -> None:
            with torch.enable_grad():
                with torch.autocast("cpu", torch.bfloat16):
                    prediction = model(**given)[0]
                prediction.square().mean().backward()

        leave = shapes | {tuple(reversed(shape)) for shape in shapes}
        most = peak_bytes(run, ignore=lambda tensor: tuple(tensor.shape) in leave)
    return most, 21 * 45 * 80


@pytest.mark.parametrize("cast", [True, False], ids=["float32 weights", "bf16 weights"])
@pytest.mark.parametrize("share", [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
@pytest.mark.parametrize("name", ["Wan2.1-T2V-14B", "HunyuanVideo"])
def test_the_peak_equals_that_of_a_traced_pass_at_published_widths(name: str, share: float, cast: bool) -> None:
    config = {**CONFIGS[name], "num_layers": 2, "num_single_layers": 2}
    if not is_joint(CONFIGS[name]):
        del config["num_single_layers"]
    most, tokens = measure_peak_bytes(config, share, cast=cast)
    found = joint_attention_network if is_joint(config) else partial(cross_attention_network, image_tokens=0)
    text = 256 if is_joint(config) else 512
    network = found(config, text_tokens=text, half=True, cast=cast)
    assert network.peak_bytes(tokens, select_blocks(len(network.blocks), share)) == pytest.approx(most, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("cast", [True, False], ids=["float32 weights", "bf16 weights"])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_peak_with_a_timestep_for_each_token_equals_that_of_a_traced_pass(share: float, cast: bool) -> None:
    config = {**CONFIGS["Wan2.1-T2V-1.3B"], "num_layers": 2}
    most, tokens = measure_peak_bytes(config, share, cast=cast, by_token=True)
    found = cross_attention_network(
        config, text_tokens=512, image_tokens=0, half=True, cast=cast, timestep_per_token=True
    )
    assert found.peak_bytes(tokens, select_blocks(2, share)) == pytest.approx(most, rel=0.02)


@pytest.mark.parametrize("keep", ["attention", pytest.param("self_attention", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["Wan2.1-T2V-14B", pytest.param("HunyuanVideo", marks=pytest.mark.slow)])
def test_the_peak_includes_the_kept_outputs_of_attention(name: str, keep: str) -> None:
    config = {**CONFIGS[name], "num_layers": 4, "num_single_layers": 4}
    joint = is_joint(CONFIGS[name])
    if not joint:
        del config["num_single_layers"]
    (without, tokens), (most, _) = (measure_peak_bytes(config, 1.0, cast=False, keep=kept) for kept in ("", keep))
    found = joint_attention_network if joint else partial(cross_attention_network, image_tokens=0)
    network = found(config, text_tokens=256 if joint else 512, half=True, cast=False)
    everything = range(len(network.blocks))
    assert network.peak_bytes(tokens, everything, keep) == pytest.approx(most, rel=0.02)
    one = network.blocks[0].kept_bytes(keep)(tokens)
    assert most - without == pytest.approx((len(network.blocks) - 1) * one, rel=0.1)


@pytest.mark.parametrize("name", ["text", "image", "joint"])
def test_kept_attention_is_not_counted_as_recomputed(name: str) -> None:
    config = SMALL_CONFIGS[name]
    given, tokens = model_inputs(config, text := 512 if config.get("image_dim") else TEXT_TOKENS)
    found = network(config, text=text)
    everything = range(len(found.blocks))
    with torch.device("meta"):
        attention = build_transformer(config)
    forward = count_flops(attention, on_meta(given), backward=False)
    linear = forward - found.outside(tokens) - sum(block.attention(tokens) for block in found.blocks)
    assert found.recompute(tokens, everything, "attention") == pytest.approx(linear, rel=1e-9)
    assert found.recompute(tokens, everything, "attention") <= found.recompute(tokens, everything, "self_attention")
    assert found.recompute(tokens, everything, "self_attention") < found.recompute(tokens, everything)


@pytest.mark.parametrize("name", ["text", "joint"])
def test_the_peak_includes_one_recomputed_block(name: str) -> None:
    found = network(SMALL_CONFIGS[name])
    everything = range(len(found.blocks))
    one = max(block.saved(768) + block.transient(768) for block in found.blocks)
    assert found.peak_bytes(768, everything) == found.saved_bytes(768, everything) + one
    assert found.peak_bytes(768, ()) >= found.saved_bytes(768, ()) > found.peak_bytes(768, everything)
