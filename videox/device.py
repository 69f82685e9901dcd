"""Serves both training loops: what goes to the device and what comes back from it, without the host's waiting for it.

The host runs ahead of a GPU and hands it work. Whoever reads a tensor of the GPU, or copies one there from pageable
memory, makes the host wait until all of that work is done, and the GPU idle until there is new work. Here tensors
go out from pinned memory, and numbers come back by a copy of their own, to be read a step later.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a host tensor on the device; the copy is made behind the work that the device has, and nobody waits.

    One that is on a device already is moved as torch moves it, and to the host the copy is waited for.
    """
    if tensor.device.type != "cpu":
        return tensor.to(device)
    pinned = tensor.pin_memory() if device.type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)


class DeviceEvent:
    """A moment of the device's work: when all that was handed to it so far is done.

    Args:
        device: of the work; what is not a GPU has no work behind the host's, so that the host's clock is right.
        now: that clock, seconds.
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
        """Whether it is the device's clock that tells it."""
        return self._event is not None

    def wait(self) -> None:
        """Returns once the moment is over; the device need not have done what was handed to it later."""
        if self._event is not None:
            self._event.synchronize()

    def since(self, earlier: DeviceEvent) -> float:
        """Returns the seconds from an earlier moment to this one; waits for both."""
        if self._event is None or earlier._event is None:
            return self._time - earlier._time
        self.wait()
        return earlier._event.elapsed_time(self._event) / 1000


class AsyncScalars:
    """Some numbers of the device on their way to the host.

    Args:
        tensors: scalars, on the device or on the host.
        device: where they are brought together.
    """

    def __init__(self, *tensors: Tensor, device: torch.device) -> None:
        there = torch.stack([to_device(tensor.detach(), device).double() for tensor in tensors])
        self._here = torch.empty(len(tensors), dtype=torch.float64, pin_memory=device.type == "cuda")
        self._here.copy_(there, non_blocking=True)
        self.moment = DeviceEvent(device)

    def read(self) -> list[float]:
        """Returns them; waits until they have come, which a step later they have."""
        self.moment.wait()
        return self._here.tolist()


@contextmanager
def memory_phase(name: str) -> Iterator[None]:
    """Name what runs inside, for the message of an out-of-memory error; the innermost name counts.

    The error keeps its type, so that code which handles torch.OutOfMemoryError goes on to do so;
    videox.training.memory_check turns one that ends the run into a line with this name.

    Args:
        name: for example "the VAE" or "the backward pass".
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        error.phase = getattr(error, "phase", name)  # type: ignore[attr-defined]
        raise
