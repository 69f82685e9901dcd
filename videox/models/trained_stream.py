"""Streamed blocks that are trained (--stream_blocks without a LoRA): weights and gradients rest in host memory.

Weights are copied to the GPU as those of frozen streamed blocks are (videox.models.streamed_blocks). When the backward
pass of a block ends, all its gradients are moved to host memory at once, where they are the gradients of the block's
parameters, which are in host memory, too. Gradients of a step's earlier micro-batches come back to the GPU and are
added there. Gradients are bit-identical to those of blocks that stay.

Their norms are computed on the GPU, before they leave: the global norm needs no pass over host memory.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from videox.device import DeviceEvent
from videox.models.shared_memory import pin_memory
from videox.models.streamed_blocks import BlockStream, Part, StreamedForward, WeightCopies, parts_of, size_of


class GradientStream:
    """Moves the gradients of streamed blocks to host memory, block by block.

    Args:
        memory: of each block, in the order of the forward pass: host memory for its gradients, uint8.
        device: where blocks run.

    Attributes:
        norms: 2-norm of the gradient of each parameter that has one, scalars on the device.
    """

    def __init__(self, memory: Sequence[Tensor], device: torch.device) -> None:
        self._memory, self._device = memory, device
        self._buffer = torch.empty(max(map(Tensor.numel, memory)), dtype=torch.uint8, device=device)
        self._copies = WeightCopies(device)
        self.norms: dict[nn.Parameter, Tensor] = {}

    @property
    def bytes(self) -> int:
        """Bytes of the gradients in host memory."""
        return sum(map(Tensor.numel, self._memory))

    @torch.no_grad()
    def add(
        self, number: int, parts: Sequence[Part], trained: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]
    ) -> None:
        """Add the gradients of a block's backward pass to those of the parameters, and start moving them to the host.

        Args:
            number: of the block.
            parts: places of the parameters' gradients in the block's memory.
            trained: the block's parameters in host memory; their gradients are views of that memory.
            gradients: of each of them on the device; None where the loss does not depend on it.
        """
        memory = self._memory[number]
        buffer = self._buffer[: memory.numel()]
        self._copies.wait()  # the gradients of the block after this one have left the buffer
        if any(parameter.grad is not None for parameter in trained):  # of the step's earlier micro-batches
            self._copies.start(buffer, memory)
            self._copies.wait()
        found = [n for n, gradient in enumerate(gradients) if gradient is not None]
        sums = [parts[n].of(buffer) for n in found]
        for n, total in zip(found, sums, strict=True):
            gradient = gradients[n]
            assert gradient is not None
            if trained[n].grad is None:
                total.copy_(gradient)
                trained[n].grad = parts[n].of(memory)
            else:
                total.add_(gradient)
        self.norms |= dict(zip((trained[n] for n in found), torch._foreach_norm(sums, 2.0), strict=True))
        self._copies.start(memory, buffer)

    def wait(self) -> None:
        """Make the host wait until all gradients are in its memory."""
        self._copies.wait()
        DeviceEvent(self._device).wait()


class _OnDevice(torch.autograd.Function):
    """The trained parameters of a block: views of its memory on the device, whose gradients go to the host."""

    @staticmethod
    def forward(ctx: Any, forward: TrainedForward, memory: Tensor, *trained: nn.Parameter) -> tuple[Tensor, ...]:  # noqa: ANN401
        del trained  # they are given so that the results need gradients
        ctx.set_materialize_grads(False)
        ctx.streamed = forward
        return tuple(part.of(memory).detach() for part in forward.trained_parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:  # noqa: ANN401
        ctx.streamed.add_gradients(gradients)
        return (None, None, *(None for _ in gradients))


class TrainedForward(StreamedForward):
    """As StreamedForward, of a block with parameters that are trained: they are in host memory while it does not run.

    Args:
        block: its forward method is called.
        parts: all its parameters.
        stream: which copies them.
        number: of the block in both streams.
        gradients: which takes their gradients.
    """

    def __init__(
        self, block: nn.Module, parts: Sequence[Part], stream: BlockStream, number: int, gradients: GradientStream
    ) -> None:
        super().__init__(block, parts, stream, number)
        self._gradients = gradients
        self.at_rest: list[nn.Parameter] = [getattr(part.owner, part.name) for part in parts]
        self._trained = [parameter for parameter in self.at_rest if parameter.requires_grad]
        self.trained_parts = [p for p, rest in zip(parts, self.at_rest, strict=True) if rest.requires_grad]
        self._gradient_parts = parts_of(block, lambda parameter: parameter.requires_grad)

    def _weights(self) -> Sequence[Tensor]:
        memory = self._stream.weights(self._number)
        trained = iter(_OnDevice.apply(self, memory, *self._trained) if self._trained else ())
        pairs = zip(self._parts, self.at_rest, strict=True)
        return [as_autocast(part, next(trained)) if rest.requires_grad else part.of(memory) for part, rest in pairs]

    def _resting(self) -> Sequence[nn.Parameter]:
        return self.at_rest

    def add_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        """Take the gradients of the trained parameters from a backward pass."""
        self._gradients.add(self._number, self._gradient_parts, self._trained, gradients)


def as_autocast(part: Part, weight: Tensor) -> Tensor:
    """Return a parameter of a linear layer as autocast gives it to the layer: cast once for each run of its block.

    Autocast keeps the cast of a leaf, so that the gradients of a layer that runs twice, as the modulation of
    HunyuanVideo's image-to-video does, are added in the dtype of the cast. A streamed parameter is no leaf: without
    this it would be cast twice, and its gradients would be added in float32.
    """
    kind = weight.device.type
    if not torch.is_autocast_enabled(kind) or not isinstance(part.owner, nn.Linear) or weight.dtype != torch.float32:
        return weight
    return weight.to(torch.get_autocast_dtype(kind))


class TrainedStream:
    """The streams of a model's blocks that are trained.

    Args:
        weights, gradients: the streams.
        parameters: of the blocks, in host memory.
    """

    def __init__(self, weights: BlockStream, gradients: GradientStream, parameters: Sequence[nn.Parameter]) -> None:
        self.weights, self.gradients, self.parameters = weights, gradients, parameters


def stream_trained(blocks: Sequence[nn.Module], numbers: Collection[int], device: torch.device) -> TrainedStream:
    """Move all parameters of some blocks to host memory, from where they are copied when a block runs.

    They stay parameters of their modules, in host memory: they are saved, loaded and stepped as any other ones.
    Moving the model to a device or to another dtype does not move them.

    Args:
        blocks: repeated blocks of a transformer, in order, with their trainable parameters chosen; checkpointed.
        numbers: of the blocks to stream.
        device: where blocks run.
    """
    chosen = [blocks[number] for number in sorted(numbers)]
    parts = [parts_of(block, lambda _: True) for block in chosen]
    weights = [_host_memory(size_of(of_block), device) for of_block in parts]
    for block, of_block, memory in zip(chosen, parts, weights, strict=True):
        for part in of_block:
            parameter = getattr(part.owner, part.name)
            moved = part.of(memory).copy_(parameter.detach())
            setattr(part.owner, part.name, nn.Parameter(moved.data, requires_grad=parameter.requires_grad))
        for module in block.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)
        block._apply = lambda *_, block=block, **__: block  # type: ignore[method-assign]
    sizes = [size_of(parts_of(block, lambda parameter: parameter.requires_grad)) for block in chosen]
    stream = BlockStream(weights, device)
    gradients = GradientStream([_host_memory(size, device) for size in sizes], device)
    parameters = list[nn.Parameter]()
    for number, (block, of_block) in enumerate(zip(chosen, parts, strict=True)):
        forward = TrainedForward(block, of_block, stream, number, gradients)
        block.forward = forward
        parameters += forward.at_rest
    return TrainedStream(stream, gradients, parameters)


def _host_memory(size: int, device: torch.device) -> Tensor:
    """Return host memory, uint8 [size], page-locked for a GPU."""
    memory = torch.frombuffer(mmap.mmap(-1, max(size, 1)), dtype=torch.uint8)[:size]
    if device.type == "cuda" and size:
        pin_memory(memory)
    return memory
