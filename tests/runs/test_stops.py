"""Tests of kills and stop signals: a run that is killed or stopped at any moment resumes bit-identically."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import forkserver
import numpy as np
import pytest
import runs
import tiny

from videox.data.dataset import Sample, TokenLengthDataset
from videox.distributed.signals import ECHO_SECONDS
from videox.run.checkpoint import find_checkpoints, verify

stops = tiny.load_script("benchmarks/stops.py")

STEPS = 15
STOPPED = 75
FATAL_ROW = 3
QUICK_KILLS, QUICK_IN_SAVES = 4, 2


@dataclass(frozen=True)
class StopRuns:
    """A model and a data set, and runs of STEPS steps on one process."""

    model: Path
    metadata: Path

    def flags(self, output_dir: Path, **changes: object) -> list[str]:
        settings = {"max_train_steps": STEPS, "checkpointing_steps": 5, "mixed_precision": "no", **changes}
        return runs.wan_flags(self.model, self.metadata, output_dir, **settings)

    def start(self, output_dir: Path, **changes: object) -> forkserver.TrainerProcess:
        return forkserver.shared().start(self.flags(output_dir, **changes), output_dir.with_suffix(".log"))

    def resume(self, output_dir: Path, **changes: object) -> forkserver.TrainerProcess:
        flags = self.flags(output_dir, resume_from_checkpoint="latest", **changes)
        return forkserver.shared().run(flags, output_dir.with_suffix(".log"))


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> StopRuns:
    folder = tmp_path_factory.mktemp("setup")
    return StopRuns(tiny.build_wan_t2v(folder / "model"), tiny.make_dataset(folder / "data", copies=2))


@pytest.fixture(scope="module")
def reference(setup: StopRuns, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run that was never interrupted."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    assert forkserver.shared().run(setup.flags(folder), folder.with_suffix(".log")).code == 0
    return folder


def written_steps(output_dir: Path) -> int:
    metrics = output_dir / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


# --------------------------------------------------------------------------------------------------------------- kills


def check_kills(results: list, kills: int, in_saves: int) -> None:
    """Check that enough kills hit a save, that none left a partial checkpoint, and that all runs resumed exactly."""
    assert len(results) == kills
    assert sum(kill.in_save for kill in results) >= in_saves
    assert [kill.half for kill in results] == [[]] * kills
    assert [kill.differences for kill in results] == [[]] * kills


@pytest.mark.slow
def test_killed_runs_resume_bit_identically(setup: StopRuns, tmp_path: Path) -> None:
    def argv(output_dir: Path) -> list[str]:
        return setup.flags(output_dir, max_train_steps=10, checkpointing_steps=2, checkpoints_total_limit=2)

    results = stops.kill_many(
        forkserver.shared(), argv, tmp_path, steps=10, kills=QUICK_KILLS, in_saves=QUICK_IN_SAVES, seed=11
    )
    check_kills(results, QUICK_KILLS, QUICK_IN_SAVES)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "precision"), stops.CONFIGURATIONS)
def test_kills_at_twenty_times_resume_bit_identically(
    setup: StopRuns, tmp_path: Path, workers: int, precision: str
) -> None:
    def argv(output_dir: Path) -> list[str]:
        return stops.command(
            setup.model, setup.metadata, output_dir, workers=workers, precision=precision, steps=stops.STEPS
        )

    results = stops.kill_many(
        forkserver.shared(), argv, tmp_path, steps=stops.STEPS, kills=stops.KILLS, in_saves=stops.IN_SAVES, seed=7
    )
    check_kills(results, stops.KILLS, 5)


@pytest.mark.slow
def test_a_run_that_is_killed_repeatedly_resumes_bit_identically(
    setup: StopRuns, reference: Path, tmp_path: Path
) -> None:
    # Every run but the last is killed shortly after one more save, or while it still loads.
    folder = tmp_path / "run"
    for attempt in range(5):
        trainer = setup.start(folder, resume_from_checkpoint="latest")
        if attempt % 2:
            time.sleep(0.25 * attempt)
        else:
            trainer.wait_until(lambda reached=4 + 2 * attempt: written_steps(folder) > reached)
        trainer.kill()
        trainer.wait()
    assert setup.resume(folder).code == 0
    assert forkserver.differences(folder, reference, STEPS) == []


@pytest.mark.slow
def test_a_killed_data_worker_changes_nothing(setup: StopRuns, reference: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    trainer = setup.start(folder, dataloader_num_workers=2)
    trainer.wait_until(lambda: written_steps(folder) >= 7)
    children = Path(f"/proc/{trainer.pid}/task/{trainer.pid}/children").read_text(encoding="ascii").split()
    os.kill(int(children[0]), signal.SIGKILL)
    assert trainer.wait() == 0, trainer.output()[-3000:]
    assert "a data worker ended with signal 9 (SIGKILL)" in trainer.output()
    assert forkserver.differences(folder, reference, STEPS) == []


def train_with_a_fatal_row() -> int:
    """Train; the decoder crashes in one row. Each worker that reads it leaves a byte in a file."""
    read = TokenLengthDataset._read

    def crash(self: TokenLengthDataset, sample: Sample, path: Path) -> np.ndarray:
        if sample["planned"].row == FATAL_ROW:
            with Path(os.environ["DEATHS"]).open("ab") as file:
                file.write(b"x")
            os.kill(os.getpid(), signal.SIGSEGV)
        return read(self, sample, path)

    TokenLengthDataset._read = crash
    return runs.train_script().main()


@pytest.mark.slow
def test_a_row_that_crashes_its_decoder_is_left_out(setup: StopRuns, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    environment = {"DEATHS": str(tmp_path / "deaths")}
    for steps in (8, 30):  # the second run resumes in the same epoch, and trains another one
        flags = setup.flags(folder, max_train_steps=steps, dataloader_num_workers=2, resume_from_checkpoint="latest")
        entry = "tests.runs.test_stops:train_with_a_fatal_row"
        trainer = forkserver.shared().start(
            flags, folder.with_suffix(".log"), environment=environment, entry_point=entry
        )
        assert trainer.wait() == 0, trainer.output()[-3000:]
    bad = [json.loads(line) for line in (folder / "bad_samples.jsonl").read_text().splitlines()]
    assert {(line["row"], line["class"], line["detail"]) for line in bad} == {
        (FATAL_ROW, "crashed", "the process that read it ended with signal 11 (SIGSEGV)")
    }
    assert len((tmp_path / "deaths").read_bytes()) <= 2  # once in each process at most; never again once it is known
    assert [line["step"] for line in forkserver.read_steps(folder)] == list(range(1, 31))


# -------------------------------------------------------------------------------------------------------- stop signals


def check_stopped(
    setup: StopRuns, reference: Path, trainer: forkserver.TrainerProcess, folder: Path, name: str
) -> None:
    """Check that a run was saved at the step where it stopped, and resumes to the same end as the reference run."""
    assert trainer.wait() == STOPPED, trainer.output()[-4000:]
    assert "Traceback" not in trainer.output()
    status, step = forkserver.read_status(folder), written_steps(folder)
    assert (status["state"], status["exit_code"], status["step"]) == ("stopped", STOPPED, step)
    assert name in status["error"]
    assert f"at step {step}; resume with --resume_from_checkpoint latest" in status["error"]
    assert 0 < step < STEPS
    assert verify(folder / f"checkpoint-{step}", hashes=True) == []
    assert (folder / "losses.png").is_file()
    assert setup.resume(folder).code == 0
    assert f"checkpoint-{step}" in {path.name for path in find_checkpoints(folder)}
    assert forkserver.differences(folder, reference, STEPS) == []


def send_to_all(number: int) -> Callable[[forkserver.TrainerProcess], None]:
    return lambda trainer: trainer.signal_all(number)


def send_to_trainer(number: int) -> Callable[[forkserver.TrainerProcess], None]:
    return lambda trainer: trainer.signal(number)


@pytest.mark.parametrize(
    ("name", "send", "workers"),
    [
        # a terminal and a batch system signal the data loader workers too; `kill` does not
        pytest.param("SIGINT", send_to_all(signal.SIGINT), 2, id="Ctrl-C"),
        pytest.param("SIGTERM", send_to_all(signal.SIGTERM), 2, id="TERM-to-all", marks=pytest.mark.slow),
        pytest.param("SIGTERM", send_to_trainer(signal.SIGTERM), 2, id="TERM", marks=pytest.mark.slow),
        pytest.param("SIGUSR1", send_to_trainer(signal.SIGUSR1), 0, id="USR1", marks=pytest.mark.slow),
        pytest.param("SIGUSR1", send_to_all(signal.SIGUSR1), 2, id="USR1-to-all", marks=pytest.mark.slow),
        pytest.param("SIGINT", send_to_all(signal.SIGINT), 0, id="Ctrl-C-alone", marks=pytest.mark.slow),
    ],
)
def test_a_stop_signal_saves_and_stops(
    setup: StopRuns,
    reference: Path,
    tmp_path: Path,
    name: str,
    send: Callable[[forkserver.TrainerProcess], None],
    workers: int,
) -> None:
    folder = tmp_path / "run"
    trainer = setup.start(folder, dataloader_num_workers=workers)
    trainer.wait_until(lambda: written_steps(folder) >= 7)
    send(trainer)
    check_stopped(setup, reference, trainer, folder, name)


@pytest.mark.slow
def test_a_stop_signal_during_a_save_lets_the_save_finish(setup: StopRuns, reference: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    trainer = setup.start(folder, checkpointing_steps=1)
    while trainer.wait_until(lambda: stops.saves_under_way(folder)):
        trainer.signal(signal.SIGSTOP)  # stops the trainer here, so that the next signal arrives during the save
        under_way = stops.saves_under_way(folder)
        if under_way:
            break
        trainer.signal(signal.SIGCONT)
    assert under_way, "the run ended before a save was caught"
    trainer.signal(signal.SIGTERM)
    trainer.signal(signal.SIGCONT)
    check_stopped(setup, reference, trainer, folder, "SIGTERM")
    assert verify(folder / under_way[0].name.removeprefix(".tmp-").rpartition("-")[0], hashes=True) == []


@pytest.mark.slow
def test_a_second_ctrl_c_exits_immediately(setup: StopRuns, tmp_path: Path) -> None:
    # Steps of about a second: the trainer is still in the step when the second Ctrl-C arrives.
    folder = tmp_path / "run"
    slow_steps = {"video_sample_size": 256, "token_sample_size": 256, "image_sample_size": 256}
    trainer = setup.start(folder, checkpointing_steps=1, **slow_steps)
    trainer.wait_until(lambda: find_checkpoints(folder))
    trainer.signal_all(signal.SIGINT)
    trainer.wait_until(lambda: "SIGINT: process" in trainer.output())
    kept = [path.name for path in find_checkpoints(folder)]
    time.sleep(1.2 * ECHO_SECONDS)
    trainer.signal_all(signal.SIGINT)
    assert trainer.wait(timeout=5) == 128 + signal.SIGINT
    assert [path.name for path in find_checkpoints(folder)] == kept
    assert all(verify(path, hashes=True) == [] for path in find_checkpoints(folder))
    assert setup.resume(folder, checkpointing_steps=1, max_train_steps=len(kept) + 1, **slow_steps).code == 0
    assert [line["step"] for line in forkserver.read_steps(folder)] == list(range(1, len(kept) + 2))
