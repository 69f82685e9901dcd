"""Cache of encoder outputs, addressed by a hash of everything that an output depends on.

A key covers the file (path, size, modification time), the frames and the size they are cropped to, the caption, the
mask, the encoder's weights and settings, and the version of this code. An edited clip, another VAE or another crop
therefore has another key, and an entry never has to be invalidated.
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

from videox.data.cache.shard import (
    KEY_BYTES,
    SUFFIX,
    CorruptedError,
    Shard,
    ShardWriter,
    delete_unfinished,
    read_entry,
)
from videox.errors import STORAGE, UserError
from videox.files import SEAL, seal_of, write_json_atomically
from videox.shapes import Bucket

VERSION = 1  # increase it whenever decoding, resizing, masks or encoding give other numbers than before
MAX_SHARD_ENTRIES = 1024  # also the most entries that a killed process loses
MAX_SHARD_BYTES = 8 * 2**30
FINGERPRINTS = "fingerprints.json"


class CacheField(NamedTuple):
    """One tensor of a sample that an encoder computes.

    Attributes:
        name: name of the tensor.
        encoder: fingerprint of the encoder's weights and settings.
        uses: the inputs that the tensor depends on: "clip" (all frames), "frame" (the first), "mask", "caption".
    """

    name: str
    encoder: str
    uses: tuple[str, ...]

    @property
    def needs_pixels(self) -> bool:
        """Whether the media file must be read to compute it."""
        return "clip" in self.uses or "frame" in self.uses


class SampleKey(NamedTuple):
    """Everything of a sample that its encoder outputs depend on.

    Attributes:
        file: path relative to the data folder.
        size: bytes of the file when it was indexed.
        mtime_ns: modification time of the file when it was indexed.
        start: first source frame.
        pace: source frames per kept frame.
        bucket: number and size of the frames.
        mask: name of the mask of known frames.
        caption: the caption as it is trained: drawn from its row's, with the run's rules and dropout applied.
        decoding: a sum of keys of DECODINGS (videox.data.media.container), 0 for most files.
    """

    file: str
    size: int
    mtime_ns: int
    start: int
    pace: float
    bucket: Bucket
    mask: str
    caption: str
    decoding: int = 0


def cache_key(field: CacheField, sample_key: SampleKey) -> bytes:
    """Return the key of a sample's tensor: equal if and only if everything that the tensor depends on is equal."""
    file: tuple[Any, ...] = (sample_key.file, sample_key.size, sample_key.mtime_ns, sample_key.start)
    if sample_key.decoding:  # else the key is that of earlier versions, which decoded the file alike
        file = (*file, f"decoding {sample_key.decoding}")
    bucket = sample_key.bucket
    values: dict[str, Any] = {
        # The pace of a single frame is irrelevant: 1.0 lets runs with different strides share the entry.
        "clip": (*file, float(sample_key.pace) if bucket.frames > 1 else 1.0, *bucket),
        "frame": (*file, *bucket[1:]),
        "mask": sample_key.mask,
        "caption": sample_key.caption,
    }
    content = repr((VERSION, field.name, field.encoder, [(use, values[use]) for use in field.uses]))
    return hashlib.blake2b(content.encode(errors="surrogateescape"), digest_size=KEY_BYTES).digest()


