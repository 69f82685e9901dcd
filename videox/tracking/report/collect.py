"""Reads what a run has written so far into its output_dir. What is missing or damaged is left out, and said so."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from videox.run.branch import BEFORE, METRICS, VALIDATION
from videox.run.checkpoint import checkpoint_folders, step_in_name
from videox.run.folder import best_exports
from videox.run.status import Status, read_status

DATA_REPORT = "data_report.json"
LISTED = 2000  # lines of a list (refused rows, unreadable samples) that are read and shown; all are counted
_CLIP = re.compile(r"step-(\d+)-prompt-(\d+)\.(mp4|png)")
_NO_NUMBERS = ("step", "rows", "buckets", "non_finite", "skipped")  # keys of a step that are not curves
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Listing:
    """A list of records: at most LISTED of them, and how many there are."""

    records: Sequence[Record] = ()
    total: int = 0


@dataclass(frozen=True)
class Metrics:
    """metrics.jsonl in columns.

    Attributes:
        steps: float64 [n].
        columns: float64 [n] by name, NaN where a step has no value.
        not_finite: steps whose loss or gradient was not finite; they did not change the weights.
        skipped: steps with finite numbers that did not change the weights either.
        trained: number of times that each row was in a step.
    """

    steps: np.ndarray = field(default_factory=lambda: np.zeros(0))
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    not_finite: Sequence[int] = ()
    skipped: Sequence[int] = ()
    trained: Mapping[int, int] = field(default_factory=dict)

    def column(self, name: str) -> np.ndarray:
        """Return a column; NaN everywhere if no step has it."""
        return self.columns.get(name, np.full(len(self.steps), np.nan))


@dataclass(frozen=True)
class SampleFile:
    """A sample clip: its step, the number of its prompt, its file, and what is known of the prompt."""

    step: int
    number: int
    path: Path
    prompt: str
    image: str | None
    settings: str


@dataclass(frozen=True)
class RunFiles:
    """What a run has written.

    Attributes:
        folder: its output_dir.
        status: None without run_status.json.
        asked: the flags, of args.json.
        resolved: what followed from them.
        metrics: of each step.
        validation: the lines of validation.jsonl.
        data: the content of data_report.json.
        refused: rows that are not trained.
        bad: samples that could not be read during training.
        events: the lines of events.jsonl.
        samples: sample clips, by step and prompt.
        checkpoints: their steps.
        best: steps of the weights that --keep_best exported.
        problems: a sentence for each file that could not be read.
    """

    folder: Path
    status: Status | None
    asked: Record
    resolved: Record
    metrics: Metrics
    validation: Sequence[Record]
    data: Record
    refused: Listing
    bad: Listing
    events: Sequence[Record]
    samples: Sequence[SampleFile]
    checkpoints: Sequence[int]
    best: Sequence[int]
    problems: Sequence[str]


def read_run(folder: Path) -> RunFiles:
    """Return what a run has written into its output_dir so far; no file is necessary, and none is changed."""
    problems: list[str] = []
    flags = _read_object(folder / "args.json", problems)
    asked, resolved = (mapping(flags.get(key)) for key in ("asked", "resolved"))
    return RunFiles(
        folder=folder,
        status=read_status(folder),
        asked=asked,
        resolved=resolved,
        metrics=read_metrics(folder / METRICS, problems),
        validation=list(_with_before(folder / VALIDATION, problems)),
        data=_read_object(folder / DATA_REPORT, problems),
        refused=_read_listing(folder / "refused_rows.jsonl", problems),
        bad=_read_listing(folder / "bad_samples.jsonl", problems),
        events=list(_lines(folder / "events.jsonl", problems)),
        samples=read_samples(folder, asked, problems),
        checkpoints=sorted(step_in_name(path) for path in checkpoint_folders(folder)) if folder.is_dir() else (),
        best=sorted(best_exports(folder)),
        problems=problems,
    )


def mapping(value: object) -> Record:
    """Return a value of a record as a mapping; an empty one if it is none."""
    return value if isinstance(value, dict) else {}


def _read_object(path: Path, problems: list[str]) -> Record:
    try:
        return mapping(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as why:
        problems.append(f"{path.name} cannot be read: {why}")
        return {}


def _lines(path: Path, problems: list[str]) -> Iterator[Record]:
    """Yield the records of a JSON Lines file; a line that is not one is left out, and the first one is a problem.

    A last line without a line break is being written, or was cut off by a kill: it is left out as well.
    """
    try:
        with path.open("rb") as file:
            broken = 0
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    return
                try:
                    record = json.loads(line)
                except ValueError:
                    record = None
                if isinstance(record, dict):
                    yield record
                elif not broken:
                    broken = number
                    problems.append(f"{path.name}: line {number} is not a JSON object; such lines are left out")
    except FileNotFoundError:
        return
    except OSError as why:
        problems.append(f"{path.name} cannot be read: {why}")


def _with_before(path: Path, problems: list[str]) -> Iterator[Record]:
    """Yield the records of a file, after those of the run in another folder that this one continues."""
    yield from _lines(path.parent / BEFORE / path.name, problems)
    yield from _lines(path, problems)


def _read_listing(path: Path, problems: list[str]) -> Listing:
    records: list[Record] = []
    total = 0
    for record in _lines(path, problems):
        total += 1
        if len(records) < LISTED:
            records.append(record)
    return Listing(records, total)


def finite(value: object) -> float:
    """Return a value of a record as a float; NaN if it is none."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value) if abs(value) < 1e300 else math.nan
    return math.nan


