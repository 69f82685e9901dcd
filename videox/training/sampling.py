"""Sample clips: one clip per prompt from the weights in training, by a diffusers pipeline that is left unchanged."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import nn

from videox.activity import ACTIVITY
from videox.models.scheduler import with_shift
from videox.shapes import Bucket
from videox.tracking.preview import SheetEntry, write_clip, write_contact_sheet
from videox.training.validation_loss import evaluation_mode


class Pipeline(Protocol):
    """What `sample_clips` needs of a diffusers text-to-video pipeline."""

    scheduler: Any
    components: dict[str, Any]

    def set_progress_bar_config(self, **settings: Any) -> None:  # noqa: ANN401 - as in diffusers
        """Set tqdm's keywords."""

    def __call__(self, **arguments: Any) -> Any:  # noqa: ANN401 - as in diffusers
        """Return an object with `frames`, float [1, T, H, W, 3] in [0, 1]."""


@dataclass(frozen=True)
class SampleClip:
    """What one clip is sampled from, the same at each step, so that clips of two steps differ by the training alone.

    Attributes:
        prompt: also its caption on the contact sheet.
        shape: frames (4k+1; a single frame is written as .png), height and width (multiples of 16).
        fps: frames per second of the written clip.
        seed: of the CPU generator that the noise is drawn from.
        steps: denoising steps.
        guidance: keywords of the pipeline, such as {"guidance_scale": 5.0}.
        negative_prompt: used with classifier-free guidance above 1.
        flow_shift: of the noise levels; None = that of the pipeline's scheduler.
        image: what the clip starts from, in image-to-video; of the clip's height and width.
        image_path: where it was read, for the records.
        last_image: what the clip ends with, as `image`; last_image_path: where it was read.
        text_tokens: length that the prompt's embeddings are padded to; None = the pipeline's own.
    """

    prompt: str
    shape: Bucket
    fps: float
    seed: int
    steps: int
    guidance: Mapping[str, float]
    negative_prompt: str = ""
    flow_shift: float | None = None
    image: Image.Image | None = None
    image_path: Path | None = None
    last_image: Image.Image | None = None
    last_image_path: Path | None = None
    text_tokens: int | None = None

    def arguments(self) -> dict[str, Any]:
        """Keywords of the pipeline."""
        arguments: dict[str, Any] = {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "height": self.shape.height,
            "width": self.shape.width,
            "num_frames": self.shape.frames,
            "num_inference_steps": self.steps,
            "generator": torch.Generator("cpu").manual_seed(self.seed),
            "output_type": "np",
            **self.guidance,
        }
        optional = {"image": self.image, "last_image": self.last_image, "max_sequence_length": self.text_tokens}
        return arguments | {name: value for name, value in optional.items() if value is not None}

    def facts(self) -> dict[str, object]:
        """Everything that the clip depends on besides the weights, for its record."""
        return {
            "prompt": self.prompt, "negative_prompt": self.negative_prompt, "width": self.shape.width,
            "height": self.shape.height, "frames": self.shape.frames, "fps": self.fps, "seed": self.seed,
            "steps": self.steps, **self.guidance, "flow_shift": self.flow_shift,
            "image": str(self.image_path) if self.image_path else None, "text_tokens": self.text_tokens,
            **({"last_image": str(self.last_image_path)} if self.last_image_path else {}),
        }  # fmt: skip


class FinishedClip(NamedTuple):
    """A clip that was written: its number among the prompts, its file, uint8 [T, H, W, 3], and seconds of sampling."""

    number: int
    clip: SampleClip
    path: Path
    frames: np.ndarray
    seconds: float


class TimeIsUp(Exception):
    """Raised inside a pipeline when a TimeLimit is over."""


class TimeLimit:
    """How long the clips of one step may take, from now on.

    Args:
        seconds: above 0.
        agree: returns the main rank's answer on every rank; each rank calls it equally often. None = the own answer.
    """

    def __init__(self, seconds: float, agree: Callable[[bool], bool] | None = None) -> None:
        self.seconds, self._agree, self._start = seconds, agree, time.monotonic()

    def is_over(self) -> bool:
        """Whether the time is over; a collective if `agree` is one."""
        over = time.monotonic() - self._start > self.seconds
        return over if self._agree is None else self._agree(over)


