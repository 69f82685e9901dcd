"""Checks of media files without a decoder: format by the first bytes, completeness, and the error for bad files."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

# Pixels per image or frame. Without a limit, a file of a few kilobytes could allocate gigabytes of memory.
MAX_PIXELS = 64_000_000

_HEAD = 1024
_PROCESS_ERRNOS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_PREFIXES = (
    (b"\x89PNG\r\n\x1a\n", "image", "PNG"),
    (b"\xff\xd8\xff", "image", "JPEG"),
    (b"GIF87a", "image", "GIF"),
    (b"GIF89a", "image", "GIF"),
    (b"II*\0", "image", "TIFF"),
    (b"MM\0*", "image", "TIFF"),
    (b"II+\0", "image", "TIFF"),
    (b"MM\0+", "image", "TIFF"),
    (b"\x1a\x45\xdf\xa3", "video", "matroska"),
    (b"\0\0\1\xba", "video", "mpeg"),
    (b"FLV\1", "video", "flv"),
    (b"OggS", "video", "ogg"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "video", "asf"),
)
_TOP_BOXES = (b"ftyp", b"moov", b"mdat", b"moof", b"meta", b"free", b"skip", b"wide", b"uuid", b"pnot")
_BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)


class BadMedia(Exception):
    """One image or clip that cannot be used; the run continues without it and counts it.

    Args:
        media_class: one of missing, empty, unrecognised, truncated, no_video_stream, too_large, too_small,
            unreadable, changed, undecodable, out_of_range.
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
    """

    kind: str
    width: int
    height: int
    frames: int
    fps: float


@dataclass(frozen=True, slots=True)
class Container:
    """A file that passed the checks and may be passed to a decoder.

    Attributes:
        kind: "image" or "video".
        format: the only format that a decoder may open it as.
        size: in bytes.
        fragmented: an MP4 whose index is stored in pieces between the media data.
    """

    kind: str
    format: str
    size: int
    fragmented: bool = False


def open_container(path: Path) -> Container:
    """Return what a file is by its first bytes (never by its name), after the checks that need no decoder.

    A playlist or any other text is unrecognised, so that no decoder follows it to other files.

    Raises:
        BadMedia: missing, unreadable (not a regular file, or the system refuses it), empty, unrecognised, or
            truncated (shorter than its container states; not detected for formats that state no length).
    """
    try:
        status = path.stat()
        # Checked before opening, because opening a pipe would wait for a writer forever.
        if not stat.S_ISREG(status.st_mode):
            raise BadMedia("unreadable", "not a regular file")
        if status.st_size == 0:
            raise BadMedia("empty", "0 bytes")
        with path.open("rb") as file:
            kind, format_name = _recognise(file.read(_HEAD))
            fragmented = _check_complete(file, format_name, status.st_size)
    except FileNotFoundError as error:
        raise BadMedia("missing", "no such file") from error
    except OSError as error:
        raise_system_error(error)
        raise BadMedia("unreadable", str(error)) from error
    return Container(kind, format_name, status.st_size, fragmented)


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


def _recognise(head: bytes) -> tuple[str, str]:
    for prefix, kind, format_name in _PREFIXES:
        if head.startswith(prefix):
            return kind, format_name
    found = _recognise_riff(head) or _recognise_boxes(head) or _recognise_bmp(head) or _recognise_ts(head)
    if found is None:
        raise BadMedia("unrecognised", f"no known image or video format begins with {head[:8].hex(' ')}")
    return found


def _recognise_riff(head: bytes) -> tuple[str, str] | None:
    known = {b"WEBP": ("image", "WEBP"), b"AVI ": ("video", "avi")}
    return known.get(head[8:12]) if head.startswith(b"RIFF") else None


def _recognise_boxes(head: bytes) -> tuple[str, str] | None:
    if head[4:8] not in _TOP_BOXES:
        return None
    if head[4:8] != b"ftyp":
        return "video", "mov"
    brands = {head[8:12]} | {head[i : i + 4] for i in range(16, min(int.from_bytes(head[:4]), _HEAD), 4)}
    if head[8:12] in (b"avif", b"avis", b"mif1", b"msf1") and brands & {b"avif", b"avis"}:
        return "image", "AVIF"
    if head[8:12] in (b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1"):
        raise BadMedia("unrecognised", "HEIF image; convert it to PNG or JPEG")
    return "video", "mov"


def _recognise_bmp(head: bytes) -> tuple[str, str] | None:
    is_bmp = head.startswith(b"BM") and int.from_bytes(head[14:18], "little") in _BMP_HEADERS
    return ("image", "BMP") if is_bmp else None


def _recognise_ts(head: bytes) -> tuple[str, str] | None:
    # Packets of 188 bytes, or of 192 where Blu-ray puts a 4-byte timestamp in front of each.
    for first, step in ((0, 188), (4, 192)):
        if len(head) > first + 2 * step and all(head[first + i * step] == 0x47 for i in range(3)):
            return "video", "mpegts"
    return None


def _check_complete(file: BinaryIO, format_name: str, size: int) -> bool:
    """Raise BadMedia "truncated" if the container states more bytes than the file has.

    Returns:
        Whether an MP4 is fragmented: its index is stored in pieces between the media data.
    """
    if format_name in ("mov", "AVIF"):
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
    head = file.read(_HEAD)
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
