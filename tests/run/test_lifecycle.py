"""Serves whoever reads how a run ended: one owner of a folder, one line, one exit code, on every process the same."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

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
)
from videox.run.lifecycle import Run, open_run, run_script
from videox.run.status import RunStatus, read_status


def alone(value: object) -> list[object]:
    return [value]


def opened(folder: Path, **changes: object) -> object:
    return open_run(folder, **{"resume": None, "verify": False, "is_main": True, "gather": alone, **changes})


def together(work: Callable[[int, Callable[[object], list[object]]], object], world_size: int = 2) -> list[object]:
    """Runs work(rank, gather) in a thread for each rank, gather being a collective among them; returns what each gave,
    or raised."""
    barrier, values, results = threading.Barrier(world_size), [None] * world_size, [None] * world_size

    def rank_of(rank: int) -> None:
        def gather(value: object) -> list[object]:
            values[rank] = value
            barrier.wait(20)
            found = list(values)
            barrier.wait(20)
            return found

        try:
            results[rank] = work(rank, gather)
        except UserError as refusal:
            results[rank] = refusal

    threads = [threading.Thread(target=rank_of, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


# ------------------------------------------------------------------------------------------- open_run


def test_a_new_run_is_running_until_it_says_otherwise(tmp_path: Path) -> None:
    with opened(tmp_path / "deep" / "run") as run:
        assert isinstance(run, Run)
        assert (run.resume.path, run.resume.step, run.notes) == (None, 0, ())
        status = read_status(tmp_path / "deep" / "run")
        assert (status.state, status.exit_code, status.was_killed) == ("running", None, False)
        run.status.write("finished", step=3, exit_code=0)
    assert read_status(tmp_path / "deep" / "run").state == "finished"


def test_a_worker_that_ends_meanwhile_does_not_keep_the_status_from_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch's loader does, whose second worker ends because the first one was killed."""

    def fail(number: int, frame: object) -> None:
        raise RuntimeError(f"a worker ended: {number}, {frame}")

    write = RunStatus.write

    def disturbed(self: RunStatus, state: str, **told: object) -> None:
        if state == "failed":
            signal.raise_signal(signal.SIGCHLD)
        write(self, state, **told)

    monkeypatch.setattr(RunStatus, "write", disturbed)
    before = signal.signal(signal.SIGCHLD, fail)
    try:
        with pytest.raises(ValueError, match="of a step"), opened(tmp_path / "run"):
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
    ],
    ids=["refusal", "save", "bug"],
)
def test_what_ends_a_run_is_in_its_status_and_goes_on_up(
    tmp_path: Path, error: BaseException, code: int, line: str
) -> None:
    with pytest.raises(type(error)) as raised, opened(tmp_path) as run:
        run.status.heartbeat(7)
        raise error
    assert raised.value is error
    status = read_status(tmp_path)
    assert (status.state, status.exit_code, status.step, status.error) == ("failed", code, 7, line)
    assert not status.was_killed


def test_an_interrupt_outside_a_step_is_a_stop_and_no_failure(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), opened(tmp_path) as run:
        run.status.heartbeat(7)
        raise KeyboardInterrupt
    status = read_status(tmp_path)
    assert (status.state, status.exit_code, status.step) == ("stopped", INTERRUPTED, 7)
    assert "nothing was saved" in status.error


