"""Report of a dry run: what the data becomes, what a step costs and what it needs, for planning GPUs before a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from videox.data.plan.balance import PlanBalance
from videox.data.plan.balancing import MAX_VARIANCE_RATIO
from videox.data.plan.buckets import Fate, SizePolicy, crop_share, frames_at_pace, pace_of
from videox.data.plan.epoch import PADDING, EpochPlan
from videox.data.plan.settings import PlanColumns, PlanSettings
from videox.errors import plural
from videox.estimate.advice import AppliedChange, Proposal
from videox.estimate.duration import Duration, format_duration, format_gpu_time, three_digits
from videox.estimate.flops import Network
from videox.estimate.memory import SAFE_SHARE, Memory, MemorySetup, moved_to_host

WORLD_SIZES = (1, 8, 64, 512)  # numbers of processes for which balance and mix are reported
MUCH_PADDING = 0.02  # share of the slots that are padding, from which it is pointed out
GIB = 2**30
EXTRA_FATES = {fate.name.lower() for fate in (Fate.HELD_OUT, Fate.NOT_DRAWN)}
LAUNCHER_NOTE = (
    "`accelerate launch` up to --num_processes N takes the place of `python`; other flags follow the script"
)
CROP_EPSILON = 1e-6  # a cropped share of the area below this is float rounding
WIDTH = 36  # characters of a name in the table of memory
# what the items of Memory, whose names are keys of plan_report.json, are called in the printed report
LABELS = {
    "masters": "fp32 parameters", "optimizer": "optimizer state", "average": "EMA", "communication": "communication buffers",
    "encoding": "encoding (text, VAE)", "loading": "while loading", "resting encoders": "offloaded encoders",
    "workers": "data loader workers",
}  # fmt: skip


@dataclass(frozen=True)
class EpochFlops:
    """FLOPs of an epoch.

    Attributes:
        model: forward and backward passes of all samples.
        recomputed: what activation checkpointing adds.
        per_sample: both together, float64 per bucket of the plan, for one sample.
    """

    model: float
    recomputed: float
    per_sample: np.ndarray


def samples_of(plan: EpochPlan) -> tuple[np.ndarray, np.ndarray]:
    """Return (metadata row, bucket number) of each sample of an epoch, int64."""
    return plan.row, np.repeat(plan.micro_bucket, np.diff(plan.micro_first))


def crop_shares(columns: PlanColumns, plan: EpochPlan) -> np.ndarray:
    """Return the share of its source's area that is cropped from each sample."""
    rows, bucket = samples_of(plan)
    heights, widths = (np.array([getattr(b, side) for b in plan.buckets])[bucket] for side in ("height", "width"))
    return crop_share(columns.height[rows], columns.width[rows], heights, widths)


def attributes(columns: PlanColumns, plan: EpochPlan, policy: SizePolicy) -> dict[str, int]:
    """Return how many trained rows are repeated, clipped (frames left over), cropped or upscaled in this epoch."""
    rows, bucket = samples_of(plan)
    frames, heights, widths = (np.array([b[side] for b in plan.buckets])[bucket] for side in range(3))
    pace = pace_of(policy, None if columns.fps is None else columns.fps[rows])
    clipped = (columns.kind[rows] == 1) & (frames < frames_at_pace(columns.frames[rows].astype(np.int64), pace))
    cropped = crop_shares(columns, plan) > CROP_EPSILON
    upscaled = np.maximum(heights / columns.height[rows], widths / columns.width[rows]) > 1
    counted = {"clipped": clipped, "cropped": cropped, "upscaled": upscaled}
    times = np.unique(rows, return_counts=True)[1]
    return {
        "repeated": int(np.count_nonzero(times > 1)),
        **{name: len(np.unique(rows[mask])) for name, mask in counted.items()},
    }


def reported_fates(plan: EpochPlan) -> dict[str, int]:
    """Return the number of rows of each fate; fates in EXTRA_FATES are left out where their count is 0."""
    counts = plan.fate_counts()
    return {name: count for name, count in counts.items() if count or name not in EXTRA_FATES}


def epoch_flops(plan: EpochPlan, network: Network, recomputed: Callable[[int], float]) -> EpochFlops:
    """Return the FLOPs of an epoch; recomputed: what activation checkpointing adds for a sample, by its tokens."""
    tokens = plan.bucket_tokens()
    counts = np.bincount(samples_of(plan)[1], minlength=len(plan.buckets))
    model = np.array([network.forward_backward(size) for size in tokens])
    again = np.array([recomputed(size) for size in tokens])
    return EpochFlops(float((model * counts).sum()), float((again * counts).sum()), model + again)


