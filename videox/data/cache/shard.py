"""A cache shard: one large safetensors file of many tensors, written to a temporary file and renamed.

The file contains one blob with the bytes of all tensors, and columns with the position of each, so that a file of a
thousand entries opens in a millisecond. Each tensor has a checksum, and so have the columns together. The header is
compared with the one that the columns give, so that every byte of the file is checked. The writer holds a lock on its
temporary file: an unlocked one was left by a process that died.
"""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from videox.files import flush, temp_path

SUFFIX = ".safetensors"
KEY_BYTES = 16
_HEADER = 4096  # bytes reserved for the safetensors header, whose length is known only when all entries are written
_FORMAT = "videox-cache-1"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8)
_MAX_DIMS = 6
# name, numpy type, safetensors type, shape of one entry
_COLUMNS = (
    ("key", np.uint8, "U8", (KEY_BYTES,)),
    ("place", np.int64, "I64", (2,)),
    ("checksum", np.uint32, "U32", ()),
    ("dtype", np.uint8, "U8", ()),
    ("shape", np.int32, "I32", (_MAX_DIMS,)),
)
_ALL_COLUMNS = (*_COLUMNS, ("notes", np.uint8, "U8", ()))
_ALIGNED = 8  # bytes; the columns begin at a multiple


class CorruptedError(Exception):
    """A file or an entry whose content is not what was written; the text describes how it differs."""


class Entry(NamedTuple):
    """Where a tensor is stored: offset and size in bytes, its checksum, dtype and shape."""

    offset: int
    size: int
    checksum: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def read_entry(handle: int, entry: Entry) -> torch.Tensor:
    """Read a tensor of an open file into new memory.

    Raises:
        CorruptedError: its bytes differ from those that were written.
    """
    content = torch.empty(entry.size, dtype=torch.uint8)
    view, done = content.numpy().data, 0
    while done < entry.size:
        count = os.preadv(handle, [view[done:]], entry.offset + done)
        if not count:
            raise CorruptedError(f"it ends {entry.size - done} bytes too early")
        done += count
    if zlib.crc32(view) != entry.checksum:
        raise CorruptedError("its checksum differs")
    return content.view(entry.dtype).view(entry.shape)


