"""Replaces all processes of a launch by new ones that run another command: of the old ones nothing remains in memory.

Each process keeps its PID, so that the launcher goes on watching it, its standard streams and its parent; the kernel
frees everything else, memory of the GPU included.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import random
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from videox.distributed.environment import AGENT_STORE
from videox.distributed.signals import STOP_SIGNALS, StopOutsideSteps
from videox.errors import STOPPED

PORTS = (20_000, 32_768)  # below the ports that Linux gives to connections by itself
STANDARD_STREAMS = 2  # the largest of their descriptors


def restart(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Replace this process, and every other one of its launch, by one that runs a command; all of them call it.

    The new processes meet at a port of their own: the store of the old ones still has their addresses.

    Args:
        command: a program and its arguments.
        environment: variables as the launcher has set them.

    Returns:
        STOPPED, after a stop signal; otherwise it does not return.
    """
    with _Noted() as stop:
        meeting, stopped = _agree(stop)
        if stopped:
            return STOPPED
        if dist.is_initialized():
            dist.destroy_process_group()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    # The handlers are those of a program again: a signal that comes from here on ends it.
    if stop:
        os._exit(STOPPED)
    _close_on_exec()
    os.execve(command[0], list(command), {**environment, **meeting})


def _agree(stop: _Noted) -> tuple[dict[str, str], bool]:
    """Return the variables with which the new processes meet, and whether any process got a stop signal."""
    if not dist.is_initialized():
        return {}, bool(stop)
    port = free_port() if dist.get_rank() == 0 else 0
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, (port, bool(stop)))
    return {"MASTER_PORT": str(values[0][0]), AGENT_STORE: "False"}, any(stopped for _, stopped in values)


def free_port() -> int:
    """Return a port that no program uses, and that Linux does not give to a connection meanwhile."""
    while True:
        port = random.SystemRandom().randrange(*PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        return port


def _close_on_exec() -> None:
    """Let the kernel close all files but the standard streams, also those that libraries opened."""
    for path in Path("/proc/self/fd").iterdir():
        if (number := int(path.name)) > STANDARD_STREAMS:
            with contextlib.suppress(OSError):  # that of the listing itself
                os.set_inheritable(number, False)


class _Noted:
    """Notes stop signals in its block; true after one, also after one that came while the run before it ended."""

    def __init__(self) -> None:
        self._noted = StopOutsideSteps.unheeded
        self._previous_handlers: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self._noted

    def __enter__(self) -> _Noted:
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP, and the new process must, too
                self._previous_handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._noted = True
