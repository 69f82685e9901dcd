"""Tests of videox.shapes: frames, latents and tokens against published examples and exact fractions."""

from __future__ import annotations

import ast
import math
import re
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from videox.data.plan.buckets import ASPECT_RATIOS_512, SizePolicy, bucket_sides, exact_sides
from videox.data.plan.plan import largest_bucket, plan_epoch
from videox.data.plan.settings import PlanColumns, PlanSettings
from videox.engine.train_state import plan_inputs
from videox.errors import UserError
from videox.shapes import (
    USUAL,
    Bucket,
    Ratios,
    frames_that_fit,
    latent_shape,
    snap_frames,
    token_count,
    token_limited_frames,
)

SIZES = st.integers(32, 8192)
FRAMES = st.integers(0, 500).map(lambda k: 4 * k + 1)


@given(st.integers(1, 10_000))
def test_snapped_frames_are_the_largest_4k_plus_1(frames: int) -> None:
    snapped = snap_frames(frames)
    assert snapped % 4 == 1
    assert snapped <= frames < snapped + 4


@given(st.integers(-100, 0))
def test_snapped_frames_are_at_least_one(frames: int) -> None:
    assert snap_frames(frames) == 1


@given(st.integers(0, 400), st.integers(1, 50))
@example(162, 2)  # 81 frames, where length // stride counts 81 as well
@example(161, 2)  # 81 frames, where length // stride counts 80
def test_frames_that_fit_equal_the_length_of_a_slice(length: int, stride: int) -> None:
    assert frames_that_fit(length, stride) == len(range(length)[::stride])


@pytest.mark.parametrize(
    ("length", "stride", "kept"), [(41, 1, 41), (41, 2, 21), (42, 2, 21), (243, 3, 81), (0, 3, 0)]
)
def test_frames_that_fit_by_hand(length: int, stride: int, kept: int) -> None:
    assert frames_that_fit(length, stride) == kept


@given(FRAMES, SIZES, SIZES)
@example(81, 512, 576)  # 81 * 512^2 / 576^2 = 64 exactly: 61 frames
@example(49, 512, 896)
def test_token_limited_frames_equal_exact_fractions(n_frames: int, token_sample_size: int, size: int) -> None:
    budget = Fraction(n_frames * token_sample_size**2, size**2)
    wanted = 4 * math.floor((min(budget, Fraction(n_frames)) - 1) / 4) + 1
    assert token_limited_frames(n_frames, token_sample_size, size) == max(wanted, 1)


@given(FRAMES, SIZES, SIZES)
def test_token_limited_frames_fill_the_budget_and_no_more(n_frames: int, token_sample_size: int, size: int) -> None:
    frames, budget = token_limited_frames(n_frames, token_sample_size, size), n_frames * token_sample_size**2
    assert frames % 4 == 1
    assert 1 <= frames <= n_frames
    assert frames * size**2 <= budget or frames == 1
    assert frames == n_frames or (frames + 4) * size**2 > budget  # four more would not fit


@given(FRAMES, SIZES, SIZES, SIZES)
def test_larger_sizes_never_have_more_frames(n_frames: int, token_sample_size: int, one: int, other: int) -> None:
    small, large = sorted((one, other))
    assert token_limited_frames(n_frames, token_sample_size, small) >= token_limited_frames(
        n_frames, token_sample_size, large
    )


@given(st.integers(0, 60), st.integers(1, 128), st.integers(1, 128))
def test_tokens_are_latent_patches(k: int, rows: int, columns: int) -> None:
    bucket = Bucket(4 * k + 1, 16 * rows, 16 * columns)
    assert latent_shape(bucket) == (k + 1, 2 * rows, 2 * columns)
    assert token_count(bucket) == (k + 1) * rows * columns


def test_tokens_of_the_published_clip() -> None:
    assert token_count(Bucket(49, 512, 512)) == 13_312 == 32 * 32 * 13
    assert token_count(Bucket(21, 768, 768)) == 13_824  # above the nominal clip, because of the first frame
    assert latent_shape(Bucket(81, 480, 832)) == (21, 60, 104)


# ------------------------------------------------------------------------------------------------------ other ratios

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [*ROOT.glob("videox/**/*.py"), *ROOT.glob("scripts/*/train.py"), ROOT / "scripts/sample.py"]
FINE = Ratios(temporal=4, spatial=16, patch=2)  # of Wan2.2 TI2V-5B
OTHER = Ratios(temporal=2, spatial=4, patch=3)


@given(st.sampled_from([FINE, OTHER]), st.integers(0, 60), st.integers(1, 40), st.integers(1, 40))
def test_tokens_follow_the_ratios(ratios: Ratios, k: int, rows: int, columns: int) -> None:
    bucket = Bucket(ratios.temporal * k + 1, ratios.grid * rows, ratios.grid * columns)
    assert latent_shape(bucket, ratios) == (k + 1, ratios.patch * rows, ratios.patch * columns)
    assert token_count(bucket, ratios) == (k + 1) * rows * columns
    assert snap_frames(bucket.frames + ratios.temporal - 1, ratios) == bucket.frames


def test_tokens_of_the_published_clip_of_ti2v_5b() -> None:
    assert token_count(Bucket(121, 704, 1280), FINE) == 31 * 22 * 40 == 27_280


