"""The loop's parts: the plans of all epochs as one stream of steps, agreement of the ranks, update, end of a step."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

from torch import Tensor

from videox.data.plan.plan import plan_epoch
from videox.device import memory_phase
from videox.distributed.step_sync import StepReport, sync_step
from videox.engine.base import Engine, Update
from videox.rng import Purpose, hash_key
from videox.tracking.events import append_event
from videox.tracking.overfitting import last_is_best, waited
from videox.tracking.progress import StepClock
from videox.training.checkpointing import Checkpointer
from videox.training.context import Context
from videox.training.data import DataPipeline
from videox.training.guard import StepGuard
from videox.training.recorder import Recorder
from videox.training.schedule import Schedule
from videox.training.step import PlannedStep, seed_generators
from videox.training.validator import Validator


def iterate_steps(schedule: Schedule, data: DataPipeline, clock: StepClock) -> Iterator[PlannedStep]:
    """Yield the steps from the state's position to the end of the run; the caller counts them with state.advance.

    Each epoch is planned when it begins, without the rows that were found unreadable before. Nothing is replayed.
    """
    state, plan = schedule.state, schedule.plan
    while state.step < schedule.total:
        if plan.epoch != state.epoch:
            plan = plan_epoch(
                schedule.columns, schedule.settings, state.epoch, state.quarantined, state.first_step_of_epoch
            )
        first_row = schedule.first_row if plan is schedule.plan else 0
        data.sampler.set_plan(plan, state.epoch_step, first_row)
        loaded = iter(data.loader)
        for epoch_step in range(state.epoch_step, plan.n_steps):
            if state.step == schedule.total:
                return
            yield PlannedStep(plan, epoch_step, plan.rows_of_step(epoch_step), loaded, clock)


def agree(ctx: Context, step: PlannedStep, recorder: Recorder, guard: StepGuard, *, stop: bool) -> StepReport:
    """Combine by one small all-reduce: is a stop requested, are samples unreadable, are all ranks at the same step?

    The previous step is recorded here, since the device has its numbers by now.

    Args:
        stop: this rank was asked to stop.

    Raises:
        UserError: a rank is at another step, too many steps were skipped, or too many rows are unreadable.
    """
    report = sync_step(
        ctx.accelerator, stop=stop, bad_samples=len(step.bad), data_wait=step.clock.data_wait,
        stamp=step.fingerprint(), busy=recorder.busy(),
    )  # fmt: skip
    recorder.flush(report.busy)
    if report.bad_samples:  # before anything else can end the run, so that they are recorded
        guard.record_bad_samples(step.bad, len(step.plan.fates))
    return report


def clip_and_step(
    engine: Engine, guard: StepGuard, loss: Tensor, *, empty: bool, limit: Callable[[Tensor], Tensor]
) -> Update:
    """Clip the accumulated gradients and update the weights, unless loss or gradients are not finite or a spike.

    Args:
        engine: with the gradients of the step.
        guard: with the bounds of --skip_spikes, from the steps before; the seed of stochastic rounding follows from
            its state, so that replicated weights round alike.
        loss: sum over all ranks, scalar on the device.
        empty: no sample of the step could be read: its gradients are zero, and the weights are not updated.
        limit: the norm to clip to, from the gradient norm; both are scalars on the device.
    """
    seed_generators(int(hash_key(guard.state.seed, guard.state.step, Purpose.ROUNDING)))
    with memory_phase("the optimizer step"):
        return engine.update(loss=loss, empty=empty, limit=limit, bounds=guard.spikes.bounds_to_skip())


def finish_step(
    args: argparse.Namespace, validate: Validator, checkpoints: Checkpointer, *, epoch_ended: bool, done: bool
) -> bool:
    """Compare replicas, measure the held-out loss, save and sample clips, each if due; return whether the run ends.

    In this order: clips are sampled after the save, so that nothing is lost if the run ends while they are made.

    Args:
        epoch_ended: the step was the last one of an epoch.
        done: the step was the last one of the run.
    """
    checkpoints.compare_replicas()
    measured = validate.measure_if_due(epoch_ended=epoch_ended, done=done)
    without = waited(validate.history)
    is_best = bool(args.keep_best and measured and last_is_best(validate.history))
    stops = bool(args.early_stop and measured and without >= args.early_stop and not done)
    if done or stops or is_best or checkpoints.state.step % args.checkpointing_steps == 0:
        checkpoints.save(last=done or stops)
    if is_best:
        checkpoints.export_best()
    validate.sample_if_due(epoch_ended=epoch_ended, done=done or stops)
    if stops:
        what = f"the held-out loss has had no new minimum for {without} validations (--early_stop)"
        checkpoints.recorder.bar.note(f"the run ends at step {checkpoints.state.step}: {what}")
        if checkpoints.ctx.is_main:
            append_event(checkpoints.ctx.output_dir, "early_stop", checkpoints.state.step, text=what)
    return done or stops
