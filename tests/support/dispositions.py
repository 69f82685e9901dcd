"""Signals with their default effect, also where the parent of the tests ignores them: nohup, a script's `&`, CI.

An ignored signal stays ignored in child processes, and Python then installs no handler of Ctrl-C.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def set_defaults() -> None:
    """Give the signals that stop a run the effect that they have in a process started from a terminal."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@contextmanager
def default_signals() -> Iterator[None]:
    """Set the defaults inside the context, for this process and the children that it starts there."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    set_defaults()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
