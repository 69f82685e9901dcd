"""Serves the plan: which slots run side by side, so that no rank waits and each step stays as varied as the data.

Two rules of combination do all the work. `equal_sums` puts slots together whose sum is alike: a rank's slots of a step
by cost, or a step's micro-steps by log tokens. `side_by_side` and `levelled` put slots next to each other which cost
alike, while the log tokens of what stands together stay near their mean, or make up for what else a step has. How far
they may stray is chosen on a part of the epoch, by the two numbers of balance.py. Whole numbers throughout: no machine
rounds them otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import numpy as np

WINDOW, WINDOW_SLOTS = 32, 2048  # steps, and slots, that are dealt together at least, from a random part of the epoch
SAMPLE = 32768  # slots, about, on which the candidates are compared
DRIFTS = (
    0.0,
    0.7,
    1.0,
    1.3,
    1.8,
    3.0,
    5.0,
    8.0,
    13.0,
    21.0,
    math.inf,
)  # rms of a step's mean, 1 = as random steps have it
BLOCKS = (128, 64, 32, 16, 8, 4, 2)  # steps whose slots cost alike as a whole
FEW, BY = (1, 2), ("cost", "deviation")  # micro-steps that level a step, and what they have least of
# mix to stay below: with several slots for each rank of a step where balance is GOOD with that; else
VARIED, LIMIT = 1.9, 3.6
CEILING = 4.0  # mix that no epoch passes: what turns out to, though its part of the epoch did not, is dealt anew
GOOD, NO_MATTER = 0.95, 0.002  # balance; a difference of it that is not worth a worse mix
PASSES = 4  # over pairs of sums that are split anew


@dataclass(frozen=True)
class SlotCosts:
    """The slots of an epoch, to be dealt: int64 columns, one entry per slot.

    cost: of the slot's samples; deviation: sum over them of log tokens less their mean; samples: their number.
    """

    cost: np.ndarray
    deviation: np.ndarray
    samples: np.ndarray

    def at(self, slots: np.ndarray) -> SlotCosts:
        """Returns the slots chosen, in the shape of `slots`."""
        return SlotCosts(self.cost[slots], self.deviation[slots], self.samples[slots])


def take(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Returns values [n, m] in the order [n, ...], in its shape."""
    return np.take_along_axis(values, order.reshape(len(order), -1), 1).reshape(order.shape)


def equal_sums(values: np.ndarray, size: int) -> np.ndarray:
    """Returns groups whose sums of values are nearly equal: positions int64 [n, m / size, size] in values [n, m].

    In rounds the next largest values go to the groups with the least sum (longest processing time first, of Graham,
    "Bounds on multiprocessing timing anomalies", 1969, with equally many to each); where groups are small, pairs of
    them are then split anew, in the best of all ways.
    """
    n, m = values.shape
    groups = m // size
    order = np.argsort(-values, axis=1, kind="stable").reshape(n, size, groups)
    members = np.empty((n, groups, size), np.int64)
    members[:, :, 0] = order[:, 0]
    total = take(values, order[:, 0])
    for turn in range(1, size):
        least = np.argsort(total, axis=1, kind="stable")
        members[:, :, :turn] = np.take_along_axis(members[:, :, :turn], least[:, :, None], 1)
        members[:, :, turn] = order[:, turn]
        total = take(total, least) + take(values, order[:, turn])
    return _split_anew(values, members) if 1 < size <= 4 and groups > 1 else members


