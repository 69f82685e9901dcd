"""The curves before a branch: a run that resumes from the checkpoint of another folder shows what came before it."""

from __future__ import annotations

import json
from pathlib import Path

from videox.files import atomic_write

BEFORE = "before"  # folder in output_dir
METRICS, VALIDATION = CURVES = ("metrics.jsonl", "validation.jsonl")


def copy_curves(checkpoint: Path, output_dir: Path, step: int, run: str) -> None:
    """Copy the records up to a step from the folder of a checkpoint into `before` of another folder.

    They are for the curves alone: the records of the new folder begin with its own first step. Nothing is copied
    within a folder, into one that has records of its own, or from one that is not of the same run.

    Args:
        checkpoint: that the run resumes from.
        output_dir: of the run.
        step: of the checkpoint.
        run: name of the run.

    Raises:
        OSError: a file cannot be read or written.
    """
    origin = checkpoint.resolve().parent
    if origin == output_dir.resolve() or (output_dir / METRICS).exists() or _run_in(origin) != run:
        return
    for name in CURVES:
        lines = [line for line in earlier_lines(origin / name) if _step_of(line) <= step]
        if lines:
            (output_dir / BEFORE).mkdir(exist_ok=True)
            with atomic_write(output_dir / BEFORE / name) as temporary:
                temporary.write_bytes(b"".join(lines))


def earlier_lines(path: Path) -> list[bytes]:
    """Return the complete lines of a record file, after those that came before its folder. Raises OSError."""
    found: list[bytes] = []
    for file in (path.parent / BEFORE / path.name, path):
        if file.is_file():
            found += [line for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    return found


def _run_in(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / "args.json").read_text(encoding="utf-8"))["resolved"]["run"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # no run: a checkpoint that was copied alone


def _step_of(line: bytes) -> float:
    """Return the step of a line; infinity for one that is damaged."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
