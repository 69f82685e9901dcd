"""Reading of still images, and the resizing that images and video frames share."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from videox.data.media.container import (
    MAX_PIXELS,
    BadMedia,
    MediaInfo,
    check_pixels,
    open_container,
    raise_system_error,
)
from videox.data.media.png import open_png

# What Pillow and its codecs raise for damaged content: every error that their code can run into, but not MemoryError.
_PILLOW_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, LookupError, OSError, RuntimeError,
    SyntaxError, TypeError, ValueError, struct.error, zlib.error,
)  # fmt: skip
_ORIENTATION = 0x0112
_BITS_PER_SAMPLE, _SAMPLE_FORMAT, _SIGNED = 258, 339, 2
_NEW_SUBFILE_TYPE, _REDUCED, _DNG_VERSION = 254, 1, 50706  # TIFF 6.0, section 8: bit 0; DNG 1.6, chapter 4
_TO_UPRIGHT = {  # EXIF 2.3 table 4.6.4: orientation -> transform that makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def resize_cover(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale a frame to cover height x width (bilinear, antialiased) and crop it at the centre.

    torch's 8-bit kernel is within 1/255 of Pillow's and of the float formula, and several times faster than Pillow's.

    Args:
        frame: uint8 [h, w, 3].
        height: height of the result, in pixels.
        width: width of the result, in pixels.

    Returns:
        uint8 [height, width, 3].

    Raises:
        BadMedia: too_small, for a strip so thin that the scaled frame would have more than MAX_PIXELS pixels.
    """
    import torch  # imported here, because the index's child processes only read sizes and do not need it

    full_height, full_width = cover_size(frame.shape[0], frame.shape[1], height, width)
    if full_height * full_width > max(MAX_PIXELS, 4 * height * width):
        raise BadMedia("too_small", f"{frame.shape[1]}x{frame.shape[0]} would grow to {full_width}x{full_height}")
    # Decoders may return read-only frames, which torch cannot represent; they are copied.
    writable = np.require(frame, requirements=["C", "W"])
    pixels = torch.from_numpy(writable)[None].permute(0, 3, 1, 2)
    scaled = torch.nn.functional.interpolate(pixels, (full_height, full_width), mode="bilinear", antialias=True)
    top, left = (full_height - height) // 2, (full_width - width) // 2
    return scaled[0, :, top : top + height, left : left + width].permute(1, 2, 0).numpy()


def cover_size(source_height: int, source_width: int, height: int, width: int) -> tuple[int, int]:
    """Return the height and width of the source when it is scaled to just cover height x width."""
    scale = max(height / source_height, width / source_width)
    return max(height, round(source_height * scale)), max(width, round(source_width * scale))


def probe_image(path: Path) -> MediaInfo:
    """Return the upright size of an image, read from its header; raise BadMedia as `read_image` does."""
    with open_image(path) as image:
        width, height = upright_size(image)
        return MediaInfo("image", width, height, 1, 0.0)


