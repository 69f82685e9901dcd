"""Serves whoever sits before a run: how long its steps take, on a bar or in lines that no lost terminal interrupts."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

from tqdm import tqdm


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

    def split(self) -> float:
        """Ends the step, begins the next one, and returns the seconds that it took."""
        now = self._now()
        seconds = max(now - self._start - self._aside, 1e-9)
        self._start, self._aside, self.data_wait = now, 0.0, 0.0
        return seconds

    def count(self, tokens: int, seconds: float, data_wait: float) -> StepTime:
        """Returns the times of a step that has ended; the smoothed ones go on from the steps counted before.

        Args:
            tokens: of the global batch.
            seconds: that it took.
            data_wait: seconds of them, the largest over the ranks.
        """
        self._tokens = self._keep * self._tokens + tokens
        self._seconds = self._keep * self._seconds + seconds
        self._waited = self._keep * self._waited + min(data_wait, seconds)
        return StepTime(
            seconds=seconds,
            data_wait=data_wait,
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

    def update(
        self,
        loss: float,
        tokens_per_second: float,
        wait_share: float,
        mfu: float | None = None,
        stragglers: tuple[float, float] | None = None,
    ) -> None:
        """Shows that one more step is done.

        Args:
            loss: of this step.
            tokens_per_second: smoothed, over the global batch.
            wait_share: share of the time that went into waiting for data, in [0, 1].
            mfu: share of the devices' arithmetic that goes into the model, None where their peak is not known.
            stragglers: share of the time that processes wait for the slowest, measured and as planned; None = unknown.
        """
        self.step += 1
        figures = f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s, data wait {wait_share:.0%}"
        if mfu is not None:
            figures += f", MFU {mfu:.0%}"
        if stragglers is not None:
            figures += f", waiting for the slowest {stragglers[0]:.0%} (planned {stragglers[1]:.0%})"
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
