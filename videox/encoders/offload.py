"""CPU offload of frozen encoders (--low_vram): their weights are on the GPU only while they are used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class OffloadedModule:
    """A frozen module whose weights are stored in host memory and copied to the device for each use.

    Frozen weights never change, so nothing is copied back: the device copies are dropped, and the module's tensors
    point at the host weights again. With a GPU the host weights are pinned, for copies at the full bandwidth of the
    bus, and copied in a separate stream: a module that is prefetched while another one computes is copied during that
    computation.

    Args:
        module: a module on the CPU; it is frozen.
        device: the device that it computes on.
        offload: False keeps it on the device permanently.
    """

    def __init__(self, module: torch.nn.Module, device: torch.device, offload: bool) -> None:
        self.module = module.requires_grad_(False).eval()
        self.device = device
        self.offload = offload
        self._uses = 0
        self._prefetched: list[torch.Tensor] = []
        self._stream = torch.cuda.Stream(device) if offload and device.type == "cuda" else None
        if not offload:
            module.to(device)
            return
        if device.type == "cuda":
            for tensor in (*module.parameters(), *module.buffers()):
                # Weights shared by the machine's processes are pinned already (load_frozen); pin_memory would copy
                # them, and each process would have its own.
                if not tensor.is_pinned():
                    tensor.data = tensor.data.pin_memory()
        self._host_weights = [(tensor, tensor.data) for tensor in (*module.parameters(), *module.buffers())]

    def prefetch(self) -> None:
        """Start copying the weights to the device, for on_device to find them there; a second call does nothing."""
        if not self.offload or self._uses or self._prefetched:
            return
        if self._stream is None:
            self._prefetched = [weight.to(self.device, non_blocking=True) for _, weight in self._host_weights]
            return
        # Allocated in the compute stream's memory pool, so that memory which the computation freed can be reused. Its
        # last kernels may still use that memory: the copy stream waits for them.
        copies = [torch.empty_like(weight, device=self.device) for _, weight in self._host_weights]
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for copy, (_, weight) in zip(copies, self._host_weights, strict=True):
                copy.copy_(weight, non_blocking=True)
                # If the module is never used, the copy is freed while the copy stream may still write to it.
                copy.record_stream(self._stream)
        self._prefetched = copies

    @contextmanager
    def on_device(self) -> Iterator[torch.nn.Module]:
        """Yield the module on its device; after the outermost use an offloaded module occupies no device memory."""
        self.prefetch()
        self._uses += 1
        try:
            if self._prefetched:
                if self._stream is not None:
                    torch.cuda.current_stream(self.device).wait_stream(self._stream)
                for (tensor, _), copy in zip(self._host_weights, self._prefetched, strict=True):
                    tensor.data = copy
                self._prefetched = []
            yield self.module
        finally:
            self._uses -= 1
            if self.offload and not self._uses:
                for tensor, weight in self._host_weights:
                    tensor.data = weight
