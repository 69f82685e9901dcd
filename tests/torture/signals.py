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
from tests.torture.rank_runs import RankRuns
from videox.errors import INTERRUPTED, STOPPED

LONGEST_PAUSE = 0.6  # seconds between two signals: shorter and longer than the echo of a launcher
END_SECONDS = 120.0
RANKS = 2


class Signals(Area):
    """A run that gets a stop signal is saved or has not begun; its status says that it was stopped."""

    rows = (
        Row("once", "one stop signal at a random moment: exit 75 or 130, status never `running`, resumed bit-identically", 200),
        Row("twice", "two stop signals in quick succession at a random moment: the same", 200),
        Row("ranks", "two ranks (DDP), both get one or two stop signals at a random moment: both end alike, resumed with the same losses and export", 200),
    )  # fmt: skip

    def __init__(self, folder: Path, *, broken: bool = False, family: str = "wan2.1") -> None:
        super().__init__(folder, broken=broken)
        self.ground = shared(family)
        self.runs = RankRuns(self.ground)
        self.kinds = [row.name for row in self.rows if family == "wan2.1" or row.name != "ranks"]

    def attempt(self, seed: int, draw: random.Random) -> Outcome:
        kind, place = self.kinds[seed % len(self.kinds)], self.ground.new_place(f"signal-{seed}")
        number = draw.choice((signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))
        share, pause = draw.random(), draw.uniform(0, LONGEST_PAUSE)
        pauses = [pause] if kind == "twice" or (kind == "ranks" and draw.random() < 0.5) else []
        to_all, workers = draw.random() < 0.5, draw.choice((0, 2))
        if kind == "ranks":
            moment = share * self.runs.reference("ddp", RANKS)[1]
            started = self.runs.start(place, "ddp", RANKS)
        else:
            moment = share * self.ground.life(dataloader_num_workers=workers)
            started = [self.ground.start(place, dataloader_num_workers=workers)]
        for delay in (moment, *pauses):
            time.sleep(delay)
            for run in started:
                (run.signal_all if to_all and run.running() else run.signal)(number)
        for run in started:
            if self.broken:
                run.kill()
            run.wait(END_SECONDS)
        problems = [line for run in started for line in problems_of_stop(run, place / "run")]
        if len({run.code for run in started}) > 1:
            problems.append(f"the ranks ended with {[run.code for run in started]}")
        if not problems and kind == "ranks":
            problems = self.runs.problems_of_resume(place, "ddp", RANKS)
        elif not problems:
            problems = self.ground.problems_after_resume(place)
        shutil.rmtree(place)
        again = "".join(f" and {pause:.2f} s later" for pause in pauses)
        what = f"{number.name} after {moment:.2f} s{again}, {'with their workers' if to_all else 'trainers only'}"
        return Outcome(kind, what, problems=["; ".join(problems)] if problems else ())


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
