"""Failure propagation: when one rank of a run fails, all others learn the cause at once and end with it.

A process that is blocked in a collective notices nothing: NCCL waits for its timeout, and gloo knows only that a
connection broke. So each rank has one more connection, to rank 0 (videox.run.failure_hub).
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

from videox.errors import PEER_LOST, PeerFailed, UserError, error_line, exit_code
from videox.run.failure_hub import (
    CONNECT_SECONDS,
    Connection,
    FailureServer,
    Report,
    accept_connections,
    is_lost_connection,
    lost_peer_line,
    open_listener,
)
from videox.run.status import RunStatus

BLOCKED_SECONDS = 5.0  # after the verdict; a process that raised no exception by then is blocked in a collective
EXIT_SECONDS = 15  # within which a process must end once it has failed


class FailureMonitor:
    """One rank's connection to the others; does nothing in a run of a single process.

    Attributes:
        status: writer of run_status.json, once it exists; used by the thread that ends a blocked process.
    """

    def __init__(self) -> None:
        self.status: RunStatus | None = None
        self.rank, self.machines = 0, [""]
        self._connection: Connection | None = None
        self._verdict: Report | None = None
        # _decided: the verdict has arrived. _failing: this process has raised an exception and ends by itself.
        self._decided, self._failing = threading.Event(), threading.Event()
        self._finished = False

    def join(self, rank: int, gather: Callable[[Any], list[Any]], environment: Mapping[str, str]) -> list[str]:
        """Connect the ranks; called on all of them. Returns notes about ranks that could not be connected.

        Args:
            rank: of this process.
            gather: collective that returns every rank's value.
            environment: the launcher's variables.
        """
        listener, token = (open_listener(environment), secrets.token_hex(16)) if rank == 0 else (None, "")
        machine = f"{socket.gethostname()} {environment.get('GROUP_RANK', '')}"
        server = (listener.getsockname()[1], token) if listener else None
        gathered = gather((machine, server))
        self.rank, self.machines = rank, [name for name, _ in gathered]
        port, token = gathered[0][1]
        if listener is not None:
            here, there = socket.socketpair()
            connections = {0: Connection(there), **accept_connections(listener, token, len(gathered) - 1)}
            self._connection = Connection(here)
            FailureServer(connections, [name.rpartition(" ")[0] for name in self.machines]).start()
            missing = sorted(set(range(len(gathered))) - set(connections))
        else:
            self._connection, missing = self._connect(environment, port, token), []
        if self._connection is not None:
            threading.Thread(target=self._listen, name="videox-peer", daemon=True).start()
        if not missing:
            return []
        return [
            f"processes {missing} could not connect to port {port} here: their failure is noticed only by a timeout"
        ]

    def _connect(self, environment: Mapping[str, str], port: int, token: str) -> Connection | None:
        here = self.machines[0] == self.machines[self.rank]
        address = "127.0.0.1" if here else environment["MASTER_ADDR"]
        try:
            connection = socket.create_connection((address, port), timeout=CONNECT_SECONDS)
        except OSError:
            return None  # rank 0 reports it, see join
        connection.sendall(json.dumps({"token": token, "rank": self.rank}).encode())
        return Connection(connection)

    def leave(self) -> None:
        """Report that this rank has finished: the end of its process is no failure."""
        self._finished = True
        if self._connection is not None:
            self._connection.send({"bye": True})

    def first_cause(self) -> AbstractContextManager[None]:
        """Return a context that replaces the exception that ends its block by the failure that ended the run.

        Raises:
            PeerFailed: with the line and exit code of the rank that failed first; on that rank its own exception is
                raised.
        """
        return _FirstCause(self)

    def report_failure(self, error: BaseException) -> PeerFailed | None:
        """Report to the others what ends this process; return what ended the run, None if this failure did."""
        if self._connection is None or self._failing.is_set():
            return None
        self._failing.set()
        # SIGALRM kills the process if it does not end in time: the interpreter's shutdown may wait forever for
        # connections whose other end is gone.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(EXIT_SECONDS)
        consequence = is_lost_connection(error)
        line, code = error_line(error), PEER_LOST if consequence else exit_code(error)
        if not isinstance(error, (UserError, KeyboardInterrupt)):  # a UserError names its flag, file or row
            line = line.replace("error: ", f"error: process {self.rank}: ", 1)
        self._connection.send({"report": Report(self.rank, line, code, consequence)._asdict()})
        self._decided.wait(EXIT_SECONDS / 2)
        if self._verdict is None or (self._verdict.rank == self.rank and not consequence):
            return None
        return self._failure(self._verdict)

    def _failure(self, verdict: Report) -> PeerFailed:
        if verdict.lost and verdict.rank == 0 and self.status is not None:
            # Rank 0, which writes the status otherwise, is gone; each rank writes the same content.
            self.status.enabled = True
        machine = self.machines[self.rank]
        # The failed rank prints the line itself, but only its own machine's log has it. On every other machine, and if
        # the failed rank was killed, the lowest remaining rank of the machine prints it.
        printed_here = machine == self.machines[verdict.rank] and not verdict.lost
        others = [rank for rank, name in enumerate(self.machines) if name == machine and rank != verdict.rank]
        return PeerFailed(verdict.line, verdict.exit_code, should_print=not printed_here and self.rank == others[0])

    def _listen(self) -> None:
        """Wait for the verdict; end the process if it does not end by itself."""
        connection = self._connection
        while connection is not None:
            for message in connection.receive():
                if self._finished or (message is not None and "verdict" not in message):
                    return
                # The stream ended without a verdict: rank 0 itself was killed.
                lost = Report(0, lost_peer_line(0, self.machines[0].rpartition(" ")[0]), PEER_LOST, lost=True)
                self._verdict = Report(**message["verdict"]) if message else lost
                self._decided.set()
                if not self._failing.wait(BLOCKED_SECONDS):
                    self._end_blocked(self._verdict)
                return

    def _end_blocked(self, verdict: Report) -> None:
        failure = self._failure(verdict)
        if self.status is not None:
            self.status.write("failed", exit_code=failure.exit_code, error=failure.line)
        if failure.should_print:
            sys.stderr.write(f"{failure.line}\n")
        sys.stdout.flush()
        sys.stderr.flush()
        # The main thread is blocked in a collective and cannot raise an exception, so sys.exit would not end it.
        os._exit(failure.exit_code)


class _FirstCause(AbstractContextManager[None]):
    """See FailureMonitor.first_cause."""

    def __init__(self, monitor: FailureMonitor) -> None:
        self.monitor = monitor

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and (failure := self.monitor.report_failure(error)) is not None:
            raise failure from error
