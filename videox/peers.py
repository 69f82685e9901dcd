"""Serves the processes of one run that must end together: each learns in an instant that another failed, and why.

A process that is blocked in a collective notices nothing: NCCL waits for its timeout, and gloo knows only that a
connection broke. So each process keeps one more connection to the first one. What ends a process is told over it
before that process ends; the system closes it for a process that was killed; TCP's probes find a machine that is gone.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch.distributed as dist

from videox.errors import PEER_LOST, PeerFailed, Refusal
from videox.lifecycle import exit_code, one_line
from videox.status import RunStatus

CONNECTING = 30.0  # seconds that the connections may take
TOGETHER = 0.5  # seconds in which reports of one cause come in; agreed refusals come from every process
CONSEQUENCE = 3.0  # seconds in which the cause of a broken connection must be heard of
BLOCKED = 5.0  # seconds after which a process that has not noticed by itself counts as blocked in a collective
LEAVING = 15  # seconds that a process may take to end once the cause is known
PROBES = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 9}  # a silent machine counts as gone after 60 s


class Report(NamedTuple):
    """What ended a process: its rank, the line for people, the exit code.

    consequence: a connection broke, so the cause may be elsewhere; lost: the process could not say anything.
    """

    rank: int
    line: str
    exit_code: int
    consequence: bool = False
    lost: bool = False


def lost_connection(error: BaseException) -> bool:
    """Returns whether an exception says no more than that a collective found another process gone."""
    return isinstance(error, dist.DistError) or any(
        name in str(error) for name in ("gloo/", "NCCL", "ncclRemoteError")
    )


def first_of(reports: Sequence[Report]) -> Report:
    """Returns the cause among reports in the order of their arrival; of equal ones that of the lowest rank.

    A broken connection is the cause only where nothing else is.
    """
    cause = next((report for report in reports if not report.consequence), reports[0])
    return min((report for report in reports if report.line == cause.line), key=lambda report: report.rank)


def lost_line(rank: int, host: str) -> str:
    """Returns the line about a process that ended without a word."""
    what = f"process {rank} on {host} is gone: killed, out of memory, or its machine or network is down"
    mend = "look into that machine's own log, then start again with --resume_from_checkpoint latest"
    return Refusal("peer lost", what, mend, PEER_LOST).line()


# ------------------------------------------------------------------------------------------------ connections


class _Line:
    """One connection: messages are JSON lines, and the end of the stream is None."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(True)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in PROBES.items():
            if connection.family != socket.AF_UNIX and hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self.connection, self._rest = connection, b""

    def fileno(self) -> int:
        return self.connection.fileno()

    def send(self, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # whoever is gone is found by reading
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any] | None]:
        """Waits for bytes and returns the messages that they complete; None, at last, for the end."""
        try:
            found = self.connection.recv(1 << 16)
        except OSError:  # reset, or found dead by TCP's probes
            found = b""
        *lines, self._rest = (self._rest + found).split(b"\n")
        return [*(json.loads(line) for line in lines), *([] if found else [None])]


def _open_listener(environment: Mapping[str, str]) -> socket.socket:
    """Returns a listening socket: on the loopback where all processes run on this machine."""
    world = environment.get("WORLD_SIZE", "1")
    alone = environment.get("LOCAL_WORLD_SIZE", world) == world
    return socket.create_server(("127.0.0.1" if alone else "", 0), backlog=int(world))


def _accept(listener: socket.socket, token: str, wanted: int) -> dict[int, _Line]:
    """Returns the connections by rank of those that name the token, as many as come in time."""
    lines: dict[int, _Line] = {}
    deadline = time.monotonic() + CONNECTING
    while len(lines) < wanted and (left := deadline - time.monotonic()) > 0:
        listener.settimeout(left)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # late, or none of ours
            connection = listener.accept()[0]
            connection.settimeout(1.0)
            said = json.loads(connection.recv(256))
            if secrets.compare_digest(said["token"], token):
                lines[int(said["rank"])] = _Line(connection)
    listener.close()
    return lines


