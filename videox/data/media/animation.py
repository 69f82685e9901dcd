"""Animations (GIF, WebP, APNG, AVIF): how many frames they have, when these are shown, and reading of clips of them.

The files are images by their format; one with several frames is a video. Times are read from the container's own
fields, without a decoder where the container has them outside of the compressed data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from videox.data.media.container import ANIMATED_PNG, ANIMATION, BadMedia, Container, MediaInfo
from videox.data.media.image import open_image, pillow_errors_to_bad_media, upright_pixels, upright_size

ANIMATED_FORMATS = ("GIF", "WEBP", "PNG", "AVIF")
# Seconds that a frame is shown whose file states no time, and below which a GIF states none: many encoders wrote 0 or
# 1 hundredths, and browsers and FFmpeg show such frames for a tenth of a second.
_DEFAULT_DELAY, _MIN_GIF_DELAY = Fraction(1, 10), Fraction(2, 100)
_WEBP_ANIMATED = 0x02  # flag of a VP8X chunk (RFC 9649, 2.7)


def probe_animation(path: Path, container: Container) -> MediaInfo | None:
    """Return size, frames and mean frames per second of an animation; None for an image with a single picture.

    Args:
        path: the file.
        container: what `open_container` returned for it.

    Raises:
        BadMedia: as `read_image`; truncated also for a file that ends within a frame.
    """
    if container.format not in ANIMATED_FORMATS or (container.format == "AVIF" and not container.sequence):
        return None
    delays = None if container.format == "AVIF" else _DELAYS[container.format](path)
    if delays is not None and len(delays) < 2:
        return None
    with open_image(path) as image:
        frames = _frames(image)
        if frames < 2:
            return None
        if delays is not None and len(delays) != frames:
            raise BadMedia("truncated", f"{len(delays)} of {frames} frames")
        seconds = sum(delays, Fraction(0)) if delays else _avif_seconds(image)
        width, height = upright_size(image)
    decoding = ANIMATION | (ANIMATED_PNG if container.format == "PNG" else 0)
    return MediaInfo("video", width, height, frames, float(frames / seconds), decoding=decoding)


def read(path: Path, indices: Sequence[int], keep: Callable[[int, np.ndarray], None]) -> None:
    """Pass the frames of `indices` (ascending), uint8 [h, w, 3], upright and complete, to `keep(index, frame)`.

    A frame of an animation is what is shown: the canvas after the frame was drawn on those before it. Transparent
    pixels become white.

    Raises:
        BadMedia: as `read_image`; out_of_range for frames that the file does not have.
    """
    with open_image(path) as image:
        frames, first = _frames(image), _first(image)
        if frames < 2:
            raise BadMedia("undecodable", "an image where a video is expected")
        if indices[0] < 0 or indices[-1] >= frames:
            raise BadMedia("out_of_range", f"frames {indices[0]} to {indices[-1]} of {frames}")
        for index in sorted(set(indices)):
            _show(image, first + index)
            keep(index, upright_pixels(image))


def _show(image: Image.Image, number: int) -> None:
    """Make a frame the current picture; those of an APNG are loaded one after the other.

    A frame of an APNG is drawn on those before it. Pillow 13 draws it on an incomplete canvas where `seek` passes over
    frames that were not loaded.
    """
    with pillow_errors_to_bad_media():
        if image.format == "PNG":
            for before in range(image.tell(), number):
                image.seek(before)
                image.load()
        image.seek(number)


def _frames(image: Image.Image) -> int:
    with pillow_errors_to_bad_media():
        return int(getattr(image, "n_frames", 1)) - _first(image)


def _first(image: Image.Image) -> int:
    """Return Pillow's number of the first frame: 1 for an APNG whose default image is not part of the animation."""
    return int(bool(getattr(image, "default_image", False)))


def _avif_seconds(image: Image.Image) -> Fraction:
    """Return the duration of an AVIF sequence: the end of its last frame, which Pillow tells in milliseconds."""
    frames = _frames(image)
    with pillow_errors_to_bad_media():
        image.seek(frames - 1)
        image.load()
    end = int(image.info["timestamp"]) + int(image.info["duration"])
    return Fraction(end, 1000) or frames * _DEFAULT_DELAY


def _gif_delays(path: Path) -> list[Fraction]:
    """Return the seconds that each frame of a GIF is shown (GIF89a specification, 17 to 27)."""
    delays: list[Fraction] = []
    data, delay = path.read_bytes(), Fraction(0)
    at = 13 + _color_table_bytes(data[10:11])
    while at < len(data) and data[at] != 0x3B:  # the trailer, which some encoders leave out
        block, label = data[at], data[at + 1 : at + 2]
        if block == 0x21:
            if label == b"\xf9":
                delay = Fraction(int.from_bytes(data[at + 4 : at + 6], "little"), 100)
            at = _after_sub_blocks(data, at + 2)
        elif block == 0x2C:
            at = _after_sub_blocks(data, at + 11 + _color_table_bytes(data[at + 9 : at + 10]))
            delays.append(delay if delay >= _MIN_GIF_DELAY else _DEFAULT_DELAY)
            delay = Fraction(0)
        else:
            at += 1  # padding, which decoders skip
    return delays


def _color_table_bytes(flags: bytes) -> int:
    return 3 << (flags[0] & 7) + 1 if flags and flags[0] & 0x80 else 0


def _after_sub_blocks(data: bytes, at: int) -> int:
    while at < len(data):
        size = data[at]
        at += 1 + size
        if not size:
            return at
    raise BadMedia("truncated", f"its {len(data)} bytes end within a block")


def _webp_delays(path: Path) -> list[Fraction]:
    """Return the seconds that each frame of a WebP file is shown (RFC 9649, 2.7.1.1); [] for a still image."""
    with path.open("rb") as file:
        file.seek(12)
        delays: list[Fraction] = []
        while len(header := file.read(8)) == 8:
            size = int.from_bytes(header[4:], "little")
            payload = file.read(min(size, 16))
            is_still = header[:4] == b"VP8X" and not int.from_bytes(payload[:1]) & _WEBP_ANIMATED
            if is_still or header[:4] in (b"VP8 ", b"VP8L"):
                return []
            if header[:4] == b"ANMF":
                delays.append(Fraction(int.from_bytes(payload[12:15], "little"), 1000) or _DEFAULT_DELAY)
            file.seek(size - len(payload) + size % 2, 1)
    return delays


def _png_delays(path: Path) -> list[Fraction]:
    """Return the seconds that each frame of an APNG is shown (PNG specification, 11.3.6); [] for a still image."""
    delays: list[Fraction] = []
    size, animated, at = path.stat().st_size, False, 8
    with path.open("rb") as file:
        while at < size:
            file.seek(at)
            header, payload = file.read(8), file.read(26)
            name = header[4:]
            at += 12 + int.from_bytes(header[:4])
            animated = animated or name == b"acTL"
            if name == b"IEND" or (name == b"IDAT" and not animated):
                break  # the chunk of an animation stands before the pixels
            if animated and at > size:
                raise BadMedia("truncated", f"{size} bytes, its {name.decode('latin-1')} chunk ends at {at}")
            if name == b"fcTL" and len(payload) == 26:
                numerator, denominator = int.from_bytes(payload[20:22]), int.from_bytes(payload[22:24])
                delays.append(Fraction(numerator, denominator or 100) or _DEFAULT_DELAY)
    return delays


_DELAYS: dict[str, Callable[[Path], list[Fraction]]] = {"GIF": _gif_delays, "WEBP": _webp_delays, "PNG": _png_delays}
