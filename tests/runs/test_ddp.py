"""Serves whoever trains on several devices: DDP on real processes is one process that accumulates, and stops whole.

The launcher itself is started where the launcher matters; elsewhere its processes are forked with its variables, from
one that has imported everything (see forkserver.py).
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

from videox.run.checkpoint import find_checkpoints, verify

STEPS = 8
FLAGS, PEER_LOST, BUG, STOPPED = 2, 7, 70, 75
OUT_IN = 30.0  # seconds in which all processes are gone after one is
LAUNCH = (sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--dynamo_backend", "no")


class Ground:
    """A model and a data set, and a run of one process with two micro-batches a step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = tiny.build_wan_t2v(folder / "model")
        self.metadata = tiny.make_dataset(folder / "data", copies=2)
        self.alone = folder / "alone"
        assert forkserver.shared().run(self.flags(self.alone, accumulation=2), self.log("alone")).code == 0

    def log(self, name: str) -> Path:
        return self.folder / f"{name}-{time.monotonic_ns()}.log"

    def flags(self, output_dir: Path, *, accumulation: int = 1, **changes: object) -> list[str]:
        asked = {"max_train_steps": STEPS, "checkpointing_steps": 4, "mixed_precision": "no"}
        # Sums in another order differ in the last bit, and Adam with a tiny epsilon makes whole steps out of gradients
        # that are nothing but such bits.
        asked |= {"gradient_accumulation_steps": accumulation, "adam_epsilon": "1e-6"}
        return runs.wan_plain(self.model, self.metadata, output_dir, **{**asked, **changes})

    def ranks(self, world_size: int, output_dir: Path, **changes: object) -> list[forkserver.Trainer]:
        return forkserver.shared().start_ranks(
            world_size, self.flags(output_dir, **changes), self.log(output_dir.name)
        )


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground(tmp_path_factory.mktemp("ground"))


def codes(ranks: list[forkserver.Trainer], limit: float = forkserver.LIMIT) -> list[int]:
    return [rank.wait(limit) for rank in ranks]


def said(ranks: list[forkserver.Trainer]) -> str:
    return "\n".join(rank.said()[-3000:] for rank in ranks)


def written_steps(output_dir: Path) -> int:
    metrics = output_dir / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def assert_equal_runs(output_dir: Path, expected: Path, tolerance: float, last: int = STEPS) -> None:
    """Checks that two runs took the same samples, with equal losses, and ended with equal weights."""
    found, wanted = forkserver.steps(output_dir), forkserver.steps(expected)
    assert [line["step"] for line in found] == list(range(1, last + 1))
    for name in ("rows", "buckets", "lr", "tokens"):
        assert [line[name] for line in found] == [line[name] for line in wanted], name
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(
            [line[name] for line in found], [line[name] for line in wanted], rtol=tolerance, err_msg=name
        )
    a, b = (runs.read_weights(folder / f"checkpoint-{last}" / "transformer") for folder in (output_dir, expected))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name].numpy(), b[name].numpy(), rtol=0, atol=1e-5, err_msg=name)


# ------------------------------------------------------------------------------ the same run, divided


def test_two_processes_are_one_with_twice_the_accumulation(ground: Ground, tmp_path: Path) -> None:
    ranks = ground.ranks(2, tmp_path / "run", dataloader_num_workers=1)
    assert codes(ranks) == [0, 0], said(ranks)
    assert "backend     ddp" in ranks[0].said()
    assert "processes   2" in ranks[0].said()
    assert "processes" not in ranks[1].said()
    assert_equal_runs(tmp_path / "run", ground.alone, 1e-5)


