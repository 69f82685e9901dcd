"""Serves whoever plans a run: what the data becomes, what a step costs, and what it needs, before a GPU is rented."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from videox.data.plan.balance import PlanBalance
from videox.data.plan.balancing import MAX_VARIANCE_RATIO
from videox.data.plan.buckets import Fate, SizePolicy, crop_share, frames_at_pace, pace_of
from videox.data.plan.epoch import PADDING, EpochPlan
from videox.data.plan.settings import PlanColumns, PlanSettings
from videox.estimate.flops import Network
from videox.estimate.memory import CLOSE, Memory, MemorySetup
from videox.shapes import token_count

WORLDS = (1, 8, 64, 512)  # processes for which balance and mix are told
MUCH_PADDING = 0.02  # share of the slots; a balance that lacks less needs no words
GIB = 2**30
EXTRA_FATES = {fate.name.lower() for fate in (Fate.HELD_OUT, Fate.NOT_DRAWN)}
CUT_NOTHING = 1e-6  # a share of the area below this is rounding


@dataclass(frozen=True)
class Work:
    """Operations of an epoch.

    Attributes:
        model: forward and backward, of all samples.
        recomputed: what recomputation adds.
        by_bucket: both together, for each bucket of the plan, of one sample.
    """

    model: float
    recomputed: float
    by_bucket: np.ndarray


@dataclass(frozen=True)
class Speed:
    """How fast a GPU is taken to be: its peak (operations per second), the share of it that is used, and whence."""

    peak: float
    share: float
    source: str


def samples_of(plan: EpochPlan) -> tuple[np.ndarray, np.ndarray]:
    """Returns (metadata row, bucket number) of each sample of an epoch, int64."""
    return plan.row, np.repeat(plan.micro_bucket, np.diff(plan.micro_first))


def cut_of(columns: PlanColumns, plan: EpochPlan) -> np.ndarray:
    """Returns the share of its source's area that each sample loses."""
    rows, bucket = samples_of(plan)
    heights, widths = (np.array([getattr(b, side) for b in plan.buckets])[bucket] for side in ("height", "width"))
    return crop_share(columns.height[rows], columns.width[rows], heights, widths)


def attributes(columns: PlanColumns, plan: EpochPlan, policy: SizePolicy) -> dict[str, int]:
    """Returns how many trained rows are repeated, clipped (frames left over), cropped or upscaled in this epoch."""
    rows, bucket = samples_of(plan)
    frames, heights, widths = (np.array([b[side] for b in plan.buckets])[bucket] for side in range(3))
    pace = pace_of(policy, None if columns.fps is None else columns.fps[rows])
    clipped = (columns.kind[rows] == 1) & (frames < frames_at_pace(columns.frames[rows].astype(np.int64), pace))
    cropped = cut_of(columns, plan) > CUT_NOTHING
    upscaled = np.maximum(heights / columns.height[rows], widths / columns.width[rows]) > 1
    counted = {"clipped": clipped, "cropped": cropped, "upscaled": upscaled}
    times = np.unique(rows, return_counts=True)[1]
    return {
        "repeated": int(np.count_nonzero(times > 1)),
        **{name: len(np.unique(rows[mask])) for name, mask in counted.items()},
    }


def fates_of(plan: EpochPlan) -> dict[str, int]:
    """Returns how many rows meet each fate; those held out or not drawn are named only where there are some."""
    counts = plan.fate_counts()
    return {name: count for name, count in counts.items() if count or name not in EXTRA_FATES}


def work_of(plan: EpochPlan, network: Network, chosen: Sequence[int]) -> Work:
    """Returns the operations of an epoch; chosen: numbers of the blocks that are recomputed."""
    tokens = np.array([token_count(bucket) for bucket in plan.buckets], np.float64)
    counts = np.bincount(samples_of(plan)[1], minlength=len(plan.buckets))
    model = np.array([network.model(size) for size in tokens])
    more = np.array([network.recomputed(size, chosen) for size in tokens])
    return Work(float((model * counts).sum()), float((more * counts).sum()), model + more)


def samples_per_step(plan: EpochPlan, settings: PlanSettings) -> int:
    """Returns the samples of a full step, or where slots are filled by cost, of a step on average."""
    return (
        settings.slots * settings.batch_size if settings.slot_fill == "fixed" else round(len(plan.row) / plan.n_steps)
    )


def plan_report(
    columns: PlanColumns,
    plan: EpochPlan,
    settings: PlanSettings,
    *,
    work: Work,
    balanced: Mapping[int, PlanBalance],
    memory: Memory,
    checkpoint: float,
) -> dict[str, Any]:
    """Returns the content of plan_report.json."""
    cut = cut_of(columns, plan)
    table = plan.bucket_table()
    told = {"balance": "balance", "balance_unplanned": "unplanned", "mix": "step_variance_ratio"}
    tokens = sum(token_count(bucket) * samples for bucket, samples, _ in table)
    return {
        "rows": len(columns),
        "fates": fates_of(plan),
        "attributes": attributes(columns, plan, settings.policy),
        "cropped": {
            "median": float(np.median(cut)), "p95": float(np.quantile(cut, 0.95)), "max": float(cut.max()),
        },
        "buckets": [{**bucket._asdict(), "rows": n, "tokens": token_count(bucket)} for bucket, n, _ in table],
        "global_batch": samples_per_step(plan, settings),
        "steps_per_epoch": plan.n_steps,
        "tokens_per_step": tokens / plan.n_steps,
        "flops_per_step": work.model / plan.n_steps,
        **{name: {str(world): getattr(balanced[world], field) for world in WORLDS} for name, field in told.items()},
        "memory": {
            **{name: int(size) for name, size in memory.items().items()},
            "host": {name: int(size) for name, size in memory.host.items()},
            "checkpoint": int(checkpoint),
        },
    }  # fmt: skip


