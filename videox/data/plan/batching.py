"""Serves the plan: what fills a slot, a fixed number of samples of one bucket or as many of several as cost alike."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np

from videox.data.plan.settings import PlanSettings, sample_cost
from videox.shapes import Bucket, token_count

UNITS = 1 << 14  # of cost in a full slot
ROOM = (
    UNITS * 102 // 100
)  # what a slot may hold at most: with none to spare the last micro-batches would find no place
PART = 20  # a micro-batch of several samples takes at most this part of its slot, so that it finds room
EVEN = 0.97  # of the slots that fill whole steps: with fewer than so many the last step stays short
CLUMP = 2.0  # samples of one bucket that run together, on the mean over what makes steps differ


class Filling(NamedTuple):
    """The micro-batches of an epoch: int64 [M] each.

    first: sample, in an order in which each bucket's are together; samples: how many; bucket, slot: numbers.
    """

    first: np.ndarray
    samples: np.ndarray
    bucket: np.ndarray
    slot: np.ndarray

    @property
    def slots(self) -> int:
        """Number of slots."""
        return int(self.slot.max()) + 1


def fill_slots(settings: PlanSettings, buckets: tuple[Bucket, ...], counts: np.ndarray) -> Filling:
    """Returns the micro-batches and slots of an epoch.

    Fixed fill: a slot is a micro-batch of batch_size samples, each bucket's remainder a smaller one. Cost fill: a slot
    holds the cost of batch_size samples of the largest bucket, to 2 %. Where ranks meet once a step, several
    micro-batches of any buckets fill it; where they meet in each micro-batch it is one, as large as memory allows.

    Args:
        counts: samples of each bucket, int64.
    """
    if settings.slot_fill == "fixed":
        return one_each(*chunks(counts, np.full(len(buckets), settings.batch_size)))
    first, count, bucket = chunks(counts, batch_sizes(settings, buckets, counts))
    if settings.barrier == "micro":
        return one_each(first, count, bucket)
    unit = sample_cost(settings, buckets)
    room = settings.batch_size * unit.max()
    cost = np.maximum(np.ceil(count * unit[bucket] / room * UNITS * (1 - 1e-12)).astype(np.int64), 1)
    return Filling(first, count, bucket, pack_steps(cost, settings.slots))


def one_each(first: np.ndarray, count: np.ndarray, bucket: np.ndarray) -> Filling:
    """Returns the filling in which each micro-batch is a slot."""
    return Filling(first, count, bucket, np.arange(len(first)))


def chunks(counts: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts each bucket's samples (counts, in bucket order) into chunks of at most `sizes`: (first, count, bucket)."""
    parts = -(-counts // sizes)
    bucket = np.repeat(np.arange(len(counts)), parts)
    within = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
    first = (np.cumsum(counts) - counts)[bucket] + within * sizes[bucket]
    return first, np.minimum(sizes[bucket], counts[bucket] - within * sizes[bucket]), bucket


def batch_sizes(settings: PlanSettings, buckets: tuple[Bucket, ...], counts: np.ndarray) -> np.ndarray:
    """Returns the samples of a micro-batch of each bucket under cost fill, int64, at least 1.

    They have at most the tokens, and so the memory, of batch_size samples of the largest bucket, and at most the cost
    of a slot, or its PARTth part where a slot holds several. Many samples of one bucket in one step are less varied
    than as many random ones: their number is limited, so that its mean, weighted by each bucket's part in the variance
    of log tokens, stays below CLUMP.
    """
    tokens = np.array([token_count(bucket) for bucket in buckets], np.float64)
    cost = sample_cost(settings, buckets)
    room = settings.batch_size * cost.max() / (PART if settings.barrier == "step" else 1)
    sizes = np.minimum(np.floor(room / cost * (1 + 1e-12)), np.floor(settings.batch_size * tokens.max() / tokens))
    sizes = np.maximum(sizes, 1).astype(np.int64)
    logs = np.rint(np.log(tokens) * 4096).astype(np.int64)
    weights = counts * (logs - int(counts @ logs) // int(counts.sum())) ** 2
    largest = 1
    while largest < sizes.max() and int(weights @ np.minimum(sizes, 2 * largest)) <= CLUMP * int(weights.sum()):
        largest *= 2
    return np.minimum(sizes, largest)


def pack_steps(cost: np.ndarray, size: int) -> np.ndarray:
    """Returns the slot of each micro-batch, int64, with a full last step where a little does it.

    A step of which a part is padding takes as long as a full one. Slots may hold ROOM; and that number of steps which
    is run anyway takes less time if all their slots are filled a little less.

    Args:
        cost: as pack's.
        size: slots of a step.
    """
    slot = pack(cost)
    slots = int(slot.max()) + 1
    for steps in (slots // size, -(-slots // size)):
        if steps and slots % size and EVEN <= slots / (steps * size) <= 1 / EVEN:
            even = pack(cost, steps * size)
            if even.max() + 1 == steps * size:
                return even
    return slot


def pack(cost: np.ndarray, slots: int | None = None) -> np.ndarray:
    """Returns the slot of each micro-batch, int64: dearest first, each goes where most room is left.

    Slots of equal room are filled together, so that the work grows with the number of different costs, not with the
    number of micro-batches.

    Args:
        cost: int64 [M], 1 to UNITS; no slot gets more than ROOM.
        slots: to begin with (None = as many as the costs fill); more are added where something finds no place.
    """
    slot = np.empty(len(cost), np.int64)
    order = np.argsort(-cost, kind="stable")
    values, firsts = np.unique(-cost[order], return_index=True)
    slots = slots or -(-int(cost.sum()) // UNITS)
    rooms, open_slots = [ROOM], {ROOM: [np.arange(slots)]}

    def leave(room: int, numbers: np.ndarray) -> None:
        if room not in open_slots:
            insort(rooms, room)
        open_slots.setdefault(room, []).append(numbers)

    for value, first, last in zip((-values).tolist(), firsts, [*firsts[1:], len(order)], strict=True):
        waiting = order[first:last]
        while len(waiting):
            if not rooms or rooms[-1] < value:  # new slots: as many as these alone would fill
                several = -(-len(waiting) // (UNITS // value))
                leave(ROOM, np.arange(slots, slots + several))
                slots += several
            room = rooms[-1]
            numbers = open_slots[room].pop()
            if not open_slots[room]:
                del open_slots[room]
                del rooms[bisect_left(rooms, room)]
            served = min(len(waiting), len(numbers))
            slot[waiting[:served]] = numbers[:served]
            leave(room - value, numbers[:served])
            if served < len(numbers):
                leave(room, numbers[served:])
            waiting = waiting[served:]
    return np.unique(slot, return_inverse=True)[1]
