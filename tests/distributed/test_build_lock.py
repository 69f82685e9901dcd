"""Tests of videox.distributed.build_lock: a lock without an owner is refused before DeepSpeed waits for it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import forkserver
import pytest
import runs
import tiny
from launches import launcher_environment

from videox.distributed.build_lock import extensions_folder, refuse_stale_locks
from videox.errors import FLAGS, UserError


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    path = tmp_path / "with space" / "deepspeed_shm_comm" / "lock"
    path.parent.mkdir(parents=True)
    path.touch()
    return path


def environment(lock: Path, **more: str) -> dict[str, str]:
    return {"TORCH_EXTENSIONS_DIR": str(lock.parent.parent), **more}


def test_lock_without_owner_is_refused_with_the_command_that_removes_it(lock: Path) -> None:
    with pytest.raises(UserError, match="held by no process on this machine") as refused:
        refuse_stale_locks(environment(lock))
    assert refused.value.exit_code == FLAGS
    subprocess.run(["bash", "-c", refused.value.hint], check=True)
    refuse_stale_locks(environment(lock))
    assert not lock.exists()


def test_lock_with_living_owner_is_accepted(lock: Path) -> None:
    lock.unlink()
    owner_code = (
        "import os, sys, time; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); print('held', flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", owner_code, str(lock)], stdout=subprocess.PIPE)
    assert owner.stdout.readline() == b"held\n"
    refuse_stale_locks(environment(lock))
    owner.kill()
    owner.wait()
    with pytest.raises(UserError):
        refuse_stale_locks(environment(lock))


def test_young_lock_of_a_multi_machine_launch_is_accepted(lock: Path) -> None:
    several = environment(lock, WORLD_SIZE="16", LOCAL_WORLD_SIZE="8")
    refuse_stale_locks(several)
    os.utime(lock, (time.time() - 3600,) * 2)
    with pytest.raises(UserError):
        refuse_stale_locks(several)


def test_extensions_folder_is_the_one_that_torch_uses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch.utils.cpp_extension import _get_build_directory

    for name, value in (
        ("TORCH_EXTENSIONS_DIR", str(tmp_path / "given")),
        ("XDG_CACHE_HOME", str(tmp_path / "cache")),
    ):
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
        monkeypatch.setenv(name, value)
        built = Path(_get_build_directory("an_extension", verbose=False))
        (built / "lock").touch()
        assert built.is_relative_to(extensions_folder(os.environ))
        with pytest.raises(UserError, match="an_extension/lock"):
            refuse_stale_locks(os.environ)
        (built / "lock").unlink()


@pytest.mark.slow
def test_deepspeed_start_with_a_stale_lock_prints_one_line_and_ends(lock: Path, tmp_path: Path) -> None:
    model, metadata = tiny.build_wan_t2v(tmp_path / "model"), tiny.make_dataset(tmp_path / "data")
    ranks = forkserver.shared().start_ranks(
        2,
        runs.wan_flags(model, metadata, tmp_path / "run"),
        tmp_path / "log",
        environment={**launcher_environment("zero2", "wan2.1 normal", 2), **environment(lock)},
    )
    assert [rank.wait(60) for rank in ranks] == [FLAGS, FLAGS]
    assert f"the build lock {lock} is held by no process on this machine" in ranks[0].error_line()
    assert "error: " not in ranks[1].output()
