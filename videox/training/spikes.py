"""Spikes: steps whose loss or gradient norm is far above those of the steps before, found by a robust bound."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np

from videox.engine.base import NO_BOUNDS, Bounds
from videox.engine.train_state import TrainState

WINDOW = 128  # steps that a bound is computed from: the last ones that had an update and no spike
LEAST = 32  # with fewer steps in the window there is no bound
DEVIATIONS = 6.0  # k of the bound
LEAST_DEVIATION = 0.12  # of the logarithm: a bound is at least twice the median, exp(6 * 0.12) = 2.05
SIGMA_OF_MAD = 1.4826  # a normal distribution's standard deviation divided by its median absolute deviation
NEW_LEVEL = 5  # steps above the bound in a row, after which the window begins anew
LARGEST_LOG = 88.0  # of a float32
_LEAST_VALUE = 1e-30  # a loss or norm of 0 has no logarithm


def spike_bound(values: Sequence[float]) -> float:
    """Return the largest value that is not a spike: exp(m + k * max(1.4826 * MAD, 0.12)), k = 6.

    m is the median of the logarithms of the values and MAD the median of their absolute deviations from m. Losses and
    gradient norms vary by factors, so that their logarithms have about equal tails on both sides.

    Args:
        values: of the steps before, each finite and at least 0.

    Returns:
        A number that float32 represents; infinity if there are fewer than 32 values.
    """
    if len(values) < LEAST:
        return math.inf
    logs = [math.log(max(value, _LEAST_VALUE)) for value in values]
    middle = statistics.median(logs)
    deviation = SIGMA_OF_MAD * statistics.median([abs(value - middle) for value in logs])
    bound = math.exp(min(middle + DEVIATIONS * max(deviation, LEAST_DEVIATION), LARGEST_LOG))
    return float(np.float32(bound))  # as a device compares it with a norm in float32


class SpikeDetector:
    """Compares each step with the steps before it. Equal on all ranks, and a resumed run goes on where it was.

    Args:
        state: whose `recent_losses`, `recent_grad_norms` and `spikes_in_row` are kept.
        skip: spikes are left out (--skip_spikes).
    """

    def __init__(self, state: TrainState, *, skip: bool) -> None:
        self.state, self.skip = state, skip

    def bounds(self) -> Bounds:
        """Return the bounds of the next step, computed from the steps that are recorded."""
        return Bounds(spike_bound(self.state.recent_losses), spike_bound(self.state.recent_grad_norms))

    def bounds_to_skip(self) -> Bounds:
        """Return the bounds above which the next step is left out; none without --skip_spikes."""
        return self.bounds() if self.skip else NO_BOUNDS

    def add(self, loss: float, grad_norm: float) -> str:
        """Add the step after those that are recorded, with finite numbers; return what to print of it, or "".

        A step above a bound is a spike and is not added to the window. After five spikes in a row the window begins
        anew: the numbers have a new level.
        """
        state, bounds = self.state, self.bounds()
        high = [
            f"{name} {value:.4g} is above {bound:.4g}"
            for name, value, bound in (("loss", loss, bounds.loss), ("gradient norm", grad_norm, bounds.grad_norm))
            if value > bound
        ]
        if not high:
            state.spikes_in_row = 0
            state.recent_losses = [*state.recent_losses, loss][-WINDOW:]
            state.recent_grad_norms = [*state.recent_grad_norms, grad_norm][-WINDOW:]
            return ""
        state.spikes_in_row += 1
        before = len(state.recent_losses)
        said = f"its {' and its '.join(high)}, the bound from the {before} steps before it"
        if state.spikes_in_row >= NEW_LEVEL:
            state.spikes_in_row, state.recent_losses, state.recent_grad_norms = 0, [], []
            return f"{said}, as in the {NEW_LEVEL - 1} steps before; the next {LEAST} steps have no bound"
        return said if self.skip or state.spikes_in_row == 1 else ""
