"""Tests of videox.estimate.time_left: within a fifth of the truth from the fifth step on, whatever a step costs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plans import COLUMNS, SETTINGS

from videox.data.plan.balance import balance, plan_costs
from videox.data.plan.plan import plan_epoch
from videox.data.plan.settings import BARRIERS
from videox.estimate.mfu import Meter
from videox.estimate.time_left import TimeLeft, fit_durations

PLANS = [plan_epoch(COLUMNS, SETTINGS, epoch) for epoch in range(3)]


def meter(barrier: str = "step") -> Meter:
    return Meter(lambda tokens: float(tokens), None, 1, replace(SETTINGS, barrier=barrier))


@pytest.mark.parametrize("barrier", BARRIERS)
def test_costs_of_steps_give_the_planned_balance(barrier: str) -> None:
    settings = replace(SETTINGS, barrier=barrier)
    for processes in (1, SETTINGS.slots):
        costs, padding = plan_costs(PLANS[0], settings, processes)
        of_steps = Meter(lambda tokens: float(tokens), None, processes, settings).costs_of_steps(PLANS[0])
        assert len(of_steps) == PLANS[0].n_steps
        planned = costs.sum() / (processes * of_steps.sum())
        assert planned == pytest.approx(balance(costs, barrier, padding))


@pytest.mark.parametrize("fixed", [0.0, 0.5, 3.0], ids=["by cost", "mixed", "mostly fixed"])
def test_the_time_left_is_right_within_a_fifth_from_the_fifth_step_on(fixed: float) -> None:
    """Steps take (their planned cost + a fixed part) with 5 % of noise, the first one five times as long."""
    wrong, asked = 0, 0
    for seed in range(10):
        draw, known = np.random.default_rng(seed), meter()
        durations = [known.costs_of_steps(plan) / PLANS_MEAN + fixed for plan in PLANS]
        durations = [each * np.exp(draw.normal(0, 0.05, len(each))) for each in durations]
        durations[0][0] *= 5
        total = sum(map(len, durations))
        left, done = TimeLeft(known, total, {}), 0
        flat = np.concatenate(durations)
        for plan, seconds in zip(PLANS, durations, strict=True):
            for step in range(plan.n_steps):
                left.add_step(plan, step, float(seconds[step]))
                done += 1
                if done in (5, 8, 13, 21, 34, total // 2, total - 10):
                    left._at = -1.0  # no kept estimate
                    asked += 1
                    wrong += abs(left.estimate(done, plan, step) / float(flat[done:].sum()) - 1) > 0.2
    assert asked >= 50 and wrong <= 0.02 * asked, (wrong, asked)


PLANS_MEAN = float(np.mean([meter().costs_of_steps(plan).mean() for plan in PLANS]))


@given(st.lists(st.tuples(st.floats(1, 1e9), st.floats(1e-3, 1e4)), min_size=1, max_size=30), st.floats(1, 1e9))
def test_no_measured_times_give_a_negative_or_infinite_estimate(steps, expected) -> None:
    costs, seconds = (np.array(column) for column in zip(*steps, strict=True))
    linear, fixed = fit_durations(costs, seconds, expected)
    assert linear >= 0 and fixed >= 0 and 0 < linear * expected + fixed < 1e15


def test_one_step_is_assumed_to_take_time_by_its_cost() -> None:
    linear, fixed = fit_durations(np.array([10.0]), np.array([2.0]), 100.0)
    assert linear * 100 + fixed == pytest.approx(20.0)


def test_pauses_that_are_still_to_come_count() -> None:
    plan, known = PLANS[0], meter()
    left = TimeLeft(known, 100, {"validation": 20, "save": 50})
    left.add_pause("validation", 0, 6.0)
    left.add_pause("validation", 0, 4.0)  # held-out loss and samples of one validation
    left.add_step(plan, 0, 1e-9)
    assert left.estimate(1, plan, 0) == pytest.approx(10.0 * 5, abs=1e-3)  # at 20, 40, 60, 80 and the end
    left.add_pause("validation", 20, 10.0)
    left.add_pause("save", 50, 3.0)
    assert left.estimate(50, plan, 0) == pytest.approx(10.0 * 3 + 3.0, abs=1e-3)
    assert left.estimate(100, plan, 0) == 0.0
