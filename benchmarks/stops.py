"""Serves whoever doubts that a killed run goes on as if nothing had happened: kills runs at random and compares.

    python benchmarks/stops.py [--kills N] [--output benchmarks/stops.md]

Each kill is a run of its own: the trainer is started, SIGKILL ends it and its workers at a drawn moment, the same
command with --resume_from_checkpoint latest finishes it, and metrics, last checkpoint and exported weights are
compared with an unbroken run's, byte by byte. A share of the kills wait for a save to begin; whether a kill really
fell into a save is told by the temporary folder that it left.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

import forkserver
import runs
import tiny
import torch

from videox.checkpoint import find_checkpoints, latest

STEPS, EVERY, KILLS, IN_SAVES = 60, 5, 20, 7
CONFIGURATIONS = tuple((workers, precision) for precision in ("no", "bf16") for workers in (0, 2))
LONGEST_SAVE = 0.03  # seconds: kills that wait for a save come within this after it has begun
ATTEMPTS = 10  # a save may be over before its kill arrives; then the kill is drawn again
HEADER = (
    "data workers", "precision", "kills", "inside a save", "before the first save", "resumes", "half checkpoints",
    "differences", "minutes",
)  # fmt: skip


@dataclass(frozen=True)
class Kill:
    """What one kill met: whether a save was under way, the newest checkpoint (0 = none), and what it cost."""

    in_save: bool
    checkpoint: int
    half: list[str]
    resumes: int
    differences: list[str]


def command(model: Path, metadata: Path, output_dir: Path, *, workers: int, precision: str, steps: int) -> list[str]:
    """Returns the flags of the runs that are killed: a save every few steps, the oldest ones pruned."""
    return runs.wan_plain(
        model, metadata, output_dir, dataloader_num_workers=workers, mixed_precision=precision, max_train_steps=steps,
        checkpointing_steps=EVERY, checkpoints_total_limit=2,
    )  # fmt: skip


def saves_under_way(output_dir: Path, step: int | None = None) -> list[Path]:
    """Returns the temporary folders of saves, of one step's or of any."""
    return list(output_dir.glob(f".tmp-checkpoint-{step or '*'}-*"))


def kill(
    server: forkserver.ForkServer,
    argv: Callable[[Path], list[str]],
    output_dir: Path,
    *,
    moment: float = 0.0,
    save: int | None = None,
) -> None:
    """Starts a trainer and ends it and its workers by SIGKILL.

    Args:
        argv: flags for an output_dir.
        moment: seconds after the start, or after the beginning of a save.
        save: the step of that save; None = of the run.
    """
    trainer = server.start(argv(output_dir), output_dir.with_suffix(".log"))
    if save is not None:
        trainer.until(lambda: saves_under_way(output_dir, save))
    time.sleep(moment)
    trainer.kill()
    trainer.wait()


def kill_and_resume(
    server: forkserver.ForkServer,
    argv: Callable[[Path], list[str]],
    output_dir: Path,
    unbroken: Path,
    steps: int,
    **when: float | int | None,
) -> Kill:
    """Kills a run at the given moment, resumes it until it has finished, and compares it with the unbroken one."""
    kill(server, argv, output_dir, **when)
    in_save = bool(saves_under_way(output_dir))
    newest, half = latest(output_dir, hashes=True)
    step = int(newest.name.removeprefix("checkpoint-")) if newest else 0
    again = server.run([*argv(output_dir), "--resume_from_checkpoint", "latest"], output_dir.with_suffix(".log"))
    said = [] if again.code == 0 else [f"resume ended with {again.code}: {again.said()[-2000:]}"]
    said += forkserver.differences(output_dir, unbroken, steps) if not said else []
    said += [f"{path.name} is left" for path in saves_under_way(output_dir)]
    said += [] if len(find_checkpoints(output_dir)) == 2 else ["not the two newest checkpoints are kept"]
    return Kill(in_save, step, half, resumes=1, differences=said)


