"""Tests of videox.run.lifecycle, run_on_main and exit codes: one owner per folder, the same end on every rank."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from dispositions import default_signals

from videox.distributed.collectives import run_on_main
from videox.errors import (
    BUG,
    DATA,
    FLAGS,
    INTERRUPTED,
    MODEL,
    NUMERICS,
    PEER_LOST,
    STORAGE,
    SaveError,
    UserError,
    error_line,
    exit_code,
    name_process,
)
from videox.run.lifecycle import STOP_SIGNALS, Run, open_run, run_script
from videox.run.status import RunStatus, read_status


def gather_single(value: object) -> list[object]:
    return [value]


def open_in(folder: Path, **changes: object) -> object:
    return open_run(folder, **{"resume": None, "verify": False, "is_main": True, "gather": gather_single, **changes})


def run_ranks(work: Callable[[int, Callable[[object], list[object]]], object], world_size: int = 2) -> list[object]:
    """Run work(rank, gather) in a thread per rank; return what each returned or raised."""
    barrier, values, results = threading.Barrier(world_size), [None] * world_size, [None] * world_size

    def rank_of(rank: int) -> None:
        def gather(value: object) -> list[object]:
            values[rank] = value
            barrier.wait(20)
            gathered = list(values)
            barrier.wait(20)
            return gathered

        try:
            results[rank] = work(rank, gather)
        except UserError as error:
            results[rank] = error

    threads = [threading.Thread(target=rank_of, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


# ------------------------------------------------------------------------------------------- open_run


def test_new_run_has_state_running_until_it_is_set(tmp_path: Path) -> None:
    with open_in(tmp_path / "deep" / "run") as run:
        assert isinstance(run, Run)
        assert (run.resume.path, run.resume.step, run.notes) == (None, 0, ())
        status = read_status(tmp_path / "deep" / "run")
        assert (status.state, status.exit_code, status.was_killed) == ("running", None, False)
        run.status.write("finished", step=3, exit_code=0)
    assert read_status(tmp_path / "deep" / "run").state == "finished"


def test_sigchld_of_a_loader_worker_does_not_prevent_the_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's DataLoader raises in its SIGCHLD handler when a second worker ends because the first one was killed."""

    def fail(number: int, frame: object) -> None:
        raise RuntimeError(f"a worker ended: {number}, {frame}")

    write = RunStatus.write

    def interrupted_write(self: RunStatus, state: str, **fields: object) -> None:
        if state == "failed":
            signal.raise_signal(signal.SIGCHLD)
        write(self, state, **fields)

    monkeypatch.setattr(RunStatus, "write", interrupted_write)
    before = signal.signal(signal.SIGCHLD, fail)
    try:
        with pytest.raises(ValueError, match="of a step"), open_in(tmp_path / "run"):
            raise ValueError("of a step")
        assert signal.getsignal(signal.SIGCHLD) is fail
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert read_status(tmp_path / "run").state == "failed"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("--seed", "is odd", "give another", DATA), DATA, "error: --seed: is odd. Fix: give another."),
        (
            SaveError("/run: No space left"),
            STORAGE,
            "error: /run: No space left. Fix: free some disk space, or pass a writable folder",
        ),
        (ValueError("two\nlines"), BUG, "error: ValueError: two lines"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/run/.tmp-args.json-1", None, "/run/args.json"),
            STORAGE,
            "error: /run/args.json: No space left on device. Fix: free some disk space or repair the disk, then start "
            "again; a run goes on with --resume_from_checkpoint latest.",
        ),
        (
            PermissionError(errno.EROFS, "Read-only file system", "/run/args.json"),
            STORAGE,
            "error: /run/args.json: Read-only file system. Fix: make it readable and writable for the user that runs "
            "this, or pass another folder.",
        ),
        (
            FileNotFoundError(errno.ENOENT, "No such file", "/x"),
            BUG,
            "error: FileNotFoundError: [Errno 2] No such file: '/x'",
        ),
        (ConnectionResetError(errno.ECONNRESET, "reset"), BUG, "error: ConnectionResetError: [Errno 104] reset"),
    ],
    ids=["user_error", "save_error", "bug", "full", "read_only", "missing", "connection"],
)
def test_exception_is_written_to_the_status_and_reraised(
    tmp_path: Path, error: BaseException, code: int, line: str
) -> None:
    with pytest.raises(type(error)) as raised, open_in(tmp_path) as run:
        run.status.heartbeat(7)
        raise error
    assert raised.value is error
    status = read_status(tmp_path)
    assert (status.state, status.exit_code, status.step, status.error) == ("failed", code, 7, line)
    assert not status.was_killed


