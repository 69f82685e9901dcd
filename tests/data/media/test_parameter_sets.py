"""Tests of files whose packets contain other parameter sets than their container states."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from tests.data.media.test_video_frames import H264, HEIGHT, HEVC_CLOSED, WIDTH, assert_as_decoded, decoded, write_clip
from videox.data.media import bitstream
from videox.data.media.container import EARLIER_SETS, open_container
from videox.data.media.packets import listing_of
from videox.data.media.video import probe, read_clip

# The two options write pictures that a decoder with the sets of the other one reads wrongly.
OTHER = {
    "libx264": ({**H264, "x264-params": H264["x264-params"] + ":cabac=0"}, {**H264, "qp": "40"}),
    "libx265": (
        {**HEVC_CLOSED, "x265-params": HEVC_CLOSED["x265-params"] + ":no-sao=1:no-signhide=1"},
        {**HEVC_CLOSED, "x265-params": HEVC_CLOSED["x265-params"] + ":qp=40:signhide=1:sao=1"},
    ),
}


def parameter_sets(codec: str, extradata: bytes) -> bytes:
    """Return the sets of an avcC or hvcC box as they stand in a packet: each after its length, of 4 bytes."""
    units = (
        bitstream._avcc_parameter_sets(extradata) if codec == "libx264" else bitstream._hvcc_parameter_sets(extradata)
    )
    return b"".join(len(unit).to_bytes(4, "big") + unit for unit in units)


def write_other_sets(path: Path, codec: str, suffix: str, where: str) -> np.ndarray:
    """Write the packets of a clip with the header of another one, and return the frames of the clip.

    Args:
        path: the folder.
        codec: the encoder.
        suffix: of the file, which is named `mixed`.
        where: packets that contain the clip's own sets: "first", "keyframes", or "join" for a file that begins with
            the other clip and has them in the first packet of the second.
    """
    header, clip = (
        write_clip(path / f"{name}.mp4", codec, options) for name, options in zip("ab", OTHER[codec], strict=True)
    )
    with (
        av.open(str(header)) as stated,
        av.open(str(clip)) as source,
        av.open(str(path / f"mixed.{suffix}"), "w") as file,
    ):
        template, stream = source.streams.video[0], file.add_stream_from_template(stated.streams.video[0])
        sets = parameter_sets(codec, template.codec_context.extradata)
        assert sets != parameter_sets(codec, stated.streams.video[0].codec_context.extradata)
        before = [packet for packet in stated.demux(video=0) if packet.size] if where == "join" else []
        after = [packet for packet in source.demux(template) if packet.size]
        end = max((packet.pts + packet.duration for packet in before), default=0)
        for number, packet in enumerate([*before, *after]):
            own = number == len(before) or (where == "keyframes" and packet.is_keyframe)
            copy = av.Packet((sets if own else b"") + bytes(packet))
            shift = end if number >= len(before) else 0
            copy.pts, copy.dts, copy.time_base = packet.pts + shift, packet.dts + shift, packet.time_base
            copy.duration, copy.is_keyframe, copy.stream = packet.duration, packet.is_keyframe, stream
            file.mux(copy)
    return np.stack((decoded(header) if where == "join" else []) + decoded(clip))


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "flv"])
@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_keyframes_that_need_the_headers_of_the_first_frame_are_read(tmp_path: Path, codec: str, suffix: str) -> None:
    if (codec, suffix) == ("libx265", "flv"):
        suffix = "mov"
    expected = write_other_sets(tmp_path, codec, suffix, "first")
    path = tmp_path / f"mixed.{suffix}"
    np.testing.assert_array_equal(np.stack(decoded(path)), expected)
    assert_as_decoded(path)
    assert probe(path).decoding == EARLIER_SETS
    reasons: list[str] = []
    read_clip(path, [30], HEIGHT, WIDTH, "decord", reasons.append)
    assert len(reasons) == 1


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_keyframes_that_contain_their_headers_are_places_to_start(tmp_path: Path, codec: str) -> None:
    write_other_sets(tmp_path, codec, "mp4", "keyframes")
    path = tmp_path / "mixed.mp4"
    assert_as_decoded(path)
    assert probe(path).decoding == 0
    assert listing_of(path, open_container(path)).packets.key.sum() > 2


def test_a_join_in_the_middle_is_found_by_the_damage(tmp_path: Path) -> None:
    expected = write_other_sets(tmp_path, "libx264", "mp4", "join")
    path = tmp_path / "mixed.mp4"
    assert len(expected) == 80
    for first in (2, 45, 60, 78):
        np.testing.assert_array_equal(read_clip(path, [first, first + 1], HEIGHT, WIDTH), expected[first : first + 2])


def test_keyframes_of_an_old_x264_need_its_version_in_the_first_frame(tmp_path: Path) -> None:
    """FFmpeg decodes 4:4:4 pictures of old versions by other rules, which it knows from the first packet only."""
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=25, options={**H264, "qp": "8"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv444p"
        for number in range(40):
            pixels = np.random.default_rng(number).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = number
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    assert probe(path).decoding == 0
    content = path.read_bytes()
    version = bitstream._X264.search(content)
    assert version is not None and len(version[1]) == 3
    path.write_bytes(content.replace(b"x264 - core " + version[1], b"x264 - core 120"))
    assert_as_decoded(path)
    assert probe(path).decoding == EARLIER_SETS
