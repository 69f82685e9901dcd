"""Comparison of a run's rows with those that it began with: which were lost since, and which are other ones now."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from videox.data.media.container import DECODINGS
from videox.data.plan.settings import PlanColumns
from videox.errors import MODEL, UserError, plural


def lost_rows(then: PlanColumns, now: PlanColumns, may_appear: np.ndarray | None = None) -> np.ndarray | None:
    """Return the rows that were readable then and are not now, if nothing else has changed; otherwise None.

    Args:
        then: columns that the run began with.
        now: columns of this launch.
        may_appear: bool [rows], rows that may have become usable since then; None = no row.
    """
    both = then.usable & now.usable
    # A lost row's other columns are not known any more, so only rows that are readable in both are compared.
    pairs = [
        (getattr(then, name), getattr(now, name)) for name in ("kind", "width", "height", "frames", "fps", "weight")
    ]
    pairs.append((_decoding(then), _decoding(now)))
    same = [a is b if a is None or b is None else np.array_equal(a[both], b[both]) for a, b in pairs]
    appeared = now.usable & ~then.usable
    only_lost = all(same) and not np.any(appeared if may_appear is None else appeared & ~may_appear)
    return np.flatnonzero(then.usable & ~now.usable) if only_lost else None


def refuse_changed_rows(
    then: PlanColumns, now: PlanColumns, name_of: Callable[[int], str] = str, most: int = 5
) -> None:
    """Raise UserError if rows are other ones than when the run began, or if this version decodes them otherwise.

    Args:
        then: the columns that the run began with.
        now: the columns of this launch, with the same files and captions.
        name_of: returns how a message names a row.
        most: rows that are named.

    Raises:
        UserError: with the rows, their files, and what they were and are.
    """
    both = then.usable & now.usable
    decoding = _decoding(then) ^ _decoding(now)
    changed = now.usable & ~then.usable | both & (decoding != 0)
    for name in ("kind", "width", "height", "frames"):
        changed |= both & (getattr(then, name) != getattr(now, name))
    rows = np.flatnonzero(changed).tolist()
    if not rows:
        return

    def describe(row: int) -> str:
        if not then.usable[row]:
            return f"could not be read, is {_shape_of(now, row)}"
        before, after = _shape_of(then, row), _shape_of(now, row)
        kinds = " and ".join(what for bit, what in DECODINGS.items() if decoding[row] & bit)
        return f"was {before}, is {after}" if before != after else f"is decoded differently by this version: {kinds}"

    named = "; ".join(f"row {row} ({name_of(row)}) {describe(row)}" for row in rows[:most])
    more = f"; and {len(rows) - most} more" if len(rows) > most else ""
    hint = (
        "resume with the files and the version that it began with, add --accept_data_change=now to train the rows as "
        "they are now, or start a new run in another --output_dir from its weights (--transformer_path)"
    )
    what = f"{len(rows)} {plural(len(rows), 'row has', 'rows have')} changed since the run began: {named}{more}"
    raise UserError("--resume_from_checkpoint", what, hint, MODEL)


def _shape_of(columns: PlanColumns, row: int) -> str:
    size = f"{columns.width[row]}x{columns.height[row]}"
    return f"an image of {size}" if columns.kind[row] == 0 else f"a video of {columns.frames[row]} frames of {size}"


def _decoding(columns: PlanColumns) -> np.ndarray:
    """Return the decoding of every row; older checkpoints have none, their rows were decoded as 0 stands for."""
    return np.zeros(len(columns), np.uint32) if columns.decoding is None else columns.decoding
