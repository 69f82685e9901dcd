"""Tests of videox.distributed.signals outside of the steps; tests/runs/test_stops.py has those of a whole run."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest
from crashes import fork, wait_for
from dispositions import default_signals

from videox.distributed.signals import ECHO_SECONDS, STOP_SIGNALS, StopOutsideSteps, StopRequest
from videox.errors import INTERRUPTED, STOPPED, StopSignal, error_line, exit_code
from videox.run.lifecycle import open_run
from videox.run.status import RunStatus, read_status


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_signal_outside_the_steps_stops_the_run_and_its_status_says_so(tmp_path: Path, number: int) -> None:
    with default_signals():
        with (
            pytest.raises(StopSignal) as raised,
            StopOutsideSteps() as signals,
            open_run(tmp_path, resume=None, verify=False, is_main=True, gather=lambda value: [value]),
        ):
            signals.begin()
            signal.raise_signal(number)
        for each in STOP_SIGNALS:  # ignored until the process has ended
            signal.raise_signal(each)
    code = INTERRUPTED if number == signal.SIGINT else STOPPED
    status = read_status(tmp_path)
    assert (exit_code(raised.value), status.state, status.exit_code) == (code, "stopped", code)
    assert status.error == error_line(raised.value)
    assert "outside a step; nothing was saved" in status.error


def test_further_signals_change_nothing_while_the_status_is_written() -> None:
    with default_signals(), StopOutsideSteps() as signals:
        signals.begin()
        with pytest.raises(StopSignal):
            signal.raise_signal(signal.SIGTERM)
        for number in STOP_SIGNALS:
            signal.raise_signal(number)


@pytest.mark.parametrize("during", ["running", "failed"])
def test_a_signal_while_the_status_is_written_does_not_leave_it_at_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, during: str
) -> None:
    write = RunStatus.write

    def interrupted_write(status: RunStatus, state: str, **fields: object) -> None:
        write(status, state, **fields)
        if state == during:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(RunStatus, "write", interrupted_write)
    with (
        default_signals(),
        pytest.raises((StopSignal, ValueError)) as raised,
        StopOutsideSteps() as signals,
    ):
        signals.begin()
        with open_run(tmp_path, resume=None, verify=False, is_main=True, gather=lambda value: [value]):
            raise ValueError("of the run")
    status = read_status(tmp_path)
    assert status.state == {"running": "stopped", "failed": "failed"}[during]
    assert status.exit_code == exit_code(raised.value)


def test_a_signal_that_became_another_error_or_was_ignored_stops_the_run() -> None:
    """A library that the signal interrupts may catch StopSignal."""
    with default_signals(), StopOutsideSteps() as signals:
        signals.begin()
        with signals.raised():
            pass
        with pytest.raises(StopSignal, match="SIGTERM") as raised, signals.raised():
            try:
                signal.raise_signal(signal.SIGTERM)
            except StopSignal:
                raise ValueError("could not determine the shape") from None
        assert isinstance(raised.value.__cause__, ValueError)
        with pytest.raises(StopSignal, match="SIGTERM"), StopRequest():
            raise AssertionError("the steps have begun")


def test_a_run_without_a_signal_leaves_the_handlers_as_they_were() -> None:
    with default_signals():
        before = [signal.getsignal(number) for number in STOP_SIGNALS]
        with StopOutsideSteps() as signals:
            signals.begin()
            assert [signal.getsignal(number) for number in STOP_SIGNALS] != before
        assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_signals_are_ignored_once_the_run_has_ended() -> None:
    with default_signals(), StopOutsideSteps() as signals:
        signals.begin()
        signals.end()
        for number in STOP_SIGNALS:
            signal.raise_signal(number)


def test_a_signal_during_the_steps_is_a_request_and_the_next_one_does_not_interrupt_the_save() -> None:
    with default_signals(), StopOutsideSteps() as signals:
        signals.begin()
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGTERM)
            assert stop.signal_name == "SIGTERM"
        signal.raise_signal(signal.SIGTERM)  # the status is written, the losses are plotted


@pytest.mark.parametrize("in_a_step", [False, True])
def test_a_later_ctrl_c_exits_at_once_after_the_status(tmp_path: Path, in_a_step: bool) -> None:
    def run() -> None:
        with default_signals(), StopOutsideSteps() as signals:
            signals.begin()
            signals.before_exit = (tmp_path / "status").touch
            with StopRequest() if in_a_step else contextlib.nullcontext():
                try:
                    signal.raise_signal(signal.SIGINT)
                except StopSignal:
                    assert not in_a_step
                time.sleep(1.2 * ECHO_SECONDS)
                signal.raise_signal(signal.SIGINT)
                os._exit(1)

    assert wait_for(fork(run)) == 128 + signal.SIGINT
    assert (tmp_path / "status").exists()


def test_a_forked_data_worker_does_not_raise() -> None:
    def worker() -> None:
        signal.raise_signal(signal.SIGTERM)

    with default_signals(), StopOutsideSteps() as signals:
        signals.begin()
        assert wait_for(fork(worker)) == 0
