"""The plan of an epoch, as a pure function of columns, settings, seed and epoch number. Imports no torch.

Everything that a sample needs (bucket, clip start, key of its random draws, share of the loss) is known before any
file is opened, and so is which slots run side by side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import NamedTuple

import numpy as np

from videox.data.plan.balancing import SlotCosts, assign_slots
from videox.data.plan.batching import Filling, fill_slots
from videox.data.plan.buckets import (
    CROP_RATIOS,
    BucketDraws,
    Fate,
    assign_buckets,
    clip_starts,
    frame_offsets,
    frames_at_pace,
    last_start,
    pace_of,
    spaced_starts,
    static_fates,
)
from videox.data.plan.epoch import EpochPlan
from videox.data.plan.held_out import STRATIFIED, choose_rows
from videox.data.plan.settings import PlanColumns, PlanSettings, launch_cost, sample_cost
from videox.errors import DATA, UserError
from videox.rng import Purpose, hash_key, uniform
from videox.shapes import Bucket, token_count


def held_out_rows(columns: PlanColumns, settings: PlanSettings) -> np.ndarray:
    """Return the rows (int64, ascending) held out for validation, chosen among those that could be trained."""
    rows, count = np.flatnonzero(_static_fates(columns, settings) == Fate.TRAINED), settings.held_out
    if not count and settings.held_out_share:
        count = max(round(settings.held_out_share * len(rows)), 1)
    return choose_rows(columns, rows, count, settings.seed, choice=settings.held_out_choice)


def compared_rows(columns: PlanColumns, settings: PlanSettings, count: int | None = None) -> np.ndarray:
    """Return trained rows (int64, ascending) whose loss is compared with that of the held-out ones.

    Args:
        columns: of the index.
        settings: of the run.
        count: how many; None: as many as are held out.
    """
    fates, kept = _static_fates(columns, settings), held_out_rows(columns, settings)
    fates[kept] = Fate.HELD_OUT
    trained = fates == Fate.TRAINED
    if columns.weight is not None:
        trained &= columns.weight > 0
    rows = np.flatnonzero(trained)
    return choose_rows(
        columns, rows, len(kept) if count is None else count, settings.seed, choice=STRATIFIED, beside=True
    )


def _static_fates(columns: PlanColumns, settings: PlanSettings) -> np.ndarray:
    shape = columns.kind, columns.height, columns.width, columns.frames
    return static_fates(settings.policy, *shape, columns.usable, columns.fps)


def held_out_plan(columns: PlanColumns, settings: PlanSettings) -> EpochPlan | None:
    """Return a plan of the held-out rows alone, one sample per step, the same for the whole run; None without any."""
    return _plan_of_rows(columns, settings, held_out_rows(columns, settings)) if settings.holds_out else None


def compared_plan(columns: PlanColumns, settings: PlanSettings, count: int | None = None) -> EpochPlan | None:
    """Return a plan of compared_rows alone, as held_out_plan; None where there is no row. count: see compared_rows."""
    rows = compared_rows(columns, settings, count)
    return _plan_of_rows(columns, settings, rows) if len(rows) else None


def list_plan(columns: PlanColumns, settings: PlanSettings) -> EpochPlan | None:
    """Return a plan of all rows of a list that is only measured, as held_out_plan; None where none is usable.

    Args:
        columns: of the list.
        settings: of the run.
    """
    rows = np.flatnonzero(_static_fates(columns, settings) == Fate.TRAINED)
    return _plan_of_rows(columns, settings, rows) if len(rows) else None


def _plan_of_rows(columns: PlanColumns, settings: PlanSettings, rows: np.ndarray) -> EpochPlan:
    chosen = np.zeros(len(columns), bool)
    chosen[rows] = True
    one_per_step = replace(
        settings, held_out=0, held_out_share=0.0, batch_size=1, slots=1, accumulation=1, slot_fill="fixed",
        balance="none", video_repeat=1,
    )  # fmt: skip
    return plan_epoch(replace(columns, usable=chosen, weight=None), one_per_step, 0)


def row_fates(columns: PlanColumns, settings: PlanSettings, excluded: np.ndarray) -> np.ndarray:
    """Return a Fate per metadata row (uint8); excluded: rows quarantined during training."""
    fates = _static_fates(columns, settings)
    if settings.holds_out:
        fates[held_out_rows(columns, settings)] = Fate.HELD_OUT
    fates[np.asarray(excluded, np.int64)] = Fate.QUARANTINED
    return fates


class Samples(NamedTuple):
    """The samples of an epoch, int64 [N] each: metadata row, number of its copy, which of the row's `clips` clips."""

    row: np.ndarray
    copy: np.ndarray
    clip: np.ndarray
    clips: np.ndarray


