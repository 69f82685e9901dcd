"""Tests of videox.diffusion.noise_window: draws of an expert stay in its window of noise and have its density."""

from __future__ import annotations

from argparse import Namespace
from functools import cache

import numpy as np
import pytest
import torch

from videox.data.plan.timesteps import ACROSS_STEPS, place_in_stratum
from videox.diffusion.flow_matching import draw_sigmas, timestep_density
from videox.diffusion.noise_window import WHOLE, NoiseWindow
from videox.training.build import sigmas_of_batch
from videox.training.validation_loss import fixed_sigmas

DRAWS = 10_000
EXPERTS = {
    "high_noise": lambda boundary: NoiseWindow(lowest=boundary),
    "low_noise": lambda boundary: NoiseWindow(end=boundary),
}
SCHEMES = ("none", "logit_normal", "mode", "sigma_sqrt", "cosmap")


def flags(scheme: str, *, uniform: bool, steps: int = 1000) -> Namespace:
    return Namespace(
        weighting_scheme=scheme, uniform_sampling=uniform, logit_mean=0.3, logit_std=1.2, mode_scale=1.29,
        train_sampling_steps=steps,
    )  # fmt: skip


def sigmas(args: Namespace, window: NoiseWindow, shift: float, strata: np.ndarray) -> np.ndarray:
    batch = {"strata": strata, "keys": list(range(len(strata))), "timesteps": ACROSS_STEPS}
    return sigmas_of_batch(args, batch, shift, window).double().numpy()


@pytest.mark.parametrize(("shift", "boundary"), [(3.0, 0.875), (12.0, 0.875), (3.0, 0.9), (1.0, 0.9), (0.5, 0.3)])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("uniform", [True, False], ids=["stratified", "independent"])
@pytest.mark.parametrize("expert", EXPERTS)
def test_draws_are_the_ones_of_the_whole_range_that_lie_in_the_window(
    expert: str, uniform: bool, scheme: str, shift: float, boundary: float
) -> None:
    """Truncation keeps the shape of a density: it is that of the draws of one model that happen to lie there."""
    window, args = EXPERTS[expert](boundary), flags(scheme, uniform=uniform)
    strata = (np.arange(DRAWS) + place_in_stratum(1, 0)) / DRAWS
    found = sigmas(args, window, shift, strata)
    least = boundary - 1e-7  # the boundary itself, rounded to float32, belongs to high noise
    inside = (found >= least) if expert == "high_noise" else (found < least)
    assert inside.all() and len(found) == DRAWS
    density = (scheme, args.logit_mean, args.logit_std, args.mode_scale)
    fine = draw_sigmas(timestep_density((np.arange(400_000) + 0.5) / 400_000, *density), shift).double().numpy()
    expected = fine[(fine >= least) if expert == "high_noise" else (fine < least)]
    quantiles = np.linspace(0.01, 0.99, 50)
    levels = np.quantile(expected, quantiles)
    distance = np.abs(np.searchsorted(np.sort(found), levels, side="right") / DRAWS
                      - np.searchsorted(np.sort(expected), levels, side="right") / len(expected)).max()  # fmt: skip
    # The largest distance between the two distribution functions: at most the mass of a timestep, and for independent
    # draws 1.95 / sqrt(n), which is exceeded with a probability of 0.1 %.
    heaviest = np.unique(expected, return_counts=True)[1].max() / len(expected)
    assert distance < 1.5 * heaviest + (0 if uniform else 1.95 / DRAWS**0.5)


@cache
def shares_of_timesteps(scheme: str) -> np.ndarray:
    """Return the share of each of the 1000 timesteps in the draws of one model, noisiest first; float64 [1000].

    From the density alone: the distribution function of the logistic-normal law, and for the others a fine grid.
    """
    args, edges = flags(scheme, uniform=True), np.arange(1001) / 1000
    if args.weighting_scheme == "logit_normal":
        inner = torch.special.logit(torch.from_numpy(edges[1:-1]))
        below = torch.special.ndtr((inner - args.logit_mean) / args.logit_std).numpy()
        return np.diff(np.concatenate([[0], below, [1]]))
    u = (np.arange(2_000_000) + 0.5) / 2_000_000
    if args.weighting_scheme == "mode":
        u = 1 - u - args.mode_scale * (np.cos(np.pi * u / 2) ** 2 - 1 + u)
    return np.histogram(u, edges)[0] / len(u)


def timesteps_of(t: np.ndarray, shift: float) -> np.ndarray:
    """Return which of the 1000 timesteps, noisiest first, have these sigmas; int64."""
    return np.rint(1000 * (1 - t / (shift - (shift - 1) * t))).astype(int)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("expert", EXPERTS)
