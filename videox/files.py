"""Serves every file that must be whole: written aside, flushed to the disk, and put in place by one rename."""

from __future__ import annotations

import filecmp
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from videox.errors import SaveError


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


def unique_path(path: Path) -> Path:
    """Returns the path itself if nothing has that name, else the first free one of path-2, path-3, ...

    Where a file has the name, the number stands before its suffix, by which it is known for what it is.
    """
    free, number, suffix = path, 1, path.suffix if path.is_file() else ""
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.name.removesuffix(suffix)}-{number}{suffix}")
    return free


def temp_path(path: Path, kind: str = "tmp") -> Path:
    """Returns a hidden name beside a path, `.kind-name-<12 hex digits>`, that nothing else has or will have."""
    return path.with_name(f".{kind}-{path.name}-{secrets.token_hex(6)}")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Puts a file in place so that a reader finds it whole, old or new, at any instant, also after a power cut.

    Args:
        path: the file to make or replace; its folder exists.

    Yields:
        The path, beside it, to write the new content to. After an exception nothing is left of it.

    Raises:
        OSError: the disk refused.
    """
    temporary = temp_path(path)
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
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


# --------------------------------------------------------------------------- what users get, whole or absent


def publish_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Makes a folder that is whole or absent: written beside it, flushed, renamed. What stood there is moved aside.

    Args:
        folder: the final name; an existing one becomes `folder-superseded` (`-2`, ...), never deleted, and one that
            holds the same files stays, so that a finished run can be resumed any number of times.
        write: fills the folder that it is given.

    Raises:
        SaveError: the disk refused; nothing is left behind.
    """

    def fill(temporary: Path) -> None:
        made = temporary / folder.name
        made.mkdir()
        write(made)

    _publish(folder, fill, folder.with_name(f"{folder.name}-superseded"))


def publish_file(target: Path, write: Callable[[Path], None]) -> None:
    """As publish_folder, for one file.

    Args:
        target: the file; its folder may be made.
        write: makes a file of this name in the folder that it is given.

    Raises:
        SaveError: the disk refused; nothing is left behind.
    """
    _publish(target, write, target.with_name(f"{target.stem}-superseded{target.suffix}"))


def _publish(target: Path, write: Callable[[Path], None], superseded: Path) -> None:
    temporary = temp_path(target)
    made = temporary / target.name
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        flush_tree(temporary)
        if _same(made, target):
            return
        if os.path.lexists(target):
            target.rename(unique_path(superseded))
        made.rename(target)
        flush(target.parent)
    except (OSError, SafetensorError) as error:
        raise SaveError(f"{target}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _same(first: Path, second: Path) -> bool:
    """Tells whether two files, or all files below two folders, are equal byte for byte."""
    if first.is_file():
        return second.is_file() and filecmp.cmp(first, second, shallow=False)
    names = [sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file()) for folder in (first, second)]
    return names[0] == names[1] and second.is_dir() and all(_same(first / name, second / name) for name in names[0])
