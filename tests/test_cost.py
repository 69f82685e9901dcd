"""Tests of benchmarks/cost.py: the cost that the plan balances by equals torch's count for a real Wan2.1."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cost import cost_coefficients
from videox.shapes import Bucket, latent_shape, token_count

# (dim per head, heads, feed-forward width, layers) of Wan2.1 1.3B and 14B; text_dim 4096, 512 text tokens
SIZES = {"1.3B": (128, 12, 8960, 30), "14B": (128, 40, 13824, 40)}
TEXT_TOKENS = 512
SHAPES = [Bucket(1, 256, 256), Bucket(17, 480, 832), Bucket(81, 720, 1248)]


@cache
def wan(size: str) -> WanTransformer3DModel:
    """Return the published architecture on the meta device: only shapes are computed."""
    head_dim, heads, ffn_dim, layers = SIZES[size]
    with torch.device("meta"):
        return WanTransformer3DModel(
            num_attention_heads=heads, attention_head_dim=head_dim, ffn_dim=ffn_dim, num_layers=layers,
            in_channels=16, out_channels=16, text_dim=4096,
        )  # fmt: skip


@cache
def count_flops(model: WanTransformer3DModel, bucket: Bucket, batch: int = 1) -> int:
    """Return the FLOPs of a forward pass as torch counts them from the shapes of the matrix products."""
    latents = torch.empty(batch, 16, *latent_shape(bucket), device="meta")
    text = torch.empty(batch, TEXT_TOKENS, 4096, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(latents, torch.empty(batch, device="meta"), text, return_dict=False)
    return counter.get_total_flops()


def estimated(size: str, bucket: Bucket) -> float:
    head_dim, heads, ffn_dim, layers = SIZES[size]
    linear, quadratic = cost_coefficients(
        dim=head_dim * heads, ffn_dim=ffn_dim, layers=layers, text_tokens=TEXT_TOKENS
    )
    tokens = token_count(bucket)
    return linear * tokens + quadratic * tokens**2


def left_out(size: str, bucket: Bucket) -> int:
    """Return the FLOPs that the estimate leaves out on purpose: those of text and timestep, and the outer layers."""
    head_dim, heads, _, layers = SIZES[size]
    dim, tokens = head_dim * heads, token_count(bucket)
    text = TEXT_TOKENS * (2 * (4096 * dim + dim * dim) + layers * 2 * 2 * dim * dim)  # embedder, keys and values
    time = 2 * (256 * dim + dim * dim + 6 * dim * dim)
    ends = tokens * 2 * (16 * 4 * dim + dim * 16 * 4)
    return text + time + ends


@pytest.mark.parametrize("size", [pytest.param(s, marks=pytest.mark.slow if s == "14B" else ()) for s in SIZES])
def test_the_estimate_equals_torchs_count_without_text_and_outer_layers(size: str) -> None:
    model = wan(size)
    for bucket in SHAPES:
        total = count_flops(model, bucket)
        assert estimated(size, bucket) + left_out(size, bucket) == pytest.approx(total, rel=1e-6)
        if token_count(bucket) > 1000:  # for clips, little is left out
            assert estimated(size, bucket) == pytest.approx(total, rel=0.06)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_cost_ratios_between_shapes_equal_torchs(size: str) -> None:
    model = wan(size)
    small, large = SHAPES[1], SHAPES[2]
    ratio = count_flops(model, large) / count_flops(model, small)
    assert estimated(size, large) / estimated(size, small) == pytest.approx(ratio, rel=0.06)
    assert ratio > 1.2 * token_count(large) / token_count(small)  # cost grows faster than tokens


@pytest.mark.slow
def test_a_batch_costs_its_samples() -> None:
    model = wan("1.3B")
    assert count_flops(model, SHAPES[1], batch=3) == pytest.approx(3 * count_flops(model, SHAPES[1]), rel=1e-9)
