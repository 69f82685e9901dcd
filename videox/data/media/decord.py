"""Read clips with decord, if decord returns the same frames of the file as PyAV."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from videox.data.media.container import Container
from videox.data.media.display_matrix import AS_STORED, display_transform
from videox.data.media.frames import Keep, display_order
from videox.data.media.packets import decode_from_start, listing_of
from videox.data.media.source import is_cover, open_video
from videox.errors import UserError

_FORMATS = ("mov", "matroska", "flv")
_CODECS = ("h264", "vp8", "vp9", "mjpeg")
_PIXELS = ("yuv420p", "yuv422p", "yuv444p", "yuvj420p", "yuvj422p", "yuvj444p", "gray")
_SMALL_FILE = 4_000_000  # bytes; reading all of it costs nothing beside the decoding
_LEAST_SHARE = 0.25  # of the frames of a larger file, from the first wanted one to the last


class DecordCannotRead(Exception):
    """decord does not read this file, or not as PyAV does; the argument says why."""


def fallback_line(reasons: Counter[str]) -> str:
    """Return the line that says how many clips of this process PyAV read in place of decord, by reason."""
    listed = "; ".join(f"{why} ({count})" for why, count in reasons.most_common())
    return f"--video_reader decord: PyAV read {reasons.total()} clips in place of decord: {listed}"


def read(path: Path, container: Container, indices: Sequence[int], keep: Keep) -> None:
    """Pass the frames of `indices` (ascending), uint8 [h, w, 3], to `keep(index, frame)`, one by one.

    decord hides damage silently, where the PyAV reader raises BadMedia.

    Raises:
        DecordCannotRead: the frames must be read with PyAV; some may have been passed to `keep`.
        BadMedia: the classes of `listing_of`.
        UserError: decord is not installed.
    """
    decord = _import_decord()
    _check_usable(path, container, indices)
    frames = listing_of(path, container, complete=True).packets.frames
    try:
        video = decord.VideoReader(str(path.absolute()), num_threads=1)
        if len(video) != frames:
            raise DecordCannotRead("decord counts other frames")
        for index in sorted(set(indices)):
            frame = video[index].asnumpy()
            if frame.shape[2:] != (3,):  # narrow videos, whose lines FFmpeg pads
                raise DecordCannotRead("decord returns padded lines as further channels")
            keep(index, frame)
    except (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError) as error:
        raise DecordCannotRead("decord cannot open or decode it") from error


def _check_usable(path: Path, container: Container, indices: Sequence[int]) -> None:
    """Raise DecordCannotRead where decord 0.6 was observed to return other frames than PyAV, or to read too much.

    decord miscounts frames when it seeks in open GOPs (H.264 keyframes that are not IDR pictures), in transport
    and program streams and in AVI, and replaces frames by others if the first one is not marked as a keyframe. It
    does not support AV1, converts the chroma of interlaced frames and 10-bit values differently, ignores that a
    video is mirrored, reads the largest video stream instead of the first, and raises for some sizes of rotated
    videos. It orders frames by their times, and reads the whole file, about three times, before it returns the
    first frame.
    """
    listing = listing_of(path, container)
    if container.format not in _FORMATS or listing.codec not in _CODECS:
        raise DecordCannotRead("its container or codec is not read exactly by decord")
    wanted = indices[-1] - indices[0] + 1
    if container.size > _SMALL_FILE and wanted < _LEAST_SHARE * listing.packets.frames:
        raise DecordCannotRead("decord would read the whole file for a short part of it")
    listing = listing_of(path, container, complete=True)
    packets = listing.packets
    order = display_order(listing, packets)
    if not listing.countable or order is None or not packets.shown.all() or not indices[-1] < packets.frames:
        raise DecordCannotRead("its frames are not ordered or counted by their times")
    if packets.needs_earlier_sets:
        raise DecordCannotRead("its keyframes need headers that are in earlier frames only")
    if not packets.key[0] or not packets.closed[packets.key].all():
        raise DecordCannotRead("decoding cannot start at each of its keyframes")
    first = next((frame for _, frame in decode_from_start(path, container)), None)
    if first is None or first.format.name not in _PIXELS or first.interlaced_frame:
        raise DecordCannotRead("its pixels are converted differently by decord")
    if display_transform(first) != AS_STORED:
        raise DecordCannotRead("it is turned or mirrored")
    with open_video(path, container) as (file, stream):
        if any(other.index != stream.index and not is_cover(other) for other in file.streams.video):
            raise DecordCannotRead("it has several video streams")


def _import_decord() -> Any:  # noqa: ANN401 - decord has no types
    try:
        import decord  # imported here, because it is optional
    except ImportError as error:
        hint = "pip install decord or use --video_reader pyav"
        raise UserError("--video_reader decord", "decord is not installed", hint) from error
    return decord
