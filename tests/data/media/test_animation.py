"""Tests of videox.data.media.animation: GIF, WebP, APNG and AVIF with several frames are read as videos."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image, ImageDraw

from videox.data.choices import READERS
from videox.data.media.animation import ANIMATED_FORMATS
from videox.data.media.container import ANIMATED_PNG, ANIMATION, BadMedia, MediaInfo
from videox.data.media.video import probe, read_clip, read_image

LOSSLESS = {"gif": {}, "png": {}, "webp": {"lossless": True}, "avif": {"quality": 100, "subsampling": "4:4:4"}}


def picture(number: int, width: int = 40, height: int = 30) -> Image.Image:
    """A picture with a palette of few colours and a square that moves, so that frames differ in a part only."""
    image = Image.new("RGB", (width, height), (40, 80, 120))
    ImageDraw.Draw(image).rectangle((2 * number, number, 2 * number + 8, number + 8), (200, 10 * number, 30))
    return image


def save(path: Path, count: int, duration: int | list[int] = 80, **options: object) -> list[np.ndarray]:
    frames = [picture(number) for number in range(count)]
    options = {**LOSSLESS[path.suffix[1:]], **options}
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=duration, loop=0, **options)
    return [np.asarray(frame) for frame in frames]


def read_all(path: Path) -> np.ndarray:
    info = probe(path)
    return read_clip(path, list(range(info.frames)), info.height, info.width)


def refusal(call, *arguments) -> BadMedia:
    with pytest.raises(BadMedia) as refused:
        call(*arguments)
    return refused.value


@pytest.mark.parametrize("suffix", LOSSLESS)
@pytest.mark.parametrize(
    ("count", "duration", "fps"),
    [(12, 80, 12.5), (2, 40, 25.0), (5, [100, 300, 50, 500, 50], 5.0)],
    ids=["steady", "two frames", "uneven"],
)
def test_animations_are_videos_with_their_own_frames_and_times(
    tmp_path: Path, suffix: str, count: int, duration: int | list[int], fps: float
) -> None:
    expected = save(tmp_path / f"a.{suffix}", count, duration)
    path = (tmp_path / f"a.{suffix}").rename(tmp_path / "a.bin")
    info = probe(path)
    assert info == MediaInfo("video", 40, 30, count, pytest.approx(fps))
    assert (info.format in ANIMATED_FORMATS, info.decoding) == (
        True,
        ANIMATION | (ANIMATED_PNG if suffix == "png" else 0),
    )
    limit = 6 if suffix == "avif" else 0
    for reader in READERS:
        for wanted in (list(range(count)), [count - 1], [0, count - 1, count - 1]):
            clip = read_clip(path, wanted, 30, 40, reader)
            assert np.abs(clip.astype(int) - np.stack([expected[i] for i in wanted])).max() <= limit
    # The file is an image too, for a row whose type says so.
    assert np.abs(read_image(path, 30, 40)[0].astype(int) - expected[0]).max() <= limit


@pytest.mark.parametrize("seed", [13, 14, 16])
def test_a_frame_of_an_apng_is_the_same_wherever_reading_begins(tmp_path: Path, seed: int) -> None:
    """Frames of parts that are drawn over others, or replace them, and are removed in all three ways."""
    random = np.random.default_rng(seed)
    pictures = []
    for _ in range(6):
        pixels = np.zeros((30, 40, 4), np.uint8)
        x, y = random.integers(0, 25, 2)
        pixels[y : y + 9, x : x + 12] = (*random.integers(0, 255, 3), int(random.integers(90, 255)))
        pictures.append(Image.fromarray(pixels))
    disposal, blend = ([int(value) for value in random.integers(0, end, 6)] for end in (3, 2))
    path = tmp_path / "a.png"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], disposal=disposal, blend=blend, duration=80)
    expected = read_all(path)
    for first in range(6):
        np.testing.assert_array_equal(read_clip(path, [*range(first, 6)], 30, 40), expected[first:])


@pytest.mark.parametrize("suffix", LOSSLESS)
def test_a_single_picture_is_an_image(tmp_path: Path, suffix: str) -> None:
    picture(0).save(tmp_path / f"still.{suffix}", **LOSSLESS[suffix])
    save(tmp_path / f"one.{suffix}", 1)
    for name in ("still", "one"):
        info = probe(tmp_path / f"{name}.{suffix}")
        assert (info, info.decoding) == (MediaInfo("image", 40, 30, 1, 0.0), 0)
        assert refusal(read_clip, tmp_path / f"{name}.{suffix}", [0], 30, 40).media_class == "undecodable"


def test_equal_frames_that_an_encoder_joined_are_one_longer_frame(tmp_path: Path) -> None:
    picture(0).save(
        tmp_path / "a.gif", save_all=True, append_images=[picture(0), picture(5)], duration=[100, 100, 200], loop=0
    )
    assert probe(tmp_path / "a.gif") == MediaInfo("video", 40, 30, 2, 5.0)


def ffmpeg_frames(path: Path) -> np.ndarray:
    command = [get_ffmpeg_exe(), "-v", "error", "-i", str(path), "-fps_mode", "passthrough", "-f", "rawvideo"]
    output = subprocess.run([*command, "-pix_fmt", "rgb24", "-"], check=True, stdout=subprocess.PIPE).stdout
    return np.frombuffer(output, np.uint8).reshape(-1, 96, 128, 3)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("a.gif", ("-vf", "split[a][b];[a]palettegen[p];[b][p]paletteuse")),
        ("offsets.gif", ("-gifflags", "+offsetting+transdiff")),
        ("whole.gif", ("-gifflags", "-offsetting-transdiff")),
        ("a.apng", ("-plays", "0", "-pred", "mixed")),
    ],
)
def test_animations_of_ffmpeg_are_read_as_ffmpeg_reads_them(tmp_path: Path, name: str, arguments: tuple) -> None:
    source = ("-f", "lavfi", "-i", "testsrc2=size=128x96:rate=20:duration=1")
    path = tmp_path / name
    subprocess.run([get_ffmpeg_exe(), "-v", "error", *source, *arguments, str(path)], check=True)
    expected = ffmpeg_frames(path)
    assert probe(path) == MediaInfo("video", 128, 96, 20, 20.0)
    assert np.abs(read_all(path).astype(int) - expected).max() <= 3


@pytest.mark.parametrize("disposal", [1, 2, 3])
def test_frames_are_drawn_on_what_the_one_before_leaves(tmp_path: Path, disposal: int) -> None:
    """A red square on the left, then a transparent frame with a blue square on the right."""
    canvases = []
    for at, colour in ((2, "red"), (20, "blue"), (30, "green")):
        canvas = Image.new("RGBA", (40, 12), (0, 0, 0, 0))
        ImageDraw.Draw(canvas).rectangle((at, 2, at + 6, 8), colour)
        canvases.append(canvas)
    path = tmp_path / "a.gif"
    canvases[0].save(path, save_all=True, append_images=canvases[1:], duration=100, disposal=disposal, optimize=False)
    clip = read_all(path)
    assert len(clip) == 3
    red, blue, green, white = (255, 0, 0), (0, 0, 255), (0, 128, 0), (255, 255, 255)
    first, second = (red, blue) if disposal == 1 else (white, white)  # kept, or cleared or restored
    assert [tuple(clip[2, 5, x]) for x in (4, 22, 32, 12)] == [first, second, green, white]


def test_the_default_image_of_an_apng_is_not_a_frame(tmp_path: Path) -> None:
    path, frames = tmp_path / "a.png", [picture(number) for number in range(1, 5)]
    picture(9).save(path, save_all=True, append_images=frames, default_image=True, duration=250)
    assert probe(path) == MediaInfo("video", 40, 30, 4, 4.0)
    np.testing.assert_array_equal(read_all(path), np.stack([np.asarray(frame) for frame in frames]))
    frames[0].save(path, save_all=True, append_images=[frames[1]], default_image=True)
    assert probe(path).kind == "image"  # a default image and a single frame


@pytest.mark.parametrize(("delay", "fps"), [(0, 10.0), (10, 10.0), (20, 50.0), (100, 10.0)])
def test_a_gif_without_times_has_those_that_browsers_give_it(tmp_path: Path, delay: int, fps: float) -> None:
    save(tmp_path / "a.gif", 6, delay)
    assert probe(tmp_path / "a.gif").fps == pytest.approx(fps)


@pytest.mark.parametrize("suffix", ["webp", "png"])
def test_orientation_of_an_animation_is_applied(tmp_path: Path, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = save(tmp_path / f"a.{suffix}", 3, exif=exif)
    assert probe(tmp_path / f"a.{suffix}") == MediaInfo("video", 30, 40, 3, 12.5)
    np.testing.assert_array_equal(read_all(tmp_path / f"a.{suffix}"), [np.rot90(frame, -1) for frame in stored])


@pytest.mark.parametrize("suffix", LOSSLESS)
def test_cut_animations_are_bad_samples(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    save(path, 8)
    whole = path.read_bytes()
    for share in (0.3, 0.6, 0.95):
        path.write_bytes(whole[: int(len(whole) * share)])
        assert refusal(probe, path).media_class in ("truncated", "undecodable")
        assert refusal(read_clip, path, [0, 7], 30, 40).media_class in ("truncated", "undecodable", "out_of_range")


def test_frames_out_of_range_and_a_gif_without_trailer(tmp_path: Path) -> None:
    expected = save(tmp_path / "a.gif", 4)
    (tmp_path / "a.gif").write_bytes((tmp_path / "a.gif").read_bytes()[:-1])
    np.testing.assert_array_equal(read_all(tmp_path / "a.gif"), np.stack(expected))
    assert refusal(read_clip, tmp_path / "a.gif", [0, 4], 30, 40).media_class == "out_of_range"
