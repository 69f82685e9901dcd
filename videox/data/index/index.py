"""Serves the plan: size, frames and rate of every file, looked at once and kept in columns beside the metadata.

A second start maps the saved columns, asks the file system for sizes and times, and looks again only at what changed.
Files are looked at in child processes that a kernel timer ends, since a decoder may hang or crash in native code. They
are plain children and not a multiprocessing pool, because such a pool would run the calling script's imports (torch,
diffusers) in each child and again after each crash. Light imports only.
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from videox.data.index.formats import folder_listing
from videox.data.index.metadata import confine, read_metadata
from videox.data.index.probe import DEADLINE
from videox.data.index.scan import Files, contradictions, look, rows_of_metadata, rows_of_saved, size_and_time
from videox.data.index.table import (
    FINGERPRINTED,
    IMAGE,
    MEASURED,
    VERSION,
    VIDEO,
    WEIGHT,
    class_array,
    fingerprint_of,
    header_of,
    load_table,
    names_of,
    repeated_string,
    string_array,
    usable_of,
    write_table,
)
from videox.errors import STORAGE, UserError

_SETTLED_NS = 2_000_000_000  # a file this young may change again without a new modification time


@dataclass(frozen=True, eq=False)
class Index:
    """The columns, one entry per metadata row; memory-mapped and read-only where they come from a saved index.

    Attributes:
        data_dir: the folder that file_path is relative to.
        file_path: strings (Arrow).
        text: the captions (Arrow).
        kind: uint8, 0 image, 1 video.
        width: int32, pixels, upright.
        height: int32, pixels, upright.
        frames: int32, frames of the file (1 for an image).
        fps: float32, frames per second (0 for an image).
        file_size: int64, bytes when looked at; -1 for a file that was not looked at.
        mtime_ns: int64, modification time when looked at.
        usable: bool, False where the row has a problem.
        problem: Arrow dictionary of strings: "", a key of ROW_PROBLEMS, a class of BadMedia, "timeout" or "crashed".
        detail: strings (Arrow), one line about the problem.
        weight: float32, how often a row occurs in an epoch, on the mean; 1 where metadata does not say it.
        notes: sentences for the start report.
        stored: (path, fingerprint) of the saved index, None for one made by `from_columns`.
    """

    data_dir: Path
    file_path: pa.LargeStringArray
    text: pa.LargeStringArray
    kind: np.ndarray
    width: np.ndarray
    height: np.ndarray
    frames: np.ndarray
    fps: np.ndarray
    file_size: np.ndarray
    mtime_ns: np.ndarray
    usable: np.ndarray
    problem: pa.DictionaryArray
    detail: pa.LargeStringArray
    weight: np.ndarray
    notes: tuple[str, ...] = ()
    stored: tuple[Path, str] | None = None

    def __len__(self) -> int:
        return len(self.kind)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles a saved index as its path, so that a worker maps the same pages instead of copying them."""
        if self.stored is not None:
            return _reopen, (self.stored[0], self.data_dir, self.stored[1])
        return Index, tuple(getattr(self, field.name) for field in fields(self))

    def file(self, row: int) -> Path:
        """Returns the path of a row's file."""
        return self.data_dir / self.file_path[int(row)].as_py()

    def caption(self, row: int) -> str:
        """Returns a row's caption."""
        return str(self.text[int(row)].as_py())

    def problems(self) -> list[tuple[int, str, str, str]]:
        """Returns (row, file_path, class, detail) of every row that cannot be used, by row."""
        rows = np.flatnonzero(~self.usable)
        columns = (column.take(pa.array(rows)).to_pylist() for column in (self.file_path, self.problem, self.detail))
        return list(zip(rows.tolist(), *columns, strict=True))

    def fingerprint(self) -> str:
        """Returns sha256 (hex) over file_path, text, kind, width, height, frames and usable: what a plan depends on.

        Times are left out, so that a copied or touched data set still fits its checkpoints.
        """
        if self.stored is not None:
            return self.stored[1]
        return fingerprint_of(pa.table({name: getattr(self, name) for name in (*FINGERPRINTED, "problem")}))

    def names(self) -> str:
        """Returns sha256 (hex) over file_path and text alone: the same rows, whatever has become of their files."""
        return str(names_of(pa.table({name: getattr(self, name) for name in ("file_path", "text")})).hexdigest())

    @classmethod
    def from_columns(
        cls,
        *,
        kind: np.ndarray,
        width: np.ndarray,
        height: np.ndarray,
        frames: np.ndarray,
        fps: np.ndarray | None = None,
        usable: np.ndarray | None = None,
        weight: np.ndarray | None = None,
        file_path: list[str] | None = None,
        text: list[str] | None = None,
        data_dir: Path = Path(),
    ) -> Index:
        """Makes an index in memory, for planning sizes that no files stand behind.

        Args:
            kind: 0 image, 1 video, one per row.
            width: pixels.
            height: pixels.
            frames: frames of the file.
            fps: frames per second; 0 where left out.
            weight: 1 where left out.
            usable: all where left out; other rows get the problem "missing".
            file_path: the row number where left out.
            text: '' where left out.
            data_dir: the folder that file_path is relative to.
        """
        rows = len(kind)
        good = np.ones(rows, bool) if usable is None else np.asarray(usable, bool)
        given = {"kind": kind, "width": width, "height": height, "frames": frames}
        given["fps"] = np.zeros(rows) if fps is None else fps
        given["file_size"] = given["mtime_ns"] = np.full(rows, -1)
        paths = pa.array(np.arange(rows)).cast(pa.large_string()) if file_path is None else string_array(file_path)
        texts = repeated_string("", rows) if text is None else string_array(text)
        numbers: dict[str, Any] = {name: np.asarray(given[name]).astype(dtype) for name, dtype in MEASURED.items()}
        return cls(
            data_dir=data_dir,
            file_path=paths,
            text=texts,
            **numbers,
            usable=good,
            problem=class_array(pa.array(np.where(good, "", "missing"))),
            detail=repeated_string("", rows),
            weight=np.ones(rows, np.float32) if weight is None else np.asarray(weight, np.float32),
        )


