"""JSON Lines files: append records so that a killed process truncates at most the last line, and read them back."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from videox.errors import STORAGE, UserError


def json_line(record: Mapping[str, object]) -> bytes:
    """Return a record as one line of standard JSON, line break included.

    Finite floats are written in the shortest form that reads back exactly. JSON has no NaN or infinity: such a number
    becomes null at any depth of nesting, and the key "non_finite": true is added.
    """
    non_finite: list[float] = []
    cleaned = {name: _null_non_finite(value, non_finite) for name, value in record.items()}
    if non_finite:
        cleaned["non_finite"] = True
    return json.dumps(cleaned, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n"


def _null_non_finite(value: object, non_finite: list[float]) -> object:
    """Return a value with None for every NaN or infinity, which are appended to `non_finite`."""
    if isinstance(value, (list, tuple)):
        return [_null_non_finite(item, non_finite) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        non_finite.append(value)
        return None
    return value


def append_line(path: Path, record: Mapping[str, object]) -> None:
    """Append a record to a JSON Lines file by a single write, so that a kill leaves at most one truncated line.

    If the write fails, the file is cut back to its previous length.

    Raises:
        UserError: (exit code 5) if the file cannot be written, e.g. because the disk is full.
    """
    line = json_line(record)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            end = os.fstat(descriptor).st_size
            try:
                written = os.write(descriptor, line)
                while written < len(line):  # a nearly full disk accepts part of the line; the next write then fails
                    written += os.write(descriptor, line[written:])
            except OSError:
                os.ftruncate(descriptor, end)
                raise
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(
            str(path), f"cannot be written ({error.strerror})", "free disk space or fix the permissions", STORAGE
        ) from error


def read_lines(path: Path) -> list[dict]:
    """Return the records of a JSON Lines file in order; an empty list if there is no file.

    A last line without a line break was truncated by a kill and is ignored.

    Raises:
        UserError: (exit code 5) for a complete line that is not a JSON object.
    """
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise UserError(
                f"{path}:{number}", "is not a JSON object", "remove the broken line or move the file", STORAGE
            )
        records.append(record)
    return records


def drop_truncated_line(path: Path) -> None:
    """Remove a last line without a line break, which was truncated by a kill. Raises OSError."""
    if path.exists():
        content = path.read_bytes()
        complete = content.rfind(b"\n") + 1
        if complete < len(content):
            os.truncate(path, complete)
