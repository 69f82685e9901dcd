"""Tests of --watchdog_seconds: in runs of two processes the one that hangs is named, and the run can be resumed."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from pathlib import Path
from types import ModuleType

import forkserver
import pytest
import runs
from launches import BackendRuns, exit_codes, launcher_environment, output_of

from videox.data.dataset import TokenLengthDataset
from videox.errors import BUG, PEER_LOST
from videox.run.checkpoint import find_checkpoints, verify

pytestmark = pytest.mark.slow

STEPS = 6
SECONDS = 10.0  # of the watchdog; longer than any part of a step on a busy machine
MOST_SECONDS = 100.0  # after the hang; the machine of a test may be busy


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> BackendRuns:
    return BackendRuns(tmp_path_factory.mktemp("wan"), "wan2.1 normal", STEPS)


# -------------------------------------------------------------------------------------------------------------- faults


def hang(folder: str, call: int = 4) -> bool:
    """Return whether this process is to hang now: in the given call of this function."""
    path = Path(folder) / "calls"
    calls = len(path.read_bytes()) + 1 if path.exists() else 1
    path.write_bytes(b"x" * calls)
    return calls == call


def endless_decode(script: ModuleType) -> None:
    read = TokenLengthDataset._read

    def decode(self: TokenLengthDataset, *arguments: object) -> object:
        while hang(os.environ["CALLS"], 7):  # after the held-out rows, the first batch, and a few steps
            while True:
                pass
        return read(self, *arguments)

    TokenLengthDataset._read = decode


def lock_in_a_save(script: ModuleType) -> None:
    build_engine = script.build.build_engine

    def build(*arguments: object) -> object:
        engine = build_engine(*arguments)
        save = engine.save

        def locked(*where: object, **state: object) -> None:
            if hang(os.environ["CALLS"], 3):
                lock = threading.Lock()
                lock.acquire()
                lock.acquire()
            save(*where, **state)

        engine.save = locked
        return engine

    script.build.build_engine = build


def keeps_the_lock_of_python(script: ModuleType) -> None:
    compute = script.accumulate_gradients

    def accumulate(*arguments: object, **settings: object) -> object:
        if hang(os.environ["CALLS"]):
            ctypes.PyDLL(None).sleep(1000)
        return compute(*arguments, **settings)

    script.accumulate_gradients = accumulate


def raises(script: ModuleType) -> None:
    compute = script.accumulate_gradients

    def accumulate(*arguments: object, **settings: object) -> object:
        if hang(os.environ["CALLS"]):
            raise RuntimeError("this process fails")
        return compute(*arguments, **settings)

    script.accumulate_gradients = accumulate


FAULTS = {fault.__name__: fault for fault in (endless_decode, lock_in_a_save, keeps_the_lock_of_python, raises)}


def train() -> int:
    """Train; the rank in the variable VICTIM has the fault in the variable FAULT."""
    script = runs.train_script()
    if os.environ["RANK"] == os.environ["VICTIM"]:
        FAULTS[os.environ["FAULT"]](script)
    return script.main()


def start(wan: BackendRuns, folder: Path, fault: str, victim: int, **changes: object) -> list:
    changes = {"checkpointing_steps": 1, "watchdog_seconds": SECONDS, **changes}
    folder.parent.mkdir(exist_ok=True)
    return forkserver.shared().start_ranks(
        2,
        wan.flags(folder, **changes),
        folder.with_name(f"{folder.name}.log"),
        entry_points=["tests.runs.test_hangs:train"] * 2 if fault else (),
        environment={
            **launcher_environment("ddp", wan.kind, 2),
            "VICTIM": str(victim),
            "FAULT": fault,
            "CALLS": str(folder.parent),
        },
    )


def check_ended(folder: Path, ranks: list, victim: int, what: str, stacks: tuple[int, ...]) -> None:
    """Check the line, the status, the stacks, and that every checkpoint is whole."""
    lines = [line for rank in ranks for line in rank.output().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, output_of(ranks)
    assert lines[0].startswith(f"error: watchdog: process {victim} on "), lines
    assert what in lines[0]
    status = forkserver.read_status(folder)
    assert (status["state"], status["exit_code"], status["error"]) == ("failed", PEER_LOST, lines[0])
    assert sorted(path.name for path in (folder / "stacks").iterdir()) == [f"process-{rank}.txt" for rank in stacks]
    checkpoints = find_checkpoints(folder)
    assert len(checkpoints) >= 2
    assert all(verify(path, hashes=True) == [] for path in checkpoints)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(
    ("fault", "section", "frame"),
    [("endless_decode", "waiting for data", "decode"), ("lock_in_a_save", "a save", "locked")],
)
def test_a_process_that_hangs_is_named(
    wan: BackendRuns, tmp_path: Path, fault: str, section: str, frame: str, victim: int
) -> None:
    folder = tmp_path / "run"
    ranks = start(wan, folder, fault, victim)
    assert [rank.wait() for rank in ranks] == [PEER_LOST, PEER_LOST], output_of(ranks)
    check_ended(folder, ranks, victim, f" s in {section}; the limit is {SECONDS:.0f} s", (0, 1))
    assert f" in {frame}" in (folder / "stacks" / f"process-{victim}.txt").read_text()
    again = wan.run_ranks("ddp", folder, resume_from_checkpoint="latest")
    assert exit_codes(again) == [0, 0], output_of(again)
    assert [line["step"] for line in forkserver.read_steps(folder)] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_process_is_named_by_the_other_one(wan: BackendRuns, tmp_path: Path, victim: int) -> None:
    folder = tmp_path / "run"
    ranks = start(wan, folder, "", victim, max_train_steps=500)
    ranks[victim].wait_until(lambda: len(find_checkpoints(folder)) >= 3)
    ranks[victim].signal(signal.SIGSTOP)
    stopped = time.monotonic()
    assert ranks[1 - victim].wait(MOST_SECONDS) == PEER_LOST, output_of(ranks)
    assert time.monotonic() - stopped > SECONDS / 2
    check_ended(folder, ranks, victim, "has not responded for", (1 - victim,))
    ranks[victim].kill()
    ranks[victim].wait()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_keeps_the_lock_of_python_is_named(wan: BackendRuns, tmp_path: Path, victim: int) -> None:
    folder = tmp_path / "run"
    ranks = start(wan, folder, "keeps_the_lock_of_python", victim)
    assert ranks[1 - victim].wait() == PEER_LOST, output_of(ranks)
    ranks[victim].wait_until(lambda: "in accumulate" in ranks[victim].output(), MOST_SECONDS)  # its stack, on stderr
    ranks[victim].kill()
    ranks[victim].wait()
    check_ended(folder, ranks, victim, "native code that holds Python's lock", (1 - victim,))


def test_a_process_that_raises_ends_all_before_the_watchdog(wan: BackendRuns, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ranks = start(wan, folder, "raises", 1)
    assert ranks[0].wait(MOST_SECONDS) == BUG, output_of(ranks)
    ranks[1].wait()
    status = forkserver.read_status(folder)
    assert "this process fails" in status["error"]
    assert not (folder / "stacks").exists()