def draw_samples(columns: PlanColumns, settings: PlanSettings, epoch: int, fates: np.ndarray) -> Samples:
    """Return the samples of an epoch; in `fates`, rows that their weight leaves out of this epoch become NOT_DRAWN.

    An image occurs once, a video video_repeat times with each of its clips, both multiplied by the row's weight; the
    fractional part of the product is the probability of one more occurrence.
    """
    rotation = variant_epoch(settings, epoch)
    rows = np.flatnonzero(fates == Fate.TRAINED)
    video = columns.kind[rows] == 1
    pace = pace_of(settings.policy, None if columns.fps is None else columns.fps[rows])
    fitting_clips = frames_at_pace(columns.frames[rows].astype(np.int64), pace) // settings.policy.n_frames
    clips = np.where(video, np.clip(fitting_clips, 1, settings.clips_per_video), 1)
    times = np.where(video, max(settings.video_repeat, 1), 1) * clips
    if columns.weight is not None:
        # weight 2.25: two copies, and with probability 0.25 a third
        draw = uniform(settings.seed, epoch, rows, Purpose.REPEAT)
        times = np.floor(times * columns.weight[rows].astype(np.float64) + draw).astype(np.int64)
        fates[rows[times == 0]] = Fate.NOT_DRAWN
    # Number the copies of each row from 0. The rotation gives each copy another clip in the next epoch: if its weight
    # leaves a row fewer copies than clips, all clips are still trained over the epochs.
    copies = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)
    clips = np.repeat(clips, times)
    return Samples(np.repeat(rows, times), copies, (copies + rotation) % clips, clips)


def variant_epoch(settings: PlanSettings, epoch: int) -> int:
    """Return the epoch whose clips, sizes and crops this epoch repeats; the epoch itself without cache_variants."""
    return epoch % settings.cache_variants if settings.cache_variants else epoch


def _draw_buckets(
    columns: PlanColumns, settings: PlanSettings, epoch: int, rows: np.ndarray, copies: np.ndarray
) -> tuple[np.ndarray, np.ndarray, tuple[Bucket, ...], np.ndarray]:
    """Return (variant uint64 [N], bucket number int64 [N], buckets, sample frames int32 [N])."""
    # keyed by the variant epoch, not the epoch: what a cache stores (size, ratio, frames, start) repeats with it
    variant = hash_key(settings.seed, variant_epoch(settings, epoch), rows, copies, Purpose.SAMPLE)
    frames, height, width, _ = assign_buckets(
        settings.policy,
        columns.kind[rows],
        columns.height[rows],
        columns.width[rows],
        columns.frames[rows],
        BucketDraws(*(uniform(variant, purpose) for purpose in (Purpose.SIZE, Purpose.RATIO, Purpose.FRAMES))),
        fps=None if columns.fps is None else columns.fps[rows],
    )
    # one integer per bucket, 20 bits per side: unique() on integers is many times faster than on rows
    code = (frames.astype(np.int64) << 40) | (height.astype(np.int64) << 20) | width
    values, number = np.unique(code, return_inverse=True)
    buckets = tuple(Bucket(int(value >> 40), int(value >> 20 & 0xFFFFF), int(value & 0xFFFFF)) for value in values)
    return variant, number, buckets, frames


class DrawnSamples(NamedTuple):
    """An epoch's samples before they are ordered, with what is drawn for each.

    rows, copies, starts int64 [N]; keys, variants uint64 [N]; number int64 [N] into buckets.
    """

    rows: np.ndarray
    copies: np.ndarray
    starts: np.ndarray
    keys: np.ndarray
    variants: np.ndarray
    number: np.ndarray
    buckets: tuple[Bucket, ...]


def draw_epoch(columns: PlanColumns, settings: PlanSettings, epoch: int, fates: np.ndarray) -> DrawnSamples:
    """Return an epoch's samples with their buckets, clip starts and keys; changes `fates` as draw_samples does."""
    rows, copies, clip, clips = draw_samples(columns, settings, epoch, fates)
    variants, number, buckets, frames = _draw_buckets(columns, settings, epoch, rows, copies)
    pace = pace_of(settings.policy, None if columns.fps is None else columns.fps[rows])
    if settings.clip_sampling == "random":
        starts = clip_starts(columns.frames[rows], frames, pace, uniform(variants, Purpose.START))
    else:
        latest, length = last_start(columns.frames[rows], frames, pace), frame_offsets(frames - 1, pace) + 1
        starts = spaced_starts(latest, length, clip, clips, settings.clip_sampling)
    # keyed by the epoch: noise, timesteps and caption dropout are new in every epoch, cached or not
    keys = hash_key(settings.seed, epoch, rows, copies, Purpose.SAMPLE)
    return DrawnSamples(rows, copies, starts, keys, variants, number, buckets)


