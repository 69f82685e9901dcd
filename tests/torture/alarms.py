"""Area alarms: a run of two ranks with the default limits of the watchdog, which must never end it."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

import forkserver
import launches

from tests.torture.cases import Area, Outcome, Row
from tests.torture.ground import shared
from tests.torture.rank_runs import RankRuns, error_lines
from videox.errors import STOPPED
from videox.run.checkpoint import find_checkpoints

RANKS = 2
PROMPT = "a bright square moves"
BROKEN_SECONDS = 3.0  # limit of the watchdog in the broken variant, in which a rank is stopped
PAUSE = 1.0  # seconds between two looks


class Alarms(Area):
    """One run, as long as the time that is given to the area, beside whatever else the machine does."""

    rows = (Row("minutes", "minutes of a run of two ranks with the watchdog's own limits, a data worker each, saves, validations and sample clips: no alarm", 60),)  # fmt: skip

    def __init__(self, folder: Path, *, broken: bool = False) -> None:
        super().__init__(folder, broken=broken)
        self.ground = shared()
        self.runs = RankRuns(self.ground)

    def attempt(self, seed: int, draw: random.Random) -> Outcome:
        place = self.ground.new_place(f"alarms-{seed}")
        output_dir, every = place / "run", draw.choice((5, 10))
        ranks = self.runs.start(
            place, "ddp", RANKS, max_train_steps=10_000_000, num_train_epochs=None, checkpointing_steps=every,
            validation_rows=2, validation_steps=every, validation_prompts=[PROMPT], sample_every=5 * every,
            sample_steps=2, dataloader_num_workers=1, watchdog_seconds=BROKEN_SECONDS if self.broken else None,
        )  # fmt: skip
        ranks[0].wait_until(lambda: find_checkpoints(output_dir))
        if self.broken:
            ranks[1].signal(signal.SIGSTOP)
        began, seconds = time.monotonic(), 10 * BROKEN_SECONDS if self.broken else self.seconds
        while all(rank.running() for rank in ranks) and time.monotonic() - began < seconds:
            time.sleep(PAUSE)
        minutes = int((time.monotonic() - began) / 60)
        for rank in ranks:
            rank.signal(signal.SIGTERM)
            rank.signal(signal.SIGCONT)
        codes = [rank.wait() for rank in ranks]
        steps = forkserver.read_steps(output_dir)
        validations = (output_dir / "validation.jsonl").read_bytes().count(b"\n")
        problems = [] if codes == [STOPPED] * RANKS else [f"ended with {codes}: {launches.output_of(ranks)}"]
        problems += error_lines(ranks)
        problems += ["stacks were written"] if (output_dir / "stacks").exists() else []
        shutil.rmtree(place)
        what = f"{minutes} minutes, {len(steps)} steps, saves every {every} steps, {validations} validations"
        return Outcome("minutes", what, tried=max(minutes, 1), problems=problems[:1])
