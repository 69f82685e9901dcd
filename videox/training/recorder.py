"""Recorder: writes the records of a run (metrics, tracker, bar, validation, first batch); changes nothing of it."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from videox.activity import ACTIVITY
from videox.data.bucket_sampler import planned_samples
from videox.data.dataset import Sample, TokenLengthDataset
from videox.data.media.decord import fallback_line
from videox.data.plan.epoch import PADDING
from videox.device import DeviceEvent, PhaseTimes
from videox.distributed.step_sync import StepReport
from videox.distributed.straggler import BackwardTimer, straggler_share
from videox.engine.base import Update
from videox.errors import SaveError, UserError
from videox.estimate.cost_model import StepTimes
from videox.estimate.mfu import Meter
from videox.estimate.time_left import TimeLeft
from videox.files import publish_folder
from videox.tracking.gpu_memory import GpuMemory
from videox.tracking.jsonl import append_line
from videox.tracking.metrics import MetricsLog, StepRecord
from videox.tracking.pending_step import PendingStep, step_scalars
from videox.tracking.preview import BatchSample, write_batch
from videox.tracking.progress import ProgressBar, StepClock, StepFacts
from videox.tracking.trackers import Tracker
from videox.training.context import Context
from videox.training.guard import StepOutcome
from videox.training.sampling import FinishedClip, SampledClips
from videox.training.schedule import Schedule
from videox.training.step import PlannedStep
from videox.training.step_loss import StepCorrection, StepLoss
from videox.training.validation_loss import ValidationLoss, append_validation, change_since_first

VALIDATION, SAVE = "validation", "save"  # kinds of pauses between steps


@dataclass(frozen=True)
class Instruments:
    """What measures the steps and where their numbers go, besides metrics.jsonl.

    Attributes:
        bar: progress bar.
        tracker: TensorBoard or W&B.
        meter: compares steps with the hardware's peak and with the plan.
        times: collects step times, from which cost_model.json is fitted.
        timer: measures this rank's own work apart from its waiting for other ranks; None where that is not possible.
        memory: compares the memory in use with the predicted one; None where there is no GPU.
        time_left: estimates the time until the end of the run.
        correct: corrects the loss of a step.
    """

    bar: ProgressBar
    tracker: Tracker
    meter: Meter
    times: StepTimes
    timer: BackwardTimer | None
    time_left: TimeLeft
    correct: StepCorrection
    memory: GpuMemory | None = None


class Recorder:
    """Records of a run. A step is recorded while the next one runs, so that the host never waits for the device.

    Args:
        ctx: of the run.
        schedule: its state is read, and never changed except for the running means of the loss.
        instruments: of the run.
        on_outcome: called with each step's outcome when the device has it; may raise UserError.
    """

    def __init__(
        self, ctx: Context, schedule: Schedule, instruments: Instruments, on_outcome: Callable[[StepOutcome], None]
    ) -> None:
        self.ctx, self.state, self.on_outcome = ctx, schedule.state, on_outcome
        self.bar, self.tracker, self.meter = instruments.bar, instruments.tracker, instruments.meter
        self.times, self.timer, self.time_left = instruments.times, instruments.timer, instruments.time_left
        self.correct = instruments.correct
        self.metrics = MetricsLog(ctx.output_dir, enabled=ctx.is_main, after=self.state.step)
        self.clock = StepClock()
        self.fallbacks: Counter[str] = Counter()  # clips that PyAV read in place of decord, by reason
        self._pending: PendingStep | None = None
        self._reported_memory = False
        self._start = DeviceEvent(ctx.device)
        self.memory, self._phases, self._active = instruments.memory, PhaseTimes(ctx.device), contextlib.ExitStack()

    def __enter__(self) -> Recorder:
        self._active.enter_context(self._phases.active())
        return self

    def __exit__(self, kind: type[BaseException] | None, *raised: object) -> None:
        """Record the last step also when an exception ends the run; other ranks are not asked for anything then."""
        self._active.close()
        if kind is not None and self._pending is not None:
            with contextlib.suppress(
                RuntimeError
            ):  # a failed device has no numbers; the exception reports the failure
                self._record()

    def first_batch(self, schedule: Schedule, dataset: TokenLengthDataset) -> None:
        """Write the first micro-batch of the run to output_dir/first_batch, as the model gets it.

        The pixels are decoded for this also where the cache has everything.
        """
        folder = self.ctx.output_dir / "first_batch"
        if not self.ctx.is_main or folder.exists():
            return
        plan, fps, dataset = schedule.plan, schedule.index.fps, dataset.with_pixels()
        batch = plan.micro_batches(0, 0, plan.slots)[0]
        samples = [dataset[planned] for planned in planned_samples(batch, 0, last=True)]
        visible = [
            BatchSample(
                s["planned"].row,
                s["pixels"],
                shown_caption(s, dataset),
                float(fps[s["planned"].row]),
                dataset.pace(s["planned"].row),
            )
            for s in samples
            if s["bad"] is None and s["pixels"] is not None and s["planned"].row != PADDING
        ]
        if visible:
            try:
                publish_folder(folder, partial(write_batch, samples=visible, unknown_fps=schedule.profile.fps))
            except SaveError as why:
                self.bar.note(f"warning: the first batch was not written ({why}); training continues")

    def log(self, step: PlannedStep, report: StepReport, lr: float, loss: StepLoss, update: Update) -> None:
        """Take note of an optimizer step that the state counts already; `flush` records it during the next one.

        Args:
            step: of the plan.
            report: what the ranks agreed on.
            lr: learning rate of the full-rate group.
            loss: summed over all ranks.
            update: of the engine.
        """
        self.fallbacks.update(step.fallbacks)
        waited, seconds = self.clock.data_wait, self.clock.split()
        self._pending = PendingStep(
            self.state.step, step.plan, step.epoch_step, report, lr, step.is_empty(report),
            step_scalars(loss.total, update.grad_norm, update.applied, loss.parts), seconds, waited, self._start,
            self.timer.take() if self.timer else None, self._phases.take(),
        )  # fmt: skip
        self._start = self._pending.scalars.event

    def busy(self) -> float:
        """Seconds that this rank worked in the step that is not recorded yet; 0 where it is not known."""
        return self._pending.busy() if self._pending else 0.0

    def flush(self, busy: Sequence[float] | None = None) -> None:
        """Record the last step in metrics.jsonl, tracker, bar and status, if it is not yet; all ranks call it.

        Args:
            busy: busy() of every rank; None gathers them.

        Raises:
            UserError: of on_outcome.
        """
        if self._pending is not None:
            self._record(self.ctx.gather(self.busy()) if busy is None and self.timer else busy or ())

    def _record(self, busy: Sequence[float] = ()) -> None:
        assert self._pending is not None
        step, self._pending = self._pending, None
        loss, grad_norm, applied, *parts = step.scalars.read()
        corrected = self.correct(step.plan, step.epoch_step, parts)
        rows, tokens = step.plan.rows_of_step(step.epoch_step).tolist(), step.plan.tokens_of_step(step.epoch_step)
        self.on_outcome(StepOutcome(step.step, rows, step.empty, bool(applied), loss, grad_norm))
        times = self.clock.count(tokens, step.duration(), step.report.data_wait)
        measured = self._measured(step, times.seconds) if self.ctx.is_main else {}
        share, stragglers = straggler_share(busy), None
        if share is not None and self.ctx.is_main:
            measured["straggler_share"] = share
            stragglers = share, 1 - measured["planned_balance"]
        record = StepRecord(
            step=step.step,
            loss=loss,
            lr=step.lr,
            grad_norm=grad_norm,
            tokens=tokens,
            tokens_per_second=times.tokens_per_second,
            data_wait=times.data_wait,
            rows=rows,
            buckets=step.plan.buckets_of_step(step.epoch_step),
            measured=measured,
            loss_corrected=corrected if math.isfinite(corrected) else None,
            skipped=not applied and math.isfinite(loss) and math.isfinite(grad_norm),
        )
        if self.ctx.is_main:
            self.times.add(step.plan, step.epoch_step, max(times.seconds - times.data_wait, 1e-9))
        self.metrics.append(record)
        self.tracker.log(record)
        self.ctx.run.status.heartbeat(step.step)
        self.ctx.watchdog.step_took(times.seconds)
        if not self.ctx.is_main:
            return
        self.time_left.add_step(step.plan, step.epoch_step, times.seconds)
        facts = StepFacts(
            epoch=step.plan.epoch + (step.epoch_step + 1) / step.plan.n_steps,
            lr=step.lr,
            memory_gib=measured.get("peak_allocated_gib"),
            mfu=measured.get("mfu"),
            stragglers=stragglers,
            seconds_left=self.time_left.estimate(step.step, step.plan, step.epoch_step),
        )
        self.bar.update(loss, times.smooth_tokens_per_second, times.wait_share, facts)
        self.ctx.report.update(facts.seconds_left)

    def _measured(self, step: PendingStep, seconds: float) -> dict[str, float]:
        """Return what this rank measured of a step beside its loss: shares, times and memory."""
        measured = {**self.meter.measure(step.plan, step.epoch_step, seconds), "step_seconds": seconds, **step.parts()}
        if self.memory is not None:
            measured |= self.memory.measure()
            if not self._reported_memory:
                self._reported_memory = True
                self.bar.note(self.memory.line())
        return measured

    @contextmanager
    def paused(self, kind: str = VALIDATION) -> Iterator[None]:
        """Leave the time inside out of the steps; the last step is recorded before.

        Args:
            kind: VALIDATION or SAVE.
        """
        self.flush()
        start = time.monotonic()
        with self.clock.paused():
            yield
        self.time_left.add_pause(kind, self.state.step, time.monotonic() - start)
        self._phases.take()  # of a save or a validation, not of a step
        self._start = DeviceEvent(self.ctx.device)

    def validation(
        self, result: ValidationLoss, ema: ValidationLoss | None, trained: ValidationLoss | None, words: str
    ) -> None:
        """Record a held-out loss in validation.jsonl and the tracker, and print its change.

        Args:
            result: of the weights.
            ema: that of the EMA, if there is one.
            trained: of the weights, on training rows.
            words: what the validations so far say together.
        """
        if not self.ctx.is_main:
            return
        records, step = self.ctx.output_dir / "validation.jsonl", self.state.step
        append_validation(records, step, result, ema, trained)
        scalars = {"validation/loss": result.mean}
        for name, loss in (("ema_loss", ema), ("train_loss", trained)):
            if loss is not None:
                scalars[f"validation/{name}"] = loss.mean
        self.tracker.scalars(scalars, step)
        change = change_since_first(records)
        suffix = f", with the EMA {ema.mean:.4f}" if ema is not None else ""
        self.bar.note(f"step {step}: held-out loss {result.mean:.4f}{change}{suffix}{words and '; '}{words}")

    def sampled_clip(self, clip: FinishedClip) -> None:
        """Record a sample clip in samples.jsonl and the tracker; a record that cannot be written is a warning."""
        step, file = self.state.step, clip.path.relative_to(self.ctx.output_dir).as_posix()
        line = {"step": step, "number": clip.number, "file": file, **clip.clip.facts(), "seconds": clip.seconds}
        try:
            append_line(self.ctx.output_dir / "samples.jsonl", line)
        except UserError as why:
            self.bar.note(f"warning: {why.where} {why.what}")
        self.tracker.clip(f"samples/prompt-{clip.number}", clip.path, clip.frames, clip.clip.fps, step)

    def sampled(self, clips: SampledClips) -> None:
        """Print where the sample clips are, and a warning for each that failed."""
        for path in clips.paths[-1:]:
            self.bar.note(f"step {self.state.step}: sample clips in {path.parent}, contact sheet {path.name}")
        for warning in clips.warnings:
            self.bar.note(f"warning: {warning}")

    def close(self) -> None:
        """Close bar and tracker; print the peak of GPU memory, and how often PyAV read in place of decord."""
        if self.fallbacks:
            self.bar.note(fallback_line(self.fallbacks))
        if self.memory is not None:
            self.bar.note(self.memory.line())
        self.bar.close()
        with ACTIVITY.section("closing the records"):
            self.tracker.close()


def shown_caption(sample: Sample, dataset: TokenLengthDataset) -> str:
    """A sample's caption for people; one that was dropped is marked, since it would look like a missing one."""
    if not sample["caption"] and dataset.caption_before_dropout(sample["planned"]):
        return "(trained without its caption: --caption_dropout)"
    return sample["caption"]
