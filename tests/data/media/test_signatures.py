"""Tests of videox.data.media.signatures: what a file is by its first bytes, and videos without a usual container."""

from __future__ import annotations

import gzip
import io
import pickle
import subprocess
import tarfile
import wave
import zipfile
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import safetensors.numpy
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image

from videox.data.choices import READERS
from videox.data.media.container import BadMedia, format_of
from videox.data.media.signatures import FORMATS, HEAD_BYTES, describe, recognise
from videox.data.media.video import probe, read_clip

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
PAGE = "<html><head><title>404 Not Found</title></head><body>nginx</body></html>"


def zip_of(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, "content")
    return buffer.getvalue()


def tar_of(name: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name))
    return buffer.getvalue()


def wav() -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(1600))
    return buffer.getvalue()


def sound(container: str, codec: str) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        stream = file.add_stream(codec, rate=48000)
        for at in range(0, 4096, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 48000, at
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return buffer.getvalue()


def saved(format_name: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, format_name, **options)
    return buffer.getvalue()


# name -> (content, class of BadMedia, words of the message)
NO_MEDIA: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "lfs": (LFS.encode, "unrecognised", "a Git LFS pointer in place of the file: run git lfs pull"),
    "lfs with CRLF": (LFS.replace("\n", "\r\n").encode, "unrecognised", "run git lfs pull"),
    "lfs of a long file": ((LFS * 99).encode, "unrecognised", "run git lfs pull"),
    "annex": (lambda: b"/annex/objects/SHA256E-s1--ab.mp4\n", "unrecognised", "run git annex get"),
    "html": (PAGE.encode, "unrecognised", "a web page (HTML)"),
    "html with doctype": (("\ufeff\n <!DOCTYPE html>\n" + PAGE).encode, "unrecognised", "a web page (HTML)"),
    "xhtml": (('<?xml version="1.0"?>\n<!-- x -->\n' + PAGE).encode, "unrecognised", "a web page (HTML)"),
    "storage error": (lambda: b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>', "unrecognised", "storage"),
    "svg": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', "unrecognised", "an SVG drawing"),
    "text": (lambda: b"a caption", "unrecognised", "a text, not an image or video; it begins with 'a caption'"),
    "text, cut in a letter": (lambda: b"a" + "\u00fc".encode() * HEAD_BYTES, "unrecognised", "a text"),
    "utf-16": (lambda: "a caption".encode("utf-16"), "unrecognised", "begins with 'a caption'"),
    "text that begins like Netpbm": (lambda: b"P1 is the first", "unrecognised", "begins with 'P1 is the first'"),
    "netpbm": (lambda: saved("PPM"), "unrecognised", "a Netpbm image"),
    "netpbm in text": (lambda: b"P2\n# made by hand\n2 1\n255\n0 9\n", "unrecognised", "a Netpbm image"),
    "dds": (lambda: saved("DDS"), "unrecognised", "a DDS texture"),
    "sgi": (lambda: saved("SGI"), "unrecognised", "an SGI image"),
    "pcx": (lambda: saved("PCX"), "unrecognised", "a PCX image"),
    "eps": (lambda: saved("EPS"), "unrecognised", "an EPS drawing"),
    "icns": (lambda: saved("ICNS"), "unrecognised", "an icon"),
    "icon": (lambda: saved("ICO"), "unrecognised", "an icon"),
    "icon of one size": (lambda: saved("ICO", sizes=[(16, 16)]), "unrecognised", "an icon"),
    "xbm": (lambda: b"#define a_width 16\n#define a_height 7\n", "unrecognised", "an X11 pixmap"),
    "json": (lambda: b'{"error": "quota"}', "unrecognised", """begins with '{"error": "quota"}'"""),
    "subrip": (lambda: b"1\r\n00:00:01,000 --> 00:00:02,000\r\nHello\r\n", "unrecognised", "subtitles (SubRip)"),
    "webvtt": (lambda: b"WEBVTT\n\n00:01.000 --> 00:02.000\nHello\n", "unrecognised", "subtitles (WebVTT)"),
    "ass": (lambda: b"\xef\xbb\xbf[Script Info]\nTitle: x\n", "unrecognised", "subtitles (ASS)"),
    "playlist": (lambda: b"#EXTM3U\n#EXTINF:9,\na.ts\n", "unrecognised", "a playlist"),
    "zip": (lambda: zip_of("a.mp4"), "unrecognised", "a zip archive: unpack it"),
    "gzip": (lambda: gzip.compress(b"a"), "unrecognised", "a gzip archive"),
    "tar": (lambda: tar_of("a.mp4"), "unrecognised", "a tar archive"),
    "npy": (lambda: b"\x93NUMPY\1\0v\0{'descr'", "unrecognised", "a numpy array"),
    "pdf": (lambda: b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "unrecognised", "a PDF document"),
    "zeros": (lambda: bytes(5000), "unrecognised", "all zero"),
    "wav": (wav, "no_video_stream", "audio only (WAV)"),
    "mp3": (lambda: sound("mp3", "mp3"), "no_video_stream", "audio only (MP3)"),
    "ogg": (lambda: sound("ogg", "libopus"), "no_video_stream", "audio only (Ogg)"),
    "aac": (lambda: sound("adts", "aac"), "no_video_stream", "audio only (AAC)"),
    "m4a": (lambda: sound("mp4", "aac"), "no_video_stream", "audio only: 1 audio stream"),
    "mka": (lambda: sound("matroska", "aac"), "no_video_stream", "audio only: 1 audio stream"),
    "AppleDouble": (lambda: b"\0\5\x16\7\0\2\0\0Mac OS X        ", "unrecognised", "what macOS stores beside a file"),
    "folder of macOS": (lambda: b"\0\0\0\1Bud1\0\0", "unrecognised", "a .DS_Store of macOS"),
    "shortcut": (lambda: b"L\0\0\0\1\x14\2\0\0\0\0\0\xc0", "unrecognised", "a Windows shortcut"),
    "safetensors": (lambda: safetensors.numpy.save({"a": np.zeros(2, np.float32)}), "unrecognised", "tensors (safetensors)"),
    "pickle": (lambda: pickle.dumps({"a": 1}), "unrecognised", "a Python pickle"),
    "cr2": (lambda: b"II*\0\x10\0\0\0CR\2\0" + bytes(60), "unrecognised", "a raw photo of a camera: save it as PNG"),
    "rw2": (lambda: b"IIU\0\x18\0\0\0" + bytes(60), "unrecognised", "a raw photo"),
    "raf": (lambda: b"FUJIFILMCCD-RAW 0201" + bytes(60), "unrecognised", "a raw photo"),
    "xcf": (lambda: b"gimp xcf v011\0\0\0", "unrecognised", "a GIMP image"),
    "bink": (lambda: b"BIKi\x99\0\0\0", "unrecognised", "a Bink video"),
    "red": (lambda: b"\0\0\1\x20RED2\0\7\0\0", "unrecognised", "a RED raw video"),
    "pgs": (lambda: b"PG" + bytes(8) + b"\x16\0\x13" + bytes(19), "unrecognised", "subtitles (PGS)"),
    "unknown": (lambda: b"\x01\x02\x03\x04\xff\xfe\xfd\xfc" * 9, "unrecognised", "begins with 01 02 03 04 ff fe fd fc"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_MEDIA)
def test_a_file_that_is_no_media_says_what_it_is(tmp_path: Path, name: str) -> None:
    content, media_class, words = NO_MEDIA[name]
    path = tmp_path / "a.mp4"
    path.write_bytes(content())
    with pytest.raises(BadMedia) as refused:
        probe(path)
    assert refused.value.media_class == media_class
    assert words in refused.value.detail
    shows_bytes = "begins with 01 02" in refused.value.detail
    assert shows_bytes == (name == "unknown")


def ffmpeg(*arguments: str) -> None:
    subprocess.run([get_ffmpeg_exe(), "-v", "error", "-y", *arguments], check=True)


SOURCE = ("-f", "lavfi", "-i", "testsrc2=size=160x128:rate=25:duration=0.48")
# file -> (format, arguments of FFmpeg)
RAW = {
    "a.ivf": ("ivf", ("-c:v", "libvpx", "-b:v", "300k")),
    "vp9.ivf": ("ivf", ("-c:v", "libvpx-vp9", "-b:v", "300k")),
    "a.y4m": ("yuv4mpegpipe", ("-pix_fmt", "yuv420p")),
    "444.y4m": ("yuv4mpegpipe", ("-pix_fmt", "yuv444p")),
    "a.mxf": ("mxf", ("-c:v", "mpeg2video", "-bf", "2")),
    "h264.mxf": ("mxf", ("-c:v", "libx264", "-g", "9")),
    "pal.dv": ("dv", ("-s", "720x576", "-pix_fmt", "yuv420p", "-c:v", "dvvideo")),
    "ntsc.dv": ("dv", ("-s", "720x480", "-r", "30000/1001", "-pix_fmt", "yuv411p", "-c:v", "dvvideo")),
    "mpeg1.m1v": ("mpegvideo", ("-c:v", "mpeg1video", "-bf", "2")),
    "mpeg2.m2v": ("mpegvideo", ("-c:v", "mpeg2video", "-bf", "2", "-g", "6")),
    "a.264": ("h264", ("-c:v", "libx264", "-bf", "3", "-g", "10")),
    "aud.264": ("h264", ("-c:v", "libx264", "-bf", "0", "-x264-params", "aud=1")),
    "a.265": ("hevc", ("-c:v", "libx265", "-x265-params", "log-level=none")),
    "a.m4v": ("m4v", ("-c:v", "mpeg4", "-bf", "2", "-f", "m4v")),
    "a.nut": ("nut", ("-c:v", "mpeg4", "-bf", "0")),
    "a.mpg": ("mpeg", ("-c:v", "mpeg2video", "-bf", "2")),
    "a.m2ts": ("mpegts", ("-c:v", "libx264", "-mpegts_m2ts_mode", "1")),
}


def reference(path: Path) -> np.ndarray:
    """Return every frame as FFmpeg's own program decodes it, uint8 [T, h, w, 3]."""
    with av.open(str(path)) as file:
        size = file.streams.video[0].height, file.streams.video[0].width
    arguments = ["-i", str(path), "-fps_mode", "passthrough", "-sws_flags", "bicubic", "-f", "rawvideo"]
    command = [get_ffmpeg_exe(), "-v", "error", *arguments, "-pix_fmt", "rgb24", "-"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    return np.frombuffer(output, np.uint8).reshape(-1, *size, 3)


def assert_reads_as_ffmpeg(path: Path) -> None:
    info, expected = probe(path), reference(path)
    assert info.fps == pytest.approx(30000 / 1001 if expected.shape[1] == 480 else 25)
    assert (info.kind, info.frames, (info.height, info.width)) == ("video", len(expected), expected.shape[1:3])
    wanted = [*range(0, info.frames, 3), info.frames - 1]
    for reader in READERS:
        clip = read_clip(path, wanted, info.height, info.width, reader)
        difference = np.abs(clip.astype(int) - expected[wanted])
        # FFmpeg's program scales the colours of interlaced DV within fields, this reader within frames.
        assert difference.max() <= 3 or (info.format == "dv" and np.median(difference) <= 1), reader


SLOW = ("vp9.ivf", "444.y4m", "h264.mxf", "ntsc.dv", "pal.dv", "aud.264", "a.nut", "a.265")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in RAW]
)
def test_videos_without_a_usual_container_are_read_as_ffmpeg_reads_them(tmp_path: Path, name: str) -> None:
    format_name, arguments = RAW[name]
    ffmpeg(*SOURCE, *arguments, str(tmp_path / name))
    disguised = (tmp_path / name).rename(tmp_path / "a.bin")
    assert format_of(disguised) == format_name
    assert_reads_as_ffmpeg(disguised)


@pytest.mark.parametrize("first", [1, 187, 188 * 4 + 100])
def test_transport_streams_are_recognised_wherever_they_are_cut(tmp_path: Path, first: int) -> None:
    whole, cut = tmp_path / "a.ts", tmp_path / "cut.ts"
    ffmpeg(*SOURCE, "-c:v", "libx264", "-g", "10", str(whole))
    cut.write_bytes(
        bytes(range(1, 1 + first % 188)) + whole.read_bytes() if first < 188 else whole.read_bytes()[first:]
    )
    assert format_of(cut) == "mpegts"
    # Whole packets after the leftover of one: nothing of the video is missing.
    assert probe(cut).frames == 12 if first < 188 else probe(cut).frames > 0


@pytest.mark.parametrize("step", [192, 204])
def test_packets_of_other_sizes_are_found_at_any_offset(step: int) -> None:
    packets = b"".join((b"\x47" + bytes([n]) * 187).ljust(step, b"\1") for n in range(2, 30))
    for at in (0, 3, 100, step - 1):
        assert recognise((b"\2" * at + packets)[:HEAD_BYTES]) == "mpegts"
    assert recognise(packets[: step * 2] + bytes(HEAD_BYTES)) == ""


def test_text_is_never_a_video() -> None:
    lines = "\n".join(["GET /index.html"] * 300).encode()[:HEAD_BYTES]
    assert recognise(lines) == ""
    assert describe(lines)[1].startswith("a text")


def test_random_bytes_are_hardly_ever_a_format() -> None:
    random = np.random.default_rng(0)
    found = [recognise(random.bytes(HEAD_BYTES)) for _ in range(200)]
    assert [name for name in found if name] == []


def test_formats_keep_their_numbers_in_saved_indexes() -> None:
    assert FORMATS[:10] == ("", "PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "AVIF", "HEIF", "mov")
    assert FORMATS[10:17] == ("matroska", "mpeg", "flv", "ogg", "asf", "avi", "mpegts")
    assert len({*FORMATS}) == len(FORMATS) < 256


def test_short_files_are_described(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    for length in range(1, 20):
        head = content[:length]
        assert recognise(head) or describe(head)[1]


def test_a_stream_whose_only_keyframe_is_cut_is_refused_before_the_run(tmp_path: Path) -> None:
    whole, cut = tmp_path / "a.m2v", tmp_path / "cut.m2v"
    ffmpeg(*SOURCE, "-c:v", "mpeg2video", str(whole))
    assert probe(whole).frames == 12
    first = next(packet for packet in av.open(str(whole)).demux(video=0))
    cut.write_bytes(whole.read_bytes()[: first.size // 2])
    with pytest.raises(BadMedia) as refused:
        probe(cut)
    assert refused.value.media_class == "undecodable"


def test_an_encrypted_video_is_refused_as_such(tmp_path: Path) -> None:
    keys = (
        "-encryption_key",
        "76a6c65c5ea762046bd749a2e632ccbb",
        "-encryption_kid",
        "a7e61c373e219033c21091fa607bf3b8",
    )
    ffmpeg(*SOURCE, "-c:v", "libx264", "-encryption_scheme", "cenc-aes-ctr", *keys, str(tmp_path / "a.mp4"))
    with pytest.raises(BadMedia, match=r"undecodable: it is encrypted \(DRM\)"):
        probe(tmp_path / "a.mp4")


@pytest.mark.slow
def test_a_sequence_of_heif_pictures_is_a_video(tmp_path: Path) -> None:
    plain, sequence = tmp_path / "a.mp4", tmp_path / "a.heics"
    ffmpeg(*SOURCE, "-c:v", "libx265", "-x265-params", "log-level=none", "-tag:v", "hvc1", str(plain))
    content = plain.read_bytes()
    brands = b"msf1" + content[12:16] + b"msf1hevciso8mp41"[: int.from_bytes(content[:4]) - 16]
    sequence.write_bytes(content[:8] + brands + content[int.from_bytes(content[:4]) :])
    assert recognise(sequence.read_bytes()[:HEAD_BYTES]) == "mov"
    assert probe(sequence) == probe(plain)
