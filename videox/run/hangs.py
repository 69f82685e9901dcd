"""Whether a run hangs, and which process is the cause, from what its processes report of their progress."""

from __future__ import annotations

from typing import NamedTuple

from videox.errors import PEER_LOST, UserError


class Beat(NamedTuple):
    """What a process reports of itself, at regular intervals.

    Attributes:
        age: seconds since its last progress.
        limit: seconds without progress after which its section counts as hanging.
        interval: seconds until its next report.
        section: what it does, in words.
        waits: it waits for other processes in a collective.
    """

    age: float
    limit: float
    interval: float
    section: str
    waits: bool = False


class Hang(NamedTuple):
    """Which process a run hangs in.

    Attributes:
        rank: of the process.
        age: seconds since its last progress.
        section: what it does, as it last reported.
        limit: seconds without progress after which that counts as hanging.
        silent: it reports nothing any more: stopped, or in code that keeps Python's lock.
    """

    rank: int
    age: float
    section: str
    limit: float
    silent: bool = False

    def line(self, host: str, stacks: str) -> str:
        """Return the error line for the user.

        Args:
            host: machine of the process.
            stacks: folder with the stacks of the processes.
        """
        what = f"process {self.rank} on {host} has made no progress for {self.age:.0f} s in {self.section}"
        if self.silent:
            what = (
                f"process {self.rank} on {host} has not responded for {self.age:.0f} s (it is stopped, or hangs in "
                f"native code that holds Python's lock), last in {self.section}"
            )
        hint = f"read the stacks in {stacks}, then start again with --resume_from_checkpoint latest"
        return UserError("watchdog", f"{what}; the limit is {self.limit:.0f} s", hint, PEER_LOST).line()


class Clock:
    """Seconds in which this process could run: a stop of the process or of its machine counts as one interval.

    So that a run goes on after it was stopped and continued (SIGSTOP, Ctrl-Z, a suspended machine).
    """

    def __init__(self, start: float) -> None:
        self._seen, self._left_out = start, 0.0

    def tick(self, now: float, interval: float) -> float:
        """Return the time; to be called every `interval` seconds with the monotonic clock's time."""
        passed = now - self._seen
        if passed > 3 * interval + 1:
            self._left_out += passed - interval
        self._seen = now
        return now - self._left_out

    def at(self, time: float) -> float:
        """Return the time of this clock at a time of the monotonic clock, before a stop that no tick has seen yet."""
        return time - self._left_out


class HangWatch:
    """Finds out whether the processes of a run hang.

    As long as one process makes progress the run does not hang: the others wait for it. If none does, the cause is a
    process that does not respond; else the one that has made no progress for the longest time, among those that do not
    wait in a collective if there are any.

    A process that does not respond may have entered another section since its last report: the limit of the others
    holds for it too, if that is lower than its own.

    Args:
        ranks: of the processes.
        now: time in seconds.
        first: assumed of each process until its first report.
    """

    def __init__(self, ranks: list[int], now: float, first: Beat) -> None:
        self._beats = {rank: (now, first) for rank in ranks}

    @property
    def interval(self) -> float:
        """Seconds until the next report of any process."""
        return min((beat.interval for _, beat in self._beats.values()), default=30.0)

    def hear(self, rank: int, beat: Beat, now: float) -> None:
        """Take note of a report."""
        if rank in self._beats:
            self._beats[rank] = (now, beat)

    def forget(self, rank: int) -> None:
        """Take note that a process has ended."""
        self._beats.pop(rank, None)

    def find(self, now: float) -> Hang | None:
        """Return the process in which the run hangs; None if a process makes progress."""
        ages = {rank: beat.age + now - heard for rank, (heard, beat) in self._beats.items()}
        silent = [rank for rank, (heard, beat) in self._beats.items() if now - heard > 3 * beat.interval + 2]
        limits = {rank: beat.limit for rank, (_, beat) in self._beats.items()}
        highest = max(
            (limits[rank] for rank in limits if rank not in silent), default=max(limits.values(), default=0.0)
        )
        limits |= {rank: min(limits[rank], highest) for rank in silent}
        if not ages or any(ages[rank] <= limits[rank] for rank in ages):
            return None
        if silent:
            rank = min(silent)
            heard, beat = self._beats[rank]
            return Hang(rank, now - heard, beat.section, limits[rank], silent=True)
        at_work = [rank for rank, (_, beat) in self._beats.items() if not beat.waits]
        rank = max(at_work or ages, key=lambda rank: ages[rank])
        beat = self._beats[rank][1]
        return Hang(rank, ages[rank], beat.section, beat.limit)
