"""Frame-exact reading with PyAV: frames are counted in the order in which the decoder delivers them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from videox.data.media.container import BadMedia, Container
from videox.data.media.display_matrix import DisplayTransform, display_transform
from videox.data.media.listing import MISSING, Listing, Packets
from videox.data.media.packets import (
    REORDER,
    OrderError,
    decode_from_start,
    listing_of,
    number_packet,
    packet_number,
    packets_from,
    window,
)
from videox.data.media.source import open_video

# Decoders whose skip_frame = NONREF skips only frames that no other frame refers to. The HEVC decoder also skips
# frames that are referred to by frames of a higher temporal layer.
_EXACT_NONREF_SKIP = ("h264", "mpeg4", "mpeg2video", "mpeg1video")

Keep = Callable[[int, np.ndarray], None]


class _Sink(NamedTuple):
    """Where frames go.

    Attributes:
        keep: called with (index, uint8 [h, w, 3]).
        upright: how every frame becomes upright; None: as its own display matrix says.
    """

    keep: Keep
    upright: DisplayTransform | None


def read_frames(path: Path, container: Container, indices: Sequence[int], keep: Keep) -> None:
    """Pass the frames of `indices` (ascending), uint8 [h, w, 3], upright, to `keep(index, frame)`, one by one.

    Frame 0 is the first that a decoder delivers when it reads the whole file, and so on. Where the times of the
    packets give that order, decoding starts at the keyframe before the first wanted frame, and frames are known by
    their packet. Where they do not (`display_order`), frames are counted from a keyframe whose place is known. Where
    neither works, they are counted from the start of the file: that costs the decoding of everything before them.

    Raises:
        BadMedia: out_of_range, undecodable, and the classes of `open_video`.
    """
    listing = listing_of(path, container)
    frames = listing.packets.frames
    if indices[0] < 0 or (listing.countable and indices[-1] >= frames):
        stored = len(listing.packets.shown)
        if indices[0] >= 0 and indices[-1] < stored and not listing.has_fields:
            raise BadMedia("undecodable", f"only {frames} of its {stored} frames can be decoded")
        raise BadMedia("out_of_range", f"frames {indices[0]} to {indices[-1]} of {frames}")
    # A stream states its orientation at keyframes only, and FFmpeg applies it to these frames alone.
    upright = _first_transform(path, container) if listing.turned else None
    sink = _Sink(keep, upright)
    missing = _read_by_packets(path, container, indices, sink) if listing.countable else set(indices)
    if missing:
        frames = _read_from_start(path, container, listing, missing, sink)
    if missing and not listing.countable:
        raise BadMedia("out_of_range", f"frames {indices[0]} to {indices[-1]} of {frames}")
    if missing:
        raise BadMedia("undecodable", f"frame {min(missing)} was not delivered")


def _read_by_packets(path: Path, container: Container, indices: Sequence[int], sink: _Sink) -> set[int]:
    """Read frames from a keyframe near them; return those that were not delivered, or cannot be told apart.

    Where the file does not contain what its index states, or a frame is damaged that is decoded by it, all of its
    packets are listed: a keyframe may need parameter sets that are in none of the packets around it.
    """
    for complete in (False, True):
        listing, missing = listing_of(path, container, complete=complete), set(indices)
        try:
            packets = window(path, container, listing, indices[0], indices[-1])
            _read_from_keyframe(path, container, listing, packets, missing, sink)
            return missing
        except OrderError:
            if listing.complete:
                break
        except BadMedia as damage:
            if listing.complete or damage.media_class != "undecodable":
                raise
    return set(indices)


def display_order(listing: Listing, packets: Packets) -> np.ndarray | None:
    """Return the packets that give frames, in the order of the frames: int64 [frames]; None if times do not tell it.

    If there are B-frames and presentation times that ascend from packet to packet, then these are decoding times (of
    a file made from an AVI or from a raw stream without new times), and only the decoder can order the frames. The
    same is true if a keyframe is displayed before a frame that precedes it in the stream: times begin anew there.
    After a lost picture, the decoder returns frames in another order than that of their times.
    """
    shown = np.flatnonzero(packets.shown)
    if listing.always_in_order or packets.reordered is False:
        return shown
    times = packets.pts[shown]
    if listing.made_up_times or listing.losses or (times == MISSING).any() or len(np.unique(times)) < len(times):
        return None
    if (np.diff(times) > 0).all():
        return None
    keys = packets.key[shown]
    latest_before = np.maximum.accumulate(times)[:-1]
    if (latest_before[keys[1:]] > times[1:][keys[1:]]).any():
        return None
    return shown[np.argsort(times)]


def _read_from_keyframe(
    path: Path, container: Container, listing: Listing, packets: Packets, missing: set[int], sink: _Sink
) -> None:
    """Read frames of `missing` and remove them from it; those that stay were not delivered.

    Raises:
        OrderError: the frames came in another order than expected; all must be read again.
    """
    order = display_order(listing, packets)
    if order is None:
        _count_from_keyframe(path, container, packets, missing, sink)
        return
    place = np.full(len(packets.pts), -1)
    place[order] = packets.frames_before + np.arange(len(order))
    wanted = {int(at) for at in np.flatnonzero(np.isin(place, list(missing)))}
    if len(wanted) < len(missing):
        raise OrderError
    # Both fields of a frame are needed; and to skip frames, their packets must be known by one frame each.
    skip_others = not listing.has_fields
    starts = np.flatnonzero((packets.key | packets.closed) & packets.shown & (place <= min(missing)))
    closed = starts[packets.closed[starts]]
    stop = max(wanted) + REORDER
    # A keyframe that the container states may not be one; a closed one always is.
    for start in dict.fromkeys([*starts[-1:].tolist(), *closed[-1:].tolist()]):
        latest, output = -1, _Output(sink)
        for at, frame in _decode(path, container, packets, (start, stop), wanted if skip_others else None):
            position = int(place[at]) if at < len(place) else -1
            if 0 <= position < latest:  # the decoder does not follow the times
                raise OrderError
            latest = max(latest, position)
            output.take(position, frame, missing)
            if not missing:
                return


def _count_from_keyframe(path: Path, container: Container, packets: Packets, missing: set[int], sink: _Sink) -> None:
    """Read frames of `missing`, counted from a keyframe whose position is known, and remove them from it.

    The position of a keyframe from which all that follows can be decoded is the number of frames before it in the
    stream. Any other keyframe is displayed after some frames that follow it in the stream: decoding begins at the
    keyframe before it, and these frames are counted until it comes out.

    Raises:
        OrderError: a frame was not delivered, so that those after it cannot be counted.
    """
    ranks, first = packets.ranks(), min(missing)
    closed = np.flatnonzero(packets.closed & packets.shown & (ranks <= first))
    keys = np.flatnonzero(packets.key & packets.shown & (ranks <= first - REORDER))
    if len(closed) and (len(keys) < 2 or closed[-1] >= keys[-2]):
        start = anchor = int(closed[-1])
        position = int(ranks[start])
    elif len(keys) > 1:
        start, anchor, position = int(keys[-2]), int(keys[-1]), -1
    else:
        return
    stop = int(np.searchsorted(ranks, max(missing) + 1 + REORDER))
    delivered: set[int] = set()
    oldest, output = anchor, _Output(sink)  # oldest: the first packet from the anchor on whose frame is awaited
    for at, frame in _decode(path, container, packets, (start, stop), None):
        delivered.add(at)
        if position < 0 and at == anchor:
            position = int(ranks[anchor]) + sum(number > anchor for number in delivered)
        output.take(position, frame, missing)
        if not missing:
            return
        if position < 0:
            continue
        position += 1
        while oldest in delivered or (oldest < len(packets.shown) and not packets.shown[oldest]):
            oldest += 1
        if at - oldest > 2 * REORDER:
            raise OrderError


def _first_transform(path: Path, container: Container) -> DisplayTransform | None:
    first = next((frame for _, frame in decode_from_start(path, container)), None)
    return None if first is None else display_transform(first)


def _read_from_start(path: Path, container: Container, listing: Listing, missing: set[int], sink: _Sink) -> int:
    """Read frames of `missing` and remove them from it; those that stay are beyond the last frame.

    Returns:
        The number of frames that were decoded.

    Raises:
        BadMedia: undecodable, if frames are counted by their packets and one of them was not delivered: those after it
            have other numbers in the index than in the order of the decoder.
    """
    output, position = _Output(sink), 0
    awaited, shown = 0, listing.packets.shown
    delivered: set[int] = set()
    for at, frame in decode_from_start(path, container):
        delivered.add(at)
        while awaited in delivered or (awaited < len(shown) and not shown[awaited]):
            delivered.discard(awaited)
            awaited += 1
        # All frames that precede a keyframe in the stream come before it.
        if listing.countable and frame.key_frame and awaited < at:
            raise BadMedia("undecodable", f"frame {position} was not delivered")
        output.take(position, frame, missing)
        position += 1
        if not missing:
            break
    return position


def _decode(
    path: Path, container: Container, packets: Packets, span: tuple[int, int], wanted: set[int] | None
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yield (position of its packet in `packets`, frame), in the order of the decoder.

    Args:
        path: the file.
        container: what it is.
        packets: packets of its video stream.
        span: the packets to decode, first and last; the first is a keyframe.
        wanted: packets whose frames are needed; frames that are neither wanted nor referred to are then skipped.
            None = decode everything.

    Raises:
        OrderError: the packets are not those of `packets`.
    """
    with open_video(path, container) as (file, stream):
        context = stream.codec_context
        skipping = wanted is not None and context.name in _EXACT_NONREF_SKIP
        for at, packet in packets_from(file, stream, packets, span[0]):
            if at > span[1]:
                break
            expected = packets.pts[at] if at < len(packets.pts) and packets.shown[at] else MISSING
            if packet.pts is not None and expected not in (MISSING, packet.pts):
                raise OrderError
            number_packet(packet, at)
            if skipping:
                context.skip_frame = "DEFAULT" if at in (wanted or ()) else "NONREF"
            yield from map(_numbered, context.decode(packet))
        yield from map(_numbered, context.decode(None))


