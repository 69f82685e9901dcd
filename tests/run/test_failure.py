"""Tests of videox.run.failure: a rank that fails or is killed ends all ranks, and the cause is printed once.

The faults are injected into the real training script, in a forked child or under the launcher.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

import forkserver
import pytest
import runs
import torch
from hypothesis import given
from hypothesis import strategies as st
from launches import BackendRuns, exit_codes, launcher_environment, launcher_flags, output_of

from videox.errors import BUG, FLAGS, PEER_LOST, STORAGE
from videox.run.checkpoint import find_checkpoints, verify
from videox.run.failure_hub import Report, find_cause

BACKENDS = ("ddp", "zero2", "zero3", "fsdp1", "fsdp2")
END_SECONDS = 30.0  # within which all processes must end after one has
CAUSE = "this process fails"


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> BackendRuns:
    return BackendRuns(tmp_path_factory.mktemp("wan"), "wan2.1 normal", 4)


# ------------------------------------------------------------------------------------------------- find_cause


REPORTS = st.lists(
    st.builds(Report, rank=st.integers(0, 3), line=st.sampled_from("ab"), exit_code=st.just(2), consequence=st.booleans()),
    min_size=1,
)  # fmt: skip


@given(REPORTS)
def test_cause_is_the_first_report_that_is_no_consequence(reports: list[Report]) -> None:
    found = find_cause(reports)
    assert found in reports
    causes = [report for report in reports if not report.consequence] or reports
    assert found.line == causes[0].line
    assert all(report.rank >= found.rank for report in reports if report.line == found.line)


# ------------------------------------------------------------------------------------------------- faults


def at_start(script: ModuleType) -> None:
    def load(*_: object) -> None:
        raise RuntimeError(CAUSE)

    script.build_model = load


def in_a_step(script: ModuleType) -> None:
    compute, calls = script.accumulate_gradients, iter(range(1, 100))

    def third_fails(*arguments: object, **settings: object) -> torch.Tensor:
        if next(calls) == 3:
            raise RuntimeError(CAUSE)
        return compute(*arguments, **settings)

    script.accumulate_gradients = third_fails


def in_a_layer(script: ModuleType) -> None:
    """Out of memory between the collectives of the second step's forward pass."""
    load, calls = script.build_model, iter(range(1, 100))

    def no_memory(*_: object) -> None:
        # Each step runs a block twice, the second time to compute its activations again; validation has no gradients.
        if torch.is_grad_enabled() and next(calls) == 3:
            raise torch.OutOfMemoryError(CAUSE)

    def loaded(*arguments: object) -> object:
        components = load(*arguments)
        components.transformer.blocks[1].register_forward_pre_hook(no_memory)
        return components

    script.build_model = loaded


def in_a_save(script: ModuleType) -> None:
    """Out of memory before the first collective of the second save."""
    build_engine, calls = script.build.build_engine, iter(range(1, 100))

    def build_failing_engine(*arguments: object) -> object:
        engine = build_engine(*arguments)
        save = engine.save

        def second_fails(*where: object, **state: object) -> None:
            if next(calls) == 2:
                raise torch.OutOfMemoryError(CAUSE)
            save(*where, **state)

        engine.save = second_fails
        return engine

    script.build.build_engine = build_failing_engine


def with_a_full_disk(script: ModuleType) -> None:
    """Any file of a checkpoint that this process writes is too large, as on a disk that is full, from step 2 on."""
    import resource

    save, calls = script.build.Checkpointer.save, iter(range(1, 100))

    def full(checkpointer: object, *arguments: object, **settings: object) -> None:
        if next(calls) >= 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (48 << 10, resource.RLIM_INFINITY))
        save(checkpointer, *arguments, **settings)

    script.build.Checkpointer.save = full


FAULTS = {fault.__name__: fault for fault in (at_start, in_a_step, in_a_layer, in_a_save, with_a_full_disk)}


def train() -> int:
    """Train; the rank in the variable VICTIM gets the fault in the variable FAULT."""
    script = runs.train_script()
    if os.environ["RANK"] == os.environ["VICTIM"]:
        FAULTS[os.environ["FAULT"]](script)
    return script.main()


def start(ground: BackendRuns, backend: str, folder: Path, fault: str, victim: int, **changes: object) -> list:
    return forkserver.shared().start_ranks(
        2,
        ground.flags(folder, checkpointing_steps=1, **changes),
        folder.with_name(f"{folder.name}.log"),
        entry_points=["tests.run.test_failure:train"] * 2,
        environment={**launcher_environment(backend, ground.kind, 2), "VICTIM": str(victim), "FAULT": fault},
    )


def check_only_complete_checkpoints(folder: Path, *steps: int) -> None:
    found = find_checkpoints(folder) if folder.exists() else []
    assert [path.name for path in found] == [f"checkpoint-{step}" for step in steps]
    assert all(verify(path, hashes=True) == [] for path in found)


def check_resumed(ground: BackendRuns, backend: str, folder: Path) -> None:
    again = ground.run_ranks(backend, folder, resume_from_checkpoint="latest")
    assert exit_codes(again) == [0, 0], output_of(again)
    assert not list(folder.glob(".tmp-*"))
    assert [line["step"] for line in forkserver.read_steps(folder)] == list(range(1, ground.steps + 1))


