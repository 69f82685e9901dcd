"""Area media_kinds: bad files of sixty kinds, through probe and loader, each named by its class; and sound ones."""

from __future__ import annotations

import json
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

from tests.torture.bad_media import CLIPS, KINDS, SIDE, STILLS, UNUSUAL, write_bad, write_sound
from tests.torture.cases import Area, Outcome, Row
from videox.data.dataset import TokenLengthDataset
from videox.data.index.index import DataLocation, Index, build_index
from videox.data.loader import BatchLoader
from videox.data.plan.epoch import PlannedSample
from videox.shapes import Bucket

WORKERS = 2
POLICY = replace(plans.POLICY, video_sample_size=SIDE, image_sample_size=SIDE, n_frames=5)
TOLERANCE = 3  # of 255, of a pixel of an unusual file


class MediaKinds(Area):
    """Every bad file is refused by its name and class, by the probe or by the loader; no sound one is."""

    rows = (
        Row("bad", f"bad files of {len(KINDS)} kinds: refused by name and class; beside them {len(UNUSUAL)} unusual sound files and {len(CLIPS) + len(STILLS)} usual ones: read, with the right pixels", 20 * len(KINDS)),
    )  # fmt: skip

    def __init__(self, folder: Path, *, broken: bool = False) -> None:
        super().__init__(folder, broken=broken)
        media = folder / "sound"
        media.mkdir()
        # in a child: an encoder may change the scheduling policy of the process that encodes with it
        assert wait_for(fork(lambda: write_sound(media))) == 0
        self.sound = {name: (media / name).read_bytes() for name in (*CLIPS, *STILLS)}

    def attempt(self, seed: int, draw: random.Random) -> Outcome:
        place, pixels = self.folder / f"kinds-{seed}", {}
        place.mkdir()
        for name, content in self.sound.items():
            (place / name).write_bytes(content)
        for name, made in UNUSUAL.items():
            picture = Image.fromarray(tiny.moving_square(1, SIDE, SIDE, draw.randrange(1000))[0])
            content, shown = made(picture)
            (place / name).write_bytes(content)
            pixels[name] = np.asarray(shown)
        for kind in KINDS:
            if kind.late:
                shutil.copy2(place / ("clip.mp4" if kind.name.endswith(".mp4") else "still.png"), place / kind.name)
            else:
                write_bad(kind, place, self.sound, draw)
        names = [*(kind.name for kind in KINDS), *UNUSUAL, *self.sound]
        rows = [{"file_path": name, "text": name, "type": type_of(name)} for name in names]
        (place / "metadata.json").write_text(json.dumps(rows), encoding="utf-8")
        index = self._index(place)
        for kind in KINDS:
            if kind.late:
                write_bad(kind, place, self.sound, draw)
        found = self._named(index, names, pixels)
        shutil.rmtree(place)
        problems = [
            f"{kind.name}: {found.get(kind.name, 'not refused')} instead of {' or '.join(kind.classes)}"
            for kind in KINDS
            if found.get(kind.name) not in (kind.classes if not self.broken else kind.classes[1:])
        ]
        problems += [f"{name} is sound: {why}" for name, why in found.items() if name in (*UNUSUAL, *self.sound)]
        return Outcome("bad", f"{len(KINDS)} bad files", len(KINDS), problems)

    def _index(self, place: Path) -> Index:
        path = place / "metadata.json.videox-index.arrow"
        return build_index(DataLocation(place / "metadata.json", place, path), workers=WORKERS, progress=False)

    def _named(self, index: Index, names: list[str], pixels: dict[str, np.ndarray]) -> dict[str, str]:
        """Return the class of each refused file, or what is wrong with the pixels of one that was read."""
        found = {name: media_class for _, name, media_class, _ in index.problems()}
        for row, batch in self._read(index, [row for row, name in enumerate(names) if name not in found]):
            name = names[row]
            if batch["bad"]:
                found[name] = batch["bad"][0].media_class
            elif name in pixels:
                difference = np.abs(batch["pixels"].numpy()[0, 0].astype(int) - pixels[name]).max()
                if difference > TOLERANCE:
                    found[name] = f"a pixel differs by {difference}"
        return found

    def _read(self, index: Index, rows: list[int]) -> Iterator[tuple[int, dict]]:
        """Yield each row and its batch."""
        buckets = [Bucket(5 if index.kind[row] == "video" else 1, SIDE, SIDE) for row in rows]
        planned = [
            [PlannedSample(row, 0, row, 0, 1.0, 0.5, bucket, row, 0, True)]
            for row, bucket in zip(rows, buckets, strict=True)
        ]
        dataset = TokenLengthDataset(index, policy=POLICY, reader="pyav", caption_dropout=0.0)
        yield from zip(rows, BatchLoader(dataset, planned, workers=WORKERS, pin_memory=False), strict=True)


def type_of(name: str) -> str:
    """Return the type that metadata would state; the content of an unusual file decides."""
    return "video" if name.endswith((".mp4", ".mov", ".mkv", ".avi", ".webm")) else "image"
