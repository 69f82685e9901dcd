"""Serves the index: its columns as an Arrow file that is mapped and not parsed, replaced as a whole or not at all."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from videox.errors import STORAGE, UserError
from videox.files import atomic_write

IMAGE, VIDEO, UNKNOWN = 0, 1, 2  # the values of kind; UNKNOWN only where metadata does not say it
VERSION = 2
MEASURED = {
    "kind": np.uint8,
    "width": np.int32,
    "height": np.int32,
    "frames": np.int32,
    "fps": np.float32,
    "file_size": np.int64,
    "mtime_ns": np.int64,
}
KEYS = ("kind", "width", "height", "frames", "fps")
WEIGHT = "declared_weight"  # of metadata alone, nothing is measured
DECLARED = {**{f"declared_{name}": MEASURED[name] for name in KEYS}, WEIGHT: np.float32}
FINGERPRINTED = ("file_path", "text", "kind", "width", "height", "frames")
NUMBERS = {name: pa.from_numpy_dtype(dtype) for name, dtype in (MEASURED | DECLARED).items()}
_STRINGS = {name: pa.large_string() for name in ("file_path", "text", "detail")}
SCHEMA = pa.schema({**_STRINGS, **NUMBERS, "problem": pa.dictionary(pa.int32(), pa.large_string())})
_STALE_SECONDS = 3600.0


def load_table(path: Path) -> pa.Table | None:
    """Maps a saved table; None where there is none that this version can read, which only costs a new look."""
    try:
        with pa.memory_map(str(path)) as mapped:
            table = pa.ipc.open_file(mapped).read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, UnicodeDecodeError):  # the last: a column's name that is none
        return None
    if header_of(table).get("version") == 1 and WEIGHT not in table.schema.names:
        ones = pa.array(np.ones(len(table), np.float32))  # its metadata is read again, its files are not
        table = table.append_column(WEIGHT, ones).select(SCHEMA.names)
    if not table.schema.equals(SCHEMA) or any(table[name].num_chunks != 1 for name in SCHEMA.names):
        return None
    return table if header_of(table).get("version") in (1, VERSION) else None


def header_of(table: pa.Table) -> dict[str, Any]:
    """Returns what was written with a saved table; {} where that is not ours."""
    try:
        made = json.loads((table.schema.metadata or {}).get(b"videox", b"{}"))
    except ValueError:
        return {}
    return made if isinstance(made, dict) else {}


def write_table(table: pa.Table, header: dict[str, Any], path: Path) -> None:
    """Writes a table aside and puts it in place in one step, so that a reader finds the old one or the new one."""
    table = table.replace_schema_metadata({"videox": json.dumps(header)})
    try:
        for left in path.parent.glob(f".tmp-{path.name}-*"):  # by a build that was killed
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                left.unlink()
        with (
            atomic_write(path) as temporary,
            temporary.open("xb") as file,
            pa.ipc.new_file(file, table.schema) as writer,
        ):
            writer.write_table(table)
    except OSError as error:
        what = f"the index cannot be written ({error.strerror})"
        raise UserError(str(path), what, "make room there, or make the folder writable", STORAGE) from error


def names_of(table: pa.Table) -> Any:  # noqa: ANN401 - a hash object of hashlib
    """Returns a sha256 over file_path and text, however they are stored; it can be updated further."""
    digest = hashlib.sha256(str(table.num_rows).encode())
    for name in ("file_path", "text"):
        strings = table[name].combine_chunks()
        digest.update(pc.binary_length(strings).to_numpy().astype("<i8").tobytes())
        _, offsets, data = strings.buffers()
        ends = np.frombuffer(offsets, np.int64)[[strings.offset, strings.offset + len(strings)]]
        digest.update(memoryview(data or b"")[ends[0] : ends[1]])
    return digest


def fingerprint_of(table: pa.Table) -> str:
    """Returns sha256 (hex) over the columns FINGERPRINTED and over which rows are usable, however they are stored."""
    digest = names_of(table)
    for name in ("kind", "width", "height", "frames"):
        digest.update(np.ascontiguousarray(table[name].to_numpy()).astype("<i4").tobytes())
    digest.update(usable_of(table).tobytes())
    return digest.hexdigest()


def usable_of(table: pa.Table) -> np.ndarray:
    """Returns bool [rows], True where a row has no problem."""
    usable: np.ndarray = pc.equal(table["problem"].combine_chunks().cast(pa.large_string()), "").to_numpy(False)
    return usable


def class_array(strings: pa.Array) -> pa.DictionaryArray:
    """Returns problems as a dictionary, "" first and the others sorted, so that equal ones are stored equally."""
    names = string_array(["", *sorted(set(pc.unique(strings).to_pylist()) - {""})])
    return pa.DictionaryArray.from_arrays(pc.index_in(strings.cast(pa.large_string()), value_set=names), names)


def string_array(values: Iterable[str]) -> pa.Array:
    """Returns Arrow strings with 64-bit offsets, since captions may pass 2 GiB together."""
    return pa.array(list(values), pa.large_string())


def repeated_string(value: str, times: int) -> pa.Array:
    """Returns one string, `times` times."""
    return pa.repeat(pa.scalar(value, pa.large_string()), times)
