"""CLIP's preprocessing: as in Wan's own code, which changes the aspect ratio, and of the first picture alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature


class SquashProcessor:
    """Resizes pictures to a square, whatever their aspect ratio, and normalises them; called as diffusers does.

    Wan's own code scales values to [-1, 1], resizes them by bicubic interpolation without antialiasing, scales them
    back to [0, 1] and normalises them. diffusers' processor resizes the shorter side instead and crops the centre.

    Args:
        side: of the square, in pixels.
        mean, std: of each channel, for values in [0, 1].
    """

    def __init__(self, side: int, mean: Sequence[float], std: Sequence[float]) -> None:
        self.side = side
        self.mean, self.std = (torch.tensor([*values]).view(1, 3, 1, 1) for values in (mean, std))

    def __call__(self, images: Image.Image | Sequence[Image.Image], return_tensors: str = "pt") -> BatchFeature:
        """Return pixel_values, float32 [B, 3, side, side]; return_tensors: "pt", as diffusers asks."""
        pictures = [images] if isinstance(images, Image.Image) else images
        pixels = torch.cat([self._resize(picture) for picture in pictures])
        values = (pixels.mul(0.5).add(0.5) - self.mean) / self.std
        return BatchFeature({"pixel_values": values}, tensor_type=return_tensors)

    def _resize(self, picture: Image.Image) -> torch.Tensor:
        """Return a picture as float32 [1, 3, side, side], about -1 to 1."""
        pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None].float().div(255)
        size = (self.side, self.side)
        return torch.nn.functional.interpolate(pixels.sub(0.5).div(0.5), size, mode="bicubic", align_corners=False)


class FirstPicture:
    """Processes the first of several pictures only, for models that take CLIP's features of one.

    diffusers' pipeline hands over the first and the last picture of a clip together.

    Args:
        processor: of a picture.
    """

    def __init__(self, processor: Callable[..., BatchFeature]) -> None:
        self.processor = processor

    def __call__(self, images: Image.Image | Sequence[Image.Image], return_tensors: str = "pt") -> BatchFeature:
        """Return pixel_values of one picture, float32 [1, 3, side, side]; return_tensors: "pt", as diffusers asks."""
        picture = images if isinstance(images, Image.Image) else images[0]
        return self.processor(images=picture, return_tensors=return_tensors)
