"""Serves whoever starts a run: what the data is, what the plan makes of it, how it differs from the original."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from videox.data.index.index import Index, index_summary
from videox.data.plan.balance import balance_and_variance_ratio
from videox.data.plan.buckets import Fate, crop_share
from videox.data.plan.epoch import EpochPlan
from videox.data.plan.settings import PlanColumns, PlanSettings
from videox.distributed.backends import Backend
from videox.shapes import token_count

MUCH_CUT = 0.12  # of a sample's area; rows that lose more are named
UNFIT = {
    Fate.TOO_SHORT: "too few frames for a sample at this stride or rate; --explain with this row says how many",
    Fate.TOO_SMALL: "a side is below 16 pixels",
}
DIFFERENCES = (
    "frame 0 is trained like every other latent frame (HunyuanVideo image-to-video: all but the one that is given)",
    "what trains is float32, but for optimizers named _bf16; computation alone is bf16, where that is asked for",
    "timesteps are stratified over the global batch, not nailed to processes",
    "max_grad_norm clips from the first step",
    "in buckets each clip keeps its own aspect ratio; each row is seen once per epoch unless told otherwise",
)


def start_facts(accelerator: Accelerator, backend: Backend, *, task: str, output_dir: Path) -> dict[str, object]:
    """Returns what a person should see first: what runs, on what, and where it writes."""
    return {
        "backend": f"{backend.name} ({backend.description})",
        "processes": accelerator.num_processes,
        "task": task,
        "device": accelerator.device,
        "precision": {"bf16": "bf16 computation"}.get(accelerator.mixed_precision, "float32 throughout"),
        "output_dir": output_dir,
    }


def start_lines(facts: Mapping[str, object]) -> list[str]:
    """Returns the first lines of a run, one per fact, aligned, then what differs from the original trainer."""
    width = max(map(len, facts))
    return [
        *(f"{name:<{width}}  {value}" for name, value in facts.items()),
        "differs from the original trainer (loss curves are not comparable):",
        *(f"  - {line}" for line in DIFFERENCES),
    ]


def data_lines(index: Index, columns: PlanColumns, plan: EpochPlan, most: int = 20) -> list[str]:
    """Returns the ledger of the rows, what is cut of them, and the table of buckets with their share of tokens."""
    return [*ledger_lines(index, columns, plan), *bucket_lines(plan, most)]


def ledger_lines(index: Index, columns: PlanColumns, plan: EpochPlan) -> list[str]:
    """Returns what the data is, what becomes of its rows, and what is cut of them."""
    fates = {name: count for name, count in plan.fate_counts().items() if count}
    lines = [
        *index_summary(index),
        f"rows: {len(index)} = " + " + ".join(f"{count} {name}" for name, count in fates.items()),
    ]
    return [*lines, *still_lines(columns, plan), *cut_lines(index, columns, plan)]


def still_lines(columns: PlanColumns, plan: EpochPlan, most: int = 5) -> list[str]:
    """Returns a line on the videos of which a single frame is all that is trained, if there are any."""
    frames = np.array([bucket.frames for bucket in plan.buckets])[plan.micro_bucket]
    rows = plan.row[np.repeat(frames, np.diff(plan.micro_first)) == 1]
    stills = np.unique(rows[columns.kind[rows] == 1])
    if not len(stills):
        return []
    named = ", ".join(map(str, stills[:most])) + (", ..." if len(stills) > most else "")
    return [f"{len(stills)} videos are trained as one frame, too short for more at this stride or rate: rows {named}"]


def cut_lines(index: Index, columns: PlanColumns, plan: EpochPlan, most: int = 5) -> list[str]:
    """Returns what share of the samples' areas sticks out of their buckets, and the rows that lose the most."""
    bucket = np.repeat(plan.micro_bucket, np.diff(plan.micro_first))
    heights, widths = (np.array([getattr(b, side) for b in plan.buckets])[bucket] for side in ("height", "width"))
    cut = crop_share(columns.height[plan.row], columns.width[plan.row], heights, widths)
    lines = [
        f"cut at the borders: median {np.median(cut):.1%}, p95 {np.quantile(cut, 0.95):.1%}, most {cut.max():.1%}"
    ]
    rows, of_row = np.unique(plan.row, return_inverse=True)
    lost = np.zeros(len(rows))
    np.maximum.at(lost, of_row, cut)  # a row with several clips is named once, by the one that loses the most
    losers = np.flatnonzero(lost > MUCH_CUT)
    worst = losers[np.argsort(-lost[losers], kind="stable")][:most]
    lines += [f"  row {rows[i]} loses {lost[i]:.0%}: {index.file_path[int(rows[i])].as_py()!r}" for i in worst]
    if len(losers) > most:
        lines.append(f"  and {len(losers) - most} more lose over {MUCH_CUT:.0%}")
    return lines


