"""Serves whoever watches a run: run_status.json, metrics.jsonl, the tracker, the progress bar, the step's times."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Protocol

from tqdm import tqdm

from videox.errors import STORAGE, Refusal

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
            error: the line of `Refusal.line`, empty without an error; line breaks become spaces.

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
            _replace(self.path, json.dumps(asdict(status), indent=1).encode() + b"\n")
        except OSError as error_:
            if not self._warned:
                logger.warning("%s cannot be written (%s); the run goes on without it", self.path, error_)
            self._warned = True

    def heartbeat(self, step: int) -> None:
        """Notes that `step` optimizer steps are done; writes "running" if the last write is `interval` seconds old."""
        self.step = step
        if time.monotonic() - self._last >= self.interval:
            self.write("running")


def _replace(path: Path, content: bytes) -> None:
    """Puts a file in place whole: written aside, synced, renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def json_line(record: Mapping[str, object]) -> bytes:
    """Returns one line of standard JSON, with its line break.

    Finite floats are written in the shortest form that reads back exactly. JSON has no NaN or infinity: such a number,
    at any depth, becomes null, and the key "non_finite": true is added.
    """
    found: list[float] = []
    clean = {name: _finite(value, found) for name, value in record.items()}
    if found:
        clean["non_finite"] = True
    return json.dumps(clean, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n"


def _finite(value: object, found: list[float]) -> object:
    if isinstance(value, (list, tuple)):
        return [_finite(item, found) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        found.append(value)
        return None
    return value


def append_line(path: Path, record: Mapping[str, object]) -> None:
    """Appends a record to a file of JSON lines by a single write, so that a kill leaves at most one torn line.

    What a failed write left behind is taken away again.

    Raises:
        Refusal: (exit code 5) if the file cannot be written, e.g. because the disk is full.
    """
    line = json_line(record)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            end = os.fstat(descriptor).st_size
            try:
                written = os.write(descriptor, line)
                while written < len(line):  # a nearly full disk takes a part, and refuses the rest
                    written += os.write(descriptor, line[written:])
            except OSError:
                os.ftruncate(descriptor, end)
                raise
        finally:
            os.close(descriptor)
    except OSError as error:
        raise Refusal(
            str(path), f"cannot be written ({error.strerror})", "make room or rights there", STORAGE
        ) from error


def read_lines(path: Path) -> list[dict]:
    """Returns the records of a file of JSON lines in order; none if there is no file.

    A last line without its line break is what a kill tore off; it is left out.

    Raises:
        Refusal: (exit code 5) for a whole line that is not a JSON object.
    """
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise Refusal(
                f"{path}:{number}", "is not a JSON object", "remove the broken line or move the file", STORAGE
            )
        records.append(record)
    return records


def _drop_torn_line(path: Path) -> None:
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)


def rewind(path: Path, step: int, aside: Path) -> int:
    """Moves the lines of steps after `step` from `path` to the end of `aside`, and drops a torn last line.

    Nothing is lost if it is cut short: the lines are safe in `aside` before `path` is replaced.

    Returns:
        How many whole lines were moved.
    """
    if not path.exists():
        return 0
    records = read_lines(path)
    later = [record for record in records if record["step"] > step]
    if later:
        before = aside.read_bytes() if aside.exists() else b""
        _replace(aside, before + b"".join(map(json_line, later)))
    kept = b"".join(json_line(record) for record in records if record["step"] <= step)
    if kept != path.read_bytes():
        _replace(path, kept)
    return len(later)


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step, as metrics.jsonl holds it.

    Attributes:
        step: from 1.
        loss: mean over the real samples of the global batch.
        lr: learning rate of this step.
        grad_norm: global gradient norm before clipping.
        tokens: sequence length summed over the real samples of the global batch.
        tokens_per_second: `tokens` by the seconds of this step.
        data_wait: seconds waited for data, the largest over the ranks.
        rows: metadata row numbers of the global batch in schedule order.
        buckets: (frames, height, width) in pixels, parallel to rows.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    tokens_per_second: float
    data_wait: float
    rows: Sequence[int]
    buckets: Sequence[Sequence[int]]

    def as_dict(self) -> dict[str, object]:
        """Returns the object of metrics.jsonl; numbers of numpy or torch become Python's."""
        if len(self.rows) != len(self.buckets):
            raise ValueError(f"{len(self.rows)} rows but {len(self.buckets)} buckets in step {self.step}")
        return {
            "step": int(self.step),
            "loss": float(self.loss),
            "lr": float(self.lr),
            "grad_norm": float(self.grad_norm),
            "tokens": int(self.tokens),
            "tokens_per_second": float(self.tokens_per_second),
            "data_wait": float(self.data_wait),
            "rows": [int(row) for row in self.rows],
            "buckets": [[int(side) for side in bucket] for bucket in self.buckets],
        }


class MetricsLog:
    """Appends to output_dir/metrics.jsonl, one line per optimizer step, each in the file when `append` returns.

    Args:
        output_dir: the run's folder.
        enabled: False on every process but the main one; then nothing is written.

    Raises:
        Refusal: (exit code 5) if the file holds a broken line or cannot be written.
    """

    def __init__(self, output_dir: Path, *, enabled: bool = True) -> None:
        self.path, self.enabled = output_dir / "metrics.jsonl", enabled
        lines = read_lines(self.path) if enabled else []
        self.last_step = lines[-1]["step"] if lines else 0
        if enabled:
            _drop_torn_line(self.path)

    def append(self, record: StepRecord) -> None:
        """Writes one line.

        Raises:
            ValueError: if the step is not the one after the last line's, so that no step is repeated or missing.
            Refusal: (exit code 5) if the file cannot be written.
        """
        if record.step != self.last_step + 1 and self.enabled:
            raise ValueError(f"{self.path}: step {record.step} does not follow step {self.last_step}")
        if self.enabled:
            append_line(self.path, record.as_dict())
        self.last_step = record.step

    def sync(self) -> None:
        """Forces the lines to the disk; before a checkpoint is published, which must not outlive its own lines."""
        if self.enabled and self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())


