"""The packets of a video file in decoding order, and which of them give a frame, without decoding the file."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from videox.data.media.bitstream import Content, content_reader, may_be_interlaced
from videox.data.media.container import BadMedia, Container
from videox.data.media.listing import IN_ORDER, MISSING, Listing, Packets
from videox.data.media.matroska import video_blocks
from videox.data.media.signatures import ELEMENTARY_FORMATS
from videox.data.media.source import data_packets, open_video

# Packets by which a frame may be moved when it is put in the order of display. H.264 and HEVC keep at most 16 frames,
# and a keyframe of HEVC is followed by at most 31 frames that are displayed before it.
REORDER = 32

# Each packet gives one frame, except those that `bitstream` knows of. For any other codec, frames are counted by
# decoding the whole file.
_COUNTABLE = IN_ORDER | frozenset(("h264", "hevc", "mpeg1video", "mpeg2video", "mpeg4", "svq3", "vc1", "wmv3"))
# Formats that store no presentation times; those that FFmpeg fills in are wrong with B-frames.
_NO_TIMES = ("avi", "mxf", *ELEMENTARY_FORMATS)
_CACHED_PACKETS = 4_000_000  # about 100 MB in each process that reads
_PEEKED = 8
_MAX_LOSSES = 16  # losses around which the frames are decoded, to see which are delivered


_cache: OrderedDict[tuple[str, int, int, bool], Listing] = OrderedDict()


def listing_of(path: Path, container: Container, *, complete: bool = False) -> Listing:
    """Return the packets of a file's video stream; the listings of the files read last are kept.

    The packets come from the container's index where it has one that is complete: an MP4 without fragments, or an AVI.
    Else, and if `complete`, the whole file is read.

    Raises:
        BadMedia: the classes of `open_video`, and truncated.
    """
    status = path.stat()
    file = (str(path.absolute()), status.st_size, status.st_mtime_ns)
    key = (*file, True)
    if key not in _cache and not complete:
        key = (*file, False)
    if key not in _cache:
        listing = _list_packets(path, container, complete)
        key = (*file, listing.complete)
        _cache[key] = _without_lost(path, container, _without_undelivered(path, container, listing))
        while sum(len(kept.packets.pts) for kept in _cache.values()) > _CACHED_PACKETS and len(_cache) > 1:
            _cache.popitem(last=False)
    _cache.move_to_end(key)
    return _cache[key]


def _list_packets(path: Path, container: Container, complete: bool) -> Listing:
    with open_video(path, container) as (file, stream):
        context = stream.codec_context
        entries = None if complete else _index_entries(stream, container)
        if entries is None or may_be_interlaced(context.name, context.extradata):
            blocks = _from_blocks(path, file, stream) if container.format == "matroska" else None
            return blocks or _scan(file, stream, container)
        look = content_reader(context.name, context.extradata)
        contents = [look(bytes(packet)) for packet in islice(data_packets(file, stream), _PEEKED)]
        if all(content.certain and content.frames == 1 and content.standalone for content in contents):
            return _from_index(entries, contents, context.name, container)
    with open_video(path, container) as (file, stream):
        return _scan(file, stream, container)


def _scan(file: InputContainer, stream: VideoStream, container: Container) -> Listing:
    context = stream.codec_context
    packets, contents = _read_packets(data_packets(file, stream), stream)
    countable = context.name in _COUNTABLE and all(c.certain and c.frames <= 1 for c in contents)
    fields = may_be_interlaced(context.name, context.extradata) and not all(c.frames for c in contents)
    made_up = container.format in _NO_TIMES
    turned, losses = _turned(contents), _losses(contents, packets, context.name)
    return Listing(packets, context.name, True, countable, fields, made_up, turned=turned, losses=losses)


def _from_blocks(path: Path, file: InputContainer, stream: VideoStream) -> Listing | None:
    """Return the packets of a Matroska file by the headers of its blocks; None if they do not tell everything."""
    codec, extradata = stream.codec_context.name, stream.codec_context.extradata
    known = codec in IN_ORDER - {"vp9"} or codec in ("h264", "hevc")  # what VP9 displays, the last byte tells
    if not known or len(file.streams.video) != 1 or may_be_interlaced(codec, extradata):
        return None
    blocks = video_blocks(path, stream.time_base, content_reader(codec, extradata))
    if not blocks:
        return None
    contents = [block.content for block in blocks]
    times = np.array([block.time for block in blocks], np.int64)
    standalone = np.array([content.standalone for content in contents], bool)
    key = np.array([block.key for block in blocks], bool)
    needs_earlier_sets, key = bool((key & ~standalone).any()), key & standalone
    shown = np.array([content.frames > 0 for content in contents], bool)
    closed, missing = _closed(key, contents, codec), np.full(len(key), MISSING)
    packets = Packets(times, missing, key, closed, shown, _reordered(contents), needs_earlier_sets)
    turned, losses = _turned(contents), _losses(contents, packets, codec)
    return Listing(packets, codec, True, True, turned=turned, losses=losses)


def _reordered(contents: list[Content]) -> bool | None:
    kinds = {content.reordered for content in contents}
    return True if True in kinds else None if None in kinds or not kinds else False


def _turned(contents: list[Content]) -> bool:
    return any(content.turned for content in contents[:_PEEKED])


def _losses(contents: list[Content], packets: Packets, codec: str) -> tuple[int, ...]:
    """Return the packets from which on frames may be missing: by the numbers of H.264 pictures, by times of HEVC."""
    if codec != "hevc":
        return tuple(at for at, content in enumerate(contents) if content.after_loss)
    timed = np.flatnonzero(packets.shown & (packets.pts != MISSING))
    shown = timed[np.argsort(packets.pts[timed])]
    steps = np.diff(packets.pts[shown])
    gaps = np.flatnonzero(steps > 1.5 * np.median(steps)) if len(steps) else np.empty(0, np.int64)
    if len(gaps) > _MAX_LOSSES:  # a video without a constant frame rate
        return ()
    # What refers to a missing frame is in the group of pictures of its neighbours.
    keys = np.flatnonzero(packets.key)
    groups = np.searchsorted(keys, [*shown[gaps], *shown[gaps + 1]], side="right") - 1
    return tuple(sorted({int(keys[group]) if group >= 0 else 0 for group in groups}))


def _index_entries(stream: VideoStream, container: Container) -> np.ndarray | None:
    """Return int64 [n, 4] (time, size, is keyframe, is discarded) of the container's index; None if not complete."""
    if not (container.format == "mov" and not container.fragmented) and container.format != "avi":
        return None
    if stream.codec_context.name not in _COUNTABLE or stream.codec_context.name in ("vp8", "vp9"):
        return None
    entries = list(stream.index_entries)
    end = max((entry.pos + entry.size for entry in entries), default=0)
    if end > container.size and container.format == "mov":
        raise BadMedia("truncated", f"{container.size} bytes, its index refers to byte {end}")
    if container.format == "avi" and (not entries or len(entries) != stream.frames or end > container.size):
        return None
    rows = [(e.timestamp, e.size, e.is_keyframe, e.is_discard) for e in entries if e.size]
    table = np.array(rows, np.int64).reshape(-1, 4)
    # A placeholder of a packed MPEG-4 stream is a few bytes long: such files are read whole.
    placeholders = stream.codec_context.name == "mpeg4" and bool((table[:, 1] < 20).any())
    return None if placeholders or len(np.unique(table[:, 0])) < len(table) else table


