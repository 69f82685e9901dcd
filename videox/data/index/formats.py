"""Readers of metadata files: json, jsonl, csv or parquet, each read into raw columns.

Every error of a file names its position (line and column, or row and key).
"""

from __future__ import annotations

import ast
import codecs
import csv
import io
import json
import re
import tokenize
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from videox.data.index.columns import Columns, column_notes, field_of, find_columns, merge_columns
from videox.errors import DATA, UserError

_REPEATED = 0  # a key that no JSON object can have: marks an object that contains a column of a field twice
_CONSTANT = re.compile(r'"(?:[^"\\]|\\.)*"|-?Infinity', re.DOTALL)
_SPACE = re.compile(r"[ \t\r\n]*")  # what JSON allows between two values
_SEPARATORS = (",", ";", "\t")
_HEADER = 65536  # characters of a csv in which its header line is searched
# A cell of a csv that may hold a list of captions.
_LIST_BEGINS = re.compile(r"\[\s*(['\"\]]|None\b|null\b|nan\b)")
_NONE = ("None", "nan")
_LAYOUT = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
# Byte order marks and their encodings. UTF-32's begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

Table = tuple[Columns, list[str]]  # columns by field, and notes for the start report


class _NotANumber(Exception):
    """Infinity in a JSON text; Python's JSON reader accepts it and reports no position for it."""


def _read_json(path: Path) -> Table:
    """Read a list of objects, or objects one after another (one per line, usually), whatever the suffix says."""
    values = _parse_json(_read_text(path), path)
    if len(values) > 1 or (isinstance(values[0], dict) and any(map(field_of, values[0]))):
        return _to_columns(values, path)
    if not isinstance(values[0], list):
        what = f"the top level is {_json_type(values[0])}"
        raise UserError(f"{path} 1:1", what, "make it a list of objects, or write one object per line", DATA)
    return _to_columns(values[0], path)


def _parse_json(text: str, path: Path) -> list[Any]:
    """Return the JSON values of a text, one or more, with white space between them."""
    if not text.strip():
        raise no_samples_error(path)
    decoder = json.JSONDecoder(parse_constant=_parse_constant, object_pairs_hook=_build_object)
    values, at = [], _end_of_space(text, 0)
    try:
        while at < len(text):
            value, end = decoder.raw_decode(text, at)
            values.append(value)
            at = _end_of_space(text, end)
        return values
    except json.JSONDecodeError as error:
        where, what = f"{path} {error.lineno}:{error.colno}", f"not valid JSON ({error.msg})"
    except _NotANumber as error:
        # The reader gave no position: search for the first such constant outside of strings.
        start = next(match.start() for match in _CONSTANT.finditer(text, at) if not match[0].startswith('"'))
        line = text.count(chr(10), 0, start) + 1
        where = f"{path} {line}:{start - text.rfind(chr(10), 0, start)}"
        what = f"not valid JSON ({error})"
    except RecursionError:
        where, what = f"{path} {_line_of(text, at)}:1", "not readable JSON (nested too deeply)"
    except ValueError:  # the only other cause: Python's limit on the number of digits of an integer
        where, what = f"{path} {_line_of(text, at)}:1", "not readable JSON (a number with thousands of digits)"
    raise UserError(where, what, "correct the file at this position", DATA)


def _end_of_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _line_of(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def _build_object(pairs: list[tuple[str, Any]]) -> dict[Any, Any]:
    built: dict[Any, Any] = dict(pairs)
    if len(built) != len(pairs):
        keys = [key for key, _ in pairs]
        repeated = [name for name in built if field_of(name) is not None and keys.count(name) > 1]
        if repeated:
            built[_REPEATED] = repeated[0]
    return built


def _parse_constant(name: str) -> float:
    if name == "NaN":  # how pandas writes a missing value
        return float("nan")
    raise _NotANumber(f"{name} is not a JSON value, null is")


def _to_columns(rows: Sequence[object], path: Path) -> Table:
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
    columns = find_columns(names, path)
    values = {name: [fields.get(name) for fields in objects] for known in columns.values() for name in known}
    return merge_columns(columns, values, path), column_notes(columns)


def _read_csv(path: Path) -> Table:
    """Read a csv file with a header line; a cell that holds a list of strings becomes that list."""
    columns, values = _read_csv_cells(path)
    for name in columns["text"]:
        values[name] = [_parse_list(value) for value in values[name]]
    return merge_columns(columns, values, path), column_notes(columns)


def _parse_list(cell: str) -> str | list[str | None]:
    """Return the list of strings that a cell holds as JSON, Python or numpy write it; any other cell unchanged."""
    text = cell.strip()
    if not (_LIST_BEGINS.match(text) and text.endswith("]")):
        return cell
    try:
        items = json.loads(text)
    except (ValueError, RecursionError):
        items = _strings_of_python(text)
    if isinstance(items, list) and all(item is None or isinstance(item, str) for item in items):
        return items
    return cell


def _strings_of_python(text: str) -> list[Any] | None:
    """Return the strings of a list in Python's notation, with commas or, as numpy writes it, without; else None.

    Python itself would join strings without a comma between them to one.
    """
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
        values = [None if token.string in _NONE else token for token in tokens[1:]]
        signs = [token.string for token in values if token is not None and token.type == tokenize.OP]
        if signs.count("]") != 1 or not set(signs) <= {",", "]"}:
            return None
        known = (tokenize.OP, tokenize.STRING, *_LAYOUT)
        if any(token is not None and token.type not in known for token in values):
            return None
        kept = [token for token in values if token is None or token.type == tokenize.STRING]
        return [None if token is None else ast.literal_eval(token.string) for token in kept]
    except (ValueError, SyntaxError, tokenize.TokenError):
        return None


def _csv_reader(text: str) -> Any:  # noqa: ANN401 - the csv module names no type
    """Return a csv reader of a text.

    Cells are separated by commas; by semicolons or tabs if only these give a header with a known column.
    """
    first = next((line for line in re.findall(r"[^\r\n]+", text[:_HEADER]) if not line.lower().startswith("sep=")), "")
    columns = {sign: next(csv.reader([first], delimiter=sign), []) for sign in _SEPARATORS}
    known = [sign for sign, names in columns.items() if any(map(field_of, names))]
    # strict: without it, an unclosed quote would turn the rest of the file into one caption.
    return csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=known[0] if known else ",")


