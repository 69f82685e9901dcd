"""Flow matching: sigmas, noise, target and loss as functions of tensors and keys.

x_t = (1 - sigma) x_0 + sigma noise, target = noise - x_0 (rectified flow: Liu et al., arXiv:2209.03003; Lipman et al.,
arXiv:2210.02747). The shift of sigma is equation 23 of Esser et al., arXiv:2403.03206; the densities are from its
section 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from videox.diffusion.schemes import NUM_TRAIN_TIMESTEPS


def keyed_noise(key: int, shape: Sequence[int]) -> torch.Tensor:
    """Return standard normal noise, float32 on the CPU: a function of the 64-bit key, the same for every device."""
    generator = np.random.Generator(np.random.Philox(key=int(key)))
    return torch.from_numpy(generator.standard_normal(tuple(shape), dtype=np.float32))


def batch_noise(keys: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """Return [B, *shape] float32 noise, one key per sample."""
    return torch.stack([keyed_noise(key, shape) for key in keys])


def timestep_density(
    draw: np.ndarray, scheme: str, logit_mean: float, logit_std: float, mode_scale: float
) -> np.ndarray:
    """Map uniform draws in (0, 1) to draws from the scheme's density over (0, 1), by its inverse CDF where it has one.

    Args:
        draw: float64 [B].
        scheme: "logit_normal" (sigmoid of a normal with logit_mean and logit_std) | "mode" (heavy tails, mode_scale) |
            any other weighting scheme, which leaves the draws uniform.
        logit_mean, logit_std, mode_scale: parameters of the two densities.
    """
    u = torch.from_numpy(np.asarray(draw, np.float64))
    if scheme == "logit_normal":
        u = torch.sigmoid(logit_mean + logit_std * torch.special.ndtri(u))
    elif scheme == "mode":
        u = 1 - u - mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
    return u.numpy()


Density = tuple[str, float, float, float]  # scheme, logit_mean, logit_std and mode_scale of timestep_density


def draws_in_window(
    draw: np.ndarray, density: Density, steps: range, train_sampling_steps: int = NUM_TRAIN_TIMESTEPS
) -> np.ndarray:
    """Return draws in (0, 1) that timestep_density maps into a window: its density, truncated to the window.

    For an inverse CDF G, uniform draws u and a window [a, b), G(F(a) + u (F(b) - F(a))) has the density of G divided
    by its mass in the window, with F the inverse of G. The map of u is linear: stratified draws stay stratified.

    Args:
        draw: float64 [B], uniform in (0, 1).
        density: that is applied afterwards.
        steps: of the window, from NoiseWindow.steps; not empty.
        train_sampling_steps: as for draw_sigmas.
    """
    first, last = _window_edges(density, steps.start, steps.stop, train_sampling_steps)
    return first + np.asarray(draw, np.float64) * (last - first)


@lru_cache
def _window_edges(density: Density, start: int, stop: int, train_sampling_steps: int) -> tuple[float, float]:
    """Return the draws that the density maps to the ends of a window, the smaller one first."""
    places = start / train_sampling_steps, stop / train_sampling_steps
    if density[0] not in ("logit_normal", "mode"):
        return places  # the draws are left uniform
    first, last = sorted(_draw_of(place, density) for place in places)
    return first, last


def _draw_of(place: float, density: Density) -> float:
    """Return the draw that timestep_density, which is monotonic, maps to a place in [0, 1], by bisection."""
    rising = density[0] == "logit_normal"  # the mode density falls from 1 to 0
    if place in (0.0, 1.0):
        return place if rising else 1 - place
    low, high = 0.0, 1.0
    for _ in range(60):  # halvings; float64 has 53 bits
        middle = (low + high) / 2
        below = float(timestep_density(np.array([middle]), *density)[0]) < place
        low, high = (middle, high) if below == rising else (low, middle)
    return (low + high) / 2


def draw_sigmas(
    draw: np.ndarray, shift: float, train_sampling_steps: int = NUM_TRAIN_TIMESTEPS, steps: range | None = None
) -> torch.Tensor:
    """Return sigmas in (0, 1], float32 [B], from draws in (0, 1).

    The draw selects one of the first train_sampling_steps of the 1000 training timesteps t = 1, 0.999, ... 0.001,
    noisiest first (with fewer than 1000 steps, only the noisiest part is trained); sigma = shift t / (1 + (shift - 1)
    t). With `steps`, draws beyond them, by rounding, select the nearest of these.
    """
    chosen = range(train_sampling_steps) if steps is None else steps
    index = np.clip(np.floor(np.asarray(draw, np.float64) * train_sampling_steps), chosen.start, chosen.stop - 1)
    return shifted(torch.from_numpy((NUM_TRAIN_TIMESTEPS - index) / NUM_TRAIN_TIMESTEPS), shift).float()


def shifted(t: torch.Tensor, shift: float) -> torch.Tensor:
    """Return sigma = shift t / (1 + (shift - 1) t), elementwise, for t in [0, 1]."""
    return shift * t / (1 + (shift - 1) * t)


def add_noise(latents: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Return x_t, float32 [B, C, T, H, W], for float32 latents and noise and sigmas [B]."""
    sigma = sigmas.view(-1, *[1] * (latents.dim() - 1))
    return (1 - sigma) * latents + sigma * noise