def whole(value: object, default: int = 0) -> int:
    """Return a value of a record as an int; the default if it is none."""
    number = finite(value)
    return default if math.isnan(number) else int(number)


def read_metrics(path: Path, problems: list[str]) -> Metrics:
    """Return metrics.jsonl in columns, with what came before a branch; steps that do not increase are left out."""
    steps: list[float] = []
    columns: dict[str, list[float]] = {}
    not_finite: list[int] = []
    skipped: list[int] = []
    trained: Counter[int] = Counter()
    for record in _with_before(path, problems):
        step = finite(record.get("step"))
        if math.isnan(step) or (steps and step <= steps[-1]):
            continue
        for name, value in record.items():
            if name in _NO_NUMBERS or isinstance(value, (list, dict, str, bool)):
                continue
            column = columns.setdefault(name, [])
            column.extend([math.nan] * (len(steps) - len(column)))
            column.append(finite(value))
        steps.append(step)
        if record.get("non_finite"):
            not_finite.append(int(step))
        if record.get("skipped"):
            skipped.append(int(step))
        if isinstance(rows := record.get("rows"), list):
            trained.update(row for row in rows if isinstance(row, int))
    arrays = {}
    for name, column in columns.items():
        arrays[name] = np.array([*column, *[math.nan] * (len(steps) - len(column))], np.float64)
    return Metrics(np.array(steps, np.float64), arrays, not_finite, skipped, trained)


def read_samples(folder: Path, asked: Record, problems: list[str]) -> list[SampleFile]:
    """Return the sample clips by step and prompt: those of samples.jsonl, or of the file names without that file."""
    found = []
    records = list(_lines(folder / "samples.jsonl", problems))
    for record in records:
        name = str(record.get("file", ""))
        path = folder / name
        if path.suffix in (".mp4", ".png") and ".." not in Path(name).parts and path.is_file():
            found.append(_of_record(record, path))
    if not records:
        prompts, images = (_strings(asked.get(name)) for name in ("validation_prompts", "validation_paths"))
        for path in sorted((folder / "samples").glob("step-*-prompt-*")):
            if match := _CLIP.fullmatch(path.name):
                number = int(match[2])
                prompt, image = (part[number] if number < len(part) else None for part in (prompts, images))
                found.append(SampleFile(int(match[1]), number, path, prompt or f"prompt {number}", image, ""))
    # a run that went back to an earlier step samples again: the last record of a step and prompt is the valid one
    last = {(sample.step, sample.number): sample for sample in found}
    return [last[key] for key in sorted(last)]


def _strings(value: object) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else []


def _of_record(record: Record, path: Path) -> SampleFile:
    named = ("frames", "height", "width", "fps", "steps", "seed", "guidance_scale", "negative_prompt")
    settings = ", ".join(f"{name} {record[name]}" for name in named if record.get(name) not in (None, ""))
    image = record.get("image")
    step, number = whole(record.get("step")), whole(record.get("number"))
    prompt = str(record.get("prompt") or f"prompt {number}")
    return SampleFile(step, number, path, prompt, str(image) if image else None, settings)
