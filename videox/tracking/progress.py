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

from videox.activity import ACTIVITY


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
            with ACTIVITY.section("waiting for data"):
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


@dataclass(frozen=True, slots=True)
class StepFacts:
    """What else is shown of a step; None = not known.

    Attributes:
        epoch: epochs done, with fraction.
        lr: learning rate of the step.
        memory_gib: peak of the GPU memory of this process.
        mfu: model FLOPs utilization in [0, 1].
        stragglers: fraction of the time that ranks wait for the slowest rank, as measured and as planned.
        seconds_left: until the end of the run; None estimates it from the mean duration of the steps.
    """

    epoch: float | None = None
    lr: float | None = None
    memory_gib: float | None = None
    mfu: float | None = None
    stragglers: tuple[float, float] | None = None
    seconds_left: float | None = None


# tqdm's own format without its time left, which follows the mean of all steps and counts validation as steps
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]"


class ProgressBar:
    """Progress of the run on stderr: a bar on a terminal, plain lines otherwise (e.g. in a log file).

    Args:
        total: number of optimizer steps of the whole run.
        initial: number of optimizer steps already done when the run was resumed.
        enabled: False on every process except the main one.
        stream: output stream, stderr by default.
        every_steps: without a terminal, print a line at most every this many steps,
        every_seconds: and at most every this many seconds. The first and the last step always get a line.
    """

    def __init__(
        self,
        total: int,
        *,
        initial: int = 0,
        enabled: bool = True,
        stream: IO[str] | None = None,
        every_steps: int = 5,
        every_seconds: float = 30.0,
    ) -> None:
        self.total, self.step, self._initial = total, initial, initial
        self._stream = _QuietStream((stream or sys.stderr) if enabled else None)
        self._every_steps, self._every_seconds = every_steps, every_seconds
        self._start = self._line_time = time.monotonic()
        self._line_step = initial
        self._bar = None
        if self._stream.columns():
            self._bar = tqdm(
                total=total, initial=initial, file=self._stream, dynamic_ncols=True, unit="step", bar_format=BAR
            )

    def update(
        self,
        loss: float,
        tokens_per_second: float,
        wait_share: float,
        facts: StepFacts = StepFacts(),
    ) -> None:
        """Show that one more step is done.

        Args:
            loss: loss of this step.
            tokens_per_second: smoothed throughput over the global batch.
            wait_share: fraction of the time spent waiting for data, in [0, 1].
            facts: what else is known of the step.
        """
        self.step += 1
        now = time.monotonic()
        parts = [f"loss {loss:.4f}", f"{tokens_per_second:,.0f} tokens/s", f"data wait {wait_share:.0%}"]
        parts = [*_before(facts), *parts, *_after(facts)]
        left = facts.seconds_left
        if left is None:
            left = (now - self._start) / (self.step - self._initial) * max(self.total - self.step, 0)
        remaining = f"{tqdm.format_interval(left)} left"
        if self._bar is not None:  # the time left first: a narrow terminal cuts off the end
            self._bar.set_postfix_str(", ".join([remaining, *parts]), refresh=False)
            self._bar.update()
            return
        due = self.step - self._line_step >= self._every_steps and now - self._line_time >= self._every_seconds
        if due or self.step in (self._initial + 1, self.total):
            self.note(f"step {self.step}/{self.total}, {', '.join(parts)}, {remaining}")
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


def _before(facts: StepFacts) -> list[str]:
    """Return what is shown before the loss of a step."""
    parts = [] if facts.epoch is None else [f"epoch {facts.epoch:.2f}"]
    return parts if facts.lr is None else [*parts, f"LR {facts.lr:.2e}"]


def _after(facts: StepFacts) -> list[str]:
    """Return what is shown after the throughput of a step."""
    parts = [] if facts.memory_gib is None else [f"GPU memory {facts.memory_gib:.1f} GiB"]
    if facts.mfu is not None:
        parts.append(f"MFU {facts.mfu:.0%}")
    if facts.stragglers is not None:
        measured, planned = facts.stragglers
        parts.append(f"waiting for the slowest rank {measured:.0%} (planned {planned:.0%})")
    return parts
