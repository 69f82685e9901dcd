"""Serves the user's list of samples: json, jsonl, csv, parquet or a folder becomes columns, and every fault is named.

A fault of the whole file stops the run with a UserError; a fault of one row becomes that row's `problem`, so that the
row keeps its number and has one fate in the ledger. Light imports only: the index reads this before torch is loaded.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from videox.data.index.formats import FIELDS, READERS, Columns, no_samples, read_folder, refuse_row
from videox.errors import UserError

KINDS = ("image", "video")
ROW_PROBLEMS = {
    "no_file_path": "the row has no file_path",
    "bad_file_path": "file_path is not a usable string",
    "no_text": "the row has no text",
    "bad_text": "text is not a UTF-8 string",
}
LARGEST_WEIGHT = 10_000
_LARGEST = 2**31 - 1  # sizes and frame counts are kept in 32 bits
# What FFmpeg takes for a protocol instead of a file name. "-" means stdin; "-abc.mp4" is a fine file name.
_PROTOCOL = re.compile(
    r"[a-z][a-z0-9+.\-]*://|-$|(async|cache|concatf?|crypto|data|fd|file|ftp|gophers?|hls|https?|md5|mms[ht]|pipe|"
    r"rt[ms]?p[a-z]*|s?rtp|sctp|srt|subfile|tcp|tee|tls|udp|udplite|unix|zmq)[:,]",
    re.IGNORECASE,
)


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
        weight: how often the row occurs in an epoch, on the mean; 1.0 = not given.
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
    weight: list[float]
    problem: list[str]
    source: Path
    notes: list[str] = field(default_factory=list)


def read_metadata(path: Path, data_dir: Path, *, allow_outside_data_dir: bool = False) -> Metadata:
    """Reads metadata into columns and confines every path to the data folder.

    Args:
        path: a .json (list of objects), .jsonl, .csv (with header) or .parquet file, or a folder of x.mp4 + x.txt.
        data_dir: the folder that file_path is relative to.
        allow_outside_data_dir: lets a path leave data_dir (absolute, "..", symbolic links).

    Raises:
        UserError: exit code 2 for a file that is missing, unreadable or of an unknown kind; 3 for its content.
    """
    if not stat.S_ISDIR(_mode(data_dir)):
        raise UserError(str(data_dir), "is not a folder", "give the folder of the media as train_data_dir")
    notes: list[str] = []
    mode, suffix = _mode(path), path.suffix.lower()
    if stat.S_ISDIR(mode) and suffix not in READERS:
        columns, notes = read_folder(path, data_dir)
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
        UserError: exit code 3, with the row.
    """
    root = os.path.realpath(data_dir)
    links_of: dict[str, frozenset[str]] = {}
    for row, name in enumerate(paths):
        if (":" in name or "," in name or name == "-") and _PROTOCOL.match(name):
            refuse_row(source, row, "file_path", f"{name!r} is not a local file", "give a path below train_data_dir")
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


def _clean(columns: Columns, path: Path, notes: list[str]) -> Metadata:
    """Turns raw columns into typed ones; a value that one row got wrong becomes that row's problem."""
    rows = len(columns["file_path"])
    if rows == 0:
        raise no_samples(path)
    empty: list[Any] = [None] * rows
    raw = {name: columns.get(name, empty) for name in FIELDS}
    problem = [_path_problem(p) or _text_problem(t) for p, t in zip(raw["file_path"], raw["text"], strict=True)]
    bad = ("no_file_path", "bad_file_path")
    kind = [_kind(value, row, path) for row, value in enumerate(raw["type"])]
    numbers: dict[str, Any] = {name: [_whole(v) for v in raw[name]] for name in ("width", "height", "num_frames")}
    numbers["fps"] = [_positive(value) for value in raw["fps"]]
    bad_values = [_bad_values(name, raw[name], read, kind) for name, read in numbers.items()]
    return Metadata(
        file_path=[_printable(v) if p in bad else v for v, p in zip(raw["file_path"], problem, strict=True)],
        text=[_valid(value) if isinstance(value, str) else "" for value in raw["text"]],
        kind=kind,
        weight=[_weight(value, row, path) for row, value in enumerate(raw["weight"])],
        problem=problem,
        source=path,
        notes=[*notes, *(note for note in bad_values if note)],
        **numbers,
    )


def _bad_values(name: str, raw: Sequence[Any], read: Sequence[float], kind: Sequence[str]) -> str:
    """Returns a sentence about the values of a column that are given and cannot be, "" where there are none.

    Images may say that they have 0 frames and a rate of 0. NaN is what tables hold in place of nothing.
    """
    timed = name in ("num_frames", "fps")
    bad = [
        row
        for row, (value, number) in enumerate(zip(raw, read, strict=True))
        if not number and value is not None and value != "" and value == value and not (timed and kind[row] == "image")
    ]
    if not bad:
        return ""
    wanted = "positive number" if name == "fps" else "whole number above 0"
    first = f"first: row {bad[0]}, {ascii(raw[bad[0]])[:40]}"
    return f"{len(bad)} rows: {name} is no {wanted} and counts as not given ({first})"


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
        refuse_row(path, row, "type", f"{value!r} is unknown", f"use one of {', '.join(KINDS)}, or leave it out")
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


def _weight(value: object, row: int, path: Path) -> float:
    if value is None or value == "":
        return 1.0
    weight = 0.0 if value in (0, "0") and not isinstance(value, bool) else _positive(value) or -1.0
    if not 0 <= weight <= LARGEST_WEIGHT:
        refuse_row(path, row, "weight", f"{value!r} is no number from 0 to {LARGEST_WEIGHT}", "1 is once in an epoch")
    return weight


def _whole(value: object) -> int:
    number = _positive(value)
    return int(number) if number <= _LARGEST and number == int(number) else 0


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except FileNotFoundError as error:
        raise UserError(str(path), "there is no such file or folder", "correct the path") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(str(path), f"cannot be opened ({reason})", "correct the path or its permissions") from error


def _reader_of(path: Path, mode: int, suffix: str) -> Callable[[Path], Columns]:
    if suffix not in READERS:
        known = ", ".join(READERS)
        raise UserError(str(path), f"unknown suffix {suffix!r}", f"use one of {known}, or a folder of x.mp4 + x.txt")
    if not stat.S_ISREG(mode):
        what = "is a folder with the name of a file" if stat.S_ISDIR(mode) else "is not a regular file"
        raise UserError(str(path), what, "give the metadata file")
    return READERS[suffix]


def _real(root: str, name: str) -> str:
    return os.path.realpath(name if name.startswith("/") else f"{root}/{name}")


def _require_inside(real: str, root: str, name: str, source: Path, row: int) -> None:
    if real != root and not real.startswith(root.rstrip("/") + "/"):
        what = f"{name!r} leads to {real!r}, outside of train_data_dir {root!r}"
        refuse_row(source, row, "file_path", what, "move the file inside, or pass --allow_outside_data_dir")


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