def fingerprint(paths: Sequence[Path], settings: str, memo: dict[str, Any]) -> str:
    """Return a hash (hex) of the content of all files below some folders, and of settings.

    Args:
        paths: files and folders.
        settings: everything else that the encoder's output depends on.
        memo: hashes of files by path, size and time; files found in it are not read, new hashes are added to it.
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
    """A folder of shards. Any number of processes may read and write it at once; each writes its own files.

    Args:
        folder: the folder of the shards; created if absent.

    Raises:
        UserError: the folder cannot be created or listed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.corrupted: dict[str, str] = {}  # file, or file and entry -> what is wrong with it
        self._shards: dict[str, Shard] = {}
        self._locations: dict[bytes, tuple[tuple[str, int], ...]] = {}  # key -> (shard, number of the entry), ...
        self._folder_mtime_ns = -1
        self._writer: ShardWriter | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.refresh()
        except OSError as why:
            raise _storage_error(folder, why) from why

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the folder only: the receiving process opens the shards itself."""
        return Cache, (self.folder,)

    def __contains__(self, key: bytes) -> bool:
        return key in self._locations or (self._writer is not None and key in self._writer.entries)

    def __len__(self) -> int:
        return len(self._locations)

    def refresh(self) -> None:
        """Open shards that were published, and forget those that were deleted, since the last call; cheap if none."""
        mtime_ns = self.folder.stat().st_mtime_ns
        if mtime_ns == self._folder_mtime_ns:
            return
        names = {path.name for path in self.folder.glob(f"shard-*{SUFFIX}")}
        if self._shards.keys() - names:  # `scripts/cache.py gc` has replaced shards: read all of them again
            self._shards, self._locations = {}, {}
        for name in sorted(names - self._shards.keys() - self.corrupted.keys()):
            try:
                shard = self._shards[name] = Shard(self.folder / name)
            except CorruptedError as why:
                self.corrupted[name] = str(why)
                continue
            for number in range(len(shard)):
                key = shard.key(number)
                self._locations[key] = (*self._locations.get(key, ()), (name, number))
        self._folder_mtime_ns = mtime_ns

    def read(self, key: bytes) -> torch.Tensor | None:
        """Return a tensor, None if there is none. A corrupted entry is recorded in `corrupted` and counts as absent.

        Raises:
            UserError: the folder cannot be read.
        """
        try:
            if self._writer is not None and key in self._writer.entries:
                return read_entry(self._writer.handle, self._writer.entries[key])
            if key not in self._locations:
                self.refresh()
            for name, number in self._locations.get(key, ()):
                try:
                    return self._shards[name].read(number)
                except CorruptedError as why:
                    self.corrupted[f"{name}, entry {number}"] = str(why)
            self._locations.pop(key, None)
        except OSError as why:
            raise _storage_error(self.folder, why) from why
        return None

    def put(self, key: bytes, tensor: torch.Tensor, note: Mapping[str, Any]) -> None:
        """Store a tensor; other processes see it when its shard is full, or after `publish`.

        Args:
            key: the address, returned by `cache_key`.
            tensor: on any device.
            note: JSON values that describe the entry, for `scripts/cache.py`.

        Raises:
            UserError: it cannot be written. Published shards are not affected.
        """
        try:
            if self._writer is None:
                self._writer = ShardWriter(self.folder / f"shard-{secrets.token_hex(8)}{SUFFIX}")
            self._writer.put(key, tensor.detach().cpu(), note)
            if len(self._writer.entries) >= MAX_SHARD_ENTRIES or self._writer.size >= MAX_SHARD_BYTES:
                self.publish()
        except OSError as why:
            self._drop_writer()
            raise _storage_error(self.folder, why) from why

    def publish(self) -> None:
        """Make the tensors stored so far visible to other processes. Raises UserError."""
        if self._writer is None:
            return
        try:
            self._writer.publish()
            self._writer = None
            self.refresh()
        except OSError as why:
            self._drop_writer()
            raise _storage_error(self.folder, why) from why

    def _drop_writer(self) -> None:
        if self._writer is not None:
            self._writer.drop()
        self._writer = None

    def delete_unfinished(self) -> list[str]:
        """Delete the unfinished files of dead writers; return their names."""
        return delete_unfinished(self.folder)

    def corruption_messages(self) -> list[str]:
        """Return a line for each file or entry that was found corrupted."""
        return [f"{self.folder}/{name}: {why}; its content is encoded again" for name, why in self.corrupted.items()]


def _storage_error(folder: Path, why: OSError) -> UserError:
    hint = "free disk space, make it writable, or pass another folder; published entries are kept"
    return UserError("--latent_cache", f"{folder} cannot be used ({why})", hint, STORAGE)


class CacheView(NamedTuple):
    """A cache and the tensors that a run looks up in it, as the data workers need it.

    Attributes:
        cache: the cache.
        fields: the tensors of a sample that are cached.
        mode: the task, as in `known_mask`; it decides which masks are drawn.
        needed: the tensors of a sample that are not cached but computed each time.
    """

    cache: Cache
    fields: tuple[CacheField, ...]
    mode: str
    needed: tuple[CacheField, ...] = ()

    def find(self, sample_key: SampleKey) -> dict[str, torch.Tensor]:
        """Return the cached tensors of a sample, by name."""
        tensors = {field.name: self.cache.read(cache_key(field, sample_key)) for field in self.fields}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def needs_pixels(self, cached: Iterable[str]) -> bool:
        """Return whether a tensor that is not in `cached` is computed from the media file."""
        found = set(cached)
        return any(field.needs_pixels and field.name not in found for field in (*self.fields, *self.needed))


def trim_zeros(tensor: torch.Tensor) -> torch.Tensor:
    """Remove zero rows at the end, but keep at least one row: text embeddings are padded to hundreds of tokens."""
    nonzero = np.flatnonzero(tensor.flatten(1).ne(0).any(1).cpu().numpy())
    return tensor[: int(nonzero[-1]) + 1 if len(nonzero) else 1]


def restore_zeros(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """Append zero rows up to `rows` in total; the inverse of trim_zeros."""
    if len(tensor) == rows:
        return tensor
    padded = tensor.new_zeros(rows, *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    return padded


def read_memo(folder: Path) -> dict[str, Any]:
    """Return the saved hashes of weight files, {} if the file is absent or damaged; see `fingerprint`.

    A file of an older version has no seal.
    """
    path = folder / FINGERPRINTS
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict) or content.pop(SEAL, seal := seal_of(content)) != seal:
        return {}
    return content


def write_memo(folder: Path, memo: Mapping[str, Any]) -> None:
    """Save the hashes of weight files, if the folder is writable. Raises OSError."""
    if os.access(folder, os.W_OK):
        write_json_atomically(folder / FINGERPRINTS, {**memo, SEAL: seal_of(memo)})
