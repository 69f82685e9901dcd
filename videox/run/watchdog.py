"""Watchdog: a thread in each process that ends a run in which no process makes progress, and says which one hangs."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path

from videox.activity import ACTIVITY, Activity
from videox.run.failure import FailureMonitor
from videox.run.hangs import Beat, Clock, Hang

# The automatic limit of a section of a step: this many times the slowest step, and at least these seconds.
STEPS, LEAST_SECONDS = 10, 120.0
# By default waiting for data and a save may take longer: a file is read for up to 120 s, and disks may pause.
DATA, DISK_SECONDS = ("waiting for data",), 600.0
SAVES = ("a save",)
# The start, the first step, and what is not part of every step: least limit, also where the user sets a lower one.
LONG = (
    "loading the model", "placing weights and optimizer", "loading the checkpoint", "encoding the held-out rows",
    "compilation", "validation", "the export", "closing the records",
)  # fmt: skip
LONG_SECONDS = 1800.0
START = "the start"
MOVED_BYTES = 1 << 20  # read or written since the last progress, of a save that goes on
MOST_INTERVAL = 30.0  # seconds between two looks
# The innermost frame of a thread that waits for other processes is in one of these modules of torch and DeepSpeed.
_WAITING = ("torch/distributed/", "torch/autograd/graph.py", "deepspeed/comm/")
# Held while faulthandler's timer is set, and while the process forks: the timer's thread does not exist in the child,
# where faulthandler would wait for it forever.
_TIMER = threading.Lock()


def _before_fork() -> None:
    _TIMER.acquire()
    faulthandler.cancel_dump_traceback_later()


class Watchdog:
    """Watches the progress of this process (videox.activity), and reports it to the others.

    A section's limit is `seconds`; by default it follows from the slowest step, and is longer for data and saves. The
    start, the first step, compilation, validations, samples and exports may take LONG_SECONDS without progress. The
    run ends only when no process has made progress for its limit.

    Args:
        seconds: limit of a section of a step; None = STEPS times the slowest step; 0 = no watchdog.
        monitor: of this process: connects it to the others, and ends it.
        output_dir: the stacks are written to its folder stacks/.
        activity: of this process.
    """

    def __init__(
        self, seconds: float | None, monitor: FailureMonitor, output_dir: Path, activity: Activity = ACTIVITY
    ) -> None:
        self.seconds, self.monitor, self.activity = seconds, monitor, activity
        monitor.write_stacks_to(output_dir / "stacks")
        self._first: float | None = None  # seconds of the first step, which may have compiled kernels
        self._slowest: float | None = None  # of the later ones
        self._stopped = threading.Event()
        now = time.monotonic()
        self._clock, self._progressed, self._seen, self._moved = Clock(now), now, activity.progressed, 0
        self._interval = self._next_interval()

    @classmethod
    def off(cls) -> Watchdog:
        """Return one that does nothing."""
        return cls(0.0, FailureMonitor(), Path())

    def __enter__(self) -> Watchdog:
        if self.seconds != 0:
            threading.Thread(target=self._watch, name="videox-watchdog", daemon=True).start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stopped.set()
        with _TIMER:
            faulthandler.cancel_dump_traceback_later()

    def step_took(self, seconds: float) -> None:
        """Take note of the duration of a step."""
        if self._first is None:
            self._first = seconds
        else:
            self._slowest = max(self._slowest or 0.0, seconds)

    @property
    def step_limit(self) -> float:
        """Seconds without progress after which a section of a step counts as hanging."""
        if self.seconds:
            return self.seconds
        return max(LEAST_SECONDS, STEPS * (self._slowest or self._first or 0.0))

    def limit(self, sections: tuple[str, ...]) -> float:
        """Return the seconds without progress after which these open sections count as hanging.

        Args:
            sections: the outermost first.
        """
        if self._first is None or any(name in LONG for name in sections):
            return max(self.step_limit, LONG_SECONDS)
        if not self.seconds and any(name in DATA + SAVES for name in sections):
            return max(self.step_limit, DISK_SECONDS)
        return self.step_limit

    def look(self, now: float) -> Beat:
        """Return what this process does; to be called at the intervals of the result.

        Args:
            now: of time.monotonic.
        """
        sections, progressed = self.activity.sections, self.activity.progressed
        when = self._clock.at(progressed)  # before the tick, which leaves out a stop of this process after that
        here, limit = self._clock.tick(now, self._interval), self.limit(sections)
        if progressed != self._seen:
            self._seen, self._progressed = progressed, min(when, here)
        elif (self._first is None or any(name in LONG + SAVES for name in sections)) and self._has_moved_bytes():
            self._progressed = here
        self._interval = self._next_interval()
        age = here - self._progressed
        section = sections[-1] if sections else (START if self._first is None else "the step, between its parts")
        return Beat(age, limit, self._interval, section, age > limit / 4 and _main_thread_waits())

    def _has_moved_bytes(self) -> bool:
        """Return whether this process has read or written MOVED_BYTES since the last call that returned True."""
        moved = moved_bytes()
        if moved - self._moved < MOVED_BYTES:
            return False
        self._moved = moved
        return True

    def _next_interval(self) -> float:
        """Return the seconds until the next look: as a step needs it, also in a section with a longer limit.

        Otherwise the others would go by that limit if this process is stopped in the next step, before it reports.
        """
        return min(self.step_limit / 20, MOST_INTERVAL)

    def _watch(self) -> None:
        while not self._stopped.wait(self._interval):
            beat = self.look(time.monotonic())
            # If code that keeps Python's lock hangs, no thread of Python can run; this timer's thread still does.
            with _TIMER:
                if self._stopped.is_set():
                    return
                faulthandler.dump_traceback_later(max(beat.limit - beat.age, 0) + 3 * beat.interval + 1, file=2)
            if beat.age > beat.limit and self.monitor.is_alone:
                self.monitor.end_hanging(Hang(0, beat.age, beat.section, beat.limit))
            else:
                self.monitor.report_beat(beat)


def moved_bytes() -> int:
    """Return the bytes that this process has read and written so far; 0 if the system does not report them."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    counts = dict(line.split(": ") for line in lines)
    return sum(int(counts[name]) for name in ("rchar", "wchar", "read_bytes"))


def _main_thread_waits() -> bool:
    """Return whether the main thread waits for other processes in a collective."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return frame is not None and any(name in frame.f_code.co_filename for name in _WAITING)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_TIMER.release, after_in_child=_TIMER.release)
