"""Which rows the validations of a run measure: held-out rows, or those of --validation_meta, and training rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from videox.data.index.index import Index
from videox.data.plan.buckets import Fate
from videox.data.plan.epoch import EpochPlan
from videox.data.plan.plan import compared_plan, held_out_plan, list_plan, row_fates
from videox.data.plan.settings import PlanColumns, PlanSettings, columns_of
from videox.errors import DATA, UserError, plural
from videox.training.schedule import Schedule

HELD_OUT_SET, TRAINING_SET = "held_out", "training"


@dataclass(frozen=True)
class RowSet:
    """Rows that validations measure.

    Attributes:
        name: HELD_OUT_SET or TRAINING_SET.
        index: that has the rows.
        plan: one row per step; None without any row.
    """

    name: str
    index: Index
    plan: EpochPlan | None


def row_sets(schedule: Schedule) -> tuple[RowSet, RowSet]:
    """Return the held-out rows, and the training rows that are measured beside them, about as many.

    Raises:
        UserError: (DATA) no row of --validation_meta can be measured.
    """
    columns, settings, listed = schedule.columns, schedule.settings, schedule.validation
    if listed is None:
        held_out = RowSet(HELD_OUT_SET, schedule.index, held_out_plan(columns, settings))
        return held_out, RowSet(TRAINING_SET, schedule.index, compared_plan(columns, settings))
    plan = list_plan(_columns(listed, settings), settings)
    if plan is None:
        what = (
            f"none of its {len(listed)} {plural(len(listed), 'row')} can be measured ({_left_out(listed, settings)})"
        )
        hint = "name clips that the training could use, of at least --video_sample_n_frames frames"
        raise UserError("--validation_meta", what, hint, DATA)
    beside = compared_plan(columns, settings, len(np.unique(plan.row)))
    return RowSet(HELD_OUT_SET, listed, plan), RowSet(TRAINING_SET, schedule.index, beside)


def list_notes(schedule: Schedule) -> list[str]:
    """Lines on --validation_meta: its rows that are not measured, and a warning if files of it are trained as well."""
    listed, settings = schedule.validation, schedule.settings
    plan = row_sets(schedule)[0].plan
    if listed is None or plan is None:
        return []
    rows, lines = np.unique(plan.row).tolist(), []
    if len(rows) < len(listed):
        left_out = (
            f"{len(listed) - len(rows)} of its {len(listed)} rows {plural(len(listed) - len(rows), 'is', 'are')} not measured "
            f"({_left_out(listed, settings)})"
        )
        lines.append(f"--validation_meta: {left_out}")
    # Only files of the same name are looked up on the disk: the training data may have a million rows.
    names, paths = {listed.file(row).name for row in rows}, schedule.index.file_path.to_pylist()
    files = {(schedule.index.data_dir / path).resolve() for path in paths if path.rpartition("/")[2] in names}
    both = [str(listed.file_path[row].as_py()) for row in rows if listed.file(row).resolve() in files]
    if both:
        lines.append(
            f"warning: {len(both)} of the {len(rows)} rows of --validation_meta {plural(len(both), 'is', 'are')} in the "
            "training data as well "
            f"({', '.join(both[:5])}): their loss does not show overfitting"
        )
    return lines


def _columns(listed: Index, settings: PlanSettings) -> PlanColumns:
    return columns_of(listed, by_second=settings.policy.sample_fps > 0)


def _left_out(listed: Index, settings: PlanSettings) -> str:
    """Return how many rows of a list are not measured, by fate."""
    everything = replace(settings, held_out=0, held_out_share=0.0)
    fates = row_fates(_columns(listed, settings), everything, np.zeros(0, np.int64))
    return ", ".join(
        f"{(fates == fate).sum()} {fate.name.lower()}"
        for fate in Fate
        if fate != Fate.TRAINED and (fates == fate).any()
    )
