"""Connections between the ranks of a run, by which rank 0 hears of every failure and decides which one was first.

Every rank has a connection to rank 0, where the FailureServer listens. A rank that fails reports it over its
connection; a connection that closes without a message is a process that was killed; TCP keepalive probes detect a
machine that is gone.
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

import torch.distributed as dist

from videox.errors import PEER_LOST, UserError

CONNECT_SECONDS = 30.0  # timeout for establishing the connections
# How long to collect reports before the verdict. An error that all ranks agreed on is reported by every rank.
REPORT_SECONDS = 0.5
# The same after a report of a broken connection: its cause may be reported later than the consequence.
CONSEQUENCE_SECONDS = 3.0
PROBES = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 9}  # a silent machine counts as lost after 60 s


class Report(NamedTuple):
    """What ended a process.

    Attributes:
        rank: of the process.
        line: the error line for the user.
        exit_code: of the run, if this is its cause.
        consequence: a connection broke, so the cause may be at another rank.
        lost: the process ended without reporting anything.
    """

    rank: int
    line: str
    exit_code: int
    consequence: bool = False
    lost: bool = False


def is_lost_connection(error: BaseException) -> bool:
    """Return whether an exception only means that a collective lost its connection to another process."""
    return isinstance(error, dist.DistError) or any(
        name in str(error) for name in ("gloo/", "NCCL", "ncclRemoteError")
    )


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
        self.connection, self._incomplete = connection, b""

    def fileno(self) -> int:
        """Return the file descriptor, so that select can wait for the connection."""
        return self.connection.fileno()

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message. A broken connection is ignored here, since receive() reports it."""
        with contextlib.suppress(OSError):
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
    """Runs on rank 0: hears every rank, decides which failure came first, and sends the verdict to all."""

    def __init__(self, connections: Mapping[int, Connection], hosts: Sequence[str]) -> None:
        super().__init__(name="videox-peers", daemon=True)
        self.connections, self.hosts = dict(connections), hosts
        self.reports: list[Report] = []
        self.deadline, self.decided = math.inf, False

    def run(self) -> None:
        """Receive until all connections are closed.

        Messages after the verdict are read, too: with unread data the connection would be reset, and its rank might
        not get to read the verdict.
        """
        while self.connections:
            waiting = self.decided or self.deadline == math.inf
            timeout = None if waiting else max(self.deadline - time.monotonic(), 0)
            ready = select.select(list(self.connections.values()), [], [], timeout)[0]
            for rank in [rank for rank, connection in self.connections.items() if connection in ready]:
                self._handle_messages(rank)
            if not self.decided and time.monotonic() >= self.deadline:
                self.decided = True
                verdict = {"verdict": find_cause(self.reports)._asdict()}
                # Rank 0, this process, last: its verdict may end the process, and this thread with it.
                for _, connection in sorted(self.connections.items(), reverse=True):
                    connection.send(verdict)

    def _handle_messages(self, rank: int) -> None:
        for message in self.connections[rank].receive():
            if message is None:
                del self.connections[rank]
                self._add_report(Report(rank, lost_peer_line(rank, self.hosts[rank]), PEER_LOST, lost=True))
            elif "report" in message:
                self._add_report(Report(**message["report"]))
            elif rank == 0:  # this process leaves without a failure: the monitoring of all ranks ends
                for connection in self.connections.values():
                    connection.send({"bye": True})
                self.connections.clear()
                return
            else:
                del self.connections[rank]
                return

    def _add_report(self, report: Report) -> None:
        self.reports.append(report)
        seconds = CONSEQUENCE_SECONDS if report.consequence else REPORT_SECONDS
        self.deadline = min(self.deadline, time.monotonic() + seconds)
