"""Serves whoever samples from the average of the steps: an EMA of the float32 weights, divided as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from videox.device import to_device
from videox.errors import MODEL, UserError

CHUNK = 2**26  # numbers read at once; where the backend or another device needs a copy of them, 256 MiB


@dataclass(frozen=True)
class Fp32Params:
    """A process's part of the float32 weights in training: of each tensor one stretch of its elements, in rank order.

    Attributes:
        names: of the trained parameters, in the same order on all processes.
        read: returns this process's part of one, of any shape; it may be a copy.
        write: puts a part's values in place.
        settle: called by all processes before parts are exchanged: drops what was gathered from them.
        publish: called by all processes after parts were exchanged: has the forward pass compute with them.
        divided: parts are not the whole.
        group: the processes among which they are divided, None = all.
    """

    names: Sequence[str]
    read: Callable[[str], Tensor]
    write: Callable[[str, Tensor], object]
    settle: Callable[[], object] = lambda: None
    publish: Callable[[], object] = lambda: None
    divided: bool = False
    group: dist.ProcessGroup | None = None


def decay_at(update: Tensor, decay: float) -> Tensor:
    """Returns what the average keeps of itself in its n-th update, n from 1: float64 scalars, on any device.

    0 in the first update, then n / (9 + n) as long as that is below `decay`: diffusers.training_utils.EMAModel with
    its defaults, so that a short run's average does not remember where it began.
    """
    return (update / (9 + update)).clamp(max=decay) * (update > 1)


class Ema:
    """The exponential moving average of the trained weights: e <- e + (1 - decay) (w - e), elementwise, in float32.

    Each process averages its own part, so that nothing is gathered. Weights that are not trained are no part of it.

    Args:
        masters: the weights in training; the average begins as they are.
        decay: at most, see decay_at; 0 to 1.
        device: where the average is kept (None = beside the weights).
    """

    def __init__(self, fp32_params: Fp32Params, *, decay: float, device: torch.device | None = None) -> None:
        self.fp32_params, self.decay = fp32_params, decay
        self.parts = {name: _copy(fp32_params.read(name), device) for name in fp32_params.names}
        self._updates = torch.zeros((), dtype=torch.float64)

    @property
    def updates(self) -> int:
        """Optimizer steps that the average has seen; the host waits for them."""
        return int(self._updates)

    def begin(self) -> None:
        """Takes the weights as they are for the average."""
        self._updates = torch.zeros((), dtype=torch.float64)
        for name, part in self.parts.items():
            part.copy_(self.fp32_params.read(name))

    @torch.no_grad()
    def update(self, applied: Tensor) -> None:
        """Moves the average towards the weights after a step. Waits for the device only if kept elsewhere.

        Args:
            applied: boolean scalar, the step moved the weights; else the average stays, to the bit.
        """
        self._updates = to_device(self._updates, applied.device) + applied
        moves = ((1 - decay_at(self._updates, self.decay)) * applied).float()
        for names in _chunks(self.parts):
            parts = [self.parts[name] for name in names]
            move = to_device(moves, parts[0].device)
            weights = [self.fp32_params.read(name).to(part.device) for name, part in zip(names, parts, strict=True)]
            torch._foreach_lerp_(parts, weights, [move] * len(parts))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Computes and gathers with the average inside: it changes places with the weights, to the bit, and back.

        All processes enter and leave together. After an exception the weights are back, but nothing that needs the
        other processes is done: they may wait elsewhere.
        """
        self._exchange()
        try:
            self.fp32_params.publish()
            yield
        finally:
            self._exchange()
        self.fp32_params.publish()

    @torch.no_grad()
    def _exchange(self) -> None:
        self.fp32_params.settle()
        for name, part in self.parts.items():
            weights = self.fp32_params.read(name).to(part.device, copy=True)
            self.fp32_params.write(name, part)
            part.copy_(weights)

    @torch.no_grad()
    def load(self, stored: Mapping[str, Tensor], updates: int) -> None:
        """Takes an average that was saved, at any number of processes; only this process's parts are read.

        Args:
            stored: whole tensors by name, e.g. StoredTensors.
            updates: that it had seen.

        Raises:
            UserError: (MODEL) a trained parameter is missing or of another size.
        """
        mine = [part.numel() for part in self.parts.values()]
        ranks = self._gather(mine)
        for at, (name, part) in enumerate(self.parts.items()):
            total = sum(sizes[at] for sizes in ranks)
            # ZeRO-3 fills the last parts up to equal sizes
            if name not in stored or not 0 <= total - stored[name].numel() < len(ranks):
                found = f"has {stored[name].numel()} numbers in {name}" if name in stored else f"lacks {name}"
                raise UserError("EMA", found, "resume with the model and flags it was saved with", MODEL)
            begin = sum(sizes[at] for sizes in ranks[: self._rank()])
            values = stored[name].reshape(-1)[begin : begin + mine[at]]
            part.view(-1)[: values.numel()].copy_(values)
        self._updates = torch.tensor(float(updates), dtype=torch.float64)

    def _gather(self, sizes: list[int]) -> list[list[int]]:
        if not self.fp32_params.divided:
            return [sizes]
        gathered: list[list[int]] = [[] for _ in range(dist.get_world_size(self.fp32_params.group))]
        dist.all_gather_object(gathered, sizes, group=self.fp32_params.group)
        return gathered

    def _rank(self) -> int:
        return dist.get_rank(self.fp32_params.group) if self.fp32_params.divided else 0


def _copy(part: Tensor, device: torch.device | None) -> Tensor:
    return part.detach().to(device or part.device, torch.float32, copy=True).contiguous()


def _chunks(parts: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Yields the names of the parts that are not empty, as many as hold CHUNK numbers, or one."""
    names: list[str] = []
    size = 0
    for name, part in parts.items():
        if names and size + part.numel() > CHUNK:
            yield names
            names, size = [], 0
        if part.numel():
            names.append(name)
            size += part.numel()
    if names:
        yield names
