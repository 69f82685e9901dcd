"""Tests of videox.run.watchdog and videox.run.hangs: limits, which process is named, and no false alarms."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import forkserver
import pytest
from hypothesis import given
from hypothesis import strategies as st

from videox.activity import ACTIVITY, Activity
from videox.data.media.timeout import time_limit
from videox.errors import PEER_LOST
from videox.models.compiled_blocks import COMPILING
from videox.run import watchdog as module
from videox.run.failure import FailureMonitor
from videox.run.hangs import Beat, Clock, HangWatch
from videox.run.status import RunStatus
from videox.run.watchdog import DATA, DISK_SECONDS, LEAST_SECONDS, LONG, LONG_SECONDS, SAVES, Watchdog

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 0.6  # seconds, of the processes of these tests that hang
LARGER = 3.0  # of those that go on, on a machine that may be busy

# ------------------------------------------------------------------------------------------------------ which process

BEATS = st.lists(
    st.tuples(
        st.builds(Beat, st.floats(0, 100), st.floats(1, 50), st.floats(0.1, 5), st.just("a save"), st.booleans()),
        st.floats(0, 50),
    ),
    min_size=1,
    max_size=4,
)


@given(BEATS)
def test_a_run_hangs_only_if_no_process_makes_progress(reports: list[tuple[Beat, float]]) -> None:
    watch = HangWatch(list(range(len(reports))), 0.0, Beat(0, 1, 1, ""))
    for rank, (beat, heard) in enumerate(reports):
        watch.hear(rank, beat, heard)
    now = 50.0
    ages = [beat.age + now - heard for beat, heard in reports]
    silent = [rank for rank, (beat, heard) in enumerate(reports) if now - heard > 3 * beat.interval + 2]
    hang = watch.find(now)
    responding = [beat.limit for rank, (beat, _) in enumerate(reports) if rank not in silent]
    limits = [
        min(beat.limit, max(responding)) if rank in silent and responding else beat.limit
        for rank, (beat, _) in enumerate(reports)
    ]
    if any(age <= limit for age, limit in zip(ages, limits, strict=True)):
        assert hang is None
        return
    assert hang is not None
    if silent:
        assert (hang.rank, hang.silent) == (silent[0], True)
        return
    working = [rank for rank, (beat, _) in enumerate(reports) if not beat.waits] or list(range(len(reports)))
    assert not hang.silent
    assert hang.rank in working
    assert ages[hang.rank] == max(ages[rank] for rank in working)


def test_a_process_that_writes_keeps_the_others_waiting_without_an_alarm() -> None:
    watch = HangWatch([0, 1], 0.0, Beat(0, 1, 1, ""))
    for second in range(0, 1000, 6):
        watch.hear(0, Beat(1.0, 120, 6, "a save"), second)
        watch.hear(1, Beat(second, 120, 6, "a save", waits=True), second)
        assert watch.find(second) is None
    watch.hear(0, Beat(121.0, 120, 6, "a save"), 1000)
    watch.hear(1, Beat(1000, 120, 6, "a save", waits=True), 1000)
    hang = watch.find(1001)
    assert hang is not None
    line = hang.line("node7", "out/stacks")
    assert line.startswith(
        "error: watchdog: process 0 on node7 has made no progress for 122 s in a save; the limit is"
    )
    assert "Fix: read the stacks in out/stacks" in line


def test_a_process_that_is_stopped_soon_after_the_start_is_found_within_the_limit_of_the_others() -> None:
    watch = HangWatch([0, 1], 0.0, Beat(0, LONG_SECONDS, 30, "the start"))
    watch.hear(1, Beat(1, LONG_SECONDS, 6, "the start"), 6)
    for second in range(6, 140, 6):
        watch.hear(0, Beat(second - 6, 120, 6, "the backward pass", waits=True), second)
        hang = watch.find(second)
        assert (hang is not None) == (second - 6 > 120)
    assert hang is not None
    assert (hang.rank, hang.silent, hang.limit) == (1, True, 120)


def test_a_process_that_has_ended_is_not_waited_for() -> None:
    watch = HangWatch([0, 1], 0.0, Beat(0, 1, 1, ""))
    watch.hear(0, Beat(0, 100, 1, "the export"), 10)
    watch.forget(1)
    watch.hear(1, Beat(200, 100, 1, "late"), 10)
    assert watch.find(11) is None


def test_time_in_which_the_process_was_stopped_does_not_count() -> None:
    clock = Clock(100.0)
    assert clock.tick(101.0, 1.0) == 101
    before = clock.at(101.5)
    assert clock.tick(1101.0, 1.0) == 102
    assert (before, clock.tick(1102.0, 1.0)) == (101.5, 103)


# ------------------------------------------------------------------------------------------------------------- limits


def dog(seconds: float | None, *steps: float, activity: Activity | None = None) -> Watchdog:
    watchdog = Watchdog(seconds, FailureMonitor(), Path(), activity or Activity())
    for step in steps:
        watchdog.step_took(step)
    return watchdog


def test_the_limit_follows_from_the_slowest_step() -> None:
    forward = ("the forward pass",)
    assert dog(None, 1.0).limit(forward) == LEAST_SECONDS
    assert dog(None, 40.0).limit(forward) == 400  # of the first step, while there is no other one
    assert dog(None, 400.0, 2.0).limit(forward) == LEAST_SECONDS  # the first one may have compiled kernels
    assert dog(None, 400.0, 2.0, 30.0, 3.0).limit(forward) == 300
    assert dog(7.0, 400.0, 30.0).limit(forward) == 7


@pytest.mark.parametrize("name", [*DATA, *SAVES])
def test_data_and_saves_have_more_time_unless_the_user_sets_the_limit(name: str) -> None:
    assert dog(None, 1.0, 1.0).limit((name,)) == DISK_SECONDS
    assert dog(None, 1.0, 100.0).limit((name,)) == 1000
    assert dog(7.0, 1.0, 1.0).limit((name,)) == 7


@pytest.mark.parametrize("seconds", [None, 7.0])
def test_what_is_not_part_of_every_step_has_the_long_limit(seconds: float | None) -> None:
    assert dog(seconds).limit(()) == dog(seconds).limit(("the forward pass",)) == LONG_SECONDS  # the first step
    for name in LONG:
        assert dog(seconds, 1.0, 1.0).limit((name, "the VAE")) == LONG_SECONDS
        assert dog(seconds, 1.0, 1.0).limit(("the forward pass", name)) == LONG_SECONDS
    assert dog(5000.0, 1.0, 1.0).limit(("validation",)) == 5000


def test_every_named_section_exists() -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "videox").rglob("*.py"))
    named = set(re.findall(r"\b(?:memory_phase|section)\(\"([^\"]+)\"\)", code))
    assert {*LONG, *DATA, *SAVES} - {COMPILING} <= named


# ----------------------------------------------------------------------------------------------------------- progress


def test_sections_and_their_ends_are_progress() -> None:
    activity = Activity()
    watchdog = dog(10.0, 1.0, 1.0, activity=activity)
    start = time.monotonic()
    with activity.section("validation"), activity.section("the VAE"):
        assert activity.sections == ("validation", "the VAE")
        beat = watchdog.look(start + 0.4)
        assert (beat.section, beat.limit, beat.interval) == ("the VAE", LONG_SECONDS, 0.5)
    beat = watchdog.look(start + 0.8)
    assert (beat.section, beat.limit) == ("the step, between its parts", 10)
    assert beat.age < 0.9
    assert watchdog.look(start + 1.2).age == pytest.approx(beat.age + 0.4)
    activity.progress()
    assert watchdog.look(start + 1.2).age < 1.2
    with pytest.raises(ValueError, match="x"), activity.section("a save"):
        raise ValueError("x")
    assert activity.sections == ()


def test_sections_of_other_threads_are_not_those_of_the_process() -> None:
    activity = Activity()
    with activity.section("a save"):
        thread = threading.Thread(target=activity.enter, args=("other",))
        thread.start()
        thread.join()
        assert activity.sections == ("a save",)


def test_a_save_that_writes_makes_progress_and_one_that_waits_does_not(tmp_path: Path) -> None:
    activity = Activity()
    watchdog = dog(10.0, 1.0, 1.0, activity=activity)
    with activity.section("a save"):
        now = time.monotonic()
        watchdog.look(now)
        watchdog.look(now + 0.5)  # counts what this process has read and written before
        for second in range(1, 40):
            (tmp_path / "file").write_bytes(bytes(module.MOVED_BYTES))
            assert watchdog.look(now + second).age == 0
        for second in range(40, 52):
            beat = watchdog.look(now + second)
        assert beat.age == pytest.approx(12, abs=0.1)
        assert beat.age > beat.limit
    with activity.section("the forward pass"):  # where files are written by others, such as trackers
        before = watchdog.look(now + 52).age
        (tmp_path / "file").write_bytes(bytes(2 * module.MOVED_BYTES))
        assert watchdog.look(now + 52.5).age == pytest.approx(before + 0.5)


# ------------------------------------------------------------------------------------------------- real processes


def start_watching(output_dir: Path, limit: float = LIMIT) -> tuple[Watchdog, FailureMonitor]:
    monitor = FailureMonitor()
    watchdog = Watchdog(limit, monitor, output_dir)
    monitor.status = RunStatus(output_dir)
    monitor.status.write("running", step=3)
    for _ in range(2):
        watchdog.step_took(0.1)
    watchdog.__enter__()
    return watchdog, monitor


def hang_in_a_lock() -> int:
    start_watching(Path(sys.argv[1]))
    lock = threading.Lock()
    with ACTIVITY.section("a save"), lock:
        lock.acquire()
    return 0


def hang_in_python() -> int:
    start_watching(Path(sys.argv[1]))
    with ACTIVITY.section("waiting for data"):
        while True:
            pass


def hang_with_the_lock_of_python() -> int:
    start_watching(Path(sys.argv[1]))
    time.sleep(0.2)
    with ACTIVITY.section("the forward pass"):
        ctypes.PyDLL(None).sleep(6)
    return 0


def write_slowly() -> int:
    watchdog, _ = start_watching(Path(sys.argv[1]), LARGER)
    with ACTIVITY.section("a save"):
        for _ in range(10):
            time.sleep(0.5)
            (Path(sys.argv[1]) / "part").write_bytes(bytes(module.MOVED_BYTES))
    watchdog.__exit__()
    return 0


def fork_while_watched() -> int:
    """Fork children that read with a time limit, as workers of the loader do, while the watchdog sets its timer."""
    watchdog, _ = start_watching(Path(sys.argv[1]), LARGER)
    for _ in range(30):
        child = os.fork()
        if child == 0:
            with time_limit(5.0, own_process=True):
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        ACTIVITY.progress()
    watchdog.__exit__()
    return 0


def be_stopped() -> int:
    watchdog, _ = start_watching(Path(sys.argv[1]), LARGER)
    print("ready", flush=True)
    for _ in range(20):
        time.sleep(0.1)
        ACTIVITY.progress()
    watchdog.__exit__()
    return 0


def start(name: str, folder: Path) -> forkserver.TrainerProcess:
    entry = f"tests.run.test_watchdog:{name}"
    return forkserver.shared().start([str(folder)], folder / "log", entry_point=entry)


@pytest.mark.parametrize(("name", "section"), [("hang_in_a_lock", "a save"), ("hang_in_python", "waiting for data")])
def test_a_process_that_hangs_ends_with_a_line_and_its_stacks(tmp_path: Path, name: str, section: str) -> None:
    process = start(name, tmp_path)
    assert process.wait(20) == PEER_LOST, process.output()
    line = process.error_line()
    assert "watchdog: process 0 on " in line
    assert f" s in {section}; the limit is 1 s" in line
    status = forkserver.read_status(tmp_path)
    assert (status["state"], status["exit_code"], status["error"]) == ("failed", PEER_LOST, line)
    stacks = (tmp_path / "stacks" / "process-0.txt").read_text()
    assert name in stacks
    assert "videox/run/watchdog.py" in stacks  # all threads


@pytest.mark.parametrize("name", ["write_slowly", "fork_while_watched"])
def test_a_process_that_goes_on_is_left_alone(tmp_path: Path, name: str) -> None:
    process = start(name, tmp_path)
    assert process.wait(60) == 0, process.output()
    assert not (tmp_path / "stacks").exists()
    assert "Timeout" not in process.output()


@pytest.mark.slow
def test_a_process_that_was_stopped_and_continued_goes_on(tmp_path: Path) -> None:
    process = start("be_stopped", tmp_path)
    process.wait_until(lambda: "ready" in process.output())
    process.signal(signal.SIGSTOP)
    time.sleep(2 * LARGER)
    process.signal(signal.SIGCONT)
    assert process.wait(20) == 0, process.output()


@pytest.mark.slow
def test_code_that_keeps_the_lock_of_python_leaves_its_stack(tmp_path: Path) -> None:
    process = start("hang_with_the_lock_of_python", tmp_path)
    process.wait_until(lambda: "hang_with_the_lock_of_python" in process.output(), 20)
    process.kill()
    process.wait()
