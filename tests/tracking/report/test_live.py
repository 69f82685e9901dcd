"""Tests of videox.tracking.report.live: a page while a run trains, which the run neither waits for nor fails by."""

from __future__ import annotations

import json
import logging
import shutil
import time
from pathlib import Path

import pytest
from run_folders import HOSTILE, write_run

from videox.tracking.jsonl import read_lines
from videox.tracking.report.live import LiveReport
from videox.tracking.report.page import PAGE


def wait_for(report: LiveReport, seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while report._is_running():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow  # its process has the lowest priority
def test_a_page_is_written_by_another_process_and_not_too_often(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", texts=HOSTILE[:1], sample_steps=())
    report = LiveReport(folder, seconds=0.01)
    report.start()
    first = report._process
    report.update(120.0)
    assert report._process is first  # one at a time
    wait_for(report)
    assert (folder / PAGE).is_file()
    report.update(120.0)
    assert report._process is None  # not due: the first page took longer than a twentieth of the time since
    (folder / PAGE).unlink()
    report.finish(wait=240.0)
    assert (folder / PAGE).is_file() and not report._is_running()
    end = read_lines(folder / "events.jsonl")[-1]
    assert (end["event"], end["state"], end["step"], end["exit_code"]) == ("end", "stopped", 60, 75)
    report.finish()
    report.update()
    assert report._process is None and len(read_lines(folder / "events.jsonl")) == 4


@pytest.mark.slow  # as above
def test_a_run_that_ends_while_its_page_is_written_gets_the_last_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_run(tmp_path / "run", texts=HOSTILE[:1], sample_steps=())
    report = LiveReport(folder, seconds=60.0)
    with caplog.at_level(logging.WARNING):
        report.start()
        report.finish(wait=0.0)
        assert report._is_running()
        wait_for(report)
    assert (folder / PAGE).is_file() and not caplog.records


def test_a_page_that_cannot_be_written_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_run(tmp_path / "run", texts=HOSTILE[:1], sample_steps=())
    report = LiveReport(folder, seconds=0.01)
    shutil.rmtree(folder)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            report.start()
            wait_for(report)
            report._due = 0.0
    (record,) = caplog.records
    assert "report.html was not written" in record.getMessage() and "is not the output_dir" in record.getMessage()


@pytest.mark.parametrize(("seconds", "enabled"), [(0.0, True), (60.0, False)])
def test_a_report_that_is_off_starts_no_process(tmp_path: Path, seconds: float, enabled: bool) -> None:
    folder = write_run(tmp_path / "run", texts=HOSTILE[:1], sample_steps=())
    before = (folder / "events.jsonl").read_bytes()
    report = LiveReport(folder, seconds, enabled=enabled)
    report.start()
    report.update(5.0)
    assert report._process is None
    report.finish()
    assert report._process is None and not (folder / PAGE).exists()
    lines = (folder / "events.jsonl").read_bytes()[len(before) :].splitlines()
    assert [json.loads(line)["event"] for line in lines] == (["end"] if enabled else [])


def test_a_run_that_never_began_records_nothing(tmp_path: Path) -> None:
    report = LiveReport(tmp_path / "none", 60.0)
    report.finish()
    assert not (tmp_path / "none").exists()
