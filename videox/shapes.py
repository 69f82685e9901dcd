"""Frames, latents and tokens: the rules that convert one into another. Integers only, imports no torch."""

from __future__ import annotations

from typing import Any, NamedTuple

TEMPORAL_RATIO = 4  # frames per latent frame after the first, in the VAEs of both families
SPATIAL_RATIO = 8  # pixels per latent pixel along each side, in the VAEs of both families
PATCH = 2  # latent pixels per token along each side, in both transformers
GRID = SPATIAL_RATIO * PATCH  # pixels; the sides of every bucket are multiples of this


class Bucket(NamedTuple):
    """The shape that all samples of a micro-batch share: frames (4k+1), height, width (multiples of 16) in pixels."""

    frames: int
    height: int
    width: int


def snap_frames(frames: int) -> int:
    """Return the largest 4k+1 up to `frames` (at least 1): the lengths that causal VAEs encode without rest."""
    return max(0, (frames - 1) // TEMPORAL_RATIO) * TEMPORAL_RATIO + 1


def frames_that_fit(length: Any, stride: int) -> Any:  # noqa: ANN401 - a number or an array
    """Return how many frames, `stride` apart, a video of `length` frames has (0 for none); also for arrays."""
    return (length - 1) // stride + 1


def token_limited_frames(n_frames: int, token_sample_size: int, size: int) -> int:
    """Return the frames (4k+1, at least 1) that a size x size clip may have within the budget of a nominal clip.

    The budget is n_frames * token_sample_size^2 pixels, so that 4 * floor((min(budget / size^2, n_frames) - 1) / 4) +
    1 frames fit; computed in integers, because a float quotient can be just below a whole frame.
    """
    quotient = (n_frames * token_sample_size**2 - size**2) // (TEMPORAL_RATIO * size**2)
    return max(0, min(quotient, (n_frames - 1) // TEMPORAL_RATIO)) * TEMPORAL_RATIO + 1


def latent_shape(bucket: Bucket) -> tuple[int, int, int]:
    """Return (latent frames, latent height, latent width) of a bucket."""
    return (
        (bucket.frames - 1) // TEMPORAL_RATIO + 1,
        bucket.height // SPATIAL_RATIO,
        bucket.width // SPATIAL_RATIO,
    )


def token_count(bucket: Bucket) -> int:
    """Return the transformer's sequence length for one sample of a bucket (text tokens not counted)."""
    frames, height, width = latent_shape(bucket)
    return frames * (height // PATCH) * (width // PATCH)
