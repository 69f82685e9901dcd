"""Serves whoever goes on with a run elsewhere, later or otherwise: what may change, what may not, and what is kept."""

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
LARGEST_FILE = 160_000  # bytes: more than the weights, less than the optimizer's file
LARGEST_PICTURE = 10 * 1024  # bytes: more than any record, less than the sheet of the first batch


class Ground:
    """A model and a data set; an unbroken run of STEPS steps, and one that was interrupted after its second save."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = tiny.build_wan_t2v(folder / "model")
        self.metadata = tiny.make_dataset(folder / "data", copies=2)
        self.unbroken = folder / "unbroken"
        assert self.run(self.unbroken).code == 0
        self.interrupted = folder / "interrupted"
        trainer = self.start(self.interrupted)
        trainer.until(lambda: len(metrics(self.interrupted)) > 2 * EVERY)
        trainer.kill()
        trainer.wait()
        assert [path.name for path in find_checkpoints(self.interrupted)] == ["checkpoint-4", "checkpoint-8"]

    def flags(self, output_dir: Path, **changes: object) -> list[str]:
        asked = {"max_train_steps": STEPS, "checkpointing_steps": EVERY, "mixed_precision": "no"}
        metadata = changes.pop("metadata", self.metadata)
        return runs.wan_plain(self.model, metadata, output_dir, **{**asked, **changes})

    def start(self, output_dir: Path, *, largest_file: int = 0, **changes: object) -> forkserver.Trainer:
        log = self.folder / f"{output_dir.parent.name}-{output_dir.name}-{time.monotonic_ns()}.log"
        return forkserver.shared().start(self.flags(output_dir, **changes), log, largest_file=largest_file)

    def run(self, output_dir: Path, **changes: object) -> forkserver.Trainer:
        trainer = self.start(output_dir, **changes)
        trainer.wait()
        return trainer

    def resume(self, output_dir: Path, **changes: object) -> forkserver.Trainer:
        return self.run(output_dir, **{"resume_from_checkpoint": "latest", **changes})

    def copy(self, output_dir: Path) -> Path:
        """Copies the interrupted run to another place, as if it had been moved there."""
        return shutil.copytree(self.interrupted, output_dir)

    def differences(self, output_dir: Path) -> list[str]:
        return forkserver.differences(output_dir, self.unbroken, STEPS)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground(tmp_path_factory.mktemp("ground"))


def metrics(output_dir: Path) -> list[bytes]:
    path = output_dir / "metrics.jsonl"
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Returns every file below a folder with the time of its last change."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


# ------------------------------------------------------------------------------------- what may change


@pytest.mark.parametrize(
    "workers", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_other_workers_and_another_place(ground: Ground, tmp_path: Path, workers: int) -> None:
    folder = ground.copy(tmp_path / "moved")
    trainer = ground.resume(folder, dataloader_num_workers=workers, gradient_accumulation_steps=1)
    assert trainer.code == 0, trainer.said()[-4000:]
    assert "from step 8" in trainer.said()
    assert "died without a goodbye" in trainer.said()
    assert ground.differences(folder) == []


def test_a_checkpoint_elsewhere_is_only_read(ground: Ground, tmp_path: Path) -> None:
    kept = shutil.copytree(ground.interrupted / "checkpoint-8", tmp_path / "archive" / "my-best")
    for path in sorted(kept.rglob("*"), reverse=True):
        path.chmod(0o555 if path.is_dir() else 0o444)
    kept.chmod(0o555)
    before = contents(kept)
    folder = tmp_path / "run"
    trainer = ground.run(folder, resume_from_checkpoint=f"{kept}/", verify=True)
    assert trainer.code == 0, trainer.said()[-4000:]
    assert contents(kept) == before
    assert forkserver.steps(folder) == forkserver.steps(ground.unbroken)[8:]
    assert forkserver.tensors(folder / "checkpoint-12") == forkserver.tensors(ground.unbroken / "checkpoint-12")


def test_a_rewound_run_exports_what_it_then_trained(ground: Ground, tmp_path: Path) -> None:
    folder = shutil.copytree(ground.unbroken, tmp_path / "run")
    before = runs.read_weights(folder / "transformer")
    back = {"resume_from_checkpoint": str(folder / "checkpoint-8"), "learning_rate": "1e-2", "export_dtype": "fp32"}
    assert ground.run(folder, **back).code == 0
    exported = runs.read_weights(folder / "transformer")
    trained = runs.read_weights(folder / "checkpoint-12" / "transformer")
    assert all((exported[name] == trained[name]).all() for name in trained)
    kept = runs.read_weights(folder / "transformer-superseded")
    assert all((kept[name] == before[name]).all() for name in before)


@pytest.mark.slow
def test_a_second_rewind_does_not_write_over_the_first(ground: Ground, tmp_path: Path) -> None:
    folder = shutil.copytree(ground.unbroken, tmp_path / "run")
    moved = []
    for name in ("superseded-4", "superseded-4-2"):
        lines = metrics(folder)
        assert ground.run(folder, resume_from_checkpoint=str(folder / "checkpoint-4")).code == 0
        moved.append((folder / name, lines[4:]))
        assert [metrics(place) for place, _ in moved] == [lines for _, lines in moved]
    assert ground.differences(folder) == []


@pytest.mark.slow
def test_a_finished_checkpoint_elsewhere_is_exported_at_once(ground: Ground, tmp_path: Path) -> None:
    trainer = ground.run(tmp_path / "run", resume_from_checkpoint=str(ground.unbroken / "checkpoint-12"))
    assert trainer.code == 0, trainer.said()[-4000:]
    assert metrics(tmp_path / "run") == []
    exported = runs.read_weights(tmp_path / "run" / "transformer")
    assert all((exported[n] == w).all() for n, w in runs.read_weights(ground.unbroken / "transformer").items())


@pytest.mark.slow
def test_the_tracker_hides_what_was_rewound(ground: Ground, tmp_path: Path) -> None:
    folder = ground.copy(tmp_path / "run")
    assert ground.resume(folder, report_to="tensorboard").code == 0
    assert list((folder / "logs").rglob("events.out.tfevents.*"))
    assert ground.differences(folder) == []


def test_rewind_moves_what_came_later_and_deletes_nothing(ground: Ground, tmp_path: Path) -> None:
    folder = shutil.copytree(ground.unbroken, tmp_path / "run")
    lines, later = metrics(folder), {name: contents(folder / name) for name in ("checkpoint-8", "checkpoint-12")}
    trainer = ground.run(folder, resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert trainer.code == 0, trainer.said()[-4000:]
    moved = folder / "superseded-4"
    assert metrics(moved) == lines[4:]
    assert metrics(folder)[:4] == lines[:4]
    assert {name: contents(moved / name) for name in later} == later
    assert ground.differences(folder) == []


def test_a_finished_run_ends_at_once_and_adds_nothing(ground: Ground, tmp_path: Path) -> None:
    folder = shutil.copytree(ground.unbroken, tmp_path / "run")
    names = [path.relative_to(folder) for path in folder.rglob("*") if "first_batch" not in path.parts]
    kept = {name: contents(folder / name) for name in ("checkpoint-4", "checkpoint-8", "checkpoint-12")}
    for fewer in (STEPS, STEPS - 3):
        trainer = ground.resume(folder, max_train_steps=fewer)
        assert trainer.code == 0, trainer.said()[-4000:]
        assert metrics(folder) == metrics(ground.unbroken)
        assert {name: contents(folder / name) for name in kept} == kept
        assert sorted(path.relative_to(folder) for path in folder.rglob("*") if "first_batch" not in path.parts) == (
            sorted(names)
        )
        assert forkserver.status(folder)["state"] == "finished"
        assert forkserver.status(folder)["step"] == STEPS
        assert ground.differences(folder) == []


def test_more_steps_continue_a_finished_run(ground: Ground, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert ground.run(folder, max_train_steps=6).code == 0
    short = runs.read_weights(folder / "transformer")
    assert ground.resume(folder).code == 0
    assert forkserver.steps(folder) == forkserver.steps(ground.unbroken)
    assert forkserver.tensors(folder / "checkpoint-12") == forkserver.tensors(ground.unbroken / "checkpoint-12")
    exported = runs.read_weights(folder / "transformer")
    assert any((exported[name] != short[name]).any() for name in short)
    assert all(
        (exported[name] == value).all() for name, value in runs.read_weights(ground.unbroken / "transformer").items()
    )


def test_latest_of_nothing_starts_anew_and_says_so(ground: Ground, tmp_path: Path) -> None:
    trainer = ground.resume(tmp_path / "run", max_train_steps=2)
    assert trainer.code == 0
    assert "there is no checkpoint" in trainer.said()
    assert "starts anew, at step 0" in trainer.said()
    assert forkserver.steps(tmp_path / "run") == forkserver.steps(ground.unbroken)[:2]


# --------------------------------------------------------------------------------- what may not change


def altered_data(ground: Ground, folder: Path, change: str) -> Path:
    data = shutil.copytree(ground.metadata.parent, folder / "data")
    rows = json.loads((data / "metadata.json").read_text(encoding="utf-8"))
    if change == "row":
        rows.append({**rows[0], "text": "one more"})
    else:
        rows[3]["text"] = "another caption"
    (data / "metadata.json").write_text(json.dumps(rows), encoding="utf-8")
    return data / "metadata.json"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data": "row"}, "the data's rows, captions or sizes are others"),
        ({"data": "caption"}, "the data's rows, captions or sizes are others"),
        ({"train_batch_size": 2}, "batch_size was 1, is 2"),
        ({"video_sample_size": 48}, "policy.video_sample_size was 64, is 48"),
        ({"video_sample_n_frames": 5}, "policy.n_frames was "),
        ({"seed": 43}, "seed was 42, is 43"),
        ({"random_hw_adapt": None}, "policy.random_hw_adapt was True, is False"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_another_schedule_is_refused_by_name(ground: Ground, tmp_path: Path, changes: dict, named: str) -> None:
    folder = ground.copy(tmp_path / "run")
    before = {name: content for name, content in contents(folder).items() if name not in ("run_status.json", ".lock")}
    changes = dict(changes)
    if "data" in changes:
        changes["metadata"] = altered_data(ground, tmp_path, changes.pop("data"))
    trainer = ground.resume(folder, **changes)
    assert trainer.code == MODEL
    assert named in trainer.complaint()
    assert "Fix: " in trainer.complaint()
    status = forkserver.status(folder)
    assert (status["state"], status["exit_code"], status["error"]) == ("failed", MODEL, trainer.complaint())
    after = {name: content for name, content in contents(folder).items() if name in before}
    assert after == before


def test_no_seed_and_other_accumulation_take_the_runs_own(ground: Ground, tmp_path: Path) -> None:
    folder = ground.copy(tmp_path / "run")
    assert ground.resume(folder, seed=None, gradient_accumulation_steps=3).code == 0
    assert ground.differences(folder) == []


# ------------------------------------------------------------------------------- which one is taken up


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
def test_a_broken_newest_checkpoint_gives_way_to_the_one_before(ground: Ground, tmp_path: Path, how: str) -> None:
    folder = ground.copy(tmp_path / "run")
    break_newest(folder, how)
    trainer = ground.resume(folder)
    assert trainer.code == 0, trainer.said()[-4000:]
    assert re.search(r"checkpoint-8 is not used: \S.+", trainer.said())
    assert "from step 4" in trainer.said()
    assert (folder / "superseded-4" / "checkpoint-8").is_dir()
    assert ground.differences(folder) == []


def test_a_foreign_checkpoint_is_named(ground: Ground, tmp_path: Path) -> None:
    # The files that accelerate's save_state leaves, as VideoX-Fun calls it.
    folder = tmp_path / "run"
    foreign = folder / "checkpoint-50"
    shutil.copytree(ground.unbroken / "transformer", foreign / "transformer")
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl", "sampler_pos_start.pkl"):
        (foreign / name).write_bytes(b"not ours")
    for asked in ("latest", str(foreign)):
        trainer = ground.run(folder, resume_from_checkpoint=asked)
        assert trainer.code == MODEL
        assert "VideoX-Fun" in trainer.complaint()
        assert f"--transformer_path {foreign / 'transformer'}" in trainer.complaint()
    # and that way out is a way
    out = tmp_path / "out"
    assert ground.run(out, transformer_path=foreign / "transformer", max_train_steps=1).code == 0


def test_only_exact_names_are_checkpoints(ground: Ground, tmp_path: Path) -> None:
    folder = ground.copy(tmp_path / "run")
    tempting = (
        "checkpoint-99-outputs",
        "checkpoint-5-outputs",
        "checkpoint-009",
        "checkpoint-tmp",
        "old-checkpoint-99",
    )
    for name in tempting:
        shutil.copytree(folder / "checkpoint-4", folder / name)
    before = {name: contents(folder / name) for name in tempting}
    trainer = ground.resume(folder)
    assert "from step 8" in trainer.said()
    assert ground.differences(folder) == []
    assert {name: contents(folder / name) for name in tempting} == before


def test_the_limit_prunes_only_after_the_newer_save(ground: Ground, tmp_path: Path) -> None:
    folder, seen = tmp_path / "run", []

    def look() -> bool:
        names = [path.name for path in find_checkpoints(folder)]
        if not seen or seen[-1] != names:
            seen.append(names)
        return False

    trainer = ground.start(folder, checkpointing_steps=2, checkpoints_total_limit=2)
    trainer.until(look)
    assert trainer.wait() == 0
    assert [path.name for path in find_checkpoints(folder)] == ["checkpoint-10", "checkpoint-12"]
    counts = [len(names) for names in seen]
    assert all(2 <= count <= 3 for count in counts[counts.index(2) :]), seen
    assert forkserver.steps(folder) == forkserver.steps(ground.unbroken)


# ------------------------------------------------------------------------- two at once, and a full disk


def test_a_second_trainer_is_refused_and_harms_nothing(ground: Ground, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = ground.start(folder)
    first.until(lambda: metrics(folder))
    for asked in (None, "latest"):
        second = ground.run(folder, resume_from_checkpoint=asked)
        assert second.code == FLAGS
        assert f"is held by pid {first.pid} on host " in second.complaint()
    assert first.running(), "the first run had ended before the second began: the test shows nothing"
    assert first.wait() == 0, first.said()[-4000:]
    assert ground.differences(folder) == []


def test_a_first_batch_that_cannot_be_written_is_a_warning(ground: Ground, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    trainer = ground.start(folder, largest_file=LARGEST_PICTURE)
    trainer.until(lambda: "warning: the first batch cannot be looked at" in trainer.said())
    resource.prlimit(trainer.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert trainer.wait() == 0, trainer.said()[-4000:]
    assert not list(folder.glob("*first_batch*"))


def test_one_failing_save_is_a_warning(ground: Ground, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    trainer = ground.start(folder, largest_file=LARGEST_FILE)
    trainer.until(lambda: "warning: no checkpoint at step 4" in trainer.said())
    resource.prlimit(trainer.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert trainer.wait() == 0, trainer.said()[-4000:]
    assert [path.name for path in find_checkpoints(folder)] == ["checkpoint-8", "checkpoint-12"]
    assert "the run goes on" in trainer.said()
    assert not list(folder.glob(".tmp-*"))
    assert ground.differences(folder) == []


def test_a_second_failing_save_ends_the_run(ground: Ground, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert ground.run(folder, max_train_steps=EVERY).code == 0
    trainer = ground.resume(folder, largest_file=LARGEST_FILE)
    assert trainer.code == STORAGE, trainer.said()[-4000:]
    assert "warning: no checkpoint at step 8" in trainer.said()
    assert "the save at step 12 failed like the one before" in trainer.complaint()
    status = forkserver.status(folder)
    assert (status["state"], status["exit_code"], status["step"]) == ("failed", STORAGE, STEPS)
    assert [path.name for path in find_checkpoints(folder)] == ["checkpoint-4"]
    assert verify(folder / "checkpoint-4", hashes=True) == []
    assert not list(folder.glob(".tmp-*"))
    assert ground.resume(folder).code == 0
    assert ground.differences(folder) == []
