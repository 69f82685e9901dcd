"""Readers of metadata files: json, jsonl, csv, parquet or a folder of media and captions, each read into raw columns.

Every error of a file names its position (line and column, or row and key).
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from videox.errors import DATA, FLAGS, UserError

FIELDS = ("file_path", "text", "type", "width", "height", "num_frames", "fps", "weight")
VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
_REPEATED = 0  # a key that no JSON object can have: marks an object that contains one of FIELDS twice
_CONSTANT = re.compile(r'"(?:[^"\\]|\\.)*"|NaN|-?Infinity', re.DOTALL)

Columns = dict[str, list[Any]]


class _NotANumber(Exception):
    """NaN or Infinity in a JSON text; Python's JSON reader accepts both and reports no position for them."""


def list_folder(folder: Path) -> list[tuple[str, str]]:
    """List the media and .txt files below a folder, sorted, as (path relative to it without suffix, suffix).

    Hidden files and folders are skipped; links to folders are not followed.

    Raises:
        UserError: exit code 2 for a folder that cannot be listed.
    """
    found = []
    for parent, folders, names in os.walk(folder, onerror=_raise_folder_error):
        folders[:] = [name for name in folders if not name.startswith(".")]
        prefix = Path(parent).relative_to(folder)
        for name in names:
            suffix = Path(name).suffix
            if not name.startswith(".") and (suffix.lower() in (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES, ".txt")):
                found.append((str(prefix / name.removesuffix(suffix)), suffix))
    return sorted(found)


def _read_json(path: Path) -> Columns:
    rows = _parse_json(_read_text(path), path, lines_before=0)
    if not isinstance(rows, list):
        raise UserError(f"{path} 1:1", f"the top level is {_json_type(rows)}", "make it a list of objects", DATA)
    return _to_columns(rows, path)


def _read_jsonl(path: Path) -> Columns:
    # Not splitlines(), which also splits at U+2028 and similar characters: they are legal inside a JSON string.
    lines = _read_text(path).split("\n")
    return _to_columns([_parse_json(text, path, number) for number, text in enumerate(lines) if text.strip()], path)


def _parse_json(text: str, path: Path, lines_before: int) -> object:
    """Parse a JSON text; lines_before: number of lines of the file before this text, for positions in messages."""
    if not text.strip():
        raise no_samples_error(path)
    try:
        return json.loads(text, parse_constant=_reject_constant, object_pairs_hook=_build_object)
    except json.JSONDecodeError as error:
        where, what = f"{path} {lines_before + error.lineno}:{error.colno}", f"not valid JSON ({error.msg})"
    except _NotANumber as error:
        # The reader gave no position: search for the first such constant outside of strings.
        start = next(match.start() for match in _CONSTANT.finditer(text) if not match[0].startswith('"'))
        line = lines_before + text.count(chr(10), 0, start) + 1
        where = f"{path} {line}:{start - text.rfind(chr(10), 0, start)}"
        what = f"not valid JSON ({error})"
    except RecursionError:
        where, what = f"{path} {lines_before + 1}:1", "not readable JSON (nested too deeply)"
    except ValueError:  # the only other cause: Python's limit on the number of digits of an integer
        where, what = f"{path} {lines_before + 1}:1", "not readable JSON (a number with thousands of digits)"
    raise UserError(where, what, "correct the file at this position", DATA)


def _build_object(pairs: list[tuple[str, Any]]) -> dict[Any, Any]:
    built: dict[Any, Any] = dict(pairs)
    if len(built) != len(pairs):
        keys = [key for key, _ in pairs]
        repeated = [name for name in FIELDS if keys.count(name) > 1]
        if repeated:
            built[_REPEATED] = repeated[0]
    return built


def _reject_constant(name: str) -> NoReturn:
    raise _NotANumber(f"{name} is not a JSON value, null is")


def _to_columns(rows: Sequence[object], path: Path) -> Columns:
    objects: list[dict[Any, Any]] = []
    for row, value in enumerate(rows):
        if not isinstance(value, dict):
            raise UserError(f"{path} row {row}", f"the row is {_json_type(value)}", "make it an object", DATA)
        if _REPEATED in value:
            raise_row_error(path, row, value[_REPEATED], "the key occurs twice", "remove one of them")
        objects.append(value)
    if not objects:
        raise no_samples_error(path)
    names = {key: None for fields in objects for key in fields}
    _require_columns(names, path)
    return {name: [fields.get(name) for fields in objects] for name in FIELDS if name in names}


