"""Serves dataset and encoders: what encoders made of a sample, found again by what it was made from.

A key is a hash of everything that a tensor depends on: the file (path, size, modification time), the frames, the size
they were cut to, the caption, the mask, the encoder's weights and settings, and the version of this code. So an edited
clip, another VAE or another crop is simply not there; nothing is ever told to be stale.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from videox.data.cache.shard import KEY_BYTES, SUFFIX, Damaged, Shard, ShardWriter, read_entry, sweep
from videox.errors import STORAGE, UserError
from videox.files import write_json_atomically
from videox.shapes import Bucket

VERSION = 1  # raise it whenever decoding, resizing, masks or encoding give other numbers than before
UNIT_ENTRIES = 1024  # of a file, and thereby what a killed process loses at most
UNIT_BYTES = 8 * 2**30
FINGERPRINTS = "fingerprints.json"


class CacheField(NamedTuple):
    """One tensor that an encoder makes of a sample.

    name: of the tensor; encoder: fingerprint of weights and settings; uses: which Facts it depends on, of "clip" (all
    frames), "frame" (the first), "mask", "caption".
    """

    name: str
    encoder: str
    uses: tuple[str, ...]

    @property
    def sees_pixels(self) -> bool:
        """Whether it cannot be made without the file."""
        return "clip" in self.uses or "frame" in self.uses


class SampleKey(NamedTuple):
    """What a sample is made from.

    file: relative path; size: bytes, mtime_ns: of the indexed file; start, pace, bucket: the frames and their size;
    mask: its name; caption: after dropout.
    """

    file: str
    size: int
    mtime_ns: int
    start: int
    pace: float
    bucket: Bucket
    mask: str
    caption: str


def key_of(part: CacheField, facts: SampleKey) -> bytes:
    """Returns the address of a part of a sample: equal where all that it depends on is equal."""
    file, frames = (facts.file, facts.size, facts.mtime_ns, facts.start), facts.bucket.frames
    used: dict[str, Any] = {
        "clip": (*file, float(facts.pace) if frames > 1 else 1.0, *facts.bucket),
        "frame": (*file, *facts.bucket[1:]),
        "mask": facts.mask,
        "caption": facts.caption,
    }
    content = repr((VERSION, part.name, part.encoder, [(use, used[use]) for use in part.uses]))
    return hashlib.blake2b(content.encode(errors="surrogateescape"), digest_size=KEY_BYTES).digest()


def fingerprint(paths: Sequence[Path], settings: str, memo: dict[str, Any]) -> str:
    """Returns a hash (hex) of all files below some folders, by content, and of settings.

    Args:
        paths: files and folders.
        settings: whatever else the encoder's result depends on.
        memo: hashes of files that were read before, by path, size and time; what is read now is added.
    """
    files = sorted(f for path in paths for f in (path.rglob("*") if path.is_dir() else [path]) if f.is_file())
    total = hashlib.sha256(settings.encode())
    for path in files:
        status = path.stat()
        known = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
        if known not in memo:
            with path.open("rb") as file:
                memo[known] = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.name} {memo[known]}\n".encode())
    return total.hexdigest()[:32]


class Cache:
    """A folder of shards. Any number of processes read and write it at once; each writes files of its own.

    Args:
        folder: of the shards; made if absent.

    Raises:
        UserError: the folder cannot be made or listed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.damaged: dict[str, str] = {}  # file, or file and entry -> what is wrong with it
        self._shards: dict[str, Shard] = {}
        self._places: dict[bytes, tuple[tuple[str, int], ...]] = {}
        self._seen = -1
        self._writer: ShardWriter | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.refresh()
        except OSError as why:
            raise _unusable(folder, why) from why

    def __reduce__(self) -> tuple[Any, ...]:
        """A process that gets it by pickle opens the folder itself."""
        return Cache, (self.folder,)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places or (self._writer is not None and key in self._writer.entries)

    def __len__(self) -> int:
        return len(self._places)

    def refresh(self) -> None:
        """Takes notice of files that were published, or went, since it last looked; costs nothing if none was."""
        changed = self.folder.stat().st_mtime_ns
        if changed == self._seen:
            return
        names = {path.name for path in self.folder.glob(f"shard-*{SUFFIX}")}
        if self._shards.keys() - names:  # after clearing up
            self._shards, self._places = {}, {}
        for name in sorted(names - self._shards.keys() - self.damaged.keys()):
            try:
                shard = self._shards[name] = Shard(self.folder / name)
            except Damaged as why:
                self.damaged[name] = str(why)
                continue
            for number in range(len(shard)):
                key = shard.keys[number * KEY_BYTES : (number + 1) * KEY_BYTES]
                self._places[key] = (*self._places.get(key, ()), (name, number))
        self._seen = changed

    def read(self, key: bytes) -> torch.Tensor | None:
        """Returns a tensor, None where there is none; what is damaged is noted in `damaged` and not there.

        Raises:
            UserError: the folder cannot be read.
        """
        try:
            if self._writer is not None and key in self._writer.entries:
                return read_entry(self._writer.handle, self._writer.entries[key])
            if key not in self._places:
                self.refresh()
            for name, number in self._places.get(key, ()):
                try:
                    return self._shards[name].read(number)
                except Damaged as why:
                    self.damaged[f"{name}, entry {number}"] = str(why)
            self._places.pop(key, None)
        except OSError as why:
            raise _unusable(self.folder, why) from why
        return None

    def put(self, key: bytes, tensor: torch.Tensor, note: Mapping[str, Any]) -> None:
        """Keeps a tensor; other processes see it when its file is full, or after `publish`.

        Raises:
            UserError: the disk refused. What was published stands.
        """
        try:
            if self._writer is None:
                self._writer = ShardWriter(self.folder / f"shard-{secrets.token_hex(8)}{SUFFIX}")
            self._writer.put(key, tensor.detach().cpu(), note)
            if len(self._writer.entries) >= UNIT_ENTRIES or self._writer.size >= UNIT_BYTES:
                self.publish()
        except OSError as why:
            self._drop()
            raise _unusable(self.folder, why) from why

    def publish(self) -> None:
        """Puts what is kept so far in place, for all to see. Raises UserError."""
        if self._writer is None:
            return
        try:
            self._writer.publish()
            self._writer = None
            self.refresh()
        except OSError as why:
            self._drop()
            raise _unusable(self.folder, why) from why

    def _drop(self) -> None:
        if self._writer is not None:
            self._writer.drop()
        self._writer = None

    def clear_up(self) -> list[str]:
        """Deletes what dead writers left; returns the names."""
        return sweep(self.folder)

    def damage(self) -> list[str]:
        """Returns a line for each file or entry that was found damaged; what they held is encoded anew."""
        return [f"{self.folder}/{name}: {why}; what it held is made anew" for name, why in self.damaged.items()]


