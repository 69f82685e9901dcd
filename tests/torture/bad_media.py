"""Sixty kinds of bad media files with the classes that name them, and fifteen kinds of unusual but sound files."""

from __future__ import annotations

import io
import os
import random
import struct
import wave
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import tiny
from PIL import Image

SIDE, FRAMES = 64, 11
TOO_MANY_PIXELS = (60_000, 60_000)
# The sound files that the bad ones are made from.
CLIPS = {
    "clip.mp4": "libx264", "clip.mov": "libx264", "clip.mkv": "libx264", "clip.avi": "mpeg4", "clip.webm": "libvpx",
    "clip.hevc.mp4": "libx265",
}  # fmt: skip
STILLS = ("still.png", "still.jpg", "still.webp", "still.gif", "still.bmp", "still.tif", "still.avif")

UNRECOGNISED, TRUNCATED, UNDECODABLE = "unrecognised", "truncated", "undecodable"
NO_VIDEO, TOO_LARGE, EMPTY, MISSING, UNREADABLE = "no_video_stream", "too_large", "empty", "missing", "unreadable"
CHANGED = "changed"
Bytes = Callable[[Mapping[str, bytes], random.Random], bytes]


class Kind(NamedTuple):
    """A kind of bad file.

    Attributes:
        name: of the file.
        classes: one of these names it.
        content: returns its bytes from those of the sound files; None where `make` writes it.
        make: writes the file otherwise.
        late: the file is sound while the index is built, and is changed afterwards.
    """

    name: str
    classes: tuple[str, ...]
    content: Bytes | None = None
    make: Callable[[Path], None] | None = None
    late: bool = False


def text(*lines: str) -> Bytes:
    """A text; some of its words are drawn."""
    return lambda sound, draw: ("\n".join(lines) + f"\n{draw.randbytes(8).hex()}\n").encode()


def head(start: bytes, length: int = 3000) -> Bytes:
    """A file of another format: its first bytes, then noise."""
    return lambda sound, draw: start + draw.randbytes(length)


def cut(name: str, least: float = 0.1, most: float = 0.9) -> Bytes:
    """A sound file without its end."""
    return lambda sound, draw: sound[name][: int(len(sound[name]) * draw.uniform(least, most))]


def replaced(name: str, old: bytes, new: bytes) -> Bytes:
    """A sound file in which some bytes are others."""

    def content(sound: Mapping[str, bytes], draw: random.Random) -> bytes:
        assert old in sound[name], f"{name} has no {old!r}"
        return sound[name].replace(old, new)

    return content


def without_media_data(fill: Callable[[random.Random, int], bytes], name: str = "clip.mp4") -> Bytes:
    """A clip whose index is whole, but whose coded frames are other bytes."""

    def content(sound: Mapping[str, bytes], draw: random.Random) -> bytes:
        clip = bytearray(sound[name])
        at = clip.index(b"mdat") + 4
        length = int.from_bytes(clip[at - 8 : at - 4]) - 8
        clip[at : at + length] = fill(draw, length)
        return bytes(clip)

    return content


def png_of_size(width: int, height: int) -> Bytes:
    """A PNG file whose header states another size."""

    def content(sound: Mapping[str, bytes], draw: random.Random) -> bytes:
        png = bytearray(sound["still.png"])
        png[16:24] = struct.pack(">II", width, height)
        png[29:33] = struct.pack(">I", zlib.crc32(bytes(png[12:29])))
        return bytes(png)

    return content


def at(name: str, position: int, value: bytes) -> Bytes:
    """A sound file with other bytes at one position."""
    return lambda sound, draw: sound[name][:position] + value + sound[name][position + len(value) :]


def jpeg_of_size(width: int, height: int) -> Bytes:
    """A JPEG file whose frame header states another size."""

    def content(sound: Mapping[str, bytes], draw: random.Random) -> bytes:
        jpeg = sound["still.jpg"]
        position = jpeg.index(b"\xff\xc0") + 5
        return jpeg[:position] + struct.pack(">HH", height, width) + jpeg[position + 4 :]

    return content