def test_stratified_draws_cover_the_window_evenly(expert: str, scheme: str) -> None:
    """Each timestep of the window gets its share of 10,000 draws, within a draw; no other timestep gets one."""
    window, shift, args = EXPERTS[expert](0.875), 3.0, flags(scheme, uniform=True)
    steps = window.steps(shift)
    shares = shares_of_timesteps(scheme)[steps.start : steps.stop]
    strata = (np.arange(DRAWS) + place_in_stratum(3, 0)) / DRAWS
    seen = timesteps_of(sigmas(args, window, shift, strata), shift)
    assert set(seen) <= set(steps)
    counts = np.bincount(seen - steps.start, minlength=len(steps))
    assert np.abs(counts - DRAWS * shares / shares.sum()).max() < 1.1


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("expert", EXPERTS)
def test_every_stratum_of_the_window_is_drawn_once_per_step(expert: str, scheme: str) -> None:
    window, shift, samples, args = EXPERTS[expert](0.875), 3.0, 8, flags(scheme, uniform=True)
    steps = window.steps(shift)
    shares = shares_of_timesteps(scheme)[steps.start : steps.stop]
    upper = np.cumsum(shares) / shares.sum()  # of the truncated density, its distribution function
    lower = np.concatenate([[0], upper[:-1]])
    middles = []
    for step in range(200):
        strata = (np.arange(samples) + place_in_stratum(7, step)) / samples
        place = timesteps_of(sigmas(args, window, shift, strata), shift) - steps.start
        # Each timestep reaches into its own stratum; those of the mode density are in the opposite order.
        own = np.arange(samples)[:: -1 if scheme == "mode" else 1]
        assert (lower[place] < (own + 1) / samples + 1e-6).all() and (upper[place] > own / samples - 1e-6).all()
        middles.append((lower[place] + upper[place]) / 2 * samples % 1)
    # The place in the strata moves from step to step and covers them evenly, within the width of a timestep.
    places, widest = np.sort(np.concatenate(middles)), samples * shares.max() / shares.sum()
    assert np.abs(places - (np.arange(len(places)) + 0.5) / len(places)).max() < 0.05 + widest


@pytest.mark.parametrize("expert", EXPERTS)
def test_fewer_trained_timesteps_leave_the_noisiest_part_of_the_window(expert: str) -> None:
    window, shift, count = EXPERTS[expert](0.875), 3.0, 800
    steps = window.steps(shift, count)
    assert 0 < len(steps) <= len(window.steps(shift)) and steps.stop <= count
    strata = (np.arange(DRAWS) + place_in_stratum(3, 0)) / DRAWS
    seen = timesteps_of(sigmas(flags("none", uniform=True, steps=count), window, shift, strata), shift)
    counts = np.bincount(seen, minlength=count)
    assert np.flatnonzero(counts).tolist() == list(steps)
    assert np.abs(counts[steps.start : steps.stop] - DRAWS / len(steps)).max() < 1.1


def test_the_two_windows_share_the_timesteps_between_them() -> None:
    for shift in (0.5, 1.0, 3.0, 5.0, 12.0):
        for boundary in (0.875, 0.9):
            high, low = (EXPERTS[name](boundary).steps(shift) for name in EXPERTS)
            assert [*high, *low] == list(range(1000))
            t = 1000 * draw_sigmas((np.array([*high]) + 0.5) / 1000, shift).double()
            assert bool((t >= 1000 * boundary - 1e-3).all())  # as the pipeline decides, on timesteps
    assert WHOLE.steps(3.0) == range(1000)
    assert NoiseWindow(end=0.3).steps(3.0, 100) == range(0)  # of the noisiest tenth, none has little noise


def test_the_whole_window_changes_no_draw() -> None:
    strata = (np.arange(64) + 0.3) / 64
    for scheme in SCHEMES:
        args = flags(scheme, uniform=True)
        density = timestep_density(strata, scheme, args.logit_mean, args.logit_std, args.mode_scale)
        found = sigmas_of_batch(args, {"strata": strata, "keys": [0] * 64, "timesteps": ACROSS_STEPS}, 3.0)
        assert torch.equal(found, draw_sigmas(density, 3.0))


@pytest.mark.parametrize("expert", EXPERTS)
def test_held_out_sigmas_are_the_middles_of_shares_of_the_window(expert: str) -> None:
    window = EXPERTS[expert](0.9)
    found = np.array(fixed_sigmas(4, 5.0, window))
    assert ((found >= window.lowest) & (found < window.end)).all() and (np.diff(found) > 0).all()
    times = found / (5.0 - 4.0 * found)
    lowest, highest = window.times(5.0)
    assert np.allclose(times, lowest + (highest - lowest) * np.array([0.125, 0.375, 0.625, 0.875]))
