"""Cost model: the cost of a sample, fitted to the measured durations of steps, for the plan of the next run."""

from __future__ import annotations

import json
import math
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from videox.data.plan.epoch import EpochPlan
from videox.data.plan.settings import PlanSettings
from videox.distributed.backends import backend_of
from videox.errors import UserError
from videox.files import SEAL, seal_of, write_json_atomically

if TYPE_CHECKING:
    from accelerate import Accelerator

COST_MODEL = "cost_model.json"
MAX_STEPS = 4096  # the most recent steps that are remembered
MIN_STEPS = 12  # with fewer steps nothing is fitted
ROUNDS, HUBER = 12, 1.345  # rounds of reweighting; Huber's constant (95 % efficiency for normally distributed errors)


class Fit(NamedTuple):
    """Seconds of a micro-batch of B samples of S tokens: linear * B * S + quadratic * B * S^2 + fixed.

    fixed: further seconds of each step; error: median relative error of a step's time; steps: number of steps in the
    fit.
    """

    linear: float
    quadratic: float
    fixed: float
    error: float
    steps: int


def step_sizes(
    plan: EpochPlan, epoch_step: int, world_size: int, barrier: str, cost: tuple[float, float]
) -> tuple[float, float]:
    """Return the sums of B * S and of B * S^2 over the micro-batches that determine the duration of a step.

    They are those of the most expensive rank, or at each micro-batch of the rank that is the most expensive there.

    Args:
        barrier: where ranks synchronize, one of BARRIERS.
        cost: a and b of the cost a*S + b*S^2 by which ranks are compared.
    """
    tokens, samples, slot, place = plan.shape_of_step(epoch_step)
    micro = slot // world_size * (int(place.max()) + 1) + place
    sizes = np.zeros((world_size, int(micro.max()) + 1, 2))
    sizes[slot % world_size, micro, 0] = samples * tokens
    sizes[slot % world_size, micro, 1] = samples * tokens.astype(np.float64) ** 2
    costs = sizes @ np.array(cost)
    chosen = sizes[costs.argmax(0), np.arange(sizes.shape[1])] if barrier == "micro" else sizes[costs.sum(1).argmax()]
    return float(chosen[:, 0].sum()), float(chosen[:, 1].sum())


def fit(sizes: np.ndarray, seconds: np.ndarray) -> Fit | None:
    """Fit the cost model to measured steps, by least squares of relative errors with Huber's weights.

    Coefficients are not negative: where the best fit has a negative one, it is left out. Returns None where there are
    too few steps, or steps of one size only, which do not determine two coefficients.

    Args:
        sizes: float64 [N, 2], as returned by step_sizes.
        seconds: float64 [N], above 0.
    """
    if len(seconds) < MIN_STEPS:
        return None
    scale = np.append(sizes.max(0), 1.0)
    # divided by the measured seconds, so that the errors are relative; scaled, so that columns are comparable
    columns = np.column_stack([sizes, np.ones(len(sizes))]) / scale / seconds[:, None]
    # steps of a single size cannot tell the linear from the quadratic coefficient
    if np.linalg.matrix_rank(columns[:, :2] * seconds[:, None], tol=1e-6) < 2:
        return None
    weights, solution = np.ones(len(seconds)), np.zeros(3)
    for _ in range(ROUNDS):
        solution = _non_negative_least_squares(columns * weights[:, None], weights)
        errors = np.abs(columns @ solution - 1)
        # the median absolute error of a normal distribution is 0.6745 standard deviations
        scale_of_errors = max(float(np.median(errors)) / 0.6745, 1e-9)
        weights = np.sqrt(np.minimum(1, HUBER * scale_of_errors / np.maximum(errors, 1e-12)))
    linear, quadratic, fixed = (solution / scale).tolist()
    if linear == 0 and quadratic == 0:
        return None
    return Fit(linear, quadratic, fixed, float(np.median(np.abs(columns @ solution - 1))), len(seconds))


