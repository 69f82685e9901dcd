"""Serves whoever looks in on a run: run_status.json says how it stands, and whether it died without a goodbye."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from videox.files import write_json_atomically

logger = logging.getLogger(__name__)
STATES = ("running", "finished", "stopped", "failed")


def _process_start(pid: int) -> str:
    """Returns when a process started, in the kernel's ticks, or "" where it is gone or the system does not tell.

    A number of a dead process is soon given to another one (in a container every trainer may be process 7), so the
    number alone does not say who lives.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]


def _alive(pid: int, started: str) -> bool:
    if started:
        return _process_start(pid) == started
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


@dataclass(frozen=True, slots=True)
class Status:
    """What run_status.json said; see `RunStatus` for the fields."""

    state: str
    exit_code: int | None
    step: int
    error: str
    pid: int
    host: str
    started: str
    updated: float

    @property
    def died(self) -> bool:
        """True if the run said "running" and its process is gone, so it ended without a goodbye (kill -9, power cut).

        Of a process on another host nothing can be seen; it counts as gone, since the lock of output_dir is what tells
        two living trainers apart, and a needless look at the hashes costs less than a missed one.
        """
        return self.state == "running" and not (self.host == socket.gethostname() and _alive(self.pid, self.started))


def read_status(output_dir: Path) -> Status | None:
    """Returns what the last run in `output_dir` left in run_status.json, or None if there is no file.

    A file that cannot be understood counts as a run that died while it wrote: state "running", process 0.
    """
    try:
        found = json.loads((output_dir / "run_status.json").read_text(encoding="utf-8"))
        return Status(**{name: found[name] for name in Status.__dataclass_fields__})
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return Status("running", None, 0, "", 0, "", "", 0.0)


class RunStatus:
    """Keeps output_dir/run_status.json: `state`, `exit_code`, `step`, `error` (one line), and `pid`, `host`, `started`
    (the process's start), `updated` (seconds since 1970).

    Every write replaces the whole file by a rename, so a reader never sees half of one. A write that fails is a
    warning, once: the status must neither end a run nor hide the error that did.

    Args:
        output_dir: the run's folder; made if it is not there.
        enabled: False on every process but the main one; then nothing is written.
        interval: seconds between two writes of `heartbeat`.
    """

    def __init__(self, output_dir: Path, *, enabled: bool = True, interval: float = 10.0) -> None:
        self.path = output_dir / "run_status.json"
        self.enabled, self.interval = enabled, interval
        self.step = 0
        self._last, self._warned = -math.inf, False

    def write(self, state: str, *, step: int | None = None, exit_code: int | None = None, error: str = "") -> None:
        """Writes the state at once.

        Args:
            state: one of STATES.
            step: optimizer steps done; None keeps the last one told.
            exit_code: as in videox.errors, 0 for a finished run, None while it runs.
            error: the line of `UserError.line`, empty without an error; line breaks become spaces.

        Raises:
            ValueError: for an unknown state.
        """
        if state not in STATES:
            raise ValueError(f"state {state!r} is none of {STATES}")
        self.step = self.step if step is None else step
        self._last = time.monotonic()
        if not self.enabled:
            return
        pid = os.getpid()
        status = Status(
            state=state,
            exit_code=exit_code,
            step=self.step,
            error=" ".join(error.split()),
            pid=pid,
            host=socket.gethostname(),
            started=_process_start(pid),
            updated=time.time(),
        )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json_atomically(self.path, asdict(status))
        except OSError as error_:
            if not self._warned:
                logger.warning("%s cannot be written (%s); the run goes on without it", self.path, error_)
            self._warned = True

    def heartbeat(self, step: int) -> None:
        """Notes that `step` optimizer steps are done; writes "running" if the last write is `interval` seconds old."""
        self.step = step
        if time.monotonic() - self._last >= self.interval:
            self.write("running")
