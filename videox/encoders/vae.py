"""Serves both train.py scripts: pixels to the VAE's own latents, drawn by key; each family then scales them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from einops import rearrange
from PIL import Image

from videox.device import to_device
from videox.diffusion.flow_matching import batch_noise
from videox.encoders.offload import OffloadedModule
from videox.rng import Purpose, hash_key


def to_video(pixels: torch.Tensor) -> torch.Tensor:
    """Returns float32 [B, 3, T, H, W] in [-1, 1] of uint8 pixels [B, T, H, W, 3], to the bit as diffusers does."""
    return 2 * (rearrange(pixels, "b t h w c -> b c t h w").float() / 255) - 1


@torch.no_grad()
def encode_moments(vae: OffloadedModule, video: torch.Tensor, *, mini_batch: int) -> torch.Tensor:
    """Returns mean and log-variance of the VAE's posterior one after the other, float32 [B, 2 C, t, h, w].

    Args:
        vae: of diffusers, whose encode gives a latent_dist.
        video: float32 [B, 3, T, H, W] in [-1, 1], on the device.
        mini_batch: samples per call.
    """
    with vae.on_device() as module:
        parts = [module.encode(part).latent_dist.parameters for part in video.split(mini_batch)]  # type: ignore[operator]
    return torch.cat(parts).contiguous()


def draw(moments: torch.Tensor, channels: int, keys: Sequence[int] | None) -> torch.Tensor:
    """Returns latents z, float32 [B, C, t, h, w], not yet scaled, of encode_moments, or of its first C channels alone.

    Args:
        moments: [B, 2 C, t, h, w]; without the log-variance only the mode can be taken.
        channels: C.
        keys: one per sample for the posterior's noise; None takes the posterior's mode.
    """
    if keys is None:
        return moments[:, :channels]
    posterior = DiagonalGaussianDistribution(moments)
    drawn = [int(hash_key(key, Purpose.POSTERIOR)) for key in keys]
    return posterior.mean + posterior.std * to_device(batch_noise(drawn, posterior.mean.shape[1:]), moments.device)


def encode(vae: OffloadedModule, video: torch.Tensor, *, keys: Sequence[int] | None, mini_batch: int) -> torch.Tensor:
    """Returns the VAE's latents z, float32 [B, C, t, h, w], not yet scaled; as encode_moments and draw."""
    moments = encode_moments(vae, video, mini_batch=mini_batch)
    return draw(moments, moments.shape[1] // 2, keys)


def to_images(frames: torch.Tensor) -> list[Image.Image]:
    """Returns pictures of frames [B, 3, H, W] in [-1, 1], as image encoders take them."""
    pixels = ((frames + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in pixels]
