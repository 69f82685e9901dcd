"""Area checkpoints: damage of every file of a checkpoint, of the saved index and of a latent cache."""

from __future__ import annotations

import random
import shutil
from functools import partial
from pathlib import Path

import torch

from tests.torture.cases import Area, Outcome, Row, flip_bit
from tests.torture.ground import EVERY, STEPS, shared
from videox.data.cache import maintenance
from videox.data.cache.cache import FINGERPRINTS, Cache, read_memo, write_memo
from videox.data.index.index import DataLocation, Index, build_index
from videox.errors import MODEL, UserError
from videox.run.checkpoint import verify
from videox.run.folder import resolve_resume

FILES = 20  # damaged files of a case
INDEX_FILES = 4
CACHE_FILES = 50
CACHED = {number.to_bytes(16, "big"): torch.arange(200.0) + number for number in range(6)}
NOTE = {"part": "moments", "encoder": "e", "file": "a.mp4", "size": 3, "mtime_ns": 4}
HASHES = {"/models/vae.safetensors 12 345": "ab" * 32}  # of the weights that the cache was made with
DAMAGE = ("bit", "bit", "bit", "cut", "longer", "missing", "other step")
COLUMNS = ("kind", "width", "height", "frames", "fps", "usable", "weight", "file_size", "mtime_ns")


def damage(path: Path, kind: str, draw: random.Random, other: Path | None = None) -> str:
    """Damage a file and return how, "" if its content is still the same.

    Args:
        path: the file.
        kind: one of DAMAGE.
        other: the same file of another step; None if there is none.
    """
    before = path.read_bytes()
    if kind == "bit":
        return flip_bit(path, draw)
    if kind == "missing":
        path.unlink()
        return "missing"
    if kind == "cut":
        path.write_bytes(before[: draw.randrange(len(before))])
    elif kind == "longer":
        added = draw.randbytes(draw.choice((1, 4096)))
        if path.suffix == ".json" and not added.strip():
            return ""  # a document with white space after it is the same document
        path.write_bytes(before + added)
    elif other is not None and other.exists():
        shutil.copyfile(other, path)
    return kind if path.read_bytes() != before else ""


