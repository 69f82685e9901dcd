"""Area kills: SIGKILL at random moments of the whole life of a run and of its resumes, then a last resume."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

from tests.torture.cases import Area, Outcome, Row
from tests.torture.ground import shared
from videox.run.checkpoint import find_checkpoints

NUMBERS = (1, 1, 2, 4, 8)  # of kills of a case, drawn
EARLIER = 0.8  # share of a moment that is tried next where the first run had ended before
LATER = 0.6  # of the life of a run, in which the kills after the first come: a resumed run has less to do


class Kills(Area):
    """Ends a run and its data workers, and the runs that resume it; the last resume must be bit-identical.

    What a case tried is the number of processes that were running when they were killed.
    """

    rows = (
        Row("plain", "killed at a random moment (start, index, training, save, prune, export), resumed bit-identically", 4000),
        Row("cached", "the same while a latent cache is written and read", 1000),
    )  # fmt: skip

    def __init__(self, folder: Path, *, broken: bool = False, family: str = "wan2.1") -> None:
        super().__init__(folder, broken=broken)
        self.ground = shared(family)

    def attempt(self, seed: int, draw: random.Random) -> Outcome:
        cached = seed % 5 == 4
        changes: dict[str, object] = {"cached": True} if cached else {}
        workers = draw.choice((0, 2))
        life = self.ground.life(dataloader_num_workers=workers, **changes)
        first, more = draw.uniform(0, life), 0 if self.broken else draw.choice(NUMBERS) - 1
        moments = [first, *(draw.uniform(0, LATER * life) for _ in range(more))]
        killed = 0
        while not killed:
            place = self.ground.new_place(f"kill-{seed}")
            killed = self._kill_in_turn(place, moments, dataloader_num_workers=workers, **changes)
            moments = [EARLIER * moment for moment in moments]  # the first had ended before
        what = f"{workers} workers, {killed} killed, the first within {first:.2f} s"
        problems = self.ground.problems_after_resume(place, draw if self.broken else None, **changes)
        shutil.rmtree(place)
        return Outcome("cached" if cached else "plain", what, killed, ["; ".join(problems)] if problems else ())

    def _kill_in_turn(self, place: Path, moments: Sequence[float], **changes: object) -> int:
        """Start a run and resume it, each killed after so many seconds; return how many were running then."""
        for number, moment in enumerate(moments):
            resumed = {"resume_from_checkpoint": "latest"} if number else {}
            run = self.ground.start(place, **resumed, **changes)
            if self.broken:
                run.wait_until(lambda: find_checkpoints(place / "run"))
            else:
                run.wait_for(moment)
            run.kill()
            if run.wait() != -signal.SIGKILL:
                return number
        return len(moments)
