"""Serves the tests that start commands with children of their own: none outlives its limit."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil


def family_of(pid: int) -> list[int]:
    """Returns a process and all that descend from it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    return [pid]


def end_all(pid: int) -> None:
    """Kills a process and all that descend from it: a launcher starts each rank in a session of its own."""
    for found in family_of(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(found, signal.SIGKILL)


def run_bounded(
    command: Sequence[str], limit: float, *, cwd: Path, env: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Runs a command; what has not ended within `limit` seconds is killed with all that it started.

    subprocess.run would end the command alone and then wait, without a limit, for the children that hold its output.
    """
    with subprocess.Popen(
        list(command), cwd=cwd, env=dict(env), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as started:
        try:
            out, err = started.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            end_all(started.pid)
            out, err = started.communicate()
            raise AssertionError(f"still running after {limit} s: {command}\n{out[-2000:]}\n{err[-4000:]}") from None
    return subprocess.CompletedProcess(command, started.returncode, out, err)
