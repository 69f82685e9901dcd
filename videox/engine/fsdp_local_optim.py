"""Serves FSDP2 with optimizers that know no divided tensors: each process steps and keeps the shards that it has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from videox.errors import MODEL, UserError
from videox.optim.registry import OPTIMIZERS
from videox.optim.state import load_optimizer_tensors, optimizer_tensors
from videox.weights.safetensors_io import StoredTensors, save_tensors

STEM = "rank-{:05d}-of-{:05d}"


class LocalShards:
    """Plain parameters over the memory of divided ones, for optimizers that work number by number or in blocks.

    Blocks of eight-bit moments begin anew in each shard, so that what is kept of them fits this number of processes.

    Args:
        parameters: divided ones by name, where they lie.
        rank: of this process.
        world_size: processes that divide them.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, rank: int, world_size: int) -> None:
        self._divided = dict(parameters)
        self.rank, self.world_size = rank, world_size
        self.parameters = {
            name: nn.Parameter(_shard(parameter.detach()), requires_grad=parameter.requires_grad)
            for name, parameter in parameters.items()
        }

    def take_gradients(self) -> None:
        """Hands the gradients of the shards on; a process without a piece of a tensor has none of it."""
        for name, parameter in self._divided.items():
            own = self.parameters[name]
            own.grad = _shard(parameter.grad) if parameter.grad is not None and own.numel() else None

    def save(self, optimizer: torch.optim.Optimizer, folder: Path) -> None:
        """Writes what this process keeps into a folder that all share. Raises OSError, SafetensorError."""
        tensors = {name: tensor.contiguous() for name, tensor in optimizer_tensors(optimizer, self._names()).items()}
        save_tensors(folder, tensors, stem=STEM.format(self.rank, self.world_size))

    def load(self, optimizer: torch.optim.Optimizer, folder: Path) -> None:
        """Puts back, to the bit, what save wrote. Raises UserError where it does not fit."""
        stored = StoredTensors(folder, STEM.format(self.rank, self.world_size))
        load_optimizer_tensors(optimizer, self._names(), stored)

    def _names(self) -> dict[nn.Parameter, str]:
        return {parameter: name for name, parameter in self.parameters.items()}


def _shard(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def refuse_other_moments(folder: Path, name: str, world_size: int) -> None:
    """Refuses moments that FSDP2 saved of another kind of optimizer, or of shards of other sizes.

    Args:
        folder: of a checkpoint, with the optimizer's files.
        name: of videox.optim.registry.OPTIMIZERS.
        world_size: processes of this launch.

    Raises:
        UserError: (MODEL) with the way out.
    """
    found = sorted(path.name for path in folder.glob("rank-00000-of-*.safetensors"))
    where = f"{folder.parent.name} was saved"
    if bool(found) is not OPTIMIZERS[name].by_shard:
        alike = [other for other, kind in OPTIMIZERS.items() if kind.by_shard is bool(found)]
        what = f"{name}, and {where} with another optimizer"
        raise UserError("--optimizer", what, f"resume with the one it began with ({' or '.join(alike)})", MODEL)
    if found and found != [f"{STEM.format(0, world_size)}.safetensors"]:
        processes = int(found[0].removesuffix(".safetensors").rpartition("-")[2])
        what = f"{where} by {processes} processes, and {name} keeps its moments by their shards"
        raise UserError("--resume_from_checkpoint", what, f"launch {processes} processes, as then", MODEL)
