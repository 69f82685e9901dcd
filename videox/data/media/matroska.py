"""Times and headers of the video frames of a Matroska file (RFC 9559), without reading the frames themselves."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from videox.data.media.bitstream import Content

_SEGMENT, _INFO, _TRACKS, _CLUSTER = 0x18538067, 0x1549A966, 0x1654AE6B, 0x1F43B675
_OTHER_PARTS = (0x114D9B74, 0x1C53BB6B, 0x1043A770, 0x1941A469, 0x1254C367, 0xEC, 0xBF)  # index, chapters, tags, ...
_SCALE, _TRACK, _NUMBER, _TYPE, _CODEC, _ENCODINGS = 0x2AD7B1, 0xAE, 0xD7, 0x83, 0x86, 0x6D80
_TIME, _SIMPLE_BLOCK, _GROUP, _BLOCK, _REFERENCE, _ENCRYPTED = 0xE7, 0xA3, 0xA0, 0xA1, 0xFB, 0xAF
_VIDEO = b"\1"
_LACING = 0x06
_HEAD = 192  # bytes at the beginning of a frame that usually contain the header of its picture

_Place = tuple[int, bool, int, int]


class Block(NamedTuple):
    """One stored frame.

    Attributes:
        time: of presentation, in units of the file's time base.
        key: the file says that decoding can start here.
        content: of its first bytes.
    """

    time: int
    key: bool
    content: Content


class _UnusualError(Exception):
    """The file has something that this module does not follow."""


class _Element(NamedTuple):
    name: int
    start: int  # of its content
    end: int


def video_blocks(path: Path, time_base: Fraction | None, look: Callable[[bytes], Content]) -> list[Block] | None:
    """Return the frames of the only video track, in the order of the file; None for a file that is not a plain one.

    Args:
        path: a Matroska or WebM file.
        time_base: the unit of times that the caller expects, in seconds.
        look: returns what a packet contains; it gets the first bytes of each, and more where they do not suffice.

    Not plain: several video tracks, frames that are laced, compressed, encrypted or numbered in another time base,
    clusters of unknown length, and anything between the clusters that is not known.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        size = os.fstat(descriptor).st_size
        places = _blocks(descriptor, size, time_base)
        return [Block(time, key, _content(descriptor, at, length, look)) for time, key, at, length in places]
    except _UnusualError:
        return None
    finally:
        os.close(descriptor)


def _content(descriptor: int, start: int, size: int, look: Callable[[bytes], Content]) -> Content:
    """Look at the head of a frame; further in if no picture begins there, behind other data."""
    for length in (_HEAD, 4096, size):
        content = look(os.pread(descriptor, min(length, size), start))
        if content.frames or length >= size:
            break
    return content


def _blocks(descriptor: int, size: int, time_base: Fraction | None) -> Iterator[_Place]:
    """Yield (time, is keyframe, start, size) of the frames."""
    header = _element(descriptor, 0, size)
    segment = _element(descriptor, header.end, size)
    if segment.name != _SEGMENT:
        raise _UnusualError
    track = None
    at = segment.start
    while at < min(segment.end, size):
        part = _element(descriptor, at, size)
        at = part.end
        if part.name == _INFO and _unit(descriptor, part) != time_base:
            raise _UnusualError
        if part.name == _TRACKS:
            track = _video_track(descriptor, part)
        elif part.name == _CLUSTER:
            if track is None:
                raise _UnusualError
            yield from _blocks_of_cluster(descriptor, part, track)
        elif part.name not in (_INFO, *_OTHER_PARTS):
            raise _UnusualError


def _blocks_of_cluster(descriptor: int, cluster: _Element, track: int) -> Iterator[_Place]:
    time = None
    for element in _children(descriptor, cluster):
        if element.name == _TIME:
            time = int.from_bytes(os.pread(descriptor, element.end - element.start, element.start))
        elif element.name == _SIMPLE_BLOCK:
            yield from _block(descriptor, element, track, time, None)
        elif element.name == _GROUP:
            parts = list(_children(descriptor, element))
            refers = any(part.name == _REFERENCE for part in parts)
            for part in parts:
                if part.name == _BLOCK:
                    yield from _block(descriptor, part, track, time, not refers)
        elif element.name == _ENCRYPTED:
            raise _UnusualError


def _block(descriptor: int, element: _Element, track: int, time: int | None, key: bool | None) -> Iterator[_Place]:
    head = os.pread(descriptor, 12, element.start)
    number, width = _number(head, 0, marker=False)
    if number != track:
        return
    if len(head) < width + 3:
        raise _UnusualError
    flags = head[width + 2]
    start = element.start + width + 3
    if time is None or flags & _LACING:
        raise _UnusualError
    relative = int.from_bytes(head[width : width + 2], signed=True)
    if element.end > start:
        yield time + relative, bool(flags & 0x80) if key is None else key, start, element.end - start


def _unit(descriptor: int, info: _Element) -> Fraction:
    """Return the unit of all times, in seconds."""
    nanoseconds = 1_000_000
    for element in _children(descriptor, info):
        if element.name == _SCALE:
            nanoseconds = int.from_bytes(os.pread(descriptor, element.end - element.start, element.start))
    return Fraction(nanoseconds, 10**9)


def _video_track(descriptor: int, tracks: _Element) -> int:
    found = []
    for entry in _children(descriptor, tracks):
        if entry.name != _TRACK:
            continue
        values = {
            part.name: os.pread(descriptor, min(part.end - part.start, 64), part.start)
            for part in _children(descriptor, entry)
        }
        if values.get(_TYPE) == _VIDEO:
            found.append(values)
    # Tracks of this codec id store decoding times.
    if len(found) != 1 or _ENCODINGS in found[0] or found[0].get(_CODEC, b"").startswith(b"V_MS/VFW/FOURCC"):
        raise _UnusualError
    return int.from_bytes(found[0].get(_NUMBER, b""))


def _children(descriptor: int, parent: _Element) -> Iterator[_Element]:
    at = parent.start
    while at < parent.end:
        element = _element(descriptor, at, parent.end)
        yield element
        at = element.end


def _element(descriptor: int, at: int, limit: int) -> _Element:
    """Return the element at a position; raise _UnusualError if it is longer than `limit` or of unknown length."""
    head = os.pread(descriptor, 12, at)
    name, width = _number(head, 0, marker=True)
    length, more = _number(head, width, marker=False)
    start = at + width + more
    if length == (1 << 7 * more) - 1:
        if name != _SEGMENT:
            raise _UnusualError
        return _Element(name, start, limit)
    if start + length > limit:
        raise _UnusualError
    return _Element(name, start, start + length)


def _number(data: bytes, at: int, *, marker: bool) -> tuple[int, int]:
    """Return a variable-length integer (RFC 8794) and its width in bytes; marker: keep the bit that states it."""
    if at >= len(data) or data[at] == 0:
        raise _UnusualError
    width = 9 - data[at].bit_length()
    if at + width > len(data):
        raise _UnusualError
    value = int.from_bytes(data[at : at + width])
    return (value if marker else value & ((1 << 7 * width) - 1)), width
