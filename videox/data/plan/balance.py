"""Serves the plan and whoever judges it: how evenly ranks are loaded, how varied steps are, what no plan would give.

Two numbers pull against each other. Balance: the share of the ranks' time that is spent working, not waiting for the
dearest rank. Mix: how much more steps differ from each other than steps of randomly drawn samples would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from videox.data.plan.plan import BARRIERS, Columns, EpochPlan, PlanSettings, check_world_size, plan_epoch, sample_cost
from videox.rng import Purpose, hash_key
from videox.shapes import token_count


@dataclass(frozen=True)
class PlanBalance:
    """How an epoch loads so many processes.

    Attributes:
        balance: as `balance` returns it.
        unplanned: the same without a plan; None where the data is too small for one step of that.
        mix: as `mix` returns it.
        steps: of the epoch.
        padded: share of its slots that hold nothing but padding, 0 to 1.
    """

    balance: float
    unplanned: float | None
    step_variance_ratio: float
    steps: int
    padded: float


def loads(
    columns: Columns, settings: PlanSettings, accumulation: int, worlds: Sequence[int]
) -> dict[int, PlanBalance]:
    """Returns a PlanBalance for each number of processes, of the plan that a run has which begins with so many."""
    found = {}
    for world in worlds:
        own = replace(settings, slots=world * accumulation)
        plan = plan_epoch(columns, own, 0)
        bucket = np.repeat(plan.micro_bucket, np.diff(plan.micro_first))
        costs = unplanned(
            sample_cost(own, plan.buckets)[bucket], bucket, batch_size=settings.batch_size, ranks=world,
            accumulation=accumulation, seed=settings.seed,
        )  # fmt: skip
        filled = (len(plan.slot_first) - 1) / (plan.n_steps * plan.slots)
        without = balance(costs, own.barrier) if len(costs) else None
        planned, mixed_so = balance_and_mix(plan, own, world)
        found[world] = PlanBalance(planned, without, mixed_so, plan.n_steps, 1 - filled)
    return found


def balance_and_mix(
    plan: EpochPlan, settings: PlanSettings, world_size: int, barrier: str | None = None
) -> tuple[float, float]:
    """Returns balance efficiency and mix of an epoch as world_size processes run it; barrier: None = the plan's own.

    Raises:
        UserError: world_size does not divide the slots of a step.
    """
    costs, padding = plan_costs(plan, settings, world_size)
    steps = np.arange(len(plan.slot_first) - 1) // plan.slots
    counts = np.diff(plan.micro_first[plan.slot_first])
    tokens = np.array([token_count(bucket) for bucket in plan.buckets])[plan.micro_bucket]
    return (
        balance(costs, barrier or settings.barrier, padding),
        step_variance_ratio(np.repeat(tokens, np.diff(plan.micro_first)), np.repeat(steps, counts)),
    )


def plan_costs(plan: EpochPlan, settings: PlanSettings, world_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (costs, padding), float64 [steps, micro-batches, ranks]: what each rank of a planned epoch computes.

    They are those of EpochPlan.micro_batches: a slot runs on rank slot modulo world_size, and each slot of a step
    takes as many micro-batches as the fullest, where need be of weight 0.

    Raises:
        UserError: world_size does not divide the slots of a step.
    """
    check_world_size(plan.slots, world_size)
    unit = sample_cost(settings, plan.buckets)
    depths = np.zeros((plan.n_steps, plan.slots), np.int64)
    depths.flat[: len(plan.slot_first) - 1] = np.diff(plan.slot_first)
    deepest = depths.max(axis=1)
    slot = np.repeat(np.arange(len(plan.slot_first) - 1), np.diff(plan.slot_first))
    within = np.arange(len(slot)) - plan.slot_first[:-1][slot]
    costs = np.zeros((plan.n_steps * plan.slots, int(deepest.max())))
    costs[slot, within] = unit[plan.micro_bucket] * np.diff(plan.micro_first)
    place = np.arange(costs.shape[1])
    missing = (place >= depths[:, :, None]) & (place < deepest[:, None, None])
    padding = np.zeros(missing.shape)
    for step in np.flatnonzero(missing.any(axis=(1, 2))):
        whole, short = sample_cost(settings, plan.padding_buckets(int(step)))
        padding[step] = missing[step] * np.where(depths[step] > 0, short, whole)[:, None]

    def by_rank(columns: np.ndarray) -> np.ndarray:
        """Turns [steps, slots, depth] into [steps, accumulation x depth, ranks]."""
        split = columns.reshape(plan.n_steps, plan.slots // world_size, world_size, -1)
        return split.transpose(0, 1, 3, 2).reshape(plan.n_steps, -1, world_size)

    return by_rank(costs), by_rank(padding)


def balance(costs: np.ndarray, barrier: str, padding: np.ndarray | float = 0.0) -> float:
    """Returns the balance efficiency in (0, 1]: sum of cost / (ranks x sum over barriers of the largest rank's cost).

    Args:
        costs: float64 [steps, micro-batches, ranks], the cost of each micro-batch's real samples; 0 where none runs.
        barrier: "step": ranks wait for each other once in a step; "micro": in each micro-batch.
        padding: of the same shape, the cost of samples of weight 0: it takes time and counts nothing.
    """
    if barrier not in BARRIERS:
        raise ValueError(f"{barrier!r} is none of {BARRIERS}")
    spent = costs + padding
    slowest = spent.max(axis=2).sum() if barrier == "micro" else spent.sum(axis=1).max(axis=1).sum()
    return float(costs.sum() / (costs.shape[2] * slowest))


def step_variance_ratio(tokens: np.ndarray, step: np.ndarray) -> float:
    """Returns the variance of the step mean of log tokens over that of random steps of the same size; 1 is random.

    Each step's squared deviation is taken over what it would be on average if as many samples were drawn from the
    epoch without replacement, sigma^2 / n x (N - n) / (N - 1), so that a short last step weighs like any other.

    Args:
        tokens: int [N], of each sample.
        step: int [N], the step of each sample, from 0.

    Returns:
        0 where every sample has equally many tokens, 1 where a single step holds everything.
    """
    logs = np.log(tokens.astype(np.float64))
    counts = np.bincount(step)
    counts, sums = counts[counts > 0], np.bincount(step, weights=logs - logs.mean())[counts > 0]
    variance, total = logs.var(), len(logs)
    if len(counts) == 1:
        return 1.0
    if variance < 1e-12:
        return 0.0
    expected = variance / counts * (total - counts) / (total - 1)
    return float(np.mean((sums / counts) ** 2 / expected))


def unplanned(
    cost: np.ndarray, bucket: np.ndarray, *, batch_size: int, ranks: int, accumulation: int = 1, seed: int = 0
) -> np.ndarray:
    """Returns the costs of an epoch in which each rank takes the next batch of one bucket, whatever the others take.

    So does the scheme of the original trainer: sizes are drawn in each process by itself. What does not fill a batch
    makes a smaller one, what does not fill a step is left out.

    Args:
        cost: float64 [N], of each sample.
        bucket: int [N], of each sample, from 0.
        batch_size: samples per batch.
        ranks: processes.
        accumulation: batches per step and process.
        seed: of the order.

    Returns:
        float64 [steps, accumulation, ranks], as `balance` takes it; no steps where the epoch does not fill one.
    """
    order = np.argsort(hash_key(seed, Purpose.ORDER, np.arange(len(cost))), kind="stable")
    order = order[np.argsort(bucket[order], kind="stable")]
    counts = np.bincount(bucket)
    within = np.arange(len(cost)) - np.repeat(np.cumsum(counts) - counts, counts)
    batch = np.cumsum(within % batch_size == 0) - 1
    costs = np.bincount(batch, weights=cost[order])
    costs = costs[np.argsort(hash_key(seed, Purpose.MICRO_BATCH, np.arange(len(costs))), kind="stable")]
    steps = len(costs) // (ranks * accumulation)
    return costs[: steps * ranks * accumulation].reshape(steps, accumulation, ranks)
