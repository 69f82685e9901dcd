"""Area media: damaged clips and images of 22 formats, read by the loader's worker processes and by the probe's."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import plans
import tiny
from crashes import fork, wait_for
from PIL import Image

from tests.torture.cases import Area, Outcome, Row
from videox.data.dataset import Sample, TokenLengthDataset
from videox.data.index.index import DataLocation, Index, build_index
from videox.data.loader import BatchLoader
from videox.data.plan.epoch import PlannedSample
from videox.shapes import Bucket

FRAMES, SIDE = 11, 64
CLIPS = {
    "h264.mp4": "libx264", "h264.mkv": "libx264", "h264.mov": "libx264", "mpeg4.avi": "mpeg4", "vp8.webm": "libvpx",
    "vp9.webm": "libvpx-vp9", "hevc.mp4": "libx265", "av1.mp4": "libsvtav1", "mpeg2.ts": "mpeg2video",
    "mpeg2.mpg": "mpeg2video", "ffv1.mkv": "ffv1", "sorenson.flv": "flv", "wmv2.wmv": "wmv2",
}  # fmt: skip
STILLS = ("still.png", "still.jpg", "still.webp", "still.gif", "still.bmp", "still.tif", "still.avif")
ANIMATIONS = ("moving.gif", "moving.webp")
FORMATS = (*CLIPS, *STILLS, *ANIMATIONS)
SOUND = ("h264.mp4", "still.png")  # of each case two files stay as they are: they must be read as ever
WORKERS = 2
POLICY = replace(plans.POLICY, video_sample_size=SIDE, image_sample_size=SIDE, n_frames=5)
HEAD = 600  # bytes in which most headers are


def write_media(folder: Path) -> None:
    """Write a file of each format, the two that stay sound, and metadata.json."""
    for number, (name, codec) in enumerate(CLIPS.items()):
        tiny.write_clip(folder / name, FRAMES, 96, SIDE, codec=codec, seed=number)
    for number, name in enumerate(STILLS):
        tiny.write_image(folder / name, 96, SIDE, seed=number)
    pictures = [Image.fromarray(frame) for frame in tiny.moving_square(4, 96, SIDE)]
    for name in ANIMATIONS:
        pictures[0].save(folder / name, save_all=True, append_images=pictures[1:])
    for name in SOUND:
        shutil.copy2(folder / name, folder / f"sound-{name}")
    names = (*FORMATS, *(f"sound-{name}" for name in SOUND))
    rows = [
        {"file_path": name, "text": name, "type": "video" if "codec" in kind_of(name) else "image"} for name in names
    ]
    (folder / "metadata.json").write_text(json.dumps(rows), encoding="utf-8")


def kind_of(name: str) -> str:
    """Return \"codec\" for a clip, \"picture\" for an image or an animation."""
    return "codec" if name.removeprefix("sound-") in CLIPS else "picture"


def mutate(content: bytes, draw: random.Random) -> bytes:
    """Return damaged bytes of the same length: flipped bits, noise, zeros, moved parts, a lost end."""
    damaged, size = bytearray(content), len(content)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        at = draw.randrange(min(HEAD, size)) if draw.random() < 0.5 else draw.randrange(size)
        length = min(draw.choice((1, 2, 4, 16, 64, 1024)), size - at)
        match draw.randrange(6):
            case 0 | 1:
                damaged[at] ^= 1 << draw.randrange(8)
            case 2:
                damaged[at : at + length] = draw.randbytes(length)
            case 3:
                damaged[at : at + length] = bytes([draw.choice((0, 0x7F, 0x80, 0xFF))]) * length
            case 4:
                other = draw.randrange(size - length + 1)
                damaged[at : at + length] = damaged[other : other + length]
            case _:
                damaged[at:] = bytes(size - at)
    return bytes(damaged)


