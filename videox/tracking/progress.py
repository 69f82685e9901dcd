"""Step timing and the progress display: a tqdm bar on a terminal, plain log lines elsewhere."""

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
        seconds: duration of the step, without the time inside `StepClock.paused`.
        data_wait: seconds of it that were spent waiting for data.
        tokens_per_second: throughput over the global batch.
        smooth_tokens_per_second: the same, smoothed over the last steps.
        wait_share: fraction of the last steps' time that was spent waiting for data, in [0, 1].
    """

    seconds: float
    data_wait: float
    tokens_per_second: float
    smooth_tokens_per_second: float
    wait_share: float


class StepClock:
    """Measures the duration of steps by the monotonic clock, which does not jump when the system time is changed.

    Smoothed values are ratios of two exponentially decayed sums (tokens and seconds), not averages of ratios: steps
    with very different token counts are then weighted by the time they take, as they are in the run's total.

    Args:
        memory: approximate number of past steps that the smoothed values cover.
        now: function that returns the time in seconds.
    """

    def __init__(self, *, memory: float = 20.0, now: Callable[[], float] = time.monotonic) -> None:
        self._decay, self._now = 1 - 1 / memory, now
        self._tokens = self._seconds = self._waited = 0.0
        self._paused = self.data_wait = 0.0
        self._start = now()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data; `data_wait` is the sum since the step began."""
        start = self._now()
        try:
            yield
        finally:
            self.data_wait += self._now() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside (validation, checkpoint) from the step."""
        start = self._now()
        try:
            yield
        finally:
            self._paused += self._now() - start

    def split(self) -> float:
        """End the step, begin the next one, and return the duration of the ended step in seconds."""
        now = self._now()
        seconds = max(now - self._start - self._paused, 1e-9)
        self._start, self._paused, self.data_wait = now, 0.0, 0.0
        return seconds

    def count(self, tokens: int, seconds: float, data_wait: float) -> StepTime:
        """Return the times of a step that has ended, and update the smoothed values.

        Args:
            tokens: number of tokens in the global batch.
            seconds: duration of the step.
            data_wait: seconds of it that were spent waiting for data, maximum over the ranks.
        """
        self._tokens = self._decay * self._tokens + tokens
        self._seconds = self._decay * self._seconds + seconds
        self._waited = self._decay * self._waited + min(data_wait, seconds)
        return StepTime(
            seconds=seconds,
            data_wait=data_wait,
            tokens_per_second=tokens / seconds,
            smooth_tokens_per_second=self._tokens / self._seconds,
            wait_share=self._waited / self._seconds,
        )


class _QuietStream:
    """A stream that stops writing after the first write error, so that a closed terminal does not end a run."""

    def __init__(self, stream: IO[str] | None) -> None:
        self._stream = stream
        self.encoding = getattr(stream, "encoding", None)  # tqdm reads it to decide between Unicode blocks and ASCII

    def write(self, text: str) -> int:
        self._try(lambda stream: stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(lambda stream: stream.flush())

    def columns(self) -> int:
        """Return the width of the terminal, 0 if there is none or its width is not known."""
        try:
            return os.get_terminal_size(self.fileno()).columns
        except (OSError, ValueError):
            return 0

    def fileno(self) -> int:
        if self._stream is None:
            raise OSError("the stream is closed")
        return self._stream.fileno()

    def _try(self, action: Callable[[IO[str]], object]) -> object:
        if self._stream is None:
            return None
        try:
            return action(self._stream)
        except (OSError, ValueError):  # ValueError: closed stream; also the base class of UnicodeEncodeError
            self._stream = None
            return None


class ProgressBar:
    """Progress of the run on stderr: a bar on a terminal, plain lines otherwise (e.g. in a log file).

    Args:
        total: number of optimizer steps of the whole run.
        initial: number of optimizer steps already done when the run was resumed.
        enabled: False on every process except the main one.
        stream: output stream, stderr by default.
        every_steps: without a terminal, print a line at least every this many steps.
        every_seconds: without a terminal, print a line at least every this many seconds (checked at each step). The
            first and the last step always get a line.
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
        """Show that one more step is done.

        Args:
            loss: loss of this step.
            tokens_per_second: smoothed throughput over the global batch.
            wait_share: fraction of the time spent waiting for data, in [0, 1].
            mfu: model FLOPs utilization in [0, 1], None if the peak FLOPS of the device are not known.
            stragglers: fraction of the time that ranks wait for the slowest rank, as measured and as planned; None if
                not measured.
        """
        self.step += 1
        postfix = f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s, data wait {wait_share:.0%}"
        if mfu is not None:
            postfix += f", MFU {mfu:.0%}"
        if stragglers is not None:
            postfix += f", waiting for the slowest rank {stragglers[0]:.0%} (planned {stragglers[1]:.0%})"
        if self._bar is not None:
            self._bar.set_postfix_str(postfix, refresh=False)
            self._bar.update()
            return
        now = time.monotonic()
        due = self.step - self._line_step >= self._every_steps or now - self._line_time >= self._every_seconds
        if due or self.step in (self._initial + 1, self.total):
            done = self.step - self._initial
            remaining = tqdm.format_interval((now - self._start) / done * max(self.total - self.step, 0))
            self.note(f"step {self.step}/{self.total}, {postfix}, {remaining} left")
            self._line_step, self._line_time = self.step, now

    def note(self, text: str) -> None:
        """Print a separate line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            self._stream.write(text + "\n")
            self._stream.flush()

    def close(self) -> None:
        """Close the bar; it stays visible in its last state."""
        if self._bar is not None:
            self._bar.close()
