"""Tests of videox.training.build: the noise levels of a batch."""

from __future__ import annotations

from argparse import Namespace
from typing import cast

import numpy as np
import pytest
import torch

from videox.data.dataset import Batch
from videox.data.plan.timesteps import ACROSS_STEPS, PER_STEP
from videox.diffusion.flow_matching import draw_sigmas
from videox.rng import Purpose, uniform
from videox.training.build import sigmas_of_batch

COUNT, SHIFT = 400, 3.0
KEYS = list(range(COUNT))
STRATA = (np.arange(COUNT) + 0.3) / COUNT
MODE_SCALE = 1.29


def flags(scheme: str, *, uniform_sampling: bool = True) -> Namespace:
    return Namespace(
        uniform_sampling=uniform_sampling, weighting_scheme=scheme, logit_mean=0.5, logit_std=0.8,
        mode_scale=MODE_SCALE, train_sampling_steps=1000,
    )  # fmt: skip


def batch_of(timesteps: str) -> Batch:
    return cast(Batch, {"keys": KEYS, "strata": STRATA, "timesteps": timesteps})


def shares_of(sigmas: torch.Tensor) -> np.ndarray:
    """Return the drawn values, from 0 = all noise to 1, to 1/1000: the shift is undone."""
    sigma = sigmas.double()
    return (1 - sigma / (SHIFT - (SHIFT - 1) * sigma)).numpy()


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "cosmap"])
def test_schemes_without_a_density_of_timesteps_leave_them_uniform(scheme: str) -> None:
    for timesteps in (PER_STEP, ACROSS_STEPS):
        assert torch.equal(sigmas_of_batch(flags(scheme), batch_of(timesteps), SHIFT), draw_sigmas(STRATA, SHIFT))


def test_independent_draws_are_keyed_by_sample() -> None:
    expected = draw_sigmas(uniform(np.array(KEYS, np.uint64), Purpose.TIMESTEP), SHIFT)
    for timesteps in (PER_STEP, ACROSS_STEPS):
        found = sigmas_of_batch(flags("none", uniform_sampling=False), batch_of(timesteps), SHIFT)
        assert torch.equal(found, expected)


def test_strata_cover_the_density_of_logit_normal() -> None:
    drawn = shares_of(sigmas_of_batch(flags("logit_normal"), batch_of(ACROSS_STEPS), SHIFT)) + 5e-4
    logits = np.log(drawn / (1 - drawn))
    below = torch.special.ndtr(torch.from_numpy((logits - 0.5) / 0.8)).numpy()  # share of the density below each draw
    # one in each stratum of equal probability; a timestep is up to 1/1000 wide, where the density is up to 2
    assert np.abs(np.sort(below) - STRATA).max() < 2.5e-3


def test_strata_cover_the_density_of_mode() -> None:
    drawn = np.sort(shares_of(sigmas_of_batch(flags("mode"), batch_of(ACROSS_STEPS), SHIFT))) + 5e-4
    u = np.linspace(0, 1, 100001)
    density = 1 - u - MODE_SCALE * (np.cos(np.pi * u / 2) ** 2 - 1 + u)  # of uniform u; it falls from 1 to 0
    assert np.all(np.diff(density) <= 0)
    below = 1 - np.interp(drawn, density[::-1], u[::-1])
    assert np.abs(np.sort(below) - np.sort(1 - STRATA)).max() < 5e-3


@pytest.mark.parametrize("scheme", ["logit_normal", "mode"])
def test_runs_of_older_versions_go_on_without_the_density(scheme: str) -> None:
    assert torch.equal(sigmas_of_batch(flags(scheme), batch_of(PER_STEP), SHIFT), draw_sigmas(STRATA, SHIFT))