def _numbered(frame: av.VideoFrame) -> tuple[int, av.VideoFrame]:
    number = packet_number(frame)
    if number < 0:
        raise OrderError
    return number, frame


class _Output:
    """Passes wanted frames to a sink, unless they are damaged, and follows damage from frame to frame.

    Frames that refer to a damaged frame are damaged too, until the next keyframe.

    Args:
        sink: where they go.
    """

    def __init__(self, sink: _Sink) -> None:
        self._sink, self._damaged, self._reformatter = sink, False, VideoReformatter()

    def take(self, position: int, frame: av.VideoFrame, missing: set[int]) -> None:
        """Take the next frame of the decoder, and remove it from `missing`; position: -1 if it is not known.

        Raises:
            BadMedia: undecodable, if a wanted frame is damaged.
        """
        self._damaged = frame.is_corrupt or (self._damaged and not frame.key_frame)
        if position not in missing:
            return
        if self._damaged:
            raise BadMedia("undecodable", f"the file is damaged at or before frame {position}")
        self._sink.keep(
            position, (self._sink.upright or display_transform(frame)).apply(_rgb(frame, self._reformatter))
        )
        missing.discard(position)


def _rgb(frame: av.VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
    """Return uint8 [h, w, 3], as stored, converted by the matrix and range of the frame (BT.601 if it states none)."""
    converted = reformatter.reformat(frame, format="rgb24", interpolation="BICUBIC", threads=1)
    plane = converted.planes[0]
    rows = np.frombuffer(memoryview(plane), np.uint8).reshape(frame.height, plane.line_size)
    return rows[:, : frame.width * 3].reshape(frame.height, frame.width, 3)
