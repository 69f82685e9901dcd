"""Serves the cache: one large safetensors file of many tensors, written aside and renamed, read by position.

The file holds a blob of all tensors' bytes and columns that say which lies where, so that a file of a thousand entries
opens in a millisecond. Every tensor has a checksum, and so have the columns. The writer holds a lock on its file: one
that nobody locks was left by a process that died.
"""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from videox.files import flush, temp_path

SUFFIX = ".safetensors"
KEY_BYTES = 16
_HEADER = 4096  # bytes kept free for the safetensors header, whose length is known only in the end
_FORMAT = "videox-cache-1"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8)
_MOST_SIDES = 6
# name, numpy type, safetensors type, further sides
_COLUMNS = (
    ("key", np.uint8, "U8", (KEY_BYTES,)),
    ("place", np.int64, "I64", (2,)),
    ("checksum", np.uint32, "U32", ()),
    ("dtype", np.uint8, "U8", ()),
    ("shape", np.int32, "I32", (_MOST_SIDES,)),
)


class Damaged(Exception):
    """A file or an entry that is not what was written; its text says how."""


class Entry(NamedTuple):
    """Where a tensor lies: offset and size in bytes, its checksum, dtype and shape."""

    offset: int
    size: int
    checksum: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def read_entry(handle: int, entry: Entry) -> torch.Tensor:
    """Returns a tensor of an open file, in memory of its own.

    Raises:
        Damaged: its bytes are not those that were written.
    """
    content = torch.empty(entry.size, dtype=torch.uint8)
    view, done = content.numpy().data, 0
    while done < entry.size:
        count = os.preadv(handle, [view[done:]], entry.offset + done)
        if not count:
            raise Damaged(f"it ends {entry.size - done} bytes too early")
        done += count
    if zlib.crc32(view) != entry.checksum:
        raise Damaged("its checksum differs")
    return content.view(entry.dtype).view(entry.shape)


