"""Host memory that all processes of a machine share, and frozen models whose weights are in it."""

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

from videox.models.component import load_component
from videox.models.configured import Component
from videox.weights.weight_files import chosen_set

ALIGNED = 64  # bytes; the offset of each tensor is a multiple, as in memory that torch allocates
Gather = Callable[[Any], list[Any]]
# Changes a loaded model in place. The first process of a machine gives it its values (True); the others give it its
# modules alone (False), and use the values of the first.
Change = Callable[[nn.Module, bool], None]


class TensorSlot(NamedTuple):
    """A tensor's position in shared memory: offset of its first byte, dtype, shape."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class SharedBlock(NamedTuple):
    """A block of shared memory that other processes can open: owner, its file descriptor, size in bytes, tensors."""

    pid: int
    descriptor: int
    size: int
    slots: Mapping[str, TensorSlot]


def load_frozen(
    model_class: Any,  # noqa: ANN401 - of diffusers or transformers
    component: Component,
    dtype: torch.dtype,
    *,
    pinned: bool,
    gather: Gather,
    change: Change | None = None,
) -> nn.Module:
    """Return load_component(model_class, component, dtype) with one copy of its weights per machine.

    Weights that are used in their stored dtype need no sharing: loading maps their files, and all processes use the
    same pages of the page cache. Weights that are cast or pinned would be a copy in each process. For these, the first
    process of a machine loads the model and moves it, tensor by tensor, into anonymous shared memory that the others
    open. The memory has no name in the file system and is freed when the last process ends, even if it is killed. A
    collective; the weights must not be written to.

    Args:
        model_class: a class of diffusers or transformers.
        component: the model's files.
        dtype: the dtype of the weights.
        pinned: page-lock the weights for copies to the GPU.
        gather: a collective that returns every process's value.
        change: is given the model in the dtype of its files, and casts and quantises it; None casts it.

    Raises:
        UserError: as load_component.
    """
    stored = stored_dtype(component.path) if component.tensors is None else component.tensors.dtype()
    mapped = stored == dtype and not pinned and change is None
    loaded_in = dtype if change is None else stored
    processes = gather((_machine_id(), os.getpid(), mapped))
    count = Counter(machine for machine, _, _ in processes)
    # The decision must be the same in all processes, since the gathers below are collectives.
    if max(count.values()) == 1 or all(mapped for _, _, mapped in processes):
        model = load_component(model_class, component, loaded_in)
        if change is not None:
            change(model, True)
        return model
    leader = next(pid for machine, pid, _ in processes if machine == _machine_id())
    is_leader, alone = leader == os.getpid(), count[_machine_id()] == 1
    # The other processes load in the stored dtype: that maps the files and allocates nothing, and the weights are
    # replaced by the shared ones below.
    model = load_component(model_class, component, loaded_in if is_leader else stored)
    if change is not None:
        change(model, is_leader)
    memory, block = _move_to_shared(model) if is_leader and not alone else (None, None)
    blocks = [block for block in gather(block) if block is not None and block.pid == leader]
    if not is_leader:
        memory = _open_shared(blocks[0])
        _rebind(model, memory, blocks[0].slots)
    # The descriptor may be closed only after all processes have opened it: it is the memory's only name.
    gather(None)
    if block is not None:
        os.close(block.descriptor)
    if pinned and memory is not None:
        pin_memory(memory)
    return model


def allocate_shared(size: int, *, pinned: bool, gather: Gather) -> tuple[Tensor, bool]:
    """Return memory that all processes of a machine share, uint8 [size], and whether this process has to fill it.

    It is freed when the last process ends. A collective; another one has to follow before the others read the memory.

    Args:
        size: in bytes, equal in all processes.
        pinned: page-lock it for copies to the GPU.
        gather: a collective that returns every process's value.
    """
    local = [pid for machine, pid in gather((_machine_id(), os.getpid())) if machine == _machine_id()]
    is_leader, alone = local[0] == os.getpid(), len(local) == 1
    block = None
    if alone:
        memory = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
    elif is_leader:
        descriptor = _create_shared(size)
        memory, block = _mmap(descriptor, size), SharedBlock(os.getpid(), descriptor, size, {})
    offered = [other for machine, other in gather((_machine_id(), block)) if machine == _machine_id()]
    if not alone and not is_leader:
        memory = _open_shared(next(filter(None, offered)))
    gather(None)  # the descriptor may be closed only after all processes have opened it
    if block is not None:
        os.close(block.descriptor)
    if pinned:
        pin_memory(memory)
    return memory, is_leader


def stored_dtype(folder: Path) -> torch.dtype | None:
    """Return the dtype of most bytes of a folder's weights; None if it has no safetensors files. Raises UserError."""
    sizes: Counter[torch.dtype] = Counter()
    found = chosen_set(folder)
    for path in found.files if found else ():
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                tensor = file.get_tensor(name)  # mapped, not read
                sizes[tensor.dtype] += tensor.nbytes
    return sizes.most_common(1)[0][0] if sizes else None


def _machine_id() -> str:
    """Return an id that is equal for processes that can open each other's memory: boot id and PID namespace."""
    if sys.platform != "linux":
        return str(os.getpid())
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()}"


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name; a tensor with several names is listed under the first."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _move_to_shared(model: nn.Module) -> tuple[Tensor, SharedBlock]:
    """Move a model's tensors into new shared memory; return it (uint8) and the block that other processes open."""
    slots, size = {}, 0
    for name, tensor in _named_tensors(model).items():
        slots[name] = TensorSlot(size, tensor.dtype, tuple(tensor.shape))
        size += -(-tensor.nbytes // ALIGNED) * ALIGNED
    descriptor = _create_shared(size)
    memory = _mmap(descriptor, size)
    _rebind(model, memory, slots, copy=True)
    return memory, SharedBlock(os.getpid(), descriptor, size, slots)


def _create_shared(size: int) -> int:
    """Return the descriptor of new shared memory.

    Unlike a file in /dev/shm, a memfd needs no cleanup after a kill, and a container's limit of /dev/shm does not
    apply to it.
    """
    descriptor = os.memfd_create("videox")
    os.ftruncate(descriptor, size)
    return descriptor


def _open_shared(block: SharedBlock) -> Tensor:
    """Return another process's shared memory, uint8."""
    descriptor = os.open(f"/proc/{block.pid}/fd/{block.descriptor}", os.O_RDWR)
    try:
        return _mmap(descriptor, block.size)
    finally:
        os.close(descriptor)


def _mmap(descriptor: int, size: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)


def _rebind(model: nn.Module, memory: Tensor, slots: Mapping[str, TensorSlot], *, copy: bool = False) -> None:
    """Make a model's tensors views of shared memory; `copy` writes their values there first."""
    for name, tensor in _named_tensors(model).items():
        offset, dtype, shape = slots[name]
        view = memory[offset : offset + dtype.itemsize * torch.Size(shape).numel()].view(dtype).reshape(shape)
        if copy:
            view.copy_(tensor.detach())
        tensor.data = view


def pin_memory(memory: Tensor) -> None:
    """Page-lock shared memory in place for this process's GPU; torch's own pin_memory would make a copy."""
    cudart = torch.cuda.cudart()
    torch.cuda.check_error(cudart.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