SAVED_BEFORE = {"at_start": 0, "in_a_step": 2, "in_a_layer": 1, "in_a_save": 1}
CODES = {"at_start": BUG, "in_a_step": BUG, "in_a_layer": FLAGS, "in_a_save": FLAGS}  # OOM is a UserError with a hint


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("fault", SAVED_BEFORE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_failure_of_one_rank_ends_all(wan: BackendRuns, tmp_path: Path, backend: str, fault: str, victim: int) -> None:
    folder = tmp_path / "run"
    ranks = start(wan, backend, folder, fault, victim)
    failed, other = ranks[victim], ranks[1 - victim]
    assert failed.wait() != 0
    assert other.wait(END_SECONDS) == CODES[fault], output_of(ranks)
    assert failed.output().count(CAUSE) == 1, failed.output()[-3000:]
    if CODES[fault] == BUG:
        assert f"error: process {victim}: RuntimeError: {CAUSE}\n" in failed.output()
    assert CAUSE not in other.output()
    assert "Traceback" not in other.output(), other.output()[-3000:]
    status = forkserver.read_status(folder)
    assert (status["state"], status["exit_code"]) == ("failed", CODES[fault])
    assert CAUSE in status["error"]
    check_only_complete_checkpoints(folder, *range(1, SAVED_BEFORE[fault] + 1))
    if fault == "in_a_save":
        check_resumed(wan, backend, folder)


# ------------------------------------------------------------------------------------------------ a full disk


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_full_disk_on_one_rank_ends_all_with_one_line(
    wan: BackendRuns, tmp_path: Path, backend: str, victim: int
) -> None:
    folder = tmp_path / "run"
    ranks = start(wan, backend, folder, "with_a_full_disk", victim)
    if backend == "ddp" and victim == 1:  # only rank 0 writes
        assert [rank.wait() for rank in ranks] == [0, 0], output_of(ranks)
        return
    assert [rank.wait() for rank in ranks] == [STORAGE, STORAGE], output_of(ranks)
    lines = [line for rank in ranks for line in rank.output().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, output_of(ranks)
    assert "the save at step 3 failed, as the one before did" in lines[0]
    assert "warning: no checkpoint at step 2" in ranks[0].output()
    assert not any("Traceback" in rank.output() for rank in ranks), output_of(ranks)
    status = forkserver.read_status(folder)
    assert (status["state"], status["exit_code"], status["error"]) == ("failed", STORAGE, lines[0])
    assert not list(folder.glob(".tmp-*"))
    check_only_complete_checkpoints(folder, 1)
    check_resumed(wan, backend, folder)


# --------------------------------------------------------------------------------------------------- killed


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_killed_rank_is_reported_as_lost_peer(wan: BackendRuns, tmp_path: Path, backend: str, victim: int) -> None:
    folder = tmp_path / "run"
    ranks = wan.start_ranks(backend, folder, checkpointing_steps=1)
    ranks[victim].wait_until(lambda: find_checkpoints(folder))
    ranks[victim].kill()
    other = ranks[1 - victim]
    assert other.wait(END_SECONDS) == PEER_LOST, output_of(ranks)
    assert f"peer lost: process {victim} on " in other.error_line()
    status = forkserver.read_status(folder)
    assert (status["state"], status["exit_code"], status["error"]) == ("failed", PEER_LOST, other.error_line())
    assert all(verify(path, hashes=True) == [] for path in find_checkpoints(folder))
    ranks[victim].wait()
    check_resumed(wan, backend, folder)


# ------------------------------------------------------------------------------------------------ the launcher


UNDER_LAUNCHER = """import sys
sys.path[:0] = [{tests!r}, {root!r}]
from tests.run import test_failure
from videox.run.lifecycle import run_script
run_script(test_failure.train)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "fault"), [("ddp", "in_a_step"), ("fsdp2", "in_a_save"), ("zero3", "in_a_layer")])
def test_under_the_launcher_the_cause_is_printed_once(
    wan: BackendRuns, tmp_path: Path, backend: str, fault: str
) -> None:
    folder, faulty = tmp_path / "run", tmp_path / "faulty.py"
    faulty.write_text(UNDER_LAUNCHER.format(tests=str(runs.ROOT / "tests/support"), root=str(runs.ROOT)))
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher_flags(backend, wan.kind, 2)]
    command += ["--main_process_port", "0", str(faulty), *wan.flags(folder, checkpointing_steps=1)]
    found = runs.run_command(command, folder, VICTIM="1", FAULT=fault)
    assert found.code != 0
    printed = f"Error: {CAUSE}" if CODES[fault] == BUG else f"({CAUSE})"
    assert found.stderr.count(printed) == 1, found.stderr[-5000:]
    assert "gloo" not in found.stderr.replace("gloo_", ""), found.stderr[-5000:]
    assert (found.status["state"], found.status["exit_code"]) == ("failed", CODES[fault])
    assert CAUSE in found.status["error"]
    check_only_complete_checkpoints(folder, *range(1, SAVED_BEFORE[fault] + 1))
