"""Tests of videox.data.loader and of the dataset: whatever a decoder raises, or dies of, is a bad sample."""

from __future__ import annotations

import errno
import os
import select
import signal
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

import forkserver
import numpy as np
import plans
import pytest
from hypothesis import given
from hypothesis import strategies as st

from videox.data import loader as module
from videox.data.dataset import Batch, Sample, TokenLengthDataset
from videox.data.index.index import Index, MediaColumns
from videox.data.loader import BatchLoader
from videox.data.plan.epoch import PlannedSample
from videox.errors import DATA, UserError
from videox.shapes import Bucket

ROWS = 8
END_SECONDS = 20.0  # for a worker to end after its training process; the machine of a test may be busy


def index_of(rows: int) -> Index:
    sides = np.full(rows, 64)
    media = MediaColumns(kind=np.ones(rows), width=sides, height=sides, frames=np.full(rows, 9))
    return Index.from_columns(media, text=["a clip"] * rows, file_path=[f"{row}.mp4" for row in range(rows)])


class FaultyDataset(TokenLengthDataset):
    """Calls a function with the row before it returns pixels that are equal to the row."""

    def __init__(self, fault: Callable[[int], None]) -> None:
        super().__init__(index_of(ROWS), policy=plans.POLICY, reader="pyav", caption_dropout=0.0)
        self.fault = fault

    def _read(self, sample: Sample, path: Path) -> np.ndarray:
        assert path.name == f"{sample['planned'].row}.mp4"
        self.fault(sample["planned"].row)
        return np.full((1, 64, 64, 3), sample["planned"].row, np.uint8)


def planned(row: int) -> PlannedSample:
    return PlannedSample(row, 0, row, 0, 1.0, 0.5, Bucket(1, 64, 64), row, 0, True)


def batches() -> list[list[PlannedSample]]:
    return [[planned(row)] for row in range(ROWS)]


def check_batches(found: list[Batch], bad_rows: dict[int, str]) -> None:
    """Check that all rows came in order, and which of them are bad; values: part of the detail."""
    assert [batch["rows"] for batch in found] == [[row] for row in range(ROWS)]
    assert {bad.row for batch in found for bad in batch["bad"]} == bad_rows.keys()
    for row, batch in enumerate(found):
        is_bad = row in bad_rows
        assert batch["weights"].tolist() == [0.0 if is_bad else 1.0]
        assert batch["pixels"].unique().tolist() == [0 if is_bad else row]
        for bad in batch["bad"]:
            assert bad_rows[row] in bad.detail
            assert (bad.path, bad.media_class) == (f"{row}.mp4", "crashed")


# -------------------------------------------------------------------------------------------------------- exceptions

ERRORS = (
    RuntimeError("Failed to decode frame 0: Decoding of color planes failed"),  # Pillow, for a damaged AVIF
    AttributeError("'NoneType' object has no attribute 'width'"),  # PyAV, for a codec that it does not know
    *(kind("x") for kind in (ValueError, KeyError, OSError, EOFError, SystemError, AssertionError, RecursionError)),
    UnicodeDecodeError("utf-8", b"x", 0, 1, "invalid"),
    struct.error("short"),
    type("OwnError", (Exception,), {})("of a library"),
)


@given(st.sampled_from(ERRORS), st.integers(0, ROWS - 1))
def test_whatever_a_decoder_raises_is_a_bad_sample(error: Exception, row: int) -> None:
    def fault(_: int) -> None:
        raise error

    sample = FaultyDataset(fault)[planned(row)]
    bad = sample["bad"]
    assert bad is not None
    assert (bad.row, bad.media_class, sample["planned"].weight) == (row, "undecodable", 0.0)
    assert f"{type(error).__name__}: {error}" in bad.detail
    assert "(test_loader.py:" in bad.detail
    assert "\n" not in bad.detail
    assert not sample["pixels"].any()


