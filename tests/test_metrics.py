"""Serves videox/metrics.py: what a run writes reads back exactly, and no lost disk, terminal or tracker ends it."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from videox.errors import FLAGS, STORAGE, Refusal
from videox.metrics import (
    TRACKERS,
    MetricsLog,
    ProgressBar,
    RunStatus,
    StepClock,
    StepRecord,
    Tracker,
    append_line,
    check_tracker,
    json_line,
    read_lines,
    read_status,
    rewind,
)

ROOT = Path(__file__).resolve().parent.parent


def record(step: int, **changed) -> StepRecord:
    fields = {
        "step": step,
        "loss": 0.5,
        "lr": 2e-5,
        "grad_norm": 1.25,
        "tokens": 13312,
        "tokens_per_second": 1000.0,
        "data_wait": 0.01,
        "rows": [3, 1],
        "buckets": [(49, 512, 512), (1, 256, 992)],
    }
    return StepRecord(**(fields | changed))


def run_python(code: str, *arguments: object, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, **options)


@settings(max_examples=200)
@given(
    loss=st.floats(allow_nan=False, allow_infinity=False),
    lr=st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=True),
    rows=st.lists(st.integers(0, 2**40), max_size=5),
)
def test_a_line_reads_back_exactly(loss, lr, rows):
    line = json_line(record(1, loss=loss, lr=lr, rows=rows, buckets=[(1, 16, 16)] * len(rows)).as_dict())
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    back = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (back["loss"], back["lr"], back["rows"]) == (loss, lr, rows)
    assert math.copysign(1, back["loss"]) == math.copysign(1, loss)


@pytest.mark.parametrize("value", [5e-324, 1.7976931348623157e308, 0.1 + 0.2, float(np.float32(0.1)), -0.0])
def test_extreme_floats_go_through_the_file(tmp_path, value):
    log = MetricsLog(tmp_path)
    log.append(record(1, loss=np.float64(value), rows=np.array([7]), buckets=np.array([[5, 64, 64]])))
    (line,) = read_lines(tmp_path / "metrics.jsonl")
    assert repr(line["loss"]) == repr(value)
    assert (line["rows"], line["buckets"]) == ([7], [[5, 64, 64]])
    assert "non_finite" not in line


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_becomes_null_at_any_depth(value):
    def strict(name):
        raise AssertionError(f"{name} is not JSON")

    assert json.loads(json_line({"step": 1, "loss": value}), parse_constant=strict) == {
        "step": 1,
        "loss": None,
        "non_finite": True,
    }
    nested = json.loads(json_line({"per_sigma": [[0.5, 1.0], [0.9, value]]}), parse_constant=strict)
    assert nested == {"per_sigma": [[0.5, 1.0], [0.9, None]], "non_finite": True}


def test_the_contract_of_a_line(tmp_path):
    log = MetricsLog(tmp_path)
    log.append(record(1))
    log.append(record(2))
    first, second = read_lines(tmp_path / "metrics.jsonl")
    assert list(first) == [
        "step",
        "loss",
        "lr",
        "grad_norm",
        "tokens",
        "tokens_per_second",
        "data_wait",
        "rows",
        "buckets",
    ]
    assert first["buckets"] == [[49, 512, 512], [1, 256, 992]]
    assert second["step"] == 2
    with pytest.raises(ValueError, match="step 4 does not follow step 2"):
        log.append(record(4))
    with pytest.raises(ValueError, match="step 2 does not follow step 2"):
        MetricsLog(tmp_path).append(record(2))
    with pytest.raises(ValueError, match="2 rows but 1 buckets"):
        log.append(record(3, buckets=[(1, 16, 16)]))
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 2


def test_a_process_that_is_not_the_main_one_writes_nothing(tmp_path):
    log, status = MetricsLog(tmp_path / "run", enabled=False), RunStatus(tmp_path / "run", enabled=False)
    log.append(record(1))
    log.sync()
    status.write("running")
    Tracker("tensorboard", tmp_path / "logs", project="p", settings={}, enabled=False).log(record(1))
    stream = io.StringIO()
    ProgressBar(2, enabled=False, stream=stream).update(1.0, 1.0, 0.0)
    assert list(tmp_path.iterdir()) == [] and stream.getvalue() == ""


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_cut_of_the_last_line_is_repaired(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("torn")
    log = MetricsLog(folder)
    for step in (1, 2, 3):
        log.append(record(step))
    path = folder / "metrics.jsonl"
    content = path.read_bytes()
    whole = content.rindex(b"\n", 0, -1) + 1
    path.write_bytes(content[: data.draw(st.integers(whole, len(content) - 1))])
    assert [line["step"] for line in read_lines(path)] == [1, 2]
    again = MetricsLog(folder)
    assert again.last_step == 2
    again.append(record(3))
    assert path.read_bytes() == content


def test_a_killed_writer_leaves_at_most_one_torn_line(tmp_path):
    code = (
        "import sys, itertools, pathlib; sys.path.insert(0, 'tests')\n"
        "from test_metrics import record; from videox.metrics import MetricsLog\n"
        "log = MetricsLog(pathlib.Path(sys.argv[1]))\n"
        "for step in itertools.count(1): log.append(record(step, rows=list(range(500)), buckets=[(1,16,16)] * 500))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    path = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (path.exists() and path.stat().st_size > 10**6) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    log = MetricsLog(tmp_path)
    assert [line["step"] for line in read_lines(path)] == list(range(1, log.last_step + 1))
    assert log.last_step > 50


def test_a_broken_line_inside_is_refused_with_its_number(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(json_line(record(1).as_dict()) + b'{"step": 2, "lo\n')
    with pytest.raises(Refusal, match=r"metrics\.jsonl:2: is not a JSON object") as refusal:
        MetricsLog(tmp_path)
    assert refusal.value.exit_code == STORAGE


def test_a_full_disk_is_refused_and_leaves_whole_lines(tmp_path):
    code = (
        "import resource, sys, pathlib\n"
        "from videox.metrics import append_line; from videox.errors import Refusal\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "append_line(path, {'step': 1, 'note': 'x' * 60})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))\n"
        "try: append_line(path, {'step': 2, 'note': 'x' * 60})\n"
        "except Refusal as refusal: print(refusal.exit_code, refusal.line())"
    )
    path = tmp_path / "metrics.jsonl"
    done = run_python(code, path)
    assert done.stdout.startswith(f"{STORAGE} error: {path}: cannot be written (File too large)"), done.stderr
    assert path.read_bytes() == json_line({"step": 1, "note": "x" * 60})


@given(steps=st.integers(0, 12), step=st.integers(0, 14), torn=st.booleans())
@settings(max_examples=60, deadline=None)
def test_rewind_loses_no_line_and_keeps_every_byte(tmp_path_factory, steps, step, torn):
    folder = tmp_path_factory.mktemp("rewind")
    path, aside = folder / "metrics.jsonl", folder / "superseded-1" / "metrics.jsonl"
    lines = [json_line(record(i, loss=math.nan if i % 3 == 0 else i / 7).as_dict()) for i in range(1, steps + 1)]
    path.write_bytes(b"".join(lines) + (b'{"step": 99' if torn else b""))
    assert rewind(path, step, aside) == max(0, steps - step)
    assert path.read_bytes() == b"".join(lines[:step])
    assert (aside.read_bytes() if aside.exists() else b"") == b"".join(lines[step:])
    assert rewind(path, step, aside) == 0
    assert rewind(folder / "absent.jsonl", 0, aside) == 0


def test_status_reads_back_on_one_line_and_whole(tmp_path):
    assert read_status(tmp_path) is None
    status = RunStatus(tmp_path)
    status.write("running", step=3)
    mine = read_status(tmp_path)
    assert (mine.state, mine.step, mine.exit_code, mine.pid) == ("running", 3, None, os.getpid())
    assert not mine.died
    refusal = Refusal("--train_data_meta", "holds\nno rows", "give rows", 3)
    status.write("failed", exit_code=3, error=refusal.line() + "\nmore")
    found = json.loads((tmp_path / "run_status.json").read_text())
    assert (found["state"], found["exit_code"], found["step"]) == ("failed", 3, 3)
    assert "\n" not in found["error"] and found["error"].startswith("error: --train_data_meta: holds")
    assert not read_status(tmp_path).died
    assert [path.name for path in tmp_path.iterdir()] == ["run_status.json"]
    with pytest.raises(ValueError, match="'done' is none of"):
        status.write("done")


def test_a_heartbeat_writes_only_when_it_is_due(tmp_path):
    lazy, eager = RunStatus(tmp_path / "lazy", interval=3600), RunStatus(tmp_path / "eager", interval=0)
    for status in (lazy, eager):
        status.write("running")
        status.heartbeat(5)
    assert (read_status(tmp_path / "lazy").step, read_status(tmp_path / "eager").step) == (0, 5)
    lazy.write("finished", exit_code=0)
    assert read_status(tmp_path / "lazy").step == 5


@pytest.mark.parametrize("ending", ["kill", "goodbye"])
def test_a_run_that_was_killed_is_known(tmp_path, ending):
    code = (
        "import os, signal, sys, pathlib; from videox.metrics import RunStatus\n"
        "status = RunStatus(pathlib.Path(sys.argv[1])); status.write('running', step=7)\n"
        "if sys.argv[2] == 'kill': os.kill(os.getpid(), signal.SIGKILL)\n"
        "status.write('stopped', exit_code=75)"
    )
    assert run_python(code, tmp_path, ending).returncode == (-signal.SIGKILL if ending == "kill" else 0)
    status = read_status(tmp_path)
    assert (status.died, status.step) == (ending == "kill", 7)


def test_a_reused_process_number_another_host_and_a_torn_file_count_as_dead(tmp_path):
    RunStatus(tmp_path).write("running", step=1)
    path = tmp_path / "run_status.json"
    content = path.read_text()
    assert not read_status(tmp_path).died
    for change in ({"started": "1"}, {"host": "elsewhere"}, {"pid": 2**22 + 1}):
        path.write_text(json.dumps(json.loads(content) | change))
        assert read_status(tmp_path).died, change
    for torn in (content[:20], "", "[]", '{"state": "running"}'):
        path.write_text(torn)
        assert read_status(tmp_path).died, torn


def test_a_status_that_cannot_be_written_warns_once(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    status = RunStatus(tmp_path / "file")
    with caplog.at_level(logging.WARNING):
        status.write("running")
        status.write("failed", exit_code=5, error="x")
    assert len(caplog.records) == 1 and "run_status.json cannot be written" in caplog.text


def test_tensorboard_shows_the_same_numbers(tmp_path):
    tracker = Tracker("tensorboard", tmp_path, project="videox", settings={"lr": 2e-5, "path": Path("x")})
    for step in (1, 2, 3):
        tracker.log(record(step, loss=1 / step))
    tracker.scalars({"validation/loss": 0.25}, 3)
    tracker.close()
    tracker.log(record(4))  # after the end it is silent
    events = EventAccumulator(str(tmp_path / "videox"))
    events.Reload()
    losses = events.Scalars("train/loss")
    assert [(e.step, e.value) for e in losses] == [(s, pytest.approx(1 / s, rel=1e-6)) for s in (1, 2, 3)]
    assert events.Scalars("validation/loss")[0].value == 0.25
    assert {"train/lr", "train/grad_norm", "speed/tokens_per_second", "speed/data_wait"} <= set(
        events.Tags()["scalars"]
    )


def test_a_resumed_tracker_hides_what_was_rewound(tmp_path):
    for first, last in ((1, 6), (4, 5)):
        tracker = Tracker("tensorboard", tmp_path, project="videox", settings={}, first_step=first)
        for step in range(first, last + 1):
            tracker.log(record(step, loss=float(first)))
        tracker.close()
        time.sleep(1.1)  # the names of its files, and so their order, come from whole seconds
    events = EventAccumulator(str(tmp_path / "videox"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1), (2, 1), (3, 1), (4, 4), (5, 4)]


def test_a_tracker_without_a_folder_warns_once_and_training_goes_on(tmp_path, caplog):
    (tmp_path / "logs").write_text("a file in the way")
    with caplog.at_level(logging.WARNING):
        tracker = Tracker("tensorboard", tmp_path / "logs", project="videox", settings={})
        for step in range(1, 50):
            tracker.log(record(step))
        tracker.close()
    assert [r.name for r in caplog.records] == ["videox.metrics"] and "is off from now on" in caplog.text


def test_a_tracker_whose_disk_fills_up_warns_once_and_training_goes_on(tmp_path):
    code = (
        "import resource, sys, pathlib, time; sys.path.insert(0, 'tests')\n"
        "from test_metrics import record; from videox.metrics import Tracker\n"
        "tracker = Tracker('tensorboard', pathlib.Path(sys.argv[1]), project='p', settings={})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))\n"
        "for step in range(1, 3001): tracker.log(record(step))\n"
        "tracker.close(); print('trained', step)"
    )
    done = run_python(code, tmp_path)
    assert done.stdout == "trained 3000\n", done.stderr
    assert done.returncode == 0 and done.stderr.count("is off from now on") == 1


def test_unknown_and_absent_trackers_are_refused(monkeypatch):
    with pytest.raises(Refusal, match=r"no tracker 'tensorbord'.*tensorboard, wandb, none") as refusal:
        check_tracker("tensorbord")
    assert refusal.value.exit_code == FLAGS
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path_importer_cache", {})
    with pytest.raises(Refusal, match=r"wandb is not installed.*pip install wandb"):
        check_tracker("wandb")
    check_tracker("none")
    assert list(TRACKERS) == ["tensorboard", "wandb", "none"]


class Clock:
    def __init__(self):
        self.time = 100.0

    def __call__(self):
        return self.time


def test_the_clock_counts_waiting_and_leaves_out_what_is_aside():
    now = Clock()
    clock = StepClock(now=now)
    with clock.waiting():
        now.time += 1
    now.time += 2
    with clock.waiting():
        now.time += 1
    with clock.aside():
        now.time += 100
    assert clock.data_wait == 2
    first = clock.lap(tokens=400)
    assert (first.seconds, first.data_wait, first.tokens_per_second, first.wait_share) == (4, 2, 100, 0.5)
    now.time += 5
    second = clock.lap(tokens=1000, data_wait=1.5)
    assert (second.seconds, second.data_wait, second.tokens_per_second) == (5, 1.5, 200)
    assert 100 < second.smooth_tokens_per_second < 200


@given(st.lists(st.tuples(st.integers(0, 10**6), st.floats(0.001, 100)), min_size=1, max_size=50))
def test_the_smoothed_speed_lies_within_the_steps_and_is_theirs_where_they_agree(steps):
    now = Clock()
    clock, steady = StepClock(now=now), StepClock(now=now)
    speeds = []
    for tokens, seconds in steps:
        now.time += seconds
        times, same = clock.lap(tokens), steady.lap(round(seconds * 1000))
        speeds.append(times.tokens_per_second)
        assert min(speeds) * (1 - 1e-9) <= times.smooth_tokens_per_second <= max(speeds) * (1 + 1e-9)
        assert same.smooth_tokens_per_second == pytest.approx(1000, abs=501 / min(s for _, s in steps))


def test_an_exception_while_waiting_is_still_counted():
    now = Clock()
    clock = StepClock(now=now)
    with pytest.raises(StopIteration), clock.waiting():
        now.time += 3
        raise StopIteration
    assert clock.data_wait == 3


def test_without_a_terminal_there_are_lines_and_no_bar():
    stream = io.StringIO()
    bar = ProgressBar(120, initial=20, stream=stream, every_steps=40)
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


def test_without_a_terminal_slow_steps_are_seen_by_the_time():
    stream = io.StringIO()
    bar = ProgressBar(1000, stream=stream, every_seconds=0.0)
    for _ in range(5):
        bar.update(0.5, 1.0, 0.0)
    assert len(stream.getvalue().splitlines()) == 5


def read_all(main: int) -> str:
    chunks = []
    with suppress(OSError):  # EIO is how Linux ends a terminal whose other side is closed
        while chunk := os.read(main, 65536):
            chunks.append(chunk)
    os.close(main)
    return b"".join(chunks).decode()


def test_on_a_terminal_a_bar_starts_at_the_resumed_step():
    main, worker = pty.openpty()
    termios.tcsetwinsize(worker, (24, 120))
    with os.fdopen(worker, "w") as stream:
        bar = ProgressBar(10, initial=4, stream=stream)
        for _ in range(6):
            bar.update(0.125, 2000.0, 0.5)
            time.sleep(0.11)
        bar.note("a note")
        bar.close()
    shown = read_all(main)
    assert "4/10" in shown and "10/10" in shown and "loss 0.1250, 2,000 tokens/s, data wait 50%" in shown
    assert "a note" in shown and "\r" in shown


def test_on_a_terminal_without_a_width_there_are_lines():
    main, worker = pty.openpty()
    with os.fdopen(worker, "w") as stream:
        ProgressBar(1, stream=stream).update(0.125, 2000.0, 0.5)
    assert read_all(main) == "step 1/1, loss 0.1250, 2,000 tokens/s, data wait 50%, 00:00 left\r\n"


@pytest.mark.parametrize("loss", ["closed", "gone", "pipe", "terminal"])
def test_a_lost_stream_ends_no_run(loss):
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
    bar = ProgressBar(100, stream=stream, every_steps=1)
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


def test_a_run_without_any_stderr_goes_on(tmp_path):
    code = (
        "import sys; from videox.metrics import ProgressBar\n"
        "assert sys.stderr is None\n"
        "bar = ProgressBar(3)\n"
        "for _ in range(3): bar.update(1.0, 1.0, 0.0)\n"
        "bar.close(); print('done', bar.step)"
    )
    done = run_python(
        "import os, sys; os.close(2); os.execv(sys.executable, [sys.executable, '-c', sys.argv[1]])", code
    )
    assert (done.returncode, done.stdout) == (0, "done 3\n")


def test_appending_makes_the_folder_and_keeps_no_file_open(tmp_path):
    before = len(list(Path("/proc/self/fd").iterdir()))
    for step in range(100):
        append_line(tmp_path / "a" / "b.jsonl", {"step": step})
    assert [line["step"] for line in read_lines(tmp_path / "a" / "b.jsonl")] == list(range(100))
    assert len(list(Path("/proc/self/fd").iterdir())) == before
