"""Report on the data at the start of a run: how each row is used, what is cropped, and the buckets of the epoch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from videox.data.index.captions import (
    TRIGGER,
    CaptionRules,
    caption_counts,
    draw_caption,
    other_placeholders,
    rows_with_placeholder,
    rows_without_caption,
    unpack_captions,
)
from videox.data.index.index import Index, index_summary
from videox.data.plan.balance import balance_and_variance_ratio
from videox.data.plan.buckets import Fate, SizePolicy, crop_share, frames_at_pace, pace_of
from videox.data.plan.epoch import EpochPlan
from videox.data.plan.settings import PlanColumns, PlanSettings
from videox.errors import DATA, UserError, plural

MUCH_CROPPED = 0.12  # share of a sample's area; rows that lose more are listed
UNFIT = {
    Fate.TOO_SHORT: "too few frames for a sample at this stride or frame rate; --explain with this row number prints how many",
    Fate.TOO_SMALL: "a side is smaller than {grid} pixels",
}


def data_lines(
    index: Index, columns: PlanColumns, plan: EpochPlan, policy: SizePolicy, max_buckets: int = 20
) -> list[str]:
    """Return the lines on rows and cropping, and the table of buckets with their share of the tokens."""
    return [*row_lines(index, columns, plan, policy), *bucket_lines(plan, max_buckets)]


def row_lines(index: Index, columns: PlanColumns, plan: EpochPlan, policy: SizePolicy) -> list[str]:
    """Return lines on the files, on how each row is used, and on what is cropped."""
    fates = {name: count for name, count in plan.fate_counts().items() if count}
    lines = [
        *index_summary(index),
        f"rows: {len(index)} = " + " + ".join(f"{count} {name}" for name, count in fates.items()),
    ]
    return [*lines, *single_frame_lines(columns, plan, policy), *crop_lines(index, columns, plan)]


def single_frame_lines(columns: PlanColumns, plan: EpochPlan, policy: SizePolicy, max_rows: int = 5) -> list[str]:
    """Return a line for each reason why videos are trained as a single frame although more frames are requested."""
    if policy.n_frames == 1:
        return []  # requested for every video
    frames = np.array([bucket.frames for bucket in plan.buckets])[plan.micro_bucket]
    rows = plan.row[np.repeat(frames, np.diff(plan.micro_first)) == 1]
    videos = np.unique(rows[columns.kind[rows] == 1])
    pace = pace_of(policy, None if columns.fps is None else columns.fps[videos])
    fit = frames_at_pace(columns.frames[videos].astype(np.int64), pace)
    # The fewest frames above one are those of a second latent frame. A video that has them is cut by the token budget.
    too_short = fit < policy.ratios.temporal + 1
    reasons = {
        "too short for more at this stride or frame rate": videos[too_short],
        f"as the token budget (--token_sample_size {policy.token_sample_size}) allows no more at their target size": (
            videos[~too_short]
        ),
    }
    return [
        f"{len(rows)} {plural(len(rows), 'video is', 'videos are')} trained as a single frame, {reason}: "
        f"{plural(len(rows), 'row')} {', '.join(map(str, rows[:max_rows]))}"
        + (", ..." if len(rows) > max_rows else "")
        for reason, rows in reasons.items()
        if len(rows)
    ]


def crop_lines(index: Index, columns: PlanColumns, plan: EpochPlan, max_rows: int = 5) -> list[str]:
    """Return which share of the samples' area is cropped, and the rows that lose the most."""
    bucket = np.repeat(plan.micro_bucket, np.diff(plan.micro_first))
    heights, widths = (np.array([getattr(b, side) for b in plan.buckets])[bucket] for side in ("height", "width"))
    cropped = crop_share(columns.height[plan.row], columns.width[plan.row], heights, widths)
    lines = [
        f"cropped area: median {np.median(cropped):.1%}, p95 {np.quantile(cropped, 0.95):.1%}, max {cropped.max():.1%}"
    ]
    rows, of_row = np.unique(plan.row, return_inverse=True)
    lost = np.zeros(len(rows))
    np.maximum.at(lost, of_row, cropped)  # a row with several clips is listed once, with its most cropped clip
    exceeding = np.flatnonzero(lost > MUCH_CROPPED)
    worst = exceeding[np.argsort(-lost[exceeding], kind="stable")][:max_rows]
    lines += [
        f"  row {rows[i]} loses {lost[i]:.0%} of its area: {index.file_path[int(rows[i])].as_py()!r}" for i in worst
    ]
    if len(exceeding) > max_rows:
        lines.append(f"  and {len(exceeding) - max_rows} more lose over {MUCH_CROPPED:.0%}")
    return lines


