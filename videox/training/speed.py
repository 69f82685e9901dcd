"""Sets up attention kernel, activation checkpointing and compilation of a transformer from the flags."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from videox.distributed.accelerator import compute_dtype
from videox.distributed.collectives import run_on_all, run_on_main
from videox.estimate.activation_choice import choice_lines
from videox.estimate.report import GIB
from videox.models import attention_backend as kernels
from videox.models.activation_checkpoint import checkpoint_blocks
from videox.models.activation_offload import HostOffload
from videox.models.attention_backend import AttentionShape, Trial
from videox.models.compiled_blocks import compile_blocks
from videox.models.recompute import Recompute
from videox.run.checkpoint import read_manifest
from videox.training.context import Context
from videox.training.planned_gpu import memory_limit
from videox.training.run_memory import Launch, RunMemory, chooser, largest_micro_batches, zero_settings
from videox.training.schedule import Schedule

FACT = "attention_backend"  # name in a checkpoint's manifest
SMALL_TOKENS = 256  # of the trial that decides whether a backend can train here


def prepare_blocks(
    args: argparse.Namespace,
    ctx: Context,
    schedule: Schedule,
    transformer: Any,  # noqa: ANN401 - of diffusers
    blocks: Sequence[torch.nn.Module],
) -> None:
    """Choose the attention kernel, set up activation checkpointing, and compile the blocks, as the flags say.

    Args:
        transformer: of diffusers, before a backend shards it.
        blocks: its repeated blocks, in order.
    """
    if args.attention_backend != kernels.NATIVE:
        kernels.use_backend(transformer, choose_attention(args, ctx, schedule, transformer))
    if args.activation_memory:
        checkpoint_blocks(transformer, blocks, automatic_recompute(args, ctx, schedule))
    elif args.gradient_checkpointing_keep or args.offload_activations or args.selective_ac:
        recompute = Recompute(args.selective_ac or 1.0, args.gradient_checkpointing_keep or "")
        offload = HostOffload(ctx.device) if args.offload_activations else None
        checkpoint_blocks(transformer, blocks, lambda *_: recompute, offload)
    elif args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if args.compile:
        compile_blocks(blocks, _note(ctx))
        ctx.print("compile    repeated blocks; the first steps take minutes")


def _note(ctx: Context) -> Callable[[str], None]:
    """What prints a line, also of a rank that fails alone."""

    def note(line: str) -> None:
        if ctx.is_main:
            ctx.print(line)
        else:
            sys.stderr.write(f"rank {ctx.rank}: {line}\n")

    return note


# ------------------------------------------------------------------------------------------------ attention kernel


def choose_attention(args: argparse.Namespace, ctx: Context, schedule: Schedule, transformer: Any) -> str:  # noqa: ANN401 - of diffusers
    """diffusers' name of the attention kernel: as the flag names it, as the run has chosen before, or the fastest one.

    Raises:
        UserError: the kernel that is named, or that the resumed run has, cannot train here.
    """
    name = args.attention_backend
    config, chosen = transformer.config, list[tuple[str, list[str]]]()
    shape = AttentionShape(1, SMALL_TOKENS, config.num_attention_heads, config.attention_head_dim)
    small = Trial(shape, ctx.device, compute_dtype(ctx.accelerator))
    stored = read_manifest(ctx.checkpoint)["description"].get(FACT) if ctx.checkpoint else None
    if name == kernels.AUTO and stored is None:
        run_on_main(lambda: chosen.append(_measure(schedule, small)), is_main=ctx.is_main, gather=ctx.gather)
        name, lines = ctx.gather(chosen)[0][0]
        ctx.print(*lines)
    elif name == kernels.AUTO:
        name = stored
    found: list[str] = []
    run_on_all(lambda: found.append(kernels.check_backend(name, small)), gather=ctx.gather)
    ctx.print(f"attention  {found[0].lstrip('_')}" + (" (as before)" if stored == found[0] else ""))
    return found[0]


def _measure(schedule: Schedule, small: Trial) -> tuple[str, list[str]]:
    """The fastest kernel for the largest samples of the first epoch, and lines on what was measured."""
    tokens = max(schedule.plan.bucket_tokens())
    shape = small.shape._replace(tokens=min(tokens, kernels.MOST_TOKENS))
    name, times = kernels.fastest_backend(small, Trial(shape, small.device, small.dtype), kernels.CANDIDATES)
    return name, [kernels.describe_times(times, shape)]


def attention_fact(transformer: Any) -> dict[str, str]:  # noqa: ANN401 - of diffusers
    """What a checkpoint's manifest stores of the attention kernel; {} where none was chosen."""
    names = {
        str(getattr(backend, "value", backend))
        for processor in transformer.attn_processors.values()
        if (backend := getattr(processor, "chosen_backend", getattr(processor, "_attention_backend", None)))
    }
    return {FACT: names.pop()} if names else {}


# ---------------------------------------------------------------------------------------------- activation memory


def automatic_recompute(args: argparse.Namespace, ctx: Context, schedule: Schedule) -> Callable[[int, int], Recompute]:
    """What to recompute, as a function of samples and tokens; prints it for each bucket.

    Under a backend where ranks have to recompute the same blocks, all buckets get the choice of the largest one.
    """
    limit = memory_limit(args)
    if args.gpu_memory is None and ctx.device.type == "cuda":
        limit = float(torch.cuda.get_device_properties(ctx.device).total_memory)
    limit = min(ctx.gather(limit))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ctx.world_size))
    half = ctx.accelerator.mixed_precision == "bf16"
    launch = Launch(ctx.backend.name, ctx.world_size, local, half, zero_settings(os.environ))
    run = RunMemory(args, schedule.profile, launch, schedule.columns, schedule.settings)
    choose = chooser(run, limit, alone=ctx.backend.recomputes_alone)
    ctx.print(*choice_lines(largest_micro_batches(schedule.plan), choose, limit / GIB, ratios=schedule.plan.ratios))
    return choose
