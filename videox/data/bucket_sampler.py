"""Serves the loader: this process's micro-batches of the plan, in order, from any step."""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import Sampler

from videox.data.dataset import PlannedSample
from videox.data.plan.plan import EpochPlan, MicroBatch, check_world_size


class BucketBatchSampler(Sampler[list[PlannedSample]]):
    """Yields micro-batches as lists of planned samples; one instance serves every epoch, so that workers can persist.

    Args:
        rank: of this process.
        world_size: number of processes; must divide the plan's slots.
    """

    def __init__(self, *, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self._plan: EpochPlan | None = None
        self._start = 0

    def begin(self, plan: EpochPlan, start: int = 0) -> None:
        """Sets the epoch that the next iteration yields, from step `start` (0-based); nothing is replayed."""
        check_world_size(plan.slots, self.world_size)
        self._plan, self._start = plan, start

    def __iter__(self) -> Iterator[list[PlannedSample]]:
        plan = self._current()
        for step in range(self._start, plan.n_steps):
            batches = plan.micro_batches(step, self.rank, self.world_size)
            for number, batch in enumerate(batches):
                yield planned_samples(batch, number, last=number == len(batches) - 1)

    def _current(self) -> EpochPlan:
        if self._plan is None:
            raise ValueError("begin() gives the sampler its plan before it is iterated")
        return self._plan


def planned_samples(batch: MicroBatch, number: int, last: bool) -> list[PlannedSample]:
    """Returns a micro-batch, the number-th of its process in the step, as plain numbers that are cheap to send."""
    return [
        PlannedSample(
            int(row), int(start), int(key), int(variant), float(weight), float(stratum), batch.bucket, batch.step,
            number, last,
        )
        for row, start, key, variant, weight, stratum in zip(
            batch.rows, batch.starts, batch.keys, batch.variants, batch.weights, batch.strata, strict=True
        )
    ]  # fmt: skip


def held_out_samples(plan: EpochPlan | None) -> Iterator[PlannedSample]:
    """Yields each held-out row as a sample whose masks are drawn by its number, from 0; plan: of held_out_plan."""
    for step in range(plan.n_steps if plan else 0):
        assert plan is not None
        (planned,) = planned_samples(plan.micro_batches(step, 0, 1)[0], 0, last=True)
        yield planned._replace(key=step, variant=step)
