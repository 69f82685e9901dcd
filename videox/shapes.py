"""Frames, latents and tokens: the rules that convert one into another. Integers only, imports no torch."""

from __future__ import annotations

from typing import Any, NamedTuple


class Ratios(NamedTuple):
    """How many pixels and frames of a clip become one latent and one token of a model.

    Attributes:
        temporal: frames per latent frame after the first, in the VAE.
        spatial: pixels per latent pixel along each side, in the VAE.
        patch: latent pixels per token along each side, in the transformer.
    """

    temporal: int = 4
    spatial: int = 8
    patch: int = 2

    @property
    def grid(self) -> int:
        """Pixels per token along each side; the sides of every bucket are multiples of it."""
        return self.spatial * self.patch


USUAL = Ratios()  # of Wan2.1, Wan2.2 A14B and HunyuanVideo


class Bucket(NamedTuple):
    """The shape that all samples of a micro-batch share: frames, height and width in pixels.

    With the usual ratios 4k+1 frames and sides in multiples of 16.
    """

    frames: int
    height: int
    width: int


def snap_frames(frames: int, ratios: Ratios = USUAL) -> int:
    """Return the largest 4k+1 up to `frames` (at least 1): the lengths that causal VAEs encode without rest."""
    return max(0, (frames - 1) // ratios.temporal) * ratios.temporal + 1


def frames_that_fit(length: Any, stride: int) -> Any:  # noqa: ANN401 - a number or an array
    """Return how many frames, `stride` apart, a video of `length` frames has (0 for none); also for arrays."""
    return (length - 1) // stride + 1


def token_limited_frames(n_frames: int, token_sample_size: int, size: int, ratios: Ratios = USUAL) -> int:
    """Return the frames (4k+1, at least 1) that a size x size clip may have within the budget of a nominal clip.

    The budget is n_frames * token_sample_size^2 pixels, so that 4 * floor((min(budget / size^2, n_frames) - 1) / 4) +
    1 frames fit; computed in integers, because a float quotient can be just below a whole frame.
    """
    step = ratios.temporal
    quotient = (n_frames * token_sample_size**2 - size**2) // (step * size**2)
    return max(0, min(quotient, (n_frames - 1) // step)) * step + 1


def latent_shape(bucket: Bucket, ratios: Ratios = USUAL) -> tuple[int, int, int]:
    """Return (latent frames, latent height, latent width) of a bucket."""
    return (
        (bucket.frames - 1) // ratios.temporal + 1,
        bucket.height // ratios.spatial,
        bucket.width // ratios.spatial,
    )


def token_count(bucket: Bucket, ratios: Ratios = USUAL) -> int:
    """Return the transformer's sequence length for one sample of a bucket (text tokens not counted)."""
    frames, height, width = latent_shape(bucket, ratios)
    return frames * (height // ratios.patch) * (width // ratios.patch)