def samples_per_step(plan: EpochPlan, settings: PlanSettings) -> int:
    """Return the samples of a full step; where slots are filled by cost, of a step on average."""
    return (
        settings.slots * settings.batch_size if settings.slot_fill == "fixed" else round(len(plan.row) / plan.n_steps)
    )


def plan_report(
    columns: PlanColumns,
    plan: EpochPlan,
    settings: PlanSettings,
    *,
    flops: EpochFlops,
    balanced: Mapping[int, PlanBalance],
    memory: Memory,
    checkpoint: float,
) -> dict[str, Any]:
    """Return the content of plan_report.json."""
    cropped = crop_shares(columns, plan)
    table = plan.bucket_table()
    metric_fields = {"balance": "balance", "balance_unplanned": "unplanned", "mix": "step_variance_ratio"}
    tokens = sum(plan.tokens_of(bucket) * samples for bucket, samples, _ in table)
    return {
        "rows": len(columns),
        "fates": reported_fates(plan),
        "attributes": attributes(columns, plan, settings.policy),
        "cropped": {
            "median": float(np.median(cropped)), "p95": float(np.quantile(cropped, 0.95)), "max": float(cropped.max()),
        },
        "buckets": [{**bucket._asdict(), "rows": n, "tokens": plan.tokens_of(bucket)} for bucket, n, _ in table],
        "global_batch": samples_per_step(plan, settings),
        "steps_per_epoch": plan.n_steps,
        "tokens_per_step": tokens / plan.n_steps,
        "flops_per_step": flops.model / plan.n_steps,
        **{name: {str(world): getattr(balanced[world], field) for world in WORLD_SIZES} for name, field in metric_fields.items()},
        "memory": {
            **{name: int(size) for name, size in memory.items().items()},
            "host": {name: int(size) for name, size in memory.host.items()},
            "checkpoint": int(checkpoint),
        },
    }  # fmt: skip


def plan_records(plan: EpochPlan, world_size: int) -> Iterator[dict[str, int]]:
    """Yield the lines of plan-W.jsonl: each real sample of an epoch, as W processes run it; steps count from 1."""
    for step in range(plan.n_steps):
        for rank in range(world_size):
            for micro, batch in enumerate(plan.micro_batches(step, rank, world_size)):
                for row, start in zip(batch.rows.tolist(), batch.starts.tolist(), strict=True):
                    if row != PADDING:
                        place = {"step": step + 1, "rank": rank, "micro": micro, "row": row}
                        yield {**place, **batch.bucket._asdict(), "clip_start": start}


# -------------------------------------------------------------------------------------------------- printed lines


def target_size_lines(policy: SizePolicy) -> list[str]:
    """Return the target sizes of videos (with the most frames at each) and of images."""
    videos = ", ".join(f"{size} ({policy.max_frames(size)} frames)" for size in policy.video_sizes())
    return [f"videos: {videos}", f"images: {', '.join(map(str, policy.image_sizes()))}"]


def attribute_line(counts: Mapping[str, int]) -> str:
    """Return how many of the trained rows are changed, and how."""
    descriptions = {
        "repeated": "occur more than once",
        "clipped": "are longer than their clip",
        "cropped": "are cropped",
    }
    descriptions["upscaled"] = "are upscaled"
    return "of the trained rows, " + ", ".join(f"{counts[name]:,} {text}" for name, text in descriptions.items())


def tail_line(plan: EpochPlan, settings: PlanSettings) -> str:
    """Return what happens to samples that do not fill a micro-batch, and to micro-batches that do not fill a step."""
    sizes = np.diff(plan.micro_first)
    smaller = np.count_nonzero(sizes < settings.batch_size) if settings.slot_fill == "fixed" else 0
    missing = plan.n_steps * plan.slots - (len(plan.slot_first) - 1)
    parts = []
    if smaller:
        parts.append(f"{smaller} of {len(sizes)} micro-batches are smaller (the last ones of their buckets)")
    if missing:
        parts.append(f"{missing} of the {plan.slots} slots of the last step are padding (weight 0)")
    return (
        "remainders: "
        + ("; ".join(parts) if parts else "none, every micro-batch and step is full")
        + "; no row is dropped"
    )


