"""The sources of a run: the lists and folders that its rows come from, each with its captions and repeats.

Several sources become one index. A row's file_path is then relative to the deepest folder that contains the data
folders of all sources, so that it stays valid when that folder is moved. Light imports only, as in index.py.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from videox.data.index.captions import pack_captions, unpack_captions, with_source_rules
from videox.data.index.folders import ALL_FILES, FolderRules
from videox.data.index.metadata import MAX_WEIGHT, Metadata, check_paths, read_metadata
from videox.data.index.scan import Files
from videox.data.index.table import header_of, load_table, repeated_string
from videox.errors import DATA, UserError, plural


@dataclass(frozen=True)
class CaptionEdits:
    """How the captions of a source are changed when it is read, in the order of the attributes.

    Each caption of a row is changed. What `CaptionRules` do in a run comes later.

    Attributes:
        from_name: the caption is the name of the file without suffix, with spaces for underscores.
        first_line: only the first line of a caption is used.
        missing: the caption of files that have none.
        fixed: the caption of every file; None keeps their own.
        prefix: text that is put before every caption, without a space in between; the tags of a run are shuffled
            without it and the suffix.
        suffix: text that is put after every caption.
    """

    from_name: bool = False
    first_line: bool = False
    missing: str = ""
    fixed: str | None = None
    prefix: str = ""
    suffix: str = ""

    def apply(self, text: str, file_path: str) -> str:
        """Return the captions of a row after these changes, as `pack_captions` stores them.

        Args:
            text: the row's captions, as `pack_captions` stores them.
            file_path: of the row.
        """
        row = unpack_captions(text)
        captions: tuple[str, ...] = row.captions
        if self.from_name:
            captions = (Path(file_path).stem.replace("_", " "),)
        if self.first_line:
            captions = tuple(caption.partition("\n")[0].strip() for caption in captions)
        captions = tuple(caption if caption.strip() else self.missing for caption in captions)
        if self.fixed is not None:
            captions = (self.fixed,)
        return with_source_rules(
            pack_captions(row._replace(captions=captions)), prefix=self.prefix, suffix=self.suffix
        )


UNCHANGED = CaptionEdits()


@dataclass(frozen=True)
class Source:
    """A list or folder of a run's data.

    Attributes:
        metadata_path: a metadata file or folder that `read_metadata` accepts.
        data_dir: the folder that its file_path values are relative to.
        rules: which files of a folder are read.
        captions: how captions are changed.
        weight: how often each of its rows occurs in an epoch, on average; multiplied by the weight of the row.
        allow_absolute: allow absolute paths outside of data_dir, for a list that no data folder is given for.
    """

    metadata_path: Path
    data_dir: Path
    rules: FolderRules = ALL_FILES
    captions: CaptionEdits = UNCHANGED
    weight: float = 1.0
    allow_absolute: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether it is read as `--train_data_meta` alone would be."""
        return self == Source(self.metadata_path, self.data_dir, allow_absolute=self.allow_absolute)

    def key(self) -> dict[str, Any]:
        """Return everything that its rows depend on as JSON values, besides the content of files."""
        paths = {"metadata_path": os.path.realpath(self.metadata_path), "data_dir": os.path.realpath(self.data_dir)}
        values: dict[str, Any] = json.loads(json.dumps(asdict(self) | paths))
        return values

    def describe(self) -> str:
        """Return one line: the path and what is not the default."""
        captions = {
            name: value if value is True else repr(value)
            for name, value in asdict(self.captions).items()
            if value != getattr(UNCHANGED, name)
        }
        parts = [f"captions in {' or '.join(self.rules.caption_suffixes)}"] if self.rules != ALL_FILES else []
        parts += self.rules.describe()
        parts += [f"caption {name.replace('_', ' ')}{'' if v is True else f' {v}'}" for name, v in captions.items()]
        parts += [f"repeats {self.weight:g}"] if self.weight != 1 else []
        details = f" ({', '.join(parts)})" if parts else ""
        return os.path.realpath(self.metadata_path) + details


def common_folder(sources: Sequence[Source]) -> Path:
    """Return the folder that the rows' file_path is relative to: the only data folder, or the deepest common one."""
    if len(sources) == 1:
        return sources[0].data_dir
    return Path(os.path.commonpath([os.path.realpath(source.data_dir) for source in sources]))


def index_name(sources: Sequence[Source]) -> str:
    """Return the file name of the index of these sources; it starts with the name of the first one."""
    name = Path(os.path.realpath(sources[0].metadata_path)).name
    if len(sources) > 1:
        paths = json.dumps([os.path.realpath(source.metadata_path) for source in sources])
        name += f"-and-{len(sources) - 1}-more-{hashlib.sha256(paths.encode()).hexdigest()[:8]}"
    return f"{name}.videox-index.arrow"


def read_sources(sources: Sequence[Source], root: Path, *, allow_outside_data_dir: bool) -> tuple[Metadata, list[int]]:
    """Read all sources into one table.

    Args:
        sources: in the order of their rows.
        root: the folder that file_path is made relative to, from `common_folder`.
        allow_outside_data_dir: allow paths that leave the data_dir of their source.

    Returns:
        The rows, and the number of rows of each source.

    Raises:
        UserError: as `read_metadata`, naming the list and its own row number; a weight is too large.
    """
    parts = [_read_source(source, root, allow_outside_data_dir) for source in sources]
    columns = [field.name for field in fields(Metadata) if field.name not in ("source", "notes")]
    merged: dict[str, Any] = {name: list(chain.from_iterable(getattr(p, name) for p in parts)) for name in columns}
    counts = [len(part.file_path) for part in parts]
    notes = []
    for source, part, (first, last) in zip(sources, parts, _ranges(counts), strict=True):
        notes.append(f"rows {first} to {last - 1}: {source.describe()}")
        notes += [f"  {note}" for note in part.notes]
    return Metadata(**merged, source=sources[0].metadata_path, notes=notes), counts


