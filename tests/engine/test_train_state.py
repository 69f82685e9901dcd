"""Tests of videox.engine.train_state: bit-identical resume, and refusal of what would change the run."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import WanTransformer3DModel
from hypothesis import given
from hypothesis import strategies as st

from videox.data.media.container import MIRRORED
from videox.data.plan.buckets import SizePolicy
from videox.data.plan.plan import plan_epoch
from videox.data.plan.settings import PlanColumns, PlanSettings
from videox.engine.resume import IndexedData, refuse_changed_plan, resume_or_begin
from videox.engine.train_state import (
    STATE_FILE,
    TrainState,
    checkpoint_bytes,
    load_state,
    plan_inputs,
    read_state,
    run_name,
    save_state,
)
from videox.errors import FLAGS, MODEL, UserError
from videox.optim.build import choose_trainable, make_optimizer, parameter_groups

POLICY = SizePolicy(
    video_sample_size=64, image_sample_size=64, token_sample_size=64, n_frames=9, stride=2, enable_bucket=True,
    random_hw_adapt=True, token_length=True, random_frame_crop=False, random_ratio_crop=False, fix_sample_size=None,
)  # fmt: skip
SETTINGS = PlanSettings(
    policy=POLICY, batch_size=2, slots=4, seed=7, slot_fill="fixed", video_repeat=1, held_out=0, cost_linear=1.0,
    cost_quadratic=0.5,
)  # fmt: skip


def state_of(settings: PlanSettings = SETTINGS, index: str = "same") -> TrainState:
    return TrainState(settings.seed, settings.slots, index, plan_inputs(settings), run="a run")


def gather_single(value: object) -> list[object]:
    return [value]


def write_state(folder: Path, state: TrainState) -> Path:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    folder.mkdir(parents=True, exist_ok=True)
    save_state(folder, state=state, model=model, config="{}", optimizer=optimizer)
    return folder


# ------------------------------------------------------------------------------------------ reading and counting


def test_state_round_trips(tmp_path: Path) -> None:
    state = state_of()
    state.step, state.epoch, state.epoch_step = 1234, 5, 17
    state.quarantined, state.bad, state.skipped, state.skipped_in_row = [3, 99], [4], 6, 2
    state.seed = 2**63 - 1
    assert read_state(write_state(tmp_path / "checkpoint", state)) == state


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"seed": 1}', None], ids=["empty", "list", "torn", "short", "none"]
)
def test_unreadable_state_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / STATE_FILE).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="not a readable trainer state") as refused:
        read_state(tmp_path)
    assert refused.value.exit_code == MODEL


@given(st.lists(st.integers(1, 6), min_size=1, max_size=8))
def test_advance_counts_steps_and_epochs(lengths: list[int]) -> None:
    state = state_of()
    for epoch, length in enumerate(lengths):
        for step in range(length):
            assert (state.epoch, state.epoch_step) == (epoch, step)
            assert state.advance(length) == (step == length - 1)
    assert (state.step, state.epoch, state.epoch_step) == (sum(lengths), len(lengths), 0)


def test_bad_rows_are_quarantined_from_the_next_epoch_on() -> None:
    state = state_of()
    state.quarantined, state.bad = [8], [3, 8, 1]
    assert not state.advance(2)
    assert (state.quarantined, state.bad) == ([8], [3, 8, 1])
    assert state.advance(2)
    assert (state.quarantined, state.bad) == ([1, 3, 8], [])


# -------------------------------------------------------------------------------------------- refuse_changed_plan


@pytest.mark.parametrize(
    ("then", "now", "named"),
    [
        (["a", "b"], ["a", "c"], " with its sources (no longer: b; new: c)"),
        (["a", "b"], ["a"], " with its sources (no longer: b)"),
        (["a", "b"], ["b", "a"], " with its sources (the same ones in another order)"),
        ([], ["a", "b"], " with its sources (one list or folder before, now: a, b)"),
        (["a", "b"], ["a", "b"], ""),
        ([], ["a"], ""),
    ],
)
def test_changed_sources_are_named(then: list[str], now: list[str], named: str) -> None:
    state = replace(state_of(), sources=then)
    with pytest.raises(UserError) as refused:
        refuse_changed_plan(state, SETTINGS, IndexedData("another", "names", COLUMNS, sources=tuple(now)))
    assert refused.value.what.endswith(f"the data's rows, captions or sizes have changed{named}")
    refuse_changed_plan(state, SETTINGS)  # equal rows, whatever names them


def test_the_state_of_an_older_version_has_no_sources(tmp_path: Path) -> None:
    checkpoint = write_state(tmp_path / "checkpoint", state_of())
    content = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    del content["sources"]
    (checkpoint / STATE_FILE).write_text(json.dumps(content), encoding="utf-8")
    assert read_state(checkpoint) == state_of()


@pytest.mark.parametrize(
    ("changed", "index", "named"),
    [
        (replace(SETTINGS, batch_size=3), "same", "--train_batch_size was 2, is 3"),
        (replace(SETTINGS, seed=8), "same", "--seed was 7, is 8"),
        (replace(SETTINGS, slot_fill="cost"), "same", "--slot_fill was fixed, is cost"),
        (replace(SETTINGS, policy=replace(POLICY, video_sample_size=96)), "same", "--video_sample_size was 64, is 96"),
        (replace(SETTINGS, policy=replace(POLICY, fix_sample_size=(64, 32))), "same", "--fix_sample_size was None, is [64, 32]"),
        (SETTINGS, "other", "the data's rows, captions or sizes have changed"),
    ],
)  # fmt: skip
def test_changed_setting_is_refused_with_both_values(changed: PlanSettings, index: str, named: str) -> None:
    with pytest.raises(UserError) as refused:
        refuse_changed_plan(state_of(), changed, None if index == "same" else IndexedData(index, "names", COLUMNS))
    assert refused.value.what == (f"the schedule would change: {named}" if index == "same" else named)
    assert refused.value.exit_code == MODEL
    assert "another --output_dir" in refused.value.hint


def test_all_changes_are_listed_and_equal_settings_accepted() -> None:
    refuse_changed_plan(state_of(), SETTINGS)
    with pytest.raises(UserError) as refused:
        other = IndexedData("other", "names", COLUMNS)
        refuse_changed_plan(state_of(), replace(SETTINGS, batch_size=3, seed=8), other)
    assert refused.value.what.count(" was ") == 2
    assert "data's rows" in refused.value.what


def test_old_state_without_a_setting_is_refused_with_its_name() -> None:
    state = state_of()
    del state.settings["held_out"]
    with pytest.raises(UserError, match="--validation_rows was None, is 0"):
        refuse_changed_plan(state, SETTINGS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"held_out_share": 0.1}, "--validation_share was 0.0, is 0.1"),
        ({"held_out_list": "1f2e"}, "--validation_meta was '', is 1f2e"),
    ],
)
def test_other_held_out_rows_are_refused_with_their_flag(change: dict, message: str) -> None:
    assert not change.keys() & state_of().settings.keys()  # at its default it is not stored: old runs keep their names
    with pytest.raises(UserError) as refused:
        refuse_changed_plan(state_of(), replace(SETTINGS, **change))
    assert message in refused.value.what


def test_checkpoint_from_before_balance_keeps_its_order(tmp_path: Path) -> None:
    old = write_older(tmp_path / "older", state_of())
    state, settings = begin(old, seed=None)
    assert (settings.balance, settings.barrier, settings.accumulation, settings.slots) == ("none", "step", 1, 4)
    assert state.step == state_of().step
    by_cost = state_of()
    by_cost.settings["slot_fill"] = "cost"
    with pytest.raises(UserError, match="older version, which filled slots by cost"):
        begin(write_older(tmp_path / "cost", by_cost))


def write_older(folder: Path, state: TrainState) -> Path:
    """Write a checkpoint as a version did that had no balance."""
    for name in ("balance", "barrier", "accumulation", "clips_per_video", "clip_sampling"):
        del state.settings[name]
    del state.settings["policy"]["sample_fps"]
    return write_state(folder, state)


def test_resumed_run_keeps_the_settings_of_its_first_launch(tmp_path: Path) -> None:
    state = state_of()
    state.settings |= {"barrier": "micro", "accumulation": 2, "cost_linear": 3.0, "cost_quadratic": 0.5}
    _, settings = begin(write_state(tmp_path / "checkpoint", state))
    assert (settings.barrier, settings.accumulation) == ("micro", 2)
    assert (settings.cost_linear, settings.cost_quadratic) == (3.0, 0.5)


@pytest.mark.parametrize("timesteps", ["per_step", "across_steps"])
def test_resumed_run_draws_timesteps_as_it_began(timesteps: str, tmp_path: Path) -> None:
    began = replace(SETTINGS, timesteps=timesteps)
    assert ("timesteps" in plan_inputs(began)) == (timesteps != "per_step")  # older versions stored nothing
    checkpoint = write_state(tmp_path / "checkpoint", state_of(began))

    def settings_of(**changes: object) -> PlanSettings:
        return replace(SETTINGS, **{"timesteps": "across_steps", **changes})

    state, settings = resume_or_begin(
        checkpoint, settings_of, IndexedData("same", "names", COLUMNS), seed=7, slots=4, world_size=1,
        flags_name="a run", gather=gather_single,
    )  # fmt: skip
    assert settings == began
    assert (run_name("flags", "data", began) == run_name("flags", "data", SETTINGS)) == (timesteps == "per_step")
    assert state.settings == plan_inputs(began)


def test_the_first_step_of_an_epoch_is_counted_over_the_run() -> None:
    state, found = state_of(), []
    for length in (3, 1, 2):
        for _ in range(length):
            found.append(state.first_step_of_epoch)
            state.advance(length)
    assert found == [0, 0, 0, 3, 4, 4]


def columns_of(width: int = 64, usable: bool = True) -> PlanColumns:
    """Two rows, of which the second one may be lost."""
    sides = {"height": np.array([48, 48], np.int32), "frames": np.array([9, 9], np.int32)}
    kind, widths = np.array([1, 1], np.uint8), np.array([64, width], np.int32)
    return PlanColumns(kind=kind, width=widths, usable=np.array([True, usable]), **sides)


COLUMNS = columns_of()


def test_lost_row_keeps_its_place_and_any_other_change_is_refused(tmp_path: Path) -> None:
    state, _ = begin(None)
    write_state(tmp_path / "checkpoint", state)

    def resumed(columns: PlanColumns, names: str = "names") -> TrainState:
        def settings_of(**changes: object) -> PlanSettings:
            return replace(SETTINGS, **changes)

        return resume_or_begin(
            tmp_path / "checkpoint", settings_of, IndexedData("another", names, columns), seed=7, slots=4,
            world_size=1, flags_name="a run", gather=gather_single,
        )[0]  # fmt: skip

    assert resumed(columns_of(width=0, usable=False)).columns.usable.all()
    with pytest.raises(UserError, match="data's rows"):
        resumed(columns_of(usable=False), "others")
    with pytest.raises(UserError) as refused:
        resumed(columns_of(width=80))
    what = "row 1 (1) was a video of 9 frames of 64x48, is a video of 9 frames of 80x48"
    assert refused.value.what == f"1 row has changed since the run began: {what}"


def test_rows_that_this_version_decodes_otherwise_are_named(tmp_path: Path) -> None:
    state, _ = begin(None)

    def write() -> None:
        shutil.rmtree(tmp_path / "checkpoint", ignore_errors=True)
        write_state(tmp_path / "checkpoint", state)

    write()  # as that of an older version: no decoding

    def resumed(columns: PlanColumns) -> TrainState:
        def settings_of(**changes: object) -> PlanSettings:
            return replace(SETTINGS, **changes)

        data = IndexedData("another", "names", columns, name_of=lambda row: ("'a.mp4'", "'b.gif'")[row])
        return resume_or_begin(
            tmp_path / "checkpoint", settings_of, data, seed=7, slots=4, world_size=1, flags_name="a run",
            gather=gather_single,
        )[0]  # fmt: skip

    mirrored = replace(COLUMNS, decoding=np.array([MIRRORED, 0], np.uint32))
    image = replace(COLUMNS, kind=np.array([1, 0], np.uint8), frames=np.array([9, 1], np.int32))
    found = replace(columns_of(usable=False), decoding=None)
    for columns, row in (
        (mirrored, "row 0 ('a.mp4') is decoded differently by this version: a mirrored video"),
        (image, "row 1 ('b.gif') was a video of 9 frames of 64x48, is an image of 64x48"),
    ):
        with pytest.raises(UserError) as refused:
            resumed(columns)
        assert refused.value.what == f"1 row has changed since the run began: {row}"
    assert resumed(found).columns.usable.all()  # a lost row is no change
    state.columns = replace(COLUMNS, decoding=mirrored.decoding)
    write()
    np.testing.assert_array_equal(resumed(mirrored).columns.decoding, mirrored.decoding)
    lost = replace(columns_of(usable=True), usable=np.array([False, True]))
    assert resumed(lost).columns.usable.all()  # the only mirrored row is lost: its decoding is not known any more
    state.columns = found
    write()
    with pytest.raises(UserError, match=r"row 1 \('b.gif'\) could not be read, is a video of 9 frames of 64x48"):
        resumed(COLUMNS)


def begin(checkpoint: Path | None, *, seed: int | None = 7, slots: int = 4, world_size: int = 1) -> tuple:
    def settings_of(**changes: object) -> PlanSettings:
        return replace(SETTINGS, **changes)

    return resume_or_begin(
        checkpoint, settings_of, IndexedData("same", "names", COLUMNS), seed=seed, slots=slots,
        world_size=world_size, flags_name="a run", gather=gather_single,
    )  # fmt: skip


def test_new_run_uses_the_requested_seed_or_draws_one() -> None:
    state, settings = begin(None, seed=0)
    assert (state.seed, settings.seed, state.step) == (0, 0, 0)
    drawn = {begin(None, seed=None)[0].seed for _ in range(8)}
    assert len(drawn) > 1
    assert all(0 <= seed < 2**32 for seed in drawn)


def test_runs_with_the_same_name_train_the_same_order() -> None:
    def name(**changes: object) -> str:
        return run_name("flags", "data", replace(SETTINGS, slots=4, **changes))

    per_process = {"accumulation": 1, "barrier": "step"}
    assert (
        name(**per_process) == name(**per_process) == name(accumulation=4, barrier="step")
    )  # 4 processes; 1 with 4 steps
    others = [{"accumulation": 2}, {"barrier": "micro"}, {"seed": SETTINGS.seed + 1}, {"cost_quadratic": 2.0}]
    names = [name(**{**per_process, **other}) for other in others]
    names += [run_name("other flags", "data", replace(SETTINGS, slots=4, **per_process))]
    names += [run_name("flags", "other data", replace(SETTINGS, slots=4, **per_process)), name(**per_process)]
    assert len(set(names)) == len(names)
    sides = np.random.default_rng(0).integers(64, 400, (2, 64))
    columns = PlanColumns(np.zeros(64, np.uint8), *sides.astype(np.int32), np.ones(64, np.int32), np.ones(64, bool))
    planned = (plan_epoch(columns, replace(SETTINGS, slots=4, accumulation=each), 0) for each in (1, 4))
    orders = dict(zip((1, 4), (plan.row.tolist() for plan in planned), strict=True))
    assert orders[1] == orders[4]
    assert begin(None, seed=None)[0].run != begin(None, seed=None)[0].run


def test_resumed_run_keeps_its_seed_and_slots(tmp_path: Path) -> None:
    checkpoint = write_state(tmp_path / "checkpoint", state_of())
    for slots, world_size in ((1, 1), (2, 2), (8, 4)):
        state, settings = begin(checkpoint, seed=None, slots=slots, world_size=world_size)
        assert (state.seed, state.slots, settings.slots) == (7, 4, 4)
    with pytest.raises(UserError, match="--seed was 7, is 9"):
        begin(checkpoint, seed=9)
    with pytest.raises(UserError, match="3 does not divide the 4 slots") as refused:
        begin(checkpoint, slots=3, world_size=3)
    assert refused.value.exit_code == FLAGS
    assert "1, 2, 4 processes" in refused.value.hint


# ------------------------------------------------------------------------------- weights and optimizer


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> WanTransformer3DModel:
    model = tiny.build_wan_t2v(tmp_path_factory.mktemp("model") / "model")
    return WanTransformer3DModel.from_pretrained(model / "transformer")


def choose(model: torch.nn.Module, trainable: list[str], low: list[str]) -> torch.optim.Optimizer:
    groups = parameter_groups(model, *choose_trainable(model, trainable, low))
    return make_optimizer(groups, learning_rate=1e-2, betas=(0.9, 0.999), weight_decay=0.1, epsilon=1e-8)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Run AdamW steps first..last; each step's data is a function of its number."""
    for step in range(first, last + 1):
        generator = torch.Generator().manual_seed(step)
        latents = torch.randn(1, 16, 2, 4, 4, generator=generator)
        text = torch.randn(1, 5, model.config.text_dim, generator=generator)
        prediction = model(hidden_states=latents, timestep=torch.tensor([100.0 * step]), encoder_hidden_states=text)[0]
        (prediction - latents).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def bits(model: torch.nn.Module) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("trainable", "low"),
    [(["."], []), (["attn1"], ["ffn"]), (["blocks.1"], [])],
    ids=["all", "two_learning_rates", "part"],
)
def test_resume_is_bit_identical(
    fresh: WanTransformer3DModel, tmp_path: Path, trainable: list[str], low: list[str]
) -> None:
    unbroken = copy.deepcopy(fresh)
    optimizer = choose(unbroken, trainable, low)
    train(unbroken, optimizer, 1, 3)
    state = state_of()
    state.step = 3
    save = partial(save_state, state=state, model=unbroken, config=unbroken.to_json_string(), optimizer=optimizer)
    tmp_path.joinpath("a").mkdir()
    save(tmp_path / "a")
    at_save = bits(unbroken)
    train(unbroken, optimizer, 4, 6)

    resumed = copy.deepcopy(fresh)
    again = choose(resumed, trainable, low)
    load_state(tmp_path / "a", resumed, again)
    assert bits(resumed) == at_save != bits(fresh)
    train(resumed, again, 4, 6)
    assert bits(resumed) == bits(unbroken)
    # The files saved from both are equal, too, and diffusers reads the weights.
    for name, model, its_optimizer in (("b", unbroken, optimizer), ("c", resumed, again)):
        (tmp_path / name).mkdir()
        save_state(tmp_path / name, state=state, model=model, config=model.to_json_string(), optimizer=its_optimizer)
    files = sorted(path.relative_to(tmp_path / "b") for path in (tmp_path / "b").rglob("*") if path.is_file())
    assert all((tmp_path / "b" / name).read_bytes() == (tmp_path / "c" / name).read_bytes() for name in files)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path / "b" / "transformer")
    assert bits(loaded) == bits(unbroken)


