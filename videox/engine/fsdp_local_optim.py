"""Optimizers that do not support DTensor, or whose moments torch does not save: each rank has its own shards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from videox.errors import MODEL, UserError, plural
from videox.optim.registry import OPTIMIZERS, kind_of
from videox.optim.state import load_optimizer_tensors, optimizer_tensors
from videox.weights.safetensors_io import StoredTensors, save_tensors

STEM = "rank-{:05d}-of-{:05d}"


class LocalShards:
    """Plain parameters that share memory with the local shards, for elementwise and blockwise optimizers.

    FSDP1's parameters are plain already, FSDP2's are DTensors. Blocks of 8-bit moments start anew in each shard, so
    saved moments fit only the world size that saved them.

    Args:
        parameters: sharded ones by name, already on their device.
        rank: of this process.
        world_size: number of ranks that they are sharded across.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, rank: int, world_size: int) -> None:
        self._sharded = dict(parameters)
        self.rank, self.world_size = rank, world_size
        self.parameters = {
            name: nn.Parameter(_shard(parameter.detach()), requires_grad=parameter.requires_grad)
            if isinstance(parameter, DTensor)
            else parameter
            for name, parameter in parameters.items()
        }

    def take_gradients(self) -> None:
        """Pass the gradients of the shards on; a rank without a piece of a tensor has no gradient of it."""
        for name, parameter in self._sharded.items():
            local = self.parameters[name]
            local.grad = _shard(parameter.grad) if parameter.grad is not None and local.numel() else None

    def save(self, optimizer: torch.optim.Optimizer, folder: Path) -> None:
        """Write this rank's optimizer state into a folder that all ranks share. Raises OSError, SafetensorError."""
        tensors = {name: tensor.contiguous() for name, tensor in optimizer_tensors(optimizer, self._names()).items()}
        save_tensors(folder, tensors, stem=STEM.format(self.rank, self.world_size))

    def load(self, optimizer: torch.optim.Optimizer, folder: Path) -> None:
        """Load what save wrote, bit-identical. Raises UserError if it does not fit."""
        stored = StoredTensors(folder, STEM.format(self.rank, self.world_size))
        load_optimizer_tensors(optimizer, self._names(), stored)

    def _names(self) -> dict[nn.Parameter, str]:
        return {parameter: name for name, parameter in self.parameters.items()}


def _shard(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def refuse_other_optimizer_state(folder: Path, name: str, world_size: int) -> None:
    """Raise UserError for FSDP optimizer state of another kind of optimizer, or of shards of other sizes.

    Args:
        folder: of a checkpoint, with the optimizer's files.
        name: of videox.optim.registry.OPTIMIZERS.
        world_size: of this launch.

    Raises:
        UserError: (MODEL) with the optimizers or the world size that can resume it.
    """
    found = sorted(path.name for path in folder.glob("rank-00000-of-*.safetensors"))
    saved = f"{folder.parent.name} was saved"
    if bool(found) is not kind_of(name).by_shard:
        compatible = [other for other, kind in OPTIMIZERS.items() if kind.by_shard is bool(found)]
        compatible += ["an optimizer class"] if found else []
        what = f"{name}, but {saved} with another optimizer"
        raise UserError(
            "--optimizer", what, f"resume with the optimizer it began with ({' or '.join(compatible)})", MODEL
        )
    if found and found != [f"{STEM.format(0, world_size)}.safetensors"]:
        processes = int(found[0].removesuffix(".safetensors").rpartition("-")[2])
        of_them = f"{processes} {plural(processes, 'process', 'processes')}"
        what = f"{saved} by {of_them}, and {name} stores its moments per shard"
        raise UserError("--resume_from_checkpoint", what, f"launch {of_them}", MODEL)
