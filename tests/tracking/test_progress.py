"""Tests of videox.tracking.progress: the step clock, bar and log lines, and output streams that are closed or lost."""

from __future__ import annotations

import io
import os
import pty
import termios
import time
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import run_python

from videox.tracking.progress import ProgressBar, StepClock, StepFacts


class Clock:
    def __init__(self):
        self.time = 100.0

    def __call__(self):
        return self.time


def test_the_clock_counts_waiting_and_excludes_pauses():
    now = Clock()
    clock = StepClock(now=now)
    with clock.waiting():
        now.time += 1
    now.time += 2
    with clock.waiting():
        now.time += 1
    with clock.paused():
        now.time += 100
    assert clock.data_wait == 2
    waited, seconds = clock.data_wait, clock.split()
    first = clock.count(400, seconds, waited)
    assert (first.seconds, first.data_wait, first.tokens_per_second, first.wait_share) == (4, 2, 100, 0.5)
    now.time += 5
    assert clock.data_wait == 0
    second = clock.count(1000, clock.split(), 1.5)
    assert (second.seconds, second.data_wait, second.tokens_per_second) == (5, 1.5, 200)
    assert 100 < second.smooth_tokens_per_second < 200


@given(st.lists(st.tuples(st.integers(0, 10**6), st.floats(0.001, 100)), min_size=1, max_size=50))
def test_smoothed_throughput_is_between_the_throughputs_of_the_steps(steps):
    now = Clock()
    clock, steady = StepClock(now=now), StepClock(now=now)
    speeds = []
    for tokens, seconds in steps:
        now.time += seconds
        times = clock.count(tokens, clock.split(), clock.data_wait)
        same = steady.count(round(seconds * 1000), steady.split(), steady.data_wait)
        speeds.append(times.tokens_per_second)
        assert min(speeds) * (1 - 1e-9) <= times.smooth_tokens_per_second <= max(speeds) * (1 + 1e-9)
        assert same.smooth_tokens_per_second == pytest.approx(1000, abs=501 / min(s for _, s in steps))


def test_waiting_that_ends_with_an_exception_is_counted():
    now = Clock()
    clock = StepClock(now=now)
    with pytest.raises(StopIteration), clock.waiting():
        now.time += 3
        raise StopIteration
    assert clock.data_wait == 3


def test_without_a_terminal_lines_are_printed_instead_of_a_bar():
    stream = io.StringIO()
    bar = ProgressBar(120, initial=20, stream=stream, every_steps=40, every_seconds=0.0)
    for _ in range(100):
        bar.update(0.5, 1234.5, 0.02)
    bar.note("validation 0.25")
    bar.close()
    lines = stream.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "step 21/120",
        "step 61/120",
        "step 101/120",
        "step 120/120",
        "validation 0.25",
    ]
    assert "loss 0.5000, 1,234 tokens/s, data wait 2%, 00:0" in lines[1] and "\r" not in stream.getvalue()


@pytest.mark.parametrize(("steps", "seconds", "lines"), [(1, 0.0, 20), (5, 0.0, 4), (1, 3600.0, 1), (100, 0.0, 1)])
def test_a_line_is_due_when_both_steps_and_seconds_have_passed(steps, seconds, lines):
    stream = io.StringIO()
    bar = ProgressBar(1000, stream=stream, every_steps=steps, every_seconds=seconds)
    for _ in range(20):
        bar.update(0.5, 1.0, 0.0)
    assert len(stream.getvalue().splitlines()) == lines


def test_a_line_has_what_is_known_of_the_step():
    stream = io.StringIO()
    facts = StepFacts(epoch=1.25, lr=1e-4, memory_gib=41.26, mfu=0.384, stragglers=(0.1, 0.05), seconds_left=7325.0)
    ProgressBar(1000, stream=stream).update(0.5, 1234.5, 0.02, facts)
    assert stream.getvalue() == (
        "step 1/1000, epoch 1.25, LR 1.00e-04, loss 0.5000, 1,234 tokens/s, data wait 2%, GPU memory 41.3 GiB, MFU 38%, "
        "waiting for the slowest rank 10% (planned 5%), 2:02:05 left\n"
    )


def read_all(main: int) -> str:
    chunks = []
    with suppress(OSError):  # Linux raises EIO when the other side of the terminal is closed
        while chunk := os.read(main, 65536):
            chunks.append(chunk)
    os.close(main)
    return b"".join(chunks).decode()


def test_on_a_terminal_the_bar_starts_at_the_resumed_step():
    main, worker = pty.openpty()
    termios.tcsetwinsize(worker, (24, 120))
    with os.fdopen(worker, "w") as stream:
        bar = ProgressBar(10, initial=4, stream=stream)
        for _ in range(6):
            bar.update(0.125, 2000.0, 0.5)
            time.sleep(0.11)
        bar.note("a note")
        bar.close()
    output = read_all(main)
    assert "4/10" in output and "10/10" in output and "loss 0.1250, 2,000 tokens/s, data wait 50%" in output
    assert "a note" in output and "\r" in output


def test_on_a_terminal_of_unknown_width_lines_are_printed():
    main, worker = pty.openpty()
    with os.fdopen(worker, "w") as stream:
        ProgressBar(1, stream=stream).update(0.125, 2000.0, 0.5)
    assert read_all(main) == "step 1/1, loss 0.1250, 2,000 tokens/s, data wait 50%, 00:00 left\r\n"


@pytest.mark.parametrize("loss", ["closed", "gone", "pipe", "terminal"])
def test_a_lost_output_stream_does_not_end_the_run(loss):
    main = None
    if loss == "closed":
        stream = io.StringIO()
    elif loss == "terminal":
        main, worker = pty.openpty()
        termios.tcsetwinsize(worker, (24, 120))
        stream = os.fdopen(worker, "w")
    else:
        reader, writer = os.pipe()
        os.close(reader)
        stream = os.fdopen(writer, "w")
    bar = ProgressBar(100, stream=stream, every_steps=1, every_seconds=0.0)
    if loss == "closed":
        stream.close()
    elif loss == "gone":
        os.close(stream.fileno())
    elif loss == "terminal":
        os.close(main)
    for _ in range(100):
        bar.update(1.0, 1.0, 0.0)
    bar.note("still here")
    bar.close()
    assert bar.step == 100


def test_a_run_without_stderr_continues(tmp_path):
    code = (
        "import sys; from videox.tracking.progress import ProgressBar\n"
        "assert sys.stderr is None\n"
        "bar = ProgressBar(3)\n"
        "for _ in range(3): bar.update(1.0, 1.0, 0.0)\n"
        "bar.close(); print('done', bar.step)"
    )
    done = run_python(
        "import os, sys; os.close(2); os.execv(sys.executable, [sys.executable, '-c', sys.argv[1]])", code
    )
    assert (done.returncode, done.stdout) == (0, "done 3\n")


def test_other_processes_than_the_main_one_print_nothing():
    stream = io.StringIO()
    ProgressBar(2, enabled=False, stream=stream).update(1.0, 1.0, 0.0)
    assert stream.getvalue() == ""
