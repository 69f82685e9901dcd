"""Probing of media files (size, frames, fps) and frame-exact reading of clips with PyAV or decord."""

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
    raise_system_error,
    sniff,
)
from videox.data.media.display_matrix import display_transform
from videox.data.media.image import probe_image, read_image, resize_cover

__all__ = ["READERS", "BadMedia", "MediaInfo", "probe", "read_clip", "read_image", "sniff"]

READERS = ("pyav", "decord")  # the first is the default, since benchmarks/decode.py measures it faster

# Decoders whose skip_frame = NONREF skips only frames that no other frame refers to. The HEVC decoder also skips
# frames that are referred to by frames of a higher temporal layer.
_EXACT_NONREF_SKIP = ("h264", "mpeg4", "mpeg2video", "mpeg1video")
_NO_TIMESTAMPS = ("avi",)  # stores no presentation times; those that FFmpeg fills in are wrong with B-frames


@dataclass(frozen=True, slots=True)
class _Packet:
    """One packet of the video stream: presentation time, whether decoding can start here, whether it is displayed."""

    pts: int | None
    key: bool
    displayed: bool


def probe(path: Path) -> MediaInfo:
    """Return the size, frames and fps of an image or video.

    Frames are counted, because the count in a header may be wrong: by the index entries where the container has a
    complete index, else by the packets. One frame is decoded, to read its display matrix.

    Raises:
        BadMedia: the classes of `open_container`, no_video_stream, too_large, truncated, or undecodable.
    """
    container = open_container(path)
    if container.kind == "image":
        return probe_image(path)
    with _open_video(path, container) as (file, stream):
        times, count = _count_frames(file, stream, container)
        if count == 0:
            raise BadMedia("no_video_stream", "its video stream has no frames")
        fps = _average_fps(stream, times)
        first = _first_frame(file, stream)
    width, height = first.width, first.height
    if display_transform(first).transpose:
        width, height = height, width
    return MediaInfo("video", width, height, count, fps)


def read_clip(
    path: Path, frame_indices: Sequence[int], height: int, width: int, reader: str = READERS[0]
) -> np.ndarray:
    """Read exactly these frames, made upright, each scaled to cover height x width and cropped at the centre.

    The whole display matrix of a frame is applied: quarter turns and mirroring.
    Frames are converted and resized one by one, so that a long clip is never in memory at full size. Both readers
    return the same frames. Pixels are assumed to be square; HDR is not tone-mapped.

    Args:
        path: a video file.
        frame_indices: ascending, counted from 0 in presentation order, independent of the time between frames.
        height: height of the result, in pixels.
        width: width of the result, in pixels.
        reader: "pyav" or "decord"; PyAV is used where decord returns other frames (`decord_reader.matches_pyav`).

    Returns:
        uint8 [T, height, width, 3], RGB.

    Raises:
        BadMedia: the classes of `open_container`, no_video_stream, too_large, too_small (a strip too thin to
            cover height x width), out_of_range, or undecodable.
        UserError: decord is requested and not installed.
    """
    if not frame_indices or list(frame_indices) != sorted(frame_indices):
        raise ValueError("frame_indices must be ascending and not empty")
    container = open_container(path)
    if container.kind != "video":
        raise BadMedia("undecodable", "an image where a video is expected")
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
        times = None if container.format in _NO_TIMESTAMPS else _presentation_times(packets)
        _check_range(indices, sum(packet.displayed for packet in packets))
        if times is not None:
            start = _keyframe_before(packets, times[indices[0]])
            # If the seek fails, no frame is decoded here and the second pass below reads them.
            with suppress(av.error.FFmpegError):
                file.seek(start, stream=stream)
            missing -= _decode(file, stream, times, missing, keep, start)
    if missing:
        # Second pass, from the start: the container has no usable times, or seeking did not deliver every frame.
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
    """Decode the frames of `indices` and pass each to `keep`.

    Args:
        file: the open container.
        stream: its video stream.
        times: presentation times of all frames, by which frames are identified; None = frames are counted.
        indices: frames to decode.
        keep: called with (index, uint8 [h, w, 3]) for each of them.
        start: time of the keyframe to start at; frames that are neither wanted nor referred to are then skipped.
            None = decode everything from the current position.

    Returns:
        The indices that were decoded.
    """
    context, reformatter = stream.codec_context, VideoReformatter()
    wanted = {index if times is None else times[index]: index for index in indices}
    decoded: set[int] = set()
    position, damaged = 0, False
    skipping = start is not None and context.name in _EXACT_NONREF_SKIP
    started = start is None
    for packet in file.demux(stream):
        started = started or packet.pts == start
        if not started:
            continue
        if skipping:
            context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
        for frame in context.decode(packet):
            time = position if times is None else frame.pts
            index = None if time is None else wanted.get(time)
            position += 1
            # Frames that refer to a damaged frame are damaged too, until the next keyframe.
            damaged = frame.is_corrupt or (damaged and not frame.key_frame)
            if damaged and index is not None:
                raise BadMedia("undecodable", f"the file is damaged at or before frame {index}")
            if index is not None and index not in decoded:
                keep(index, _rgb(frame, reformatter))
                decoded.add(index)
        if len(decoded) == len(wanted):
            break
    return decoded


