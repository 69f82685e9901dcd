"""Serves the dry run and a run's first minute: the largest sample of any epoch, which decides the memory."""

from __future__ import annotations

from itertools import product

import numpy as np

from videox.data.plan.buckets import CROP_RATIOS, Fate, assign
from videox.data.plan.plan import row_fates
from videox.data.plan.settings import Columns, PlanSettings
from videox.errors import DATA, UserError
from videox.shapes import Bucket, token_count


def largest_bucket(columns: Columns, settings: PlanSettings) -> Bucket:
    """Returns the bucket of the most tokens that a trained row can fall in, in whatever epoch.

    Raises:
        UserError: no row can be trained.
    """
    policy = settings.policy
    rows = np.flatnonzero(row_fates(columns, settings, np.zeros(0, np.int64)) == Fate.TRAINED)
    if not len(rows):
        raise UserError("--train_data_meta", "no row can be trained", "look at the rows' problems", DATA)
    kind, height, width, frames = (getattr(columns, name)[rows] for name in ("kind", "height", "width", "frames"))
    sizes = max(len(policy.video_sizes()), len(policy.image_sizes()))
    ratios = len(CROP_RATIOS) * 8 if policy.random_ratio_crop else 1  # every ratio's band is hit
    best = Bucket(1, 0, 0)
    for size, ratio in product(range(sizes), range(ratios)):
        found = assign(
            policy, kind, height, width, frames,
            size_draw=np.full(len(rows), (size + 0.5) / sizes),
            ratio_draw=np.full(len(rows), (ratio + 0.5) / ratios),
            frames_draw=np.zeros(len(rows)),
            fps=None if columns.fps is None else columns.fps[rows],
        )  # fmt: skip
        tokens = ((found.frames.astype(np.int64) - 1) // 4 + 1) * found.height * found.width
        at = int(tokens.argmax())
        bucket = Bucket(int(found.frames[at]), int(found.height[at]), int(found.width[at]))
        best = max(best, bucket, key=token_count)
    return best
