"""Area kills: SIGKILL at random moments of the whole life of a run, once to three times, then a resume."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

from tests.torture.cases import Area, Outcome, Row
from tests.torture.ground import shared
from videox.run.checkpoint import find_checkpoints

MOST_KILLS = 3


class Kills(Area):
    """Ends a run and its data workers; resumed, it must be bit-identical to an uninterrupted run."""

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
        seconds = self.ground.reference(**changes)[1]
        place, workers = self.ground.new_place(f"kill-{seed}"), draw.choice((0, 2))
        moments = [
            draw.uniform(0, seconds) for _ in range(1 if self.broken else draw.choice((1, 1, 1, 2, MOST_KILLS)))
        ]
        for number, moment in enumerate(moments):
            resumed = {"resume_from_checkpoint": "latest"} if number else {}
            run = self.ground.start(place, dataloader_num_workers=workers, **resumed, **changes)
            if self.broken:
                run.wait_until(lambda: find_checkpoints(place / "run"))
            else:
                time.sleep(moment)
            run.kill()
            run.wait()
        what = f"{workers} workers, killed after {', '.join(f'{moment:.2f}' for moment in moments)} s"
        problems = self.ground.problems_after_resume(place, draw if self.broken else None, **changes)
        shutil.rmtree(place)
        return Outcome("cached" if cached else "plain", what, problems=problems)