def loss_weights(sigmas: torch.Tensor, scheme: str) -> torch.Tensor:
    """Return each sample's loss weight, float32 [B]: sigma^-2, 2 / (pi (1 - 2 sigma + 2 sigma^2)), or 1."""
    if scheme == "sigma_sqrt":
        return sigmas**-2.0
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2))
    return torch.ones_like(sigmas)


def velocity_losses(
    prediction: torch.Tensor, target: torch.Tensor, weights: torch.Tensor, generated: torch.Tensor | None = None
) -> torch.Tensor:
    """Return each sample's weighted mean squared error over its latent elements: float32 [B].

    Args:
        prediction, target: [B, C, T, H, W]. If leading frames are given to the model in all samples, the caller
            removes them.
        weights: float32 [B].
        generated: float32 [B, 1, T, 1, 1], 0 for latent frames that a sample is given, which are left out of its
            mean; None = no sample is given one.
    """
    errors = (prediction.float() - target.float()).square()
    if generated is None:
        return errors.flatten(1).mean(1) * weights
    return _mean_of_frames(errors, generated) * weights


def _mean_of_frames(errors: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Return the mean over the chosen latent frames of each sample, float32 [B]; 0 where none is chosen.

    Args:
        errors: float32 [B, C, T, H, W].
        chosen: float32 [B, 1, T, 1, 1], 1 or 0.
    """
    shares = (chosen / chosen.sum(2, keepdim=True).clamp(min=1)).flatten(1)
    return (errors.mean((1, 3, 4)) * shares).sum(1)


def motion_losses(
    prediction: torch.Tensor, target: torch.Tensor, losses: torch.Tensor, ratio: float,
    generated: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Mix the error of the change from each latent frame to the next into the losses: float32 [B].

    losses (1 - ratio) + ratio * mean squared error of the differences of neighbouring frames, unweighted. Clips of at
    most two latent frames are left as they are, because their single difference contains little about motion.

    Args:
        prediction, target: [B, C, T, H, W].
        losses: float32 [B], as returned by velocity_losses.
        ratio: share of the motion term, 0 to 1.
        generated: as for velocity_losses.
    """
    if prediction.shape[2] <= 2:
        return losses
    change, target_change = prediction.float().diff(dim=2), target.float().diff(dim=2)
    errors = (change - target_change).square()
    if generated is None:
        return (1 - ratio) * losses + ratio * errors.flatten(1).mean(1)
    both = generated[:, :, 1:] * generated[:, :, :-1]
    mixed = (1 - ratio) * losses + ratio * _mean_of_frames(errors, both)
    return torch.where(both.sum((1, 2, 3, 4)) > 1, mixed, losses)
