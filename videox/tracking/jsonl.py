"""Serves the run's records: JSON lines, appended so that a kill tears at most the last one, and read back."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from videox.errors import STORAGE, UserError


def json_line(record: Mapping[str, object]) -> bytes:
    """Returns one line of standard JSON, with its line break.

    Finite floats are written in the shortest form that reads back exactly. JSON has no NaN or infinity: such a number,
    at any depth, becomes null, and the key "non_finite": true is added.
    """
    found: list[float] = []
    clean = {name: _finite(value, found) for name, value in record.items()}
    if found:
        clean["non_finite"] = True
    return json.dumps(clean, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n"


def _finite(value: object, found: list[float]) -> object:
    if isinstance(value, (list, tuple)):
        return [_finite(item, found) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        found.append(value)
        return None
    return value


def append_line(path: Path, record: Mapping[str, object]) -> None:
    """Appends a record to a file of JSON lines by a single write, so that a kill leaves at most one torn line.

    What a failed write left behind is taken away again.

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
                while written < len(line):  # a nearly full disk takes a part, and refuses the rest
                    written += os.write(descriptor, line[written:])
            except OSError:
                os.ftruncate(descriptor, end)
                raise
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(
            str(path), f"cannot be written ({error.strerror})", "make room or rights there", STORAGE
        ) from error


def read_lines(path: Path) -> list[dict]:
    """Returns the records of a file of JSON lines in order; none if there is no file.

    A last line without its line break is what a kill tore off; it is left out.

    Raises:
        UserError: (exit code 5) for a whole line that is not a JSON object.
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


def drop_torn_line(path: Path) -> None:
    """Cuts off a last line without its line break, which a kill has torn. Raises OSError."""
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)