def plan_epoch(
    columns: PlanColumns,
    settings: PlanSettings,
    epoch: int,
    excluded: np.ndarray | Sequence[int] = (),
    first_step: int = 0,
) -> EpochPlan:
    """Return the plan of an epoch: the same on every rank and at every world size.

    Args:
        columns: of the index.
        settings: with the seed; plans of two seeds are independent.
        epoch: number of the epoch, from 0.
        excluded: metadata rows that all ranks agreed to leave out from this epoch on.
        first_step: number of the epoch's first step in the run, from 0; only the timesteps depend on it.

    Raises:
        UserError: no row is left to train.
    """
    fates = row_fates(columns, settings, np.asarray(excluded, np.int64))
    rows, copies, starts, key, variants, number, buckets = draw_epoch(columns, settings, epoch, fates)
    if not len(rows):
        raise _no_row_error(fates, settings)

    # Shuffle all samples, then sort by bucket with a stable sort: random order within each bucket. The order is that
    # of hashed keys, not of a stream of random numbers: excluding a row does not reorder the others.
    order = np.argsort(hash_key(key, Purpose.ORDER), kind="stable")
    order = order[np.argsort(number[order], kind="stable")]
    counts = np.bincount(number, minlength=len(buckets))
    filling = fill_slots(settings, buckets, counts)
    position = np.empty(filling.slots, np.int64)
    position[slot_order(settings, epoch, buckets, counts, filling)] = np.arange(filling.slots)

    # The most expensive micro-batch of a slot comes first: a step that does not fit in memory fails at its beginning,
    # not after most of its work.
    cost = sample_cost(settings, buckets)[filling.bucket] * filling.samples
    execution = np.lexsort((filling.first, -cost, position[filling.slot]))
    first, count, bucket, slot = (column[execution] for column in filling)
    samples = order[_concat_ranges(first, count)]
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
        slot_first=np.concatenate([[0], np.cumsum(np.bincount(position[slot]))]),
        fates=fates,
        min_frames=settings.policy.min_frames,
        timesteps=settings.timesteps,
        first_step=first_step,
        ratios=settings.policy.ratios,
    )


def _no_row_error(fates: np.ndarray, settings: PlanSettings) -> UserError:
    """Return the error for an epoch without samples; fates: of all rows."""
    counts_by_fate = ", ".join(
        f"{np.count_nonzero(fates == fate)} {fate.name.lower()}" for fate in Fate if np.any(fates == fate)
    )
    hint = "fix the problems reported above, or lower --video_sample_n_frames or --video_sample_stride"
    if np.any(fates == Fate.HELD_OUT):  # these rows could be trained
        hint = "lower --validation_share" if settings.held_out_share else "lower --validation_rows"
    if np.any(fates == Fate.NOT_DRAWN):  # these rows would be trained with weight 1
        hint = "raise the `weight` of some rows: 1 means once per epoch"
    return UserError("--train_data_meta", f"no row of {len(fates)} can be trained ({counts_by_fate})", hint, DATA)


