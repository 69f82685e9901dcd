"""Serves both training loops: the plans of all epochs as one stream of steps, from wherever the state stands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from videox.data.bucket_sampler import BucketBatchSampler
from videox.data.dataset import BadSample, Batch
from videox.data.plan.plan import Columns, EpochPlan, PlanSettings, count_steps, plan_epoch
from videox.distributed.accelerator import sum_over_ranks
from videox.distributed.step_sync import agree
from videox.engine.base import Engine
from videox.engine.train_state import TrainState
from videox.rng import Purpose, hash_key
from videox.tracking.progress import StepClock
from videox.training.recorder import Recorder


class StepEnd(NamedTuple):
    """What follows a step: stop, a process was asked to; epochs, how many have just ended, 0 in the midst of one."""

    stop: bool
    epochs: int


@dataclass(frozen=True)
class PlannedStep:
    """One optimizer step: its place in the plan and this process's micro-batches of it."""

    plan: EpochPlan
    epoch_step: int
    rows: np.ndarray
    loaded: Iterator[Batch]
    clock: StepClock

    def batches(self) -> Iterator[Batch]:
        """Yields this process's micro-batches; the time that they take to come counts as waiting for data.

        torch's own generators, from which dropout draws, are set for each by its key: a resumed run repeats them.
        """
        last = False
        while not last:
            with self.clock.waiting():
                batch = next(self.loaded)
            seed_generators(int(hash_key(batch["keys"][0], Purpose.DROPOUT)))
            yield batch
            last = batch["last"]

    def stamp(self) -> int:
        """Returns a number below 2^53 that processes at different steps, or with different plans, do not share."""
        return int(hash_key(self.plan.epoch, self.epoch_step, len(self.rows), int(self.rows.sum()))) >> 11


def seed_generators(seed: int) -> None:
    """Sets torch's generators, of the processor and of the GPU that is here.

    As torch.manual_seed, but for devices that are not here: for each kind of these it keeps a trace of the whole call,
    a fifth of all that a step on a tiny model takes beside the model (benchmarks/cache.py).
    """
    torch.default_generator.manual_seed(seed)
    if torch.accelerator.is_available():
        torch.get_device_module().manual_seed_all(seed)


def iterate_steps(
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


def finish_step(
    step: PlannedStep,
    accelerator: Accelerator,
    watch: Recorder,
    engine: Engine,
    *,
    loss: torch.Tensor,
    bad: Sequence[BadSample],
    stop: bool,
    clip_limit: Callable[..., torch.Tensor],
    max_bad_fraction: float,
    rate: float,
) -> StepEnd:
    """Ends an optimizer step on all processes alike: agree on what it was, then take it or leave it, and record it.

    It is left when its loss or gradient is not finite, or when every sample of it was bad. The host does not learn
    here what the device finds: that is recorded when the next step closes.

    Args:
        engine: holds the step's gradients.
        loss: float64 scalar, this process's part of the step's loss.
        bad: this process's bad samples.
        stop: this process was asked to stop.
        clip_limit: the norm to clip to, from (norm, step=steps done); both norms are scalars on the device.
        max_bad_fraction: share of the rows that may be bad.
        rate: learning rate of this step, for the records.

    Raises:
        UserError: too many steps in a row were left, too many rows are bad, or a process is at another step.
    """
    state = watch.state
    report = agree(
        accelerator, stop=stop, bad_samples=len(bad), data_wait=watch.clock.data_wait, stamp=step.stamp(),
        busy=watch.busy(),
    )  # fmt: skip
    watch.flush(report.busy)
    if report.bad_samples:  # first, so that they are named whatever ends the run
        watch.bad_samples(bad, len(step.plan.fates), max_bad_fraction)
    empty = report.bad_samples == len(step.rows)
    seed_generators(int(hash_key(state.seed, state.step, Purpose.ROUNDING)))  # weights that are whole round alike
    loss = sum_over_ranks(loss)
    update = engine.update(loss=loss, empty=empty, limit=partial(clip_limit, step=state.step))
    epoch_ended = state.advance(step.plan.n_steps)
    watch.step(step.plan, step.epoch_step, report, rate, loss, update, empty=empty)
    return StepEnd(stop=report.stop, epochs=state.epoch if epoch_ended else 0)
