"""The data of a run: encoder outputs from the cache or the encoders, dataset, this rank's sampler, and the loader."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from videox.data.bucket_sampler import BucketBatchSampler
from videox.data.dataset import TokenLengthDataset
from videox.data.loader import BatchLoader
from videox.encoders.encode import Encoder, EncodingSpec, LazyEncoders
from videox.errors import UserError
from videox.training.context import Context
from videox.training.precompute import CacheTodo, find_missing, format_missing, open_encoder
from videox.training.schedule import Schedule


@dataclass(frozen=True)
class DataPipeline:
    """What turns planned samples into the tensors of a micro-batch.

    Attributes:
        encode: outputs of the frozen encoders for a batch; reads and fills the cache.
        dataset: decodes planned samples.
        sampler: micro-batches of this rank.
        loader: over both.
        missing: cache entries that the rest of the run needs and the cache does not have; empty without a cache.
    """

    encode: Encoder
    dataset: TokenLengthDataset
    sampler: BucketBatchSampler
    loader: BatchLoader
    missing: Sequence[CacheTodo]


def with_numerics(args: argparse.Namespace, spec: EncodingSpec, device: torch.device) -> EncodingSpec:
    """Return a spec with the flags that change its values in its address in the cache.

    These are --vae_tiling, and --allow_tf32 where an encoder computes in float32 on a GPU. The dtypes are part of the
    spec already.
    """
    if args.vae_tiling and spec.module == "vae":
        spec = replace(spec, settings=f"{spec.settings}, tiled")
    full = args.vae_dtype == "fp32" if spec.module == "vae" else spec.dtype == torch.float32
    if args.allow_tf32 and full and device.type == "cuda":
        spec = replace(spec, settings=f"{spec.settings}, TF32")
    return spec


def build_data(
    args: argparse.Namespace,
    ctx: Context,
    schedule: Schedule,
    specs: Sequence[EncodingSpec],
    encoders: LazyEncoders,
) -> DataPipeline:
    """Build the data pipeline and print what the cache contains.

    Args:
        specs: how the encoder outputs of a sample are computed.
        encoders: loaded here, unless the cache has all of their outputs.

    Raises:
        UserError: --cache_only without a cache, or a cache that does not fit its disk.
    """
    if args.cache_only and not args.latent_cache:
        raise UserError("--cache_only", "there is no --latent_cache to fill", "name a folder with --latent_cache")
    specs = [with_numerics(args, spec, ctx.device) for spec in specs]
    rules = schedule.settings.caption_rules
    encode = open_encoder(
        specs, args.latent_cache, ctx, mode=args.train_mode, encoders=encoders, cache_text=not rules.shuffle_tags
    )
    dataset = TokenLengthDataset(
        schedule.index, policy=schedule.settings.policy, reader=args.video_reader,
        caption_dropout=args.caption_dropout, caption_rules=rules, cache_view=encode.cache_view, always_read=bool(args.dump_steps),
    )  # fmt: skip
    missing = find_missing(schedule, dataset, encode)
    if encode.cache is not None:
        ctx.print(*format_missing(missing, encode.cache, encode.uncached))
    needed = encode.cache is None or (bool(encode.uncached) and not args.cache_only)
    if any(ctx.gather(needed or any(todo.jobs for todo in missing))):
        encoders.load(ctx.gather)
    sampler = BucketBatchSampler(data_group=ctx.data_group, data_groups=ctx.data_groups)
    pin = ctx.device.type == "cuda"
    loader = BatchLoader(dataset, sampler, workers=args.dataloader_num_workers, pin_memory=pin)
    return DataPipeline(encode, dataset, sampler, loader, missing)
