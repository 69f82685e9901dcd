"""Tests of videox.estimate.gpus and duration: data sheets by device name, durations and prices."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch.utils.flop_counter import FlopCounterMode

from videox.estimate.duration import (
    Duration,
    format_duration,
    format_gpu_time,
    offload_seconds,
    text_flops,
    vae_flops_per_pixel,
)
from videox.estimate.gpus import GPUS, gpu_of_device
from videox.estimate.memory import MemorySetup, Parameters

DEVICE_NAMES = {
    "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H100 PCIe": "h100-pcie", "NVIDIA H100 NVL": "h100-nvl", "NVIDIA H200": "h200",
    "NVIDIA A100-SXM4-80GB": "a100-80", "NVIDIA A100-PCIE-40GB": "a100-40", "NVIDIA A100-SXM4-40GB": "a100-40",
    "NVIDIA GeForce RTX 4090": "rtx4090", "NVIDIA GeForce RTX 3090": "rtx3090", "NVIDIA RTX A6000": "a6000",
    "NVIDIA L4": "l4", "NVIDIA L40S": "l40s", "NVIDIA L40": "l40", "NVIDIA A10": "a10", "NVIDIA GH200 480GB": "gh200",
}  # fmt: skip


@pytest.mark.parametrize("device", DEVICE_NAMES)
def test_a_gpu_is_found_by_its_device_name(device: str) -> None:
    assert gpu_of_device(device) is GPUS[DEVICE_NAMES[device]]


def test_an_unknown_gpu_is_not_guessed() -> None:
    assert gpu_of_device("Some GPU") is None and gpu_of_device("NVIDIA A1000") is None


def test_durations_have_natural_units() -> None:
    seconds = {0.5: "0.5 seconds", 89: "89.0 seconds", 600: "10.0 minutes", 7200: "2.0 hours", 864_000: "10.0 days"}
    assert {value: format_duration(value) for value in seconds} == seconds
    assert format_gpu_time(36, 1, None) == "36.0 seconds on 1 GPU (0.01 GPU hours)"
    assert format_gpu_time(7200, 8, 2.5) == "2.0 hours on 8 GPUs (16 GPU hours, 40.00 at 2.5 per GPU hour)"


def test_a_cache_encodes_each_variant_once() -> None:
    def run(cached: bool, variants: int) -> float:
        return Duration(epoch=100.0, encoding=10.0, epochs=5, cached=cached, variants=variants).run()

    assert [run(False, 0), run(True, 0), run(True, 1), run(True, 9)] == [550, 550, 510, 550]


def test_flops_of_the_vae_are_proportional_to_the_clip() -> None:
    with torch.device("meta"):
        vae = AutoencoderKLWan(base_dim=8)
    per_pixel = vae_flops_per_pixel(vae)
    clip = torch.empty((1, 3, 17, 192, 256), device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae.encode(clip)
    assert per_pixel * clip[0, 0].numel() == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_flops_of_a_caption_are_two_per_parameter_and_token() -> None:
    with torch.device("meta"):
        encoder = torch.nn.ModuleDict(
            {"embed_tokens": torch.nn.Embedding(100, 8), "layer": torch.nn.Linear(8, 8, bias=False)}
        )
    assert text_flops({"text_encoder": encoder, "vae": encoder}, 10) == 2 * 10 * 64


def test_copies_to_the_host_take_time() -> None:
    setup = MemorySetup("single", 1, 1, True, 1.0, True, 0, 1, 1, {}, optimizer="adamw_offload")
    parameters, gpu = Parameters(10**9, 10**9, 10, 10), GPUS["rtx4090"]
    assert offload_seconds(parameters, setup, gpu) == pytest.approx(8e9 / gpu.host_bandwidth)
    assert offload_seconds(parameters, MemorySetup("single", 1, 1, True, 1.0, True, 0, 1, 1, {}), gpu) == 0
