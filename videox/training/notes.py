"""Lines on flags and variables whose effect differs from what a user may expect, for a run and a dry run."""

from __future__ import annotations

import argparse
import os

from videox.distributed.backends import requested_engine
from videox.optim.registry import kind_of
from videox.shapes import USUAL
from videox.training.args import optimizer_of, size_policy
from videox.training.data_sources import sources_of
from videox.training.flags import LR_WARMUP_STEPS


def notes(args: argparse.Namespace) -> list[str]:
    """Lines on flags and variables whose effect differs from what a user may expect."""
    lines = [] if args.dry_run and args.dry_run_data else [*sources_of(args).lines]
    policy = size_policy(args, ratios=USUAL)
    ranged = policy.token_length or policy.random_hw_adapt
    if ranged and policy.image_sample_size < policy.video_sample_size:
        sizes = (
            f"--image_sample_size {policy.image_sample_size} is below --video_sample_size {policy.video_sample_size}"
        )
        lines.append(f"{sizes}: sizes still range from {policy.low} to {policy.high}")
    if args.lr_scheduler == "constant" and args.lr_warmup_steps != LR_WARMUP_STEPS:
        lines.append("--lr_warmup_steps has no effect with --lr_scheduler constant; use constant_with_warmup")
    if args.low_vram and not args.latent_cache:
        lines.append(
            "--low_vram copies the text encoder to the GPU for each micro-batch, and the training waits for it: with "
            "--latent_cache each caption is encoded once"
        )
    if kind_of(optimizer_of(args)).on_host:
        import torch  # imported for an optimizer on the host alone, because it loads slowly

        from videox.optim.cpu_offload import thread_notes

        lines += thread_notes(optimizer_of(args), torch.get_num_threads(), os.cpu_count() or 1, os.environ)
    world = os.environ.get("WORLD_SIZE", "1")
    if "TORCHELASTIC_RUN_ID" in os.environ and "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" not in os.environ:
        lines.append(
            "after Ctrl-C or SIGTERM the launcher kills the processes within 30 s: export "
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 if a step and its save take longer"
        )
    if args.deterministic and (args.use_deepspeed or requested_engine(os.environ) == "deepspeed"):
        lines.append(
            "--deterministic does not reach DeepSpeed's own kernels: on GPUs, resumed losses may differ in rounding"
        )
    one_machine = world == os.environ.get("LOCAL_WORLD_SIZE", world)
    if os.environ.get("NCCL_P2P_DISABLE") == "1" and one_machine and world != "1":
        lines.append("NCCL_P2P_DISABLE=1 disables NVLink: unset it on a single machine")
    return lines