def check_sources(
    paths: Sequence[str], counts: Sequence[int], sources: Sequence[Source], root: Path, *, allow_outside_data_dir: bool
) -> None:
    """Raise as `check_paths` for a path that leaves the data folder of its source.

    Args:
        paths: one per row, relative to root; '' is skipped.
        counts: number of rows of each source.
        sources: in the order of their rows.
        root: from `common_folder`.
        allow_outside_data_dir: check only the names, not where they lead.

    Raises:
        UserError: exit code 3, with the list and its own row number.
    """
    for source, (first, last) in zip(sources, _ranges(counts), strict=True):
        checked = ["" if source.allow_absolute and path.startswith("/") else path for path in paths[first:last]]
        absolute = [path and os.path.join(root, path) for path in checked]  # noqa: PTH118 - a million rows
        check_paths(absolute, source.data_dir, source.metadata_path, allow_outside_data_dir=allow_outside_data_dir)


def require_files_of_each(files: Files, counts: Sequence[int], sources: Sequence[Source]) -> None:
    """Raise if none of the files of a source exists: most likely its disk is not mounted.

    Raises:
        UserError: exit code 3, with the source.
    """
    for source, (first, last) in zip(sources, _ranges(counts), strict=True):
        numbers = [number for number in set(files.file_of_row[first:last].tolist()) if files.paths[number]]
        if numbers and all(files.problem[number] == "missing" for number in numbers):
            what = f"none of its {len(numbers)} {plural(len(numbers), 'file')} exists (first: {files.full_path(min(numbers))!r})"
            hint = "check its folder, and that its disk is mounted"
            raise UserError(str(source.metadata_path), what, hint, DATA)


def measured_before(saved: pa.Table | None, sources: Sequence[Source], root: Path) -> list[pa.Table]:
    """Return saved tables that may contain measurements of these sources, with paths relative to root.

    Args:
        saved: the saved index of these sources, which may have been written for another list of them.
        sources: of the run; the index that each has as the only source of a run is read, too.
        root: from `common_folder`.
    """
    own = [load_table(Path(os.path.realpath(s.metadata_path)).parent / index_name([s])) for s in sources]
    tables = [rebased(table, root) for table in (saved, *own) if table is not None]
    return [table for table in tables if table is not None]


def rebased(table: pa.Table, root: Path) -> pa.Table | None:
    """Return a saved table with file_path relative to root; None if it has no row below root or names no folder."""
    old, new = str(header_of(table).get("options", {}).get("data_dir", "")), os.path.realpath(root)
    if not old or old == new:
        return table if old else None
    paths = table["file_path"].combine_chunks()
    relative = pc.invert(pc.starts_with(paths, "/"))
    below_old, below_new = (f"{folder.rstrip('/')}/" for folder in (old, new))
    if below_old.startswith(below_new):
        prefix = below_old.removeprefix(below_new)
        empty = pa.scalar("", pa.large_string())
        changed = pc.binary_join_element_wise(repeated_string(prefix, len(paths)), paths, empty)
        paths, kept = pc.if_else(relative, changed, paths), None
    elif below_new.startswith(below_old):
        prefix = below_new.removeprefix(below_old)
        kept = pc.and_(relative, pc.starts_with(paths, prefix))
        paths = pc.utf8_slice_codeunits(paths, start=len(prefix), stop=None)
    else:
        return None
    position = table.schema.get_field_index("file_path")
    moved = table.set_column(position, table.schema.field("file_path"), paths)
    return (moved if kept is None else moved.filter(kept)).combine_chunks()


def _read_source(source: Source, root: Path, allow_outside_data_dir: bool) -> Metadata:
    read = read_metadata(
        source.metadata_path,
        source.data_dir,
        allow_outside_data_dir=allow_outside_data_dir,
        allow_absolute=source.allow_absolute,
        rules=source.rules,
    )
    heavy = max((weight * source.weight for weight in read.weight), default=0)
    if heavy > MAX_WEIGHT:
        what = f"a row would occur {heavy:g} times in an epoch, at most {MAX_WEIGHT} is possible"
        raise UserError(str(source.metadata_path), what, "lower its repeats", DATA)
    texts = read.text
    if source.captions != UNCHANGED:
        pairs = zip(read.text, read.file_path, read.problem, strict=True)
        texts = [text if problem else source.captions.apply(text, path) for text, path, problem in pairs]
    below = os.path.relpath(os.path.realpath(source.data_dir), os.path.realpath(root))
    paths = read.file_path
    if below != ".":
        unusable = ("no_file_path", "bad_file_path")
        paths = [
            path if problem in unusable or path.startswith("/") else f"{below}/{path}"
            for path, problem in zip(read.file_path, read.problem, strict=True)
        ]
    return replace(read, file_path=paths, text=texts, weight=[weight * source.weight for weight in read.weight])


def _ranges(counts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the first row of each source and the row after its last one."""
    first = 0
    for count in counts:
        yield first, first + count
        first += count
