"""Maintenance of a cache for scripts/cache.py: list its content, verify it, and collect garbage."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from videox.data.cache.cache import MAX_SHARD_BYTES, MAX_SHARD_ENTRIES
from videox.data.cache.shard import SUFFIX, CorruptedError, Shard, ShardWriter, delete_unfinished


class StoredEntry(NamedTuple):
    """An entry of a shard, read and checked.

    Attributes:
        number: position in the shard.
        key: its key.
        note: its note: "part" (name of the tensor), "encoder", "file", "size" and "mtime_ns".
        tensor: its tensor, None if it cannot be read.
        error: why it cannot be read, "" if it can.
    """

    number: int
    key: bytes
    note: dict[str, Any]
    tensor: torch.Tensor | None
    error: str


def format_size(size: int) -> str:
    """Format bytes in decimal units: "1.50 GB", "3.20 MB"."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def shard_paths(folder: Path) -> list[Path]:
    """Return the published shards of a cache."""
    return sorted(folder.glob(f"shard-*{SUFFIX}"))


def is_cache(folder: Path) -> bool:
    """Return whether a folder contains a shard, published or not."""
    return bool(shard_paths(folder)) or any(folder.glob(".tmp-shard-*"))


def read_entries(shard: Shard) -> Iterator[StoredEntry]:
    """Yield every entry of a shard, read and checked."""
    for number, note in enumerate(shard.notes()):
        try:
            yield StoredEntry(number, shard.key(number), note, shard.read(number), "")
        except CorruptedError as why:
            yield StoredEntry(number, shard.key(number), note, None, str(why))


def verify(folder: Path) -> tuple[int, list[str]]:
    """Read all entries of a cache; return the number of intact ones and a line for each corrupted file or entry."""
    intact, errors = 0, []
    for path in shard_paths(folder):
        try:
            shard = Shard(path)
        except CorruptedError as why:
            errors.append(f"{path}: {why}")
            continue
        for entry in read_entries(shard):
            intact += entry.tensor is not None
            if entry.error:
                name = f"{entry.note['part']} of {entry.note['file']!r}"
                errors.append(f"{path}, entry {entry.number} ({name}): {entry.error}")
    return intact, errors


def summarize(folder: Path) -> list[tuple[str, str, int, int]]:
    """Return (tensor name, encoder, entries, bytes) of a cache, largest first; corrupted files are left out."""
    counts: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    for path in shard_paths(folder):
        try:
            shard = Shard(path)
        except CorruptedError:
            continue
        for number, note in enumerate(shard.notes()):
            kind = (note["part"], note["encoder"])
            counts[kind] += 1
            sizes[kind] += shard.entry(number).size
    return [(*kind, counts[kind], size) for kind, size in sizes.most_common()]


def media_files(folder: Path) -> set[str]:
    """Return the media files that a cache's entries were computed from, as metadata names them."""
    files: set[str] = set()
    for path in shard_paths(folder):
        try:
            files |= {note["file"] for note in Shard(path).notes() if note["file"] is not None}
        except CorruptedError:
            continue
    return files


def clean(folder: Path, *, encoders: Collection[str] = (), data_dir: Path | None = None) -> dict[str, int]:
    """Drop unusable entries and merge small shards into large ones; return the number of dropped entries by reason.

    Corrupted entries, duplicates and unfinished files of dead writers are always dropped. The new shards are complete
    before the old ones are deleted, so that a kill at any time loses nothing and concurrent runs find the new ones.

    Args:
        folder: the cache.
        encoders: fingerprints of encoders whose entries are dropped too.
        data_dir: also drop entries of media files below it that are missing or have changed (None = keep them).

    Raises:
        OSError: the folder cannot be written to; no entry is lost.
    """
    dropped: Counter[str] = Counter({"unfinished file": len(delete_unfinished(folder))})
    seen: set[bytes] = set()
    replaced: list[tuple[Shard, list[str]]] = []
    paths = shard_paths(folder)
    for path in paths:
        try:
            shard = Shard(path)
        except CorruptedError:
            dropped["corrupted file"] += 1
            path.unlink()
            continue
        reasons = [_drop_reason(entry, seen, encoders, data_dir) for entry in read_entries(shard)]
        dropped.update(filter(None, reasons))
        large = len(shard) >= MAX_SHARD_ENTRIES // 2 or path.stat().st_size >= MAX_SHARD_BYTES // 2
        if any(reasons) or (not large and len(paths) > 1):
            replaced.append((shard, reasons))
    _rewrite(folder, replaced)
    for shard, _ in replaced:
        shard.path.unlink()
    return {reason: count for reason, count in dropped.items() if count}


def _rewrite(folder: Path, shards: Sequence[tuple[Shard, Sequence[str]]]) -> None:
    """Copy the entries that are kept into new shards; shards: each with the drop reason of every entry, "" = keep."""
    writer: ShardWriter | None = None
    try:
        for shard, reasons in shards:
            for entry, reason in zip(read_entries(shard), reasons, strict=True):
                if reason or entry.tensor is None:
                    continue
                if writer is None or len(writer.entries) >= MAX_SHARD_ENTRIES or writer.size >= MAX_SHARD_BYTES:
                    _publish(writer)
                    writer = ShardWriter(folder / f"shard-{secrets.token_hex(8)}{SUFFIX}")
                writer.put(entry.key, entry.tensor, entry.note)
        _publish(writer)
    finally:
        if writer is not None:
            writer.drop()


def _publish(writer: ShardWriter | None) -> None:
    if writer is not None:
        writer.publish()


def _drop_reason(entry: StoredEntry, seen: set[bytes], encoders: Collection[str], data_dir: Path | None) -> str:
    """Return why an entry is dropped, "" if it is kept; seen: keys of the entries kept so far, added to."""
    if entry.tensor is None:
        return "corrupted"
    if entry.key in seen:
        return "duplicate"
    if entry.note["encoder"] in encoders:
        return "dropped encoder"
    if data_dir is not None and not _is_current(entry.note, data_dir):
        return "media file changed or missing"
    seen.add(entry.key)
    return ""


def _is_current(note: dict[str, Any], data_dir: Path) -> bool:
    if note["file"] is None:
        return True  # depends on a caption only
    try:
        status = (data_dir / note["file"]).stat()
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == (note["size"], note["mtime_ns"])
