"""Validator: measures the held-out loss and samples clips during training, and leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from videox.data.bucket_sampler import held_out_samples
from videox.data.dataset import Batch, TokenLengthDataset, collate
from videox.device import memory_phase
from videox.diffusion.noise_window import WHOLE, NoiseWindow
from videox.distributed.collectives import sum_over_ranks
from videox.engine.train_state import TrainState
from videox.errors import DATA, UserError
from videox.tracking.overfitting import Measured, read_history, sentence
from videox.training.context import Context
from videox.training.measured_rows import HELD_OUT_SET, list_notes, row_sets
from videox.training.recorder import Recorder
from videox.training.sampling import ClipWriter, SampleClip, SampledClips, TimeLimit, sample_clips
from videox.training.schedule import Schedule
from videox.training.validation_loss import HeldOut, HeldOutLoss, Predict, ValidationLoss, validation_loss

HELD_OUT_FILE = "held_out.jsonl"
SIGMAS = 4  # noise levels at which each held-out row is measured


@dataclass(frozen=True)
class FamilyValidation:
    """How a family predicts and samples, for its Validator.

    Attributes:
        predict: velocity prediction for a held-out sample, as in training.
        pipeline: a context that yields the diffusers pipeline, ready to sample with the transformer in training.
        guidance_scale: of the sample clips.
        given_frames: leading latent frames that the model is given, of all samples or by sample; they are excluded
            from the loss.
        embedded_guidance: the guidance scale is an input of the transformer; else it is classifier-free.
        window: of noise levels that the transformer is trained at.
        no_samples: why no clips are sampled; "" = they are.
    """

    predict: Predict
    pipeline: Callable[[], AbstractContextManager[Any]]
    guidance_scale: float
    given_frames: int | Callable[[HeldOut], int] = 0
    embedded_guidance: bool = False
    window: NoiseWindow = WHOLE
    no_samples: str = ""


@dataclass(frozen=True)
class MeasuredRows:
    """The samples that validations measure, in host memory, and what held_out.jsonl says of them.

    Attributes:
        held_out: never trained on; may be empty.
        trained: of training rows, about as many.
        records: a line for each.
        notes: lines on rows that are not measured, or should not be.
    """

    held_out: list[HeldOut]
    trained: list[HeldOut]
    records: list[dict[str, Any]]
    notes: list[str]

    def lines(self, most: int = 10) -> list[str]:
        """Return lines that name the held-out rows, for the start of a run; [] without any."""
        if not self.held_out:
            return []
        named = [
            f"row {each['row']} {each['file']} ({each['frames']} x {each['height']} x {each['width']})"
            for each in self.records
            if each["set"] == HELD_OUT_SET
        ]
        more = f" and {len(named) - most} more" if len(named) > most else ""
        return [f"held out for validation: {', '.join(named[:most])}{more}; {HELD_OUT_FILE} lists them", *self.notes]


def encode_held_out(
    dataset: TokenLengthDataset,
    schedule: Schedule,
    encode: Callable[[Batch], tuple[torch.Tensor, dict[str, torch.Tensor]]],
) -> MeasuredRows:
    """The held-out samples and the training samples that are measured beside them, with their captions.

    Args:
        dataset: of the run.
        schedule: whose settings, or list of clips for validation, decide which rows are held out.
        encode: returns a batch's latents, by the mode of the posterior, and the other inputs of the model.

    Raises:
        UserError: (DATA) a held-out row cannot be read.
    """
    rows = MeasuredRows([], [], [], list_notes(schedule))
    for measured, encoded in zip(row_sets(schedule), (rows.held_out, rows.trained), strict=True):
        with_captions = dataset.of_index(measured.index).without_dropout()
        for planned in held_out_samples(measured.plan):
            sample = with_captions[planned]
            file = str(measured.index.file_path[planned.row].as_py())
            if (bad := sample["bad"]) is not None:
                what = f"row {planned.row} is {bad.media_class} ({bad.detail})"
                if measured.name != HELD_OUT_SET:
                    rows.notes.append(f"warning: no loss of the training row {file} at validations: {what}")
                    continue
                hint = f"fix {bad.path} or remove it from the metadata"
                flag = "--validation_meta" if schedule.validation else "--validation_rows"
                raise UserError(flag, f"the held-out {what}", hint, DATA)
            with memory_phase("encoding the held-out rows"):
                latents, given = encode(collate([sample]))
            encoded.append(HeldOut(latents.cpu(), {key: value.cpu() for key, value in given.items()}))
            facts = {**planned.bucket._asdict(), "start": planned.start, "caption": sample["caption"]}
            rows.records.append({"set": measured.name, "row": planned.row, "file": file, **facts})
    return rows


class Validator:
    """Measures the held-out loss and samples clips, where they are due; all ranks call its methods together.

    Their time does not count as training time.

    Args:
        ctx: of the run.
        recorder: gets the results; it is paused meanwhile.
        rows: that are measured; may be empty.
        measure: how the held-out loss is measured.
        sampler: of the sample clips.
        intervals: when a validation is due.
        ema: context in which the model has the EMA's weights, which are then measured too, and sampled; None = no EMA.
    """

    def __init__(
        self,
        ctx: Context,
        recorder: Recorder,
        rows: MeasuredRows,
        measure: HeldOutLoss,
        sampler: Sampler,
        intervals: Intervals,
        ema: Callable[[], AbstractContextManager[None]] | None = None,
    ) -> None:
        self.ctx, self.recorder, self.rows, self.measure_settings = ctx, recorder, rows, measure
        self.sampler, self.intervals, self.ema = sampler, intervals, ema
        before = read_history(ctx.output_dir / "validation.jsonl") if ctx.is_main else []
        self.history: list[Measured] = ctx.gather(before)[0]

    def __call__(self) -> None:
        """Measure and sample before the first step."""
        self.measure()
        self.sample()

    def measure_if_due(self, *, epoch_ended: bool, done: bool) -> bool:
        """Measure the held-out loss if it is due after this step, and return whether it was.

        epoch_ended: the step was the last of its epoch; done: it was the last of the run.
        """
        due = bool(self.rows.held_out) and (done or self.intervals.validation_due(self.recorder.state, epoch_ended))
        if due:
            self.measure()
        return due

    def sample_if_due(self, *, epoch_ended: bool, done: bool) -> None:
        """Sample clips if they are due after this step; arguments as for measure_if_due."""
        if done or self.intervals.samples_due(self.recorder.state, epoch_ended):
            self.sample()

    def measure(self) -> None:
        """Measure and record the loss on held-out and on training rows, and that of the EMA on held-out rows."""
        if not self.rows.held_out:
            return
        with self.recorder.paused(), memory_phase("validation"):
            loss, ema_loss = self._measure(self.rows.held_out), None
            trained = self._measure(self.rows.trained) if self.rows.trained else None
            if self.ema:
                with self.ema():
                    ema_loss = self._measure(self.rows.held_out)
            step = self.recorder.state.step
            self.history.append(Measured(step, loss.mean, trained.mean if trained else None))
            self.recorder.validation(loss, ema_loss, trained, sentence(self.history))

    def sample(self) -> None:
        """Sample a clip for each prompt; a clip that fails never ends the run."""
        if not self.sampler.clips:
            return
        with self.recorder.paused(), memory_phase("validation"):
            with self.ema() if self.ema else nullcontext():
                if self.sampler.collective or self.ctx.is_main:
                    self.sampler.sample_all()
            self.ctx.accelerator.wait_for_everyone()

    def _measure(self, samples: Sequence[HeldOut]) -> ValidationLoss:
        ctx = self.ctx
        return validation_loss(
            samples, self.measure_settings, device=ctx.device, rank=ctx.rank, world_size=ctx.world_size,
            all_reduce_sum=sum_over_ranks,
        )  # fmt: skip


@dataclass(frozen=True)
class Intervals:
    """When a run validates and samples, in optimizer steps and epochs.

    Attributes:
        steps: between validations.
        epochs: between further validations; 0 = none.
        sample_steps: between samples; None = at each validation.
    """

    steps: int
    epochs: int
    sample_steps: int | None = None

    def validation_due(self, state: TrainState, epoch_ended: bool) -> bool:
        """Whether to validate now; epoch_ended: the last step was the last one of an epoch."""
        by_epoch = epoch_ended and self.epochs > 0 and state.epoch % self.epochs == 0
        return by_epoch or state.step % self.steps == 0

    def samples_due(self, state: TrainState, epoch_ended: bool) -> bool:
        """Whether to sample clips now; arguments as for validation_due."""
        if self.sample_steps is None:
            return self.validation_due(state, epoch_ended)
        return state.step % self.sample_steps == 0


class Sampler:
    """Samples the clips of a run with the weights in training.

    Args:
        ctx: of the run.
        recorder: gets the clips.
        clips: may be empty.
        pipeline: see FamilyValidation.
        minutes: that the clips of one step may take.
    """

    def __init__(
        self,
        ctx: Context,
        recorder: Recorder,
        clips: Sequence[SampleClip],
        pipeline: Callable[[], AbstractContextManager[Any]],
        minutes: float,
    ) -> None:
        self.ctx, self.recorder, self.clips, self.pipeline, self.minutes = ctx, recorder, clips, pipeline, minutes
        self.collective = not ctx.backend.full_weights

    def sample_all(self) -> None:
        """Sample now: on the main rank, or on all ranks together where the weights are sharded."""
        step, is_main = self.recorder.state.step, self.ctx.is_main
        writer = ClipWriter(self.ctx.output_dir / "samples", step, is_main, self.recorder.sampled_clip)
        limit = TimeLimit(60 * self.minutes, self._of_main if self.collective else None)
        try:
            with self.pipeline() as pipeline:
                result = sample_clips(pipeline, self.clips, writer, collective=self.collective, limit=limit)
        except Exception as error:
            if self.collective:  # the other ranks would wait for this one
                raise
            first = (str(error).strip() or "no message").splitlines()[0]
            result = SampledClips(warnings=[f"no samples at step {step}: {type(error).__name__}: {first}"])
        self.recorder.sampled(result)

    def _of_main(self, value: bool) -> bool:
        """Return the value of the main rank; a collective."""
        return bool(self.ctx.gather(value)[0])
