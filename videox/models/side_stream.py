"""Copies between a device and its host in a stream of their own, beside the computation."""

from __future__ import annotations

import torch
from torch import Tensor


class SideStream:
    """A stream for copies between host and device, which are made in the order in which they are started.

    On a CPU a copy is made at once.

    Args:
        device: of the tensors that are not on the host.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, target: Tensor, source: Tensor) -> None:
        """Copy after all computation that was queued until now; what is on the device is not reused before."""
        if self.stream is None:
            target.copy_(source)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
        (source if source.device.type == "cuda" else target).record_stream(self.stream)

    def wait(self) -> None:
        """Let the computation that is queued from now on wait for all copies that were started."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
