"""Tests of videox.estimate.data_report: which reason is printed for videos that are trained as a single frame."""

from __future__ import annotations

import numpy as np
import pytest

from videox.data.plan.buckets import SizePolicy
from videox.data.plan.plan import plan_epoch
from videox.data.plan.settings import PlanColumns, PlanSettings
from videox.estimate.data_report import single_frame_lines

TOO_SHORT = "too short for more at this stride or frame rate"
SIZES = {"video_sample_size": 96, "image_sample_size": 96, "enable_bucket": True}


def lines_of(frames: list[int], fps: float | None = None, **policy: object) -> list[str]:
    """Return the lines of a data set of one image, followed by videos of 256 x 144 pixels."""
    count = np.array([1, *frames], np.int32)
    columns = PlanColumns(
        (np.arange(len(count)) > 0).astype(np.uint8),
        np.full(len(count), 256, np.int32),
        np.full(len(count), 144, np.int32),
        count,
        np.ones(len(count), bool),
        fps=None if fps is None else np.full(len(count), fps, np.float32),
    )
    settings = PlanSettings(SizePolicy(**{**SIZES, **policy}), batch_size=1, slots=1, seed=0)
    return single_frame_lines(columns, plan_epoch(columns, settings, 0), settings.policy)


def test_a_short_video_is_too_short() -> None:
    assert lines_of([60, 4, 5, 1], n_frames=9, stride=1) == [
        f"2 videos are trained as a single frame, {TOO_SHORT}: rows 2, 4"
    ]
    assert lines_of([60, 17, 16], n_frames=9, stride=4) == [
        f"1 video is trained as a single frame, {TOO_SHORT}: row 3"
    ]
    assert lines_of([3] * 7, n_frames=9, stride=1) == [
        f"7 videos are trained as a single frame, {TOO_SHORT}: rows 1, 2, 3, 4, 5, ..."
    ]


def test_a_short_video_at_its_frame_rate_is_too_short() -> None:
    assert lines_of([60, 12], fps=24.0, n_frames=9, stride=1, sample_fps=8.0) == [
        f"1 video is trained as a single frame, {TOO_SHORT}: row 2"
    ]


@pytest.mark.parametrize("random_frame_crop", [False, True])
def test_a_long_video_is_cut_by_the_token_budget(random_frame_crop: bool) -> None:
    budget = {"token_sample_size": 48, "token_length": True, "n_frames": 9, "stride": 1}
    lines = lines_of([60, 2, 60], random_frame_crop=random_frame_crop, **budget)
    assert lines == [
        f"1 video is trained as a single frame, {TOO_SHORT}: row 2",
        "2 videos are trained as a single frame, as the token budget (--token_sample_size 48) allows no more at their "
        "target size: rows 1, 3",
    ]
    assert lines_of([60, 60], **{**budget, "token_sample_size": 96}) == []


def test_single_frames_by_request_have_no_line() -> None:
    assert lines_of([60, 2], n_frames=1, stride=1) == []
