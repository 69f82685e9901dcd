"""What the main thread of this process does, and when it last made progress; the watchdog reads both."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Activity:
    """The open sections of the main thread, and the time of its last progress.

    Entering and leaving a section is progress, and so is each call of `progress`. Sections of other threads are
    ignored. Reading needs no lock: both attributes are replaced as a whole.

    Attributes:
        sections: names of the open sections, the outermost first.
        progressed: time of the last progress, in seconds of time.monotonic.
    """

    def __init__(self) -> None:
        self.sections: tuple[str, ...] = ()
        self.progressed = time.monotonic()

    def progress(self) -> None:
        """Note that the work goes on; may be called by any thread."""
        self.progressed = time.monotonic()

    def enter(self, name: str) -> None:
        """Open a section."""
        if threading.current_thread() is threading.main_thread():
            self.sections = (*self.sections, name)
        self.progress()

    def leave(self, name: str) -> None:
        """Close the innermost section of this name."""
        if threading.current_thread() is threading.main_thread() and name in self.sections:
            at = len(self.sections) - 1 - self.sections[::-1].index(name)
            self.sections = self.sections[:at] + self.sections[at + 1 :]
        self.progress()

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Name what runs inside, such as "the backward pass"."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave(name)


ACTIVITY = Activity()  # of this process
