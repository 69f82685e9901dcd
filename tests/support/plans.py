"""Plans for tests: settings, mixed data sets and hypothesis strategies for both, and the micro-batches of a plan."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from videox.data.plan.buckets import SizePolicy
from videox.data.plan.epoch import PADDING, EpochPlan, MicroBatch
from videox.data.plan.settings import PlanColumns, PlanSettings
from videox.data.plan.timesteps import TIMESTEPS

WORLD_SIZES = (1, 2, 3, 4, 6, 12)
POLICY = SizePolicy(
    video_sample_size=256, image_sample_size=512, n_frames=49, stride=2,
    enable_bucket=True, random_hw_adapt=True, token_length=True, random_frame_crop=True,
)  # fmt: skip
SETTINGS = PlanSettings(POLICY, batch_size=2, slots=12, seed=42, cost_linear=1e6, cost_quadratic=1e3)
SHAPES = ((1920, 1080), (1080, 1920), (640, 480), (512, 512), (2048, 858), (300, 200))


def make_columns(rows: int, seed: int = 0, image_share: float = 0.3) -> PlanColumns:
    """Return a mixed data set: about one row in twenty is unusable, some clips are too short, some too small."""
    rng = np.random.default_rng(seed)
    kind = (rng.random(rows) >= image_share).astype(np.uint8)
    size = np.array(SHAPES, np.int32)[rng.integers(0, len(SHAPES), rows)]
    size[rng.random(rows) < 0.03] = 8
    frames = np.where(kind == 1, rng.integers(0, 300, rows), 1).astype(np.int32)
    return PlanColumns(kind, size[:, 0], size[:, 1], frames, rng.random(rows) >= 0.05)


COLUMNS = make_columns(301)

random_settings = st.builds(
    replace,
    st.just(SETTINGS),
    batch_size=st.integers(1, 5),
    slots=st.integers(1, 16),
    seed=st.integers(0, 2**63 - 1),
    slot_fill=st.sampled_from(["fixed", "cost"]),
    video_repeat=st.integers(0, 3),
    held_out=st.integers(0, 5),
    timesteps=st.sampled_from(TIMESTEPS),
)
random_columns = st.builds(make_columns, st.integers(40, 160), st.integers(0, 99), st.sampled_from([0.0, 0.3, 1.0]))


def batches_of_step(plan: EpochPlan, step: int, world_size: int = 1) -> list[MicroBatch]:
    """Return the micro-batches of all ranks in a step."""
    return [batch for rank in range(world_size) for batch in plan.micro_batches(step, rank, world_size)]


def all_batches(plan: EpochPlan, world_size: int = 1) -> list[MicroBatch]:
    """Return the micro-batches of all ranks in all steps."""
    return [batch for step in range(plan.n_steps) for batch in batches_of_step(plan, step, world_size)]


def real_batches(batches: list[MicroBatch]) -> list[MicroBatch]:
    """Return the micro-batches that are not padding."""
    return [batch for batch in batches if batch.rows[0] != PADDING]


def samples_of(batches: list[MicroBatch]) -> list[tuple]:
    """Return everything that each real sample depends on, as plain tuples."""
    return [
        (batch.step, batch.slot, batch.bucket, *values)
        for batch in real_batches(batches)
        for values in zip(*(column.tolist() for column in batch[3:-1]), strict=True)
    ]
