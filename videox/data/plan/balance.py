"""Metrics of a plan: how evenly ranks are loaded, how varied steps are, and what both would be without a plan.

The two metrics compete. Balance: the share of the ranks' time spent computing, not waiting for the slowest rank. Step
variance ratio ("mix" in reports): the variance of the step composition relative to random steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from videox.data.plan.epoch import EpochPlan, check_world_size
from videox.data.plan.plan import plan_epoch
from videox.data.plan.settings import BARRIERS, PlanColumns, PlanSettings, launch_cost, sample_cost
from videox.rng import Purpose, hash_key


@dataclass(frozen=True)
class PlanBalance:
    """The metrics of an epoch on one number of processes.

    Attributes:
        balance: as `balance` returns it.
        unplanned: the balance without a plan; None where the data does not fill one step in that case.
        step_variance_ratio: as `step_variance_ratio` returns it.
        steps: optimizer steps of the epoch.
        padded: share of the epoch's slots that contain nothing but padding, 0 to 1.
    """

    balance: float
    unplanned: float | None
    step_variance_ratio: float
    steps: int
    padded: float


def balance_by_world_size(
    columns: PlanColumns, settings: PlanSettings, accumulation: int, worlds: Sequence[int]
) -> dict[int, PlanBalance]:
    """Return a PlanBalance for each number of processes, each for the plan of a run launched with that number."""
    by_world = {}
    for world in worlds:
        world_settings = replace(settings, slots=world * accumulation)
        plan = plan_epoch(columns, world_settings, 0)
        bucket = np.repeat(plan.micro_bucket, np.diff(plan.micro_first))
        costs = unplanned_costs(
            sample_cost(world_settings, plan.buckets)[bucket], bucket, batch_size=settings.batch_size, data_groups=world,
            accumulation=accumulation, seed=settings.seed, launch=launch_cost(world_settings),
        )  # fmt: skip
        filled = (len(plan.slot_first) - 1) / (plan.n_steps * plan.slots)
        without = balance(costs, world_settings.barrier) if len(costs) else None
        planned, variance_ratio = balance_and_variance_ratio(plan, world_settings, world)
        by_world[world] = PlanBalance(planned, without, variance_ratio, plan.n_steps, 1 - filled)
    return by_world


def balance_and_variance_ratio(
    plan: EpochPlan, settings: PlanSettings, data_groups: int, barrier: str | None = None
) -> tuple[float, float]:
    """Return (balance, step variance ratio) of an epoch on world_size ranks.

    Args:
        barrier: where ranks synchronize, one of BARRIERS; None = as the plan's settings say.

    Raises:
        UserError: world_size does not divide the slots of a step.
    """
    costs, padding = plan_costs(plan, settings, data_groups)
    steps = np.arange(len(plan.slot_first) - 1) // plan.slots
    counts = np.diff(plan.micro_first[plan.slot_first])
    tokens = np.array(plan.bucket_tokens())[plan.micro_bucket]
    return (
        balance(costs, barrier or settings.barrier, padding),
        step_variance_ratio(np.repeat(tokens, np.diff(plan.micro_first)), np.repeat(steps, counts)),
    )


def plan_costs(plan: EpochPlan, settings: PlanSettings, data_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (costs, padding), float64 [steps, micro-batches, ranks]: cost of each rank's real and padding samples.

    They are those of EpochPlan.micro_batches: a slot runs on rank slot modulo world_size, and each slot of a step has
    as many micro-batches as the fullest one, if necessary of weight 0.

    Raises:
        UserError: world_size does not divide the slots of a step.
    """
    check_world_size(plan.slots, data_groups)
    unit, launch = sample_cost(settings, plan.buckets), launch_cost(settings)
    depths = np.zeros((plan.n_steps, plan.slots), np.int64)
    depths.flat[: len(plan.slot_first) - 1] = np.diff(plan.slot_first)
    deepest = depths.max(axis=1)
    slot = np.repeat(np.arange(len(plan.slot_first) - 1), np.diff(plan.slot_first))
    within = np.arange(len(slot)) - plan.slot_first[:-1][slot]
    costs = np.zeros((plan.n_steps * plan.slots, int(deepest.max())))
    costs[slot, within] = unit[plan.micro_bucket] * np.diff(plan.micro_first) + launch
    position = np.arange(costs.shape[1])
    # a slot has as many padding micro-batches as the fullest slot of its step has more
    missing = (position >= depths[:, :, None]) & (position < deepest[:, None, None])
    padding = np.zeros(missing.shape)
    for step in np.flatnonzero(missing.any(axis=(1, 2))):
        cheapest, smallest = sample_cost(settings, plan.padding_buckets(int(step)))
        padding[step] = missing[step] * (np.where(depths[step] > 0, smallest, cheapest) + launch)[:, None]

    def by_rank(by_slot: np.ndarray) -> np.ndarray:
        """Turn [steps, slots, depth] into [steps, accumulation x depth, ranks]."""
        split = by_slot.reshape(plan.n_steps, plan.slots // data_groups, data_groups, -1)
        return split.transpose(0, 1, 3, 2).reshape(plan.n_steps, -1, data_groups)

    return by_rank(costs), by_rank(padding)


def balance(costs: np.ndarray, barrier: str, padding: np.ndarray | float = 0.0) -> float:
    """Return the balance efficiency in (0, 1]: sum of cost / (ranks x sum over barriers of the largest rank's cost).

    Args:
        costs: float64 [steps, micro-batches, ranks], the cost of each micro-batch's real samples; 0 where none runs.
        barrier: "step": ranks synchronize once per step; "micro": in each micro-batch.
        padding: same shape, the cost of samples of weight 0: they take time but are no useful work.
    """
    if barrier not in BARRIERS:
        raise ValueError(f"{barrier!r} is none of {BARRIERS}")
    spent = costs + padding
    slowest = spent.max(axis=2).sum() if barrier == "micro" else spent.sum(axis=1).max(axis=1).sum()
    return float(costs.sum() / (costs.shape[2] * slowest))


def step_variance_ratio(tokens: np.ndarray, step: np.ndarray) -> float:
    """Return the variance of the step mean of log tokens relative to random steps of the same sizes; 1 = random.

    Each step's squared deviation is divided by its expected value if the step's samples were drawn from the epoch
    without replacement, sigma^2 / n x (N - n) / (N - 1), so that a short last step has the same weight as any other.

    Args:
        tokens: int [N], tokens of each sample.
        step: int [N], the step of each sample, from 0.

    Returns:
        0 where all samples have the same number of tokens, 1 where one step has all samples.
    """
    logs = np.log(tokens.astype(np.float64))
    counts = np.bincount(step)
    counts, sums = counts[counts > 0], np.bincount(step, weights=logs - logs.mean())[counts > 0]
    variance, total = logs.var(), len(logs)
    # with a single step, N - n is 0 and the expected variance too
    if len(counts) == 1:
        return 1.0
    if variance < 1e-12:
        return 0.0
    expected = variance / counts * (total - counts) / (total - 1)
    return float(np.mean((sums / counts) ** 2 / expected))


def unplanned_costs(
    cost: np.ndarray,
    bucket: np.ndarray,
    *,
    batch_size: int,
    data_groups: int,
    accumulation: int = 1,
    seed: int = 0,
    launch: float = 0.0,
) -> np.ndarray:
    """Return the costs of an epoch in which each rank takes the next batch of one bucket, independently of the others.

    This is the scheme of the original trainer, where each process draws sizes independently. The remainder of a bucket
    makes a smaller batch; batches that do not fill a step are left out.

    Args:
        cost: float64 [N], of each sample.
        bucket: int [N], of each sample, from 0.
        batch_size: samples per batch.
        ranks: number of processes.
        accumulation: batches per step and process.
        seed: of the random order.
        launch: cost of a batch besides that of its samples.

    Returns:
        float64 [steps, accumulation, ranks], as `balance` takes it; no steps where the epoch does not fill one.
    """
    order = np.argsort(hash_key(seed, Purpose.ORDER, np.arange(len(cost))), kind="stable")
    order = order[np.argsort(bucket[order], kind="stable")]
    counts = np.bincount(bucket)
    within = np.arange(len(cost)) - np.repeat(np.cumsum(counts) - counts, counts)
    batch = np.cumsum(within % batch_size == 0) - 1
    costs = np.bincount(batch, weights=cost[order]) + launch
    costs = costs[np.argsort(hash_key(seed, Purpose.MICRO_BATCH, np.arange(len(costs))), kind="stable")]
    steps = len(costs) // (data_groups * accumulation)
    return costs[: steps * data_groups * accumulation].reshape(steps, accumulation, data_groups)
