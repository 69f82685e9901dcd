"""Serves the index: every distinct file of the metadata, what is known of it, and the look at those that are new."""

from __future__ import annotations

import os
import sys
import time
import unicodedata
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from videox.data.index.metadata import ROW_PROBLEMS, Metadata
from videox.data.index.probe import Answer, probe_each
from videox.data.index.table import (
    DECLARED,
    IMAGE,
    KEYS,
    MEASURED,
    NUMBERS,
    SCHEMA,
    UNKNOWN,
    VERSION,
    VIDEO,
    class_array,
    string_array,
    usable_of,
    write_table,
)
from videox.data.media.container import MAX_PIXELS, BadMedia, too_large
from videox.errors import DATA, UserError

_KINDS = {"image": IMAGE, "video": VIDEO, "": UNKNOWN}
_LOOK_AGAIN = ("timeout", "crashed", "unreadable")  # mended, they may keep their size and time
_COMMIT_SECONDS = 60.0
_STAT_THREADS, _STAT_CHUNK = 16, 4096
FEW = 8  # files per worker that tell how long the rest takes


class Files:
    """The distinct files of all rows, and what is known of each so far.

    Args:
        rows: of `rows_of_metadata` or `rows_of_saved`.
        data_dir: the folder that file_path is relative to.
        source: the saved index that the rows were taken from, if they were.
    """

    def __init__(self, rows: pa.Table, data_dir: Path, source: pa.Table | None = None) -> None:
        self.rows, self.root, self.source = rows, os.path.realpath(data_dir), source
        # A row with a problem of its own is never trained: its file is '' here, which is never looked at.
        sound = pc.equal(rows["row_problem"], "")
        encoded = pc.if_else(sound, rows["file_path"], "").combine_chunks().dictionary_encode()
        self.codes = encoded.indices.to_numpy()
        self.paths: list[str] = encoded.dictionary.to_pylist()
        count = len(self.paths)
        self.first_row = np.empty(count, np.int64)
        self.first_row[self.codes[::-1]] = np.arange(len(self.codes))[::-1]
        self.measured = {name: np.zeros(count, dtype) for name, dtype in MEASURED.items()}
        self.measured["file_size"] -= 1
        self.problem, self.detail = [""] * count, [""] * count
        self.seen = np.array([path == "" for path in self.paths])
        self.renamed = 0

    def survey(self, tables: Sequence[pa.Table], trust_metadata: bool) -> None:
        """Fills in all that can be known without opening a file; what remains is `unseen`."""
        if trust_metadata:
            for table in tables:
                self._reuse(table, unchanged_only=False)
            self._declare()
            self._stat()
        else:
            self._stat()
            for table in tables:
                self._reuse(table, unchanged_only=True)

    def refuse_all_missing(self, metadata_path: Path) -> None:
        """Refuses a data folder that holds none of the files, before what is saved of them is given up.

        Raises:
            UserError: exit code 3.
        """
        named = [number for number, path in enumerate(self.paths) if path]
        if named and all(self.problem[number] == "missing" for number in named):
            what = f"none of its {len(named)} files is there (first: {self.full_path(named[0])!r})"
            raise UserError(str(metadata_path), what, "check train_data_dir, and that its disk is mounted", DATA)

    def unseen(self) -> np.ndarray:
        """Returns the numbers of the files that must be looked at."""
        return np.flatnonzero(~self.seen)

    def unseen_by_row(self) -> list[str]:
        """Returns, for each row, its path where it is the first row of a file that must be looked at, else ''."""
        paths = [""] * len(self.codes)
        for number in self.unseen():
            paths[self.first_row[number]] = self.paths[number]
        return paths

    def full_path(self, number: int, path: str = "") -> str:
        """Returns the absolute path of a file, or of another name in its place."""
        path = path or self.paths[number]
        return path if path.startswith("/") else f"{self.root}/{path}"

    def record(self, number: int, answer: Answer) -> None:
        """Keeps what a look at a file gave."""
        self.seen[number] = True
        if isinstance(answer, BadMedia):
            self.problem[number], self.detail[number] = answer.media_class, answer.detail
            return
        self.measured["kind"][number] = _KINDS[answer.kind]
        for name in ("width", "height", "frames", "fps"):
            self.measured[name][number] = getattr(answer, name)

    def is_as_saved(self) -> bool:
        """Returns whether the saved index that the rows come from says of every file what is known now."""
        if self.source is None or self.renamed or not self.seen.all():
            return False
        named = np.array([path != "" for path in self.paths])
        at = self.first_row[named]
        same = all(np.array_equal(self.source[name].to_numpy()[at], self.measured[name][named]) for name in MEASURED)
        was = self.source["problem"].combine_chunks().cast(pa.large_string()).take(pa.array(at))
        return same and was.equals(string_array(self.problem).filter(pa.array(named)))

    def table(self) -> pa.Table:
        """Returns the columns of all rows."""
        return self._table_of(self.rows, self.codes)

    def seen_table(self) -> pa.Table:
        """Returns the columns of one row for each file that is known."""
        numbers = np.flatnonzero(self.seen)
        return self._table_of(self.rows.take(pa.array(self.first_row[numbers])), numbers)

    def notes(self) -> list[str]:
        """Returns sentences about what is legal but may be unwanted."""
        own = pc.equal(self.rows["row_problem"], "")
        again = pc.sum(own).as_py() - sum(path != "" for path in self.paths)
        silent = pc.sum(pc.and_(own, pc.equal(pc.binary_length(self.rows["text"]), 0))).as_py()
        counted = {
            "rows name a file that an earlier row names: each row is trained": again,
            "rows have an empty caption": silent,
            "files were found under another Unicode form of their name": self.renamed,
        }
        return [f"{count} {what}" for what, count in counted.items() if count]

    def _table_of(self, rows: pa.Table, codes: np.ndarray) -> pa.Table:
        taken = pa.array(codes)
        own = rows["row_problem"].combine_chunks()
        sound = pc.equal(own, "")
        columns = {
            "file_path": pc.if_else(sound, string_array(self.paths).take(taken), rows["file_path"]),
            "text": rows["text"],
            "detail": pc.if_else(sound, string_array(self.detail).take(taken), _explained(own)),
            "problem": class_array(pc.if_else(sound, string_array(self.problem).take(taken), own)),
        }
        columns |= {name: pa.array(values[codes]) for name, values in self.measured.items()}
        columns |= {name: rows[name] for name in DECLARED}
        return pa.table({name: columns[name] for name in SCHEMA.names}, schema=SCHEMA).combine_chunks()

    def _stat(self) -> None:
        numbers = self.unseen()
        chunks = [numbers[at : at + _STAT_CHUNK] for at in range(0, len(numbers), _STAT_CHUNK)]
        # Threads, since on a network disk the waiting for answers is what takes the time.
        with ThreadPoolExecutor(_STAT_THREADS) as pool:
            found = list(pool.map(lambda chunk: [size_and_time(self.full_path(i)) for i in chunk], chunks))
        pairs = [pair for chunk in found for pair in chunk]
        for number, pair in zip(numbers, pairs, strict=True):
            self.measured["file_size"][number], self.measured["mtime_ns"][number] = pair or (-1, 0)
        for number in (number for number, pair in zip(numbers, pairs, strict=True) if pair is None):
            self._miss(number)

    def _miss(self, number: int) -> None:
        """Looks for a missing file under the other Unicode forms of its name, as macOS and Linux write them."""
        path = self.paths[number]
        for form in () if path.isascii() else ("NFC", "NFD"):
            other = unicodedata.normalize(form, path)
            pair = size_and_time(self.full_path(number, other))
            if other != path and pair is not None:
                self.paths[number], self.renamed = other, self.renamed + 1
                self.measured["file_size"][number], self.measured["mtime_ns"][number] = pair
                return
        self.record(number, BadMedia("missing", "no such file"))

    def _reuse(self, table: pa.Table, *, unchanged_only: bool) -> None:
        """Takes over what a saved table knows of files, where size and time are still the same."""
        problem = table["problem"].combine_chunks().cast(pa.large_string())
        fit = ~pc.is_in(problem, value_set=string_array([*ROW_PROBLEMS, *_LOOK_AGAIN])).to_numpy(zero_copy_only=False)
        numbers = self.unseen()
        if table is self.source:
            numbers = numbers[fit[self.first_row[numbers]]]
            at = self.first_row[numbers]
        else:
            wanted, sources = string_array(self.paths).take(pa.array(numbers)), np.flatnonzero(fit)
            found = pc.index_in(wanted, value_set=table["file_path"].take(pa.array(sources)).combine_chunks())
            found = pc.fill_null(found, -1).to_numpy()
            numbers, at = numbers[found >= 0], sources[found[found >= 0]]
        saved = {name: table[name].to_numpy() for name in MEASURED}
        if unchanged_only:
            same = saved["file_size"][at] == self.measured["file_size"][numbers]
            same &= saved["mtime_ns"][at] == self.measured["mtime_ns"][numbers]
            numbers, at = numbers[same], at[same]
        for name, values in saved.items():
            self.measured[name][numbers] = values[at]
        self.seen[numbers] = True
        bad = ~usable_of(table)[at]
        for number, row in zip(numbers[bad], at[bad], strict=True):
            self.problem[number], self.detail[number] = problem[row].as_py(), table["detail"][row].as_py()

    def _declare(self) -> None:
        """Takes the metadata's word for the files whose first row tells everything."""
        numbers = self.unseen()
        told = {name: self.rows[f"declared_{name}"].to_numpy()[self.first_row[numbers]] for name in KEYS}
        complete = (told["width"] > 0) & (told["height"] > 0) & (told["kind"] != UNKNOWN)
        complete &= (told["kind"] == IMAGE) | ((told["frames"] > 0) & (told["fps"] > 0))
        told["frames"] = np.where(told["kind"] == IMAGE, 1, told["frames"])
        told["fps"] = np.where(told["kind"] == IMAGE, 0, told["fps"])
        for name, values in told.items():
            self.measured[name][numbers[complete]] = values[complete]
        self.seen[numbers[complete]] = True
        for number in numbers[complete & (told["width"].astype(np.int64) * told["height"] > MAX_PIXELS)]:
            self.record(number, too_large(self.measured["width"][number], self.measured["height"][number]))


