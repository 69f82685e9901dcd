"""Index of a data set: size, frames and fps of every media file, probed once and saved in columns beside the metadata.

A later start maps the saved columns, asks the file system for sizes and times, and probes only the files that changed.
Light imports only: no torch and no decoder.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from videox.data.index.captions import RowCaptions, unpack_captions
from videox.data.index.metadata import READER, check_paths, read_metadata
from videox.data.index.probe import PROBE_SECONDS
from videox.data.index.scan import (
    Files,
    animation_notes,
    find_contradictions,
    probe_files,
    rows_of_metadata,
    rows_of_saved,
    with_declared_stills,
)
from videox.data.index.sources import Source, check_sources, measured_before, read_sources, require_files_of_each
from videox.data.index.stamps import is_unchanged, stamp_of
from videox.data.index.table import (
    FINGERPRINTED,
    IMAGE,
    MEASURED,
    VERSION,
    VIDEO,
    WEIGHT,
    class_array,
    fingerprint_of,
    hash_names,
    header_of,
    load_table,
    repeated_string,
    string_array,
    usable_of,
    write_table,
)
from videox.data.media.container import PROBE_VERSIONS
from videox.errors import STORAGE, UserError, plural


@dataclass(frozen=True)
class DataLocation:
    """Where a data set and its index are stored.

    Attributes:
        metadata_path: a metadata file or folder that `read_metadata` accepts.
        data_dir: the folder that file_path is relative to.
        index_path: the saved index (an Arrow file, replaced atomically); its folder must be writable.
        allow_outside_data_dir: allow a file_path that leaves data_dir.
        allow_absolute: allow absolute paths outside of data_dir; for metadata without a data folder of its own.
        sources: the lists and folders that the rows come from; () = metadata_path alone. data_dir is then their
            `common_folder`, metadata_path the first of them, and each states itself whether its paths may be absolute.
    """

    metadata_path: Path
    data_dir: Path
    index_path: Path
    allow_outside_data_dir: bool = False
    allow_absolute: bool = False
    sources: tuple[Source, ...] = ()


@dataclass(frozen=True)
class MediaColumns:
    """What probing measures of the media files, one entry per row.

    Attributes:
        kind: 0 image, 1 video.
        width: pixels.
        height: pixels.
        frames: frames of the file.
        fps: frames per second; None = 0 for every row.
    """

    kind: np.ndarray
    width: np.ndarray
    height: np.ndarray
    frames: np.ndarray
    fps: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Index:
    """The columns, one entry per metadata row; memory-mapped and read-only if they come from a saved index.

    Attributes:
        data_dir: the folder that file_path is relative to.
        file_path: strings (Arrow).
        text: the captions of each row, as `pack_captions` stores them (Arrow).
        kind: uint8, 0 image, 1 video.
        width: int32, pixels, upright.
        height: int32, pixels, upright.
        frames: int32, frames of the file (1 for an image).
        fps: float32, frames per second (0 for an image).
        file_size: int64, bytes when probed; -1 for a file that was not probed.
        mtime_ns: int64, modification time when probed.
        format: uint8, position in FORMATS of the file's format; 0 for a file that was not probed.
        decoding: uint32, a sum of keys of DECODINGS.
        usable: bool, False where the row has a problem.
        problem: Arrow dictionary of strings: "", a key of ROW_PROBLEMS, a class of BadMedia, "timeout" or "crashed".
        detail: strings (Arrow), one line about the problem.
        weight: float32, how often a row occurs in an epoch, on average; 1 where metadata does not state it.
        notes: sentences for the start report.
        stored: (path, fingerprint) of the saved index; None for one in memory.
        earlier_rows: number of rows at the end that are the ones of an epoch that began with other data.
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
    format: np.ndarray
    decoding: np.ndarray
    usable: np.ndarray
    problem: pa.DictionaryArray
    detail: pa.LargeStringArray
    weight: np.ndarray
    notes: tuple[str, ...] = ()
    stored: tuple[Path, str] | None = None
    earlier_rows: int = 0

    def __len__(self) -> int:
        return len(self.kind)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle a saved index as its path, so that a worker maps the same pages instead of copying them."""
        if self.stored is not None:
            return _reopen, (self.stored[0], self.data_dir, self.stored[1])
        return Index, tuple(getattr(self, field.name) for field in fields(self))

    @property
    def first_earlier_row(self) -> int:
        """Where the earlier_rows begin."""
        return len(self) - self.earlier_rows

    def number(self, row: int) -> int:
        """Return a row's number in its own data, for records and messages; that of an earlier row counts from 0."""
        return row - self.first_earlier_row if row >= self.first_earlier_row else row

    def file(self, row: int) -> Path:
        """Return the path of a row's file."""
        return self.data_dir / self.file_path[int(row)].as_py()

    def captions(self, row: int) -> RowCaptions:
        """Return a row's captions, to which the rules of the run are not applied yet."""
        return unpack_captions(self.text[int(row)].as_py())

    def caption(self, row: int) -> str:
        """Return the first of a row's captions."""
        return self.captions(row).captions[0]

    def problems(self) -> list[tuple[int, str, str, str]]:
        """Return (row, file_path, class, detail) of every unusable row, sorted by row."""
        rows = np.flatnonzero(~self.usable)
        columns = (column.take(pa.array(rows)).to_pylist() for column in (self.file_path, self.problem, self.detail))
        return list(zip(rows.tolist(), *columns, strict=True))

    def fingerprint(self) -> str:
        """Return sha256 (hex) over file_path, text, kind, width, height, frames and usable: what a plan depends on.

        Modification times are not included, so that a copied or touched data set still matches its checkpoints.
        """
        if self.stored is not None:
            return self.stored[1]
        return fingerprint_of(pa.table({name: getattr(self, name) for name in (*FINGERPRINTED, "problem")}))

    def rows_fingerprint(self) -> str:
        """Return sha256 (hex) over file_path and text only: it does not depend on the state of the media files."""
        return str(hash_names(pa.table({name: getattr(self, name) for name in ("file_path", "text")})).hexdigest())

    @classmethod
    def from_columns(
        cls,
        media: MediaColumns,
        *,
        usable: np.ndarray | None = None,
        weight: np.ndarray | None = None,
        file_path: list[str] | None = None,
        text: list[str] | None = None,
        data_dir: Path = Path(),
    ) -> Index:
        """Build an index in memory, to plan with sizes of files that need not exist.

        Args:
            media: kind and sizes of each row.
            usable: bool [rows], None = all; other rows get the problem "missing".
            weight: how often each row occurs in an epoch, None = once.
            file_path: paths, None = the row numbers.
            text: captions, None = ''.
            data_dir: the folder that file_path is relative to.
        """
        rows = len(media.kind)
        good = np.ones(rows, bool) if usable is None else np.asarray(usable, bool)
        values = {"kind": media.kind, "width": media.width, "height": media.height, "frames": media.frames}
        values["fps"] = np.zeros(rows) if media.fps is None else media.fps
        values["file_size"] = values["mtime_ns"] = np.full(rows, -1)
        values["format"] = values["decoding"] = np.zeros(rows)
        paths = pa.array(np.arange(rows)).cast(pa.large_string()) if file_path is None else string_array(file_path)
        texts = repeated_string("", rows) if text is None else string_array(text)
        measured: dict[str, Any] = {name: np.asarray(values[name]).astype(dtype) for name, dtype in MEASURED.items()}
        return cls(
            data_dir=data_dir,
            file_path=paths,
            text=texts,
            **measured,
            usable=good,
            problem=class_array(pa.array(np.where(good, "", "missing"))),
            detail=repeated_string("", rows),
            weight=np.ones(rows, np.float32) if weight is None else np.asarray(weight, np.float32),
        )


