"""Area watchdog: one of two ranks stops, reads a file forever, waits for a lock in a save, or fails alone."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import forkserver
import launches
import psutil

from tests.torture.cases import Area, Outcome, Row
from tests.torture.ground import shared
from tests.torture.rank_faults import CAUSE, DECODE, ENTRY_POINT, IN_A_SAVE, RankFault
from tests.torture.rank_runs import RankRuns, error_lines
from videox.errors import BUG, PEER_LOST
from videox.run.checkpoint import find_checkpoints, verify

RANKS = 2
SECONDS = 20.0  # of the watchdog; longer than any part of a step of the tiny model on a machine that does other work
# After the limit, until the status says it: the other rank ends its step, both report at intervals of a second.
LATE_SECONDS = 10.0
RAISED_SECONDS = 30.0  # until a rank that failed has ended all
LEAVE_SECONDS = 15.0  # after the end of a rank, for its data workers to end
SAVE, DATA = "a save", "waiting for data"
STEP = ("the forward pass", "the backward pass")
# Each row: the kind of fault, its five places, and the section that the line must name ("" = any).
FAULTS = {
    "stopped": ("stop", (DATA, "the VAE", *STEP, SAVE), ""),
    "decode": ("loop", (DECODE,) * 5, DATA),
    "lock": ("lock", (SAVE, *IN_A_SAVE), SAVE),
    "raised": ("raise", (DATA, *STEP, SAVE, "validation"), ""),
}
ON_RANK_0 = ("writing", "publishing", "pruning")


class Hangs(Area):
    """A rank that hangs is named by the others within the limit, and every checkpoint stays whole."""

    rows = (
        Row("stopped", f"one of two ranks gets SIGSTOP in a section of a step or a save: named within {LATE_SECONDS:g} s after the limit of {SECONDS:g} s, exit code 7, stacks of the other one, checkpoints whole", 5),
        Row("decode", "one of two ranks, or its data worker, reads a file forever: the same, with the section and all stacks", 5),
        Row("lock", "one of two ranks waits in a save for a lock that nobody releases: the same", 5),
        Row("raised", f"one of two ranks fails while the other is in a collective: all out within {RAISED_SECONDS:g} s, the cause named once, no stacks", 5),
    )  # fmt: skip

    def __init__(self, folder: Path, *, broken: bool = False) -> None:
        super().__init__(folder, broken=broken)
        self.ground = shared()
        self.runs = RankRuns(self.ground)

    def attempt(self, seed: int, draw: random.Random) -> Outcome:
        row, round_ = self.rows[seed % len(self.rows)].name, seed // len(self.rows)
        kind, places, section = FAULTS[row]
        place = places[round_ % len(places)]
        victim = 0 if place in ON_RANK_0 else draw.randrange(RANKS)
        workers = round_ % 2 if kind == "loop" else draw.choice((0, 1))
        fault = RankFault(victim, kind, place, draw.randrange(2, 6))
        folder = self.ground.new_place(f"hang-{seed}")
        output_dir, moment = folder / "run", folder / "moment"
        environment = {} if self.broken else fault.environment(output_dir, moment)
        ranks = self.runs.start(
            folder, "ddp", RANKS, "" if self.broken else ENTRY_POINT, environment,
            max_train_steps=3 if self.broken else 500, num_train_epochs=None, checkpointing_steps=2,
            checkpoints_total_limit=1, validation_rows=1, validation_steps=2, dataloader_num_workers=workers,
            watchdog_seconds=SECONDS,
        )  # fmt: skip
        responding = [rank for number, rank in enumerate(ranks) if (kind, number) != ("stop", victim) or self.broken]
        codes = [rank.wait() for rank in responding]
        seconds = ended_after(output_dir, moment)
        left = processes_left(responding)
        for rank in ranks:
            rank.kill()  # the stopped one
            rank.wait()
        problems = [] if codes == [expected := code_of(kind)] * len(codes) else [f"ended with {codes}, not {expected}"]
        problems += problems_of_line(kind, victim, section, responding, output_dir)
        frame = frame_of(kind, workers)
        problems += problems_of_stacks(kind, victim, [ranks.index(rank) for rank in responding], output_dir, frame)
        problems += [f"process {pid} is left" for pid in left]
        problems += [
            f"{path.name}: {why}" for path in find_checkpoints(output_dir) for why in verify(path, hashes=True)
        ]
        most = RAISED_SECONDS if kind == "raise" else SECONDS + LATE_SECONDS
        if not 0 <= seconds <= most:
            problems.append(f"the status said it after {seconds:.1f} s")
        if problems:
            problems[0] += f": {launches.output_of(ranks)}"
        shutil.rmtree(folder)
        what = f"{kind} in {place} of rank {victim} after step {fault.step}, {workers} workers: named after {seconds:.1f} s"
        return Outcome(row, what, problems=["; ".join(problems)] if problems else ())


def code_of(kind: str) -> int:
    return BUG if kind == "raise" else PEER_LOST


def ended_after(output_dir: Path, moment: Path) -> float:
    """Return the seconds from the fault to the last state of the run's status; -1 if there was no fault."""
    if not moment.exists():
        return -1.0
    return (output_dir / "run_status.json").stat().st_mtime - float(moment.read_text(encoding="utf-8"))


def processes_left(ranks: Sequence[forkserver.TrainerProcess]) -> list[int]:
    """Return the processes of the sessions of ranks that have ended which are still there after a while; end them."""
    sessions, deadline = {rank.pid for rank in ranks}, time.monotonic() + LEAVE_SECONDS
    while (found := processes_of(sessions)) and time.monotonic() < deadline:
        time.sleep(0.5)
    for pid in found:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return found


def processes_of(sessions: set[int]) -> list[int]:
    """Return the processes of these sessions."""
    found = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) in sessions and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def problems_of_line(
    kind: str, victim: int, section: str, ranks: Sequence[forkserver.TrainerProcess], output_dir: Path
) -> list[str]:
    """Return what is wrong with the error line that these ranks have printed, and with the status."""
    lines = error_lines(ranks)
    if len(lines) != 1:
        return [f"{len(lines)} error lines"]
    parts = {
        "raise": [f"process {victim}: RuntimeError: {CAUSE}"],
        "stop": [f"error: watchdog: process {victim} on ", "has not responded for"],
    }.get(kind, [f"error: watchdog: process {victim} on ", f" s in {section}; the limit is {SECONDS:.0f} s"])
    problems = [f"the line does not say {part!r}: {lines[0]}" for part in parts if part not in lines[0]]
    status = forkserver.read_status(output_dir)
    if (status["state"], status["exit_code"], status["error"]) != ("failed", code_of(kind), lines[0]):
        problems.append(f"the status is {status}")
    return problems


def frame_of(kind: str, workers: int) -> str:
    """Return what the stack of a rank that hangs must contain; the stack of its data workers is not among them."""
    if kind == "lock":
        return " in wait_for_a_lock"
    return "torch/utils/data/dataloader.py" if workers else " in loop"


def problems_of_stacks(kind: str, victim: int, ranks: Sequence[int], output_dir: Path, frame: str) -> list[str]:
    """Return what is wrong with the stacks that these ranks must have written if the run hangs."""
    folder = output_dir / "stacks"
    found = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    expected = [] if kind == "raise" else [f"process-{rank}.txt" for rank in ranks]
    if found != expected:
        return [f"stacks {found} instead of {expected}"]
    if kind != "raise" and victim in ranks and frame not in (folder / f"process-{victim}.txt").read_text("utf-8"):
        return [f"the stack of process {victim} does not show {frame!r}"]
    return []
