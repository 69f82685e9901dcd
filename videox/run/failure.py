"""Failure propagation: when one rank of a run fails, all others learn the cause at once and end with it.

A process that is blocked in a collective notices nothing: NCCL waits for its timeout, and gloo knows only that a
connection broke. So each rank has one more connection, to rank 0 (videox.run.failure_hub).
"""

from __future__ import annotations

import faulthandler
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from videox.errors import (
    INTERRUPTED,
    PEER_LOST,
    STOPPED,
    PeerFailed,
    error_line,
    exit_code,
    is_lost_connection,
    name_process,
)
from videox.run.failure_hub import (
    CONNECT_SECONDS,
    Connection,
    FailureServer,
    Report,
    accept_connections,
    lost_peer_line,
    open_listener,
)
from videox.run.hangs import Beat, Clock, Hang
from videox.run.status import RunStatus

BLOCKED_SECONDS = 5.0  # after the verdict; a process that raised no exception by then is blocked in a collective
EXIT_SECONDS = 15  # within which a process must end once it has failed
PRINT_SECONDS = 2.0  # for the line of a run that hangs: the reader of stderr may hang, too


class FailureMonitor:
    """One rank's connection to the others; does nothing in a run of a single process.

    Attributes:
        status: writer of run_status.json, once it exists; used by the thread that ends a blocked process.
        stacks: folder that the stacks of a run that hangs are written to.
    """

    def __init__(self) -> None:
        self.status: RunStatus | None = None
        self.stacks = Path("stacks")
        self.rank, self.machines = 0, [""]
        self._connection: Connection | None = None
        self._verdict: Report | None = None
        # _decided: the verdict has arrived. _failing: this process has raised an exception and ends by itself.
        self._decided, self._failing = threading.Event(), threading.Event()
        self._finished = False
        self._server: FailureServer | None = None
        self._heard, self._clock = 0.0, Clock(time.monotonic())  # when rank 0 last sent a message, and its clock

    @property
    def is_alone(self) -> bool:
        """Whether there is no connection to other ranks."""
        return self._connection is None

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
            self._server = FailureServer(connections, [name.rpartition(" ")[0] for name in self.machines])
            self._server.start()
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

    def write_stacks_to(self, folder: Path) -> None:
        """Set the folder that the stacks of a run that hangs are written to."""
        self.stacks = folder
        if self._server is not None:
            self._server.stacks = str(folder)

    def report_beat(self, beat: Beat) -> None:
        """Report the progress of this process to rank 0; end the process if neither it nor rank 0 responds.

        To be called at the intervals of the reports.
        """
        if self._connection is None or self._finished or self._decided.is_set() or self._failing.is_set():
            return
        self._connection.send({"beat": list(beat)})
        now = self._clock.tick(time.monotonic(), beat.interval)
        self._heard = min(self._heard or now, now)  # a stop of this process is no silence of rank 0
        silence = now - self._heard
        if self.rank != 0 and beat.age > beat.limit and silence > max(beat.limit, 3 * beat.interval + 2):
            self.end_hanging(Hang(0, silence, "an unknown section", beat.limit, silent=True))

    def end_hanging(self, hang: Hang) -> None:
        """End this process because the run hangs in one of its processes; the others decide the same by themselves.

        Does nothing if the run has ended already, or this process is about to end.
        """
        if self._finished or self._decided.is_set() or self._failing.is_set():
            return
        host = self.machines[hang.rank].rpartition(" ")[0] or socket.gethostname()
        line = hang.line(host, str(self.stacks))
        self._verdict = Report(hang.rank, line, PEER_LOST, lost=hang.silent, hangs=True)
        self._decided.set()
        self._end_blocked(self._verdict)

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
        name_process(error, self.rank)  # also where this process prints it, and in the status
        line, code = error_line(error), PEER_LOST if consequence else exit_code(error)
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
        # the failed rank was killed or hangs, the lowest remaining rank of the machine prints it.
        printed_here = machine == self.machines[verdict.rank] and not (verdict.lost or verdict.hangs)
        others = [rank for rank, name in enumerate(self.machines) if name == machine and rank != verdict.rank]
        printer = others[0] if others else verdict.rank
        return PeerFailed(verdict.line, verdict.exit_code, should_print=not printed_here and self.rank == printer)

    def _listen(self) -> None:
        """Wait for the verdict; end the process if it does not end by itself."""
        connection = self._connection
        while connection is not None:
            for message in connection.receive():
                if message is not None and "beat" in message:
                    self._heard = self._clock.at(time.monotonic())
                    continue
                if self._finished or self._decided.is_set() or (message is not None and "verdict" not in message):
                    return
                # The stream ended without a verdict: rank 0 itself was killed.
                lost = Report(0, lost_peer_line(0, self.machines[0].rpartition(" ")[0]), PEER_LOST, lost=True)
                self._verdict = Report(**message["verdict"]) if message else lost
                self._decided.set()
                if not self._failing.wait(0 if self._verdict.hangs else BLOCKED_SECONDS):
                    self._end_blocked(self._verdict)
                return

    def _end_blocked(self, verdict: Report) -> None:
        if verdict.hangs:
            self._write_stacks()
        failure = self._failure(verdict)
        if self.status is not None:
            state = "stopped" if failure.exit_code in (STOPPED, INTERRUPTED) else "failed"
            self.status.write(state, exit_code=failure.exit_code, error=failure.line)
        if verdict.hangs:  # the main thread may hang in a write to a stream, whose lock it then has
            line = f"{failure.line}\n".encode() if failure.should_print else b""
            printer = threading.Thread(target=os.write, args=(2, line), daemon=True)
            printer.start()
            printer.join(PRINT_SECONDS)
            os._exit(failure.exit_code)
        if failure.should_print:
            sys.stderr.write(f"{failure.line}\n")
        sys.stdout.flush()
        sys.stderr.flush()
        # The main thread is blocked in a collective and cannot raise an exception, so sys.exit would not end it.
        os._exit(failure.exit_code)

    def _write_stacks(self) -> None:
        """Write the stacks of all threads to the folder `stacks`; to stderr if that cannot be written."""
        try:
            self.stacks.mkdir(parents=True, exist_ok=True)
            with (self.stacks / f"process-{self.rank}.txt").open("a", encoding="utf-8") as file:
                file.write(f"==== {time.strftime('%Y-%m-%d %H:%M:%S')}, process {self.rank} (PID {os.getpid()})\n")
                file.flush()
                faulthandler.dump_traceback(file)
        except OSError:
            with suppress(OSError):
                faulthandler.dump_traceback(2)


class _FirstCause(AbstractContextManager[None]):
    """See FailureMonitor.first_cause."""

    def __init__(self, monitor: FailureMonitor) -> None:
        self.monitor = monitor

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and (failure := self.monitor.report_failure(error)) is not None:
            raise failure from error
