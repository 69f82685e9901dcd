"""Sets up streamed blocks (--stream_blocks): how many, and what is printed of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from videox.estimate.report import GIB
from videox.models.recompute import ON_DEVICE, select_blocks
from videox.models.streamed_blocks import stream_blocks
from videox.training.argument_parser import AUTO
from videox.training.context import Context
from videox.training.planned_gpu import room_of
from videox.training.speed_flags import ALL


def stream_frozen(args: argparse.Namespace, ctx: Context, blocks: Sequence[nn.Module]) -> None:
    """Stream as many blocks as --stream_blocks says, evenly spaced, and print it; nothing without the flag.

    Args:
        blocks: repeated blocks of the transformer, in order, with their adapters.
    """
    if not args.stream_blocks:
        return
    count = len(blocks) if args.stream_blocks == ALL else args.stream_blocks
    if count == AUTO:
        run = ctx.memory.run
        count = run.streamed(min(ctx.gather(room_of(args, ctx.device).available)))
        run.setup = replace(run.setup, streamed=count)  # so that the estimates of this run are those of what it does
    if not count:
        ctx.print("streaming  no block: by the estimate all of them fit (--stream_blocks auto)")
        return
    numbers = select_blocks(len(blocks), min(count / len(blocks), 1))
    stream = stream_blocks(blocks, numbers, ctx.device, ctx.gather)
    ctx.print(
        f"streaming  {len(numbers)} of {len(blocks)} blocks: their frozen weights rest in {stream.bytes / GIB:.2f} GiB of "
        f"host memory, those of {ON_DEVICE} at a time are on the GPU"
    )
