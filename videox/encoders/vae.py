"""VAE encoding: pixels to posterior moments, and latents drawn from them by each sample's key; not yet scaled."""

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
    """Return float32 [B, 3, T, H, W] in [-1, 1] of uint8 pixels [B, T, H, W, 3], bitwise equal to diffusers'."""
    return 2 * (rearrange(pixels, "b t h w c -> b c t h w").float() / 255) - 1


@torch.no_grad()
def encode_moments(vae: OffloadedModule, video: torch.Tensor, *, mini_batch: int) -> torch.Tensor:
    """Return the mean and log-variance of the VAE's posterior, concatenated: float32 [B, 2 C, t, h, w].

    Args:
        vae: a VAE of diffusers, whose encode returns an object with a latent_dist.
        video: float32 [B, 3, T, H, W] in [-1, 1], on the device.
        mini_batch: samples per call of the VAE.
    """
    with vae.on_device() as module:
        moments = [module.encode(chunk).latent_dist.parameters for chunk in video.split(mini_batch)]  # type: ignore[operator]
    return torch.cat(moments).contiguous()


def sample_latents(moments: torch.Tensor, channels: int, keys: Sequence[int] | None) -> torch.Tensor:
    """Return latents z, float32 [B, C, t, h, w], not yet scaled, from the result of encode_moments.

    Args:
        moments: [B, 2 C, t, h, w], or [B, C, t, h, w] without the log-variance if only the mode is needed.
        channels: C.
        keys: one key per sample for the posterior's noise; None returns the posterior's mode.
    """
    if keys is None:
        return moments[:, :channels]
    posterior = DiagonalGaussianDistribution(moments)
    noise_keys = [int(hash_key(key, Purpose.POSTERIOR)) for key in keys]
    noise = batch_noise(noise_keys, posterior.mean.shape[1:])
    return posterior.mean + posterior.std * to_device(noise, moments.device)


def encode_latents(vae: OffloadedModule, video: torch.Tensor, *, keys: Sequence[int] | None, mini_batch: int) -> torch.Tensor:
    """Return the VAE's latents z, float32 [B, C, t, h, w], not yet scaled; see encode_moments and sample_latents."""
    moments = encode_moments(vae, video, mini_batch=mini_batch)
    return sample_latents(moments, moments.shape[1] // 2, keys)


def to_images(frames: torch.Tensor) -> list[Image.Image]:
    """Return PIL images of frames [B, 3, H, W] in [-1, 1], the input of image encoders."""
    pixels = ((frames + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in pixels]