def build_index(
    location: DataLocation,
    *,
    workers: int,
    progress: bool,
    trust_metadata: bool = False,
    timeout: float = PROBE_SECONDS,
    announce: Callable[[int, float], None] | None = None,
    notify: Callable[[str], None] | None = None,
) -> Index:
    """Return the index of the metadata: reuse what is still valid of the saved one, probe the rest, and save it.

    Args:
        location: where the metadata, the media files and the saved index are.
        workers: child processes that probe files; at least 1 is used.
        progress: show a progress bar on stderr.
        trust_metadata: do not probe the files of rows that state type, width and height (and num_frames and fps for
            videos); for a dry run. A later build without it probes them.
        timeout: time limit for one file in seconds, after which it gets the problem "timeout".
        announce: called once while files are probed, with their number and the estimated seconds for all of them.
        notify: called with a line for the user where files are probed again that an earlier version measured
            otherwise, and with another one after that.

    Raises:
        UserError: as `read_metadata`; exit code 3 if none of the files exists, 5 if the index cannot be written.
    """
    data_dir, index_path, sources = location.data_dir, location.index_path, location.sources
    saved = load_table(index_path)
    rows, header, rows_are_saved = _read_rows(location, saved)
    partial = index_path.with_name(f"{index_path.name}.partial")
    files = Files(rows, data_dir, saved if rows_are_saved else None)
    known = [table for table in (saved, load_table(partial)) if table is not None]
    if sources and not rows_are_saved:
        known = measured_before(saved, sources, data_dir) + known[saved is not None :]
    files.load_known(known, trust_metadata)
    files.require_any_file(location.metadata_path)
    if sources:
        require_files_of_each(files, header["rows_of_sources"], sources)
    # read_metadata has checked the paths of new rows. A saved row is checked again if its file changed, since a link
    # may have replaced it, or if it was found under another name.
    if (rows_are_saved and len(files.to_probe())) or files.renamed:
        _check_paths_again(files, location, header)
    if notify is not None and (line := files.line_before_probing()):
        notify(line)
    probe_files(files, partial, workers=workers, progress=progress, timeout=timeout, announce=announce)
    if notify is not None and (line := files.line_after_probing()):
        notify(line)
    if saved is not None and header.get("probed") == PROBE_VERSIONS and files.matches_saved():
        return _to_index(saved, data_dir, index_path)
    table = files.table()
    as_trained = with_declared_stills(table)
    about_files = [*files.notes(), *animation_notes(table), *find_contradictions(as_trained)]
    header["notes"] = [*header["from_metadata"], *about_files]
    header["fingerprint"], header["probed"] = fingerprint_of(as_trained), PROBE_VERSIONS
    write_table(table, header, index_path)
    partial.unlink(missing_ok=True)
    return load_index(index_path, data_dir)


