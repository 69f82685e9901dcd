"""Stamps of metadata: what shows a later start whether a metadata file or folder has changed, without parsing it."""

from __future__ import annotations

import hashlib
import stat
import time
from pathlib import Path
from typing import Any

from videox.data.index.folders import ALL_FILES, FolderRules, list_folder
from videox.data.index.media_files import is_opened
from videox.data.index.scan import size_and_mtime

_SETTLED_NS = 2_000_000_000  # a file younger than this may change again without a new modification time


def stamp_of(path: Path, rules: FolderRules = ALL_FILES, *, with_bytes: bool = True) -> dict[str, Any]:
    """Return what shows whether the metadata has changed since; {} if there is none.

    Args:
        path: the metadata file or folder.
        rules: which files of a folder are read.
        with_bytes: include the hash of the file's content, and whether its time alone is reliable.
    """
    try:
        status = path.stat()
    except (OSError, ValueError):
        return {}  # read_metadata reports it to the user
    if stat.S_ISDIR(status.st_mode):
        names = list_folder(path, rules.caption_suffixes)
        # Captions, and files that were opened to find out what they are. The other files are compared when probed.
        opened = (pair for pair in names if rules.kind or is_opened(pair[1]))
        read = [size_and_mtime(f"{path}/{stem}{suffix}") for stem, suffix in opened]
        return {"listing": hashlib.sha256(repr((names, read)).encode(errors="surrogateescape")).hexdigest()}
    stamp: dict[str, Any] = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
    if with_bytes and stat.S_ISREG(status.st_mode):
        stamp["settled"] = time.time_ns() - status.st_mtime_ns > _SETTLED_NS
        stamp["sha256"] = _sha256(path)
    return stamp


def is_unchanged(saved: dict[str, Any], path: Path, rules: FolderRules = ALL_FILES) -> bool:
    """Return whether the metadata is unchanged: by size and time, or by its bytes where the time is not reliable.

    Args:
        saved: what `stamp_of` returned for it.
        path: the metadata file or folder.
        rules: which files of a folder are read.
    """
    now = stamp_of(path, rules, with_bytes=False)
    if "listing" in now or "size" not in now:
        return bool(now) and now == saved
    if now["size"] != saved.get("size"):
        return False
    return (saved["settled"] and now["mtime_ns"] == saved["mtime_ns"]) or _sha256(path) == saved["sha256"]


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""  # read_metadata reports it to the user
