"""Serves sampler, resume and dry run: the schedule as a pure function of columns, settings, seed and epoch. No torch.

An epoch is a list of optimizer steps; a step is G slots, a slot one or more micro-batches, a micro-batch samples
of one bucket. G is fixed at first launch, so that the same steps run at any world size which divides it. Whatever a
sample needs (bucket, clip start, key of its random draws, share of the loss) is known before any file is opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from videox.data.buckets import Fate, SizePolicy, assign, clip_starts, static_fates
from videox.errors import DATA, Refusal
from videox.keys import Purpose, mix, uniform
from videox.shapes import Bucket, token_count

PADDING = -1  # the row number of a sample that only keeps ranks in step
# where ranks wait for each other: once in an optimizer step (DDP, ZeRO-2), or in each micro-batch (ZeRO-3, FSDP)
BARRIERS = ("step", "micro")


@dataclass(frozen=True)
class Columns:
    """What the plan reads of the index, one entry per metadata row.

    kind uint8 (0 image, 1 video), width, height, frames int32 (upright pixels, source frames), usable bool.
    """

    kind: np.ndarray
    width: np.ndarray
    height: np.ndarray
    frames: np.ndarray
    usable: np.ndarray

    def __len__(self) -> int:
        return len(self.kind)


@dataclass(frozen=True)
class PlanSettings:
    """Every setting that the schedule depends on besides the columns.

    batch_size: samples per micro-batch; slots: G, processes x accumulation at first launch; slot_fill: "fixed" or
    "cost"; video_repeat: how often a video occurs in an epoch (0 and 1 both mean once); held_out: rows kept for
    validation; cost_linear, cost_quadratic: a and b of a sample's cost a*S + b*S^2 in tokens S; barrier: one of
    BARRIERS.
    """

    policy: SizePolicy
    batch_size: int
    slots: int
    seed: int
    slot_fill: str = "fixed"
    video_repeat: int = 1
    held_out: int = 0
    cost_linear: float = 1.0
    cost_quadratic: float = 0.0
    barrier: str = "step"


class MicroBatch(NamedTuple):
    """Samples of one bucket that one process trains at once, with all that their tensors depend on.

    rows, copies, starts int64 [B]; keys uint64 [B]; weights float64 [B], each sample's share of the step's loss (0 for
    padding); strata float64 [B] in (0, 1), stratified over the step; step counts from 0 within the epoch.
    """

    step: int
    slot: int
    bucket: Bucket
    rows: np.ndarray
    copies: np.ndarray
    starts: np.ndarray
    keys: np.ndarray
    weights: np.ndarray
    strata: np.ndarray

    @property
    def tokens(self) -> int:
        """The transformer's tokens of all real samples together."""
        return token_count(self.bucket) * int(np.count_nonzero(self.rows != PADDING))