def _non_negative_least_squares(columns: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return the least squares solution without negative entries: the best over all subsets of columns."""
    best, least_error = np.zeros(columns.shape[1]), math.inf
    for choice in range(1, 2 ** columns.shape[1]):
        used = [i for i in range(columns.shape[1]) if choice >> i & 1]
        solution = np.linalg.lstsq(columns[:, used], target, rcond=None)[0]
        squared_error = float(((columns[:, used] @ solution - target) ** 2).sum())
        if solution.min() >= 0 and squared_error < least_error - 1e-15:
            best, least_error = np.zeros(columns.shape[1]), squared_error
            best[used] = solution
    return best


class StepTimes:
    """Records the size and the duration of each step on the main process, without synchronizing with the device.

    The duration of a step is the time from its record to the next one's, without validation, checkpoints and waiting
    for data. The device is less than a step behind the host, so that a single duration may partly belong to the
    neighbouring step; over many steps this averages out. The first steps, in which kernels are selected and compiled,
    are outliers to the fit.

    Args:
        world_size, barrier, cost: as for step_sizes.
        device: name of the device, for the file.
    """

    def __init__(self, *, world_size: int, barrier: str, cost: tuple[float, float], device: str) -> None:
        self.world_size, self.barrier, self.cost, self.device = world_size, barrier, cost, device
        self._sizes: deque[tuple[float, float]] = deque(maxlen=MAX_STEPS)
        self._seconds: deque[float] = deque(maxlen=MAX_STEPS)

    def add(self, plan: EpochPlan, epoch_step: int, seconds: float) -> None:
        """Record one step."""
        self._sizes.append(step_sizes(plan, epoch_step, self.world_size, self.barrier, self.cost))
        self._seconds.append(seconds)

    def write(self, folder: Path) -> bool:
        """Write cost_model.json if there are enough steps for a fit; return whether it was written."""
        fitted = fit(np.array(self._sizes).reshape(-1, 2), np.array(self._seconds))
        if fitted is None:
            return False
        planned_with = {"cost_linear": self.cost[0], "cost_quadratic": self.cost[1]}
        context = {
            "device": self.device,
            "processes": self.world_size,
            "barrier": self.barrier,
            "planned_with": planned_with,
        }
        content = {**fitted._asdict(), **context}
        write_json_atomically(folder / COST_MODEL, {**content, SEAL: seal_of(content)})
        return True


def read_cost_model(path: Path) -> tuple[float, float]:
    """Read a and b of a sample's cost a*S + b*S^2 from a cost_model.json.

    A file without a seal is of an older version, or written by hand.

    Raises:
        UserError: the file is missing, has changed since it was written, or has no usable pair of numbers.
    """
    hint = "pass the cost_model.json of a run, or omit the flag"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError("--cost_model", f"{path} is not a readable cost model ({error})", hint) from error
    try:
        pair = float(content["linear"]), float(content["quadratic"])
    except (ValueError, KeyError, TypeError) as error:
        what = f"{path} is not a cost model: not a JSON object with numbers `linear` and `quadratic`"
        raise UserError("--cost_model", what, hint) from error
    if SEAL in content and content[SEAL] != seal_of(content):
        what = f"{path} has changed since it was written: its seal does not match"
        raise UserError("--cost_model", what, f"{hint}; numbers of your own need a file without `{SEAL}`")
    if not all(math.isfinite(value) and value >= 0 for value in pair) or not any(pair):
        raise UserError(
            "--cost_model",
            f"{path} has linear {pair[0]:g} and quadratic {pair[1]:g}: both must be 0 or more, and one above 0",
            hint,
        )
    return pair


def step_times(accelerator: Accelerator, settings: PlanSettings) -> StepTimes:
    """Return an empty StepTimes for this launch."""
    import torch  # imported here, because read_cost_model does not need it

    device = accelerator.device
    return StepTimes(
        world_size=accelerator.num_processes,
        barrier=backend_of(accelerator).barrier,
        cost=(settings.cost_linear, settings.cost_quadratic),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    )
