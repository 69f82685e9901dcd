"""Tests of runs whose weights, moments or gradients become bad: nothing of it is saved, and all ranks agree."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forkserver
import pytest
import runs
import tiny
import torch
from launches import SHARDED_BACKENDS, BackendRuns, exit_codes, output_of

from videox.activity import ACTIVITY
from videox.errors import NUMERICS
from videox.run.checkpoint import find_checkpoints, verify
from videox.run.folder import prune
from videox.training import checkpointing, spikes

BAD_STEP = 3
FLAGS = {"mixed_precision": "no", "checkpointing_steps": 1, "lr_warmup_steps": 0, "validation_rows": 0}


def at_step(script: Any, step: int, damage: Callable[[Any], None], patch: Callable[..., None] = setattr) -> None:
    """Call `damage` with the engine at the end of the backward pass of one step of a run."""
    engines: list[Any] = []
    steps: list[int] = []
    build_engine, accumulate, dump_folder = script.build.build_engine, script.accumulate_gradients, script.dump_folder

    def remember_engine(*arguments: Any, **settings: Any) -> Any:
        engines.append(build_engine(*arguments, **settings))
        return engines[-1]

    def remember_step(folder: Path, number: int, dumped: list[int]) -> Path | None:
        steps.append(number)
        return dump_folder(folder, number, dumped)

    def accumulate_and_damage(*arguments: Any) -> torch.Tensor:
        loss = accumulate(*arguments)
        if steps and steps[-1] == step and arguments[4]["last"]:
            damage(engines[-1])
        return loss

    patch(script.build, "build_engine", remember_engine)
    patch(script, "dump_folder", remember_step)
    patch(script, "accumulate_gradients", accumulate_and_damage)


@torch.no_grad()
def damage_weight(engine: Any, value: float = math.nan) -> None:
    """Set one number of a weight that this rank has a part of; under ZeRO of its float32 master alone."""
    params = engine.fp32_params()
    name = next(name for name in reversed(params.names) if params.read(name).numel())
    values = params.read(name).clone()
    values.view(-1)[-1] = value
    params.write(name, values)


@torch.no_grad()
def damage_moment(engine: Any) -> None:
    state = next(state for state in engine.optimizer.state.values() if "exp_avg_sq" in state)
    state["exp_avg_sq"].view(-1)[0] = -1e-3


# ----------------------------------------------------------------------------------------------------- one process


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("bad")
    return tiny.build_wan_t2v(folder / "model"), tiny.make_dataset(folder / "data")


def damaged_run(
    paths: tuple[Path, Path], folder: Path, patch: pytest.MonkeyPatch, damage: Callable[[Any], None], **changes: object
) -> runs.Outcome:
    at_step(runs.train_script(), BAD_STEP, damage, patch.setattr)
    return runs.train(runs.wan_flags(*paths, folder, **{**FLAGS, **changes}))


def test_a_bad_weight_is_never_saved_and_two_refusals_end_the_run(
    paths: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage(engine: Any) -> None:  # large enough to be refused, small enough to train on
        damage_weight(engine, -7e4)

    pruned_in: list[tuple[str, ...]] = []

    def prune_noting_the_section(*arguments: Any) -> list[str]:
        pruned_in.append(ACTIVITY.sections)
        return prune(*arguments)

    monkeypatch.setattr(checkpointing, "prune", prune_noting_the_section)
    folder = tmp_path / "run"
    outcome = damaged_run(paths, folder, monkeypatch, damage, max_train_steps=6, checkpoints_total_limit=1)
    assert outcome.code == NUMERICS, outcome.stderr
    assert pruned_in == [("a save",)] * 2  # not as a part of the next step, for its times and for the watchdog
    said = "has the value -7e+04, and none above 65,504 is plausible); the last good checkpoint is checkpoint-2"
    (warning,) = [
        line.strip()
        for line in (outcome.stdout + outcome.stderr).splitlines()
        if line.strip().startswith("warning: no checkpoint at step 3 (")
    ]
    assert warning.endswith(f"{said}; training continues")
    error = outcome.status["error"]
    assert "the save at step 4 failed, as the one before did (" in error and said in error
    assert [path.name for path in find_checkpoints(folder)] == ["checkpoint-2"]
    assert verify(folder / "checkpoint-2", hashes=True) == []
    assert not (folder / "transformer").exists()


@pytest.mark.slow
@pytest.mark.parametrize("damage", [damage_weight, damage_moment])
def test_bad_numbers_in_the_last_step_are_a_failure_without_an_export(
    paths: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Any], None]
) -> None:
    folder = tmp_path / "run"
    outcome = damaged_run(paths, folder, monkeypatch, damage, max_train_steps=BAD_STEP)
    assert (outcome.code, outcome.status["state"]) == (NUMERICS, "failed")
    assert "the last good checkpoint is checkpoint-2. Fix: resume with" in outcome.status["error"]
    assert [path.name for path in find_checkpoints(folder)] == ["checkpoint-1", "checkpoint-2"]
    assert not (folder / "transformer").exists()


@pytest.mark.slow
def test_a_bad_ema_is_refused(paths: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damage(engine: Any) -> None:
        next(iter(engine.ema.shards.values())).view(-1)[0] = math.inf

    outcome = damaged_run(paths, tmp_path / "run", monkeypatch, damage, max_train_steps=BAD_STEP, use_ema=True)
    assert outcome.code == NUMERICS and "(EMA of " in outcome.status["error"]


# ----------------------------------------------------------------------------------------------------- every backend


def train_with_a_bad_weight() -> int:
    """Train on two ranks; in the last step one number of one rank's weights becomes NaN."""
    script, rank = runs.train_script(), os.environ["RANK"]
    bad_rank = "0" if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true" and not _is_fsdp() else "1"
    at_step(script, BAD_STEP, lambda engine: damage_weight(engine) if rank == bad_rank else None)
    return script.main()


