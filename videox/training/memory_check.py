"""Serves whoever starts a run for the night: the largest micro-batch comes first, and a lack of memory has a name."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch

from videox.data.bucket_sampler import planned_samples
from videox.data.dataset import Batch, TokenLengthDataset, collate
from videox.data.plan.epoch import padding
from videox.engine.base import Engine
from videox.errors import FLAGS, UserError
from videox.shapes import Bucket, token_count

# The innermost function of these names says what ran; the first phase is where none of them did.
IN_A_BATCH = {
    "": "the forward pass", "encode_video": "the VAE", "encode_conditions": "the VAE",
    "encode_prompts": "the text encoder", "encode_images": "the image encoder", "backward": "the backward pass",
}  # fmt: skip
AROUND = {
    "": "the run", "load_components": "loading the model", "open_engine": "placing weights and optimizer",
    "load": "loading the checkpoint", "encode_held_out": "encoding the held-out rows", "update": "the optimizer step",
    "validate": "validation", "save": "a save", "finished": "the export",
}  # fmt: skip


def largest_batch(dataset: TokenLengthDataset, bucket: Bucket, samples: int, *, last: bool, encoded: bool) -> Batch:
    """Returns a micro-batch of black clips that weighs nothing.

    Args:
        dataset: makes its tensors, as any other's.
        bucket: its size.
        samples: in it.
        last: reduces gradients among processes, as a step's last micro-batch does.
        encoded: what the encoders make of it is made, though padding has no use for it.
    """
    one = planned_samples(padding(0, 0, bucket), 0, last=last)[0]
    batch = collate([dataset[one] for _ in range(samples)])
    batch["real"] = [encoded] * samples
    return batch


def try_batch(engine: Engine, batch: Batch, accumulate: Callable[[Batch], object], *, has_moments: bool) -> None:
    """Runs forward and backward pass of a micro-batch and leaves nothing of it; all processes call it.

    Weights, moments, counters and random states are afterwards, to the bit, what they were.

    Args:
        engine: with no gradients accumulated.
        batch: that weighs nothing.
        accumulate: adds its gradients.
        has_moments: the optimizer's moments are allocated; before a first step others take their place here, unless
            they are to lie on the host.
    """
    fp32_params, moments = engine.fp32_params(), []
    if not has_moments and not engine.moments_on_host:
        moments = [torch.zeros(2, *fp32_params.read(name).shape, device=_device(engine)) for name in fp32_params.names]
    with torch.random.fork_rng():
        accumulate(batch)
    engine.discard()
    del moments


def _device(engine: Engine) -> torch.device:
    return next(engine.model.parameters()).device


def names_memory(accumulate: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a lack of GPU memory within a micro-batch a UserError that names its bucket and what ran.

    Args:
        accumulate: one of its arguments is the Batch.
    """

    @functools.wraps(accumulate)
    def named(*given: Any, **by_name: Any) -> Any:  # noqa: ANN401 - whatever it takes and gives
        try:
            return accumulate(*given, **by_name)
        except torch.OutOfMemoryError as error:
            batch = next(v for v in (*given, *by_name.values()) if isinstance(v, Mapping) and "bucket" in v)
            bucket, count = batch["bucket"], len(batch["rows"])
            size = f"{count} x {bucket.frames} x {bucket.height} x {bucket.width} ({count * token_count(bucket):,} tokens)"
            raise _refusal(error, _phase(error, IN_A_BATCH), f" of the micro-batch {size}") from error

    return named


def names_phase(train: Callable[..., int]) -> Callable[..., int]:
    """Makes a lack of GPU memory anywhere else in a run a UserError that names what ran."""

    @functools.wraps(train)
    def named(*given: Any) -> int:  # noqa: ANN401
        try:
            return train(*given)
        except torch.OutOfMemoryError as error:
            raise _refusal(error, _phase(error, AROUND), "") from error

    return named


def _phase(error: BaseException, phases: Mapping[str, str]) -> str:
    found = [phases[frame.name] for frame in traceback.extract_tb(error.__traceback__) if frame.name in phases]
    return found[-1] if found else phases[""]


def _refusal(error: BaseException, phase: str, where: str) -> UserError:
    hint = {
        "the VAE": "lower --vae_mini_batch or --token_sample_size, or give --low_vram",
        "the text encoder": "give --low_vram",
        "validation": "give fewer --validation_prompts, or --low_vram",
    }.get(
        phase,
        "see --dry_run for what fits: --gradient_checkpointing, --low_vram, a smaller --token_sample_size, ZeRO-3, "
        "or --optimizer adamw_offload",
    )
    said = " ".join(str(error).split())
    return UserError("GPU memory", f"ran out in {phase}{where} ({said[:200]})", hint, FLAGS)
