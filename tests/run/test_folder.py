"""Tests of videox.run.folder: resuming, rewinding, pruning, locking; no kill or full disk loses a record."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from crashes import file_names, fork, gather_single, inject_fault, kill_self, publish, publish_all, wait_for
from hypothesis import given, settings
from hypothesis import strategies as st

from videox.errors import FLAGS, MODEL, STORAGE, UserError
from videox.files import temp_path
from videox.optim.state import load_optimizer_tensors, optimizer_tensors
from videox.run.checkpoint import (
    MANIFEST,
    find_checkpoints,
    latest_checkpoint,
    publish_checkpoint,
    read_manifest,
    verify,
)
from videox.run.folder import (
    RECORDS,
    ResumePoint,
    discard,
    lock_folder,
    prune,
    remove_leftovers,
    require_disk_space,
    resolve_resume,
    rewind,
)
from videox.weights.safetensors_io import StoredTensors, save_tensors, save_weights


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory) -> Path:
    return publish_all(tmp_path_factory.mktemp("run"), 1, 2)


# --- resuming --------------------------------------------------------------------------------------------------------


def resume(path: str | None, run: Path, hashes: bool = False) -> ResumePoint:
    return resolve_resume(path, run, partial(verify, hashes=hashes))


def refused(path: str | None, run: Path, exit_code: int, hashes: bool = False) -> str:
    with pytest.raises(UserError) as caught:
        resume(path, run, hashes)
    assert caught.value.exit_code == exit_code
    return caught.value.line()


def test_latest_without_a_checkpoint_starts_a_new_run_and_reports_it(tmp_path):
    found = resume("latest", tmp_path / "absent")
    assert (found.path, found.step) == (None, 0) and "a new run starts at step 0" in found.warnings[0]
    (tmp_path / RECORDS[0]).write_text('{"step": 1}\n')  # killed before its first checkpoint
    assert resume("latest", tmp_path).path is None
    assert resume(None, tmp_path / "absent") == ResumePoint(None, 0)


def test_latest_is_the_newest_sound_checkpoint(two_checkpoints, tmp_path):
    run = shutil.copytree(two_checkpoints, tmp_path / "run")
    assert resume("latest", run) == ResumePoint(run / "checkpoint-2", 2)
    tensors = run / "checkpoint-2" / "optimizer.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"\x7f")
    assert resume("latest", run).step == 2
    found = resume("latest", run, hashes=True)
    assert found.step == 1 and "checkpoint-2" in found.warnings[0]
    (run / "checkpoint-1" / "trainer_state.json").unlink()
    line = refused("latest", run, MODEL, hashes=True)
    assert "trainer_state.json is missing" in line and "optimizer.safetensors" in line
    assert "optimizer.safetensors" in refused(str(run / "checkpoint-2"), run, MODEL, hashes=True)


def test_renamed_folder_is_not_latest_but_can_be_passed(two_checkpoints, tmp_path):
    run = shutil.copytree(two_checkpoints, tmp_path / "run")
    (run / "checkpoint-2").rename(run / "checkpoint-90")
    found = resume("latest", run)
    assert found.step == 1 and "it was saved as checkpoint-2" in found.warnings[0]
    assert resume(str(run / "checkpoint-90"), run).step == 2


def test_path_outside_the_run_is_accepted(two_checkpoints, tmp_path, monkeypatch):
    run = tmp_path / "run"
    publish(run, 2)
    moved = shutil.copytree(two_checkpoints / "checkpoint-1", tmp_path / "backup" / "my favourite")
    for path in moved.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    moved.chmod(0o555)
    monkeypatch.chdir(tmp_path)
    for given_path in (str(moved), f"{moved}/", "backup/my favourite", "./backup/my favourite/"):
        found = resume(given_path, run, hashes=True)
        assert found.step == 1 and found.path.resolve() == moved
    link = tmp_path / "link"
    link.symlink_to(moved)
    assert resume(str(link), run).step == 1


def test_path_without_a_checkpoint_is_refused_with_what_is_there(two_checkpoints, tmp_path):
    run = two_checkpoints
    assert "does not exist" in refused(str(tmp_path / "typo"), run, MODEL)
    assert f"pass {run / 'checkpoint-2'}" in refused(str(tmp_path / "typo"), run, MODEL)
    assert "found: nothing" in refused(str(tmp_path), tmp_path / "empty", MODEL)
    (tmp_path / "notes.txt").write_text("x")
    assert "found: notes.txt" in refused(str(tmp_path), run, MODEL)
    assert "is a file" in refused(str(tmp_path / "notes.txt"), run, MODEL)
    line = refused(str(run), tmp_path / "empty", MODEL)
    assert "contains checkpoints (checkpoint-1, checkpoint-2)" in line and f"pass {run / 'checkpoint-2'}" in line


def test_unreadable_path_is_refused_with_one_line(tmp_path):
    (tmp_path / "closed").mkdir(mode=0)

    def as_nobody() -> None:
        os.chdir(tmp_path)
        if os.getuid() == 0:
            os.setuid(65534)
        for path in ("closed/checkpoint-1", "x" * 300):
            assert path in refused(path, Path(), STORAGE)
        assert "Permission denied" in refused("latest", Path("closed/run"), STORAGE)
        assert "Permission denied" in refused(None, Path("closed/run"), STORAGE)

    tmp_path.chmod(0o755)
    assert wait_for(fork(as_nobody)) == 0


@pytest.mark.parametrize("marker", ["optimizer.bin", "random_states_0.pkl", "sampler_pos_start.pkl", "pytorch_model/"])
@pytest.mark.parametrize("by_path", [True, False])
def test_foreign_checkpoint_is_refused_with_how_to_use_it(tmp_path, marker, by_path):
    foreign = tmp_path / "checkpoint-500"
    (foreign / "transformer").mkdir(parents=True)
    (foreign / marker).mkdir() if marker.endswith("/") else (foreign / marker).write_bytes(b"pickle")
    line = refused(str(foreign) if by_path else "latest", tmp_path, MODEL)
    assert "VideoX-Fun" in line and f"--transformer_path {foreign / 'transformer'}" in line
    assert marker.rstrip("/") in line
    assert "checkpoint-500" in refused(None, tmp_path, FLAGS)
    publish(tmp_path, 3)
    assert resume("latest", tmp_path).step == 3


@pytest.mark.parametrize(
    ("name", "content", "has_run"),
    [
        ("metrics.jsonl", '{"step": 1}\n', True),
        ("metrics.jsonl", "", False),
        ("run_status.json", '{"state": "finished", "step": 9}', True),
        ("run_status.json", '{"state": "failed", "step": 0}', False),
        ("run_status.json", "{torn", True),
        ("plan_report.json", "{}", False),
    ],
)
def test_folder_with_a_run_is_refused_without_resume(tmp_path, name, content, has_run):
    (tmp_path / name).write_text(content)
    if has_run:
        line = refused(None, tmp_path, FLAGS)
        assert name in line and "--resume_from_checkpoint latest" in line and "another --output_dir" in line
    else:
        assert resume(None, tmp_path) == ResumePoint(None, 0)


def test_folder_with_checkpoints_is_refused_without_resume(two_checkpoints):
    assert "checkpoint-2" in refused(None, two_checkpoints, FLAGS)


# --- rewinding -------------------------------------------------------------------------------------------------------


def lines_of(steps: range) -> list[str]:
    return [json.dumps({"step": step, "loss": step / 3}) + "\n" for step in steps]


def test_rewind_moves_later_records_and_deletes_nothing(two_checkpoints, tmp_path):
    run = shutil.copytree(two_checkpoints, tmp_path / "run")
    for name in RECORDS:
        (run / name).write_text("".join(lines_of(range(1, 6))) + '{"step": 6, "lo')
    (run / "checkpoint-9-outputs").mkdir()
    assert rewind(run, 1) == run / "superseded-1"
    assert file_names(run) == sorted(["checkpoint-1", "checkpoint-9-outputs", "superseded-1", *RECORDS])
    for name in RECORDS:
        assert (run / name).read_text() == "".join(lines_of(range(1, 2)))
        assert (run / "superseded-1" / name).read_text() == "".join(lines_of(range(2, 6))) + '{"step": 6, "lo'
    assert verify(run / "superseded-1" / "checkpoint-2", hashes=True) == []
    assert rewind(run, 1) is None and "superseded-1-2" not in file_names(run)
    publish(run, 4)
    assert rewind(run, 1) == run / "superseded-1-2"
    assert rewind(tmp_path / "absent", 0) is None


@pytest.mark.parametrize("tail", ['{"step": 3, "loss": 1.0}', '{"step": 3, "loss": 1.0', "3", "\x00\x00", "\n"])
def test_incomplete_last_line_is_moved_and_missing_newline_added(tmp_path, tail):
    log = tmp_path / RECORDS[0]
    log.write_text("".join(lines_of(range(1, 3))) + tail)
    moved = rewind(tmp_path, 3)
    complete = tail.endswith("}")
    assert log.read_text() == "".join(lines_of(range(1, 3))) + (tail + "\n" if complete else "")
    assert (moved is None) if complete else (moved / log.name).read_text() == tail


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(st.integers(1, 9), max_size=12),
    saved=st.sets(st.integers(1, 9), max_size=3),
    back_to=st.integers(0, 9),
    incomplete=st.booleans(),
)
def test_rewind_keeps_every_line_once_and_in_order(tmp_path_factory, steps, saved, back_to, incomplete):
    run = tmp_path_factory.mktemp("run")
    for step in saved:
        (run / f"checkpoint-{step}").mkdir()
        (run / f"checkpoint-{step}" / MANIFEST).write_text("{}")
    lines = [json.dumps({"step": step, "n": number}) + "\n" for number, step in enumerate(steps)]
    (run / RECORDS[0]).write_text("".join(lines) + ('{"st' if incomplete else ""))
    superseded = rewind(run, back_to)
    later = [line for line, step in zip(lines, steps, strict=True) if step > back_to] + ['{"st'] * incomplete
    assert (run / RECORDS[0]).read_text() == "".join(
        line for line, step in zip(lines, steps, strict=True) if step <= back_to
    )
    assert {int(path.name[11:]) for path in find_checkpoints(run)} == {step for step in saved if step <= back_to}
    if later or any(step > back_to for step in saved):
        moved = superseded / RECORDS[0]
        assert (moved.read_text() if moved.exists() else "") == "".join(later)
        assert {int(path.name[11:]) for path in find_checkpoints(superseded)} == {
            step for step in saved if step > back_to
        }
    else:
        assert superseded is None
    assert rewind(run, back_to) is None


@pytest.mark.slow
def test_rewind_killed_at_every_file_operation_is_completed_by_the_next(tmp_path):
    """At each point the newest remaining checkpoint has all its records, and no line or checkpoint is lost."""
    everything = lines_of(range(1, 60))
    points, interrupted, status = 0, 0, -signal.SIGKILL
    while status == -signal.SIGKILL:
        points += 1
        run = tmp_path / str(points)
        for step in range(10, 60, 10):
            (run / f"checkpoint-{step}").mkdir(parents=True)
            (run / f"checkpoint-{step}" / MANIFEST).write_text("{}")
        for name in RECORDS:
            (run / name).write_text("".join(everything))

        def killed(run: Path = run, at: int = points) -> None:
            inject_fault(run, at, kill_self, reads=False)
            rewind(run, 10)

        status = wait_for(fork(killed))
        left = [int(path.name[11:]) for path in find_checkpoints(run)]
        newest = left[-1]
        assert left == list(range(10, newest + 1, 10))  # moved newest first: no gap among the rest
        for name in RECORDS:
            assert (run / name).read_text().startswith("".join(everything[:newest]))
        interrupted += bool(list(run.glob("superseded-*"))) and rewind(run, 10) is not None
        assert rewind(run, 10) is None or not list(run.glob("superseded-*-2"))
        remove_leftovers(run)
        for name in RECORDS:
            assert (run / name).read_text() == "".join(everything[:10])
            assert "".join(everything[10:]) in [path.read_text() for path in run.glob(f"superseded-*/{name}")]
        assert file_names(run) == sorted(
            ["checkpoint-10", *RECORDS, *(path.name for path in run.glob("superseded-*"))]
        )
        assert sorted(path.name for path in run.glob("superseded-*/checkpoint-*")) == [
            f"checkpoint-{step}" for step in range(20, 60, 10)
        ]
    assert status == 0 and interrupted > 10


def test_folder_that_cannot_be_rewound_is_refused(tmp_path):
    (tmp_path / RECORDS[0]).mkdir()  # not a file: ignored
    assert rewind(tmp_path, 0) is None
    (tmp_path / RECORDS[1]).write_text("".join(lines_of(range(1, 400))))

    def full_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        with pytest.raises(UserError) as caught:
            rewind(tmp_path, 1)
        assert caught.value.exit_code == STORAGE and "cannot be rewound to step 1" in caught.value.line()

    assert wait_for(fork(full_disk)) == 0
    assert (tmp_path / RECORDS[1]).read_text() == "".join(lines_of(range(1, 400)))


# --- pruning ---------------------------------------------------------------------------------------------------------


def test_prune_keeps_the_newest_sound_ones_and_touches_nothing_else(tmp_path):
    for step in (1, 2, 3, 4, 5, 6):
        publish(tmp_path, step)
    (tmp_path / "checkpoint-5" / "trainer_state.json").unlink()
    outside = publish(tmp_path / "elsewhere", 0)
    (tmp_path / "checkpoint-0").symlink_to(outside)
    for name in ("checkpoint-1-outputs", "checkpoint-007", "superseded-2"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-8").mkdir()  # no manifest: not a checkpoint
    assert prune(tmp_path, keep=2) == []
    left = [name for name in file_names(tmp_path) if name.startswith("checkpoint")]
    assert left == sorted(
        [
            "checkpoint-0",
            "checkpoint-1-outputs",
            "checkpoint-007",
            "checkpoint-4",
            "checkpoint-5",
            "checkpoint-6",
            "checkpoint-8",
        ]
    )
    assert verify(outside) == [] and not [name for name in file_names(tmp_path) if name.startswith(".")]
    assert prune(tmp_path, keep=0) == []  # never deletes the last one
    assert latest_checkpoint(tmp_path)[0] == tmp_path / "checkpoint-6"
    assert prune(tmp_path / "absent", keep=1) == []


def test_prune_keeps_the_spared_one_besides_the_newest(tmp_path):
    publish_all(tmp_path, 1, 2, 3, 4)
    assert prune(tmp_path, keep=1, spare=2) == [] and file_names(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    assert prune(tmp_path, keep=1, spare=4) == [] and file_names(tmp_path) == ["checkpoint-4"]
    assert discard([tmp_path / "checkpoint-4", tmp_path / "absent"]) == [] and file_names(tmp_path) == []


def test_rewinding_moves_later_best_weights(tmp_path):
    publish_all(tmp_path, 1, 2)
    for name in ("best-1", "best-2", "best-cat", "best-2-superseded"):
        (tmp_path / name).mkdir()
    moved = rewind(tmp_path, 1)
    assert file_names(moved) == ["best-2", "checkpoint-2"]
    assert {"best-1", "best-cat", "best-2-superseded", "checkpoint-1"} <= set(file_names(tmp_path))


def test_failed_removal_is_reported_and_tried_again(tmp_path):
    for step in (1, 2):
        publish(tmp_path, step)
    tmp_path.chmod(0o555)

    def without_write_permission() -> None:
        os.chdir(tmp_path)  # its parent folders are not accessible to other users
        if os.getuid() == 0:
            os.setuid(65534)
        warnings = prune(Path(), keep=1)
        assert len(warnings) == 1 and "checkpoint-1 could not be deleted" in warnings[0]

    def without_read_permission() -> None:
        if os.getuid() == 0:
            os.setuid(65534)
        warnings = prune(tmp_path, keep=1)
        assert len(warnings) == 1 and "could not be pruned" in warnings[0]

    assert wait_for(fork(without_write_permission)) == 0
    tmp_path.chmod(0o000)
    assert wait_for(fork(without_read_permission)) == 0
    tmp_path.chmod(0o755)
    assert verify(tmp_path / "checkpoint-1", hashes=True) == []
    assert prune(tmp_path, keep=1) == [] and file_names(tmp_path) == ["checkpoint-2"]


def test_remove_leftovers_deletes_only_own_files(tmp_path):
    for name in (
        ".tmp-checkpoint-5-0123456789ab",
        ".trash-checkpoint-4-0123456789ab",
        ".tmp-transformer-0123456789ab",
    ):
        (tmp_path / name / "transformer").mkdir(parents=True)
    (tmp_path / ".tmp-run_status.json-0123456789ab").write_text("{")
    temp_path(tmp_path / "losses.png").write_text("half")
    (tmp_path / "precious").mkdir()
    (tmp_path / ".trash-link-0123456789ab").symlink_to(tmp_path / "precious")
    others = [".tmp", ".tmp-mine", ".trash-1", ".tmp-notes-0123456789", "precious"]
    for name in others[:-1]:
        (tmp_path / name).mkdir()
    assert remove_leftovers(tmp_path) == []
    assert file_names(tmp_path) == sorted(others)
    assert remove_leftovers(tmp_path / "absent") == []


# --- disk space and the lock -----------------------------------------------------------------------------------


def test_missing_disk_space_is_reported_in_numbers(tmp_path):
    require_disk_space(tmp_path / "not" / "yet" / "there", 1)
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(UserError, match=r"needs 1e\+09 GB of disk space, [0-9.e+]+ GB are free") as caught:
        require_disk_space(tmp_path / "run", 10**18)
    assert caught.value.exit_code == STORAGE and free < 10**18


def test_second_run_is_refused_with_the_lock_owner(tmp_path):
    run = tmp_path / "new" / "run"
    with lock_folder(run) as warnings:
        assert warnings == []

        def second() -> None:
            with pytest.raises(UserError) as caught, lock_folder(run):
                pass
            assert caught.value.exit_code == FLAGS
            assert (
                f"in use by pid {os.getppid()} on host " in caught.value.line() and " since 2" in caught.value.line()
            )

        assert wait_for(fork(second)) == 0
    with lock_folder(run):
        pass


def test_lock_ends_with_its_owner_also_if_a_worker_lives_on(tmp_path):
    reader, writer = os.pipe()

    def work() -> None:  # e.g. a DataLoader worker that outlives a killed trainer
        os.write(writer, f"{os.getpid()}\n".encode())
        time.sleep(60)

    def owner() -> None:
        with lock_folder(tmp_path):
            fork(work)
            time.sleep(60)

    child = fork(owner)
    worker = int(os.read(reader, 20))
    try:
        with pytest.raises(UserError), lock_folder(tmp_path):
            pass
        os.kill(child, signal.SIGKILL)
        wait_for(child)
        with lock_folder(tmp_path):
            os.kill(worker, 0)  # it is still alive
    finally:
        os.kill(worker, signal.SIGKILL)


def test_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch):
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))  # as a network mount without a lock service

    monkeypatch.setattr("videox.run.folder.fcntl.flock", no_locks)
    with lock_folder(tmp_path) as warnings:
        assert len(warnings) == 1 and "has no file locks" in warnings[0] and "No locks available" in warnings[0]


def test_lock_is_not_written_through_a_link(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(UserError) as caught, lock_folder(tmp_path):
        pass
    assert caught.value.exit_code == STORAGE and (tmp_path / "victim").read_text() == "precious"


# --- kills -----------------------------------------------------------------------------------------------------------


def resume_and_train(run: Path, published: int) -> None:
    """A small run: resume, train AdamW, record, save and prune until killed; write each published step to a pipe."""
    with lock_folder(run):
        remove_leftovers(run)
        start = resolve_resume("latest", run, partial(verify, hashes=True))
        rewind(run, start.step)
        weight = torch.nn.Parameter(torch.zeros(300))
        optimizer = torch.optim.AdamW([weight], lr=0.1)
        if start.path is not None:
            with torch.no_grad():
                weight.copy_(StoredTensors(start.path / "transformer")["w"])
            load_optimizer_tensors(optimizer, {weight: "w"}, StoredTensors(start.path, "optimizer"))
        for step in range(start.step + 1, 100_000):
            weight.grad = torch.linspace(-1, step % 7, 300)
            optimizer.step()
            with (run / RECORDS[0]).open("a") as log:
                log.write(json.dumps({"step": step, "loss": float(weight.sum())}) + "\n")
            if step % 2:
                continue
            with publish_checkpoint(run, step, is_main=True, gather=gather_single, description={}) as folder:
                assert folder is not None
                save_weights(folder / "transformer", {"w": weight}, "{}", max_shard_size=100)
                save_tensors(folder, optimizer_tensors(optimizer, {weight: "w"}), stem="optimizer")
            os.write(published, f"{step}\n".encode())
            assert prune(run, keep=2) == []


def uninterrupted(steps: int) -> list[torch.Tensor]:
    weight = torch.nn.Parameter(torch.zeros(300))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    after = []
    for step in range(1, steps + 1):
        weight.grad = torch.linspace(-1, step % 7, 300)
        optimizer.step()
        after.append(weight.detach().clone())
    return after


@pytest.mark.slow
def test_forty_kills_at_random_times_lose_nothing(tmp_path):
    """After each SIGKILL the newest checkpoint is sound, exact, and not older than the last one that was reported."""
    uninterrupted(1)  # torch imports many modules at an optimizer's first step: once here, not in each child
    chance = random.Random(7)
    announced, span, kills = 0, 0.1, 0
    while kills < 40 or announced < 20:
        kills += 1
        assert kills < 400, "the kills come too early to test anything"
        reader, writer = os.pipe()
        child = fork(lambda writer=writer: resume_and_train(tmp_path, writer))
        os.close(writer)
        time.sleep(chance.uniform(0.0, span))
        os.kill(child, signal.SIGKILL)
        assert wait_for(child) == -signal.SIGKILL
        with os.fdopen(reader) as lines:
            reached = [int(line) for line in lines]
        span *= 0.9 if reached else 1.2  # adapts to the speed of the machine
        announced = max([announced, *reached])
        newest, warnings = latest_checkpoint(tmp_path, partial(verify, hashes=True))
        assert warnings == [] and (newest is None) == (announced == 0 and not find_checkpoints(tmp_path))
        if newest is not None:
            assert read_manifest(newest)["step"] >= announced

    with lock_folder(tmp_path):  # the killed processes left no lock
        assert remove_leftovers(tmp_path) == []
        newest, _ = latest_checkpoint(tmp_path, partial(verify, hashes=True))
        step = read_manifest(newest)["step"]
        rewind(tmp_path, step)
    exact = uninterrupted(step)
    assert torch.equal(StoredTensors(newest / "transformer")["w"], exact[-1])
    records = [json.loads(line) for line in (tmp_path / RECORDS[0]).read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, step + 1))
    assert [record["loss"] for record in records] == [float(weight.sum()) for weight in exact]
    assert not [name for name in file_names(tmp_path) if name.startswith((".tmp", ".trash"))]
    assert len(find_checkpoints(tmp_path)) <= 3  # killed between a publication and its pruning