def has_unordered_times(path: Path, container: Container) -> bool:
    """Whether a video has B-frames and its presentation times are its decoding times, by its first packets."""
    with open_video(path, container) as (file, stream):
        packets, _ = _read_packets(islice(data_packets(file, stream), 2 * REORDER), stream)
        may_reorder = stream.codec_context.has_b_frames
    times = packets.pts[packets.pts != MISSING]
    if (np.diff(times) <= 0).any():
        return False
    if packets.reordered is not None or not may_reorder:
        return packets.reordered is True
    # The headers do not say it (HEVC, VC-1): the decoder does.
    order = [number for number, _ in islice(decode_from_start(path, container), 2 * REORDER)]
    return order != sorted(order)


def _from_index(entries: np.ndarray, contents: list[Content], codec: str, container: Container) -> Listing:
    times, key, shown = entries[:, 0].copy(), entries[:, 2].astype(bool), entries[:, 3] == 0
    closed = np.zeros(len(key), bool)
    count = min(len(contents), len(key))
    closed[:count] = _closed(key[:count], contents[:count], codec)
    packets = Packets(np.full(len(key), MISSING), times, key, closed, shown, None)
    made_up = container.format in _NO_TIMES
    return Listing(packets, codec, False, True, made_up_times=made_up, turned=_turned(contents))


def _read_packets(source: Iterable[Packet], stream: VideoStream) -> tuple[Packets, list[Content]]:
    context = stream.codec_context
    look = content_reader(context.name, context.extradata)
    rows, contents, truncated = [], [], False
    for packet in source:
        truncated = packet.is_corrupt
        content = look(bytes(packet))
        pts, dts = (MISSING if time is None else time for time in (packet.pts, packet.dts))
        rows.append((pts, dts, packet.is_keyframe, not packet.is_discard and content.frames > 0))
        contents.append(content)
    if truncated:
        raise BadMedia("truncated", "its last packet is incomplete")
    table = np.array(rows, np.int64).reshape(-1, 4)
    stated, shown = table[:, 2].astype(bool), table[:, 3].astype(bool)
    key = stated & np.array([content.standalone for content in contents], bool)
    closed = _closed(key, contents, context.name)
    times, needs_earlier_sets = (table[:, 0].copy(), table[:, 1].copy()), bool((stated & ~key).any())
    return Packets(*times, key, closed, shown, _reordered(contents), needs_earlier_sets), contents