def slot_order(
    settings: PlanSettings, epoch: int, buckets: tuple[Bucket, ...], counts: np.ndarray, filling: Filling
) -> np.ndarray:
    """Return the slots' numbers, int64, in execution order: those side by side have similar costs, steps are shuffled.

    Slots that do not fill a step come last.
    """
    shuffled = np.argsort(hash_key(settings.seed, epoch, Purpose.MICRO_BATCH, np.arange(filling.slots)), kind="stable")
    data_groups, accumulation = settings.slots // settings.accumulation, settings.accumulation
    # A single rank never waits. It gets the plan of one rank per slot, which also suits a later run on more ranks.
    if data_groups == 1:
        data_groups, accumulation = settings.slots, 1
    if settings.balance == "none" or data_groups == 1:
        return shuffled
    unit = sample_cost(settings, buckets)
    # Integers: floats summed in another order differ in the last bit between machines, and with them the plan.
    # 2**24 and 4096 are fine enough, and keep all sums below 2**53, where float64 adds integers exactly.
    launch = np.rint(launch_cost(settings) / unit.max() * 2**24)
    unit = np.maximum(np.rint(unit / unit.max() * 2**24), 1)
    logs = np.rint(np.log([token_count(bucket, settings.policy.ratios) for bucket in buckets]) * 4096).astype(np.int64)
    logs -= int(counts @ logs) // int(counts.sum())
    of_samples = (unit[filling.bucket], logs[filling.bucket], np.ones(len(filling.slot)))
    columns = [column * filling.samples for column in of_samples]
    columns[0] += launch
    sums = (np.bincount(filling.slot, weights=column).astype(np.int64) for column in columns)
    slots = SlotCosts(*(column[shuffled] for column in sums))
    assigned = assign_slots(
        slots,
        data_groups=data_groups,
        accumulation=accumulation,
        barrier=settings.barrier,
        spread=math.sqrt(int(counts @ logs**2) / int(counts.sum())),
        strict=settings.balance == "strict",
    )
    # Rows and steps come sorted by cost. Shuffle the ranks within each step, or one rank would always get the most
    # expensive slots; and shuffle the steps, or the epoch would begin with the most expensive ones.
    steps = np.arange(len(assigned))
    by_rank = uniform(settings.seed, epoch, Purpose.STEP, steps[:, None], np.arange(data_groups)).argsort(
        1, kind="stable"
    )
    assigned = np.take_along_axis(assigned, by_rank[:, None, :], 2)
    assigned = assigned[np.argsort(hash_key(settings.seed, epoch, Purpose.STEP, steps), kind="stable")]
    # the last, incomplete step: sorted by cost, so that slots run side by side with similar ones
    remainder = np.arange(assigned.size, filling.slots)
    remainder = remainder[np.argsort(-slots.cost[remainder], kind="stable")]
    return shuffled[np.concatenate([assigned.ravel(), remainder])]


def _concat_ranges(first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Return first[0], first[0] + 1, ... (count[0] numbers), then those of first[1], ...: int64."""
    return np.repeat(first - (np.cumsum(count) - count), count) + np.arange(count.sum())


def count_steps(
    columns: PlanColumns, settings: PlanSettings, epoch: int, excluded: np.ndarray | Sequence[int] = ()
) -> int:
    """Return the optimizer steps of an epoch without ordering its samples (several times faster than the plan)."""
    fates = row_fates(columns, settings, np.asarray(excluded, np.int64))
    rows, copies, _, _ = draw_samples(columns, settings, epoch, fates)
    if not len(rows):
        return 0
    _, number, buckets, _ = _draw_buckets(columns, settings, epoch, rows, copies)
    filling = fill_slots(settings, buckets, np.bincount(number, minlength=len(buckets)))
    return -(-filling.slots // settings.slots)


def largest_bucket(columns: PlanColumns, settings: PlanSettings) -> Bucket:
    """Return the bucket with the most tokens that a trained row can get in any epoch; it decides the memory of a run.

    Raises:
        UserError: no row can be trained.
    """
    policy = settings.policy
    rows = np.flatnonzero(row_fates(columns, settings, np.zeros(0, np.int64)) == Fate.TRAINED)
    if not len(rows):
        raise UserError("--train_data_meta", "no row can be trained", "fix the problems reported for the rows", DATA)
    kind, height, width, frames = (getattr(columns, name)[rows] for name in ("kind", "height", "width", "frames"))
    # one draw in the middle of each size's and each ratio's interval reaches every bucket
    sizes = max(len(policy.video_sizes()), len(policy.image_sizes()))
    # shares of ratios are multiples of 1/62, so that 8 x 15 = 120 evenly spaced draws reach every one
    ratios = len(CROP_RATIOS) * 8 if policy.random_ratio_crop else 1
    result = Bucket(1, 0, 0)
    for size, ratio in product(range(sizes), range(ratios)):
        assignment = assign_buckets(
            policy, kind, height, width, frames,
            BucketDraws(
                size=np.full(len(rows), (size + 0.5) / sizes),
                ratio=np.full(len(rows), (ratio + 0.5) / ratios),
                frames=np.zeros(len(rows)),  # every draw below FULL_LENGTH_SHARE keeps all frames
            ),
            fps=None if columns.fps is None else columns.fps[rows],
        )  # fmt: skip
        latent_frames = (assignment.frames.astype(np.int64) - 1) // policy.ratios.temporal + 1
        tokens = latent_frames * assignment.height * assignment.width
        largest = int(tokens.argmax())
        bucket = Bucket(*(int(column[largest]) for column in assignment[:3]))
        result = max(result, bucket, key=lambda size: token_count(size, policy.ratios))
    return result
