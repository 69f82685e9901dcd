"""Tests of MPEG-2 whose frames are two field pictures: two pictures are one frame."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.data.media.test_video_frames import assert_as_decoded, decoded
from tests.support.mpeg2_fields import frames, shades_of, write_mpeg2_fields
from videox.data.media.bitstream import content_reader
from videox.data.media.video import probe


@pytest.mark.parametrize(
    "suffix", ["m2v", "ts", *(pytest.param(s, marks=pytest.mark.slow) for s in ("mpg", "mkv", "mp4"))]
)
def test_two_field_pictures_of_mpeg2_are_one_frame(tmp_path: Path, suffix: str) -> None:
    path = write_mpeg2_fields(tmp_path / f"fields.{suffix}")
    pictures = decoded(path)
    assert len(pictures) == probe(path).frames == 20
    for number, picture in enumerate(pictures):
        luma = picture[16::32, 8::16, 0] * (219 / 255) + 16
        np.testing.assert_allclose(luma, shades_of(number), atol=1.5)
    assert probe(path).fps == pytest.approx(25)
    assert_as_decoded(path)


@pytest.mark.parametrize("suffix", ["ts", "mpg"])
def test_fields_in_packets_of_their_own_are_joined(tmp_path: Path, suffix: str) -> None:
    assert_as_decoded(write_mpeg2_fields(tmp_path / f"fields.{suffix}", apart=True))


@pytest.mark.parametrize("suffix", ["ts", pytest.param("mpg", marks=pytest.mark.slow), "mkv"])
def test_a_recording_of_fields_that_begins_between_keyframes(tmp_path: Path, suffix: str) -> None:
    path = write_mpeg2_fields(tmp_path / f"fields.{suffix}", dropped=2)
    assert 0 < len(decoded(path)) == probe(path).frames
    assert_as_decoded(path)


def test_a_packet_of_two_field_pictures_has_one_frame() -> None:
    look = content_reader("mpeg2video", None)
    assert [look(frame).frames for frame in frames(7, 6)] == [1] * 7
