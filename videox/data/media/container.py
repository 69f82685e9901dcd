"""Checks of media files without a decoder: format by the first bytes, completeness, and the error for bad files."""

from __future__ import annotations

import errno
import os
import stat
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from videox.data.media.signatures import HEAD_BYTES, brands_of, describe, kind_of, recognise

# Pixels per image or frame. Without a limit, a file of a few kilobytes could allocate gigabytes of memory.
MAX_PIXELS = 64_000_000

_PROCESS_ERRNOS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)

# Kinds of files that earlier versions decoded otherwise, as bits of MediaInfo.decoding. Indexes, cache keys and
# checkpoints contain them: a bit is never reused, and a kind whose decoding changes again gets a new one.
MIRRORED, ANIMATION, REORDERED, FIELD_CODED, BETWEEN_KEYFRAMES, EARLIER_SETS, ANIMATED_PNG = 1, 2, 4, 8, 16, 32, 64
TURNED_IN_STREAM, LOST_PICTURES = 128, 256
DECODINGS = {
    MIRRORED: "a mirrored video",
    ANIMATION: "an animation",
    REORDERED: "B-frames without composition times",
    FIELD_CODED: "field-coded H.264",
    BETWEEN_KEYFRAMES: "a recording that begins between keyframes",
    EARLIER_SETS: "keyframes that need headers of earlier frames",
    ANIMATED_PNG: "an animated PNG",
    TURNED_IN_STREAM: "a video whose stream states its orientation",
    LOST_PICTURES: "a recording with lost pictures",
}
# Version of what `probe` finds out of the files of a format; 1 where a format is not listed. It is increased when the
# same file would be measured, accepted or decoded otherwise: an index probes the files of that format again.
PROBE_VERSIONS = {
    "PNG": 3, "TIFF": 3, "GIF": 2, "WEBP": 2, "AVIF": 2, "mov": 3, "matroska": 4, "mpegts": 4, "mpeg": 2, "flv": 4, "avi": 3,
    "asf": 2,
}  # fmt: skip


class BadMedia(Exception):
    """One image or clip that cannot be used; the run continues without it and counts it.

    Args:
        media_class: one of missing, empty, unrecognised, truncated, no_video_stream, too_large, too_small,
            unreadable, changed, undecodable, out_of_range, needs_package.
        detail: one line for bad_samples.jsonl, with the value found.
    """

    def __init__(self, media_class: str, detail: str) -> None:
        self.media_class, self.detail = media_class, detail
        super().__init__(media_class, detail)  # both, so that pickling from a worker process keeps them

    def __str__(self) -> str:
        return f"{self.media_class}: {self.detail}"


@dataclass(frozen=True, slots=True)
class MediaInfo:
    """What planning needs to know of a file.

    Attributes:
        kind: "image" or "video".
        width: in pixels, of the upright image or frame.
        height: in pixels, of the upright image or frame.
        frames: number of frames, 1 for an image.
        fps: frames per second, 0.0 for an image and for a video whose rate is unknown.
        format: one of FORMATS; "" where it is unknown. Not compared.
        decoding: a sum of keys of DECODINGS, 0 for most files. Not compared.
    """

    kind: str
    width: int
    height: int
    frames: int
    fps: float
    format: str = field(default="", compare=False)
    decoding: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Container:
    """A file that passed the checks and may be passed to a decoder.

    Attributes:
        kind: "image" or "video".
        format: the only format that a decoder may open it as, one of FORMATS.
        size: in bytes.
        fragmented: an MP4 whose index is stored in pieces between the media data.
        sequence: an AVIF file with a track of pictures.
    """

    kind: str
    format: str
    size: int
    fragmented: bool = False
    sequence: bool = False


def open_container(path: Path) -> Container:
    """Return what a file is by its first bytes (never by its name), after the checks that need no decoder.

    A playlist or any other text is unrecognised, so that no decoder follows it to other files.

    Raises:
        BadMedia: missing, unreadable (not a regular file, or the system refuses it), empty, unrecognised,
            no_video_stream (a format of sound only), or truncated (shorter than its container states; not detected
            for formats that state no length).
    """
    try:
        status = path.stat()
        # Checked before opening, because opening a pipe would wait for a writer forever.
        if not stat.S_ISREG(status.st_mode):
            raise BadMedia("unreadable", "not a regular file")
        if status.st_size == 0:
            raise BadMedia("empty", "0 bytes")
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
            format_name = recognise(head)
            if not format_name:
                raise BadMedia(*describe(head))
            fragmented = _check_complete(file, format_name, status.st_size)
    except FileNotFoundError as error:
        raise BadMedia("missing", "no such file") from error
    except OSError as error:
        raise_system_error(error)
        raise BadMedia("unreadable", str(error)) from error
    is_sequence = format_name == "AVIF" and b"avis" in brands_of(head)
    return Container(kind_of(format_name), format_name, status.st_size, fragmented, is_sequence)


