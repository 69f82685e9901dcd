"""Serves the plan: which bucket (frames, height, width) each row falls in. Pure functions over columns, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np

from videox.errors import UserError
from videox.shapes import GRID, TEMPORAL_RATIO, frames_that_fit, snap_frames, token_limited_frames

LADDER_STEP = 128  # pixels between two target sizes
LADDER_FOOT = 512  # under random_hw_adapt alone the smallest target is at most this
LARGEST_SHARE = 0.75  # of the draws go to the largest size, except for token-length videos
UPSCALE_LIMIT = 1.25  # a target may exceed the source's mean side by this factor
GOOD_CUT = 0.005  # of the area: less is not worth a smaller size
WHOLE_SHARE = 0.90  # of random_frame_crop's draws keep all frames

# (height / width, height, width) at target size 512: diffusers' PixArt ASPECT_RATIO_512_BIN and the seven ratios
# 0.26 0.27 2.89 3.11 3.62 3.75 3.88 that VideoX-Fun's users have besides.
# fmt: off
ASPECT_RATIOS_512: tuple[tuple[float, int, int], ...] = (
    (0.25, 256, 1024), (0.26, 256, 992), (0.27, 256, 960), (0.28, 256, 928), (0.32, 288, 896), (0.33, 288, 864),
    (0.35, 288, 832), (0.4, 320, 800), (0.42, 320, 768), (0.48, 352, 736), (0.5, 352, 704), (0.52, 352, 672),
    (0.57, 384, 672), (0.6, 384, 640), (0.68, 416, 608), (0.72, 416, 576), (0.78, 448, 576), (0.82, 448, 544),
    (0.88, 480, 544), (0.94, 480, 512), (1.0, 512, 512), (1.07, 512, 480), (1.13, 544, 480), (1.21, 544, 448),
    (1.29, 576, 448), (1.38, 576, 416), (1.46, 608, 416), (1.67, 640, 384), (1.75, 672, 384), (2.0, 704, 352),
    (2.09, 736, 352), (2.4, 768, 320), (2.5, 800, 320), (2.89, 832, 288), (3.0, 864, 288), (3.11, 896, 288),
    (3.62, 928, 256), (3.75, 960, 256), (3.88, 992, 256), (4.0, 1024, 256),
)
GRIDS = ("ratios", "exact")
# random_ratio_crop draws one of these ratios, with this weight.
CROP_RATIOS = ((0.42, 1), (0.5, 2), (0.57, 4), (0.68, 4), (0.78, 4), (0.88, 4), (0.94, 8), (1.0, 8), (1.07, 8),
               (1.13, 4), (1.29, 4), (1.46, 4), (1.75, 4), (2.0, 2), (2.4, 1))
# fmt: on
_RATIOS = np.array([ratio for ratio, _, _ in ASPECT_RATIOS_512])
_HEIGHTS = np.array([height for _, height, _ in ASPECT_RATIOS_512], np.int32)
_WIDTHS = np.array([width for _, _, width in ASPECT_RATIOS_512], np.int32)
_MIDDLES = (_RATIOS[1:] + _RATIOS[:-1]) / 2
_CROP_CHOICES = np.array([int(np.flatnonzero(ratio == _RATIOS)[0]) for ratio, _ in CROP_RATIOS])
_CROP_EDGES = np.cumsum([weight for _, weight in CROP_RATIOS]) / sum(weight for _, weight in CROP_RATIOS)


class Fate(IntEnum):
    """What becomes of a metadata row; each row has exactly one, so that the counts add up to the rows."""

    TRAINED = 0
    TOO_SHORT = 1
    TOO_SMALL = 2
    QUARANTINED = 3
    REFUSED = 4
    HELD_OUT = 5
    NOT_DRAWN = 6


@dataclass(frozen=True)
class SizePolicy:
    """The flags that decide sizes; sizes in pixels of a square's side, frames in frames, stride in source frames.

    min_frames: frames (4k+1) below which a sample teaches nothing, 5 where the first latent frame is given; images and
    shorter clips are then too short. sample_fps: kept frames per second of source, 0 = by the stride. grid: "ratios",
    the 40 of ASPECT_RATIOS_512, or "exact", see exact_sides.

    Raises:
        UserError: flags that contradict each other or are out of range.
    """

    video_sample_size: int = 512
    image_sample_size: int = 512
    token_sample_size: int = 512
    n_frames: int = 17
    stride: int = 4
    enable_bucket: bool = False
    random_hw_adapt: bool = False
    token_length: bool = False
    random_frame_crop: bool = False
    random_ratio_crop: bool = False
    fix_sample_size: tuple[int, int] | None = None
    min_frames: int = 1
    sample_fps: float = 0.0
    grid: str = GRIDS[0]

    def __post_init__(self) -> None:
        for name in ("video_sample_size", "image_sample_size", "token_sample_size"):
            if not 2 * GRID <= getattr(self, name) <= 8192:
                raise UserError(f"--{name}", f"{getattr(self, name)} is outside 32..8192", "give a side in pixels")
        if self.n_frames < 1 or snap_frames(self.n_frames) != self.n_frames:
            near = snap_frames(max(1, self.n_frames))
            hint = f"use {near} or {near + TEMPORAL_RATIO}"
            raise UserError("--video_sample_n_frames", f"{self.n_frames} is not 4k+1", hint)
        if self.stride < 1:
            raise UserError("--video_sample_stride", f"{self.stride} is below 1", "use 1 for every frame")
        if not self.enable_bucket:
            for name in ("random_hw_adapt", "token_length", "random_frame_crop", "random_ratio_crop"):
                if getattr(self, name):
                    flag = "training_with_video_token_length" if name == "token_length" else name
                    raise UserError(f"--{flag}", "has no meaning without buckets", "add --enable_bucket")
            if self.grid != GRIDS[0]:
                raise UserError(f"--bucket_grid {self.grid}", "has no meaning without buckets", "add --enable_bucket")
            if self.fix_sample_size:
                raise UserError("--fix_sample_size", "has no meaning without buckets", "add --enable_bucket")
        if self.n_frames < self.min_frames or not self.video_sizes():
            what = f"{self.n_frames} frames at --token_sample_size {self.token_sample_size} leave no clip of {self.min_frames}"
            hint = "raise one of them; the given first frame alone teaches nothing"
            raise UserError("--video_sample_n_frames", what, hint)
        if self.fix_sample_size and min(self.fix_sample_size) < 2 * GRID:
            raise UserError(
                "--fix_sample_size", f"{self.fix_sample_size} has a side below 32", "give height and width"
            )

    @property
    def low(self) -> int:
        """The smaller of the two sample sizes: the order in which a user gives them does not matter."""
        return min(self.video_sample_size, self.image_sample_size)

    @property
    def high(self) -> int:
        """The larger of the two sample sizes."""
        return max(self.video_sample_size, self.image_sample_size)

    def image_sizes(self) -> tuple[int, ...]:
        """Returns the target sizes that an image may be trained at, ascending."""
        if self.enable_bucket and not self.fix_sample_size:
            if self.token_length:
                return ladder(self.low, self.high)
            if self.random_hw_adapt:
                return ladder(min(self.low, LADDER_FOOT), self.high)
        return (self.image_sample_size,)

    def video_sizes(self) -> tuple[int, ...]:
        """Returns the target sizes that a video may be trained at, ascending."""
        if self.enable_bucket and not self.fix_sample_size:
            if self.token_length:
                sizes = ladder(self.low, self.high)
                return tuple(size for size in sizes if self.max_frames(size) >= self.min_frames)
            if self.random_hw_adapt:
                return ladder(min(self.low, LADDER_FOOT), self.low)
        return (self.video_sample_size,)

    def max_frames(self, size: int) -> int:
        """Returns the most frames that a video at this target size may have (4k+1)."""
        if self.token_length and not self.fix_sample_size:
            return token_limited_frames(self.n_frames, self.token_sample_size, size)
        return self.n_frames


class Assignment(NamedTuple):
    """One entry per sample: the bucket, int32 [N] each, and the target size that was drawn."""

    frames: np.ndarray
    height: np.ndarray
    width: np.ndarray
    target: np.ndarray


def ladder(foot: int, top: int) -> tuple[int, ...]:
    """Returns foot, foot + 128, ... and always top."""
    return (*range(foot, top, LADDER_STEP), top)


def nearest_ratio(height: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Returns each sample's position in ASPECT_RATIOS_512: the key nearest to height / width, the lower on a tie."""
    return np.searchsorted(_MIDDLES, np.asarray(height) / np.asarray(width), side="left")


