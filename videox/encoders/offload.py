"""Serves --low_vram: frozen encoders that occupy the accelerator only while they are used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class OffloadedModule:
    """A frozen module whose weights rest in host memory and are copied to the device for each use.

    Frozen weights never change, so nothing is copied back: the device's copies are dropped and the module points at
    the resting weights again. With a GPU the resting weights are pinned, for copies at the bus's full rate, and are
    copied in a stream of their own: one that is called while another module computes comes beside that computation.

    Args:
        module: on the CPU; it is frozen.
        device: where it computes.
        rests: False keeps it on the device for good.
    """

    def __init__(self, module: torch.nn.Module, device: torch.device, rests: bool) -> None:
        self.module = module.requires_grad_(False).eval()
        self.device = device
        self.rests = rests
        self._uses = 0
        self._coming: list[torch.Tensor] = []
        self._stream = torch.cuda.Stream(device) if rests and device.type == "cuda" else None
        if not rests:
            module.to(device)
            return
        if device.type == "cuda":
            for tensor in (*module.parameters(), *module.buffers()):
                if not tensor.is_pinned():  # what the machine's processes share is pinned where it lies
                    tensor.data = tensor.data.pin_memory()
        self._resting = [(tensor, tensor.data) for tensor in (*module.parameters(), *module.buffers())]

    def prefetch(self) -> None:
        """Begins to copy the weights to the device, for `awake` to find them there; a second call changes nothing."""
        if not self.rests or self._uses or self._coming:
            return
        if self._stream is None:
            self._coming = [resting.to(self.device, non_blocking=True) for _, resting in self._resting]
            return
        # Their memory is the computation's own, so that what it has given back can be used: the copy waits for that.
        there = [torch.empty_like(resting, device=self.device) for _, resting in self._resting]
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for copy, (_, resting) in zip(there, self._resting, strict=True):
                copy.copy_(resting, non_blocking=True)
                copy.record_stream(self._stream)  # should nobody wake the module
        self._coming = there

    @contextmanager
    def on_device(self) -> Iterator[torch.nn.Module]:
        """Yields the module on its device; after the outermost use a resting module holds no device memory."""
        self.prefetch()
        self._uses += 1
        try:
            if self._coming:
                if self._stream is not None:
                    torch.cuda.current_stream(self.device).wait_stream(self._stream)
                for (tensor, _), copy in zip(self._resting, self._coming, strict=True):
                    tensor.data = copy
                self._coming = []
            yield self.module
        finally:
            self._uses -= 1
            if self.rests and not self._uses:
                for tensor, resting in self._resting:
                    tensor.data = resting
