"""Serves who starts under DeepSpeed after a crash: a build lock that nobody holds is named, not waited for.

torch builds DeepSpeed's C++ parts at their first use and keeps others away by a file `lock`, whose owner has it open.
One whose owner was killed stays, and every later start would wait at it for ever, in silence.
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

ELSEWHERE = 600.0  # seconds in which a lock may belong to a machine that shares the folder and builds at this moment


def extensions_folder(environment: Mapping[str, str]) -> Path:
    """Returns where torch builds: TORCH_EXTENSIONS_DIR, or its own default."""
    return Path(environment.get("TORCH_EXTENSIONS_DIR") or user_cache_dir(appname="torch_extensions"))


def held(lock: Path) -> bool:
    """Returns whether a living process of this machine has a file open (Linux)."""
    wanted = os.path.realpath(lock)
    for opened in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # gone by now, or another user's
            if os.readlink(opened) == wanted:  # noqa: PTH115 - a file that is deleted by now still has its old name
                return True
    return False


def refuse_dead_locks(environment: Mapping[str, str]) -> None:
    """Refuses to start where a build lock is left over.

    Args:
        environment: with TORCH_EXTENSIONS_DIR, and the launcher's WORLD_SIZE and LOCAL_WORLD_SIZE.

    Raises:
        UserError: with the line that removes it.
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
        if held(lock) or not lock.exists() or (shared and age < ELSEWHERE):
            continue
        what = f"the build lock {lock} is held by no process here: its owner was killed"
        raise UserError("DeepSpeed", what, f"rm {shlex.quote(str(lock))}", FLAGS)