def test_interrupt_outside_a_step_is_a_stop_not_a_failure(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), open_in(tmp_path) as run:
        run.status.heartbeat(7)
        raise KeyboardInterrupt
    status = read_status(tmp_path)
    assert (status.state, status.exit_code, status.step) == ("stopped", INTERRUPTED, 7)
    assert "nothing was saved" in status.error


def test_folder_is_locked_during_a_run_and_released_after(tmp_path: Path) -> None:
    with open_in(tmp_path) as run:
        run.status.write("running", step=5)
        with pytest.raises(UserError, match=r"is in use by pid \d+ on host \S+ since") as refused, open_in(tmp_path):
            pass
        assert refused.value.exit_code == FLAGS
        assert read_status(tmp_path).state == "running"  # the refused run has not written to it
    with open_in(tmp_path, resume="latest") as run:
        assert "there is no checkpoint" in " ".join(run.notes)


def test_killed_previous_run_is_reported(tmp_path: Path) -> None:
    RunStatus(tmp_path).write("running", step=41)
    text = (tmp_path / "run_status.json").read_text(encoding="utf-8")
    (tmp_path / "run_status.json").write_text(text.replace('"started": "', '"started": "9'), encoding="utf-8")
    with open_in(tmp_path, resume="latest") as run:
        assert "the last run here ended without writing its status (killed?) at step 41" in run.notes


