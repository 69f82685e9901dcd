"""Serves whoever watches a run: what every step and every mishap leaves in files, on the bar and in the tracker."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from videox.data.bucket_sampler import planned_samples
from videox.data.dataset import BadSample, Sample, TokenLengthDataset
from videox.data.plan.plan import PADDING, EpochPlan
from videox.device import DeviceEvent
from videox.distributed.step_sync import StepReport
from videox.distributed.straggler import BackwardTimer, straggler_share
from videox.engine.base import Update
from videox.engine.train_state import TrainState
from videox.errors import DATA, NUMERICS, STOPPED, STORAGE, UserError
from videox.estimate.cost_model import StepTimes
from videox.estimate.mfu import Meter
from videox.files import SaveError, publish_folder, write_json_atomically
from videox.run.checkpoint import publishing
from videox.run.folder import prune, rewind, room_for
from videox.run.lifecycle import Run, main_first, together
from videox.tracking.jsonl import append_line
from videox.tracking.metrics import MetricsLog, StepRecord
from videox.tracking.pending_step import PendingStep, numbers_of
from videox.tracking.preview import BatchSample, plot_losses, write_batch
from videox.tracking.progress import ProgressBar, StepClock
from videox.tracking.trackers import Tracker
from videox.training.validation_loss import SampledClips, ValidationLoss, append_validation, change_since_first

ALWAYS_ALLOWED_BAD = 10  # rows that may be unreadable whatever the fraction
SKIPS_ALLOWED = 5  # steps without an update in a row


class Recorder:
    """Keeps a run's records. Reads only: nothing here changes what is trained.

    Args:
        output_dir: of the run.
        run: open; what lies behind the step where it goes on is moved aside, never deleted.
        state: of the run, at the step where it goes on.
        total: optimizer steps of the whole run.
        asked: every flag; resolved: what followed from them. Both go to args.json.
        report_to: tracker; logging_dir: its folder inside output_dir; project: its name.
        checkpoint_bytes: size of one checkpoint, for which there must be room.
        meter: compares steps with hardware and plan.
        is_main: on the one process that writes.
        gather: collective that returns every process's value.
        times: takes the times of the steps, from which cost_model.json is fitted.
        device: of the run.
        effort: tells this process's own work from its waiting for others; None where nothing does.

    Raises:
        UserError: no room for a checkpoint, or an unknown tracker.
    """

    def __init__(
        self,
        output_dir: Path,
        run: Run,
        state: TrainState,
        total: int,
        *,
        asked: Mapping[str, Any],
        resolved: Mapping[str, Any],
        report_to: str,
        logging_dir: str,
        project: str,
        checkpoint_bytes: int,
        meter: Meter,
        is_main: bool,
        gather: Callable[[Any], list[Any]],
        times: StepTimes,
        device: torch.device,
        effort: BackwardTimer | None = None,
    ) -> None:
        self.times, self.effort, self.device = times, effort, device
        self.output_dir, self.run, self.state = output_dir, run, state
        self.is_main, self.gather, self.meter = is_main, gather, meter

        def begin() -> None:
            room_for(output_dir, checkpoint_bytes)
            rewind(output_dir, state.step)
            write_json_atomically(output_dir / "args.json", {"asked": dict(asked), "resolved": dict(resolved)})

        main_first(begin, is_main=is_main, gather=gather)
        self.metrics = MetricsLog(output_dir, enabled=is_main, after=state.step)
        self.tracker = Tracker(
            report_to,
            output_dir / logging_dir,
            project=project,
            settings=asked,
            first_step=state.step + 1,
            enabled=is_main,
        )
        self.bar = ProgressBar(total, initial=state.step, enabled=is_main)
        self.clock = StepClock()
        self._save_failed = False
        self._late: PendingStep | None = None
        self._begin = DeviceEvent(device)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *raised: object) -> None:
        """Records the last step, also when something ends the run; then no other process is asked for anything."""
        if kind is not None and self._late is not None:
            with contextlib.suppress(RuntimeError):  # a device that failed gives no numbers: what ends the run says so
                self._record()

    def first_batch(self, plan: EpochPlan, dataset: TokenLengthDataset, fps: np.ndarray) -> None:
        """Writes the run's first micro-batch to output_dir/first_batch: what the model will really see.

        Args:
            fps: source frames per second of each metadata row.
        """
        folder = self.output_dir / "first_batch"
        if not self.is_main or folder.exists():
            return
        samples = [
            dataset[planned] for planned in planned_samples(plan.micro_batches(0, 0, plan.slots)[0], 0, last=True)
        ]
        shown = [
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
        if shown:
            try:
                publish_folder(folder, partial(write_batch, samples=shown))
            except SaveError as why:
                self.bar.note(f"warning: the first batch cannot be looked at ({why}); the run goes on")

    def step(
        self, plan: EpochPlan, epoch_step: int, report: StepReport, rate: float, loss: Tensor, update: Update, *,
        empty: bool,
    ) -> None:  # fmt: skip
        """Takes note of an optimizer step that the state counts already; `settle` records it, while the next one runs.

        Args:
            epoch_step: of the plan, from 0.
            rate: learning rate of the full-rate group.
            loss: over all processes, scalar on the device.
            empty: none of its samples could be read.
        """
        waited, seconds = self.clock.data_wait, self.clock.split()
        self._late = PendingStep(
            self.state.step, plan, epoch_step, report, rate, empty,
            numbers_of(loss, update.grad_norm, update.applied), seconds, waited, self._begin,
            self.effort.take() if self.effort else None,
        )  # fmt: skip
        self._begin = self._late.numbers.moment

    def busy(self) -> float:
        """Returns the seconds that this process worked in the step that is not recorded yet; 0 = not known."""
        return self._late.busy() if self._late else 0.0

    def flush(self, busy: Sequence[float] | None = None) -> None:
        """Records the last step in metrics.jsonl, tracker, bar and status, if it is not; all processes call it.

        Args:
            busy: every process's busy(); None gathers them.

        Raises:
            UserError: too many steps in a row changed nothing.
        """
        if self._late is not None:
            self._record(self.gather(self.busy()) if busy is None and self.effort else busy or ())

    def _record(self, busy: Sequence[float] = ()) -> None:
        assert self._late is not None
        late, self._late = self._late, None
        loss, grad_norm, applied = late.numbers.read()
        rows, tokens = late.plan.rows_of_step(late.epoch_step).tolist(), late.plan.tokens_of_step(late.epoch_step)
        if late.empty:
            self.state.skipped += 1  # the data's fault, which max_bad_fraction limits, and no sign of a diverging run
        elif applied:
            self.state.skipped_in_row = 0
        else:
            self._skipped(late.step, rows)
        times = self.clock.count(tokens, late.took(), late.report.data_wait)
        measured = self.meter.measure(late.plan, late.epoch_step, times.seconds) if self.is_main else {}
        share, stragglers = straggler_share(busy), None
        if share is not None and self.is_main:
            measured["straggler_share"] = share
            stragglers = share, 1 - measured["planned_balance"]
        record = StepRecord(
            step=late.step,
            loss=loss,
            lr=late.rate,
            grad_norm=grad_norm,
            tokens=tokens,
            tokens_per_second=times.tokens_per_second,
            data_wait=times.data_wait,
            rows=rows,
            buckets=late.plan.buckets_of_step(late.epoch_step),
            measured=measured,
        )
        if self.is_main:
            self.times.add(late.plan, late.epoch_step, max(times.seconds - times.data_wait, 1e-9))
        self.metrics.append(record)
        self.tracker.log(record)
        self.run.status.heartbeat(late.step)
        self.bar.update(loss, times.smooth_tokens_per_second, times.wait_share, record.measured.get("mfu"), stragglers)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leaves the time inside (validation, checkpoint) out of the steps, which are recorded before."""
        self.flush()
        with self.clock.aside():
            yield
        self._begin = DeviceEvent(self.device)

    def validation(self, result: ValidationLoss, average: ValidationLoss | None = None) -> None:
        """Records a validation loss in validation.jsonl and the tracker, and says how it moved; average: the EMA's."""
        if not self.is_main:
            return
        records = self.output_dir / "validation.jsonl"
        append_validation(records, self.state.step, result, average)
        scalars, said = {"validation/loss": result.mean}, ""
        if average is not None:
            scalars["validation/ema_loss"], said = average.mean, f", with the EMA {average.mean:.4f}"
        self.tracker.scalars(scalars, self.state.step)
        self.bar.note(f"step {self.state.step}: validation loss {result.mean:.4f}{change_since_first(records)}{said}")

    def sampled(self, clips: SampledClips) -> None:
        """Says where the sample clips are, and what went wrong with any."""
        for path in clips.paths[-1:]:
            self.bar.note(f"step {self.state.step}: sample clips beside {path}")
        for warning in clips.warnings:
            self.bar.note(f"warning: {warning}")

    def _skipped(self, step: int, rows: Sequence[int]) -> None:
        """Counts a step without an update. Raises UserError: too many of them in a row."""
        self.state.skipped += 1
        self.state.skipped_in_row += 1
        if self.is_main:
            self.bar.note(f"step {step} changed nothing: its loss or gradient is not finite")
        if self.state.skipped_in_row >= SKIPS_ALLOWED:
            what = f"{self.state.skipped_in_row} steps in a row had no finite loss and gradient, the last with rows {list(rows)}"
            hint = "resume from an earlier checkpoint with a lower --learning_rate, or look at these rows"
            raise UserError(f"step {step}", what, hint, NUMERICS)

    def bad_samples(self, mine: Sequence[BadSample], rows: int, max_bad_fraction: float) -> None:
        """Writes every process's bad samples of a step to bad_samples.jsonl; all processes call it.

        Args:
            mine: of this process.
            rows: of the metadata.
            max_bad_fraction: share of them that may be bad (ten always may).

        Raises:
            UserError: more are bad.
        """
        found = [(rank, bad) for rank, part in enumerate(self.gather(list(mine))) for bad in part]
        for rank, bad in found:
            self.state.bad = sorted({*self.state.bad, bad.row})
            if self.is_main:
                line = {"row": bad.row, "path": bad.path, "class": bad.media_class, "detail": bad.detail}
                append_line(self.output_dir / "bad_samples.jsonl", {**line, "step": self.state.step + 1, "rank": rank})
                self.bar.note(f"row {bad.row} counts nothing: {bad.path!r} is {bad.media_class} ({bad.detail})")
        known = len({*self.state.bad, *self.state.quarantined})
        if known > max(ALWAYS_ALLOWED_BAD, max_bad_fraction * rows):
            hint = "mend the files named in bad_samples.jsonl, or raise --max_bad_fraction"
            raise UserError("--max_bad_fraction", f"{known} of {rows} rows turned out bad", hint, DATA)

    def save(self, write: Callable[[Path], None], keep: int | None, description: dict[str, Any]) -> None:
        """Publishes checkpoint-N whole or not at all, then drops the oldest ones beyond `keep`; all processes call it.

        Args:
            write: writes the checkpoint's files into the folder given; all processes call it.
            keep: None = all.
            description: for the manifest.

        Raises:
            UserError: (STORAGE) the second save running that fails; the first is a warning.
        """
        with self.aside():
            self.metrics.sync()
            try:
                with publishing(
                    self.output_dir, self.state.step, is_main=self.is_main, gather=self.gather, description=description
                ) as folder:
                    if folder is not None:
                        write(folder)
            except SaveError as why:
                if self._save_failed:
                    what = f"the save at step {self.state.step} failed like the one before ({why})"
                    raise UserError(
                        str(self.output_dir), what, "make room or mend the disk, then resume", STORAGE
                    ) from why
                self._save_failed = True
                self.bar.note(f"warning: no checkpoint at step {self.state.step} ({why}); the run goes on")
                return
        self._save_failed = False
        if self.is_main:
            self.times.write(self.output_dir)
        for warning in prune(self.output_dir, keep) if keep and self.is_main else []:
            self.bar.note(f"warning: {warning}")

    def stopped(self, signal_name: str) -> int:
        """Ends a run that was asked to stop and has been saved; returns its exit code."""
        self._close()
        line = f"stopped by {signal_name or 'another process'} at step {self.state.step}; --resume_from_checkpoint latest goes on"
        self.run.status.write("stopped", step=self.state.step, exit_code=STOPPED, error=line)
        self.bar.note(line)
        return STOPPED

    def finished(self, export: Callable[[], None]) -> int:
        """Exports the trained model, draws the loss curve, ends the run; all processes call it. Returns the exit code.

        What an earlier process finished at this very step is not written again, unless this one trained anew to it.
        """
        untouched = self.run.finished_step == self.run.resume.step == self.state.step
        again = untouched and (self.output_dir / "transformer").is_dir()
        if not self.gather(again)[0]:
            together(export, gather=self.gather)
        if self.is_main:
            plot_losses(
                self.output_dir / "metrics.jsonl", self.output_dir / "validation.jsonl", self.output_dir / "losses.png"
            )
        self._close()
        self.run.status.write("finished", step=self.state.step, exit_code=0)
        self.bar.note(f"finished at step {self.state.step}; what was trained is in {self.output_dir}")
        return 0

    def _close(self) -> None:
        self.bar.close()
        self.tracker.close()


def shown_caption(sample: Sample, dataset: TokenLengthDataset) -> str:
    """Returns a sample's caption for people, who would take one that was dropped for one that is missing."""
    if not sample["caption"] and dataset.index.caption(sample["planned"].row):
        return "(trained without its caption, by --caption_dropout)"
    return sample["caption"]