def _allowed(location: DataLocation) -> dict[str, bool]:
    """Return which paths the rows of a location may have, as keywords of read_metadata."""
    return {
        "allow_outside_data_dir": location.allow_outside_data_dir, "allow_absolute": location.allow_absolute,
    }  # fmt: skip


def _read_rows(location: DataLocation, saved: pa.Table | None) -> tuple[pa.Table, dict[str, Any], bool]:
    """Return the rows and the header of an index, and whether both are the saved one's, of unchanged metadata."""
    allowed, sources = _allowed(location), location.sources
    options: dict[str, Any] = {"data_dir": os.path.realpath(location.data_dir), "reader": READER, **allowed}
    if sources:
        options["sources"] = [source.key() for source in sources]
    header = {} if saved is None else header_of(saved)
    # version 3 differs by the checksum alone
    is_current = header.get("version") in (3, VERSION) and header.get("options") == options
    if saved is not None and is_current and _is_unchanged(header["stamp"], location):
        return rows_of_saved(saved), {**header, "version": VERSION}, True
    # The stamp is computed before reading: the next start then notices a change that happens while we read.
    header = {"version": VERSION, "options": options, "stamp": _stamp(location)}
    if sources:
        outside = location.allow_outside_data_dir
        metadata, counts = read_sources(sources, location.data_dir, allow_outside_data_dir=outside)
        header["rows_of_sources"] = counts
    else:
        metadata = read_metadata(
            location.metadata_path, location.data_dir, allow_outside_data_dir=location.allow_outside_data_dir,
            allow_absolute=location.allow_absolute,
        )  # fmt: skip
    header["from_metadata"] = metadata.notes
    # As Python objects, a million rows need much more memory than as columns: they end with this function.
    return rows_of_metadata(metadata), header, False


