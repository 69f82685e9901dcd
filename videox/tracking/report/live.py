"""Writes the page while a run trains: in a separate process of the lowest priority, which the run never waits for."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

import videox
from videox.errors import UserError
from videox.run.status import read_status
from videox.tracking.events import append_event

logger = logging.getLogger(__name__)
MEDIA_SECONDS = 60.0  # that one process makes pictures and clips for; the next one continues
LAST_WAIT = 10.0  # seconds that the end of a run waits for the last page; launchers kill a stopped run after 30
TERMINATED = 128 + signal.SIGTERM  # exit code of a page's program that the end of the run has ended
MOST_SHARE = 20  # a page is not begun before this many times its predecessor's duration has passed


class LiveReport:
    """Starts the program that writes report.html, and records the end of the run in events.jsonl.

    The page has a process of its own: it shares neither the interpreter's lock nor memory with the training, and
    whatever happens to it does not reach the run. A page that cannot be written is a warning, once.

    Args:
        output_dir: of the run.
        seconds: least time between two pages; 0 = no page.
        enabled: False on every process except the main one; nothing is done then.
    """

    def __init__(self, output_dir: Path, seconds: float, *, enabled: bool = True) -> None:
        self.output_dir, self.seconds, self.enabled = output_dir, seconds, enabled
        self._started = self._warned = False
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._begun = self._due = 0.0

    @classmethod
    def off(cls) -> LiveReport:
        """Return one that does nothing."""
        return cls(Path(), 0.0, enabled=False)

    def start(self) -> None:
        """Begin: the folder belongs to this run now. The first page is written at once."""
        self._started = self.enabled
        self.update()

    def update(self, seconds_left: float | None = None) -> None:
        """Write the page if it is due; returns at once. To be called after every step.

        Args:
            seconds_left: until the end of the run, if it is known.
        """
        if self._started and self.seconds > 0 and time.monotonic() >= self._due and not self._is_running():
            self._spawn(seconds_left, MEDIA_SECONDS)

    def finish(self, wait: float = LAST_WAIT) -> None:
        """Record how the run ended, as run_status.json says, and write the last page; a second call does nothing.

        Args:
            wait: most seconds to wait for the page; its process then goes on by itself.
        """
        if not self._started:
            return
        self._started = False
        self._record_end()
        if self.seconds <= 0:
            return
        if self._is_running() and self._process is not None:
            self._process.terminate()
            self._wait(min(wait, 5.0))
        self._spawn(0.0, MEDIA_SECONDS)  # also beside one that has not ended yet: pages replace each other as a whole
        self._wait(wait)

    def _record_end(self) -> None:
        status = read_status(self.output_dir)
        if status is None:
            return
        facts = {"state": status.state, "exit_code": status.exit_code, "error": status.error}
        try:
            append_event(self.output_dir, "end", status.step, **facts)
        except UserError as why:
            logger.warning("%s %s", why.where, why.what)

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self._is_running() and time.monotonic() < end:
            time.sleep(0.02)

    def _is_running(self) -> bool:
        """Return whether a page is being written; if one was just finished, take note of how it went."""
        if self._process is None:
            return False
        code = self._process.poll()
        if code is None:
            return True
        self._process = None
        self._due = max(self._due, self._begun + MOST_SHARE * (time.monotonic() - self._begun))
        assert self._errors is not None
        with self._errors as errors:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
        if code > 0 and code != TERMINATED and not self._warned:
            self._warned = True
            reason = lines[-1] if lines else f"exit code {code}"
            logger.warning("report.html was not written (%s); training continues without it", reason)
        return False

    def _spawn(self, seconds_left: float | None, media_seconds: float) -> None:
        command = [sys.executable, "-m", "videox.tracking.report", str(self.output_dir.absolute())]
        command += [f"--media_seconds={media_seconds:g}"]
        if seconds_left is not None:
            command.append(f"--seconds_left={seconds_left:.0f}")
        self._begun = time.monotonic()
        self._due = self._begun + self.seconds
        # its own session: Ctrl-C at the terminal and a launcher's signals are for the training
        try:
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - read and closed when the process has ended
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._errors,
                start_new_session=True, env=_environment(),
            )  # fmt: skip
        except OSError as why:
            self._process = None
            if not self._warned:
                self._warned = True
                logger.warning("report.html was not written (%s); training continues without it", why)


def _environment() -> dict[str, str]:
    """Return the environment of the program: this very videox, one thread, no GPU."""
    package = str(Path(videox.__file__).resolve().parents[1])
    paths = [package, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    settings = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **settings}