def plan_records(plan: EpochPlan, world_size: int) -> Iterator[dict[str, int]]:
    """Yields the lines of plan-W.jsonl: each real sample of an epoch, as W processes run it; steps count from 1."""
    for step in range(plan.n_steps):
        for rank in range(world_size):
            for micro, batch in enumerate(plan.micro_batches(step, rank, world_size)):
                for row, start in zip(batch.rows.tolist(), batch.starts.tolist(), strict=True):
                    if row != PADDING:
                        place = {"step": step + 1, "rank": rank, "micro": micro, "row": row}
                        yield {**place, **batch.bucket._asdict(), "clip_start": start}


# --------------------------------------------------------------------------------------------------------- words


def ladder_lines(policy: SizePolicy) -> list[str]:
    """Returns the target sizes that videos and images may be trained at."""
    videos = ", ".join(f"{size} ({policy.max_frames(size)} frames)" for size in policy.video_sizes())
    return [f"videos: {videos}", f"images: {', '.join(map(str, policy.image_sizes()))}"]


def attribute_line(found: Mapping[str, int]) -> str:
    """Returns how many of the trained rows are changed, and how."""
    words = {"repeated": "occur more than once", "clipped": "are longer than their clip", "cropped": "lose a border"}
    words["upscaled"] = "are enlarged"
    return "of the trained rows " + ", ".join(f"{found[name]:,} {text}" for name, text in words.items())


def tail_line(plan: EpochPlan, settings: PlanSettings) -> str:
    """Returns what becomes of samples that fill no batch, and of batches that fill no step."""
    sizes = np.diff(plan.micro_first)
    smaller = np.count_nonzero(sizes < settings.batch_size) if settings.slot_fill == "fixed" else 0
    missing = plan.n_steps * plan.slots - (len(plan.slot_first) - 1)
    parts = []
    if smaller:
        parts.append(f"{smaller} of {len(sizes)} batches are smaller, since their bucket ends")
    if missing:
        parts.append(f"{missing} of the last step's {plan.slots} slots are padding of weight 0")
    return "tail: " + ("; ".join(parts) if parts else "every batch and every step is full") + "; no row is dropped"


def time_lines(plan: EpochPlan, work: Work, most: int = 20) -> list[str]:
    """Returns the table of buckets: samples, tokens, and the share of the time that they take, dearest first."""
    counts = np.bincount(samples_of(plan)[1], minlength=len(plan.buckets))
    spent = counts * work.by_bucket
    order = np.argsort(-spent, kind="stable")
    tokens = counts * np.array([token_count(bucket) for bucket in plan.buckets])
    lines = [
        f"epoch 0: {len(plan.buckets)} buckets, {tokens.sum():,} tokens",
        f"  {'frames x height x width':>24} {'tokens':>8} {'samples':>8} {'of tokens':>9} {'of time':>8}",
    ]
    shown = order if len(order) <= most else order[: most - 1]
    for number in shown:
        bucket = plan.buckets[number]
        name = f"{bucket.frames} x {bucket.height} x {bucket.width}"
        shares = f"{tokens[number] / tokens.sum():>9.1%} {spent[number] / spent.sum():>8.1%}"
        lines.append(f"  {name:>24} {token_count(bucket):>8,} {counts[number]:>8,} {shares}")
    rest = order[len(shown) :]
    if len(rest):
        shares = f"{tokens[rest].sum() / tokens.sum():>9.1%} {spent[rest].sum() / spent.sum():>8.1%}"
        lines.append(f"  {f'{len(rest)} others':>24} {'':>8} {counts[rest].sum():>8,} {shares}")
    return lines


def step_lines(
    plan: EpochPlan, settings: PlanSettings, work: Work, processes: int, speed: Speed, efficiency: float
) -> list[str]:
    """Returns tokens and operations of a step, and how long an epoch takes.

    Args:
        processes: that share the work.
        efficiency: of the balance at that number of processes.
    """
    tokens = sum(token_count(bucket) * samples for bucket, samples, _ in plan.bucket_table())
    rate = processes * speed.peak * speed.share * efficiency
    hours = work.model / rate / 3600
    more = f" and {work.recomputed / plan.n_steps / 1e15:,.3g} PFLOP of recomputation" if work.recomputed else ""
    batch = f"global batch {samples_per_step(plan, settings):,}"
    if settings.slot_fill == "cost":
        batch += f" on average, in {settings.slots:,} slots"
    return [
        f"{batch}, {plan.n_steps:,} steps per epoch",
        f"a step: {tokens / plan.n_steps:,.0f} tokens, {work.model / plan.n_steps / 1e15:,.3g} PFLOP of model{more}, on average",
        f"an epoch: {hours:,.1f} hours on {processes} GPUs ({speed.source}, balance {efficiency:.2f}), "
        f"{hours * processes:,.0f} GPU hours",
    ]