def sound_of(container: str, codec: str) -> Bytes:
    """A file that has sound only, as a container for videos stores it."""

    def content(sound: Mapping[str, bytes], draw: random.Random) -> bytes:
        memory = io.BytesIO()
        with av.open(memory, "w", format=container) as file:
            stream = file.add_stream(codec, rate=48_000)
            for _ in range(8):
                samples = np.array([[draw.uniform(-1, 1) for _ in range(1024)]], np.float32)
                frame = av.AudioFrame.from_ndarray(samples, "fltp", "mono")
                frame.sample_rate = 48_000
                file.mux(stream.encode(frame))
            file.mux(stream.encode())
        return memory.getvalue()

    return content


def wave_file(sound: Mapping[str, bytes], draw: random.Random) -> bytes:
    memory = io.BytesIO()
    with wave.open(memory, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(draw.randbytes(2000))
    return memory.getvalue()


def image_of_mode(mode: str, values: Callable[[random.Random], np.ndarray]) -> Bytes:
    """A TIFF file of a pixel mode that has no meaning as a colour of 8 bits."""

    def content(sound: Mapping[str, bytes], draw: random.Random) -> bytes:
        memory = io.BytesIO()
        Image.fromarray(values(draw), mode).save(memory, "TIFF")
        return memory.getvalue()

    return content


def noise(draw: random.Random, length: int) -> bytes:
    return draw.randbytes(length)


def zeros(draw: random.Random, length: int) -> bytes:
    return bytes(length)


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


KINDS = (
    Kind("empty.mp4", (EMPTY,), lambda sound, draw: b""),
    Kind("empty.png", (EMPTY,), lambda sound, draw: b""),
    Kind("noise.mp4", (UNRECOGNISED, NO_VIDEO), lambda sound, draw: b"\xf3" + draw.randbytes(5000)),
    Kind("noise.png", (UNRECOGNISED, NO_VIDEO), lambda sound, draw: b"\xf3" + draw.randbytes(5000)),
    Kind("zeros.mp4", (UNRECOGNISED,), lambda sound, draw: bytes(draw.randrange(1, 9000))),
    Kind("one_byte.mp4", (UNRECOGNISED,), lambda sound, draw: b"\xf3"),
    Kind("text.mp4", (UNRECOGNISED,), text("a red fox jumps over the lazy dog")),
    Kind("utf16.mp4", (UNRECOGNISED,), lambda sound, draw: f"a red fox {draw.random()}".encode("utf-16")),
    Kind("page.jpg", (UNRECOGNISED,), text("<!DOCTYPE html>", "<html><body>404 Not Found</body></html>")),
    Kind("storage_error.mp4", (UNRECOGNISED,), text('<?xml version="1.0"?>', "<Error><Code>AccessDenied</Code></Error>")),
    Kind("lfs_pointer.mp4", (UNRECOGNISED,), text("version https://git-lfs.github.com/spec/v1", "oid sha256:0", "size 9")),
    Kind("annex_pointer.mp4", (UNRECOGNISED,), text("/annex/objects/SHA256E-s1--0.mp4")),
    Kind("playlist.mp4", (UNRECOGNISED,), text("#EXTM3U", "#EXTINF:9,", "clip.mp4")),
    Kind("concat.mp4", (UNRECOGNISED,), text("ffconcat version 1.0", "file clip.mp4")),
    Kind("dash.mp4", (UNRECOGNISED,), text('<MPD xmlns="urn:mpeg:dash:schema:mpd:2011">', "</MPD>")),
    Kind("drawing.png", (UNRECOGNISED,), text('<svg xmlns="http://www.w3.org/2000/svg">', "</svg>")),
    Kind("subtitles.mp4", (UNRECOGNISED,), text("1", "00:00:01,000 --> 00:00:02,000", "a fox")),
    Kind("archive.mp4", (UNRECOGNISED,), head(b"PK\3\4\x14\0\0\0")),
    Kind("compressed.mp4", (UNRECOGNISED,), head(b"\x1f\x8b\x08\0")),
    Kind("document.png", (UNRECOGNISED,), head(b"%PDF-1.7\n")),
    Kind("layers.png", (UNRECOGNISED,), head(b"8BPS\0\1")),
    Kind("jpeg_xl.jpg", (UNRECOGNISED,), head(b"\xff\x0a")),
    Kind("jpeg_2000.jpg", (UNRECOGNISED,), head(b"\0\0\0\x0cjP  \r\n\x87\n")),
    Kind("light.png", (UNRECOGNISED,), head(b"\x76\x2f\x31\x01")),
    Kind("array.png", (UNRECOGNISED,), head(b"\x93NUMPY\1\0")),
    Kind("table.mp4", (UNRECOGNISED,), head(b"PAR1")),
    Kind("program.mp4", (UNRECOGNISED,), head(b"\x7fELF\2\1\1\0")),
    Kind("weights.mp4", (UNRECOGNISED,), head(struct.pack("<Q", 2) + b'{"')),
    Kind("pickle.png", (UNRECOGNISED,), head(b"\x80\x04\x95")),
    Kind("folder.mp4", (UNREADABLE,), make=lambda path: path.mkdir()),
    Kind("pipe.mp4", (UNREADABLE,), make=os.mkfifo),
    Kind("loop.png", (UNREADABLE,), make=link_to("loop.png")),
    Kind("nowhere.png", (MISSING,), make=link_to("not_there.png")),
    Kind("absent.mp4", (MISSING,), make=lambda path: None),
    Kind("sound.wav", (NO_VIDEO,), wave_file),
    Kind("sound.mp3", (NO_VIDEO,), head(b"ID3\4\0\0\0\0\0\0")),
    Kind("sound.flac", (NO_VIDEO,), head(b"fLaC\0\0\0\x22")),
    Kind("sound.mp4", (NO_VIDEO,), sound_of("mp4", "aac")),
    Kind("sound.mkv", (NO_VIDEO,), sound_of("matroska", "aac")),
    Kind("cut.mp4", (TRUNCATED,), cut("clip.mp4", 0.1, 0.95)),
    Kind("cut.mov", (TRUNCATED,), cut("clip.mov", 0.1, 0.95)),
    Kind("cut.hevc.mp4", (TRUNCATED,), cut("clip.hevc.mp4", 0.1, 0.95)),
    Kind("cut.avi", (TRUNCATED,), cut("clip.avi")),
    Kind("cut.mkv", (TRUNCATED,), cut("clip.mkv")),
    Kind("cut.png", (TRUNCATED, UNDECODABLE), cut("still.png", 0.3)),
    Kind("cut.jpg", (TRUNCATED,), cut("still.jpg", 0.5)),
    Kind("cut.webp", (TRUNCATED,), cut("still.webp", 0.2)),
    Kind("cut.gif", (TRUNCATED,), cut("still.gif", 0.3, 0.8)),
    Kind("cut.bmp", (TRUNCATED,), cut("still.bmp")),
    Kind("cut.avif", (TRUNCATED, UNDECODABLE), cut("still.avif", 0.6)),  # the latter between two of its boxes
    Kind("no_index.mp4", (TRUNCATED,), replaced("clip.mp4", b"moov", b"free")),
    Kind("unknown_codec.mp4", (UNDECODABLE,), replaced("clip.mp4", b"avc1", b"zzz9")),
    Kind("zero_frames.mp4", (UNDECODABLE,), without_media_data(zeros)),
    Kind("noise_frames.mp4", (UNDECODABLE,), without_media_data(noise)),
    Kind("huge.png", (TOO_LARGE,), png_of_size(*TOO_MANY_PIXELS)),
    Kind("huge.jpg", (TOO_LARGE,), jpeg_of_size(*TOO_MANY_PIXELS)),
    Kind("bright.tif", (UNDECODABLE,), image_of_mode("F", lambda draw: np.full((8, 8), draw.uniform(2, 900), np.float32))),
    Kind("replaced.png", (CHANGED,), cut("still.png", 0.2, 0.5), late=True),
    Kind("shortened.mp4", (CHANGED,), cut("clip.mp4"), late=True),
    Kind("removed.mp4", (MISSING,), make=Path.unlink, late=True),
)  # fmt: skip


def write_sound(folder: Path) -> dict[str, bytes]:
    """Write the sound files, and return the content of each by name."""
    for number, (name, codec) in enumerate(CLIPS.items()):
        tiny.write_clip(folder / name, FRAMES, SIDE, SIDE, codec=codec, seed=number)
    for number, name in enumerate(STILLS):
        tiny.write_image(folder / name, SIDE, SIDE, seed=number)
    return {name: (folder / name).read_bytes() for name in (*CLIPS, *STILLS)}


def write_bad(kind: Kind, folder: Path, sound: Mapping[str, bytes], draw: random.Random) -> None:
    """Write the file of a kind, or change the sound one that is there."""
    path = folder / kind.name
    if kind.content is not None:
        path.write_bytes(kind.content(sound, draw))
    else:
        assert kind.make is not None
        kind.make(path)


# ------------------------------------------------------------------------------------------------ unusual files


def saved(picture: Image.Image, kind: str, **settings: object) -> bytes:
    memory = io.BytesIO()
    picture.save(memory, kind, **settings)
    return memory.getvalue()


def turned(orientation: int) -> Callable[[Image.Image], tuple[bytes, Image.Image]]:
    """An image that a viewer turns upright (EXIF orientation), and what a viewer shows."""
    back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
    }  # fmt: skip

    def made(picture: Image.Image) -> tuple[bytes, Image.Image]:
        exif = Image.Exif()
        exif[274] = orientation
        return saved(picture, "PNG", exif=exif), picture.transpose(back[orientation])

    return made