@dataclass(frozen=True)
class EpochPlan:
    """One epoch's schedule. Samples lie in schedule order; micro-batches and slots are ranges over them.

    row, copy, start int64 [N], key uint64 [N]; micro_first int64 [M + 1] into samples;
    micro_bucket int64 [M] into buckets; slot_first int64 [S + 1] into micro-batches; fates uint8 per metadata row.
    """

    epoch: int
    seed: int
    slots: int
    buckets: tuple[Bucket, ...]
    row: np.ndarray
    copy: np.ndarray
    start: np.ndarray
    key: np.ndarray
    micro_first: np.ndarray
    micro_bucket: np.ndarray
    slot_first: np.ndarray
    fates: np.ndarray

    @property
    def n_steps(self) -> int:
        """Optimizer steps of this epoch."""
        return -(-(len(self.slot_first) - 1) // self.slots)

    def _slot_range(self, step: int) -> range:
        return range(step * self.slots, min((step + 1) * self.slots, len(self.slot_first) - 1))

    def _sample_range(self, step: int) -> tuple[int, int]:
        slots = self._slot_range(step)
        first, last = self.slot_first[slots.start], self.slot_first[slots.stop]
        return int(self.micro_first[first]), int(self.micro_first[last])

    def rows_of_step(self, step: int) -> np.ndarray:
        """Returns the metadata rows (int64) of the whole global batch in schedule order, padding left out."""
        first, last = self._sample_range(step)
        return self.row[first:last]

    def buckets_of_step(self, step: int) -> list[Bucket]:
        """Returns the bucket of each of rows_of_step."""
        slots = self._slot_range(step)
        micros = range(self.slot_first[slots.start], self.slot_first[slots.stop])
        return [
            self.buckets[self.micro_bucket[m]]
            for m in micros
            for _ in range(self.micro_first[m + 1] - self.micro_first[m])
        ]

    def tokens_of_step(self, step: int) -> int:
        """Returns the transformer's tokens of the whole global batch."""
        return sum(token_count(bucket) for bucket in self.buckets_of_step(step))

    def strata_of_step(self, step: int) -> np.ndarray:
        """Returns one draw in (0, 1) per sample: sample i of n lies in a stratum of width 1/n that only it has.

        Which stratum a sample gets is a keyed permutation, so that neither a bucket nor a process keeps one band.
        """
        first, last = self._sample_range(step)
        count = last - first
        order = mix(self.seed, self.epoch, step, Purpose.STRATUM, np.arange(count))
        place = np.empty(count, np.int64)
        place[np.argsort(order, kind="stable")] = np.arange(count)
        return (place + uniform(self.key[first:last], Purpose.TIMESTEP)) / count

    def micro_batches(self, step: int, rank: int, world_size: int) -> list[MicroBatch]:
        """Returns what one process runs in a step; every process of every world size runs its share of the same step.

        Process `rank` takes slots rank, rank + world_size, ... of the step. Slots with fewer micro-batches than the
        fullest one, and missing slots of the epoch's last step, are padded with weight 0 in its cheapest bucket.

        Raises:
            Refusal: world_size does not divide the number of slots.
        """
        check_world_size(self.slots, world_size)
        slots = self._slot_range(step)
        depth = max(int(self.slot_first[s + 1] - self.slot_first[s]) for s in slots)
        cheapest = min(self.buckets_of_step(step), key=token_count)
        first, last = self._sample_range(step)
        strata = self.strata_of_step(step)
        batches = []
        for slot in range(rank, self.slots, world_size):
            number = slots.start + slot
            micros = range(self.slot_first[number], self.slot_first[number + 1]) if number in slots else range(0)
            for m in micros:
                part = slice(self.micro_first[m], self.micro_first[m + 1])
                count = part.stop - part.start
                weights = np.full(count, 1.0 / (last - first))
                batches.append(
                    MicroBatch(
                        step, slot, self.buckets[self.micro_bucket[m]], self.row[part], self.copy[part],
                        self.start[part], self.key[part], weights, strata[part.start - first : part.stop - first],
                    )
                )  # fmt: skip
            batches += [padding(step, slot, cheapest)] * (depth - len(micros))
        return batches

    def bucket_table(self) -> list[tuple[Bucket, int, int]]:
        """Returns (bucket, samples, micro-batches) for each bucket in use, most tokens first."""
        sizes = np.diff(self.micro_first)
        samples = np.bincount(self.micro_bucket, weights=sizes, minlength=len(self.buckets)).astype(int)
        micros = np.bincount(self.micro_bucket, minlength=len(self.buckets))
        table = [(bucket, int(n), int(m)) for bucket, n, m in zip(self.buckets, samples, micros, strict=True)]
        return sorted(table, key=lambda line: (-token_count(line[0]), line[0]))

    def commonest_bucket(self) -> Bucket:
        """Returns the bucket of the most samples, clips before images."""
        return max(self.bucket_table(), key=lambda line: (line[0].frames > 1, line[1], token_count(line[0])))[0]

    def fate_counts(self) -> dict[str, int]:
        """Returns how many metadata rows met each fate; the counts add up to the rows."""
        return {fate.name.lower(): int(np.count_nonzero(self.fates == fate)) for fate in Fate}


def padding(step: int, slot: int, bucket: Bucket) -> MicroBatch:
    """Returns a micro-batch of one sample that opens no file and weighs nothing."""
    one = np.zeros(1, np.int64)
    return MicroBatch(
        step, slot, bucket, one + PADDING, one, one, one.astype(np.uint64), np.zeros(1), np.full(1, 0.5)
    )  # fmt: skip


def check_world_size(slots: int, world_size: int) -> None:
    """Raises Refusal unless world_size divides the slots of a step."""
    if slots % world_size:
        fits = [str(w) for w in range(1, slots + 1) if slots % w == 0]
        raise Refusal(
            "number of processes",
            f"{world_size} does not divide the {slots} slots of an optimizer step",
            f"start one of {', '.join(fits)} processes, or begin a new run in another --output_dir",
        )


def held_out_rows(columns: Columns, settings: PlanSettings) -> np.ndarray:
    """Returns the rows (int64, ascending) kept for validation: a keyed choice among those that could be trained."""
    fates = static_fates(settings.policy, columns.kind, columns.height, columns.width, columns.frames, columns.usable)
    rows = np.flatnonzero(fates == Fate.TRAINED)
    order = mix(settings.seed, Purpose.HELD_OUT, rows)
    return np.sort(rows[np.argsort(order, kind="stable")[: settings.held_out]])


def held_out_plan(columns: Columns, settings: PlanSettings) -> EpochPlan | None:
    """Returns a plan of the held-out rows alone, one sample a step, the same for the whole run; None without any."""
    if not settings.held_out:
        return None
    kept = np.zeros(len(columns), bool)
    kept[held_out_rows(columns, settings)] = True
    alone = replace(settings, held_out=0, batch_size=1, slots=1, slot_fill="fixed", video_repeat=1)
    return plan_epoch(replace(columns, usable=kept), alone, 0)


def row_fates(columns: Columns, settings: PlanSettings, excluded: np.ndarray) -> np.ndarray:
    """Returns a Fate per metadata row (uint8); `excluded` are the rows quarantined while training."""
    policy = settings.policy
    fates = static_fates(policy, columns.kind, columns.height, columns.width, columns.frames, columns.usable)
    if settings.held_out:
        fates[held_out_rows(columns, settings)] = Fate.HELD_OUT
    fates[np.asarray(excluded, np.int64)] = Fate.QUARANTINED
    return fates


def _samples(columns: Columns, settings: PlanSettings, fates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (rows, copies): images once, videos video_repeat times."""
    rows = np.flatnonzero(fates == Fate.TRAINED)
    if settings.video_repeat <= 1:
        return rows, np.zeros(len(rows), np.int64)
    times = np.where(columns.kind[rows] == 1, settings.video_repeat, 1)
    copies = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)
    return np.repeat(rows, times), copies


def _draw_buckets(
    columns: Columns, settings: PlanSettings, epoch: int, rows: np.ndarray, copies: np.ndarray
) -> tuple[np.ndarray, np.ndarray, tuple[Bucket, ...], np.ndarray]:
    """Returns (key uint64 [N], bucket number int64 [N], buckets, sample frames int32 [N])."""
    key = mix(settings.seed, epoch, rows, copies, Purpose.SAMPLE)
    frames, height, width, _ = assign(
        settings.policy,
        columns.kind[rows],
        columns.height[rows],
        columns.width[rows],
        columns.frames[rows],
        size_draw=uniform(key, Purpose.SIZE),
        ratio_draw=uniform(key, Purpose.RATIO),
        frames_draw=uniform(key, Purpose.FRAMES),
    )
    code = (frames.astype(np.int64) << 40) | (height.astype(np.int64) << 20) | width
    values, number = np.unique(code, return_inverse=True)
    buckets = tuple(Bucket(int(v >> 40), int(v >> 20 & 0xFFFFF), int(v & 0xFFFFF)) for v in values)
    return key, number, buckets, frames


def sample_cost(settings: PlanSettings, buckets: tuple[Bucket, ...]) -> np.ndarray:
    """Returns the cost a*S + b*S^2 of one sample of each bucket, float64."""
    tokens = np.array([token_count(bucket) for bucket in buckets], np.float64)
    return settings.cost_linear * tokens + settings.cost_quadratic * tokens**2


def _slot_capacity(settings: PlanSettings, buckets: tuple[Bucket, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Returns (samples that fill a slot, samples that fill a micro-batch) per bucket, both int64.

    Fixed fill: both are the batch size. Cost fill: a slot holds the cost, and a micro-batch the tokens, of batch_size
    samples of the largest bucket; attention makes large samples dearer than their tokens, memory follows the tokens.
    """
    tokens = np.array([token_count(bucket) for bucket in buckets], np.float64)
    if settings.slot_fill == "fixed":
        batch = np.full(len(buckets), settings.batch_size, np.int64)
        return batch, batch
    cost = sample_cost(settings, buckets)
    per_slot = np.floor(settings.batch_size * cost.max() / cost * (1 + 1e-12)).astype(np.int64)
    per_micro = np.minimum(per_slot, np.floor(settings.batch_size * tokens.max() / tokens).astype(np.int64))
    return per_slot, np.maximum(per_micro, 1)


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
        Refusal: nothing is left to train.
    """
    fates = row_fates(columns, settings, np.asarray(excluded, np.int64))
    rows, copies = _samples(columns, settings, fates)
    if not len(rows):
        counts = ", ".join(f"{np.count_nonzero(fates == f)} {f.name.lower()}" for f in Fate if np.any(fates == f))
        mend = "look at the rows' problems above, or lower --video_sample_n_frames or --video_sample_stride"
        raise Refusal("--train_data_meta", f"no row of {len(columns)} can be trained ({counts})", mend, DATA)
    key, number, buckets, frames = _draw_buckets(columns, settings, epoch, rows, copies)
    starts = clip_starts(columns.frames[rows], frames, settings.policy.stride, uniform(key, Purpose.START))

    # shuffle the samples, then bring each bucket's together: a random order within every bucket
    order = np.argsort(mix(key, Purpose.ORDER), kind="stable")
    order = order[np.argsort(number[order], kind="stable")]
    per_slot, per_micro = _slot_capacity(settings, buckets)
    chunk_first, chunk_count, chunk_bucket = _chunks(np.bincount(number, minlength=len(buckets)), per_slot)
    slot_of_chunk = _fill_slots(settings, chunk_count, chunk_bucket, per_slot)

    # shuffle the slots, keep the chunks of one slot together
    n_slots = int(slot_of_chunk.max()) + 1
    place = np.empty(n_slots, np.int64)
    place[np.argsort(mix(settings.seed, epoch, Purpose.MICRO_BATCH, np.arange(n_slots)), kind="stable")] = np.arange(
        n_slots
    )
    turn = np.argsort(place[slot_of_chunk], kind="stable")
    first, count, bucket, slot = (
        column[turn] for column in (chunk_first, chunk_count, chunk_bucket, place[slot_of_chunk])
    )
    sample_order = order[_ranges(first, count)]

    # split each chunk into the micro-batches that memory allows
    parts = -(-count // per_micro[bucket])
    micro_chunk = np.repeat(np.arange(len(count)), parts)
    within = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
    micro_size = np.minimum(
        per_micro[bucket][micro_chunk], count[micro_chunk] - within * per_micro[bucket][micro_chunk]
    )
    return EpochPlan(
        epoch=epoch,
        seed=settings.seed,
        slots=settings.slots,
        buckets=buckets,
        row=rows[sample_order],
        copy=copies[sample_order],
        start=starts[sample_order],
        key=key[sample_order],
        micro_first=np.concatenate([[0], np.cumsum(micro_size)]),
        micro_bucket=bucket[micro_chunk],
        slot_first=np.concatenate([[0], np.cumsum(np.bincount(slot[micro_chunk], minlength=n_slots))]),
        fates=fates,
    )


def _chunks(counts: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts each bucket's samples (counts, in bucket order) into chunks of at most `sizes`: (first, count, bucket)."""
    parts = -(-counts // sizes)
    bucket = np.repeat(np.arange(len(counts)), parts)
    within = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
    first = (np.cumsum(counts) - counts)[bucket] + within * sizes[bucket]
    return first, np.minimum(sizes[bucket], counts[bucket] - within * sizes[bucket]), bucket


def _fill_slots(
    settings: PlanSettings,
    chunk_count: np.ndarray,
    chunk_bucket: np.ndarray,
    per_slot: np.ndarray,
) -> np.ndarray:
    """Returns the slot of each chunk: one each, but under cost fill the buckets' tails share slots (first fit)."""
    if settings.slot_fill == "fixed":
        return np.arange(len(chunk_count))
    share = chunk_count / per_slot[chunk_bucket]
    slot = np.zeros(len(share), np.int64)
    whole = chunk_count == per_slot[chunk_bucket]
    slot[whole] = np.arange(np.count_nonzero(whole))
    room: list[float] = []
    base = int(np.count_nonzero(whole))
    for chunk in sorted(np.flatnonzero(~whole), key=lambda c: (-share[c], c)):
        taken = next((i for i, free in enumerate(room) if free >= share[chunk]), len(room))
        if taken == len(room):
            room.append(1.0)
        room[taken] -= share[chunk]
        slot[chunk] = base + taken
    return slot


def _ranges(first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Returns first[0], first[0] + 1, ... (count[0] numbers), then those of first[1], ...: int64."""
    return np.repeat(first - (np.cumsum(count) - count), count) + np.arange(count.sum())


def count_steps(
    columns: Columns, settings: PlanSettings, epoch: int, excluded: np.ndarray | Sequence[int] = ()
) -> int:
    """Returns the optimizer steps of an epoch without ordering its samples (several times faster than the plan)."""
    fates = row_fates(columns, settings, np.asarray(excluded, np.int64))
    rows, copies = _samples(columns, settings, fates)
    if not len(rows):
        return 0
    _, number, buckets, _ = _draw_buckets(columns, settings, epoch, rows, copies)
    per_slot, _ = _slot_capacity(settings, buckets)
    _, count, bucket = _chunks(np.bincount(number, minlength=len(buckets)), per_slot)
    slots = int(_fill_slots(settings, count, bucket, per_slot).max()) + 1
    return -(-slots // settings.slots)
