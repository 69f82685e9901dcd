"""Corrected loss: the loss of a step, divided by how hard its noise levels and buckets are. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

BANDS = 16  # of noise; each has an equal share of the draws that noise levels are made from
SAMPLES = 100.0  # approximate number of its own past samples that a mean covers
STEPS = 30.0  # approximate number of past steps that the level covers
PRIOR = 2.0  # samples of average difficulty that each mean begins with
LARGEST = 8.0  # one sample counts as at most this many times as hard as expected


def noise_bands(draws: np.ndarray) -> list[int]:
    """Return the noise band of each sample, 0 to BANDS - 1.

    Args:
        draws: in (0, 1), as sigmas are computed from; uniform, so that each band is drawn equally often.
    """
    return np.clip(np.asarray(draws, np.float64) * BANDS, 0, BANDS - 1).astype(int).tolist()


class CorrectedLoss:
    """Removes from a step's loss what follows from the noise levels and buckets that were drawn for it.

    The loss of a sample in band b and bucket k is modelled as level * difficulty, where the level is common to all
    samples and falls as the model learns, and

        difficulty(b, k) = mean(b) * mean(k) * mean(b, k).

    Each mean is a running mean of the loss of its samples, divided by the level and by the two other means: of all
    samples of the band, of all samples of the bucket, and of those of both. It is (s + PRIOR) / (w + PRIOR), where s
    sums these ratios and w counts them, and both are multiplied by 1 - 1/SAMPLES per sample of that mean. This is an
    exponential average without bias at its start, drawn towards 1 by PRIOR samples: a rare combination is as hard as
    its band and its bucket say until it has samples of its own. The corrected loss is

        loss * reference / (mean difficulty of the step's samples).

    The reference is the mean difficulty over all bands, in equal shares, and over the buckets in the shares that they
    have in the first epoch of the data: always the same mix, so that the line shows how the level changes. The means
    are those before the step. The level is a running mean of the losses divided by their difficulty.

    Factors and not differences: a loss that falls to a tenth does so in every band, and a mean that has not seen a
    sample since then is still right.

    Args:
        stored: the running means of a checkpoint, as JSON values; {} begins them anew. Changed in place.
    """

    def __init__(self, stored: dict[str, Any]) -> None:
        self._stored = stored
        stored.setdefault("level", [0.0, 0.0])
        stored.setdefault("means", {})
        stored.setdefault("mix", {})

    @property
    def epoch(self) -> int | None:
        """The epoch whose mix of buckets is the reference; None before use_mix."""
        return self._stored.get("epoch")

    def use_mix(self, epoch: int, shares: Mapping[str, float]) -> None:
        """Set the reference: the share of the samples that each bucket has in an epoch; the shares sum to 1."""
        self._stored["epoch"] = epoch
        self._stored["mix"] = dict(shares)

    def add(self, bands: Sequence[int], buckets: Sequence[str], losses: Sequence[float]) -> float:
        """Return the corrected loss of a step, and take its samples into the running means.

        Args:
            bands: of noise, of each sample.
            buckets: name of each sample's bucket.
            losses: of each sample; those of all ranks, in the same order on every rank.

        Returns:
            NaN, without a change of the means, if there is no sample or a loss is not finite.
        """
        if not losses or not all(map(math.isfinite, losses)):
            return math.nan
        samples = list(zip(bands, buckets, losses, strict=True))
        loss = math.fsum(losses) / len(losses)
        relative = loss * len(samples) / math.fsum(self._difficulty(band, bucket) for band, bucket, _ in samples)
        corrected = relative * self._reference()
        total, weight = self._stored["level"]
        self._take_in(samples, total / weight if weight else relative)
        decay = 1 - 1 / STEPS
        self._stored["level"] = [decay * total + relative, decay * weight + 1]
        return corrected

    def _mean(self, name: str) -> float:
        total, weight = self._stored["means"].get(name, (0.0, 0.0))
        return (total + PRIOR) / (weight + PRIOR)

    def _difficulty(self, band: int, bucket: str) -> float:
        return self._mean(str(band)) * self._mean(bucket) * self._mean(f"{band} {bucket}")

    def _reference(self) -> float:
        """Return the mean difficulty of the reference mix; of all bands alone where no mix is set."""
        bands = [self._mean(str(band)) for band in range(BANDS)]
        parts = []
        for bucket, share in self._stored["mix"].items():
            cells = math.fsum(mean * self._mean(f"{band} {bucket}") for band, mean in enumerate(bands))
            parts.append(share * self._mean(bucket) * cells)
        return math.fsum(parts or bands) / BANDS

    def _take_in(self, samples: Sequence[tuple[int, str, float]], level: float) -> None:
        if level <= 0:
            return
        # All ratios are computed before the first mean changes, so that the order within a step matters little.
        ratios = []
        for band, bucket, loss in samples:
            names = str(band), bucket, f"{band} {bucket}"
            means = [self._mean(name) for name in names]
            surprise = min(loss / (level * math.prod(means)), LARGEST)
            ratios += [(name, mean * surprise) for name, mean in zip(names, means, strict=True)]
        decay = 1 - 1 / SAMPLES
        for name, ratio in ratios:
            total, weight = self._stored["means"].get(name, (0.0, 0.0))
            self._stored["means"][name] = [decay * total + ratio, decay * weight + 1]