def read_image(path: Path, height: int, width: int) -> np.ndarray:
    """Read an image, made upright by its EXIF orientation, scaled to cover height x width and cropped at the centre.

    Of an animation, the first picture is read. Transparent pixels become white. 16- and 32-bit grey is scaled by the
    range of its type; float grey must be in 0..1. Colour profiles are not applied. Text and profiles in a PNG file are
    left out, so that neither their size nor damage in them matters (open_png).

    Returns:
        uint8 [1, height, width, 3], RGB.

    Raises:
        BadMedia: the classes of `open_container`, needs_package (HEIF without pillow-heif), too_large (before
            decoding), truncated, or undecodable (also for the preview in a raw photo).
    """
    with open_image(path) as image:
        pixels = upright_pixels(image)
    return np.ascontiguousarray(resize_cover(pixels, height, width)[None])


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return the width and height of an open image that is made upright by its EXIF orientation."""
    width, height = image.size
    # Pillow exchanges the sides of a TIFF file by itself, on opening it, and turns the pixels when it loads them.
    return (height, width) if _orientation(image) >= 5 and image.format != "TIFF" else (width, height)


def upright_pixels(image: Image.Image) -> np.ndarray:
    """Return the current picture of an open image as uint8 [h, w, 3], upright, with white in place of transparency.

    Raises:
        BadMedia: too_large, truncated, or undecodable.
    """
    with pillow_errors_to_bad_media():
        image.load()
        transform = _TO_UPRIGHT.get(_orientation(image))
        rgb = _to_rgb(image)
        return np.array(rgb if transform is None else rgb.transpose(transform))


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Open an image by its content, and check its size; raise BadMedia as `read_image` does."""
    container = open_container(path)
    if container.kind != "image":
        raise BadMedia("undecodable", "a video where an image is expected")
    if container.format == "HEIF":
        _register_heif()
    with ExitStack() as stack:
        with pillow_errors_to_bad_media():
            source = stack.enter_context(open_png(path)) if container.format == "PNG" else path
            image = stack.enter_context(Image.open(source, formats=[container.format]))
            is_preview = container.format == "TIFF" and _is_preview(image)
        if is_preview:
            raise BadMedia("undecodable", "a raw photo, and only its preview can be read: save it as PNG or JPEG")
        check_pixels(*image.size)
        yield image


def _is_preview(image: Image.Image) -> bool:
    """Return whether the first picture of a TIFF file is a smaller version of another, as in DNG, NEF and ARW."""
    tags = getattr(image, "tag_v2", {})
    return bool(tags.get(_NEW_SUBFILE_TYPE, 0) & _REDUCED) or _DNG_VERSION in tags


def _register_heif() -> None:
    """Make Pillow open HEIF images; raise BadMedia "needs_package" if pillow-heif is not installed."""
    try:
        import pillow_heif  # imported here, because it is optional
    except ImportError as error:
        what = "a HEIF image (HEIC): pip install pillow-heif, or convert it to PNG or JPEG"
        raise BadMedia("needs_package", what) from error
    pillow_heif.register_heif_opener(thumbnails=False)


@contextmanager
def pillow_errors_to_bad_media() -> Iterator[None]:
    """Convert Pillow's errors to BadMedia; wraps only calls of Pillow, so that a bug of our code stays visible."""
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadMedia("too_large", str(error)) from error
    except _PILLOW_ERRORS as error:
        raise_system_error(error)
        truncated = "truncated" in str(error).lower() or isinstance(error, EOFError)
        detail = str(error) or type(error).__name__
        raise BadMedia("truncated" if truncated else "undecodable", detail) from error


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except (*_PILLOW_ERRORS, TypeError):  # the pixels may be fine although the EXIF block is broken: assume upright
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_grey_to_8_bit(image)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        coloured = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), coloured).convert("RGB")
    if image.mode not in ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"):
        raise BadMedia("undecodable", f"pixels of mode {image.mode}")
    return image.convert("RGB")


def _grey_to_8_bit(image: Image.Image) -> np.ndarray:
    """Return uint8 [h, w] of a grey image with more than 8 bits, scaled by the range of its stored type."""
    values = np.asarray(image)
    if image.mode == "F":
        if not (values.min() >= 0 and values.max() <= 1):  # this form of the comparison rejects NaN too
            raise BadMedia("undecodable", f"float pixels from {values.min()} to {values.max()}, outside of 0..1")
        return np.round(values * 255).astype(np.uint8)
    tags = getattr(image, "tag_v2", {})
    bits = int(tags.get(_BITS_PER_SAMPLE, (16,))[0])
    signed = tags.get(_SAMPLE_FORMAT, (1,))[0] == _SIGNED
    if bits == 32 and not signed:
        values = values.view(np.uint32)  # Pillow stores unsigned values in a signed type
    limit = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    return np.round(values.clip(0, limit) * (255.0 / limit)).astype(np.uint8)
