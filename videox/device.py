"""Transfers between host and device that do not make the host wait for the device.

The host runs ahead of a GPU and queues work for it. Reading a tensor of the GPU, or copying one to it from pageable
memory, makes the host wait until all queued work is done, and then the GPU is idle until new work arrives. Here
tensors are sent from pinned memory, and scalars come back by an asynchronous copy that is read one step later.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from videox.activity import ACTIVITY


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a host tensor on the device; the copy is queued behind the device's work and does not block.

    A tensor that is already on a device is moved with Tensor.to; a copy to the host blocks.
    """
    if tensor.device.type != "cpu":
        return tensor.to(device)
    pinned = tensor.pin_memory() if device.type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)


class DeviceEvent:
    """A point in the device's work queue: it is reached when everything queued so far is done.

    Args:
        device: of the work; on anything but a GPU, work is done immediately, so that the host's clock is used.
        now: the host's clock, in seconds.
    """

    def __init__(self, device: torch.device, now: Callable[[], float] = time.monotonic) -> None:
        self._event: torch.cuda.Event | None = None
        self._time = 0.0
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(torch.cuda.current_stream(device))
        else:
            self._time = now()

    @property
    def on_device(self) -> bool:
        """Whether the time is measured by the device."""
        return self._event is not None

    def wait(self) -> None:
        """Wait until the event is reached; work that was queued later may be unfinished."""
        if self._event is not None:
            self._event.synchronize()

    def since(self, earlier: DeviceEvent, *, reached: bool = False) -> float:
        """Return the seconds from an earlier event to this one; waits for both.

        Args:
            earlier: on the same device.
            reached: both are known to be reached, so that nothing is to wait for.
        """
        if self._event is None or earlier._event is None:
            return self._time - earlier._time
        if not reached:
            self.wait()
        return earlier._event.elapsed_time(self._event) / 1000


class AsyncScalars:
    """Scalars of the device that are being copied to the host.

    Args:
        tensors: scalars, or vectors of them, on the device or on the host.
        device: where they are joined before the copy.
    """

    def __init__(self, *tensors: Tensor, device: torch.device) -> None:
        joined = torch.cat([to_device(tensor.detach(), device).double().reshape(-1) for tensor in tensors])
        self._on_host = torch.empty(len(joined), dtype=torch.float64, pin_memory=device.type == "cuda")
        self._on_host.copy_(joined, non_blocking=True)
        self.event = DeviceEvent(device)

    def read(self) -> list[float]:
        """Return the values in order; waits for the copy, which is finished if one step has passed."""
        self.event.wait()
        return self._on_host.tolist()


class Span(NamedTuple):
    """The work of a phase: its name, when the device began and ended it, and the place of the span around it (-1)."""

    name: str
    begin: DeviceEvent
    end: DeviceEvent | None
    outer: int


class PhaseTimes:
    """The device's time in each phase of a step; measured by events, for which the host does not wait.

    Args:
        device: of the work.
        now: the host's clock, where the device has none.
    """

    def __init__(self, device: torch.device, now: Callable[[], float] = time.monotonic) -> None:
        self._device, self._now = device, now
        self._spans: list[Span] = []
        self._open: list[int] = []

    @contextmanager
    def active(self) -> Iterator[None]:
        """Measure the phases inside, of this process."""
        _TIMES.append(self)
        try:
            yield
        finally:
            _TIMES.remove(self)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what runs inside."""
        place, outer = len(self._spans), self._open[-1] if self._open else -1
        self._spans.append(Span(name, DeviceEvent(self._device, self._now), None, outer))
        self._open.append(place)
        try:
            yield
        finally:
            self._open.pop()
            self._spans[place] = self._spans[place]._replace(end=DeviceEvent(self._device, self._now))

    def take(self) -> list[Span]:
        """Return the spans since the last call, for `seconds_by_phase`. Must be called outside all phases."""
        spans, self._spans = self._spans, []
        return spans


_TIMES: list[PhaseTimes] = []  # the ones that measure this process


def seconds_by_phase(spans: Sequence[Span]) -> dict[str, float]:
    """Return the device's seconds in each phase, without those of the phases inside it.

    Args:
        spans: whose work the device has done.
    """
    seconds: dict[str, float] = {}
    for span in spans:
        if span.end is None:
            continue
        spent = span.end.since(span.begin, reached=True)
        seconds[span.name] = seconds.get(span.name, 0.0) + spent
        if span.outer >= 0:
            outer = spans[span.outer].name
            seconds[outer] = seconds.get(outer, 0.0) - spent
    return seconds


@contextmanager
def memory_phase(name: str) -> Iterator[None]:
    """Name what runs inside: for out-of-memory errors, for the times of a step, and for the watchdog.

    In the message the innermost name counts. The error keeps its type, so that code which handles
    torch.OutOfMemoryError goes on to do so; videox.training.memory_check turns one that ends the run into a line with
    this name.

    Args:
        name: for example "the VAE" or "the backward pass".
    """
    try:
        with ExitStack() as stack:
            stack.enter_context(ACTIVITY.section(name))
            for times in _TIMES:
                stack.enter_context(times.phase(name))
            yield
    except torch.OutOfMemoryError as error:
        error.phase = getattr(error, "phase", name)  # type: ignore[attr-defined]
        raise