def sides(position: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (height, width) int32 of ratio `position` at target size `target`: floored to multiples of 16."""
    height = _HEIGHTS[position].astype(np.int64) * target // (512 * GRID) * GRID
    width = _WIDTHS[position].astype(np.int64) * target // (512 * GRID) * GRID
    return np.maximum(height, GRID).astype(np.int32), np.maximum(width, GRID).astype(np.int32)


def exact_sides(height: np.ndarray, width: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (height, width) int32: multiples of 16 as near to the source's ratio as target x target pixels allow.

    The short side is tried from the largest that fits down to three quarters of it, the long side follows from the
    ratio; of what cuts no more than 0.5 % of the source the largest is taken, else what cuts the least. At target 512
    that is at most 1.6 %, from 640 on 1.3 %: for a ratio midway between n x n and n x (n - 1) multiples of 16, since
    within as many pixels no ratio lies between these.
    """
    short, long = np.minimum(height, width).astype(np.float64), np.maximum(height, width).astype(np.float64)
    ratio, cells = long / short, (np.asarray(target, np.int64) // GRID) ** 2
    most = np.maximum(np.floor(np.sqrt(cells / ratio) + 1e-9), 1)
    best_short, best_long, best_cut = (
        most.copy(),
        np.minimum(np.maximum(np.floor(most * ratio), 1), cells),
        np.ones(len(most)),
    )
    for less in range(int(most.max(initial=1)) // 4 + 1):
        side = np.maximum(most - less, np.ceil(0.75 * most))
        for other in (np.floor(side * ratio), np.ceil(side * ratio)):
            cut = 1 - np.minimum(other / side, ratio) / np.maximum(other / side, ratio)
            better = (side * other <= cells) & (other >= 1) & (cut < best_cut) & (best_cut > GOOD_CUT)
            best_short, best_long, best_cut = (
                np.where(better, new, old) for new, old in ((side, best_short), (other, best_long), (cut, best_cut))
            )
    tall = height > width
    sides = ((GRID * side).astype(np.int32) for side in (best_short, best_long))
    small, large = sides
    return np.where(tall, large, small), np.where(tall, small, large)


def draw_sizes(sizes: tuple[int, ...], mean_side: np.ndarray, draw: np.ndarray, even: bool) -> np.ndarray:
    """Returns a target size per sample.

    Args:
        sizes: ascending target sizes.
        mean_side: (height + width) / 2 of each source in pixels; sizes above 1.25 times it are dropped, but the
            smallest is always allowed.
        draw: uniform in (0, 1).
        even: all allowed sizes equally; otherwise the largest allowed has probability 0.75 and the rest share 0.25.
    """
    table = np.asarray(sizes)
    allowed = np.maximum(np.searchsorted(table, UPSCALE_LIMIT * mean_side, side="right"), 1)
    if even:
        return table[np.minimum((draw * allowed).astype(np.int64), allowed - 1)]
    rest = ((draw - LARGEST_SHARE) / (1 - LARGEST_SHARE) * (allowed - 1)).astype(np.int64)
    pick = np.where((draw < LARGEST_SHARE) | (allowed == 1), allowed - 1, np.minimum(rest, allowed - 2))
    return table[pick]


def crop_frames(frames: np.ndarray, draw: np.ndarray) -> np.ndarray:
    """Returns frames under random_frame_crop: F with probability 0.90, else one of 5, 9, ..., F - 4 equally."""
    shorter = np.maximum((frames - 1) // TEMPORAL_RATIO - 1, 0)  # how many of 5, 9, ... lie below F
    pick = np.minimum(((draw - WHOLE_SHARE) / (1 - WHOLE_SHARE) * shorter).astype(np.int64), shorter - 1)
    return np.where((draw < WHOLE_SHARE) | (shorter == 0), frames, TEMPORAL_RATIO * (pick + 1) + 1)


def pace_of(policy: SizePolicy, fps: np.ndarray | None) -> np.ndarray | int:
    """Returns the source frames from one kept frame to the next: the stride, or float64 per row under sample_fps.

    Args:
        fps: of each source; where it is 0 (unknown) or None, the stride holds. A source slower than sample_fps gives
            a pace below 1, so that frames repeat and what moves keeps its speed.
    """
    if not policy.sample_fps or fps is None:
        return policy.stride
    return np.where(fps > 0, fps.astype(np.float64) / policy.sample_fps, policy.stride)


def frame_offsets(frames: Any, pace: Any) -> Any:  # noqa: ANN401 - numbers, or columns of them
    """Returns the source frame, counted from a clip's first, that is shown when kept frame number `frames` is due."""
    return np.floor(np.asarray(frames) * np.asarray(pace, np.float64) + 1e-6).astype(np.int64)


def frames_at_pace(length: np.ndarray, pace: np.ndarray | int) -> np.ndarray:
    """Returns how many frames a video of `length` frames holds at a pace, int64: frame_offsets(n - 1) < length."""
    if isinstance(pace, int):
        return np.asarray(frames_that_fit(length, pace))
    return np.ceil((length - 1e-6) / pace).astype(np.int64)


def static_fates(
    policy: SizePolicy,
    kind: np.ndarray,
    height: np.ndarray,
    width: np.ndarray,
    frames: np.ndarray,
    usable: np.ndarray,
    fps: np.ndarray | None = None,
) -> np.ndarray:
    """Returns a Fate per row (uint8) as far as the row itself decides it; kind is 0 for images and 1 for videos.

    A source with a side under 16 pixels is too small. Without buckets every video must have all n_frames.
    """
    fates = np.full(len(kind), Fate.TRAINED, np.uint8)
    fit = frames_at_pace(frames.astype(np.int64), pace_of(policy, fps))
    needed = policy.min_frames if policy.enable_bucket else policy.n_frames
    fates[(kind == 1) & (fit < needed)] = Fate.TOO_SHORT
    if policy.min_frames > 1:
        fates[kind == 0] = Fate.TOO_SHORT
    fates[np.minimum(height, width) < GRID] = Fate.TOO_SMALL
    fates[~usable] = Fate.REFUSED
    return fates


def assign(
    policy: SizePolicy,
    kind: np.ndarray,
    height: np.ndarray,
    width: np.ndarray,
    frames: np.ndarray,
    *,
    size_draw: np.ndarray,
    ratio_draw: np.ndarray,
    frames_draw: np.ndarray,
    fps: np.ndarray | None = None,
) -> Assignment:
    """Returns each sample's bucket from its source (pixels, frames; kind 0 image, 1 video) and its uniform draws."""
    video = kind == 1
    mean_side = (height.astype(np.float64) + width) / 2
    video_sizes, image_sizes = policy.video_sizes(), policy.image_sizes()
    target = np.empty(len(kind), np.int64)
    target[video] = draw_sizes(video_sizes, mean_side[video], size_draw[video], even=policy.token_length)
    target[~video] = draw_sizes(image_sizes, mean_side[~video], size_draw[~video], even=False)

    budget = np.array([policy.max_frames(size) for size in video_sizes])
    length = np.ones(len(kind), np.int64)
    pace = pace_of(policy, None if fps is None else fps[video])
    fit = np.maximum(frames_at_pace(frames[video].astype(np.int64), pace), 1)
    longest = budget[np.searchsorted(np.asarray(video_sizes), target[video])]
    length[video] = np.minimum((fit - 1) // TEMPORAL_RATIO * TEMPORAL_RATIO + 1, longest)
    if policy.random_frame_crop:
        length[video] = np.maximum(crop_frames(length[video], frames_draw[video]), policy.min_frames)

    if policy.fix_sample_size:
        high, wide = (side // GRID * GRID for side in policy.fix_sample_size)
        return Assignment(
            length.astype(np.int32), np.full(len(kind), high, np.int32), np.full(len(kind), wide, np.int32), target
        )
    if not policy.enable_bucket:
        square = (target // GRID * GRID).astype(np.int32)
        return Assignment(length.astype(np.int32), square, square, target)
    if policy.grid == "exact" and not policy.random_ratio_crop:
        return Assignment(length.astype(np.int32), *exact_sides(height, width, target), target)
    if policy.random_ratio_crop:
        position = _CROP_CHOICES[np.searchsorted(_CROP_EDGES, ratio_draw, side="right")]
    else:
        position = nearest_ratio(height, width)
    return Assignment(length.astype(np.int32), *sides(position, target), target)


def cut_share(
    height: np.ndarray, width: np.ndarray, bucket_height: np.ndarray, bucket_width: np.ndarray
) -> np.ndarray:
    """Returns the share of each source's area (0 to 1) that sticks out of its bucket and is cut at the centre."""
    tall = np.asarray(bucket_height) / height
    wide = np.asarray(bucket_width) / width
    return 1 - np.minimum(tall, wide) / np.maximum(tall, wide)


def clip_starts(frames: np.ndarray, sample_frames: np.ndarray, pace: np.ndarray | int, draw: np.ndarray) -> np.ndarray:
    """Returns the first source frame of each clip (int64): uniform over all starts that leave room for the clip."""
    room = room_of(frames, sample_frames, pace)
    return np.minimum((draw * (room + 1)).astype(np.int64), room)


def room_of(frames: np.ndarray, sample_frames: np.ndarray, pace: np.ndarray | int) -> np.ndarray:
    """Returns the last source frame (int64) at which a clip can start; 0 for an image."""
    return np.maximum(frames.astype(np.int64) - 1 - frame_offsets(sample_frames.astype(np.int64) - 1, pace), 0)


def planned_starts(
    room: np.ndarray, length: np.ndarray, clip: np.ndarray, clips: np.ndarray, sampling: str
) -> np.ndarray:
    """Returns the first source frame (int64) of clip number `clip` of `clips` of a video.

    Args:
        room: as room_of.
        length: source frames of the clip.
        sampling: "uniform": from the first possible start to the last, evenly, one alone in the middle; "head": one
            after another from the beginning.
    """
    if sampling == "head":
        return np.minimum(clip * length, room)
    return np.where(clips > 1, room * clip // np.maximum(clips - 1, 1), room // 2)
