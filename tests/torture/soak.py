"""Area soak: many tiny steps with saves and a damaged file; what the run holds must not grow."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import psutil
import runs
import torch

from tests.torture.cases import Area, Outcome, Row
from tests.torture.ground import shared
from videox.errors import STOPPED

MOST_GROWTH = {"MiB": 50, "open files": 0, "threads": 0, "children": 0, "entries of output_dir": 0}
PAUSE = 0.1  # seconds between two looks
LEAST_STEPS, LEAST_LOOKS = 36, 30
WARM_UP = 12  # steps; lazily loaded modules and pools come in the first ones


class Soak(Area):
    """One run, at least as long as the time that is given to the area."""

    rows = (Row("steps", "steps of one run with two data workers, saves, prunes and a bad row: memory, open files, threads, children and output_dir do not grow", 50_000),)  # fmt: skip

    def __init__(self, folder: Path, *, broken: bool = False) -> None:
        super().__init__(folder, broken=broken)
        self.ground = shared()

    def attempt(self, seed: int, draw: random.Random) -> Outcome:
        place = self.ground.new_place(f"soak-{seed}")
        add_bad_row(self.ground.inputs / "data")
        run = self.ground.start(
            place, "tests.torture.soak:train_with_a_leak" if self.broken else "", max_train_steps=10_000_000,
            checkpointing_steps=draw.choice((5, 50)), dataloader_num_workers=2, num_train_epochs=None,
        )  # fmt: skip
        output_dir, looks, began = place / "run", [], 0.0
        run.wait_until(lambda: steps_done(output_dir) >= WARM_UP)
        began = time.monotonic()
        while run.running() and (
            time.monotonic() - began < self.seconds
            or steps_done(output_dir) < WARM_UP + LEAST_STEPS
            or len(looks) < LEAST_LOOKS
        ):
            with contextlib.suppress(psutil.NoSuchProcess):
                looks.append(look(run.pid, output_dir))
            time.sleep(PAUSE)
        run.signal(signal.SIGTERM)
        run.wait()
        steps = steps_done(output_dir)
        problems = growth(looks)
        if run.code != STOPPED:
            problems.append(f"it ended with {run.code}: {run.output()[-2000:]}")
        shutil.rmtree(place)
        what = f"{len(looks)} looks, last {looks[-1] if looks else 'none'}"
        return Outcome("steps", what, tried=steps, problems=problems)


def add_bad_row(data: Path) -> None:
    """Add a row whose clip is cut off in the middle."""
    clip = data / "cut.mp4"
    whole = next(data.glob("*.mp4")).read_bytes()
    clip.write_bytes(whole[: len(whole) // 2])
    metadata = data / "metadata.json"
    rows = json.loads(metadata.read_bytes())
    metadata.write_text(
        json.dumps([*rows, {"file_path": clip.name, "text": "cut", "type": "video"}]), encoding="utf-8"
    )


def steps_done(output_dir: Path) -> int:
    metrics = output_dir / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def look(pid: int, output_dir: Path) -> dict[str, int]:
    """Return what a run holds at this moment."""
    process = psutil.Process(pid)
    children = process.children(recursive=True)
    return {
        "MiB": process.memory_info().rss >> 20,
        "open files": process.num_fds(),
        "threads": process.num_threads(),
        "children": len(children),
        "entries of output_dir": len(os.listdir(output_dir)),  # noqa: PTH208 - one call, while names come and go
    }


def growth(looks: list[dict[str, int]]) -> list[str]:
    """Return what has grown from the second to the last third of the looks, by the least value of each."""
    third = len(looks) // 3
    if not third:
        return [f"only {len(looks)} looks"]
    problems = []
    for name, most in MOST_GROWTH.items():
        middle, last = (min(part[name] for part in looks[i * third : (i + 1) * third]) for i in (1, 2))
        if last - middle > most:
            problems.append(f"{name}: {middle}, later {last}")
    return problems


def train_with_a_leak() -> int:
    """Broken on purpose: each micro-batch opens a file and leaves it open; entry point of a forked trainer."""
    script = runs.train_script()
    compute, kept = script.accumulate_gradients, []

    def leaking(*arguments: object, **settings: object) -> torch.Tensor:
        kept.append(os.open(os.devnull, os.O_RDONLY))
        return compute(*arguments, **settings)

    script.accumulate_gradients = leaking
    return script.main()
