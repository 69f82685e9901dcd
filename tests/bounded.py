"""Serves the tests that start commands with children of their own: none outlives its limit."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path


def run_bounded(
    command: Sequence[str], limit: float, *, cwd: Path, env: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Runs a command in a session of its own; what has not ended within `limit` seconds is killed with its children.

    subprocess.run would end the command alone and then wait, without a limit, for the children that hold its output.
    """
    with subprocess.Popen(
        list(command),
        cwd=cwd,
        env=dict(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as started:
        try:
            out, err = started.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)
            out, err = started.communicate()
            raise AssertionError(f"still running after {limit} s: {command}\n{out[-2000:]}\n{err[-4000:]}") from None
    return subprocess.CompletedProcess(command, started.returncode, out, err)
