"""Kills runs at random moments, resumes them, and compares them with an uninterrupted run.

    python benchmarks/stops.py [--kills N] [--output benchmarks/stops.md]

Each kill is a separate run: SIGKILL ends the trainer and its data workers at a random moment, the same command with
--resume_from_checkpoint latest finishes the run, and metrics, last checkpoint and exported weights are compared with
those of an uninterrupted run, byte by byte. Some of the kills wait until a save begins; a save was really interrupted
if its temporary folder remains.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/support"))

import forkserver
import runs
import tiny
from machine import machine_line

from videox.run.checkpoint import find_checkpoints, latest_checkpoint, verify

STEPS, EVERY, KILLS, IN_SAVES = 60, 5, 20, 7
CONFIGURATIONS = tuple((workers, precision) for precision in ("no", "bf16") for workers in (0, 2))
LONGEST_SAVE = 0.02  # seconds after the begin of a save within which a kill comes that waits for one
HEADER = (
    "data workers", "precision", "kills", "inside a save", "before the first save", "resumes", "half checkpoints",
    "differences", "minutes",
)  # fmt: skip


@dataclass(frozen=True)
class Kill:
    """One kill: whether it interrupted a save, the newest checkpoint (0 = none), and the results of the resume."""

    in_save: bool
    checkpoint: int
    half: list[str]
    resumes: int
    differences: list[str]


def command(model: Path, metadata: Path, output_dir: Path, *, workers: int, precision: str, steps: int) -> list[str]:
    """Return the flags of the runs that are killed: a save every few steps, old checkpoints pruned."""
    return runs.wan_flags(
        model, metadata, output_dir, dataloader_num_workers=workers, mixed_precision=precision, max_train_steps=steps,
        checkpointing_steps=EVERY, checkpoints_total_limit=2,
    )  # fmt: skip


def saves_under_way(output_dir: Path, first: int = 0) -> list[Path]:
    """Return the temporary folders of unfinished saves of step `first` or later."""
    found = output_dir.glob(".tmp-checkpoint-*-*")
    return [path for path in found if int(path.name.split("-")[2]) >= first]


def kill_at(server: forkserver.ForkServer, argv: Callable[[Path], list[str]], output_dir: Path, moment: float) -> None:
    """Start a trainer, and end it and its data workers by SIGKILL `moment` seconds later."""
    trainer = server.start(argv(output_dir), output_dir.with_suffix(".log"))
    time.sleep(moment)
    trainer.kill()
    trainer.wait()


def kill_in_save(
    server: forkserver.ForkServer,
    argv: Callable[[Path], list[str]],
    output_dir: Path,
    first: int,
    draw: random.Random,
) -> bool:
    """Start a trainer and kill it during the save of step `first` or of a later one.

    SIGSTOP pauses the trainer shortly after a save has begun. If the save has finished by then, the trainer continues
    to the next one. Returns False if no save was interrupted and the run has ended by itself.
    """
    trainer = server.start(argv(output_dir), output_dir.with_suffix(".log"))
    while trainer.wait_until(lambda: saves_under_way(output_dir, first)):
        time.sleep(draw.uniform(0, LONGEST_SAVE))
        trainer.signal(signal.SIGSTOP)
        if saves_under_way(output_dir):
            trainer.kill()
            break
        trainer.signal(signal.SIGCONT)
    return trainer.wait() == -signal.SIGKILL


def resume(
    server: forkserver.ForkServer, argv: Callable[[Path], list[str]], output_dir: Path, uninterrupted: Path, steps: int
) -> Kill:
    """Check the folder that a kill left, resume the run to its end, and compare it with the uninterrupted run."""
    in_save = bool(saves_under_way(output_dir))
    newest, half = latest_checkpoint(output_dir, partial(verify, hashes=True))
    step = int(newest.name.removeprefix("checkpoint-")) if newest else 0
    again = server.run([*argv(output_dir), "--resume_from_checkpoint", "latest"], output_dir.with_suffix(".log"))
    problems = [] if again.code == 0 else [f"resume ended with {again.code}: {again.output()[-2000:]}"]
    problems += forkserver.differences(output_dir, uninterrupted, steps) if not problems else []
    problems += [f"{path.name} is left" for path in saves_under_way(output_dir)]
    problems += [] if len(find_checkpoints(output_dir)) == 2 else ["not exactly two checkpoints are kept"]
    return Kill(in_save, step, half, resumes=1, differences=problems)


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
    """Kill `kills` runs, `in_saves` of them during a save, the others at a random moment of a run's wall time."""
    draw = random.Random(seed)
    uninterrupted = folder / "uninterrupted"
    whole = server.run(argv(uninterrupted), folder / "uninterrupted.log")
    assert whole.code == 0, whole.output()[-4000:]
    met = []
    for number in range(kills):
        output_dir = folder / f"kill-{number}"
        if number < in_saves:
            while not kill_in_save(server, argv, output_dir, draw.randrange(EVERY, steps, EVERY), draw):
                shutil.rmtree(output_dir)
        else:
            kill_at(server, argv, output_dir, draw.uniform(0, whole.seconds))
        met.append(resume(server, argv, output_dir, uninterrupted, steps))
    return met


def row(workers: int, precision: str, met: Sequence[Kill], seconds: float) -> tuple[object, ...]:
    """Return one row of the table."""
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


def page(lines: Sequence[Sequence[object]], kills: int) -> str:
    """Return the report as Markdown."""
    table = [HEADER, ["---"] * len(HEADER), *lines]
    return "\n".join(
        [
            "# Runs that were killed and resumed",
            "",
            f"Measured by `python benchmarks/stops.py --kills {kills}`. Runs of {STEPS} steps save a checkpoint every {EVERY} steps and keep the",
            "newest two. Each is ended by SIGKILL (with its data workers) at a random moment of its wall time or during a save,",
            "resumed by `--resume_from_checkpoint latest`, and compared byte by byte with an uninterrupted run: losses, learning",
            "rates, gradient norms and rows of all steps, weights, optimizer and exported model.",
            "",
            *("| " + " | ".join(map(str, line)) + " |" for line in table),
            "",
            "- Half checkpoints: folders named like a checkpoint in which some file does not match its hash after the kill.",
            "- Differences: runs that are not bit-identical, miss or repeat a step, or leave temporary files.",
            "",
            f"{machine_line('torch')}; the small Wan2.1 of tests/tiny.py.",
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=KILLS, help="kills for each of the four configurations")
    parser.add_argument("--output", type=Path, help="Markdown file to write (default: print only)")
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
