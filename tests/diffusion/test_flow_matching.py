"""Tests of videox.diffusion.flow_matching: formulas against plain recomputation, densities against samplers."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from hypothesis import given
from hypothesis import strategies as st

from videox.diffusion.flow_matching import (
    add_noise,
    batch_noise,
    draw_sigmas,
    keyed_noise,
    loss_weights,
    motion_losses,
    shifted,
    timestep_density,
    velocity_losses,
)
from videox.diffusion.schemes import NUM_TRAIN_TIMESTEPS, WEIGHTING_SCHEMES
from videox.rng import hash_key, uniform

SHAPE = (16, 3, 4, 6)
KEYS = st.integers(0, 2**64 - 1)
DRAWS = uniform(42, np.arange(100_000))


def random_tensor(*shape: int, key: int) -> torch.Tensor:
    return keyed_noise(key, shape)


# --------------------------------------------------------------------------------------------------------- noise


@given(KEYS)
def test_noise_is_a_function_of_its_key(key: int) -> None:
    one, again = keyed_noise(key, SHAPE), keyed_noise(np.uint64(key), torch.Size(SHAPE))
    assert one.dtype == torch.float32
    assert one.device.type == "cpu"
    assert torch.equal(one, again)
    assert not torch.equal(one, keyed_noise((key + 1) % 2**64, SHAPE))


def test_noise_never_changes() -> None:
    """A resumed run must draw the same noise as the first one, even with another version of numpy."""
    first = keyed_noise(42, (4,)).tolist()
    assert first == [0.18170474469661713, -1.2426393032073975, -0.5515530109405518, 0.3664800226688385]


@given(st.lists(KEYS, min_size=1, max_size=6, unique=True), st.randoms())
def test_noise_does_not_depend_on_the_batch(keys: list[int], chance) -> None:
    order = chance.sample(range(len(keys)), len(keys))
    together, shuffled = batch_noise(keys, SHAPE), batch_noise([keys[i] for i in order], SHAPE)
    assert together.shape == (len(keys), *SHAPE)
    assert torch.equal(together[order], shuffled)
    assert torch.equal(together[0], keyed_noise(keys[0], SHAPE))


def test_noise_leaves_global_generators_alone() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002 - the state that must not move
    keyed_noise(7, SHAPE)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


def test_noise_is_standard_normal_and_independent_between_keys() -> None:
    noise = batch_noise([int(key) for key in hash_key(42, np.arange(50))], (16, 5, 16, 16)).flatten(1).double()
    count = noise.shape[1]
    assert abs(noise.mean()) < 5 / math.sqrt(noise.numel())
    assert abs(noise.var() - 1) < 5 * math.sqrt(2 / noise.numel())
    assert abs((noise**4).mean() - 3) < 5 * math.sqrt(96 / noise.numel())
    correlation = torch.corrcoef(noise) - torch.eye(50)
    assert correlation.abs().max() < 5 / math.sqrt(count)
    ordered = noise[0].sort().values
    ideal = torch.tensor([NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)])
    assert (torch.special.ndtr(ordered) - torch.special.ndtr(ideal)).abs().max() * math.sqrt(count) < 2.2


# -------------------------------------------------------------------------------------------------------- sigmas


@given(st.floats(0, 1), st.floats(0.1, 20))
def test_shift_is_the_published_formula(t: float, shift: float) -> None:
    sigma = float(shifted(torch.tensor(t, dtype=torch.float64), shift))
    assert math.isclose(sigma, shift * t / (1 + (shift - 1) * t), rel_tol=1e-12)
    assert 0 <= sigma <= 1 + 1e-15
    assert (shift >= 1) == (sigma >= t) or math.isclose(sigma, t, abs_tol=1e-9)


@pytest.mark.parametrize(("shift", "median"), [(1.0, 0.5), (3.0, 0.75), (5.0, 5 / 6), (7.0, 0.875)])
def test_median_sigma_of_the_families_shifts(shift: float, median: float) -> None:
    assert float(shifted(torch.tensor(0.5, dtype=torch.float64), shift)) == pytest.approx(median)
    assert float(draw_sigmas(DRAWS, shift).median()) == pytest.approx(median, abs=0.005)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 7.0])
def test_sigmas_equal_those_of_the_scheduler(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    every = draw_sigmas((np.arange(1000) + 0.5) / 1000, shift)
    assert every.dtype == torch.float32
    torch.testing.assert_close(every, scheduler.sigmas[:1000], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(1000 * every, scheduler.timesteps, atol=1e-3, rtol=1e-6)
    assert every[0] == 1
    assert torch.all(every.diff() < 0)


@given(st.integers(1, 1000), st.integers(0, 999), st.floats(0.001, 0.999), st.floats(0.5, 10))
def test_a_draw_selects_its_timestep(steps: int, index: int, within: float, shift: float) -> None:
    index %= steps
    sigma = float(draw_sigmas(np.array([(index + within) / steps]), shift, steps)[0])
    t = (NUM_TRAIN_TIMESTEPS - index) / NUM_TRAIN_TIMESTEPS
    assert sigma == pytest.approx(shift * t / (1 + (shift - 1) * t), rel=1e-6)


def test_fewer_steps_train_the_noisiest_part() -> None:
    sigmas = draw_sigmas(DRAWS, 1.0, 250)
    assert len(torch.unique(sigmas)) == 250
    assert float(sigmas.max()) == 1
    assert float(sigmas.min()) == pytest.approx(0.751)


def test_uniform_draws_reach_every_timestep_equally() -> None:
    counts = np.unique(draw_sigmas(DRAWS, 5.0).numpy(), return_counts=True)[1]
    assert len(counts) == 1000
    assert (((counts - 100) ** 2 / 100).sum() - 999) / math.sqrt(2 * 999) < 5


@pytest.mark.parametrize("draw", [0.0, 2.0**-54, 1 - 2.0**-53, 1.0])
def test_extreme_draws_stay_in_range(draw: float) -> None:
    for steps in (1, 250, 1000):
        assert 0 < float(draw_sigmas(np.array([draw]), 5.0, steps)[0]) <= 1


# ----------------------------------------------------------------------------------------------------- densities


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.8), (1.0, 2.0)])
def test_logit_normal_has_the_samplers_quantiles(mean: float, std: float) -> None:
    found = timestep_density(DRAWS, "logit_normal", mean, std, 1.29)
    sampled = compute_density_for_timestep_sampling(
        "logit_normal", 100_000, mean, std, device="cpu", generator=torch.Generator().manual_seed(7)
    ).numpy()
    levels = np.linspace(0.05, 0.95, 19)
    assert np.abs(np.quantile(found, levels) - np.quantile(sampled, levels)).max() < 0.015
    middle = timestep_density(np.array([0.5]), "logit_normal", mean, std, 1.29)[0]
    assert middle == pytest.approx(1 / (1 + math.exp(-mean)))
    quarter = timestep_density(np.array([0.25]), "logit_normal", mean, std, 1.29)[0]
    assert quarter == pytest.approx(1 / (1 + math.exp(-NormalDist(mean, std).inv_cdf(0.25))))


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.81, 1.29, 1.75])
def test_mode_equals_diffusers_and_stays_in_its_interval(scale: float) -> None:
    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(7)

    wanted = compute_density_for_timestep_sampling("mode", 1000, mode_scale=scale, device="cpu", generator=generator())
    same_draws = torch.rand(1000, generator=generator()).double().numpy()
    assert np.abs(timestep_density(same_draws, "mode", 0.0, 1.0, scale) - wanted.numpy()).max() < 1e-6
    found = timestep_density(np.linspace(0, 1, 10_001), "mode", 0.0, 1.0, scale)
    assert np.all(np.diff(found) <= 1e-12)  # one to one: a density, noisiest first
    assert found[0] == pytest.approx(1)
    assert found[-1] == pytest.approx(0)


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "cosmap"])
def test_other_schemes_leave_draws_uniform(scheme: str) -> None:
    assert np.array_equal(timestep_density(DRAWS, scheme, 0.0, 1.0, 1.29), DRAWS)


def test_logit_normal_is_finite_at_extreme_draws() -> None:
    ends = timestep_density(np.array([2.0**-54, 1 - 2.0**-53]), "logit_normal", 0.0, 20.0, 1.29)
    assert np.all(np.isfinite(ends))
    assert np.all(torch.isfinite(draw_sigmas(ends, 5.0)).numpy())


# -------------------------------------------------------------------------------------------- noising and losses


@given(KEYS, st.lists(st.floats(0, 1, width=32), min_size=1, max_size=4))
def test_noising_and_target_are_rectified_flow(key: int, levels: list[float]) -> None:
    sigmas = torch.tensor(levels)
    latents, noise = (random_tensor(len(levels), *SHAPE, key=(key + i) % 2**64) for i in range(2))
    noisy, target = add_noise(latents, noise, sigmas), noise - latents
    assert noisy.dtype == torch.float32
    for i, sigma in enumerate(levels):
        torch.testing.assert_close(noisy[i], (1 - sigma) * latents[i] + sigma * noise[i])
        torch.testing.assert_close(noisy[i] - sigma * target[i], latents[i], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(noisy[i] + (1 - sigma) * target[i], noise[i], atol=1e-5, rtol=1e-5)


def test_noising_is_exact_at_sigma_0_and_1() -> None:
    latents, noise = random_tensor(2, *SHAPE, key=1), random_tensor(2, *SHAPE, key=2)
    noisy = add_noise(latents, noise, torch.tensor([0.0, 1.0]))
    assert torch.equal(noisy[0], latents[0])
    assert torch.equal(noisy[1], noise[1])


@pytest.mark.parametrize("scheme", WEIGHTING_SCHEMES)
def test_loss_weights_equal_those_of_diffusers(scheme: str) -> None:
    sigmas = draw_sigmas(DRAWS[:1000], 5.0)
    weights = loss_weights(sigmas, scheme)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, compute_loss_weighting_for_sd3(scheme, sigmas))


@given(KEYS, st.integers(1, 4))
def test_velocity_losses_equal_torchs_mean_squared_error(key: int, count: int) -> None:
    prediction, target = (random_tensor(count, *SHAPE, key=(key + i) % 2**64) for i in range(2))
    weights = torch.arange(1, count + 1).float()
    losses = velocity_losses(prediction, target, weights)
    assert losses.shape == (count,)
    for i in range(count):
        wanted = torch.nn.functional.mse_loss(prediction[i], target[i]) * weights[i]
        torch.testing.assert_close(losses[i], wanted)


def test_losses_of_a_bfloat16_prediction_are_float32() -> None:
    prediction = random_tensor(2, *SHAPE, key=1).bfloat16()
    target = random_tensor(2, *SHAPE, key=2)
    losses = velocity_losses(prediction, target, torch.ones(2))
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.mean(), torch.nn.functional.mse_loss(prediction.float(), target))
    assert motion_losses(prediction, target, losses, 0.25).dtype == torch.float32


def test_every_latent_frame_is_trained() -> None:
    prediction = random_tensor(1, *SHAPE, key=1).requires_grad_()
    velocity_losses(prediction, random_tensor(1, *SHAPE, key=2), torch.ones(1)).sum().backward()
    assert torch.all(prediction.grad.abs().amax(dim=(0, 1, 3, 4)) > 0)


@given(KEYS, st.integers(3, 6), st.floats(0, 1))
def test_motion_losses_mix_in_the_change_between_frames(key: int, frames: int, ratio: float) -> None:
    prediction, target = (random_tensor(2, 4, frames, 3, 5, key=(key + i) % 2**64) for i in range(2))
    losses = torch.tensor([0.3, 7.0])
    found = motion_losses(prediction, target, losses, ratio)
    for i in range(2):
        change, wanted = (x[i, :, 1:] - x[i, :, :-1] for x in (prediction, target))
        motion = torch.nn.functional.mse_loss(change, wanted)
        torch.testing.assert_close(found[i], (1 - ratio) * losses[i] + ratio * motion)


@pytest.mark.parametrize("frames", [1, 2])
def test_motion_losses_leave_short_clips_alone(frames: int) -> None:
    prediction, target = (random_tensor(2, 4, frames, 3, 5, key=key) for key in (1, 2))
    losses = torch.tensor([0.3, 7.0])
    assert torch.equal(motion_losses(prediction, target, losses, 0.5), losses)


def test_a_constant_offset_has_no_motion_loss() -> None:
    target = random_tensor(1, 4, 5, 3, 5, key=1)
    losses = velocity_losses(target + 3, target, torch.ones(1))
    torch.testing.assert_close(motion_losses(target + 3, target, losses, 1.0), torch.zeros(1), atol=1e-10, rtol=0)
    torch.testing.assert_close(losses, torch.full((1,), 9.0))