class ShardWriter:
    """Writes one shard, tensor by tensor; other processes see it after `publish`.

    Args:
        path: the final path of the file; its folder exists.

    Raises:
        OSError: writing failed, in the constructor and in every method.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary, self.handle = _create_locked_file(path)
        self._end = _HEADER
        self.entries: dict[bytes, Entry] = {}
        self._notes: list[Mapping[str, Any]] = []

    @property
    def size(self) -> int:
        """Bytes of tensors written so far."""
        return self._end - _HEADER

    def put(self, key: bytes, tensor: torch.Tensor, note: Mapping[str, Any]) -> None:
        """Append a CPU tensor.

        Args:
            key: KEY_BYTES bytes.
            tensor: of at most six dimensions.
            note: JSON values that describe the entry, for `scripts/cache.py`.
        """
        content = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
        entry = Entry(self._end, len(content), zlib.crc32(content), tensor.dtype, tuple(tensor.shape))
        self._end = _write(self.handle, content, self._end)
        self.entries[key] = entry
        self._notes.append(note)

    def publish(self) -> None:
        """Write the columns and rename the file to its final path; without any tensor, leave no file."""
        try:
            if self.entries:
                self._write_columns()
                os.fsync(self.handle)
                self._temporary.replace(self.path)
                flush(self.path.parent)
        finally:
            self.drop()

    def drop(self) -> None:
        """Close the file and delete it if it is not published."""
        self._temporary.unlink(missing_ok=True)
        if self.handle >= 0:
            os.close(self.handle)
            self.handle = -1

    def _write_columns(self) -> None:
        entries = list(self.entries.values())
        shapes = [[*entry.shape, *[-1] * (_MAX_DIMS - len(entry.shape))] for entry in entries]
        values: dict[str, Any] = {
            "key": np.frombuffer(b"".join(self.entries), np.uint8).reshape(-1, KEY_BYTES),
            "place": [(entry.offset - _HEADER, entry.size) for entry in entries],
            "checksum": [entry.checksum for entry in entries],
            "dtype": [_DTYPES.index(entry.dtype) for entry in entries],
            "shape": shapes,
        }
        gap = -self._end % _ALIGNED
        self._end = _write(self.handle, memoryview(bytes(gap)), self._end)
        start = self.size
        columns = [np.ascontiguousarray(values[name], kind) for name, kind, _, _ in _COLUMNS]
        columns.append(np.frombuffer(json.dumps(self._notes).encode(), np.uint8))
        for column in columns:
            self._end = _write(self.handle, column.view(np.uint8).reshape(-1).data, self._end)
        _write(self.handle, memoryview(_header(start, columns)), 0)


def _header(start: int, columns: Sequence[np.ndarray]) -> bytes:
    """Return the first bytes of a shard: the safetensors header of its blob and columns.

    Args:
        start: bytes of the blob.
        columns: in the order of _ALL_COLUMNS.
    """
    header: dict[str, Any] = {"blob": _header_entry("U8", [start], 0, start)}
    checksum = 0
    for (name, _, code, _), column in zip(_ALL_COLUMNS, columns, strict=True):
        header[name] = _header_entry(code, list(column.shape), start, start + column.nbytes)
        checksum, start = zlib.crc32(column.tobytes(), checksum), start + column.nbytes
    header["__metadata__"] = {"format": _FORMAT, "columns_checksum": str(checksum)}
    # safetensors starts with the length of the JSON text in 8 bytes; spaces after the text are legal.
    text = json.dumps(header).encode().ljust(_HEADER - 8)
    return len(text).to_bytes(8, "little") + text


def _header_entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def _write(handle: int, content: memoryview, offset: int) -> int:
    """Write all of the content and return the offset of its end."""
    done = 0
    while done < len(content):
        done += os.pwrite(handle, content[done:], offset + done)
    return offset + len(content)


def _create_locked_file(path: Path) -> tuple[Path, int]:
    """Create and lock a new temporary file next to a path; retry if it was deleted before it was locked."""
    while True:
        temporary = temp_path(path)
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        fcntl.flock(handle, fcntl.LOCK_EX)
        # Between open and flock, another process may have taken the file for a leftover: compare the inodes.
        with suppress(FileNotFoundError):
            if temporary.stat().st_ino == os.fstat(handle).st_ino:
                return temporary, handle
        os.close(handle)


def delete_unfinished(folder: Path) -> list[str]:
    """Delete the temporary files of writers that died before they published; return their names."""
    deleted = []
    for path in folder.glob(f".tmp-*{SUFFIX}-*"):
        try:
            handle = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
            deleted.append(path.name)
        except BlockingIOError:
            continue  # its writer is alive
        finally:
            os.close(handle)
    return deleted


class Shard:
    """A published shard, whose entries are read on demand.

    Args:
        path: path of the file.

    Raises:
        CorruptedError: the file is truncated, or its header or columns differ from those that were written.
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._columns = self._read_columns()
        except (ValueError, LookupError, TypeError, RecursionError) as why:
            raise CorruptedError(f"its header or columns are corrupted ({why})") from why
        self.keys = self._columns["key"].tobytes()

    def __len__(self) -> int:
        return len(self._columns["key"])

    def __del__(self) -> None:
        if getattr(self, "handle", -1) >= 0:
            os.close(self.handle)

    def key(self, number: int) -> bytes:
        """Return the key of an entry."""
        return self.keys[number * KEY_BYTES : (number + 1) * KEY_BYTES]

    def entry(self, number: int) -> Entry:
        """Return where an entry is stored."""
        offset, size = self._columns["place"][number].tolist()
        shape = tuple(side for side in self._columns["shape"][number].tolist() if side >= 0)
        dtype = _DTYPES[int(self._columns["dtype"][number])]
        return Entry(offset + _HEADER, size, int(self._columns["checksum"][number]), dtype, shape)

    def read(self, number: int) -> torch.Tensor:
        """Read the tensor of an entry. Raises CorruptedError."""
        return read_entry(self.handle, self.entry(number))

    def notes(self) -> list[dict[str, Any]]:
        """Return the note of each entry, as passed to `ShardWriter.put`."""
        return json.loads(self._columns["notes"].tobytes())

    def _read_columns(self) -> dict[str, np.ndarray]:
        length = os.fstat(self.handle).st_size
        header = json.loads(os.pread(self.handle, _HEADER, 0)[8:])
        if header["__metadata__"]["format"] != _FORMAT:
            raise ValueError("it has another format version")
        expected = _HEADER + header["notes"]["data_offsets"][1]
        if length != expected:
            raise CorruptedError(f"it has {length} of {expected} bytes")
        columns = {}
        for name, kind, _, entry_shape in _ALL_COLUMNS:
            start, end = header[name]["data_offsets"]
            if not 0 <= start <= end <= length - _HEADER:
                raise ValueError(f"{name} lies outside of it")
            content = os.pread(self.handle, end - start, _HEADER + start)
            columns[name] = np.frombuffer(content, kind).reshape(-1, *entry_shape)
        # What was written follows from the columns, the checksum of their content included.
        first = int(header["blob"]["data_offsets"][1])
        if os.pread(self.handle, _HEADER, 0) != _header(first, [*columns.values()]):
            raise ValueError("the checksum of the columns or the header differs")
        end_of_entries = int(columns["place"][-1].sum())
        gap = os.pread(self.handle, first - end_of_entries, _HEADER + end_of_entries)
        if len(gap) >= _ALIGNED or any(gap):
            raise ValueError("there are bytes between the entries and the columns")
        return columns
