"""Tests of DDP on real processes: equal to gradient accumulation on one process, and all ranks stop and fail together.

Tests about the launcher start it. The others fork the ranks with the launcher's environment variables (forkserver.py).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import forkserver
import numpy as np
import pytest
import runs
import tiny
from launches import output_of

from videox.data.index.index import DataLocation, build_index
from videox.run.checkpoint import find_checkpoints, verify
from videox.training.planning import index_path

STEPS = 8
FLAGS, DATA, PEER_LOST, BUG, STOPPED = 2, 3, 7, 70, 75
EXIT_TIMEOUT = 30.0  # seconds within which all ranks must end after one has ended
LAUNCH = (sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--dynamo_backend", "no")


class DdpRuns:
    """A model and a data set, and a baseline run on one process with two micro-batches per step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = tiny.build_wan_t2v(folder / "model")
        self.metadata = tiny.make_dataset(folder / "data", copies=2)
        self.baseline = folder / "baseline"
        assert forkserver.shared().run(self.flags(self.baseline, accumulation=2), self.log("baseline")).code == 0

    def log(self, name: str) -> Path:
        return self.folder / f"{name}-{time.monotonic_ns()}.log"

    def flags(self, output_dir: Path, *, accumulation: int = 1, **changes: object) -> list[str]:
        settings = {"max_train_steps": STEPS, "checkpointing_steps": 4, "mixed_precision": "no"}
        # Sums in another order differ in the last bit. Adam with a tiny epsilon would turn gradients that consist of
        # such rounding errors only into full steps.
        settings |= {"gradient_accumulation_steps": accumulation, "adam_epsilon": "1e-6"}
        return runs.wan_flags(self.model, self.metadata, output_dir, **{**settings, **changes})

    def start_ranks(self, world_size: int, output_dir: Path, **changes: object) -> list[forkserver.TrainerProcess]:
        return forkserver.shared().start_ranks(
            world_size, self.flags(output_dir, **changes), self.log(output_dir.name)
        )


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> DdpRuns:
    return DdpRuns(tmp_path_factory.mktemp("ddp"))


def wait_for_all(ranks: list[forkserver.TrainerProcess], timeout: float = forkserver.TIMEOUT) -> list[int]:
    """Wait for all ranks and return their exit codes."""
    return [rank.wait(timeout) for rank in ranks]


def written_steps(output_dir: Path) -> int:
    metrics = output_dir / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def assert_equal_runs(output_dir: Path, expected: Path, tolerance: float, last: int = STEPS) -> None:
    """Check that two runs used the same samples, with equal losses, and ended with equal weights."""
    found, expected_steps = forkserver.read_steps(output_dir), forkserver.read_steps(expected)
    assert [line["step"] for line in found] == list(range(1, last + 1))
    for name in ("rows", "buckets", "lr", "tokens"):
        assert [line[name] for line in found] == [line[name] for line in expected_steps], name
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(
            [line[name] for line in found], [line[name] for line in expected_steps], rtol=tolerance, err_msg=name
        )
    a, b = (runs.read_weights(folder / f"checkpoint-{last}" / "transformer") for folder in (output_dir, expected))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name].numpy(), b[name].numpy(), rtol=0, atol=1e-5, err_msg=name)


# -------------------------------------------------------------------------------------- the same run on more processes


def test_two_ranks_equal_one_with_twice_the_accumulation(ddp: DdpRuns, tmp_path: Path) -> None:
    ranks = ddp.start_ranks(2, tmp_path / "run", dataloader_num_workers=1)
    assert wait_for_all(ranks) == [0, 0], output_of(ranks)
    assert "backend     ddp" in ranks[0].output()
    assert "processes   2" in ranks[0].output()
    assert "processes" not in ranks[1].output()
    assert_equal_runs(tmp_path / "run", ddp.baseline, 1e-5)


