"""Serves both training loops: the plans of all epochs as one stream of steps, from wherever the state stands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import DataLoader

from videox.data.bucket_sampler import BucketBatchSampler
from videox.data.dataset import Batch
from videox.data.plan import Columns, EpochPlan, PlanSettings, count_steps, plan_epoch
from videox.keys import mix
from videox.metrics import StepClock
from videox.state import TrainState


@dataclass(frozen=True)
class PlannedStep:
    """One optimizer step: its place in the plan and this process's micro-batches of it."""

    plan: EpochPlan
    epoch_step: int
    rows: np.ndarray
    loaded: Iterator[Batch]
    clock: StepClock

    def batches(self) -> Iterator[Batch]:
        """Yields this process's micro-batches; the time that they take to come counts as waiting for data."""
        last = False
        while not last:
            with self.clock.waiting():
                batch = next(self.loaded)
            yield batch
            last = batch["last"]

    def stamp(self) -> int:
        """Returns a number below 2^53 that processes at different steps, or with different plans, do not share."""
        return int(mix(self.plan.epoch, self.epoch_step, len(self.rows), int(self.rows.sum()))) >> 11


def walk(
    columns: Columns,
    settings: PlanSettings,
    state: TrainState,
    sampler: BucketBatchSampler,
    loader: DataLoader,
    *,
    total: int,
    clock: StepClock,
) -> Iterator[PlannedStep]:
    """Yields the steps from the state's on, until `total` are done; the caller counts them with state.advance.

    Each epoch is planned when it begins, without the rows that were found bad before; nothing is replayed.

    Args:
        columns: of the index.
        settings: of the plan.
        state: the run's; `step` and `epoch_step` say where to begin.
        sampler: of this process, the loader's own.
        loader: of build_loader.
        total: optimizer steps of the whole run.
        clock: measures the wait for data.
    """
    while state.step < total:
        plan = plan_epoch(columns, settings, state.epoch, state.quarantined)
        sampler.begin(plan, state.epoch_step)
        loaded = iter(loader)
        for epoch_step in range(state.epoch_step, plan.n_steps):
            if state.step == total:
                return
            yield PlannedStep(plan, epoch_step, plan.rows_of_step(epoch_step), loaded, clock)


def total_steps(columns: Columns, settings: PlanSettings, max_train_steps: int | None, num_train_epochs: int) -> int:
    """Returns the optimizer steps of a run: max_train_steps, else the sum over the epochs' plans.

    Rows that turn out bad while training shorten later epochs; the run then begins another epoch, so that the number
    that the learning rate was planned for stays.
    """
    return max_train_steps or sum(count_steps(columns, settings, epoch) for epoch in range(num_train_epochs))
