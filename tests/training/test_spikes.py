"""Tests of videox.training.spikes: the bound, how spikes are printed, and --skip_spikes in runs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import forkserver
import numpy as np
import pytest
import runs
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from videox.engine.base import NO_BOUNDS
from videox.engine.train_state import TrainState
from videox.training import spikes
from videox.training.spikes import LEAST, NEW_LEVEL, WINDOW, SpikeDetector, spike_bound

STEPS, SPIKE, FACTOR = 7, 6, 1e4


def new_state() -> TrainState:
    return TrainState(0, 1, "", {}, "")


# -------------------------------------------------------------------------------------------------------- the bound


@settings(max_examples=25)
@given(values=st.lists(st.floats(0, 1e30), min_size=LEAST, max_size=WINDOW), factor=st.floats(1e-3, 1e3))
def test_the_bound_scales_with_the_values_and_is_at_least_twice_their_median(
    values: list[float], factor: float
) -> None:
    bound = spike_bound(values)
    assert bound >= 2 * float(np.median(values)) * (1 - 1e-5)
    assert bound == float(np.float32(bound))
    if min(values) > 1e-20:
        # equal up to rounding of the logarithms, which the exponential enlarges
        assert spike_bound([value * factor for value in values]) == pytest.approx(
            min(bound * factor, 1.7e38), rel=1e-3
        )


def test_the_bound_is_the_documented_formula() -> None:
    values = np.exp(np.random.default_rng(1).normal(-2, 0.5, 100))
    logs = np.log(values)
    middle = np.median(logs)
    expected = math.exp(middle + 6 * 1.4826 * np.median(np.abs(logs - middle)))
    assert spike_bound(list(values)) == pytest.approx(expected, rel=1e-6)
    assert spike_bound([0.25] * 50) == pytest.approx(0.25 * math.exp(0.72), rel=1e-6)
    assert spike_bound(list(values[: LEAST - 1])) == math.inf


def test_values_that_vary_by_factors_are_no_spikes() -> None:
    draws = np.random.default_rng(2).lognormal(-3, 1.0, (1_500, 2))
    detector = SpikeDetector(new_state(), skip=False)
    assert sum(bool(detector.add(*step)) for step in draws.tolist()) == 0
    assert detector.add(1.0, 1e3) and detector.add(1e3, 1.0) == "", "the second step belongs to the same event"


def test_a_spike_is_printed_once_and_is_not_part_of_the_window() -> None:
    detector = SpikeDetector(state := new_state(), skip=False)
    for _ in range(WINDOW + 5):
        assert detector.add(0.5, 2.0) == ""
    assert len(state.recent_losses) == len(state.recent_grad_norms) == WINDOW
    said = detector.add(5.0, 2.0)
    assert said == f"its loss 5 is above 1.027, the bound from the {WINDOW} steps before it"
    assert detector.add(6.0, 50.0) == ""
    assert detector.add(0.5, 2.0) == ""
    assert "its loss 7 is above 1.027 and its gradient norm 9 is above 4.109" in detector.add(7.0, 9.0)
    assert set(state.recent_losses) == {0.5}


@pytest.mark.parametrize("skip", [True, False])
def test_a_new_level_is_accepted(skip: bool) -> None:
    detector = SpikeDetector(state := new_state(), skip=skip)
    for _ in range(LEAST):
        detector.add(0.5, 2.0)
    assert detector.bounds().loss < 5 and (detector.bounds_to_skip() == detector.bounds()) == skip
    said = [detector.add(5.0, 2.0) for _ in range(NEW_LEVEL)]
    assert [bool(line) for line in said] == [True, *[skip] * (NEW_LEVEL - 2), True]
    assert f"the next {LEAST} steps have no bound" in said[-1]
    assert (state.recent_losses, state.spikes_in_row, detector.bounds()) == ([], 0, NO_BOUNDS)


# --------------------------------------------------------------------------------------------------------- in runs


class SpikeRuns:
    """A model and a data set, and runs of seven steps whose sixth loss is ten thousand times as high."""

    def __init__(self, folder: Path) -> None:
        self.model, self.metadata = tiny.build_wan_t2v(folder / "model"), tiny.make_dataset(folder / "data", copies=4)

    def train(self, folder: Path, **changes: object) -> runs.Outcome:
        asked = {"max_train_steps": STEPS, "checkpointing_steps": 1, "mixed_precision": "no", "num_train_epochs": 9}
        return runs.train(runs.wan_flags(self.model, self.metadata, folder, **{**asked, **changes}))


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SpikeRuns]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spikes, "LEAST", 4)  # a run of seven steps has bounds from its fifth step on
        inject_spike(runs.train_script(), patch)
        yield SpikeRuns(tmp_path_factory.mktemp("spikes"))


def inject_spike(script: ModuleType, patch: pytest.MonkeyPatch) -> None:
    """Multiply the losses of step SPIKE; the script names the step that it accumulates for where it dumps."""
    compute_losses, dump_folder, step = script.velocity_losses, script.dump_folder, 0

    def note_step(folder: Path, number: int, dumped: list[int]) -> Path | None:
        nonlocal step
        step = number
        return dump_folder(folder, number, dumped)

    def losses(*arguments: torch.Tensor) -> torch.Tensor:
        return compute_losses(*arguments) * (FACTOR if step == SPIKE else 1)

    patch.setattr(script, "dump_folder", note_step)
    patch.setattr(script, "velocity_losses", losses)


def weights_equal(outcome: runs.Outcome, first: int, second: int) -> bool:
    before, after = (outcome.weights(f"checkpoint-{step}/transformer") for step in (first, second))
    return all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_a_spike_is_left_out_of_a_run(wan: SpikeRuns, tmp_path: Path) -> None:
    outcome = wan.train(tmp_path / "run", skip_spikes=True)
    assert outcome.code == 0, outcome.stderr
    (line,) = re.findall(r"^.*\(--skip_spikes\).*$", outcome.stdout + outcome.stderr, re.MULTILINE)
    rows = outcome.metrics[SPIKE - 1]["rows"]
    assert [line["step"] for line in outcome.metrics if line.get("skipped")] == [SPIKE]
    assert line.startswith(f"step {SPIKE} is left out (--skip_spikes): its loss ") and line.endswith(f"are {rows}")
    assert weights_equal(outcome, SPIKE - 1, SPIKE)
    assert not weights_equal(outcome, SPIKE, SPIKE + 1)
    assert outcome.losses[SPIKE - 1] > 100 * outcome.losses[SPIKE - 2]


@pytest.mark.slow
def test_a_run_that_is_resumed_before_the_spike_leaves_it_out_as_well(wan: SpikeRuns, tmp_path: Path) -> None:
    assert wan.train(tmp_path / "run", skip_spikes=True).code == 0
    again = tmp_path / "again"
    assert wan.train(again, skip_spikes=True, max_train_steps=SPIKE - 1).code == 0
    resumed = wan.train(again, skip_spikes=True, resume_from_checkpoint="latest")
    assert f"step {SPIKE} is left out" in resumed.stdout + resumed.stderr
    assert forkserver.differences(again, tmp_path / "run", STEPS) == []


@pytest.mark.slow
def test_without_the_flag_a_spike_is_only_printed(wan: SpikeRuns, tmp_path: Path) -> None:
    outcome = wan.train(tmp_path / "run")
    assert outcome.code == 0, outcome.stderr
    assert (outcome.stdout + outcome.stderr).count(f"step {SPIKE} is a spike: its loss ") == 1
    assert not weights_equal(outcome, SPIKE - 1, SPIKE)
