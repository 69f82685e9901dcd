"""Tests of videox.data.index.row_changes: stored rows are read back equal, and differences are named by row."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from videox.data.index.index import Index, MediaColumns
from videox.data.index.row_changes import compare_rows, join_rows, load_rows, save_rows
from videox.data.media.container import MIRRORED

PATHS = ["a.mp4", "b.mp4", "c.png", "b.mp4"]
TEXTS = ["a tower", "", "a cat", "a second caption"]


def index_of(paths: list[str], texts: list[str], frames: int = 9, usable: list[bool] | None = None) -> Index:
    rows = len(paths)
    kind = np.array([0 if path.endswith(".png") else 1 for path in paths], np.uint8)
    counts = np.where(kind == 1, frames, 1).astype(np.int32)
    media = MediaColumns(kind, np.full(rows, 64, np.int32), np.full(rows, 48, np.int32), counts, np.full(rows, 24.0))
    return Index.from_columns(
        media, usable=None if usable is None else np.array(usable), file_path=paths, text=texts, data_dir=Path("clips")
    )


def described(then: Index, now: Index) -> list[str]:
    return [str(change) for change in compare_rows(then, now)]


def test_stored_rows_are_read_back_equal_and_not_written_twice(tmp_path: Path) -> None:
    index, path = index_of(PATHS, TEXTS, usable=[True, False, True, True]), tmp_path / "rows/x.arrow"
    save_rows(index, path)
    loaded = load_rows(path, Path("clips"))
    assert loaded is not None
    for field in fields(Index):
        then, now = getattr(index, field.name), getattr(loaded, field.name)
        same = np.array_equal(then, now) if isinstance(then, np.ndarray) else then == now
        if isinstance(then, pa.DictionaryArray):
            same = then.to_pylist() == now.to_pylist()
        assert same, field.name
    assert loaded.fingerprint() == index.fingerprint()
    before = path.stat().st_mtime_ns
    save_rows(index_of(["other.mp4"], [""]), path)
    assert path.stat().st_mtime_ns == before


def test_missing_and_damaged_files_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "x.arrow"
    assert load_rows(path, tmp_path) is None
    save_rows(index_of(PATHS, TEXTS), path)
    content = path.read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"text"):
        path.write_bytes(damaged)
        assert load_rows(path, tmp_path) is None


def test_equal_rows_have_no_changes() -> None:
    assert described(index_of(PATHS, TEXTS), index_of(PATHS, TEXTS)) == []


def test_each_kind_of_change_is_named() -> None:
    then = index_of(PATHS, TEXTS, usable=[True, True, False, True])
    now = index_of(["new.mp4", "b.mp4", "c.png", "b.mp4"], [*TEXTS[:1], "a tall tower", *TEXTS[2:]])
    assert described(then, now) == [
        "row 0 a.mp4: is gone",
        "row 0 new.mp4: is new",
        "row 1 b.mp4: caption was '' and is 'a tall tower'",
        "row 2 c.png: could not be read and is an image of 64x48",
    ]
    longer = index_of(PATHS, TEXTS, frames=12)
    weighted = replace(longer, weight=np.array([1, 2, 1, 1], np.float32))
    assert described(index_of(PATHS, TEXTS), weighted)[1] == (
        "row 1 b.mp4: was a video of 9 frames of 64x48 and is a video of 12 frames of 64x48 and weight was 1 and is 2"
    )
    mirrored = replace(longer, decoding=np.array([MIRRORED, 0, 0, 0], np.uint32))
    assert described(longer, mirrored) == ["row 0 a.mp4: is decoded differently by this version (a mirrored video)"]
    slower = replace(longer, fps=np.array([12, 24, 24, 24], np.float32))
    assert described(longer, slower) == ["row 0 a.mp4: had 24 frames per second and has 12"]


def test_a_row_that_cannot_be_read_now_is_no_change() -> None:
    assert described(index_of(PATHS, TEXTS), index_of(PATHS, TEXTS, usable=[False, True, True, True])) == []


def test_rows_of_one_file_are_matched_in_their_order() -> None:
    then, now = index_of(["a.mp4"] * 3, ["x", "y", "z"]), index_of(["a.mp4"] * 2, ["x", "y"])
    assert described(then, now) == ["row 2 a.mp4: is gone"]
    assert described(now, then) == ["row 2 a.mp4: is new"]


def test_another_order_is_named_by_its_first_row() -> None:
    then, now = index_of(["a.mp4", "b.mp4", "c.mp4"], [""] * 3), index_of(["a.mp4", "c.mp4", "b.mp4"], [""] * 3)
    assert described(then, now) == ["row 1 c.mp4: was row 2"]


def test_long_captions_are_shortened() -> None:
    (change,) = described(index_of(["a.mp4"], ["x" * 500]), index_of(["a.mp4"], ["y" * 500]))
    assert change == f"row 0 a.mp4: caption was {'x' * 60 + '...'!r} and is {'y' * 60 + '...'!r}"


def test_joined_rows_are_found_behind_the_new_ones() -> None:
    now, then = index_of(["new.mp4", "b.mp4"], ["1", "2"]), index_of(PATHS, TEXTS, usable=[True, False, True, True])
    joined = join_rows(now, then)
    assert len(joined) == 6
    assert joined.first_earlier_row == 2
    assert [joined.number(row) for row in (-1, 0, 1, 2, 5)] == [-1, 0, 1, 0, 3]
    for position, (index, row) in enumerate([(now, 0), (now, 1), *((then, row) for row in range(4))]):
        assert joined.file(position) == index.file(row)
        assert joined.caption(position) == index.caption(row)
        assert joined.usable[position] == index.usable[row]
        assert joined.problem[position].as_py() == index.problem[row].as_py()
        assert joined.frames[position] == index.frames[row]
