"""Area ranks: one of two or four ranks is killed at a random moment, under each backend, forked or really launched."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import forkserver
import launches
import psutil
import runs
from bounded import kill_tree

from tests.torture.cases import Area, Outcome, Row
from tests.torture.ground import shared
from tests.torture.rank_runs import KIND, RECIPES, RankRuns
from videox.errors import PEER_LOST

RANKS, MORE_RANKS = 2, 4
END_SECONDS = 60.0  # within which the other rank must end
GOAL = "one of two ranks killed at a random moment: the other ends with 7 within 60 s, resumed with the same losses and export"


class Ranks(Area):
    """A rank that is killed ends all, and nothing is lost."""

    rows = (
        *(Row(recipe, f"{recipe}, forked ranks: {GOAL}", 300) for recipe in RECIPES),
        Row("launch", f"`accelerate launch`, the four backends in turn: {GOAL.replace('the other ends with 7', 'the launch fails')}", 300),
        Row("four", f"four forked ranks, the four backends in turn: {GOAL.replace('two', 'four').replace('the other ends', 'the others end')}", 100),
    )  # fmt: skip

    def __init__(self, folder: Path, *, broken: bool = False) -> None:
        super().__init__(folder, broken=broken)
        self.ground = shared()
        self.runs = RankRuns(self.ground)
        self.launched = cache(self._seconds_of_launch)

    def attempt(self, seed: int, draw: random.Random) -> Outcome:
        row = self.rows[seed % len(self.rows)].name
        recipe = row if row in RECIPES else RECIPES[seed // len(self.rows) % len(RECIPES)]
        ranks = MORE_RANKS if row == "four" else RANKS
        self.runs.reference(recipe, ranks)
        if row == "launch":
            self.launched(recipe)
        place, victim = self.ground.new_place(f"ranks-{seed}"), draw.randrange(ranks)
        if row == "launch":
            what, problems = self._kill_launched(place, recipe, victim, draw.random())
        else:
            what, problems = self._kill_forked(place, recipe, ranks, victim, draw.random())
        if not problems:
            problems = self.runs.problems_of_resume(place, recipe, ranks)
        shutil.rmtree(place)
        return Outcome(row, f"{recipe}: rank {victim} of {ranks} killed after {what}", problems=problems)

    def _kill_forked(self, place: Path, recipe: str, number: int, victim: int, share: float) -> tuple[str, list[str]]:
        moment = share * self.runs.reference(recipe, number)[1]
        ranks = self.runs.start(place, recipe, number)
        time.sleep(moment)
        finished = not ranks[victim].running()
        for rank in ranks if self.broken else ranks[victim : victim + 1]:
            rank.kill()
        begin = time.monotonic()
        codes = [rank.wait() for rank in ranks]
        seconds = time.monotonic() - begin
        problems = [] if seconds <= END_SECONDS else [f"the last of the other ranks ended after {seconds:.0f} s"]
        allowed = {0} if finished else {PEER_LOST, 0} if has_finished(place / "run") else {PEER_LOST}
        others = codes[:victim] + codes[victim + 1 :]
        if not allowed.issuperset(others):
            problems.append(f"the other ranks ended with {others}, not {allowed}: {launches.output_of(ranks)}")
        return f"{moment:.1f} s", problems

    def _command(self, place: Path, recipe: str) -> list[str]:
        launcher = [sys.executable, "-m", "accelerate.commands.launch", *launches.launcher_flags(recipe, KIND, RANKS)]
        flags = self.ground.flags(place, mixed_precision=None)
        return [*launcher, "--main_process_port", "0", runs.WAN_SCRIPT, *flags]

    def _seconds_of_launch(self, recipe: str) -> float:
        outcome = runs.run_command(self._command(self.ground.new_place(f"launched-{recipe}"), recipe), Path())
        assert outcome.code == 0, outcome.stderr[-4000:]
        return outcome.seconds

    def _kill_launched(self, place: Path, recipe: str, victim: int, share: float) -> tuple[str, list[str]]:
        moment, begin = share * self.launched(recipe), time.monotonic()
        with (place / "log").open("w") as log:
            started = subprocess.Popen(
                self._command(place, recipe), cwd=runs.ROOT, env=runs.child_environment(), stdout=log, stderr=log
            )
            while started.poll() is None and (len(ranks_of(started.pid)) < RANKS or time.monotonic() - begin < moment):
                time.sleep(0.05)
            found = ranks_of(started.pid)
            if len(found) > victim:
                os.kill(found[victim], signal.SIGKILL)
            if self.broken:
                kill_tree(started.pid)
            killed = time.monotonic()
            try:
                code = started.wait(2 * END_SECONDS)
            except subprocess.TimeoutExpired:
                kill_tree(started.pid)
                started.wait()
                return f"{killed - begin:.1f} s", [f"the launch did not end within {2 * END_SECONDS} s"]
        output = (place / "log").read_text(encoding="utf-8", errors="replace")
        seconds, may_be_right = time.monotonic() - killed, not found or has_finished(place / "run")
        problems = [] if seconds <= END_SECONDS else [f"the launch ended after {seconds:.0f} s"]
        if (code == 0 and not may_be_right) or (code != 0 and not found) or code < 0:
            problems.append(f"the launch ended with {code}: {output[-2000:]}")
        return f"{killed - begin:.1f} s", problems


def has_finished(output_dir: Path) -> bool:
    """Return whether a run has ended, by its status; a rank that is killed after that is not missed by the others."""
    return (output_dir / "run_status.json").exists() and forkserver.read_status(output_dir)["state"] == "finished"


def ranks_of(launcher: int) -> Sequence[int]:
    """Return the pids of the ranks that a launcher has started, in the order of their start."""
    try:
        children = psutil.Process(launcher).children(recursive=True)
        found = [child for child in children if any(word.endswith("train.py") for word in child.cmdline()[:4])]
        return [child.pid for child in sorted(found, key=psutil.Process.create_time)][:RANKS]
    except psutil.NoSuchProcess:
        return []
