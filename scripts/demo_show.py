"""What the Wan2.1 demo shows: for each caption the generated clip beside the clip that was trained with it.

Distances are measured between the latents of the VAE, normalised to mean 0 and variance 1 per channel: two different
clips are about 2 apart, equal ones 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from demo_data import Scene
from diffusers import AutoencoderKLWan

from videox.data.media.video import read_clip
from videox.tracking.preview import SheetEntry, write_contact_sheet

FRAMES, HEIGHT, WIDTH = 9, 80, 128  # of a clip as the model gets it
CELL = 8  # pixels; motion is compared in squares of this side
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


def motion(frames: np.ndarray) -> np.ndarray:
    """Return how the frames of a clip differ from its first one, in squares of CELL x CELL pixels.

    Args:
        frames: uint8 [T, H, W, 3]; H and W are multiples of CELL.

    Returns:
        float64 [T - 1, H / CELL, W / CELL, 3]; 0 everywhere for a still.
    """
    count, height, width, _ = frames.shape
    cells = frames.reshape(count, height // CELL, CELL, width // CELL, CELL, 3).mean((2, 4))
    return cells[1:] - cells[:1]


def likeness(one: np.ndarray, other: np.ndarray) -> float:
    """Return the cosine of the angle between two motions: 1 = the same but for its strength; 0 for a still."""
    norms = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float((one * other).sum()) / norms if norms else 0.0


def motion_table(generated: Sequence[Shown], trained: Sequence[Shown]) -> tuple[list[str], int]:
    """Return lines with the likeness of motions, and how many generated clips move most like that of their caption."""
    rows = [[likeness(motion(a.frames), motion(b.frames)) for b in trained] for a in generated]
    return _lines(generated, trained, rows, np.argmax)


def table(generated: Sequence[Shown], trained: Sequence[Shown]) -> tuple[list[str], int]:
    """Return lines with the distances, and how many generated clips are nearest to the clip of their own caption."""
    return _lines(generated, trained, distances(generated, trained), np.argmin)


def _lines(
    generated: Sequence[Shown],
    trained: Sequence[Shown],
    rows: Sequence[Sequence[float]],
    choose: Callable[[Sequence[float]], np.intp],
) -> tuple[list[str], int]:
    """Return a line of values for each generated clip, and for how many the own clip has the chosen value."""
    lines, right = [], 0
    for clip, row in zip(generated, rows, strict=True):
        chosen = trained[int(choose(row))].caption
        right += chosen == clip.caption
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