def build_index(
    metadata_path: Path,
    data_dir: Path,
    index_path: Path,
    *,
    allow_outside_data_dir: bool,
    workers: int,
    progress: bool,
    trust_metadata: bool = False,
    deadline: float = DEADLINE,
    announce: Callable[[int, float], None] | None = None,
) -> Index:
    """Returns the index of the metadata, from index_path as far as that still holds, and saves what is new.

    Args:
        metadata_path: what `read_metadata` takes.
        data_dir: the folder that file_path is relative to.
        index_path: where the index is kept (an Arrow file, replaced as a whole); its folder must be writable.
        allow_outside_data_dir: lets a path leave data_dir.
        workers: child processes that look at files; at least 1 is used.
        progress: shows a bar on stderr.
        trust_metadata: takes the word of rows that give type, width and height (and num_frames and fps for videos)
            without a look at their files, for a dry run; a later build without it looks at them.
        deadline: seconds that one file may take before it becomes a "timeout".
        announce: told, where files are looked at, how many they are and how many seconds that should take.

    Raises:
        UserError: as `read_metadata`; exit code 3 where not one file is there, 5 where the index cannot be written.
    """
    options = {"data_dir": os.path.realpath(data_dir), "allow_outside_data_dir": allow_outside_data_dir}
    saved = load_table(index_path)
    header = {} if saved is None else header_of(saved)
    known = (
        header.get("version") == VERSION
        and header.get("options") == options
        and _is_same(header["stamp"], metadata_path)
    )
    if saved is not None and known:
        rows = rows_of_saved(saved)
    else:
        # The stamp is taken before reading: a change meanwhile is then found by the next start.
        header = {"version": VERSION, "options": options, "stamp": _stamp(metadata_path, with_bytes=True)}
        metadata = read_metadata(metadata_path, data_dir, allow_outside_data_dir=allow_outside_data_dir)
        header["from_metadata"], rows = metadata.notes, rows_of_metadata(metadata)
        del metadata  # as Python objects, a million rows are much larger than as columns
    partial = index_path.with_name(f"{index_path.name}.partial")
    files = Files(rows, data_dir, saved if known else None)
    files.survey([table for table in (saved, load_table(partial)) if table is not None], trust_metadata)
    files.refuse_all_missing(metadata_path)
    if (known and len(files.unseen())) or files.renamed:
        confine(files.unseen_by_row(), data_dir, metadata_path, allow_outside_data_dir=allow_outside_data_dir)
    look(files, partial, workers=workers, progress=progress, deadline=deadline, announce=announce)
    if saved is not None and files.is_as_saved():
        return _index_of(saved, data_dir, index_path)
    table = files.table()
    header["notes"] = [*header["from_metadata"], *files.notes(), *contradictions(table)]
    header["fingerprint"] = fingerprint_of(table)
    write_table(table, header, index_path)
    partial.unlink(missing_ok=True)
    return load_index(index_path, data_dir)


