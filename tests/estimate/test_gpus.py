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
)
from videox.estimate.gpus import GPUS, gpu_of_device
from videox.estimate.measure import count_without_embeddings, vae_flops_per_pixel

DEVICE_NAMES = {
    "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H100 PCIe": "h100-pcie", "NVIDIA H100 NVL": "h100-nvl", "NVIDIA H200": "h200",
    "NVIDIA A100-SXM4-80GB": "a100-80", "NVIDIA A100-PCIE-40GB": "a100-40", "NVIDIA A100-SXM4-40GB": "a100-40",
    "NVIDIA GeForce RTX 4090": "rtx4090", "NVIDIA GeForce RTX 3090": "rtx3090", "NVIDIA RTX A6000": "a6000",
    "NVIDIA L4": "l4", "NVIDIA L40S": "l40s", "NVIDIA L40": "l40", "NVIDIA A10": "a10", "NVIDIA GH200 480GB": "gh200",
}  # fmt: skip


@pytest.mark.parametrize("device", DEVICE_NAMES)
def test_a_gpu_is_found_by_its_device_name(device: str) -> None:
    assert gpu_of_device(device) is GPUS[DEVICE_NAMES[device]]


# Of the data sheets: float32 units, boost clock in MHz, bits of the memory bus, Gbit per second and pin.
CARDS = {
    "rtx3060": (3584, 1777, 192, 15), "rtx3090": (10_496, 1695, 384, 19.5), "rtx4080": (9728, 2505, 256, 22.4),
    "rtx4090": (16_384, 2520, 384, 21), "rtx5080": (10_752, 2617, 256, 30), "rtx5090": (21_760, 2407, 512, 28),
    "a10": (9216, 1695, 384, 12.5), "a40": (10_752, 1740, 384, 14.5), "a6000": (10_752, 1800, 384, 16),
    "a100-40": (6912, 1410, 5120, 2.43), "a100-80": (6912, 1410, 5120, 3.186), "a800": (6912, 1410, 5120, 3.186),
    "l4": (7424, 2040, 192, 12.5), "l40": (18_176, 2490, 384, 18), "l40s": (18_176, 2520, 384, 18),
    "h100-pcie": (14_592, 1755, 5120, 3.13), "h100": (16_896, 1980, 5120, 5.23), "h800": (16_896, 1980, 5120, 5.23),
    "h200": (16_896, 1980, 6144, 6.25), "gh200": (16_896, 1980, 6144, 5.2),
}  # fmt: skip
# bfloat16 with float32 accumulation is this many times float32: GeForce cards have half of the rate of the workstation
# cards with the same chip
RATIO = {
    2: ("rtx3090", "rtx3060", "rtx4080", "rtx4090", "rtx5080", "rtx5090", "l40"), 4: ("a10", "a40", "a6000", "l4", "l40s"),
    16: ("a100-40", "a100-80", "a800"),
}  # fmt: skip


@pytest.mark.parametrize("name", CARDS)
def test_speeds_follow_from_cores_and_clocks(name: str) -> None:
    units, clock, bus, rate = CARDS[name]
    assert GPUS[name].fp32 == pytest.approx(2 * units * clock * 1e6, rel=0.01)  # a multiply-add per unit and cycle
    assert GPUS[name].memory_bandwidth == pytest.approx(bus / 8 * rate * 1e9, rel=0.01)
    for ratio, names in RATIO.items():
        if name in names:
            assert GPUS[name].bf16 == pytest.approx(ratio * GPUS[name].fp32, rel=0.02)


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


class ConvolutionEncoder(torch.nn.Module):
    """An encoder of one convolution without padding."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = torch.nn.Conv3d(3, 5, 3, bias=False, device="meta")

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.convolution(pixels)


def test_flops_of_a_convolution_are_counted_without_a_print(capsys: pytest.CaptureFixture[str]) -> None:
    """7 x 126 x 126 outputs of a clip of 9 x 128 x 128 pixels, each of 5 channels with 3 x 27 multiply-adds."""
    expected = 7 * 126 * 126 * 5 * 2 * 3 * 27 / (9 * 128 * 128)
    assert vae_flops_per_pixel(ConvolutionEncoder()) == expected
    assert capsys.readouterr().out == ""


def test_embeddings_take_no_flops_of_a_caption() -> None:
    with torch.device("meta"):
        encoder = torch.nn.ModuleDict(
            {"embed_tokens": torch.nn.Embedding(100, 8), "layer": torch.nn.Linear(8, 8, bias=False)}
        )
    assert count_without_embeddings(encoder) == 64
