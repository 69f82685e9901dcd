"""Serves --low_vram: frozen encoders that occupy the accelerator only while they are used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class RestingModule:
    """A frozen module whose weights rest in host memory and are copied to the device for each use.

    Frozen weights never change, so nothing is copied back: the device's copies are dropped and the module points at
    the resting weights again. With a GPU the resting weights are pinned, for copies at the bus's full rate.

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
        if not rests:
            module.to(device)
            return
        if device.type == "cuda":
            for tensor in (*module.parameters(), *module.buffers()):
                if not tensor.is_pinned():  # what the machine's processes share is pinned where it lies
                    tensor.data = tensor.data.pin_memory()
        self._resting = [(tensor, tensor.data) for tensor in (*module.parameters(), *module.buffers())]

    @contextmanager
    def awake(self) -> Iterator[torch.nn.Module]:
        """Yields the module on its device; after the outermost use a resting module holds no device memory."""
        self._uses += 1
        try:
            if self.rests and self._uses == 1:
                for tensor, resting in self._resting:
                    tensor.data = resting.to(self.device, non_blocking=True)
            yield self.module
        finally:
            self._uses -= 1
            if self.rests and not self._uses:
                for tensor, resting in self._resting:
                    tensor.data = resting
