"""Buckets: the (frames, height, width) in which each metadata row is trained.

Pure functions over NumPy columns; imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np

from videox.data.choices import GRIDS
from videox.errors import UserError
from videox.shapes import USUAL, Ratios, frames_that_fit, snap_frames, token_limited_frames

LADDER_STEP = 128  # pixels from one target size to the next
LADDER_START = 512  # under random_hw_adapt alone the smallest target is at most this
LARGEST_SHARE = 0.75  # share of the draws that go to the largest size, except for token-length videos
UPSCALE_LIMIT = 1.25  # a target may be at most this factor above the source's mean side
ACCEPTED_CROP = 0.005  # share of the area: cropping less than this is not worth a smaller size
FULL_LENGTH_SHARE = 0.90  # share of random_frame_crop's draws that keep all frames

# (height / width, height, width) at target size 512: diffusers' PixArt ASPECT_RATIO_512_BIN and the seven ratios
# 0.26 0.27 2.89 3.11 3.62 3.75 3.88 that VideoX-Fun adds.
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
# random_ratio_crop draws one of these (ratio, weight) pairs with a probability proportional to its weight.
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
    """How a metadata row is used; each row has exactly one fate, so that the counts add up to the number of rows."""

    TRAINED = 0
    TOO_SHORT = 1
    TOO_SMALL = 2
    QUARANTINED = 3
    REFUSED = 4
    HELD_OUT = 5
    NOT_DRAWN = 6


@dataclass(frozen=True)
class SizePolicy:
    """The flags that decide sizes: sizes are sides of a square in pixels, stride is in source frames.

    min_frames: the fewest frames (4k+1) of a sample that has a loss, 5 where the first latent frame is given to the
    model; images and shorter clips are then too short. sample_fps: kept frames per second of the source, 0 = use the
    stride. grid: "ratios", the 40 of ASPECT_RATIOS_512, or "exact", see exact_sides. ratios: of the model.

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
    ratios: Ratios = USUAL

    def __post_init__(self) -> None:
        least = 2 * self.ratios.grid
        for name in ("video_sample_size", "image_sample_size", "token_sample_size"):
            if not least <= getattr(self, name) <= 8192:
                what = f"{getattr(self, name)} is outside {least}..8192"
                raise UserError(f"--{name}", what, "pass the side of a square in pixels")
        if self.n_frames < 1 or snap_frames(self.n_frames, self.ratios) != self.n_frames:
            near, step = snap_frames(max(1, self.n_frames), self.ratios), self.ratios.temporal
            what, hint = f"{self.n_frames} is not {step}k+1", f"use {near} or {near + step}"
            raise UserError("--video_sample_n_frames", what, hint)
        if self.stride < 1:
            raise UserError("--video_sample_stride", f"{self.stride} is below 1", "use 1 for every frame")
        if not self.enable_bucket:
            for name in ("random_hw_adapt", "token_length", "random_frame_crop", "random_ratio_crop"):
                if getattr(self, name):
                    flag = "training_with_video_token_length" if name == "token_length" else name
                    raise UserError(f"--{flag}", "has no effect without buckets", "add --enable_bucket")
            if self.grid != GRIDS[0]:
                raise UserError(f"--bucket_grid {self.grid}", "has no effect without buckets", "add --enable_bucket")
            if self.fix_sample_size:
                raise UserError("--fix_sample_size", "has no effect without buckets", "add --enable_bucket")
        if self.n_frames < self.min_frames or not self.video_sizes():
            what = f"{self.n_frames} frames at --token_sample_size {self.token_sample_size} leave no clip of {self.min_frames} frames"
            hint = "raise one of them: a sample of the given first frame alone has no loss"
            raise UserError("--video_sample_n_frames", what, hint)
        if self.fix_sample_size and min(self.fix_sample_size) < least:
            what = f"{self.fix_sample_size} has a side below {least} pixels"
            raise UserError("--fix_sample_size", what, f"pass height and width of at least {least}")

    @property
    def low(self) -> int:
        """The smaller of the two sample sizes; which of the two flags has it does not matter."""
        return min(self.video_sample_size, self.image_sample_size)

    @property
    def high(self) -> int:
        """The larger of the two sample sizes."""
        return max(self.video_sample_size, self.image_sample_size)

    def image_sizes(self) -> tuple[int, ...]:
        """Return the target sizes that an image may be trained at, ascending."""
        if self.enable_bucket and not self.fix_sample_size:
            if self.token_length:
                return size_ladder(self.low, self.high)
            if self.random_hw_adapt:
                return size_ladder(min(self.low, LADDER_START), self.high)
        return (self.image_sample_size,)

    def video_sizes(self) -> tuple[int, ...]:
        """Return the target sizes that a video may be trained at, ascending."""
        if self.enable_bucket and not self.fix_sample_size:
            if self.token_length:
                sizes = size_ladder(self.low, self.high)
                return tuple(size for size in sizes if self.max_frames(size) >= self.min_frames)
            if self.random_hw_adapt:
                return size_ladder(min(self.low, LADDER_START), self.low)
        return (self.video_sample_size,)

    def max_frames(self, size: int) -> int:
        """Return the most frames (4k+1) that a video at this target size may have."""
        if self.token_length and not self.fix_sample_size:
            return token_limited_frames(self.n_frames, self.token_sample_size, size, self.ratios)
        return self.n_frames


