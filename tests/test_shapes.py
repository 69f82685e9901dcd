"""Tests of videox.shapes: frames, latents and tokens against published examples and exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from videox.shapes import (
    GRID,
    Bucket,
    frames_that_fit,
    latent_shape,
    snap_frames,
    token_count,
    token_limited_frames,
)

SIZES = st.integers(32, 8192)
FRAMES = st.integers(0, 500).map(lambda k: 4 * k + 1)


@given(st.integers(1, 10_000))
def test_snapped_frames_are_the_largest_4k_plus_1(frames: int) -> None:
    snapped = snap_frames(frames)
    assert snapped % 4 == 1
    assert snapped <= frames < snapped + 4


@given(st.integers(-100, 0))
def test_snapped_frames_are_at_least_one(frames: int) -> None:
    assert snap_frames(frames) == 1


@given(st.integers(0, 400), st.integers(1, 50))
@example(162, 2)  # 81 frames, where length // stride counts 81 as well
@example(161, 2)  # 81 frames, where length // stride counts 80
def test_frames_that_fit_equal_the_length_of_a_slice(length: int, stride: int) -> None:
    assert frames_that_fit(length, stride) == len(range(length)[::stride])


@pytest.mark.parametrize(
    ("length", "stride", "kept"), [(41, 1, 41), (41, 2, 21), (42, 2, 21), (243, 3, 81), (0, 3, 0)]
)
def test_frames_that_fit_by_hand(length: int, stride: int, kept: int) -> None:
    assert frames_that_fit(length, stride) == kept


@given(FRAMES, SIZES, SIZES)
@example(81, 512, 576)  # 81 * 512^2 / 576^2 = 64 exactly: 61 frames
@example(49, 512, 896)
def test_token_limited_frames_equal_exact_fractions(n_frames: int, token_sample_size: int, size: int) -> None:
    budget = Fraction(n_frames * token_sample_size**2, size**2)
    wanted = 4 * math.floor((min(budget, Fraction(n_frames)) - 1) / 4) + 1
    assert token_limited_frames(n_frames, token_sample_size, size) == max(wanted, 1)


@given(FRAMES, SIZES, SIZES)
def test_token_limited_frames_fill_the_budget_and_no_more(n_frames: int, token_sample_size: int, size: int) -> None:
    frames, budget = token_limited_frames(n_frames, token_sample_size, size), n_frames * token_sample_size**2
    assert frames % 4 == 1
    assert 1 <= frames <= n_frames
    assert frames * size**2 <= budget or frames == 1
    assert frames == n_frames or (frames + 4) * size**2 > budget  # four more would not fit


@given(FRAMES, SIZES, SIZES, SIZES)
def test_larger_sizes_never_have_more_frames(n_frames: int, token_sample_size: int, one: int, other: int) -> None:
    small, large = sorted((one, other))
    assert token_limited_frames(n_frames, token_sample_size, small) >= token_limited_frames(
        n_frames, token_sample_size, large
    )


@given(st.integers(0, 60), st.integers(1, 128), st.integers(1, 128))
def test_tokens_are_latent_patches(k: int, rows: int, columns: int) -> None:
    bucket = Bucket(4 * k + 1, GRID * rows, GRID * columns)
    assert latent_shape(bucket) == (k + 1, 2 * rows, 2 * columns)
    assert token_count(bucket) == (k + 1) * rows * columns


def test_tokens_of_the_published_clip() -> None:
    assert token_count(Bucket(49, 512, 512)) == 13_312 == 32 * 32 * 13
    assert token_count(Bucket(21, 768, 768)) == 13_824  # above the nominal clip, because of the first frame
    assert latent_shape(Bucket(81, 480, 832)) == (21, 60, 104)