def _split_anew(values: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Pairs the largest sums with the least and splits what a pair has together as evenly as it can be."""
    n, groups, size = members.shape
    halves = [half for half in combinations(range(2 * size), size) if 0 in half]
    signs = -np.ones((len(halves), 2 * size))
    split = np.empty((len(halves), 2 * size), np.int64)
    for number, half in enumerate(halves):
        signs[number, half] = 1
        split[number] = [*half, *(i for i in range(2 * size) if i not in half)]
    rows, pairs = np.arange(n)[:, None], groups // 2
    for turn in range(PASSES):
        order = np.argsort(take(values, members).sum(2), axis=1, kind="stable")
        low, high = order[:, :pairs], order[:, groups - pairs :]
        high = high[:, ::-1] if turn % 2 == 0 else high
        both = np.concatenate([members[rows, low], members[rows, high]], axis=2)
        gap = np.abs(take(values, both).astype(np.float64) @ signs.T)  # whole numbers below 2^53, exact
        both = np.take_along_axis(both, split[gap.argmin(2)], 2)
        members[rows, low], members[rows, high] = both[:, :, :size], both[:, :, size:]
    return members


def side_by_side(worth: np.ndarray, deviation: np.ndarray, width: int, given: np.ndarray) -> np.ndarray:
    """Returns positions int64 [n, m / width, width]: what stands in a row is worth alike, and is level with `given`.

    Sorted by worth, each row takes as many from the dear end, and the rest from the cheap end, as bring its sum of
    deviations and what is given nearest to the mean of what is left. So the first rows have the most to choose from.

    Args:
        worth: int64 [n, m]: what slots are sorted by, their cost or deviation.
        deviation: int64 [n, m], given: int64 [n, m / width]: what shall be level, of a slot, and of a row besides.
    """
    n, m = worth.shape
    order = np.argsort(-worth, axis=1, kind="stable")
    sums = np.zeros((n, m + 1), np.int64)
    np.cumsum(take(deviation, order), axis=1, out=sums[:, 1:])
    places = np.empty((n, m // width, width), np.int64)
    rows, dear = np.arange(n), np.arange(width + 1)
    low, high = np.zeros(n, np.int64), np.full(n, m)
    for place in range(m // width):
        rest = sums[rows, high] - sums[rows, low] + given[:, place:].sum(1)
        aim = rest // (m // width - place) - given[:, place]
        first = sums[rows[:, None], low[:, None] + dear] - sums[rows, low][:, None]
        last = sums[rows, high][:, None] - sums[rows[:, None], high[:, None] - width + dear]
        taken = np.abs(first + last - aim[:, None]).argmin(1)
        turn = dear[None, :-1]
        places[:, place] = np.where(turn < taken[:, None], low[:, None] + turn, high[:, None] - width + turn)
        low, high = low + taken, high - (width - taken)
    return take(order, places)


def straying(cost: np.ndarray, deviation: np.ndarray, width: int, stray: float) -> np.ndarray:
    """Returns positions int64 [n, m / width, width]: what stands in a row costs alike, and strays by `stray` at most.

    Rows' sums of deviations fall evenly from the first to the last, with an rms of `stray` around the mean: the first
    rows take what is dearest, and of the cheapest, whose tokens are far below the mean, what it takes to make up for
    it. Infinity sorts by cost alone; 0 holds every row at the mean.
    """
    n, m = cost.shape
    if math.isinf(stray):
        return np.argsort(-cost, axis=1, kind="stable").reshape(n, m // width, width)
    rows = m // width
    fall = int(2 * math.sqrt(3) * stray / max(rows - 1, 1))
    return side_by_side(cost, deviation, width, np.tile(fall * np.arange(1 - rows, 1), (n, 1)))


def levelled(cost: np.ndarray, deviation: np.ndarray, width: int, block: int) -> np.ndarray:
    """Returns positions int64 [n, m / width, width]: blocks of rows cost alike, deviations are levelled."""
    n, m = cost.shape
    rows = m // width
    order = np.argsort(-cost, axis=1, kind="stable")
    parts = [(first, min(block, rows - first)) for first in range(0, rows, block)]
    whole = [part for part in parts if part[1] == block]
    found = []
    for some in (whole, parts[len(whole) :]):
        if some:
            count, length = len(some), some[0][1] * width
            chunk = order[:, some[0][0] * width :][:, : count * length].reshape(n * count, length)
            groups = equal_sums(take(np.repeat(deviation, count, axis=0), chunk), width)
            found.append(take(chunk, groups).reshape(n, -1, width))
    return np.concatenate(found, axis=1)


@dataclass(frozen=True)
class Dealing:
    """How a window of slots becomes steps.

    ranks, accumulation: of the launch that the plan is made for; barrier: one of BARRIERS; stray: as side_by_side's,
    in units of what a random step's sum of deviations has; block: as levelled's, 0 for straying; few: so many of a
    step's micro-steps make the step as varied as the data, and the others need not be, 0 for all; by: what those few
    have least of, one of BY; shuffled: as the slots come, which is at random.
    """

    ranks: int
    accumulation: int
    barrier: str
    stray: float = 0.0
    block: int = 0
    few: int = 0
    by: str = "cost"
    shuffled: bool = False

    def steps(self, deck: SlotCosts, spread: float) -> np.ndarray:
        """Returns positions int64 [n, steps, accumulation, ranks] in a deck of columns [n, m].

        Args:
            spread: rms of the sum of deviations of one random slot.
        """
        n, m = deck.cost.shape
        shape = (n, m // (self.ranks * self.accumulation), self.accumulation, self.ranks)
        if self.shuffled:
            return np.tile(np.arange(m), (n, 1)).reshape(shape)
        if self.few:
            return self._by_few(deck, shape)
        if self.accumulation == 1 or self.barrier == "micro":
            rows = self._rows(deck.cost, deck.deviation, spread)
            if self.accumulation == 1:
                return rows.reshape(shape)
            groups = equal_sums(take(deck.deviation, rows).sum(2), self.accumulation)
            return np.take_along_axis(rows, groups.reshape(n, -1)[:, :, None], 1).reshape(shape)
        bins = equal_sums(deck.cost, self.accumulation)
        cost, deviation = take(deck.cost, bins).sum(2), take(deck.deviation, bins).sum(2)
        rows = self._rows(cost, deviation, spread * math.sqrt(self.accumulation))
        dealt = np.take_along_axis(bins, rows.reshape(n, -1)[:, :, None], 1)
        return dealt.reshape(n, -1, self.ranks, self.accumulation).transpose(0, 1, 3, 2)

    def _by_few(self, deck: SlotCosts, shape: tuple[int, int, int, int]) -> np.ndarray:
        """Returns steps whose micro-steps are sorted by cost, but for a few that make up for what the others are."""
        n, steps, accumulation, ranks = shape
        worth = getattr(deck, self.by)
        order = np.argsort(-worth, axis=1, kind="stable")
        others, few = np.split(order, [steps * (accumulation - self.few) * ranks], axis=1)
        rows = take(others, np.argsort(-take(deck.cost, others), axis=1, kind="stable")).reshape(n, -1, ranks)
        sums = take(deck.deviation, rows).sum(2)
        groups = equal_sums(sums, accumulation - self.few)
        given = take(sums, groups).sum(2)
        # those farthest from the mean come first, while there is much to choose from
        far = np.argsort(-np.abs(given - given.sum(1, keepdims=True) // steps), axis=1, kind="stable")
        groups, given = np.take_along_axis(groups, far[:, :, None], 1), take(given, far)
        kept = np.take_along_axis(rows, groups.reshape(n, -1)[:, :, None], 1).reshape(n, steps, -1, ranks)
        found = side_by_side(take(worth, few), take(deck.deviation, few), self.few * ranks, given)
        found = take(few, found)
        found = np.take_along_axis(found, np.argsort(-take(deck.cost, found), axis=2, kind="stable"), 2)
        return np.concatenate([kept, found.reshape(n, steps, self.few, ranks)], axis=2)

    def _rows(self, cost: np.ndarray, deviation: np.ndarray, spread: float) -> np.ndarray:
        if self.block:
            return levelled(cost, deviation, self.ranks, self.block)
        if math.isinf(self.stray) or spread == 0:  # where all slots have equal tokens, any order strays by nothing
            return straying(cost, deviation, self.ranks, math.inf)
        return straying(cost, deviation, self.ranks, self.stray * spread * math.sqrt(self.ranks))


def judge(deck: SlotCosts, steps: np.ndarray, barrier: str, spread: float) -> tuple[float, float]:
    """Returns (balance, mix) of steps [n, steps, accumulation, ranks]: balance.py's numbers, in whole numbers.

    Args:
        spread: rms of one random sample's deviation.
    """
    flat = steps.reshape(len(steps), -1)
    cost, deviation, samples = (take(c, flat).reshape(-1, *steps.shape[2:]) for c in vars(deck).values())
    slowest = cost.max(2).sum() if barrier == "micro" else cost.sum(1).max(1).sum()
    balance = int(cost.sum()) / (int(slowest) * steps.shape[3])
    strayed, counts = deviation.sum((1, 2)).tolist(), samples.sum((1, 2)).tolist()
    if spread == 0:
        return balance, 0.0
    mixed = math.fsum(d * d / c for d, c in zip(strayed, counts, strict=True)) / (len(counts) * spread**2)
    return balance, mixed


def choose(
    windows: SlotCosts, dealing: partial[Dealing], spread: float, per_slot: float, strict: bool
) -> list[Dealing]:
    """Returns how to deal an epoch, by what the candidates give on some windows of it, and what else if that fails.

    Strict takes the best balance. Otherwise steps are kept about as varied as the data: where ranks have several slots
    the best balance below VARIED is taken if it is GOOD, else the best below LIMIT. In its stead come those that are
    more varied, the least so first. As they come at random, slots are always varied enough.

    Args:
        dealing: Dealing with ranks, accumulation and barrier.
        spread: rms of one random sample's deviation; per_slot: of one slot's sum of deviations.
    """
    ways = [dealing(stray=drift) for drift in DRIFTS] + [dealing(block=block) for block in BLOCKS]
    ways.append(dealing(shuffled=True))
    barrier, several = ways[0].barrier, ways[0].accumulation > 1
    if several:
        few = [dealing(barrier="micro", few=few, by=by) for few in FEW if few < ways[0].accumulation for by in BY]
        # what is balanced in each micro-batch is so in their sum
        ways += few if barrier == "micro" else [*few, *(dealing(barrier="micro", stray=drift) for drift in DRIFTS)]
    found = [(*judge(windows, way.steps(windows, per_slot), barrier, spread), way) for way in ways]
    by_mix = sorted(found, key=lambda each: -each[1])
    for limit, enough in ((math.inf, 0.0),) if strict else ((VARIED, GOOD if several else math.inf), (LIMIT, 0.0)):
        fit = [each for each in found if each[1] <= limit]
        best = max((balance for balance, _, _ in fit), default=-1.0)
        if fit and best >= enough:
            first = min((each for each in fit if each[0] >= best - NO_MATTER), key=lambda each: each[1])
            return [first[2], *(way for _, mixed, way in by_mix if mixed < first[1]), ways[-1]]
    return [*(way for *_, way in by_mix[-1:]), ways[-1]]


def assign_slots(
    deck: SlotCosts, *, ranks: int, accumulation: int, barrier: str, spread: float, strict: bool
) -> np.ndarray:
    """Returns the slots of an epoch's full steps, int64 [steps, accumulation, ranks]; steps are in no order.

    Args:
        deck: its slots in random order; what does not fill a step, the last of them, is left out.
        ranks, accumulation: of the launch that the plan is made for.
        barrier: one of BARRIERS.
        spread: rms of one sample's deviation.
        strict: balance alone counts.
    """
    size = ranks * accumulation
    count = len(deck.cost) // size
    if count == 0:
        return np.empty((0, accumulation, ranks), np.int64)
    windows = -(-count // max(WINDOW, WINDOW_SLOTS // size))
    short, longer = count // windows, count % windows  # steps of a window; so many windows have one more
    cut = longer * (short + 1) * size
    parts = [
        np.arange(start, stop).reshape(-1, steps * size)
        for start, stop, steps in ((0, cut, short + 1), (cut, count * size, short))
    ]
    per_slot = math.sqrt(int((deck.deviation**2).sum()) / len(deck.cost))
    first = max(parts, key=len)
    some = deck.at(first[: max(SAMPLE // first.shape[1], 1)])
    whole, dealt = deck.at(np.arange(count * size)[None]), np.empty(0, np.int64)
    for way in choose(some, partial(Dealing, ranks, accumulation, barrier=barrier), spread, per_slot, strict):
        found = [take(part, way.steps(deck.at(part), per_slot)) for part in parts if len(part)]
        dealt = np.concatenate([steps.reshape(-1, accumulation, ranks) for steps in found])
        # of the epoch's samples, without replacement
        mixed = judge(whole, dealt[None], barrier, spread)[1] * count / max(count - 1, 1)
        if strict or mixed <= CEILING:
            break
    return dealt
