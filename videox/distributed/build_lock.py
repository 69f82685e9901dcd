"""DeepSpeed build locks: a lock that no process holds is reported at startup instead of waited for.

torch compiles DeepSpeed's C++ extensions at their first use and keeps other processes out by a file `lock`, which its
owner has open. The lock of a killed owner stays, and every later start would wait for it forever without a message.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from torch._appdirs import user_cache_dir

from videox.errors import FLAGS, UserError

# Seconds: a younger lock may belong to another machine that shares the folder and is building now; the processes of
# another machine are not visible in /proc.
BUILD_SECONDS = 600.0


def extensions_folder(environment: Mapping[str, str]) -> Path:
    """Return the folder where torch builds extensions: TORCH_EXTENSIONS_DIR, or torch's default."""
    return Path(environment.get("TORCH_EXTENSIONS_DIR") or user_cache_dir(appname="torch_extensions"))


def is_open(lock: Path) -> bool:
    """Return whether a living process of this machine has a file open (Linux)."""
    wanted = os.path.realpath(lock)
    for opened in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # the process has ended, or belongs to another user
            if os.readlink(opened) == wanted:  # noqa: PTH115 - compared as strings
                return True
    return False


def refuse_stale_locks(environment: Mapping[str, str]) -> None:
    """Raise UserError if a build lock was left behind by a killed process.

    Args:
        environment: with TORCH_EXTENSIONS_DIR, and the launcher's WORLD_SIZE and LOCAL_WORLD_SIZE.

    Raises:
        UserError: with the command that removes it.
    """
    if sys.platform != "linux":
        return
    world = environment.get("WORLD_SIZE", "1")
    shared = environment.get("LOCAL_WORLD_SIZE", world) != world
    folder = extensions_folder(environment)
    for lock in sorted([*folder.glob("*/lock"), *folder.glob("*/*/lock")]):
        try:
            age = time.time() - lock.stat().st_mtime
        except FileNotFoundError:
            continue
        if is_open(lock) or not lock.exists() or (shared and age < BUILD_SECONDS):
            continue
        what = f"the build lock {lock} is held by no process on this machine: its owner was killed"
        raise UserError("DeepSpeed", what, f"rm {shlex.quote(str(lock))}", FLAGS)