def test_a_folder_has_one_owner_and_is_free_again_afterwards(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        run.status.write("running", step=5)
        with pytest.raises(UserError, match=r"is in use by pid \d+ on host \S+ since") as refused, opened(tmp_path):
            pass
        assert refused.value.exit_code == FLAGS
        assert read_status(tmp_path).state == "running"  # the intruder has not written over it
    with opened(tmp_path, resume="latest") as run:
        assert "there is no checkpoint" in " ".join(run.notes)


def test_a_run_that_died_is_told_of(tmp_path: Path) -> None:
    RunStatus(tmp_path).write("running", step=41)
    text = (tmp_path / "run_status.json").read_text(encoding="utf-8")
    (tmp_path / "run_status.json").write_text(text.replace('"started": "', '"started": "9'), encoding="utf-8")
    with opened(tmp_path, resume="latest") as run:
        assert "the last run here ended without writing its status (killed?) at step 41" in run.notes


def test_a_folder_with_a_run_is_refused_without_resume(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n", encoding="ascii")
    with pytest.raises(UserError, match="already contains a run") as refused, opened(tmp_path):
        pass
    assert refused.value.exit_code == FLAGS
    assert "--resume_from_checkpoint latest" in refused.value.hint
    assert "another --output_dir" in refused.value.hint


def test_all_processes_get_the_main_ones_decision(tmp_path: Path) -> None:
    def enter(rank: int, gather: Callable[[object], list[object]]) -> object:
        with open_run(tmp_path, resume="latest", verify=False, is_main=rank == 0, gather=gather) as run:
            return run.resume, run.notes, run.status.enabled

    first, second = together(enter)
    assert first[:2] == second[:2]
    assert (first[2], second[2]) == (True, False)  # one of them writes


def test_all_processes_get_the_main_ones_refusal(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n", encoding="ascii")

    def enter(rank: int, gather: Callable[[object], list[object]]) -> object:
        with open_run(tmp_path, resume=None, verify=False, is_main=rank == 0, gather=gather):
            return "entered"

    first, second = together(enter)
    assert isinstance(first, UserError)
    assert first.line() == second.line()


# ------------------------------------------------------------------------------------------- main_first


def test_main_works_first_and_alone() -> None:
    order = []

    def work(rank: int, gather: Callable[[object], list[object]]) -> None:
        run_on_main(lambda: order.append(("work", rank)), is_main=rank == 0, gather=gather)
        order.append(("after", rank))

    assert together(work, 3) == [None, None, None]
    assert order[0] == ("work", 0)
    assert sorted(order[1:]) == [("after", 0), ("after", 1), ("after", 2)]


def test_a_refusal_of_main_reaches_everyone() -> None:
    def refuse() -> None:
        raise UserError("data", "is gone", "bring it back", DATA)

    def work(rank: int, gather: Callable[[object], list[object]]) -> None:
        run_on_main(refuse, is_main=rank == 0, gather=gather)

    assert [(str(found), found.exit_code) for found in together(work)] == [
        ("data: is gone. Fix: bring it back.", DATA)
    ] * 2


# ------------------------------------------------------------------------------------------- exit codes


@pytest.mark.parametrize("code", [FLAGS, DATA, MODEL, STORAGE, NUMERICS, PEER_LOST])
def test_a_refusal_is_one_line_and_its_code(capsys: pytest.CaptureFixture[str], code: int) -> None:
    def main() -> int:
        raise UserError("--flag", "has a\nbreak", "mend it", code)

    with pytest.raises(SystemExit) as ended:
        run_script(main)
    assert ended.value.code == code
    assert capsys.readouterr().err == "error: --flag: has a\\nbreak. Fix: mend it.\n"


def test_the_code_of_main_is_the_exit_code_and_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: 75)
    assert ended.value.code == 75
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 // 0)
    assert exit_code(ZeroDivisionError("division by zero")) == BUG
    assert error_line(ZeroDivisionError("division by zero")) == "error: ZeroDivisionError: division by zero"


# The interpreter's lock stays with the main thread, so that gloo's thread still waits for it when the process ends.
ONE_OF_SEVERAL = """
import atexit, sys, torch, torch.distributed as dist
from videox.run.lifecycle import run_script

def main():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    atexit.register(print, "last words", end="")
    sys.setswitchinterval(100)
    for _ in range(50):
        dist.all_gather([torch.zeros(1)], torch.ones(1))
    return {code}

run_script(main)
"""


@pytest.mark.parametrize("code", [0, 75])
def test_a_process_of_several_ends_with_its_code_while_gloo_still_holds_tensors(code: int) -> None:
    command = [sys.executable, "-c", ONE_OF_SEVERAL.format(code=code)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=100)[0] for process in started] == ["last words"] * 2
    assert [process.returncode for process in started] == [code] * 2
