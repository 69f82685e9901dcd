"""Serves metadata: one reader per format, each giving raw columns; every fault names its place in the file."""

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
_REPEATED = 0  # a key that no JSON object can have: marks an object that names one of FIELDS twice
_CONSTANT = re.compile(r'"(?:[^"\\]|\\.)*"|NaN|-?Infinity', re.DOTALL)

Columns = dict[str, list[Any]]


class _NotANumber(Exception):
    """Carries the NaN or Infinity that Python's JSON reader met; the reader itself gives no position for it."""


def folder_listing(folder: Path) -> list[tuple[str, str]]:
    """Lists the media and .txt files below a folder: (path relative to it without suffix, suffix), sorted.

    Hidden files and folders are passed over; links to folders are not followed.

    Raises:
        UserError: exit code 2 for a folder that cannot be listed.
    """
    found = []
    for parent, folders, names in os.walk(folder, onerror=_refuse_folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        prefix = Path(parent).relative_to(folder)
        for name in names:
            suffix = Path(name).suffix
            if not name.startswith(".") and (suffix.lower() in (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES, ".txt")):
                found.append((str(prefix / name.removesuffix(suffix)), suffix))
    return sorted(found)


def _read_json(path: Path) -> Columns:
    top = _parse_json(_read_text(path), path, line=0)
    if not isinstance(top, list):
        raise UserError(f"{path} 1:1", f"the top level is {_json_name(top)}", "make it a list of objects", DATA)
    return _columns_of(top, path)


def _read_jsonl(path: Path) -> Columns:
    # Not splitlines(): U+2028 and its kin are legal inside a JSON string.
    lines = _read_text(path).split("\n")
    return _columns_of([_parse_json(text, path, line) for line, text in enumerate(lines) if text.strip()], path)


def _parse_json(text: str, path: Path, line: int) -> object:
    """Parses a text that starts `line` lines into the file."""
    if not text.strip():
        raise no_samples(path)
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        where, what = f"{path} {line + error.lineno}:{error.colno}", f"not valid JSON ({error.msg})"
    except _NotANumber as error:
        at = next(match.start() for match in _CONSTANT.finditer(text) if not match[0].startswith('"'))
        where = f"{path} {line + text.count(chr(10), 0, at) + 1}:{at - text.rfind(chr(10), 0, at)}"
        what = f"not valid JSON ({error})"
    except RecursionError:
        where, what = f"{path} {line + 1}:1", "not readable JSON (nested too deeply)"
    except ValueError:  # the only other one: Python's limit on the digits of a whole number
        where, what = f"{path} {line + 1}:1", "not readable JSON (a number with thousands of digits)"
    raise UserError(where, what, "correct the file there", DATA)


def _object(pairs: list[tuple[str, Any]]) -> dict[Any, Any]:
    made: dict[Any, Any] = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = [name for name in FIELDS if keys.count(name) > 1]
        if twice:
            made[_REPEATED] = twice[0]
    return made


def _refuse_constant(name: str) -> NoReturn:
    raise _NotANumber(f"{name} is no JSON value, null is")


def _columns_of(rows: Sequence[object], path: Path) -> Columns:
    objects: list[dict[Any, Any]] = []
    for row, value in enumerate(rows):
        if not isinstance(value, dict):
            raise UserError(f"{path} row {row}", f"the row is {_json_name(value)}", "make it an object", DATA)
        if _REPEATED in value:
            refuse_row(path, row, value[_REPEATED], "the key stands twice", "keep one of them")
        objects.append(value)
    if not objects:
        raise no_samples(path)
    found = {key: None for made in objects for key in made}
    _require_columns(found, path)
    return {name: [made.get(name) for made in objects] for name in FIELDS if name in found}


def _read_csv(path: Path) -> Columns:
    text = _read_text(path)
    limit = csv.field_size_limit(max(len(text), 131072))  # captions may be longer than the module's 128 KiB
    try:
        # strict: an unclosed quote would otherwise swallow the rest of the file as one caption
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = next(reader, None)
        if header is None:
            raise no_samples(path)
        _require_columns(header, path)
        picked: Columns = {name: [] for name in FIELDS if name in header}
        places = [(picked[name], header.index(name)) for name in picked]
        for row, values in enumerate(filter(None, reader)):
            if len(values) != len(header):
                what = f"line {reader.line_num} has {len(values)} columns, the header has {len(header)}"
                raise UserError(f"{path} row {row}", what, "quote captions that hold commas or line breaks", DATA)
            for column, place in places:
                column.append(values[place])
    except csv.Error as error:
        where = f"{path} line {reader.line_num}"
        raise UserError(where, f"not valid CSV ({error})", "correct the quotes there", DATA) from error
    finally:
        csv.field_size_limit(limit)
    return picked


def _read_parquet(path: Path) -> Columns:
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _require_columns(names, path)
            table = file.read(columns=[name for name in FIELDS if name in names])
            return {name: _plain(table.column(name)) for name in table.column_names}
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(str(path), f"not readable as parquet ({reason})", "write the file again", DATA) from error


def _plain(column: pa.ChunkedArray) -> list[Any]:
    """Turns an Arrow column into Python values; types that no field can have become b''."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    texts = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    numbers = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    if texts or numbers or pa.types.is_null(kind):
        return column.to_pylist()
    return [None if null else b"" for null in column.is_null().to_pylist()]


def read_folder(folder: Path, data_dir: Path) -> tuple[Columns, list[str]]:
    """Reads a folder of media and captions: columns file_path (relative to data_dir) and text, and what to report."""
    listing = folder_listing(folder)
    media = [(stem, suffix) for stem, suffix in listing if suffix.lower() != ".txt"]
    captions = {stem: suffix for stem, suffix in listing if suffix.lower() == ".txt"}
    prefix = Path(os.path.relpath(os.path.realpath(folder), os.path.realpath(data_dir)))
    columns: Columns = {
        "file_path": [str(prefix / (stem + suffix)) for stem, suffix in media],
        "text": [_read_caption(folder / (stem + captions[stem])) if stem in captions else "" for stem, _ in media],
    }
    silent = [stem + suffix for stem, suffix in media if stem not in captions]
    orphans = sorted(captions.keys() - {stem for stem, _ in media})
    notes = []
    if silent:
        notes.append(f"{len(silent)} media files have no .txt, their caption is empty (first: {silent[0]!r})")
    if orphans:
        notes.append(f"{len(orphans)} .txt files have no media, they are not used (first: {orphans[0]!r})")
    return columns, notes


def _read_caption(path: Path) -> str | bytes:
    """Reads a caption; bytes that are no UTF-8 come back as they are and become the row's problem "bad_text"."""
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
        raise UserError(str(path), f"byte {at} is not UTF-8 text, it looks like UTF-16 or UTF-32", hint, DATA)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = f"byte {error.start} (0x{content[error.start]:02x}) is not UTF-8, perhaps the file is Latin-1"
        raise UserError(str(path), what, hint, DATA) from error


def _require_columns(found: Iterable[object], path: Path) -> None:
    names = [str(name) for name in found]
    name, times = (
        Counter(filter(None, names)).most_common(1)[0] if any(names) else ("", 0)
    )  # '' ends many exported lines
    if times > 1:
        raise UserError(str(path), f"column {name!r} stands {times} times in the header", "keep one of them", DATA)
    missing = [name for name in ("file_path", "text") if name not in names]
    if missing:
        what = f"no row has {' nor '.join(missing)}; columns found: {', '.join(map(repr, names[:20])) or 'none'}"
        raise UserError(str(path), what, "name the columns file_path and text, separated by commas in a csv", DATA)


def refuse_row(path: Path, row: int, key: str, what: str, hint: str) -> NoReturn:
    """Raises the UserError (exit code 3) of one row, counted from 0, and one of its keys."""
    raise UserError(f"{path} row {row}, key {key}", what, hint, DATA)


def _refuse_folder(error: OSError) -> NoReturn:
    raise UserError(str(error.filename), f"cannot be listed ({error.strerror})", "check its permissions", FLAGS)


def no_samples(path: Path) -> UserError:
    """Returns the UserError (exit code 3) of metadata that lists nothing."""
    return UserError(str(path), "0 samples", "add one object or row per image or video", DATA)


def _json_name(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


READERS: dict[str, Callable[[Path], Columns]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