def balance_line(plan: EpochPlan, settings: PlanSettings, processes: int) -> str:
    """Returns how evenly the ranks are loaded, and how much more steps differ than random ones would."""
    balance, mix = balance_and_variance_ratio(plan, settings, processes)
    where = {"step": "optimizer step", "micro": "micro-batch"}[settings.barrier]
    return (
        f"balance {balance:.3f} on {processes} processes that meet in every {where} (1 = nobody waits), mix {mix:.2f} "
        f"(1 = steps differ as random ones do), --balance {settings.balance}"
    )


def lost_lines(index: Index, then: PlanColumns, now: PlanColumns) -> list[str]:
    """Returns a line on the rows that a resumed run could read once and cannot any more, if there are any."""
    lost = np.flatnonzero(then.usable & ~now.usable)
    named = ", ".join(f"{row} ({index.file_path[int(row)].as_py()!r})" for row in lost[:5])
    return [f"{len(lost)} rows cannot be read any more and will count nothing: {named}"] if len(lost) else []


def refused_rows(index: Index, plan: EpochPlan) -> list[dict[str, object]]:
    """Returns row, path, class and detail of every row that cannot be trained."""
    problems = {row: (kind, detail) for row, _, kind, detail in index.problems()}
    rows = np.flatnonzero(~np.isin(plan.fates, (Fate.TRAINED, Fate.HELD_OUT, Fate.NOT_DRAWN))).tolist()
    refused = []
    for row in rows:
        fate = Fate(int(plan.fates[row]))
        kind, detail = problems.get(row, (fate.name.lower(), UNFIT.get(fate, "")))
        refused.append({"row": row, "path": index.file_path[row].as_py(), "class": kind, "detail": detail})
    return refused


def changed_flags(output_dir: Path, now: Mapping[str, object]) -> list[str]:
    """Returns a line for each flag that a resumed run gets otherwise than the run here had it last."""
    try:
        before = json.loads((output_dir / "args.json").read_text(encoding="utf-8"))["asked"]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # a new folder
    own = {"resume_from_checkpoint", "output_dir", "verify"}
    plain = json.loads(json.dumps(dict(now)))
    names = [name for name in plain if name not in own and name in before and before[name] != plain[name]]
    return [f"--{name} was {before[name]}, is {plain[name]} from here on" for name in names]


def bucket_lines(plan: EpochPlan, most: int = 20) -> list[str]:
    """Returns the table of this epoch's buckets, dearest first."""
    table = plan.bucket_table()
    total = sum(token_count(bucket) * samples for bucket, samples, _ in table)
    lines = [f"epoch {plan.epoch}: {plan.n_steps} steps of {plan.slots} slots, {len(table)} buckets, {total:,} tokens"]
    lines.append(f"  {'frames x height x width':>24} {'tokens':>8} {'samples':>8} {'batches':>8} {'of tokens':>9}")
    rows: Sequence[tuple[str, int, int, int]] = [
        (f"{b.frames} x {b.height} x {b.width}", token_count(b), samples, batches) for b, samples, batches in table
    ]
    if len(rows) > most:
        rest = table[most - 1 :]
        tokens = sum(token_count(bucket) * samples for bucket, samples, _ in rest)
        samples, batches = sum(line[1] for line in rest), sum(line[2] for line in rest)
        rows = [*rows[: most - 1], (f"{len(rest)} smaller ones", tokens // max(samples, 1), samples, batches)]
    for name, tokens, samples, batches in rows:
        lines.append(f"  {name:>24} {tokens:>8,} {samples:>8,} {batches:>8,} {tokens * samples / total:>9.1%}")
    return lines


def typical_fps(index: Index) -> float:
    """Returns the median frames per second of the videos whose files tell it, 16 (Wan's own) where none does."""
    rates = index.fps[index.usable & (index.kind == 1) & (index.fps > 0)]
    return float(np.median(rates)) if len(rates) else 16.0