@dataclass(frozen=True)
class BucketDraws:
    """Uniform draws in (0, 1), float64 [N] each: of the target size, of random_ratio_crop and of random_frame_crop."""

    size: np.ndarray
    ratio: np.ndarray
    frames: np.ndarray


class Assignment(NamedTuple):
    """The bucket of each sample, int32 [N] each, and the target size that was drawn for it."""

    frames: np.ndarray
    height: np.ndarray
    width: np.ndarray
    target: np.ndarray


def size_ladder(first: int, last: int) -> tuple[int, ...]:
    """Return first, first + 128, ... up to and always including last."""
    return (*range(first, last, LADDER_STEP), last)


def nearest_ratio(height: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Return each sample's position in ASPECT_RATIOS_512: the one nearest to height / width, the lower on a tie."""
    return np.searchsorted(_MIDDLES, np.asarray(height) / np.asarray(width), side="left")


def bucket_sides(position: np.ndarray, target: np.ndarray, ratios: Ratios = USUAL) -> tuple[np.ndarray, np.ndarray]:
    """Return (height, width) int32 of ratio number `position` at target size `target`, floored to the model's grid."""
    grid = ratios.grid
    height = _HEIGHTS[position].astype(np.int64) * target // (512 * grid) * grid
    width = _WIDTHS[position].astype(np.int64) * target // (512 * grid) * grid
    return np.maximum(height, grid).astype(np.int32), np.maximum(width, grid).astype(np.int32)


def exact_sides(
    height: np.ndarray, width: np.ndarray, target: np.ndarray, ratios: Ratios = USUAL
) -> tuple[np.ndarray, np.ndarray]:
    """Return (height, width), int32: multiples of the grid as near to the source's ratio as target x target allow.

    The short side is tried from the largest that fits down to three quarters of it; the long side follows from the
    ratio. Among the candidates that crop at most 0.5 % of the source the largest is chosen; if there is none, the one
    that crops the least. On a grid of 16 pixels at most 1.6 % is cropped at target 512, from 640 on 1.3 %: the worst
    case is a ratio midway between n x n and n x (n - 1) multiples of 16, because no ratio between these two exists
    within that number of pixels.
    """
    short, long = np.minimum(height, width).astype(np.float64), np.maximum(height, width).astype(np.float64)
    ratio, cells = long / short, (np.asarray(target, np.int64) // ratios.grid) ** 2
    largest = np.maximum(np.floor(np.sqrt(cells / ratio) + 1e-9), 1)
    best_short, best_long, best_crop = (
        largest.copy(),
        np.minimum(np.maximum(np.floor(largest * ratio), 1), cells),
        np.ones(len(largest)),
    )
    for smaller in range(int(largest.max(initial=1)) // 4 + 1):
        side = np.maximum(largest - smaller, np.ceil(0.75 * largest))
        for long_side in (np.floor(side * ratio), np.ceil(side * ratio)):
            crop = 1 - np.minimum(long_side / side, ratio) / np.maximum(long_side / side, ratio)
            better = (side * long_side <= cells) & (long_side >= 1) & (crop < best_crop) & (best_crop > ACCEPTED_CROP)
            best_short, best_long, best_crop = (
                np.where(better, new, old)
                for new, old in ((side, best_short), (long_side, best_long), (crop, best_crop))
            )
    tall = height > width
    pixels = ((ratios.grid * side).astype(np.int32) for side in (best_short, best_long))
    short_pixels, long_pixels = pixels
    return np.where(tall, long_pixels, short_pixels), np.where(tall, short_pixels, long_pixels)


def draw_sizes(sizes: tuple[int, ...], mean_side: np.ndarray, draw: np.ndarray, even: bool) -> np.ndarray:
    """Draw a target size for each sample.

    Args:
        sizes: ascending target sizes.
        mean_side: (height + width) / 2 of each source in pixels; sizes above 1.25 times it are dropped, but the
            smallest is always allowed.
        draw: uniform in (0, 1).
        even: all allowed sizes equally; otherwise the largest allowed has probability 0.75 and the rest share 0.25.
    """
    table = np.asarray(sizes)
    # searchsorted gives the number of sizes up to the limit; at least 1, so that the smallest is always allowed
    allowed = np.maximum(np.searchsorted(table, UPSCALE_LIMIT * mean_side, side="right"), 1)
    if even:
        return table[np.minimum((draw * allowed).astype(np.int64), allowed - 1)]
    rest = ((draw - LARGEST_SHARE) / (1 - LARGEST_SHARE) * (allowed - 1)).astype(np.int64)
    pick = np.where((draw < LARGEST_SHARE) | (allowed == 1), allowed - 1, np.minimum(rest, allowed - 2))
    return table[pick]


def crop_frames(frames: np.ndarray, draw: np.ndarray, ratios: Ratios = USUAL) -> np.ndarray:
    """Draw the frames under random_frame_crop: F with probability 0.90, else one of 5, 9, ..., F - 4 uniformly."""
    step = ratios.temporal
    shorter = np.maximum((frames - 1) // step - 1, 0)  # how many of 5, 9, ... are below F
    pick = np.minimum(((draw - FULL_LENGTH_SHARE) / (1 - FULL_LENGTH_SHARE) * shorter).astype(np.int64), shorter - 1)
    return np.where((draw < FULL_LENGTH_SHARE) | (shorter == 0), frames, step * (pick + 1) + 1)


def pace_of(policy: SizePolicy, fps: np.ndarray | None) -> np.ndarray | int:
    """Return the pace, source frames per kept frame: the stride, or float64 per row under sample_fps.

    Args:
        fps: of each source; where it is 0 (unknown) or None, the stride is used. A source slower than sample_fps has a
            pace below 1: frames are repeated, so that motion keeps its speed.
    """
    if not policy.sample_fps or fps is None:
        return policy.stride
    return np.where(fps > 0, fps.astype(np.float64) / policy.sample_fps, policy.stride)


def frame_offsets(frames: Any, pace: Any) -> Any:  # noqa: ANN401 - numbers, or columns of them
    """Return the source frame, counted from the clip's first, that is used as kept frame number `frames` (from 0)."""
    # 1e-6: a product such as 3 * (24 / 8) that float rounding puts just below a whole frame still counts as that frame
    return np.floor(np.asarray(frames) * np.asarray(pace, np.float64) + 1e-6).astype(np.int64)


def frames_at_pace(length: np.ndarray, pace: np.ndarray | int) -> np.ndarray:
    """Return the most frames n (int64) of a video of `length` frames at a pace: frame_offsets(n - 1) < length."""
    if isinstance(pace, int):
        return np.asarray(frames_that_fit(length, pace))
    return np.ceil((length - 1e-6) / pace).astype(np.int64)  # the same 1e-6 as in frame_offsets, whose inverse this is


def static_fates(
    policy: SizePolicy,
    kind: np.ndarray,
    height: np.ndarray,
    width: np.ndarray,
    frames: np.ndarray,
    usable: np.ndarray,
    fps: np.ndarray | None = None,
) -> np.ndarray:
    """Return a Fate per row (uint8) as decided by the row itself; kind is 0 for images and 1 for videos.

    A source with a side under the model's grid, usually 16 pixels, is too small. Without buckets every video must have
    all n_frames.
    """
    fates = np.full(len(kind), Fate.TRAINED, np.uint8)
    fit = frames_at_pace(frames.astype(np.int64), pace_of(policy, fps))
    needed = policy.min_frames if policy.enable_bucket else policy.n_frames
    fates[(kind == 1) & (fit < needed)] = Fate.TOO_SHORT
    if policy.min_frames > 1:
        fates[kind == 0] = Fate.TOO_SHORT
    fates[np.minimum(height, width) < policy.ratios.grid] = Fate.TOO_SMALL
    fates[~usable] = Fate.REFUSED
    return fates


def assign_buckets(
    policy: SizePolicy,
    kind: np.ndarray,
    height: np.ndarray,
    width: np.ndarray,
    frames: np.ndarray,
    draws: BucketDraws,
    *,
    fps: np.ndarray | None = None,
) -> Assignment:
    """Assign each sample to a bucket by its source (pixels, frames; kind 0 image, 1 video) and its uniform draws."""
    video = kind == 1
    mean_side = (height.astype(np.float64) + width) / 2
    video_sizes, image_sizes = policy.video_sizes(), policy.image_sizes()
    target = np.empty(len(kind), np.int64)
    target[video] = draw_sizes(video_sizes, mean_side[video], draws.size[video], even=policy.token_length)
    target[~video] = draw_sizes(image_sizes, mean_side[~video], draws.size[~video], even=False)

    max_frames = np.array([policy.max_frames(size) for size in video_sizes])
    length = np.ones(len(kind), np.int64)
    pace = pace_of(policy, None if fps is None else fps[video])
    # at least one frame, so that the shape is valid; a source without frames is not trained (static_fates)
    fit = np.maximum(frames_at_pace(frames[video].astype(np.int64), pace), 1)
    longest = max_frames[np.searchsorted(np.asarray(video_sizes), target[video])]
    ratios = policy.ratios
    length[video] = np.minimum((fit - 1) // ratios.temporal * ratios.temporal + 1, longest)
    if policy.random_frame_crop:
        length[video] = np.maximum(crop_frames(length[video], draws.frames[video], ratios), policy.min_frames)

    if policy.fix_sample_size:
        high, wide = (side // ratios.grid * ratios.grid for side in policy.fix_sample_size)
        return Assignment(
            length.astype(np.int32), np.full(len(kind), high, np.int32), np.full(len(kind), wide, np.int32), target
        )
    if not policy.enable_bucket:
        square = (target // ratios.grid * ratios.grid).astype(np.int32)
        return Assignment(length.astype(np.int32), square, square, target)
    if policy.grid == "exact" and not policy.random_ratio_crop:
        return Assignment(length.astype(np.int32), *exact_sides(height, width, target, ratios), target)
    if policy.random_ratio_crop:
        position = _CROP_CHOICES[np.searchsorted(_CROP_EDGES, draws.ratio, side="right")]
    else:
        position = nearest_ratio(height, width)
    return Assignment(length.astype(np.int32), *bucket_sides(position, target, ratios), target)


def crop_share(
    height: np.ndarray, width: np.ndarray, bucket_height: np.ndarray, bucket_width: np.ndarray
) -> np.ndarray:
    """Return the share of each source's area (0 to 1) that is cropped to fit its bucket (a centered crop)."""
    scale_y = np.asarray(bucket_height) / height
    scale_x = np.asarray(bucket_width) / width
    return 1 - np.minimum(scale_y, scale_x) / np.maximum(scale_y, scale_x)


def clip_starts(frames: np.ndarray, sample_frames: np.ndarray, pace: np.ndarray | int, draw: np.ndarray) -> np.ndarray:
    """Return the first source frame of each clip (int64): uniform over all starts at which the whole clip fits."""
    latest = last_start(frames, sample_frames, pace)
    return np.minimum((draw * (latest + 1)).astype(np.int64), latest)


def last_start(frames: np.ndarray, sample_frames: np.ndarray, pace: np.ndarray | int) -> np.ndarray:
    """Return the last source frame (int64) at which a clip can start; 0 for an image."""
    return np.maximum(frames.astype(np.int64) - 1 - frame_offsets(sample_frames.astype(np.int64) - 1, pace), 0)


def spaced_starts(
    latest: np.ndarray, length: np.ndarray, clip: np.ndarray, clips: np.ndarray, sampling: str
) -> np.ndarray:
    """Return the first source frame (int64) of clip number `clip` of `clips` of a video.

    Args:
        latest: the last possible start, as last_start returns it.
        length: source frames of the clip.
        sampling: "uniform": evenly spaced from the first possible start to the last, a single clip in the middle;
            "head": one after another from the beginning of the video.
    """
    if sampling == "head":
        return np.minimum(clip * length, latest)
    return np.where(clips > 1, latest * clip // np.maximum(clips - 1, 1), latest // 2)