class Checkpoints(Area):
    """Damage is found before anything is trained from it."""

    rows = (
        Row("checkpoint", "a flipped bit, a cut, longer, missing or foreign file: the checkpoint is refused by the file's name, `latest` takes the older one", 1000),
        Row("start", "the same through the train script: code 4 and one line that names the file", 100),
        Row("index", "a damaged saved index: built again with the same content, never used", 1000),
        Row("cache", "a flipped bit or a cut in any file of a latent cache: `scripts/cache.py verify` names it, and no run reads it", 1000),
    )  # fmt: skip

    def __init__(self, folder: Path, *, broken: bool = False, family: str = "wan2.1") -> None:
        super().__init__(folder, broken=broken)
        self.ground = shared(family)
        self.run = self.ground.reference()[0]
        self.check = partial(verify, hashes=not broken)
        self.newest, self.older = (f"checkpoint-{step}" for step in (STEPS, STEPS - EVERY))

    def attempt(self, seed: int, draw: random.Random) -> Outcome:
        if seed % 10 == 9 and not self.broken:
            return self.refused_start(seed, draw)
        if seed % 10 in (3, 7):
            return self._index(seed, draw)
        if seed % 10 == 5:
            return self._cache(seed, draw)
        return self.damaged_checkpoints(seed, draw)

    def damaged_checkpoints(self, seed: int, draw: random.Random) -> Outcome:
        """Damage files of the newest checkpoint, one at a time, and look which checkpoint a resume takes."""
        place, problems = self.folder / f"case-{seed}", []
        for _ in range(FILES):
            name, how = self._damaged_copy(place, draw)
            problems += [f"{name}, {how}: {found}" for found in self._problems_of_resume(place, name)]
            shutil.rmtree(place)
        return Outcome("checkpoint", f"{FILES} files", tried=FILES, problems=problems)

    def _damaged_copy(self, run: Path, draw: random.Random) -> tuple[str, str]:
        """Copy the run, and damage a file of the newest checkpoint; return its name and how."""
        while True:
            shutil.copytree(self.run, run)
            folder = run / self.newest
            path = draw.choice(sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size))
            name = path.relative_to(folder).as_posix()
            if how := damage(path, draw.choice(DAMAGE), draw, run / self.older / name):
                return name, how
            shutil.rmtree(run)

    def _problems_of_resume(self, run: Path, name: str) -> list[str]:
        """Return at most one problem."""
        latest = resolve_resume("latest", run, self.check)
        if latest.path != run / self.older:
            return [f"latest takes {latest.path and latest.path.name}"]
        # a checkpoint without its manifest is none: it is passed over like any other folder
        if name != "manifest.json" and not any(name in line for line in latest.warnings):
            return [f"the warning does not name it: {latest.warnings}"]
        try:
            resolve_resume(str(run / self.newest), run, self.check)
        except UserError as error:
            # the manifest of another step says that all other files are not the ones that were saved
            named = name in error.line() or name == "manifest.json"
            return [] if error.exit_code == MODEL and named else [error.line()]
        return ["it was accepted when it was passed by its path"]

    def refused_start(self, seed: int, draw: random.Random) -> Outcome:
        """Damage a file of the newest checkpoint, and start the train script from it."""
        place = self.ground.new_place(f"checkpoints-{seed}")
        name, how = self._damaged_copy(place / "run", draw)
        run = self.ground.start(place, resume_from_checkpoint=place / "run" / self.newest)
        run.wait()
        lines = [line for line in run.output().splitlines() if line.startswith("error: ")]
        named = len(lines) == 1 and (name in lines[0] or name == "manifest.json")
        right = run.code == MODEL and named and "Traceback" not in run.output()
        shutil.rmtree(place)
        problems = [] if right else [f"{name}, {how}: ended with {run.code}: {run.output()[-1000:]}"]
        return Outcome("start", f"{name}, {how}", problems=problems)

    def _index(self, seed: int, draw: random.Random) -> Outcome:
        problems = []
        for number in range(INDEX_FILES):
            place = self.folder / f"index-{seed}-{number}"
            shutil.copytree(self.ground.data, place)
            path = place / "metadata.json.videox-index.arrow"
            location = DataLocation(place / "metadata.json", place, path)
            expected = content_of(build_index(location, workers=1, progress=False))
            how = damage(path, draw.choice(DAMAGE[:5]), draw)
            try:
                found = content_of(build_index(location, workers=1, progress=False))
            except UserError as error:
                found = {"error": error.line()}
            if found != expected:
                different = [name for name in expected if found.get(name) != expected[name]]
                problems.append(f"{how}: {found.get('error', f'the index has other values of {different}')}")
            shutil.rmtree(place)
        return Outcome("index", f"{INDEX_FILES} files", tried=INDEX_FILES, problems=problems)

    def _cache(self, seed: int, draw: random.Random) -> Outcome:
        problems, place = [], self.folder / f"cache-{seed}"
        for _ in range(CACHE_FILES):
            cache = Cache(place)
            for number, (key, tensor) in enumerate(CACHED.items()):
                cache.put(key, tensor, NOTE)
                if number % 2:
                    cache.publish()  # three shards
            write_memo(place, HASHES)
            path = draw.choice(sorted(place.iterdir()))
            how = damage(path, draw.choice(("bit", "cut")), draw)
            if found := problem_of_cache(place, path):
                problems.append(f"{path.name}, {how}: {found}")
            shutil.rmtree(place)
        return Outcome("cache", f"{CACHE_FILES} files", tried=CACHE_FILES, problems=problems)


def problem_of_cache(folder: Path, damaged: Path) -> str:
    """Return what is wrong with how a cache with one damaged file is read, "" if nothing."""
    intact, errors = maintenance.verify(folder)
    if damaged.name == FINGERPRINTS:
        # one letter of the word `seal` may be another one: the hashes are what they were
        return "" if read_memo(folder) in ({}, HASHES) and not errors else f"hashes {read_memo(folder)}, {errors}"
    if intact == len(CACHED) or not errors or not all(damaged.name in error for error in errors):
        return f"verify finds {intact} intact entries and {errors}"
    cache = Cache(folder)
    read = {key: cache.read(key) for key in CACHED}
    if not all(tensor is None or torch.equal(tensor, CACHED[key]) for key, tensor in read.items()):
        return "an entry was read otherwise than it was written"
    return "" if any(damaged.name in line for line in cache.corruption_messages()) else "the run does not name it"


def content_of(index: Index) -> dict[str, object]:
    """Return what a run takes from an index."""
    content: dict[str, object] = {name: [repr(value) for value in getattr(index, name).tolist()] for name in COLUMNS}
    captions = [index.captions(row) for row in range(len(index))]
    return content | {"paths": index.file_path.to_pylist(), "captions": captions, "fingerprint": index.fingerprint()}
