"""Read clips with decord, if decord returns the same frames of the file as PyAV."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import av
import numpy as np

from videox.data.media.container import BadMedia
from videox.data.media.display_matrix import AS_STORED, display_transform
from videox.errors import UserError

_FORMATS = ("mov", "matroska", "flv")
_CODECS = ("h264", "vp8", "vp9", "mjpeg")
_PIXELS = ("yuv420p", "yuv422p", "yuv444p", "yuvj420p", "yuvj422p", "yuvj444p", "gray")
_IDR = 5  # NAL unit type, H.264 table 7-1


def matches_pyav(format_name: str, codec: str, first: av.VideoFrame, key_packets: Iterable[bytes]) -> bool:
    """Return whether decord 0.6 returns the same frames as PyAV; False where it was observed to return others.

    decord miscounts frames when it seeks in open GOPs (H.264 keyframes that are not IDR pictures), in transport and
    program streams and in AVI. It does not support AV1, converts the chroma of interlaced frames and 10-bit values
    differently, ignores that a video is mirrored, and raises for some sizes of rotated videos.

    Args:
        format_name: format of the container.
        codec: name of the codec.
        first: the first frame.
        key_packets: the packets of all keyframes.
    """
    if format_name not in _FORMATS or codec not in _CODECS or first.format.name not in _PIXELS:
        return False
    if display_transform(first) != AS_STORED or first.interlaced_frame:
        return False
    return codec != "h264" or all(_has_idr(packet) for packet in key_packets)


def read(path: Path, indices: Sequence[int], keep: Callable[[int, np.ndarray], None]) -> None:
    """Pass the frames of `indices` (ascending), uint8 [h, w, 3], to `keep(index, frame)`, one by one.

    decord hides damage silently, where the PyAV reader raises BadMedia.

    Raises:
        BadMedia: undecodable.
        UserError: decord is not installed.
    """
    try:
        import decord  # imported here, because it is optional
    except ImportError as error:
        hint = "pip install decord or use --video_reader pyav"
        raise UserError("--video_reader decord", "decord is not installed", hint) from error
    try:
        video = decord.VideoReader(str(path.absolute()), num_threads=1)
        for index in sorted(set(indices)):
            keep(index, video[index].asnumpy())
    except (decord.DECORDError, decord.DECORDLimitReachedError) as error:
        raise BadMedia("undecodable", str(error).strip().splitlines()[0]) from error


def _has_idr(packet: bytes) -> bool:
    """Return whether a packet of NAL units, each after its length in 4 bytes (ISO 14496-15), has an IDR slice."""
    at = 0
    while at + 4 < len(packet):
        if packet[at + 4] & 31 == _IDR:
            return True
        at += 4 + int.from_bytes(packet[at : at + 4])
    return False
