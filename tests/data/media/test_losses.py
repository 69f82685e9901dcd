"""Tests of recordings that lost pictures in their middle: frames are counted and read as the decoder delivers them."""

from __future__ import annotations

from pathlib import Path

import av
import pytest

from tests.data.media.test_video_frames import (
    H264,
    HEIGHT,
    HEVC,
    HEVC_CLOSED,
    WIDTH,
    assert_as_decoded,
    decoded,
    remux,
    write_clip,
)
from tests.support.h264_fields import write_fields
from videox.data.media import frames as reading
from videox.data.media import packets as listing
from videox.data.media.bitstream import H264 as Reader
from videox.data.media.container import LOST_PICTURES, BadMedia, open_container
from videox.data.media.video import probe, read_clip


def without_packets(source: Path, target: Path, *lost: int) -> Path:
    """Copy the packets of a clip, without those of these numbers; their times stay."""
    with av.open(str(source)) as file, av.open(str(target), "w") as copy:
        template = file.streams.video[0]
        stream = copy.add_stream_from_template(template)
        for number, packet in enumerate(packet for packet in file.demux(template) if packet.size):
            if number not in lost:
                packet.stream = stream
                copy.mux(packet)
    return target


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("suffix", "lost"),
    [
        ("ts", (24,)),
        ("mkv", (24,)),
        ("ts", (46,)),
        ("mkv", (48, 49, 50)),
        pytest.param("flv", (24,), marks=SLOW),
        pytest.param("ts", (25,), marks=SLOW),
        pytest.param("ts", (12, 36), marks=SLOW),
    ],
)
def test_lost_pictures_are_not_counted(tmp_path: Path, suffix: str, lost: tuple[int, ...]) -> None:
    clip = write_clip(tmp_path / "clip.mp4", options=H264, frames=60)
    assert_as_decoded(without_packets(clip, tmp_path / f"lossy.{suffix}", *lost))


@pytest.mark.parametrize(
    ("suffix", "options", "lost"),
    [("ts", HEVC_CLOSED, (12,)), ("mkv", HEVC, (13, 26)), pytest.param("mkv", HEVC, (14,), marks=SLOW)],
)
def test_lost_pictures_of_hevc_are_not_counted(
    tmp_path: Path, suffix: str, options: dict[str, str], lost: tuple[int, ...]
) -> None:
    clip = write_clip(tmp_path / "clip.mp4", "libx265", options)
    path = without_packets(clip, tmp_path / f"lossy.{suffix}", *lost)
    assert probe(path).decoding & LOST_PICTURES
    assert_as_decoded(path)


@pytest.mark.parametrize(("codec", "options", "lost"), [("libx265", HEVC, 14), ("libx264", H264, 24)])
def test_an_mp4_that_lacks_frames_never_gives_others_in_their_place(
    tmp_path: Path, codec: str, options: dict[str, str], lost: int
) -> None:
    """The index of an MP4 does not show the loss, and nothing else of the file is read before the frames."""
    clip = write_clip(tmp_path / "clip.mp4", codec, options)
    path = without_packets(clip, tmp_path / "lossy.mp4", lost)
    expected, count = decoded(path), probe(path).frames
    assert count == 39 > len(expected)
    for index in range(count):
        try:
            (got,) = read_clip(path, [index], HEIGHT, WIDTH)
        except BadMedia as bad:
            assert bad.media_class == "undecodable" and index >= lost - 4
        else:
            assert any((got == frame).all() for frame in expected[max(0, index - 12) : index + 1])
    with pytest.raises(BadMedia, match="undecodable"):
        read_clip(path, [*range(count)], HEIGHT, WIDTH)


def test_frames_far_from_a_loss_are_read_without_decoding_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = write_clip(tmp_path / "clip.mp4", options=H264, frames=150)
    path = without_packets(clip, tmp_path / "lossy.ts", 60)
    expected = decoded(path)
    info = probe(path)
    assert info.frames == len(expected) < 149 and info.decoding & LOST_PICTURES
    monkeypatch.setattr(reading, "_read_from_start", lambda *_: pytest.fail("read from the start of the file"))
    for index in (20, 62, 110, len(expected) - 1):
        assert (read_clip(path, [index], HEIGHT, WIDTH)[0] == expected[index]).all()


def test_many_losses_are_counted_by_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "_MAX_LOSSES", 2)
    clip = write_clip(tmp_path / "clip.mp4", options=H264, frames=80)
    path = without_packets(clip, tmp_path / "lossy.ts", 12, 24, 36, 48)
    assert probe(path).frames == len(decoded(path))
    assert not listing.listing_of(path, open_container(path)).countable
    assert_as_decoded(path)


@pytest.mark.parametrize("suffix", ["ts", "mkv"])
def test_whole_clips_have_no_losses(tmp_path: Path, suffix: str) -> None:
    whole = write_clip(tmp_path / "clip.mp4", options=H264, frames=30)
    fields = write_fields(tmp_path / f"fields.{suffix}", b_frames=True)
    hevc = write_clip(tmp_path / "hevc.mp4", "libx265", HEVC, frames=30)
    for path in (remux(whole, tmp_path / f"copy.{suffix}"), remux(hevc, tmp_path / f"copy2.{suffix}"), fields):
        assert listing.listing_of(path, open_container(path)).losses == ()
        assert not probe(path).decoding & LOST_PICTURES


def test_a_stream_that_may_leave_out_numbers_has_no_losses(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", options=H264, frames=30)
    with av.open(str(clip)) as file:
        stream = file.streams.video[0]
        packets = [bytes(packet) for packet in file.demux(stream) if packet.size]
        reader = Reader(stream.codec_context.extradata)
    del packets[12]
    assert [at for at, packet in enumerate(packets) if reader.read(packet).after_loss][:1] == [12]
    reader.sequences = {number: found._replace(gaps_allowed=True) for number, found in reader.sequences.items()}
    assert not any(reader.read(packet).after_loss for packet in packets)