def time_lines(plan: EpochPlan, seconds: Sequence[float], max_rows: int = 20) -> list[str]:
    """Return the table of buckets: samples, tokens, and their share of the time, most time first.

    Args:
        plan: of the epoch.
        seconds: of all micro-batches of each of the plan's buckets.
        max_rows: lines of the table.
    """
    counts = np.bincount(samples_of(plan)[1], minlength=len(plan.buckets))
    times = np.asarray(seconds, np.float64)
    order = np.argsort(-times, kind="stable")
    tokens = counts * np.array(plan.bucket_tokens())
    lines = [
        f"epoch 0: {len(plan.buckets)} bucket{'s' * (len(plan.buckets) > 1)}, {tokens.sum():,} tokens",
        f"  {'frames x height x width':>24} {'tokens':>8} {'samples':>8} {'token share':>11} {'time share':>10}",
    ]
    listed = order if len(order) <= max_rows else order[: max_rows - 1]
    for number in listed:
        bucket = plan.buckets[number]
        name = f"{bucket.frames} x {bucket.height} x {bucket.width}"
        shares = f"{tokens[number] / tokens.sum():>11.1%} {times[number] / times.sum():>10.1%}"
        lines.append(f"  {name:>24} {plan.tokens_of(bucket):>8,} {counts[number]:>8,} {shares}")
    others = order[len(listed) :]
    if len(others):
        shares = f"{tokens[others].sum() / tokens.sum():>11.1%} {times[others].sum() / times.sum():>10.1%}"
        buckets = f"{len(others)} other {plural(len(others), 'bucket')}"
        lines.append(f"  {buckets:>24} {'':>8} {counts[others].sum():>8,} {shares}")
    return lines


def step_lines(plan: EpochPlan, settings: PlanSettings, flops: EpochFlops) -> list[str]:
    """Return samples, tokens and FLOPs of a step."""
    tokens = sum(plan.tokens_of(bucket) * samples for bucket, samples, _ in plan.bucket_table())
    model_pflop, recomputed_pflop = (size / plan.n_steps / 1e15 for size in (flops.model, flops.recomputed))
    recompute = f" + {recomputed_pflop:,.3g} PFLOP of recomputation" if flops.recomputed else ""
    batch = f"global batch {samples_per_step(plan, settings):,}"
    if settings.slot_fill == "cost":
        batch += f" on average, in {settings.slots:,} slots"
    return [
        f"{batch}, {plan.n_steps:,} {plural(plan.n_steps, 'step')} per epoch",
        f"step: {tokens / plan.n_steps:,.0f} tokens, {model_pflop:,.3g} PFLOP of the model{recompute}, on average",
    ]


def duration_lines(duration: Duration, steps: int, gpus: int, price: float | None, assumed: str) -> list[str]:
    """Return the duration of a step, an epoch and the run, and what is included.

    Args:
        duration: of the run.
        steps: optimizer steps of an epoch.
        gpus: number of GPUs.
        price: of a GPU hour; None: not stated.
        assumed: what else is assumed, in words.
    """
    encoding = format_duration(duration.encoding)
    if duration.cached and duration.variants:
        first = "first epoch" if duration.variants == 1 else f"first {duration.variants} epochs"
        each = "" if duration.variants == 1 else " each"
        included = f"clips and captions are encoded in the {first} ({encoding}{each}), then read from the latent cache"
        epoch = duration.epoch
    else:
        hint = "" if duration.cached else "; --latent_cache with --cache_variants reads it from disk instead"
        included = f"{encoding} of each epoch are encoding of clips and captions{hint}"
        epoch = duration.epoch + duration.encoding
    return [
        f"time ({assumed}):",
        f"  step: {format_duration(epoch / steps)}; epoch: {format_gpu_time(epoch, gpus, price)}",
        f"  run of {round(duration.epochs * steps):,} steps, {three_digits(duration.epochs)} epochs: {format_gpu_time(duration.run(), gpus, price)}",
        f"  {included}; without validation and checkpoints",
    ]


def duration_facts(duration: Duration, steps: int, gpus: int, price: float | None) -> dict[str, str]:
    """Return the duration of a step, an epoch and the run in words, by name, for the picture; as duration_lines."""
    once = bool(duration.cached and duration.variants)
    epoch = duration.epoch + (0 if once else duration.encoding)
    hours = duration.run() * gpus / 3600
    facts = {
        "optimizer step": format_duration(epoch / steps),
        "epoch": f"{format_duration(epoch)}, {steps:,} {plural(steps, 'step')}",
        "encoding": f"{format_duration(duration.encoding)}, {'once' if once else 'in each epoch'}",
        "run": f"{format_duration(duration.run())}, {three_digits(duration.epochs)} epochs",
        "GPU hours": three_digits(hours),
    }
    return facts if price is None else {**facts, "price": f"{hours * price:,.2f} at {price:g} per GPU hour"}


