"""Tests of runs whose disk refuses writes: each ends with code 5 and one line, and loses nothing that was saved."""

from __future__ import annotations

import re
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import forkserver
import pytest
import runs
import tiny
from skips import skip_missing

from videox.errors import STORAGE
from videox.run.checkpoint import find_checkpoints, verify

LARGEST_FILE = 160_000  # bytes: more than the weights file, less than the optimizer file
LINE = re.compile(r"^error: .+\. Fix: .+\.$")


class StorageRuns:
    """A model, a data set, and runs of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model, self.metadata = tiny.build_wan_t2v(folder / "model"), tiny.make_dataset(folder / "data")

    def start(self, output_dir: Path, *, largest_file: int = 0, **changes: object) -> forkserver.TrainerProcess:
        settings = {"max_train_steps": 2, "checkpointing_steps": 1, "mixed_precision": "no", "num_train_epochs": None}
        flags = runs.wan_flags(self.model, self.metadata, output_dir, **{**settings, **changes})
        log = self.folder / f"{time.monotonic_ns()}.log"
        return forkserver.shared().start(flags, log, largest_file=largest_file)

    def run(self, output_dir: Path, **changes: object) -> forkserver.TrainerProcess:
        trainer = self.start(output_dir, **changes)
        trainer.wait()
        return trainer


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> StorageRuns:
    return StorageRuns(tmp_path_factory.mktemp("storage"))


def check_refused(trainer: forkserver.TrainerProcess) -> None:
    """Check that a run ended with code 5 and one line that says what to do."""
    assert trainer.code == STORAGE, trainer.output()[-3000:]
    assert "Traceback" not in trainer.output()
    assert LINE.match(trainer.error_line()), trainer.error_line()


# ----------------------------------------------------------------------------------------------------- the last save


def test_a_last_save_that_fails_is_a_failure_after_the_export(setup: StorageRuns, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    trainer = setup.run(folder, largest_file=LARGEST_FILE, checkpointing_steps=9)
    check_refused(trainer)
    assert "warning: no checkpoint at step 2 (" in trainer.output() and "training continues" not in trainer.output()
    status = forkserver.read_status(folder)
    assert (status["state"], status["exit_code"]) == ("failed", STORAGE)
    assert "the save at step 2 failed (" in status["error"] and "there is no checkpoint yet" in status["error"]
    assert "resume with --resume_from_checkpoint latest" in trainer.error_line()
    assert runs.read_weights(folder / "transformer")


@pytest.mark.slow
def test_a_stop_whose_save_fails_is_a_failure(setup: StorageRuns, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    trainer = setup.start(folder, max_train_steps=5000, checkpointing_steps=1000, dataloader_num_workers=0)
    trainer.wait_until(lambda: (folder / "metrics.jsonl").is_file() and forkserver.read_steps(folder))
    resource.prlimit(trainer.pid, resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    trainer.signal(signal.SIGTERM)
    trainer.wait()
    check_refused(trainer)
    assert "there is no checkpoint yet" in trainer.error_line()
    assert forkserver.read_status(folder)["state"] == "failed"
    assert not list(folder.glob("checkpoint-*")) and not list(folder.glob(".tmp-*"))


@pytest.mark.slow
def test_a_picture_that_cannot_be_written_does_not_fail_a_finished_run(setup: StorageRuns, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "losses.png").mkdir(parents=True)
    (folder / "losses.png" / "mine.txt").write_text("keep", encoding="utf-8")
    trainer = setup.run(folder)
    assert trainer.code == 0, trainer.output()[-3000:]
    assert "warning: losses.png was not written (" in trainer.output()
    assert forkserver.read_status(folder)["state"] == "finished"
    assert (folder / "losses.png" / "mine.txt").read_text(encoding="utf-8") == "keep"


# -------------------------------------------------------------------------------------------------------- every write


@pytest.mark.slow
def test_a_file_that_cannot_be_replaced_is_named_in_one_line(setup: StorageRuns, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "args.json" / "mine").mkdir(parents=True)
    trainer = setup.run(folder)
    check_refused(trainer)
    assert f"{folder / 'args.json'}: Is a directory. Fix: move what has this name away" in trainer.error_line()
    assert (folder / "args.json" / "mine").is_dir() and not (folder / "crash.txt").exists()
    assert forkserver.read_status(folder)["exit_code"] == STORAGE


@pytest.mark.slow
@pytest.mark.parametrize("largest", [20_000, 50_000, 90_000])
def test_a_file_of_any_size_that_is_refused_ends_the_run_with_one_line(
    setup: StorageRuns, tmp_path: Path, largest: int
) -> None:
    folder = tmp_path / "run"
    check_refused(setup.run(folder, largest_file=largest))
    assert find_checkpoints(folder) == []


@pytest.mark.slow
def test_an_index_that_cannot_be_written_is_named(setup: StorageRuns, tmp_path: Path) -> None:
    metadata = tiny.make_dataset(tmp_path / "data")
    index = metadata.with_name(f"{metadata.name}.videox-index.arrow")
    index.mkdir()
    trainer = forkserver.shared().run(runs.wan_flags(setup.model, metadata, tmp_path / "run"), tmp_path / "log")
    check_refused(trainer)
    assert f"{index}: the index cannot be written" in trainer.error_line()


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    """Mount a tmpfs with these options at a folder; skips the test where that is not permitted."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], capture_output=True)
    if mounted.returncode:
        skip_missing("the permission to mount a tmpfs", "a full disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [*(f"size={kilobytes}k" for kilobytes in (4, 16, 64, 256, 512, 1024, 1536)), "nr_inodes=4", "nr_inodes=12"],
)
def test_a_full_disk_ends_the_run_with_one_line_and_keeps_what_was_saved(
    setup: StorageRuns, tmp_path: Path, options: str
) -> None:
    with small_disk(tmp_path / "disk", options) as disk:
        trainer = setup.run(disk / "run", max_train_steps=6, checkpoints_total_limit=2)
        check_refused(trainer)
        assert all(verify(checkpoint, hashes=True) == [] for checkpoint in find_checkpoints(disk / "run"))
        assert not list((disk / "run").glob(".tmp-checkpoint*"))