def _is_fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def train_with_one_infinite_gradient() -> int:
    """Train on two ranks; in step 3 rank 1 alone has an infinite value in the gradients that were reduced."""
    script = runs.train_script()

    def damage(engine: Any) -> None:
        if os.environ["RANK"] == "1":
            gradients = [p.grad for p in engine.model.parameters() if p.grad is not None]
            local = [g.to_local() if hasattr(g, "to_local") else g for g in gradients]
            next(values for values in local if values.numel()).view(-1)[0] = math.inf

    at_step(script, BAD_STEP, damage)
    return script.main()


def train_with_a_spike() -> int:
    """Train on two ranks with bounds from the fifth step on; the losses of step 7 are a thousand times as high."""
    spikes.LEAST = 4
    script, compute_losses = runs.train_script(), runs.train_script().velocity_losses
    high = [False]

    def losses(*arguments: torch.Tensor) -> torch.Tensor:
        return compute_losses(*arguments) * (1e3 if high[0] else 1)

    dump_folder = script.dump_folder

    def note_step(folder: Path, number: int, dumped: list[int]) -> Path | None:
        high[0] = number == 7
        return dump_folder(folder, number, dumped)

    script.velocity_losses, script.dump_folder = losses, note_step
    return script.main()


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> BackendRuns:
    return BackendRuns(tmp_path_factory.mktemp("wan"), "wan2.1 normal", 2)


HERE = "tests.runs.test_bad_state"


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", *SHARDED_BACKENDS])
def test_a_bad_weight_of_one_rank_is_refused_on_all(wan: BackendRuns, tmp_path: Path, backend: str) -> None:
    folder = tmp_path / "run"
    ranks = wan.run_ranks(
        backend, folder, entry_point=f"{HERE}:train_with_a_bad_weight", max_train_steps=BAD_STEP,
        checkpointing_steps=1, lr_warmup_steps=0,
    )  # fmt: skip
    assert exit_codes(ranks) == [NUMERICS, NUMERICS], output_of(ranks)
    error = forkserver.read_status(folder)["error"]
    assert f"rank {0 if backend == 'ddp' else 1}: " in error and "contains NaN" in error
    assert "the last good checkpoint is checkpoint-2" in error
    assert [path.name for path in find_checkpoints(folder)] == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", "fsdp2"])
def test_an_infinite_gradient_of_one_rank_skips_the_step_on_all(
    wan: BackendRuns, tmp_path: Path, backend: str
) -> None:
    ranks = wan.run_ranks(
        backend, tmp_path / "run", entry_point=f"{HERE}:train_with_one_infinite_gradient", max_train_steps=4
    )
    assert exit_codes(ranks) == [0, 0], output_of(ranks)
    assert f"step {BAD_STEP} was skipped: its loss or gradient is not finite" in ranks[0].output()
    assert [line["grad_norm"] is not None for line in forkserver.read_steps(tmp_path / "run")] == [
        True,
        True,
        False,
        True,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", *SHARDED_BACKENDS])
def test_a_spike_is_left_out_on_all_ranks(wan: BackendRuns, tmp_path: Path, backend: str) -> None:
    folder = tmp_path / "run"
    ranks = wan.run_ranks(
        backend, folder, entry_point=f"{HERE}:train_with_a_spike", max_train_steps=8, checkpointing_steps=1,
        skip_spikes=True, save_whole_weights=True, lr_warmup_steps=0,
    )  # fmt: skip
    assert exit_codes(ranks) == [0, 0], output_of(ranks)
    assert ranks[0].output().count("is left out (--skip_spikes)") == 1
    assert "step 7 is left out (--skip_spikes): its loss" in ranks[0].output()
    steps = [runs.read_weights(folder / f"checkpoint-{step}" / "transformer") for step in (6, 7, 8)]
    assert all(torch.equal(steps[0][name], steps[1][name]) for name in steps[0])
    assert not all(torch.equal(steps[1][name], steps[2][name]) for name in steps[0])
    recorded = forkserver.read_steps(folder)
    assert recorded[6]["loss"] > 50 * recorded[5]["loss"] and recorded[6]["grad_norm"] > 0