def _check_paths_again(files: Files, location: DataLocation, header: dict[str, Any]) -> None:
    paths, root = files.paths_to_probe_by_row(), location.data_dir
    if location.sources:
        counts, outside = header["rows_of_sources"], location.allow_outside_data_dir
        check_sources(paths, counts, location.sources, root, allow_outside_data_dir=outside)
    else:
        check_paths(paths, root, location.metadata_path, **_allowed(location))


def _stamp(location: DataLocation) -> dict[str, Any]:
    """Return what shows whether the metadata has changed since, for all sources."""
    if not location.sources:
        return stamp_of(location.metadata_path)
    return {"sources": [stamp_of(source.metadata_path, source.rules) for source in location.sources]}


def _is_unchanged(saved: dict[str, Any], location: DataLocation) -> bool:
    if not location.sources:
        return is_unchanged(saved, location.metadata_path)
    stamps = zip(saved["sources"], location.sources, strict=True)
    return all(is_unchanged(stamp, source.metadata_path, source.rules) for stamp, source in stamps)


def load_index(index_path: Path, data_dir: Path) -> Index:
    """Memory-map a saved index without reading metadata or media files.

    Raises:
        UserError: exit code 5 if there is none, or it is damaged.
    """
    table = load_table(index_path)
    if table is None:
        hint = "delete it, the next start builds it again"
        raise UserError(str(index_path), "is not a complete index", hint, STORAGE)
    return _to_index(table, data_dir, index_path)


def index_summary(index: Index) -> list[str]:
    """Return lines for the start report: counts, sizes, lengths, problems by class, notes."""
    lines = [f"{len(index)} {plural(len(index), 'row')}, {np.count_nonzero(index.usable)} usable"]
    for name, kind in (("image", IMAGE), ("video", VIDEO)):
        selected = index.usable & (index.kind == kind)
        if not selected.any():
            continue
        side = np.sqrt(index.width[selected].astype(np.float64) * index.height[selected])
        count = int(np.count_nonzero(selected))
        parts = [f"{count} {plural(count, name)}", f"mean side {_spread(side)} pixels"]
        if kind == VIDEO:
            parts.append(f"{_spread(index.frames[selected])} frames")
            timed = selected & (index.fps > 0)
            if timed.any():
                parts.append(f"{_spread(index.frames[timed] / index.fps[timed], 1)} seconds")
        lines.append(", ".join(parts))
    for counted in sorted(pc.value_counts(index.problem).to_pylist(), key=lambda c: (-c["counts"], c["values"])):
        if counted["values"]:
            row = int(np.flatnonzero(pc.equal(index.problem.cast(pa.large_string()), counted["values"]))[0])
            what = index.detail[row].as_py()
            rows = plural(counted["counts"], "row")
            lines.append(f"{counted['counts']} {rows} cannot be used: {counted['values']} (first: row {row}, {what})")
    return [*lines, *index.notes]


def _spread(values: np.ndarray, digits: int = 0) -> str:
    low, middle, high = np.quantile(values, (0, 0.5, 1))
    return f"{low:.{digits}f} / {middle:.{digits}f} / {high:.{digits}f} (min / median / max)"


def _to_index(table: pa.Table, data_dir: Path, path: Path) -> Index:
    header, table = header_of(table), with_declared_stills(table)
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
        what = "the index was rebuilt from changed metadata while this run uses it"
        hint = "start again, and do not change a metadata file that a run uses"
        raise UserError(str(path), what, hint, STORAGE)
    return index