class _Sink(Protocol):
    errors: tuple[type[Exception], ...]

    def write(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    errors: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, logging_dir: Path, project: str, settings: Mapping[str, object], first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what a run that was rewound had logged after this step
        self._writer = SummaryWriter(str(logging_dir / project), purge_step=first_step, flush_secs=30)
        self._writer.add_text("settings", "    " + json.dumps(settings, indent=1, default=str).replace("\n", "\n    "))

    def write(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    errors: tuple[type[Exception], ...]

    def __init__(self, logging_dir: Path, project: str, settings: Mapping[str, object], first_step: int) -> None:
        import wandb

        del first_step  # there each start is a run of its own
        self.errors = (OSError, wandb.errors.Error)
        logging_dir.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(dir=str(logging_dir), project=project, config=dict(settings))
        except wandb.errors.Error as error:  # not logged in, no network
            raise OSError(str(error)) from error

    def write(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Path, str, Mapping[str, object], int], _Sink] | None] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "none": None,
}


def check_tracker(report_to: str) -> None:
    """Raises a Refusal (exit code 2) for a tracker that is unknown or not installed; cheap, for every process."""
    if report_to not in TRACKERS:
        raise Refusal("--report_to", f"there is no tracker {report_to!r}", f"choose one of {', '.join(TRACKERS)}")
    if TRACKERS[report_to] is not None and importlib.util.find_spec(report_to) is None:
        mend = f"pip install {report_to}, or give --report_to none"
        raise Refusal("--report_to", f"{report_to} is not installed", mend)