@pytest.mark.parametrize(
    ("error", "media_class"),
    [
        (MemoryError(), "too_large"),
        (OSError(errno.EIO, "x"), "unreadable"),
        (OSError(errno.ESTALE, "x"), "unreadable"),
    ],
)
def test_errors_of_memory_and_disk_have_their_classes(error: Exception, media_class: str) -> None:
    def fault(_: int) -> None:
        raise error

    bad = FaultyDataset(fault)[planned(1)]["bad"]
    assert bad is not None
    assert bad.media_class == media_class


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "x"), UserError("--video_reader", "x", "y"), SystemExit(3)])
def test_what_is_no_fault_of_the_file_ends_the_run(error: BaseException) -> None:
    def fault(_: int) -> None:
        raise error

    with pytest.raises(type(error)):
        FaultyDataset(fault)[planned(1)]


# ------------------------------------------------------------------------------------------------------------- deaths


def once(path: Path) -> bool:
    """Return True in the first call of any process."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def test_dead_workers_are_replaced_and_only_the_fatal_row_is_bad(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fault(row: int) -> None:
        if row == 2:
            os.kill(os.getpid(), signal.SIGSEGV)
        if row == 3 and once(tmp_path / "killed"):
            os.kill(os.getpid(), signal.SIGKILL)

    before = signal.getsignal(signal.SIGCHLD)
    loader = BatchLoader(FaultyDataset(fault), batches(), workers=2)
    check_batches(list(loader), {2: "the process that read it ended with signal 11 (SIGSEGV)"})
    check_batches(list(loader), {2: "SIGSEGV"})  # the next epoch, without another death
    assert signal.getsignal(signal.SIGCHLD) == before
    lines = [record.getMessage() for record in caplog.records]
    assert any("signal 11 (SIGSEGV) while it read row 2 ('2.mp4'); the row is left out" in line for line in lines)
    assert any("signal 9 (SIGKILL) while it read row 3 ('3.mp4'); the row is read once more" in line for line in lines)
    assert len(lines) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("die", "detail"),
    [
        (os.abort, "signal 6 (SIGABRT)"),
        (lambda: os._exit(3), "exit code 3"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "signal 9 (SIGKILL)"),
        (lambda: os.kill(os.getpid(), signal.SIGBUS), "signal 7 (SIGBUS)"),
    ],
)
@pytest.mark.parametrize("workers", [1, 3])
def test_each_kind_of_death_costs_one_row(die: Callable[[], None], detail: str, workers: int) -> None:
    def fault(row: int) -> None:
        if row == 5:
            die()

    check_batches(list(BatchLoader(FaultyDataset(fault), batches(), workers=workers)), {5: detail})


@pytest.mark.slow
def test_workers_that_die_before_they_read_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "init_worker", lambda worker: os._exit(4))
    with pytest.raises(
        UserError, match="3 of its processes ended one after the other, the last one with exit code 4"
    ) as error:
        list(BatchLoader(FaultyDataset(lambda row: None), batches(), workers=1))
    assert error.value.exit_code == DATA


def test_an_exception_that_is_no_bad_sample_is_raised_from_a_worker() -> None:
    def fault(row: int) -> None:
        if row == 1:
            raise UserError("--video_reader decord", "decord is not installed", "pip install decord")

    with pytest.raises(RuntimeError, match="decord is not installed"):  # torch's, with the traceback of the worker
        list(BatchLoader(FaultyDataset(fault), batches(), workers=1))


# ------------------------------------------------------------------------------------------------ the end of workers


def read_without_an_end() -> int:
    """Wait for a worker that reads forever; entry point of a forked process."""
    note = Path(sys.argv[1])

    def fault(row: int) -> None:
        del row
        note.with_suffix(".part").write_text(str(os.getpid()))
        note.with_suffix(".part").rename(note)
        while True:
            time.sleep(0.01)

    next(iter(BatchLoader(FaultyDataset(fault), batches(), workers=1)))
    return 0


def test_a_worker_that_reads_forever_ends_with_the_training_process(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    entry = "tests.data.test_loader:read_without_an_end"
    process = forkserver.shared().start([str(note)], tmp_path / "log", entry_point=entry)
    process.wait_until(note.exists)
    worker = os.pidfd_open(int(note.read_text()))
    process.signal(signal.SIGKILL)  # not its worker
    process.wait()
    ended = select.select([worker], [], [], END_SECONDS)[0]
    if not ended:
        signal.pidfd_send_signal(worker, signal.SIGKILL)
    os.close(worker)
    assert ended, f"the worker is still there after {END_SECONDS} s"
