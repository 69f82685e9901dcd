"""Atomic writes: a file or folder is written under a temporary name, flushed to the disk and then renamed."""

from __future__ import annotations

import ctypes
import errno
import filecmp
import hashlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from videox.activity import ACTIVITY
from videox.errors import SaveError

SEAL = "seal"  # key of a JSON object's hash, see seal_of
_PART = 64 << 20  # bytes that a slow disk writes in a few seconds
_WRITE_AND_WAIT = 7  # SYNC_FILE_RANGE_WAIT_BEFORE, _WRITE and _WAIT_AFTER of linux/fs.h


def flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk (fsync). Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _write_back(descriptor, os.fstat(descriptor).st_size)
        os.fsync(descriptor)
    except OSError as error:  # which does not name the file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


def _write_back(descriptor: int, size: int) -> None:
    """Have Linux write a large file to the disk part by part, so that the watchdog sees that a slow disk goes on.

    Where the file system cannot do that, the fsync that follows does everything.

    Raises:
        OSError: the disk refused; the fsync would not report it a second time.
    """
    if size < 2 * _PART or sys.platform != "linux":
        return
    sync_file_range = ctypes.CDLL(None, use_errno=True).sync_file_range
    sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    for start in range(0, size, _PART):
        if sync_file_range(descriptor, start, _PART, _WRITE_AND_WAIT) != 0:
            if (failed := ctypes.get_errno()) in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
                raise OSError(failed, os.strerror(failed))
            return
        ACTIVITY.progress()


def flush_tree(folder: Path) -> None:
    """Flush every file and folder below `folder`, and the folder itself, to the disk. Raises OSError."""
    for path in folder.rglob("*"):
        flush(path)
    flush(folder)


def unique_path(path: Path) -> Path:
    """Return the path itself if nothing has that name, else the first unused one of path-2, path-3, ...

    For a file the number is inserted before the suffix, which identifies its type.
    """
    free, number, suffix = path, 1, path.suffix if path.is_file() else ""
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.name.removesuffix(suffix)}-{number}{suffix}")
    return free


def temp_path(path: Path, kind: str = "tmp") -> Path:
    """Return a unique hidden path in the same folder, `.kind-name-<12 hex digits>`."""
    return path.with_name(f".{kind}-{path.name}-{secrets.token_hex(6)}")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Replace a file so that a reader finds it whole, old or new, at any time, even after a power failure.

    Args:
        path: the file to create or replace; its folder exists.

    Yields:
        The temporary path, in the same folder, to write the new content to. It is removed after an exception.

    Raises:
        OSError: the disk refused.
    """
    temporary = temp_path(path)
    try:
        yield temporary
        # the content is on the disk before the name points to it, and the name before the caller goes on
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def mode_of_umask(path: Path) -> Iterator[None]:
    """Create a file that the block writes with the permissions of the user's umask; safetensors would make it 0600.

    Args:
        path: a file that may exist.

    Raises:
        OSError: the file cannot be created.
    """
    path.touch()
    mode = path.stat().st_mode
    yield
    path.chmod(mode)


def write_json_atomically(path: Path, content: object) -> None:
    """Write a JSON file that a reader finds whole, old or new, at any time. Raises OSError, TypeError."""
    text = json.dumps(content, indent=1) + "\n"
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def seal_of(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a JSON object without its key SEAL, in hexadecimal; it does not depend on the layout.

    A JSON file that has it as its value of SEAL shows by itself whether it is what was written.
    """
    body = {key: value for key, value in content.items() if key != SEAL}
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# ------------------------------------------------------------------------ output files and folders, whole or absent


def publish_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Create a folder that is whole or absent: it is written under a temporary name, flushed and renamed.

    Args:
        folder: the final name; an existing folder is renamed to `folder-superseded` (`-2`, ...), never deleted. If it
            has the same files it stays, so that a finished run can be resumed any number of times.
        write: fills the folder that is passed to it.

    Raises:
        SaveError: the disk refused; nothing is left behind.
    """

    def fill(temporary: Path) -> None:
        new = temporary / folder.name
        new.mkdir()
        write(new)

    _publish(folder, fill, folder.with_name(f"{folder.name}-superseded"))


def publish_file(target: Path, write: Callable[[Path], None]) -> None:
    """Create a file that is whole or absent, as publish_folder does.

    Args:
        target: the file; its folder is created if necessary.
        write: creates a file of this name in the folder that is passed to it.

    Raises:
        SaveError: the disk refused; nothing is left behind.
    """
    _publish(target, write, target.with_name(f"{target.stem}-superseded{target.suffix}"))


def _publish(target: Path, write: Callable[[Path], None], superseded: Path) -> None:
    temporary = temp_path(target)
    new = temporary / target.name
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        flush_tree(temporary)
        if _same_content(new, target):
            return
        if os.path.lexists(target):
            target.rename(unique_path(superseded))
        new.rename(target)
        flush(target.parent)
    except (OSError, SafetensorError) as error:
        raise SaveError(f"{target}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _same_content(first: Path, second: Path) -> bool:
    """Return whether two files, or all files below two folders, are equal byte for byte."""
    if first.is_file():
        return second.is_file() and filecmp.cmp(first, second, shallow=False)
    names = [sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file()) for folder in (first, second)]
    return (
        names[0] == names[1]
        and second.is_dir()
        and all(_same_content(first / name, second / name) for name in names[0])
    )