def _rgb(frame: av.VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
    """Return uint8 [h, w, 3], upright, converted by the matrix and range of the frame (BT.601 if it states none)."""
    converted = reformatter.reformat(frame, format="rgb24", interpolation="BICUBIC", threads=1)
    plane = converted.planes[0]
    rows = np.frombuffer(memoryview(plane), np.uint8).reshape(frame.height, plane.line_size)
    pixels = rows[:, : frame.width * 3].reshape(frame.height, frame.width, 3)
    return display_transform(frame).apply(pixels)


def _read_with_decord(
    path: Path, container: Container, indices: Sequence[int], keep: Callable[[int, np.ndarray], None]
) -> None:
    with _open_video(path, container) as (file, stream):
        packets = list(_packets(file, stream))
        _check_range(indices, sum(packet.displayed for packet in packets))
        simple = len(file.streams.video) == 1 and all(packet.displayed for packet in packets)
        file.seek(0)
        keys = [bytes(packet) for packet in file.demux(stream) if packet.is_keyframe]
        first = _first_frame(file, stream)
        codec = stream.codec_context.name
        same_frames = simple and decord_reader.matches_pyav(container.format, codec, first, keys)
    if same_frames:
        decord_reader.read(path, indices, keep)
    else:
        _read_with_pyav(path, container, indices, keep)


@contextmanager
def _open_video(path: Path, container: Container) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open the first video stream that is not a cover picture, single-threaded, in the recognised format only."""
    with (
        _ffmpeg_errors_to_bad_media(),
        av.open(
            str(path.absolute()),  # absolute, so that FFmpeg does not interpret the name as a protocol
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
        # Checked again by the decoder: the stream may state another size than its container.
        context.options = {"max_pixels": str(MAX_PIXELS)}
        yield file, videos[0]


@contextmanager
def _ffmpeg_errors_to_bad_media() -> Iterator[None]:
    try:
        yield
    except av.error.FFmpegError as error:
        raise_system_error(error)
        raise BadMedia("undecodable", f"{error.strerror}") from error


def _packets(file: InputContainer, stream: VideoStream) -> Iterator[_Packet]:
    """Yield the stream's packets in decoding order, without decoding them."""
    truncated = False
    for packet in file.demux(stream):
        if packet.size:
            truncated = packet.is_corrupt
            # VP8 stores frames that are only referred to, never displayed; bit 4 of the packet is the display flag.
            hidden = stream.codec_context.name == "vp8" and not memoryview(packet)[0] & 0x10
            yield _Packet(packet.pts, packet.is_keyframe, not (packet.is_discard or hidden))
    if truncated:
        raise BadMedia("truncated", "its last packet is incomplete")


def _presentation_times(packets: Sequence[_Packet]) -> list[int] | None:
    """Return the times of the displayed frames in presentation order; None if they are missing or not unique."""
    times = [packet.pts for packet in packets if packet.displayed and packet.pts is not None]
    complete = len(times) == sum(packet.displayed for packet in packets) == len(set(times))
    return sorted(times) if complete else None


def _keyframe_before(packets: Sequence[_Packet], time: int) -> int:
    """Return the time of the last keyframe displayed at or before `time`.

    Frames that follow such a keyframe in decoding order and in time refer to nothing before it. Frames that follow it
    in decoding order only (an open GOP) do, and are decoded from the keyframe before it.
    """
    keys = [packet.pts for packet in packets if packet.key and packet.pts is not None and packet.pts <= time]
    first = packets[0].pts
    assert first is not None
    return keys[-1] if keys else first


def _check_range(indices: Sequence[int], frames: int) -> None:
    if indices[0] < 0 or indices[-1] >= frames:
        raise BadMedia("out_of_range", f"frames {indices[0]} to {indices[-1]} of {frames}")


def _count_frames(file: InputContainer, stream: VideoStream, container: Container) -> tuple[list[int], int]:
    """Return the times of some or all frames, ascending, and the number of frames."""
    if container.format == "mov" and not container.fragmented:
        entries = list(stream.index_entries)
        end = max((entry.pos + entry.size for entry in entries), default=0)
        if end > container.size:
            raise BadMedia("truncated", f"{container.size} bytes, its index refers to byte {end}")
        return [entry.timestamp for entry in entries], sum(not entry.is_discard for entry in entries)
    packets = list(_packets(file, stream))
    times = sorted(packet.pts for packet in packets if packet.pts is not None)
    return times, sum(packet.displayed for packet in packets)


def _average_fps(stream: VideoStream, times: list[int]) -> float:
    """Return the average frames per second: stated by the container, else computed from the times, else 0."""
    if stream.average_rate:
        return float(stream.average_rate)
    if stream.time_base is None or len(times) < 2 or times[-1] == times[0]:
        return 0.0
    return float((len(times) - 1) / ((times[-1] - times[0]) * stream.time_base))


def _first_frame(file: InputContainer, stream: VideoStream) -> av.VideoFrame:
    """Return a frame from the beginning of the stream, to read its size, format and display matrix."""
    file.seek(0)
    context = stream.codec_context
    for packet in file.demux(stream):
        # Flushing after the first packet returns its frame at once; else the decoder waits for frames to reorder.
        frames = [*context.decode(packet), *(context.decode(None) if packet.size else [])]
        if frames:
            return frames[0]
        break
    context.flush_buffers()
    file.seek(0)
    for frame in file.decode(stream):  # the first packet contains no displayed frame
        return frame
    raise BadMedia("undecodable", "no frame can be decoded")
