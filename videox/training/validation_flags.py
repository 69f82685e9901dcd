"""The flags of the held-out loss and of sample clips, and their checks. Imports no torch or diffusers."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from videox.errors import UserError, plural
from videox.shapes import USUAL, Ratios, snap_frames
from videox.training.argument_parser import COUNT, COUNT_OR_ZERO, Parser, number
from videox.training.prompts import FLAG, SamplePrompt, read_prompts

HELD_OUT_FLAGS = ("validation_rows", "validation_share", "validation_meta")  # exclude each other
SAMPLE_STEPS = 25  # denoising steps
# Minutes that one round of samples may take. Other processes wait for the sampling one for an hour at most.
SAMPLE_MINUTES, MOST_MINUTES_TOGETHER = 30.0, 50.0
# The pictures of a prompt that are no single first frame, by --train_mode.
PICTURES: Mapping[str, tuple[str, ...]] = {"normal": (), "flf2v": ("image", "last_image")}
WITHOUT_PICTURE = ("ti2v",)  # in these modes a prompt may have none: its clip is made from the text alone


def add_validation(parser: Parser) -> None:
    """Add the flags of the held-out loss, and of when a run validates."""
    add = parser.add_argument_group("validation (steps are optimizer steps)").add_argument
    add(
        "--validation_rows",
        type=COUNT_OR_ZERO,
        default=0,
        help="rows held out of training for the held-out loss, captioned clips first; held_out.jsonl names them (0 = off)",
    )
    share = "the same as a share of the rows, above 0 and below 1, such as 0.05"
    add("--validation_share", type=number(float, 0.0001, 0.9), metavar="SHARE", help=share)
    meta = (
        "a list of clips or a folder of its own for the held-out loss, read as --train_data_meta is; all of its rows "
        "are measured, and none is trained"
    )
    add("--validation_meta", metavar="FILE", help=meta)
    add("--validation_steps", type=COUNT, default=2000, help="steps between validations")
    add("--validation_epochs", type=COUNT_OR_ZERO, default=0, help="epochs between further validations (0 = off)")
    best = (
        "keep the checkpoint with the lowest held-out loss beyond checkpoints_total_limit, and export it to best-STEP; "
        "the best one before it is deleted unless it was saved anyway"
    )
    add("--keep_best", action="store_true", help=best)
    stop = "end the run when the held-out loss has had no new minimum for N validations (0 = never)"
    add("--early_stop", type=COUNT_OR_ZERO, default=0, metavar="N", help=stop)
    ema = "sample clips with the EMA of --use_ema, and report its held-out loss as well"
    add("--validate_ema", action="store_true", help=ema)


def add_samples(parser: Parser) -> None:
    """Add the flags of sample clips, which are made at step 0, at each validation or every N steps, and at the end."""
    add = parser.add_argument_group("sample clips (docs/samples.md has the options of a prompt)").add_argument
    prompts = (
        "prompts to sample clips from, or files of prompts (.txt: one a line; .yaml); a prompt may end with options "
        "such as --w 832 --h 480 --f 81 --d 42 --s 30 --l 5 --n blurry"
    )
    add(FLAG, nargs="+", default=[], metavar="TEXT|FILE", help=prompts)
    paths = (
        "i2v, inpaint, ti2v, flf2v: pictures that the clips start from (flf2v: and end with), for prompts without --i"
    )
    add("--validation_paths", nargs="+", default=[], help=paths)
    every = "steps between samples; by default at each validation, and in any case at step 0 and at the end"
    add("--sample_every", type=COUNT, metavar="N", help=every)
    size = number(int, 16, 8192)
    shape = (
        "size of the clips; by default the most common one of the training data; with a picture its area, in the "
        "picture's aspect ratio"
    )
    add("--sample_resolution", type=size, nargs=2, metavar=("HEIGHT", "WIDTH"), help=shape)
    add("--sample_frames", type=number(int, 1, 10_000), help="frames of a clip, 4k+1; by default as in training")
    rate = "frames per second of a clip; by default as in training"
    add("--sample_fps", type=number(float, 0.1, 1000), help=rate)
    add("--sample_steps", type=number(int, 1, 1000), default=SAMPLE_STEPS, help="denoising steps of a clip")
    guidance = (
        "guidance scale; by default 5 for Wan2.1 (classifier-free), --guidance_scale for HunyuanVideo (embedded)"
    )
    add("--sample_guidance", type=number(float, 0, 100), help=guidance)
    add("--sample_negative_prompt", default="", metavar="TEXT", help="negative prompt, for classifier-free guidance")
    seed = "seed of the first clip's noise, the second one has the next number; by default the run's seed"
    add("--sample_seed", type=number(int, 0, 2**63 - 1), help=seed)
    minutes = "minutes that the clips of one step may take; those that do not fit in are left out"
    add("--sample_minutes", type=number(float, 0.001, 10**5), default=SAMPLE_MINUTES, help=minutes)


def check_validation(args: argparse.Namespace) -> None:
    """Raise UserError for flags that need the held-out loss, without held-out rows, and for two kinds of such rows."""
    given = [f"--{flag}" for flag in HELD_OUT_FLAGS if getattr(args, flag)]
    if len(given) > 1:
        what = f"contradicts {' and '.join(given[:-1])}: each names the rows of the held-out loss"
        raise UserError(given[-1], what, "use one of them")
    for flag in ("keep_best", "early_stop"):
        if getattr(args, flag) and not given:
            what = "there is no held-out loss without --validation_rows, --validation_share or --validation_meta"
            raise UserError(f"--{flag}", what, "add --validation_rows N, or remove the flag")


def check_samples(args: argparse.Namespace) -> None:
    """Check prompts, their options and their pictures, before anything slow.

    Raises:
        UserError: naming the prompt or the flag that is wrong.
    """
    check_clip_shape(args.sample_resolution, args.sample_frames, "--sample_resolution", "--sample_frames", USUAL)
    prompts = prompts_of(args)
    for prompt in prompts:
        for picture in (prompt.image, prompt.last_image):
            if picture is not None and not picture.is_file():
                raise UserError(prompt.place, f"the picture {picture} does not exist", "pass a picture that exists")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and args.sample_minutes > MOST_MINUTES_TOGETHER:
        what = f"{args.sample_minutes:g}: the processes wait for each other for an hour at most"
        raise UserError("--sample_minutes", what, f"pass at most {MOST_MINUTES_TOGETHER:g} with several processes")


def check_clip_shape(
    sides: Sequence[int] | None, frames: int | None, size_flag: str, frames_flag: str, ratios: Ratios
) -> None:
    """Raise UserError unless sides are multiples of the model's grid and frames are 4k+1; None = not given.

    Args:
        sides: height and width of clips, in pixels.
        frames: of clips.
        size_flag: that has the sides.
        frames_flag: that has the frames.
        ratios: of the model.
    """
    grid, step = ratios.grid, ratios.temporal
    if sides and any(side % grid for side in sides):
        nearest = " ".join(str(max(grid, round(side / grid) * grid)) for side in sides)
        what = f"{' '.join(map(str, sides))}: sides are multiples of {grid}"
        raise UserError(size_flag, what, f"pass {nearest}")
    if frames and frames != snap_frames(frames, ratios):
        raise UserError(frames_flag, f"{frames}: clips have {step}k+1 frames", f"pass {snap_frames(frames, ratios)}")


def prompts_of(args: argparse.Namespace) -> list[SamplePrompt]:
    """Return the prompts of a run with their pictures: of the option --i, else of --validation_paths in order.

    Raises:
        UserError: of read_prompts, or where prompts and pictures do not fit --train_mode.
    """
    return with_pictures(
        read_prompts(args.validation_prompts), args.validation_paths, args.train_mode, "--validation_paths"
    )


def with_pictures(prompts: Sequence[SamplePrompt], paths: Sequence[str], task: str, flag: str) -> list[SamplePrompt]:
    """Return prompts with the pictures that the task starts from: none, one each, or a first and a last one.

    Args:
        prompts: of read_prompts.
        paths: the pictures that their options do not name, in order.
        task: value of --train_mode, for messages.
        flag: that has the paths, for messages.

    Raises:
        UserError: too many or too few pictures.
    """
    fields = PICTURES.get(task, ("image",))
    for field, option, role in (
        ("image", "--i", "starts from no picture"),
        ("last_image", "--ei", "has no last frame"),
    ):
        named = next((prompt for prompt in prompts if getattr(prompt, field) is not None), None)
        if named and field not in fields:
            what = f"{option} {getattr(named, field)}: --train_mode {task} {role}"
            raise UserError(named.place, what, "remove the option, or use a model for image-to-video")
    wanted = sum(getattr(prompt, field) is None for prompt in prompts for field in fields)
    if task in WITHOUT_PICTURE and not paths:
        return [*prompts]
    if len(paths) != wanted:
        what = f"{len(paths)} {plural(len(paths), 'image')}, --train_mode {task} needs {wanted}"
        hint = "pass one image per prompt in i2v and inpaint, by this flag or by the option --i"
        if task in WITHOUT_PICTURE:
            hint = "name the picture of each prompt that has one by the option --i"
        if len(fields) > 1:
            hint = "pass a first and a last image per prompt, by this flag or by the options --i and --ei"
        raise UserError(flag, what, hint)
    left, found = map(Path, paths), []
    for prompt in prompts:
        pictures: dict[str, Any] = {field: getattr(prompt, field) or next(left) for field in fields}
        found.append(replace(prompt, **pictures))
    return found
