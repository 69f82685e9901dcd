"""Counter-based random numbers: every draw is a function of (seed, epoch, sample, purpose), not of a stream.

The state of a stream depends on what was drawn before: another number of workers or ranks, or an unreadable file,
would change it. A key does not change. The hash is the finalizer of splitmix64 (Steele, Lea and Flood, "Fast
splittable pseudorandom number generators", OOPSLA 2014), folded over the parts.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

UINT = np.uint64
GOLDEN = UINT(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, the increment of splitmix64


class Purpose(IntEnum):
    """What a draw is for; no two purposes share a number. Checkpoints depend on the values: only add new ones."""

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
    CAPTION = 27
    CAPTION_TAGS = 28
    TIMESTEP_BLOCK = 29
    FIRST_FRAME = 30


def _finalize(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> UINT(30))) * UINT(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> UINT(27))) * UINT(0x94D049BB133111EB)
    return z ^ (z >> UINT(31))


def hash_key(*parts: int | np.ndarray) -> np.ndarray:
    """Return uint64 keys: one well-mixed number for each combination of the broadcast integer parts.

    The order of the parts matters. Works on whole columns; no generator object is created.
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is intended
        key = np.zeros((), UINT)
        for part in parts:
            column = np.asarray(part)
            words = column.astype(UINT) if column.dtype != object else np.asarray(int(part) & (2**64 - 1), UINT)
            key = _finalize(key * UINT(0xD1342543DE82EF95) + words + GOLDEN)
        return key


def uniform(*parts: int | np.ndarray) -> np.ndarray:
    """Return float64 draws in the open interval (0, 1), one for each combination of the broadcast integer parts."""
    return to_unit_interval(hash_key(*parts))


def to_unit_interval(numbers: np.ndarray) -> np.ndarray:
    """Return uint64 numbers divided by 2^64, rounded to float64 in the open interval (0, 1)."""
    # 52 random bits plus one half are 53 bits, exact in float64: with one more bit the largest draw would round to 1
    return ((numbers >> UINT(12)).astype(np.float64) + 0.5) * 2.0**-52