class ShardWriter:
    """Writes one file, tensor by tensor; it exists for others once it is published.

    Args:
        path: of the file; its folder exists.

    Raises:
        OSError: the disk refused, here and in every method.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary, self.handle = _locked_file(path)
        self._end = _HEADER
        self.entries: dict[bytes, Entry] = {}
        self._notes: list[Mapping[str, Any]] = []

    @property
    def size(self) -> int:
        """Bytes of tensors so far."""
        return self._end - _HEADER

    def put(self, key: bytes, tensor: torch.Tensor, note: Mapping[str, Any]) -> None:
        """Appends a tensor of the CPU.

        Args:
            key: KEY_BYTES bytes.
            tensor: at most six sides.
            note: what the entry is, for people and for clearing up; JSON values.
        """
        content = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
        entry = Entry(self._end, len(content), zlib.crc32(content), tensor.dtype, tuple(tensor.shape))
        self._end = _write(self.handle, content, self._end)
        self.entries[key] = entry
        self._notes.append(note)

    def publish(self) -> None:
        """Puts the file in place, whole; without any tensor nothing is left."""
        try:
            if self.entries:
                self._write_columns()
                os.fsync(self.handle)
                self._temporary.replace(self.path)
                flush(self.path.parent)
        finally:
            self.drop()

    def drop(self) -> None:
        """Leaves nothing of a file that is not published."""
        self._temporary.unlink(missing_ok=True)
        if self.handle >= 0:
            os.close(self.handle)
            self.handle = -1

    def _write_columns(self) -> None:
        entries = list(self.entries.values())
        shapes = [[*entry.shape, *[-1] * (_MOST_SIDES - len(entry.shape))] for entry in entries]
        values: dict[str, Any] = {
            "key": np.frombuffer(b"".join(self.entries), np.uint8).reshape(-1, KEY_BYTES),
            "place": [(entry.offset - _HEADER, entry.size) for entry in entries],
            "checksum": [entry.checksum for entry in entries],
            "dtype": [_DTYPES.index(entry.dtype) for entry in entries],
            "shape": shapes,
        }
        self._end += -self._end % 8  # whole numbers are read where they lie
        start, checksum = self.size, 0
        header: dict[str, Any] = {"blob": _tensor("U8", [start], 0, start)}
        parts = [(name, np.ascontiguousarray(values[name], kind), code) for name, kind, code, _ in _COLUMNS]
        parts.append(("notes", np.frombuffer(json.dumps(self._notes).encode(), np.uint8), "U8"))
        for name, column, code in parts:
            end = _write(self.handle, column.view(np.uint8).reshape(-1).data, self._end)
            header[name] = _tensor(code, list(column.shape), self._end - _HEADER, end - _HEADER)
            checksum, self._end = zlib.crc32(column.tobytes(), checksum), end
        header["__metadata__"] = {"format": _FORMAT, "columns_checksum": str(checksum)}
        text = json.dumps(header).encode().ljust(_HEADER - 8)
        _write(self.handle, memoryview(len(text).to_bytes(8, "little") + text), 0)


def _tensor(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def _write(handle: int, content: memoryview, offset: int) -> int:
    """Writes all of it and returns where it ends."""
    done = 0
    while done < len(content):
        done += os.pwrite(handle, content[done:], offset + done)
    return offset + len(content)


def _locked_file(path: Path) -> tuple[Path, int]:
    """Returns a new file beside a path, locked; made anew where a sweep came between making and locking."""
    while True:
        temporary = temp_path(path)
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        fcntl.flock(handle, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if temporary.stat().st_ino == os.fstat(handle).st_ino:
                return temporary, handle
        os.close(handle)


def sweep(folder: Path) -> list[str]:
    """Deletes what writers left that died before they published; returns the names."""
    swept = []
    for path in folder.glob(f".tmp-*{SUFFIX}-*"):
        try:
            handle = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
            swept.append(path.name)
        except BlockingIOError:
            continue  # its writer lives
        finally:
            os.close(handle)
    return swept


class Shard:
    """A published file: its entries by key, each read when it is asked for.

    Args:
        path: of the file.

    Raises:
        Damaged: it is cut short, or its header or columns are not those that were written.
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._columns = self._read_columns()
        except (ValueError, KeyError, TypeError, IndexError) as why:
            raise Damaged(f"its header or columns are damaged ({why})") from why
        self.keys = self._columns["key"].tobytes()

    def __len__(self) -> int:
        return len(self._columns["key"])

    def __del__(self) -> None:
        if getattr(self, "handle", -1) >= 0:
            os.close(self.handle)

    def key(self, number: int) -> bytes:
        """Returns the key of an entry."""
        return self.keys[number * KEY_BYTES : (number + 1) * KEY_BYTES]

    def entry(self, number: int) -> Entry:
        """Returns where an entry lies."""
        offset, size = self._columns["place"][number].tolist()
        shape = tuple(side for side in self._columns["shape"][number].tolist() if side >= 0)
        dtype = _DTYPES[int(self._columns["dtype"][number])]
        return Entry(offset + _HEADER, size, int(self._columns["checksum"][number]), dtype, shape)

    def read(self, number: int) -> torch.Tensor:
        """Returns a tensor. Raises Damaged."""
        return read_entry(self.handle, self.entry(number))

    def notes(self) -> list[dict[str, Any]]:
        """Returns what each entry is, as its writer noted it."""
        return json.loads(self._columns["notes"].tobytes())

    def _read_columns(self) -> dict[str, np.ndarray]:
        length = os.fstat(self.handle).st_size
        header = json.loads(os.pread(self.handle, _HEADER, 0)[8:])
        if header["__metadata__"]["format"] != _FORMAT:
            raise ValueError("it is of another version")
        whole = _HEADER + header["notes"]["data_offsets"][1]
        if length != whole:
            raise Damaged(f"it has {length} of {whole} bytes")
        columns, checksum = {}, 0
        for name, kind, _, sides in (*_COLUMNS, ("notes", np.uint8, "U8", ())):
            start, end = header[name]["data_offsets"]
            content = os.pread(self.handle, end - start, _HEADER + start)
            checksum = zlib.crc32(content, checksum)
            columns[name] = np.frombuffer(content, kind).reshape(-1, *sides)
        if str(checksum) != header["__metadata__"]["columns_checksum"]:
            raise ValueError("the checksum of the columns differs")
        return columns
