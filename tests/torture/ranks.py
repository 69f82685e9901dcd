"""Area ranks: one of two ranks is killed at a random moment, under each backend, forked or really launched."""

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
from tests.torture.ground import STEPS, shared
from videox.errors import PEER_LOST

RECIPES = ("ddp", "zero2", "zero3", "fsdp2")
KIND = "wan2.1 normal"
RANKS = 2
END_SECONDS = 60.0  # within which the other rank must end
GOAL = "one of two ranks killed at a random moment: the other ends with 7 within 60 s, resumed with the same losses and export"


class Ranks(Area):
    """A rank that is killed ends all, and nothing is lost."""

    rows = (
        *(Row(recipe, f"{recipe}, forked ranks: {GOAL}", 300) for recipe in RECIPES),
        Row("launch", f"`accelerate launch`, the four backends in turn: {GOAL.replace('the other ends with 7', 'the launch fails')}", 300),
    )  # fmt: skip

    def __init__(self, folder: Path, *, broken: bool = False) -> None:
        super().__init__(folder, broken=broken)
        self.ground = shared()
        self.reference = cache(self._reference)
        self.launched = cache(self._seconds_of_launch)

    def attempt(self, seed: int, draw: random.Random) -> Outcome:
        row = self.rows[seed % len(self.rows)].name
        recipe = RECIPES[seed // len(self.rows) % len(RECIPES)] if row == "launch" else row
        self.reference(recipe)
        if row == "launch":
            self.launched(recipe)
        place, victim = self.ground.new_place(f"ranks-{seed}"), draw.randrange(RANKS)
        if row == "launch":
            what, problems = self._kill_launched(place, recipe, victim, draw.random())
        else:
            what, problems = self._kill_forked(place, recipe, victim, draw.random())
        if not problems:
            problems = self._problems_of_resume(place, recipe)
        shutil.rmtree(place)
        return Outcome(row, f"{recipe}: rank {victim} killed after {what}", problems=problems)

    def _start(self, place: Path, recipe: str, **changes: object) -> list[forkserver.TrainerProcess]:
        return self.ground.server.start_ranks(
            RANKS, self.ground.flags(place, mixed_precision=None, **changes), place / "log",
            environment=launches.launcher_environment(recipe, KIND, RANKS),
        )  # fmt: skip

    def _reference(self, recipe: str) -> tuple[Path, float]:
        """Return the output folder of an uninterrupted run of this backend, and how many seconds it took."""
        place, begin = self.ground.new_place(f"reference-{recipe}"), time.monotonic()
        ranks = self._start(place, recipe)
        assert [rank.wait() for rank in ranks] == [0] * RANKS, launches.output_of(ranks)
        return place / "run", time.monotonic() - begin

    def _kill_forked(self, place: Path, recipe: str, victim: int, share: float) -> tuple[str, list[str]]:
        moment = share * self.reference(recipe)[1]
        ranks = self._start(place, recipe)
        time.sleep(moment)
        finished = not ranks[victim].running()
        for rank in ranks if self.broken else ranks[victim : victim + 1]:
            rank.kill()
        begin = time.monotonic()
        codes = [rank.wait() for rank in ranks]
        seconds = time.monotonic() - begin
        problems = [] if seconds <= END_SECONDS else [f"the other rank ended after {seconds:.0f} s"]
        expected = 0 if finished else PEER_LOST
        if codes[1 - victim] != expected:
            problems.append(
                f"the other rank ended with {codes[1 - victim]}, not {expected}: {launches.output_of(ranks)}"
            )
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
        seconds, finished = time.monotonic() - killed, not found
        problems = [] if seconds <= END_SECONDS else [f"the launch ended after {seconds:.0f} s"]
        if (code == 0) != finished or code < 0:
            problems.append(f"the launch ended with {code}: {output[-2000:]}")
        return f"{killed - begin:.1f} s", problems

    def _problems_of_resume(self, place: Path, recipe: str) -> list[str]:
        again = self._start(place, recipe, resume_from_checkpoint="latest")
        codes = [rank.wait() for rank in again]
        if codes != [0] * RANKS:
            return [f"the resume ended with {codes}: {launches.output_of(again)}"]
        expected, output_dir = self.reference(recipe)[0], place / "run"
        found = forkserver.read_steps(output_dir)
        problems = [] if len(found) == STEPS else [f"steps {[line['step'] for line in found]}"]
        pairs = zip(forkserver.read_steps(expected), found, strict=False)
        problems += [f"metrics of step {a['step']}: {b} instead of {a}" for a, b in pairs if a != b]
        problems += [f"{path.name} is left" for path in output_dir.glob(".tmp-*")]
        return problems + different_files(output_dir / "transformer", expected / "transformer")


def ranks_of(launcher: int) -> Sequence[int]:
    """Return the pids of the ranks that a launcher has started, in the order of their start."""
    try:
        children = psutil.Process(launcher).children(recursive=True)
        found = [child for child in children if any(word.endswith("train.py") for word in child.cmdline()[:4])]
        return [child.pid for child in sorted(found, key=psutil.Process.create_time)][:RANKS]
    except psutil.NoSuchProcess:
        return []


def different_files(folder: Path, expected: Path) -> list[str]:
    """Return the names of the files that are not equal in both folders."""
    names = {path.name for root in (folder, expected) for path in root.iterdir()}
    same = [name for name in names if (folder / name).exists() and (expected / name).exists()]
    equal = {name for name in same if (folder / name).read_bytes() == (expected / name).read_bytes()}
    return [f"transformer/{name} is not equal" for name in sorted(names - equal)]
