"""Serves whoever asks after one row: what becomes of it in each epoch, or why nothing does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from videox.data.index.index import Index
from videox.data.index.table import IMAGE
from videox.data.plan.buckets import Fate, crop_share, frame_offsets, frames_at_pace, pace_of
from videox.data.plan.plan import draw_samples, plan_epoch, row_fates
from videox.data.plan.settings import PlanColumns, PlanSettings
from videox.errors import UserError
from videox.shapes import GRID, token_count


def explain_row(index: Index, columns: PlanColumns, settings: PlanSettings, row: int, epochs: int) -> list[str]:
    """Returns lines about one metadata row: its file, and its size, start and cut in each epoch, or why it has none.

    Args:
        index: for the file and its problem.
        columns: what the plan reads of it.
        settings: of the run.
        row: number in the metadata, from 0.
        epochs: of the run.

    Raises:
        UserError: there is no such row.
    """
    if not 0 <= row < len(columns):
        raise UserError("--explain", f"{row}: the metadata has rows 0 to {len(columns) - 1}", "give one of them")
    lines = [
        f"row {row}: {index.file_path[row].as_py()!r}, {_file_words(index, columns, row)}",
        f"caption: {index.caption(row)!r}",
    ]
    fate = Fate(int(row_fates(columns, settings, np.zeros(0, np.int64))[row]))
    if fate is not Fate.TRAINED:
        return [*lines, f"{fate.name.lower()}: {_reason(index, columns, settings, row, fate)}"]
    return [*lines, *_epoch_lines(columns, settings, row, epochs)]


def _file_words(index: Index, columns: PlanColumns, row: int) -> str:
    """Returns what is known of a row's file, which is nothing where the row itself or the look at it failed."""
    if not (columns.width[row] > 0 and columns.height[row] > 0):
        return "of which kind and size is not known, since the row is refused"
    size = f"{columns.width[row]} x {columns.height[row]} pixels"
    if columns.kind[row] == IMAGE:
        return f"image, {size}"
    rate = f" at {index.fps[row]:g} per second" if index.fps[row] > 0 else ""
    return f"video, {size}, {columns.frames[row]} frames{rate}"


def _reason(index: Index, columns: PlanColumns, settings: PlanSettings, row: int, fate: Fate) -> str:
    policy = settings.policy
    if fate is Fate.REFUSED:
        problems = {number: f"{kind} ({detail})" for number, _, kind, detail in index.problems()}
        return problems.get(row, "it cannot be used")
    if fate is Fate.HELD_OUT:
        return "--validation_rows keeps it for the validation loss"
    if fate is Fate.TOO_SMALL:
        return f"a side is below {GRID} pixels"
    if columns.kind[row] == 0:
        return "an image has no frame beside the one that is given"
    fit = int(np.ravel(frames_at_pace(columns.frames[[row]].astype(np.int64), _pace(columns, settings, row)))[0])
    needed = policy.min_frames if policy.enable_bucket else policy.n_frames
    by = f"--video_sample_fps {policy.sample_fps:g}" if policy.sample_fps else f"--video_sample_stride {policy.stride}"
    return f"{fit} frames fit at {by}, {needed} are needed"


def _pace(columns: PlanColumns, settings: PlanSettings, row: int) -> np.ndarray | int:
    return pace_of(settings.policy, None if columns.fps is None else columns.fps[[row]])


def _epoch_lines(columns: PlanColumns, settings: PlanSettings, row: int, epochs: int) -> list[str]:
    """Draws depend on the row alone, so that a plan without the other rows tells its bucket and start."""
    usable = np.zeros(len(columns), bool)
    usable[row] = True
    alone = replace(columns, usable=usable)
    own = replace(
        settings, held_out=0, slots=1, accumulation=1, batch_size=1, slot_fill="fixed", balance="none"
    )  # fmt: skip
    pace = _pace(columns, settings, row)
    lines = [
        f"  {'epoch':>5} {'frames x height x width':>24} {'tokens':>8} {'first frame':>11} {'last':>6} {'cut':>6}"
    ]
    for epoch in range(epochs):
        fates = row_fates(alone, own, np.zeros(0, np.int64))
        draw_samples(alone, own, epoch, fates)
        if fates[row] == Fate.NOT_DRAWN:
            lines.append(f"  {epoch:>5} {'not drawn, by its weight':>24}")
            continue
        plan = plan_epoch(alone, own, epoch)
        for micro, copy in enumerate(plan.copy.tolist()):
            bucket = plan.buckets[plan.micro_bucket[micro]]
            start = int(plan.start[micro])
            last = start + int(np.ravel(frame_offsets(bucket.frames - 1, pace))[0])
            cut = crop_share(columns.height[row], columns.width[row], bucket.height, bucket.width)
            name = f"{bucket.frames} x {bucket.height} x {bucket.width}"
            again = f"  (time {copy + 1})" if copy else ""
            lines.append(f"  {epoch:>5} {name:>24} {token_count(bucket):>8,} {start:>11} {last:>6} {cut:>6.1%}{again}")
    return lines
