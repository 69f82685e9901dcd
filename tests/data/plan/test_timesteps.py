"""Tests of videox.data.plan.timesteps: draws cover the range in each step, in a row of steps, and for each bucket."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import COLUMNS, SETTINGS, all_batches, batches_of_step, make_columns, real_batches
from point_sets import discrepancy, largest_gap

from videox.data.plan.epoch import EpochPlan
from videox.data.plan.plan import plan_epoch
from videox.data.plan.settings import PlanSettings
from videox.data.plan.timesteps import ACROSS_STEPS, BLOCK_STEPS, PER_STEP, TIMESTEPS, place_in_stratum
from videox.rng import Purpose, uniform

PHI = (1 + math.sqrt(5)) / 2
ACROSS = replace(SETTINGS, timesteps=ACROSS_STEPS)
ONE_SAMPLE = replace(ACROSS, batch_size=1, slots=1)
WINDOW = 16
# Largest star discrepancy of two parts of one sequence each, with any starts, that have 16 draws together. Independent
# draws have 0.21 in the mean and any value up to 1.
WINDOW_BOUND = 0.224


def run_of(asked: PlanSettings, epochs: int, rows: int = 25) -> list[EpochPlan]:
    """Return the plans of a run's epochs. Each epoch begins at the step after the last one of the epoch before."""
    plans, columns = [], make_columns(rows, image_share=0.5)
    for epoch in range(epochs):
        plans.append(plan_epoch(columns, asked, epoch, first_step=sum(plan.n_steps for plan in plans)))
    return plans


# ----------------------------------------------------------------------------------------------------- the sequence


@given(st.integers(0, 2**63 - 1), st.integers(0, 10**9))
def test_place_follows_its_formula(seed: int, step: int) -> None:
    block = step // BLOCK_STEPS
    start = float(uniform(seed, block, Purpose.TIMESTEP_BLOCK)) + (block * BLOCK_STEPS) / PHI
    expected = (start + (step - block * BLOCK_STEPS) / PHI) % 1
    found = float(place_in_stratum(seed, step))
    assert 0 < found < 1
    assert min(abs(found - expected), 1 - abs(found - expected)) < 1e-6  # the reference rounds step / phi
    assert found == place_in_stratum(seed, np.array([step, step + 1]))[0]


def test_places_never_change() -> None:
    assert place_in_stratum(42, np.array([0, 1, 33, 34, 10**6])).tolist() == [
        0.09506931892725545, 0.7131033076771501, 0.49019094767378524, 0.9101336145626745, 0.5378635112805744,
    ]  # fmt: skip


def test_every_window_of_16_steps_covers_the_range() -> None:
    places = np.stack([place_in_stratum(seed, np.arange(2000)) for seed in range(20)])
    windows = discrepancy(np.lib.stride_tricks.sliding_window_view(places, WINDOW, axis=1))
    assert windows.max() < WINDOW_BOUND
    random = discrepancy(np.random.default_rng(0).random((20000, WINDOW)))
    assert windows.mean() < 0.5 * random.mean()
    assert windows.max() < np.quantile(random, 0.65)


def test_the_bound_holds_for_any_two_starts() -> None:
    starts = np.linspace(0, 1, 2001)[:, None]
    largest = [0.0, *(n * discrepancy((starts + np.arange(n) / PHI) % 1).max() for n in range(1, WINDOW + 1))]
    assert BLOCK_STEPS >= WINDOW  # so that a window has at most two starts
    assert max(one + other for one, other in zip(largest, largest[::-1], strict=True)) / WINDOW < WINDOW_BOUND


@pytest.mark.parametrize("occurrences", [20, 50])
def test_what_occurs_in_every_nth_step_keeps_no_band(occurrences: int) -> None:
    steps, seeds = np.arange(occurrences), range(100)
    random = float(largest_gap(np.random.default_rng(0).random((2000, occurrences))).mean())
    for period in range(1, 90):
        gaps = largest_gap(np.stack([place_in_stratum(seed, period * steps) for seed in seeds]))
        assert gaps.mean() < 1.75 * random, f"every {period} steps"
    # one start for the whole run would leave a band in the Fibonacci periods
    assert largest_gap(55 * steps / PHI % 1) > 4 * random


# ---------------------------------------------------------------------------------------------------- in the plan


@settings(max_examples=30)
@given(st.integers(0, 2**63 - 1), st.integers(1, 5), st.integers(1, 6), st.integers(0, 10**6))
def test_sample_in_stratum_p_of_n_gets_p_plus_place_over_n(seed: int, batch: int, slots: int, first: int) -> None:
    plan = plan_epoch(COLUMNS, replace(ACROSS, seed=seed, batch_size=batch, slots=slots), 1, first_step=first)
    for step in range(0, plan.n_steps, 7):
        strata = np.sort(np.concatenate([batch.strata for batch in real_batches(batches_of_step(plan, step))]))
        expected = (np.arange(len(strata)) + place_in_stratum(seed, first + step)) / len(strata)
        assert strata.tolist() == expected.tolist()


def test_one_sample_per_step_follows_the_sequence_over_epochs() -> None:
    plans = run_of(ONE_SAMPLE, epochs=9)
    draws = [float(batch.strata[0]) for plan in plans for batch in all_batches(plan)]
    assert draws == place_in_stratum(SETTINGS.seed, np.arange(len(draws))).tolist()
    assert len(draws) > 100


@pytest.mark.parametrize("slots", [1, 4])
def test_no_bucket_and_no_slot_keeps_a_band(slots: int) -> None:
    found: dict[object, list[float]] = {}
    for plan in run_of(replace(ONE_SAMPLE, slots=slots), epochs=40):
        for batch in real_batches(all_batches(plan)):
            found.setdefault(batch.bucket, []).extend(batch.strata.tolist())
            found.setdefault(batch.slot, []).extend(batch.strata.tolist())
    frequent = {name: np.array(draws) for name, draws in found.items() if len(draws) >= 30}
    assert len(frequent) > slots + 5
    for name, draws in frequent.items():
        # Kolmogorov's limit that independent draws exceed once in 10,000 times
        assert discrepancy(draws) < 2.23 / math.sqrt(len(draws)), name


def test_what_a_plan_has_besides_timesteps_does_not_depend_on_them() -> None:
    plans = [plan_epoch(COLUMNS, replace(SETTINGS, timesteps=timesteps), 1) for timesteps in TIMESTEPS]
    for one, other in zip(*map(all_batches, plans), strict=True):
        assert [np.asarray(a).tolist() for a in one[2:9]] == [np.asarray(b).tolist() for b in other[2:9]]
    assert plans[0].strata_of_step(0).tolist() != plans[1].strata_of_step(0).tolist()


def test_runs_of_older_versions_keep_their_draws() -> None:
    assert SETTINGS.timesteps == PER_STEP
    plan = plan_epoch(COLUMNS, SETTINGS, 1, first_step=99)  # written by the version before ACROSS_STEPS
    assert plan.strata_of_step(3)[:4].tolist() == [
        0.41903066442257003, 0.7221202794737102, 0.4039296906093455, 0.47224151999388847,
    ]  # fmt: skip
    alone = plan_epoch(COLUMNS, replace(SETTINGS, batch_size=1, slots=1), 0)
    assert [*alone.strata_of_step(3).tolist(), *alone.strata_of_step(7).tolist()] == [
        0.7805973410234069, 0.930994058977158,
    ]  # fmt: skip
