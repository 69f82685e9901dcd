"""Serves the next run's plan: what a sample really costs, fitted to the times of this run's steps."""

from __future__ import annotations

import json
import math
from collections import deque
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator

from videox.data.plan.epoch import EpochPlan
from videox.data.plan.settings import PlanSettings
from videox.distributed.backends import backend_of
from videox.errors import UserError
from videox.files import write_json_atomically

COST_MODEL = "cost_model.json"
REMEMBERED = 4096  # steps, the last ones
LEAST = 12  # steps below which nothing is fitted
ROUNDS, TIGHT = 12, 1.345  # of reweighting, and Huber's constant


class Fit(NamedTuple):
    """Seconds of a micro-batch of B samples of S tokens: linear * B * S + quadratic * B * S^2 + fixed.

    fixed: of each step besides; error: median relative error of a step's time; steps: fitted to.
    """

    linear: float
    quadratic: float
    fixed: float
    error: float
    steps: int


def step_sizes(
    plan: EpochPlan, epoch_step: int, world_size: int, barrier: str, cost: tuple[float, float]
) -> tuple[float, float]:
    """Returns the sums of B * S and of B * S^2 over the micro-batches that a step's time depends on.

    Those are the micro-batches of the dearest rank, or at each of them of the rank that is dearest there.

    Args:
        barrier: one of BARRIERS; cost: a and b by which the plan tells what is dear.
    """
    tokens, samples, slot, place = plan.shape_of_step(epoch_step)
    turn = slot // world_size * (int(place.max()) + 1) + place
    sizes = np.zeros((world_size, int(turn.max()) + 1, 2))
    sizes[slot % world_size, turn, 0] = samples * tokens
    sizes[slot % world_size, turn, 1] = samples * tokens.astype(np.float64) ** 2
    costs = sizes @ np.array(cost)
    chosen = sizes[costs.argmax(0), np.arange(sizes.shape[1])] if barrier == "micro" else sizes[costs.sum(1).argmax()]
    return float(chosen[:, 0].sum()), float(chosen[:, 1].sum())


def fit(sizes: np.ndarray, seconds: np.ndarray) -> Fit | None:
    """Returns the cost model nearest to measured steps, by least squares of relative errors with Huber's weights.

    Coefficients are not negative: where the best has a negative one, that is left out. None where there are too few
    steps, or all of one size, from which two coefficients cannot be told.

    Args:
        sizes: float64 [N, 2], as step_sizes; seconds: float64 [N], above 0.
    """
    if len(seconds) < LEAST:
        return None
    scale = np.append(sizes.max(0), 1.0)
    columns = np.column_stack([sizes, np.ones(len(sizes))]) / scale / seconds[:, None]
    if np.linalg.matrix_rank(columns[:, :2] * seconds[:, None], tol=1e-6) < 2:
        return None
    weights, found = np.ones(len(seconds)), np.zeros(3)
    for _ in range(ROUNDS):
        found = _not_negative(columns * weights[:, None], weights)
        off = np.abs(columns @ found - 1)
        width = max(float(np.median(off)) / 0.6745, 1e-9)
        weights = np.sqrt(np.minimum(1, TIGHT * width / np.maximum(off, 1e-12)))
    linear, quadratic, fixed = (found / scale).tolist()
    if linear == 0 and quadratic == 0:
        return None
    return Fit(linear, quadratic, fixed, float(np.median(np.abs(columns @ found - 1))), len(seconds))


def _not_negative(columns: np.ndarray, aim: np.ndarray) -> np.ndarray:
    """Returns the least squares solution without negative entries: the best over all choices of columns."""
    best, least = np.zeros(columns.shape[1]), math.inf
    for choice in range(1, 2 ** columns.shape[1]):
        used = [i for i in range(columns.shape[1]) if choice >> i & 1]
        part = np.linalg.lstsq(columns[:, used], aim, rcond=None)[0]
        error = float(((columns[:, used] @ part - aim) ** 2).sum())
        if part.min() >= 0 and error < least - 1e-15:
            best, least = np.zeros(columns.shape[1]), error
            best[used] = part
    return best


class StepTimes:
    """Remembers what each step computed and how long it took, on the main process; nothing waits for the device.

    A step's time is that from its record to the next one's, without validation, checkpoints and waiting for data. The
    device runs behind the host by less than a step, so that a single time may belong to its neighbour in part; over
    many steps it does not. The first ones, in which kernels are chosen and compiled, are outliers to the fit.

    Args:
        world_size, barrier, cost: as step_sizes'; device: in words, for the file.
    """

    def __init__(self, *, world_size: int, barrier: str, cost: tuple[float, float], device: str) -> None:
        self.world_size, self.barrier, self.cost, self.device = world_size, barrier, cost, device
        self._sizes: deque[tuple[float, float]] = deque(maxlen=REMEMBERED)
        self._seconds: deque[float] = deque(maxlen=REMEMBERED)

    def add(self, plan: EpochPlan, epoch_step: int, seconds: float) -> None:
        """Keeps one step."""
        self._sizes.append(step_sizes(plan, epoch_step, self.world_size, self.barrier, self.cost))
        self._seconds.append(seconds)

    def write(self, folder: Path) -> bool:
        """Writes cost_model.json as far as there is enough to fit; returns whether it did."""
        found = fit(np.array(self._sizes).reshape(-1, 2), np.array(self._seconds))
        if found is None:
            return False
        asked = {"cost_linear": self.cost[0], "cost_quadratic": self.cost[1]}
        about = {"device": self.device, "processes": self.world_size, "barrier": self.barrier, "planned_with": asked}
        write_json_atomically(folder / COST_MODEL, {**found._asdict(), **about})
        return True


def read_cost_model(path: Path) -> tuple[float, float]:
    """Returns a and b of a sample's cost a*S + b*S^2 from a cost_model.json.

    Raises:
        UserError: it is not there, or holds no usable pair.
    """
    hint = "give the cost_model.json of a run, or leave the flag out"
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as why:
        raise UserError("--cost_model", f"{path} is no readable cost model ({why})", hint) from why
    try:
        pair = float(held["linear"]), float(held["quadratic"])
    except (ValueError, KeyError, TypeError) as why:
        what = f"{path} is no cost model: it is no JSON object with numbers `linear` and `quadratic`"
        raise UserError("--cost_model", what, hint) from why
    if not all(math.isfinite(value) and value >= 0 for value in pair) or not any(pair):
        raise UserError("--cost_model", f"{path} says {pair[0]:g} and {pair[1]:g}, which order nothing", hint)
    return pair


def step_times(accelerator: Accelerator, settings: PlanSettings) -> StepTimes:
    """Returns an empty StepTimes of this launch."""
    device = accelerator.device
    return StepTimes(
        world_size=accelerator.num_processes,
        barrier=backend_of(accelerator).barrier,
        cost=(settings.cost_linear, settings.cost_quadratic),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    )
