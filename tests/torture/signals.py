"""Area signals: a stop signal at random moments of the whole life of a run, once or twice, then a resume."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

import forkserver

from tests.torture.cases import Area, Outcome, Row
from tests.torture.ground import shared
from videox.errors import INTERRUPTED, STOPPED

LONGEST_PAUSE = 0.6  # seconds between two signals: shorter and longer than the echo of a launcher
END_SECONDS = 120.0


class Signals(Area):
    """A run that gets a stop signal is saved or has not begun; its status says that it was stopped."""

    rows = (
        Row("once", "one stop signal at a random moment: exit 75 or 130, status never `running`, resumed bit-identically", 200),
        Row("twice", "two stop signals in quick succession at a random moment: the same", 200),
    )  # fmt: skip

    def __init__(self, folder: Path, *, broken: bool = False, family: str = "wan2.1") -> None:
        super().__init__(folder, broken=broken)
        self.ground = shared(family)

    def attempt(self, seed: int, draw: random.Random) -> Outcome:
        seconds = self.ground.reference()[1]
        twice, place = seed % 2 == 1, self.ground.new_place(f"signal-{seed}")
        number = draw.choice((signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))
        moment, pause = draw.uniform(0, seconds), draw.uniform(0, LONGEST_PAUSE)
        to_all = draw.random() < 0.5
        run = self.ground.start(place, dataloader_num_workers=draw.choice((0, 2)))
        for delay in (moment, pause)[: 1 + twice]:
            time.sleep(delay)
            (run.signal_all if to_all and run.running() else run.signal)(number)
        if self.broken:
            run.kill()
        run.wait(END_SECONDS)
        what = f"{number.name} after {moment:.2f} s{f' and {pause:.2f} s later' if twice else ''}, {'all' if to_all else 'trainer'}"
        problems = problems_of_stop(run, place / "run")
        if not problems:
            problems += self.ground.problems_after_resume(place)
        shutil.rmtree(place)
        return Outcome("twice" if twice else "once", what, problems=problems)


def problems_of_stop(run: forkserver.TrainerProcess, output_dir: Path) -> list[str]:
    """Return what is wrong with how a run ended that got a stop signal, or two."""
    problems = [f"it printed a traceback: {run.output()[-1500:]}"] if "Traceback" in run.output() else []
    # A signal that comes before the process handles any ends it as any program; nothing has begun then.
    if run.code not in (0, STOPPED, INTERRUPTED) and (run.code == -signal.SIGKILL or output_dir.exists()):
        problems.append(f"exit code {run.code}: {run.output()[-1000:]}")
    if (output_dir / "run_status.json").exists():
        status = forkserver.read_status(output_dir)
        expected = "finished" if run.code == 0 else "stopped"
        if (status["state"], status["exit_code"]) != (expected, run.code):
            problems.append(f"exit code {run.code}, but the status is {status['state']} with {status['exit_code']}")
    return problems
