"""Processor time until the trainer answers without training: help, wrong flags, the list of recipes, a dry run.

    python benchmarks/startup.py [--rounds 5] [--output benchmarks/startup.md]

Each command is a process of its own. Its processor time (user and system) depends less on what else the machine does
than the time on a clock does; the smallest of the rounds is the figure.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from machine import machine_line

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = ("wan2.1", "hunyuanvideo")
DRY_RUN = {"wan2.1": "t2v-1.3b-lora-24gb", "hunyuanvideo": "t2v-lora-48gb"}
AT_ONCE, PLANNED = 1.0, 4.0  # seconds of processor time that the answers should take at most


@dataclass(frozen=True)
class Command:
    """A command: what is shown for it, its words, the exit code that it must have, and its goal in seconds."""

    shown: str
    words: tuple[str, ...]
    code: int
    goal: float


def commands(folder: str) -> list[Command]:
    """Return all commands; folder: for the files of the dry runs."""
    found = []
    for family in FAMILIES:
        script = f"scripts/{family}/train.py"
        for flags, code in (("--help", 0), ("--learning_rat 1e-4", 2), ("--lr 1e-4", 2), ("--list_recipes", 0)):
            found.append(Command(f"{script} {flags}", (script, *flags.split()), code, AT_ONCE))
        flags = f"--recipe {DRY_RUN[family]} --dry_run --dry_run_data 200x5s@24fps:1280x720"
        words = (script, *flags.split(), "--output_dir", folder)
        found.append(Command(f"{script} {flags}", words, 0, PLANNED))
    return found


@dataclass(frozen=True)
class Times:
    """Seconds of a command: on the processor, and on the clock."""

    processor: float
    clock: float


def measure(command: Command) -> Times:
    """Run a command once; raises RuntimeError where it ends with another code."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(
        [sys.executable, *command.words], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != command.code:
        raise RuntimeError(f"{command.shown} ended with {done.returncode}: {done.stderr}")
    used = (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime)
    return Times(used, time.monotonic() - begun)


def page(rows: list[tuple[Command, Times]], rounds: int) -> str:
    """Return the page with the table."""
    table = [
        f"| `{command.shown}` | {times.processor:.2f} | {times.clock:.2f} | {command.goal:g} | "
        f"{'yes' if times.processor <= command.goal else 'no'} |"
        for command, times in rows
    ]
    return f"""# Time until the trainer answers

Written by `python benchmarks/startup.py --rounds {rounds} --output benchmarks/startup.md`: the smallest of {rounds} rounds.

{machine_line("torch", "diffusers")}. Load when it began: {os.getloadavg()[0]:.1f}; a busy second thread of a core makes processor
times longer, too.

| command | processor s | clock s | goal | reached |
|---|---|---|---|---|
{chr(10).join(table)}

Help, wrong flags and recipes are answered before torch is imported. The dry run of a published model imports neither torch nor diffusers
(config/module_facts.json has what it needs of their classes); of any other model it builds the modules, which takes some seconds more.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="Markdown file to write (default: print only)")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="videox-startup-") as folder:
        for command in commands(folder):
            found = [measure(command) for _ in range(args.rounds)]
            rows.append((command, min(found, key=lambda times: times.processor)))
            print(command.shown, f"{rows[-1][1].processor:.2f}", sep="\t", flush=True)
    text = page(rows, args.rounds)
    print(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