def look(
    files: Files,
    partial: Path,
    *,
    workers: int,
    progress: bool,
    deadline: float,
    announce: Callable[[int, float], None] | None = None,
) -> None:
    """Looks at what is unseen; once a minute all that is known is kept aside, where a killed build is taken up.

    Args:
        announce: told once, after the first few, how many files there are and how many seconds they should take.
    """
    numbers = files.unseen()
    if not len(numbers):
        return
    paths = [files.full_path(number) for number in numbers]
    answers = probe_each(paths, workers=workers, deadline=deadline)
    begun = committed = time.monotonic()
    few = min(len(paths), FEW * workers)
    bar = tqdm(answers, "looking at the files", len(paths), unit=" files", disable=not progress, file=sys.stderr)
    for done, (position, answer) in enumerate(bar, 1):
        files.record(int(numbers[position]), answer)
        if announce is not None and done == few:
            announce(len(paths), (time.monotonic() - begun) / few * len(paths))
        if time.monotonic() - committed > _COMMIT_SECONDS:
            write_table(files.seen_table(), {"version": VERSION}, partial)
            committed = time.monotonic()


def rows_of_metadata(metadata: Metadata) -> pa.Table:
    """Returns columns file_path, text, row_problem and DECLARED of the metadata."""
    declared = {
        "declared_kind": [_KINDS[kind] for kind in metadata.kind],
        "declared_width": metadata.width,
        "declared_height": metadata.height,
        "declared_frames": metadata.num_frames,
        "declared_fps": metadata.fps,
        "declared_weight": metadata.weight,
    }
    columns = {"file_path": metadata.file_path, "text": metadata.text, "row_problem": metadata.problem}
    strings = {name: string_array(values) for name, values in columns.items()}
    return pa.table(strings | {name: pa.array(np.array(v, DECLARED[name])) for name, v in declared.items()})


