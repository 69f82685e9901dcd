"""Serves both train.py scripts: from the flags to the schedule of a run, known before any weight is loaded."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

import videox.estimate.data_report as report
from videox.data.index.index import Index, build_index, load_index
from videox.data.plan.plan import Columns, EpochPlan, PlanSettings, plan_epoch
from videox.data.plan.settings import columns_fingerprint, columns_of
from videox.distributed.accelerator import backend_of
from videox.engine.train_state import (
    TrainState,
    refuse_other_run,
    resume_or_begin,
)
from videox.estimate.cost_model import read_cost_model
from videox.files import atomic_write
from videox.run.lifecycle import Run, main_first
from videox.tracking.jsonl import json_line
from videox.training.args import data_dir, size_policy
from videox.training.loop import total_steps

# Flags that change where, how long and how fast a run goes, what it shows and writes, and none of its numbers.
WITHOUT_NUMBERS = {
    "output_dir", "logging_dir", "report_to", "tracker_project_name", "resume_from_checkpoint", "verify", "dump_steps",
    "max_train_steps", "num_train_epochs", "checkpointing_steps", "checkpoints_total_limit", "export_dtype",
    "export_layouts", "low_vram",
    "validation_prompts", "validation_paths", "validation_steps", "validation_epochs", "dataloader_num_workers",
    "gradient_accumulation_steps", "max_bad_fraction", "video_reader", "use_deepspeed", "use_fsdp",
    "use_ema", "ema_decay", "ema_device", "validate_ema",
    "save_whole_weights", "latent_cache", "cache_only",
    "dry_run", "explain", "dry_run_plan", "dry_run_processes", "dry_run_backend", "gpu_memory", "assumed_mfu",
    "peak_tflops", "try_largest_first",
}  # fmt: skip

Gather = Callable[[Any], list[Any]]


@dataclass(frozen=True)
class Schedule:
    """Data and schedule of a run: from here on, everything that will happen is known.

    plan: of the epoch in which the run goes on; total: optimizer steps of the whole run.
    """

    index: Index
    columns: Columns
    settings: PlanSettings
    state: TrainState
    plan: EpochPlan
    total: int


def open_schedule(
    args: argparse.Namespace,
    accelerator: Accelerator,
    run: Run,
    gather: Gather,
    cost: tuple[float, float],
    min_frames: int = 1,
) -> Schedule:
    """Returns the index, brought up to date, and the schedule over it, resumed or begun; prints both.

    Args:
        cost: a and b of a sample's cost a*S + b*S^2 in tokens S; --cost_model gives others to a new run.
        min_frames: below which a sample teaches nothing.

    Raises:
        UserError: the data cannot be read or trained, or a resumed run would get another schedule.
    """
    index = shared_index(args, is_main=accelerator.is_main_process, gather=gather)
    columns = columns_of(index, by_second=args.video_sample_fps > 0)
    cost = read_cost_model(Path(args.cost_model)) if args.cost_model else cost
    state, settings = resume_or_begin(
        run.resume.path,
        partial(
            plan_settings,
            args,
            min_frames=min_frames,
            cost_linear=cost[0],
            cost_quadratic=cost[1],
            barrier=backend_of(accelerator).barrier,
            accumulation=args.gradient_accumulation_steps,
        ),
        seed=args.seed,
        slots=accelerator.num_processes * args.gradient_accumulation_steps,
        world_size=accelerator.num_processes,
        index_fingerprint=columns_fingerprint(index, columns),
        names=index.names(),
        columns=columns,
        run=name_of_flags(vars(args)),
        gather=gather,
    )
    if run.resume.path:
        refuse_other_run(Path(args.output_dir), state)
    lost, columns = report.lost_lines(index, state.columns or columns, columns), state.columns or columns
    plan = plan_epoch(columns, settings, state.epoch, state.quarantined)
    total = total_steps(columns, settings, args.max_train_steps, args.num_train_epochs)
    balance = report.balance_line(plan, settings, accelerator.num_processes)
    accelerator.print("\n".join([*lost, *report.data_lines(index, columns, plan), balance]))
    if accelerator.is_main_process and (refused := report.refused_rows(index, plan)):
        with atomic_write(Path(args.output_dir) / "refused_rows.jsonl") as aside:
            aside.write_bytes(b"".join(map(json_line, refused)))
        accelerator.print(
            f"{len(refused)} rows are not trained: refused_rows.jsonl in the output folder names them all"
        )
    if args.cost_model and (settings.cost_linear, settings.cost_quadratic) != cost:
        accelerator.print("--cost_model: a running plan never changes, what the run began with stays")
    asked = accelerator.num_processes * args.gradient_accumulation_steps
    if settings.slots != asked:
        steps = f"{settings.slots // accelerator.num_processes} accumulation steps on {accelerator.num_processes} processes"
        accelerator.print(f"a step has {settings.slots} micro-batches, as the run began: {steps}, not {asked} in all")
    accelerator.print(f"seed {settings.seed}, {total} optimizer steps, from step {state.step}")
    if state.step >= total:
        accelerator.print(
            "all of them are done: nothing is left to train; raise --max_train_steps or --num_train_epochs"
        )
    return Schedule(index, columns, settings, state, plan, total)


def name_of_flags(asked: Mapping[str, Any]) -> str:
    """Returns a name of the flags that change numbers; how a step is divided is said by the plan's settings."""
    numbers = {name: value for name, value in asked.items() if name not in WITHOUT_NUMBERS}
    return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()[:16]


def index_path(args: argparse.Namespace) -> Path:
    """Returns where the index is kept: beside the metadata, or in output_dir where that folder is read-only."""
    meta = Path(args.train_data_meta).resolve()
    name = f"{meta.name}.videox-index.arrow"
    return meta.parent / name if os.access(meta.parent, os.W_OK) else Path(args.output_dir) / name


def shared_index(args: argparse.Namespace, *, is_main: bool, gather: Callable[[Any], list[Any]]) -> Index:
    """Returns the index, brought up to date by the main process and mapped by the others."""
    build = partial(
        build_index,
        Path(args.train_data_meta),
        data_dir(args),
        index_path(args),
        allow_outside_data_dir=args.allow_outside_data_dir,
        workers=max(args.dataloader_num_workers, 1),
        progress=True,
    )
    main_first(build, is_main=is_main, gather=gather)
    return load_index(index_path(args), data_dir(args))


def plan_settings(
    args: argparse.Namespace, *, seed: int, slots: int, min_frames: int = 1, **launched: object
) -> PlanSettings:
    """Returns the flags that the schedule depends on; launched: other fields of PlanSettings, which win over flags."""
    fields: dict[str, Any] = dict(
        policy=size_policy(args, min_frames),
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
    )
    return PlanSettings(**{**fields, **launched})
