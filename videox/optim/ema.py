"""Exponential moving average (EMA) of the float32 trainable parameters, sharded as the parameters are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from videox.device import to_device
from videox.errors import MODEL, UserError

CHUNK = 2**26  # elements that are read at once; if the backend or the device needs a copy of them, it is 256 MiB


@dataclass(frozen=True)
class Fp32Params:
    """A rank's shards of the float32 trainable parameters: of each tensor one range of its elements, in rank order.

    Attributes:
        names: names of the trainable parameters, in the same order on all ranks.
        read: returns this rank's shard of a parameter, of any shape; it may be a copy.
        write: writes values into a shard.
        before_swap: called by all ranks before shards are swapped: drops copies that were gathered from them.
        after_swap: called by all ranks after shards were swapped: makes the forward pass use the new values.
        sharded: the shards are not complete tensors.
        group: the ranks across which the parameters are sharded, None = all.
    """

    names: Sequence[str]
    read: Callable[[str], Tensor]
    write: Callable[[str, Tensor], object]
    before_swap: Callable[[], object] = lambda: None
    after_swap: Callable[[], object] = lambda: None
    sharded: bool = False
    group: dist.ProcessGroup | None = None


def decay_at(update: Tensor, decay: float) -> Tensor:
    """Return the decay of the n-th EMA update, n from 1: float64 scalars, on any device.

    0 in the first update, then n / (9 + n) until that reaches `decay`: diffusers.training_utils.EMAModel with its
    defaults. A short run's EMA therefore does not depend on the initial weights.
    """
    return (update / (9 + update)).clamp(max=decay) * (update > 1)


class Ema:
    """The exponential moving average of the trainable parameters in float32: e <- e + (1 - decay) (w - e).

    Each rank averages its own shards, so nothing is gathered. Frozen parameters have no EMA.

    Args:
        fp32_params: the float32 parameters in training; the EMA starts from their current values.
        decay: maximum decay, 0 to 1; see decay_at.
        device: the device of the EMA (None = the parameters' device).
    """

    def __init__(self, fp32_params: Fp32Params, *, decay: float, device: torch.device | None = None) -> None:
        self.fp32_params, self.decay = fp32_params, decay
        self.shards = {name: _copy(fp32_params.read(name), device) for name in fp32_params.names}
        self._updates = torch.zeros((), dtype=torch.float64)

    @property
    def updates(self) -> int:
        """The number of optimizer steps in the EMA; the host waits for the device."""
        return int(self._updates)

    def reset(self) -> None:
        """Restart the EMA from the current parameters."""
        self._updates = torch.zeros((), dtype=torch.float64)
        for name, shard in self.shards.items():
            shard.copy_(self.fp32_params.read(name))

    @torch.no_grad()
    def update(self, applied: Tensor) -> None:
        """Update the EMA after a step. The host waits for the device only if the EMA is on another device.

        Args:
            applied: boolean scalar, true if the step changed the parameters; if false, the EMA stays bitwise
                unchanged.
        """
        # The count and the weight of the update stay on the device: reading `applied` on the host would make it wait
        # for the step. A step that was not applied has weight 0, and lerp then leaves the EMA as it is.
        self._updates = to_device(self._updates, applied.device) + applied
        update_weight = ((1 - decay_at(self._updates, self.decay)) * applied).float()
        for names in _chunks(self.shards):
            shards = [self.shards[name] for name in names]
            weight = to_device(update_weight, shards[0].device)
            params = [self.fp32_params.read(name).to(shard.device) for name, shard in zip(names, shards, strict=True)]
            torch._foreach_lerp_(shards, params, [weight] * len(shards))

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Swap the EMA and the parameters inside the context, bitwise exactly, for computing or saving with the EMA.

        All ranks enter and leave together. After an exception the parameters are swapped back, but no collective is
        run: the other ranks may be waiting in another one.
        """
        self._swap()
        try:
            self.fp32_params.after_swap()
            yield
        finally:
            self._swap()
        self.fp32_params.after_swap()

    @torch.no_grad()
    def _swap(self) -> None:
        self.fp32_params.before_swap()
        for name, shard in self.shards.items():
            params = self.fp32_params.read(name).to(shard.device, copy=True)
            self.fp32_params.write(name, shard)
            shard.copy_(params)

    @torch.no_grad()
    def load(self, stored: Mapping[str, Tensor], updates: int) -> None:
        """Load a saved EMA, which may be from another number of ranks; only this rank's shards are read.

        Args:
            stored: complete tensors by name, e.g. StoredTensors.
            updates: the number of updates in the saved EMA.

        Raises:
            UserError: (MODEL) a trainable parameter is missing or of another size.
        """
        own_sizes = [shard.numel() for shard in self.shards.values()]
        sizes_by_rank = self._gather(own_sizes)
        for number, (name, shard) in enumerate(self.shards.items()):
            total = sum(sizes[number] for sizes in sizes_by_rank)
            # ZeRO-3 pads the last shard to the size of the others: the sum may be larger, by less than one per rank.
            if name not in stored or not 0 <= total - stored[name].numel() < len(sizes_by_rank):
                what = f"has {stored[name].numel()} elements in {name}" if name in stored else f"lacks {name}"
                raise UserError("EMA", what, "resume with the model and flags it was saved with", MODEL)
            begin = sum(sizes[number] for sizes in sizes_by_rank[: self._rank()])
            values = stored[name].reshape(-1)[begin : begin + own_sizes[number]]
            shard.view(-1)[: values.numel()].copy_(values)
        self._updates = torch.tensor(float(updates), dtype=torch.float64)

    def _gather(self, sizes: list[int]) -> list[list[int]]:
        if not self.fp32_params.sharded:
            return [sizes]
        gathered: list[list[int]] = [[] for _ in range(dist.get_world_size(self.fp32_params.group))]
        dist.all_gather_object(gathered, sizes, group=self.fp32_params.group)
        return gathered

    def _rank(self) -> int:
        return dist.get_rank(self.fp32_params.group) if self.fp32_params.sharded else 0


def _copy(shard: Tensor, device: torch.device | None) -> Tensor:
    return shard.detach().to(device or shard.device, torch.float32, copy=True).contiguous()


def _chunks(shards: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Yield the names of the shards that are not empty, in groups of at most CHUNK elements or of one shard."""
    names: list[str] = []
    size = 0
    for name, shard in shards.items():
        if names and size + shard.numel() > CHUNK:
            yield names
            names, size = [], 0
        if shard.numel():
            names.append(name)
            size += shard.numel()
    if names:
        yield names
