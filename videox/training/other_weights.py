"""The transformer that a run does not train but samples with: in host memory, where it fits."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator

from videox.distributed.accelerator import compute_dtype
from videox.encoders.encode import LazyEncoders
from videox.encoders.offload import OffloadedModule
from videox.models.configured import Component
from videox.training.context import Context
from videox.training.validation_flags import prompts_of

GB = 1e9
SAMPLING_ROOM = 8 * 2**30  # bytes that the tensors of a sample clip may need beside the weights


def prepare(args: argparse.Namespace, ctx: Context, component: Component, other: LazyEncoders[OffloadedModule]) -> str:
    """Load the other transformer if all processes sample together; all ranks call it.

    Where the main process samples alone, it loads the weights for its first clip.

    Args:
        component: the other transformer.
        other: loads it.

    Returns:
        Why there are no sample clips: the weights do not fit in host memory. "" if they do, or without prompts.
    """
    if not prompts_of(args):
        return ""
    numbers = sum(math.prod(shape) for shape in component.source().shapes().values())
    needed, free = numbers * compute_dtype(ctx.accelerator).itemsize, min(ctx.gather(free_host_memory()))
    if needed > free:
        return (
            f"the other expert needs {needed / GB:.1f} GB of host memory, {free / GB:.1f} GB are free; sample the "
            "exported weights with scripts/sample.py on a larger machine"
        )
    if not ctx.backend.full_weights:
        other.load(ctx.gather)
    return ""


def free_host_memory() -> int:
    """Return the bytes of host memory that programs can still allocate, without swapping."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    return 1024 * int(meminfo["MemAvailable"].split()[0])


def fits_beside(accelerator: Accelerator) -> Callable[[int], bool]:
    """Return a function: whether so many bytes of weights fit on the device beside the training; it prints if not.

    On a CPU they always do: the weights are there already.
    """
    told = False

    def fits(needed: int) -> bool:
        nonlocal told
        device = accelerator.device
        if device.type != "cuda":
            return True
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        enough = needed + SAMPLING_ROOM <= free
        if not enough and not told:
            told = True
            accelerator.print(
                f"sample clips: the other expert ({needed / GB:.1f} GB) does not fit on the GPU beside the training "
                f"({free / GB:.1f} GB are free): it is copied block by block, which takes longer"
            )
        return enough

    return fits
