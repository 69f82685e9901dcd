"""Batch sampler: yields this rank's micro-batches of the plan in order, starting at any step."""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import Sampler

from videox.data.plan.epoch import PADDING, EpochPlan, MicroBatch, PlannedSample, check_world_size


class BucketBatchSampler(Sampler[list[PlannedSample]]):
    """Yields micro-batches as lists of planned samples; used for all epochs, because persistent workers keep it.

    Args:
        data_group: index of this rank's data group, the ranks that get the same samples (today each rank alone).
        data_groups: their number; must divide the number of slots of the plan.
    """

    def __init__(self, *, data_group: int, data_groups: int) -> None:
        self.data_group = data_group
        self.data_groups = data_groups
        self._plan: EpochPlan | None = None
        self._start = self._first_row = 0

    def set_plan(self, plan: EpochPlan, start: int = 0, first_row: int = 0) -> None:
        """Set the epoch of the next iteration and its first step (0-based); earlier steps are skipped at no cost.

        first_row: where the plan's rows begin in the index of the data set.
        """
        check_world_size(plan.slots, self.data_groups)
        self._plan, self._start, self._first_row = plan, start, first_row

    def __iter__(self) -> Iterator[list[PlannedSample]]:
        plan = self._current()
        for step in range(self._start, plan.n_steps):
            batches = plan.micro_batches(step, self.data_group, self.data_groups)
            for number, batch in enumerate(batches):
                samples = planned_samples(batch, number, last=number == len(batches) - 1, first_row=self._first_row)
                yield [sample._replace(timesteps=plan.timesteps) for sample in samples]

    def _current(self) -> EpochPlan:
        if self._plan is None:
            raise ValueError("call set_plan() before iterating over the sampler")
        return self._plan


def planned_samples(batch: MicroBatch, number: int, last: bool, first_row: int = 0) -> list[PlannedSample]:
    """Convert a micro-batch to plain numbers, which are cheap to send to a worker.

    Args:
        batch: the micro-batch.
        number: its number among this rank's micro-batches of the step, from 0.
        last: whether it is the last of them.
        first_row: where the plan's rows begin in the index of the data set.
    """
    return [
        PlannedSample(
            int(row) if row == PADDING else int(row) + first_row, int(start), int(key), int(variant), float(weight), float(stratum), batch.bucket, batch.step,
            number, last,
        )
        for row, start, key, variant, weight, stratum in zip(
            batch.rows, batch.starts, batch.keys, batch.variants, batch.weights, batch.strata, strict=True
        )
    ]  # fmt: skip


def held_out_samples(plan: EpochPlan | None) -> Iterator[PlannedSample]:
    """Yield each row of `held_out_plan` or `compared_plan`; its number (from 0) is the key of its random draws."""
    for step in range(plan.n_steps if plan else 0):
        assert plan is not None
        (planned,) = planned_samples(plan.micro_batches(step, 0, 1)[0], 0, last=True)
        yield planned._replace(key=step, variant=step)