def grey_16(picture: Image.Image) -> tuple[bytes, Image.Image]:
    grey = picture.convert("L")
    return saved(Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), "PNG"), grey.convert("RGB")


def as_mode(mode: str, kind: str = "PNG", **settings: object) -> Callable[[Image.Image], tuple[bytes, Image.Image]]:
    def made(picture: Image.Image) -> tuple[bytes, Image.Image]:
        changed = picture.convert(mode)
        return saved(changed, kind, **settings), changed.convert("RGB")

    return made


def transparent(picture: Image.Image) -> tuple[bytes, Image.Image]:
    """A picture whose upper half is transparent: white."""
    clear = picture.convert("RGBA")
    clear.paste((255, 0, 0, 0), (0, 0, SIDE, SIDE // 2))
    shown = picture.copy()
    shown.paste((255, 255, 255), (0, 0, SIDE, SIDE // 2))
    return saved(clear, "PNG"), shown


def named_otherwise(picture: Image.Image) -> tuple[bytes, Image.Image]:
    return saved(picture, "PNG"), picture


def progressive(picture: Image.Image) -> tuple[bytes, Image.Image]:
    content = saved(picture, "JPEG", quality=90, progressive=True)
    return content, Image.open(io.BytesIO(content)).convert("RGB")


# By file name: from a picture to the file's bytes and the pixels that are trained.
UNUSUAL: Mapping[str, Callable[[Image.Image], tuple[bytes, Image.Image]]] = {
    **{f"turned_{number}.png": turned(number) for number in range(2, 9)},
    "grey.png": as_mode("L"), "two_colours.png": as_mode("1"), "palette.png": as_mode("P"), "grey_16.png": grey_16,
    "cmyk.tif": as_mode("CMYK", "TIFF"), "transparent.png": transparent, "image.mp4": named_otherwise,
    "progressive.jpg": progressive,
}  # fmt: skip
