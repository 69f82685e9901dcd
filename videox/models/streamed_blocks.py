"""Streamed blocks (--stream_blocks): their frozen weights stay in host memory, and are on the GPU only while they run.

The weights of a block are copied to the GPU for each of its runs, in the forward pass and when the backward pass
computes it again. The copy of the next block runs beside the computation, in a stream of its own. Two buffers on the
GPU are used in turn, so that the weights of at most two streamed blocks are there at a time. Outputs and gradients are
bit-identical to those of blocks that stay. On a CPU the same schedule makes plain copies.

A streamed block has to be checkpointed as a whole: otherwise autograd would keep its weights until the backward pass,
when their buffer has those of another block.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from videox.models.recompute import ON_DEVICE
from videox.models.shared_memory import Gather, allocate_shared
from videox.models.side_stream import SideStream

ALIGNED = 256  # bytes; the offset of each tensor in a buffer is a multiple, as in memory that torch allocates on a GPU
UNUSED = 0xFF  # a byte; all floating-point numbers of these bytes are NaN
COPY, USE, RELEASE = "copy", "use", "release"


class Part(NamedTuple):
    """A parameter of a block: the module and the name that have it, and its place in the block's memory."""

    owner: nn.Module
    name: str
    offset: int
    dtype: torch.dtype
    shape: torch.Size

    def of(self, memory: Tensor) -> Tensor:
        """Return the parameter as a view of memory, uint8, that has the block's weights."""
        size = self.dtype.itemsize * self.shape.numel()
        return memory[self.offset : self.offset + size].view(self.dtype).view(self.shape)


class WeightCopies(SideStream):
    """Copies of weights to the device.

    On a CPU a copy is made when it is waited for, the last moment at which a GPU makes it; until then its target has
    NaN. A result is then not finite if it depends on a copy that was not waited for, or on what the copy replaced.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._queued: list[tuple[Tensor, Tensor]] = []

    def start(self, target: Tensor, source: Tensor) -> None:
        """As SideStream.start, of bytes."""
        if self.stream is not None:
            super().start(target, source)
            return
        target.fill_(UNUSED)
        self._queued.append((target, source))

    def wait(self) -> None:
        """As SideStream.wait."""
        super().wait()
        for target, source in self._queued:
            target.copy_(source)
        self._queued.clear()


class BlockStream:
    """Copies the weights of streamed blocks to the device when they run, one block ahead.

    Args:
        memory: of each block, in the order of the forward pass: host memory, uint8, with its frozen weights.
        device: where blocks run.

    Attributes:
        record: takes what is queued, as (COPY, USE or RELEASE, number of the block, number of the buffer), if set.
    """

    def __init__(self, memory: Sequence[Tensor], device: torch.device) -> None:
        self._memory = memory
        size = max(map(Tensor.numel, memory))
        self._buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(ON_DEVICE)]
        self._blocks: list[int | None] = [None] * ON_DEVICE  # in each buffer
        self._copies = WeightCopies(device)
        self._last = 0  # buffer of the block that ran last
        self.record: Callable[[tuple[str, int, int]], None] | None = None

    def forget(self) -> None:
        """Copy every block again before its next use, since weights in host memory have changed."""
        self._blocks = [None] * ON_DEVICE

    @property
    def bytes(self) -> int:
        """Bytes of the weights in host memory."""
        return sum(map(Tensor.numel, self._memory))

    def weights(self, number: int) -> Tensor:
        """Return memory on the device with the weights of a block, uint8, and start copying the block that follows.

        The memory is valid until another block is asked for. In the backward pass that is when the block before is
        computed again: autograd runs the operations of later blocks first, so that nothing uses it any more.
        """
        before = self._blocks[self._last]
        if number not in self._blocks:  # the first block of all, and where the order is another one
            self._copy(number, 1 - self._last)
        self._last = self._blocks.index(number)
        self._copies.wait()
        self._note(USE, number, self._last)
        following = self._following(number, before)
        if following not in self._blocks:
            self._copy(following, 1 - self._last)
        return self._buffers[self._last][: self._memory[number].numel()]

    def _following(self, number: int, before: int | None) -> int:
        """Return the block that is likely to run next."""
        count = len(self._memory)
        if not torch.is_grad_enabled():  # passes without a backward pass follow each other
            return (number + 1) % count
        forwards = before is None or before < number
        if number in (0, count - 1):  # where a pass begins and ends
            forwards = number == 0
        return min(number + 1, count - 1) if forwards else max(number - 1, 0)

    def _copy(self, number: int, buffer: int) -> None:
        """Start copying a block's weights into a buffer, after all computation that was queued until now."""
        if (released := self._blocks[buffer]) is not None:
            self._note(RELEASE, released, buffer)
        self._note(COPY, number, buffer)
        self._blocks[buffer] = number
        memory = self._memory[number]
        self._copies.start(self._buffers[buffer][: memory.numel()], memory)

    def _note(self, what: str, number: int, buffer: int) -> None:
        if self.record is not None:
            self.record((what, number, buffer))


