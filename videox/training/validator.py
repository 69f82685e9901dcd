"""Validator: measures the held-out loss and samples clips during training, and leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from videox.data.bucket_sampler import held_out_samples
from videox.data.dataset import Batch, TokenLengthDataset, collate
from videox.data.media.video import BadMedia, read_image
from videox.data.plan.plan import held_out_plan
from videox.device import memory_phase
from videox.distributed.collectives import sum_over_ranks
from videox.errors import DATA, UserError
from videox.shapes import Bucket
from videox.training.context import Context
from videox.training.recorder import Recorder
from videox.training.sampling import SampleSettings, sample_clips
from videox.training.schedule import Schedule
from videox.training.validation_loss import HeldOut, HeldOutLoss, Predict, ValidationLoss, validation_loss

SIGMAS = 4  # noise levels at which each held-out row is measured


@dataclass(frozen=True)
class FamilyValidation:
    """How a family predicts and samples, for its Validator.

    Attributes:
        predict: velocity prediction for a held-out sample, as in training.
        pipeline: a context that yields the diffusers pipeline, ready to sample with the transformer in training.
        guidance_scale: of the sample clips.
        given_frames: leading latent frames that the model is given; they are excluded from the loss.
    """

    predict: Predict
    pipeline: Callable[[], AbstractContextManager[Any]]
    guidance_scale: float
    given_frames: int = 0


def encode_held_out(
    dataset: TokenLengthDataset,
    schedule: Schedule,
    encode: Callable[[Batch], tuple[torch.Tensor, dict[str, torch.Tensor]]],
) -> list[HeldOut]:
    """The held-out samples in host memory, with their captions.

    Args:
        dataset: of the run.
        schedule: whose settings decide which rows are held out.
        encode: returns a batch's latents, by the mode of the posterior, and the other inputs of the model.

    Raises:
        UserError: (DATA) a row cannot be read.
    """
    encoded, with_captions = [], dataset.without_dropout()
    for planned in held_out_samples(held_out_plan(schedule.columns, schedule.settings)):
        sample = with_captions[planned]
        if sample["bad"] is not None:
            bad = sample["bad"]
            what = f"the held-out row {planned.row} is {bad.media_class} ({bad.detail})"
            raise UserError("--validation_rows", what, f"fix {bad.path} or remove it from the metadata", DATA)
        with memory_phase("encoding the held-out rows"):
            latents, given = encode(collate([sample]))
        encoded.append(HeldOut(latents.cpu(), {name: value.cpu() for name, value in given.items()}))
    return encoded


class Validator:
    """Measures the held-out loss and samples a clip for each prompt; call it when a validation is due.

    Args:
        ctx: of the run.
        recorder: gets the results; it is paused meanwhile.
        held_out: may be empty.
        measure: how the held-out loss is measured.
        samples: prompts and sampling parameters; the prompts may be empty.
        pipeline: see FamilyValidation.
        ema: context in which the model has the EMA's weights, which are then measured too, and sampled; None = no EMA.
    """

    def __init__(
        self,
        ctx: Context,
        recorder: Recorder,
        held_out: Sequence[HeldOut],
        measure: HeldOutLoss,
        samples: SampleSettings,
        pipeline: Callable[[], AbstractContextManager[Any]],
        ema: Callable[[], AbstractContextManager[None]] | None = None,
    ) -> None:
        self.ctx, self.recorder, self.held_out, self.measure = ctx, recorder, held_out, measure
        self.samples, self.pipeline, self.ema = samples, pipeline, ema
        self.collective = not ctx.backend.full_weights

    def __call__(self) -> None:
        """Measure and sample; all ranks call it, and its time does not count as training time."""
        with self.recorder.paused(), memory_phase("validation"):
            loss = self._measure() if self.held_out else None
            with self.ema() if self.ema else nullcontext():
                if loss is not None:
                    self.recorder.validation(loss, self._measure() if self.ema else None)
                if self.samples.prompts and (self.collective or self.ctx.is_main):
                    self._sample()
                self.ctx.accelerator.wait_for_everyone()

    def _measure(self) -> ValidationLoss:
        ctx = self.ctx
        return validation_loss(
            self.held_out, self.measure, device=ctx.device, rank=ctx.rank, world_size=ctx.world_size,
            all_reduce_sum=sum_over_ranks,
        )  # fmt: skip

    def _sample(self) -> None:
        folder, step = self.ctx.output_dir / "samples", self.recorder.state.step
        with self.pipeline() as pipeline:
            clips = sample_clips(
                pipeline, self.samples, folder, step, write=self.ctx.is_main, collective=self.collective
            )
        self.recorder.sampled(clips)


def validation_images(paths: Sequence[str], shape: Bucket) -> list[Image.Image]:
    """The images that sample clips start from, scaled to cover the clip's size and cropped at the centre.

    Raises:
        UserError: one cannot be read.
    """
    images = []
    for path in paths:
        try:
            images.append(Image.fromarray(read_image(Path(path), shape.height, shape.width)[0]))
        except BadMedia as why:
            what = f"{path} is {why.media_class} ({why.detail})"
            raise UserError("--validation_paths", what, "pass an image that can be read") from why
    return images
