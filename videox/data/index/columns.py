"""Columns of a list by the names that others use: which column holds which field, and one value per field and row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from videox.errors import DATA, UserError

FIELDS = ("file_path", "text", "type", "width", "height", "num_frames", "fps", "weight")
# Names of a field's column in the lists of other tools, our own name first.
ALIASES = {
    "file_path": (
        "file_path", "path", "file_name", "video", "video_path", "image", "image_path", "media_path",
    ),
    "text": ("text", "caption", "prompt"),
}  # fmt: skip
_FIELD_OF = {name: name for name in FIELDS} | {alias: name for name, known in ALIASES.items() for alias in known}

Columns = dict[str, list[Any]]


def field_of(column: object) -> str | None:
    """Return the field that a column holds, None for one that is ignored; case and outer white space do not count."""
    return _FIELD_OF.get(column.strip().lower()) if isinstance(column, str) else None


def find_columns(found: Iterable[object], path: Path) -> dict[str, list[str]]:
    """Return the columns of each field that a list has, in the order of the list.

    Args:
        found: names of all columns.
        path: the list, for messages.

    Raises:
        UserError: exit code 3 if a column occurs twice, or no column holds the file path or the caption.
    """
    names = [str(name) for name in found]
    # Empty names are not counted: many exporters end each line with a comma.
    name, count = Counter(filter(None, names)).most_common(1)[0] if any(names) else ("", 0)
    if count > 1:
        raise UserError(str(path), f"column {name!r} occurs {count} times in the header", "remove all but one", DATA)
    columns: dict[str, list[str]] = {}
    for name in names:
        if (known := field_of(name)) is not None:
            columns.setdefault(known, []).append(name)
    missing = [name for name in ALIASES if name not in columns]
    if missing:
        what = f"no row has {' nor '.join(missing)}; columns found: {', '.join(map(repr, names[:20])) or 'none'}"
        known = " and ".join(" or ".join(ALIASES[name]) for name in missing)
        hint = f"name the columns {known}; in a csv, separate them by commas, semicolons or tabs"
        raise UserError(str(path), what, hint, DATA)
    return columns


def merge_columns(columns: Mapping[str, Sequence[str]], values: Mapping[str, list[Any]], path: Path) -> Columns:
    """Return one list of values per field; if several columns hold it, each row uses the one that it has a value in.

    Args:
        columns: of `find_columns`.
        values: by name of the column, equally long lists.
        path: the list, for messages.

    Raises:
        UserError: exit code 3 for a row with different values in two columns of one field.
    """
    return {name: _merge(name, [(each, values[each]) for each in names], path) for name, names in columns.items()}


def column_notes(columns: Mapping[str, Sequence[str]]) -> list[str]:
    """Return a sentence on the columns that do not have our own names; none if all have."""
    renamed = [
        f"{name} from {' or '.join(map(repr, names))}" for name, names in columns.items() if list(names) != [name]
    ]
    return [f"columns by other names: {', '.join(renamed)}"] if renamed else []


def is_given(value: object) -> bool:
    """Return whether a cell has a value: None, an empty string and NaN, as tables store a missing one, are none."""
    return value is not None and value != "" and value == value


def _merge(name: str, columns: Sequence[tuple[str, list[Any]]], path: Path) -> list[Any]:
    (first, merged), *others = columns
    for column, values in others:
        origin = merged
        merged = []
        for row, (before, value) in enumerate(zip(origin, values, strict=True)):
            if is_given(before) and is_given(value) and before != value:
                where = f"{path} row {row}, columns {first!r} and {column!r}"
                what = f"both state the {name}, as {_shorten(before)} and {_shorten(value)}"
                raise UserError(where, what, "remove one of the two columns, or rename it", DATA)
            merged.append(before if is_given(before) else value)
    return merged


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
