"""An optimizer step that is not recorded yet: its loss and gradient norm are still being copied from the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from videox.data.plan.epoch import EpochPlan
from videox.device import AsyncScalars, DeviceEvent, Span, seconds_by_phase
from videox.distributed.step_sync import StepReport

# Phases of a step (videox.device.memory_phase) by the metric that their time is part of; any other "the ..." is an
# encoder.
PARTS = {
    "the forward pass": "forward_seconds", "the backward pass": "backward_seconds",
    "the optimizer step": "optimizer_seconds",
}  # fmt: skip


@dataclass(frozen=True)
class PendingStep:
    """A step whose work the host has queued. It is recorded one step later, while the device runs the next step.

    Attributes:
        step: number of the optimizer step, from 1.
        plan: the epoch plan that the step belongs to.
        epoch_step: index of the step in the plan, from 0.
        report: what the ranks agreed on in this step.
        lr: learning rate of the parameters that train at the full LR (the others train at half of it).
        empty: whether none of its samples could be read.
        scalars: loss, gradient norm before clipping, whether the optimizer step was applied, and each sample's part of
            the loss.
        host_seconds: duration by the host's clock.
        data_wait: seconds of it that this rank waited for data.
        begin: when the device began the step.
        work_done: when this rank's own work of the step was done, None = not measured.
        spans: the phases of this rank's work.
    """

    step: int
    plan: EpochPlan
    epoch_step: int
    report: StepReport
    lr: float
    empty: bool
    scalars: AsyncScalars
    host_seconds: float
    data_wait: float
    begin: DeviceEvent
    work_done: DeviceEvent | None
    spans: Sequence[Span] = ()

    def parts(self) -> dict[str, float]:
        """Return this rank's seconds of the step by metric, without waiting. `scalars` must have been read before.

        encode_seconds: the frozen encoders, 0 where a cache has their outputs; forward_seconds, backward_seconds,
        optimizer_seconds: as measured by the device, with the waiting for other ranks that is part of them.
        """
        parts = dict.fromkeys(("encode_seconds", *PARTS.values()), 0.0)
        for phase, seconds in seconds_by_phase(self.spans).items():
            parts[PARTS.get(phase, "encode_seconds")] += seconds
        return parts

    def duration(self) -> float:
        """Return the duration of the step in seconds, by the device's clock if it has one.

        The host only queues work for a GPU and runs ahead of it, so its clock does not show when a step ended.
        """
        end = self.scalars.event
        return max(end.since(self.begin), 1e-9) if end.on_device else self.host_seconds

    def busy(self) -> float:
        """Return the seconds in which this rank waited neither for data nor for other ranks; 0 = not measured."""
        if self.work_done is None:
            return 0.0
        return max(self.work_done.since(self.begin) - self.data_wait, 1e-9)


def step_scalars(loss: Tensor, grad_norm: Tensor, applied: Tensor, parts: Tensor) -> AsyncScalars:
    """Start to copy a step's scalars to the host, from the device of `loss`; parts: of the loss, one per sample."""
    return AsyncScalars(loss, grad_norm, applied, parts, device=loss.device)
