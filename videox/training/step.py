"""PlannedStep: one optimizer step of the plan, with this rank's micro-batches of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from videox.data.dataset import BadSample, Batch
from videox.data.plan.epoch import EpochPlan
from videox.distributed.step_sync import StepReport
from videox.rng import Purpose, hash_key
from videox.tracking.progress import StepClock


@dataclass(frozen=True)
class PlannedStep:
    """One optimizer step: its place in the plan, and this rank's micro-batches of it.

    Attributes:
        plan: of the epoch.
        epoch_step: index of the step in it, from 0.
        rows: metadata rows of its samples on all ranks.
        loaded: batches of this rank's loader.
        clock: measures the wait for data.
        bad: unreadable samples of this rank in the micro-batches so far.
        fallbacks: for each clip of them that PyAV read in place of decord, why.
    """

    plan: EpochPlan
    epoch_step: int
    rows: np.ndarray
    loaded: Iterator[Batch]
    clock: StepClock
    bad: list[BadSample] = field(default_factory=list)
    fallbacks: list[str] = field(default_factory=list)

    def micro_batches(self) -> Iterator[Batch]:
        """Yield this rank's micro-batches; the time until each is there counts as data wait.

        torch's global generators, which dropout draws from, are seeded by the key of each: a resumed run repeats them.
        """
        last = False
        while not last:
            with self.clock.waiting():
                batch = next(self.loaded)
            seed_generators(int(hash_key(batch["keys"][0], Purpose.DROPOUT)))
            self.bad.extend(batch["bad"])
            self.fallbacks.extend(batch["fallbacks"])
            yield batch
            last = batch["last"]

    def is_empty(self, report: StepReport) -> bool:
        """Whether none of its samples could be read, on any rank."""
        return report.bad_samples == len(self.rows)

    def fingerprint(self) -> int:
        """A number below 2^53 that differs between ranks which are at different steps or have different plans."""
        return int(hash_key(self.plan.epoch, self.epoch_step, len(self.rows), int(self.rows.sum()))) >> 11


def seed_generators(seed: int) -> None:
    """Seed torch's generators of the CPU and of the GPUs.

    The same as torch.manual_seed, except for kinds of devices that this machine does not have: torch keeps a stack
    trace for each of them, which takes a fifth of the host time of a step on a tiny model (benchmarks/cache.py).
    """
    torch.default_generator.manual_seed(seed)
    if torch.accelerator.is_available():
        torch.get_device_module().manual_seed_all(seed)
