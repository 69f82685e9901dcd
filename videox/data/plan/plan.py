"""Serves sampler, resume and dry run: the schedule as a pure function of columns, settings, seed and epoch. No torch.

Whatever a sample needs (bucket, clip start, key of its random draws, share of the loss) is known before any file is
opened, and so is which slots run side by side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from videox.data.plan.balancing import SlotCosts, assign_slots
from videox.data.plan.batching import Filling, fill_slots
from videox.data.plan.buckets import (
    Fate,
    assign,
    clip_starts,
    frame_offsets,
    frames_at_pace,
    pace_of,
    planned_starts,
    room_of,
    static_fates,
)
from videox.data.plan.epoch import PADDING, EpochPlan, MicroBatch, check_world_size
from videox.data.plan.settings import BARRIERS, Columns, PlanSettings, sample_cost
from videox.errors import DATA, UserError
from videox.rng import Purpose, hash_key, uniform
from videox.shapes import Bucket, token_count

__all__ = [
    "BARRIERS", "PADDING", "Columns", "EpochPlan", "MicroBatch", "PlanSettings", "check_world_size", "count_steps",
    "draw_epoch", "held_out_plan", "held_out_rows", "plan_epoch", "row_fates", "sample_cost",
]  # fmt: skip


def held_out_rows(columns: Columns, settings: PlanSettings) -> np.ndarray:
    """Returns the rows (int64, ascending) kept for validation: a keyed choice among those that could be trained."""
    fates = _static(columns, settings)
    rows = np.flatnonzero(fates == Fate.TRAINED)
    order = hash_key(settings.seed, Purpose.HELD_OUT, rows)
    return np.sort(rows[np.argsort(order, kind="stable")[: settings.held_out]])


def _static(columns: Columns, settings: PlanSettings) -> np.ndarray:
    shape = columns.kind, columns.height, columns.width, columns.frames
    return static_fates(settings.policy, *shape, columns.usable, columns.fps)


def held_out_plan(columns: Columns, settings: PlanSettings) -> EpochPlan | None:
    """Returns a plan of the held-out rows alone, one sample a step, the same for the whole run; None without any."""
    if not settings.held_out:
        return None
    kept = np.zeros(len(columns), bool)
    kept[held_out_rows(columns, settings)] = True
    alone = replace(
        settings, held_out=0, batch_size=1, slots=1, accumulation=1, slot_fill="fixed", balance="none", video_repeat=1
    )
    return plan_epoch(replace(columns, usable=kept, weight=None), alone, 0)


def row_fates(columns: Columns, settings: PlanSettings, excluded: np.ndarray) -> np.ndarray:
    """Returns a Fate per metadata row (uint8); `excluded` are the rows quarantined while training."""
    fates = _static(columns, settings)
    if settings.held_out:
        fates[held_out_rows(columns, settings)] = Fate.HELD_OUT
    fates[np.asarray(excluded, np.int64)] = Fate.QUARANTINED
    return fates


class Samples(NamedTuple):
    """What an epoch trains, one entry per sample, int64: metadata row, copy of it, which of its `clips` clips."""

    row: np.ndarray
    copy: np.ndarray
    clip: np.ndarray
    clips: np.ndarray


def draw_samples(columns: Columns, settings: PlanSettings, epoch: int, fates: np.ndarray) -> Samples:
    """Returns the samples of an epoch; rows whose weight gives them none this time become NOT_DRAWN in `fates`.

    An image occurs once, a video video_repeat times with each of its clips, all that times the row's weight; the part
    of it that is no whole number is the probability of one more.
    """
    turn = turn_of(settings, epoch)
    rows = np.flatnonzero(fates == Fate.TRAINED)
    video = columns.kind[rows] == 1
    pace = pace_of(settings.policy, None if columns.fps is None else columns.fps[rows])
    whole = frames_at_pace(columns.frames[rows].astype(np.int64), pace) // settings.policy.n_frames
    clips = np.where(video, np.clip(whole, 1, settings.clips_per_video), 1)
    times = np.where(video, max(settings.video_repeat, 1), 1) * clips
    if columns.weight is not None:
        draw = uniform(settings.seed, epoch, rows, Purpose.REPEAT)
        times = np.floor(times * columns.weight[rows].astype(np.float64) + draw).astype(np.int64)
        fates[rows[times == 0]] = Fate.NOT_DRAWN
    copies = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)
    clips = np.repeat(clips, times)
    return Samples(np.repeat(rows, times), copies, (copies + turn) % clips, clips)


def turn_of(settings: PlanSettings, epoch: int) -> int:
    """Returns the epoch whose clips, sizes and crops come again in this one; it itself without cache_variants."""
    return epoch % settings.cache_variants if settings.cache_variants else epoch


def _draw_buckets(
    columns: Columns, settings: PlanSettings, epoch: int, rows: np.ndarray, copies: np.ndarray
) -> tuple[np.ndarray, np.ndarray, tuple[Bucket, ...], np.ndarray]:
    """Returns (variant uint64 [N], bucket number int64 [N], buckets, sample frames int32 [N])."""
    variant = hash_key(settings.seed, turn_of(settings, epoch), rows, copies, Purpose.SAMPLE)
    frames, height, width, _ = assign(
        settings.policy,
        columns.kind[rows],
        columns.height[rows],
        columns.width[rows],
        columns.frames[rows],
        size_draw=uniform(variant, Purpose.SIZE),
        ratio_draw=uniform(variant, Purpose.RATIO),
        frames_draw=uniform(variant, Purpose.FRAMES),
        fps=None if columns.fps is None else columns.fps[rows],
    )
    code = (frames.astype(np.int64) << 40) | (height.astype(np.int64) << 20) | width
    values, number = np.unique(code, return_inverse=True)
    buckets = tuple(Bucket(int(v >> 40), int(v >> 20 & 0xFFFFF), int(v & 0xFFFFF)) for v in values)
    return variant, number, buckets, frames


class Drawn(NamedTuple):
    """An epoch's samples before they are put in order, with what is drawn for each.

    rows, copies, starts int64 [N]; keys, variants uint64 [N]; number int64 [N] into buckets.
    """

    rows: np.ndarray
    copies: np.ndarray
    starts: np.ndarray
    keys: np.ndarray
    variants: np.ndarray
    number: np.ndarray
    buckets: tuple[Bucket, ...]


def draw_epoch(columns: Columns, settings: PlanSettings, epoch: int, fates: np.ndarray) -> Drawn:
    """Returns the samples of an epoch with their buckets, clip starts and keys; `fates` as draw_samples takes it."""
    rows, copies, clip, clips = draw_samples(columns, settings, epoch, fates)
    variants, number, buckets, frames = _draw_buckets(columns, settings, epoch, rows, copies)
    pace = pace_of(settings.policy, None if columns.fps is None else columns.fps[rows])
    if settings.clip_sampling == "random":
        starts = clip_starts(columns.frames[rows], frames, pace, uniform(variants, Purpose.START))
    else:
        room, length = room_of(columns.frames[rows], frames, pace), frame_offsets(frames - 1, pace) + 1
        starts = planned_starts(room, length, clip, clips, settings.clip_sampling)
    keys = hash_key(settings.seed, epoch, rows, copies, Purpose.SAMPLE)
    return Drawn(rows, copies, starts, keys, variants, number, buckets)


def plan_epoch(
    columns: Columns, settings: PlanSettings, epoch: int, excluded: np.ndarray | Sequence[int] = ()
) -> EpochPlan:
    """Returns the epoch's schedule: the same on every process and at every world size.

    Args:
        columns: the index.
        settings: with the seed; two seeds share nothing.
        epoch: from 0.
        excluded: metadata rows that all processes agreed to leave out from this epoch on.

    Raises:
        UserError: nothing is left to train.
    """
    fates = row_fates(columns, settings, np.asarray(excluded, np.int64))
    rows, copies, starts, key, variants, number, buckets = draw_epoch(columns, settings, epoch, fates)
    if not len(rows):
        met = ", ".join(f"{np.count_nonzero(fates == f)} {f.name.lower()}" for f in Fate if np.any(fates == f))
        hint = "look at the rows' problems above, or lower --video_sample_n_frames or --video_sample_stride"
        if np.any(fates == Fate.HELD_OUT):  # they could be trained
            hint = "lower --validation_rows"
        if np.any(fates == Fate.NOT_DRAWN):  # a row that could be trained, and would be at weight 1
            hint = "raise the `weight` of some rows: 1 is once in an epoch"
        raise UserError("--train_data_meta", f"no row of {len(columns)} can be trained ({met})", hint, DATA)

    # shuffle the samples, then bring each bucket's together: a random order within every bucket
    order = np.argsort(hash_key(key, Purpose.ORDER), kind="stable")
    order = order[np.argsort(number[order], kind="stable")]
    counts = np.bincount(number, minlength=len(buckets))
    filling = fill_slots(settings, buckets, counts)
    place = np.empty(filling.slots, np.int64)
    place[slot_order(settings, epoch, buckets, counts, filling)] = np.arange(filling.slots)

    # the dearest micro-batch of a slot first: a step that does not fit in memory fails before it has begun
    cost = sample_cost(settings, buckets)[filling.bucket] * filling.samples
    turn = np.lexsort((filling.first, -cost, place[filling.slot]))
    first, count, bucket, slot = (column[turn] for column in filling)
    samples = order[_ranges(first, count)]
    return EpochPlan(
        epoch=epoch,
        seed=settings.seed,
        slots=settings.slots,
        buckets=buckets,
        row=rows[samples],
        copy=copies[samples],
        start=starts[samples],
        key=key[samples],
        variant=variants[samples],
        micro_first=np.concatenate([[0], np.cumsum(count)]),
        micro_bucket=bucket,
        slot_first=np.concatenate([[0], np.cumsum(np.bincount(place[slot]))]),
        fates=fates,
        least_frames=settings.policy.min_frames,
    )


def slot_order(
    settings: PlanSettings, epoch: int, buckets: tuple[Bucket, ...], counts: np.ndarray, filling: Filling
) -> np.ndarray:
    """Returns the numbers of the slots, int64, in schedule order: slots side by side cost alike, steps are shuffled.

    Costs and log tokens are rounded to whole numbers first, of which every machine makes the same order. What does
    not fill a step comes last.
    """
    shuffled = np.argsort(hash_key(settings.seed, epoch, Purpose.MICRO_BATCH, np.arange(filling.slots)), kind="stable")
    ranks, accumulation = settings.slots // settings.accumulation, settings.accumulation
    if ranks == 1:  # one process has nobody to wait for: its plan is that of a process for each slot
        ranks, accumulation = settings.slots, 1
    if settings.balance == "none" or ranks == 1:
        return shuffled
    unit = sample_cost(settings, buckets)
    unit = np.maximum(np.rint(unit / unit.max() * 2**24), 1)
    logs = np.rint(np.log([token_count(bucket) for bucket in buckets]) * 4096).astype(np.int64)
    logs -= int(counts @ logs) // int(counts.sum())
    sums = (
        np.bincount(filling.slot, weights=column * filling.samples).astype(np.int64)
        for column in (unit[filling.bucket], logs[filling.bucket], np.ones(len(filling.slot)))
    )
    deck = SlotCosts(*(column[shuffled] for column in sums))
    dealt = assign_slots(
        deck,
        ranks=ranks,
        accumulation=accumulation,
        barrier=settings.barrier,
        spread=math.sqrt(int(counts @ logs**2) / int(counts.sum())),
        strict=settings.balance == "strict",
    )
    # no rank keeps the dearest slots, and no part of the epoch the dearest steps
    steps = np.arange(len(dealt))
    by_rank = uniform(settings.seed, epoch, Purpose.STEP, steps[:, None], np.arange(ranks)).argsort(1, kind="stable")
    dealt = np.take_along_axis(dealt, by_rank[:, None, :], 2)
    dealt = dealt[np.argsort(hash_key(settings.seed, epoch, Purpose.STEP, steps), kind="stable")]
    rest = np.arange(dealt.size, filling.slots)
    rest = rest[np.argsort(-deck.cost[rest], kind="stable")]
    return shuffled[np.concatenate([dealt.ravel(), rest])]


def _ranges(first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Returns first[0], first[0] + 1, ... (count[0] numbers), then those of first[1], ...: int64."""
    return np.repeat(first - (np.cumsum(count) - count), count) + np.arange(count.sum())


def count_steps(
    columns: Columns, settings: PlanSettings, epoch: int, excluded: np.ndarray | Sequence[int] = ()
) -> int:
    """Returns the optimizer steps of an epoch without ordering its samples (several times faster than the plan)."""
    fates = row_fates(columns, settings, np.asarray(excluded, np.int64))
    rows, copies, _, _ = draw_samples(columns, settings, epoch, fates)
    if not len(rows):
        return 0
    _, number, buckets, _ = _draw_buckets(columns, settings, epoch, rows, copies)
    filling = fill_slots(settings, buckets, np.bincount(number, minlength=len(buckets)))
    return -(-filling.slots // settings.slots)
