"""CPU offload of frozen modules (--low_vram): their weights are on the GPU only while they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module


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

    @contextmanager
    def on_calls(self, following: OffloadedModule | None = None) -> Iterator[torch.nn.Module]:
        """Yield the module, whose weights are on the device only during each call of it.

        A diffusers pipeline calls its modules one after the other, so that one at a time is on the device. A VAE is
        copied for its first encode or decode, and stays until the end of the context: it is small. A module without
        offload stays on the device.

        Args:
            following: a module that is called next: its copy starts with each call.
        """
        if not self.offload:
            yield self.module
            return
        hook = CallHook(self, following)
        add_hook_to_module(self.module, hook)
        try:
            yield self.module
        finally:
            remove_hook_from_module(self.module)
            hook.end()
            self._prefetched = []  # of a call that did not come


class CallHook(ModelHook):
    """Copies an offloaded module to the device before a call, and drops the copies after its forward method.

    diffusers' pipelines take the device from the hook, and call pre_forward before a VAE's encode and decode.
    """

    def __init__(self, offloaded: OffloadedModule, following: OffloadedModule | None = None) -> None:
        self.execution_device = offloaded.device
        self._offloaded, self._following = offloaded, following
        self._use = ExitStack()
        self._in_use = False

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:  # noqa: ANN401, ARG002
        """Copy the weights, and start to copy those of the module that follows."""
        if not self._in_use:
            self._use.enter_context(self._offloaded.on_device())
            self._in_use = True
        if self._following is not None:
            self._following.prefetch()
        return args, kwargs

    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:  # noqa: ANN401, ARG002
        """Drop the copies and return the output."""
        self.end()
        return output

    def end(self) -> None:
        """Drop the copies, if there are any."""
        self._in_use = False
        self._use.close()


class OffloadedTransformer(OffloadedModule):
    """An offloaded module that is copied to the device block by block where it does not fit as a whole.

    Args:
        module: as OffloadedModule.
        blocks: of the module, in the order of its forward pass.
        device: as OffloadedModule.
        fits: called with its bytes at each use: whether they fit on the device as a whole.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        blocks: Sequence[torch.nn.Module],
        device: torch.device,
        fits: Callable[[int], bool],
    ) -> None:
        super().__init__(module, device, offload=True)
        self._fits = fits
        self._blocks = [OffloadedModule(block, device, offload=True) for block in blocks]
        self._others = OffloadedModule(without_blocks(module, blocks), device, offload=True)

    @contextmanager
    def on_device(self) -> Iterator[torch.nn.Module]:
        """Yield the module to be called: its weights are on the device, or are copied when a block runs."""
        if self._uses or self._fits(sum(weight.nbytes for _, weight in self._host_weights)):
            with super().on_device() as module:
                yield module
            return
        with ExitStack() as stack:
            stack.enter_context(self._others.on_device())
            for block, following in zip_longest(self._blocks, self._blocks[1:]):
                stack.enter_context(block.on_calls(following))
            yield self.module


def without_blocks(module: torch.nn.Module, blocks: Sequence[torch.nn.Module]) -> torch.nn.Module:
    """Return a module with the same parameters and buffers, but for those of the blocks."""
    inside = {id(tensor) for block in blocks for tensor in (*block.parameters(), *block.buffers())}
    others = torch.nn.Module()
    for name, parameter in module.named_parameters():
        if id(parameter) not in inside:
            others.register_parameter(name.replace(".", "_"), parameter)
    for name, buffer in module.named_buffers():
        if id(buffer) not in inside:
            others.register_buffer(name.replace(".", "_"), buffer)
    return others
