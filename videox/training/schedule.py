"""From flags to the schedule of a run: index, plan and train state, built before any weight is loaded."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import videox.estimate.data_report as report
from videox.data.index.index import DataLocation, Index, build_index, load_index
from videox.data.plan.epoch import EpochPlan
from videox.data.plan.plan import count_steps, plan_epoch
from videox.data.plan.settings import PlanColumns, PlanSettings, columns_of
from videox.distributed.collectives import run_on_main
from videox.engine.resume import refuse_other_run, resume_or_begin
from videox.engine.train_state import TrainState, plan_inputs
from videox.errors import DATA, UserError, plural
from videox.estimate.cost_model import read_cost_model
from videox.estimate.frame_rates import frame_rate_lines
from videox.estimate.model_profile import ModelProfile
from videox.files import atomic_write
from videox.run.equal_processes import refuse_differences
from videox.shapes import Bucket
from videox.tracking.jsonl import json_line
from videox.training.argument_parser import AUTO
from videox.training.context import Context
from videox.training.data_change import change_lines, indexed_data, keep_rows, rows_of_epoch
from videox.training.flow_shift import with_default_yaml
from videox.training.planning import data_location, plan_settings, validation_location
from videox.training.validation_flags import check_clip_shape

# Flags that change where, how long and how fast a run trains, what it shows and writes, but none of its numbers. They
# are not part of a run's name.
WITHOUT_NUMBERS = {
    "output_dir", "logging_dir", "report_to", "tracker_project_name", "report_seconds", "resume_from_checkpoint", "verify",
    "skip_verify", "dump_steps",
    "max_train_steps", "num_train_epochs", "checkpointing_steps", "checkpoints_total_limit", "export_dtype",
    "export_layouts", "export_at", "merge_base", "low_vram",
    "validation_prompts", "validation_paths", "validation_steps", "validation_epochs", "dataloader_num_workers",
    "sample_every", "sample_resolution", "sample_frames", "sample_fps", "sample_steps", "sample_guidance",
    "sample_negative_prompt", "sample_seed", "sample_minutes", "keep_best", "early_stop", "validation_meta",
    "gradient_accumulation_steps", "max_bad_fraction", "video_reader", "use_deepspeed", "use_fsdp",
    "use_ema", "ema_decay", "ema_device", "validate_ema",
    "save_whole_weights", "latent_cache", "cache_only",
    "dry_run", "explain", "dry_run_plan", "dry_run_processes", "dry_run_backend", "dry_run_deepspeed_config", "gpu_memory", "assumed_mfu",
    "peak_tflops", "try_largest_first", "missing_caption", "config", "recipe", "dry_run_model", "dry_run_data", "gpu",
    "gpu_price", "accept_data_change", "gradient_checkpointing_keep", "activation_memory", "offload_activations",
    "watchdog_seconds", "replica_check_steps", "stream_blocks", "other_transformer_path", "host_memory",
}  # fmt: skip
# Flags that older versions did not have, with their defaults: at its default a flag is not part of a run's name.
LATER_FLAGS: Mapping[str, Any] = {
    "dataset_config": None, "caption_prefix": "", "trigger_word": "", "caption_shuffle_tags": False, "lora_type": "lora",
    "loraplus_ratio": 1.0, "optimizer_args": [], "flow_shift": AUTO, "deterministic": False, "vae_dtype": "fp32",
    "text_multiple": None, "launch_tokens": 0, "compile": False, "attention_backend": "native", "vae_tiling": False,
    "validation_share": None, "skip_spikes": False, "base_precision": "bf16", "text_encoder_precision": "bf16",
    "clip_image": None, "i2v_ratio": 0.5,
}  # fmt: skip


@dataclass(frozen=True)
class Schedule:
    """Data and schedule of a run: all samples, steps and random draws follow from it.

    Attributes:
        index: of the metadata's files.
        columns: what the plan reads of the index; on a resumed run those that it began with. If the data has changed
            within the epoch, those of the new data.
        settings: of the plan.
        state: position of the run; `advance` moves it.
        plan: of the epoch that the run is in when it starts.
        total: optimizer steps of the whole run.
        profile: of the model.
        first_row: where the rows of `plan` begin in the index: 0, unless its epoch began with other data than the
            columns describe.
        validation: index of --validation_meta; None without it.
    """

    index: Index
    columns: PlanColumns
    settings: PlanSettings
    state: TrainState
    plan: EpochPlan
    total: int
    profile: ModelProfile
    first_row: int = 0
    validation: Index | None = None

    def plan_of_columns(self) -> EpochPlan:
        """The plan of this epoch, or of the next one if the columns are those of changed data that begin then."""
        state = self.state
        return plan_epoch(self.columns, self.settings, state.epoch + 1) if state.next_data else self.plan

    @property
    def data_changes(self) -> list[dict[str, Any]]:
        """First step and epoch of each change of the data, and its index, as the checkpoints have them."""
        state, later = self.state, []
        if state.next_data:
            first = state.step - state.epoch_step + self.plan.n_steps
            change = {"step": first, "epoch": state.epoch + 1}
            later = [{**change, "before": state.index, "after": state.next_data.index}]
        return [*state.data_changes, *later]


def build_schedule(args: argparse.Namespace, ctx: Context, profile: ModelProfile) -> Schedule:
    """Bring the index up to date, resume or begin the schedule over it, and print both.

    Args:
        profile: of the model, for the cost of a sample; --cost_model gives a new run another.

    Raises:
        UserError: the data cannot be read or trained, or a resumed run would get another schedule.
    """
    check_clip_shape(
        args.sample_resolution, args.sample_frames, "--sample_resolution", "--sample_frames", profile.ratios
    )
    index = shared_index(args, ctx)
    report.check_captions(index, args.missing_caption)
    current = columns_of(index, by_second=args.video_sample_fps > 0)
    cost = read_cost_model(Path(args.cost_model)) if args.cost_model else profile.cost
    requested_slots = ctx.world_size * args.gradient_accumulation_steps
    validation = validation_index(args, ctx)
    data = indexed_data(args, ctx, index, current)
    state, settings = resume_or_begin(
        ctx.checkpoint,
        partial(
            plan_settings,
            args,
            min_frames=profile.min_frames,
            ratios=profile.ratios,
            cost_linear=cost[0],
            cost_quadratic=cost[1],
            barrier=ctx.backend.barrier,
            accumulation=args.gradient_accumulation_steps,
            held_out_list=validation.fingerprint()[:16] if validation else "",
        ),
        data,
        seed=args.seed,
        slots=requested_slots,
        world_size=ctx.world_size,
        flags_name=name_of_flags(vars(args)),
        gather=ctx.gather,
    )
    facts = {"the data": data.fingerprint, "the seed": state.seed, "the plan": _digest(plan_inputs(settings))}
    models = {f"config.json of the {name}": _digest(config) for name, (_, config) in profile.components.items()}
    refuse_differences({**facts, **models}, "give all machines the same data and the same model", ctx.gather)
    if ctx.checkpoint:
        refuse_other_run(ctx.output_dir, state)
    keep_rows(args, ctx, state, data, index)
    schedule = replace(_schedule_of(args, ctx, index, state, settings, profile), validation=validation)
    described = schedule.plan_of_columns()
    ctx.print(*report.unreadable_lines(index, schedule.columns, current))
    ctx.print(*report.data_lines(index, schedule.columns, described, settings.policy))
    ctx.print(*frame_rate_lines(index, described, settings.policy, profile.fps))
    ctx.print(*report.caption_lines(index, settings.caption_rules))
    ctx.print(*change_lines(args, ctx, index, state, settings, schedule.plan))
    ctx.print(report.balance_line(schedule.plan, settings, ctx.world_size))
    _write_refused_rows(ctx, index, described)
    if args.cost_model and (settings.cost_linear, settings.cost_quadratic) != cost:
        ctx.print("--cost_model has no effect on a resumed run: it keeps the costs that it began with")
    ctx.print(*_step_lines(schedule, ctx.world_size, requested_slots))
    return schedule


def _schedule_of(
    args: argparse.Namespace,
    ctx: Context,
    index: Index,
    state: TrainState,
    settings: PlanSettings,
    profile: ModelProfile,
) -> Schedule:
    """Return the schedule of a run whose state is known; index: of this launch."""
    joined, plan, first_row = rows_of_epoch(args, ctx, index, state, settings)
    columns = (state.next_data or state).columns or columns_of(index, by_second=args.video_sample_fps > 0)
    schedule = Schedule(joined, columns, settings, state, plan, total=0, profile=profile, first_row=first_row)
    changes = schedule.data_changes
    begin = (changes[-1]["step"], changes[-1]["epoch"]) if changes else (0, 0)
    total = total_steps(columns, settings, args.max_train_steps, args.num_train_epochs, begin)
    return replace(schedule, total=total)


def _write_refused_rows(ctx: Context, index: Index, plan: EpochPlan) -> None:
    if ctx.is_main and (refused := report.refused_rows(index, plan)):
        with atomic_write(ctx.output_dir / "refused_rows.jsonl") as temporary:
            temporary.write_bytes(b"".join(map(json_line, refused)))
        rows = plural(len(refused), "row is", "rows are")
        ctx.print(f"{len(refused)} {rows} not trained; refused_rows.jsonl in the output folder lists them")


def _step_lines(schedule: Schedule, world_size: int, requested_slots: int) -> list[str]:
    """Lines on the size and number of optimizer steps, for the start of a run."""
    lines, slots, state = [], schedule.settings.slots, schedule.state
    if slots != requested_slots:
        steps = slots // world_size
        accumulation = f"{steps} accumulation {plural(steps, 'step')} on {world_size} {plural(world_size, 'process', 'processes')}"
        lines.append(
            f"a step has {slots} micro-batches, as when the run began: {accumulation}, instead of the {requested_slots} "
            f"micro-batches of this launch"
        )
    lines.append(f"seed {schedule.settings.seed}, {schedule.total} optimizer steps, from step {state.step}")
    if state.step >= schedule.total:
        lines.append("all of them are done: raise --max_train_steps or --num_train_epochs to train on")
    return lines


def total_steps(
    columns: PlanColumns,
    settings: PlanSettings,
    max_train_steps: int | None,
    num_train_epochs: int,
    begin: tuple[int, int] = (0, 0),
) -> int:
    """Optimizer steps of a run: max_train_steps, otherwise the sum over the epochs' plans.

    begin: first step and first epoch of these columns; earlier steps trained other data.

    Rows that are found unreadable during training shorten later epochs; the run then begins another epoch, so that the
    total which the learning-rate schedule was made for stays.
    """
    step, first = begin
    return max_train_steps or step + sum(
        count_steps(columns, settings, epoch) for epoch in range(first, num_train_epochs)
    )


def most_common_shape(schedule: Schedule) -> Bucket:
    """The bucket with the most samples in the first epoch: the shape of sample clips.

    Always of epoch 0, so that the clips of two steps, or of a resumed run, differ by the training alone.
    """
    first = schedule.plan if schedule.plan.epoch == 0 else plan_epoch(schedule.columns, schedule.settings, 0)
    return first.most_common_bucket()


def name_of_flags(asked: Mapping[str, Any]) -> str:
    """A hash of the flags that change numbers; how a step is divided over ranks is part of the plan settings."""
    left_out = WITHOUT_NUMBERS | {name for name, default in LATER_FLAGS.items() if asked.get(name) == default}
    return _digest({name: value for name, value in with_default_yaml(asked).items() if name not in left_out})


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def shared_index(args: argparse.Namespace, ctx: Context) -> Index:
    """The index, brought up to date by the main process and memory-mapped by the others."""
    return _index_at(data_location(args), args, ctx)


def validation_index(args: argparse.Namespace, ctx: Context) -> Index | None:
    """The index of --validation_meta, as shared_index; None without the flag."""
    return _index_at(validation_location(args), args, ctx) if args.validation_meta else None


def _index_at(location: DataLocation, args: argparse.Namespace, ctx: Context) -> Index:
    workers = max(args.dataloader_num_workers, 1)
    build = partial(build_index, location, workers=workers, progress=True, notify=ctx.print)
    run_on_main(build, is_main=ctx.is_main, gather=ctx.gather)
    if not location.index_path.is_file():
        what = f"was written by process 0 and is not visible to process {ctx.rank}"
        raise UserError(str(location.index_path), what, "give all machines the same data at the same path", DATA)
    return load_index(location.index_path, location.data_dir)