def kill_many(
    server: forkserver.ForkServer,
    argv: Callable[[Path], list[str]],
    folder: Path,
    *,
    steps: int,
    kills: int,
    in_saves: int,
    seed: int,
) -> list[Kill]:
    """Kills `kills` runs, at least `in_saves` of them inside a save, the others at any moment of a run's wall time."""
    draw = random.Random(seed)
    unbroken = folder / "unbroken"
    whole = server.run(argv(unbroken), folder / "unbroken.log")
    assert whole.code == 0, whole.said()[-4000:]
    met = []
    for number in range(kills):
        if number >= in_saves:
            when = {"moment": draw.uniform(0, whole.seconds)}
            met.append(kill_and_resume(server, argv, folder / f"kill-{number}", unbroken, steps, **when))
            continue
        for attempt in range(ATTEMPTS):
            when = {"save": draw.randrange(EVERY, steps + 1, EVERY), "moment": draw.uniform(0, LONGEST_SAVE)}
            found = kill_and_resume(server, argv, folder / f"kill-{number}-{attempt}", unbroken, steps, **when)
            if found.in_save or found.half or found.differences:
                break
        met.append(found)
    return met


def row(workers: int, precision: str, met: Sequence[Kill], seconds: float) -> tuple[object, ...]:
    """Returns one line of the table."""
    return (
        workers,
        {"no": "float32"}.get(precision, precision),
        len(met),
        sum(k.in_save for k in met),
        sum(k.checkpoint == 0 for k in met),
        sum(k.resumes for k in met),
        sum(len(k.half) for k in met),
        sum(bool(k.differences) for k in met),
        f"{seconds / 60:.1f}",
    )


def processor() -> str:
    """Returns the processor's name as the kernel tells it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def page(lines: Sequence[Sequence[object]], kills: int) -> str:
    """Returns the report as Markdown."""
    table = [HEADER, ["---"] * len(HEADER), *lines]
    return "\n".join(
        [
            "# Runs that were killed and resumed",
            "",
            f"`python benchmarks/stops.py --kills {kills}`: runs of {STEPS} steps with a checkpoint every {EVERY} and the",
            "newest two kept, each ended by SIGKILL (with its data workers) at a moment drawn from its whole wall time, or",
            "from a save, then resumed by `--resume_from_checkpoint latest` and compared byte by byte with an unbroken run:",
            "losses, learning rates, gradient norms and rows of all steps, weights, optimizer and exported model.",
            "",
            *("| " + " | ".join(map(str, line)) + " |" for line in table),
            "",
            "Half checkpoints: folders with a checkpoint's name that do not verify after the kill, every hash compared.",
            "Differences: runs that are not equal to the last bit, that miss or repeat a step, or that leave something behind.",
            "",
            f"{os.cpu_count()}-core {processor()}, CPU only; torch {torch.__version__.split('+')[0]},"
            f" Python {platform.python_version()}; the small Wan2.1 of tests/tiny.py.",
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=KILLS, help="for each of the four configurations")
    parser.add_argument("--output", type=Path, help="Markdown file to write (none = print only)")
    args = parser.parse_args()
    lines, wrong = [], []
    with tempfile.TemporaryDirectory(prefix="videox-stops-") as name:
        folder = Path(name)
        model, metadata = tiny.build_wan_t2v(folder / "model"), tiny.make_dataset(folder / "data", copies=2)
        for number, (workers, precision) in enumerate(CONFIGURATIONS):
            place = folder / f"workers-{workers}-{precision}"
            place.mkdir()

            def argv(output_dir: Path, workers: int = workers, precision: str = precision) -> list[str]:
                return command(model, metadata, output_dir, workers=workers, precision=precision, steps=STEPS)

            began = time.monotonic()
            met = kill_many(
                forkserver.shared(), argv, place, steps=STEPS, kills=args.kills,
                in_saves=min(IN_SAVES, args.kills), seed=number,
            )  # fmt: skip
            lines.append(row(workers, precision, met, time.monotonic() - began))
            wrong += [line for k in met for line in (*k.half, *k.differences)]
            print(*lines[-1], sep="\t", flush=True)
    print("\n".join(wrong), file=sys.stderr)
    text = page(lines, args.kills)
    print(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