def _unusable(folder: Path, why: OSError) -> UserError:
    hint = "make room, make it writable, or give another folder; what was written before stands"
    return UserError("--latent_cache", f"{folder} cannot be used ({why})", hint, STORAGE)


class CacheView(NamedTuple):
    """A cache and what is looked for in it, as the data's workers need it; mode: of known_mask, names the masks."""

    cache: Cache
    parts: tuple[CacheField, ...]
    mode: str

    def find(self, facts: SampleKey) -> dict[str, torch.Tensor]:
        """Returns the parts of a sample that are there, by name."""
        tensors = {part.name: self.cache.read(key_of(part, facts)) for part in self.parts}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def needs_pixels(self, found: Iterable[str]) -> bool:
        """Returns whether a part that was not found is made from the file."""
        return any(part.sees_pixels and part.name not in set(found) for part in self.parts)


def trim_zeros(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor without the zero rows at its end, of which one stays: text is padded to hundreds of tokens."""
    filled = np.flatnonzero(tensor.flatten(1).ne(0).any(1).cpu().numpy())
    return tensor[: int(filled[-1]) + 1 if len(filled) else 1]


def restore_zeros(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """Returns a tensor with zero rows after it, up to so many; trim_zeros taken back."""
    if len(tensor) == rows:
        return tensor
    whole = tensor.new_zeros(rows, *tensor.shape[1:])
    whole[: len(tensor)] = tensor
    return whole


def read_memo(folder: Path) -> dict[str, Any]:
    """Returns the hashes of weight files that were read before; a file that is not whole counts as none."""
    path = folder / FINGERPRINTS
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_memo(folder: Path, memo: Mapping[str, Any]) -> None:
    """Keeps these hashes. Raises OSError."""
    if os.access(folder, os.W_OK):
        write_json_atomically(folder / FINGERPRINTS, dict(memo))
