"""Peer watch: notices a process that ends while all of them form the process group, before failures are reported.

torch waits for such a process as long as for any collective. Until the processes of a run are connected otherwise
(videox.run.failure), each of them counts up in the rendezvous store, and process 0 looks at all counters.
"""

from __future__ import annotations

import math
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from types import TracebackType

from torch.distributed import DistError, TCPStore

from videox.distributed.rendezvous import timeout_seconds
from videox.errors import PEER_LOST, UserError, is_lost_connection

BEAT_SECONDS = 1.0
BROKEN_SECONDS = 5.0  # how long a process may be silent once a connection between two processes has broken
_DONE = "done"


class PeerWatch:
    """Ends this process if another one of the launch does not respond; active from `start` to the end of the context.

    A process counts as lost if its counter has not changed for VIDEOX_MEETING_SECONDS (45 by default), or for
    BROKEN_SECONDS once a process has left the context with a broken connection. Process 0 looks at all of them and
    writes what it has found into the store; the others look at that and at process 0.

    Args:
        environment: the launcher's variables.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self._rank = self._world = 0
        self._seconds = math.inf
        self._ended, self._broken = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PeerWatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._thread is not None and is_lost_connection(error):
            # The error does not say which process has ended. The watch finds it, and ends this process with its name.
            self._broken.set()
            self._thread.join(2 * BROKEN_SECONDS)
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def start(self, store: TCPStore | None) -> None:
        """Begin to watch.

        Args:
            store: of the rendezvous that all processes have joined; used by the watch alone. None = one process.
        """
        if store is not None:
            environment = self._environment
            self._rank, self._world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
            self._seconds = timeout_seconds(environment)
            self._thread = threading.Thread(target=self._watch, args=(store,), name="videox-joining", daemon=True)
            self._thread.start()

    def _watch(self, store: TCPStore) -> None:
        """Count up and look at the others, until this process is connected to them or one is lost."""
        others = [rank for rank in range(self._world) if rank != self._rank] if self._rank == 0 else [0]
        seen = dict.fromkeys(others, ("", time.monotonic()))
        count = 0
        try:
            while not self._ended.wait(BEAT_SECONDS if count else 0):
                count += 1
                store.set(self._key(self._rank), f"{count} {socket.gethostname()}")
                if self._broken.is_set():
                    store.set(self._key("broken"), "")
                if store.check([self._key("broken")]):
                    self._seconds = min(self._seconds, BROKEN_SECONDS)
                if store.check([self._key("lost")]):
                    self._end(*_rank_and_line(store.get(self._key("lost"))))
                now = time.monotonic()
                for rank, value in zip(others, self._values(store, others), strict=True):
                    if value == _DONE or value != seen[rank][0]:
                        seen[rank] = (value, now)
                    elif now - seen[rank][1] > self._seconds:
                        self._report(store, rank, value)
            store.set(self._key(self._rank), _DONE)
        except DistError:
            if not self._ended.is_set():
                self._end(0, self._line(0, ""))

    def _key(self, what: int | str) -> str:
        # A restarted launch uses the same store, with the keys of its last start still in it.
        return f"videox/{self._environment.get('TORCHELASTIC_RESTART_COUNT', '0')}/beat/{what}"

    def _values(self, store: TCPStore, ranks: list[int]) -> list[str]:
        """Return the counters; "" for a process that has not counted yet."""
        keys = [self._key(rank) for rank in ranks]
        if store.check(keys):
            return [value.decode() for value in store.multi_get(keys)]
        return [store.get(key).decode() if store.check([key]) else "" for key in keys]

    def _report(self, store: TCPStore, rank: int, value: str) -> None:
        line = self._line(rank, value.partition(" ")[2])
        if self._rank == 0:
            store.set(self._key("lost"), f"{rank} {line}")
            self._ended.wait(3 * BEAT_SECONDS)  # process 0 may serve the store: the others have to read it first
        self._end(rank, line)

    def _line(self, rank: int, host: str) -> str:
        on = f" on {host}" if host else ""
        where = f"{self._environment['MASTER_ADDR']}:{self._environment['MASTER_PORT']}"
        what = f"process {rank} of {self._world}{on} has ended, or does not respond, while the processes connected"
        return UserError(where, what, "read its log, then start all processes again", PEER_LOST).line()

    def _end(self, lost: int, line: str) -> None:
        """End the process, whose main thread waits in torch; one of each machine prints the line."""
        if self._ended.is_set():
            return
        first_machine = self._environment.get("GROUP_RANK", "0") == "0"
        if self._environment.get("LOCAL_RANK", "0") == ("1" if lost == 0 and first_machine else "0"):
            sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
        os._exit(PEER_LOST)


def _rank_and_line(value: bytes) -> tuple[int, str]:
    rank, _, line = value.decode().partition(" ")
    return int(rank), line
