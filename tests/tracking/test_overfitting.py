"""Tests of videox.tracking.overfitting: what a series of validations says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from videox.tracking.overfitting import Measured, best_of, last_is_best, overfits, read_history, sentence, waited


def series(*pairs: tuple[float | None, float | None]) -> list[Measured]:
    """Return validations every 100 steps with these losses on held-out and training rows."""
    return [Measured(100 * number, *pair) for number, pair in enumerate(pairs)]


FALLING = series((1.0, 1.0), (0.9, 0.9), (0.8, 0.8))
OVERFIT = series((1.0, 1.0), (0.8, 0.75), (0.82, 0.7), (0.85, 0.6))


def test_falling_losses_are_learning() -> None:
    assert best_of(FALLING) is FALLING[-1] and last_is_best(FALLING) and waited(FALLING) == 0 and not overfits(FALLING)
    assert sentence(FALLING) == "training rows 0.8000; the lowest so far"
    assert sentence(FALLING[:1]) == "training rows 1.0000"
    assert sentence(series((1.0, None), (0.5, None))) == "the lowest so far"


def test_a_rising_held_out_loss_with_falling_training_loss_is_overfitting() -> None:
    assert best_of(OVERFIT).step == 100 and waited(OVERFIT) == 2 and overfits(OVERFIT)
    assert sentence(OVERFIT) == "training rows 0.6000; best at step 100: 0.8000; overfitting since step 100"


@pytest.mark.parametrize(
    "history",
    [
        OVERFIT[:3],  # a single validation does not count
        series((1.0, 1.0), (0.8, 0.75), (0.82, 0.8), (0.85, 0.9)),  # both rise: not overfitting, but diverging
        series((1.0, 1.0), (0.8, 0.75), (0.8001, 0.7), (0.8002, 0.6)),  # as good as the best one
        series((1.0, 1.0), (0.8, 0.75), (0.82, 0.7), (0.801, 0.6)),  # back again
        series((1.0, None), (0.8, None), (0.82, None), (0.85, None)),  # training rows were not measured
    ],
)
def test_other_series_are_no_overfitting(history: list[Measured]) -> None:
    assert not overfits(history) and "no new minimum since step 100" in sentence(history)


def test_losses_that_are_not_finite_are_never_the_best() -> None:
    history = series((math.nan, 1.0), (None, 1.0))
    assert best_of(history) is None and not last_is_best(history) and waited(history) == 0 and sentence(history)
    history = series((1.0, 1.0), (math.nan, 1.0), (math.inf, 0.5))
    assert best_of(history) is history[0] and waited(history) == 2 and not overfits(history)
    assert not last_is_best([])


def test_equal_losses_keep_the_first_as_the_best() -> None:
    history = series((1.0, 1.0), (1.0, 1.0))
    assert best_of(history) is history[0] and waited(history) == 1


def test_the_history_is_that_of_validation_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "validation.jsonl"
    assert read_history(path) == []
    lines = [{"step": 0, "loss": 1.0, "per_sigma": []}, {"step": 5, "loss": None, "train_loss": 0.5}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert read_history(path) == [Measured(0, 1.0, None), Measured(5, None, 0.5)]
