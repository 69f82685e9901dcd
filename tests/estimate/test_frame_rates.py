"""Tests of videox.estimate.frame_rates: the rates that videos train at, and when a warning is printed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from videox.data.index.index import Index, MediaColumns
from videox.data.plan.buckets import SizePolicy
from videox.data.plan.plan import plan_epoch
from videox.data.plan.settings import PlanSettings, columns_of
from videox.estimate.frame_rates import frame_rate_lines

SIZES = {"video_sample_size": 96, "image_sample_size": 96, "enable_bucket": True, "n_frames": 9}


def lines_of(
    rates: list[float], model_fps: float = 16, images: int = 0, frames: int = 400, **policy: object
) -> list[str]:
    """Return the lines for videos of these frame rates, 0 = unknown, after some images."""
    kind = np.array([0] * images + [1] * len(rates))
    full = {name: np.full(len(kind), value) for name, value in (("width", 256), ("height", 144))}
    fps = np.array([0.0] * images + rates)
    index = Index.from_columns(MediaColumns(kind=kind, frames=np.where(kind, frames, 1), fps=fps, **full))
    plan = PlanSettings(SizePolicy(**{**SIZES, "stride": 3, **policy}), batch_size=1, slots=1, seed=0)
    columns = columns_of(index, by_second=plan.policy.sample_fps > 0)
    return frame_rate_lines(index, plan_epoch(columns, plan, 0), plan.policy, model_fps, max_rates=3)


def test_each_source_rate_has_a_line_and_rates_far_off_a_warning() -> None:
    header, *lines, warning = lines_of([24.0] * 3 + [60.0] + [47.952], images=2)
    assert header == "frame rates with --video_sample_stride 3; the model was trained at 16 fps:"
    assert lines == [
        "  3 videos of 24 fps train at 8 fps: motion looks 2 times as fast",
        "  1 video of 47.95 fps train at 15.98 fps",
        "  1 video of 60 fps train at 20 fps",
    ]
    assert warning.startswith("warning: 3 videos train at a frame rate more than 25% off the model's 16 fps")
    assert warning.endswith("use --video_sample_fps 16")


def test_the_rate_of_the_model_decides() -> None:
    assert not [line for line in lines_of([48.0], stride=3) if "warning" in line]
    slow = lines_of([48.0], stride=1, model_fps=24)
    assert "train at 48 fps: motion looks 0.5 times as fast" in slow[1] and slow[-1].endswith("--video_sample_fps 24")


@settings(max_examples=25)
@given(st.integers(1, 400), st.sampled_from([16.0, 24.0]))
@example(80, 16.0)
@example(48, 16.0)
def test_the_warning_begins_above_a_quarter(quarters: int, model_fps: float) -> None:
    rate = quarters / 4
    warned = "warning" in lines_of([rate], stride=1, model_fps=model_fps)[-1]
    assert warned == (rate > 1.25 * model_fps or rate < 0.75 * model_fps)


def test_a_frame_rate_for_all_needs_no_list() -> None:
    assert lines_of([24.0, 60.0], sample_fps=16.0) == ["frame rate: 2 videos train at 16 fps"]
    first, warning = lines_of([24.0, 60.0], sample_fps=8.0)
    assert first == "frame rate: 2 videos train at 8 fps" and warning.startswith("warning: 2 videos")
    assert "(--video_sample_fps 8)" in warning and warning.endswith("use --video_sample_fps 16")


@pytest.mark.parametrize("sample_fps", [0.0, 16.0])
def test_unknown_rates_are_counted_and_never_warned_about(sample_fps: float) -> None:
    lines = lines_of([0.0, 0.0, 48.0], sample_fps=sample_fps)
    assert "  2 videos of unknown frame rate: 1 of 3 frames is kept" in lines
    assert not [line for line in lines if "warning" in line]


def test_rare_rates_share_a_line() -> None:
    _, *lines, warning = lines_of([24.0] * 5 + [25.0] * 4 + [30.0] * 3 + [48.0, 120.0])
    assert [line.split()[0] for line in lines] == ["5", "4", "3", "2"]
    assert lines[-1] == "  2 videos of 2 other rates train at 16 to 40 fps"
    assert warning.startswith("warning: 13 videos")


def test_there_is_nothing_to_say_about_images_and_single_frames() -> None:
    assert lines_of([], images=3) == []
    assert lines_of([24.0], n_frames=1) == []
    assert lines_of([24.0], frames=1, images=1) == []
