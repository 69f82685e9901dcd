"""The distinct media files of the metadata: what is known of each, and probing of those that are new or changed."""

from __future__ import annotations

import os
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from videox.activity import ACTIVITY
from videox.data.index.metadata import ROW_PROBLEMS, Metadata
from videox.data.index.probe import ProbeResult, probe_each
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
    header_of,
    string_array,
    usable_of,
    write_table,
)
from videox.data.media.container import (
    ANIMATED_PNG,
    ANIMATION,
    DECODINGS,
    MAX_PIXELS,
    PROBE_VERSIONS,
    BadMedia,
    format_of,
    too_large_error,
)
from videox.data.media.signatures import FORMATS
from videox.errors import DATA, UserError, plural

_KINDS = {"image": IMAGE, "video": VIDEO, "": UNKNOWN}
# Problems that may disappear while the file keeps its size and time: such files are probed again by every start.
_PROBE_AGAIN = ("timeout", "crashed", "unreadable", "needs_package")
_COMMIT_SECONDS = 60.0
_STAT_THREADS, _STAT_CHUNK = 16, 4096
ESTIMATE_AFTER = 8  # files per worker after which the total time is estimated


class Files:
    """The distinct files of all rows, and what is known of each so far.

    Args:
        rows: table returned by `rows_of_metadata` or `rows_of_saved`.
        data_dir: the folder that file_path is relative to.
        source: the saved index that the rows were taken from; None if they come from metadata.
    """

    def __init__(self, rows: pa.Table, data_dir: Path, source: pa.Table | None = None) -> None:
        self.rows, self.root, self.source = rows, os.path.realpath(data_dir), source
        # A row with a problem of its own is never trained: it gets the path '', which is never probed.
        sound = pc.equal(rows["row_problem"], "")
        encoded = pc.if_else(sound, rows["file_path"], "").combine_chunks().dictionary_encode()
        self.file_of_row = encoded.indices.to_numpy()
        self.paths: list[str] = encoded.dictionary.to_pylist()
        count = len(self.paths)
        self.first_row = np.empty(count, np.int64)
        # Assigned in reverse order, so that the first row of a file is written last and stays.
        self.first_row[self.file_of_row[::-1]] = np.arange(len(self.file_of_row))[::-1]
        self.measured = {name: np.zeros(count, dtype) for name, dtype in MEASURED.items()}
        self.measured["file_size"] -= 1
        self.problem, self.detail = [""] * count, [""] * count
        self.known = np.array([path == "" for path in self.paths])
        self.renamed = 0
        self._outdated: dict[int, str] = {}  # file -> its format, of files that an earlier version measured otherwise

    def load_known(self, tables: Sequence[pa.Table], trust_metadata: bool) -> None:
        """Fill in everything that is known without opening a file; the rest is `to_probe`.

        Args:
            tables: saved tables whose measurements may be reused.
            trust_metadata: use sizes that metadata states, and reuse measurements of files that have changed.
        """
        if trust_metadata:
            for table in tables:
                self._reuse(table, unchanged_only=False)
            self._use_declared()
            self._read_stats()
        else:
            self._read_stats()
            for table in tables:
                self._reuse(table, unchanged_only=True)

    def require_any_file(self, metadata_path: Path) -> None:
        """Raise if the data folder contains none of the files, before their saved measurements are discarded.

        Raises:
            UserError: exit code 3.
        """
        named = [number for number, path in enumerate(self.paths) if path]
        if named and all(self.problem[number] == "missing" for number in named):
            what = (
                f"none of its {len(named)} {plural(len(named), 'file')} exists (first: {self.full_path(named[0])!r})"
            )
            raise UserError(str(metadata_path), what, "check train_data_dir, and that its disk is mounted", DATA)

    def to_probe(self) -> np.ndarray:
        """Return the numbers of the files that must be probed."""
        return np.flatnonzero(~self.known)

    def paths_to_probe_by_row(self) -> list[str]:
        """Return, for each row, its path if it is the first row of a file that must be probed, else ''."""
        paths = [""] * len(self.file_of_row)
        for number in self.to_probe():
            paths[self.first_row[number]] = self.paths[number]
        return paths

    def full_path(self, number: int, path: str = "") -> str:
        """Return the absolute path of a file, or of `path` in place of its own name."""
        path = path or self.paths[number]
        return path if path.startswith("/") else f"{self.root}/{path}"

    def record(self, number: int, result: ProbeResult) -> None:
        """Store the probe result of a file."""
        self.known[number] = True
        if isinstance(result, BadMedia):
            self.problem[number], self.detail[number] = result.media_class, result.detail
            return
        self.measured["kind"][number] = _KINDS[result.kind]
        self.measured["format"][number] = FORMATS.index(result.format)
        for name in ("width", "height", "frames", "fps", "decoding"):
            self.measured[name][number] = getattr(result, name)

    def matches_saved(self) -> bool:
        """Return whether the saved index that the rows come from already contains what is known of every file."""
        if self.source is None or self.renamed or not self.known.all():
            return False
        named = np.array([path != "" for path in self.paths])
        rows = self.first_row[named]
        equal = all(
            np.array_equal(self.source[name].to_numpy()[rows], self.measured[name][named]) for name in MEASURED
        )
        saved_problem = self.source["problem"].combine_chunks().cast(pa.large_string()).take(pa.array(rows))
        return equal and saved_problem.equals(string_array(self.problem).filter(pa.array(named)))

    def table(self) -> pa.Table:
        """Return the columns of all rows."""
        return self._table_of(self.rows, self.file_of_row)

    def known_table(self) -> pa.Table:
        """Return the columns of one row for each known file."""
        numbers = np.flatnonzero(self.known)
        return self._table_of(self.rows.take(pa.array(self.first_row[numbers])), numbers)

    def notes(self) -> list[str]:
        """Return sentences about what is legal but may be unintended."""
        sound = pc.equal(self.rows["row_problem"], "")
        repeated = pc.sum(sound).as_py() - sum(path != "" for path in self.paths)
        counts = {
            "rows name a file that an earlier row names: each row is trained": repeated,
            "files were found under another Unicode form of their name": self.renamed,
        }
        return [f"{count} {what}" for what, count in counts.items() if count]

    def line_before_probing(self) -> str:
        """Return a line on the files that are probed again, as an earlier version may have measured them otherwise."""
        if not self._outdated:
            return ""
        formats = Counter(name or "of unknown format" for name in self._outdated.values())
        named = ", ".join(f"{count} {name}" for name, count in sorted(formats.items()))
        files = plural(len(self._outdated), "file is", "files are")
        return f"index: {len(self._outdated)} {files} probed again, since an earlier version read some files of their formats otherwise ({named})"

    def line_after_probing(self) -> str:
        """Return a line on those of them that are decoded otherwise than by an earlier version; "" if none is."""
        decoding = self.measured["decoding"][list(self._outdated)]
        counts = {what: np.count_nonzero(decoding & bit) for bit, what in DECODINGS.items()}
        named = ", ".join(f"{what}: {count}" for what, count in counts.items() if count)
        what = "are decoded otherwise than by an earlier version; their cached tensors are computed again"
        return f"index: {np.count_nonzero(decoding)} of them {what} ({named})" if named else ""

    def _table_of(self, rows: pa.Table, files: np.ndarray) -> pa.Table:
        """Return the columns of some rows; files: int [rows], the number of each row's file."""
        indices = pa.array(files)
        row_problem = rows["row_problem"].combine_chunks()
        sound = pc.equal(row_problem, "")
        columns = {
            "file_path": pc.if_else(sound, string_array(self.paths).take(indices), rows["file_path"]),
            "text": rows["text"],
            "detail": pc.if_else(sound, string_array(self.detail).take(indices), _explain(row_problem)),
            "problem": class_array(pc.if_else(sound, string_array(self.problem).take(indices), row_problem)),
        }
        columns |= {name: pa.array(values[files]) for name, values in self.measured.items()}
        columns |= {name: rows[name] for name in DECLARED}
        return pa.table({name: columns[name] for name in SCHEMA.names}, schema=SCHEMA).combine_chunks()

    def _read_stats(self) -> None:
        numbers = self.to_probe()
        chunks = [numbers[start : start + _STAT_CHUNK] for start in range(0, len(numbers), _STAT_CHUNK)]
        # Threads, because on a network disk most of the time is spent waiting for each stat call.
        with ThreadPoolExecutor(_STAT_THREADS) as pool:
            found = list(pool.map(lambda chunk: [size_and_mtime(self.full_path(i)) for i in chunk], chunks))
        stats = [pair for chunk in found for pair in chunk]
        for number, pair in zip(numbers, stats, strict=True):
            self.measured["file_size"][number], self.measured["mtime_ns"][number] = pair or (-1, 0)
        for number in (number for number, pair in zip(numbers, stats, strict=True) if pair is None):
            self._handle_missing(number)

    def _handle_missing(self, number: int) -> None:
        """Search for a missing file under other Unicode forms of its name, which differ between macOS and Linux."""
        path = self.paths[number]
        for form in () if path.isascii() else ("NFC", "NFD"):
            other = unicodedata.normalize(form, path)
            pair = size_and_mtime(self.full_path(number, other))
            if other != path and pair is not None:
                self.paths[number], self.renamed = other, self.renamed + 1
                self.measured["file_size"][number], self.measured["mtime_ns"][number] = pair
                return
        self.record(number, BadMedia("missing", "no such file"))

    def _reuse(self, table: pa.Table, *, unchanged_only: bool) -> None:
        """Copy the measurements of a saved table; unchanged_only: only for files of the same size and time."""
        problem = table["problem"].combine_chunks().cast(pa.large_string())
        excluded = string_array([*ROW_PROBLEMS, *_PROBE_AGAIN])
        reusable = ~pc.is_in(problem, value_set=excluded).to_numpy(zero_copy_only=False)
        numbers = self.to_probe()
        if table is self.source:
            # The rows are those of this table, so that no lookup by path is needed.
            numbers = numbers[reusable[self.first_row[numbers]]]
            rows = self.first_row[numbers]
        else:
            wanted, candidates = string_array(self.paths).take(pa.array(numbers)), np.flatnonzero(reusable)
            found = pc.index_in(wanted, value_set=table["file_path"].take(pa.array(candidates)).combine_chunks())
            found = pc.fill_null(found, -1).to_numpy()
            numbers, rows = numbers[found >= 0], candidates[found[found >= 0]]
        saved = {name: table[name].to_numpy() for name in MEASURED}
        if unchanged_only:
            same = saved["file_size"][rows] == self.measured["file_size"][numbers]
            same &= saved["mtime_ns"][rows] == self.measured["mtime_ns"][numbers]
            numbers, rows = numbers[same], rows[same]
        formats, alike = self._formats(table, numbers, rows, look=unchanged_only)
        if unchanged_only:
            self._outdated |= {int(number): FORMATS[formats[at]] for at, number in enumerate(numbers) if not alike[at]}
            numbers, rows, formats = numbers[alike], rows[alike], formats[alike]
        else:
            formats[~alike] = 0  # the next start that has the files looks at them
        for name, values in saved.items():
            self.measured[name][numbers] = values[rows]
        self.measured["format"][numbers] = formats
        self.known[numbers] = True
        for number in numbers if self._outdated else ():
            self._outdated.pop(int(number), None)
        bad = ~usable_of(table)[rows]
        for number, row in zip(numbers[bad], rows[bad], strict=True):
            self.problem[number], self.detail[number] = problem[row].as_py(), table["detail"][row].as_py()

    def _formats(
        self, table: pa.Table, numbers: np.ndarray, rows: np.ndarray, *, look: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the formats of files, and whether this version would measure them as a saved table did.

        Args:
            table: the saved table.
            numbers: int [files], the files.
            rows: int [files], their rows in the table.
            look: open the files whose format the table does not contain, as those of older versions.

        Returns:
            uint8 [files], positions in FORMATS; bool [files].
        """
        probed = header_of(table).get("probed", {})
        formats, usable = table["format"].to_numpy()[rows].copy(), usable_of(table)[rows]
        versions = np.array([PROBE_VERSIONS.get(name, 1) == probed.get(name, 1) for name in FORMATS])
        alike = versions[np.minimum(formats, len(FORMATS) - 1)]
        # A file with a problem has no format: any version may have found the problem that another does not find.
        alike[(formats == 0) & ~usable] = probed == PROBE_VERSIONS
        unknown = np.flatnonzero((formats == 0) & usable) if look else np.empty(0, np.int64)
        with ThreadPoolExecutor(_STAT_THREADS) as pool:
            names = list(pool.map(lambda at: format_of(Path(self.full_path(int(numbers[at])))), unknown))
        formats[unknown] = [FORMATS.index(name) for name in names]
        alike[unknown] = [name != "" and PROBE_VERSIONS.get(name, 1) == 1 for name in names]
        return formats, alike

    def _use_declared(self) -> None:
        """Use the sizes that metadata states for files whose first row states all of them."""
        numbers = self.to_probe()
        declared = {name: self.rows[f"declared_{name}"].to_numpy()[self.first_row[numbers]] for name in KEYS}
        complete = (declared["width"] > 0) & (declared["height"] > 0) & (declared["kind"] != UNKNOWN)
        complete &= (declared["kind"] == IMAGE) | ((declared["frames"] > 0) & (declared["fps"] > 0))
        declared["frames"] = np.where(declared["kind"] == IMAGE, 1, declared["frames"])
        declared["fps"] = np.where(declared["kind"] == IMAGE, 0, declared["fps"])
        for name, values in declared.items():
            self.measured[name][numbers[complete]] = values[complete]
        self.known[numbers[complete]] = True
        pixels = declared["width"].astype(np.int64) * declared["height"]
        for number in numbers[complete & (pixels > MAX_PIXELS)]:
            self.record(number, too_large_error(self.measured["width"][number], self.measured["height"][number]))


def probe_files(
    files: Files,
    partial: Path,
    *,
    workers: int,
    progress: bool,
    timeout: float,
    announce: Callable[[int, float], None] | None = None,
) -> None:
    """Probe the files that are not known yet and record the results.

    Args:
        files: receives the results.
        partial: file that all known measurements are saved to once a minute; the next start continues from it if this
            one is killed.
        workers: child processes.
        progress: show a progress bar on stderr.
        timeout: time limit for one file, in seconds.
        announce: called once, after the first few results, with the number of files and the estimated seconds for all.
    """
    numbers = files.to_probe()
    if not len(numbers):
        return
    paths = [files.full_path(number) for number in numbers]
    results = probe_each(paths, workers=workers, timeout=timeout)
    started = committed = time.monotonic()
    estimate_at = min(len(paths), ESTIMATE_AFTER * workers)
    bar = tqdm(results, "probing media files", len(paths), unit=" files", disable=not progress, file=sys.stderr)
    for done, (position, result) in enumerate(bar, 1):
        files.record(int(numbers[position]), result)
        ACTIVITY.progress()
        if announce is not None and done == estimate_at:
            announce(len(paths), (time.monotonic() - started) / estimate_at * len(paths))
        if time.monotonic() - committed > _COMMIT_SECONDS:
            write_table(files.known_table(), {"version": VERSION, "probed": PROBE_VERSIONS}, partial)
            committed = time.monotonic()


def rows_of_metadata(metadata: Metadata) -> pa.Table:
    """Return columns file_path, text, row_problem and DECLARED of the metadata."""
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
    """Return the columns of `rows_of_metadata` from a saved index, without reading metadata."""
    problem = table["problem"].combine_chunks().cast(pa.large_string())
    row_problem = pc.if_else(pc.is_in(problem, value_set=string_array(ROW_PROBLEMS)), problem, "")
    return table.select(["file_path", "text", *DECLARED]).append_column("row_problem", row_problem)


def with_declared_stills(table: pa.Table) -> pa.Table:
    """Return a table in which an animation is an image of one frame where the type of its row says image."""
    decoding = table["decoding"].to_numpy()
    still = (decoding & ANIMATION != 0) & (table["declared_kind"].to_numpy() == IMAGE)
    if not still.any():
        return table
    values = {"kind": IMAGE, "frames": 1, "fps": 0, "decoding": decoding & ~np.uint32(ANIMATION | ANIMATED_PNG)}
    for name, value in values.items():
        column = np.where(still, value, table[name].to_numpy()).astype(MEASURED[name])
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(column))
    return table


def animation_notes(table: pa.Table) -> list[str]:
    """Return a sentence on the rows whose file is an animation: of which formats, and what they are trained as."""
    animated = usable_of(table) & (table["decoding"].to_numpy() & ANIMATION != 0)
    if not animated.any():
        return []
    counts = Counter(FORMATS[code] for code in table["format"].to_numpy()[animated])
    stills = np.count_nonzero(animated & (table["declared_kind"].to_numpy() == IMAGE))
    formats = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    parts = [f"{np.count_nonzero(animated) - stills} as videos"]
    parts += [f"{stills} as images of their first frame, because the row's type is image"] if stills else []
    return [f"{np.count_nonzero(animated)} animations ({formats}) are trained: {', '.join(parts)}"]


def find_contradictions(table: pa.Table) -> list[str]:
    """Return a sentence for each column in which metadata and the files differ."""
    column = {name: table[name].to_numpy() for name in NUMBERS}
    probed = (column["file_size"] >= 0) & usable_of(table)
    video = probed & (column["kind"] == VIDEO)
    declared = {name: column[f"declared_{name}"] for name in KEYS}
    differs = {name: column[name] != declared[name] for name in KEYS}
    # A tolerance, because 29.97 is often written as 30.
    fps_differs = np.abs(column["fps"] - declared["fps"]) > 0.01 * column["fps"]
    size = (declared["width"] > 0) & differs["width"] | (declared["height"] > 0) & differs["height"]
    kind = (declared["kind"] != UNKNOWN) & differs["kind"]
    masks = {
        "type differs from the file's content, which is used": probed & kind,
        "width or height differs from the file, whose size is used": probed & size,
        "num_frames differs from the file, whose count is used": video & (declared["frames"] > 0) & differs["frames"],
        "fps differs from the file, whose fps is used": (
            video & (declared["fps"] > 0) & (column["fps"] > 0) & fps_differs
        ),
    }
    counts = {what: (int(mask.sum()), mask) for what, mask in masks.items() if mask.any()}
    return [f"{n} {plural(n, 'row')}: {what} (first: row {mask.argmax()})" for what, (n, mask) in counts.items()]


def size_and_mtime(path: str) -> tuple[int, int] | None:
    """Return bytes and mtime in ns; None for a missing file, (-1, 0) for one whose state only a probe can find out."""
    try:
        status = os.stat(path)  # noqa: PTH116 - a million Path objects take longer than the calls
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        return -1, 0
    return status.st_size, status.st_mtime_ns


def _explain(row_problem: pa.Array) -> pa.Array:
    keys = string_array(["", *ROW_PROBLEMS])
    return string_array(["", *ROW_PROBLEMS.values()]).take(pc.index_in(row_problem, value_set=keys))
