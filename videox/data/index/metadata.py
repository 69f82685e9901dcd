"""Reading of metadata (json, jsonl, csv, parquet or a folder) into typed and checked columns, one entry per row.

An error of the whole file raises a UserError. An error of one row becomes that row's `problem`: the row keeps its
number and is reported as unusable. Light imports only, because the index reads metadata before torch is loaded.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from videox.data.index.captions import RowCaptions, clean_captions, pack_captions
from videox.data.index.columns import FIELDS, Columns, is_given
from videox.data.index.folders import ALL_FILES, FolderRules, read_folder
from videox.data.index.formats import READERS, Table, no_samples_error, raise_row_error
from videox.errors import UserError, plural

READER = 3  # increase it whenever the same metadata gives other rows than before: saved rows are then read again
KINDS = ("image", "video")
ROW_PROBLEMS = {
    "no_file_path": "the row has no file_path",
    "bad_file_path": "file_path is no text, or not UTF-8: rename the file",
    "no_text": "the row has no text",  # of indexes that an older version saved: now the caption is empty
    "bad_text": "text is neither a UTF-8 string nor a list of them",
}
# What tables and lists contain where a number or a type is not given, besides nothing at all.
_NOT_GIVEN = {"", "nan", "none", "null", "<na>"}
WINDOWS_DRIVE = re.compile(r"[a-z]:[\\/]", re.IGNORECASE)
MAX_WEIGHT = 10_000
_MAX_INT = 2**31 - 1  # sizes and frame counts are stored in 32 bits
# What FFmpeg interprets as a protocol instead of a file name. "-" means stdin; "-abc.mp4" is an ordinary file name.
_PROTOCOL = re.compile(
    r"[a-z][a-z0-9+.\-]*://|-$|(async|cache|concatf?|crypto|data|fd|file|ftp|gophers?|hls|https?|md5|mms[ht]|pipe|"
    r"rt[ms]?p[a-z]*|s?rtp|sctp|srt|subfile|tcp|tee|tls|udp|udplite|unix|zmq)[:,]",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Metadata:
    """The metadata in columns, one entry per row.

    Attributes:
        file_path: as written, relative to train_data_dir; a printable form of it where it is not usable.
        text: the captions as `pack_captions` stores them: a single one as it is, '' where the row has none.
        kind: "image", "video" or "" (decided by the file's content).
        width: in pixels, 0 = not given.
        height: in pixels, 0 = not given.
        num_frames: number of frames, 0 = not given.
        fps: in frames per second, 0.0 = not given.
        weight: how often the row occurs in an epoch, on average; 1.0 where not given.
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


def read_metadata(
    path: Path,
    data_dir: Path,
    *,
    allow_outside_data_dir: bool = False,
    allow_absolute: bool = False,
    rules: FolderRules = ALL_FILES,
) -> Metadata:
    """Read metadata into columns and check that every path is inside the data folder.

    Args:
        path: a .json (list of objects), .jsonl, .csv or .tsv (with header), or .parquet file, or a folder of clips.
        data_dir: the folder that file_path is relative to.
        allow_outside_data_dir: allow paths that leave data_dir (absolute, "..", symbolic links).
        allow_absolute: allow absolute paths outside of data_dir, for a list that no data folder is given for.
        rules: which files of a folder are read.

    Raises:
        UserError: exit code 2 for a file that is missing, unreadable or of an unknown type; 3 for its content.
    """
    if not stat.S_ISDIR(_stat_mode(data_dir)):
        raise UserError(str(data_dir), "is not a folder", "pass the folder of the media files as --train_data_dir")
    mode, suffix = _stat_mode(path), path.suffix.lower()
    if stat.S_ISDIR(mode) and suffix not in READERS:
        columns, notes = read_folder(path, data_dir, rules)
    else:
        columns, notes = _select_reader(path, mode, suffix)(path)
    if (note := _use_slashes(columns["file_path"], data_dir, path)) is not None:
        notes = [*notes, note]
    metadata = _to_metadata(columns, path, notes)
    unusable = ("no_file_path", "bad_file_path")
    paths = ["" if p in unusable else f for f, p in zip(metadata.file_path, metadata.problem, strict=True)]
    check_paths(paths, data_dir, path, allow_outside_data_dir=allow_outside_data_dir, allow_absolute=allow_absolute)
    return metadata


def check_paths(
    paths: Sequence[str],
    data_dir: Path,
    source: Path,
    *,
    allow_outside_data_dir: bool,
    allow_absolute: bool = False,
) -> None:
    """Raise for the first path that is not the name of a local file, or that leaves data_dir after resolving links.

    Each directory is resolved and listed only once, so that a million rows do not need a system call each.

    Args:
        paths: one per row; '' is skipped.
        data_dir: the folder that paths are relative to.
        source: the metadata file, for the message.
        allow_outside_data_dir: check only the names, not where they lead.
        allow_absolute: the same for absolute paths alone.

    Raises:
        UserError: exit code 3, with the row.
    """
    root = os.path.realpath(data_dir)
    links_of: dict[str, frozenset[str]] = {}
    for row, name in enumerate(paths):
        if (":" in name or "," in name or name == "-") and _PROTOCOL.match(name):
            hint = "use a path below --train_data_dir"
            raise_row_error(source, row, "file_path", f"{name!r} is not a local file", hint)
        if allow_outside_data_dir or not name or (allow_absolute and name.startswith("/")):
            continue
        directory, base = os.path.split(name)
        links = links_of.get(directory)
        if links is None:
            real = _resolve(root, directory)
            _require_inside(real, root, name, source, row)
            links = links_of[directory] = _links_in(real)
        if base in links or base in ("", ".", ".."):
            _require_inside(_resolve(root, name), root, name, source, row)


def _use_slashes(paths: list[Any], data_dir: Path, source: Path) -> str | None:
    """Write the backslashes of paths from Windows as slashes, in place; return a note if there are any.

    A file whose name really has a backslash keeps it.

    Raises:
        UserError: exit code 3 for a path on a drive of Windows.
    """
    rows = [row for row, value in enumerate(paths) if isinstance(value, str) and ("\\" in value or ":" in value)]
    changed = []
    for row in rows:
        name = paths[row]
        if WINDOWS_DRIVE.match(name):
            what = f"{name!r} is a path on a drive of Windows"
            raise_row_error(source, row, "file_path", what, "make the paths relative to --train_data_dir")
        if "\\" in name and "\0" not in name and not os.path.lexists(os.path.join(data_dir, name)):  # noqa: PTH118
            paths[row] = name.replace("\\", "/")
            changed.append((row, name))
    if not changed:
        return None
    return f"{len(changed)} {plural(len(changed), 'row')}: \\ in file_path is read as / (first: row {changed[0][0]}, {changed[0][1]!r})"


def _to_metadata(columns: Columns, path: Path, notes: list[str]) -> Metadata:
    """Convert raw columns to typed ones; a wrong value in one row becomes that row's problem."""
    rows = len(columns["file_path"])
    if rows == 0:
        raise no_samples_error(path)
    empty: list[Any] = [None] * rows
    raw = {name: columns.get(name, empty) for name in FIELDS}
    captions = [_captions(value) for value in raw["text"]]
    problem = [
        _path_problem(name) or ("bad_text" if row is None else "")
        for name, row in zip(raw["file_path"], captions, strict=True)
    ]
    unusable = ("no_file_path", "bad_file_path")
    kind = [_kind(value, row, path) for row, value in enumerate(raw["type"])]
    numbers: dict[str, Any] = {
        name: [_positive_int(v) for v in raw[name]] for name in ("width", "height", "num_frames")
    }
    numbers["fps"] = [_positive_float(value) for value in raw["fps"]]
    number_notes = [_note_on_bad_numbers(name, raw[name], parsed, kind) for name, parsed in numbers.items()]
    return Metadata(
        file_path=[_printable(v) if p in unusable else v for v, p in zip(raw["file_path"], problem, strict=True)],
        text=[pack_captions(row or RowCaptions()) for row in captions],
        kind=kind,
        weight=[_weight(value, row, path) for row, value in enumerate(raw["weight"])],
        problem=problem,
        source=path,
        notes=[*notes, *(note for note in number_notes if note)],
        **numbers,
    )


def _note_on_bad_numbers(name: str, raw: Sequence[Any], parsed: Sequence[float], kind: Sequence[str]) -> str:
    """Return a note about the values of a column that are given and invalid, "" if there are none.

    Images may state 0 frames and 0 fps. NaN is how tables store a missing value, so it is not reported.
    """
    only_for_videos = name in ("num_frames", "fps")
    bad = [
        row
        for row, (value, number) in enumerate(zip(raw, parsed, strict=True))
        if not number and not _is_missing(value) and not (only_for_videos and kind[row] == "image")
    ]
    if not bad:
        return ""
    expected = "a positive number" if name == "fps" else "an integer above 0"
    first = f"first: row {bad[0]}, {ascii(raw[bad[0]])[:40]}"
    return f"{len(bad)} {plural(len(bad), 'row')}: {name} is not {expected} and is ignored ({first})"


def _is_missing(value: object) -> bool:
    """Return whether a cell that holds no free text is not given."""
    return not is_given(value) or (isinstance(value, str) and value.strip().lower() in _NOT_GIVEN)


def _path_problem(value: object) -> str:
    if not is_given(value):
        return "no_file_path"
    usable = isinstance(value, str) and "\0" not in value and _replace_surrogates(value) == value
    return "" if usable else "bad_file_path"


def _captions(value: object) -> RowCaptions | None:
    """Return the captions that a cell holds, ("",) if it holds none; None if it is not text."""
    if not is_given(value):
        return RowCaptions()
    if isinstance(value, str):
        return RowCaptions((_replace_surrogates(value),))
    if not isinstance(value, list):
        return None
    items = [item for item in value if is_given(item)]
    if not all(isinstance(item, str) for item in items):
        return None
    return clean_captions([_replace_surrogates(item) for item in items])


def _printable(value: object) -> str:
    return "" if value is None else ascii(value)[:200]


def _replace_surrogates(text: str) -> str:
    """Replace lone surrogates, which no file and no tokenizer can store, by U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _kind(value: object, row: int, path: Path) -> str:
    if _is_missing(value):
        return ""
    kind = value.strip().lower() if isinstance(value, str) else value
    if kind not in KINDS:
        raise_row_error(path, row, "type", f"{value!r} is unknown", f"use one of {', '.join(KINDS)}, or leave it out")
    return str(kind)


def _positive_float(value: object) -> float:
    """Parse a number or a string; 0.0 for everything that is not a positive finite number."""
    if value is None or isinstance(value, bool) or not isinstance(value, int | float | str):
        return 0.0
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return 0.0
    return number if 0.0 < number < float("inf") else 0.0


def _weight(value: object, row: int, path: Path) -> float:
    if _is_missing(value):
        return 1.0
    # 0 is a legal weight: the row is never used. Everything that is not a number becomes -1, which is rejected.
    weight = 0.0 if _is_zero(value) else _positive_float(value) or -1.0
    if not 0 <= weight <= MAX_WEIGHT:
        what = f"{value!r} is not a number from 0 to {MAX_WEIGHT}"
        raise_row_error(path, row, "weight", what, "set how often the row occurs in an epoch (1 = once)")
    return weight


def _is_zero(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return False
    try:
        return float(value) == 0
    except (ValueError, OverflowError):
        return False


def _positive_int(value: object) -> int:
    number = _positive_float(value)
    return int(number) if number <= _MAX_INT and number == int(number) else 0


def _stat_mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except FileNotFoundError as error:
        raise UserError(str(path), "there is no such file or folder", "correct the path") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(str(path), f"cannot be opened ({reason})", "correct the path or its permissions") from error


def _select_reader(path: Path, mode: int, suffix: str) -> Callable[[Path], Table]:
    if suffix not in READERS:
        known = ", ".join(READERS)
        raise UserError(str(path), f"unknown suffix {suffix!r}", f"use one of {known}, or a folder of x.mp4 + x.txt")
    if not stat.S_ISREG(mode):
        what = "is a folder with the suffix of a file" if stat.S_ISDIR(mode) else "is not a regular file"
        raise UserError(str(path), what, "pass the metadata file")
    return READERS[suffix]


def _resolve(root: str, name: str) -> str:
    return os.path.realpath(name if name.startswith("/") else f"{root}/{name}")


def _require_inside(real: str, root: str, name: str, source: Path, row: int) -> None:
    if real != root and not real.startswith(root.rstrip("/") + "/"):
        what = f"{name!r} leads to {real!r}, outside of train_data_dir {root!r}"
        raise_row_error(source, row, "file_path", what, "move the file inside, or pass --allow_outside_data_dir")


def _links_in(directory: str) -> frozenset[str]:
    try:
        with os.scandir(directory) as entries:
            return frozenset(entry.name for entry in entries if entry.is_symlink())
    except (FileNotFoundError, NotADirectoryError):
        return frozenset()  # its files are missing, which the index reports for each of them
    except OSError:
        return _AllNames()  # not listable: each name is resolved separately


class _AllNames(frozenset[str]):
    """A set that contains every name."""

    def __contains__(self, name: object) -> bool:
        return True
