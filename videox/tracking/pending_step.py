"""Serves the run's records: an optimizer step whose loss and norm are still on their way from the device."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from videox.data.plan.plan import EpochPlan
from videox.device import AsyncScalars, DeviceEvent
from videox.distributed.step_sync import StepReport


@dataclass(frozen=True)
class PendingStep:
    """A step that is done as far as the host is concerned. It is recorded while the device works at the next one.

    Attributes:
        step: its number, from 1; plan, epoch_step: its place in the plan, from 0.
        report: what the processes agreed on in it.
        rate: learning rate of the full-rate group.
        empty: none of its samples could be read.
        numbers: loss, gradient norm before clipping, and whether the weights were stepped.
        seconds: by the host's clock.
        waited: seconds of it that this process waited for data.
        begin: when the device began it; work_done: when this process's own part was done, None = not measured.
    """

    step: int
    plan: EpochPlan
    epoch_step: int
    report: StepReport
    rate: float
    empty: bool
    numbers: AsyncScalars
    seconds: float
    waited: float
    begin: DeviceEvent
    work_done: DeviceEvent | None

    def took(self) -> float:
        """Returns the seconds of the step: by the device's clock where it has one, which the host runs ahead of."""
        end = self.numbers.moment
        return max(end.since(self.begin), 1e-9) if end.on_device else self.seconds

    def busy(self) -> float:
        """Returns the seconds that this process worked and waited neither for data nor for others; 0 = not known."""
        if self.work_done is None:
            return 0.0
        return max(self.work_done.since(self.begin) - self.waited, 1e-9)


def numbers_of(loss: Tensor, grad_norm: Tensor, applied: Tensor) -> AsyncScalars:
    """Returns a step's numbers on their way; loss: on the device."""
    return AsyncScalars(loss, grad_norm, applied, device=loss.device)
