"""One epoch's plan, read step by step by the sampler and on resume. Imports no torch.

An epoch is a list of optimizer steps, a step is G slots, a slot is one or more micro-batches, and a micro-batch is
samples of one bucket. G is fixed at first launch, so that the same steps run at any world size that divides it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from videox.data.plan.buckets import Fate
from videox.data.plan.timesteps import ACROSS_STEPS, PER_STEP, place_in_stratum
from videox.errors import UserError
from videox.rng import Purpose, hash_key, uniform
from videox.shapes import USUAL, Bucket, Ratios, token_count

PADDING = -1  # row number of a padding sample, which has weight 0 and only keeps the ranks in step
PADDING_CELLS = 4  # side of an added padding micro-batch, in units of the model's grid: its cost is negligible


class MicroBatch(NamedTuple):
    """Samples of one bucket that one rank trains in one forward pass, with everything that their tensors depend on.

    rows, copies, starts int64 [B]; keys, variants uint64 [B]; weights float64 [B], each sample's share of the step's
    loss (0 for padding); strata float64 [B] in (0, 1), stratified over the step; step counts from 0 within the epoch;
    ratios: of the model.
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
    ratios: Ratios = USUAL

    @property
    def tokens(self) -> int:
        """The number of transformer tokens of all real samples together."""
        return token_count(self.bucket, self.ratios) * int(np.count_nonzero(self.rows != PADDING))


class PlannedSample(NamedTuple):
    """One sample of a micro-batch as the sampler sends it to a data loader worker.

    row: metadata row, -1 for padding; start: first source frame; key: key of the draws that are new in each epoch;
    variant: key of the draws whose results a cache can store; weight: share of the step's loss; stratum: timestep draw
    in (0, 1); step: step within the epoch; micro: number of the rank's micro-batch in the step, from 0; last: whether
    it is the rank's last micro-batch of the step; timesteps: of the plan.
    """

    row: int
    start: int
    key: int
    variant: int
    weight: float
    stratum: float
    bucket: Bucket
    step: int
    micro: int
    last: bool
    timesteps: str = PER_STEP


