"""System, memory, limits and disk of this machine."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from videox.distributed.accelerate_config import default_path
from videox.doctor.findings import BLOCKS, GIB, NOTE, Finding, gib

PYTHON = ((3, 11), (3, 14))  # from, below; as requires-python of pyproject.toml
SMALL_SHM, LEAST_SHM = 2 * GIB, 256 * 2**20
SMALL_DISK, LEAST_DISK = 50 * GIB, GIB
FEW_FILES, LEAST_FILES = 4096, 512
WINDOWS_FILE_SYSTEMS = ("9p", "drvfs", "v9fs")
WSL_LIMIT = "raise `memory` under [wsl2] in %UserProfile%\\.wslconfig, then `wsl --shutdown`"


@dataclass(frozen=True)
class Host:
    """What the checks of this module read, so that tests can describe another machine.

    Attributes:
        root: of the file system.
        platform: as sys.platform.
        shared_memory: bytes of /dev/shm, None if there is none.
        open_files: soft limit of open files.
        locked_memory: soft limit of locked memory in bytes, -1 = none.
    """

    root: Path
    platform: str
    shared_memory: int | None
    open_files: int
    locked_memory: int

    def read(self, path: str) -> str:
        """Return a file below the root, "" if it cannot be read."""
        try:
            return (self.root / path).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    @property
    def wsl(self) -> int:
        """1 or 2 in the Windows Subsystem for Linux, else 0. WSL1 has no Linux kernel of its own."""
        text = self.read("proc/version").lower()
        if "microsoft" not in text:
            return 0
        return 2 if "wsl2" in text or "microsoft-standard" in text else 1

    @property
    def memory(self) -> int:
        """Bytes of memory that this machine or container has."""
        total = next(
            (line.split()[1] for line in self.read("proc/meminfo").splitlines() if line[:9] == "MemTotal:"), "0"
        )
        limit = self.read("sys/fs/cgroup/memory.max").strip()
        return min(1024 * int(total), int(limit)) if limit.isdecimal() else 1024 * int(total)


def this_host() -> Host:
    """Return this machine."""
    shm = Path("/dev/shm")
    size = shutil.disk_usage(shm).total if shm.is_dir() else None
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return Host(Path("/"), sys.platform, size, files, locked)


def system(host: Host) -> list[Finding]:
    """Return operating system, Python, processors and memory."""
    release = dict(line.split("=", 1) for line in host.read("etc/os-release").splitlines() if "=" in line)
    parts = [
        f"{platform.system()} {platform.release()}",
        platform.machine(),
        release.get("PRETTY_NAME", "").strip('"'),
    ]
    if (host.root / ".dockerenv").exists() or "docker" in host.read("proc/1/cgroup"):
        parts.append("in a container")
    findings = [Finding("system", ", ".join(part for part in parts if part))]
    if host.platform == "darwin":
        text = "macOS: trains on the CPU only, and no test runs there"
        findings.append(Finding("macOS", text, NOTE, "use a Linux machine with an NVIDIA GPU"))
    version = sys.version_info[:2]
    supported = PYTHON[0] <= version < PYTHON[1]
    fix = "" if supported else "install Python 3.11, 3.12 or 3.13, then `make setup`"
    text = f"{platform.python_version()}, {sys.executable}"
    findings.append(
        Finding("python", text if supported else f"{text} is not supported", "ok" if supported else BLOCKS, fix)
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    findings.append(Finding("processors", f"{cores} of {os.cpu_count()}"))
    findings.append(Finding("memory", gib(host.memory)))
    return findings


def wsl(host: Host, folders: Mapping[str, Path]) -> list[Finding]:
    """Return what is different in the Windows Subsystem for Linux; nothing elsewhere.

    Args:
        host: this machine.
        folders: by name; those on a Windows drive are slow.
    """
    if host.wsl == 1:
        return [Finding("WSL", "WSL1 has no GPU support", BLOCKS, "in PowerShell: `wsl --set-version DISTRIBUTION 2`")]
    if host.wsl != 2:
        return []
    findings = [
        Finding(
            "WSL2 memory",
            f"WSL2 has {gib(host.memory)} of the memory of Windows, and page-locked (pinned) memory is limited further; "
            "--low_vram and the optimizers named _offload need it",
            NOTE,
            f"{WSL_LIMIT}; if a run ends in `CUDA error: out of memory` while it pins, leave out --low_vram",
        )
    ]
    if not (host.root / "dev/dxg").exists():
        text = "/dev/dxg is missing: Windows passes no GPU to WSL2"
        fix = (
            "install NVIDIA's driver in Windows (none in WSL2), then `wsl --update` and `wsl --shutdown` in PowerShell"
        )
        findings.append(Finding("WSL2 GPU", text, BLOCKS, fix))
    for name, path in folders.items():
        if file_system(host, path) in WINDOWS_FILE_SYSTEMS:
            text = f"{name} {path} is on a Windows drive, where small files are read many times slower"
            findings.append(Finding("WSL2 files", text, NOTE, "copy it into WSL2, e.g. to ~/videox and ~/clips"))
    return findings


def file_system(host: Host, path: Path) -> str:
    """Return the type of the file system that a path is on, from /proc/mounts; "" if it is not known."""
    best, kind = "", ""
    for fields in (line.split() for line in host.read("proc/mounts").splitlines()):
        point = fields[1].replace("\\040", " ") if len(fields) > 2 else ""
        inside = point and (path == Path(point) or Path(point) in path.parents)
        if inside and len(point) >= len(best):
            best, kind = point, fields[2]
    return kind


def limits(host: Host) -> list[Finding]:
    """Return shared memory and the limits of a process."""
    findings = []
    if host.shared_memory is not None:
        text, fix = f"{gib(host.shared_memory)} in /dev/shm", "start the container with --shm-size=16g or --ipc=host"
        if host.wsl:
            fix = f"{WSL_LIMIT}; /dev/shm is half of it"
        level = BLOCKS if host.shared_memory < LEAST_SHM else NOTE if host.shared_memory < SMALL_SHM else "ok"
        if level != "ok":
            text += ", little for the batches of data workers and for NCCL"
            fix += ", or train with --dataloader_num_workers=0 on one GPU"
        findings.append(Finding("shared memory", text, level, fix if level != "ok" else ""))
    level = BLOCKS if host.open_files < LEAST_FILES else NOTE if host.open_files < FEW_FILES else "ok"
    fix = "`ulimit -n 65536` before the start" if level != "ok" else ""
    findings.append(Finding("open files", f"at most {host.open_files} (ulimit -n)", level, fix))
    locked = "unlimited" if host.locked_memory < 0 else gib(host.locked_memory)
    infiniband = any((host.root / "sys/class/infiniband").glob("*"))
    level = NOTE if infiniband and host.locked_memory >= 0 else "ok"
    fix = "`ulimit -l unlimited` (in a container: --ulimit memlock=-1)" if level == NOTE else ""
    text = f"at most {locked} (ulimit -l){', and InfiniBand needs more' if fix else ''}"
    findings.append(Finding("locked memory", text, level, fix))
    return findings


def folders(environment: Mapping[str, str]) -> dict[str, Path]:
    """Return the folders that a run writes to or reads from, by name."""
    return {
        "here": Path.cwd(),
        "cache": default_path(environment).parent.parent,
        "temporary files": Path(tempfile.gettempdir()),
    }


def disk(places: Mapping[str, Path]) -> list[Finding]:
    """Return the free space of folders, those that do not exist yet by the nearest one that does."""
    findings = []
    for name, path in places.items():
        there = next(folder for folder in (path, *path.parents) if folder.is_dir())
        free = shutil.disk_usage(there).free
        writable = os.access(there, os.W_OK)
        text, level, fix = f"{gib(free)} free in {path}", "ok", ""
        if not writable:
            level, text = (BLOCKS if name != "cache" else NOTE), f"{text}, not writable"
            fix = {"cache": "`export HF_HOME=` a writable folder", "here": "pass a writable --output_dir"}.get(
                name, "`export TMPDIR=` a writable folder"
            )
        elif free < LEAST_DISK or (free < SMALL_DISK and name == "here"):
            level = BLOCKS if free < LEAST_DISK else NOTE
            fix = "free some space, or pass --output_dir on another disk; --dry_run says how much a run writes"
        findings.append(Finding(f"disk, {name}", text, level, fix))
    return findings
