"""Serves whoever loses power or patience: a run that is killed or stopped at any moment goes on to the bit."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import forkserver
import pytest
import runs
import tiny

from videox.distributed.accelerator import TWICE
from videox.run.checkpoint import find_checkpoints, verify

stops = tiny.load_script("benchmarks/stops.py")

STEPS = 15
STOPPED = 75
QUICK_KILLS, QUICK_IN_SAVES = 4, 2


@dataclass(frozen=True)
class Ground:
    """A model, a data set, and the fork server; `flags` are those of a run of STEPS steps that ends unbroken."""

    model: Path
    metadata: Path

    def flags(self, output_dir: Path, **changes: object) -> list[str]:
        asked = {"max_train_steps": STEPS, "checkpointing_steps": 5, "mixed_precision": "no", **changes}
        return runs.wan_plain(self.model, self.metadata, output_dir, **asked)

    def resume(self, output_dir: Path, **changes: object) -> forkserver.Trainer:
        flags = self.flags(output_dir, resume_from_checkpoint="latest", **changes)
        return forkserver.shared().run(flags, output_dir.with_suffix(".log"))


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    folder = tmp_path_factory.mktemp("ground")
    return Ground(tiny.build_wan_t2v(folder / "model"), tiny.make_dataset(folder / "data", copies=2))


@pytest.fixture(scope="module")
def unbroken(ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    assert forkserver.shared().run(ground.flags(folder), folder.with_suffix(".log")).code == 0
    return folder


def written_steps(output_dir: Path) -> int:
    metrics = output_dir / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def start(ground: Ground, output_dir: Path, **changes: object) -> forkserver.Trainer:
    return forkserver.shared().start(ground.flags(output_dir, **changes), output_dir.with_suffix(".log"))


# ----------------------------------------------------------------------------------------------- killed


def check_kills(met: list, kills: int, in_saves: int) -> None:
    assert len(met) == kills
    assert sum(kill.in_save for kill in met) >= in_saves
    assert [kill.half for kill in met] == [[]] * kills
    assert [kill.differences for kill in met] == [[]] * kills


def test_killed_runs_go_on_to_the_bit(ground: Ground, tmp_path: Path) -> None:
    def argv(output_dir: Path) -> list[str]:
        return ground.flags(output_dir, max_train_steps=10, checkpointing_steps=2, checkpoints_total_limit=2)

    met = stops.kill_many(
        forkserver.shared(), argv, tmp_path, steps=10, kills=QUICK_KILLS, in_saves=QUICK_IN_SAVES, seed=11
    )
    check_kills(met, QUICK_KILLS, QUICK_IN_SAVES)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "precision"), stops.CONFIGURATIONS)
def test_killed_at_twenty_moments(ground: Ground, tmp_path: Path, workers: int, precision: str) -> None:
    def argv(output_dir: Path) -> list[str]:
        return stops.command(
            ground.model, ground.metadata, output_dir, workers=workers, precision=precision, steps=stops.STEPS
        )

    met = stops.kill_many(
        forkserver.shared(), argv, tmp_path, steps=stops.STEPS, kills=stops.KILLS, in_saves=stops.IN_SAVES, seed=7
    )
    check_kills(met, stops.KILLS, 5)


@pytest.mark.slow
def test_killed_again_and_again(ground: Ground, unbroken: Path, tmp_path: Path) -> None:
    # Each life but the last ends shortly after it has come one save further, or while it loads.
    folder = tmp_path / "run"
    for life in range(5):
        trainer = start(ground, folder, resume_from_checkpoint="latest")
        if life % 2:
            time.sleep(0.25 * life)
        else:
            trainer.until(lambda reached=4 + 2 * life: written_steps(folder) > reached)
        trainer.kill()
        trainer.wait()
    assert ground.resume(folder).code == 0
    assert forkserver.differences(folder, unbroken, STEPS) == []


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_and_nothing_is_lost(ground: Ground, unbroken: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    trainer = start(ground, folder, dataloader_num_workers=2)
    trainer.until(lambda: written_steps(folder) >= 7)
    children = Path(f"/proc/{trainer.pid}/task/{trainer.pid}/children").read_text(encoding="ascii").split()
    os.kill(int(children[0]), signal.SIGKILL)
    assert trainer.wait() != 0
    assert forkserver.status(folder)["state"] == "failed"
    assert ground.resume(folder, dataloader_num_workers=2).code == 0
    assert forkserver.differences(folder, unbroken, STEPS) == []


# ---------------------------------------------------------------------------------------------- stopped


def check_stopped(ground: Ground, unbroken: Path, trainer: forkserver.Trainer, folder: Path, name: str) -> None:
    """Checks that a run was saved where it stopped, said so, and goes on to the end of the unbroken one."""
    assert trainer.wait() == STOPPED, trainer.said()[-4000:]
    assert "Traceback" not in trainer.said()
    status, step = forkserver.status(folder), written_steps(folder)
    assert (status["state"], status["exit_code"], status["step"]) == ("stopped", STOPPED, step)
    assert name in status["error"]
    assert f"at step {step}; --resume_from_checkpoint latest goes on" in status["error"]
    assert 0 < step < STEPS
    assert verify(folder / f"checkpoint-{step}", hashes=True) == []
    assert ground.resume(folder).code == 0
    assert f"checkpoint-{step}" in {path.name for path in find_checkpoints(folder)}
    assert forkserver.differences(folder, unbroken, STEPS) == []


def to_all(number: int) -> Callable[[forkserver.Trainer], None]:
    return lambda trainer: trainer.signal_all(number)


def to_it(number: int) -> Callable[[forkserver.Trainer], None]:
    return lambda trainer: trainer.signal(number)


@pytest.mark.parametrize(
    ("name", "send", "workers"),
    [
        # a terminal and a batch system reach the data workers too; `kill` does not
        pytest.param("SIGINT", to_all(signal.SIGINT), 2, id="Ctrl-C"),
        pytest.param("SIGTERM", to_all(signal.SIGTERM), 2, id="TERM-to-all"),
        pytest.param("SIGTERM", to_it(signal.SIGTERM), 2, id="TERM", marks=pytest.mark.slow),
        pytest.param("SIGUSR1", to_it(signal.SIGUSR1), 0, id="USR1", marks=pytest.mark.slow),
        pytest.param("SIGUSR1", to_all(signal.SIGUSR1), 2, id="USR1-to-all", marks=pytest.mark.slow),
        pytest.param("SIGINT", to_all(signal.SIGINT), 0, id="Ctrl-C-alone", marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_stops(
    ground: Ground,
    unbroken: Path,
    tmp_path: Path,
    name: str,
    send: Callable[[forkserver.Trainer], None],
    workers: int,
) -> None:
    folder = tmp_path / "run"
    trainer = start(ground, folder, dataloader_num_workers=workers)
    trainer.until(lambda: written_steps(folder) >= 7)
    send(trainer)
    check_stopped(ground, unbroken, trainer, folder, name)


def test_a_signal_inside_a_save_lets_the_save_finish(ground: Ground, unbroken: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    trainer = start(ground, folder, checkpointing_steps=1)
    while trainer.until(lambda: stops.saves_under_way(folder)):
        trainer.signal(signal.SIGSTOP)  # holds the trainer where it is, so that the next signal finds it there
        under_way = stops.saves_under_way(folder)
        if under_way:
            break
        trainer.signal(signal.SIGCONT)
    assert under_way, "the run ended before a save was met"
    trainer.signal(signal.SIGTERM)
    trainer.signal(signal.SIGCONT)
    check_stopped(ground, unbroken, trainer, folder, "SIGTERM")
    assert verify(folder / under_way[0].name.removeprefix(".tmp-").rpartition("-")[0], hashes=True) == []


def test_a_second_ctrl_c_leaves_at_once(ground: Ground, tmp_path: Path) -> None:
    # steps of a second or so: the first Ctrl-C is still waiting for the step's end when the second comes
    folder = tmp_path / "run"
    slow_steps = {"video_sample_size": 256, "token_sample_size": 256, "image_sample_size": 256}
    trainer = start(ground, folder, checkpointing_steps=1, **slow_steps)
    trainer.until(lambda: find_checkpoints(folder))
    trainer.signal_all(signal.SIGINT)
    trainer.until(lambda: "SIGINT: process" in trainer.said())
    kept = [path.name for path in find_checkpoints(folder)]
    time.sleep(1.2 * TWICE)
    trainer.signal_all(signal.SIGINT)
    assert trainer.wait(limit=5) == 128 + signal.SIGINT
    assert [path.name for path in find_checkpoints(folder)] == kept
    assert all(verify(path, hashes=True) == [] for path in find_checkpoints(folder))
    assert ground.resume(folder, checkpointing_steps=1, max_train_steps=len(kept) + 1, **slow_steps).code == 0
    assert [line["step"] for line in forkserver.steps(folder)] == list(range(1, len(kept) + 2))