def _read_csv_cells(path: Path) -> tuple[dict[str, list[str]], dict[str, list[Any]]]:
    """Return the columns of each field, as `find_columns` does, and the cells of each of these columns."""
    text = _read_text(path)
    # Captions may be longer than the csv module's default limit of 128 KiB.
    default_limit = csv.field_size_limit(max(len(text), 131072))
    reader = _csv_reader(text)
    try:
        # Empty lines, and the line "sep=;" that Excel writes, may precede the header.
        header = next((row for row in reader if row and not row[0].lower().startswith("sep=")), None)
        if header is None:
            raise no_samples_error(path)
        columns = find_columns(header, path)
        cells: dict[str, list[Any]] = {name: [] for known in columns.values() for name in known}
        positions = [(cells[name], header.index(name)) for name in cells]
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
    return columns, cells


def _read_parquet(path: Path) -> Table:
    try:
        with pq.ParquetFile(path) as file:
            columns = find_columns(file.schema_arrow.names, path)
            wanted = [name for known in columns.values() for name in known]
            table = file.read(columns=wanted)
            values = {name: _python_values(table.column(name)) for name in wanted}
            return merge_columns(columns, values, path), column_notes(columns)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(str(path), f"not readable as parquet ({reason})", "write the file again", DATA) from error


def _python_values(column: pa.ChunkedArray) -> list[Any]:
    """Convert an Arrow column to Python values; values of a type that no field can have become b''."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    if pa.types.is_decimal(kind):
        return column.cast(pa.float64()).to_pylist()
    if _is_text(kind) or is_number or pa.types.is_null(kind) or _is_list_of_text(kind):
        return column.to_pylist()
    return [None if null else b"" for null in column.is_null().to_pylist()]


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_list_of_text(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not (is_list or pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind)):
        return False
    item = kind.value_type
    return _is_text(item.value_type if pa.types.is_dictionary(item) else item)


def encoding_of(content: bytes) -> str:
    """Return the encoding that the byte order mark at the beginning states; UTF-8 without one."""
    return next((encoding for mark, encoding in _MARKS.items() if content.startswith(mark)), "utf-8")


def read_bytes(path: Path) -> bytes:
    """Return the content of a file.

    Raises:
        UserError: exit code 2 for a file that cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            str(path), f"cannot be read ({error.strerror})", "check its permissions and its disk"
        ) from error


def _read_text(path: Path) -> str:
    content = read_bytes(path)
    encoding = encoding_of(content)
    hint = "save the file as UTF-8"
    if encoding.startswith("utf-8") and b"\0" in content[:4]:
        at = content.index(b"\0")
        raise UserError(str(path), f"byte {at} is not UTF-8 text, the file seems to be UTF-16 or UTF-32", hint, DATA)
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        what = f"byte {error.start} (0x{content[error.start]:02x}) is not {encoding.upper().removesuffix('-SIG')}"
        guess = ", the file may be Latin-1" if encoding == "utf-8" else ""
        raise UserError(str(path), what + guess, hint, DATA) from error


def raise_row_error(path: Path, row: int, key: str, what: str, hint: str) -> NoReturn:
    """Raise the UserError (exit code 3) of one row (0-based) and one of its keys."""
    raise UserError(f"{path} row {row}, key {key}", what, hint, DATA)


def no_samples_error(path: Path) -> UserError:
    """Return the UserError (exit code 3) of metadata without any row."""
    return UserError(str(path), "0 samples", "add one object or row per image or video", DATA)


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


READERS: dict[str, Callable[[Path], Table]] = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".tsv": _read_csv,
}
