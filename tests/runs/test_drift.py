"""Tests of two real ranks whose replicated weights become different: both end, and no checkpoint has them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import forkserver
import pytest
import runs
import torch
from launches import BackendRuns, exit_codes, output_of

from videox.errors import NUMERICS
from videox.run.checkpoint import find_checkpoints, verify

BAD_STEP = 3
HERE = "tests.runs.test_drift"


@torch.no_grad()
def change_one_bit(engine: Any) -> None:
    """Change the lowest bit of one number of a replicated weight, as a memory error does."""
    _, weight = list(engine.replicated_weights())[-1]
    values = weight.view(-1)
    values.view(torch.int16 if values.element_size() == 2 else torch.int32)[0] ^= 1


def train_with_a_drifted_rank() -> int:
    """Train on two ranks; after step 3 one bit of one weight of rank 1 is another one."""
    script = runs.train_script()
    finish = script.loop.finish_step

    def drifted(args: Any, validate: Any, checkpoints: Any, **settings: Any) -> bool:
        if checkpoints.state.step == BAD_STEP and os.environ["RANK"] == "1":
            change_one_bit(checkpoints.engine)
        return finish(args, validate, checkpoints, **settings)

    script.loop.finish_step = drifted
    return script.main()


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> BackendRuns:
    return BackendRuns(tmp_path_factory.mktemp("wan"), "wan2.1 normal", 2)


@pytest.mark.parametrize(
    ("backend", "changes"),
    [
        ("ddp", {"replica_check_steps": 1, "checkpointing_steps": 2}),
        pytest.param("ddp", {"checkpointing_steps": 2, "use_ema": True}, marks=pytest.mark.slow),
        pytest.param(
            "ddp", {"replica_check_steps": 1, "checkpointing_steps": 2, "lora_rank": 2}, marks=pytest.mark.slow
        ),
        pytest.param("zero2", {"replica_check_steps": 1, "checkpointing_steps": 2}, marks=pytest.mark.slow),
    ],
)
def test_drifted_replicas_end_the_run_on_all_ranks(
    wan: BackendRuns, tmp_path: Path, backend: str, changes: dict[str, object]
) -> None:
    folder = tmp_path / "run"
    ranks = wan.run_ranks(
        backend, folder, entry_point=f"{HERE}:train_with_a_drifted_rank", max_train_steps=6, **changes
    )
    assert exit_codes(ranks) == [NUMERICS, NUMERICS], output_of(ranks)
    error = forkserver.read_status(folder)["error"]
    found_at = BAD_STEP if "replica_check_steps" in changes else 4  # before the next save
    assert f"step {found_at}: the weights of rank 1 are not those of rank 0" in error
    assert "tensors differ, the first one is " in error and " they became different after step 2." in error
    assert [path.name for path in find_checkpoints(folder)] == ["checkpoint-2"]
    assert verify(folder / "checkpoint-2", hashes=True) == []


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", "zero2", "zero3", "fsdp2"])
def test_comparisons_change_nothing(wan: BackendRuns, tmp_path: Path, backend: str) -> None:
    folders = [tmp_path / "with", tmp_path / "without"]
    for folder, every in zip(folders, (1, 0), strict=True):
        ranks = wan.run_ranks(backend, folder, max_train_steps=3, replica_check_steps=every, checkpointing_steps=3)
        assert exit_codes(ranks) == [0, 0], output_of(ranks)
    first, second = (forkserver.read_steps(folder) for folder in folders)
    assert first == second
