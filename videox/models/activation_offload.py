"""Offload of block inputs to the host (--offload_activations): they are on the GPU only while they are used.

A checkpointed block saves its inputs for the backward pass. The latents' tokens, its first input, are copied to pinned
host memory during the forward pass and back before the backward pass needs them, in a stream of their own, so that the
copies run during the computation of other blocks. On a CPU the same path makes plain copies.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from videox.models.side_stream import SideStream


class HostBuffers:
    """Host memory that is used again: as many buffers as inputs are on the host at the same time.

    Args:
        pinned: page-locked memory, from which a GPU copies without its host's help.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._free: list[Tensor] = []

    def take(self, size: int) -> Tensor:
        """Return a buffer of at least `size` bytes, uint8; it is nobody else's until it is given back."""
        self._free.sort(key=Tensor.numel)
        for position, buffer in enumerate(self._free):
            if buffer.numel() >= size:
                return self._free.pop(position)
        if self._free:  # replaced by the new one, so that their number does not grow with the number of sizes
            self._free.pop()
        return torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)

    def give_back(self, buffer: Tensor) -> None:
        """Allow a buffer to be used again."""
        self._free.append(buffer)

    def free_bytes(self) -> int:
        """Return the bytes of the buffers that are not in use."""
        return sum(buffer.numel() for buffer in self._free)


class _OnHost:
    """The memory of a tensor, and of views of it, on the host; and its copy on the device once that was started."""

    def __init__(self, memory: Tensor, buffer: Tensor) -> None:
        self.elements, self.dtype, self.device, self.buffer = memory.numel(), memory.dtype, memory.device, buffer
        self.copy: Tensor | None = None
        self.before: weakref.ref[_OnHost] | None = None  # of the block before, whose backward pass follows

    def on_host(self) -> Tensor:
        """Return the values in the buffer, [elements]."""
        return self.buffer[: self.elements * self.dtype.itemsize].view(self.dtype)


@dataclass(frozen=True)
class _View:
    """A tensor in memory that is on the host."""

    memory: _OnHost
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class HostOffload:
    """Moves the first inputs of checkpointed blocks to the host until the backward pass.

    The values come back bit-identical, with the same strides. Copies of both directions run in one stream, in the
    order in which they are queued, so that a buffer is read before it is written again.

    Args:
        device: of the activations.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffers = HostBuffers(pinned=device.type == "cuda")
        self.moved_bytes = 0  # to the host, since the start
        self._copies = SideStream(device)
        self._last: weakref.ref[_OnHost] | None = None

    def around(self, moved: Tensor) -> AbstractContextManager[object]:
        """Return a context for a non-reentrant checkpoint, in which saving `moved` copies it to the host.

        The inputs of the checkpoint are all that autograd saves in it. Those that are views of the same memory move
        with it, as the text in HunyuanVideo; the others stay where they are, since all blocks share them.
        """
        storage = moved.untyped_storage()
        # not a small part of something large, which other tensors may need
        address = storage.data_ptr() if storage.nbytes() <= 2 * moved.numel() * moved.element_size() else 0
        found: list[_OnHost] = []

        def pack(tensor: Tensor) -> _View | Tensor:
            if not address or tensor.untyped_storage().data_ptr() != address:
                return tensor
            if not found:
                found.append(self._to_host(tensor))
            return _View(found[0], tensor.shape, tensor.stride(), int(tensor.storage_offset()))

        def unpack(packed: _View | Tensor) -> Tensor:
            return packed if isinstance(packed, Tensor) else self._to_device(packed)

        return saved_tensors_hooks(pack, unpack)

    def _to_host(self, tensor: Tensor) -> _OnHost:
        """Start copying all memory of a tensor to the host."""
        size = tensor.untyped_storage().nbytes()
        memory = tensor.detach().as_strided((size // tensor.element_size(),), (1,), 0)
        packed = _OnHost(memory, self.buffers.take(size))
        # also if the graph is dropped without a backward pass
        weakref.finalize(packed, self.buffers.give_back, packed.buffer)
        self.moved_bytes += size
        self._copies.start(packed.on_host(), memory)
        packed.before, self._last = self._last, weakref.ref(packed)
        return packed

    def _start_copy(self, packed: _OnHost) -> Tensor:
        """Start copying to the device, unless that was done, and return the copy."""
        if packed.copy is None:
            # allocated in the compute stream's memory pool, whose last kernels may still use that memory
            packed.copy = torch.empty(packed.elements, dtype=packed.dtype, device=packed.device)
            self._copies.start(packed.copy, packed.on_host())
        return packed.copy

    def _to_device(self, view: _View) -> Tensor:
        copy = self._start_copy(view.memory)
        self._copies.wait()
        before = view.memory.before() if view.memory.before is not None else None
        if before is not None:  # during the computation of this block
            self._start_copy(before)
        return copy.as_strided(view.shape, view.stride, view.offset)
