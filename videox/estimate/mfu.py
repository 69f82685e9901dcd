"""MFU and planned balance of a step: the share of a GPU's FLOPs that go into the model."""

from __future__ import annotations

import numpy as np
import torch

from videox.data.plan.balance import balance, plan_costs
from videox.data.plan.epoch import EpochPlan
from videox.data.plan.settings import PlanSettings
from videox.estimate.flops import Network
from videox.estimate.gpus import gpu_of_device
from videox.estimate.polynomial import Polynomial


def peak_of(name: str) -> float | None:
    """Return the peak bfloat16 FLOPs per second of a GPU by its device name, None for an unknown one."""
    gpu = gpu_of_device(name)
    return gpu.bf16 if gpu else None


class Meter:
    """Compares the duration of a step with what the hardware and the plan allow.

    Args:
        flops_per_sample: FLOPs of the forward and backward pass of one sample, without recomputation, by its tokens.
        peak: FLOPs per second of one device; None where it is not known.
        processes: number of processes that share a step.
        settings: of the plan.
    """

    def __init__(
        self, flops_per_sample: Polynomial, peak: float | None, processes: int, settings: PlanSettings
    ) -> None:
        self.flops_per_sample, self.peak, self.processes, self.settings = flops_per_sample, peak, processes, settings
        self._plan: EpochPlan | None = None
        self._costs = self._padding = np.zeros((0, 0, 0))
        self._of_steps = np.zeros(0)

    def measure(self, plan: EpochPlan, epoch_step: int, seconds: float) -> dict[str, float]:
        """Return the metrics of a step that took `seconds`.

        planned_balance is the planned share (0 to 1) of the devices' time in which none waits for another; mfu, where
        the peak is known, is the share of the devices' FLOPs that went into the model.
        """
        self._read(plan)
        step = slice(epoch_step, epoch_step + 1)
        metrics = {"planned_balance": balance(self._costs[step], self.settings.barrier, self._padding[step])}
        if self.peak is not None:
            flops = sum(self.flops_per_sample(plan.tokens_of(bucket)) for bucket in plan.buckets_of_step(epoch_step))
            metrics["mfu"] = flops / (seconds * self.peak * self.processes)
        return metrics

    def costs_of_steps(self, plan: EpochPlan) -> np.ndarray:
        """Return the planned cost of each step, float64 [steps]: of the most expensive rank between two barriers."""
        self._read(plan)
        return self._of_steps

    def _read(self, plan: EpochPlan) -> None:
        if plan is not self._plan:
            self._plan = plan
            self._costs, self._padding = plan_costs(plan, self.settings, self.processes)
            spent = self._costs + self._padding
            by_micro = self.settings.barrier == "micro"
            self._of_steps = spent.max(axis=2).sum(axis=1) if by_micro else spent.sum(axis=1).max(axis=1)


def run_meter(
    network: Network, *, peak_tflops: float | None, processes: int, settings: PlanSettings, device: torch.device
) -> Meter:
    """Return the meter of a run; peak_tflops: None uses the GPU's own peak, and reports no MFU on other devices."""
    peak = None if peak_tflops is None else peak_tflops * 1e12
    if peak is None and device.type == "cuda":
        peak = peak_of(torch.cuda.get_device_name(device))
    return Meter(network.forward_backward_polynomial(), peak, processes, settings)
