"""Tests of videox.data.plan.balancing, batching and balance: ranks wait little, steps stay varied, no slot is lost."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as settings_
from hypothesis import strategies as st
from plans import (
    COLUMNS,
    SETTINGS,
    WORLD_SIZES,
    all_batches,
    make_columns,
    random_columns,
    random_settings,
    real_batches,
    samples_of,
)

from videox.data.choices import BALANCES
from videox.data.plan.balance import (
    balance,
    balance_and_variance_ratio,
    plan_costs,
    step_variance_ratio,
    unplanned_costs,
)
from videox.data.plan.balancing import (
    CORRECT_BY,
    MAX_VARIANCE_RATIO,
    SlotCosts,
    Strategy,
    assign_slots,
    equal_sums,
    evaluate,
    rows_in_blocks,
    rows_with_drift,
)
from videox.data.plan.batching import CAPACITY, COST_UNITS, pack, pack_steps
from videox.data.plan.epoch import PADDING, EpochPlan, MicroBatch
from videox.data.plan.plan import plan_epoch
from videox.data.plan.settings import BARRIERS, PlanSettings, launch_cost, sample_cost
from videox.shapes import token_count

WAN = {"cost_linear": 2.6e9, "cost_quadratic": 184320.0}  # of Wan2.1 1.3B, rounded
MANY = make_columns(6000)
planned_settings = st.builds(
    lambda settings, balance, barrier, accumulation, ranks: replace(
        settings, balance=balance, barrier=barrier, accumulation=accumulation, slots=ranks * accumulation, **WAN
    ),
    random_settings, st.sampled_from(BALANCES), st.sampled_from(BARRIERS), st.integers(1, 4), st.sampled_from([1, 2, 3, 6]),
)  # fmt: skip


def random_slots(slots: int, seed: int = 0) -> SlotCosts:
    """Return slots of a mixed data set: a third are cheap images, clips differ in cost by a factor of eight."""
    rng = np.random.default_rng(seed)
    logs = np.where(rng.random(slots) < 0.3, rng.normal(6, 0.5, slots), rng.normal(9.4, 0.5, slots))
    deviation = np.rint((logs - logs.mean()) * 4096).astype(np.int64)
    return SlotCosts(np.rint(np.exp(1.4 * logs)).astype(np.int64), deviation, np.ones(slots, np.int64))


# ------------------------------------------------------------------------------------------------ grouping and packing


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.integers(0, 99))
def test_every_slot_is_assigned_once(n: int, rows: int, width: int, seed: int) -> None:
    slots = random_slots(n * rows * width, seed)
    cost, deviation = slots.cost.reshape(n, -1), slots.deviation.reshape(n, -1)
    assigned = [equal_sums(cost, width), *(rows_in_blocks(cost, deviation, width, block) for block in (1, 2, 8))]
    assigned += [rows_with_drift(cost, deviation, width, drift) for drift in (0.0, 3000.0, math.inf)]
    for order in assigned:
        assert order.shape == (n, rows, width)
        assert np.array_equal(np.sort(order.reshape(n, -1), axis=1), np.tile(np.arange(rows * width), (n, 1)))


@pytest.mark.parametrize("barrier", BARRIERS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_slots_of_one_bucket_are_assigned_once(barrier: str, accumulation: int) -> None:
    alike = SlotCosts(np.full(24, 7), np.zeros(24, np.int64), np.ones(24, np.int64))
    assigned = assign_slots(alike, data_groups=2, accumulation=accumulation, barrier=barrier, spread=0.0, strict=False)
    assert assigned.shape == (12 // accumulation, accumulation, 2)
    assert sorted(assigned.flatten()) == list(range(24))


@pytest.mark.parametrize(("size", "limit"), [(2, 0.05), (3, 0.04), (4, 0.01), (8, 0.01)])
def test_sums_are_nearly_equal(size: int, limit: float) -> None:
    values = np.random.default_rng(0).integers(1, 1000, (1, 64 * size))
    sums = np.take_along_axis(values, equal_sums(values, size).reshape(1, -1), 1).reshape(64, size).sum(1)
    assert sums.std() < limit * sums.mean()


def test_drift_trades_step_variance_for_balance() -> None:
    slots = random_slots(4096)
    cost, deviation = slots.cost[None], slots.deviation[None]
    spread = math.sqrt(float((slots.deviation**2).mean()) * 16)
    results = []
    for drift in (0.0, 1.0, 2.0, 4.0, math.inf):
        rows = rows_with_drift(cost, deviation, 16, drift * spread)[0]
        deviations = slots.deviation[rows].sum(1) / spread
        results.append((balance(slots.cost[rows][:, None, :].astype(float), "step"), float(np.mean(deviations**2))))
    balances, mixes = zip(*results, strict=True)
    assert balances == tuple(sorted(balances))
    assert balances[-1] > 0.95
    assert mixes[0] < 0.1
    assert mixes[1] == pytest.approx(1, rel=0.2)  # drift is an rms, in units of that of random rows
    assert mixes[2] == pytest.approx(4, rel=0.2)


def test_a_few_micro_steps_correct_the_others() -> None:
    """Images fill too few micro-steps for each step to have one: nearly as balanced as sorting by cost, and varied."""
    ranks, steps, rng = 64, 24, np.random.default_rng(0)
    images = rng.random(steps * 4 * ranks) < 0.07
    logs = np.where(images, -4.0, rng.normal(0.3, 0.25, len(images)))
    cost = np.rint(1e6 * np.exp(1.4 * logs)).astype(np.int64)
    slots = SlotCosts(cost, np.rint((logs - logs.mean()) * 4096).astype(np.int64), np.ones(len(logs), np.int64))
    all_slots, spread = slots.at(np.arange(len(logs))[None]), math.sqrt(float((slots.deviation**2).mean()))
    results = []
    by_cost, level, *corrected = [Strategy(ranks, 4, "micro", drift=drift) for drift in (math.inf, 0.0)] + [
        Strategy(ranks, 4, "micro", corrections=1, correct_by=by) for by in CORRECT_BY
    ]
    for strategy in (by_cost, level, *corrected):
        assigned = strategy.build_steps(all_slots, spread)
        assert sorted(assigned.flatten()) == list(range(len(logs)))
        results.append(evaluate(all_slots, assigned, "micro", spread))
    assert results[0][1] > MAX_VARIANCE_RATIO  # sorted by cost alone
    for balanced, mixed in results[2:]:
        assert balanced > (results[0][0] + results[1][0]) / 2
        assert mixed < 0.1


@settings_(max_examples=40, deadline=None)
@given(
    st.integers(1, 16), st.integers(1, 4), st.sampled_from(BARRIERS), st.integers(32, 80), st.integers(0, 9999),
    st.sampled_from([1, 2, 7]),
)  # fmt: skip
def test_the_variance_ratio_stays_below_its_limit(
    ranks: int, accumulation: int, barrier: str, steps: int, seed: int, max_samples: int
) -> None:
    """At any balance, also where slots of several similar samples make random slots less varied."""
    slots = random_slots(steps * ranks * accumulation, seed)
    count = 1 + np.random.default_rng(seed).integers(0, max_samples, len(slots.cost))
    slots = SlotCosts(slots.cost, np.rint(slots.deviation * np.sqrt(count)).astype(np.int64), count)
    slots = replace(slots, deviation=slots.deviation - slots.samples * (slots.deviation.sum() // slots.samples.sum()))
    spread = math.sqrt(float((slots.deviation**2 / slots.samples).mean()))
    assigned = assign_slots(
        slots, data_groups=ranks, accumulation=accumulation, barrier=barrier, spread=spread, strict=False
    )
    all_slots = slots.at(np.arange(len(slots.cost))[None])
    assert evaluate(all_slots, assigned[None], barrier, spread)[1] * steps / (steps - 1) <= MAX_VARIANCE_RATIO


@given(st.lists(st.integers(1, COST_UNITS), min_size=1, max_size=200))
def test_no_slot_is_overfull_and_none_is_empty(costs: list[int]) -> None:
    slot = pack(np.array(costs))
    loads = np.bincount(slot, weights=costs)
    assert loads.max() <= CAPACITY
    assert loads.min() > 0
    assert len(loads) <= 2 * math.ceil(sum(costs) / COST_UNITS) + 1


@given(st.lists(st.integers(1, COST_UNITS), min_size=1, max_size=200), st.integers(1, 8))
def test_pack_steps_never_adds_a_step(costs: list[int], size: int) -> None:
    even, plain = (
        np.bincount(slot, weights=costs) for slot in (pack_steps(np.array(costs), size), pack(np.array(costs)))
    )
    assert even.max() <= CAPACITY and even.min() > 0 and even.sum() == sum(costs)
    assert -(-len(even) // size) <= -(-len(plain) // size)
    if len(even) != len(plain):
        assert len(even) % size == 0


def test_the_last_step_is_full_if_small_changes_achieve_it() -> None:
    costs = np.random.default_rng(0).integers(1, COST_UNITS // 4, 4000)
    slots = int(pack(costs).max()) + 1
    for size in (7, 16, 24):
        assert slots % size and (int(pack_steps(costs, size).max()) + 1) % size == 0


# -------------------------------------------------------------------------------------------------- a whole plan


@settings_(max_examples=40, deadline=None)
@given(random_columns, planned_settings)
def test_any_plan_trains_each_row_once_at_every_world_size(columns: object, settings: PlanSettings) -> None:
    plan = plan_epoch(columns, settings, 0)
    alone = samples_of(all_batches(plan))
    assert len({(row, copy) for _, _, _, row, copy, *_ in alone}) == len(alone) == len(plan.row)
    for world_size in (w for w in WORLD_SIZES if settings.slots % w == 0):
        assert sorted(samples_of(all_batches(plan, world_size))) == sorted(alone)
    again = plan_epoch(columns, settings, 0)
    assert all(
        np.array_equal(getattr(plan, name), getattr(again, name)) for name in ("row", "micro_first", "slot_first")
    )
    if settings.video_repeat <= 1:  # no clip twice in a step
        for step in range(plan.n_steps):
            assert len(set(plan.rows_of_step(step).tolist())) == len(plan.rows_of_step(step))


@settings_(max_examples=25, deadline=None)
@given(random_columns, planned_settings)
def test_plan_costs_equal_the_costs_of_the_executed_micro_batches(columns: object, settings: PlanSettings) -> None:
    plan = plan_epoch(columns, settings, 0)
    ranks = settings.slots // settings.accumulation
    costs, padding = plan_costs(plan, settings, ranks)

    def cost(batch: MicroBatch) -> float:
        tokens = token_count(batch.bucket)
        samples = len(batch.rows) * (settings.cost_linear * tokens + settings.cost_quadratic * tokens**2)
        return samples + launch_cost(settings)

    for step in range(plan.n_steps):
        for rank in range(ranks):
            batches = plan.micro_batches(step, rank, ranks)
            rank_costs = (costs + padding)[step, :, rank]
            assert rank_costs[rank_costs > 0] == pytest.approx([cost(batch) for batch in batches])
            assert costs[step, :, rank].sum() == pytest.approx(sum(cost(b) for b in real_batches(batches)))


def test_launches_are_balanced_where_they_are_counted() -> None:
    """Slots of several small micro-batches and of one large one: their costs are equal only without the launches."""
    settings = replace(SETTINGS, slot_fill="cost", slots=8, batch_size=1, balance="strict", **WAN)
    plain, counted = settings, replace(settings, launch_tokens=4096)
    assert launch_cost(plain) == 0 and launch_cost(counted) == pytest.approx(
        WAN["cost_linear"] * 4096 + WAN["cost_quadratic"] * 4096**2
    )
    plans = {name: plan_epoch(MANY, each, 0) for name, each in (("plain", plain), ("counted", counted))}
    again = plan_epoch(MANY, replace(plain, launch_tokens=0), 0)
    assert all(np.array_equal(getattr(plans["plain"], name), getattr(again, name)) for name in ("row", "slot_first"))
    costs, padding = plan_costs(plans["plain"], plain, 8)
    with_launches, more_padding = plan_costs(plans["plain"], counted, 8)
    assert np.array_equal(with_launches - costs, launch_cost(counted) * (costs > 0))
    assert np.array_equal((more_padding - padding) > 0, padding > 0)
    balances = {name: balance_and_variance_ratio(plan, counted, 8)[0] for name, plan in plans.items()}
    assert balances["counted"] > balances["plain"]


def metrics_of(settings: PlanSettings, world_size: int) -> tuple[float, float]:
    return balance_and_variance_ratio(plan_epoch(MANY, settings, 0), settings, world_size)


@pytest.mark.slow
@pytest.mark.parametrize("barrier", BARRIERS)
@pytest.mark.parametrize("slot_fill", ["fixed", "cost"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_ranks_wait_less_and_steps_stay_varied(barrier: str, slot_fill: str, accumulation: int) -> None:
    settings = replace(
        SETTINGS, batch_size=1, slots=8 * accumulation, accumulation=accumulation, barrier=barrier, slot_fill=slot_fill,
        **WAN,
    )  # fmt: skip
    found = {kind: metrics_of(replace(settings, balance=kind), 8) for kind in BALANCES}
    assert found["none"][0] < found["mixed"][0] <= found["strict"][0] + 0.005
    assert found["strict"][0] > 0.96
    assert found["mixed"][1] < 4.05
    if accumulation == 4:
        assert found["mixed"][0] > 0.95


def test_fixed_fill_keeps_the_samples_of_a_step() -> None:
    for kind in BALANCES:
        settings = replace(SETTINGS, balance=kind, batch_size=1, accumulation=3)
        plan = plan_epoch(MANY, settings, 0)
        assert {len(plan.rows_of_step(step)) for step in range(plan.n_steps - 1)} == {settings.slots}


def test_one_process_has_the_plan_of_many_processes() -> None:
    alone, several = (plan_epoch(COLUMNS, replace(SETTINGS, accumulation=a), 0) for a in (SETTINGS.slots, 1))
    assert samples_of(all_batches(alone)) == samples_of(all_batches(several))


def test_no_rank_always_gets_the_most_expensive_slots() -> None:
    settings = replace(SETTINGS, batch_size=1, slots=8, accumulation=2, **WAN)
    plan = plan_epoch(MANY, settings, 0)
    costs, _ = plan_costs(plan, settings, 4)
    by_rank = costs.sum((0, 1)) / costs.sum() * 4
    assert np.all(np.abs(by_rank - 1) < 0.05)
    thirds = np.array_split(costs.sum((1, 2)), 3)
    assert np.ptp([third.mean() for third in thirds]) < 0.1 * costs.sum((1, 2)).mean()


# ------------------------------------------------------------------------------------------------------------- metrics


def test_balance_by_hand() -> None:
    costs = np.array([[[4.0, 2.0], [1.0, 3.0]]])
    assert balance(costs, "step") == 10 / (2 * 5)
    assert balance(costs, "micro") == 10 / (2 * (4 + 3))
    assert balance(costs, "step", np.array([[[0.0, 0.0], [0.0, 5.0]]])) == 10 / (2 * 10)
    with pytest.raises(ValueError, match="layer"):
        balance(costs, "layer")


def test_the_variance_ratio_is_one_for_random_steps_and_the_size_for_sorted_ones() -> None:
    tokens = np.random.default_rng(1).integers(100, 30000, 64 * 400)
    step = np.arange(len(tokens)) // 64
    assert step_variance_ratio(tokens, step) == pytest.approx(1, abs=0.15)
    assert step_variance_ratio(np.sort(tokens), step) == pytest.approx(64, rel=0.05)
    assert step_variance_ratio(np.full(64, 9), np.arange(64) // 8) == 0
    assert step_variance_ratio(tokens[:64], np.zeros(64, int)) == 1


def test_unplanned_costs_are_full_batches_in_random_order() -> None:
    bucket = np.random.default_rng(1).integers(0, 5, 4000)
    cost = (bucket + 1.0) ** 2
    found = unplanned_costs(cost, bucket, batch_size=2, data_groups=8, accumulation=2)
    assert found.shape[1:] == (2, 8)
    assert set(np.unique(found)) <= {2 * (b + 1.0) ** 2 for b in range(5)} | {(b + 1.0) ** 2 for b in range(5)}
    assert found.size == pytest.approx(2000, abs=20)
    assert balance(found, "micro") < balance(found, "step") < 0.75


def test_padding_takes_time_but_is_no_useful_work() -> None:
    settings = replace(SETTINGS, slot_fill="cost", slots=4, batch_size=1, **WAN)
    plan: EpochPlan = plan_epoch(COLUMNS, settings, 0)
    costs, padding = plan_costs(plan, settings, 4)
    unit = sample_cost(settings, plan.buckets)
    assert costs.sum() == pytest.approx(float(unit[plan.micro_bucket] @ np.diff(plan.micro_first)))
    pads = sum(batch.rows[0] == PADDING for batch in all_batches(plan, 4))
    assert np.count_nonzero(padding) == pads > 0
