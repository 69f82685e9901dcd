"""PNG files without the chunks that are not needed for the pixels and that decoders reject.

Pillow limits the memory of decompressed text and colour profiles, and verifies the checksum of every chunk, by not
opening the image at all. Neither has an effect on the pixels: these chunks are left out before Pillow reads the file.
"""

from __future__ import annotations

import io
import os
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

from PIL.PngImagePlugin import MAX_TEXT_CHUNK

_SIGNATURE_BYTES = 8
_ANCILLARY = 0x20  # bit of the first byte of a chunk's name (PNG specification, 5.4)
# Ancillary chunks that the pixels depend on: transparency, and the frames of an animation.
_PIXEL_CHUNKS = (b"tRNS", b"acTL", b"fcTL", b"fdAT")
_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")
# Keywords of the text in which Pillow searches for the orientation.
_ORIENTATION_KEYWORDS = (b"Raw profile type exif", b"XML:com.adobe.xmp")
_MAX_TEXTS = 8  # texts with an orientation that are passed on: at most 8 * MAX_TEXT_CHUNK bytes of memory


class _Spans(io.RawIOBase):
    """Spans of a file, one after another, as a read-only file. Closing it closes the file.

    Args:
        file: the file, unbuffered.
        spans: begin and end of each span, in bytes.
    """

    def __init__(self, file: BinaryIO, spans: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self._file, self._spans, self._at = file, spans, 0
        self._ends = list(accumulate(end - begin for begin, end in spans))

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position in the spans."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Set the position in the spans, as io.IOBase.seek."""
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._ends[-1]}[whence]
        self._at = max(0, origin + offset)
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # the buffer of io.BufferedReader
        """Read up to the end of a span; return the number of bytes, 0 at the end of the last span."""
        number = bisect_right(self._ends, self._at)
        if number == len(self._ends):
            return 0
        left = self._ends[number] - self._at
        self._file.seek(self._spans[number][1] - left)
        data = self._file.read(min(left, len(buffer)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def open_png(path: Path) -> io.BufferedReader:
    """Open a PNG file without its text, colour profile and other ancillary chunks; the pixels are the same.

    Chunks with an orientation are part of it, if they are sound and decompress to at most Pillow's limit.

    Raises:
        OSError: the file cannot be read.
    """
    with ExitStack() as stack:
        file = stack.enter_context(path.open("rb", buffering=0))
        spans = _needed_spans(file, os.fstat(file.fileno()).st_size)
        stack.pop_all()  # the caller closes the file
    return io.BufferedReader(_Spans(file, spans))


def _needed_spans(file: BinaryIO, size: int) -> list[tuple[int, int]]:
    spans = [(0, min(size, _SIGNATURE_BYTES))]
    at, texts = _SIGNATURE_BYTES, 0
    while at < size:
        file.seek(at)
        header = file.read(8)
        name, end = header[4:], at + 12 + int.from_bytes(header[:4])
        is_chunk = len(name) == 4 and name.isalpha()
        if not is_chunk or end > size or name == b"IEND":
            end, needed = size, True  # Pillow reports what is wrong
        elif name in _TEXT_CHUNKS:
            needed = texts < _MAX_TEXTS and _is_orientation_text(file, name, end - at - 12)
            texts += needed
        elif name == b"eXIf":
            needed = _has_right_checksum(name, file.read(end - at - 12), file.read(4))
        else:
            needed = not name[0] & _ANCILLARY or name in _PIXEL_CHUNKS
        if needed and spans[-1][1] == at:
            spans[-1] = spans[-1][0], end
        elif needed:
            spans.append((at, end))
        at = end
    return spans


def _is_orientation_text(file: BinaryIO, name: bytes, length: int) -> bool:
    """Return whether the text chunk at the file's position may have the orientation, and Pillow accepts it."""
    if length > MAX_TEXT_CHUNK:
        return False
    data = file.read(length)
    keyword, _, text = data.partition(b"\0")
    if keyword not in _ORIENTATION_KEYWORDS or not _has_right_checksum(name, data, file.read(4)):
        return False
    if name == b"zTXt":
        return text[:1] == b"\0" and _decompresses(text[1:])
    if name == b"iTXt" and text[:1] not in (b"", b"\0"):
        return text.count(b"\0", 2) >= 2 and _decompresses(text[2:].split(b"\0", 2)[2])
    return True


def _has_right_checksum(name: bytes, data: bytes, checksum: bytes) -> bool:
    return zlib.crc32(data, zlib.crc32(name)) == int.from_bytes(checksum)


def _decompresses(data: bytes) -> bool:
    """Return whether data decompresses to at most MAX_TEXT_CHUNK bytes, Pillow's limit."""
    decompressor = zlib.decompressobj()
    try:
        decompressor.decompress(data, MAX_TEXT_CHUNK)
    except zlib.error:
        return False
    return not decompressor.unconsumed_tail
