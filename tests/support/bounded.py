"""Commands with a time limit for the tests: a command that exceeds it is killed with all its descendants."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil


def process_tree(pid: int) -> list[int]:
    """Return the pid and those of all descendants."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    return [pid]


def kill_tree(pid: int) -> None:
    """Kill a process and all descendants, not only its session: a launcher starts each rank in a new one."""
    for member in process_tree(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)


def run_bounded(
    command: Sequence[str], limit: float, *, cwd: Path, env: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a command; after `limit` seconds it is killed with all processes that it started.

    subprocess.run would kill the command only and then wait without limit for children that keep its output open.
    """
    with subprocess.Popen(
        list(command), cwd=cwd, env=dict(env), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as started:
        try:
            out, err = started.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            kill_tree(started.pid)
            out, err = started.communicate()
            raise AssertionError(f"still running after {limit} s: {command}\n{out[-2000:]}\n{err[-4000:]}") from None
    return subprocess.CompletedProcess(command, started.returncode, out, err)
