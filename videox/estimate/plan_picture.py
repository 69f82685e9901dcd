"""PlanPicture: what plan_report.png shows; imports no matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from videox.data.plan.balance import PlanBalance
from videox.shapes import USUAL, Bucket, Ratios


@dataclass(frozen=True)
class PlanPicture:
    """What plan_report.png shows.

    Attributes:
        title: what is trained.
        buckets: of an epoch.
        counts: samples of each bucket.
        flops: FLOPs of all samples of each bucket.
        balanced: metrics of the plan by number of processes; empty: of one process, which waits for no other.
        memory: GiB of each item on a GPU; items of different phases are not there at the same time.
        total: GiB at the peak.
        limit: GiB of the GPU.
        card: its name.
        facts: what the run takes, in words by name: steps, time, disk.
        ratios: of the model.
    """

    title: str
    buckets: Sequence[Bucket]
    counts: np.ndarray
    flops: np.ndarray
    balanced: Mapping[int, PlanBalance]
    memory: Mapping[str, float]
    total: float
    limit: float
    card: str
    facts: Mapping[str, str]
    ratios: Ratios = USUAL
