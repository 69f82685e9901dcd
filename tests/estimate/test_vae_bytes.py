"""Tests of the estimated memory of encoding: what a published VAE with random weights allocates on the CPU."""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan

from videox.encoders.vae import use_tiling
from videox.estimate.module_facts import Modules

COMPONENTS = json.loads(
    (Path(__file__).resolve().parents[2] / "config/models/wan2.1-t2v-14b.json").read_text(encoding="utf-8")
)["components"]


def allocated_bytes(vae: Any, clip: torch.Tensor) -> int:
    """Return the most bytes that torch's allocator has given out while a clip is encoded, also within operators."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.no_grad(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        vae.encode(clip)
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events))


def published_vae(*, tiled: bool) -> Any:
    """Return Wan2.1's VAE, with 127 million random parameters."""
    vae: Any = AutoencoderKLWan.from_config(COMPONENTS["vae"]).eval().requires_grad_(False)
    assert sum(parameter.numel() for parameter in vae.parameters()) == pytest.approx(127e6, rel=0.01)
    use_tiling(vae, tiled)
    return vae


def estimate(size: tuple[int, int, int], *, tiled: bool) -> float:
    vae = Modules({"vae": ("diffusers.AutoencoderKLWan", COMPONENTS["vae"])})
    return vae.vae_peak(size, half=False, tiled=tiled)


@pytest.mark.slow
def test_the_published_vae_allocates_what_is_estimated() -> None:
    size, vae = (9, 96, 128), published_vae(tiled=False)
    measured, expected = allocated_bytes(vae, torch.rand(1, 3, *size)), estimate(size, tiled=False)
    packed = max(parameter.nbytes for parameter in vae.parameters())  # oneDNN's copy of a convolution's weight
    assert 0.95 * expected < measured < 1.05 * expected + packed


@pytest.mark.slow
def test_a_clip_in_tiles_allocates_what_a_tile_does() -> None:
    """The estimate says so, and so does torch's allocator; tiles have 256 x 256 pixels."""
    clip, tile = (1, 288, 256), (1, 256, 256)
    assert estimate(clip, tiled=True) == pytest.approx(estimate(tile, tiled=False), rel=0.01)
    in_tiles = allocated_bytes(published_vae(tiled=True), torch.rand(1, 3, *clip))
    assert in_tiles == pytest.approx(allocated_bytes(published_vae(tiled=False), torch.rand(1, 3, *tile)), rel=0.01)