def balance_line(plan: EpochPlan, settings: PlanSettings, processes: int) -> str:
    """Return a line on how evenly ranks are loaded, and how varied steps are relative to random ones."""
    balance, ratio = balance_and_variance_ratio(plan, settings, processes)
    where = {"step": "optimizer step", "micro": "micro-batch"}[settings.barrier]
    return (
        f"balance {balance:.3f} on {processes} processes that synchronize in every {where} (1 = no rank waits), mix "
        f"{ratio:.2f} (variance of the step composition relative to random steps), --balance {settings.balance}"
    )


def check_captions(index: Index, missing_caption: str) -> None:
    """Raise UserError if a row that can be trained has no caption and missing_caption is "refuse"."""
    if missing_caption != "refuse":
        return
    rows = np.flatnonzero(index.usable & rows_without_caption(index.text))
    if len(rows):
        paths = ", ".join(f"{row} ({index.file_path[int(row)].as_py()!r})" for row in rows[:5])
        named = f"{plural(len(rows), 'row')} {paths}{', ...' if len(rows) > 5 else ''}"
        what = f"{len(rows)} {plural(len(rows), 'row has', 'rows have')} no caption: {named}"
        hint = "add their captions, or remove --missing_caption refuse to train them with the empty one"
        raise UserError("--missing_caption refuse", what, hint, DATA)


def caption_lines(index: Index, rules: CaptionRules, max_rows: int = 10) -> list[str]:
    """Return a line each on rows without a caption, rows with several, and captions whose placeholders stay."""
    bare = np.flatnonzero(index.usable & rows_without_caption(index.text))
    counts = caption_counts(index.text)
    several = np.flatnonzero(index.usable & (counts > 1))
    lines = []
    if len(bare):
        texts = pc.unique(
            index.text.take(pa.array(bare))
        ).to_pylist()  # they differ by prefixes of their sources alone
        trained = sorted({draw_caption(unpack_captions(text), rules, 0).strip() for text in texts})
        named = ["an empty caption" if not caption else f"the caption {caption!r}" for caption in trained[:3]]
        how = " or ".join([*named, "others"] if len(trained) > 3 else named)
        rows = plural(len(bare), "row has no caption and is", "rows have no caption and are")
        lines.append(f"{len(bare)} {rows} trained with {how}: {plural(len(bare), 'row')} {_listed(bare, max_rows)}")
    if len(several):
        lines.append(
            f"{len(several)} {plural(len(several), 'row has', 'rows have')} several captions (up to {counts[several].max()}): "
            "each sample of an epoch draws one"
        )
    left = np.flatnonzero(index.usable & rows_with_placeholder(index.text))
    if len(left) and not rules.trigger_word:
        lines.append(
            f"warning: {TRIGGER} in the captions of {len(left)} {plural(len(left), 'row')} is trained as it is, because "
            f"there is no --trigger_word: {plural(len(left), 'row')} {_listed(left, max_rows)}"
        )
    return [*lines, *_placeholder_lines(index, rules.prefix, max_rows)]


