"""VAE encoding: pixels to posterior moments, and latents drawn from them by each sample's key; not yet scaled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

from videox.device import to_device
from videox.diffusion.flow_matching import batch_noise
from videox.encoders.encode import EncoderInput, LazyEncoders
from videox.encoders.offload import OffloadedModule
from videox.errors import MODEL, UserError
from videox.rng import Purpose, hash_key

# Values of --vae_dtype: what the VAE's weights are loaded in, and what it computes in.
VAE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@torch.no_grad()
def encode_moments(vae: OffloadedModule, video: torch.Tensor, *, mini_batch: int) -> torch.Tensor:
    """Return the mean and log-variance of the VAE's posterior, concatenated: float32 [B, 2 C, t, h, w].

    Args:
        vae: a VAE of diffusers, whose encode returns an object with a latent_dist; it computes in its weights' dtype.
        video: float32 [B, 3, T, H, W] in [-1, 1], on the device.
        mini_batch: samples per call of the VAE.
    """
    with vae.on_device() as module:
        dtype = next(module.parameters()).dtype
        moments = [
            module.encode(chunk.to(dtype)).latent_dist.parameters  # type: ignore[operator]
            for chunk in video.split(mini_batch)
        ]
    return torch.cat(moments).float().contiguous()


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


def to_images(frames: torch.Tensor) -> list[Image.Image]:
    """Return PIL images of frames [B, 3, H, W] in [-1, 1], the input of image encoders."""
    pixels = ((frames + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in pixels]


def clip_moments(
    encoders: LazyEncoders[Any], mini_batch: int, inputs: EncoderInput, frames: int | None = None
) -> torch.Tensor:
    """Return the moments of the posterior of clips, float32 [n, 2C, t, h, w]; as EncodingSpec.encode.

    Args:
        encoders: of the family, with the VAE as `vae`; loaded on first use.
        mini_batch: as in encode_moments.
        inputs: of the samples.
        frames: encode these first frames alone; None encodes all.
    """
    return encode_moments(encoders().vae, inputs.video[:, :, :frames], mini_batch=mini_batch)


def use_tiling(vae: Any, tiled: bool) -> None:  # noqa: ANN401 - of diffusers
    """Let a VAE encode and decode in overlapping tiles where asked: less memory, and slightly other values."""
    if tiled:
        vae.enable_tiling()


def latent_statistics(config: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ANN401 - of diffusers
    """Return mean and standard deviation of latents per channel, [1, C, 1, 1, 1], from the VAE's configuration.

    Raises:
        UserError: (MODEL) they are not one number for each channel, or a deviation is not above 0.
    """
    for key, values in (("latents_mean", config.latents_mean), ("latents_std", config.latents_std)):
        if len(values) != config.z_dim or (key == "latents_std" and min(values) <= 0):
            what = f"{key} is not {config.z_dim} numbers{' above 0' if key == 'latents_std' else ''}"
            raise UserError("vae/config.json", what, "download the model again", MODEL)
    mean, std = (
        torch.tensor(values, device=device).view(1, -1, 1, 1, 1)
        for values in (config.latents_mean, config.latents_std)
    )
    return mean, std
