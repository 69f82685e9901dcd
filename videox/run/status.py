"""run_status.json: the state of a run, and whether the run ended without writing its status (was killed)."""

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
    """Return when a process started, in the kernel's clock ticks; "" if it is gone or the system does not report it.

    The PID of a dead process is soon reused (in a container every trainer may be PID 7), so the PID alone does not
    identify a process.
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
    """Content of run_status.json; see `RunStatus` for the fields."""

    state: str
    exit_code: int | None
    step: int
    error: str
    pid: int
    host: str
    started: str
    updated: float

    @property
    def was_killed(self) -> bool:
        """True if the state is "running" and the process is gone: it ended without writing its status (kill -9).

        A process on another host cannot be checked and counts as gone: the lock of output_dir is what keeps two living
        trainers apart, and an unnecessary check of the hashes costs less than a missing one.
        """
        return self.state == "running" and not (self.host == socket.gethostname() and _alive(self.pid, self.started))


def read_status(output_dir: Path) -> Status | None:
    """Return what the last run in `output_dir` left in run_status.json, or None if there is no file.

    A file that cannot be parsed counts as a run that was killed while it wrote: state "running", PID 0.
    """
    try:
        content = json.loads((output_dir / "run_status.json").read_text(encoding="utf-8"))
        return Status(**{name: content[name] for name in Status.__dataclass_fields__})
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return Status("running", None, 0, "", 0, "", "", 0.0)


class RunStatus:
    """Writer of output_dir/run_status.json: `state`, `exit_code`, `step`, `error` (one line), and `pid`, `host`,
    `started` (start time of the process), `updated` (seconds since 1970).

    Every write replaces the whole file by a rename, so a reader never sees an incomplete one. A failed write is logged
    as a warning, once: the status must neither end a run nor hide the error that did.

    Args:
        output_dir: the run's folder; created if missing.
        enabled: False on every rank but the main one; then nothing is written.
        interval: seconds between two writes of `heartbeat`.
    """

    def __init__(self, output_dir: Path, *, enabled: bool = True, interval: float = 10.0) -> None:
        self.path = output_dir / "run_status.json"
        self.enabled, self.interval = enabled, interval
        self.step = 0
        self._last_write, self._warned = -math.inf, False

    def write(self, state: str, *, step: int | None = None, exit_code: int | None = None, error: str = "") -> None:
        """Write the state at once.

        Args:
            state: one of STATES.
            step: optimizer steps done; None keeps the last value.
            exit_code: as in videox.errors, 0 for a finished run, None while it runs.
            error: the line of `UserError.line`, empty without an error; line breaks become spaces.

        Raises:
            ValueError: for an unknown state.
        """
        if state not in STATES:
            raise ValueError(f"state {state!r} is not one of {STATES}")
        self.step = self.step if step is None else step
        self._last_write = time.monotonic()
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
                logger.warning("%s cannot be written (%s); training continues without it", self.path, error_)
            self._warned = True

    def heartbeat(self, step: int) -> None:
        """Record that `step` optimizer steps are done; write "running" if the last write is `interval` seconds old."""
        self.step = step
        if time.monotonic() - self._last_write >= self.interval:
            self.write("running")
