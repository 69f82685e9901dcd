"""Names of the timestep densities and loss weightings, and the number of timesteps; imports no torch."""

from __future__ import annotations

NUM_TRAIN_TIMESTEPS = 1000
WEIGHTING_SCHEMES = ("none", "sigma_sqrt", "logit_normal", "mode", "cosmap")
