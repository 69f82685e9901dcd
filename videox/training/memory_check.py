"""Out-of-memory errors with what ran and what to change, and a test of the largest micro-batch before step 1."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from videox.data.bucket_sampler import planned_samples
from videox.data.dataset import Batch, TokenLengthDataset, collate
from videox.data.plan.epoch import padding
from videox.data.plan.plan import largest_bucket
from videox.engine.base import Engine
from videox.errors import FLAGS, UserError
from videox.estimate.model_profile import ModelProfile
from videox.estimate.report import GIB
from videox.optim.registry import kind_of
from videox.shapes import Bucket, Ratios, token_count
from videox.training.args import optimizer_of
from videox.training.context import Context
from videox.training.memory_advice import MemoryAdvice
from videox.training.planned_gpu import room_of
from videox.training.run_memory import Launch, RunMemory
from videox.training.schedule import Schedule


@contextmanager
def explain_oom(advice: MemoryAdvice) -> Iterator[None]:
    """Turn torch.OutOfMemoryError inside into a UserError that names phase, micro-batch and what to change.

    The phase is set by videox.device.memory_phase, the micro-batch by `name_batch`.

    Args:
        advice: of the run.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        phase, batch = getattr(error, "phase", "the run"), getattr(error, "batch", "")
        cause = " ".join(str(error).split())[:200]
        what = f"out of memory (OOM) in {phase}{batch} ({cause})"
        hint, details = advice.after_oom(phase)
        raise UserError("GPU memory", what, hint, FLAGS, details) from error


@contextmanager
def name_batch(batch: Batch, ratios: Ratios) -> Iterator[None]:
    """Add the size of a micro-batch to an out-of-memory error inside; ratios: of the model."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        bucket, count = batch["bucket"], len(batch["rows"])
        tokens = count * token_count(bucket, ratios)
        size = f"{count} x {bucket.frames} x {bucket.height} x {bucket.width} ({tokens:,} tokens)"
        error.batch = f" of the micro-batch {size}"  # type: ignore[attr-defined]
        raise


def plan_memory(args: argparse.Namespace, ctx: Context, model: ModelProfile, schedule: Schedule) -> None:
    """Set what `ctx.memory` estimates: the memory of this run, as it was launched, with its plan."""
    half = ctx.accelerator.mixed_precision == "bf16"
    zero = ctx.accelerator.state.deepspeed_plugin.deepspeed_config if ctx.backend.engine == "deepspeed" else {}
    per_host = int(os.environ.get("LOCAL_WORLD_SIZE", ctx.world_size))
    launch = Launch(ctx.backend.name, ctx.world_size, per_host, half, zero.get("zero_optimization", {}))
    ctx.memory.plan(
        lambda: RunMemory(args, model, launch, schedule.columns, schedule.settings),
        lambda: room_of(args, ctx.device),
    )


def try_largest(
    args: argparse.Namespace,
    ctx: Context,
    schedule: Schedule,
    engine: Engine,
    dataset: TokenLengthDataset,
    accumulate: Callable[[Batch], object],
) -> None:
    """Run the largest micro-batch of all epochs, so that an out-of-memory error appears in the first minute.

    Args:
        accumulate: runs forward and backward of a batch.

    Raises:
        torch.OutOfMemoryError: it does not fit.
    """
    if args.try_largest_first == "off" or (args.try_largest_first == "auto" and ctx.device.type != "cuda"):
        return
    bucket = largest_bucket(schedule.columns, schedule.settings)
    last = ctx.backend.engine != "deepspeed"  # DeepSpeed would take the last micro-batch for the end of a step
    batch = largest_batch(dataset, bucket, args.train_batch_size, last=last, encoded=args.latent_cache is None)
    moments = 0 if engine.moments_on_host or schedule.state.step else kind_of(optimizer_of(args)).moment_bytes
    gpu = ctx.device if ctx.device.type == "cuda" else None
    if gpu:
        torch.cuda.reset_peak_memory_stats(gpu)
    with name_batch(batch, schedule.plan.ratios):
        try_batch(engine, batch, accumulate, moment_bytes=moments)
    if ctx.is_main:
        predicted = ctx.memory.allocated(encoded=args.latent_cache is None)
        peak = peak_line(predicted, measured=torch.cuda.max_memory_allocated(gpu) if gpu else None)
        tokens = schedule.plan.tokens_of(bucket)
        ctx.print(f"the largest micro-batch, {args.train_batch_size} x {tokens:,} tokens, fits: {peak}")


def peak_line(predicted: float | str, measured: int | None) -> str:
    """Return the measured peak of tensors beside the predicted one, with the error of the prediction.

    Args:
        predicted: bytes, or why there is no prediction.
        measured: bytes; None where they cannot be measured.
    """
    if isinstance(predicted, str):
        beside, error = f"no prediction: {predicted}", ""
    else:
        beside = f"{predicted / GIB:.2f} GiB predicted"
        error = f", {(predicted - measured) / measured:+.1%}" if measured else ""
    found = (
        "the peak is not measured on a CPU" if measured is None else f"{measured / GIB:.2f} GiB of tensors at the peak"
    )
    return f"{found} ({beside}{error})"


def largest_batch(dataset: TokenLengthDataset, bucket: Bucket, samples: int, *, last: bool, encoded: bool) -> Batch:
    """A micro-batch of black clips with weight 0.

    Args:
        dataset: makes its tensors, as those of other batches.
        bucket: size of its samples.
        samples: number of samples.
        last: reduce gradients over the ranks, as the last micro-batch of a step does.
        encoded: run the encoders on it, although padding needs none.
    """
    one = planned_samples(padding(0, 0, bucket), 0, last=last)[0]
    batch = collate([dataset[one] for _ in range(samples)])
    batch["real"] = [encoded] * samples
    return batch


def try_batch(engine: Engine, batch: Batch, accumulate: Callable[[Batch], object], *, moment_bytes: int) -> None:
    """Run forward and backward of a micro-batch and drop the result; all ranks call it.

    Weights, optimizer state, counters and random states are bitwise the same afterwards.

    Args:
        engine: without accumulated gradients.
        batch: with weight 0.
        accumulate: runs forward and backward of a batch.
        moment_bytes: bytes per trainable parameter that the optimizer will allocate on the device in its first step;
            tensors of this size take their place here. 0: it has allocated its moments, or keeps them in host memory.
    """
    device, moments = _device(engine), []
    if moment_bytes:
        fp32_params = engine.fp32_params()
        for name in fp32_params.names:
            size = moment_bytes * fp32_params.read(name).numel()
            moments.append(torch.empty(size, dtype=torch.uint8, device=device))
    # Without a list of devices torch would fork the generators of all GPUs of the machine, and warn about it.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        accumulate(batch)
    engine.zero_grad()
    del moments


def _device(engine: Engine) -> torch.device:
    return next(engine.model.parameters()).device
