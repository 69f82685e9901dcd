"""Serves the index and the dataset: the size of any media file, and those frames of a clip that are wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from videox.data.media import decord as decord_reader
from videox.data.media.container import (
    MAX_PIXELS,
    BadMedia,
    Container,
    MediaInfo,
    check_pixels,
    open_container,
    raise_for_system,
    sniff,
)
from videox.data.media.image import probe_image, read_image, resize_cover

__all__ = ["READERS", "BadMedia", "MediaInfo", "probe", "read_clip", "read_image", "sniff"]

READERS = ("pyav", "decord")  # the first is the default, since benchmarks/decode.py measures it faster

# Decoders that leave out a frame no other frame refers to, exactly, when told so for its packet alone. HEVC's takes
# for such also a frame that only those of a higher temporal layer refer to.
_SKIPS_EXACTLY = ("h264", "mpeg4", "mpeg2video", "mpeg1video")
_NO_TIMES = ("avi",)  # it stores no presentation times, and those that FFmpeg fills in are wrong with B-frames


@dataclass(frozen=True, slots=True)
class _Packet:
    """One packet of the video stream: presentation time, whether decoding can begin here, whether it is shown."""

    pts: int | None
    key: bool
    shown: bool


def probe(path: Path) -> MediaInfo:
    """Returns the size, frames and rate of an image or video.

    The frame count is counted, never a header's claim: index entries that lie inside the file where the container
    has a full index, packets elsewhere. One frame is decoded, to learn which way is up.

    Raises:
        BadMedia: the classes of `open_container`, no_video_stream, too_large, truncated, or undecodable.
    """
    container = open_container(path)
    if container.kind == "image":
        return probe_image(path)
    with _open_video(path, container) as (file, stream):
        times, count = _count(file, stream, container)
        if count == 0:
            raise BadMedia("no_video_stream", "its video stream has no frames")
        fps = _rate(stream, times)
        first = _first_frame(file, stream)
    width, height = first.width, first.height
    if _quarter_turns(first) % 2:
        width, height = height, width
    return MediaInfo("video", width, height, count, fps)


def read_clip(
    path: Path, frame_indices: Sequence[int], height: int, width: int, reader: str = READERS[0]
) -> np.ndarray:
    """Reads exactly these frames, upright, each scaled to cover height x width and cut at the centre.

    Frames are converted and resized one by one, so that a long clip at full size never stands in memory. Both
    readers give the same frames. Pixels count as square; HDR is not tone-mapped.

    Args:
        path: a video file.
        frame_indices: ascending, counted in presentation order from 0, whatever the time between frames.
        height: of the result, in pixels.
        width: of the result, in pixels.
        reader: "pyav" or "decord"; what decord would read otherwise (`decord_reader.reads_alike`), PyAV reads.

    Returns:
        uint8 [T, height, width, 3], RGB.

    Raises:
        BadMedia: the classes of `open_container`, no_video_stream, too_large, too_small (a strip too thin to
            cover height x width), out_of_range, or undecodable.
        UserError: decord is wanted and not installed.
    """
    if not frame_indices or list(frame_indices) != sorted(frame_indices):
        raise ValueError("frame_indices must be ascending, with at least one of them")
    container = open_container(path)
    if container.kind != "video":
        raise BadMedia("undecodable", "an image where a video is wanted")
    clip = np.empty((len(frame_indices), height, width, 3), np.uint8)

    def keep(index: int, frame: np.ndarray) -> None:
        resized = resize_cover(frame, height, width)
        for slot, wanted in enumerate(frame_indices):
            if wanted == index:
                clip[slot] = resized

    {"pyav": _read_with_pyav, "decord": _read_with_decord}[reader](path, container, frame_indices, keep)
    return clip


def _read_with_pyav(
    path: Path, container: Container, indices: Sequence[int], keep: Callable[[int, np.ndarray], None]
) -> None:
    missing = set(indices)
    with _open_video(path, container) as (file, stream):
        packets = list(_packets(file, stream))
        times = None if container.format in _NO_TIMES else _presentation_times(packets)
        _check_range(indices, sum(packet.shown for packet in packets))
        if times is not None:
            start = _last_key(packets, times[indices[0]])
            with suppress(av.error.FFmpegError):  # then nothing comes, and the second way is taken
                file.seek(start, stream=stream)
            missing -= _decode(file, stream, times, missing, keep, start)
    if missing:
        # A container without usable times, or a seek or first frames that did not come: from the start, all of it.
        with _open_video(path, container) as (file, stream):
            missing -= _decode(file, stream, times, missing, keep, None)
    if missing:
        raise BadMedia("undecodable", f"frame {min(missing)} was not delivered")


def _decode(
    file: InputContainer,
    stream: VideoStream,
    times: list[int] | None,
    indices: set[int],
    keep: Callable[[int, np.ndarray], None],
    start: int | None,
) -> set[int]:
    """Hands the frames of `indices` to `keep` and returns those that came.

    Frames are known by their time, or by counting where `times` is None. With a `start` (the time of a keyframe)
    decoding begins there, and frames that nobody wants and no other frame needs are not decoded.
    """
    context, reformatter = stream.codec_context, VideoReformatter()
    wanted = {index if times is None else times[index]: index for index in indices}
    came: set[int] = set()
    position, damaged = 0, False
    skipping = start is not None and context.name in _SKIPS_EXACTLY
    begun = start is None
    for packet in file.demux(stream):
        begun = begun or packet.pts == start
        if not begun:
            continue
        if skipping:
            context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
        for frame in context.decode(packet):
            time = position if times is None else frame.pts
            index = None if time is None else wanted.get(time)
            position += 1
            # What is built on a damaged frame is damaged too, as far as the next frame that needs no other.
            damaged = frame.is_corrupt or (damaged and not frame.key_frame)
            if damaged and index is not None:
                raise BadMedia("undecodable", f"damage at or before frame {index}")
            if index is not None and index not in came:
                keep(index, _rgb(frame, reformatter))
                came.add(index)
        if len(came) == len(wanted):
            break
    return came


def _rgb(frame: av.VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
    """Returns uint8 [h, w, 3], upright, by the matrix and range that the frame states (BT.601 where it has none)."""
    converted = reformatter.reformat(frame, format="rgb24", interpolation="BICUBIC", threads=1)
    plane = converted.planes[0]
    rows = np.frombuffer(memoryview(plane), np.uint8).reshape(frame.height, plane.line_size)
    pixels = rows[:, : frame.width * 3].reshape(frame.height, frame.width, 3)
    return np.rot90(pixels, _quarter_turns(frame))


def _quarter_turns(frame: av.VideoFrame) -> int:
    """Returns by how many quarter turns, counter-clockwise, the stored frame must be turned to stand upright."""
    return round(frame.rotation / 90) % 4


def _read_with_decord(
    path: Path, container: Container, indices: Sequence[int], keep: Callable[[int, np.ndarray], None]
) -> None:
    with _open_video(path, container) as (file, stream):
        packets = list(_packets(file, stream))
        _check_range(indices, sum(packet.shown for packet in packets))
        plain = len(file.streams.video) == 1 and all(packet.shown for packet in packets)
        file.seek(0)
        keys = [bytes(packet) for packet in file.demux(stream) if packet.is_keyframe]
        first = _first_frame(file, stream)
        alike = plain and decord_reader.reads_alike(container.format, stream.codec_context.name, first, keys)
    if alike:
        decord_reader.read(path, indices, keep)
    else:
        _read_with_pyav(path, container, indices, keep)


@contextmanager
def _open_video(path: Path, container: Container) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Opens the first video stream that is no cover picture, for one thread, as the one format that was recognised."""
    with (
        _decoder_faults(),
        av.open(
            str(path.absolute()),  # absolute, so that no name is taken for a protocol
            format=container.format,
            container_options={"protocol_whitelist": "file"},
            metadata_errors="replace",
        ) as file,
    ):
        videos = [video for video in file.streams.video if not video.disposition & av.stream.Disposition.attached_pic]
        if not videos:
            raise BadMedia("no_video_stream", f"{len(file.streams)} streams, none of them a video")
        context = videos[0].codec_context
        check_pixels(context.width, context.height)
        context.thread_count = 1
        context.options = {"max_pixels": str(MAX_PIXELS)}  # a stream may say another size than its container
        yield file, videos[0]


