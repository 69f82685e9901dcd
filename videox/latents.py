"""Serves both train.py scripts: pixels to the VAE's own latents, drawn by key; each family then scales them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange

from videox.flow_matching import batch_noise
from videox.keys import Purpose, mix
from videox.offload import RestingModule


def to_video(pixels: torch.Tensor) -> torch.Tensor:
    """Returns float32 [B, 3, T, H, W] in [-1, 1] of uint8 pixels [B, T, H, W, 3], to the bit as diffusers does."""
    return 2 * (rearrange(pixels, "b t h w c -> b c t h w").float() / 255) - 1


@torch.no_grad()
def encode(vae: RestingModule, video: torch.Tensor, *, keys: Sequence[int] | None, mini_batch: int) -> torch.Tensor:
    """Returns the VAE's latents z, float32 [B, C, t, h, w], not yet scaled.

    Args:
        vae: of diffusers, whose encode gives a latent_dist.
        video: float32 [B, 3, T, H, W] in [-1, 1], on the device.
        keys: one per sample for the posterior's noise; None takes the posterior's mode.
        mini_batch: samples per call.
    """
    latents = []
    with vae.awake() as module:
        for first in range(0, len(video), mini_batch):
            posterior = module.encode(video[first : first + mini_batch]).latent_dist  # type: ignore[operator]
            z = posterior.mode()
            if keys is not None:
                part = [int(mix(key, Purpose.POSTERIOR)) for key in keys[first : first + mini_batch]]
                z = posterior.mean + posterior.std * batch_noise(part, z.shape[1:]).to(z.device)
            latents.append(z)
    return torch.cat(latents)