def test_two_processes_go_on_as_one(ground: Ground, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ranks = ground.ranks(2, folder, max_train_steps=4)
    assert codes(ranks) == [0, 0], said(ranks)
    alone = forkserver.shared().run(ground.flags(folder, resume_from_checkpoint="latest"), ground.log("go-on"))
    assert alone.code == 0, alone.said()[-4000:]
    assert_equal_runs(folder, ground.alone, 1e-6)


@pytest.mark.slow
def test_one_process_goes_on_as_two_and_as_four(ground: Ground, tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    server = forkserver.shared()
    assert server.run(ground.flags(whole, accumulation=4), ground.log("whole")).code == 0
    assert server.run(ground.flags(folder, accumulation=4, max_train_steps=4), ground.log("begin")).code == 0
    for world_size, last in ((4, 5), (2, 7), (1, STEPS)):
        ranks = ground.ranks(world_size, folder, max_train_steps=last, resume_from_checkpoint="latest")
        assert codes(ranks) == [0] * world_size, said(ranks)
    assert_equal_runs(folder, whole, 1e-5)


@pytest.mark.slow
def test_a_resumed_pair_is_equal_to_the_bit(ground: Ground, tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert codes(ground.ranks(2, whole, mixed_precision="bf16")) == [0, 0]
    ranks = ground.ranks(2, folder, mixed_precision="bf16")
    ranks[0].until(lambda: written_steps(folder) >= 5)
    for rank in ranks:
        rank.kill()
    codes(ranks)
    assert codes(ground.ranks(2, folder, mixed_precision="bf16", resume_from_checkpoint="latest")) == [0, 0]
    assert forkserver.differences(folder, whole, STEPS) == []


def test_a_number_of_processes_that_does_not_divide_is_refused(ground: Ground, tmp_path: Path) -> None:
    folder = shutil.copytree(ground.alone, tmp_path / "run")
    ranks = ground.ranks(3, folder, resume_from_checkpoint="latest")
    assert codes(ranks) == [FLAGS] * 3, said(ranks)
    assert "3 does not divide the 2 slots of an optimizer step" in ranks[0].complaint()
    assert "start one of 1, 2 processes" in ranks[0].complaint()
    assert not any("error: " in rank.said() for rank in ranks[1:])  # once is enough


# -------------------------------------------------------------------------------------- ended together


def check_stopped(ground: Ground, folder: Path) -> None:
    """Checks that a run was saved where it stopped, and goes on to the end."""
    status, step = forkserver.status(folder), written_steps(folder)
    assert (status["state"], status["exit_code"], status["step"]) == ("stopped", STOPPED, step)
    assert 0 < step < STEPS
    assert verify(folder / f"checkpoint-{step}", hashes=True) == []
    alone = forkserver.shared().run(ground.flags(folder, resume_from_checkpoint="latest"), ground.log("go-on"))
    assert alone.code == 0, alone.said()[-4000:]
    assert_equal_runs(folder, ground.alone, 1e-5)


def test_a_signal_to_one_process_stops_all_at_the_same_step(ground: Ground, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ranks = ground.ranks(2, folder)
    ranks[0].until(lambda: written_steps(folder) >= 2)
    ranks[1].signal(signal.SIGTERM)
    assert codes(ranks, OUT_IN) == [STOPPED, STOPPED], said(ranks)
    assert "stopped by another process at step" in ranks[0].said()
    check_stopped(ground, folder)


def check_ended(ground: Ground, folder: Path, ranks: list[forkserver.Trainer], newest: int) -> None:
    """Checks that no process goes on alone, that nothing half stands there, and that the run goes on."""
    assert all(code != 0 for code in codes(ranks, OUT_IN)), said(ranks)
    assert forkserver.status(folder)["state"] == "failed"
    assert not list(folder.glob(".tmp-checkpoint-*"))
    assert [path.name for path in find_checkpoints(folder)] == ([f"checkpoint-{newest}"] if newest else [])
    assert all(verify(path, hashes=True) == [] for path in find_checkpoints(folder))
    again = ground.ranks(2, folder, resume_from_checkpoint="latest")
    assert codes(again) == [0, 0], said(again)
    assert_equal_runs(folder, ground.alone, 1e-5)


def fail_in_sixth_batch() -> int:
    """Trains in a process whose sixth micro-batch raises; forked by the tests below."""
    script, batches = tiny.load_script(forkserver.SCRIPT), iter(range(1, 6))
    compute = script.accumulate_gradients

    def computed_five_times(*arguments: object) -> object:
        if next(batches, None) is None:
            raise RuntimeError("this process fails")
        return compute(*arguments)

    script.accumulate_gradients = computed_five_times
    return script.main()


def test_one_process_that_fails_ends_all(ground: Ground, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ranks = forkserver.shared().start_ranks(
        2, ground.flags(folder), ground.log("fails"), work=("", "tests.runs.test_ddp:fail_in_sixth_batch")
    )
    assert codes(ranks, OUT_IN)[0] == BUG, said(ranks)
    assert (
        "".join(rank.said() for rank in ranks).count("RuntimeError: this process fails") == 1
    )  # by the one that does
    status = forkserver.status(folder)
    assert (status["exit_code"], status["error"]) == (BUG, "error: process 1: RuntimeError: this process fails")
    check_ended(ground, folder, ranks, newest=4)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_inside_a_save_leaves_nothing_half(ground: Ground, tmp_path: Path, victim: int) -> None:
    folder = tmp_path / "run"
    ranks = ground.ranks(2, folder, checkpointing_steps=2)
    while ranks[0].until(lambda: list(folder.glob(".tmp-checkpoint-*"))):
        ranks[victim].signal(signal.SIGSTOP)
        if list(folder.glob(".tmp-checkpoint-*")):
            break
        ranks[victim].signal(signal.SIGCONT)
    saved = [path.name for path in find_checkpoints(folder)]
    ranks[victim].kill()
    assert codes(ranks, OUT_IN)[1 - victim] == PEER_LOST, said(ranks)
    assert forkserver.status(folder)["exit_code"] == PEER_LOST
    assert [path.name for path in find_checkpoints(folder)] == saved
    assert all(verify(path, hashes=True) == [] for path in find_checkpoints(folder))
    again = ground.ranks(2, folder, resume_from_checkpoint="latest")
    assert codes(again) == [0, 0], said(again)
    assert not list(folder.glob(".tmp-checkpoint-*"))
    assert_equal_runs(folder, ground.alone, 1e-5)


def test_processes_with_other_flags_are_found_out_at_the_first_step(ground: Ground, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ranks = forkserver.shared().run_ranks(
        2, [ground.flags(folder), ground.flags(folder, seed=43)], ground.log("seeds")
    )
    assert codes(ranks) == [PEER_LOST, PEER_LOST], said(ranks)
    assert "ranks [1] are not at the step of rank 0" in ranks[0].complaint()
    assert find_checkpoints(folder) == []


# ------------------------------------------------------------------------------------ the launcher itself


def launched(
    ground: Ground, output_dir: Path, *launcher: str, cpu: bool = True, **changes: object
) -> subprocess.Popen:
    environment = {name: value for name, value in runs.environment().items() if cpu or name != "ACCELERATE_USE_CPU"}
    with output_dir.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            [*LAUNCH, *launcher, runs.WAN, *ground.flags(output_dir, **changes)],
            cwd=tiny.ROOT, env=environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip


def output(output_dir: Path) -> str:
    return output_dir.with_suffix(".log").read_text(encoding="utf-8", errors="replace")


def test_a_signal_to_the_launcher_stops_and_saves(ground: Ground, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    launcher = launched(ground, folder, "--multi_gpu", "--num_processes", "2", dataloader_num_workers=2)
    deadline = time.monotonic() + forkserver.LIMIT
    while written_steps(folder) < 2:
        assert launcher.poll() is None, output(folder)
        assert time.monotonic() < deadline, output(folder)
        time.sleep(0.002)
    os.kill(launcher.pid, signal.SIGTERM)
    assert launcher.wait(OUT_IN) != 0
    assert "backend     ddp" in output(folder)
    assert "processes   2" in output(folder)
    check_stopped(ground, folder)


@pytest.mark.slow
def test_the_launcher_without_the_cpu_variable_is_refused(ground: Ground, tmp_path: Path) -> None:
    # Without it accelerate would let each of the two processes train by itself, and both would write.
    folder = tmp_path / "run"
    assert launched(ground, folder, "--multi_gpu", "--num_processes", "2", cpu=False).wait(forkserver.LIMIT) != 0
    assert "2 processes asked for, 1 joined" in output(folder)
    assert "ACCELERATE_USE_CPU=true" in output(folder)
    assert not (folder / "metrics.jsonl").exists()


@pytest.mark.slow
def test_the_launcher_without_multi_gpu_trains_one_process_and_says_so(ground: Ground, tmp_path: Path) -> None:
    # Without a GPU accelerate starts one process whatever --num_processes says, and tells it nothing of the others.
    folder = tmp_path / "run"
    assert launched(ground, folder, "--num_processes", "2", max_train_steps=2).wait(forkserver.LIMIT) == 0
    assert "backend     single" in output(folder)
    assert "processes   1" in output(folder)
    assert forkserver.status(folder)["state"] == "finished"