@given(st.sampled_from([USUAL, FINE, OTHER]), st.integers(96, 1500), st.integers(64, 4000), st.integers(64, 4000))
def test_sides_of_buckets_are_on_the_grid(ratios: Ratios, target: int, height: int, width: int) -> None:
    by_ratio = bucket_sides(np.arange(len(ASPECT_RATIOS_512)), np.full(len(ASPECT_RATIOS_512), target), ratios)
    exact = exact_sides(np.array([height]), np.array([width]), np.array([target]), ratios)
    for side in (*by_ratio, *exact):
        assert np.all(side % ratios.grid == 0) and np.all(side >= ratios.grid)


def settings_of(ratios: Ratios) -> PlanSettings:
    flags = {"enable_bucket": True, "token_length": True, "random_hw_adapt": True, "random_frame_crop": True}
    policy = SizePolicy(video_sample_size=256, image_sample_size=384, n_frames=33, ratios=ratios, **flags)
    return PlanSettings(policy, batch_size=2, slots=4, seed=3)


@pytest.mark.parametrize("ratios", [USUAL, FINE, OTHER])
def test_a_plan_is_made_with_the_ratios_of_its_settings(ratios: Ratios) -> None:
    draw, rows = np.random.default_rng(0), 60
    height, width = (draw.integers(20, 900, rows).astype(np.int32) for _ in range(2))
    frames = draw.integers(1, 90, rows).astype(np.int32)
    columns = PlanColumns((frames > 4).astype(np.uint8), width, height, frames, np.ones(rows, bool))
    settings = settings_of(ratios)
    plan = plan_epoch(columns, settings, 0)
    small = np.minimum(height, width) < ratios.grid
    assert plan.fate_counts()["too_small"] == small.sum()
    batches = [batch for step in range(plan.n_steps) for batch in plan.micro_batches(step, 0, 1)]
    for bucket in {batch.bucket for batch in batches}:
        assert bucket.height % ratios.grid == bucket.width % ratios.grid == (bucket.frames - 1) % ratios.temporal == 0
        assert plan.tokens_of(bucket) == token_count(bucket, ratios)
    largest = largest_bucket(columns, settings)
    assert plan.tokens_of(largest) >= max(plan.bucket_tokens())
    assert plan.tokens_of_step(0) == sum(batch.tokens for batch in batches if batch.step == 0)


def test_settings_with_the_usual_ratios_are_named_as_before() -> None:
    usual, fine = (plan_inputs(settings_of(ratios)) for ratios in (USUAL, FINE))
    assert "ratios" not in usual["policy"] and fine["policy"].pop("ratios") == [4, 16, 2]
    assert fine == usual


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"video_sample_size": 48}, "48 is outside 64..8192"),
        ({"n_frames": 12}, "12 is not 4k+1"),
        ({"enable_bucket": True, "fix_sample_size": (704, 48)}, "below 64 pixels"),
    ],
)
def test_flags_are_judged_by_the_ratios(changed: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        SizePolicy(**{"ratios": FINE, **changed})
    assert message in error.value.what


@cache
def parsed() -> list[tuple[Path, ast.Module]]:
    """Return the files that name the ratios or what depends on them."""
    named = re.compile(r"ratios|grid|token_count|latent_shape|snap_frames|_mask|_pixels")
    return [(path, ast.parse(text)) for path in SOURCES if named.search(text := path.read_text(encoding="utf-8"))]


def with_ratios() -> dict[str, int]:
    """Return the functions that have the ratios as their last parameter, with a default, and its position."""
    found = {}
    for _, tree in parsed():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                names = [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]
                if {"ratios", "grid"} & {*names[-1:]} and node.args.defaults + node.args.kw_defaults:
                    found[node.name] = len(names) - 1
    return found


def passes_ratios(call: ast.Call, name: ast.Name, position: int | None) -> bool:
    """Return whether a call of a function, or a partial of it, passes the ratios; position: of the parameter."""
    keywords = {keyword.arg for keyword in call.keywords}
    count = len(call.args) - (call.func is not name)
    starred = any(isinstance(argument, ast.Starred) for argument in call.args)  # of three: a bucket
    by_place = position is not None and count + 2 * starred > position
    return bool({"ratios", "grid", None} & keywords) or by_place


def test_no_call_falls_back_on_the_usual_ratios() -> None:
    """Where a function has ratios as its last parameter, every caller passes those of the model."""
    functions, missing = with_ratios(), []
    del functions["padding"]  # also the name of variables; it is called in one place
    assert {
        "token_count",
        "latent_shape",
        "snap_frames",
        "known_mask",
        "pack_mask",
        "latents_spec",
    } <= functions.keys()
    classes = {"ModelProfile", "PlanPicture", "SizePolicy", "EpochPlan"}
    for path, tree in parsed():
        wanted = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id in {*functions, *classes}]
        parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)} if wanted else {}
        for name in wanted:
            call = parents[name]
            called = isinstance(call, ast.Call) and (call.func is name or getattr(call.func, "id", "") == "partial")
            if called and not passes_ratios(call, name, functions.get(name.id)):
                missing.append(f"{path.relative_to(ROOT)}:{name.lineno} {name.id}")
            if not called and name.id in functions:  # handed on, to be called without the ratios
                missing.append(f"{path.relative_to(ROOT)}:{name.lineno} {name.id}")
    assert missing == []
