"""Serves sampler and resume: one epoch's schedule, read step by step. No torch.

An epoch is a list of optimizer steps; a step is G slots, a slot one or more micro-batches, a micro-batch samples
of one bucket. G is fixed at first launch, so that the same steps run at any world size which divides it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from videox.data.plan.buckets import Fate
from videox.errors import UserError
from videox.rng import Purpose, hash_key, uniform
from videox.shapes import GRID, Bucket, token_count

PADDING = -1  # the row number of a sample that only keeps ranks in step
PADDING_SIDE = 4 * GRID  # pixels of a sample that only adds a micro-batch: next to nothing beside any other


class MicroBatch(NamedTuple):
    """Samples of one bucket that one process trains at once, with all that their tensors depend on.

    rows, copies, starts int64 [B]; keys, variants uint64 [B]; weights float64 [B], each sample's share of the step's
    loss (0 for padding); strata float64 [B] in (0, 1), stratified over the step; step counts from 0 within the epoch.
    """

    step: int
    slot: int
    bucket: Bucket
    rows: np.ndarray
    copies: np.ndarray
    starts: np.ndarray
    keys: np.ndarray
    variants: np.ndarray
    weights: np.ndarray
    strata: np.ndarray

    @property
    def tokens(self) -> int:
        """The transformer's tokens of all real samples together."""
        return token_count(self.bucket) * int(np.count_nonzero(self.rows != PADDING))


class Executed(NamedTuple):
    """One real sample where it runs: micro counts the rank's micro-batches of the step, sizes are in pixels."""

    step: int
    rank: int
    micro: int
    row: int
    frames: int
    height: int
    width: int
    clip_start: int


@dataclass(frozen=True)
class EpochPlan:
    """One epoch's schedule. Samples lie in schedule order; micro-batches and slots are ranges over them.

    row, copy, start int64 [N]; key, variant uint64 [N], of draws made anew each epoch and of those that may come
    again; micro_first int64 [M + 1] into samples; micro_bucket int64 [M] into buckets; slot_first int64 [S + 1] into
    micro-batches; fates uint8 per metadata row; least_frames: of a sample, the shortest that the model can be given.
    """

    epoch: int
    seed: int
    slots: int
    buckets: tuple[Bucket, ...]
    row: np.ndarray
    copy: np.ndarray
    start: np.ndarray
    key: np.ndarray
    variant: np.ndarray
    micro_first: np.ndarray
    micro_bucket: np.ndarray
    slot_first: np.ndarray
    fates: np.ndarray
    least_frames: int = 1

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

    def shape_of_step(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Returns int64 [M] of a step's micro-batches: tokens of a sample, samples, slot of the step, place in it."""
        slots = self._slot_range(step)
        firsts = self.slot_first[slots.start : slots.stop + 1]
        micros = np.arange(firsts[0], firsts[-1])
        slot = np.repeat(np.arange(len(slots)), np.diff(firsts))
        tokens = np.array([token_count(self.buckets[number]) for number in self.micro_bucket[micros]])
        return tokens, self.micro_first[micros + 1] - self.micro_first[micros], slot, micros - firsts[slot]

    def strata_of_step(self, step: int) -> np.ndarray:
        """Returns one draw in (0, 1) per sample: sample i of n lies in a stratum of width 1/n that only it has.

        Which stratum a sample gets is a keyed permutation, so that neither a bucket nor a process keeps one band.
        """
        first, last = self._sample_range(step)
        count = last - first
        order = hash_key(self.seed, self.epoch, step, Purpose.STRATUM, np.arange(count))
        place = np.empty(count, np.int64)
        place[np.argsort(order, kind="stable")] = np.arange(count)
        return (place + uniform(self.key[first:last], Purpose.TIMESTEP)) / count

    def micro_batches(self, step: int, rank: int, world_size: int) -> list[MicroBatch]:
        """Returns what one process runs in a step; every process of every world size runs its share of the same step.

        Process `rank` takes slots rank, rank + world_size, ... of the step. Slots with fewer micro-batches than the
        fullest one, and missing slots of the epoch's last step, are padded with weight 0 (padding_buckets).

        Raises:
            UserError: world_size does not divide the number of slots.
        """
        check_world_size(self.slots, world_size)
        slots = self._slot_range(step)
        depth = max(int(self.slot_first[s + 1] - self.slot_first[s]) for s in slots)
        whole, short = self.padding_buckets(step)
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
                        self.start[part], self.key[part], self.variant[part], weights,
                        strata[part.start - first : part.stop - first],
                    )
                )  # fmt: skip
            batches += [padding(step, slot, short if micros else whole)] * (depth - len(micros))
        return batches

    def executed(self, world_size: int) -> Iterator[Executed]:
        """Yields every real sample of the epoch as world_size processes run it: by step, rank and micro-batch.

        Raises:
            UserError: world_size does not divide the number of slots.
        """
        for step in range(self.n_steps):
            for rank in range(world_size):
                for micro, batch in enumerate(self.micro_batches(step, rank, world_size)):
                    for row, start in zip(batch.rows.tolist(), batch.starts.tolist(), strict=True):
                        if row != PADDING:
                            yield Executed(step, rank, micro, row, *batch.bucket, start)

    def padding_buckets(self, step: int) -> tuple[Bucket, Bucket]:
        """Returns the buckets of weight-0 micro-batches: for a slot without samples, and for one with too few batches.

        The first is the step's cheapest. The second, which may occur in every step, is a small square of least_frames.
        """
        slots = self._slot_range(step)
        used = np.unique(self.micro_bucket[self.slot_first[slots.start] : self.slot_first[slots.stop]])
        whole = min((self.buckets[number] for number in used), key=token_count)
        return whole, min(whole, Bucket(self.least_frames, PADDING_SIDE, PADDING_SIDE), key=token_count)

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
    key = one.astype(np.uint64)
    return MicroBatch(
        step, slot, bucket, one + PADDING, one, one, key, key, np.zeros(1), np.full(1, 0.5)
    )  # fmt: skip


def check_world_size(slots: int, world_size: int) -> None:
    """Raises UserError unless world_size divides the slots of a step."""
    if slots % world_size:
        fits = [str(w) for w in range(1, slots + 1) if slots % w == 0]
        raise UserError(
            "number of processes",
            f"{world_size} does not divide the {slots} slots of an optimizer step",
            f"start one of {', '.join(fits)} processes, or begin a new run in another --output_dir",
        )
