"""Serves videox/network.py: operations and kept bytes are what torch counts in the real classes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from videox.estimate.flops import Network, cross_attention_network, joint_attention_network
from videox.estimate.peak_memory import peak_bytes
from videox.models.activation_checkpoint import recompute_blocks, select_blocks

CONFIGS = json.loads((Path(__file__).parents[1] / "data" / "transformers.json").read_text(encoding="utf-8"))
SMALL_WAN = {
    "num_attention_heads": 3, "attention_head_dim": 32, "ffn_dim": 320, "num_layers": 3, "in_channels": 16,
    "out_channels": 16, "text_dim": 64,
}  # fmt: skip
SMALL_HUNYUAN = {
    "num_attention_heads": 3, "attention_head_dim": 32, "num_layers": 2, "num_single_layers": 3,
    "num_refiner_layers": 2, "mlp_ratio": 4.0, "text_embed_dim": 64, "pooled_projection_dim": 48, "in_channels": 16,
    "out_channels": 16, "rope_axes_dim": (8, 12, 12), "guidance_embeds": True,
}  # fmt: skip
SMALL: Mapping[str, Mapping[str, Any]] = {
    "text": SMALL_WAN,
    "image": {**SMALL_WAN, "in_channels": 36, "image_dim": 40, "added_kv_proj_dim": 96},
    "joint": SMALL_HUNYUAN,
    "joint without guidance": {**SMALL_HUNYUAN, "guidance_embeds": False},
    "joint, first frame replaced": {**SMALL_HUNYUAN, "image_condition_type": "token_replace"},
    "joint, first frame beside": {**SMALL_HUNYUAN, "image_condition_type": "latent_concat", "in_channels": 33},
}
TEXT, IMAGE = 40, 17  # tokens


def is_joint(config: Mapping[str, Any]) -> bool:
    return "num_single_layers" in config


def build(config: Mapping[str, Any]) -> nn.Module:
    return (HunyuanVideoTransformer3DModel if is_joint(config) else WanTransformer3DModel).from_config(config)


def blocks(model: Any) -> list[nn.Module]:
    return (
        list(model.blocks)
        if hasattr(model, "blocks")
        else [*model.transformer_blocks, *model.single_transformer_blocks]
    )


def network(config: Mapping[str, Any], *, half: bool = True, text: int = TEXT) -> Network:
    if is_joint(config):
        return joint_attention_network(config, text_tokens=text, half=half)
    return cross_attention_network(
        config, text_tokens=text, image_tokens=IMAGE if config.get("image_dim") else 0, half=half
    )


def inputs(config: Mapping[str, Any], text: int = TEXT, side: int = 16, frames: int = 3) -> tuple[dict[str, Any], int]:
    """Returns the keywords of one sample and how many latent tokens it has."""
    given: dict[str, Any] = {
        "hidden_states": torch.randn(1, config["in_channels"], frames, side, side),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, text, config["text_embed_dim" if is_joint(config) else "text_dim"]),
        "return_dict": False,
    }
    if is_joint(config):
        given |= {
            "encoder_attention_mask": torch.ones(1, text),
            "pooled_projections": torch.randn(1, config["pooled_projection_dim"]),
            "guidance": torch.tensor([6000.0]) if config["guidance_embeds"] else None,
        }
    elif config.get("image_dim"):
        given["encoder_hidden_states_image"] = torch.randn(1, IMAGE, config["image_dim"])
    return given, frames * (side // 2) ** 2


def on_meta(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in given.items()}


def counted(model: nn.Module, given: dict[str, Any], backward: bool) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        prediction = model(**given)[0]
        if backward:
            prediction.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", SMALL)
def test_operations_are_those_that_torch_counts(name: str) -> None:
    config = SMALL[name]
    # the image branch of cross-attention counts on 512 text tokens
    given, tokens = inputs(config, text := 512 if config.get("image_dim") else TEXT)
    found = network(config, text=text)
    with torch.device("meta"):
        model = build(config)
    assert counted(model, on_meta(given), backward=False) == pytest.approx(found.forward(tokens), rel=1e-9)
    assert counted(model, on_meta(given), backward=True) == pytest.approx(found.model(tokens), rel=1e-9)
    assert found.model_polynomial()(tokens) == pytest.approx(found.model(tokens), rel=1e-12)


@pytest.mark.parametrize("name", ["Wan2.1-T2V-1.3B", "HunyuanVideo"])
def test_frozen_weights_take_no_operations_for_gradients_of_their_own(name: str) -> None:
    """A bias of the first block alone trains: without a product of its own, and below nearly all that there is."""
    config = CONFIGS[name]
    given, tokens = inputs(config)
    found = network(config)
    with torch.device("meta"):
        model = build(config).requires_grad_(False)
        blocks(model)[0].get_submodule("attn1" if "Wan" in name else "attn").to_q.bias.requires_grad_(True)
    counted_all = counted(model, on_meta(given), backward=True)
    assert counted_all == pytest.approx(replace(found, frozen=True).model(tokens), rel=0.03)
    assert counted_all < 0.8 * found.model(tokens)


@pytest.mark.parametrize("name", ["text", "joint"])
def test_recomputed_operations_are_those_that_torch_counts_more(name: str) -> None:
    config = SMALL[name]
    given, tokens = inputs(config)
    found = network(config)
    with torch.device("meta"):
        model: Any = build(config)
    for share in (1.0, 0.5):
        chosen = select_blocks(len(blocks(model)), share)
        recompute_blocks(model, blocks(model), share)
        more = found.model(tokens) + found.recomputed(tokens, chosen)
        assert counted(model.train(), on_meta(given), backward=True) == pytest.approx(more, rel=1e-9)


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
    """Tera-operations of a forward pass, counted independently: linear layers, and attention of all kinds."""
    text = 256 if is_joint(CONFIGS[name]) else 512
    found = network(CONFIGS[name], text=text)
    assert found.forward(tokens) / 1e12 == pytest.approx(linear + attention, abs=0.11, rel=1e-3)
    assert found.model(tokens) == pytest.approx(3 * found.forward(tokens), rel=1e-3)


# ---------------------------------------------------------------------------------------------------- kept bytes


def kept_bytes(model: nn.Module, run: Callable[[], Any]) -> int:
    """Returns the bytes that autograd keeps of a forward pass, each storage once, weights and their copies left out.

    Of a recomputed block these are its inputs, which its checkpoint holds outside of autograd.
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

    hooks = [block.register_forward_pre_hook(note) for block in blocks(model)]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        prediction = run()
    for hook in hooks:
        hook.remove()
    del prediction
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


