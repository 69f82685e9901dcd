"""The columns of the index as an Arrow file, which is memory-mapped instead of parsed and replaced atomically."""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from videox.errors import STORAGE, UserError
from videox.files import atomic_write

IMAGE, VIDEO, UNKNOWN = 0, 1, 2  # values of the column kind; UNKNOWN only where metadata does not state the type
VERSION = 4  # since 4 a table has a checksum
_CHECKSUM = "crc32"
MEASURED = {
    "kind": np.uint8,
    "width": np.int32,
    "height": np.int32,
    "frames": np.int32,
    "fps": np.float32,
    "file_size": np.int64,
    "mtime_ns": np.int64,
    "format": np.uint8,
    "decoding": np.uint32,
}
KEYS = ("kind", "width", "height", "frames", "fps")
WEIGHT = "declared_weight"  # read from metadata only, never measured
DECLARED = {**{f"declared_{name}": MEASURED[name] for name in KEYS}, WEIGHT: np.float32}
FINGERPRINTED = ("file_path", "text", "kind", "width", "height", "frames")
NUMBERS = {name: pa.from_numpy_dtype(dtype) for name, dtype in (MEASURED | DECLARED).items()}
_STRINGS = {name: pa.large_string() for name in ("file_path", "text", "detail")}
SCHEMA = pa.schema({**_STRINGS, **NUMBERS, "problem": pa.dictionary(pa.int32(), pa.large_string())})
_STALE_SECONDS = 3600.0


def load_table(path: Path) -> pa.Table | None:
    """Memory-map a saved table; None if there is none that this version can read, or if it is damaged.

    The files are then probed again.
    """
    try:
        with pa.memory_map(str(path)) as mapped:
            table = pa.ipc.open_file(mapped).read_all()
        table.validate(full=True)
        if header_of(table).get("version") == VERSION and not _is_intact(table):
            return None
    except (pa.ArrowException, OSError, UnicodeDecodeError):  # UnicodeDecodeError: a damaged column name
        return None
    # Version 1 has no weights, versions 1 and 2 no formats. Their rows are read from metadata again, and measurements
    # are reused of those files that this version measures alike.
    if header_of(table).get("version") in (1, 2):
        missing = {WEIGHT: 1, "format": 0, "decoding": 0}
        for name in missing.keys() - {*table.schema.names}:
            table = table.append_column(name, pa.array(np.full(len(table), missing[name]), NUMBERS[name]))
        if sorted(table.schema.names) == sorted(SCHEMA.names):
            table = table.select(SCHEMA.names)
    if not table.schema.equals(SCHEMA) or any(table[name].num_chunks != 1 for name in SCHEMA.names):
        return None
    return table if header_of(table).get("version") in (1, 2, 3, VERSION) else None


def _is_intact(table: pa.Table) -> bool:
    """Return whether header and columns are those that were written."""
    metadata = table.schema.metadata or {}
    return metadata.get(_CHECKSUM.encode()) == _checksum(table, metadata.get(b"videox", b"")).encode()


def _checksum(table: pa.Table, header: bytes) -> str:
    """Return the CRC-32 (hex) of a header and of all columns, independent of chunks; it finds any single wrong bit."""
    crc = zlib.crc32(f"{table.num_rows} {table.schema.names}".encode(), zlib.crc32(header))
    for column in table.columns:
        values = column.combine_chunks()
        parts = [values]
        if isinstance(values, pa.DictionaryArray):
            parts = [values.indices, values.dictionary]
        for part in parts:
            for block in _content(part):
                crc = zlib.crc32(block, crc)
    return f"{crc:08x}"


def _content(values: pa.Array) -> list[bytes | memoryview]:
    """Return what an array of numbers or strings consists of: their bytes, and before these the lengths of strings."""
    if not pa.types.is_large_string(values.type):
        return [np.ascontiguousarray(values.to_numpy(zero_copy_only=False)).tobytes()]
    lengths = pc.binary_length(values).to_numpy(zero_copy_only=False).astype("<i8").tobytes()
    _, offsets, data = values.buffers()
    ends = np.frombuffer(offsets, np.int64)[[values.offset, values.offset + len(values)]]
    return [lengths, memoryview(data or b"")[ends[0] : ends[1]]]


def header_of(table: pa.Table) -> dict[str, Any]:
    """Return the header that was written with a saved table; {} if it is not ours."""
    try:
        header = json.loads((table.schema.metadata or {}).get(b"videox", b"{}"))
    except ValueError:
        return {}
    return header if isinstance(header, dict) else {}


def write_table(table: pa.Table, header: dict[str, Any], path: Path) -> None:
    """Write a table to a temporary file and rename it, so that a reader finds the old table or the new one.

    Raises:
        UserError: exit code 5 if it cannot be written.
    """
    text = json.dumps(header)
    table = table.replace_schema_metadata({"videox": text, _CHECKSUM: _checksum(table, text.encode())})
    try:
        for leftover in path.parent.glob(f".tmp-{path.name}-*"):  # of a build that was killed
            if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
                leftover.unlink()
        with (
            atomic_write(path) as temporary,
            temporary.open("xb") as file,
            pa.ipc.new_file(file, table.schema) as writer,
        ):
            writer.write_table(table)
    except OSError as error:
        what = f"the index cannot be written ({error.strerror or error})"
        raise UserError(str(path), what, "free disk space, or make the folder writable", STORAGE) from error


def hash_names(table: pa.Table) -> Any:  # noqa: ANN401 - a hash object of hashlib
    """Return a sha256 hash object over file_path and text, independent of their chunks; it can be updated further."""
    digest = hashlib.sha256(str(table.num_rows).encode())
    for name in ("file_path", "text"):
        # The lengths are hashed too: without them, moving a character from one string to the next changes nothing.
        for block in _content(table[name].combine_chunks()):
            digest.update(block)
    return digest


def fingerprint_of(table: pa.Table) -> str:
    """Return sha256 (hex) over the columns FINGERPRINTED and over which rows are usable, independent of chunks."""
    digest = hash_names(table)
    for name in ("kind", "width", "height", "frames"):
        digest.update(np.ascontiguousarray(table[name].to_numpy()).astype("<i4").tobytes())
    digest.update(usable_of(table).tobytes())
    return digest.hexdigest()


def usable_of(table: pa.Table) -> np.ndarray:
    """Return bool [rows], True where a row has no problem."""
    usable: np.ndarray = pc.equal(table["problem"].combine_chunks().cast(pa.large_string()), "").to_numpy(False)
    return usable


def class_array(strings: pa.Array) -> pa.DictionaryArray:
    """Return problems as a dictionary array, "" first, then sorted, so that equal columns are stored equal."""
    names = string_array(["", *sorted(set(pc.unique(strings).to_pylist()) - {""})])
    return pa.DictionaryArray.from_arrays(pc.index_in(strings.cast(pa.large_string()), value_set=names), names)


def string_array(values: Iterable[str]) -> pa.Array:
    """Return Arrow strings with 64-bit offsets, because all captions together may exceed 2 GiB."""
    return pa.array(list(values), pa.large_string())


def repeated_string(value: str, times: int) -> pa.Array:
    """Return an array of one string repeated `times` times."""
    return pa.repeat(pa.scalar(value, pa.large_string()), times)
