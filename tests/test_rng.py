"""Tests of videox.rng: fixed values, because checkpoints depend on them, and the statistics of the draws."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from videox.rng import Purpose, hash_key, uniform

WORDS = st.integers(0, 2**64 - 1)
# Checkpoints depend on these draws: a resumed run must draw the same numbers as the first one.
GOLDEN = {
    (): 0,
    (0,): 0xE220A8397B1DCDAF,
    (1,): 0x910A2DEC89025CC1,
    (42, 0, 7, 0, 1): 0x91BCF1C58832DE05,
    (2**64 - 1, 2**63): 0x824CA0DAA5896061,
}


@pytest.mark.parametrize(("parts", "key"), GOLDEN.items())
def test_keys_never_change(parts: tuple[int, ...], key: int) -> None:
    assert int(hash_key(*parts)) == key


def test_draws_never_change() -> None:
    assert uniform(42, np.arange(3), Purpose.NOISE).tolist() == [
        0.7621466500460027,
        0.4284385025670582,
        0.740765182659964,
    ]


def test_purposes_never_change() -> None:
    values = {purpose.name: purpose.value for purpose in Purpose}
    assert len(set(values.values())) == len(values)
    first = ["SAMPLE", "SIZE", "RATIO", "FRAMES", "START", "ORDER", "MICRO_BATCH", "STEP", "STRATUM", "TIMESTEP"]
    first += ["TIMESTEP_SECOND", "CAPTION_DROPOUT", "POSTERIOR", "NOISE", "HELD_OUT", "VALIDATION", "MODEL"]
    assert [values[name] for name in first] == list(range(1, 18))


def by_hand(*parts: int) -> int:
    """Return the hash computed with Python integers."""
    mask, key = 2**64 - 1, 0
    for part in parts:
        z = (key * 0xD1342543DE82EF95 + part + 0x9E3779B97F4A7C15) & mask
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        key = z ^ (z >> 31)
    return key


@given(st.lists(WORDS, max_size=6))
def test_keys_equal_integer_arithmetic(parts: list[int]) -> None:
    assert int(hash_key(*parts)) == by_hand(*parts)


@given(st.integers(-(2**63), -1))
def test_negative_numbers_are_taken_modulo_two_to_the_64(part: int) -> None:
    assert int(hash_key(part)) == int(hash_key(np.array([part]))[0]) == by_hand(part % 2**64)


@given(st.lists(WORDS, min_size=1, max_size=20), WORDS)
def test_columns_and_scalars_agree(column: list[int], scalar: int) -> None:
    together = hash_key(scalar, np.array(column, np.uint64), 3)
    assert together.dtype == np.uint64
    assert together.tolist() == [int(hash_key(scalar, part, 3)) for part in column]


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8, np.uint64])
def test_the_type_of_a_column_does_not_matter(dtype: type) -> None:
    column = np.arange(100, dtype=dtype)
    assert hash_key(5, column).tolist() == [by_hand(5, i) for i in range(100)]


def test_parts_broadcast() -> None:
    grid = hash_key(np.arange(3)[:, None], np.arange(4))
    assert grid.shape == (3, 4)
    assert int(grid[2, 1]) == by_hand(2, 1)


@given(WORDS, WORDS)
def test_order_matters(a: int, b: int) -> None:
    assert (int(hash_key(a, b)) == int(hash_key(b, a))) == (a == b)


@given(WORDS)
def test_number_of_parts_matters(a: int) -> None:
    assert len({int(hash_key(a)), int(hash_key(a, 0)), int(hash_key(0, a)), int(hash_key(a, 0, 0))}) == 4 - (a == 0)


@pytest.mark.parametrize("part", [0, 2**63 - 1, 2**63, 2**64 - 1, np.uint64(2**64 - 1), -1])
def test_no_warning_at_any_size(part: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hash_key(part, part, np.full(3, part))
        uniform(part, np.full(3, part))


def part_for_key(key: int) -> int:
    """Return the one part whose key is `key`: the hash of a single part is invertible."""
    mask = 2**64 - 1

    def undo_shift(z: int, bits: int) -> int:
        found = z
        for _ in range(64 // bits + 1):
            found = z ^ (found >> bits)
        return found

    z = undo_shift(key, 31) * pow(0x94D049BB133111EB, -1, 2**64) & mask
    z = undo_shift(z, 27) * pow(0xBF58476D1CE4E5B9, -1, 2**64) & mask
    return (undo_shift(z, 30) - 0x9E3779B97F4A7C15) & mask


@pytest.mark.parametrize("key", [0, 1, 2**11 - 1, 2**12, 2**63, 2**64 - 2**12, 2**64 - 1])
def test_draws_are_strictly_between_zero_and_one(key: int) -> None:
    part = part_for_key(key)
    assert int(hash_key(part)) == key
    assert 0 < float(uniform(part)) < 1
    assert abs(float(uniform(part)) - key / 2**64) < 2**-51


def chi_square(counts: np.ndarray) -> float:
    """Return how many standard deviations the chi-square statistic of equal shares is above its mean."""
    expected = counts.sum() / len(counts)
    freedom = len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("purpose", Purpose)
def test_draws_are_uniform(purpose: Purpose) -> None:
    draws = uniform(42, 0, np.arange(100_000), 0, purpose)
    assert abs(chi_square(np.bincount((draws * 256).astype(int), minlength=256))) < 5
    ordered = np.sort(draws)
    ideal = (np.arange(100_000) + 0.5) / 100_000
    assert np.abs(ordered - ideal).max() * math.sqrt(100_000) < 2.2  # Kolmogorov: less than one in 8,000


def test_low_bits_are_uniform_too() -> None:
    keys = hash_key(np.arange(100_000), Purpose.NOISE)
    assert abs(chi_square(np.bincount((keys & np.uint64(255)).astype(int), minlength=256))) < 5


def test_purposes_are_independent() -> None:
    keys = hash_key(42, 0, np.arange(50_000), 0, Purpose.SAMPLE)
    draws = np.stack([uniform(keys, purpose) for purpose in Purpose])
    correlation = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(correlation).max() < 5 / math.sqrt(50_000)


def test_neighbours_are_independent() -> None:
    for parts in [(np.arange(50_001), 0), (0, np.arange(50_001)), (7, np.arange(50_001), Purpose.SIZE)]:
        draws = uniform(*parts)
        assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 5 / math.sqrt(50_000)


def test_a_million_keys_are_distinct() -> None:
    keys = hash_key(42, np.arange(100)[:, None], np.arange(10_000), Purpose.SAMPLE)
    assert len(np.unique(keys)) == keys.size


@given(WORDS, st.integers(0, 63))
def test_a_changed_bit_changes_about_half_of_the_key(part: int, bit: int) -> None:
    changed = int(hash_key(part)) ^ int(hash_key(part ^ (1 << bit)))
    assert 8 <= changed.bit_count() <= 56
