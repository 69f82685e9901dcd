"""Tests of videox.data.media.png: the pixels of PNG files are read whatever text and profiles are beside them."""

from __future__ import annotations

import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import tiny
from PIL import Image, PngImagePlugin

from videox.data.media.container import BadMedia, MediaInfo
from videox.data.media.image import probe_image, read_image

PICTURE = tiny.moving_square(1, 40, 30)[0]


def png_chunk(name, data, *, damaged=False):
    """Return a PNG chunk (PNG specification, 5.3), with a wrong checksum if it is damaged."""
    checksum = zlib.crc32(name + data) ^ damaged
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)


def png_with(path, chunks, *, at_end=False, orientation=1):
    """Write a 40 x 30 PNG file with additional chunks before or behind the pixels; return its path."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(PICTURE).save(path, exif=exif if orientation > 1 else None)
    data = path.read_bytes()
    cut = len(data) - 12 if at_end else 8 + 25  # the IEND chunk has 12 bytes, the signature 8, the IHDR chunk 25
    path.write_bytes(data[:cut] + chunks + data[cut:])
    return path


LARGE = zlib.compress(bytes(3 << 20))  # 3 MiB of zeros, above Pillow's limit of 1 MiB
XMP = b"XML:com.adobe.xmp\0"
USELESS_CHUNKS = {
    "large zTXt": png_chunk(b"zTXt", b"prompt\0\0" + LARGE),
    "large iTXt": png_chunk(b"iTXt", b"workflow\0\1\0\0\0" + LARGE),
    "large XMP": png_chunk(b"iTXt", XMP + b"\1\0\0\0" + LARGE),
    "large raw profile": png_chunk(b"zTXt", b"Raw profile type exif\0\0" + LARGE),
    "large profile": png_chunk(b"iCCP", b"scanner\0\0" + LARGE),
    "unknown compression of a profile": png_chunk(b"iCCP", b"scanner\0\7" + LARGE),
    "many texts": png_chunk(b"zTXt", b"prompt\0\0" + zlib.compress(bytes(1 << 20))) * 70,
    "long text": png_chunk(b"tEXt", b"workflow\0" + b"x" * (65 << 20)),
    "text called transparency": png_chunk(b"tEXt", b"transparency\0none"),
    **{
        f"damaged {name}": png_chunk(name.encode(), data, damaged=True)
        for name, data in {
            "tEXt": b"a\0b", "zTXt": b"a\0\0" + zlib.compress(b"b"), "iTXt": XMP + b"\0\0\0\0b", "eXIf": b"MM\0*",
            "iCCP": b"a\0\0" + zlib.compress(b"b"), "pHYs": bytes(9), "tIME": bytes(7), "gAMA": bytes(4),
        }.items()
    },
    "short pHYs": png_chunk(b"pHYs", b""),
}  # fmt: skip


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("name", USELESS_CHUNKS)
def test_pixels_beside_large_or_damaged_chunks_are_read(tmp_path, name, at_end):
    for orientation in (1, 6):
        path = png_with(tmp_path / "a.png", USELESS_CHUNKS[name], at_end=at_end, orientation=orientation)
        upright = np.rot90(PICTURE, -1) if orientation == 6 else PICTURE
        height, width = upright.shape[:2]
        if name != "damaged eXIf" or orientation == 1:
            assert probe_image(path) == MediaInfo("image", width, height, 1, 0.0)
            np.testing.assert_array_equal(read_image(path, height, width)[0], upright)


def test_text_in_a_png_file_uses_no_memory(tmp_path):
    bomb = png_chunk(b"zTXt", b"prompt\0\0" + zlib.compress(bytes(1 << 20))) * 40
    path = png_with(tmp_path / "a.png", bomb + png_chunk(b"iTXt", XMP + b"\1\0\0\0" + zlib.compress(bytes(64 << 20))))
    read_image(path, 30, 40)  # torch allocates on the first call
    tracemalloc.start()
    try:
        read_image(path, 30, 40)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY) == (1 << 20, 64 << 20)


def test_orientation_in_the_text_of_a_png_file_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    raw = b"\nexif\n      1\n" + exif.tobytes().hex().encode()
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    upright = np.rot90(PICTURE, -1)
    for chunk in (
        png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw)),
        png_chunk(b"tEXt", b"Raw profile type exif\0" + raw),
        png_chunk(b"iTXt", XMP + b"\0\0\0\0" + xmp),
        png_chunk(b"iTXt", XMP + b"\1\0\0\0" + zlib.compress(xmp)),
    ):
        path = png_with(tmp_path / "a.png", USELESS_CHUNKS["large zTXt"] + chunk)
        np.testing.assert_array_equal(read_image(path, 40, 30)[0], upright)


@pytest.mark.parametrize("name", [b"IHDR", b"PLTE", b"tRNS"])
def test_damage_in_a_chunk_that_the_pixels_depend_on_is_reported(tmp_path, name):
    palette = Image.fromarray(np.repeat([[0], [1]], 4, 1).astype(np.uint8), "P")
    palette.putpalette([9, 9, 9, 0, 0, 255])
    palette.save(tmp_path / "a.png", transparency=0)
    data = bytearray((tmp_path / "a.png").read_bytes())
    at = data.index(name)
    data[at + 4 + int.from_bytes(data[at - 4 : at])] ^= 1  # the first byte of its checksum
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(BadMedia, match="undecodable"):
        read_image(tmp_path / "a.png", 2, 4)