class StreamedForward:
    """The forward pass of a streamed block, which has its frozen weights only while it runs.

    Args:
        block: its forward method is called.
        parts: its frozen parameters.
        stream: which copies them.
        number: of the block in the stream.
    """

    def __init__(self, block: nn.Module, parts: Sequence[Part], stream: BlockStream, number: int) -> None:
        self._forward, self._parts, self._stream, self._number = block.forward, parts, stream, number
        self._is_there = False

    def _weights(self) -> Sequence[Tensor]:
        """Return the block's parameters on the device."""
        memory = self._stream.weights(self._number)
        return [part.of(memory) for part in self._parts]

    def _resting(self) -> Sequence[nn.Parameter | None]:
        """Return what the modules have in place of them while the block does not run."""
        return [None] * len(self._parts)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Give the block its weights; what autograd saves of them are views of the stream's buffer.

        Selective checkpointing counts the operations of a block, which must be equal in both passes. The copies are
        not: there this is entered before the counting begins.
        """
        if self._is_there:
            yield
            return
        weights = self._weights()
        self._is_there = True
        try:
            for part, weight in zip(self._parts, weights, strict=True):
                # the optimizer does not read it: a tensor is enough
                part.owner._parameters[part.name] = weight  # type: ignore[assignment]
            yield
        finally:  # a recomputation ends with an exception of torch's as soon as all that is needed is there
            self._is_there = False
            for part, resting in zip(self._parts, self._resting(), strict=True):
                part.owner._parameters[part.name] = resting

    def __call__(self, *inputs: Any, **named: Any) -> Any:  # noqa: ANN401 - of a block
        """Run the block."""
        with self.on_device():
            return self._forward(*inputs, **named)


def stream_blocks(
    blocks: Sequence[nn.Module], numbers: Collection[int], device: torch.device, gather: Gather
) -> BlockStream:
    """Move the frozen parameters of some blocks to host memory, from where they are copied when a block runs.

    The host memory is page-locked for a GPU, and all processes of a machine share it. The parameters are None in their
    modules while the block does not run, so that they are neither moved, saved nor given to DDP. A collective.

    Args:
        blocks: repeated blocks of a transformer, in order, with their trainable parameters chosen; checkpointed.
        numbers: of the blocks to stream.
        device: where blocks run.
        gather: a collective that returns every process's value.
    """
    chosen = [blocks[number] for number in sorted(numbers)]
    parts = [parts_of(block, lambda parameter: not parameter.requires_grad) for block in chosen]
    sizes = [size_of(of_block) for of_block in parts]
    memory, fills = allocate_shared(sum(sizes), pinned=device.type == "cuda", gather=gather)
    of_blocks, offset = list[Tensor](), 0
    for of_block, size in zip(parts, sizes, strict=True):
        of_blocks.append(memory[offset : offset + size])
        offset += size
        for part in of_block:
            parameter = getattr(part.owner, part.name)
            if fills:
                part.of(of_blocks[-1]).copy_(parameter.detach())
            part.owner.register_parameter(part.name, None)
    gather(None)  # until then the memory of the others may be without values
    stream = BlockStream(of_blocks, device)
    for number, (block, of_block) in enumerate(zip(chosen, parts, strict=True)):
        block.forward = StreamedForward(block, of_block, stream, number)
    return stream


def parts_of(block: nn.Module, chosen: Callable[[nn.Parameter], bool]) -> list[Part]:
    """Return the chosen parameters of a block, one after the other in its memory."""
    parts, offset = list[Part](), 0
    for owner in block.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if chosen(parameter):
                parts.append(Part(owner, name, offset, parameter.dtype, parameter.shape))
                offset += -(-parameter.nbytes // ALIGNED) * ALIGNED
    return parts


def size_of(parts: Sequence[Part]) -> int:
    """Return the bytes of the memory of such parts; 0 of none."""
    if not parts:
        return 0
    last = parts[-1]
    return last.offset + -(-last.dtype.itemsize * last.shape.numel() // ALIGNED) * ALIGNED
