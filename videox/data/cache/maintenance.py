"""Serves scripts/cache.py: what a cache holds, whether it is whole, and how it is made smaller."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from videox.data.cache.cache import UNIT_BYTES, UNIT_ENTRIES
from videox.data.cache.shard import SUFFIX, Damaged, Shard, ShardWriter, sweep


class Found(NamedTuple):
    """An entry of a shard: its number there, its key, what it is, its tensor; or why it cannot be read."""

    number: int
    key: bytes
    note: dict[str, Any]
    tensor: torch.Tensor | None
    fault: str


def size_text(size: int) -> str:
    """Returns bytes for people, as disks are sold: "1.50 GB", "3.20 MB"."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def shard_paths(folder: Path) -> list[Path]:
    """Returns the published files of a cache."""
    return sorted(folder.glob(f"shard-*{SUFFIX}"))


def is_cache(folder: Path) -> bool:
    """Tells whether a folder has what only a cache has: a file of entries, published or not."""
    return bool(shard_paths(folder)) or any(folder.glob(".tmp-shard-*"))


def entries_of(shard: Shard) -> Iterator[Found]:
    """Yields every entry of a shard, read and checked."""
    for number, note in enumerate(shard.notes()):
        try:
            yield Found(number, shard.key(number), note, shard.read(number), "")
        except Damaged as why:
            yield Found(number, shard.key(number), note, None, str(why))


def verify(folder: Path) -> tuple[int, list[str]]:
    """Reads all of a cache; returns how many entries are whole, and a line for each file or entry that is not."""
    whole, faults = 0, []
    for path in shard_paths(folder):
        try:
            shard = Shard(path)
        except Damaged as why:
            faults.append(f"{path}: {why}")
            continue
        for found in entries_of(shard):
            whole += found.tensor is not None
            if found.fault:
                name = f"{found.note['part']} of {found.note['file']!r}"
                faults.append(f"{path}, entry {found.number} ({name}): {found.fault}")
    return whole, faults


def contents(folder: Path) -> list[tuple[str, str, int, int]]:
    """Returns (part, encoder, entries, bytes) of what a cache holds, largest first; damaged files are left out."""
    counts: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    for path in shard_paths(folder):
        try:
            shard = Shard(path)
        except Damaged:
            continue
        for number, note in enumerate(shard.notes()):
            kind = (note["part"], note["encoder"])
            counts[kind] += 1
            sizes[kind] += shard.entry(number).size
    return [(*kind, counts[kind], size) for kind, size in sizes.most_common()]


def files_of(folder: Path) -> set[str]:
    """Returns the media files that a cache's entries were made of, as the metadata names them."""
    found: set[str] = set()
    for path in shard_paths(folder):
        try:
            found |= {note["file"] for note in Shard(path).notes() if note["file"] is not None}
        except Damaged:
            continue
    return found


def clean(folder: Path, *, encoders: Collection[str] = (), data_dir: Path | None = None) -> dict[str, int]:
    """Drops what no run can use and gathers small files into large ones; returns how many entries went, by reason.

    Damaged entries, second copies and what dead writers left always go. A file is rewritten aside before the old one
    is deleted, so that a kill at any instant loses nothing; runs that read meanwhile find the new files.

    Args:
        encoders: fingerprints whose entries go too.
        data_dir: entries of files below it that are gone or have changed go too (None = they stay).

    Raises:
        OSError: the folder cannot be written to; nothing is lost.
    """
    dropped: Counter[str] = Counter({"unfinished file": len(sweep(folder))})
    seen: set[bytes] = set()
    old: list[tuple[Shard, list[str]]] = []
    paths = shard_paths(folder)
    for path in paths:
        try:
            shard = Shard(path)
        except Damaged:
            dropped["damaged file"] += 1
            path.unlink()
            continue
        reasons = [_reason(found, seen, encoders, data_dir) for found in entries_of(shard)]
        dropped.update(filter(None, reasons))
        large = len(shard) >= UNIT_ENTRIES // 2 or path.stat().st_size >= UNIT_BYTES // 2
        if any(reasons) or (not large and len(paths) > 1):
            old.append((shard, reasons))
    _rewrite(folder, old)
    for shard, _ in old:
        shard.path.unlink()
    return {reason: count for reason, count in dropped.items() if count}


def _rewrite(folder: Path, old: Sequence[tuple[Shard, Sequence[str]]]) -> None:
    """Writes the entries of some shards that no reason speaks against into new files."""
    writer: ShardWriter | None = None
    try:
        for shard, reasons in old:
            for found, reason in zip(entries_of(shard), reasons, strict=True):
                if reason or found.tensor is None:
                    continue
                if writer is None or len(writer.entries) >= UNIT_ENTRIES or writer.size >= UNIT_BYTES:
                    _publish(writer)
                    writer = ShardWriter(folder / f"shard-{secrets.token_hex(8)}{SUFFIX}")
                writer.put(found.key, found.tensor, found.note)
        _publish(writer)
    finally:
        if writer is not None:
            writer.drop()


def _publish(writer: ShardWriter | None) -> None:
    if writer is not None:
        writer.publish()


def _reason(found: Found, seen: set[bytes], encoders: Collection[str], data_dir: Path | None) -> str:
    """Returns why an entry goes, "" if it stays; the first whole one of a key stays."""
    if found.tensor is None:
        return "damaged"
    if found.key in seen:
        return "second copy"
    if found.note["encoder"] in encoders:
        return "of that encoder"
    if data_dir is not None and not _is_current(found.note, data_dir):
        return "of a file that changed or is gone"
    seen.add(found.key)
    return ""


def _is_current(note: dict[str, Any], data_dir: Path) -> bool:
    if note["file"] is None:
        return True  # of a caption alone
    try:
        status = (data_dir / note["file"]).stat()
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == (note["size"], note["mtime_ns"])