def rows_of_saved(table: pa.Table) -> pa.Table:
    """Returns the columns of `rows_of_metadata` from a saved index, without reading metadata."""
    problem = table["problem"].combine_chunks().cast(pa.large_string())
    own = pc.if_else(pc.is_in(problem, value_set=string_array(ROW_PROBLEMS)), problem, "")
    return table.select(["file_path", "text", *DECLARED]).append_column("row_problem", own)


def contradictions(table: pa.Table) -> list[str]:
    """Returns a sentence for each kind of thing that metadata says and the files contradict."""
    column = {name: table[name].to_numpy() for name in NUMBERS}
    looked = (column["file_size"] >= 0) & usable_of(table)
    video = looked & (column["kind"] == VIDEO)
    told = {name: column[f"declared_{name}"] for name in KEYS}
    differs = {name: column[name] != told[name] for name in KEYS}
    far = np.abs(column["fps"] - told["fps"]) > 0.01 * column["fps"]  # 29.97 is often written as 30
    size = (told["width"] > 0) & differs["width"] | (told["height"] > 0) & differs["height"]
    found = {
        "type differs from the content, the content wins": looked & (told["kind"] != UNKNOWN) & differs["kind"],
        "width or height differs from the file, the file wins": looked & size,
        "num_frames differs from the file, the file wins": video & (told["frames"] > 0) & differs["frames"],
        "fps differs from the file, the file wins": video & (told["fps"] > 0) & (column["fps"] > 0) & far,
    }
    return [f"{m.sum()} rows: {what} (first: row {m.argmax()})" for what, m in found.items() if m.any()]


def size_and_time(path: str) -> tuple[int, int] | None:
    """Returns bytes and mtime in ns, None for a missing file, (-1, 0) for one that only a look can tell about."""
    try:
        status = os.stat(path)  # noqa: PTH116 - a million Path objects cost more than the calls
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        return -1, 0
    return status.st_size, status.st_mtime_ns


def _explained(own: pa.Array) -> pa.Array:
    known = string_array(["", *ROW_PROBLEMS])
    return string_array(["", *ROW_PROBLEMS.values()]).take(pc.index_in(own, value_set=known))
