"""Which rows are held out for validation, and which trained rows are measured beside them. Imports no torch."""

from __future__ import annotations

import numpy as np

from videox.data.plan.settings import PlanColumns
from videox.rng import Purpose, hash_key

# random: any rows, as runs of older versions chose them; stratified: captioned clips first, spread over shapes and
# lengths
CHOICES = RANDOM, STRATIFIED = ("random", "stratified")
TALL, WIDE = 0.8, 1.25  # width / height below and above which a row counts as tall or wide


def choose_rows(
    columns: PlanColumns, rows: np.ndarray, count: int, seed: int, *, choice: str, beside: bool = False
) -> np.ndarray:
    """Return `count` of the rows (all, if there are fewer), int64 ascending: a pure function of its arguments.

    STRATIFIED takes captioned clips, then captioned images, then clips and images without a caption. It leaves half of
    each of these groups to the training before it goes on with the next one, and takes that half only if all four are
    not enough. Within a group the rows are sorted by shape (tall, square, wide) and length and divided into as many
    equal parts as rows are wanted; each part gives one row.

    Args:
        columns: of the index.
        rows: candidates, int64 ascending.
        count: how many to choose.
        seed: of the run.
        choice: one of CHOICES.
        beside: the trained rows that are measured beside the held-out ones, whose draws are independent of those.
    """
    key = hash_key(seed, Purpose.HELD_OUT, rows, 1) if beside else hash_key(seed, Purpose.HELD_OUT, rows)
    if choice == RANDOM:
        return np.sort(rows[np.argsort(key, kind="stable")[:count]])
    captionless = np.zeros(len(rows), bool) if columns.captionless is None else columns.captionless[rows]
    group = 2 * captionless.astype(np.int64) + (columns.kind[rows] != 1)
    members = [np.flatnonzero(group == number) for number in range(4)]
    taken, left = [0] * 4, count
    for share in (2, 1):  # half of each group, then the rest
        for number, places in enumerate(members):
            more = min(left, len(places) // share - taken[number])
            taken[number], left = taken[number] + more, left - more
    chosen = [_spread(columns, rows[places], key[places], n) for places, n in zip(members, taken, strict=True)]
    return np.sort(np.concatenate(chosen))


def _spread(columns: PlanColumns, rows: np.ndarray, key: np.ndarray, count: int) -> np.ndarray:
    """Return `count` rows, one of each of `count` equal parts of the rows sorted by shape and length."""
    if not count:
        return rows[:0]
    ratio = columns.width[rows] / np.maximum(columns.height[rows], 1)
    shape = (ratio >= TALL).astype(np.int64) + (ratio > WIDE)
    order = np.lexsort((key, columns.frames[rows], shape))
    part = np.arange(len(rows)) * count // len(rows)
    by_key = np.lexsort((key[order], part))  # each part is a range of places, in the order of the keys
    first = np.flatnonzero(np.diff(part, prepend=-1))
    return rows[order[by_key[first]]]
