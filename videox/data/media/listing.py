"""What is known of the packets of a video stream: `Packets` in decoding order, and a `Listing` of the whole stream."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MISSING = np.iinfo(np.int64).min  # the time of a packet that has none
# Their frames come out of the decoder in the order of the packets, and any keyframe begins anew.
IN_ORDER = frozenset(
    (
        "av1", "cfhd", "cinepak", "dnxhd", "dvvideo", "ffv1", "ffvhuff", "flashsv", "flashsv2", "flv1", "gif", "h261",
        "h263", "h263p", "hap", "huffyuv", "jpeg2000", "jpegls", "magicyuv", "mjpeg", "mjpegb", "msmpeg4v1",
        "msmpeg4v2", "msmpeg4v3", "msrle", "msvideo1", "png", "prores", "qtrle", "rawvideo", "rpza", "rv10", "rv20",
        "smc", "speedhq", "svq1", "theora", "utvideo", "v210", "vble", "vp3", "vp6", "vp6f", "vp8", "vp9", "wmv1",
        "wmv2", "zlib", "zmbv",
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Packets:
    """Packets that follow each other in a video stream, in decoding order.

    Attributes:
        pts: int64 [n], presentation time; MISSING where there is none.
        dts: int64 [n], decoding time; MISSING where there is none.
        key: bool [n], the container says that decoding can start here, and the parameter sets in force are stated by
            the container or in the packet.
        closed: bool [n], decoding can start here, and every frame after it in the stream is then delivered.
        shown: bool [n], the decoder delivers a frame that begins in this packet.
        reordered: whether a packet is a B-picture: None if it is not known.
        needs_earlier_sets: the container states keyframes that need parameter sets of an earlier packet.
        number: number of the first of them in the stream.
        frames_before: frames that the packets before them give.
    """

    pts: np.ndarray
    dts: np.ndarray
    key: np.ndarray
    closed: np.ndarray
    shown: np.ndarray
    reordered: bool | None
    needs_earlier_sets: bool = False
    number: int = 0
    frames_before: int = 0

    def ranks(self) -> np.ndarray:
        """Return for each packet the number of frames that the packets before it give: int64 [n]."""
        return self.frames_before + np.cumsum(self.shown) - self.shown

    @property
    def frames(self) -> int:
        """The number of frames that the packets give."""
        return int(self.shown.sum())


@dataclass(frozen=True, slots=True)
class Listing:
    """What is known of a video stream without decoding it.

    Attributes:
        packets: all packets of the stream.
        codec: FFmpeg's name of the codec.
        complete: every packet was read; else they come from the container's index, without presentation times.
        countable: the number of frames is that of the packets that are shown; else only decoding tells it.
        has_fields: the two fields of a frame are two packets.
        made_up_times: the presentation times were invented by FFmpeg and do not order the frames.
        begins_late: packets at the beginning cannot be decoded, since what they refer to is not in the file.
        turned: the stream itself states how frames are turned, in its first packets.
        losses: the packets from which on frames may be missing, since a picture that they refer to is.
        lossy: the decoder does not deliver a frame for some of the packets after such a loss.
    """

    packets: Packets
    codec: str
    complete: bool
    countable: bool
    has_fields: bool = False
    made_up_times: bool = False
    begins_late: bool = False
    turned: bool = False
    losses: tuple[int, ...] = ()
    lossy: bool = False

    @property
    def in_order(self) -> bool:
        """Whether frames come out of the decoder in the order of their packets."""
        return self.codec in IN_ORDER or self.packets.reordered is False

    @property
    def always_in_order(self) -> bool:
        """Whether the codec has no frames that are displayed before a frame that precedes them in the stream."""
        return self.codec in IN_ORDER
