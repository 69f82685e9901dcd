"""Tests of videox.data.plan.plan and epoch: rows occur as planned, and steps are equal at every world size."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plans import (
    COLUMNS,
    POLICY,
    SETTINGS,
    WORLD_SIZES,
    all_batches,
    batches_of_step,
    make_columns,
    random_columns,
    random_settings,
    real_batches,
    samples_of,
)

from videox.data.plan.buckets import Fate, frame_offsets, frames_at_pace, pace_of
from videox.data.plan.epoch import PADDING, MicroBatch
from videox.data.plan.plan import count_steps, held_out_plan, held_out_rows, plan_epoch
from videox.data.plan.settings import PlanColumns, PlanSettings
from videox.errors import DATA, FLAGS, UserError
from videox.shapes import token_count

ROOT = Path(__file__).resolve().parents[3]
# ------------------------------------------------------------------------------------------------- occurrences of rows


@given(random_columns, random_settings)
def test_each_trainable_row_occurs_as_often_as_planned(columns: PlanColumns, settings: PlanSettings) -> None:
    plan = plan_epoch(columns, settings, 0)
    occurrences = Counter((int(row), int(copy)) for batch in real_batches(all_batches(plan)) for row, copy in zip(batch.rows, batch.copies, strict=True))  # fmt: skip
    trained = np.flatnonzero(plan.fates == Fate.TRAINED)
    repeat = max(settings.video_repeat, 1)
    expected = {(int(row), copy) for row in trained for copy in range(repeat if columns.kind[row] else 1)}
    assert set(occurrences) == expected
    assert set(occurrences.values()) == {1}
    assert sum(plan.fate_counts().values()) == len(plan.fates) == len(columns)


@given(random_columns, random_settings)
def test_count_steps_equals_the_steps_of_the_plan(columns: PlanColumns, settings: PlanSettings) -> None:
    for epoch, excluded in [(0, ()), (3, np.arange(7))]:
        assert (
            count_steps(columns, settings, epoch, excluded) == plan_epoch(columns, settings, epoch, excluded).n_steps
        )


@given(random_columns, random_settings)
def test_a_clip_is_within_its_video(columns: PlanColumns, settings: PlanSettings) -> None:
    for batch in real_batches(all_batches(plan_epoch(columns, settings, 1))):
        last = batch.starts + (batch.bucket.frames - 1) * settings.policy.stride
        assert np.all(batch.starts >= 0)
        assert np.all(last < np.maximum(columns.frames[batch.rows], 1))
        assert np.all((columns.kind[batch.rows] == 1) | (batch.bucket.frames == 1))


def test_each_row_has_the_right_fate() -> None:
    columns = PlanColumns(
        kind=np.array([0, 1, 1, 0, 1, 1, 0], np.uint8),
        width=np.array([640, 640, 640, 8, 640, 640, 640], np.int32),
        height=np.array([480, 480, 480, 480, 480, 480, 480], np.int32),
        frames=np.array([1, 100, 0, 1, 100, 100, 1], np.int32),
        usable=np.array([1, 1, 1, 1, 0, 1, 1], bool),
    )
    settings = replace(SETTINGS, held_out=1)
    (kept,) = held_out_rows(columns, settings).tolist()
    bad = next(row for row in (0, 1, 5, 6) if row != kept)
    plan = plan_epoch(columns, settings, 0, excluded=[bad])
    assert plan.fates[[2, 3, 4]].tolist() == [Fate.TOO_SHORT, Fate.TOO_SMALL, Fate.REFUSED]
    assert plan.fates[[kept, bad]].tolist() == [Fate.HELD_OUT, Fate.QUARANTINED]
    counts = {
        "trained": 2,
        "too_short": 1,
        "too_small": 1,
        "quarantined": 1,
        "refused": 1,
        "held_out": 1,
        "not_drawn": 0,
    }
    assert plan.fate_counts() == counts


def test_quarantined_rows_are_left_out() -> None:
    excluded = np.flatnonzero(plan_epoch(COLUMNS, SETTINGS, 0).fates == Fate.TRAINED)[::3]
    plan = plan_epoch(COLUMNS, SETTINGS, 1, excluded)
    assert not set(plan.row.tolist()) & set(excluded.tolist())
    assert plan.fate_counts()["quarantined"] == len(excluded)
    # the remaining rows keep their draws: excluding a row changes no other row's
    before = plan_epoch(COLUMNS, SETTINGS, 1)
    keys = dict(zip(before.row.tolist(), zip(before.key.tolist(), before.start.tolist(), strict=True), strict=True))
    after = zip(plan.row.tolist(), plan.key.tolist(), plan.start.tolist(), strict=True)
    assert all(keys[row] == (key, start) for row, key, start in after)


@pytest.mark.parametrize("excluded", [(), tuple(range(30))])
def test_nothing_to_train_is_refused(excluded: tuple[int, ...]) -> None:
    columns = make_columns(30)
    columns = columns if excluded else replace(columns, usable=np.zeros(30, bool))
    with pytest.raises(UserError) as refused:
        plan_epoch(columns, SETTINGS, 0, excluded)
    assert refused.value.exit_code == DATA
    assert f"30 {'quarantined' if excluded else 'refused'}" in refused.value.line()
    assert count_steps(columns, SETTINGS, 0, excluded) == 0


def test_an_empty_index_is_refused() -> None:
    with pytest.raises(UserError) as refused:
        plan_epoch(make_columns(0), SETTINGS, 0)
    assert refused.value.exit_code == DATA


# ------------------------------------------------------------------------------------------------------ held out


@given(random_columns, st.integers(1, 12), st.integers(0, 5))
def test_held_out_rows_are_never_trained(columns: PlanColumns, count: int, epoch: int) -> None:
    settings = replace(SETTINGS, held_out=count)
    kept = held_out_rows(columns, settings)
    assert len(kept) == count
    assert np.all(np.diff(kept) > 0)
    plan = plan_epoch(columns, settings, epoch)
    assert not set(kept.tolist()) & set(plan.row.tolist())
    assert plan.fate_counts()["held_out"] == count
    everything = plan_epoch(columns, replace(settings, held_out=0), epoch)
    assert set(plan.row.tolist()) | set(kept.tolist()) == set(everything.row.tolist())


def test_held_out_rows_depend_only_on_the_seed() -> None:
    settings = replace(SETTINGS, held_out=10)
    kept = held_out_rows(COLUMNS, settings).tolist()
    same = replace(settings, slots=4, batch_size=1, slot_fill="cost", video_repeat=3)
    assert held_out_rows(COLUMNS, same).tolist() == kept
    assert set(held_out_rows(COLUMNS, replace(settings, held_out=4)).tolist()) < set(kept)
    assert held_out_rows(COLUMNS, replace(settings, seed=7)).tolist() != kept


def test_the_held_out_plan_has_one_row_per_step() -> None:
    assert held_out_plan(COLUMNS, SETTINGS) is None
    settings = replace(SETTINGS, held_out=9, video_repeat=4, slot_fill="cost")
    plan = held_out_plan(COLUMNS, settings)
    assert plan is not None
    assert plan.n_steps == 9
    assert sorted(plan.row.tolist()) == held_out_rows(COLUMNS, settings).tolist()
    assert [len(batch.rows) for batch in all_batches(plan)] == [1] * 9
    again = held_out_plan(COLUMNS, settings)
    assert samples_of(all_batches(again)) == samples_of(all_batches(plan))


# ------------------------------------------------------------------------------------------- equal at every world size


@pytest.mark.parametrize("slot_fill", ["fixed", "cost"])
def test_world_sizes_run_the_same_steps(slot_fill: str) -> None:
    plan = plan_epoch(COLUMNS, replace(SETTINGS, slot_fill=slot_fill, held_out=3, video_repeat=2), 0)
    assert plan.n_steps > 3
    for step in range(plan.n_steps):
        alone = samples_of(batches_of_step(plan, step))
        for world_size in WORLD_SIZES[1:]:
            assert sorted(samples_of(batches_of_step(plan, step, world_size))) == sorted(alone)


def test_a_rank_takes_every_world_size_th_slot() -> None:
    plan = plan_epoch(COLUMNS, SETTINGS, 0)
    for world_size in WORLD_SIZES:
        for rank in range(world_size):
            slots = [batch.slot for batch in plan.micro_batches(0, rank, world_size)]
            assert slots == list(range(rank, SETTINGS.slots, world_size))


@given(random_columns, random_settings.map(lambda s: replace(s, slots=12)))
def test_all_ranks_run_the_same_number_of_micro_batches(columns: PlanColumns, settings: PlanSettings) -> None:
    plan = plan_epoch(columns, settings, 0)
    for step in range(plan.n_steps):
        alone = len(batches_of_step(plan, step))
        for world_size in WORLD_SIZES:
            counts = {len(plan.micro_batches(step, rank, world_size)) for rank in range(world_size)}
            assert counts == {alone // world_size}


@given(random_columns, random_settings)
def test_weights_of_a_step_sum_to_one(columns: PlanColumns, settings: PlanSettings) -> None:
    plan = plan_epoch(columns, settings, 0)
    for step in range(plan.n_steps):
        batches = batches_of_step(plan, step)
        weights = np.concatenate([batch.weights for batch in real_batches(batches)])
        assert len(weights) == len(plan.rows_of_step(step))
        assert np.all(weights == 1 / len(weights))
        assert all(np.all(batch.weights == 0) for batch in batches if batch.rows[0] == PADDING)


@given(random_columns, random_settings)
def test_padding_opens_no_file_and_is_cheap(columns: PlanColumns, settings: PlanSettings) -> None:
    plan = plan_epoch(columns, settings, 0)
    for step in range(plan.n_steps):
        batches = batches_of_step(plan, step)
        cheapest = min(token_count(batch.bucket) for batch in real_batches(batches))
        filled = {batch.slot for batch in real_batches(batches)}
        for batch in batches:
            if PADDING in batch.rows:
                assert batch.rows.tolist() == [PADDING]
                assert token_count(batch.bucket) == (min(cheapest, 16) if batch.slot in filled else cheapest)
                assert batch.tokens == 0


def test_only_the_end_of_an_epoch_is_padded_under_fixed_fill() -> None:
    plan = plan_epoch(COLUMNS, SETTINGS, 0)
    padded = [step for step in range(plan.n_steps) if len(real_batches(batches_of_step(plan, step))) < SETTINGS.slots]
    assert padded in ([], [plan.n_steps - 1])


@pytest.mark.parametrize("world_size", [5, 7, 8, 9, 24])
def test_world_sizes_that_do_not_divide_the_slots_are_refused(world_size: int) -> None:
    plan = plan_epoch(COLUMNS, SETTINGS, 0)
    with pytest.raises(UserError) as refused:
        plan.micro_batches(0, 0, world_size)
    assert refused.value.exit_code == FLAGS
    assert "1, 2, 3, 4, 6, 12" in refused.value.hint
    assert str(world_size) in refused.value.what


# ------------------------------------------------------------------------------------------- batches, slots, steps


@given(random_columns, random_settings)
def test_a_micro_batch_has_one_bucket(columns: PlanColumns, settings: PlanSettings) -> None:
    plan = plan_epoch(columns, settings, 0)
    for step in range(plan.n_steps):
        batches = real_batches(batches_of_step(plan, step))
        planned = [batch.bucket for batch in batches for _ in batch.rows]
        assert planned == plan.buckets_of_step(step)
        assert np.concatenate([batch.rows for batch in batches]).tolist() == plan.rows_of_step(step).tolist()
        assert sum(batch.tokens for batch in batches) == plan.tokens_of_step(step)
        for batch in batches:
            assert len({len(column) for column in batch[3:-1]}) == 1
            assert all((side % 16) == 0 for side in batch.bucket[1:])


@given(random_columns, random_settings.map(lambda s: replace(s, slot_fill="fixed")))
def test_fixed_fill_keeps_the_batch_size(columns: PlanColumns, settings: PlanSettings) -> None:
    plan = plan_epoch(columns, settings, 0)
    batches = real_batches(all_batches(plan))
    assert max(len(batch.rows) for batch in batches) <= settings.batch_size
    smaller = Counter(batch.bucket for batch in batches if len(batch.rows) < settings.batch_size)
    assert all(count == 1 for count in smaller.values())  # only the remainder of each bucket


def cost(settings: PlanSettings, batch: MicroBatch) -> float:
    tokens = token_count(batch.bucket)
    return len(batch.rows) * (settings.cost_linear * tokens + settings.cost_quadratic * tokens**2)


@given(random_columns, random_settings.map(lambda s: replace(s, slot_fill="cost")))
def test_cost_fill_keeps_cost_and_memory(columns: PlanColumns, settings: PlanSettings) -> None:
    plan = plan_epoch(columns, settings, 0)
    batches = real_batches(all_batches(plan))
    largest = max(batches, key=lambda batch: token_count(batch.bucket))
    tokens = token_count(largest.bucket)
    budget = settings.batch_size * cost(settings, largest) / len(largest.rows)
    slots: Counter[tuple[int, int]] = Counter()
    for batch in batches:
        slots[batch.step, batch.slot] += cost(settings, batch)
        assert batch.tokens <= settings.batch_size * tokens
    assert max(slots.values()) <= budget * 1.02 * (1 + 1e-9)
    assert len(slots) == len(plan.slot_first) - 1
    taken = [(row, copy) for _, _, _, row, copy, *_ in samples_of(batches)]
    assert len(set(taken)) == len(taken)  # no sample twice


def test_cost_fill_needs_fewer_steps_and_fills_its_slots() -> None:
    columns = make_columns(4000)
    fixed, filled = (plan_epoch(columns, replace(SETTINGS, slot_fill=fill), 0) for fill in ("fixed", "cost"))
    assert filled.n_steps < 0.8 * fixed.n_steps
    settings = replace(SETTINGS, slot_fill="cost")
    slots: Counter[tuple[int, int]] = Counter()
    for batch in real_batches(all_batches(filled)):
        slots[batch.step, batch.slot] += cost(settings, batch)
    assert np.mean(list(slots.values())) > 0.85 * max(slots.values())


@given(random_columns, random_settings)
def test_each_sample_has_its_own_stratum(columns: PlanColumns, settings: PlanSettings) -> None:
    plan = plan_epoch(columns, settings, 2)
    for step in range(plan.n_steps):
        strata = np.sort(np.concatenate([batch.strata for batch in real_batches(batches_of_step(plan, step))]))
        count = len(strata)
        assert np.floor(strata * count).astype(int).tolist() == list(range(count))
        assert strata[0] > 0
        assert strata[-1] < 1


def test_no_slot_is_tied_to_a_range_of_strata() -> None:
    plan = plan_epoch(make_columns(4000, image_share=0.5), SETTINGS, 0)
    by_slot: dict[int, list[float]] = {}
    for batch in real_batches(all_batches(plan)):
        by_slot.setdefault(batch.slot, []).extend(batch.strata.tolist())
    for strata in by_slot.values():
        assert abs(np.mean(strata) - 0.5) < 5 / np.sqrt(12 * len(strata))
        assert len(set((np.array(strata) * 10).astype(int).tolist())) == 10


def test_steps_have_several_buckets() -> None:
    plan = plan_epoch(make_columns(4000), SETTINGS, 0)
    assert np.median([len(set(plan.buckets_of_step(step))) for step in range(plan.n_steps)]) >= 4


# ------------------------------------------------------------------------------------- weights, clips, frame rates


@given(random_columns, st.integers(0, 99), st.integers(0, 5))
def test_weight_is_the_number_of_occurrences_of_a_row(columns: PlanColumns, seed: int, epoch: int) -> None:
    weight = np.random.default_rng(seed).choice([0, 0.5, 1, 2, 2.25], len(columns)).astype(np.float32)
    settings = replace(SETTINGS, seed=seed)
    plan = plan_epoch(replace(columns, weight=weight), settings, epoch)
    times = np.bincount(plan.row, minlength=len(columns))
    able = np.isin(plan.fates, (Fate.TRAINED, Fate.NOT_DRAWN))
    assert np.all((times == np.floor(weight)) | (times == np.ceil(weight)) | ~able)
    assert np.array_equal(plan.fates[able] == Fate.NOT_DRAWN, times[able] == 0)
    assert count_steps(replace(columns, weight=weight), settings, epoch) == plan.n_steps


def test_without_any_weight_the_hint_is_to_raise_weights() -> None:
    for weight, hint in ((np.zeros(301, np.float32), "raise the `weight`"), (None, "lower --video_sample_n_frames")):
        usable = np.zeros(301, bool) if weight is None else COLUMNS.usable
        with pytest.raises(UserError) as refused:
            plan_epoch(replace(COLUMNS, weight=weight, usable=usable), SETTINGS, 0)
        assert hint in refused.value.hint and refused.value.exit_code == DATA


def test_the_fraction_of_a_weight_is_a_probability() -> None:
    columns = replace(make_columns(4000, image_share=0.0), weight=np.full(4000, 1.25, np.float32))
    plan = plan_epoch(columns, SETTINGS, 0)
    assert len(plan.row) / np.count_nonzero(plan.fates == Fate.TRAINED) == pytest.approx(1.25, abs=0.03)
    assert plan_epoch(columns, SETTINGS, 1).row.tolist() != plan.row.tolist()


@given(random_columns, st.sampled_from(["uniform", "head"]), st.integers(1, 4), st.sampled_from([0.0, 8.0, 40.0]))
def test_clips_of_a_video_are_within_it(columns: PlanColumns, sampling: str, clips: int, fps: float) -> None:
    policy = replace(POLICY, sample_fps=fps, n_frames=9, random_frame_crop=False)
    fps_column = np.random.default_rng(0).choice([0, 12, 23.976, 30], len(columns)).astype(np.float32)
    columns = replace(columns, fps=fps_column)
    settings = replace(SETTINGS, policy=policy, clips_per_video=clips, clip_sampling=sampling)
    plan = plan_epoch(columns, settings, 0)
    pace = np.broadcast_to(pace_of(policy, fps_column), len(columns))
    for batch in real_batches(all_batches(plan)):
        for row, start in zip(batch.rows, batch.starts, strict=True):
            if columns.kind[row] == 1:
                assert 0 <= start <= start + frame_offsets(batch.bucket.frames - 1, pace[row]) < columns.frames[row]
    available = np.maximum(frames_at_pace(columns.frames.astype(int), pace) // 9, 1)
    trained = np.flatnonzero((plan.fates == Fate.TRAINED) & (columns.kind == 1))
    assert np.array_equal(
        np.bincount(plan.row, minlength=len(columns))[trained], np.minimum(available, clips)[trained]
    )


@given(st.integers(1, 2000), st.floats(0.05, 40))
def test_frames_at_pace_is_the_most_frames_that_fit(length: int, pace: float) -> None:
    count = int(frames_at_pace(np.array([length]), np.array([pace]))[0])
    assert frame_offsets(count - 1, pace) < length <= frame_offsets(count, pace)
    assert frames_at_pace(np.array([length]), np.array([3.0]))[0] == frames_at_pace(np.array([length]), 3)[0]


# --------------------------------------------------------------------------------------------------- determinism


def test_the_same_seed_gives_the_same_plan() -> None:
    one, other = plan_epoch(COLUMNS, SETTINGS, 3), plan_epoch(COLUMNS, SETTINGS, 3)
    assert samples_of(all_batches(one)) == samples_of(all_batches(other))
    assert one.buckets == other.buckets


@pytest.mark.parametrize("other", [(SETTINGS, 1), (replace(SETTINGS, seed=43), 0), (replace(SETTINGS, seed=0), 0)])
def test_epochs_and_seeds_differ(other: tuple[PlanSettings, int]) -> None:
    one, two = plan_epoch(COLUMNS, SETTINGS, 0), plan_epoch(COLUMNS, *other)
    assert sorted(one.row.tolist()) == sorted(two.row.tolist())
    assert one.row.tolist() != two.row.tolist()
    assert not set(one.key.tolist()) & set(two.key.tolist())
    starts = dict(zip(one.row.tolist(), one.start.tolist(), strict=True))
    moved = [starts[row] != start for row, start in zip(two.row.tolist(), two.start.tolist(), strict=True)]
    assert np.mean(moved) > 0.4  # images and full-length clips have one start only


def test_copies_of_a_video_are_different_clips() -> None:
    plan = plan_epoch(COLUMNS, replace(SETTINGS, video_repeat=3), 0)
    assert len(set(plan.key.tolist())) == len(plan.key)
    long = [row for row in set(plan.row.tolist()) if COLUMNS.frames[row] > 250]
    starts = [set(plan.start[plan.row == row].tolist()) for row in long]
    assert np.mean([len(found) > 1 for found in starts]) > 0.9


def test_draws_do_not_depend_on_batch_size() -> None:
    one, other = plan_epoch(COLUMNS, SETTINGS, 0), plan_epoch(COLUMNS, replace(SETTINGS, batch_size=5, slots=3), 0)
    for name in ("key", "start"):
        pairs = [dict(zip(p.row.tolist(), getattr(p, name).tolist(), strict=True)) for p in (one, other)]
        assert pairs[0] == pairs[1]


# ------------------------------------------------------------------------------------------------------- summaries


@given(random_columns, random_settings)
def test_the_bucket_table_counts_samples_and_micro_batches(columns: PlanColumns, settings: PlanSettings) -> None:
    plan = plan_epoch(columns, settings, 0)
    batches = real_batches(all_batches(plan))
    counted, micros = Counter(), Counter(batch.bucket for batch in batches)
    for batch in batches:
        counted[batch.bucket] += len(batch.rows)
    table = plan.bucket_table()
    assert {bucket: (n, m) for bucket, n, m in table} == {b: (counted[b], micros[b]) for b in counted}
    tokens = [token_count(bucket) for bucket, _, _ in table]
    assert tokens == sorted(tokens, reverse=True)
    commonest = plan.most_common_bucket()
    clips = {bucket: n for bucket, n in counted.items() if bucket.frames > 1}
    assert (clips or counted)[commonest] == max((clips or counted).values())


# --------------------------------------------------------------------------------------------------- a million rows

MILLION = """
import json, sys, time
from pathlib import Path
import numpy as np
from plans import SETTINGS, make_columns
from videox.data.plan.plan import plan_epoch