@dataclass(frozen=True)
class EpochPlan:
    """One epoch's plan. Samples are in execution order; micro-batches and slots are ranges over them.

    row, copy, start int64 [N]; key, variant uint64 [N], keys of the draws that are new in each epoch and of those that
    may repeat (cache_variants); micro_first int64 [M + 1] into samples; micro_bucket int64 [M] into buckets;
    slot_first int64 [S + 1] into micro-batches; fates uint8 per metadata row; min_frames: the shortest sample that the
    model accepts; timesteps: one of TIMESTEPS; first_step: number of the epoch's first step in the run, from 0;
    ratios: of the model.
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
    min_frames: int = 1
    timesteps: str = PER_STEP
    first_step: int = 0
    ratios: Ratios = USUAL

    def tokens_of(self, bucket: Bucket) -> int:
        """Return the number of transformer tokens of one sample of a bucket."""
        return token_count(bucket, self.ratios)

    def bucket_tokens(self) -> list[int]:
        """Return tokens_of each of the plan's buckets."""
        return [self.tokens_of(bucket) for bucket in self.buckets]

    @property
    def n_steps(self) -> int:
        """The number of optimizer steps of this epoch."""
        return -(-(len(self.slot_first) - 1) // self.slots)

    def _slot_range(self, step: int) -> range:
        return range(step * self.slots, min((step + 1) * self.slots, len(self.slot_first) - 1))

    def _sample_range(self, step: int) -> tuple[int, int]:
        slots = self._slot_range(step)
        first, last = self.slot_first[slots.start], self.slot_first[slots.stop]
        return int(self.micro_first[first]), int(self.micro_first[last])

    def rows_of_step(self, step: int) -> np.ndarray:
        """Return the metadata rows (int64) of the whole global batch in execution order, padding left out."""
        first, last = self._sample_range(step)
        return self.row[first:last]

    def keys_of_step(self, step: int) -> np.ndarray:
        """Return the key (uint64) of the random draws of each row of rows_of_step; no two are equal."""
        first, last = self._sample_range(step)
        return self.key[first:last]

    def buckets_of_step(self, step: int) -> list[Bucket]:
        """Return the bucket of each row of rows_of_step."""
        slots = self._slot_range(step)
        micros = range(self.slot_first[slots.start], self.slot_first[slots.stop])
        return [
            self.buckets[self.micro_bucket[m]]
            for m in micros
            for _ in range(self.micro_first[m + 1] - self.micro_first[m])
        ]

    def tokens_of_step(self, step: int) -> int:
        """Return the number of transformer tokens of the whole global batch."""
        return sum(map(self.tokens_of, self.buckets_of_step(step)))

    def shape_of_step(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return int64 [M] columns of a step's micro-batches: tokens per sample, samples, slot, place in the slot."""
        slots = self._slot_range(step)
        firsts = self.slot_first[slots.start : slots.stop + 1]
        micros = np.arange(firsts[0], firsts[-1])
        slot = np.repeat(np.arange(len(slots)), np.diff(firsts))
        tokens = np.array([self.tokens_of(self.buckets[number]) for number in self.micro_bucket[micros]])
        return tokens, self.micro_first[micros + 1] - self.micro_first[micros], slot, micros - firsts[slot]

    def strata_of_step(self, step: int) -> np.ndarray:
        """Return one draw in (0, 1) per sample: of n samples, each is drawn within its own stratum of width 1/n.

        Which stratum a sample gets is a keyed permutation, so that no bucket and no rank is tied to one range of
        timesteps. With ACROSS_STEPS, place_in_stratum is the place within it: the sample in stratum p gets
        (p + place) / n.
        """
        first, last = self._sample_range(step)
        count = last - first
        # keyed by the step and not by the sample: the permutation covers all strata for any samples
        order = hash_key(self.seed, self.epoch, step, Purpose.STRATUM, np.arange(count))
        stratum = np.empty(count, np.int64)
        stratum[np.argsort(order, kind="stable")] = np.arange(count)
        if self.timesteps == ACROSS_STEPS:
            return (stratum + place_in_stratum(self.seed, self.first_step + step)) / count
        return (stratum + uniform(self.key[first:last], Purpose.TIMESTEP)) / count

    def micro_batches(self, step: int, data_group: int, data_groups: int) -> list[MicroBatch]:
        """Return what one data group runs in a step; all groups together run the same step at any number of groups.

        A data group is a set of ranks that get the same samples; today each rank is a group of one. Group g of n runs
        slots g, g + n, ... of the step. Slots with fewer micro-batches than the fullest one, and
        the missing slots of the epoch's last step, are padded with micro-batches of weight 0 (padding_buckets).

        Raises:
            UserError: the number of groups does not divide the number of slots.
        """
        check_world_size(self.slots, data_groups)
        slots = self._slot_range(step)
        max_batches = max(int(self.slot_first[s + 1] - self.slot_first[s]) for s in slots)
        cheapest, smallest = self.padding_buckets(step)
        first, last = self._sample_range(step)
        strata = self.strata_of_step(step)
        batches = []
        # Slots are assigned round-robin: every world size that divides the slots runs the same step.
        for slot in range(data_group, self.slots, data_groups):
            number = slots.start + slot
            micro_range = range(self.slot_first[number], self.slot_first[number + 1]) if number in slots else range(0)
            for m in micro_range:
                span = slice(self.micro_first[m], self.micro_first[m + 1])
                count = span.stop - span.start
                weights = np.full(count, 1.0 / (last - first))
                batches.append(
                    MicroBatch(
                        step, slot, self.buckets[self.micro_bucket[m]], self.row[span], self.copy[span],
                        self.start[span], self.key[span], self.variant[span], weights,
                        strata[span.start - first : span.stop - first], self.ratios,
                    )
                )  # fmt: skip
            # sharded engines synchronize in every micro-batch: all ranks must run the same number
            added = padding(step, slot, smallest if micro_range else cheapest, self.ratios)
            batches += [added] * (max_batches - len(micro_range))
        return batches

    def padding_buckets(self, step: int) -> tuple[Bucket, Bucket]:
        """Return the buckets of padding micro-batches: for an empty slot, and for a slot with too few micro-batches.

        The first is the cheapest bucket of the step. The second, which may occur in every step, is a small square of
        min_frames.
        """
        slots = self._slot_range(step)
        used = np.unique(self.micro_bucket[self.slot_first[slots.start] : self.slot_first[slots.stop]])
        cheapest = min((self.buckets[number] for number in used), key=self.tokens_of)
        side = PADDING_CELLS * self.ratios.grid
        return cheapest, min(cheapest, Bucket(self.min_frames, side, side), key=self.tokens_of)

    def bucket_table(self) -> list[tuple[Bucket, int, int]]:
        """Return (bucket, samples, micro-batches) for each bucket in use, most tokens first."""
        sizes = np.diff(self.micro_first)
        samples = np.bincount(self.micro_bucket, weights=sizes, minlength=len(self.buckets)).astype(int)
        micros = np.bincount(self.micro_bucket, minlength=len(self.buckets))
        table = [(bucket, int(n), int(m)) for bucket, n, m in zip(self.buckets, samples, micros, strict=True)]
        return sorted(table, key=lambda line: (-self.tokens_of(line[0]), line[0]))

    def most_common_bucket(self) -> Bucket:
        """Return the bucket with the most samples; a bucket of clips is preferred to one of images."""
        return max(self.bucket_table(), key=lambda line: (line[0].frames > 1, line[1], self.tokens_of(line[0])))[0]

    def fate_counts(self) -> dict[str, int]:
        """Return the number of metadata rows of each fate; the counts add up to the number of rows."""
        return {fate.name.lower(): int(np.count_nonzero(self.fates == fate)) for fate in Fate}


def padding(step: int, slot: int, bucket: Bucket, ratios: Ratios = USUAL) -> MicroBatch:
    """Return a micro-batch of one padding sample: no file is opened and its weight is 0."""
    one = np.zeros(1, np.int64)
    key = one.astype(np.uint64)
    return MicroBatch(
        step, slot, bucket, one + PADDING, one, one, key, key, np.zeros(1), np.full(1, 0.5), ratios
    )  # fmt: skip


def check_world_size(slots: int, data_groups: int) -> None:
    """Raise UserError unless the number of data groups divides the slots of a step."""
    if slots % data_groups:
        divisors = [str(w) for w in range(1, slots + 1) if slots % w == 0]
        raise UserError(
            "number of processes",
            f"{data_groups} does not divide the {slots} slots of an optimizer step",
            f"launch one of {', '.join(divisors)} processes, or start a new run in another --output_dir",
        )
