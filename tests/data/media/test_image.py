"""Tests of videox.data.media.image: damage of any kind is a bad sample, and HEIF images through pillow-heif."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from tests.support.skips import skip_missing
from videox.data.media.container import BadMedia, MediaInfo
from videox.data.media.video import probe, read_clip, read_image

SUFFIXES = ("png", "jpg", "gif", "tiff", "webp", "bmp", "avif")


def gradient(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 2, y * 3, x + y], -1).astype(np.uint8))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("frames", [1, 3])
def test_damage_is_a_bad_sample_whatever_the_decoder_raises(tmp_path: Path, suffix: str, frames: int) -> None:
    path, random = tmp_path / f"a.{suffix}", np.random.default_rng(frames)
    pictures = [gradient(48 + number, 36).crop((0, 0, 48, 36)) for number in range(frames)]
    several = {"save_all": True, "append_images": pictures[1:]} if frames > 1 and suffix not in ("jpg", "bmp") else {}
    pictures[0].save(path, **several)
    whole, read = path.read_bytes(), 0
    for _ in range(30):
        content = bytearray(whole)
        for at in random.integers(8, len(content), random.integers(1, 12)):
            content[at] = random.integers(256)
        path.write_bytes(content[: len(content) if random.random() < 0.7 else random.integers(12, len(content))])
        for call, arguments in ((probe, ()), (read_image, (16, 16)), (read_clip, ([0, frames - 1], 16, 16))):
            try:
                call(path, *arguments)
                read += 1
            except BadMedia as refused:
                assert refused.media_class and refused.detail
    assert read  # not every change is damage


def test_a_damaged_avif_whose_header_is_sound_is_undecodable(tmp_path: Path) -> None:
    path = tmp_path / "bad.avif"
    gradient(96, 64).save(path)
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat") + 4
    content[start:] = b"\xa5" * (len(content) - start)
    path.write_bytes(content)
    assert probe(path) == MediaInfo("image", 96, 64, 1, 0.0)
    with pytest.raises(BadMedia) as refused:
        read_image(path, 32, 32)
    assert refused.value.media_class == "undecodable"


@pytest.mark.parametrize("tags", [{254: 1, 271: "NIKON"}, {50706: b"\1\4\0\0"}], ids=["NEF", "DNG"])
def test_the_preview_in_a_raw_photo_is_not_the_photo(tmp_path: Path, tags: dict[int, object]) -> None:
    """Pillow opens the first picture of a raw photo, which is a preview of a few hundred pixels."""
    preview, photo = gradient(48, 32), gradient(96, 64)
    stored = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in tags.items():
        stored[tag] = value
    path = tmp_path / "photo.tif"
    preview.save(path, tiffinfo=stored, save_all=True, append_images=[photo])
    for call, arguments in ((probe, ()), (read_image, (16, 16))):
        with pytest.raises(BadMedia, match=r"undecodable: a raw photo.*save it as PNG or JPEG"):
            call(path, *arguments)
    preview.save(path, save_all=True, append_images=[photo])  # two pages
    assert probe(path).width == 48


def save_heic(path: Path, image: Image.Image, **options: object) -> Path:
    if importlib.util.find_spec("pillow_heif") is None:
        skip_missing("pillow-heif", "reading of HEIC images")
    import pillow_heif

    pillow_heif.register_heif_opener()
    image.save(path, format="HEIF", **options)
    return path


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_heic_images_are_read_upright(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = np.asarray(gradient(80, 48))
    stored = {1: upright, 3: upright[::-1, ::-1], 6: np.rot90(upright), 8: np.rot90(upright, -1)}[orientation]
    image = Image.fromarray(np.ascontiguousarray(stored))
    path = save_heic(tmp_path / "a.heic", image, exif=exif.tobytes(), quality=95).rename(tmp_path / "a.jpg")
    info = probe(path)
    assert (info, info.format) == (MediaInfo("image", 80, 48, 1, 0.0), "HEIF")
    assert np.abs(read_image(path, 48, 80)[0].astype(int) - upright).mean() < 4


def test_a_cut_heic_is_truncated(tmp_path: Path) -> None:
    path = save_heic(tmp_path / "a.heic", gradient(80, 48))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(BadMedia, match="truncated"):
        probe(path)


def test_heic_without_pillow_heif_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0\0\0\x10mdat" + bytes(8)
    (tmp_path / "a.heic").write_bytes(head)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for call in (probe, lambda path: read_image(path, 8, 8)):
        with pytest.raises(BadMedia) as refused:
            call(tmp_path / "a.heic")
        assert refused.value.media_class == "needs_package"
        assert "pip install pillow-heif" in refused.value.detail
