"""The GPU that the estimates of a run are made for: of the flags, or of this machine."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, NamedTuple

from videox.estimate.gpus import DEFAULT_GPU, GPUS, Gpu, gpu_of_device
from videox.estimate.memory import CONTEXT
from videox.estimate.report import GIB

if TYPE_CHECKING:
    import torch

DEFAULT_MEMORY = 80.0  # GiB of a GPU, where neither --gpu nor --gpu_memory is given


class Room(NamedTuple):
    """The memory of a GPU.

    Attributes:
        total: bytes.
        others: bytes that other programs use; 0 where this is not known.
        source: where `total` comes from, in words that follow "GPU".
    """

    total: float
    others: float
    source: str

    @property
    def available(self) -> float:
        """Bytes that this process can have."""
        return self.total - self.others


def gpu_of(args: argparse.Namespace) -> tuple[Gpu, str]:
    """Return the GPU to plan for and its name: of --gpu, of this machine, or an H100."""
    if args.gpu:
        return GPUS[args.gpu], str(args.gpu)
    import torch  # imported where this machine is asked, because it loads slowly

    if torch.cuda.is_available() and (gpu := gpu_of_device(torch.cuda.get_device_name())):
        return gpu, torch.cuda.get_device_name()
    return GPUS[DEFAULT_GPU], DEFAULT_GPU


def memory_limit(args: argparse.Namespace) -> float:
    """Return the bytes of a GPU that the run must fit in: of --gpu_memory, of --gpu, or 80 GiB."""
    if args.gpu_memory is not None:
        return float(args.gpu_memory * GIB)
    return (GPUS[args.gpu].gib if args.gpu else DEFAULT_MEMORY) * GIB


def room_of(args: argparse.Namespace, device: torch.device) -> Room:
    """Return the memory that a running process can use: of the flags if they name a GPU, else of its device."""
    if args.gpu_memory is not None or args.gpu:
        source = "of --gpu_memory" if args.gpu_memory is not None else f"of --gpu {args.gpu}"
        return Room(memory_limit(args), 0.0, source)
    if device.type != "cuda":
        return Room(memory_limit(args), 0.0, "assumed without --gpu and --gpu_memory")
    import torch  # imported here, because a plan for another GPU does not need it

    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device) - CONTEXT
    return Room(float(total), max(others, 0.0), "here")
