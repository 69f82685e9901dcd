"""Sample clips: one clip per prompt from the weights in training, by a diffusers pipeline that is left unchanged."""

from __future__ import annotations

import copy
import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import nn

from videox.shapes import Bucket
from videox.tracking.preview import SheetEntry, write_clip, write_contact_sheet
from videox.training.validation_loss import evaluation_mode

SAMPLING_STEPS = 25


class Pipeline(Protocol):
    """What `sample_clips` needs of a diffusers text-to-video pipeline."""

    scheduler: Any
    components: dict[str, Any]

    def set_progress_bar_config(self, **settings: Any) -> None:  # noqa: ANN401 - as in diffusers
        """Set tqdm's keywords."""

    def __call__(self, **arguments: Any) -> Any:  # noqa: ANN401 - as in diffusers
        """Return an object with `frames`, float [1, T, H, W, 3] in [0, 1]."""


@dataclass(frozen=True)
class SampleSettings:
    """What is sampled, the same at each validation, so that clips of two steps differ by the training alone.

    Attributes:
        prompts: at least one; they are also the titles of the contact sheet.
        images: what each clip starts from, in image-to-video; else empty.
        shape: frames (4k+1; a single frame is written as .png), height and width (multiples of 16) of the clips.
        fps: the model's frames per second (Wan 16, HunyuanVideo 24).
        seed: prompt i starts from the noise of a CPU generator seeded with seed + i.
        guidance_scale: as the pipeline's: classifier-free for Wan (1 = off), embedded for HunyuanVideo.
        steps: denoising steps.
        negative_prompt: used where guidance_scale > 1.
        prompt_embeddings: (prompt, negative or None) for each prompt, [1, L, D], in place of a text encoder.
    """

    prompts: Sequence[str]
    shape: Bucket
    fps: float
    seed: int
    guidance_scale: float
    images: Sequence[Image.Image] = ()
    steps: int = SAMPLING_STEPS
    negative_prompt: str = ""
    prompt_embeddings: Sequence[tuple[torch.Tensor, torch.Tensor | None]] | None = None

    def arguments(self, number: int) -> dict[str, object]:
        """Keywords of the pipeline for the prompt with this index."""
        arguments: dict[str, object] = {
            "height": self.shape.height,
            "width": self.shape.width,
            "num_frames": self.shape.frames,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "generator": torch.Generator("cpu").manual_seed(self.seed + number),
            "output_type": "np",
        }
        if self.images:
            arguments["image"] = self.images[number]
        if self.prompt_embeddings is None:
            return arguments | {"prompt": self.prompts[number], "negative_prompt": self.negative_prompt}
        prompt, negative = self.prompt_embeddings[number]
        return arguments | {"prompt_embeds": prompt, "negative_prompt_embeds": negative}


@dataclass(frozen=True, slots=True)
class SampledClips:
    """What `sample_clips` wrote (the contact sheet last), and a line for each failure."""

    paths: list[Path] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def sample_clips(
    pipeline: Pipeline, settings: SampleSettings, folder: Path, step: int, *, write: bool = True,
    collective: bool = False,
) -> SampledClips:  # fmt: skip
    """Sample a clip for each prompt with the current weights, and write the clips and a contact sheet.

    The pipeline's scheduler, the train flags of its modules and the global generators are restored. A clip that fails
    never ends the training: running out of memory, an error of a kernel or of a size, values that are not finite and a
    full disk each become a line of `warnings`. Autocast is up to the caller.

    Args:
        pipeline: ready, with the transformer in training and its other modules where they are needed.
        settings: prompts and sampling parameters.
        folder: for example output_dir/samples; the files are step-000020-prompt-0.mp4 ... and step-000020.png.
        step: optimizer steps done.
        write: False on every rank but the one that writes.
        collective: the transformer is sharded, so that all ranks call this together. An error is raised then: the
            other ranks would wait forever in a collective that this one left.
    """
    result = SampledClips()
    entries: list[SheetEntry] = []
    for number, prompt in enumerate(settings.prompts):
        name = f"step {step}, prompt {number}"
        frames = _sample(pipeline, settings.arguments(number), name, result.warnings, collective)
        if frames is None or not write:
            continue
        path = folder / f"step-{step:06d}-prompt-{number}.mp4"
        try:
            result.paths.append(write_clip(path, frames, settings.fps))
        except OSError as error:
            result.warnings.append(f"{path} was not written: {error}")
        entries.append(SheetEntry(frames, f"step {step}   prompt {number}   {settings.fps:.4g} fps", prompt))
    if entries:
        sheet = folder / f"step-{step:06d}.png"
        try:
            result.paths.append(write_contact_sheet(sheet, entries))
        except OSError as error:
            result.warnings.append(f"{sheet} was not written: {error}")
    return result


def _sample(
    pipeline: Pipeline, arguments: Mapping[str, object], name: str, warnings: list[str], collective: bool
) -> np.ndarray | None:
    """Sample one clip: uint8 [T, H, W, 3], or None and a new line in `warnings`."""
    scheduler, bar = pipeline.scheduler, dict(getattr(pipeline, "_progress_bar_config", {}))
    modules = [component for component in pipeline.components.values() if isinstance(component, nn.Module)]
    pipeline.scheduler = copy.deepcopy(scheduler)  # set_timesteps and step write into it
    pipeline.set_progress_bar_config(**bar | {"disable": True})
    failure = ""
    try:
        with evaluation_mode(modules):
            pixels = np.asarray(pipeline(**arguments).frames[0], dtype=np.float32)
    except (RuntimeError, ValueError) as error:  # out of memory is a RuntimeError
        if collective:
            raise
        failure = f"{type(error).__name__}: {str(error).strip() or 'no message'}"
    finally:
        pipeline.scheduler = scheduler
        pipeline.set_progress_bar_config(**bar)
    if failure:
        gc.collect()  # the traceback holds tensors until the except block has ended
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    elif not np.isfinite(pixels).all():
        failure = "the picture is not finite"
    if failure:
        warnings.append(f"no sample at {name}: {failure.splitlines()[0]}")
        return None
    return (pixels.clip(0, 1) * 255).round().astype(np.uint8)