def load_index(index_path: Path, data_dir: Path) -> Index:
    """Maps a saved index without a look at metadata or media.

    Raises:
        UserError: exit code 5 where there is none, or it is not whole.
    """
    table = load_table(index_path)
    if table is None:
        raise UserError(str(index_path), "is not a whole index", "delete it, the next start builds it again", STORAGE)
    return _index_of(table, data_dir, index_path)


def index_summary(index: Index) -> list[str]:
    """Returns lines for the start report: counts, sizes, lengths, problems by class, notes."""
    lines = [f"{len(index)} rows, {np.count_nonzero(index.usable)} usable"]
    for name, kind in (("images", IMAGE), ("videos", VIDEO)):
        chosen = index.usable & (index.kind == kind)
        if not chosen.any():
            continue
        side = np.sqrt(index.width[chosen].astype(np.float64) * index.height[chosen])
        parts = [f"{np.count_nonzero(chosen)} {name}", f"mean side {_spread(side)} pixels"]
        if kind == VIDEO:
            parts.append(f"{_spread(index.frames[chosen])} frames")
            timed = chosen & (index.fps > 0)
            if timed.any():
                parts.append(f"{_spread(index.frames[timed] / index.fps[timed], 1)} seconds")
        lines.append(", ".join(parts))
    for counted in sorted(pc.value_counts(index.problem).to_pylist(), key=lambda c: (-c["counts"], c["values"])):
        if counted["values"]:
            row = int(np.flatnonzero(pc.equal(index.problem.cast(pa.large_string()), counted["values"]))[0])
            what = index.detail[row].as_py()
            lines.append(f"{counted['counts']} rows cannot be used: {counted['values']} (first: row {row}, {what})")
    return [*lines, *index.notes]


def _spread(values: np.ndarray, digits: int = 0) -> str:
    low, middle, high = np.quantile(values, (0, 0.5, 1))
    return f"{low:.{digits}f} / {middle:.{digits}f} / {high:.{digits}f} (least / median / most)"


def _index_of(table: pa.Table, data_dir: Path, path: Path) -> Index:
    header = header_of(table)
    return Index(
        data_dir=data_dir,
        **{name: table[name].chunk(0) for name in ("file_path", "text", "problem", "detail")},
        **{name: table[name].chunk(0).to_numpy(zero_copy_only=True) for name in MEASURED},
        usable=usable_of(table),
        weight=table[WEIGHT].chunk(0).to_numpy(zero_copy_only=True),
        notes=tuple(header["notes"]),
        stored=(path, header["fingerprint"]),
    )


def _reopen(path: Path, data_dir: Path, fingerprint: str) -> Index:
    index = load_index(path, data_dir)
    if index.fingerprint() != fingerprint:
        what = "the index was built anew, from other metadata, while this run uses it"
        raise UserError(
            str(path), what, "start again, and let no two runs share a metadata file that changes", STORAGE
        )
    return index


def _stamp(path: Path, *, with_bytes: bool) -> dict[str, Any]:
    """Returns what tells whether the metadata is still what it was; {} where there is none."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return {}  # read_metadata says it to the user
    if stat.S_ISDIR(status.st_mode):
        names = folder_listing(path)
        captions = (size_and_time(f"{path}/{stem}{suffix}") for stem, suffix in names if suffix.lower() == ".txt")
        return {"listing": hashlib.sha256(repr((names, list(captions))).encode(errors="surrogateescape")).hexdigest()}
    stamp: dict[str, Any] = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
    if with_bytes and stat.S_ISREG(status.st_mode):
        stamp["settled"] = time.time_ns() - status.st_mtime_ns > _SETTLED_NS
        stamp["sha256"] = _sha256(path)
    return stamp


def _is_same(saved: dict[str, Any], path: Path) -> bool:
    """Returns whether the metadata is what it was: by size and time, or by its bytes where time is no proof."""
    now = _stamp(path, with_bytes=False)
    if "listing" in now or "size" not in now:
        return bool(now) and now == saved
    if now["size"] != saved.get("size"):
        return False
    return (saved["settled"] and now["mtime_ns"] == saved["mtime_ns"]) or _sha256(path) == saved["sha256"]


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""  # read_metadata says it to the user
