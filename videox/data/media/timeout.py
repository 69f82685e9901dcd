"""Time limit for reading a media file: a file that takes too long becomes a bad sample."""

from __future__ import annotations

import faulthandler
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from videox.data.media.container import BadMedia

READ_SECONDS = 120.0  # reading a clip takes about 1 s; a slow network disk may take a minute


@contextmanager
def time_limit(seconds: float, *, own_process: bool) -> Iterator[None]:
    """Abort the block after `seconds`, where that is possible.

    A decoder that returns to the interpreter regularly is aborted by an exception. If it hangs in native code, no
    exception reaches it: a process that only reads is then killed after twice the time, with the stack on stderr;
    any other process hangs.

    Args:
        seconds: time limit, above 0.
        own_process: this process only reads media and may be killed.

    Raises:
        BadMedia: "unreadable", if it took too long.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are delivered to the main thread only
        return

    def raise_timeout(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise BadMedia("unreadable", f"it was not read within {seconds:g} seconds")

    previous_handler = signal.signal(signal.SIGALRM, raise_timeout)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    if own_process:
        faulthandler.dump_traceback_later(2 * seconds, exit=True, file=2)
    try:
        yield
    finally:
        if own_process:
            faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous_handler)
