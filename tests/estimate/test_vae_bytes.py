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


@pytest.mark.slow
@pytest.mark.parametrize(("size", "tiled"), [((9, 96, 128), False), ((1, 288, 256), True)])
def test_the_published_vae_allocates_what_is_estimated(size: tuple[int, int, int], tiled: bool) -> None:
    """Wan2.1's, with 127 million parameters, at a small size; in tiles of 256 x 256 where it is tiled."""
    vae: Any = AutoencoderKLWan.from_config(COMPONENTS["vae"]).eval().requires_grad_(False)
    assert sum(parameter.numel() for parameter in vae.parameters()) == pytest.approx(127e6, rel=0.01)
    use_tiling(vae, tiled)
    clip = torch.rand(1, 3, *size)
    estimate = Modules({"vae": ("diffusers.AutoencoderKLWan", COMPONENTS["vae"])}).vae_peak(
        size, half=False, tiled=tiled
    )
    measured = allocated_bytes(vae, clip)
    print(f"{size}: estimate {estimate / 1e6:.1f} MB, measured {measured / 1e6:.1f} MB")
    packed = max(parameter.nbytes for parameter in vae.parameters())  # oneDNN's copy of a convolution's weight
    assert 0.95 * estimate < measured < 1.05 * estimate + packed
