"""The window of noise levels that a model is trained at, for models with one expert per window. Imports no torch."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from videox.diffusion.schemes import NUM_TRAIN_TIMESTEPS


class NoiseWindow(NamedTuple):
    """The noise levels lowest <= sigma < end.

    Attributes:
        lowest: 0 to below 1.
        end: above `lowest`; infinity includes pure noise, sigma 1.
    """

    lowest: float = 0.0
    end: float = math.inf

    def steps(self, shift: float, train_sampling_steps: int = NUM_TRAIN_TIMESTEPS) -> range:
        """Return which of the first training timesteps t = 1, 0.999, ... have a sigma in the window; may be empty.

        Args:
            shift: of sigma = shift t / (1 + (shift - 1) t).
            train_sampling_steps: how many of the 1000 timesteps are trained, noisiest first.
        """
        t = (NUM_TRAIN_TIMESTEPS - np.arange(train_sampling_steps)) / NUM_TRAIN_TIMESTEPS
        # Compared as they are drawn, in float32: 3 * 0.7 / 2.4 is below 0.875 in float64, and the timestep is 875.
        sigmas, lowest, end = (
            np.float32(value) for value in (shift * t / (1 + (shift - 1) * t), self.lowest, self.end)
        )
        inside = np.flatnonzero((lowest <= sigmas) & (sigmas < end))
        return range(int(inside[0]), int(inside[-1]) + 1) if len(inside) else range(0)

    def words(self) -> str:
        """Return "0.875 to 1" for the window from 0.875 on."""
        return f"{self.lowest:g} to {min(self.end, 1.0):g}"

    def times(self, shift: float) -> tuple[float, float]:
        """Return the lowest and the highest t, 0 to 1, whose sigma is in the window, before the shift."""
        ends = (self.lowest, min(self.end, 1.0))
        lowest, highest = (sigma / (shift - (shift - 1) * sigma) for sigma in ends)
        return lowest, highest


WHOLE = NoiseWindow()