@contextmanager
def _decoder_faults() -> Iterator[None]:
    try:
        yield
    except av.error.FFmpegError as error:
        raise_for_system(error)
        raise BadMedia("undecodable", f"{error.strerror}") from error


def _packets(file: InputContainer, stream: VideoStream) -> Iterator[_Packet]:
    """Yields the stream's packets in decoding order, without decoding them."""
    cut = False
    for packet in file.demux(stream):
        if packet.size:
            cut = packet.is_corrupt
            # VP8 keeps frames that are only referred to in packets of their own; bit 4 says whether one is shown.
            hidden = stream.codec_context.name == "vp8" and not memoryview(packet)[0] & 0x10
            yield _Packet(packet.pts, packet.is_keyframe, not (packet.is_discard or hidden))
    if cut:
        raise BadMedia("truncated", "its last packet is cut")


def _presentation_times(packets: Sequence[_Packet]) -> list[int] | None:
    """Returns the times of the shown frames in presentation order; None where they do not tell frames apart."""
    times = [packet.pts for packet in packets if packet.shown and packet.pts is not None]
    complete = len(times) == sum(packet.shown for packet in packets) == len(set(times))
    return sorted(times) if complete else None


def _last_key(packets: Sequence[_Packet], time: int) -> int:
    """Returns the time of the last keyframe shown at or before `time`.

    Frames that follow such a keyframe in decoding order and in time refer to nothing before it. Those that follow
    it in decoding order only (an open group of pictures) do, and so they belong to the keyframe before.
    """
    keys = [packet.pts for packet in packets if packet.key and packet.pts is not None and packet.pts <= time]
    first = packets[0].pts
    assert first is not None
    return keys[-1] if keys else first