@pytest.mark.parametrize("half", [True, False], ids=["bf16", "float32"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["text", "joint"])
def test_kept_bytes_are_those_that_autograd_keeps(name: str, share: float, half: bool) -> None:
    config = SMALL[name]
    given, tokens = inputs(config, side=32)
    model: Any = build(config).train()
    chosen = select_blocks(len(blocks(model)), share)
    if share:
        recompute_blocks(model, blocks(model), share)

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return model(**given)[0]

    assert network(config, half=half).kept(tokens, chosen) == pytest.approx(kept_bytes(model, run), rel=0.1)


def most_bytes(config: Mapping[str, Any], share: float, *, cast: bool) -> tuple[int, int]:
    """Returns (bytes, tokens): the most that the two passes of a 720p clip hold, on tensors without data.

    Weights, their copies and their gradients are left out.
    """
    with FakeTensorMode():
        model: Any = build(config).train()
        if not cast:  # as an engine that keeps bfloat16 weights
            for parameter in model.parameters():
                parameter.data = parameter.data.bfloat16()
        if share:
            recompute_blocks(model, blocks(model), share)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        text = 256 if is_joint(config) else 512
        given, _ = inputs(config, text)
        given["hidden_states"] = torch.randn(1, config["in_channels"], 21, 90, 160)
        shapes = {tuple(p.shape) for p in model.parameters() if p.ndim > 1}

        def run() -> None:
            with torch.enable_grad():
                with torch.autocast("cpu", torch.bfloat16):
                    prediction = model(**given)[0]
                prediction.square().mean().backward()

        leave = shapes | {tuple(reversed(shape)) for shape in shapes}
        most = peak_bytes(run, leave=lambda tensor: tuple(tensor.shape) in leave)
    return most, 21 * 45 * 80


@pytest.mark.parametrize("cast", [True, False], ids=["float32 weights", "bf16 weights"])
@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("name", ["Wan2.1-T2V-14B", "HunyuanVideo"])
def test_peak_is_that_of_a_pass_at_published_widths(name: str, share: float, cast: bool) -> None:
    config = {**CONFIGS[name], "num_layers": 2, "num_single_layers": 2}
    if not is_joint(CONFIGS[name]):
        del config["num_single_layers"]
    most, tokens = most_bytes(config, share, cast=cast)
    found = joint_attention_network if is_joint(config) else partial(cross_attention_network, image_tokens=0)
    text = 256 if is_joint(config) else 512
    network = found(config, text_tokens=text, half=True, cast=cast)
    assert network.peak(tokens, select_blocks(len(network.blocks), share)) == pytest.approx(most, rel=0.02)


@pytest.mark.parametrize("name", ["text", "joint"])
def test_a_recomputed_block_comes_on_top(name: str) -> None:
    found = network(SMALL[name])
    everything = range(len(found.blocks))
    one = max(block.kept(768) + block.passing(768) for block in found.blocks)
    assert found.peak(768, everything) == found.kept(768, everything) + one
    assert found.peak(768, ()) >= found.kept(768, ()) > found.peak(768, everything)
