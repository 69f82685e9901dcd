"""Connections between the ranks of a run, by which rank 0 hears of every failure and decides which one was first.

Every rank has a connection to rank 0, where the FailureServer listens. A rank that fails reports it over its
connection; a connection that closes without a message is a process that was killed; TCP keepalive probes detect a
machine that is gone. Each rank also reports its progress at regular intervals (videox.run.watchdog), from which the
FailureServer finds out whether the run hangs; it answers, so that the others notice when rank 0 does not respond.
"""

from __future__ import annotations

import contextlib
import json
import math
import secrets
import select
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from videox.errors import PEER_LOST, UserError
from videox.run.hangs import Beat, Clock, HangWatch

CONNECT_SECONDS = 30.0  # timeout for establishing the connections
# How long to collect reports before the verdict. An error that all ranks agreed on is reported by every rank.
REPORT_SECONDS = 0.5
# The same after a report of a broken connection: its cause may be reported later than the consequence.
CONSEQUENCE_SECONDS = 3.0
# Assumed of a rank that has not reported its progress yet: it may take this long until the watchdog is started.
FIRST_BEAT = Beat(0.0, 1800.0, 30.0, "the start")
PROBES = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 9}  # a silent machine counts as lost after 60 s


class Report(NamedTuple):
    """What ended a process.

    Attributes:
        rank: of the process.
        line: the error line for the user.
        exit_code: of the run, if this is its cause.
        consequence: a connection broke, so the cause may be at another rank.
        lost: the process ended without reporting anything, or does not respond.
        hangs: the run makes no progress, and this process is the cause.
    """

    rank: int
    line: str
    exit_code: int
    consequence: bool = False
    lost: bool = False
    hangs: bool = False


def find_cause(reports: Sequence[Report]) -> Report:
    """Return the cause among reports in order of arrival; of reports with equal lines the one of the lowest rank.

    A broken connection is the cause only if there is no other report.
    """
    cause = next((report for report in reports if not report.consequence), reports[0])
    return min((report for report in reports if report.line == cause.line), key=lambda report: report.rank)


def lost_peer_line(rank: int, host: str) -> str:
    """Return the error line for a process that ended without reporting anything."""
    what = f"process {rank} on {host} ended without a report: killed, out of memory, or its machine or network is down"
    hint = "check the log of that machine, then start again with --resume_from_checkpoint latest"
    return UserError("peer lost", what, hint, PEER_LOST).line()


# ------------------------------------------------------------------------------------------------ connections


class Connection:
    """A connection on which messages are JSON lines; the end of the stream is received as None."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(True)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in PROBES.items():
            if connection.family != socket.AF_UNIX and hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self.connection, self._incomplete, self._lock = connection, b"", threading.Lock()

    def fileno(self) -> int:
        """Return the file descriptor, so that select can wait for the connection."""
        return self.connection.fileno()

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message; may be called by several threads.

        A broken connection is ignored here, since receive() reports it.
        """
        with self._lock, contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any] | None]:
        """Wait for bytes and return the messages that they complete; the last one is None at the end of the stream."""
        try:
            received = self.connection.recv(1 << 16)
        except OSError:  # reset, or closed by TCP's keepalive probes
            received = b""
        *lines, self._incomplete = (self._incomplete + received).split(b"\n")
        return [*(json.loads(line) for line in lines), *([] if received else [None])]


def open_listener(environment: Mapping[str, str]) -> socket.socket:
    """Return a listening socket, on the loopback interface if all processes run on this machine."""
    world = environment.get("WORLD_SIZE", "1")
    alone = environment.get("LOCAL_WORLD_SIZE", world) == world
    return socket.create_server(("127.0.0.1" if alone else "", 0), backlog=int(world))


