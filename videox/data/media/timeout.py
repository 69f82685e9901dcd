"""Serves the dataset: a file that takes too long to read becomes a bad sample, not the end of everybody's patience."""

from __future__ import annotations

import faulthandler
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from videox.data.media.container import BadMedia

READ_SECONDS = 120.0  # a clip is read in one second; a network disk may have its minute


@contextmanager
def deadline(seconds: float, *, own_process: bool) -> Iterator[None]:
    """Ends what is inside after `seconds`, as far as a process can end what it does itself.

    A decoder that comes back to the interpreter now and then is ended by an exception. One that hangs in native code
    ends its process after twice the time, with the stack on stderr, where that process only reads; elsewhere it hangs.

    Args:
        seconds: above 0.
        own_process: this process does nothing but read, and may be ended.

    Raises:
        BadMedia: ("unreadable") it took too long.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread alone
        return

    def too_late(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise BadMedia("unreadable", f"it was not read within {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, too_late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    if own_process:
        faulthandler.dump_traceback_later(2 * seconds, exit=True, file=2)
    try:
        yield
    finally:
        if own_process:
            faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