def test_a_run_on_two_ranks_resumes_on_one(ddp: DdpRuns, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ranks = ddp.start_ranks(2, folder, max_train_steps=4)
    assert wait_for_all(ranks) == [0, 0], output_of(ranks)
    resumed = forkserver.shared().run(ddp.flags(folder, resume_from_checkpoint="latest"), ddp.log("resumed"))
    assert resumed.code == 0, resumed.output()[-4000:]
    assert_equal_runs(folder, ddp.baseline, 1e-6)


@pytest.mark.slow
def test_a_run_on_one_rank_resumes_on_four_two_and_one(ddp: DdpRuns, tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    server = forkserver.shared()
    assert server.run(ddp.flags(whole, accumulation=4), ddp.log("whole")).code == 0
    assert server.run(ddp.flags(folder, accumulation=4, max_train_steps=4), ddp.log("begin")).code == 0
    for world_size, last in ((4, 5), (2, 7), (1, STEPS)):
        ranks = ddp.start_ranks(world_size, folder, max_train_steps=last, resume_from_checkpoint="latest")
        assert wait_for_all(ranks) == [0] * world_size, output_of(ranks)
    assert_equal_runs(folder, whole, 1e-5)


@pytest.mark.slow
def test_resume_on_two_ranks_is_bit_identical(ddp: DdpRuns, tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert wait_for_all(ddp.start_ranks(2, whole, mixed_precision="bf16")) == [0, 0]
    ranks = ddp.start_ranks(2, folder, mixed_precision="bf16")
    ranks[0].wait_until(lambda: written_steps(folder) >= 5)
    for rank in ranks:
        rank.kill()
    wait_for_all(ranks)
    assert wait_for_all(ddp.start_ranks(2, folder, mixed_precision="bf16", resume_from_checkpoint="latest")) == [0, 0]
    assert forkserver.differences(folder, whole, STEPS) == []


def test_a_world_size_that_does_not_divide_the_step_is_refused(ddp: DdpRuns, tmp_path: Path) -> None:
    folder = shutil.copytree(ddp.baseline, tmp_path / "run")
    ranks = ddp.start_ranks(3, folder, resume_from_checkpoint="latest")
    assert wait_for_all(ranks) == [FLAGS] * 3, output_of(ranks)
    assert "3 does not divide the 2 slots of an optimizer step" in ranks[0].error_line()
    assert "launch one of 1, 2 processes" in ranks[0].error_line()
    assert not any("error: " in rank.output() for rank in ranks[1:])  # printed once


# ---------------------------------------------------------------------------------------------- all ranks end together


def check_stopped(ddp: DdpRuns, folder: Path) -> None:
    """Check that a run was saved at the step where it stopped, and that it can be resumed to the end."""
    status, step = forkserver.read_status(folder), written_steps(folder)
    assert (status["state"], status["exit_code"], status["step"]) == ("stopped", STOPPED, step)
    assert 0 < step < STEPS
    assert verify(folder / f"checkpoint-{step}", hashes=True) == []
    resumed = forkserver.shared().run(ddp.flags(folder, resume_from_checkpoint="latest"), ddp.log("resumed"))
    assert resumed.code == 0, resumed.output()[-4000:]
    assert_equal_runs(folder, ddp.baseline, 1e-5)


def test_a_signal_to_one_rank_stops_all_at_the_same_step(ddp: DdpRuns, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ranks = ddp.start_ranks(2, folder)
    ranks[0].wait_until(lambda: written_steps(folder) >= 2)
    ranks[1].signal(signal.SIGTERM)
    assert wait_for_all(ranks, EXIT_TIMEOUT) == [STOPPED, STOPPED], output_of(ranks)
    assert "stopped by another process at step" in ranks[0].output()
    check_stopped(ddp, folder)


def check_failed(ddp: DdpRuns, folder: Path, ranks: list[forkserver.TrainerProcess], newest: int) -> None:
    """Check that all ranks ended, that no partial checkpoint is left, and that the run can be resumed."""
    assert all(code != 0 for code in wait_for_all(ranks, EXIT_TIMEOUT)), output_of(ranks)
    assert forkserver.read_status(folder)["state"] == "failed"
    assert not list(folder.glob(".tmp-checkpoint-*"))
    assert [path.name for path in find_checkpoints(folder)] == ([f"checkpoint-{newest}"] if newest else [])
    assert all(verify(path, hashes=True) == [] for path in find_checkpoints(folder))
    resumed = ddp.start_ranks(2, folder, resume_from_checkpoint="latest")
    assert wait_for_all(resumed) == [0, 0], output_of(resumed)
    assert_equal_runs(folder, ddp.baseline, 1e-5)


def fail_in_sixth_batch() -> int:
    """Entry point of a forked rank: train, and raise in the sixth micro-batch."""
    script, batches = tiny.load_script(forkserver.SCRIPT), iter(range(1, 6))
    compute = script.accumulate_gradients

    def fail_after_five(*arguments: object, **settings: object) -> object:
        if next(batches, None) is None:
            raise RuntimeError("injected failure")
        return compute(*arguments, **settings)

    script.accumulate_gradients = fail_after_five
    return script.main()


def test_one_process_that_fails_ends_all(ddp: DdpRuns, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ranks = forkserver.shared().start_ranks(
        2, ddp.flags(folder), ddp.log("fails"), entry_points=("", "tests.runs.test_ddp:fail_in_sixth_batch")
    )
    assert wait_for_all(ranks, EXIT_TIMEOUT)[0] == BUG, output_of(ranks)
    # printed by the failing rank only
    assert "".join(rank.output() for rank in ranks).count("RuntimeError: injected failure") == 1
    status = forkserver.read_status(folder)
    assert (status["exit_code"], status["error"]) == (BUG, "error: process 1: RuntimeError: injected failure")
    check_failed(ddp, folder, ranks, newest=4)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_during_a_save_leaves_no_partial_checkpoint(ddp: DdpRuns, tmp_path: Path, victim: int) -> None:
    folder = tmp_path / "run"
    ranks = ddp.start_ranks(2, folder, checkpointing_steps=2)
    while ranks[0].wait_until(lambda: list(folder.glob(".tmp-checkpoint-*"))):
        ranks[victim].signal(signal.SIGSTOP)
        if list(folder.glob(".tmp-checkpoint-*")):
            break
        ranks[victim].signal(signal.SIGCONT)
    saved = [path.name for path in find_checkpoints(folder)]
    ranks[victim].kill()
    assert wait_for_all(ranks, EXIT_TIMEOUT)[1 - victim] == PEER_LOST, output_of(ranks)
    assert forkserver.read_status(folder)["exit_code"] == PEER_LOST
    assert [path.name for path in find_checkpoints(folder)] == saved
    assert all(verify(path, hashes=True) == [] for path in find_checkpoints(folder))
    resumed = ddp.start_ranks(2, folder, resume_from_checkpoint="latest")
    assert wait_for_all(resumed) == [0, 0], output_of(resumed)
    assert not list(folder.glob(".tmp-checkpoint-*"))
    assert_equal_runs(folder, ddp.baseline, 1e-5)


def test_ranks_with_different_flags_are_refused_before_anything_is_written(ddp: DdpRuns, tmp_path: Path) -> None:
    folder, changes = tmp_path / "run", {"seed": 43, "checkpointing_steps": 2, "max_train_steps": 2}
    ranks = forkserver.shared().run_ranks(2, [ddp.flags(folder), ddp.flags(folder, **changes)], ddp.log("flags"))
    assert wait_for_all(ranks) == [FLAGS, FLAGS], output_of(ranks)
    assert (
        ranks[0]
        .error_line()
        .startswith(
            "error: --checkpointing_steps: 4 in process 0, 2 in process 1; --max_train_steps: 8 in process 0, 2 in process 1; "
            "--seed: "
        )
    )
    assert not folder.exists()


@pytest.mark.parametrize("indexed", [True, False], ids=["indexed", "not indexed"])
def test_ranks_with_other_data_are_refused_before_a_step(ddp: DdpRuns, tmp_path: Path, indexed: bool) -> None:
    other = tiny.make_dataset(tmp_path / "other", copies=1)
    if indexed:
        index = index_path(runs.train_script().parse_args(ddp.flags(tmp_path / "run", train_data_meta=other)))
        build_index(DataLocation(other, other.parent, index), workers=1, progress=False)
    folder, elsewhere = tmp_path / "run", {"train_data_meta": other}
    ranks = forkserver.shared().run_ranks(2, [ddp.flags(folder), ddp.flags(folder, **elsewhere)], ddp.log("data"))
    code, words = (FLAGS, "error: the data: ") if indexed else (DATA, "and is not visible to process 1. Fix: ")
    assert wait_for_all(ranks) == [code, code], output_of(ranks)
    assert "".join(rank.output() for rank in ranks).count(words) == 1, output_of(ranks)
    assert not (folder / "metrics.jsonl").exists()


# --------------------------------------------------------------------------------------------------- the real launcher


def start_launcher(
    ddp: DdpRuns, output_dir: Path, *launcher: str, cpu: bool = True, **changes: object
) -> subprocess.Popen:
    environment = {
        name: value for name, value in runs.child_environment().items() if cpu or name != "ACCELERATE_USE_CPU"
    }
    with output_dir.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            [*LAUNCH, *launcher, runs.WAN_SCRIPT, *ddp.flags(output_dir, **changes)],
            cwd=tiny.ROOT, env=environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip


def launcher_output(output_dir: Path) -> str:
    return output_dir.with_suffix(".log").read_text(encoding="utf-8", errors="replace")


@pytest.mark.slow
def test_a_signal_to_the_launcher_stops_and_saves(ddp: DdpRuns, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    launcher = start_launcher(ddp, folder, "--multi_gpu", "--num_processes", "2", dataloader_num_workers=2)
    deadline = time.monotonic() + forkserver.TIMEOUT
    while written_steps(folder) < 2:
        assert launcher.poll() is None, launcher_output(folder)
        assert time.monotonic() < deadline, launcher_output(folder)
        time.sleep(0.002)
    os.kill(launcher.pid, signal.SIGTERM)
    assert launcher.wait(EXIT_TIMEOUT) != 0
    assert "backend     ddp" in launcher_output(folder)
    assert "processes   2" in launcher_output(folder)
    check_stopped(ddp, folder)


@pytest.mark.slow
def test_the_launcher_without_the_cpu_variable_is_refused(ddp: DdpRuns, tmp_path: Path) -> None:
    # Without the variable accelerate would make each of the two processes train on its own, and both would write.
    folder = tmp_path / "run"
    assert start_launcher(ddp, folder, "--multi_gpu", "--num_processes", "2", cpu=False).wait(forkserver.TIMEOUT) != 0
    assert "2 processes are asked for on this machine, but no GPU was found" in launcher_output(folder)
    assert "ACCELERATE_USE_CPU=true" in launcher_output(folder)
    assert not (folder / "metrics.jsonl").exists()


@pytest.mark.slow
def test_the_launcher_without_multi_gpu_trains_and_reports_one_process(ddp: DdpRuns, tmp_path: Path) -> None:
    # Without a GPU accelerate ignores --num_processes: it starts one process, which knows nothing of a larger launch.
    folder = tmp_path / "run"
    assert start_launcher(ddp, folder, "--num_processes", "2", max_train_steps=2).wait(forkserver.TIMEOUT) == 0
    assert "backend     single" in launcher_output(folder)
    assert "processes   1" in launcher_output(folder)
    assert forkserver.read_status(folder)["state"] == "finished"
