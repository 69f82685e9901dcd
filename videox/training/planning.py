"""What a plan is made from: the place of the data and of its index, and the plan settings. Imports no torch."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from videox.data.index.index import DataLocation
from videox.data.plan.held_out import RANDOM, STRATIFIED
from videox.data.plan.settings import PlanSettings
from videox.data.plan.timesteps import ACROSS_STEPS, PER_STEP
from videox.shapes import USUAL, Ratios
from videox.training.args import size_policy
from videox.training.data_sources import DataSources, sources_of, validation_source


def index_path(args: argparse.Namespace) -> Path:
    """Where the index is stored: next to the metadata, or in output_dir if that folder is read-only."""
    return _writable(sources_of(args).index_path(), args)


def _writable(path: Path, args: argparse.Namespace) -> Path:
    return path if os.access(path.parent, os.W_OK) else Path(args.output_dir) / path.name


def data_location(args: argparse.Namespace) -> DataLocation:
    """Return where the data set and its index are stored."""
    found = sources_of(args)
    first = found.sources[0]
    return DataLocation(
        first.metadata_path,
        found.data_dir,
        index_path(args),
        args.allow_outside_data_dir,
        allow_absolute=found.is_plain and first.allow_absolute,
        sources=() if found.is_plain else found.sources,
    )


def validation_location(args: argparse.Namespace) -> DataLocation:
    """Return where the list of --validation_meta and its index are stored."""
    source = validation_source(args)
    path = _writable(DataSources((source,)).index_path(), args)
    return DataLocation(
        source.metadata_path, source.data_dir, path, args.allow_outside_data_dir, allow_absolute=source.allow_absolute
    )


def plan_settings(
    args: argparse.Namespace, *, seed: int, slots: int, min_frames: int = 1, ratios: Ratios = USUAL,
    **launched: object,
) -> PlanSettings:  # fmt: skip
    """The plan settings from the flags; min_frames, ratios: of the model.

    launched: further fields of PlanSettings, which override the flags.
    """
    fields: dict[str, Any] = dict(
        policy=size_policy(args, min_frames, ratios),
        batch_size=args.train_batch_size,
        slots=slots,
        seed=seed,
        slot_fill=args.slot_fill,
        video_repeat=args.video_repeat,
        held_out=args.validation_rows,
        balance=args.balance,
        clips_per_video=args.clips_per_video,
        clip_sampling=args.clip_sampling,
        cache_variants=args.cache_variants,
        caption_prefix=args.caption_prefix,
        trigger_word=args.trigger_word,
        caption_shuffle_tags=args.caption_shuffle_tags,
        launch_tokens=args.launch_tokens,
        held_out_share=args.validation_share or 0.0,
        held_out_choice=STRATIFIED if args.validation_rows or args.validation_share else RANDOM,
        timesteps=ACROSS_STEPS if args.uniform_sampling else PER_STEP,
    )
    return PlanSettings(**{**fields, **launched})