def balance_lines(by_world: Mapping[int, PlanBalance], settings: PlanSettings) -> list[str]:
    """Return the table of balance and mix by number of processes, with the reasons for unusually bad numbers."""
    lines = [f"  {'processes':>9} {'steps':>9} {'balance':>8} {'unplanned':>10} {'mix':>6}"]
    for world, metrics in by_world.items():
        unplanned = "n/a" if metrics.unplanned is None else f"{metrics.unplanned:.3f}"
        lines.append(
            f"  {world:>9} {metrics.steps:>9,} {metrics.balance:>8.3f} {unplanned:>10} {metrics.step_variance_ratio:>6.2f}"
        )
    lines += [
        "  balance: share of GPU time not spent waiting for other ranks; unplanned: the balance without a plan",
        "  mix: variance of the step composition relative to random steps (1 = random)",
    ]
    padded = {world: metrics for world, metrics in by_world.items() if metrics.padded >= MUCH_PADDING}
    if padded:
        shares = ", ".join(f"{metrics.padded:.0%} on {world}" for world, metrics in padded.items())
        lines.append(f"  padding in the last step, share of all slots: {shares} processes; it counts as waiting")
        lines.append(
            "  (without a plan, samples that do not fill a step are left out; n/a: not even one step is full)"
        )
    above = {world: m for world, m in by_world.items() if m.step_variance_ratio > MAX_VARIANCE_RATIO}
    if above and settings.balance == "mixed":
        steps = ", ".join(f"{metrics.steps:,} on {world}" for world, metrics in above.items())
        lines.append(
            f"  mix above {MAX_VARIANCE_RATIO:g}: too few steps ({steps} processes), so that the last one weighs too much"
        )
    return lines


def proposal_lines(proposals: Sequence[Proposal], limit: float, goal: str = "to make it fit") -> list[str]:
    """Return the changes that make a run fit, one per line, with the memory after each.

    Args:
        proposals: of `videox.estimate.advice.propose`.
        limit: bytes of a GPU.
        goal: what the changes are for, in words.
    """
    lines = []
    for number, proposal in enumerate(proposals):
        lines.append(_proposal_title(proposal, goal if number == 0 else ""))
        launcher = any(applied.change.flags.startswith("accelerate launch") for applied in proposal.changes)
        width = max((len(applied.change.flags) for applied in proposal.changes), default=0)
        for applied in proposal.changes:
            change = applied.change
            lines.append(f"    {change.flags:<{width}}  {applied.total / GIB:>7.1f} GiB  {change.effect}")
        if launcher:
            lines.append(f"    {LAUNCHER_NOTE}")
        if proposal.changes:
            lines += _host_lines(proposal.changes[-1])
    if proposals and not any(proposal.fits for proposal in proposals):
        lines.append(
            "    only a clip that is divided over several GPUs (context parallelism) would fit, which this trainer "
            f"does not have: train smaller or shorter samples, or use a GPU with more than {limit / GIB:g} GiB"
        )
    return lines


def _proposal_title(proposal: Proposal, goal: str) -> str:
    if proposal.filled:
        also = ", and these changes:" if proposal.changes else ""
        return (
            "the encoders alone need more; the training fits with a --latent_cache that was filled before on a larger GPU, "
            f"or on the CPU by ACCELERATE_USE_CPU=true and --cache_only{also}"
        )
    if not proposal.fits:
        smallest = "; the smallest found:" if proposal.changes else ", and none needs less memory"
        return f"none of the changes that were tried makes it fit{smallest}"
    together = " (all of them; memory after each)" if len(proposal.changes) > 1 else ""
    return f"{goal}, the cheapest changes first{together}:" if goal else f"or, with more GPUs{together}:"


def _host_lines(last: AppliedChange) -> list[str]:
    host = moved_to_host(last.host)
    return [f"    host memory per machine: {sum(host.values()) / GIB:,.0f} GiB"] if host else []


