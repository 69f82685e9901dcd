"""Serves those who ask for decord: reads with it the clips of which it gives the same frames as PyAV, no others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import av
import numpy as np

from videox.data.media.container import BadMedia
from videox.errors import UserError

_FORMATS = ("mov", "matroska", "flv")
_CODECS = ("h264", "vp8", "vp9", "mjpeg")
_PIXELS = ("yuv420p", "yuv422p", "yuv444p", "yuvj420p", "yuvj422p", "yuvj444p", "gray")
_IDR = 5  # NAL unit type, H.264 table 7-1


def reads_alike(format_name: str, codec: str, first: av.VideoFrame, key_packets: Iterable[bytes]) -> bool:
    """Returns whether decord 0.6 gives the frames that PyAV gives; where this is false it was seen to give others.

    It loses count at the seeks of open groups of pictures (H.264 keyframes that are no IDR picture), of transport and
    program streams and of AVI, does not know AV1, takes other chroma for interlaced frames and other values for 10
    bit, and raises on some rotated sizes.
    """
    if format_name not in _FORMATS or codec not in _CODECS or first.format.name not in _PIXELS:
        return False
    if first.rotation or first.interlaced_frame:
        return False
    return codec != "h264" or all(_holds_idr(packet) for packet in key_packets)


def read(path: Path, indices: Sequence[int], keep: Callable[[int, np.ndarray], None]) -> None:
    """Hands the frames of `indices` (ascending), uint8 [h, w, 3], to `keep(index, frame)`, one by one.

    decord conceals damage without a word, where PyAV's reader raises BadMedia.

    Raises:
        BadMedia: undecodable.
        UserError: decord is not installed.
    """
    try:
        import decord  # here, since only those who ask for it need it installed
    except ImportError as error:
        hint = "pip install decord or use --video_reader pyav"
        raise UserError("--video_reader decord", "decord is not installed", hint) from error
    try:
        video = decord.VideoReader(str(path.absolute()), num_threads=1)
        for index in sorted(set(indices)):
            keep(index, video[index].asnumpy())
    except (decord.DECORDError, decord.DECORDLimitReachedError) as error:
        raise BadMedia("undecodable", str(error).strip().splitlines()[0]) from error


def _holds_idr(packet: bytes) -> bool:
    """Returns whether a packet of NAL units, each behind its length in 4 bytes (ISO 14496-15), has an IDR slice."""
    at = 0
    while at + 4 < len(packet):
        if packet[at + 4] & 31 == _IDR:
            return True
        at += 4 + int.from_bytes(packet[at : at + 4])
    return False