@dataclass(frozen=True, slots=True)
class SampledClips:
    """What `sample_clips` wrote (the contact sheet last), and a line for each failure."""

    paths: list[Path] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ClipWriter:
    """Where clips are written.

    Attributes:
        folder: for example output_dir/samples; the files are step-000020-prompt-0.mp4 ... and step-000020.png.
        step: optimizer steps done.
        enabled: False on every rank but the one that writes.
        on_clip: called with each clip after it was written; None = nothing is.
    """

    folder: Path
    step: int
    enabled: bool = True
    on_clip: Callable[[FinishedClip], None] | None = None

    def write(self, number: int, clip: SampleClip, frames: np.ndarray, seconds: float, result: SampledClips) -> None:
        """Write a clip, uint8 [T, H, W, 3]; a failure becomes a line of the result's warnings."""
        path = self.folder / f"step-{self.step:06d}-prompt-{number}.mp4"
        try:
            path = write_clip(path, frames, clip.fps)
        except OSError as error:
            result.warnings.append(f"{path} was not written: {error}")
            return
        result.paths.append(path)
        if self.on_clip is not None:
            self.on_clip(FinishedClip(number, clip, path, frames, seconds))

    def write_sheet(self, entries: Sequence[SheetEntry], result: SampledClips) -> None:
        """Write the contact sheet; a failure becomes a line of the result's warnings."""
        sheet = self.folder / f"step-{self.step:06d}.png"
        try:
            result.paths.append(write_contact_sheet(sheet, entries))
        except OSError as error:
            result.warnings.append(f"{sheet} was not written: {error}")


def sample_clips(
    pipeline: Pipeline, clips: Sequence[SampleClip], writer: ClipWriter, *, collective: bool = False,
    limit: TimeLimit | None = None,
) -> SampledClips:  # fmt: skip
    """Sample each clip with the current weights, and write the clips and a contact sheet.

    The pipeline's scheduler, the train flags of its modules and the global generators are restored. A clip that fails
    never ends the training: running out of memory, an error of a kernel or of a size, values that are not finite and a
    full disk each become a line of `warnings`. Autocast is up to the caller.

    Args:
        pipeline: ready, with the transformer in training and its other modules where they are needed.
        clips: what to sample.
        writer: of the files.
        collective: the transformer is sharded, so that all ranks call this together. An error before the last
            denoising step is raised then: the other ranks would wait forever in a collective that this one left.
        limit: clips that are not finished when it is over are left out; None = no limit.
    """
    result = SampledClips()
    entries: list[SheetEntry] = []
    for number, clip in enumerate(clips):
        begin = time.monotonic()
        try:
            if limit is not None and limit.is_over():
                raise TimeIsUp
            frames = _sample(pipeline, clip, f"step {writer.step}, prompt {number}", result, collective, limit)
        except TimeIsUp:
            assert limit is not None
            left = ", ".join(map(str, range(number, len(clips))))
            what = f"prompts {left} were" if number + 1 < len(clips) else f"prompt {left} was"
            minutes = f"--sample_minutes {limit.seconds / 60:g}"
            result.warnings.append(f"step {writer.step}: {what} not sampled within {minutes}")
            break
        if frames is not None and writer.enabled:
            writer.write(number, clip, frames, time.monotonic() - begin, result)
            shown = frames[sorted({0, len(frames) // 2, len(frames) - 1})]  # what the sheet shows of them
            title = f"step {writer.step}   prompt {number}   {clip.fps:.4g} fps"
            entries.append(SheetEntry(shown, title, clip.prompt))
    if entries:
        writer.write_sheet(entries, result)
    return result


def _sample(
    pipeline: Pipeline, clip: SampleClip, name: str, result: SampledClips, collective: bool, limit: TimeLimit | None
) -> np.ndarray | None:
    """Sample one clip: uint8 [T, H, W, 3], or None and a new line in the result's warnings."""
    scheduler, bar = pipeline.scheduler, dict(getattr(pipeline, "_progress_bar_config", {}))
    modules = [component for component in pipeline.components.values() if isinstance(component, nn.Module)]
    denoised = 0

    def after_step(_: object, index: int, __: object, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal denoised
        denoised = index + 1
        ACTIVITY.progress()
        if denoised < len(pipeline.scheduler.timesteps) and limit is not None and limit.is_over():
            raise TimeIsUp
        return tensors

    failure = ""
    try:
        pipeline.scheduler = copy.deepcopy(scheduler)  # set_timesteps and step write into it
        if clip.flow_shift is not None:
            pipeline.scheduler = with_shift(pipeline.scheduler, clip.flow_shift)
        pipeline.set_progress_bar_config(**bar | {"disable": True})
        with evaluation_mode(modules):
            output = pipeline(**clip.arguments(), callback_on_step_end=after_step)
        pixels = np.asarray(output.frames[0], dtype=np.float32)
    except TimeIsUp:
        raise
    except Exception as error:
        if collective and denoised < clip.steps:
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
        result.warnings.append(f"no sample at {name}: {failure.splitlines()[0]}")
        return None
    return (pixels.clip(0, 1) * 255).round().astype(np.uint8)