class Media(Area):
    """Whatever a file holds, its row is read or is a named bad row; no other row is touched and no process dies."""

    rows = (
        Row("loader", f"damaged files of {len(FORMATS)} formats through the loader's workers: read, or named as a bad row; others as ever", 20000),
        Row("index", "damaged files through the probe's processes while the index is built: measured, or named", 2000),
    )  # fmt: skip

    def __init__(self, folder: Path, *, broken: bool = False) -> None:
        super().__init__(folder, broken=broken)
        # in a child: SVT-AV1 changes the scheduling policy of the process that encodes with it
        assert wait_for(fork(lambda: write_media(folder / "media"))) == 0
        self.metadata = folder / "media" / "metadata.json"
        self.index = self._build_index(folder / "media")
        assert self.index.usable.all(), self.index.problems()
        self.names = [str(path) for path in self.index.file_path.to_pylist()]
        self.sound = [row for row, name in enumerate(self.names) if name.startswith("sound-")]
        self.expected = {row: batch["pixels"].numpy() for row, batch in self._read(self.index, self.sound, 0)}

    def attempt(self, seed: int, draw: random.Random) -> Outcome:
        place = self.folder / f"media-{seed}"
        shutil.copytree(self.metadata.parent, place)
        for name in FORMATS:
            path = place / name
            times, content = path.stat(), mutate(path.read_bytes(), draw)
            path.write_bytes(content)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        if seed % 8 == 7:
            row, problems = "index", self._problems_of_probe(place)
        else:
            row, problems = "loader", self._problems_of_loader(place)
        shutil.rmtree(place)
        return Outcome(row, f"{len(FORMATS)} files", tried=len(FORMATS), problems=problems)

    def _problems_of_probe(self, place: Path) -> list[str]:
        (place / self.index_path(place).name).unlink()
        index = self._build_index(place)
        named = {row for row, *_ in index.problems()}
        problems = [
            f"{self.names[row]}: neither measured nor named"
            for row in range(len(self.names))
            if not index.usable[row] and row not in named
        ]
        if self.broken:
            named |= set(self.sound)
        return problems + [f"{self.names[row]} is sound and was refused" for row in self.sound if row in named]

    def _problems_of_loader(self, place: Path) -> list[str]:
        # The index is that of the sound files: the damage came after it was built, and the probe cannot refuse it.
        index, rows, problems, seen = self._reopened(place), list(range(len(self.names))), [], set()
        try:
            for row, batch in self._read(index, rows, WORKERS):
                seen.add(row)
                problems += self._problems_of_batch(row, batch, place)
        except Exception as error:  # noqa: BLE001 - anything that ends the loader is what is looked for
            problems.append(f"the loader ended after {len(seen)} rows: {type(error).__name__}: {error}")
            return problems
        return problems + [f"{self.names[row]} was left out" for row in rows if row not in seen]

    def _problems_of_batch(self, row: int, batch: dict, place: Path) -> list[str]:
        name, bucket = self.names[row], self._bucket(row)
        shape = (1, bucket.frames, bucket.height, bucket.width, 3)
        if batch["rows"] != [row]:
            return [f"{name}: another row came in its place: {batch['rows']}"]
        if batch["bad"]:
            (bad,) = batch["bad"]
            if row in self.sound:
                return [f"{name} is sound and was refused: {bad}"]
            named = bad.path == str(place / name) and bad.media_class and batch["weights"].tolist() == [0.0]
            return [] if named else [f"{name}: not rightly named: {bad}"]
        pixels = batch["pixels"].numpy()
        if pixels.shape != shape:
            return [f"{name}: {pixels.shape} instead of {shape}"]
        if row in self.sound and not np.array_equal(pixels, self.expected[row]):
            return [f"{name} is sound and was read otherwise than alone"]
        return []

    def index_path(self, folder: Path) -> Path:
        return folder / "metadata.json.videox-index.arrow"

    def _build_index(self, folder: Path) -> Index:
        location = DataLocation(folder / "metadata.json", folder, self.index_path(folder))
        return build_index(location, workers=WORKERS, progress=False)

    def _reopened(self, place: Path) -> Index:
        return build_index(
            DataLocation(place / "metadata.json", place, self.index_path(place)), workers=1, progress=False
        )

    def _bucket(self, row: int) -> Bucket:
        return Bucket(5, SIDE, SIDE) if kind_of(self.names[row]) == "codec" else Bucket(1, SIDE, SIDE)

    def _read(self, index: Index, rows: list[int], workers: int) -> Iterator[tuple[int, dict]]:
        """Yield each row and its batch."""
        planned = [[PlannedSample(row, 0, row, 0, 1.0, 0.5, self._bucket(row), row, 0, True)] for row in rows]
        kind = SwappedInSilence if self.broken and workers else TokenLengthDataset
        dataset = kind(index, policy=POLICY, reader="pyav", caption_dropout=0.0)
        yield from zip(rows, BatchLoader(dataset, planned, workers=workers, pin_memory=False), strict=True)


class SwappedInSilence(TokenLengthDataset):
    """Broken on purpose: the last row comes in place of one that cannot be read, as some trainers do it."""

    def __getitem__(self, planned: PlannedSample) -> Sample:
        sample = super().__getitem__(planned)
        last = len(self.index) - 1
        return (
            sample
            if sample["bad"] is None
            else super().__getitem__(planned._replace(row=last, bucket=Bucket(1, SIDE, SIDE)))
        )
