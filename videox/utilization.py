"""Serves the report and the running log: which share of a GPU's arithmetic goes into the model."""

from __future__ import annotations

import re

import torch

# Dense bfloat16 operations per second by the makers' data sheets; the first part of a name that fits counts.
PEAKS = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H800": 989e12, "H20": 148e12,
    "GH200": 989e12, "B200": 2250e12, "B300": 2250e12, "A100": 312e12, "A800": 312e12, "A40": 149.7e12,
    "A6000": 154.8e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "RTX 4090": 165.2e12, "RTX 3090": 71e12,
    "RTX 5090": 209.5e12, "A10": 125e12,
}  # fmt: skip
USUAL = "H100"  # of a dry run on a machine without a GPU


def peak_of(name: str) -> float | None:
    """Returns the operations per second of a GPU by its name, None for one that is not known."""
    return next((peak for part, peak in PEAKS.items() if re.search(rf"\b{part}\b", name)), None)


def device_peak(given: float | None) -> tuple[float, str]:
    """Returns (operations per second, whose they are): of the flag in TFLOP/s, of the GPU here, or of an H100."""
    if given is not None:
        return given * 1e12, "as --peak_tflops says"
    if torch.cuda.is_available() and (peak := peak_of(torch.cuda.get_device_name())):
        return peak, torch.cuda.get_device_name()
    return PEAKS[USUAL], USUAL
