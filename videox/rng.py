"""Serves every random draw: numbers that are functions of (seed, epoch, sample, purpose), never of a stream.

A worker, a rank or a bad file can shift a stream; it cannot shift a key. The mix is the finaliser of splitmix64
(Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), folded over the parts.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

UINT = np.uint64
_GOLDEN = UINT(0x9E3779B97F4A7C15)


class Purpose(IntEnum):
    """What a draw is for; two purposes never share a number. Values are part of the checkpoint contract: only add."""

    SAMPLE = 1
    SIZE = 2
    RATIO = 3
    FRAMES = 4
    START = 5
    ORDER = 6
    MICRO_BATCH = 7
    STEP = 8
    STRATUM = 9
    TIMESTEP = 10
    TIMESTEP_SECOND = 11
    CAPTION_DROPOUT = 12
    POSTERIOR = 13
    NOISE = 14
    HELD_OUT = 15
    VALIDATION = 16
    MODEL = 17
    MASK_FAMILY = 18
    MASK_FRAME = 19
    MASK_SHARE = 20
    MASK_BOX = 21
    CONDITION_DROP = 22
    REPEAT = 23
    ADAPTER = 24
    DROPOUT = 25
    ROUNDING = 26


def _finalise(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> UINT(30))) * UINT(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> UINT(27))) * UINT(0x94D049BB133111EB)
    return z ^ (z >> UINT(31))


def hash_key(*parts: int | np.ndarray) -> np.ndarray:
    """Returns uint64 keys: one well-mixed number for each combination of the broadcast integer parts.

    The order of the parts matters. Works on whole columns; no generator object is made.
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        key = np.zeros((), UINT)
        for part in parts:
            column = np.asarray(part)
            words = column.astype(UINT) if column.dtype != object else np.asarray(int(part) & (2**64 - 1), UINT)
            key = _finalise(key * UINT(0xD1342543DE82EF95) + words + _GOLDEN)
        return key


def uniform(*parts: int | np.ndarray) -> np.ndarray:
    """Returns float64 draws in the open interval (0, 1), one for each combination of the broadcast integer parts."""
    # 52 bits and a half are 53 bits, which float64 holds exactly: with one bit more the largest draw would round to 1
    return ((hash_key(*parts) >> UINT(12)).astype(np.float64) + 0.5) * 2.0**-52
