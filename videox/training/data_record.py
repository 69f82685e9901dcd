"""data_report.json: what the rows of the metadata became in a run, for report.html and other tools."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from videox.data.index.captions import draw_caption
from videox.data.index.index import Index
from videox.data.plan.buckets import Fate, crop_share, frame_offsets, pace_of
from videox.data.plan.epoch import EpochPlan
from videox.data.plan.plan import held_out_plan
from videox.estimate.data_report import MUCH_CROPPED
from videox.files import write_json_atomically
from videox.shapes import Bucket
from videox.tracking.report.collect import DATA_REPORT
from videox.training.measured_rows import row_sets
from videox.training.schedule import Schedule

SHOWN_CLIPS, SHOWN_ROWS = 600, 500  # clips with pictures on the page, and rows of a list; all are counted
MOST_CAPTION = 1000  # characters


def write_data_report(output_dir: Path, schedule: Schedule) -> None:
    """Write data_report.json on the plan that this launch begins with, replaced atomically. Raises OSError."""
    write_json_atomically(output_dir / DATA_REPORT, data_report(schedule))


def data_report(schedule: Schedule) -> dict[str, Any]:
    """Return what the rows became: counts by fate, buckets, cropping, held-out rows, and clips as the model gets them.

    Paths are relative to `data_dir`. `clips` has at most SHOWN_CLIPS rows, evenly spaced over those that are trained
    or held out; `clips_total` counts all.
    """
    plan, held_out = schedule.plan_of_columns(), held_out_plan(schedule.columns, schedule.settings)
    cropped = _cropped(schedule, plan)
    much = np.flatnonzero(cropped > MUCH_CROPPED)
    worst = much[np.argsort(-cropped[much], kind="stable")][:SHOWN_ROWS]
    index, rows = schedule.index, np.flatnonzero(plan.fates == Fate.HELD_OUT)
    if schedule.validation is not None and (listed := row_sets(schedule)[0].plan):
        index, rows = schedule.validation, np.unique(listed.row)
    lost = cropped[np.isfinite(cropped)]
    return {
        "epoch": plan.epoch,
        "data_dir": str(schedule.index.data_dir.absolute()),
        "rows": len(plan.fates),
        "fates": {name: count for name, count in plan.fate_counts().items() if count},
        "steps": plan.n_steps,
        "slots": plan.slots,
        "buckets": [
            {**bucket._asdict(), "tokens": plan.tokens_of(bucket), "samples": samples, "batches": batches}
            for bucket, samples, batches in plan.bucket_table()
        ],
        "cropped": {
            "median": round(float(np.median(lost)), 4), "p95": round(float(np.quantile(lost, 0.95)), 4),
            "max": round(float(lost.max()), 4),
        },
        "cropped_rows": [{**_named(schedule, row), "cropped": round(float(cropped[row]), 4)} for row in worst.tolist()],
        "cropped_rows_total": len(much),
        "held_out": [
            {"row": row, "path": index.file_path[row].as_py(), "caption": _caption(schedule, index, row, 0)}
            for row in rows[:SHOWN_ROWS].tolist()
        ],
        "held_out_total": len(rows),
        **_clips(schedule, [plan, *([held_out] if held_out else [])], plan.fates),
    }  # fmt: skip


def _named(schedule: Schedule, row: int) -> dict[str, Any]:
    return {"row": row, "path": schedule.index.file_path[row].as_py()}


def _caption(schedule: Schedule, index: Index, row: int, key: int) -> str:
    caption = draw_caption(index.captions(row), schedule.settings.caption_rules, key)
    return caption[:MOST_CAPTION]


def _cropped(schedule: Schedule, plan: EpochPlan) -> np.ndarray:
    """Return the largest share of its area that each row loses, float64 [rows]; NaN for rows that are not trained."""
    bucket = np.repeat(plan.micro_bucket, np.diff(plan.micro_first))
    heights, widths = (np.array([getattr(b, side) for b in plan.buckets])[bucket] for side in ("height", "width"))
    columns = schedule.columns
    shares = crop_share(columns.height[plan.row], columns.width[plan.row], heights, widths)
    result = np.full(len(plan.fates), np.nan)
    np.fmax.at(result, plan.row, shares)
    return result


def _clips(schedule: Schedule, plans: Sequence[EpochPlan], fates: np.ndarray) -> dict[str, Any]:
    """Return `clips`, evenly spaced rows of each plan, and `clips_total`; fates: of all rows."""
    found: dict[int, dict[str, Any]] = {}
    drawn = [np.unique(plan.row, return_index=True) for plan in plans]
    total = sum(len(rows) for rows, _ in drawn)
    for plan, (rows, first) in zip(plans, drawn, strict=True):
        share = max(1, SHOWN_CLIPS * len(rows) // total)
        places = np.unique(np.linspace(0, len(rows) - 1, min(share, len(rows))).round().astype(int))
        bucket = np.repeat(plan.micro_bucket, np.diff(plan.micro_first))
        for place in places.tolist():
            sample = int(first[place])
            clip = _clip(schedule, plan, sample, plan.buckets[int(bucket[sample])])
            found[clip["row"]] = {**clip, "fate": Fate(int(fates[clip["row"]])).name.lower()}
    return {"clips": [found[row] for row in sorted(found)], "clips_total": total}


def _clip(schedule: Schedule, plan: EpochPlan, sample: int, bucket: Bucket) -> dict[str, Any]:
    """Return a sample of a plan with the source frames that are the first, middle and last of it."""
    row, index, policy = int(plan.row[sample]), schedule.index, schedule.settings.policy
    pace = float(np.ravel(pace_of(policy, index.fps[[row]]))[0])
    frames = sorted({0, bucket.frames // 2, bucket.frames - 1})
    indices = (int(plan.start[sample]) + frame_offsets(np.array(frames), pace)).tolist()
    share = crop_share(index.height[[row]], index.width[[row]], np.array(bucket.height), np.array(bucket.width))
    return {
        **_named(schedule, row),
        "caption": _caption(schedule, index, row, int(plan.key[sample])),
        "kind": "image" if index.kind[row] == 0 else "video",
        "bucket": list(bucket),
        "indices": indices,
        "stamp": [int(index.file_size[row]), int(index.mtime_ns[row])],
        "cropped": round(float(share[0]), 4),
    }
