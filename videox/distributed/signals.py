"""Signals that stop a run: during a step they request a stop after it, before and after all steps they end the run at
once, and processes end with their parent."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any, ClassVar, NoReturn

from videox.errors import StopSignal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
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


class StopOutsideSteps:
    """Ends a run by StopSignal at the first SIGTERM, SIGINT, SIGUSR1 or SIGHUP that comes outside of the steps.

    These are start, index, encoding and compilation, and the export after the last step; `StopRequest` replaces the
    handlers during the steps. Further signals change nothing, except that a later SIGINT exits at once.

    Attributes:
        before_exit: called before the process exits at once, to write the status.
        unheeded: whether a signal came that did not end the run, because it was about to end anyway.
    """

    current: ClassVar[StopOutsideSteps | None] = None
    unheeded: ClassVar[bool] = False

    def __init__(self) -> None:
        self.before_exit: Callable[[], object] = lambda: None
        self.received_at: float | None = None
        self._name = ""  # of the signal whose StopSignal was raised
        self._over, self._owner = False, os.getpid()
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> StopOutsideSteps:
        StopOutsideSteps.current = self
        StopOutsideSteps.unheeded = False
        return self

    def __exit__(self, *raised: object) -> None:
        StopOutsideSteps.current = None
        if self.received_at is not None:  # the process ends: a second signal is ignored while its objects are deleted
            self._over = StopOutsideSteps.unheeded = True
            return
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def begin(self) -> None:
        """Handle the signals from now on; a second call does nothing. In a thread they are left as they are."""
        if self._previous_handlers or threading.current_thread() is not threading.main_thread():
            return
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                self._previous_handlers[number] = signal.signal(number, self._handle)

    def end(self) -> None:
        """Ignore the signals from now on: the status says how the run ended, and the process ends by itself."""
        self._over = True

    def raise_again(self, error: Exception | None = None) -> None:
        """Raise StopSignal if it was raised before and did not arrive.

        A library whose code the signal interrupted may have ignored it, or raised an error of its own instead: torch
        says that an object has no shape.

        Args:
            error: what arrived instead, if anything.

        Raises:
            StopSignal: with `error` as its cause.
        """
        if self._name:
            raise StopSignal(self._name) from error

    def raised(self) -> AbstractContextManager[None]:
        """Raise StopSignal at the end of the block if it was raised inside and another exception arrived."""
        return _Raised(self)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        # A data worker has this handler from its fork until it sets its own.
        if os.getpid() != self._owner:
            return
        if self._over:
            StopOutsideSteps.unheeded = True
            return
        if self.received_at is None:
            self.received_at, self._name = time.monotonic(), signal.Signals(number).name
            raise StopSignal(self._name)
        if number == signal.SIGINT and time.monotonic() - self.received_at > ECHO_SECONDS:
            exit_at_once(number)


class _Raised(AbstractContextManager[None]):
    """See StopOutsideSteps.raised."""

    def __init__(self, signals: StopOutsideSteps) -> None:
        self._signals = signals

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            self._signals.raise_again(error)


def exit_at_once(number: int) -> NoReturn:
    """End the process without any cleanup but its status; the exit code is that of a shell, 128 + number."""
    if StopOutsideSteps.current is not None:
        StopOutsideSteps.current.before_exit()
    os._exit(128 + number)


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
        if StopOutsideSteps.current is not None:
            StopOutsideSteps.current.raise_again()
        for number in STOP_SIGNALS:
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
                exit_at_once(number)
            # The launcher, or the kernel in its place (stop_with_launcher), sends a signal that was already received.
            return
        self.signal_name, self._received_at = signal.Signals(number).name, time.monotonic()
        if StopOutsideSteps.current is not None:
            StopOutsideSteps.current.received_at = self._received_at
        what = f"process {os.getpid()} saves after this step, then prints 'stopped', also if its launcher has ended"
        message = f"\n{self.signal_name}: {what} (Ctrl-C again: exit now, the last checkpoint is kept)\n"
        # os.write, because a signal handler may interrupt a write to a buffered stream, which must not be re-entered.
        # The terminal may be gone (OSError).
        with contextlib.suppress(OSError):
            os.write(2, message.encode())