def _check_range(indices: Sequence[int], frames: int) -> None:
    if indices[0] < 0 or indices[-1] >= frames:
        raise BadMedia("out_of_range", f"frames {indices[0]} to {indices[-1]} of {frames}")


def _count(file: InputContainer, stream: VideoStream, container: Container) -> tuple[list[int], int]:
    """Returns the times of some or all frames, ascending, and how many frames there are."""
    if container.format == "mov" and not container.fragmented:
        entries = list(stream.index_entries)
        end = max((entry.pos + entry.size for entry in entries), default=0)
        if end > container.size:
            raise BadMedia("truncated", f"{container.size} bytes, its index points at {end}")
        return [entry.timestamp for entry in entries], sum(not entry.is_discard for entry in entries)
    packets = list(_packets(file, stream))
    return sorted(packet.pts for packet in packets if packet.pts is not None), sum(packet.shown for packet in packets)


def _rate(stream: VideoStream, times: list[int]) -> float:
    """Returns the average rate in frames/s: the container's, or else the one that the times give, or else 0."""
    if stream.average_rate:
        return float(stream.average_rate)
    if stream.time_base is None or len(times) < 2 or times[-1] == times[0]:
        return 0.0
    return float((len(times) - 1) / ((times[-1] - times[0]) * stream.time_base))


def _first_frame(file: InputContainer, stream: VideoStream) -> av.VideoFrame:
    """Returns a frame from the beginning of the stream, which shows size, format and rotation."""
    file.seek(0)
    context = stream.codec_context
    for packet in file.demux(stream):
        # Told at once that no more comes, the decoder gives it up and does not wait for those it may have to reorder.
        frames = [*context.decode(packet), *(context.decode(None) if packet.size else [])]
        if frames:
            return frames[0]
        break
    context.flush_buffers()
    file.seek(0)
    for frame in file.decode(stream):  # the first packets hold nothing that is shown
        return frame
    raise BadMedia("undecodable", "not one frame can be decoded")