def _read_csv(path: Path) -> Columns:
    text = _read_text(path)
    # Captions may be longer than the csv module's default limit of 128 KiB.
    default_limit = csv.field_size_limit(max(len(text), 131072))
    try:
        # strict: without it, an unclosed quote would turn the rest of the file into one caption.
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = next(reader, None)
        if header is None:
            raise no_samples_error(path)
        _require_columns(header, path)
        columns: Columns = {name: [] for name in FIELDS if name in header}
        positions = [(columns[name], header.index(name)) for name in columns]
        for row, values in enumerate(filter(None, reader)):
            if len(values) != len(header):
                what = f"line {reader.line_num} has {len(values)} columns, the header has {len(header)}"
                raise UserError(f"{path} row {row}", what, "quote captions that contain commas or line breaks", DATA)
            for column, position in positions:
                column.append(values[position])
    except csv.Error as error:
        where = f"{path} line {reader.line_num}"
        raise UserError(where, f"not valid CSV ({error})", "correct the quotes in this line", DATA) from error
    finally:
        csv.field_size_limit(default_limit)
    return columns


def _read_parquet(path: Path) -> Columns:
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _require_columns(names, path)
            table = file.read(columns=[name for name in FIELDS if name in names])
            return {name: _python_values(table.column(name)) for name in table.column_names}
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(str(path), f"not readable as parquet ({reason})", "write the file again", DATA) from error


def _python_values(column: pa.ChunkedArray) -> list[Any]:
    """Convert an Arrow column to Python values; values of a type that no field can have become b''."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    if is_text or is_number or pa.types.is_null(kind):
        return column.to_pylist()
    return [None if null else b"" for null in column.is_null().to_pylist()]


def read_folder(folder: Path, data_dir: Path) -> tuple[Columns, list[str]]:
    """Read a folder of media and captions.

    Returns:
        Columns file_path (relative to data_dir) and text, and notes for the start report.
    """
    listing = list_folder(folder)
    media = [(stem, suffix) for stem, suffix in listing if suffix.lower() != ".txt"]
    captions = {stem: suffix for stem, suffix in listing if suffix.lower() == ".txt"}
    prefix = Path(os.path.relpath(os.path.realpath(folder), os.path.realpath(data_dir)))
    columns: Columns = {
        "file_path": [str(prefix / (stem + suffix)) for stem, suffix in media],
        "text": [_read_caption(folder / (stem + captions[stem])) if stem in captions else "" for stem, _ in media],
    }
    without_caption = [stem + suffix for stem, suffix in media if stem not in captions]
    without_media = sorted(captions.keys() - {stem for stem, _ in media})
    notes = []
    if without_caption:
        count = len(without_caption)
        notes.append(f"{count} media files have no .txt file, their caption is empty (first: {without_caption[0]!r})")
    if without_media:
        count = len(without_media)
        notes.append(f"{count} .txt files have no media file, they are ignored (first: {without_media[0]!r})")
    return columns, notes


def _read_caption(path: Path) -> str | bytes:
    """Read a caption; bytes that are not UTF-8 are returned unchanged and become the row's problem "bad_text"."""
    content = _read_bytes(path)
    try:
        return content.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        return content


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            str(path), f"cannot be read ({error.strerror})", "check its permissions and its disk"
        ) from error


def _read_text(path: Path) -> str:
    content = _read_bytes(path)
    hint = "save the file as UTF-8"
    if content[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in content[:4]:
        at = 0 if content[0] > 0x7F else content.index(b"\0")
        raise UserError(str(path), f"byte {at} is not UTF-8 text, the file seems to be UTF-16 or UTF-32", hint, DATA)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = f"byte {error.start} (0x{content[error.start]:02x}) is not UTF-8, the file may be Latin-1"
        raise UserError(str(path), what, hint, DATA) from error


def _require_columns(found: Iterable[object], path: Path) -> None:
    names = [str(name) for name in found]
    # Empty names are not counted: many exporters end each line with a comma.
    name, count = Counter(filter(None, names)).most_common(1)[0] if any(names) else ("", 0)
    if count > 1:
        raise UserError(str(path), f"column {name!r} occurs {count} times in the header", "remove all but one", DATA)
    missing = [name for name in ("file_path", "text") if name not in names]
    if missing:
        what = f"no row has {' nor '.join(missing)}; columns found: {', '.join(map(repr, names[:20])) or 'none'}"
        raise UserError(str(path), what, "name the columns file_path and text, separated by commas in a csv", DATA)


def raise_row_error(path: Path, row: int, key: str, what: str, hint: str) -> NoReturn:
    """Raise the UserError (exit code 3) of one row (0-based) and one of its keys."""
    raise UserError(f"{path} row {row}, key {key}", what, hint, DATA)


def _raise_folder_error(error: OSError) -> NoReturn:
    raise UserError(str(error.filename), f"cannot be listed ({error.strerror})", "check its permissions", FLAGS)


def no_samples_error(path: Path) -> UserError:
    """Return the UserError (exit code 3) of metadata without any row."""
    return UserError(str(path), "0 samples", "add one object or row per image or video", DATA)


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


READERS: dict[str, Callable[[Path], Columns]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