def balance_lines(found: Mapping[int, PlanBalance], settings: PlanSettings) -> list[str]:
    """Returns the table of balance and mix by the number of processes, and why a number is worse than promised."""
    lines = [f"  {'processes':>9} {'steps':>9} {'balance':>8} {'unplanned':>10} {'mix':>6}"]
    for world, load in found.items():
        without = "n/a" if load.unplanned is None else f"{load.unplanned:.3f}"
        lines.append(
            f"  {world:>9} {load.steps:>9,} {load.balance:>8.3f} {without:>10} {load.step_variance_ratio:>6.2f}"
        )
    lines.append(
        "  (balance: share of the GPUs' time in which none waits for another; mix: 1 as varied as random steps)"
    )
    padded = {world: load for world, load in found.items() if load.padded >= MUCH_PADDING}
    if padded:
        shares = ", ".join(f"{load.padded:.0%} on {world}" for world, load in padded.items())
        lines.append(f"  (share of the slots that are padding of the last step: {shares}; it counts as waiting, while")
        lines.append("  without a plan the samples that fill no step are left out, n/a where they are all samples)")
    above = [
        (world, load)
        for world, load in found.items()
        if load.step_variance_ratio > MAX_VARIANCE_RATIO and settings.balance == "mixed"
    ]
    if above:
        steps = ", ".join(f"{load.steps:,} on {world}" for world, load in above)
        lines.append(
            f"  (too few steps for a mix below {MAX_VARIANCE_RATIO:g}: {steps}; what is left for the last one weighs too much)"
        )
    return lines


def way_words(words: Sequence[str], memory: Memory) -> str:
    """Returns what fits, in words; memory: with these changes."""
    text = f"{' and '.join(words)} ({memory.total() / GIB:.1f} GiB"
    host = sum(memory.host.get(name, 0.0) for name in ("offloaded optimizer", "offloaded weights"))
    if host:
        text += f"; {host / GIB:,.0f} GiB of each host besides, and slower steps"
    return f"{text})"


def memory_lines(memory: Memory, setup: MemorySetup, limit: float, ways: Sequence[str]) -> list[str]:
    """Returns the table of bytes and the verdict.

    Args:
        limit: bytes of a GPU.
        ways: what fits with room to spare, where this does not.
    """
    held = [(name, size) for name, size in memory.states.items() if size]
    phases = {name: phase for name, phase in memory.phases.items() if sum(phase.values())}
    lines = [
        f"memory per GPU, {setup.backend} on {setup.processes}, largest micro-batch {setup.batch} x {setup.tokens:,} tokens:"
    ]
    lines += [f"  {name:>30} {size / GIB:>8.2f} GiB" for name, size in held]
    lines.append("  and the largest of:")
    for phase in phases.values():
        words = " + ".join(name for name, size in phase.items() if size)
        parts = " = " + " + ".join(f"{size / GIB:.2f}" for size in phase.values() if size) if "+" in words else ""
        lines.append(f"  {words:>30} {sum(phase.values()) / GIB:>8.2f} GiB{parts}")
    items = memory.items()
    lines.append(f"  {'context, fragments':>30} {(items['context'] + items['fragments']) / GIB:>8.2f} GiB")
    total = memory.total()
    verdict = "fits" if total <= limit else "does not fit"
    spare = f", with {(limit - total) / GIB:.1f} GiB to spare: too close to be sure"
    close = spare if CLOSE * limit < total <= limit else ""
    lines.append(f"  {'together':>30} {total / GIB:>8.2f} GiB: {verdict} into {limit / GIB:g} GiB{close}")
    if total > CLOSE * limit:
        lines.append(
            f"  {'nearest that surely does':>30} {'; or '.join(ways) or 'none of the settings that were tried'}"
        )
    host = ", ".join(f"{name} {size / GIB:,.1f}" for name, size in memory.host.items() if size)
    return [*lines, f"memory per host of {setup.per_host} processes, GiB: {host}"]


def disk_lines(checkpoint: float, every: int, steps: int, keep: int | None) -> list[str]:
    """Returns the bytes of a checkpoint and of all that a run keeps.

    Args:
        checkpoint: bytes of one.
        every: optimizer steps from one to the next.
        steps: of the whole run.
        keep: how many are kept; None = all.
    """
    count = -(-steps // every)
    kept = min(count, keep) if keep else count
    limit = f"the newest {keep}" if keep else "all of them: --checkpoints_total_limit keeps fewer"
    text = f"disk: a checkpoint of {checkpoint / 1e9:,.1f} GB every {every} steps, {count:,} in {steps:,} steps; kept are {limit}"
    return [f"{text}: {kept * checkpoint / 1e12:,.2f} TB"]
