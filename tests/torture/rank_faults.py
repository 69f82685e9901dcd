"""A fault in one rank of a run: it stops, fails or waits forever where it enters a section or calls a function."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import runs

from videox.activity import ACTIVITY
from videox.data.dataset import TokenLengthDataset
from videox.run import checkpoint
from videox.training.checkpointing import Checkpointer

ENTRY_POINT = "tests.torture.rank_faults:train"
CAUSE = "this process fails on purpose"
DECODE = "decode"  # the place of a file that is read forever
# Places inside a save, besides the section of that name; the last two are on rank 0 only.
IN_A_SAVE = ("writing", "hashing", "publishing", "pruning")


@dataclass(frozen=True)
class RankFault:
    """What happens in one rank.

    Attributes:
        rank: of the process.
        kind: one of FAULTS.
        place: name of a section of videox.activity, DECODE, or one of IN_A_SAVE.
        step: not before this many steps are recorded.
    """

    rank: int
    kind: str
    place: str
    step: int

    def environment(self, output_dir: Path, moment: Path) -> dict[str, str]:
        """Return the variables that `train` reads.

        Args:
            output_dir: of the run.
            moment: file that gets the time at which the fault happened, in seconds of time.time.
        """
        values = {"VICTIM": self.rank, "KIND": self.kind, "PLACE": self.place, "STEP": self.step}
        values |= {"OUTPUT_DIR": output_dir, "MOMENT": moment}
        return {f"RANK_FAULT_{name}": str(value) for name, value in values.items()}


def train() -> int:
    """Train; the rank in the variable RANK_FAULT_VICTIM has the fault. Entry point of forked ranks."""
    script = runs.train_script()
    if os.environ["RANK"] == os.environ["RANK_FAULT_VICTIM"]:
        arm({name.removeprefix("RANK_FAULT_"): value for name, value in os.environ.items()})
    return script.main()


def arm(settings: dict[str, str]) -> None:
    """Let the fault happen where it is to happen, once."""
    place, fault = settings["PLACE"], FAULTS[settings["KIND"]]
    metrics, moment = Path(settings["OUTPUT_DIR"]) / "metrics.jsonl", Path(settings["MOMENT"])

    def happen_if_due() -> None:
        if not moment.exists() and steps_in(metrics) >= int(settings["STEP"]):
            moment.write_text(str(time.time()), encoding="utf-8")
            fault()

    functions = {
        DECODE: (TokenLengthDataset, "_read"),
        "hashing": (checkpoint, "_flush_and_hash"),
        "publishing": (checkpoint, "_publish"),
        "pruning": (Checkpointer, "_prune"),
        "writing": (Checkpointer, "_write"),
    }
    if place in functions:
        before(*functions[place], happen_if_due)
        return
    enter = ACTIVITY.enter

    def entered(name: str) -> None:
        enter(name)
        if name == place:
            happen_if_due()

    ACTIVITY.enter = entered  # type: ignore[method-assign]


def before(owner: object, name: str, call: Callable[[], None]) -> None:
    """Have a function of a class or module begin with a call."""
    function = getattr(owner, name)

    def changed(*arguments: object, **keywords: object) -> object:
        call()
        return function(*arguments, **keywords)

    setattr(owner, name, changed)


def steps_in(metrics: Path) -> int:
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def fail() -> None:
    raise RuntimeError(CAUSE)


def wait_for_a_lock() -> None:
    """Never return."""
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def loop() -> None:
    """Never return, as a decoder that finds no end; the pauses leave the processor to others."""
    while True:
        time.sleep(0.01)


FAULTS = {"stop": stop, "raise": fail, "lock": wait_for_a_lock, "loop": loop}
