"""What the Wan2.1 demo shows: for each caption the generated clip beside the clip that was trained with it.

Distances are measured between the latents of the VAE, normalised to mean 0 and variance 1 per channel: two different
clips are about 2 apart, equal ones 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from demo_data import Scene
from diffusers import AutoencoderKLWan

from videox.data.media.video import read_clip
from videox.tracking.preview import SheetEntry, write_contact_sheet

FRAMES, HEIGHT, WIDTH = 9, 80, 128  # of a clip as the model gets it
STRIDE = 3  # source frames from one frame to the next
SOURCE_FRAMES = (FRAMES - 1) * STRIDE + 1


@dataclass(frozen=True)
class Shown:
    """A clip as the model gets it, or as it generated it.

    Attributes:
        caption: of the training clip, or the prompt.
        frames: uint8 [FRAMES, HEIGHT, WIDTH, 3].
        latents: normalised, float [16, t, HEIGHT / 8, WIDTH / 8].
    """

    caption: str
    frames: np.ndarray
    latents: torch.Tensor


def training_clips(data: Path, rows: Sequence[dict[str, str]], vae: AutoencoderKLWan) -> list[Shown]:
    """Return the clips of the metadata's rows as the model gets them."""
    picked = range(0, SOURCE_FRAMES, STRIDE)
    clips = [read_clip(data / row["file_path"], picked, HEIGHT, WIDTH) for row in rows]
    return [Shown(row["text"], clip, latents_of(vae, clip)) for row, clip in zip(rows, clips, strict=True)]


def generated_clips(paths: Sequence[Path], scenes: Sequence[Scene], vae: AutoencoderKLWan) -> list[Shown]:
    """Return sampled clips; paths: one for each scene, whose caption was the prompt."""
    clips = [read_clip(path, range(FRAMES), HEIGHT, WIDTH) for path in paths]
    return [Shown(scene.caption, clip, latents_of(vae, clip)) for scene, clip in zip(scenes, clips, strict=True)]


@torch.no_grad()
def latents_of(vae: AutoencoderKLWan, frames: np.ndarray) -> torch.Tensor:
    """Return the normalised latents [16, t, h, w] of a clip, uint8 [T, H, W, 3]."""
    pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    mean, std = (
        torch.tensor(values)[:, None, None, None] for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (vae.encode(pixels).latent_dist.mode()[0] - mean) / std


def distances(generated: Sequence[Shown], trained: Sequence[Shown]) -> list[list[float]]:
    """Return the mean squared differences of latents, [generated, trained]."""
    return [[(a.latents - b.latents).square().mean().item() for b in trained] for a in generated]


def still_distance(trained: Shown, vae: AutoencoderKLWan) -> float:
    """Return the distance of a training clip to a still of its first frame."""
    still = np.repeat(trained.frames[:1], len(trained.frames), axis=0)
    return (latents_of(vae, still) - trained.latents).square().mean().item()


def table(generated: Sequence[Shown], trained: Sequence[Shown]) -> tuple[list[str], int]:
    """Return lines with the distances, and how many generated clips are nearest to the clip of their own caption."""
    lines, right = [], 0
    for clip, row in zip(generated, distances(generated, trained), strict=True):
        nearest = trained[int(np.argmin(row))].caption
        right += nearest == clip.caption
        values = " ".join(
            f"[{value:.3f}]" if other.caption == clip.caption else f" {value:.3f} "
            for value, other in zip(row, trained, strict=True)
        )
        lines.append(f"{values}  {clip.caption}")
    return lines, right


def write_comparison(path: Path, trained: Sequence[Shown], generated: Sequence[tuple[str, Shown]]) -> None:
    """Write a contact sheet with each generated clip after the training clip of the same caption.

    Args:
        path: a .png file.
        trained: training clips.
        generated: pairs (title, clip).
    """
    by_caption, entries, seen = {clip.caption: clip for clip in trained}, [], set()
    for title, clip in generated:
        if clip.caption not in seen and clip.caption in by_caption:
            entries.append(SheetEntry(by_caption[clip.caption].frames, "training clip", clip.caption))
            seen.add(clip.caption)
        entries.append(SheetEntry(clip.frames, title, clip.caption))
    write_contact_sheet(path, entries)