def test_checkpoint_bytes_equals_the_size_of_the_files(fresh: WanTransformer3DModel, tmp_path: Path) -> None:
    model = copy.deepcopy(fresh)
    optimizer = choose(model, ["attn1"], ["ffn"])
    train(model, optimizer, 1, 1)
    save_state(tmp_path, state=state_of(), model=model, config=model.to_json_string(), optimizer=optimizer)
    written = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    headers = 0
    for path in tmp_path.rglob("*.safetensors"):
        headers += 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert written - headers == pytest.approx(checkpoint_bytes(model), rel=0.01)  # each step counter is a few bytes


def test_other_weights_or_other_trainable_parameters_are_refused(fresh: WanTransformer3DModel, tmp_path: Path) -> None:
    model = copy.deepcopy(fresh)
    optimizer = choose(model, ["attn1"], [])
    train(model, optimizer, 1, 1)
    save_state(tmp_path, state=state_of(), model=model, config=model.to_json_string(), optimizer=optimizer)
    for chosen in (["ffn"], ["."]):
        other = copy.deepcopy(fresh)
        with pytest.raises(UserError) as refused:
            load_state(tmp_path, other, choose(other, chosen, []))
        assert refused.value.exit_code == MODEL
    narrow = WanTransformer3DModel.from_config({**json.loads(fresh.to_json_string()), "ffn_dim": 16})
    with pytest.raises(UserError):
        load_state(tmp_path, narrow, choose(narrow, ["attn1"], []))