def accept_connections(listener: socket.socket, token: str, expected: int) -> dict[int, Connection]:
    """Return, by rank, the connections of the processes that send the token, as many as arrive in time."""
    connections: dict[int, Connection] = {}
    deadline = time.monotonic() + CONNECT_SECONDS
    while len(connections) < expected and (remaining := deadline - time.monotonic()) > 0:
        listener.settimeout(remaining)
        # Too late, or another program (a port scanner): its connection is ignored.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            connection = listener.accept()[0]
            connection.settimeout(1.0)
            greeting = json.loads(connection.recv(256))
            if secrets.compare_digest(greeting["token"], token):
                connections[int(greeting["rank"])] = Connection(connection)
    listener.close()
    return connections


class FailureServer(threading.Thread):
    """Runs on rank 0: hears every rank, decides which failure came first, and sends the verdict to all.

    Args:
        connections: by rank.
        hosts: machine of each rank.
    """

    def __init__(self, connections: Mapping[int, Connection], hosts: Sequence[str]) -> None:
        super().__init__(name="videox-peers", daemon=True)
        self.connections, self.hosts = dict(connections), hosts
        self.stacks = ""  # folder with the stacks of the ranks of a run that hangs
        self.reports: list[Report] = []
        self.deadline, self.decided = math.inf, False
        now = time.monotonic()
        self._clock, self._watch, self._next_look = Clock(now), HangWatch(list(connections), now, FIRST_BEAT), now
        self._watching = False  # from the first report of progress on

    def run(self) -> None:
        """Receive until all connections are closed.

        Messages after the verdict are read, too: with unread data the connection would be reset, and its rank might
        not get to read the verdict.
        """
        while self.connections:
            ready = select.select(list(self.connections.values()), [], [], self._timeout())[0]
            now = self._clock.tick(time.monotonic(), self._watch.interval)
            for rank in [rank for rank, connection in self.connections.items() if connection in ready]:
                self._handle_messages(rank, now)
            if self._watching and not self.decided and time.monotonic() >= self._next_look:
                self._look(now)
            if not self.decided and time.monotonic() >= self.deadline:
                self.decided = True
                # Rank 0, this process, last: its verdict may end the process, and this thread with it.
                self._send_all({"verdict": find_cause(self.reports)._asdict()})

    def _timeout(self) -> float | None:
        """Return the seconds to wait for messages; None: forever."""
        due = math.inf if self.decided else min(self.deadline, self._next_look if self._watching else math.inf)
        return None if due == math.inf else max(due - time.monotonic(), 0)

    def _send_all(self, message: Mapping[str, Any]) -> None:
        """Send a message to all ranks, rank 0 last."""
        for _, connection in sorted(self.connections.items(), reverse=True):
            connection.send(message)

    def _look(self, now: float) -> None:
        """Find out whether the run hangs, and let the other ranks know that this one responds."""
        self._next_look = time.monotonic() + self._watch.interval
        self._send_all({"beat": True})
        hang = self._watch.find(now)
        if hang is not None and not self.reports:
            line = hang.line(self.hosts[hang.rank], self.stacks)
            self._add_report(Report(hang.rank, line, PEER_LOST, lost=hang.silent, hangs=True))

    def _handle_messages(self, rank: int, now: float) -> None:
        for message in self.connections[rank].receive():
            if message is None:
                self._remove(rank)
                self._add_report(Report(rank, lost_peer_line(rank, self.hosts[rank]), PEER_LOST, lost=True))
            elif "beat" in message:
                self._watch.hear(rank, Beat(*message["beat"]), now)
                self._watching = True
            elif "report" in message:
                self._add_report(Report(**message["report"]))
            elif rank == 0:  # this process leaves without a failure: the monitoring of all ranks ends
                self._send_all({"bye": True})
                self.connections.clear()
                return
            else:
                self._remove(rank)
                return

    def _remove(self, rank: int) -> None:
        del self.connections[rank]
        self._watch.forget(rank)

    def _add_report(self, report: Report) -> None:
        self.reports.append(report)
        seconds = CONSEQUENCE_SECONDS if report.consequence else REPORT_SECONDS
        self.deadline = min(self.deadline, time.monotonic() + seconds)
