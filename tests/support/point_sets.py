"""Measures of how evenly points cover [0, 1), for the tests and benchmarks of timesteps."""

from __future__ import annotations

import numpy as np


def discrepancy(points: np.ndarray) -> np.ndarray:
    """Return the star discrepancy of points in [0, 1), float64 [..., N] -> [...]: 0.5 / N at best, 1 at worst.

    The largest difference between the share of the points below x and x (Niederreiter 1992, theorem 2.6).
    """
    ordered, count = np.sort(points, axis=-1), points.shape[-1]
    upper = np.arange(1, count + 1) / count
    return np.maximum((upper - ordered).max(-1), (ordered - upper + 1 / count).max(-1))


def largest_gap(points: np.ndarray) -> np.ndarray:
    """Return the widest part of the circle [0, 1) without a point, float64 [..., N] -> [...]."""
    ordered = np.sort(points, axis=-1)
    return np.maximum(np.diff(ordered, axis=-1).max(-1), 1 - ordered[..., -1] + ordered[..., 0])
