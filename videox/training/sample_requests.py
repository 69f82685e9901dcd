"""From prompts with options to what each sample clip is made of: sizes, lengths, guidance and pictures."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from videox.data.media.image import probe_image
from videox.data.media.video import BadMedia, read_image
from videox.errors import UserError
from videox.shapes import USUAL, Bucket, Ratios, snap_frames
from videox.training.prompts import SamplePrompt
from videox.training.sampling import SampleClip


@dataclass(frozen=True)
class ClipDefaults:
    """What a clip has where its prompt has no option.

    Attributes:
        shape: frames, height and width; with a picture its area, in the picture's aspect ratio.
        fps: frames per second.
        steps: denoising steps.
        guidance: embedded or classifier-free, whichever the family has.
        negative_prompt: for classifier-free guidance.
        seed: of the first clip; the next one has the next number.
        embedded_guidance: the family's guidance scale is an input of the transformer (HunyuanVideo); else it is
            classifier-free (Wan2.1).
        text_tokens: length that the embeddings of prompts are padded to, as in training; None = the pipeline's own.
        ratios: of the model.
    """

    shape: Bucket
    fps: float
    steps: int
    guidance: float
    negative_prompt: str
    seed: int
    embedded_guidance: bool
    text_tokens: int | None = None
    ratios: Ratios = USUAL


def with_flags(args: argparse.Namespace, defaults: ClipDefaults) -> ClipDefaults:
    """Return defaults in which the flags --sample_resolution, --sample_frames ... replace those of the run."""
    height, width = args.sample_resolution or (defaults.shape.height, defaults.shape.width)
    given = {
        "fps": args.sample_fps, "steps": args.sample_steps, "guidance": args.sample_guidance,
        "negative_prompt": args.sample_negative_prompt, "seed": args.sample_seed,
    }  # fmt: skip
    shape = Bucket(args.sample_frames or defaults.shape.frames, height, width)
    return replace(defaults, shape=shape, **{name: value for name, value in given.items() if value is not None})


def build_clips(prompts: Sequence[SamplePrompt], defaults: ClipDefaults) -> tuple[list[SampleClip], list[str]]:
    """Return the clip of each prompt, and a line for each value that is not used as it was written.

    Args:
        prompts: each with a picture, or none.
        defaults: of what they do not say.

    Raises:
        UserError: a picture cannot be read.
    """
    clips, notes = [], []
    for number, prompt in enumerate(prompts):
        picture = _size_of(prompt) if prompt.image else None
        shape, changes = shape_of(prompt, defaults.shape, picture, defaults.ratios)
        if prompt.last_image and shape.frames == 1:
            fewest = defaults.ratios.temporal + 1
            what = f"one frame: a clip between two pictures has at least {fewest}"
            raise UserError(prompt.place, what, f"add --f {fewest} or more to the prompt, or pass --sample_frames")
        guidance, more = guidance_of(prompt, defaults)
        notes += [f"{prompt.place}: {line}" for line in (*changes, *more)]
        clips.append(
            SampleClip(
                prompt=prompt.text,
                shape=shape,
                fps=prompt.fps or defaults.fps,
                seed=(defaults.seed + number) % 2**63 if prompt.seed is None else prompt.seed,
                steps=prompt.steps or defaults.steps,
                guidance=guidance,
                negative_prompt=defaults.negative_prompt if prompt.negative is None else prompt.negative,
                flow_shift=prompt.flow_shift,
                image=_read_picture(prompt, prompt.image, shape) if prompt.image else None,
                image_path=prompt.image,
                last_image=_read_picture(prompt, prompt.last_image, shape) if prompt.last_image else None,
                last_image_path=prompt.last_image,
                text_tokens=defaults.text_tokens,
            )
        )
    return clips, notes


def shape_of(
    prompt: SamplePrompt, default: Bucket, picture: tuple[int, int] | None = None, ratios: Ratios = USUAL
) -> tuple[Bucket, list[str]]:
    """Return the shape of a clip, sides on the model's grid and 4k+1 frames, and a line if that is not as written.

    Without --w and --h the clip has the area of the default shape, in the aspect ratio of the picture if there is one.
    With one of them, the other side follows from that ratio.

    Args:
        prompt: with its options.
        default: frames, height and width where it has none.
        picture: height and width of the picture that the clip starts from.
        ratios: of the model.
    """
    grid = ratios.grid
    frames = snap_frames(prompt.frames or default.frames, ratios)
    ratio = picture[1] / picture[0] if picture else default.width / default.height
    if prompt.width is None and prompt.height is None:
        height, width = sides_of_ratio(default.height * default.width, ratio, grid) if picture else (0, 0)
        height, width = height or _snap(default.height, grid), width or _snap(default.width, grid)
    else:
        width = _snap(prompt.width or _snap(prompt.height or 0, grid) * ratio, grid)
        height = _snap(prompt.height or width / ratio, grid)
    asked = (prompt.frames or frames, prompt.height or height, prompt.width or width)
    if asked == (frames, height, width):
        return Bucket(frames, height, width), []
    text = "{2}x{1} with {0} frames".format
    rule = f"sides are multiples of {grid}, lengths {ratios.temporal}k+1"
    return Bucket(frames, height, width), [f"{text(*asked)} becomes {text(frames, height, width)}: {rule}"]


def _snap(side: float, grid: int) -> int:
    """Return the nearest multiple of the grid, at least one cell of it."""
    return max(grid, round(side / grid) * grid)


def sides_of_ratio(area: float, ratio: float, grid: int = USUAL.grid) -> tuple[int, int]:
    """Return (height, width), multiples of the grid near an area in pixels and an aspect ratio width / height."""
    cells = max(area / grid**2, 1.0)
    rows = max(1, round(math.sqrt(cells / ratio)))

    def error(sides: tuple[int, int]) -> float:
        height, width = sides
        return abs(math.log(width / height / ratio)) + abs(math.log(height * width / cells)) / 4

    candidates = [(r, max(1, round(r * ratio))) for r in range(max(1, rows - 2), rows + 3)]
    height, width = min(candidates, key=error)
    return height * grid, width * grid


def guidance_of(prompt: SamplePrompt, defaults: ClipDefaults) -> tuple[dict[str, float], list[str]]:
    """Return the guidance scales as keywords of the pipeline, and a line if one is not used as written.

    With embedded guidance --g is its scale, and --l that of an additional classifier-free guidance. Else --l is the
    scale, and --g the same if there is no --l.
    """
    guidance, cfg = prompt.guidance, prompt.cfg
    if defaults.embedded_guidance:
        embedded = defaults.guidance if guidance is None else guidance
        return {"guidance_scale": embedded, "true_cfg_scale": 1.0 if cfg is None else cfg}, []
    if guidance is None:
        return {"guidance_scale": defaults.guidance if cfg is None else cfg}, []
    if cfg is None:
        line = f"--g {guidance:g} is used as --l: this model has no embedded guidance"
        return {"guidance_scale": guidance}, [line]
    return {"guidance_scale": cfg}, [f"--g {guidance:g} has no effect: this model has no embedded guidance"]


def check_pictures(prompts: Sequence[SamplePrompt]) -> None:
    """Raise UserError if a prompt's picture cannot be read."""
    for prompt in prompts:
        for picture in (prompt.image, prompt.last_image):
            if picture is not None:
                _read_picture(prompt, picture, Bucket(1, USUAL.grid, USUAL.grid))


def _size_of(prompt: SamplePrompt) -> tuple[int, int]:
    """Return the upright height and width of a prompt's picture; raises UserError if it cannot be read."""
    assert prompt.image is not None
    try:
        found = probe_image(prompt.image)
    except BadMedia as why:
        raise _unreadable(prompt, prompt.image, why) from why
    return found.height, found.width


def _read_picture(prompt: SamplePrompt, picture: Path, shape: Bucket) -> Image.Image:
    """Return a picture of a prompt, scaled to cover the clip's size and cropped at the centre."""
    try:
        return Image.fromarray(read_image(picture, shape.height, shape.width)[0])
    except BadMedia as why:
        raise _unreadable(prompt, picture, why) from why


def _unreadable(prompt: SamplePrompt, image: Path, why: BadMedia) -> UserError:
    what = f"{image} is {why.media_class} ({why.detail})"
    return UserError(prompt.place, what, "pass an image that can be read")
