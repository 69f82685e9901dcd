"""Serves the processes of one run that must end together: each learns in an instant that another failed, and why.

A process that is blocked in a collective notices nothing: NCCL waits for its timeout, and gloo knows only that a
connection broke. So each process keeps one more connection to the first one (videox.run.failure_hub).
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from videox.errors import PEER_LOST, PeerFailed, UserError
from videox.run.failure_hub import (
    CONNECTING,
    Connection,
    FailureServer,
    Report,
    accept,
    lost_connection,
    lost_line,
    open_listener,
)
from videox.run.lifecycle import exit_code, one_line
from videox.run.status import RunStatus

BLOCKED = 5.0  # seconds after which a process that has not noticed by itself counts as blocked in a collective
LEAVING = 15  # seconds that a process may take to end once the cause is known


class FailureMonitor:
    """A process's view of the others; without others it does nothing.

    Attributes:
        status: of the run, once there is one; written by whoever ends a blocked process.
    """

    def __init__(self) -> None:
        self.status: RunStatus | None = None
        self.rank, self.machines = 0, [""]
        self._line: Connection | None = None
        self._verdict: Report | None = None
        self._known, self._noticed = threading.Event(), threading.Event()
        self._left = False

    def join(self, rank: int, gather: Callable[[Any], list[Any]], environment: Mapping[str, str]) -> list[str]:
        """Connects the processes; all call it. Returns notes on those that could not be connected.

        Args:
            rank: of this process.
            gather: collective that returns every process's value.
            environment: the launcher's variables.
        """
        listener, token = (open_listener(environment), secrets.token_hex(16)) if rank == 0 else (None, "")
        machine = f"{socket.gethostname()} {environment.get('GROUP_RANK', '')}"
        meeting = (listener.getsockname()[1], token) if listener else None
        said = gather((machine, meeting))
        self.rank, self.machines = rank, [name for name, _ in said]
        port, token = said[0][1]
        if listener is not None:
            here, there = socket.socketpair()
            lines = {0: Connection(there), **accept(listener, token, len(said) - 1)}
            self._line = Connection(here)
            FailureServer(lines, [name.rpartition(" ")[0] for name in self.machines]).start()
            missing = sorted(set(range(len(said))) - set(lines))
        else:
            self._line, missing = self._connect(environment, port, token), []
        if self._line is not None:
            threading.Thread(target=self._listen, name="videox-peer", daemon=True).start()
        if not missing:
            return []
        return [f"processes {missing} could not connect to port {port} here: their failure shows by a timeout only"]

    def _connect(self, environment: Mapping[str, str], port: int, token: str) -> Connection | None:
        here = self.machines[0] == self.machines[self.rank]
        address = "127.0.0.1" if here else environment["MASTER_ADDR"]
        try:
            connection = socket.create_connection((address, port), timeout=CONNECTING)
        except OSError:
            return None  # the first process says so
        connection.sendall(json.dumps({"token": token, "rank": self.rank}).encode())
        return Connection(connection)

    def leave(self) -> None:
        """Says that this process has done its part: its end is no failure."""
        self._left = True
        if self._line is not None:
            self._line.send({"bye": True})

    def first_cause(self) -> AbstractContextManager[None]:
        """Returns a context that turns what ends its block into what ended the run.

        Raises:
            PeerFailed: with the line and exit code of the process that failed first; there, its own exception goes on.
        """
        return _FirstCause(self)

    def found(self, error: BaseException) -> PeerFailed | None:
        """Tells the others what ends this process; returns what ended the run, None if this did."""
        if self._line is None or self._noticed.is_set():
            return None
        self._noticed.set()
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(LEAVING)  # the end of an interpreter may wait for connections that nobody serves any more
        consequence = lost_connection(error)
        line, code = one_line(error), PEER_LOST if consequence else exit_code(error)
        if not isinstance(error, (UserError, KeyboardInterrupt)):  # a refusal names its place
            line = line.replace("error: ", f"error: process {self.rank}: ", 1)
        self._line.send({"report": Report(self.rank, line, code, consequence)._asdict()})
        self._known.wait(LEAVING / 2)
        if self._verdict is None or (self._verdict.rank == self.rank and not consequence):
            return None
        return self._failure(self._verdict)

    def _failure(self, verdict: Report) -> PeerFailed:
        if verdict.lost and verdict.rank == 0 and self.status is not None:
            self.status.enabled = True  # who else should write it
        machine = self.machines[self.rank]
        told_here = machine == self.machines[verdict.rank] and not verdict.lost
        others = [rank for rank, name in enumerate(self.machines) if name == machine and rank != verdict.rank]
        return PeerFailed(verdict.line, verdict.exit_code, say=not told_here and self.rank == others[0])

    def _listen(self) -> None:
        """Waits for the verdict; ends the process if it does not do so by itself."""
        line = self._line
        while line is not None:
            for message in line.receive():
                if self._left or (message is not None and "verdict" not in message):
                    return
                lost = Report(0, lost_line(0, self.machines[0].rpartition(" ")[0]), PEER_LOST, lost=True)
                self._verdict = Report(**message["verdict"]) if message else lost
                self._known.set()
                if not self._noticed.wait(BLOCKED):
                    self._end_blocked(self._verdict)
                return

    def _end_blocked(self, verdict: Report) -> None:
        failure = self._failure(verdict)
        if self.status is not None:
            self.status.write("failed", exit_code=failure.exit_code, error=failure.line)
        if failure.say:
            sys.stderr.write(f"{failure.line}\n")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(failure.exit_code)


class _FirstCause(AbstractContextManager[None]):
    """See FailureMonitor.first_cause."""

    def __init__(self, peers: FailureMonitor) -> None:
        self.peers = peers

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and (failure := self.peers.found(error)) is not None:
            raise failure from error
