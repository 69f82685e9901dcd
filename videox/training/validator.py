"""Serves both training loops: looks at the model in the midst of training, and leaves it as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image

from videox.data.bucket_sampler import held_out_samples
from videox.data.dataset import Batch, TokenLengthDataset, collate
from videox.data.media.video import BadMedia, read_image
from videox.data.plan.plan import EpochPlan
from videox.distributed.accelerator import sum_over_ranks
from videox.errors import DATA, UserError
from videox.shapes import Bucket
from videox.training.recorder import Recorder
from videox.training.validation_loss import HeldOut, ValidationLoss, sample_clips, validation_loss

SIGMAS = 4  # noise levels at which each held-out row is measured
SAMPLING_STEPS = 25


def encode_held_out(
    dataset: TokenLengthDataset,
    plan: EpochPlan | None,
    encode: Callable[[Batch], tuple[torch.Tensor, dict[str, torch.Tensor]]],
) -> list[HeldOut]:
    """Returns the held-out samples in host memory, their captions kept.

    Args:
        dataset: of the run.
        plan: of held_out_plan; None has none.
        encode: gives the latents of a batch, by the posterior's mode, and what the model is given beside them.

    Raises:
        UserError: a row cannot be read.
    """
    encoded, kept = [], dataset.without_dropout()
    for planned in held_out_samples(plan):
        sample = kept[planned]
        if sample["bad"] is not None:
            what = f"the held-out row {planned.row} is {sample['bad'].media_class} ({sample['bad'].detail})"
            raise UserError(
                "--validation_rows", what, f"mend {sample['bad'].path} or take it out of the metadata", DATA
            )
        latents, given = encode(collate([sample]))
        encoded.append(HeldOut(latents.cpu(), {name: value.cpu() for name, value in given.items()}))
    return encoded


class Validator:
    """Measures the fixed-noise loss on the held-out rows and samples a clip for each prompt; call it when due.

    Args:
        accelerator: of the run.
        watch: where results go.
        model: the transformer, not wrapped.
        held_out: may be empty.
        predict: as validation_loss takes it.
        prompts: may be empty; images: one for each in image-to-video, else empty.
        pipeline: a context that yields the diffusers pipeline, ready to sample with the trained transformer.
        shape: frames, height, width of the sample clips.
        fps: frames per second of the sample clips.
        shift: of sigma.
        guidance_scale: of the sample clips.
        seed: of noise and samples.
        collective: weights are sharded, so that all processes sample together.
        averaged: has the model be its average inside, which then is measured too, and sampled from; None = not.
        given_frames: leading latent frames that the model is given, outside the loss.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        watch: Recorder,
        *,
        model: torch.nn.Module,
        held_out: Sequence[HeldOut],
        predict: Callable[[torch.Tensor, torch.Tensor, HeldOut], torch.Tensor],
        prompts: Sequence[str],
        images: Sequence[Image.Image],
        pipeline: Callable[[], AbstractContextManager[Any]],
        shape: Bucket,
        fps: float,
        shift: float,
        guidance_scale: float,
        seed: int,
        collective: bool,
        averaged: Callable[[], AbstractContextManager[None]] | None = None,
        given_frames: int = 0,
    ) -> None:
        self.accelerator, self.watch, self.model = accelerator, watch, model
        self.held_out, self.predict, self.shift, self.seed = held_out, predict, shift, seed
        self.prompts, self.images, self.pipeline, self.guidance_scale = prompts, images, pipeline, guidance_scale
        self.shape, self.fps, self.given_frames, self.collective = shape, fps, given_frames, collective
        self.averaged = averaged

    def __call__(self) -> None:
        """Runs both parts; all processes call it, and its time does not count as training."""
        with self.watch.aside():
            loss = self._measure() if self.held_out else None
            with self.averaged() if self.averaged else nullcontext():
                if loss is not None:
                    self.watch.validation(loss, self._measure() if self.averaged else None)
                if self.prompts and (self.collective or self.accelerator.is_main_process):
                    self._sample()
                self.accelerator.wait_for_everyone()

    def _measure(self) -> ValidationLoss:
        return validation_loss(
            self.held_out,
            self.predict,
            model=self.model,
            shift=self.shift,
            sigmas_per_sample=SIGMAS,
            noise_key=self.seed,
            given_frames=self.given_frames,
            device=self.accelerator.device,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            all_reduce_sum=sum_over_ranks,
        )

    def _sample(self) -> None:
        with self.pipeline() as pipeline:
            clips = sample_clips(
                pipeline,
                self.prompts,
                images=self.images,
                height=self.shape.height,
                width=self.shape.width,
                num_frames=self.shape.frames,
                fps=self.fps,
                seed=self.seed % 2**32,
                steps=SAMPLING_STEPS,
                guidance_scale=self.guidance_scale,
                folder=self.watch.output_dir / "samples",
                step=self.watch.state.step,
                write=self.accelerator.is_main_process,
                collective=self.collective,
            )
        self.watch.sampled(clips)


def validation_images(paths: Sequence[str], shape: Bucket) -> list[Image.Image]:
    """Returns the images that sample clips start from, scaled to cover the clip's size and cut at the centre.

    Raises:
        UserError: one cannot be read.
    """
    images = []
    for path in paths:
        try:
            images.append(Image.fromarray(read_image(Path(path), shape.height, shape.width)[0]))
        except BadMedia as why:
            what = f"{path} is {why.media_class} ({why.detail})"
            raise UserError("--validation_paths", what, "give an image that can be read") from why
    return images
