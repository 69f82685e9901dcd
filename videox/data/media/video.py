"""Probing of media files (size, frames, fps) and frame-exact reading of clips with PyAV or decord."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from videox.data.choices import READERS
from videox.data.media import animation
from videox.data.media import decord as decord_reader
from videox.data.media.container import (
    BETWEEN_KEYFRAMES,
    EARLIER_SETS,
    FIELD_CODED,
    LOST_PICTURES,
    MIRRORED,
    REORDERED,
    TURNED_IN_STREAM,
    BadMedia,
    Container,
    MediaInfo,
    open_container,
    sniff,
)
from videox.data.media.display_matrix import display_transform
from videox.data.media.frames import read_frames
from videox.data.media.image import probe_image, read_image, resize_cover
from videox.data.media.listing import MISSING, Listing
from videox.data.media.packets import decode_from_start, has_unordered_times, listing_of
from videox.data.media.source import data_packets, open_video

__all__ = ["BadMedia", "MediaInfo", "probe", "read_clip", "read_image", "sniff"]

_MAX_FPS = 1000  # a higher average rate is not one: FFmpeg states that of DV in units of time


def probe(path: Path) -> MediaInfo:
    """Return the size, frames and fps of an image or video; an animation with several frames is a video.

    Frames are counted as a decoder delivers them, because the count in a header may be wrong: by the index entries
    where the container has a complete index, else by the packets, else by decoding (`packets.listing_of`). One frame
    is decoded, to read its display matrix.

    Raises:
        BadMedia: the classes of `open_container`, no_video_stream, too_large, truncated, or undecodable.
    """
    container = open_container(path)
    info = _probe_image(path, container) if container.kind == "image" else _probe_video(path, container)
    return replace(info, format=container.format)


def _probe_image(path: Path, container: Container) -> MediaInfo:
    return animation.probe_animation(path, container) or probe_image(path)


def _probe_video(path: Path, container: Container) -> MediaInfo:
    listing = listing_of(path, container)
    if not len(listing.packets.pts):
        raise BadMedia("no_video_stream", "its video stream has no frames")
    first, average, time_base = _first_frame(path, container)
    count = listing.packets.frames
    if not listing.countable:
        count = sum(1 for _ in decode_from_start(path, container))
    if first.is_corrupt and np.count_nonzero(listing.packets.key) == 1:
        # every frame refers to this one: if it is damaged, the file has no frame that can be trained
        read_frames(path, container, [0], lambda _index, _frame: None)
    width, height = first.width, first.height
    transform = display_transform(first)
    if transform.transpose:
        width, height = height, width
    decoding = (MIRRORED if transform.mirrors else 0) | _decoding_of(path, container, listing)
    fps = _frames_per_second(listing, average, time_base)
    return MediaInfo("video", width, height, count, fps, decoding=decoding)


def _decoding_of(path: Path, container: Container, listing: Listing) -> int:
    """Return the sum of the keys of DECODINGS that the order and the beginning of the packets have."""
    decoding = FIELD_CODED if listing.has_fields else 0
    if listing.begins_late:
        decoding |= BETWEEN_KEYFRAMES
    if listing.packets.needs_earlier_sets:
        decoding |= EARLIER_SETS
    if listing.turned:
        decoding |= TURNED_IN_STREAM
    if listing.lossy:
        decoding |= LOST_PICTURES
    if not listing.always_in_order and not listing.made_up_times and has_unordered_times(path, container):
        decoding |= REORDERED
    return decoding


def read_clip(
    path: Path, frame_indices: Sequence[int], height: int, width: int, reader: str = READERS[0],
    on_fallback: Callable[[str], None] | None = None,
) -> np.ndarray:  # fmt: skip
    """Read exactly these frames, made upright, each scaled to cover height x width and cropped at the centre.

    The whole display matrix of a frame is applied: quarter turns and mirroring.
    Frames are converted and resized one by one, so that a long clip is never in memory at full size. Both readers
    return the same frames. Pixels are assumed to be square; HDR is not tone-mapped.

    Args:
        path: a video file.
        frame_indices: ascending, counted from 0 in the order of a decoder, independent of the time between frames.
        height: height of the result, in pixels.
        width: width of the result, in pixels.
        reader: "pyav" or "decord"; PyAV is used where decord does not return the same frames, cannot read the file, or
            would read a whole file for a short part of it.
        on_fallback: called with the reason if PyAV reads in place of decord.

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
    if container.kind != "video" and container.format not in animation.ANIMATED_FORMATS:
        raise BadMedia("undecodable", "an image where a video is expected")
    clip = np.empty((len(frame_indices), height, width, 3), np.uint8)

    def keep(index: int, frame: np.ndarray) -> None:
        resized = resize_cover(frame, height, width)
        for slot, wanted in enumerate(frame_indices):
            if wanted == index:
                clip[slot] = resized

    if container.kind == "image":
        animation.read(path, frame_indices, keep)
        return clip
    if reader == "decord":
        try:
            decord_reader.read(path, container, frame_indices, keep)
            return clip
        except decord_reader.DecordCannotRead as why:
            if on_fallback is not None:
                on_fallback(str(why))
    read_frames(path, container, frame_indices, keep)
    return clip


def _first_frame(path: Path, container: Container) -> tuple[av.VideoFrame, float, Fraction | None]:
    """Return the first frame, the average frames per second that the container states or 0, and the unit of times."""
    with open_video(path, container) as (file, stream):
        average, time_base = float(stream.average_rate or 0), stream.time_base
        context = stream.codec_context
        for packet in data_packets(file, stream):
            # Flushing after the first packet returns its frame at once; else the decoder waits for frames to reorder.
            frames = [*_decoded(context, packet), *_decoded(context, None)]
            if frames:
                return frames[0], average, time_base
            break
    for _, frame in decode_from_start(path, container):  # the first packet contains no frame, or a single field
        return frame, average, time_base
    raise BadMedia("undecodable", "no frame can be decoded")


def _decoded(context: av.VideoCodecContext, packet: av.Packet | None) -> list[av.VideoFrame]:
    """Return the frames that a packet gives; none if it cannot be decoded."""
    with suppress(av.error.InvalidDataError, av.error.EOFError):
        return context.decode(packet)
    return []


def _frames_per_second(listing: Listing, average: float, time_base: Fraction | None) -> float:
    """Return the average frames per second: stated by the container, else computed from the times, else 0.

    The rate that is stated for fields stored one by one may be that of the fields.
    """
    if 0 < average <= _MAX_FPS and not listing.has_fields:
        return average
    packets = listing.packets
    times = np.where(packets.pts == MISSING, packets.dts, packets.pts)[packets.shown]
    times = np.sort(times[times != MISSING])
    if time_base is None or len(times) < 2 or times[-1] == times[0]:
        return average if average <= _MAX_FPS else 0.0
    return float((len(times) - 1) / (int(times[-1] - times[0]) * time_base))
