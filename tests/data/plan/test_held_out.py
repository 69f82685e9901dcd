"""Tests of videox.data.plan.held_out: which rows are held out, and which trained rows are measured beside them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import SETTINGS, random_columns

from videox.data.plan.buckets import Fate
from videox.data.plan.held_out import RANDOM, STRATIFIED, choose_rows
from videox.data.plan.plan import (
    compared_plan,
    compared_rows,
    held_out_plan,
    held_out_rows,
    list_plan,
    plan_epoch,
)
from videox.data.plan.settings import PlanColumns

STRATIFYING = replace(SETTINGS, held_out_choice=STRATIFIED)


def clips(frames: list[int], sizes: list[tuple[int, int]], captionless: list[int] = [], images: list[int] = []):  # noqa: B006
    """Return columns of clips: sizes are (width, height); the rows in the lists are captionless, or images."""
    count = len(frames)
    kind = np.ones(count, np.uint8)
    kind[images] = 0
    without = np.zeros(count, bool)
    without[captionless] = True
    width, height = (np.array(side, np.int32) for side in zip(*sizes, strict=True))
    shapes = kind, width, height, np.array(frames, np.int32), np.ones(count, bool)
    return PlanColumns(*shapes, captionless=without if captionless else None)


def test_the_choice_of_older_runs_is_unchanged() -> None:
    columns = clips([49] * 40, [(640, 480)] * 40, captionless=[3], images=[5])
    assert held_out_rows(columns, replace(SETTINGS, held_out=4)).tolist() == [10, 14, 28, 31]
    assert SETTINGS.held_out_choice == RANDOM


def test_captioned_clips_are_chosen_before_all_others() -> None:
    count = 20
    columns = clips([49] * count, [(640, 480)] * count, captionless=[0, 1, 2, 3], images=[2, 3, 4, 5, 6, 7])
    for held_out in (1, 3, 6):  # 12 captioned clips: half of them are left to the training
        chosen = held_out_rows(columns, replace(STRATIFYING, held_out=held_out))
        assert len(chosen) == held_out and chosen.min() >= 8
    chosen = held_out_rows(columns, replace(STRATIFYING, held_out=8))
    assert np.count_nonzero(chosen >= 8) == 6 and set(chosen[:2]) <= {4, 5, 6, 7}
    assert held_out_rows(columns, replace(STRATIFYING, held_out=count)).tolist() == [*range(count)]


def test_shapes_and_lengths_are_represented() -> None:
    rng = np.random.default_rng(0)
    sizes = [((640, 360), (512, 512), (360, 640))[i % 3] for i in range(90)]
    lengths = rng.permutation(90) + 49
    columns = clips(lengths.tolist(), sizes)
    rows = np.arange(90)
    for seed in range(20):
        chosen = choose_rows(columns, rows, 9, seed, choice=STRATIFIED)
        for shape in range(3):  # of each shape a short, a middle and a long one
            own = [row for row in chosen if row % 3 == shape]
            ranks = np.argsort(np.argsort(lengths[shape::3]))[[row // 3 for row in own]]
            assert sorted(ranks // 10) == [0, 1, 2]
    chosen = {tuple(choose_rows(columns, rows, 9, seed, choice=STRATIFIED).tolist()) for seed in range(20)}
    assert len(chosen) == 20  # another seed chooses other rows


@settings(max_examples=30)
@given(random_columns, st.integers(1, 12), st.integers(0, 9))
def test_each_choice_is_a_set_of_trainable_rows(columns: PlanColumns, count: int, seed: int) -> None:
    trainable = np.flatnonzero(plan_epoch(columns, replace(SETTINGS, held_out=0), 0).fates == Fate.TRAINED)
    stratifying = replace(STRATIFYING, held_out=count, seed=seed)
    kept, beside = held_out_rows(columns, stratifying), compared_rows(columns, stratifying)
    assert len(kept) == count and np.all(np.diff(kept) > 0) and set(kept) <= set(trainable)
    assert len(beside) == min(count, len(trainable) - count) and np.all(np.diff(beside) > 0)
    assert not set(kept) & set(beside) and set(beside) <= set(trainable)
    plan = plan_epoch(columns, stratifying, 0)
    assert set(beside) <= set(plan.row.tolist()) and not set(kept) & set(plan.row.tolist())


@settings(max_examples=15)
@given(random_columns, st.floats(0.001, 0.9))
def test_a_share_holds_out_that_share_of_the_trainable_rows(columns: PlanColumns, share: float) -> None:
    trainable = np.flatnonzero(plan_epoch(columns, SETTINGS, 0).fates == Fate.TRAINED)
    sharing = replace(STRATIFYING, held_out=0, held_out_share=share)
    kept = held_out_rows(columns, sharing)
    count = max(round(share * len(trainable)), 1)
    assert len(kept) == count and sharing.holds_out
    assert kept.tolist() == held_out_rows(columns, replace(STRATIFYING, held_out=count)).tolist()
    assert not set(kept) & set(plan_epoch(columns, sharing, 0).row.tolist())
    assert len(compared_rows(columns, sharing)) == min(count, len(trainable) - count)
    assert sorted(set(held_out_plan(columns, sharing).row.tolist())) == kept.tolist()


def test_a_list_of_its_own_is_measured_as_a_whole() -> None:
    listed = clips([49, 49, 300, 49], [(640, 480), (640, 8), (640, 480), (640, 480)])
    plan = list_plan(listed, replace(SETTINGS, batch_size=3, slots=4))
    assert sorted(set(plan.row.tolist())) == [0, 2, 3] and plan.n_steps == len(plan.row)  # row 1 is too small
    assert list_plan(clips([49], [(640, 8)]), SETTINGS) is None
    columns = clips([49] * 12, [(640, 480)] * 12)
    assert len(compared_rows(columns, SETTINGS, 3)) == 3  # nothing of the training data is held out


def test_compared_rows_are_trained_ones_with_a_plan_of_their_own() -> None:
    columns = clips([49] * 12, [(640, 480)] * 12)
    three = replace(STRATIFYING, held_out=3)
    kept, beside = held_out_plan(columns, three), compared_plan(columns, three)
    assert sorted(kept.row) == held_out_rows(columns, three).tolist()
    assert sorted(beside.row) == compared_rows(columns, three).tolist() and beside.n_steps == 3
    assert compared_plan(columns, SETTINGS) is None  # nothing is held out
    assert compared_plan(columns, replace(three, held_out=12)) is None  # nothing is left
    without = np.ones(12, np.float32)
    without[compared_rows(columns, three)] = 0  # these are never drawn
    again = compared_rows(replace(columns, weight=without), three)
    assert len(again) == 3 and not set(again) & set(beside.row.tolist())


@pytest.mark.parametrize("count", [0, 1, 7])
def test_no_rows_and_too_few_rows(count: int) -> None:
    columns = clips([49] * 3, [(640, 480)] * 3)
    assert len(choose_rows(columns, np.arange(3), count, 0, choice=STRATIFIED)) == min(count, 3)
    assert len(choose_rows(columns, np.arange(0), count, 0, choice=STRATIFIED)) == 0
