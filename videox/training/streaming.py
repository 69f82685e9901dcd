"""Sets up streamed blocks (--stream_blocks): which ones, and what is printed of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from videox.estimate.report import GIB
from videox.models.recompute import ON_DEVICE, select_blocks
from videox.models.streamed_blocks import stream_blocks
from videox.models.trained_stream import TrainedStream, stream_trained
from videox.training.argument_parser import AUTO
from videox.training.context import Context
from videox.training.planned_gpu import room_of
from videox.training.speed_flags import ALL


def stream_weights(args: argparse.Namespace, ctx: Context, blocks: Sequence[nn.Module]) -> TrainedStream | None:
    """Stream as many blocks as --stream_blocks says, evenly spaced, and print it; nothing without the flag.

    Args:
        blocks: repeated blocks of the transformer, in order, with their trainable parameters or adapters.

    Returns:
        The stream of blocks that are trained; None with a LoRA, and where no block is streamed.
    """
    if not args.stream_blocks:
        return None
    count = len(blocks) if args.stream_blocks == ALL else args.stream_blocks
    if count == AUTO:
        run = ctx.memory.run
        count = run.streamed(min(ctx.gather(room_of(args, ctx.device).available)))
        run.setup = replace(run.setup, streamed=count)  # so that the estimates of this run are those of what it does
    if not count:
        ctx.print("streaming  no block: by the estimate all of them fit (--stream_blocks auto)")
        return None
    numbers = select_blocks(len(blocks), min(count / len(blocks), 1))
    which = f"streaming  {len(numbers)} of {len(blocks)} blocks"
    there = f"those of {ON_DEVICE} at a time are on the GPU"
    if not args.lora_rank:
        trained = stream_trained(blocks, numbers, ctx.device)
        size = (trained.weights.bytes + trained.gradients.bytes) / GIB
        ctx.print(f"{which}: their weights and gradients rest in {size:.2f} GiB of host memory, {there}")
        return trained
    stream = stream_blocks(blocks, numbers, ctx.device, ctx.gather)
    ctx.print(f"{which}: their frozen weights rest in {stream.bytes / GIB:.2f} GiB of host memory, {there}")
    return None
