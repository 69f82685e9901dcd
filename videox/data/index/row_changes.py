"""Rows of a run: stored with the run, compared with those of a later launch, and read again to finish an epoch."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from videox.data.index.index import Index
from videox.data.index.table import MEASURED, usable_of
from videox.data.media.container import DECODINGS
from videox.errors import STORAGE, UserError
from videox.files import atomic_write

SHOWN_CAPTION = 60  # characters of a caption in a message
TEXTS = ("file_path", "text", "detail")
COLUMNS = (*TEXTS, *MEASURED, "problem", "weight")


class RowChange(NamedTuple):
    """A row that differs: its number in the data of now (of then, for a row that is gone), its file, and how."""

    row: int
    path: str
    what: str

    def __str__(self) -> str:
        return f"row {self.row} {self.path}: {self.what}"


def save_rows(index: Index, path: Path) -> None:
    """Write the columns of an index to a compressed Arrow file, unless it exists.

    Args:
        index: of the launch.
        path: replaced atomically; its folder is created.

    Raises:
        UserError: (STORAGE) it cannot be written.
    """
    if path.is_file():
        return
    table = pa.table({name: getattr(index, name) for name in COLUMNS})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            atomic_write(path) as temporary,
            temporary.open("xb") as file,
            pa.ipc.new_file(file, table.schema, options=options) as writer,
        ):
            writer.write_table(table)
    except OSError as error:
        what = f"the rows of the run cannot be written ({error.strerror})"
        raise UserError(str(path), what, "free disk space, or make the folder writable", STORAGE) from error


def load_rows(path: Path, data_dir: Path) -> Index | None:
    """Return an index of rows that save_rows wrote; None if there is no such file, or if it is damaged."""
    try:
        with pa.memory_map(str(path)) as mapped:
            table = pa.ipc.open_file(mapped).read_all().combine_chunks()
        table.validate(full=True)
        if table.schema.names != [*COLUMNS]:
            return None
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        return None
    numbers = {name: table[name].combine_chunks().to_numpy(zero_copy_only=False) for name in (*MEASURED, "weight")}
    strings = {name: table[name].combine_chunks() for name in (*TEXTS, "problem")}
    return Index(data_dir=data_dir, **strings, **numbers, usable=usable_of(table))


def join_rows(now: Index, then: Index) -> Index:
    """Return one index with the rows of `now`, followed by those of `then` as its `earlier_rows`."""
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(now, name), getattr(then, name)]) for name in (*MEASURED, "weight")
    }
    columns["usable"] = np.concatenate([now.usable, then.usable])
    texts = {name: pa.concat_arrays([getattr(now, name), getattr(then, name)]) for name in TEXTS}
    problems = [index.problem.cast(pa.large_string()) for index in (now, then)]
    problem = pc.dictionary_encode(pa.concat_arrays(problems))
    return replace(now, **columns, **texts, problem=problem, stored=None, earlier_rows=len(then))


def compare_rows(then: Index, now: Index) -> list[RowChange]:
    """Return the rows that were added, changed or removed, sorted by row; rows are matched by their files.

    A file that several rows have is matched in the order of its rows. If all rows are the same ones in another order,
    the first row that moved is returned.
    """
    old_keys, new_keys = _keys(then), _keys(now)
    old_rows = {key: row for row, key in enumerate(old_keys)}
    changes = []
    for row, key in enumerate(new_keys):
        before = old_rows.get(key)
        if before is None:
            changes.append(RowChange(row, key[0], "is new"))
        elif what := _differences(then, before, now, row):
            changes.append(RowChange(row, key[0], " and ".join(what)))
    remaining = {*new_keys}
    gone = [RowChange(row, key[0], "is gone") for row, key in enumerate(old_keys) if key not in remaining]
    if not changes and not gone:
        moved = (row for row, key in enumerate(new_keys) if old_rows[key] != row)
        changes = [RowChange(row, new_keys[row][0], f"was row {old_rows[new_keys[row]]}") for row in moved][:1]
    return sorted([*changes, *gone])


def _keys(index: Index) -> list[tuple[str, int]]:
    """Return for each row its file, and the number of earlier rows with the same file."""
    seen: Counter[str] = Counter()
    keys = []
    for path in index.file_path.to_pylist():
        keys.append((path, seen[path]))
        seen[path] += 1
    return keys


def _differences(then: Index, before: int, now: Index, row: int) -> list[str]:
    """Return in words what differs between a row then and now; a file that cannot be read now is no difference."""
    found = []
    if then.text[before] != now.text[row]:
        found.append(f"caption was {_shown_caption(then, before)} and is {_shown_caption(now, row)}")
    if now.usable[row]:
        was, now_is = (_shape(index, number) for index, number in ((then, before), (now, row)))
        if not then.usable[before]:
            found.append(f"could not be read and is {now_is}")
        elif was != now_is:
            found.append(f"was {was} and is {now_is}")
        elif bits := int(then.decoding[before]) ^ int(now.decoding[row]):
            kinds = " and ".join(kind for bit, kind in DECODINGS.items() if bits & bit)
            found.append(f"is decoded differently by this version ({kinds})")
        elif then.fps[before] != now.fps[row]:
            found.append(f"had {then.fps[before]:g} frames per second and has {now.fps[row]:g}")
    if then.weight[before] != now.weight[row]:
        found.append(f"weight was {then.weight[before]:g} and is {now.weight[row]:g}")
    return found


def _shown_caption(index: Index, row: int) -> str:
    """Return the captions of a row as a message shows them."""
    texts = index.captions(row).captions
    shown = [repr(text if len(text) <= SHOWN_CAPTION else f"{text[:SHOWN_CAPTION]}...") for text in texts]
    return " | ".join(shown)


def _shape(index: Index, row: int) -> str:
    size = f"{index.width[row]}x{index.height[row]}"
    return f"an image of {size}" if index.kind[row] == 0 else f"a video of {index.frames[row]} frames of {size}"
