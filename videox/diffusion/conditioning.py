"""The condition of image-to-video and inpainting models, built in one place for training, validation and sampling.

Functions of tensors only. In a mask, 1 means known (the model gets the pixels) and 0 means to be generated. The order
of Wan's 36 channels (16 noisy, 4 mask, 16 condition) and grey for unknown pixels are those of diffusers'
WanImageToVideoPipeline; a test verifies that both are equal.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange, reduce

from videox.rng import Purpose, hash_key, uniform
from videox.shapes import USUAL, Bucket, Ratios

MODES = ("normal", "i2v", "inpaint", "flf2v")
IMAGE_DROP = 0.9  # share of images whose condition is zeroed, to preserve text-to-video ability

# Families of masks for inpainting, with their shares; for an image, which has one frame, only two make sense.
CLIP_MASKS = {"first": 0.3, "first_and_last": 0.2, "boxes": 0.2, "frames": 0.2, "nothing": 0.1}
IMAGE_MASKS = {"boxes": 0.75, "nothing": 0.25}
MAX_BOXES = 4
GIVEN_FRAMES = {"i2v": "first", "flf2v": "first_and_last"}  # the masks of the clips of these modes


def known_mask(
    mode: str, keys: Sequence[int], frames: int, height: int, width: int, device: torch.device | str = "cpu",
    ratios: Ratios = USUAL,
) -> torch.Tensor:  # fmt: skip
    """Return the mask of known pixels of each sample: float32 [B, 1, T, H, W], 1 = known.

    Args:
        mode: "i2v" (the first frame of a clip; nothing of an image) | "flf2v" (the first and the last one) |
            "inpaint" (a family of masks drawn by the sample's key).
        keys: one per sample.
        frames, height, width: of the bucket, in pixels.
        device: where the mask is created.
        ratios: of the model, for the grid of boxes.
    """
    masks = torch.zeros(len(keys), 1, frames, height, width, device=device)
    for mask, key in zip(masks, keys, strict=True):
        if mode == "inpaint":
            family = draw_family(IMAGE_MASKS if frames == 1 else CLIP_MASKS, key)
            fill_mask(mask[0], family, key, ratios)
        elif frames > 1:
            fill_mask(mask[0], GIVEN_FRAMES[mode], key, ratios)
    return masks


def known_pixels(
    mode: str, video: torch.Tensor, keys: Sequence[int], ratios: Ratios = USUAL
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the known pixels of a video [B, 3, T, H, W], grey (0) elsewhere, and their mask [B, 1, T, H, W].

    Args:
        mode: as in known_mask.
        video: float [B, 3, T, H, W] in [-1, 1].
        keys: of the masks, one per sample.
        ratios: of the model.
    """
    frames, height, width = video.shape[2:]
    mask = known_mask(mode, keys, frames, height, width, device=video.device, ratios=ratios)
    return video * mask, mask


def draw_family(families: dict[str, float], key: int) -> str:
    """Draw the name of a family by the key, with the given shares."""
    edges = np.cumsum(list(families.values()))
    return list(families)[int(np.searchsorted(edges / edges[-1], uniform(key, Purpose.MASK_FAMILY), side="right"))]


def mask_name(mode: str, key: int, frames: int) -> str:
    """Return a name of the mask that known_mask makes for a sample: equal names mean equal masks of the same size."""
    if mode != "inpaint":
        return GIVEN_FRAMES.get(mode, "nothing") if frames > 1 else "nothing"
    family = draw_family(IMAGE_MASKS if frames == 1 else CLIP_MASKS, key)
    return f"{family} {key:016x}" if family in ("boxes", "frames") else family


def fill_mask(mask: torch.Tensor, family: str, key: int, ratios: Ratios = USUAL) -> None:
    """Fill one sample's mask [T, H, W], which is zero, in place.

    first, first_and_last: these frames are known. frames: each frame is known with a probability drawn by the key, but
    never all of them. boxes: everything is known except one to four boxes, the same in every frame, on the
    transformer's grid. nothing: the mask stays zero.
    """
    frames, height, width = mask.shape
    if family == "first":
        mask[0] = 1
    elif family == "first_and_last":
        mask[0] = mask[-1] = 1
    elif family == "frames":
        known = uniform(key, Purpose.MASK_FRAME, np.arange(frames)) < uniform(key, Purpose.MASK_SHARE)
        known[int(hash_key(key, Purpose.MASK_SHARE)) % frames] = False
        for frame in np.flatnonzero(
            known
        ).tolist():  # not indexed by the array: copying it to the device would make the host wait
            mask[frame] = 1
    elif family == "boxes":
        mask[:] = 1
        for box in range(1 + int(hash_key(key, Purpose.MASK_BOX)) % MAX_BOXES):
            top, bottom = box_edges(height, key, 2 * box, ratios.grid)
            left, right = box_edges(width, key, 2 * box + 1, ratios.grid)
            mask[:, top:bottom, left:right] = 0


def box_edges(side: int, key: int, number: int, grid: int = USUAL.grid) -> tuple[int, int]:
    """Return (start, end) in pixels of a box along one side: a quarter to three quarters of it, on the grid."""
    cells = side // grid
    size, place = uniform(key, Purpose.MASK_BOX, number, np.arange(2))
    length = max(1, round(cells * (0.25 + 0.5 * float(size))))
    start = int(float(place) * (cells - length + 1))
    return start * grid, (start + length) * grid


def pack_mask(mask: torch.Tensor, ratios: Ratios = USUAL) -> torch.Tensor:
    """Return Wan's mask channels, [B, 4, t, h, w], of a pixel mask [B, 1, T, H, W] with T = 4 (t - 1) + 1.

    The first frame is repeated four times, so that every latent frame has four mask channels, one for each of its
    frames. A latent pixel is known if all of its 8 x 8 pixels are. Numbers are those of the usual ratios.
    """
    spatial = reduce(mask, "b c t (h p) (w q) -> b c t h w", "min", p=ratios.spatial, q=ratios.spatial)
    first = spatial[:, :, :1].repeat(1, 1, ratios.temporal, 1, 1)
    return rearrange(torch.cat([first, spatial[:, :, 1:]], 2), "b 1 (t r) h w -> b r t h w", r=ratios.temporal)


def keep_condition(mask: torch.Tensor, keys: Sequence[int]) -> torch.Tensor:
    """Return 1 or 0 per sample, float32 [B, 1, 1, 1, 1]: 0 for 90 % of the images without known pixels.

    These are trained as text-to-image, so that the model keeps that ability. Clips always keep their condition, and so
    do images of which something is known.

    Args:
        mask: as returned by known_mask, [B, 1, T, H, W], on the host.
        keys: one per sample.
    """
    keep = torch.ones(len(keys), 1, 1, 1, 1)
    if mask.shape[2] == 1:
        draws = torch.from_numpy(uniform(np.array(keys, np.uint64), Purpose.CONDITION_DROP))
        keep[(draws < IMAGE_DROP) & (mask.amax((1, 2, 3, 4)) == 0)] = 0
    return keep


def keep_on_host(
    mode: str, variants: Sequence[int], bucket: Bucket, keys: Sequence[int], ratios: Ratios = USUAL
) -> torch.Tensor:
    """Return keep_condition of known_mask on the host, so that the host need not wait for a mask on the device.

    Args:
        mode, variants, bucket: known_mask's mode, its keys, and its frames, height and width.
        keys: one per sample.
        ratios: of the model.
    """
    if bucket.frames > 1:
        return torch.ones(len(keys), 1, 1, 1, 1)
    return keep_condition(known_mask(mode, variants, *bucket, ratios=ratios), keys)


def concat_first_frame(latents: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """Return HunyuanVideo's latent_concat input [B, 33, t, h, w]: noisy, first frame (zeros after it), its mask.

    Args:
        latents: noisy, [B, 16, t, h, w].
        first: latents of the given image, [B, 16, 1, h, w].
    """
    condition = torch.zeros_like(latents)
    condition[:, :, :1] = first
    mask = torch.zeros_like(latents[:, :1])
    mask[:, :, 0] = 1
    return torch.cat([latents, condition, mask], 1)


def replace_first_frame(latents: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """Return HunyuanVideo's token_replace input [B, 16, t, h, w]: noisy latents with the given first frame."""
    return torch.cat([first, latents[:, :, 1:]], 2)
