"""Serves the user's list of samples: json, jsonl, csv, parquet or a folder becomes columns, and every fault is named.

A fault of the whole file stops the run with a Refusal; a fault of one row becomes that row's `problem`, so that the
row keeps its number and has one fate in the ledger. Light imports only: the index reads this before torch is loaded.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from videox.errors import DATA, FLAGS, Refusal

FIELDS = ("file_path", "text", "type", "width", "height", "num_frames", "fps")
KINDS = ("image", "video")
ROW_PROBLEMS = {
    "no_file_path": "the row has no file_path",
    "bad_file_path": "file_path is not a usable string",
    "no_text": "the row has no text",
    "bad_text": "text is not a UTF-8 string",
}
VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
_LARGEST = 2**31 - 1  # sizes and frame counts are kept in 32 bits
_REPEATED = 0  # a key that no JSON object can have: marks an object that names one of FIELDS twice
# What FFmpeg takes for a protocol instead of a file name. "-" means stdin; "-abc.mp4" is a fine file name.
_PROTOCOL = re.compile(
    r"[a-z][a-z0-9+.\-]*://|-$|(async|cache|concatf?|crypto|data|fd|file|ftp|gophers?|hls|https?|md5|mms[ht]|pipe|"
    r"rt[ms]?p[a-z]*|s?rtp|sctp|srt|subfile|tcp|tee|tls|udp|udplite|unix|zmq)[:,]",
    re.IGNORECASE,
)
_CONSTANT = re.compile(r'"(?:[^"\\]|\\.)*"|NaN|-?Infinity', re.DOTALL)

Columns = dict[str, list[Any]]


@dataclass(frozen=True)
class Metadata:
    """The metadata in columns, one entry per row.

    Attributes:
        file_path: as written, relative to train_data_dir; for a row with a bad one, a printable form of it.
        text: the caption; '' where the row has none that can be used.
        kind: "image", "video" or "" (decided by the file's content).
        width: in pixels, 0 = not given.
        height: in pixels, 0 = not given.
        num_frames: 0 = not given.
        fps: in frames per second, 0.0 = not given.
        problem: "" or a key of ROW_PROBLEMS.
        source: the file or folder that was read.
        notes: sentences for the start report.
    """

    file_path: list[str]
    text: list[str]
    kind: list[str]
    width: list[int]
    height: list[int]
    num_frames: list[int]
    fps: list[float]
    problem: list[str]
    source: Path
    notes: list[str] = field(default_factory=list)


class _NotANumber(Exception):
    """Carries the NaN or Infinity that Python's JSON reader met; the reader itself gives no position for it."""


def read_metadata(path: Path, data_dir: Path, *, allow_outside_data_dir: bool = False) -> Metadata:
    """Reads metadata into columns and confines every path to the data folder.

    Args:
        path: a .json (list of objects), .jsonl, .csv (with header) or .parquet file, or a folder of x.mp4 + x.txt.
        data_dir: the folder that file_path is relative to.
        allow_outside_data_dir: lets a path leave data_dir (absolute, "..", symbolic links).

    Raises:
        Refusal: exit code 2 for a file that is missing, unreadable or of an unknown kind; 3 for its content.
    """
    if not stat.S_ISDIR(_mode(data_dir)):
        raise Refusal(str(data_dir), "is not a folder", "give the folder of the media as train_data_dir")
    notes: list[str] = []
    mode, suffix = _mode(path), path.suffix.lower()
    if stat.S_ISDIR(mode) and suffix not in _READERS:
        columns, notes = _read_folder(path, data_dir)
    else:
        columns = _reader_of(path, mode, suffix)(path)
    metadata = _clean(columns, path, notes)
    unusable = ("no_file_path", "bad_file_path")
    paths = ["" if p in unusable else f for f, p in zip(metadata.file_path, metadata.problem, strict=True)]
    confine(paths, data_dir, path, allow_outside_data_dir=allow_outside_data_dir)
    return metadata


def confine(paths: Sequence[str], data_dir: Path, source: Path, *, allow_outside_data_dir: bool) -> None:
    """Refuses the first path that is not a local file's name, or leads out of data_dir once its links are resolved.

    Each directory is resolved and listed once, so that a million rows cost no system call each.

    Args:
        paths: one per row; '' is passed over.
        data_dir: the folder they are joined with.
        source: the metadata, for the message.
        allow_outside_data_dir: only the names are checked, not where they lead.

    Raises:
        Refusal: exit code 3, with the row.
    """
    root = os.path.realpath(data_dir)
    links_of: dict[str, frozenset[str]] = {}
    for row, name in enumerate(paths):
        if (":" in name or "," in name or name == "-") and _PROTOCOL.match(name):
            _refuse_row(source, row, "file_path", f"{name!r} is not a local file", "give a path below train_data_dir")
        if allow_outside_data_dir or not name:
            continue
        directory, base = os.path.split(name)
        links = links_of.get(directory)
        if links is None:
            real = _real(root, directory)
            _require_inside(real, root, name, source, row)
            links = links_of[directory] = _links_in(real)
        if base in links or base in ("", ".", ".."):
            _require_inside(_real(root, name), root, name, source, row)


def folder_listing(folder: Path) -> list[tuple[str, str]]:
    """Lists the media and .txt files below a folder: (path relative to it without suffix, suffix), sorted.

    Hidden files and folders are passed over; links to folders are not followed.

    Raises:
        Refusal: exit code 2 for a folder that cannot be listed.
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


def _clean(columns: Columns, path: Path, notes: list[str]) -> Metadata:
    """Turns raw columns into typed ones; a value that one row got wrong becomes that row's problem."""
    rows = len(columns["file_path"])
    if rows == 0:
        raise _no_samples(path)
    empty: list[Any] = [None] * rows
    raw = {name: columns.get(name, empty) for name in FIELDS}
    problem = [_path_problem(p) or _text_problem(t) for p, t in zip(raw["file_path"], raw["text"], strict=True)]
    bad = ("no_file_path", "bad_file_path")
    sides = {name: [_whole(value) for value in raw[name]] for name in ("width", "height", "num_frames")}
    return Metadata(
        file_path=[_printable(v) if p in bad else v for v, p in zip(raw["file_path"], problem, strict=True)],
        text=[_valid(value) if isinstance(value, str) else "" for value in raw["text"]],
        kind=[_kind(value, row, path) for row, value in enumerate(raw["type"])],
        fps=[_positive(value) for value in raw["fps"]],
        problem=problem,
        source=path,
        notes=notes,
        **sides,
    )


def _path_problem(value: object) -> str:
    if value is None or value == "":
        return "no_file_path"
    usable = isinstance(value, str) and "\0" not in value and _valid(value) == value
    return "" if usable else "bad_file_path"


def _text_problem(value: object) -> str:
    if value is None:
        return "no_text"
    return "" if isinstance(value, str) else "bad_text"


def _printable(value: object) -> str:
    return "" if value is None else ascii(value)[:200]


def _valid(text: str) -> str:
    """Replaces lone surrogates, which no file and no tokenizer can hold, by U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _kind(value: object, row: int, path: Path) -> str:
    if value is None or value == "":
        return ""
    kind = value.strip().lower() if isinstance(value, str) else value
    if kind not in KINDS:
        _refuse_row(path, row, "type", f"{value!r} is unknown", f"use one of {', '.join(KINDS)}, or leave it out")
    return str(kind)


def _positive(value: object) -> float:
    """Returns a number given as number or string; 0.0 for everything that is no positive finite number."""
    if value is None or isinstance(value, bool) or not isinstance(value, int | float | str):
        return 0.0
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return 0.0
    return number if 0.0 < number < float("inf") else 0.0


def _whole(value: object) -> int:
    number = _positive(value)
    return int(number) if number <= _LARGEST and number == int(number) else 0


def _read_json(path: Path) -> Columns:
    top = _parse_json(_read_text(path), path, line=0)
    if not isinstance(top, list):
        raise Refusal(f"{path} 1:1", f"the top level is {_json_name(top)}", "make it a list of objects", DATA)
    return _columns_of(top, path)


def _read_jsonl(path: Path) -> Columns:
    # Not splitlines(): U+2028 and its kin are legal inside a JSON string.
    lines = _read_text(path).split("\n")
    return _columns_of([_parse_json(text, path, line) for line, text in enumerate(lines) if text.strip()], path)


def _parse_json(text: str, path: Path, line: int) -> object:
    """Parses a text that starts `line` lines into the file."""
    if not text.strip():
        raise _no_samples(path)
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
    raise Refusal(where, what, "correct the file there", DATA)


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
            raise Refusal(f"{path} row {row}", f"the row is {_json_name(value)}", "make it an object", DATA)
        if _REPEATED in value:
            _refuse_row(path, row, value[_REPEATED], "the key stands twice", "keep one of them")
        objects.append(value)
    if not objects:
        raise _no_samples(path)
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
            raise _no_samples(path)
        _require_columns(header, path)
        picked: Columns = {name: [] for name in FIELDS if name in header}
        places = [(picked[name], header.index(name)) for name in picked]
        for row, values in enumerate(filter(None, reader)):
            if len(values) != len(header):
                what = f"line {reader.line_num} has {len(values)} columns, the header has {len(header)}"
                raise Refusal(f"{path} row {row}", what, "quote captions that hold commas or line breaks", DATA)
            for column, place in places:
                column.append(values[place])
    except csv.Error as error:
        where = f"{path} line {reader.line_num}"
        raise Refusal(where, f"not valid CSV ({error})", "correct the quotes there", DATA) from error
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
        raise Refusal(str(path), f"not readable as parquet ({reason})", "write the file again", DATA) from error


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


def _read_folder(folder: Path, data_dir: Path) -> tuple[Columns, list[str]]:
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
        notes.append(
            f"{len(silent)} media files have no .txt beside them, their caption is empty (first: {silent[0]!r})"
        )
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


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except FileNotFoundError as error:
        raise Refusal(str(path), "there is no such file or folder", "correct the path") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise Refusal(str(path), f"cannot be opened ({reason})", "correct the path or its permissions") from error


def _reader_of(path: Path, mode: int, suffix: str) -> Callable[[Path], Columns]:
    if suffix not in _READERS:
        known = ", ".join(_READERS)
        raise Refusal(str(path), f"unknown suffix {suffix!r}", f"use one of {known}, or a folder of x.mp4 + x.txt")
    if not stat.S_ISREG(mode):
        what = "is a folder with the name of a file" if stat.S_ISDIR(mode) else "is not a regular file"
        raise Refusal(str(path), what, "give the metadata file")
    return _READERS[suffix]


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Refusal(str(path), f"cannot be read ({error.strerror})", "check its permissions and its disk") from error


def _read_text(path: Path) -> str:
    content = _read_bytes(path)
    mend = "save the file as UTF-8"
    if content[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in content[:4]:
        at = 0 if content[0] > 0x7F else content.index(b"\0")
        raise Refusal(str(path), f"byte {at} is not UTF-8 text, it looks like UTF-16 or UTF-32", mend, DATA)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = f"byte {error.start} (0x{content[error.start]:02x}) is not UTF-8, perhaps the file is Latin-1"
        raise Refusal(str(path), what, mend, DATA) from error


def _require_columns(found: Iterable[object], path: Path) -> None:
    names = [str(name) for name in found]
    name, times = Counter(names).most_common(1)[0] if names else ("", 0)
    if times > 1:
        raise Refusal(str(path), f"column {name!r} stands {times} times in the header", "keep one of them", DATA)
    missing = [name for name in ("file_path", "text") if name not in names]
    if missing:
        what = f"no row has {' nor '.join(missing)}; columns found: {', '.join(map(repr, names[:20])) or 'none'}"
        raise Refusal(str(path), what, "name the columns file_path and text, separated by commas in a csv", DATA)


def _real(root: str, name: str) -> str:
    return os.path.realpath(name if name.startswith("/") else f"{root}/{name}")


def _require_inside(real: str, root: str, name: str, source: Path, row: int) -> None:
    if real != root and not real.startswith(root.rstrip("/") + "/"):
        what = f"{name!r} leads to {real!r}, outside of train_data_dir {root!r}"
        _refuse_row(source, row, "file_path", what, "move the file inside, or pass --allow_outside_data_dir")


def _links_in(directory: str) -> frozenset[str]:
    try:
        with os.scandir(directory) as entries:
            return frozenset(entry.name for entry in entries if entry.is_symlink())
    except (FileNotFoundError, NotADirectoryError):
        return frozenset()  # the files of it are missing, which the index will say of each
    except OSError:
        return _Everything()  # not listable: each name is resolved by itself


class _Everything(frozenset[str]):
    """A set that holds every name."""

    def __contains__(self, name: object) -> bool:
        return True


def _refuse_row(path: Path, row: int, key: str, what: str, mend: str) -> NoReturn:
    raise Refusal(f"{path} row {row}, key {key}", what, mend, DATA)


def _refuse_folder(error: OSError) -> NoReturn:
    raise Refusal(str(error.filename), f"cannot be listed ({error.strerror})", "check its permissions", FLAGS)


def _no_samples(path: Path) -> Refusal:
    return Refusal(str(path), "0 samples", "add one object or row per image or video", DATA)


def _json_name(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


_READERS: dict[str, Callable[[Path], Columns]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
