"""Small pictures and clips of a run, kept in output_dir/report_files, so that each is made once."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageOps

from videox.data.media.timeout import READ_SECONDS, time_limit
from videox.data.media.video import BadMedia, read_clip, read_image
from videox.files import atomic_write
from videox.tracking.report.collect import Record, SampleFile, whole

FOLDER = "report_files"
FRAME_SIDE = 128  # longer side, in pixels, of a frame on a contact sheet
CLIP_SIDE = 256  # longer side of a sample clip on the page
QUALITY = 55  # of WebP
SIGNATURE = 12  # side of the frames that clips are compared by
_STRIP = re.compile(r"row-\d+-x(\d+)-")
_NAME = re.compile(r"(row-\d+-x\d+|step-\d+-prompt-\d+)-[0-9a-f]{12}\.(webp|mp4)")


@dataclass(frozen=True)
class Cache:
    """The folder of small files, and the limit on the time for making new ones.

    Attributes:
        folder: created when the first file is written.
        until: time.monotonic() at which no further file is begun.
    """

    folder: Path
    until: float

    def get(self, name: str, make: Callable[[Path], None]) -> Path | None:
        """Return a file, made now if it does not exist; None if it cannot be made, or if the time is over.

        What cannot be made leaves an empty file, so that it is tried once: also if the attempt kills this process.
        """
        path = self.folder / name
        if not path.exists():
            if time.monotonic() >= self.until:
                return None
            self.folder.mkdir(exist_ok=True)
            path.touch()
            try:
                with time_limit(READ_SECONDS, own_process=True), atomic_write(path) as temporary:
                    make(temporary)
            except (BadMedia, av.FFmpegError, OSError, ValueError):
                return None
            except (SystemExit, KeyboardInterrupt):  # the run ends: the next page tries again
                path.unlink(missing_ok=True)
                raise
        return path if path.stat().st_size else None

    def has(self, name: str) -> bool:
        """Return whether a file was made, or tried, before."""
        return (self.folder / name).exists()

    def prune(self, used: Collection[str]) -> None:
        """Delete the files of earlier data and samples: those that this module names and that are not in `used`."""
        for path in self.folder.glob("*"):
            if _NAME.fullmatch(path.name) and path.name not in used:
                path.unlink(missing_ok=True)


def _key(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode("utf-8", "replace")).hexdigest()[:12]


def _stamp(path: Path) -> tuple[object, ...]:
    try:
        status = path.stat()
    except OSError:
        return (str(path),)
    return str(path), status.st_size, status.st_mtime_ns


def strip_name(clip: Record) -> str:
    """Return the name of a training clip's picture, which changes with the file and with what is taken from it.

    It follows from the record alone: the pictures of a run that was copied to another machine stay.
    """
    indices = clip.get("indices")
    key = _key(clip.get("path"), clip.get("stamp"), clip.get("bucket"), indices)
    return f"row-{whole(clip.get('row')):06d}-x{len(indices) if isinstance(indices, list) else 1}-{key}.webp"


def training_strip(cache: Cache, clip: Record, data_dir: Path) -> Path | None:
    """Return a picture with the first, middle and last frame of a training clip, as the model gets them.

    Args:
        cache: of the run.
        clip: an entry of data_report.json: path, kind, bucket and the indices of the three frames.
        data_dir: the folder that paths are relative to.
    """

    def make(temporary: Path) -> None:
        _, height, width = (int(side) for side in clip["bucket"])
        path = data_dir / str(clip["path"])
        if clip.get("kind") == "image":
            frames = read_image(path, height, width)
        else:
            frames = read_clip(path, [int(i) for i in clip["indices"]], height, width)
        save_strip(temporary, frames)

    return cache.get(strip_name(clip), make)


def save_strip(path: Path, frames: Sequence[np.ndarray] | np.ndarray) -> None:
    """Write frames, uint8 [h, w, 3] each, side by side as WebP."""
    small = [ImageOps.contain(Image.fromarray(frame), (FRAME_SIDE, FRAME_SIDE)) for frame in frames]
    strip = Image.new("RGB", (sum(image.width for image in small), small[0].height))
    left = 0
    for image in small:
        strip.paste(image, (left, 0))
        left += image.width
    strip.save(path, format="WEBP", quality=QUALITY)


def clip_name(sample: SampleFile) -> str:
    """Return the name of the reduced copy of a sample."""
    suffix = ".webp" if sample.path.suffix == ".png" else ".mp4"
    return f"{sample.path.stem}-{_key(_stamp(sample.path))}{suffix}"


def small_clip(cache: Cache, sample: SampleFile) -> Path | None:
    """Return a sample clip with sides of at most CLIP_SIDE; a WebP picture if it has a single frame."""
    if sample.path.suffix == ".png":
        return small_picture(cache, sample.path, clip_name(sample))
    return cache.get(clip_name(sample), lambda temporary: _shrink(sample.path, temporary))


def is_made(cache: Cache, sample: SampleFile) -> bool:
    """Return whether small_clip has nothing to do for a sample."""
    return cache.has(clip_name(sample))


def small_picture(cache: Cache, path: Path, name: str | None = None) -> Path | None:
    """Return a picture with sides of at most CLIP_SIDE, upright."""

    def make(temporary: Path) -> None:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
        ImageOps.contain(upright, (CLIP_SIDE, CLIP_SIDE)).save(temporary, format="WEBP", quality=80)

    return cache.get(name or f"given-{_key(_stamp(path))}.webp", make)


def _shrink(source: Path, target: Path) -> None:
    """Write a clip with sides of at most CLIP_SIDE as H.264, at the frame rate of the source."""
    with (
        av.open(str(source)) as given,
        av.open(str(target), "w", format="mp4", options={"movflags": "+faststart"}) as out,
    ):
        video = given.streams.video[0]
        scale = min(1.0, CLIP_SIDE / max(video.width, video.height))
        width, height = (max(2, round(side * scale / 2) * 2) for side in (video.width, video.height))
        rate = video.average_rate or Fraction(16)
        options: Any = {"crf": "28", "preset": "veryfast", "x264-params": "mbtree=0"}
        stream: Any = out.add_stream("libx264", rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number, frame in enumerate(given.decode(video)):
            small = frame.reformat(width, height, "yuv420p")
            small.pts, small.time_base = number, 1 / rate
            out.mux(stream.encode(small))
        out.mux(stream.encode())


def data_uri(path: Path) -> str:
    """Return the content of a small file as a data: address."""
    kind = {".webp": "image/webp", ".mp4": "video/mp4"}[path.suffix]
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def frames_in(path: Path) -> int:
    """Return the number of frames that a strip has side by side; 1 for other pictures."""
    match = _STRIP.match(path.name)
    return int(match[1]) if match else 1


def signature(path: Path) -> np.ndarray:
    """Return three small frames of a strip, picture or clip as one vector, float64 [9 SIGNATURE^2] in [0, 1].

    A picture of one frame counts as three equal frames.
    """
    if path.suffix == ".mp4":
        with av.open(str(path)) as container:
            frames = [frame.to_image() for frame in container.decode(video=0)]
    else:
        with Image.open(path) as image:
            strip = image.convert("RGB")
        count = frames_in(path)
        edges = np.linspace(0, strip.width, count + 1).round().astype(int).tolist()
        frames = [strip.crop((edges[i], 0, edges[i + 1], strip.height)) for i in range(count)]
    chosen = [frames[0], frames[len(frames) // 2], frames[-1]]
    size = (SIGNATURE, SIGNATURE)
    small = [frame.convert("RGB").resize(size, Image.Resampling.BOX) for frame in chosen]
    return np.concatenate([np.asarray(frame, np.float64).ravel() / 255 for frame in small])


def nearest(of: Path, among: np.ndarray) -> tuple[int, float] | None:
    """Return which of the signatures [n, 9 SIGNATURE^2], n >= 1, is nearest to that of a clip, and their distance.

    The distance is the root mean square difference of three small frames, 0 to 1. None if the clip is damaged.
    """
    try:
        wanted = signature(of)
    except (av.FFmpegError, OSError):
        return None
    distances = np.sqrt(np.mean((among - wanted) ** 2, axis=1))
    best = int(np.argmin(distances))
    return best, float(distances[best])


def deadline(seconds: float | None) -> float:
    """Return the time.monotonic() in `seconds` from now; None = never."""
    return time.monotonic() + seconds if seconds is not None else float("inf")
