"""A data set that is only described, such as "200x5s@24fps:1280x720", to plan with before there is data."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from videox.data.index.index import Index, MediaColumns
from videox.data.index.table import IMAGE, VIDEO
from videox.errors import UserError

FLAG = "--dry_run_data"
HINT = "write COUNTxSECONDSs@FPSfps:WIDTHxHEIGHT for clips, such as 200x5s@24fps:1280x720, or COUNT:WIDTHxHEIGHT for images"
MAX_ROWS = 10_000_000
_CLIPS = re.compile(r"(\d+)x(\d+(?:\.\d+)?)s@(\d+(?:\.\d+)?)fps:(\d+)x(\d+)")
_IMAGES = re.compile(r"(\d+):(\d+)x(\d+)")


def describe_data(texts: Sequence[str]) -> Index:
    """Return the index of a described data set.

    Args:
        texts: each describes clips or images of one size: `200x5s@24fps:1280x720` or `500:1024x1024`.

    Raises:
        UserError: a text describes no data.
    """
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("kind", "width", "height", "frames", "fps")}
    for text in texts:
        kind, count, frames, fps, width, height = _parse(text)
        values = {"kind": kind, "width": width, "height": height, "frames": frames, "fps": fps}
        for name, value in values.items():
            columns[name].append(np.full(count, value))
    return Index.from_columns(MediaColumns(**{name: np.concatenate(parts) for name, parts in columns.items()}))


def _parse(text: str) -> tuple[int, int, int, float, int, int]:
    """Return kind, rows, frames, fps, width and height."""
    if found := _CLIPS.fullmatch(text):
        count, width, height = (int(found[group]) for group in (1, 4, 5))
        fps = float(found[3])
        kind, frames = VIDEO, round(float(found[2]) * fps)
    elif found := _IMAGES.fullmatch(text):
        count, width, height = (int(found[group]) for group in (1, 2, 3))
        kind, frames, fps = IMAGE, 1, 0.0
    else:
        raise UserError(FLAG, f"{text} describes no data", HINT)
    if not 0 < count <= MAX_ROWS or min(frames, width, height) < 1 or max(frames, width, height) > 2**20:
        raise UserError(FLAG, f"{text} has a number out of range", HINT)
    return kind, count, frames, fps, width, height
