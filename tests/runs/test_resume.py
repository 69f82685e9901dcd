"""Tests of --resume_from_checkpoint on one process: what may change, what is refused, and which files are kept."""

from __future__ import annotations

import json
import re
import resource
import shutil
import time
from pathlib import Path

import forkserver
import pytest
import runs
import tiny

from videox.run.checkpoint import find_checkpoints, verify

STEPS, EVERY = 12, 4
MODEL, FLAGS, STORAGE = 4, 2, 5
LARGEST_FILE = 160_000  # bytes: more than the weights file, less than the optimizer file
LARGEST_IMAGE = 10 * 1024  # bytes: more than any record, less than the contact sheet of the first batch


class ResumeRuns:
    """A model, a data set, a reference run of STEPS steps, and a run that was killed after its second save."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = tiny.build_wan_t2v(folder / "model")
        self.metadata = tiny.make_dataset(folder / "data", copies=2)
        self.reference = folder / "reference"
        assert self.run(self.reference).code == 0
        self.interrupted = folder / "interrupted"
        trainer = self.start(self.interrupted)
        trainer.wait_until(lambda: len(metrics(self.interrupted)) > 2 * EVERY)
        trainer.kill()
        trainer.wait()
        assert [path.name for path in find_checkpoints(self.interrupted)] == ["checkpoint-4", "checkpoint-8"]

    def flags(self, output_dir: Path, **changes: object) -> list[str]:
        settings = {"max_train_steps": STEPS, "checkpointing_steps": EVERY, "mixed_precision": "no"}
        metadata = changes.pop("metadata", self.metadata)
        return runs.wan_flags(self.model, metadata, output_dir, **{**settings, **changes})

    def start(self, output_dir: Path, *, largest_file: int = 0, **changes: object) -> forkserver.TrainerProcess:
        log = self.folder / f"{output_dir.parent.name}-{output_dir.name}-{time.monotonic_ns()}.log"
        return forkserver.shared().start(self.flags(output_dir, **changes), log, largest_file=largest_file)

    def run(self, output_dir: Path, **changes: object) -> forkserver.TrainerProcess:
        trainer = self.start(output_dir, **changes)
        trainer.wait()
        return trainer

    def resume(self, output_dir: Path, **changes: object) -> forkserver.TrainerProcess:
        return self.run(output_dir, **{"resume_from_checkpoint": "latest", **changes})

    def copy(self, output_dir: Path) -> Path:
        """Copy the interrupted run to another folder, as if it had been moved there."""
        return shutil.copytree(self.interrupted, output_dir)

    def differences(self, output_dir: Path) -> list[str]:
        return forkserver.differences(output_dir, self.reference, STEPS)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> ResumeRuns:
    return ResumeRuns(tmp_path_factory.mktemp("setup"))


def metrics(output_dir: Path) -> list[bytes]:
    path = output_dir / "metrics.jsonl"
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return modification time and content of every file below a folder, by relative path."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


# ----------------------------------------------------------------------------------------------------- what may change


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_resume_with_other_workers_in_another_folder_is_bit_identical(
    setup: ResumeRuns, tmp_path: Path, workers: int
) -> None:
    folder = setup.copy(tmp_path / "moved")
    trainer = setup.resume(folder, dataloader_num_workers=workers, gradient_accumulation_steps=1)
    assert trainer.code == 0, trainer.output()[-4000:]
    assert "from step 8" in trainer.output()
    assert "ended without writing its status" in trainer.output()
    assert setup.differences(folder) == []


def test_a_checkpoint_outside_the_run_folder_is_only_read(setup: ResumeRuns, tmp_path: Path) -> None:
    archived = shutil.copytree(setup.interrupted / "checkpoint-8", tmp_path / "archive" / "my-best")
    for path in sorted(archived.rglob("*"), reverse=True):
        path.chmod(0o555 if path.is_dir() else 0o444)
    archived.chmod(0o555)
    before = contents(archived)
    folder = tmp_path / "run"
    trainer = setup.run(folder, resume_from_checkpoint=f"{archived}/", verify=True)
    assert trainer.code == 0, trainer.output()[-4000:]
    assert contents(archived) == before
    assert forkserver.read_steps(folder) == forkserver.read_steps(setup.reference)[8:]
    assert forkserver.read_training_state(folder / "checkpoint-12") == forkserver.read_training_state(
        setup.reference / "checkpoint-12"
    )


def test_a_rewound_run_exports_its_new_weights(setup: ResumeRuns, tmp_path: Path) -> None:
    folder = shutil.copytree(setup.reference, tmp_path / "run")
    before = runs.read_weights(folder / "transformer")
    rewound = {"resume_from_checkpoint": str(folder / "checkpoint-8"), "learning_rate": "1e-2", "export_dtype": "fp32"}
    assert setup.run(folder, **rewound).code == 0
    exported = runs.read_weights(folder / "transformer")
    trained = runs.read_weights(folder / "checkpoint-12" / "transformer")
    assert all((exported[name] == trained[name]).all() for name in trained)
    kept = runs.read_weights(folder / "transformer-superseded")
    assert all((kept[name] == before[name]).all() for name in before)


def test_a_run_that_was_killed_after_its_last_save_prunes_when_it_finishes(setup: ResumeRuns, tmp_path: Path) -> None:
    folder = shutil.copytree(setup.reference, tmp_path / "run")
    shutil.rmtree(folder / "transformer")
    (folder / "run_status.json").unlink()
    assert len(list(folder.glob("checkpoint-*"))) > 2
    assert setup.run(folder, resume_from_checkpoint="latest", checkpoints_total_limit=2).code == 0
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-8", "checkpoint-12"}


@pytest.mark.slow
def test_a_second_rewind_does_not_overwrite_the_first(setup: ResumeRuns, tmp_path: Path) -> None:
    folder = shutil.copytree(setup.reference, tmp_path / "run")
    moved = []
    for name in ("superseded-4", "superseded-4-2"):
        lines = metrics(folder)
        assert setup.run(folder, resume_from_checkpoint=str(folder / "checkpoint-4")).code == 0
        moved.append((folder / name, lines[4:]))
        assert [metrics(place) for place, _ in moved] == [lines for _, lines in moved]
    assert setup.differences(folder) == []


@pytest.mark.slow
def test_a_finished_checkpoint_of_another_run_is_exported_without_training(setup: ResumeRuns, tmp_path: Path) -> None:
    trainer = setup.run(tmp_path / "run", resume_from_checkpoint=str(setup.reference / "checkpoint-12"))
    assert trainer.code == 0, trainer.output()[-4000:]
    assert metrics(tmp_path / "run") == []
    exported = runs.read_weights(tmp_path / "run" / "transformer")
    assert all((exported[n] == w).all() for n, w in runs.read_weights(setup.reference / "transformer").items())


@pytest.mark.slow
def test_a_resume_with_tensorboard_is_bit_identical(setup: ResumeRuns, tmp_path: Path) -> None:
    folder = setup.copy(tmp_path / "run")
    assert setup.resume(folder, report_to="tensorboard").code == 0
    assert list((folder / "logs").rglob("events.out.tfevents.*"))
    assert setup.differences(folder) == []


def test_rewind_moves_later_checkpoints_and_deletes_nothing(setup: ResumeRuns, tmp_path: Path) -> None:
    folder = shutil.copytree(setup.reference, tmp_path / "run")
    lines, later = metrics(folder), {name: contents(folder / name) for name in ("checkpoint-8", "checkpoint-12")}
    trainer = setup.run(folder, resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert trainer.code == 0, trainer.output()[-4000:]
    moved = folder / "superseded-4"
    assert metrics(moved) == lines[4:]
    assert metrics(folder)[:4] == lines[:4]
    assert {name: contents(moved / name) for name in later} == later
    assert setup.differences(folder) == []


def test_resuming_a_finished_run_adds_nothing(setup: ResumeRuns, tmp_path: Path) -> None:
    folder = shutil.copytree(setup.reference, tmp_path / "run")
    names = [path.relative_to(folder) for path in folder.rglob("*") if "first_batch" not in path.parts]
    kept = {name: contents(folder / name) for name in ("checkpoint-4", "checkpoint-8", "checkpoint-12")}
    for fewer in (STEPS, STEPS - 3):
        trainer = setup.resume(folder, max_train_steps=fewer)
        assert trainer.code == 0, trainer.output()[-4000:]
        assert metrics(folder) == metrics(setup.reference)
        assert {name: contents(folder / name) for name in kept} == kept
        assert sorted(path.relative_to(folder) for path in folder.rglob("*") if "first_batch" not in path.parts) == (
            sorted(names)
        )
        assert forkserver.read_status(folder)["state"] == "finished"
        assert forkserver.read_status(folder)["step"] == STEPS
        assert setup.differences(folder) == []


@pytest.mark.slow
def test_more_steps_continue_a_finished_run(setup: ResumeRuns, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert setup.run(folder, max_train_steps=6).code == 0
    short = runs.read_weights(folder / "transformer")
    assert setup.resume(folder).code == 0
    assert forkserver.read_steps(folder) == forkserver.read_steps(setup.reference)
    assert forkserver.read_training_state(folder / "checkpoint-12") == forkserver.read_training_state(
        setup.reference / "checkpoint-12"
    )
    exported = runs.read_weights(folder / "transformer")
    assert any((exported[name] != short[name]).any() for name in short)
    assert all(
        (exported[name] == value).all() for name, value in runs.read_weights(setup.reference / "transformer").items()
    )


def test_latest_without_a_checkpoint_starts_at_step_0(setup: ResumeRuns, tmp_path: Path) -> None:
    trainer = setup.resume(tmp_path / "run", max_train_steps=2)
    assert trainer.code == 0
    assert "there is no checkpoint" in trainer.output()
    assert "a new run starts at step 0" in trainer.output()
    assert forkserver.read_steps(tmp_path / "run") == forkserver.read_steps(setup.reference)[:2]


# ------------------------------------------------------------------------------------------------- what may not change


def altered_data(setup: ResumeRuns, folder: Path, change: str) -> Path:
    data = shutil.copytree(setup.metadata.parent, folder / "data")
    rows = json.loads((data / "metadata.json").read_text(encoding="utf-8"))
    if change == "row":
        rows.append({**rows[0], "text": "one more"})
    else:
        rows[3]["text"] = "another caption"
    (data / "metadata.json").write_text(json.dumps(rows), encoding="utf-8")
    return data / "metadata.json"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "row"}, "the data's rows, captions or sizes have changed"),
        ({"data": "caption"}, "the data's rows, captions or sizes have changed"),
        ({"train_batch_size": 2}, "--train_batch_size was 1, is 2"),
        ({"video_sample_size": 48}, "--video_sample_size was 64, is 48"),
        ({"video_sample_n_frames": 5}, "--video_sample_n_frames was "),
        ({"seed": 43}, "--seed was 42, is 43"),
        ({"random_hw_adapt": None}, "--random_hw_adapt was True, is False"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_changed_schedule_is_refused_and_named(
    setup: ResumeRuns, tmp_path: Path, changes: dict, message: str
) -> None:
    folder = setup.copy(tmp_path / "run")
    before = {name: content for name, content in contents(folder).items() if name not in ("run_status.json", ".lock")}
    changes = dict(changes)
    if "data" in changes:
        changes["metadata"] = altered_data(setup, tmp_path, changes.pop("data"))
    trainer = setup.resume(folder, **changes)
    assert trainer.code == MODEL
    assert message in trainer.error_line()
    assert "Fix: " in trainer.error_line()
    status = forkserver.read_status(folder)
    assert (status["state"], status["exit_code"], status["error"]) == ("failed", MODEL, trainer.error_line())
    after = {name: content for name, content in contents(folder).items() if name in before}
    assert after == before


def test_seed_and_accumulation_of_the_run_are_kept(setup: ResumeRuns, tmp_path: Path) -> None:
    folder = setup.copy(tmp_path / "run")
    assert setup.resume(folder, seed=None, gradient_accumulation_steps=3).code == 0
    assert setup.differences(folder) == []


# -------------------------------------------------------------------------------------------- which checkpoint is used


def break_newest(folder: Path, how: str) -> None:
    weights = folder / "checkpoint-8" / "transformer" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    if how == "short":
        weights.write_bytes(content[:-1000])
    elif how == "bit":
        content[len(content) // 2] ^= 1
        weights.write_bytes(content)
    else:
        (folder / "checkpoint-8" / "manifest.json").write_text("{", encoding="ascii")


@pytest.mark.parametrize(
    "how", ["bit", pytest.param("short", marks=pytest.mark.slow), pytest.param("manifest", marks=pytest.mark.slow)]
)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(setup: ResumeRuns, tmp_path: Path, how: str) -> None:
    folder = setup.copy(tmp_path / "run")
    break_newest(folder, how)
    trainer = setup.resume(folder)
    assert trainer.code == 0, trainer.output()[-4000:]
    assert re.search(r"checkpoint-8 is not used: \S.+", trainer.output())
    assert "from step 4" in trainer.output()
    assert (folder / "superseded-4" / "checkpoint-8").is_dir()
    assert setup.differences(folder) == []


def test_a_checkpoint_of_another_trainer_is_refused_and_named(setup: ResumeRuns, tmp_path: Path) -> None:
    # The files that accelerate's save_state writes when VideoX-Fun calls it.
    folder = tmp_path / "run"
    foreign = folder / "checkpoint-50"
    shutil.copytree(setup.reference / "transformer", foreign / "transformer")
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl", "sampler_pos_start.pkl"):
        (foreign / name).write_bytes(b"not ours")
    for checkpoint in ("latest", str(foreign)):
        trainer = setup.run(folder, resume_from_checkpoint=checkpoint)
        assert trainer.code == MODEL
        assert "VideoX-Fun" in trainer.error_line()
        assert f"--transformer_path {foreign / 'transformer'}" in trainer.error_line()
    # and the fix that the message names works
    out = tmp_path / "out"
    assert setup.run(out, transformer_path=foreign / "transformer", max_train_steps=1).code == 0


def test_only_exact_names_are_checkpoints(setup: ResumeRuns, tmp_path: Path) -> None:
    folder = setup.copy(tmp_path / "run")
    similar = (
        "checkpoint-99-outputs",
        "checkpoint-5-outputs",
        "checkpoint-009",
        "checkpoint-tmp",
        "old-checkpoint-99",
    )
    for name in similar:
        shutil.copytree(folder / "checkpoint-4", folder / name)
    before = {name: contents(folder / name) for name in similar}
    trainer = setup.resume(folder)
    assert "from step 8" in trainer.output()
    assert setup.differences(folder) == []
    assert {name: contents(folder / name) for name in similar} == before


def test_checkpoints_are_pruned_only_after_the_newer_save(setup: ResumeRuns, tmp_path: Path) -> None:
    folder, seen = tmp_path / "run", []

    def record() -> bool:
        names = [path.name for path in find_checkpoints(folder)]
        if not seen or seen[-1] != names:
            seen.append(names)
        return False

    trainer = setup.start(folder, checkpointing_steps=2, checkpoints_total_limit=2)
    trainer.wait_until(record)
    assert trainer.wait() == 0
    assert [path.name for path in find_checkpoints(folder)] == ["checkpoint-10", "checkpoint-12"]
    counts = [len(names) for names in seen]
    assert all(2 <= count <= 3 for count in counts[counts.index(2) :]), seen
    assert forkserver.read_steps(folder) == forkserver.read_steps(setup.reference)


# ------------------------------------------------------------------------------------ concurrent runs, and a full disk


def test_a_second_run_in_the_same_folder_is_refused(setup: ResumeRuns, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = setup.start(folder)
    first.wait_until(lambda: metrics(folder))
    for checkpoint in (None, "latest"):
        second = setup.run(folder, resume_from_checkpoint=checkpoint)
        assert second.code == FLAGS
        assert f"is in use by pid {first.pid} on host " in second.error_line()
    assert first.running(), "the first run ended before the second started: this test shows nothing"
    assert first.wait() == 0, first.output()[-4000:]
    assert setup.differences(folder) == []


def test_a_first_batch_preview_that_cannot_be_written_is_a_warning(setup: ResumeRuns, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    trainer = setup.start(folder, largest_file=LARGEST_IMAGE)
    trainer.wait_until(lambda: "warning: the first batch was not written" in trainer.output())
    resource.prlimit(trainer.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert trainer.wait() == 0, trainer.output()[-4000:]
    assert not list(folder.glob("*first_batch*"))


def test_one_failed_save_is_a_warning(setup: ResumeRuns, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    trainer = setup.start(folder, largest_file=LARGEST_FILE)
    trainer.wait_until(lambda: "warning: no checkpoint at step 4" in trainer.output())
    resource.prlimit(trainer.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert trainer.wait() == 0, trainer.output()[-4000:]
    assert [path.name for path in find_checkpoints(folder)] == ["checkpoint-8", "checkpoint-12"]
    assert "training continues" in trainer.output()
    assert not list(folder.glob(".tmp-*"))
    assert setup.differences(folder) == []


def test_a_picture_that_cannot_be_made_does_not_fail_a_finished_run(setup: ResumeRuns, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    trainer = setup.start(folder, max_train_steps=EVERY)
    trainer.wait_until(lambda: metrics(folder))
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b"edited by hand\n")
    assert trainer.wait() == 0, trainer.output()[-4000:]
    assert "warning: losses.png was not written (" in trainer.output()
    assert forkserver.read_status(folder)["state"] == "finished"


def test_a_second_failed_save_ends_the_run(setup: ResumeRuns, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert setup.run(folder, max_train_steps=EVERY).code == 0
    trainer = setup.resume(folder, largest_file=LARGEST_FILE)
    assert trainer.code == STORAGE, trainer.output()[-4000:]
    assert "warning: no checkpoint at step 8" in trainer.output()
    assert "the save at step 12 failed, as the one before did" in trainer.error_line()
    status = forkserver.read_status(folder)
    assert (status["state"], status["exit_code"], status["step"]) == ("failed", STORAGE, STEPS)
    assert [path.name for path in find_checkpoints(folder)] == ["checkpoint-4"]
    assert verify(folder / "checkpoint-4", hashes=True) == []
    assert not list(folder.glob(".tmp-*"))
    assert setup.resume(folder).code == 0
    assert setup.differences(folder) == []
