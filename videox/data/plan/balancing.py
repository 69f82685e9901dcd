"""Balancing: which slots run side by side, so that no rank waits and each step stays as varied as the data.

Two kinds of grouping do all the work. `equal_sums` makes groups with nearly equal sums: the slots of one rank in a
step by cost, or the micro-steps of a step by log tokens. `rows_from_both_ends` and `rows_in_blocks` put slots of
similar cost into one row, which the ranks run at the same time, while the log tokens of a row stay near their mean or
compensate for the rest of the step. How far they may drift is chosen on a part of the epoch, by the two metrics of
balance.py.

All arithmetic that decides an order is on integers, which no machine rounds differently: every rank computes the plan
independently, and all must get the same one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import numpy as np

# Slots are grouped in windows of at least this many steps and slots, each a random part of the epoch: large enough to
# have slots of similar cost, and small because rows_from_both_ends loops over the rows of a window (of all at once).
WINDOW_STEPS, WINDOW_SLOTS = 32, 2048
SAMPLE_SLOTS = 32768  # strategies are compared on about this many slots, so that planning time does not grow with them
# Strategies: how far the log tokens of the slots side by side may drift from the mean (rms, 1 = as random slots do),
MAX_DRIFTS = (0.0, 0.7, 1.0, 1.3, 1.8, 3.0, 5.0, 8.0, 13.0, 21.0, math.inf)
BLOCK_STEPS = (128, 64, 32, 16, 8, 4, 2)  # or within how many steps of similar cost the log tokens are evened out,
# or how many micro-steps of a step compensate for the others, and what these slots are the smallest in.
CORRECTIONS, CORRECT_BY = (1, 2), ("cost", "deviation")
# Limits on the step variance ratio (1 = random steps): with several slots per rank and step PREFERRED_RATIO, if the
# balance is at least GOOD_BALANCE within it; else ACCEPTED_RATIO.
PREFERRED_RATIO, ACCEPTED_RATIO = 1.9, 3.6
# Limit for the whole epoch, above ACCEPTED_RATIO, which is measured on a part of it only. A strategy that exceeds this
# limit on the whole epoch is replaced by the next one.
MAX_VARIANCE_RATIO = 4.0
GOOD_BALANCE, BALANCE_TOLERANCE = 0.95, 0.002  # a difference of the tolerance is not worth a larger variance ratio
RESPLIT_PASSES = 4  # passes over pairs of groups whose members are split again


@dataclass(frozen=True)
class SlotCosts:
    """The slots of an epoch that are to be assigned: int64 columns, one entry per slot.

    cost: of the slot's samples; deviation: sum over its samples of log tokens minus their mean over the epoch;
    samples: their number.
    """

    cost: np.ndarray
    deviation: np.ndarray
    samples: np.ndarray

    def at(self, slots: np.ndarray) -> SlotCosts:
        """Return the selected slots, in the shape of `slots`."""
        return SlotCosts(self.cost[slots], self.deviation[slots], self.samples[slots])


def gather(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Return values [n, m] in the order [n, ...], in the shape of the order."""
    return np.take_along_axis(values, order.reshape(len(order), -1), 1).reshape(order.shape)


def equal_sums(values: np.ndarray, size: int) -> np.ndarray:
    """Return groups with nearly equal sums of values: positions int64 [n, m / size, size] in values [n, m].

    In rounds the next largest values go to the groups with the smallest sums (longest processing time first, of
    Graham, "Bounds on multiprocessing timing anomalies", 1969, with the same number to each group). Small groups are
    improved afterwards: the members of pairs of groups are split again, in the best of all possible ways.
    """
    n, m = values.shape
    groups = m // size
    order = np.argsort(-values, axis=1, kind="stable").reshape(n, size, groups)
    members = np.empty((n, groups, size), np.int64)
    members[:, :, 0] = order[:, 0]
    total = gather(values, order[:, 0])
    for place in range(1, size):
        # groups in order of their sum so far: the smallest sum gets the largest value of this round
        by_total = np.argsort(total, axis=1, kind="stable")
        members[:, :, :place] = np.take_along_axis(members[:, :, :place], by_total[:, :, None], 1)
        members[:, :, place] = order[:, place]
        total = gather(total, by_total) + gather(values, order[:, place])
    # up to 4 members a pair has at most 35 different splits, so all of them can be tried
    return _resplit_pairs(values, members) if 1 < size <= 4 and groups > 1 else members