def _placeholder_lines(index: Index, prefix: str, max_rows: int) -> list[str]:
    """Return warnings on placeholders in captions and prefix that the trigger word does not replace."""
    rows, spellings = other_placeholders(index.text)
    rows = rows[index.usable[rows]]
    _, in_prefix = other_placeholders(pa.array([prefix], pa.large_string()))
    found = [("--caption_prefix has", in_prefix, "")] if in_prefix else []
    if len(rows):
        named = plural(len(rows), "row")
        found.append((f"the captions of {len(rows)} {named} have", spellings, f": {named} {_listed(rows, max_rows)}"))
    return [
        f"warning: {place} {', '.join(names)}, but only {TRIGGER} is replaced by the trigger word{listed}"
        for place, names, listed in found
    ]


def _listed(rows: np.ndarray, max_rows: int) -> str:
    return ", ".join(map(str, rows[:max_rows])) + (", ..." if len(rows) > max_rows else "")


def unreadable_lines(index: Index, before: PlanColumns, now: PlanColumns) -> list[str]:
    """Return lines on rows that the run began with and can no longer be read, and on those it began without."""
    unreadable = np.flatnonzero(before.usable & ~now.usable)
    listed = ", ".join(f"{row} ({index.file_path[int(row)].as_py()!r})" for row in unreadable[:5])
    rows = plural(len(unreadable), "row can no longer be read and gets", "rows can no longer be read and get")
    lines = [f"{len(unreadable)} {rows} weight 0: {listed}"] if len(unreadable) else []
    if len(appeared := np.flatnonzero(now.usable & ~before.usable)):
        lines.append(
            f"{len(appeared)} {plural(len(appeared), 'row without a caption stays', 'rows without a caption stay')} left out, "
            f"as when the run began: {plural(len(appeared), 'row')} {_listed(appeared, 10)}"
        )
    return lines


def refused_rows(index: Index, plan: EpochPlan) -> list[dict[str, object]]:
    """Return row, path, class and detail of every row that cannot be trained."""
    problems = {row: (kind, detail) for row, _, kind, detail in index.problems()}
    rows = np.flatnonzero(~np.isin(plan.fates, (Fate.TRAINED, Fate.HELD_OUT, Fate.NOT_DRAWN))).tolist()
    records = []
    for row in rows:
        fate = Fate(int(plan.fates[row]))
        kind, detail = problems.get(row, (fate.name.lower(), UNFIT.get(fate, "").format(grid=plan.ratios.grid)))
        records.append({"row": row, "path": index.file_path[row].as_py(), "class": kind, "detail": detail})
    return records


def bucket_lines(plan: EpochPlan, max_rows: int = 20) -> list[str]:
    """Return the table of this epoch's buckets, most tokens first."""
    table = plan.bucket_table()
    total = sum(plan.tokens_of(bucket) * samples for bucket, samples, _ in table)
    steps = f"{plan.n_steps} {plural(plan.n_steps, 'step')} of {plan.slots} {plural(plan.slots, 'slot')}"
    lines = [f"epoch {plan.epoch}: {steps}, {len(table)} {plural(len(table), 'bucket')}, {total:,} tokens"]
    lines.append(f"  {'frames x height x width':>24} {'tokens':>8} {'samples':>8} {'batches':>8} {'token share':>11}")
    rows: Sequence[tuple[str, int, int, int]] = [
        (f"{b.frames} x {b.height} x {b.width}", plan.tokens_of(b), samples, batches) for b, samples, batches in table
    ]
    if len(rows) > max_rows:
        others = table[max_rows - 1 :]
        tokens = sum(plan.tokens_of(bucket) * samples for bucket, samples, _ in others)
        samples, batches = sum(line[1] for line in others), sum(line[2] for line in others)
        rows = [*rows[: max_rows - 1], (f"{len(others)} smaller buckets", tokens // max(samples, 1), samples, batches)]
    for name, tokens, samples, batches in rows:
        lines.append(f"  {name:>24} {tokens:>8,} {samples:>8,} {batches:>8,} {tokens * samples / total:>11.1%}")
    return lines


def typical_fps(index: Index, model_fps: float) -> float:
    """Return the median frame rate of the videos whose files contain it, or the model's own where none does."""
    known = index.fps[index.usable & (index.kind == 1) & (index.fps > 0)]
    return float(np.median(known)) if len(known) else model_fps
