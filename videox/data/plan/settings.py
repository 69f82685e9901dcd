"""Inputs of the plan: columns of the index and settings of the run, and the cost of a sample."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from videox.data.index.captions import CaptionRules, rows_without_caption
from videox.data.index.index import Index
from videox.data.plan.buckets import SizePolicy
from videox.shapes import Bucket, token_count

# where ranks synchronize: once per optimizer step (DDP, ZeRO-2), or in each micro-batch (ZeRO-3, FSDP)
BARRIERS = ("step", "micro")


@dataclass(frozen=True)
class PlanColumns:
    """The columns of the index that the plan reads, one entry per metadata row.

    kind uint8 (0 image, 1 video); width, height, frames int32 (upright pixels, source frames); usable bool; fps
    float32 where frames are sampled by frame rate (sample_fps), else None; weight float32, the mean number of
    occurrences of a row in an epoch, None where every row has weight 1; decoding uint32, a sum of keys of DECODINGS
    (videox.data.media.container), None where it is 0 for every row: the plan does not read it, but a resumed run must
    decode its rows as it did before; captionless bool, True for a row without a caption, None where every row has one
    or an older version stored the columns: it is read only to choose held-out rows.
    """

    kind: np.ndarray
    width: np.ndarray
    height: np.ndarray
    frames: np.ndarray
    usable: np.ndarray
    fps: np.ndarray | None = None
    weight: np.ndarray | None = None
    decoding: np.ndarray | None = None
    captionless: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.kind)


def columns_of(index: Index, *, by_second: bool) -> PlanColumns:
    """Return the columns of an index that the plan reads.

    Args:
        by_second: frames are sampled by frame rate (sample_fps), which needs the fps column.
    """
    captionless = rows_without_caption(index.text)
    return PlanColumns(
        index.kind,
        index.width,
        index.height,
        index.frames,
        index.usable,
        fps=index.fps if by_second else None,
        weight=index.weight if np.any(index.weight != 1) else None,
        decoding=index.decoding if np.any(index.decoding) else None,
        captionless=captionless if np.any(captionless) else None,
    )


def columns_fingerprint(index: Index, columns: PlanColumns) -> str:
    """Return the index's fingerprint, extended by fps and weight where the plan reads them, and by decoding."""
    extra = [(column, "<f4") for column in (columns.fps, columns.weight) if column is not None]
    extra += [(columns.decoding, "<u4")] if columns.decoding is not None else []
    # only where they are given: the fingerprint of a run without any of them stays that of its index
    if not extra:
        return index.fingerprint()
    digest = hashlib.sha256(index.fingerprint().encode())
    for column, dtype in extra:
        digest.update(np.ascontiguousarray(column, dtype).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class PlanSettings:
    """Every setting that the plan depends on, besides the columns.

    batch_size: samples per micro-batch; slots: slots per optimizer step, processes x accumulation at first launch;
    slot_fill: "fixed" or "cost"; video_repeat: how often a video occurs in an epoch (0 and 1 both mean once);
    held_out: number of rows kept for validation; held_out_share: share of the rows kept for it, where held_out is 0;
    held_out_list: fingerprint of a list of rows that validations measure instead, "" without one; held_out_choice: how
    the kept rows are chosen, one of CHOICES (held_out.py);
    cost_linear, cost_quadratic: a and b of a sample's cost a*S + b*S^2 for S tokens; barrier: one of BARRIERS;
    balance: one of BALANCES, "none" leaves slots in random order; accumulation: gradient accumulation steps at first
    launch; clips_per_video: at most this many clips of a video that is long enough for several, chosen by
    clip_sampling, one of SAMPLINGS; cache_variants: number of epochs with their own draws of clip starts, sizes and
    crops, after which these draws repeat (0 = they never repeat); caption_prefix, trigger_word, caption_shuffle_tags:
    as the fields of CaptionRules; launch_tokens: each micro-batch has the cost of one sample of this many tokens in
    addition, where ranks are balanced; timesteps: how they are drawn within their strata, one of TIMESTEPS
    (timesteps.py).
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
    caption_prefix: str = ""
    trigger_word: str = ""
    caption_shuffle_tags: bool = False
    launch_tokens: int = 0
    held_out_choice: str = "random"
    timesteps: str = "per_step"
    held_out_share: float = 0.0
    held_out_list: str = ""

    @property
    def holds_out(self) -> bool:
        """Whether rows are kept out of the training for validation."""
        return self.held_out > 0 or self.held_out_share > 0

    @property
    def caption_rules(self) -> CaptionRules:
        """What the run does to each caption."""
        return CaptionRules(self.caption_prefix, self.trigger_word, self.caption_shuffle_tags)


def sample_cost(settings: PlanSettings, buckets: tuple[Bucket, ...]) -> np.ndarray:
    """Return the cost a*S + b*S^2 of one sample of each bucket, float64."""
    tokens = np.array([token_count(bucket, settings.policy.ratios) for bucket in buckets], np.float64)
    return settings.cost_linear * tokens + settings.cost_quadratic * tokens**2


def launch_cost(settings: PlanSettings) -> float:
    """Return the cost of a micro-batch besides that of its samples: of launching its kernels."""
    tokens = float(settings.launch_tokens)
    return settings.cost_linear * tokens + settings.cost_quadratic * tokens**2
