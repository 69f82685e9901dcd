"""Serves every file that must be whole: written aside, flushed to the disk, and put in place by one rename."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def flush(path: Path) -> None:
    """Forces a file, or the entries of a folder, onto the disk (fsync). Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_tree(folder: Path) -> None:
    """Forces every file and folder below `folder`, and itself, onto the disk. Raises OSError."""
    for path in folder.rglob("*"):
        flush(path)
    flush(folder)


def unused(path: Path) -> Path:
    """Returns the path itself if nothing has that name, else the first free one of path-2, path-3, ..."""
    free, number = path, 1
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def aside(path: Path, kind: str = "tmp") -> Path:
    """Returns a hidden name beside a path, `.kind-name-<12 hex digits>`, that nothing else has or will have."""
    return path.with_name(f".{kind}-{path.name}-{secrets.token_hex(6)}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Puts a file in place so that a reader finds it whole, old or new, at any instant, also after a power cut.

    Args:
        path: the file to make or replace; its folder exists.

    Yields:
        The path, beside it, to write the new content to. After an exception nothing is left of it.

    Raises:
        OSError: the disk refused.
    """
    temporary = aside(path)
    try:
        yield temporary
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json_atomically(path: Path, content: object) -> None:
    """Writes a JSON file that a reader finds whole, old or new, at any instant. Raises OSError, TypeError."""
    text = json.dumps(content, indent=1) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
