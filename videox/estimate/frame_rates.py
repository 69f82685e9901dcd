"""Report on frame rates at the start of a run: at how many frames per second the videos of each source rate train."""

from __future__ import annotations

import numpy as np

from videox.data.index.index import Index
from videox.data.index.table import VIDEO
from videox.data.plan.buckets import Fate, SizePolicy, frames_at_pace, pace_of
from videox.data.plan.epoch import EpochPlan
from videox.errors import plural

TOLERANCE = 0.25  # share of the model's own frame rate by which videos may differ from it without a warning
USED = (Fate.TRAINED, Fate.HELD_OUT, Fate.NOT_DRAWN)


def frame_rate_lines(
    index: Index, plan: EpochPlan, policy: SizePolicy, model_fps: float, max_rates: int = 8
) -> list[str]:
    """Return lines on the frame rates that videos train at, and a warning where they are not the model's own.

    A video of F frames per second trains at F / stride, or at sample_fps where that is set. There are no lines where
    no video trains with several frames.

    Args:
        index: of the data.
        plan: of any epoch; rows that it refuses are not counted.
        policy: with stride or sample_fps.
        model_fps: frames per second of the videos that the model was trained on, above 0.
        max_rates: source rates that are listed one by one, the most common ones.
    """
    pace = pace_of(policy, index.fps if policy.sample_fps else None)
    several = policy.ratios.temporal  # with as many frames or fewer, a video trains as a single frame
    moving = frames_at_pace(index.frames.astype(np.int64), pace) > several
    used = np.isin(plan.fates, USED) & (index.kind == VIDEO) & moving
    if policy.n_frames == 1 or not used.any():
        return []
    sources, counts = np.unique(np.round(index.fps[used].astype(np.float64), 2), return_counts=True)
    known = sources > 0
    unknown, sources, counts = int(counts[~known].sum()), sources[known], counts[known]
    lines = []
    if policy.sample_fps:
        rates = np.full(len(sources), policy.sample_fps)
        how = f"--video_sample_fps {policy.sample_fps:g}"
        lines = [f"frame rate: {_videos(int(counts.sum()))} train at {policy.sample_fps:g} fps"] if len(counts) else []
    else:
        rates, how = sources / policy.stride, f"--video_sample_stride {policy.stride}"
        lines = [f"frame rates with {how}; the model was trained at {model_fps:g} fps:"]
        lines += _rate_lines(sources, rates, counts, model_fps, max_rates)
    if unknown:
        lines.append(f"  {_videos(unknown)} of unknown frame rate: 1 of {policy.stride} frames is kept")
    off = _is_off(rates, model_fps)
    if off.any():
        lines.append(
            f"warning: {_videos(int(counts[off].sum()))} train at a frame rate more than {TOLERANCE:.0%} off the "
            f"model's {model_fps:g} fps ({how}), so that the model learns another speed of motion: use "
            f"--video_sample_fps {model_fps:g}"
        )
    return lines


def _rate_lines(
    sources: np.ndarray, rates: np.ndarray, counts: np.ndarray, model_fps: float, max_rates: int
) -> list[str]:
    """Return a line for each of the most common source rates, and one for all others."""
    order = np.argsort(-counts, kind="stable")
    shown, others = np.sort(order[:max_rates]), order[max_rates:]
    lines = []
    for i in shown:
        speed = f": motion looks {model_fps / rates[i]:.2g} times as fast" if _is_off(rates[i], model_fps) else ""
        lines.append(f"  {_videos(int(counts[i]))} of {sources[i]:g} fps train at {rates[i]:.4g} fps{speed}")
    if len(others):
        spread = " to ".join(f"{end:.4g}" for end in (rates[others].min(), rates[others].max()))
        lines.append(
            f"  {_videos(int(counts[others].sum()))} of {len(others)} other {plural(len(others), 'rate')} train at {spread} fps"
        )
    return lines


def _is_off(rates: np.ndarray, model_fps: float) -> np.ndarray:
    """Return bool for each rate: whether it differs from the model's by more than TOLERANCE."""
    return np.abs(rates / model_fps - 1) > TOLERANCE + 1e-9


def _videos(count: int) -> str:
    return f"{count} {plural(count, 'video')}"