def _closed(key: np.ndarray, contents: list[Content], codec: str) -> np.ndarray:
    if codec in IN_ORDER:
        return key.copy()
    closed = np.array([bool(content.closed) and content.standalone for content in contents], bool)
    # MPEG-1, 2 and 4 do not state it; frames that are displayed before a keyframe are the B-pictures right after it.
    following = [content.reordered is not False for content in contents[1:]] + [True]
    unknown = np.array([content.closed is None for content in contents], bool)
    return closed | (key & unknown & ~np.array(following, bool))


def window(path: Path, container: Container, listing: Listing, first: int, last: int) -> Packets:
    """Return the packets around the frames `first` to `last`, with their presentation times.

    Of a listing that comes from an index, only these packets are read. They begin at the keyframe before the last one
    that surely precedes the frame `first`, and end where all later packets are displayed after `last`.

    Raises:
        BadMedia: the classes of `open_video`.
        OrderError: the file does not contain what its index states.
    """
    packets = listing.packets
    if listing.complete:
        return packets
    margin = 0 if listing.always_in_order else REORDER
    ranks = packets.ranks()
    keys = np.flatnonzero(packets.key & (ranks <= max(0, first - margin)))
    start = int(keys[-2 if margin else -1]) if len(keys) > 1 else int(keys[0]) if margin == 0 and len(keys) else 0
    stop = int(np.searchsorted(ranks, last + 1 + margin, side="right"))
    part = slice(start, stop)
    place = Packets(
        packets.pts[part], packets.dts[part], packets.key[part], packets.closed[part], packets.shown[part], None,
        False, start, int(ranks[start]),
    )  # fmt: skip
    if listing.always_in_order:
        return place
    with open_video(path, container) as (file, stream):
        found = islice((packet for _, packet in packets_from(file, stream, place, 0)), stop - start)
        read, _ = _read_packets(found, stream)
    if len(read.dts) != len(place.dts) or not np.array_equal(read.dts, place.dts):
        raise OrderError
    return replace(read, shown=place.shown & read.shown, number=start, frames_before=place.frames_before)


class OrderError(Exception):
    """The packets or frames of a file are not those that were expected from its index or times."""


def packets_from(
    file: InputContainer, stream: VideoStream, packets: Packets, start: int
) -> Iterator[tuple[int, Packet]]:
    """Yield (position in `packets`, packet) from the packet `start` on, to the end of the stream.

    Raises:
        OrderError: the file cannot be read from there: the packet has no time, or is not found by it.
    """
    at, started = start, packets.number + start == 0
    if not started:
        seek_time, times = _place(file, packets, start)
        if np.count_nonzero(times == times[start]) > 1:
            raise OrderError
        try:
            file.seek(seek_time, stream=stream)
        except av.error.FFmpegError as error:
            raise OrderError from error
    for packet in data_packets(file, stream):
        if not started:
            found = packet.dts if times is packets.dts else packet.pts
            if found is not None and found > times[start] and packet.is_keyframe:
                raise OrderError
            started = found == times[start]
            if not started:
                continue
        yield at, packet
        at += 1
    if not started:
        raise OrderError


def _place(file: InputContainer, packets: Packets, start: int) -> tuple[int, np.ndarray]:
    """Return the time to seek to for the packet `start`, and the times of packets by which it is found after that."""
    pts, dts = int(packets.pts[start]), int(packets.dts[start])
    if pts == dts == MISSING:
        raise OrderError
    # Decoding times are what indices contain, except Matroska's. After a seek they may be missing or estimated in
    # streams whose packets are cut by a parser, where the presentation time is stored.
    by_pts = pts != MISSING and (dts == MISSING or file.format.name.startswith("matroska"))
    return (pts if by_pts else dts), (packets.dts if pts == MISSING else packets.pts)


def _without_undelivered(path: Path, container: Container, listing: Listing) -> Listing:
    """Return the listing without the packets at the beginning that give no decoded frame.

    A recording that begins between keyframes, or at a keyframe whose neighbours refer to frames before it, begins with
    packets that cannot be decoded. Where that is possible, they are found by decoding up to the second keyframe.
    """
    packets = listing.packets
    if not listing.countable or not packets.frames or _begins_well(listing):
        return listing
    shown = packets.shown.copy()
    delivered: list[int] = []
    end = len(shown)
    for number, frame in decode_from_start(path, container):
        delivered.append(number)
        if frame.key_frame and number > delivered[0]:
            end = number
            break
    shown[np.setdiff1d(np.arange(end), delivered)] = False
    # FFmpeg's MPEG-4 decoder delivers a grey frame for the missing one that the first frames refer to.
    countable = len(set(delivered)) == len(delivered)
    begins_late = not countable or not np.array_equal(shown, packets.shown)
    return replace(listing, packets=replace(packets, shown=shown), countable=countable, begins_late=begins_late)


