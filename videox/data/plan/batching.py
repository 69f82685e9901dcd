"""Slot filling: a slot gets a fixed number of samples of one bucket, or micro-batches of a fixed total cost."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np

from videox.data.plan.settings import PlanSettings, sample_cost
from videox.shapes import Bucket, token_count

COST_UNITS = 1 << 14  # cost of a full slot, in integer units
# A slot may take 2 % more than its nominal cost. Without any slack the last micro-batches would fit nowhere and would
# open new, nearly empty slots.
CAPACITY = COST_UNITS * 102 // 100
BATCHES_PER_SLOT = 20  # a micro-batch of several samples costs at most 1/20 of its slot: small pieces pack well
FULL_STEPS = 0.97  # make the last step full if this needs at most 3 % fewer or more slots
# Limit on how many samples of one bucket run together, on average weighted by what makes steps differ (batch_sizes).
MAX_CLUSTERING = 2.0


class Filling(NamedTuple):
    """The micro-batches of an epoch: int64 [M] each.

    first: first sample, in an order in which the samples of a bucket are adjacent; samples: number of samples; bucket,
    slot: number of the bucket and of the slot.
    """

    first: np.ndarray
    samples: np.ndarray
    bucket: np.ndarray
    slot: np.ndarray

    @property
    def slots(self) -> int:
        """The number of slots."""
        return int(self.slot.max()) + 1


def fill_slots(settings: PlanSettings, buckets: tuple[Bucket, ...], counts: np.ndarray) -> Filling:
    """Return the micro-batches and slots of an epoch.

    Fixed fill: a slot is one micro-batch of batch_size samples; the remainder of each bucket is a smaller one. Cost
    fill: a slot has the cost of batch_size samples of the largest bucket, within 2 %. Where ranks synchronize once per
    step, several micro-batches of any buckets fill a slot; where they synchronize in each micro-batch, a slot is one
    micro-batch, as large as memory allows.

    Args:
        counts: number of samples of each bucket, int64.
    """
    if settings.slot_fill == "fixed":
        return one_batch_per_slot(*split_buckets(counts, np.full(len(buckets), settings.batch_size)))
    first, count, bucket = split_buckets(counts, batch_sizes(settings, buckets, counts))
    if settings.barrier == "micro":
        return one_batch_per_slot(first, count, bucket)
    unit = sample_cost(settings, buckets)
    slot_cost = settings.batch_size * unit.max()
    # (1 - 1e-12): a full slot is COST_UNITS and not one more because of float rounding
    cost = np.maximum(np.ceil(count * unit[bucket] / slot_cost * COST_UNITS * (1 - 1e-12)).astype(np.int64), 1)
    return Filling(first, count, bucket, pack_steps(cost, settings.slots))


def one_batch_per_slot(first: np.ndarray, count: np.ndarray, bucket: np.ndarray) -> Filling:
    """Return the filling in which each micro-batch is a slot."""
    return Filling(first, count, bucket, np.arange(len(first)))


def split_buckets(counts: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Split each bucket's samples (counts, in bucket order) into chunks of at most `sizes`: (first, count, bucket)."""
    n_chunks = -(-counts // sizes)
    bucket = np.repeat(np.arange(len(counts)), n_chunks)
    within = np.arange(n_chunks.sum()) - np.repeat(np.cumsum(n_chunks) - n_chunks, n_chunks)
    first = (np.cumsum(counts) - counts)[bucket] + within * sizes[bucket]
    return first, np.minimum(sizes[bucket], counts[bucket] - within * sizes[bucket]), bucket


def batch_sizes(settings: PlanSettings, buckets: tuple[Bucket, ...], counts: np.ndarray) -> np.ndarray:
    """Return the samples of a micro-batch of each bucket under cost fill, int64, at least 1.

    A micro-batch has at most the tokens, and so the memory, of batch_size samples of the largest bucket, and at most
    the cost of a slot, or 1 / BATCHES_PER_SLOT of it where a slot has several micro-batches. Many samples of one
    bucket in one step are less varied than the same number of random ones. The size is therefore limited, so that its
    mean over buckets, weighted by each bucket's share of the variance of log tokens, stays below MAX_CLUSTERING.
    """
    tokens = np.array([token_count(bucket, settings.policy.ratios) for bucket in buckets], np.float64)
    cost = sample_cost(settings, buckets)
    max_cost = settings.batch_size * cost.max() / (BATCHES_PER_SLOT if settings.barrier == "step" else 1)
    # (1 + 1e-12): an exact fit is not lost to float rounding
    sizes = np.minimum(np.floor(max_cost / cost * (1 + 1e-12)), np.floor(settings.batch_size * tokens.max() / tokens))
    sizes = np.maximum(sizes, 1).astype(np.int64)
    # integers, in units of 1/4096 of log tokens: every machine finds the same limit
    logs = np.rint(np.log(tokens) * 4096).astype(np.int64)
    weights = counts * (logs - int(counts @ logs) // int(counts.sum())) ** 2
    limit = 1
    while limit < sizes.max() and int(weights @ np.minimum(sizes, 2 * limit)) <= MAX_CLUSTERING * int(weights.sum()):
        limit *= 2
    return np.minimum(sizes, limit)


def pack_steps(cost: np.ndarray, size: int) -> np.ndarray:
    """Return the slot of each micro-batch, int64, with a full last step where small changes to the slots achieve it.

    A partly padded step takes as long as a full one. Slots may be filled up to CAPACITY; and if a last step has to run
    anyway, the epoch is faster when all its slots are filled a little less.

    Args:
        cost: int64 [M], as `pack` takes it.
        size: number of slots of a step.
    """
    slot = pack(cost)
    slots = int(slot.max()) + 1
    # round the number of steps down, so that slots are a little fuller, or else up, so that they are a little emptier
    for steps in (slots // size, -(-slots // size)):
        if steps and slots % size and FULL_STEPS <= slots / (steps * size) <= 1 / FULL_STEPS:
            filled = pack(cost, steps * size)
            if filled.max() + 1 == steps * size:
                return filled
    return slot


def pack(cost: np.ndarray, slots: int | None = None) -> np.ndarray:
    """Return the slot of each micro-batch, int64: by decreasing cost, each goes where most capacity is free.

    Slots with equal free capacity are filled together, so that the run time grows with the number of different costs
    and not with the number of micro-batches.

    Args:
        cost: int64 [M], 1 to COST_UNITS; no slot gets more than CAPACITY.
        slots: initial number of slots (None = as many as the costs fill); more are added where a micro-batch fits
            nowhere.
    """
    slot = np.empty(len(cost), np.int64)
    order = np.argsort(-cost, kind="stable")
    values, firsts = np.unique(-cost[order], return_index=True)
    slots = slots or -(-int(cost.sum()) // COST_UNITS)
    free_levels, slots_by_free = [CAPACITY], {CAPACITY: [np.arange(slots)]}

    def add_open(free: int, numbers: np.ndarray) -> None:
        if free not in slots_by_free:
            insort(free_levels, free)
        slots_by_free.setdefault(free, []).append(numbers)

    for value, first, last in zip((-values).tolist(), firsts, [*firsts[1:], len(order)], strict=True):
        waiting = order[first:last]
        while len(waiting):
            # nothing fits: open as many slots as these micro-batches alone would fill
            if not free_levels or free_levels[-1] < value:
                new = -(-len(waiting) // (COST_UNITS // value))
                add_open(CAPACITY, np.arange(slots, slots + new))
                slots += new
            free = free_levels[-1]
            numbers = slots_by_free[free].pop()
            if not slots_by_free[free]:
                del slots_by_free[free]
                del free_levels[bisect_left(free_levels, free)]
            placed = min(len(waiting), len(numbers))
            slot[waiting[:placed]] = numbers[:placed]
            add_open(free - value, numbers[:placed])
            if placed < len(numbers):
                add_open(free, numbers[placed:])
            waiting = waiting[placed:]
    # number the slots from 0 without gaps: a slot that received nothing disappears
    return np.unique(slot, return_inverse=True)[1]
