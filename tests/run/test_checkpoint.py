"""Tests of videox.run.checkpoint with real kills, full disks, flipped bits and failing ranks."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from crashes import (
    file_names,
    fork,
    gather_single,
    inject_fault,
    kill_self,
    publish,
    publish_all,
    raise_disk_full,
    wait_for,
    write_checkpoint_files,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from videox.errors import SaveError
from videox.files import seal_of, write_json_atomically
from videox.run.checkpoint import (
    MANIFEST,
    find_checkpoints,
    latest_checkpoint,
    publish_checkpoint,
    read_manifest,
    verify,
)
from videox.run.folder import prune, remove_leftovers
from videox.weights.safetensors_io import save_tensors

# --- publication -----------------------------------------------------------------------------------------------------


def test_published_checkpoint_is_complete_described_and_verified(tmp_path):
    checkpoint = publish(tmp_path / "new" / "run", 12, G=8, plan={"hash": "abc"})
    manifest = read_manifest(checkpoint)
    on_disk = {p.relative_to(checkpoint).as_posix() for p in checkpoint.rglob("*") if p.is_file()} - {MANIFEST}
    assert set(manifest["files"]) == on_disk and len(on_disk) == 6
    assert (manifest["step"], manifest["world_size"], manifest["format"]) == (12, 1, 1)
    assert manifest["description"] == {"G": 8, "plan": {"hash": "abc"}}
    assert manifest["versions"]["torch"] == torch.__version__
    assert verify(checkpoint, hashes=True) == []
    assert file_names(checkpoint.parent) == ["checkpoint-12"]
    assert checkpoint.stat().st_mode & 0o777 == tmp_path.joinpath("new").stat().st_mode & 0o777


def test_sound_checkpoint_is_not_written_again(tmp_path):
    checkpoint = publish(tmp_path, 3)
    before = {path: path.stat().st_mtime_ns for path in checkpoint.rglob("*")}
    with publish_checkpoint(tmp_path, 3, is_main=True, gather=gather_single, description={}) as folder:
        assert folder is None
    assert {path: path.stat().st_mtime_ns for path in checkpoint.rglob("*")} == before
    assert file_names(tmp_path) == ["checkpoint-3"]


@pytest.mark.parametrize("kind", ["broken", "foreign", "file", "dangling link"])
def test_broken_folder_with_the_checkpoint_name_is_moved_away(tmp_path, kind):
    target = tmp_path / "checkpoint-3"
    if kind == "broken":
        publish(tmp_path, 3)
        (target / "trainer_state.json").write_text("{}")
    elif kind == "foreign":
        target.mkdir()
        (target / "mine.txt").write_text("keep")
    elif kind == "file":
        target.write_text("keep")
    else:
        target.symlink_to(tmp_path / "nowhere")
    publish(tmp_path, 3)
    assert verify(target, hashes=True) == []
    assert file_names(tmp_path) == ["checkpoint-3", "superseded-3"] and file_names(tmp_path / "superseded-3") == [
        "checkpoint-3"
    ]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), SaveError("PytorchStreamWriter failed")])
def test_failed_write_drops_the_save_and_keeps_the_older(tmp_path, error):
    publish(tmp_path, 1)
    with (
        pytest.raises(SaveError, match=str(error.args[-1])),
        publish_checkpoint(tmp_path, 2, is_main=True, gather=gather_single, description={}) as folder,
    ):
        write_checkpoint_files(folder, 2)
        raise error
    assert file_names(tmp_path) == ["checkpoint-1"] and latest_checkpoint(tmp_path, partial(verify, hashes=True)) == (
        tmp_path / "checkpoint-1",
        [],
    )


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("out of memory")])
def test_other_exceptions_are_not_save_errors(tmp_path, error):
    with (
        pytest.raises(type(error)),
        publish_checkpoint(tmp_path, 2, is_main=True, gather=gather_single, description={}),
    ):
        raise error
    assert file_names(tmp_path) == []


def test_output_dir_that_cannot_be_created_is_a_save_error(tmp_path):
    (tmp_path / "run").write_text("a file")
    with (
        pytest.raises(SaveError, match="FileExistsError"),
        publish_checkpoint(tmp_path / "run", 2, is_main=True, gather=gather_single, description={}),
    ):
        pass


@pytest.mark.parametrize("limit", [0, 100, 1500, 2300, 3000])
def test_full_disk_at_any_file_keeps_the_older_checkpoint(tmp_path, limit):
    publish(tmp_path, 1)

    def full_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(SaveError, match="File too large"):
            publish(tmp_path, 2, padding="x" * 3000)

    assert wait_for(fork(full_disk)) == 0
    assert file_names(tmp_path) == ["checkpoint-1"] and latest_checkpoint(tmp_path, partial(verify, hashes=True)) == (
        tmp_path / "checkpoint-1",
        [],
    )


# --- several ranks ---------------------------------------------------------------------------------------------------


def in_ranks(world: int, tmp_path: Path, work: Callable[[int, Callable[[object], list[object]]], None]) -> list[int]:
    """Run `work(rank, gather)` in `world` forked processes connected by gloo; return their exit codes."""

    def rank_main(rank: int) -> None:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=rank, world_size=world
        )

        def gather(value: object) -> list[object]:
            values: list[object] = [None] * world
            torch.distributed.all_gather_object(values, value)
            return values

        work(rank, gather)
        torch.distributed.destroy_process_group()

    children = [fork(lambda rank=rank: rank_main(rank)) for rank in range(world)]
    return [wait_for(child) for child in children]


def test_two_ranks_publish_one_checkpoint(tmp_path):
    run = tmp_path / "run"

    def work(rank: int, gather: Callable[[object], list[object]]) -> None:
        with publish_checkpoint(run, 5, is_main=rank == 0, gather=gather, description={}) as folder:
            save_tensors(folder, {"w": torch.full((100 * (rank + 1),), float(rank))}, stem=f"rank-{rank}")
            time.sleep(0.2 * rank)  # the first to finish must not list files before the last has written
            (folder / f"rank-{rank}").mkdir()
            (folder / f"rank-{rank}" / "state.json").write_text("{}")
        assert verify(run / "checkpoint-5", hashes=True) == []  # exists for every rank on exit
        with publish_checkpoint(run, 5, is_main=rank == 0, gather=gather, description={}) as folder:
            assert folder is None

    assert in_ranks(2, tmp_path, work) == [0, 0]
    manifest = read_manifest(run / "checkpoint-5")
    assert manifest["world_size"] == 2 and len(manifest["files"]) == 4
    assert file_names(run) == ["checkpoint-5"]


@pytest.mark.parametrize("main", [0, 1])
def test_failed_rank_drops_the_save_on_all_ranks_with_its_cause(tmp_path, main):
    run = tmp_path / "run"

    def work(rank: int, gather: Callable[[object], list[object]]) -> None:
        with (
            pytest.raises(SaveError, match=r"^rank 1: OSError: .*No space left"),
            publish_checkpoint(run, 5, is_main=rank == main, gather=gather, description={}) as folder,
        ):
            write_checkpoint_files(folder / str(rank), 5)
            if rank == 1:
                raise OSError(errno.ENOSPC, "No space left on device")
        gather("the main rank has left")
        assert file_names(run) == []

    assert in_ranks(2, tmp_path, work) == [0, 0]


def test_rank_that_cannot_see_the_folder_fails_the_save(tmp_path):
    """Machines without a shared output_dir: each one has its own."""

    def work(rank: int, gather: Callable[[object], list[object]]) -> None:
        with (
            pytest.raises(SaveError, match=r"rank 1: .*must be shared by all machines"),
            publish_checkpoint(
                tmp_path / f"machine-{rank}", 5, is_main=rank == 0, gather=gather, description={}
            ) as folder,
        ):
            if rank == 0:
                write_checkpoint_files(folder, 5)

    assert in_ranks(2, tmp_path, work) == [0, 0]
    assert file_names(tmp_path / "machine-0") == []


def test_rank_killed_during_a_save_ends_the_others_and_publishes_nothing(tmp_path):
    run = tmp_path / "run"
    publish(run, 4)

    def work(rank: int, gather: Callable[[object], list[object]]) -> None:
        with (
            pytest.raises(RuntimeError),
            publish_checkpoint(run, 5, is_main=rank == 0, gather=gather, description={}) as folder,
        ):
            write_checkpoint_files(folder / str(rank), 5)
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        os._exit(0)

    assert in_ranks(2, tmp_path, work) == [0, -signal.SIGKILL]
    assert file_names(run) == ["checkpoint-4"] and latest_checkpoint(run, partial(verify, hashes=True)) == (
        run / "checkpoint-4",
        [],
    )


# --- kills -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def third_unsound(tmp_path_factory) -> Path:
    """Checkpoints 1 and 2 are sound, 3 lacks a file."""
    run = publish_all(tmp_path_factory.mktemp("third") / "run", 1, 2, 3)
    (run / "checkpoint-3" / "trainer_state.json").unlink()
    return run


def save_and_prune(run: Path) -> None:
    publish(run, 3)
    assert prune(run, keep=1) == []


@pytest.mark.slow
def test_kill_at_every_file_operation_of_save_and_prune(third_unsound, tmp_path):
    points = 0
    while True:
        points += 1
        run = shutil.copytree(third_unsound, tmp_path / str(points))

        def killed(run: Path = run, at: int = points) -> None:
            inject_fault(run, at, kill_self, reads=False)
            save_and_prune(run)

        status = wait_for(fork(killed))
        newest, _ = latest_checkpoint(run, partial(verify, hashes=True))
        assert newest in (run / "checkpoint-2", run / "checkpoint-3"), points
        assert remove_leftovers(run) == []
        save_and_prune(run)  # the second attempt ends as if there had been no kill
        assert latest_checkpoint(run, partial(verify, hashes=True)) == (run / "checkpoint-3", [])
        left = file_names(run)
        assert left[0] == "checkpoint-3" and set(left[1:]) >= {"superseded-3"}
        assert all(name.startswith("superseded-3") for name in left[1:])
        superseded = [
            path for path in run.glob("superseded-3*/checkpoint-3") if not (path / "trainer_state.json").exists()
        ]
        assert len(superseded) == 1  # the unsound one is never deleted
        shutil.rmtree(run)
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert points > 25


@pytest.mark.slow
def test_error_of_every_file_operation_of_a_save(third_unsound, tmp_path):
    """Whichever operation fails: a SaveError or a sound checkpoint, one to resume from, no temporary files."""
    points, failures = 0, 0
    reached = True
    while reached:
        points += 1
        run = shutil.copytree(third_unsound, tmp_path / str(points))

        def failing(run: Path = run, at: int = points) -> None:
            reached_fault = inject_fault(run, at, raise_disk_full, reads=True)
            status = 3
            try:
                publish(run, 3)
            except SaveError as error:
                assert "No space left on device" in str(error)
                status = 4
            os._exit(status if reached_fault else 0)

        status = wait_for(fork(failing))
        reached = status != 0
        assert status in (0, 3, 4)
        failures += status == 4
        newest, _ = latest_checkpoint(run, partial(verify, hashes=True))
        assert (
            newest == run / "checkpoint-3" if status != 4 else newest in (run / "checkpoint-2", run / "checkpoint-3")
        )
        assert [name for name in file_names(run) if name.startswith(".")] == []
        shutil.rmtree(run)
    assert failures > 20


# --- finding and verifying -------------------------------------------------------------------------------------------


def test_only_exact_names_with_a_manifest_are_checkpoints(tmp_path):
    real = [publish(tmp_path, step) for step in (100, 20, 3)]
    for name in (
        "checkpoint-100-outputs",
        "checkpoint-tmp",
        "checkpoint-007",
        "checkpoint",
        "checkpoint-",
        "xcheckpoint-4",
    ):
        shutil.copytree(real[0], tmp_path / name)
    shutil.copytree(real[0], tmp_path / "checkpoint-٤")  # a digit of another script
    shutil.copytree(real[0], tmp_path / ".tmp-checkpoint-500-0123456789ab")
    (tmp_path / "checkpoint-600").mkdir()
    (tmp_path / "checkpoint-700").write_text("a file")
    (tmp_path / "checkpoint-800").symlink_to(tmp_path / "nowhere")
    assert find_checkpoints(tmp_path) == real[::-1]
    assert latest_checkpoint(tmp_path, partial(verify, hashes=True)) == (real[0], [])
    assert find_checkpoints(tmp_path / "absent") == [] and latest_checkpoint(tmp_path / "absent") == (None, [])


FILES = (
    "manifest.json",
    "optimizer.safetensors",
    "trainer_state.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
    "transformer/diffusion_pytorch_model.safetensors.index.json",
)


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory) -> Path:
    return publish_all(tmp_path_factory.mktemp("run"), 1, 2)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["head", "middle", "tail", "truncated", "empty", "missing", "swapped"])
def test_any_damage_to_any_file_is_reported_and_the_older_is_used(two_checkpoints, tmp_path, name, damage):
    run = shutil.copytree(two_checkpoints, tmp_path / "run")
    path = run / "checkpoint-2" / name
    content = bytearray(path.read_bytes())
    at = {"head": 1, "middle": len(content) // 2, "tail": len(content) - 2}.get(damage, 0)
    if damage == "missing":
        path.unlink()
    elif damage == "swapped":
        other = (run / "checkpoint-1" / name).read_bytes()
        if other == bytes(content):
            return  # config.json is the same in both
        path.write_bytes(other)
    else:
        content[at] ^= 1
        changed = {"truncated": content[:-3], "empty": b""}.get(damage, content)
        path.write_bytes(bytes(changed))
    chosen, warnings = latest_checkpoint(run, partial(verify, hashes=True))
    assert chosen == run / "checkpoint-1"
    if (name, damage) == (MANIFEST, "missing"):
        assert warnings == []  # without a manifest it is not a checkpoint
    else:
        assert len(warnings) == 1 and "checkpoint-2" in warnings[0]
        # The manifest of another step makes the hashes of all files differ.
        assert name in warnings[0] or (name, damage) == (MANIFEST, "swapped")


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_every_single_bit_is_verified(two_checkpoints, tmp_path_factory, data):
    """If any one bit of any file, the manifest included, is flipped, the checkpoint does not verify."""
    checkpoint = two_checkpoints / "checkpoint-1"
    path = checkpoint / data.draw(st.sampled_from(FILES))
    content = path.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    flipped = bytearray(content)
    flipped[bit // 8] ^= 1 << bit % 8
    try:
        path.write_bytes(bytes(flipped))
        assert verify(checkpoint, hashes=True) != []
    finally:
        path.write_bytes(content)
    assert verify(checkpoint, hashes=True) == []


def test_without_hashes_sizes_and_headers_are_still_checked(two_checkpoints, tmp_path):
    checkpoint = shutil.copytree(two_checkpoints / "checkpoint-2", tmp_path / "checkpoint-2")
    tensors = checkpoint / "optimizer.safetensors"
    content = tensors.read_bytes()
    tensors.write_bytes(content[:-1] + b"\x7f")
    assert verify(checkpoint) == [] and "sha256" in verify(checkpoint, hashes=True)[0]
    tensors.write_bytes(b"\xff" * len(content))
    assert "optimizer.safetensors cannot be read" in verify(checkpoint)[0]
    tensors.write_bytes(content[:-1])
    assert verify(checkpoint) == [
        f"optimizer.safetensors has {len(content) - 1} bytes, the manifest has {len(content)}"
    ]


def test_manifest_with_outside_paths_or_newer_format_is_refused(two_checkpoints, tmp_path):
    checkpoint = shutil.copytree(two_checkpoints / "checkpoint-2", tmp_path / "checkpoint-2")
    body = read_manifest(checkpoint)
    for change, problem in (
        ({"files": {"../x": {"size": 1, "sha256": ""}}}, "points outside"),
        ({"files": {"/etc/hostname": {"size": 1, "sha256": ""}}}, "points outside"),
        ({"format": 2}, "has format 2, this videox reads formats up to 1"),
    ):
        changed = {**body, **change}
        write_json_atomically(checkpoint / MANIFEST, {**changed, "seal": seal_of(changed)})
        assert problem in verify(checkpoint)[0]
