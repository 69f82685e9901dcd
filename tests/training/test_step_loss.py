"""Tests of videox.training.step_loss: the loss of a step is the same for any number of processes, sample by sample."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import COLUMNS, SETTINGS, random_columns, random_settings

from videox.data.plan.epoch import PADDING, EpochPlan
from videox.data.plan.plan import plan_epoch
from videox.data.plan.settings import PlanColumns, PlanSettings
from videox.engine.train_state import TrainState, plan_inputs
from videox.training.step import PlannedStep
from videox.training.step_loss import StepCorrection, StepLoss, bucket_name, mix_of, uniform_draws

CPU = torch.device("cpu")
UNIFORM, DENSITY = (argparse.Namespace(uniform_sampling=value) for value in (True, False))


def loss_of_key(key: int) -> float:
    return 0.1 + (key % 1009) / 1009


def losses_of_rank(plan: EpochPlan, step: int, rank: int, world_size: int, bad: int = -1) -> StepLoss:
    """Return what a rank adds in a step; bad: a row that cannot be read."""
    found = StepLoss(PlannedStep(plan, step, plan.rows_of_step(step), iter(()), None), CPU)  # type: ignore[arg-type]
    for micro in plan.micro_batches(step, rank, world_size):
        weights = np.where(micro.rows == bad, 0.0, micro.weights)
        losses = np.array([loss_of_key(int(key)) for key in micro.keys])
        found.add({"keys": micro.keys.tolist()}, torch.from_numpy(losses * weights))  # type: ignore[typeddict-item]
    return found


def state_of(plan_settings: PlanSettings) -> TrainState:
    return TrainState(1, plan_settings.slots, "index", plan_inputs(plan_settings), "run")


@settings(max_examples=20, deadline=None)
@given(random_columns, random_settings, st.data())
def test_each_sample_has_its_place_for_any_number_of_processes(
    columns: PlanColumns, plan_settings: PlanSettings, data: st.DataObject
) -> None:
    plan = plan_epoch(columns, plan_settings, 1)
    step = data.draw(st.integers(0, plan.n_steps - 1))
    keys, count = plan.keys_of_step(step).tolist(), len(plan.rows_of_step(step))
    expected = torch.tensor([loss_of_key(key) * (1.0 / count) for key in keys], dtype=torch.float64)
    for world_size in (n for n in (1, 2, 4, 8) if plan_settings.slots % n == 0):
        ranks = [losses_of_rank(plan, step, rank, world_size) for rank in range(world_size)]
        assert torch.equal(sum(rank.parts for rank in ranks), expected)  # type: ignore[arg-type]
        total = sum(rank.total.item() for rank in ranks)
        assert total == pytest.approx(expected.sum().item(), rel=1e-12)


def test_the_corrected_loss_is_the_same_for_1_2_and_4_processes_and_after_a_resume() -> None:
    plan_settings = replace(SETTINGS, slots=4)
    lines = []
    for world_size in (1, 2, 4):
        state = state_of(plan_settings)
        correct, line = StepCorrection(UNIFORM, state), []
        for epoch in (0, 1):
            plan = plan_epoch(COLUMNS, plan_settings, epoch)
            for step in range(plan.n_steps):
                ranks = [losses_of_rank(plan, step, rank, world_size, bad=3) for rank in range(world_size)]
                parts = sum(rank.parts for rank in ranks).tolist()  # type: ignore[union-attr]
                line.append(correct(plan, step, parts))
                if step == 5:  # as a resume does
                    state.loss_means = json.loads(json.dumps(state.loss_means))
                    correct = StepCorrection(UNIFORM, state)
        lines.append(line)
    assert lines[0] == lines[1] == lines[2] and all(map(math.isfinite, lines[0]))
    assert state.loss_means["mix"] == mix_of(plan_epoch(COLUMNS, plan_settings, 0))
    assert sum(state.loss_means["mix"].values()) == pytest.approx(1.0)


def test_a_step_without_a_readable_sample_has_no_corrected_loss() -> None:
    plan = plan_epoch(COLUMNS, SETTINGS, 0)
    correct = StepCorrection(UNIFORM, state_of(SETTINGS))
    count = len(plan.rows_of_step(0))
    assert math.isnan(correct(plan, 0, [0.0] * count))
    parts = [0.0] + [0.25 / count] * (count - 1)  # a bad sample is left out, and not taken for a loss of 0
    assert correct(plan, 0, parts) == pytest.approx(0.25)


def test_changed_data_has_a_mix_of_its_own() -> None:
    state = state_of(SETTINGS)
    correct = StepCorrection(UNIFORM, state)

    def one_step(epoch: int, columns: PlanColumns) -> EpochPlan:
        plan = plan_epoch(columns, SETTINGS, epoch)
        correct(plan, 0, [0.1] * len(plan.rows_of_step(0)))
        return plan

    first = one_step(0, COLUMNS)
    one_step(1, COLUMNS)
    assert state.loss_means["mix"] == mix_of(first) and state.loss_means["epoch"] == 0
    state.data_changes.append({"step": 100, "epoch": 2, "before": "a", "after": "b"})
    one_step(1, COLUMNS)  # the last step of the epoch before, which is recorded one step later
    assert state.loss_means["mix"] == mix_of(first)
    other = replace(COLUMNS, usable=COLUMNS.usable & (np.arange(len(COLUMNS)) % 2 == 0))
    changed = one_step(2, other)
    assert state.loss_means["mix"] == mix_of(changed) != mix_of(first)


def test_bands_follow_the_draws_that_sigmas_are_made_of() -> None:
    plan = plan_epoch(COLUMNS, SETTINGS, 0)
    strata, keys = plan.strata_of_step(2), plan.keys_of_step(2)
    assert uniform_draws(UNIFORM, strata, keys).tolist() == strata.tolist()
    independent = uniform_draws(DENSITY, strata, keys)
    assert independent.tolist() == uniform_draws(DENSITY, strata, keys.tolist()).tolist() != strata.tolist()
    assert ((independent > 0) & (independent < 1)).all() and PADDING not in plan.rows_of_step(2)
    assert bucket_name(plan.buckets[0]).count("x") == 2