def memory_lines(memory: Memory, setup: MemorySetup, limit: float, proposals: Sequence[Proposal]) -> list[str]:
    """Return the table of memory and whether it fits.

    Args:
        limit: bytes of a GPU.
        proposals: changed settings that fit with a margin, where these do not.
    """
    states = [(name, size) for name, size in memory.states.items() if size]
    phases = {name: phase for name, phase in memory.phases.items() if sum(phase.values())}
    lines = [
        f"memory per GPU ({setup.backend}, {setup.processes} GPU{'s' * (setup.processes > 1)}), largest micro-batch "
        f"{setup.batch} x {setup.tokens:,} tokens:"
    ]
    lines += [f"  {LABELS.get(name, name):>{WIDTH}} {size / GIB:>8.2f} GiB" for name, size in states]
    lines.append("  plus the largest of these peaks, and the overhead:")
    for phase in phases.values():
        names = " + ".join(LABELS.get(name, name) for name, size in phase.items() if size)
        sizes = " = " + " + ".join(f"{size / GIB:.2f}" for size in phase.values() if size) if "+" in names else ""
        lines.append(f"  {names:>{WIDTH}} {sum(phase.values()) / GIB:>8.2f} GiB{sizes}")
    items = memory.items()
    lines.append(
        f"  {'CUDA context + fragmentation':>{WIDTH}} {(items['context'] + items['fragments']) / GIB:>8.2f} GiB"
    )
    total = memory.total()
    verdict = "fits in" if total <= limit else "does not fit in"
    lines.append(f"  {'total':>{WIDTH}} {total / GIB:>8.2f} GiB: {verdict} {limit / GIB:g} GiB{margin(total, limit)}")
    return [*lines, *(f"  {line}" for line in proposal_lines(proposals, limit))]


def margin(size: float, limit: float) -> str:
    """Return by how much bytes are below or above a limit."""
    spare = f"{(limit - size) / GIB:.1f} GiB to spare"
    if size > limit:
        return f", {(size - limit) / GIB:.1f} GiB too much"
    return f", {spare}" if size <= SAFE_SHARE * limit else f", but only {spare}: too close to be sure"


@dataclass(frozen=True)
class Disk:
    """The checkpoints of a run.

    Attributes:
        checkpoint: bytes of one checkpoint.
        every: optimizer steps from one checkpoint to the next.
        steps: optimizer steps of the whole run.
        keep: number of checkpoints that are kept; None = all.
    """

    checkpoint: float
    every: int
    steps: int
    keep: int | None

    @property
    def written(self) -> int:
        """The number of checkpoints that are written."""
        return -(-self.steps // self.every)

    @property
    def kept(self) -> int:
        """The number of checkpoints that remain at the end."""
        return min(self.written, self.keep) if self.keep else self.written

    def needed(self) -> float:
        """Return the bytes at most: while a checkpoint is written, the oldest one is still there."""
        return (self.kept + (self.kept < self.written)) * self.checkpoint


def disk_fact(disk: Disk) -> str:
    """Return the disk space of the checkpoints of a run in words, for the picture."""
    return f"{size_words(disk.needed())}, {size_words(disk.checkpoint)} each"


def disk_lines(disk: Disk, free: float) -> list[str]:
    """Return the size of a checkpoint and of all checkpoints that a run keeps, and whether they fit on the disk.

    Args:
        disk: the checkpoints.
        free: free bytes of the disk of the output folder.
    """
    kept = ""
    if disk.keep:
        kept = f", the newest {disk.keep} are kept, and one more while it is written: {size_words(disk.needed())}"
    number = f"{disk.written:,} {plural(disk.written, 'checkpoint')} in {disk.steps:,} {plural(disk.steps, 'step')} (one per {disk.every})"
    lines = [f"disk: {size_words(disk.checkpoint)} per checkpoint, {number}{kept}"]
    lines += [f"  {line}" for line in keep_all_lines(disk)]
    if disk.needed() > free:
        fitting = int(free // disk.checkpoint) - 1
        flag = f"--checkpoints_total_limit {fitting}" if fitting > 0 else "an --output_dir on a larger disk"
        lines.append(f"  only {size_words(free)} are free there: use {flag}, or more --checkpointing_steps")
    return lines


def keep_all_lines(disk: Disk) -> list[str]:
    """Return a warning with the disk space of all checkpoints, where a run keeps all of several."""
    if disk.keep or disk.written < 2:
        return []
    size = size_words(disk.kept * disk.checkpoint)
    flag = "--checkpoints_total_limit 2 keeps the newest two"
    return [f"warning: all {disk.written:,} checkpoints of the run are kept, {size} of disk space; {flag}"]


def size_words(size: float) -> str:
    """Return a number of bytes on a disk in words."""
    return f"{size / 1e12:,.2f} TB" if size >= 1e12 else f"{size / 1e9:,.1f} GB"
