"""Signals that stop a run: SIGTERM and Ctrl-C request a stop after the step, and processes end with their parent."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Mapping
from types import FrameType
from typing import Any

ECHO_SECONDS = 0.3  # a second SIGINT within this time is the first one, passed on by the launcher


def stop_with_launcher(environment: Mapping[str, str]) -> None:
    """Have the kernel send SIGTERM to this process when the launcher that started it dies (Linux).

    `accelerate launch` does not pass a SIGTERM on to a single process; without this the run would go on unnoticed.
    """
    if "ACCELERATE_MIXED_PRECISION" in environment:
        stop_with_parent()


def stop_with_parent() -> None:
    """Have the kernel send SIGTERM to this process when its parent process dies (Linux)."""
    if sys.platform == "linux":
        parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
        ctypes.CDLL(None, use_errno=True).prctl(parent_death_signal, signal.SIGTERM)


class StopRequest:
    """Turns SIGTERM, SIGINT, SIGUSR1 or SIGHUP into a request to stop after the step; a second SIGINT exits at once.

    A SIGINT within ECHO_SECONDS of the first signal is ignored: a launcher or a shell passed the same one on.
    """

    def __init__(self) -> None:
        self.signal_name = ""
        self._received_at = 0.0
        self._previous_handlers: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return bool(self.signal_name)

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            # nohup ignores SIGHUP, and the run must go on ignoring it
            if signal.getsignal(number) != signal.SIG_IGN:
                self._previous_handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.signal_name:
            if number == signal.SIGINT and time.monotonic() - self._received_at > ECHO_SECONDS:
                os._exit(128 + number)
            # The launcher, or the kernel in its place (stop_with_launcher), sends a signal that was already received.
            return
        self.signal_name, self._received_at = signal.Signals(number).name, time.monotonic()
        what = f"process {os.getpid()} saves after this step, then prints 'stopped', also if its launcher has ended"
        message = f"\n{self.signal_name}: {what} (Ctrl-C again: exit now, the last checkpoint is kept)\n"
        # os.write, because a signal handler may interrupt a write to a buffered stream, which must not be re-entered.
        # The terminal may be gone (OSError).
        with contextlib.suppress(OSError):
            os.write(2, message.encode())
