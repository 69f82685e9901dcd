"""The GPU and the host memory that the estimates of a run are made for: of the flags, or of this machine."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from videox.estimate.gpus import DEFAULT_GPU, GPUS, Gpu, gpu_of_device
from videox.estimate.memory import CONTEXT
from videox.estimate.report import GIB

if TYPE_CHECKING:
    import torch

CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")
DEFAULT_MEMORY = 80.0  # GiB of a GPU, where neither --gpu nor --gpu_memory is given


class Room(NamedTuple):
    """The memory of a GPU or of a machine.

    Attributes:
        total: bytes.
        others: bytes that other programs use; 0 where this is not known.
        source: where `total` comes from, in words that follow "GPU" or the number.
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


def host_room(args: argparse.Namespace) -> Room:
    """Return the memory of a machine that the run must fit in: of --host_memory, or of this machine or container."""
    if args.host_memory is not None:
        return Room(float(args.host_memory * GIB), 0.0, "of --host_memory")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = CONTAINER_LIMIT.read_text(encoding="ascii").strip() if CONTAINER_LIMIT.is_file() else ""
    here = min(total, int(limit)) if limit.isdecimal() else total
    return Room(float(here), 0.0, "of this machine, --host_memory states another")


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
