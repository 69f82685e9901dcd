"""Tests of MediaInfo.decoding: which files are marked as decoded otherwise than by earlier versions."""

from __future__ import annotations

import pytest

from tests.data.media.test_video_frames import H264, HEVC, OPEN_GOP, remux, write_clip
from tests.support.h264_fields import write_fields
from videox.data.media.container import BETWEEN_KEYFRAMES, FIELD_CODED, REORDERED
from videox.data.media.video import probe

NO_B_FRAMES = {**H264, "bf": "0"}
HEVC_NO_B_FRAMES = {**HEVC, "x265-params": HEVC["x265-params"].replace("bframes=3", "bframes=0")}


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize(
    ("codec", "options", "decoding"),
    [
        ("libx264", H264, REORDERED),
        ("libx264", NO_B_FRAMES, 0),
        ("mpeg4", None, REORDERED),
        ("libx265", HEVC, REORDERED),
        ("libx265", HEVC_NO_B_FRAMES, 0),
    ],
)
def test_b_frames_whose_times_are_those_of_decoding_are_marked(tmp_path, suffix, codec, options, decoding):
    clip = write_clip(tmp_path / "clip.mp4", codec, options, frames=30)
    assert probe(clip).decoding == 0
    assert probe(remux(clip, tmp_path / f"plain.{suffix}")).decoding == 0
    assert probe(remux(clip, tmp_path / f"copy.{suffix}", decoding_times=True)).decoding == decoding


@pytest.mark.parametrize("suffix", ["ts", "mkv"])
def test_field_coded_videos_are_marked(tmp_path, suffix):
    assert probe(write_fields(tmp_path / f"fields.{suffix}", b_frames=True)).decoding == FIELD_CODED
    assert probe(write_fields(tmp_path / f"frames.{suffix}", progressive=tuple(range(20)))).decoding == 0


@pytest.mark.parametrize(
    ("suffix", "codec", "options", "dropped", "decoding"),
    [
        ("mkv", "libx264", H264, 5, BETWEEN_KEYFRAMES),
        ("ts", "libx264", H264, 5, BETWEEN_KEYFRAMES),
        ("mp4", "libx264", H264, 12, 0),  # begins at the second keyframe, to which nothing before it matters
        ("mp4", "libx265", HEVC, 12, BETWEEN_KEYFRAMES),  # frames that are displayed before it refer to lost ones
        ("mpg", "mpeg2video", None, 4, BETWEEN_KEYFRAMES),
        ("avi", "mpeg4", None, 5, BETWEEN_KEYFRAMES),
        ("ts", "libx264", OPEN_GOP, 0, 0),
        ("mpg", "mpeg2video", None, 0, 0),
    ],
)
def test_recordings_that_begin_between_keyframes_are_marked(tmp_path, suffix, codec, options, dropped, decoding):
    clip = write_clip(tmp_path / f"clip.{'mp4' if suffix == 'mkv' else suffix}", codec, options)
    path = remux(clip, tmp_path / f"cut.{suffix}", dropped=dropped)
    assert probe(path).decoding & BETWEEN_KEYFRAMES == decoding


def test_frames_that_an_edit_list_hides_are_no_lost_ones(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", options=H264, start=-7)
    info = probe(clip)
    assert (info.frames, info.decoding) == (33, 0)


def test_a_first_frame_that_is_not_marked_as_a_keyframe_is_not_marked(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", options=H264)
    assert probe(remux(clip, tmp_path / "copy.mp4", no_key=True)).decoding == 0
