"""Tests of videox.files: a file is whole, old or new, whatever interrupts its writing; unused names are found."""

from __future__ import annotations

import json
import os
import resource
import signal
from pathlib import Path

import pytest
from crashes import file_names, fork, inject_fault, kill_self, wait_for
from hypothesis import given
from hypothesis import strategies as st

from videox import files
from videox.activity import ACTIVITY
from videox.files import atomic_write, flush, flush_tree, temp_path, unique_path, write_json_atomically


def test_json_is_replaced_atomically(tmp_path):
    path = tmp_path / "run_status.json"
    write_json_atomically(path, {"step": 1})
    with pytest.raises(TypeError):
        write_json_atomically(path, {"step": object()})

    def full_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
        with pytest.raises(OSError, match="File too large"):
            write_json_atomically(path, {"step": 2, "error": "long" * 10})

    assert wait_for(fork(full_disk)) == 0
    assert json.loads(path.read_text()) == {"step": 1} and file_names(tmp_path) == ["run_status.json"]


def test_an_exception_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")
    with pytest.raises(KeyError), atomic_write(path) as temporary:
        temporary.write_bytes(b"half")
        raise KeyError("x")
    assert path.read_bytes() == b"old" and file_names(tmp_path) == ["clip.mp4"]
    with pytest.raises(FileNotFoundError), atomic_write(path):
        pass  # nothing was written
    assert path.read_bytes() == b"old" and file_names(tmp_path) == ["clip.mp4"]


def test_a_kill_at_any_file_operation_leaves_the_old_or_the_new_file(tmp_path):
    points, found, status = 0, [], -signal.SIGKILL
    while status == -signal.SIGKILL:
        points += 1
        path = tmp_path / str(points) / "state.json"
        path.parent.mkdir()
        write_json_atomically(path, {"step": 1})

        def killed(at: int = points, path=path) -> None:
            inject_fault(path.parent, at, kill_self, reads=True)
            write_json_atomically(path, {"step": 2})

        status = wait_for(fork(killed))
        found.append(json.loads(path.read_text())["step"])
    assert status == 0 and found == sorted(found) and set(found) == {1, 2} and points > 3


@given(st.sets(st.integers(1, 9)))
def test_the_first_free_name_is_found(tmp_path_factory, taken):
    folder = tmp_path_factory.mktemp("names")
    for number in taken:
        (folder / ("run" if number == 1 else f"run-{number}")).symlink_to(folder / "nowhere")  # counts as taken
    free = min(set(range(1, 11)) - taken)
    assert unique_path(folder / "run").name == ("run" if free == 1 else f"run-{free}")


def test_a_file_keeps_its_suffix(tmp_path):
    path = tmp_path / "lora-superseded.safetensors"
    assert unique_path(path) == path
    path.write_text("")
    assert unique_path(path).name == "lora-superseded-2.safetensors"
    unique_path(path).write_text("")
    assert unique_path(path).name == "lora-superseded-3.safetensors"
    (tmp_path / "v1.5-superseded").mkdir()
    assert unique_path(tmp_path / "v1.5-superseded").name == "v1.5-superseded-2"


def test_temp_paths_are_hidden_and_unique(tmp_path):
    path = tmp_path / "state.json"
    found = {temp_path(path, kind) for kind in ("tmp", "trash") for _ in range(100)}
    assert len(found) == 200 and {p.parent for p in found} == {tmp_path}
    assert {p.name.split("state.json")[0] for p in found} == {".tmp-", ".trash-"}


def test_flush_tree_flushes_files_and_folders_and_refuses_missing_ones(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_text("x")
    flushed = []
    fsync = os.fsync

    def note(handle: int) -> None:
        flushed.append(str(Path(f"/proc/self/fd/{handle}").readlink()))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", note)
    flush_tree(tmp_path)
    assert sorted(flushed) == sorted(str(tmp_path / part) for part in ("", "a", "a/b", "a/b/file")) and flushed[
        -1
    ] == (str(tmp_path))
    with pytest.raises(FileNotFoundError):
        flush(tmp_path / "absent")


def test_flushing_a_large_file_makes_progress_part_by_part(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_PART", 1 << 20)
    calls = []
    monkeypatch.setattr(ACTIVITY, "progress", lambda: calls.append(1))
    for size, parts in ((2 << 20, 2), ((5 << 20) + 7, 6), ((2 << 20) - 1, 0)):
        path = tmp_path / str(size)
        path.write_bytes(bytes(size))
        flush(path)
        assert len(calls) == parts
        calls.clear()
    flush(tmp_path)
    assert not calls