def test_folder_with_a_run_is_refused_without_resume(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n", encoding="ascii")
    with pytest.raises(UserError, match="already contains a run") as refused, open_in(tmp_path):
        pass
    assert refused.value.exit_code == FLAGS
    assert "--resume_from_checkpoint latest" in refused.value.hint
    assert "another --output_dir" in refused.value.hint


def test_all_ranks_get_the_decision_of_the_main_rank(tmp_path: Path) -> None:
    def enter(rank: int, gather: Callable[[object], list[object]]) -> object:
        with open_run(tmp_path, resume="latest", verify=False, is_main=rank == 0, gather=gather) as run:
            return run.resume, run.notes, run.status.enabled

    first, second = run_ranks(enter)
    assert first[:2] == second[:2]
    assert (first[2], second[2]) == (True, False)  # only the main rank writes


def test_all_ranks_get_the_error_of_the_main_rank(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n", encoding="ascii")

    def enter(rank: int, gather: Callable[[object], list[object]]) -> object:
        with open_run(tmp_path, resume=None, verify=False, is_main=rank == 0, gather=gather):
            return "entered"

    first, second = run_ranks(enter)
    assert isinstance(first, UserError)
    assert first.line() == second.line()


# ------------------------------------------------------------------------------------------- run_on_main


def test_run_on_main_runs_only_on_the_main_rank_and_first() -> None:
    order = []

    def work(rank: int, gather: Callable[[object], list[object]]) -> None:
        run_on_main(lambda: order.append(("work", rank)), is_main=rank == 0, gather=gather)
        order.append(("after", rank))

    assert run_ranks(work, 3) == [None, None, None]
    assert order[0] == ("work", 0)
    assert sorted(order[1:]) == [("after", 0), ("after", 1), ("after", 2)]


def test_error_on_the_main_rank_is_raised_on_all_ranks() -> None:
    def fail() -> None:
        raise UserError("data", "is missing", "restore it", DATA)

    def work(rank: int, gather: Callable[[object], list[object]]) -> None:
        run_on_main(fail, is_main=rank == 0, gather=gather)

    assert [(str(error), error.exit_code) for error in run_ranks(work)] == [
        ("data: is missing. Fix: restore it.", DATA)
    ] * 2


# ------------------------------------------------------------------------------------------- exit codes


@pytest.fixture(autouse=True)
def same_handlers() -> Iterator[None]:
    """run_script ignores stop signals from its end on."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("code", [FLAGS, DATA, MODEL, STORAGE, NUMERICS, PEER_LOST])
def test_user_error_prints_one_line_and_exits_with_its_code(capsys: pytest.CaptureFixture[str], code: int) -> None:
    def main() -> int:
        raise UserError("--flag", "has a\nbreak", "remove it", code)

    with pytest.raises(SystemExit) as ended:
        run_script(main)
    assert ended.value.code == code
    assert capsys.readouterr().err == "error: --flag: has a\\nbreak. Fix: remove it.\n"


def test_exit_code_of_main_is_used_and_other_exceptions_have_a_line_and_the_code_of_a_bug(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: 75)
    assert ended.value.code == 75
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: 1 // 0)
    assert ended.value.code == BUG
    printed = capsys.readouterr().err.splitlines()
    assert printed[0].startswith("Traceback") and printed[-1].startswith("error: ZeroDivisionError: ")
    assert exit_code(ZeroDivisionError("division by zero")) == BUG
    assert error_line(ZeroDivisionError("division by zero")) == "error: ZeroDivisionError: division by zero"


@pytest.mark.parametrize("times", [1, 2])
def test_the_traceback_of_an_unforeseen_error_is_in_crash_txt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], times: int
) -> None:
    def main() -> int:
        with open_in(tmp_path / "run"):
            raise KeyError("caption\x1b[31m\n")

    for _ in range(times):
        with pytest.raises(SystemExit) as ended:
            run_script(main)
        line, place = capsys.readouterr().err.splitlines()
        assert ended.value.code == BUG == read_status(tmp_path / "run").exit_code
        assert line == "error: KeyError: 'caption\\x1b[31m\\n'" == read_status(tmp_path / "run").error
        assert place == f"  traceback: {tmp_path / 'run' / 'crash.txt'}"
    text = (tmp_path / "run" / "crash.txt").read_text()
    assert text.count("Traceback (most recent call last)") == times == text.count("in main")


def test_errors_with_a_message_for_the_user_write_no_crash_txt(tmp_path: Path) -> None:
    for error in (UserError("--flag", "is wrong", "remove it"), SaveError("full"), KeyboardInterrupt()):
        with pytest.raises(type(error)), open_in(tmp_path / "run"):
            raise error
    assert not (tmp_path / "run" / "crash.txt").exists()


@pytest.mark.parametrize("error", [RuntimeError("x"), OSError(errno.ENOSPC, "full", "a"), SaveError("EIO")])
def test_the_line_of_an_error_names_the_process_of_several(error: Exception) -> None:
    alone = error_line(error)
    name_process(error, 3)
    assert error_line(error) == f"error: process 3: {alone.removeprefix('error: ')}"


def test_the_line_of_a_user_error_names_no_process() -> None:
    error = UserError("--seed", "is odd", "pass an even one")
    name_process(error, 3)
    assert error_line(error) == "error: --seed: is odd. Fix: pass an even one."


def test_a_crash_without_a_place_for_its_traceback_prints_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> int:
        with open_in(tmp_path / "run"):
            (tmp_path / "run" / "crash.txt").mkdir()
            raise RuntimeError("\x07 rings")

    with pytest.raises(SystemExit):
        run_script(main)
    printed = capsys.readouterr().err.splitlines()
    assert printed[0].startswith("Traceback") and printed[-1] == "error: RuntimeError: \\x07 rings"


# The main thread keeps the GIL (switch interval), so that gloo's thread still waits for it when the process ends.
GLOO_PROCESS = """
import atexit, sys, torch, torch.distributed as dist
from videox.run.lifecycle import run_script

def main():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    atexit.register(print, "atexit ran", end="")
    sys.setswitchinterval(100)
    for _ in range(50):
        dist.all_gather([torch.zeros(1)], torch.ones(1))
    return {code}

run_script(main)
"""


@pytest.mark.parametrize("code", [pytest.param(0, marks=pytest.mark.slow), 75])
def test_process_exits_with_its_code_while_gloo_holds_tensors(code: int) -> None:
    command = [sys.executable, "-c", GLOO_PROCESS.format(code=code)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=100)[0] for process in started] == ["atexit ran"] * 2
    assert [process.returncode for process in started] == [code] * 2


def test_a_signal_while_the_process_ends_does_not_change_its_exit_code() -> None:
    program = """
import atexit, os, signal
from videox.run.lifecycle import STOP_SIGNALS, run_script

for number in STOP_SIGNALS:
    atexit.register(os.kill, os.getpid(), number)
run_script(lambda: 75)
"""
    with default_signals():
        assert subprocess.run([sys.executable, "-c", program], timeout=100).returncode == 75
