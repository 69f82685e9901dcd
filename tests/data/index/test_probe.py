"""Tests of videox.data.index.probe: the child processes that probe media files."""

from __future__ import annotations

import signal
from pathlib import Path

from videox.data.index import probe


def test_ctrl_c_does_not_reach_a_child_that_starts() -> None:
    """A terminal sends SIGINT to all its processes; Python would print a traceback while it starts."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    child = probe._start(10.0)
    lines = Path(f"/proc/{child.pid}/status").read_text(encoding="ascii").splitlines()
    child.kill()
    child.wait()
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigBlk:", "SigIgn:"))]
    assert len(masks) == 2 and all(mask & (1 << signal.SIGINT - 1) for mask in masks)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