def format_of(path: Path) -> str:
    """Return the format of a file by its first bytes alone, "" for one that is unknown or cannot be read."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return ""
        with path.open("rb", buffering=0) as file:
            return recognise(file.read(HEAD_BYTES))
    except OSError:
        return ""


def sniff(path: Path) -> str:
    """Return "image" or "video" by the file's first bytes; raise BadMedia as `open_container` does."""
    return open_container(path).kind


def check_pixels(width: int, height: int) -> None:
    """Raise BadMedia "too_large" for more than MAX_PIXELS pixels, and "no_video_stream" for a size of 0."""
    if width < 1 or height < 1:
        raise BadMedia("no_video_stream", f"its size is {width}x{height}")
    if width * height > MAX_PIXELS:
        raise too_large_error(width, height)


def too_large_error(width: int, height: int) -> BadMedia:
    """Return the BadMedia of a size with more than MAX_PIXELS pixels."""
    return BadMedia("too_large", f"{width}x{height} is above {MAX_PIXELS // 10**6} Mpx")


def raise_system_error(error: Exception) -> None:
    """Raise for an error of the operating system; return if a library raised the error itself.

    Raises:
        BadMedia: unreadable.
        OSError: the given error, if the process is out of file descriptors or memory: the file is not bad then.
    """
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        if error.errno in _PROCESS_ERRNOS:
            raise error
        raise BadMedia("unreadable", os.strerror(error.errno)) from error


def bad_media_of(error: Exception) -> BadMedia:
    """Return the BadMedia of an error that no reader foresaw, with the place where it was raised.

    Raises:
        OSError: the given error, as `raise_system_error`.
    """
    try:
        raise_system_error(error)
    except BadMedia as bad:
        return bad
    if isinstance(error, MemoryError):
        return BadMedia("too_large", "reading it needs more memory than there is")
    place = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" ({Path(place[0].filename).name}:{place[0].lineno})" if place else ""
    return BadMedia("undecodable", f"{' '.join(f'{type(error).__name__}: {error}'.split())}{where}")


def _check_complete(file: BinaryIO, format_name: str, size: int) -> bool:
    """Raise BadMedia "truncated" if the container states more bytes than the file has.

    Returns:
        Whether an MP4 is fragmented: its index is stored in pieces between the media data.
    """
    if format_name in ("mov", "AVIF", "HEIF"):
        names = set()
        for name, end in _boxes(file, size):
            names.add(name)
            if end > size:
                raise BadMedia("truncated", f"{size} bytes, its {name.decode()} box ends at {end}")
        if format_name == "mov" and b"moov" not in names:
            raise BadMedia("truncated", f"{size} bytes without a moov box")
        return b"moof" in names
    stated = _stated_size(file, format_name)
    if stated is not None and stated > size:
        raise BadMedia("truncated", f"{size} bytes of {stated}")
    return False


def _boxes(file: BinaryIO, size: int) -> Iterator[tuple[bytes, int]]:
    """Yield name and end of the top-level boxes of an ISO base media file, until something that is not a box."""
    start = 0
    while start + 8 <= size:
        file.seek(start)
        header = file.read(16)
        length, name = int.from_bytes(header[:4]), header[4:8]
        if length == 1:  # the 64-bit length follows the name
            length = int.from_bytes(header[8:16])
        if not name.isalnum() or not name.isascii() or 0 < length < 8:
            return
        start = start + length if length else size
        yield name, start


def _stated_size(file: BinaryIO, format_name: str) -> int | None:
    file.seek(0)
    head = file.read(HEAD_BYTES)
    if format_name in ("avi", "WEBP"):
        length = int.from_bytes(head[4:8], "little")
        # Recorders that cannot seek back write one of these two values instead of a length.
        return None if length in (0, 2**32 - 1) else 8 + length
    if format_name == "matroska":
        after_header = _ebml_end(head, 4)
        if after_header is not None and head[after_header : after_header + 4] == b"\x18\x53\x80\x67":
            return _ebml_end(head, after_header + 4)
    return None


def _ebml_end(head: bytes, at: int) -> int | None:
    """Return the end of an EBML element whose length is stored at `at`; None for a live stream of unknown length."""
    if at >= len(head) or head[at] == 0:
        return None
    # A variable-length integer: the leading zero bits of the first byte give the number of further bytes.
    width = 9 - head[at].bit_length()
    length = int.from_bytes(head[at : at + width]) & ((1 << 7 * width) - 1)
    return None if length == (1 << 7 * width) - 1 else at + width + length
