"""--explain ROW: how a row is used in each epoch, or why it is not used."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from videox.data.index.captions import draw_caption
from videox.data.index.index import Index
from videox.data.index.table import IMAGE
from videox.data.plan.buckets import Fate, crop_share, frame_offsets, frames_at_pace, pace_of
from videox.data.plan.plan import draw_samples, plan_epoch, row_fates
from videox.data.plan.settings import PlanColumns, PlanSettings
from videox.errors import UserError
from videox.rng import Purpose, uniform

MOST_CHARACTERS = 80  # of a caption in the line of an epoch


def explain_row(
    index: Index,
    columns: PlanColumns,
    settings: PlanSettings,
    row: int,
    epochs: int,
    caption_dropout: float = 0.0,
) -> list[str]:
    """Return lines about one metadata row: its file, and what each epoch trains of it, or why it is not used.

    A line of an epoch has bucket, start, cropping and caption.

    Args:
        index: has the file and its problem.
        columns: what the plan reads of the index.
        settings: of the run's plan.
        row: row number in the metadata, from 0.
        epochs: number of epochs to list.
        caption_dropout: share of captions, 0 to 1, that are dropped.

    Raises:
        UserError: there is no such row.
    """
    if not 0 <= row < len(columns):
        raise UserError(
            "--explain", f"{row}: the metadata has rows 0 to {len(columns) - 1}", "pass one of these row numbers"
        )
    lines = [
        f"row {row}: {index.file_path[row].as_py()!r}, {_describe_file(index, columns, row)}",
        *_caption_lines(index, row),
    ]
    fate = Fate(int(row_fates(columns, settings, np.zeros(0, np.int64))[row]))
    if fate is not Fate.TRAINED:
        return [*lines, f"{fate.name.lower()}: {_reason(index, columns, settings, row, fate)}"]
    return [*lines, *_epoch_lines(index, columns, settings, row, epochs, caption_dropout)]


def _caption_lines(index: Index, row: int) -> list[str]:
    """Return lines on the captions of a row as the metadata states them."""
    captions, prefix, trigger_word, suffix = index.captions(row)
    of = f" of {len(captions)}"
    lines = [
        f"caption{f' {number}{of}' if len(captions) > 1 else ''}: {caption!r}"
        for number, caption in enumerate(captions, 1)
    ]
    return [
        *lines,
        *([f"prefix of its list: {prefix!r}"] if prefix else []),
        *([f"suffix of its list: {suffix!r}"] if suffix else []),
        *([f"trigger word of its list: {trigger_word!r}"] if trigger_word else []),
    ]


def _describe_file(index: Index, columns: PlanColumns, row: int) -> str:
    """Return what is known of a row's file: nothing where the row is invalid or the file could not be probed."""
    if not (columns.width[row] > 0 and columns.height[row] > 0):
        return "kind and size unknown, because the row is refused"
    size = f"{columns.width[row]} x {columns.height[row]} pixels"
    if columns.kind[row] == IMAGE:
        return f"image, {size}"
    rate = f" at {index.fps[row]:g} fps" if index.fps[row] > 0 else ""
    return f"video, {size}, {columns.frames[row]} frames{rate}"


def _reason(index: Index, columns: PlanColumns, settings: PlanSettings, row: int, fate: Fate) -> str:
    """Return why a row is not trained."""
    policy = settings.policy
    if fate is Fate.REFUSED:
        problems = {number: f"{kind} ({detail})" for number, _, kind, detail in index.problems()}
        return problems.get(row, "it cannot be used")
    if fate is Fate.HELD_OUT:
        return "held out for the validation loss (--validation_rows, --validation_share)"
    if fate is Fate.TOO_SMALL:
        return f"a side is smaller than {policy.ratios.grid} pixels"
    if columns.kind[row] == 0:
        return "an image has no frame besides the one that is given to the model"
    available = int(np.ravel(frames_at_pace(columns.frames[[row]].astype(np.int64), _pace(columns, settings, row)))[0])
    needed = policy.min_frames if policy.enable_bucket else policy.n_frames
    rate_flag = (
        f"--video_sample_fps {policy.sample_fps:g}" if policy.sample_fps else f"--video_sample_stride {policy.stride}"
    )
    return f"it has {available} frames at {rate_flag}, but {needed} are needed"


def _pace(columns: PlanColumns, settings: PlanSettings, row: int) -> np.ndarray | int:
    return pace_of(settings.policy, None if columns.fps is None else columns.fps[[row]])


def _epoch_lines(
    index: Index, columns: PlanColumns, settings: PlanSettings, row: int, epochs: int, caption_dropout: float
) -> list[str]:
    """Return one line per epoch and copy.

    Draws depend on the row alone, so that a plan without the other rows has its bucket and start.
    """
    usable = np.zeros(len(columns), bool)
    usable[row] = True
    only_this_row = replace(columns, usable=usable)
    one_slot = replace(
        settings, held_out=0, held_out_share=0.0, slots=1, accumulation=1, batch_size=1, slot_fill="fixed",
        balance="none",
    )  # fmt: skip
    pace = _pace(columns, settings, row)
    lines = [
        f"  {'epoch':>5} {'frames x height x width':>24} {'tokens':>8} {'first frame':>11} {'last':>6} {'cropped':>7}  caption"
    ]
    for epoch in range(epochs):
        fates = row_fates(only_this_row, one_slot, np.zeros(0, np.int64))
        draw_samples(only_this_row, one_slot, epoch, fates)
        if fates[row] == Fate.NOT_DRAWN:
            lines.append(f"  {epoch:>5} {'not drawn (weight)':>24}")
            continue
        plan = plan_epoch(only_this_row, one_slot, epoch)
        for micro, copy in enumerate(plan.copy.tolist()):
            bucket = plan.buckets[plan.micro_bucket[micro]]
            start = int(plan.start[micro])
            last = start + int(np.ravel(frame_offsets(bucket.frames - 1, pace))[0])
            cropped = crop_share(columns.height[row], columns.width[row], bucket.height, bucket.width)
            name = f"{bucket.frames} x {bucket.height} x {bucket.width}"
            copy_note = f"  (copy {copy + 1})" if copy else ""
            key = int(plan.key[micro])
            is_dropped = bool(uniform(key, Purpose.CAPTION_DROPOUT) < caption_dropout)
            caption = "" if is_dropped else draw_caption(index.captions(row), settings.caption_rules, key)
            shown = f"{_shorten(caption)}{' (dropped)' if is_dropped else ''}"
            lines.append(
                f"  {epoch:>5} {name:>24} {plan.tokens_of(bucket):>8,} {start:>11} {last:>6} {cropped:>7.1%}  {shown}"
                f"{copy_note}"
            )
    return lines


def _shorten(caption: str) -> str:
    if len(caption) <= MOST_CHARACTERS:
        return repr(caption)
    return f"{caption[:MOST_CHARACTERS]!r}..."
