"""Where in its stratum a sample's timestep is drawn, as a function of seed and step. Imports no torch."""

from __future__ import annotations

import numpy as np

from videox.rng import GOLDEN, Purpose, hash_key, to_unit_interval

# per_step: each sample has a draw of its own within its stratum, as in runs of older versions; across_steps: all
# samples of a step have the same place in their strata, and it moves from step to step so that it covers them.
TIMESTEPS = PER_STEP, ACROSS_STEPS = ("per_step", "across_steps")
BLOCK_STEPS = 34  # a Fibonacci number: after as many steps the sequence is nearly back where it began


def place_in_stratum(seed: int, step: int | np.ndarray) -> np.ndarray:
    """Return the place of a step's samples within their strata, float64 in (0, 1), of the shape of `step`.

        frac(u_b + t / phi) for step t in block b = floor(t / BLOCK_STEPS)

    with phi = (1 + sqrt(5)) / 2 and a start u_b that is drawn for each block by seed and b. Within a block this is the
    additive recurrence (Kronecker sequence) of the golden ratio, whose points are the most evenly spread of all these
    recurrences for any number of steps in a row (Niederreiter, "Random Number Generation and Quasi-Monte Carlo
    Methods", SIAM 1992, chapter 3; Roberts, "The Unreasonable Effectiveness of Quasirandom Sequences", 2018). A random
    start (Cranley and Patterson, SIAM J. Numer. Anal. 13, 1976) leaves each single draw uniform.

    The start changes from block to block because of what occurs in every m-th step only, for a Fibonacci number m: m /
    phi is nearly an integer, so that with one start for the whole run a bucket in every 55th step would get a band of
    0.4 of the range in 50 occurrences. Draws of different blocks are independent.

    Arithmetic is that of unsigned 64-bit integers: the result is the same on every machine.

    Args:
        seed: of the run.
        step: number of the optimizer step in the run, from 0; steps whose update was skipped count.
    """
    steps = np.asarray(step)
    starts = hash_key(seed, steps // BLOCK_STEPS, Purpose.TIMESTEP_BLOCK)
    with np.errstate(over="ignore"):  # modulo 2^64, which is the fractional part
        return to_unit_interval(starts + steps.astype(np.uint64) * GOLDEN)