def _without_lost(path: Path, container: Container, listing: Listing) -> Listing:
    """Return the listing without the packets after a loss that give no decoded frame.

    A recording with a disturbance, or one that was repaired, lacks pictures in its middle. The decoder then leaves out
    frames until the next keyframe: they are found by decoding from the keyframe before the loss to that one. Of more
    than `_MAX_LOSSES` losses only the first ones are looked at; if these have an effect, the whole file is decoded to
    count its frames.
    """
    if not listing.countable or not listing.losses:
        return listing
    packets, shown, countable, end = listing.packets, listing.packets.shown.copy(), True, 0
    for loss in listing.losses[:_MAX_LOSSES]:
        judged, (start, end) = end, _keyframes_around(packets, loss)
        if end <= judged:
            continue
        try:
            delivered = _delivered(path, container, packets, start, end)
        except OrderError:  # the file has no times to seek to
            return replace(listing, countable=False, lossy=True)
        countable = countable and len(set(delivered)) == len(delivered)
        shown[np.setdiff1d(np.arange(loss, end), delivered)] = False
    lossy = not countable or not np.array_equal(shown, packets.shown)
    countable = countable and (len(listing.losses) <= _MAX_LOSSES or not lossy)
    return replace(listing, packets=replace(packets, shown=shown), countable=countable, lossy=lossy)


def _keyframes_around(packets: Packets, at: int) -> tuple[int, int]:
    """Return the packet from which all frames from `at` on are decoded, and that where a loss at `at` has no effect.

    The latter is a keyframe after `at`, the second one if frames that are displayed before the first one may refer to
    what precedes it in the stream; or the end.
    """
    keys, closed = np.flatnonzero(packets.key), np.flatnonzero(packets.closed)
    before = [*keys[keys < at][-2:-1].tolist(), *closed[closed < at][-1:].tolist()]
    after = [*keys[keys > at][1:2].tolist(), *closed[closed > at][:1].tolist()]
    return max(before, default=0), min(after, default=len(packets.key))


def _delivered(path: Path, container: Container, packets: Packets, start: int, end: int) -> list[int]:
    """Return the packets that give a frame when the packets from `start` to `end` are decoded.

    Raises:
        OrderError: the file cannot be read from `start`.
    """
    delivered = []
    with open_video(path, container) as (file, stream):
        for at, packet in packets_from(file, stream, packets, start):
            if at > end + REORDER:
                break
            number_packet(packet, at)
            with suppress(av.error.InvalidDataError):
                delivered += [packet_number(frame) for frame in stream.codec_context.decode(packet)]
        with suppress(av.error.EOFError):
            delivered += [packet_number(frame) for frame in stream.codec_context.decode(None)]
    return delivered


def _begins_well(listing: Listing) -> bool:
    """Return whether the decoder surely delivers every frame from the first packet on."""
    packets = listing.packets
    first = int(np.argmax(packets.shown))
    return bool(packets.key[first] and (listing.always_in_order or packets.closed[first]))


def decode_from_start(path: Path, container: Container) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yield (number of its packet, frame) for all frames, in the order in which the decoder delivers them.

    Packets that cannot be decoded are passed over until a frame was delivered, as ffmpeg does.

    Raises:
        BadMedia: the classes of `open_video`.
    """
    with open_video(path, container) as (file, stream):
        context = stream.codec_context
        begun = False
        for number, packet in enumerate(data_packets(file, stream)):
            number_packet(packet, number)
            try:
                frames = context.decode(packet)
            except av.error.InvalidDataError:
                if begun:
                    raise
                continue
            begun = begun or bool(frames)
            for frame in frames:
                yield packet_number(frame), frame
        with suppress(av.error.EOFError):
            for frame in context.decode(None):
                yield packet_number(frame), frame


def number_packet(packet: Packet, number: int) -> None:
    """Give a packet a number, which `packet_number` returns for its frame."""
    # PyAV keeps the object by its identity until the first packet or frame that has it is freed: integers, which may
    # be one object for several packets, would be lost.
    packet.opaque = [number]


def packet_number(frame: av.VideoFrame) -> int:
    """Return the number that the packet of a frame was given; -1 if the decoder did not keep it."""
    kept = frame.opaque
    return kept[0] if isinstance(kept, list) else -1
