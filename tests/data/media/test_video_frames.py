"""Tests of the order and number of frames: times that order nothing, fields, beginnings that cannot be decoded."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from tests.support.h264_fields import write_fields
from videox.data.choices import READERS
from videox.data.media import frames as reading
from videox.data.media.container import BadMedia, open_container
from videox.data.media.packets import decode_from_start, listing_of, number_packet
from videox.data.media.video import probe, read_clip

WIDTH, HEIGHT = 64, 48
H264 = {"preset": "ultrafast", "bf": "2", "g": "12", "x264-params": "scenecut=0:b-adapt=0:log-level=none"}
OPEN_GOP = {**H264, "x264-params": "scenecut=0:b-adapt=0:log-level=none:open-gop=1"}
HEVC = {"preset": "ultrafast", "x265-params": "log-level=none:bframes=3:b-adapt=0:keyint=12:scenecut=0:pools=none"}
HEVC_CLOSED = {**HEVC, "x265-params": HEVC["x265-params"] + ":open-gop=0"}


def write_clip(
    path: Path, codec: str = "libx264", options: dict[str, str] | None = None, frames: int = 40, start: int = 0
) -> Path:
    """Write frames that brighten from one to the next, with a bar that moves and a strip of noise; the first has the
    time `start`, in frames."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        if codec.startswith("mpeg"):
            stream.codec_context.gop_size, stream.codec_context.max_b_frames = 12, 2
        if codec.startswith("libvpx"):
            stream.codec_context.gop_size = 12
        for number in range(frames):
            pixels = np.full((HEIGHT, WIDTH, 3), 20 + number * 9 % 200, np.uint8)
            pixels[:, number % 60 : number % 60 + 4] = 250
            pixels[:8] = np.random.default_rng(number).integers(0, 255, (8, WIDTH, 1))
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = start + number, Fraction(1, 25)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def remux(source: Path, target: Path, *, dropped: int = 0, decoding_times: bool = False, no_key: bool = False) -> Path:
    """Copy the packets of a clip to another container.

    Args:
        source: the clip.
        target: the copy; its suffix names the container.
        dropped: packets left out at the beginning.
        decoding_times: presentation times are replaced by decoding times, as `ffmpeg -i a.avi -c copy` writes them.
        no_key: the first packet is not marked as a keyframe.
    """
    with av.open(str(source)) as file, av.open(str(target), "w") as copy:
        template = file.streams.video[0]
        stream = copy.add_stream_from_template(template)
        step = round(1 / (25 * template.time_base))
        packets = [packet for packet in file.demux(template) if packet.size]
        for number, packet in enumerate(packets[dropped:]):
            packet.stream = stream
            if decoding_times:
                packet.pts = packet.dts = number * step
            elif packet.dts is None:
                packet.dts = (number - 4) * step
            if no_key and number == 0:
                packet.is_keyframe = False
            copy.mux(packet)
    return target


def decoded(path: Path) -> list[np.ndarray]:
    """Return every frame as a decoder delivers it, [height, width, 3]: the reference for both readers."""
    with av.open(str(path)) as file:
        return [frame.to_ndarray(format="rgb24", interpolation="BICUBIC") for frame in file.decode(video=0)]


def assert_as_decoded(path: Path) -> None:
    """Check the number of frames, and what both readers return for lists that begin and end anywhere."""
    expected = np.stack(decoded(path))
    count = len(expected)
    assert probe(path).frames == count
    height, width = expected.shape[1:3]
    for reader in READERS:
        for indices in ([*range(count)], [0], [count - 1], [count // 2, count // 2 + 1], [count // 3, count - 2]):
            got = read_clip(path, indices, height, width, reader)
            np.testing.assert_array_equal(got, expected[indices], err_msg=f"{reader} {indices}")
        with pytest.raises(BadMedia, match=r"out_of_range|undecodable: only"):
            read_clip(path, [count - 1, count], height, width, reader)


DECODING_TIMES = {
    "h264 mp4": ("mp4", "mp4", "libx264", H264),
    "h264 mov": ("mp4", "mov", "libx264", H264),
    "h264 mkv": ("mp4", "mkv", "libx264", H264),
    "h264 ts": ("ts", "ts", "libx264", H264),
    "h264 flv": ("mp4", "flv", "libx264", H264),
    "h264 open groups mp4": ("mp4", "mp4", "libx264", OPEN_GOP),
    "mpeg4 mp4": ("mp4", "mp4", "mpeg4", None),
    "mpeg4 mkv": ("mp4", "mkv", "mpeg4", None),
    "mpeg4 avi": ("avi", "avi", "mpeg4", None),
    "mpeg2 mkv": ("mkv", "mkv", "mpeg2video", None),
    "mpeg2 ts": ("ts", "ts", "mpeg2video", None),
    "hevc mp4": ("mp4", "mp4", "libx265", HEVC),
    "hevc closed groups mkv": ("mp4", "mkv", "libx265", HEVC_CLOSED),
}


SLOW = ("h264 mov", "h264 ts", "mpeg4 mkv", "mpeg2 ts", "hevc closed groups mkv")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in DECODING_TIMES]
)
def test_frames_come_in_the_order_of_the_decoder_where_times_are_those_of_decoding(tmp_path, name):
    first, second, codec, options = DECODING_TIMES[name]
    clip = write_clip(tmp_path / f"clip.{first}", codec, options)
    copy = remux(clip, tmp_path / f"copy.{second}", decoding_times=True)
    expected = decoded(clip)
    assert all(np.array_equal(a, b) for a, b in zip(decoded(copy), expected, strict=True))
    assert_as_decoded(copy)


