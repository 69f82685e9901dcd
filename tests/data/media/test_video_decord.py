"""Tests of reading with decord: what it does not read is read with PyAV, and said; long files are not read whole."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from videox.data.choices import READERS
from videox.data.media import decord as decord_reader
from videox.data.media.container import open_container
from videox.data.media.decord import fallback_line
from videox.data.media.video import probe, read_clip

WIDTH, HEIGHT = 64, 48


def write_clip(path: Path, codec: str, options: dict[str, str], container: dict[str, str], frames: int = 30) -> Path:
    """Write frames that brighten from one to the next."""
    with av.open(str(path), "w", options=container) as file:
        stream = file.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((HEIGHT, WIDTH, 3), 20 + number * 7, np.uint8), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


X264 = {"preset": "ultrafast", "bf": "2", "g": "10"}
NOT_READ_BY_DECORD = {
    "webm without duration": ("a.webm", "libvpx", {"deadline": "realtime"}, {"live": "1"}),
    "vp9 without duration": ("a.webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}, {"live": "1"}),
    "mkv without duration": ("a.mkv", "libx264", X264, {"live": "1"}),
    "fragmented mp4": ("a.mp4", "libx264", X264, {"movflags": "frag_keyframe+empty_moov+default_base_moof"}),
    "flv without duration": ("a.flv", "libx264", X264, {"flvflags": "no_duration_filesize"}),
    "another codec": ("a.mp4", "mpeg4", {}, {}),
    "another container": ("a.ts", "libx264", X264, {}),
}


@pytest.mark.parametrize("name", NOT_READ_BY_DECORD)
def test_what_decord_does_not_read_is_read_with_pyav(tmp_path, name):
    file_name, codec, options, container = NOT_READ_BY_DECORD[name]
    path = write_clip(tmp_path / file_name, codec, options, container)
    indices, reasons = [0, 7, 8, 29], []
    assert probe(path).frames == 30
    expected = read_clip(path, indices, HEIGHT, WIDTH, "pyav")
    got = read_clip(path, indices, HEIGHT, WIDTH, "decord", reasons.append)
    np.testing.assert_array_equal(got, expected)
    if name in ("webm without duration", "vp9 without duration", "another codec", "another container"):
        assert len(reasons) == 1


def test_decord_reads_what_it_reads_exactly(tmp_path):
    path = write_clip(tmp_path / "a.mp4", "libx264", X264, {})
    reasons = []
    got = read_clip(path, [0, 9, 29], HEIGHT, WIDTH, "decord", reasons.append)
    np.testing.assert_array_equal(got, read_clip(path, [0, 9, 29], HEIGHT, WIDTH, "pyav"))
    assert reasons == []
    read_clip(path, [0], HEIGHT, WIDTH, "pyav", reasons.append)
    assert reasons == []


def test_narrow_videos_whose_lines_decord_returns_with_further_channels_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.data.media.test_video_decord.WIDTH", 48)
    path = write_clip(tmp_path / "a.mp4", "libx264", X264, {})
    reasons = []
    got = read_clip(path, [0, 9, 29], HEIGHT, 48, "decord", reasons.append)
    np.testing.assert_array_equal(got, read_clip(path, [0, 9, 29], HEIGHT, 48, "pyav"))
    assert reasons == ["decord returns padded lines as further channels"]


def test_the_line_about_clips_read_with_pyav_counts_the_reasons():
    line = fallback_line(Counter({"it is turned or mirrored": 2, "decord cannot open or decode it": 5}))
    assert line == (
        "--video_reader decord: PyAV read 7 clips in place of decord: decord cannot open or decode it (5); "
        "it is turned or mirrored (2)"
    )


def bytes_read() -> int:
    """Return the bytes that this process has read from files."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [("mp4", "mjpeg"), ("avi", "mpeg4"), ("mkv", "mjpeg"), pytest.param("mov", "mpeg4", marks=pytest.mark.slow)],
)
def test_a_short_clip_of_a_long_file_reads_a_small_part_of_it(tmp_path, monkeypatch, suffix, codec):
    monkeypatch.setattr(decord_reader, "_SMALL_FILE", 100_000)
    path, generator = tmp_path / f"long.{suffix}", np.random.default_rng(0)
    noise = [generator.integers(0, 255, (144, 192, 3), np.uint8) for _ in range(4)]
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=25, options={"qmin": "2", "qmax": "3"})
        stream.width, stream.height = 192, 144
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        if codec == "mpeg4":
            stream.codec_context.gop_size, stream.codec_context.max_b_frames = 10, 2
        for number in range(600):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(noise[number % 4], format="rgb24")))
        file.mux(stream.encode(None))
    size = path.stat().st_size
    assert size > 5_000_000
    assert not open_container(path).fragmented
    read_clip(path, [0], 24, 32)  # so that the imports are not counted
    for reader in READERS:
        before = bytes_read()
        read_clip(path, [*range(300, 309)], 24, 32, reader)
        assert bytes_read() - before < size / 3, reader
