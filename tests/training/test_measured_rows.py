"""Tests of videox.training.measured_rows: which rows validations measure, and what is said of a list of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from plans import SETTINGS

from videox.data.index.index import Index, MediaColumns
from videox.data.plan.settings import columns_of
from videox.errors import UserError
from videox.training.measured_rows import list_notes, row_sets

TRAINED = ["a.mp4", "b.mp4", "sub/c.mp4", "d.mp4"]


def index_of(folder: Path, names: list[str], *, height: int = 640) -> Index:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    count = len(names)
    sides = np.full(count, 480), np.array([height] * (count - 1) + [640])
    media = MediaColumns(np.ones(count, np.uint8), *sides, np.full(count, 200))
    return Index.from_columns(media, file_path=names, text=["a caption"] * count, data_dir=folder)


def schedule_of(folder: Path, listed: Index | None, **changes: object) -> SimpleNamespace:
    index = index_of(folder / "data", TRAINED)
    settings = replace(SETTINGS, **changes)
    return SimpleNamespace(
        index=index, columns=columns_of(index, by_second=False), settings=settings, validation=listed
    )


def test_a_list_is_measured_beside_as_many_training_rows(tmp_path: Path) -> None:
    listed = index_of(tmp_path / "own", ["1.mp4", "2.mp4"])
    held_out, beside = row_sets(schedule_of(tmp_path, listed))
    assert (held_out.name, beside.name) == ("held_out", "training")
    assert held_out.index is listed and sorted(held_out.plan.row) == [0, 1]
    assert len(beside.plan.row) == 2 and beside.index.data_dir == tmp_path / "data"
    assert list_notes(schedule_of(tmp_path, listed)) == []


def test_without_a_list_the_rows_of_the_plan_are_measured(tmp_path: Path) -> None:
    schedule = schedule_of(tmp_path, None, held_out_share=0.5)
    held_out, beside = row_sets(schedule)
    assert held_out.index is beside.index is schedule.index and list_notes(schedule) == []
    assert sorted({*held_out.plan.row, *beside.plan.row}) == [0, 1, 2, 3]
    assert [rows.plan for rows in row_sets(schedule_of(tmp_path, None))] == [None, None]


def test_rows_that_are_left_out_and_files_that_are_trained_as_well_are_named(tmp_path: Path) -> None:
    listed = index_of(tmp_path / "data", ["d.mp4", "new.mp4", "sub/../sub/c.mp4"])
    assert list_notes(schedule_of(tmp_path, listed)) == [
        "warning: 2 of the 3 rows of --validation_meta are in the training data as well (d.mp4, sub/../sub/c.mp4): "
        "their loss does not show overfitting"
    ]
    narrow = index_of(tmp_path / "own", ["d.mp4", "x.mp4", "y.mp4"], height=8)
    assert list_notes(schedule_of(tmp_path, narrow)) == [
        "--validation_meta: 2 of its 3 rows are not measured (2 too_small)"
    ]
    nothing = index_of(tmp_path / "own", ["d.mp4"])
    nothing = replace(nothing, usable=np.zeros(1, bool))
    with pytest.raises(UserError, match=r"none of its 1 row can be measured \(1 refused\)"):
        row_sets(schedule_of(tmp_path, nothing))