class _Hub(threading.Thread):
    """On the first process: hears every process, decides which failure came first, and tells all."""

    def __init__(self, lines: Mapping[int, _Line], hosts: Sequence[str]) -> None:
        super().__init__(name="videox-peers", daemon=True)
        self.lines, self.hosts = dict(lines), hosts
        self.reports: list[Report] = []
        self.deadline, self.decided = math.inf, False

    def run(self) -> None:
        """Hears until nobody is left: what comes after the verdict is read, or its sender might not get to read it."""
        while self.lines:
            left = None if self.decided or self.deadline == math.inf else max(self.deadline - time.monotonic(), 0)
            ready = select.select(list(self.lines.values()), [], [], left)[0]
            for rank in [rank for rank, line in self.lines.items() if line in ready]:
                self._hear(rank)
            if not self.decided and time.monotonic() >= self.deadline:
                self.decided = True
                verdict = {"verdict": first_of(self.reports)._asdict()}
                for _, line in sorted(self.lines.items(), reverse=True):  # this very process last
                    line.send(verdict)

    def _hear(self, rank: int) -> None:
        for message in self.lines[rank].receive():
            if message is None:
                del self.lines[rank]
                self._note(Report(rank, lost_line(rank, self.hosts[rank]), PEER_LOST, lost=True))
            elif "report" in message:
                self._note(Report(**message["report"]))
            elif rank == 0:  # this process leaves, all went well: nobody watches from here on
                for line in self.lines.values():
                    line.send({"bye": True})
                self.lines.clear()
                return
            else:
                del self.lines[rank]
                return

    def _note(self, report: Report) -> None:
        self.reports.append(report)
        self.deadline = min(self.deadline, time.monotonic() + (CONSEQUENCE if report.consequence else TOGETHER))


# ------------------------------------------------------------------------------------------------ a process


class Peers:
    """A process's view of the others; without others it does nothing.

    Attributes:
        status: of the run, once there is one; written by whoever ends a blocked process.
    """

    def __init__(self) -> None:
        self.status: RunStatus | None = None
        self.rank, self.machines = 0, [""]
        self._line: _Line | None = None
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
        listener, token = (_open_listener(environment), secrets.token_hex(16)) if rank == 0 else (None, "")
        machine = f"{socket.gethostname()} {environment.get('GROUP_RANK', '')}"
        meeting = (listener.getsockname()[1], token) if listener else None
        said = gather((machine, meeting))
        self.rank, self.machines = rank, [name for name, _ in said]
        port, token = said[0][1]
        if listener is not None:
            here, there = socket.socketpair()
            lines = {0: _Line(there), **_accept(listener, token, len(said) - 1)}
            self._line = _Line(here)
            _Hub(lines, [name.rpartition(" ")[0] for name in self.machines]).start()
            missing = sorted(set(range(len(said))) - set(lines))
        else:
            self._line, missing = self._connect(environment, port, token), []
        if self._line is not None:
            threading.Thread(target=self._listen, name="videox-peer", daemon=True).start()
        if not missing:
            return []
        return [f"processes {missing} could not connect to port {port} here: their failure shows by a timeout only"]

    def _connect(self, environment: Mapping[str, str], port: int, token: str) -> _Line | None:
        here = self.machines[0] == self.machines[self.rank]
        address = "127.0.0.1" if here else environment["MASTER_ADDR"]
        try:
            connection = socket.create_connection((address, port), timeout=CONNECTING)
        except OSError:
            return None  # the first process says so
        connection.sendall(json.dumps({"token": token, "rank": self.rank}).encode())
        return _Line(connection)

    def leave(self) -> None:
        """Says that this process has done its part: its end is no failure."""
        self._left = True
        if self._line is not None:
            self._line.send({"bye": True})

    @contextmanager
    def first_cause(self) -> Iterator[None]:
        """Turns what ends the block into what ended the run.

        Raises:
            PeerFailed: with the line and exit code of the process that failed first; there, its own exception goes on.
        """
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            if self._line is None or self._noticed.is_set():
                raise
            self._noticed.set()
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(LEAVING)  # the end of an interpreter may wait for connections that nobody serves any more
            consequence = lost_connection(error)
            line, code = one_line(error), PEER_LOST if consequence else exit_code(error)
            if not isinstance(error, (Refusal, KeyboardInterrupt)):  # a refusal names its place
                line = line.replace("error: ", f"error: process {self.rank}: ", 1)
            self._line.send({"report": Report(self.rank, line, code, consequence)._asdict()})
            self._known.wait(LEAVING / 2)
            if self._verdict is None or (self._verdict.rank == self.rank and not consequence):
                raise
            raise self._failure(self._verdict) from error

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
