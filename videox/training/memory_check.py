"""Out-of-memory errors as one line that names what ran, and a test of the largest micro-batch before step 1."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from videox.data.bucket_sampler import planned_samples
from videox.data.dataset import Batch, TokenLengthDataset, collate
from videox.data.plan.epoch import padding
from videox.data.plan.plan import largest_bucket
from videox.engine.base import Engine
from videox.errors import FLAGS, UserError
from videox.shapes import Bucket, token_count
from videox.training.context import Context
from videox.training.schedule import Schedule

HINTS = {
    "the VAE": "lower --vae_mini_batch or --token_sample_size, or add --low_vram",
    "the text encoder": "add --low_vram",
    "the image encoder": "add --low_vram",
    "validation": "use fewer --validation_prompts, or add --low_vram",
}
OTHERWISE = (
    "--dry_run prints what fits: --gradient_checkpointing, --low_vram, a smaller --token_sample_size, ZeRO-3, "
    "or --optimizer adamw_offload"
)


@contextmanager
def explain_oom() -> Iterator[None]:
    """Turn torch.OutOfMemoryError inside into a UserError that names phase and micro-batch.

    The phase is set by videox.device.memory_phase, the micro-batch by `name_batch`.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        phase, batch = getattr(error, "phase", "the run"), getattr(error, "batch", "")
        cause = " ".join(str(error).split())[:200]
        what = f"out of memory (OOM) in {phase}{batch} ({cause})"
        raise UserError("GPU memory", what, HINTS.get(phase, OTHERWISE), FLAGS) from error


@contextmanager
def name_batch(batch: Batch) -> Iterator[None]:
    """Add the size of a micro-batch to an out-of-memory error inside."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        bucket, count = batch["bucket"], len(batch["rows"])
        size = f"{count} x {bucket.frames} x {bucket.height} x {bucket.width} ({count * token_count(bucket):,} tokens)"
        error.batch = f" of the micro-batch {size}"  # type: ignore[attr-defined]
        raise


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
    try_batch(engine, batch, accumulate, has_moments=schedule.state.step > 0)
    ctx.print(f"the largest micro-batch, {args.train_batch_size} x {token_count(bucket):,} tokens, fits")


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


def try_batch(engine: Engine, batch: Batch, accumulate: Callable[[Batch], object], *, has_moments: bool) -> None:
    """Run forward and backward of a micro-batch and drop the result; all ranks call it.

    Weights, optimizer state, counters and random states are bitwise the same afterwards.

    Args:
        engine: without accumulated gradients.
        batch: with weight 0.
        accumulate: runs forward and backward of a batch.
        has_moments: the optimizer has allocated its moments; before the first step tensors of their size take their
            place here, unless the optimizer keeps them in host memory.
    """
    fp32_params, moments = engine.fp32_params(), []
    if not has_moments and not engine.moments_on_host:
        moments = [torch.zeros(2, *fp32_params.read(name).shape, device=_device(engine)) for name in fp32_params.names]
    with torch.random.fork_rng(), name_batch(batch):
        accumulate(batch)
    engine.zero_grad()
    del moments


def _device(engine: Engine) -> torch.device:
    return next(engine.model.parameters()).device
