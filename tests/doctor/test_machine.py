"""Tests of videox.doctor.machine: WSL, limits and disk of described machines, and of this one."""

from __future__ import annotations

from pathlib import Path

import pytest

from videox.doctor.findings import BLOCKS, GIB, NOTE, Finding
from videox.doctor.machine import Host, disk, file_system, folders, limits, system, this_host, wsl

WSL2 = "Linux version 5.15.167.4-microsoft-standard-WSL2 (root@build) #1 SMP"
WSL1 = "Linux version 4.4.0-22621-Microsoft (Microsoft@Microsoft.com)"
DRIVE = "/mnt" + "/c"
MOUNTS = f"/dev/sdc / ext4 rw 0 0\nC:\\134 {DRIVE} 9p rw,dirsync 0 0\nnone {DRIVE}/data\\040set ext4 rw 0 0\n"


def host(root: Path, **changes: object) -> Host:
    described = {"shared_memory": 16 * GIB, "open_files": 65536, "locked_memory": -1, "platform": "linux", **changes}
    return Host(root, **described)


def write(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def levels(findings: list[Finding]) -> dict[str, str]:
    return {finding.name: finding.level for finding in findings}


def test_this_machine_is_described() -> None:
    here = this_host()
    assert here.wsl == 0 and here.memory > GIB / 2 and file_system(here, Path("/proc")) == "proc"
    assert levels(system(here))["python"] == "ok"
    assert BLOCKS not in levels(disk(folders({}))).values()


def test_wsl2_has_its_own_limits(tmp_path: Path) -> None:
    root = write(tmp_path, proc__version=WSL2, proc__mounts=MOUNTS, proc__meminfo="MemTotal: 16777216 kB\n")
    assert host(root).wsl == 2
    cache, clips = Path("/home/me/.cache"), Path(DRIVE) / "data set/x"  # mounted from Linux
    places = {"here": Path(DRIVE) / "Users/me/videox", "cache": cache, "clips": clips}
    findings = wsl(host(root), places)
    assert [(finding.name, finding.level) for finding in findings] == [
        ("WSL2 memory", NOTE), ("WSL2 GPU", BLOCKS), ("WSL2 files", NOTE),
    ]  # fmt: skip
    assert "16.0 GiB" in findings[0].text and "pinned" in findings[0].text and ".wslconfig" in findings[0].fix
    assert f"here {DRIVE}/Users/me/videox" in findings[2].text
    write(root, dev__dxg="")
    assert "WSL2 GPU" not in levels(wsl(host(root), {}))
    small = limits(host(root, shared_memory=GIB))
    assert ".wslconfig" in next(finding for finding in small if finding.name == "shared memory").fix


def test_wsl1_blocks_and_linux_says_nothing(tmp_path: Path) -> None:
    assert levels(wsl(host(write(tmp_path, proc__version=WSL1)), {})) == {"WSL": BLOCKS}
    assert wsl(host(write(tmp_path, proc__version="Linux version 6.8.0-48-generic (buildd@lcy02)")), {}) == []


@pytest.mark.parametrize(
    ("changes", "name", "level", "fix"),
    [
        ({"shared_memory": 64 * 2**20}, "shared memory", BLOCKS, "--shm-size"),  # what docker gives a container
        ({"shared_memory": GIB}, "shared memory", NOTE, "--dataloader_num_workers=0"),
        ({"open_files": 256}, "open files", BLOCKS, "ulimit -n"),
        ({"open_files": 1024}, "open files", NOTE, "ulimit -n"),
    ],
)
def test_a_small_limit_is_named(tmp_path: Path, changes: dict[str, object], name: str, level: str, fix: str) -> None:
    finding = next(finding for finding in limits(host(tmp_path, **changes)) if finding.name == name)
    assert finding.level == level and fix in finding.fix
    assert set(levels(limits(host(tmp_path))).values()) == {"ok"}


def test_locked_memory_matters_with_infiniband(tmp_path: Path) -> None:
    limited = host(tmp_path, locked_memory=8 * 2**20)
    assert levels(limits(limited))["locked memory"] == "ok"
    (tmp_path / "sys/class/infiniband/mlx5_0").mkdir(parents=True)
    assert levels(limits(limited))["locked memory"] == NOTE


def test_the_memory_of_a_container_is_its_limit(tmp_path: Path) -> None:
    write(tmp_path, proc__meminfo="MemTotal: 1048576 kB\n")
    assert host(tmp_path).memory == GIB
    write(tmp_path, sys__fs__cgroup__memory_max="")  # not the file's name
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n", encoding="ascii")
    assert host(tmp_path).memory == GIB
    (tmp_path / "sys/fs/cgroup/memory.max").write_text(f"{GIB // 2}\n", encoding="ascii")
    assert host(tmp_path).memory == GIB // 2


def test_a_folder_that_does_not_exist_yet_is_on_the_disk_of_its_parent(tmp_path: Path) -> None:
    (finding,) = disk({"cache": tmp_path / "a/b/c"})
    assert finding.level == "ok" and "GiB free" in finding.text


def test_macos_is_named(tmp_path: Path) -> None:
    assert levels(system(host(tmp_path, platform="darwin")))["macOS"] == NOTE