class Tracker:
    """Sends scalars to TensorBoard or Weights & Biases. One that fails is a warning; training goes on without it.

    Args:
        report_to: a key of TRACKERS.
        logging_dir: folder for its files.
        project: name of the project (TensorBoard: a sub-folder).
        settings: what was asked and resolved, shown beside the curves.
        first_step: the first optimizer step that this process will do (from 1).
        enabled: False on every process but the main one; then nothing is opened.

    Raises:
        Refusal: (exit code 2) as `check_tracker`.
    """

    def __init__(
        self,
        report_to: str,
        logging_dir: Path,
        *,
        project: str,
        settings: Mapping[str, object],
        first_step: int = 1,
        enabled: bool = True,
    ) -> None:
        check_tracker(report_to)
        self.name = report_to
        self._sink: _Sink | None = None
        build = TRACKERS[report_to]
        if build is None or not enabled:
            return
        try:
            self._sink = build(logging_dir, project, settings, first_step)
        except OSError as error:
            self._give_up(error)

    def log(self, record: StepRecord) -> None:
        """Sends the scalars of one optimizer step."""
        self.scalars(
            {
                "train/loss": record.loss,
                "train/lr": record.lr,
                "train/grad_norm": record.grad_norm,
                "speed/tokens": float(record.tokens),
                "speed/tokens_per_second": record.tokens_per_second,
                "speed/data_wait": record.data_wait,
            },
            record.step,
        )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Sends named scalars of one optimizer step."""
        if self._sink is not None:
            try:
                self._sink.write(values, step)
            except self._sink.errors as error:
                self._give_up(error)

    def close(self) -> None:
        """Waits until everything is written, and closes."""
        if self._sink is not None:
            try:
                self._sink.close()
            except self._sink.errors as error:
                self._give_up(error)
            self._sink = None

    def _give_up(self, error: Exception) -> None:
        logger.warning("tracker %s failed and is off from now on (%s); metrics.jsonl goes on", self.name, error)
        self._sink = None


@dataclass(frozen=True, slots=True)
class StepTime:
    """Times of one optimizer step.

    Attributes:
        seconds: of the whole step, without what ran inside `StepClock.aside`.
        data_wait: seconds of it that this process waited for data.
        tokens_per_second: over the global batch.
        smooth_tokens_per_second: the same over the last steps.
        wait_share: share of the last steps' seconds that went into waiting, in [0, 1].
    """

    seconds: float
    data_wait: float
    tokens_per_second: float
    smooth_tokens_per_second: float
    wait_share: float


class StepClock:
    """Measures steps by the monotonic clock, which no change of the system's time can bend.

    Smoothed values are quotients of exponentially forgotten sums: steps of very different token counts then weigh by
    the time they take, as they do in the run's total.

    Args:
        memory: how many steps the smoothed values look back, about.
        now: a clock in seconds.
    """

    def __init__(self, *, memory: float = 20.0, now: Callable[[], float] = time.monotonic) -> None:
        self._keep, self._now = 1 - 1 / memory, now
        self._tokens = self._seconds = self._waited = 0.0
        self._aside = self.data_wait = 0.0
        self._start = now()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for data; `data_wait` holds the sum since the step began."""
        start = self._now()
        try:
            yield
        finally:
            self.data_wait += self._now() - start

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leaves the time inside (validation, checkpoint) out of the step."""
        start = self._now()
        try:
            yield
        finally:
            self._aside += self._now() - start

    def lap(self, tokens: int, data_wait: float | None = None) -> StepTime:
        """Ends the step and begins the next one.

        Args:
            tokens: of the global batch.
            data_wait: seconds, the largest over the ranks; None takes this process's own.
        """
        now = self._now()
        seconds = max(now - self._start - self._aside, 1e-9)
        waited = self.data_wait if data_wait is None else data_wait
        self._tokens = self._keep * self._tokens + tokens
        self._seconds = self._keep * self._seconds + seconds
        self._waited = self._keep * self._waited + min(waited, seconds)
        self._start, self._aside, self.data_wait = now, 0.0, 0.0
        return StepTime(
            seconds=seconds,
            data_wait=waited,
            tokens_per_second=tokens / seconds,
            smooth_tokens_per_second=self._tokens / self._seconds,
            wait_share=self._waited / self._seconds,
        )


class _QuietStream:
    """A stream that falls silent when what it writes to is closed, gone or full: a lost terminal ends no run."""

    def __init__(self, stream: IO[str] | None) -> None:
        self._stream = stream
        self.encoding = getattr(stream, "encoding", None)  # tqdm draws with blocks where they can be shown

    def write(self, text: str) -> int:
        self._try(lambda stream: stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(lambda stream: stream.flush())

    def columns(self) -> int:
        """Returns the terminal's width, 0 where it tells none or there is no terminal."""
        try:
            return os.get_terminal_size(self.fileno()).columns
        except (OSError, ValueError):
            return 0

    def fileno(self) -> int:
        if self._stream is None:
            raise OSError("the stream is gone")
        return self._stream.fileno()

    def _try(self, action: Callable[[IO[str]], object]) -> object:
        if self._stream is None:
            return None
        try:
            return action(self._stream)
        except (OSError, ValueError):  # ValueError: the stream was closed; UnicodeEncodeError is one too
            self._stream = None
            return None


class ProgressBar:
    """Shows the run on stderr: a bar on a terminal, else plain lines (log files hold no bars).

    Args:
        total: optimizer steps of the whole run.
        initial: steps already done, at a resume.
        enabled: False on every process but the main one.
        stream: where to; stderr by default.
        every_steps: without a terminal, a line at least every so many steps,
        every_seconds: and at least every so many seconds (checked at each step); the first and last step always.
    """

    def __init__(
        self,
        total: int,
        *,
        initial: int = 0,
        enabled: bool = True,
        stream: IO[str] | None = None,
        every_steps: int = 50,
        every_seconds: float = 30.0,
    ) -> None:
        self.total, self.step, self._initial = total, initial, initial
        self._stream = _QuietStream((stream or sys.stderr) if enabled else None)
        self._every_steps, self._every_seconds = every_steps, every_seconds
        self._start = self._line_time = time.monotonic()
        self._line_step = initial
        self._bar = None
        if self._stream.columns():
            self._bar = tqdm(total=total, initial=initial, file=self._stream, dynamic_ncols=True, unit="step")

    def update(self, loss: float, tokens_per_second: float, wait_share: float) -> None:
        """Shows that one more step is done.

        Args:
            loss: of this step.
            tokens_per_second: smoothed, over the global batch.
            wait_share: share of the time that went into waiting for data, in [0, 1].
        """
        self.step += 1
        figures = f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s, data wait {wait_share:.0%}"
        if self._bar is not None:
            self._bar.set_postfix_str(figures, refresh=False)
            self._bar.update()
            return
        now = time.monotonic()
        due = self.step - self._line_step >= self._every_steps or now - self._line_time >= self._every_seconds
        if due or self.step in (self._initial + 1, self.total):
            done = self.step - self._initial
            left = tqdm.format_interval((now - self._start) / done * max(self.total - self.step, 0))
            self.note(f"step {self.step}/{self.total}, {figures}, {left} left")
            self._line_step, self._line_time = self.step, now

    def note(self, text: str) -> None:
        """Writes a line of its own, above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            self._stream.write(text + "\n")
            self._stream.flush()

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