def _resplit_pairs(values: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Pair groups with the largest and the smallest sums, and split the members of each pair as evenly as possible."""
    n, groups, size = members.shape
    # member 0 is always in the first half: a split and its mirror image are the same
    halves = [half for half in combinations(range(2 * size), size) if 0 in half]
    signs = -np.ones((len(halves), 2 * size))
    split = np.empty((len(halves), 2 * size), np.int64)
    for number, half in enumerate(halves):
        signs[number, half] = 1
        split[number] = [*half, *(i for i in range(2 * size) if i not in half)]
    row, pairs = np.arange(n)[:, None], groups // 2
    for turn in range(RESPLIT_PASSES):
        order = np.argsort(gather(values, members).sum(2), axis=1, kind="stable")
        smallest, largest = order[:, :pairs], order[:, groups - pairs :]
        # every other pass pairs the groups differently, or the same pairs would be split again
        largest = largest[:, ::-1] if turn % 2 == 0 else largest
        pair = np.concatenate([members[row, smallest], members[row, largest]], axis=2)
        difference = np.abs(gather(values, pair).astype(np.float64) @ signs.T)  # exact: integers below 2^53
        pair = np.take_along_axis(pair, split[difference.argmin(2)], 2)
        members[row, smallest], members[row, largest] = pair[:, :, :size], pair[:, :, size:]
    return members


def rows_from_both_ends(key: np.ndarray, deviation: np.ndarray, width: int, offset: np.ndarray) -> np.ndarray:
    """Return rows of slots, positions int64 [n, m / width, width], whose deviations plus offset are near the mean.

    The slots are sorted by key. Each row takes as many from the top and the rest from the bottom as bring its sum of
    deviations plus its offset nearest to the mean of what remains. The first rows have the most to choose from.

    Args:
        key: int64 [n, m]: the sort key of a slot, its cost or deviation.
        deviation: int64 [n, m]: the deviation of a slot.
        width: slots per row.
        offset: int64 [n, m / width]: a deviation to compensate for, of a row.
    """
    n, m = key.shape
    order = np.argsort(-key, axis=1, kind="stable")
    sums = np.zeros((n, m + 1), np.int64)  # prefix sums: the deviation of any run of slots is one subtraction
    np.cumsum(gather(deviation, order), axis=1, out=sums[:, 1:])
    positions = np.empty((n, m // width, width), np.int64)
    windows, counts = np.arange(n), np.arange(width + 1)
    top, bottom = np.zeros(n, np.int64), np.full(n, m)
    for row in range(m // width):
        remaining = sums[windows, bottom] - sums[windows, top] + offset[:, row:].sum(1)
        target = remaining // (m // width - row) - offset[:, row]
        top_sum = sums[windows[:, None], top[:, None] + counts] - sums[windows, top][:, None]
        bottom_sum = sums[windows, bottom][:, None] - sums[windows[:, None], bottom[:, None] - width + counts]
        n_top = np.abs(top_sum + bottom_sum - target[:, None]).argmin(1)
        column = counts[None, :-1]
        positions[:, row] = np.where(column < n_top[:, None], top[:, None] + column, bottom[:, None] - width + column)
        top, bottom = top + n_top, bottom - (width - n_top)
    return gather(order, positions)


def rows_with_drift(cost: np.ndarray, deviation: np.ndarray, width: int, drift: float) -> np.ndarray:
    """Return rows of similar cost, positions int64 [n, m / width, width], that drift from the mean by `drift` (rms).

    The rows' sums of deviations decrease evenly from the first row to the last, with an rms of `drift` around the
    mean: the first rows take the most expensive slots and, from the cheapest, whose tokens are far below the mean, as
    many as compensate for them. Infinity sorts by cost alone; 0 keeps every row at the mean.
    """
    n, m = cost.shape
    if math.isinf(drift):
        return np.argsort(-cost, axis=1, kind="stable").reshape(n, m // width, width)
    rows = m // width
    # a uniform distribution of width w has an rms of w / (2 sqrt(3))
    slope = int(2 * math.sqrt(3) * drift / max(rows - 1, 1))
    return rows_from_both_ends(cost, deviation, width, np.tile(slope * np.arange(1 - rows, 1), (n, 1)))


def rows_in_blocks(cost: np.ndarray, deviation: np.ndarray, width: int, block: int) -> np.ndarray:
    """Return rows of slots, positions int64 [n, m / width, width]: blocks of similar cost, level deviations."""
    n, m = cost.shape
    rows = m // width
    order = np.argsort(-cost, axis=1, kind="stable")
    blocks = [(first, min(block, rows - first)) for first in range(0, rows, block)]
    full_blocks = [one for one in blocks if one[1] == block]
    grouped = []
    # the last block may be shorter, so it is grouped apart from the others
    for same_size in (full_blocks, blocks[len(full_blocks) :]):
        if same_size:
            n_blocks, length = len(same_size), same_size[0][1] * width
            chunk = order[:, same_size[0][0] * width :][:, : n_blocks * length].reshape(n * n_blocks, length)
            groups = equal_sums(gather(np.repeat(deviation, n_blocks, axis=0), chunk), width)
            grouped.append(gather(chunk, groups).reshape(n, -1, width))
    return np.concatenate(grouped, axis=1)


@dataclass(frozen=True)
class Strategy:
    """How a window of slots is grouped into steps.

    ranks, accumulation: of the launch that the plan is made for; barrier: one of BARRIERS; drift: as in
    rows_with_drift, in units of the rms of a random step's sum of deviations; block: rows per block as in
    rows_in_blocks, 0 = use drift; corrections: number of a step's micro-steps that make the step as varied as the
    data, so that the others need not be, 0 = all micro-steps are; correct_by: the correcting slots are the smallest by
    this, one of CORRECT_BY; random: slots stay in the order in which they come, which is random.
    """

    data_groups: int
    accumulation: int
    barrier: str
    drift: float = 0.0
    block: int = 0
    corrections: int = 0
    correct_by: str = "cost"
    random: bool = False

    def build_steps(self, slots: SlotCosts, spread: float) -> np.ndarray:
        """Return steps as positions int64 [n, steps, accumulation, ranks] in `slots`, whose columns are [n, m].

        Args:
            slots: windows of slots.
            spread: rms of the sum of deviations of one random slot.
        """
        n, m = slots.cost.shape
        shape = (n, m // (self.data_groups * self.accumulation), self.accumulation, self.data_groups)
        if self.random:
            return np.tile(np.arange(m), (n, 1)).reshape(shape)
        if self.corrections:
            return self._with_corrections(slots, shape)
        if self.accumulation == 1 or self.barrier == "micro":
            rows = self._rows(slots.cost, slots.deviation, spread)
            if self.accumulation == 1:
                return rows.reshape(shape)
            # rows are level in cost; which of them form a step is free, and chosen so that the steps are varied
            groups = equal_sums(gather(slots.deviation, rows).sum(2), self.accumulation)
            return np.take_along_axis(rows, groups.reshape(n, -1)[:, :, None], 1).reshape(shape)
        # one synchronization per step: only the cost of a rank's slots together counts, so they are chosen first
        bins = equal_sums(slots.cost, self.accumulation)
        cost, deviation = gather(slots.cost, bins).sum(2), gather(slots.deviation, bins).sum(2)
        rows = self._rows(cost, deviation, spread * math.sqrt(self.accumulation))
        members = np.take_along_axis(bins, rows.reshape(n, -1)[:, :, None], 1)
        return members.reshape(n, -1, self.data_groups, self.accumulation).transpose(0, 1, 3, 2)

    def _with_corrections(self, slots: SlotCosts, shape: tuple[int, int, int, int]) -> np.ndarray:
        """Return steps whose micro-steps are sorted by cost, but for a few that compensate the others' deviations."""
        n, steps, accumulation, data_groups = shape
        key = getattr(slots, self.correct_by)
        order = np.argsort(-key, axis=1, kind="stable")
        others, correcting = np.split(order, [steps * (accumulation - self.corrections) * data_groups], axis=1)
        rows = gather(others, np.argsort(-gather(slots.cost, others), axis=1, kind="stable")).reshape(
            n, -1, data_groups
        )
        sums = gather(slots.deviation, rows).sum(2)
        groups = equal_sums(sums, accumulation - self.corrections)
        offset = gather(sums, groups).sum(2)
        # steps farthest from the mean come first, while there are still many slots to choose from
        farthest = np.argsort(-np.abs(offset - offset.sum(1, keepdims=True) // steps), axis=1, kind="stable")
        groups, offset = np.take_along_axis(groups, farthest[:, :, None], 1), gather(offset, farthest)
        main_slots = np.take_along_axis(rows, groups.reshape(n, -1)[:, :, None], 1).reshape(n, steps, -1, data_groups)
        correction = rows_from_both_ends(
            gather(key, correcting), gather(slots.deviation, correcting), self.corrections * data_groups, offset
        )
        correction = gather(correcting, correction)
        correction = np.take_along_axis(
            correction, np.argsort(-gather(slots.cost, correction), axis=2, kind="stable"), 2
        )
        return np.concatenate([main_slots, correction.reshape(n, steps, self.corrections, data_groups)], axis=2)

    def _rows(self, cost: np.ndarray, deviation: np.ndarray, spread: float) -> np.ndarray:
        """Return rows of slots that the ranks run at the same time, by blocks or by drift."""
        if self.block:
            return rows_in_blocks(cost, deviation, self.data_groups, self.block)
        if math.isinf(self.drift) or spread == 0:  # with equal tokens everywhere no order drifts
            return rows_with_drift(cost, deviation, self.data_groups, math.inf)
        return rows_with_drift(cost, deviation, self.data_groups, self.drift * spread * math.sqrt(self.data_groups))


def evaluate(slots: SlotCosts, steps: np.ndarray, barrier: str, spread: float) -> tuple[float, float]:
    """Return (balance, step variance ratio) of steps [n, steps, accumulation, ranks]: as balance.py, on integers.

    Args:
        spread: rms of one random sample's deviation.
    """
    flat = steps.reshape(len(steps), -1)
    cost, deviation, samples = (gather(column, flat).reshape(-1, *steps.shape[2:]) for column in vars(slots).values())
    slowest = cost.max(2).sum() if barrier == "micro" else cost.sum(1).max(1).sum()
    balance = int(cost.sum()) / (int(slowest) * steps.shape[3])
    deviations, counts = deviation.sum((1, 2)).tolist(), samples.sum((1, 2)).tolist()
    if spread == 0:
        return balance, 0.0
    # fsum is exact, so that the order of the steps does not change the last bit
    total = math.fsum(d * d / n for d, n in zip(deviations, counts, strict=True))
    return balance, total / (len(counts) * spread**2)


def rank_strategies(
    windows: SlotCosts, make: partial[Strategy], spread: float, per_slot: float, strict: bool
) -> list[Strategy]:
    """Return the best strategy on some windows of an epoch, and after it those to try if it fails on the whole epoch.

    With `strict` it is the one with the best balance. Otherwise steps are kept about as varied as the data: where
    ranks have several slots per step, the best balance with a ratio up to PREFERRED_RATIO is taken if it is at least
    GOOD_BALANCE, else the best up to ACCEPTED_RATIO. The alternatives are those with more varied steps, in order of
    decreasing ratio. The last one is random order, which is always varied enough.

    Args:
        windows: slots [n, m] on which the strategies are compared.
        make: Strategy with ranks, accumulation and barrier set.
        spread: rms of one random sample's deviation.
        per_slot: rms of one slot's sum of deviations.
        strict: balance alone counts.
    """
    strategies = [make(drift=drift) for drift in MAX_DRIFTS] + [make(block=block) for block in BLOCK_STEPS]
    strategies.append(make(random=True))
    barrier, accumulates = strategies[0].barrier, strategies[0].accumulation > 1
    if accumulates:
        corrected = [
            make(barrier="micro", corrections=count, correct_by=key)
            for count in CORRECTIONS
            if count < strategies[0].accumulation
            for key in CORRECT_BY
        ]
        # slots that are balanced in each micro-batch are balanced in their sum, too
        by_micro_batch = [] if barrier == "micro" else [make(barrier="micro", drift=drift) for drift in MAX_DRIFTS]
        strategies += [*corrected, *by_micro_batch]
    results = [
        (*evaluate(windows, strategy.build_steps(windows, per_slot), barrier, spread), strategy)
        for strategy in strategies
    ]
    by_ratio = sorted(results, key=lambda each: -each[1])
    # (largest ratio, smallest balance that makes it acceptable), in order of preference
    preferences = [(PREFERRED_RATIO, GOOD_BALANCE if accumulates else math.inf), (ACCEPTED_RATIO, 0.0)]
    for limit, enough in [(math.inf, 0.0)] if strict else preferences:
        fitting = [each for each in results if each[1] <= limit]
        best = max((balance for balance, _, _ in fitting), default=-1.0)
        if fitting and best >= enough:
            chosen = min((each for each in fitting if each[0] >= best - BALANCE_TOLERANCE), key=lambda each: each[1])
            return [chosen[2], *(strategy for _, ratio, strategy in by_ratio if ratio < chosen[1]), strategies[-1]]
    return [*(strategy for *_, strategy in by_ratio[-1:]), strategies[-1]]


def assign_slots(
    slots: SlotCosts, *, data_groups: int, accumulation: int, barrier: str, spread: float, strict: bool
) -> np.ndarray:
    """Return the slots of an epoch's full steps, int64 [steps, accumulation, data groups], in any order.

    Args:
        slots: the epoch's slots in random order; the last ones, which do not fill a step, are left out.
        data_groups, accumulation: of the launch that the plan is made for.
        barrier: one of BARRIERS.
        spread: rms of one sample's deviation.
        strict: balance alone counts.
    """
    size = data_groups * accumulation
    count = len(slots.cost) // size
    if count == 0:
        return np.empty((0, accumulation, data_groups), np.int64)
    windows = -(-count // max(WINDOW_STEPS, WINDOW_SLOTS // size))
    base_steps, n_longer = count // windows, count % windows  # steps per window; n_longer windows have one more
    boundary = n_longer * (base_steps + 1) * size
    groups = [
        np.arange(start, stop).reshape(-1, steps * size)
        for start, stop, steps in ((0, boundary, base_steps + 1), (boundary, count * size, base_steps))
    ]
    per_slot = math.sqrt(int((slots.deviation**2).sum()) / len(slots.cost))
    largest = max(groups, key=len)
    sampled = slots.at(largest[: max(SAMPLE_SLOTS // largest.shape[1], 1)])
    epoch_slots, assigned = slots.at(np.arange(count * size)[None]), np.empty(0, np.int64)
    for strategy in rank_strategies(
        sampled, partial(Strategy, data_groups, accumulation, barrier=barrier), spread, per_slot, strict
    ):
        steps_of_groups = [
            gather(group, strategy.build_steps(slots.at(group), per_slot)) for group in groups if len(group)
        ]
        assigned = np.concatenate([steps.reshape(-1, accumulation, data_groups) for steps in steps_of_groups])
        # steps draw the epoch's samples without replacement, which lowers the variance of random steps by this factor
        variance_ratio = evaluate(epoch_slots, assigned[None], barrier, spread)[1] * count / max(count - 1, 1)
        if strict or variance_ratio <= MAX_VARIANCE_RATIO:
            break
    return assigned