@pytest.mark.parametrize(
    ("codec", "options", "suffix"),
    [("libx264", H264, "mp4"), ("libx264", OPEN_GOP, "mkv"), ("mpeg4", None, "avi"), ("mpeg4", None, "mp4")],
)
def test_frames_are_counted_from_a_keyframe_near_them(tmp_path, monkeypatch, codec, options, suffix):
    clip = write_clip(tmp_path / f"clip.{'mp4' if suffix == 'mkv' else suffix}", codec, options, frames=150)
    path = remux(clip, tmp_path / f"copy.{suffix}", decoding_times=True)
    expected = decoded(path)
    probe(path)  # may decode the beginning, to see which frames are delivered
    listing_of(path, open_container(path))

    def fail(*arguments):
        raise AssertionError("read from the start of the file")

    monkeypatch.setattr(reading, "_read_from_start", fail)
    for indices in ([70], [99, 100, 101], [140, 149], [83, 84]):
        got = read_clip(path, indices, HEIGHT, WIDTH)
        np.testing.assert_array_equal(got, np.stack([expected[index] for index in indices]), err_msg=str(indices))


FIELDS = {
    "a time for each": {},
    "B-frames": {"b_frames": True},
    "one time per frame": {"together": True, "b_frames": True},
    "some frames are not divided": {"progressive": (3, 4, 9), "b_frames": True},
    "bottom field first": {"bottom_first": True},
    "times of decoding": {"b_frames": True, "times": "decoding"},
}


@pytest.mark.parametrize(
    "suffix", ["ts", pytest.param("m2ts", marks=pytest.mark.slow), "mkv", pytest.param("mp4", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", FIELDS)
def test_two_fields_are_one_frame(tmp_path, suffix, name):
    path = write_fields(tmp_path / f"fields.{suffix}", **FIELDS[name])
    assert len(decoded(path)) == probe(path).frames == 20
    assert probe(path).fps == pytest.approx(25, rel=0.06)
    assert_as_decoded(path)


BEGINNINGS = {
    "h264 ts": ("ts", "libx264", H264, 5),
    "h264 mkv": ("mkv", "libx264", H264, 5),
    "h264 mp4": ("mp4", "libx264", H264, 5),
    "h264 open group ts": ("ts", "libx264", OPEN_GOP, 12),
    "h264 open group mp4": ("mp4", "libx264", OPEN_GOP, 12),
    "hevc mkv": ("mkv", "libx265", HEVC, 5),
    "hevc open group mp4": ("mp4", "libx265", HEVC, 12),
    "mpeg2 mpg": ("mpg", "mpeg2video", None, 4),
    "mpeg2 ts": ("ts", "mpeg2video", None, 5),
    "mpeg4 avi": ("avi", "mpeg4", None, 5),
    "mpeg4 mkv": ("mkv", "mpeg4", None, 5),
    "mpeg4 mp4": ("mp4", "mpeg4", None, 5),
}


@pytest.mark.parametrize("name", BEGINNINGS)
def test_the_frames_of_a_recording_that_begins_between_keyframes_are_those_that_decode(tmp_path, name):
    suffix, codec, options, dropped = BEGINNINGS[name]
    clip = write_clip(tmp_path / f"clip.{'mp4' if suffix == 'mkv' else suffix}", codec, options)
    assert_as_decoded(remux(clip, tmp_path / f"cut.{suffix}", dropped=dropped))


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv"])
def test_a_first_frame_that_is_not_marked_as_a_keyframe_is_read(tmp_path, suffix):
    clip = write_clip(tmp_path / "clip.mp4", options=H264)
    path = remux(clip, tmp_path / f"copy.{suffix}", no_key=True)
    assert len(decoded(path)) == 40
    assert_as_decoded(path)


def test_a_file_without_any_frame_that_decodes_says_so(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", options={**H264, "g": "100"})
    path = remux(clip, tmp_path / "cut.mkv", dropped=20)
    assert not decoded(path)
    with pytest.raises(BadMedia, match="undecodable: no frame can be decoded"):
        probe(path)


def test_the_error_numbers_of_ffmpeg_are_not_those_of_the_system(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", options=H264)
    path = remux(clip, tmp_path / "copy.mp4", no_key=True)
    assert sum(1 for _ in decode_from_start(path, open_container(path))) == 40
    with av.open(str(path)) as file, pytest.raises(PermissionError):
        file.seek(0)


def test_the_number_of_a_packet_does_not_depend_on_other_packets():
    first, second = av.Packet(b"a"), av.Packet(b"b")
    number_packet(first, 49)
    number_packet(second, 49)
    del first
    assert second.opaque == [49]
