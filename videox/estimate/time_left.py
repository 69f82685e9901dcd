"""Time until the end of a run: from the durations of its steps, the planned costs of those to come, and its pauses."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Mapping

import numpy as np

from videox.data.plan.epoch import EpochPlan
from videox.estimate.mfu import Meter

MEMORY = 500  # the most recent steps that the estimate follows
ROUNDS = 12  # of reweighting, towards the least absolute error
PRIOR = 0.3  # weight, in steps, of the assumption that durations are proportional to planned costs
REFRESH = 1.0  # seconds for which an estimate is kept: steps of tiny models take less time than a fit


def fit_durations(costs: np.ndarray, seconds: np.ndarray, expected: float) -> tuple[float, float]:
    """Return (per unit of cost, fixed) of the duration of a step, both 0 or more, with the least absolute error.

    Steps of a size that was not measured yet are assumed to take time in proportion to their cost, which counts as
    PRIOR measured steps. An outlier, such as a first step that compiles kernels, hardly moves the result.

    Args:
        costs: planned costs of the measured steps, float64 [n], n >= 1, above 0.
        seconds: their durations, float64 [n], above 0.
        expected: mean planned cost of the steps to come, above 0.
    """
    scale = float(costs.mean())
    ratio = float(np.median(seconds / costs))
    across = np.append(costs, expected) / scale
    target = np.append(seconds, ratio * expected)
    base = np.append(np.ones(len(costs)), PRIOR)
    weights = base.copy()
    linear, fixed = ratio * scale, 0.0
    floor = 1e-3 * float(np.median(seconds))
    for _ in range(ROUNDS):
        linear, fixed = _line(across, target, weights)
        weights = base / np.maximum(np.abs(linear * across + fixed - target), floor)
    return linear / scale, fixed


def _line(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Return slope and intercept, both 0 or more, of the weighted least squares line."""
    total = weights.sum()
    mean_x, mean_y = float(weights @ x / total), float(weights @ y / total)
    variance = float(weights @ (x - mean_x) ** 2 / total)
    if variance < 1e-9 * mean_x**2:
        return mean_y / mean_x, 0.0  # one size of steps only
    slope = float(weights @ ((x - mean_x) * (y - mean_y)) / total) / variance
    if slope < 0:
        return 0.0, mean_y
    intercept = mean_y - slope * mean_x
    if intercept < 0:
        return float(weights @ (x * y)) / float(weights @ x**2), 0.0
    return slope, intercept


class TimeLeft:
    """Estimates the seconds until the end of a run.

    Args:
        meter: knows the planned cost of each step.
        total: optimizer steps of the whole run.
        every: steps between pauses of a kind, such as {"validation": 100, "save": 500}; each kind also occurs after
            the last step.
    """

    def __init__(self, meter: Meter, total: int, every: Mapping[str, int]) -> None:
        self.meter, self.total, self.every = meter, total, every
        self._costs: deque[float] = deque(maxlen=MEMORY)
        self._seconds: deque[float] = deque(maxlen=MEMORY)
        self._pauses: dict[str, dict[int, float]] = {kind: {} for kind in every}
        self._kept, self._at = 0.0, -1.0

    def add_step(self, plan: EpochPlan, epoch_step: int, seconds: float) -> None:
        """Take note of a step that took `seconds`."""
        self._costs.append(float(self.meter.costs_of_steps(plan)[epoch_step]))
        self._seconds.append(seconds)

    def add_pause(self, kind: str, step: int, seconds: float) -> None:
        """Take note of a pause after `step` optimizer steps; several of a kind at one step count as one."""
        at_step = self._pauses.setdefault(kind, {})
        at_step[step] = at_step.get(step, 0.0) + seconds

    def estimate(self, step: int, plan: EpochPlan, epoch_step: int) -> float:
        """Return the seconds from the end of a step until the end of the run; at least one step was added before.

        Steps of later epochs are assumed to cost what those of this epoch do on average.

        Args:
            step: optimizer steps done.
            plan: of the current epoch.
            epoch_step: index of the last step in it, from 0.
        """
        now = time.monotonic()
        if len(self._seconds) > 20 and self._at > 0 and now - self._at < REFRESH:
            return max(self._kept - (now - self._at), 0.0)
        costs = self.meter.costs_of_steps(plan)
        left = max(self.total - step, 0)
        of_epoch = costs[epoch_step + 1 :][:left]
        cost_left = float(of_epoch.sum()) + (left - len(of_epoch)) * float(costs.mean())
        pauses = sum(self._pauses_left(kind, step) for kind in self.every)
        linear, fixed = 0.0, 0.0
        if left:
            linear, fixed = fit_durations(np.array(self._costs), np.array(self._seconds), cost_left / left)
        self._kept, self._at = linear * cost_left + fixed * left + pauses, now
        return self._kept

    def _pauses_left(self, kind: str, step: int) -> float:
        measured, every = self._pauses.get(kind), self.every[kind]
        if not measured or step >= self.total:
            return 0.0
        count = (self.total - 1) // every - step // every + 1
        return count * statistics.median(measured.values())