def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024

columns = make_columns(1_050_000)
before = time.perf_counter()
plan = plan_epoch(columns, SETTINGS, 0)
planned = time.perf_counter()
step = 900_000 // (SETTINGS.batch_size * SETTINGS.slots)
batches = plan.micro_batches(step, 3, 12)
reached = time.perf_counter()
print(json.dumps({
    "samples": len(plan.row), "peak": resident("VmHWM"), "seconds": planned - before, "reach": reached - planned,
    "behind": int(plan.micro_first[plan.slot_first[step * SETTINGS.slots]]), "rows": batches[0].rows.tolist(),
    "here": plan.rows_of_step(step).tolist(),
}))
"""


def test_a_million_rows_fit_in_half_a_gigabyte() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MILLION], capture_output=True, text=True, check=True, cwd=ROOT / "tests" / "support",
    )  # fmt: skip
    found = json.loads(done.stdout)
    print(f"planned {found['samples']} samples in {found['seconds']:.2f} s, reached a step in {found['reach']:.4f} s")
    assert found["samples"] > 900_000
    assert found["peak"] <= 500
    assert abs(found["behind"] - 900_000) < 10_000  # the step is reached by its number, without replaying others
    assert set(found["rows"]) <= set(found["here"])


def test_clips_and_sizes_repeat_after_cache_variants_epochs() -> None:
    settings = replace(SETTINGS, cache_variants=3, video_repeat=2)

    def drawn(epoch: int, settings: PlanSettings = settings) -> tuple[set, set]:
        plan = plan_epoch(COLUMNS, settings, epoch)
        bucket = np.repeat(plan.micro_bucket, np.diff(plan.micro_first))
        columns = (plan.row, plan.copy, plan.start, plan.variant)
        again = set(zip(*(c.tolist() for c in columns), (plan.buckets[b] for b in bucket), strict=True))
        return again, set(plan.key.tolist())

    epochs = [drawn(epoch) for epoch in range(6)]
    for early, late in zip(epochs[:3], epochs[3:], strict=True):
        assert early[0] == late[0] and not early[1] & late[1]  # noise and timesteps are new
    assert all(not epochs[a][0] & epochs[b][0] for a, b in ((0, 1), (0, 2), (1, 2)))
    assert plan_epoch(COLUMNS, settings, 0).row.tolist() != plan_epoch(COLUMNS, settings, 3).row.tolist()
    unlimited = [drawn(epoch, replace(settings, cache_variants=0)) for epoch in range(4)]
    assert unlimited[:3] == epochs[:3] and unlimited[3][0] != epochs[3][0]
    steps = [plan_epoch(COLUMNS, settings, epoch).n_steps for epoch in range(6)]
    assert steps == [count_steps(COLUMNS, settings, epoch) for epoch in range(6)]
