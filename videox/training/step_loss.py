"""The loss of an optimizer step, sample by sample: summed over ranks, and corrected for noise levels and buckets."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from videox.data.dataset import Batch
from videox.data.plan.epoch import EpochPlan
from videox.distributed.collectives import sum_over_ranks
from videox.engine.train_state import TrainState
from videox.rng import Purpose, uniform
from videox.shapes import Bucket
from videox.tracking.corrected_loss import CorrectedLoss, noise_bands
from videox.training.step import PlannedStep


class StepLoss:
    """The loss of a step as the micro-batches add to it, on the device; nothing here waits for the device.

    Each sample of the global batch has a place of its own, which one rank fills, so that the sum over ranks is exact:
    it is the same for any number of processes. One all-reduce sums the loss and all samples.

    Args:
        step: of the plan.
        device: of the losses.
    """

    def __init__(self, step: PlannedStep, device: torch.device) -> None:
        self._places = {int(key): place for place, key in enumerate(step.plan.keys_of_step(step.epoch_step), start=1)}
        self._values = torch.zeros(1 + len(self._places), dtype=torch.float64, device=device)

    @property
    def total(self) -> Tensor:
        """The loss so far, float64 scalar; after `reduce` that of all ranks."""
        return self._values[0]

    @property
    def parts(self) -> Tensor:
        """Each sample's part of the loss, float64 [samples of the step] in the order of the plan; 0 for a bad one."""
        return self._values[1:]

    def add(self, batch: Batch, parts: Tensor) -> None:
        """Add a micro-batch.

        Args:
            batch: of the step.
            parts: each sample's weighted loss, float64 [B], without gradients.
        """
        self._values[0] += parts.sum()
        # The samples of a micro-batch are neighbours in the plan; padding is not in it.
        first = self._places.get(int(batch["keys"][0]))
        if first is not None:
            self._values[first : first + len(parts)] = parts

    def reduce(self) -> None:
        """Sum over all ranks; all ranks call it."""
        self._values = sum_over_ranks(self._values)


def uniform_draws(args: argparse.Namespace, strata: np.ndarray, keys: Sequence[int] | np.ndarray) -> np.ndarray:
    """The draws in (0, 1) that sigmas are computed from, float64 [n].

    Args:
        strata: of each sample, from the plan: its draw with --uniform_sampling.
        keys: of each sample: its independent draw otherwise.
    """
    return strata if args.uniform_sampling else uniform(np.array(keys, np.uint64), Purpose.TIMESTEP)


class StepCorrection:
    """Corrects the loss of each step, by running means that are part of the train state; equal on all ranks.

    Args:
        args: the flags.
        state: of the run; its loss_means change.
    """

    def __init__(self, args: argparse.Namespace, state: TrainState) -> None:
        self._args, self._state = args, state
        self._corrected = CorrectedLoss(state.loss_means)

    def __call__(self, plan: EpochPlan, epoch_step: int, parts: Sequence[float]) -> float:
        """Return the corrected loss of a step; NaN where it has none.

        Args:
            plan: of the epoch.
            epoch_step: index of the step in it.
            parts: of StepLoss, over all ranks.
        """
        begin = max(
            (change["epoch"] for change in self._state.data_changes if change["epoch"] <= plan.epoch), default=0
        )
        if self._corrected.epoch is None or self._corrected.epoch < begin:
            self._corrected.use_mix(plan.epoch, mix_of(plan))
        draws = uniform_draws(self._args, plan.strata_of_step(epoch_step), plan.keys_of_step(epoch_step))
        bands, buckets = noise_bands(draws), map(bucket_name, plan.buckets_of_step(epoch_step))
        # Every sample of the plan has the same weight; a bad one has weight 0 and no loss.
        read = [sample for sample in zip(bands, buckets, parts, strict=True) if sample[2] != 0]
        return self._corrected.add(
            [band for band, _, _ in read],
            [bucket for _, bucket, _ in read],
            [part * len(parts) for _, _, part in read],
        )


def bucket_name(bucket: Bucket) -> str:
    """Return "frames x height x width" of a bucket."""
    return "x".join(map(str, bucket))


def mix_of(plan: EpochPlan) -> dict[str, float]:
    """Return the share of an epoch's samples that each bucket has."""
    return {bucket_name(bucket): samples / len(plan.row) for bucket, samples, _ in plan.bucket_table()}
