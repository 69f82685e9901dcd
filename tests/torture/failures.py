"""Area failures: an exception of one rank at a drawn place and step, under each backend and with four ranks."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import launches

from tests.torture.cases import Area, Outcome, Row
from tests.torture.ground import shared
from tests.torture.rank_faults import CAUSE, ENTRY_POINT, RankFault
from tests.torture.rank_runs import RECIPES, RankRuns, error_lines
from tests.torture.watchdog import RAISED_SECONDS, ended_after
from videox.errors import BUG
from videox.run.checkpoint import find_checkpoints, verify

RANKS, MORE_RANKS = 2, 4
PLACES = (
    "loading the model", "placing weights and optimizer", "waiting for data", "the VAE", "the forward pass",
    "the backward pass", "the optimizer step", "a save", "the export",
)  # fmt: skip
FIRST_STEPS = {"loading the model": 0, "placing weights and optimizer": 0, "the export": 0}
GOAL = f"an exception of one rank at a random place and step: all out with its code within {RAISED_SECONDS:g} s, the cause named once, checkpoints whole, resumed with the same losses and export"


class Failures(Area):
    """A rank that fails ends all, and nothing is lost."""

    rows = (
        *(Row(recipe, f"{recipe}, two ranks: {GOAL}", 100) for recipe in RECIPES),
        Row("four", f"four ranks, the four backends in turn: {GOAL}", 100),
    )

    def __init__(self, folder: Path, *, broken: bool = False) -> None:
        super().__init__(folder, broken=broken)
        self.ground = shared()
        self.runs = RankRuns(self.ground)

    def attempt(self, seed: int, draw: random.Random) -> Outcome:
        row, round_ = self.rows[seed % len(self.rows)].name, seed // len(self.rows)
        recipe, number = (row, RANKS) if row in RECIPES else (RECIPES[round_ % len(RECIPES)], MORE_RANKS)
        place = PLACES[(round_ + 2 * (seed % len(self.rows))) % len(PLACES)]
        fault = RankFault(draw.randrange(number), "raise", place, FIRST_STEPS.get(place, draw.randrange(5)))
        self.runs.reference(recipe, number)
        folder = self.ground.new_place(f"failure-{seed}")
        output_dir, moment = folder / "run", folder / "moment"
        ranks = self.runs.start(
            folder, recipe, number, "" if self.broken else ENTRY_POINT, fault.environment(output_dir, moment)
        )
        codes = [rank.wait() for rank in ranks]
        seconds = ended_after(output_dir, moment)
        problems = [] if codes == [BUG] * number else [f"ended with {codes}"]
        lines = error_lines(ranks)
        if len(lines) != 1 or f"process {fault.rank}: RuntimeError: {CAUSE}" not in lines[0]:
            problems.append(f"error lines {lines}")
        if not 0 <= seconds <= RAISED_SECONDS:
            problems.append(f"the status said it after {seconds:.1f} s")
        problems += [
            f"{path.name}: {why}" for path in find_checkpoints(output_dir) for why in verify(path, hashes=True)
        ]
        if problems:
            problems[0] += f": {launches.output_of(ranks)}"
        else:
            problems = self.runs.problems_of_resume(folder, recipe, number)
        shutil.rmtree(folder)
        what = (
            f"{recipe}: rank {fault.rank} of {number} fails in {place}, step {fault.step}: out after {seconds:.1f} s"
        )
        return Outcome(row, what, problems=["; ".join(problems)] if problems else ())
