"""Serves machines with several processes: what never changes, such as a text encoder, lies in host memory once."""

from __future__ import annotations

import mmap
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from videox.models.component import Component, load_part

ALIGNED = 64  # bytes; each tensor begins at a multiple


class Place(NamedTuple):
    """Where a tensor lies in shared memory: first byte, dtype, shape."""

    begin: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Offer(NamedTuple):
    """Shared memory that another process can open: who holds it, under which descriptor, its bytes and tensors."""

    pid: int
    descriptor: int
    size: int
    places: Mapping[str, Place]


def load_frozen(
    model_class: Any,  # noqa: ANN401 - of diffusers or transformers
    part: Component,
    dtype: torch.dtype,
    *,
    pinned: bool,
    gather: Callable[[Any], list[Any]],
) -> nn.Module:
    """Returns load_part(model_class, part, dtype), its weights once in the memory of each machine.

    Weights that are used as they are stored need nothing: loading maps their files, and every process sees the
    same pages. Weights to be cast, or to be pinned, would be copies in each process: there the first process of a
    machine loads them and moves them, tensor by tensor, into anonymous shared memory that the others open. It has no
    name and goes with the last process, however that ends. A collective; nobody may write to the weights.

    Args:
        model_class: of diffusers or transformers.
        part: of the model.
        dtype: of its weights.
        pinned: page-locked for the GPU.
        gather: returns every process's value.

    Raises:
        UserError: as load_part.
    """
    stored = stored_dtype(part.path) if part.tensors is None else part.tensors.dtype()
    mapped = stored == dtype and not pinned
    everybody = gather((_machine(), os.getpid(), mapped))
    together = Counter(machine for machine, _, _ in everybody)
    if max(together.values()) == 1 or all(mapped for _, _, mapped in everybody):
        return load_part(model_class, part, dtype)
    leader = next(pid for machine, pid, _ in everybody if machine == _machine())
    leads, alone = leader == os.getpid(), together[_machine()] == 1
    model = load_part(model_class, part, dtype if leads else stored)
    memory, offer = _move(model) if leads and not alone else (None, None)
    offers = [offer for offer in gather(offer) if offer is not None and offer.pid == leader]
    if not leads:
        memory = _open(offers[0])
        _point(model, memory, offers[0].places)
    gather(None)  # from here on everybody has it open
    if offer is not None:
        os.close(offer.descriptor)
    if pinned and memory is not None:
        _pin(memory)
    return model


def stored_dtype(folder: Path) -> torch.dtype | None:
    """Returns the dtype of most bytes of a folder's safetensors files; None where there are none."""
    sizes: Counter[torch.dtype] = Counter()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                tensor = file.get_tensor(name)  # mapped, not read
                sizes[tensor.dtype] += tensor.nbytes
    return sizes.most_common(1)[0][0] if sizes else None


def _machine() -> str:
    """Returns what processes share exactly if they can open each other's memory: boot and process namespace."""
    if sys.platform != "linux":
        return str(os.getpid())
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()}"


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns parameters and buffers by name, one that has several names under its first."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _move(model: nn.Module) -> tuple[Tensor, Offer]:
    """Moves a model's tensors into new shared memory; returns it, uint8, and what the others need to open it."""
    places, size = {}, 0
    for name, tensor in _tensors(model).items():
        places[name] = Place(size, tensor.dtype, tuple(tensor.shape))
        size += -(-tensor.nbytes // ALIGNED) * ALIGNED
    descriptor = os.memfd_create("videox")
    os.ftruncate(descriptor, size)
    memory = _map(descriptor, size)
    _point(model, memory, places, copy=True)
    return memory, Offer(os.getpid(), descriptor, size, places)


def _open(offer: Offer) -> Tensor:
    """Returns another process's shared memory, uint8."""
    descriptor = os.open(f"/proc/{offer.pid}/fd/{offer.descriptor}", os.O_RDWR)
    try:
        return _map(descriptor, offer.size)
    finally:
        os.close(descriptor)


def _map(descriptor: int, size: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)


def _point(model: nn.Module, memory: Tensor, places: Mapping[str, Place], *, copy: bool = False) -> None:
    """Has a model's tensors lie in shared memory; `copy` puts their values there, else they take what is there."""
    for name, tensor in _tensors(model).items():
        begin, dtype, shape = places[name]
        there = memory[begin : begin + dtype.itemsize * torch.Size(shape).numel()].view(dtype).reshape(shape)
        if copy:
            there.copy_(tensor.detach())
        tensor.data = there


def _pin(memory: Tensor) -> None:
    """Page-locks shared memory where it lies, for this process's GPU; torch's own pinning would make a copy."""
    cudart = torch.cuda.cudart()
    torch.cuda.check_error(cudart.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
