"""Serves videox.run.failure: the connections between the processes of a run, and who of them hears all and decides.

Every process has a line to the first one, where the Hub listens. What ends a process is reported over its line; the
end of a line without a word is a process that was killed; TCP's own probes find a machine that is gone.
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

CONNECTING = 30.0  # seconds that the connections may take
TOGETHER = 0.5  # seconds in which reports of one cause come in; agreed refusals come from every process
CONSEQUENCE = 3.0  # seconds in which the cause of a broken connection must be heard of
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
    hint = "look into that machine's own log, then start again with --resume_from_checkpoint latest"
    return UserError("peer lost", what, hint, PEER_LOST).line()


# ------------------------------------------------------------------------------------------------ connections


class Connection:
    """One connection: messages are JSON lines, and the end of the stream is None."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(True)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in PROBES.items():
            if connection.family != socket.AF_UNIX and hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self.connection, self._rest = connection, b""

    def fileno(self) -> int:
        """Returns the descriptor, by which select can wait for the line."""
        return self.connection.fileno()

    def send(self, message: Mapping[str, Any]) -> None:
        """Sends a message; a broken line is no error here, since reading finds it."""
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any] | None]:
        """Waits for bytes and returns the messages that they complete; None, at last, for the end."""
        try:
            found = self.connection.recv(1 << 16)
        except OSError:  # reset, or found dead by TCP's probes
            found = b""
        *lines, self._rest = (self._rest + found).split(b"\n")
        return [*(json.loads(line) for line in lines), *([] if found else [None])]


def open_listener(environment: Mapping[str, str]) -> socket.socket:
    """Returns a listening socket: on the loopback where all processes run on this machine."""
    world = environment.get("WORLD_SIZE", "1")
    alone = environment.get("LOCAL_WORLD_SIZE", world) == world
    return socket.create_server(("127.0.0.1" if alone else "", 0), backlog=int(world))


def accept(listener: socket.socket, token: str, wanted: int) -> dict[int, Connection]:
    """Returns the connections by rank of those that name the token, as many as come in time."""
    lines: dict[int, Connection] = {}
    deadline = time.monotonic() + CONNECTING
    while len(lines) < wanted and (left := deadline - time.monotonic()) > 0:
        listener.settimeout(left)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # late, or none of ours
            connection = listener.accept()[0]
            connection.settimeout(1.0)
            said = json.loads(connection.recv(256))
            if secrets.compare_digest(said["token"], token):
                lines[int(said["rank"])] = Connection(connection)
    listener.close()
    return lines


class FailureServer(threading.Thread):
    """On the first process: hears every process, decides which failure came first, and tells all."""

    def __init__(self, lines: Mapping[int, Connection], hosts: Sequence[str]) -> None:
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
