"""Serves the report and the running log: which share of a GPU's arithmetic goes into the model."""

from __future__ import annotations

import re

import numpy as np
import torch

from videox.data.plan.balance import balance, plan_costs
from videox.data.plan.epoch import EpochPlan
from videox.data.plan.settings import PlanSettings
from videox.estimate.flops import Network, Polynomial
from videox.shapes import token_count

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


class Meter:
    """Compares a step with what the hardware and the plan promise.

    Args:
        operations: of forward and backward pass of one sample, recomputation left out, from its tokens.
        peak: operations per second of one device; None where that is not known.
        processes: that share a step.
        settings: of the plan.
    """

    def __init__(self, operations: Polynomial, peak: float | None, processes: int, settings: PlanSettings) -> None:
        self.operations, self.peak, self.processes, self.settings = operations, peak, processes, settings
        self._plan: EpochPlan | None = None
        self._costs = self._padding = np.zeros((0, 0, 0))

    def measure(self, plan: EpochPlan, epoch_step: int, seconds: float) -> dict[str, float]:
        """Returns what a step of some seconds reached.

        planned_balance is the share (0 to 1) of the devices' time in which none had to wait for another, as the plan
        has it; mfu the share of their arithmetic that went into the model, where its peak is known.
        """
        if plan is not self._plan:
            self._plan = plan
            self._costs, self._padding = plan_costs(plan, self.settings, self.processes)
        this = slice(epoch_step, epoch_step + 1)
        found = {"planned_balance": balance(self._costs[this], self.settings.barrier, self._padding[this])}
        if self.peak is not None:
            work = sum(self.operations(token_count(bucket)) for bucket in plan.buckets_of_step(epoch_step))
            found["mfu"] = work / (seconds * self.peak * self.processes)
        return found


def run_meter(
    network: Network, *, peak_tflops: float | None, processes: int, settings: PlanSettings, device: torch.device
) -> Meter:
    """Returns the meter of a run; peak_tflops: None takes the GPU's own, and nothing on other devices."""
    peak = None if peak_tflops is None else peak_tflops * 1e12
    if peak is None and device.type == "cuda":
        peak = peak_of(torch.cuda.get_device_name(device))
    return Meter(network.model_polynomial(), peak, processes, settings)
