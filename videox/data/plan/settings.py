"""Serves the plan: what it depends on, the index's columns and the user's settings, and what a sample costs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from videox.data.index.index import Index
from videox.data.plan.buckets import SizePolicy
from videox.shapes import Bucket, token_count

# where ranks wait for each other: once in an optimizer step (DDP, ZeRO-2), or in each micro-batch (ZeRO-3, FSDP)
BARRIERS = ("step", "micro")
# keeps each step as varied as the data; buys balance with that; neither
BALANCES = ("mixed", "strict", "none")
SAMPLINGS = ("random", "uniform", "head")  # where a video's clips begin


@dataclass(frozen=True)
class Columns:
    """What the plan reads of the index, one entry per metadata row.

    kind uint8 (0 image, 1 video), width, height, frames int32 (upright pixels, source frames), usable bool; fps
    float32 where frames are kept by the second; weight float32, how often a row occurs in an epoch on the mean, None
    where every row has 1.
    """

    kind: np.ndarray
    width: np.ndarray
    height: np.ndarray
    frames: np.ndarray
    usable: np.ndarray
    fps: np.ndarray | None = None
    weight: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.kind)


def columns_of(index: Index, *, by_second: bool) -> Columns:
    """Returns what the plan reads of an index; by_second: frames are kept by the second, which takes the fps."""
    return Columns(
        index.kind,
        index.width,
        index.height,
        index.frames,
        index.usable,
        fps=index.fps if by_second else None,
        weight=index.weight if np.any(index.weight != 1) else None,
    )


def columns_fingerprint(index: Index, columns: Columns) -> str:
    """Returns the index's fingerprint, extended by the columns that it does not cover, where the plan reads them."""
    more = [column for column in (columns.fps, columns.weight) if column is not None]
    if not more:
        return index.fingerprint()
    digest = hashlib.sha256(index.fingerprint().encode())
    for column in more:
        digest.update(np.ascontiguousarray(column, "<f4").tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class PlanSettings:
    """Every setting that the schedule depends on besides the columns.

    batch_size: samples per micro-batch; slots: G, processes x accumulation at first launch; slot_fill: "fixed" or
    "cost"; video_repeat: how often a video occurs in an epoch (0 and 1 both mean once); held_out: rows kept for
    validation; cost_linear, cost_quadratic: a and b of a sample's cost a*S + b*S^2 in tokens S; barrier: one of
    BARRIERS; balance: one of BALANCES, "none" leaves slots in random order; accumulation: at first launch;
    clips_per_video: of a video that holds several whole ones, at most, by clip_sampling, one of SAMPLINGS;
    cache_variants: so many epochs draw clip starts, sizes and crops of their own, then these come again (0 = all do).
    """

    policy: SizePolicy
    batch_size: int
    slots: int
    seed: int
    slot_fill: str = "fixed"
    video_repeat: int = 1
    held_out: int = 0
    cost_linear: float = 1.0
    cost_quadratic: float = 0.0
    barrier: str = "step"
    balance: str = "mixed"
    accumulation: int = 1
    clips_per_video: int = 1
    clip_sampling: str = "random"
    cache_variants: int = 0


def sample_cost(settings: PlanSettings, buckets: tuple[Bucket, ...]) -> np.ndarray:
    """Returns the cost a*S + b*S^2 of one sample of each bucket, float64."""
    tokens = np.array([token_count(bucket) for bucket in buckets], np.float64)
    return settings.cost_linear * tokens + settings.cost_quadratic * tokens**2
