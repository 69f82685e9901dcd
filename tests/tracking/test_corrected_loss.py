"""Tests of videox.tracking.corrected_loss: the line is steady, shows the trend, and rare samples do not mislead it."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from videox.tracking.corrected_loss import BANDS, CorrectedLoss, noise_bands

STEPS = 600


@dataclass(frozen=True)
class Training:
    """A made-up training: each bucket's share of the samples and how hard it is, and the level of each step.

    A sample's loss is the level, times a function of its noise that differs by a factor of ten, times that of its
    bucket, times what differs from sample to sample.
    """

    shares: np.ndarray
    buckets: np.ndarray
    level: np.ndarray
    batch: int = 1
    scatter: float = 0.05

    def run(self, corrected: CorrectedLoss, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the loss of each step, the corrected one, and the expected loss of all bands and buckets."""
        draw = np.random.default_rng(seed)
        names = [f"bucket-{number}" for number in range(len(self.shares))]
        corrected.use_mix(0, dict(zip(names, self.shares.tolist(), strict=True)))
        expected = by_noise((np.arange(1000) + 0.5) / 1000).mean() * (self.shares @ self.buckets) * self.level
        raw, line = [], []
        for level in self.level:
            noise, bucket = draw.random(self.batch), draw.choice(len(self.shares), self.batch, p=self.shares)
            own = np.exp(draw.normal(0, self.scatter, self.batch))
            losses = level * by_noise(noise) * self.buckets[bucket] * own
            raw.append(losses.mean())
            line.append(corrected.add(noise_bands(noise), [names[number] for number in bucket], losses.tolist()))
        return np.array(raw), np.array(line), expected


def by_noise(draws: np.ndarray) -> np.ndarray:
    return 0.1 + 0.9 * (2 * draws - 1) ** 4


def slope(values: np.ndarray) -> float:
    return float(np.polyfit(np.linspace(0, 1, len(values)), values, 1)[0])


def two_buckets(level: np.ndarray, **changes: object) -> Training:
    return Training(np.array([0.7, 0.3]), np.array([1.0, 0.3]), level, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [1, 4])
def test_the_line_is_steadier_than_the_loss_and_falls_as_the_level_does(batch: int) -> None:
    raw, line, expected = two_buckets(np.linspace(1.0, 0.8, STEPS), batch=batch).run(CorrectedLoss({}))
    later = slice(STEPS // 3, None)
    noise = {name: np.std(values[later] / expected[later]) for name, values in (("raw", raw), ("line", line))}
    assert noise["line"] < noise["raw"] / 5, noise
    assert line[later].mean() == pytest.approx(expected[later].mean(), rel=0.03)
    assert slope(line[later]) == pytest.approx(slope(expected[later]), rel=0.3)
    # the loss of a fall that is seen in the line is hidden by the noise of the loss itself
    thirds = [part.mean() for part in np.array_split(line[later], 3)]
    assert thirds == sorted(thirds, reverse=True)


def test_a_loss_that_falls_to_a_thirtieth_is_followed() -> None:
    raw, line, expected = two_buckets(np.geomspace(1.0, 1 / 30, STEPS)).run(CorrectedLoss({}))
    later = slice(STEPS // 3, None)
    assert (
        np.abs(np.log(line[later] / expected[later])).mean()
        < 0.12
        < np.abs(np.log(raw[later] / expected[later])).mean() / 4
    )
    assert line.min() > 0


def test_a_constant_level_gives_a_constant_line() -> None:
    _, line, expected = two_buckets(np.ones(STEPS), scatter=0.0).run(CorrectedLoss({}))
    assert abs(slope(line[STEPS // 3 :])) < 0.02 * expected[0]


@pytest.mark.parametrize("seed", [0, 1])
def test_rare_buckets_do_not_mislead(seed: int) -> None:
    """There are 40 buckets. Most have at most 1 % of the samples, so that most cells never get a second sample."""
    draw = np.random.default_rng(seed)
    shares = draw.dirichlet(np.full(40, 0.6))
    training = Training(shares, np.exp(draw.normal(0, 0.5, 40)), np.linspace(1.0, 0.8, STEPS))
    raw, line, expected = training.run(CorrectedLoss({}), seed)
    later = slice(STEPS // 2, None)
    error = {name: np.std(values[later] / expected[later]) for name, values in (("raw", raw), ("line", line))}
    assert error["line"] < error["raw"] / 2, error
    assert line[later].mean() == pytest.approx(expected[later].mean(), rel=0.1)


def test_one_broken_sample_does_not_spoil_its_band() -> None:
    training, corrected = two_buckets(np.ones(STEPS)), CorrectedLoss({})
    training.run(corrected)
    usual = copy.deepcopy(corrected)
    band, bucket = noise_bands(np.array([0.03]))[0], "bucket-1"
    corrected.add([band], [bucket], [1e6])
    before, after = (each.add([band], [bucket], [0.2]) for each in (usual, corrected))
    assert after > 0.5 * before


@settings(max_examples=25, deadline=None)
@given(
    factor=st.floats(1e-6, 1e6),
    losses=st.lists(st.lists(st.floats(1e-3, 10), min_size=1, max_size=5), min_size=1, max_size=20),
    draw=st.randoms(use_true_random=False),
)
def test_the_unit_of_the_loss_does_not_matter(factor: float, losses: list[list[float]], draw) -> None:
    one, other = CorrectedLoss({}), CorrectedLoss({})
    for step in losses:
        bands, buckets = [draw.randrange(BANDS) for _ in step], [draw.choice("ab") for _ in step]
        scaled = other.add(bands, buckets, [factor * loss for loss in step])
        assert scaled == pytest.approx(factor * one.add(bands, buckets, step), rel=1e-9)


def test_the_first_step_is_not_corrected() -> None:
    assert CorrectedLoss({}).add([0, 5], ["a", "b"], [0.5, 1.5]) == pytest.approx(1.0)


def test_means_that_went_through_a_checkpoint_go_on_bit_for_bit() -> None:
    stored: dict = {}
    training = two_buckets(np.ones(50), batch=3)
    training.run(CorrectedLoss(stored))
    again = json.loads(json.dumps(stored))
    one, other = (training.run(CorrectedLoss(each), seed=1)[1].tolist() for each in (stored, again))
    assert one == other and stored == again


@pytest.mark.parametrize("losses", [[], [0.5, math.nan], [math.inf, 0.5]])
def test_a_step_without_finite_losses_changes_nothing(losses: list[float]) -> None:
    stored: dict = {}
    corrected = CorrectedLoss(stored)
    corrected.add([1], ["a"], [0.5])
    before = copy.deepcopy(stored)
    assert math.isnan(corrected.add([1] * len(losses), ["a"] * len(losses), losses))
    assert stored == before


def test_each_band_has_an_equal_share_of_the_draws() -> None:
    draws = (np.arange(16 * 10) + 0.5) / 160
    assert np.bincount(noise_bands(draws)).tolist() == [10] * BANDS
    assert noise_bands(np.array([0.0, 1.0])) == [0, BANDS - 1]
