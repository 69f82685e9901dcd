"""Builds the parts of a run from its flags: LoRA, engine, recorder, checkpointer, validator.

What only a family knows (its model, its encoders, the inputs of its transformer) is in the family's train.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from videox.data.dataset import Batch
from videox.data.plan.timesteps import ACROSS_STEPS
from videox.device import memory_phase
from videox.diffusion.flow_matching import draw_sigmas, draws_in_window, timestep_density
from videox.diffusion.noise_window import WHOLE, NoiseWindow
from videox.distributed.collectives import run_on_main
from videox.distributed.replicas import NEVER, ReplicaCheck
from videox.distributed.straggler import backward_timer
from videox.engine.base import Engine, OptimizerFactory
from videox.engine.ddp import DdpEngine
from videox.engine.ema import EmaEngine
from videox.engine.export import export_bytes
from videox.engine.fsdp import FsdpEngine
from videox.engine.streamed import StreamedEngine
from videox.engine.train_state import checkpoint_bytes
from videox.estimate.cost_model import step_times
from videox.estimate.data_report import typical_fps
from videox.estimate.mfu import run_meter
from videox.estimate.model_profile import ModelProfile
from videox.estimate.report import Disk, keep_all_lines
from videox.estimate.time_left import TimeLeft
from videox.files import atomic_write
from videox.lora.adapters import AdaptedTensors, Lora
from videox.lora.checkpoint import LoraWeights, prepare_lora
from videox.lora.targets import choose_targets
from videox.models.base_precision import BF16
from videox.models.configured import Component
from videox.models.meta_init import is_sharded
from videox.models.norm_dtype import keep_norm_dtype
from videox.models.quantised import element_count
from videox.models.quantised_loading import load_quantised
from videox.models.transformer import attach_adapters, frozen_notes, load_transformer
from videox.optim.build import choose_trainable, clip_limit, lr_schedule
from videox.optim.registry import kind_of
from videox.run.checkpoint import read_manifest
from videox.tracking.gpu_memory import GpuMemory
from videox.tracking.jsonl import json_line
from videox.tracking.progress import ProgressBar
from videox.tracking.trackers import Tracker
from videox.training.args import optimizer_of, with_fp32_params
from videox.training.argument_parser import AUTO
from videox.training.checkpointing import Checkpointer, ExportSettings
from videox.training.context import Context
from videox.training.guard import StepGuard
from videox.training.merge_base import merge_source
from videox.training.optimizer import optimizer_factory
from videox.training.recorder import SAVE, VALIDATION, Instruments, Recorder
from videox.training.sample_requests import ClipDefaults, build_clips, with_flags
from videox.training.sampling import SampleClip
from videox.training.schedule import Schedule, most_common_shape
from videox.training.speed import attention_fact, prepare_blocks
from videox.training.startup import prepare_folder
from videox.training.step_loss import StepCorrection, uniform_draws
from videox.training.streaming import stream_weights
from videox.training.validation_flags import prompts_of
from videox.training.validation_loss import HeldOutLoss
from videox.training.validator import (
    HELD_OUT_FILE,
    SIGMAS,
    FamilyValidation,
    Intervals,
    MeasuredRows,
    Sampler,
    Validator,
)
from videox.weights.format import EXPORT_DTYPES

PRECISIONS = ("base_precision", "text_encoder_precision")
SIZES = (
    "video_sample_size", "image_sample_size", "token_sample_size", "video_sample_n_frames", "video_sample_stride",
)  # fmt: skip


def build_lora(
    args: argparse.Namespace,
    ctx: Context,
    schedule: Schedule,
    component: Component,
    default_targets: Mapping[str, Sequence[str]],
    pipeline_class: Any,  # noqa: ANN401 - of diffusers
) -> LoraWeights | None:
    """The adapters of a LoRA run, printed; None without --lora_rank.

    Args:
        component: the transformer.
        default_targets: layers that get adapters unless --lora_target_modules names others, by list of blocks.
        pipeline_class: of diffusers, which reads the family's LoRA files.
    """
    if not args.lora_rank:
        return None
    merge_into = merge_source(args, component)
    stored = component.source()
    targets = choose_targets(stored.shapes(), default_targets, args.lora_target_modules)
    alpha, dora = args.lora_alpha or float(args.lora_rank), args.lora_type == "dora"
    lora = Lora(args.lora_rank, alpha, args.lora_dropout, targets, dora=dora, loraplus_ratio=args.loraplus_ratio)
    weights, lines = prepare_lora(
        lora,
        stored,
        pipeline_class,
        seed=schedule.settings.seed,
        resume=ctx.checkpoint,
        init_from=Path(args.init_lora_from) if args.init_lora_from else None,
        run_on_main=partial(run_on_main, is_main=ctx.is_main, gather=ctx.gather),
        expert=getattr(args, "expert", None),
    )
    if merge_into is not None:
        weights.weights = merge_into
    ctx.print(*lines, *frozen_notes(ctx.accelerator))
    return weights


def load_model(
    args: argparse.Namespace,
    ctx: Context,
    schedule: Schedule,
    model_class: Any,  # noqa: ANN401 - of diffusers
    component: Component,
) -> Any:  # noqa: ANN401 - of diffusers
    """Load the transformer: trainable weights in float32, the frozen ones of a LoRA run in --base_precision."""
    with memory_phase("loading the model"):
        if args.base_precision == BF16:  # the compute dtype
            return load_transformer(model_class, component, ctx.accelerator, fp32_params=with_fp32_params(args))
        lists = [*schedule.profile.blocks]
        model, error = load_quantised(model_class, component, lists, args.base_precision, ctx.device)
    ctx.print(f"base       {args.base_precision}: {error}")
    return model


def base_lr(args: argparse.Namespace, schedule: Schedule) -> float:
    """The learning rate before warm-up and decay: --learning_rate, times the samples per step with --scale_lr."""
    return args.learning_rate * (schedule.settings.slots * args.train_batch_size if args.scale_lr else 1)


def lr_of_step(args: argparse.Namespace, schedule: Schedule) -> Callable[[int], float]:
    """The learning rate as a function of the optimizer steps done."""
    factor, base = lr_schedule(args.lr_scheduler, args.lr_warmup_steps, schedule.total), base_lr(args, schedule)
    return lambda step: base * factor(step)


def build_engine(
    args: argparse.Namespace,
    ctx: Context,
    schedule: Schedule,
    transformer: torch.nn.Module,
    blocks: Sequence[torch.nn.Module],
    component: Component,
    lora: LoraWeights | None,
) -> Engine:
    """The model as the backend trains it: freezes what is not trained, sets up activation checkpointing, and resumes.

    Args:
        transformer: of load_transformer.
        blocks: its repeated blocks, in order.
        component: what load_transformer was given.
        lora: of build_lora; its adapters are trained and the transformer is frozen.
    """
    with memory_phase("placing weights and optimizer"):
        keep_norm_dtype(transformer, ctx.device)
        prepare_blocks(args, ctx, schedule, transformer, blocks)
        stored: Any = component.source() if is_sharded(transformer) else None
        if lora is None:
            full, half = choose_trainable(
                transformer, args.trainable_modules, args.trainable_modules_low_learning_rate
            )
        else:
            full, half = attach_adapters(transformer, lora.lora, lora.values, ctx.accelerator), []
            stored = AdaptedTensors(stored, lora.values) if stored is not None else None
        full_weights = checkpoint_bytes(transformer, trained=4, frozen=4 if lora is None else 0)
        numbers = element_count(transformer)
        stream = stream_weights(args, ctx, blocks)
        make = optimizer_factory(args, base_lr(args, schedule), full, half)
        engine: Engine
        if stream is not None:
            engine = StreamedEngine(ctx.accelerator, transformer, make, stream)
        else:
            engine = _engine_of_backend(args, ctx, schedule, transformer, blocks, make, stored, lora)
        if args.use_ema:
            device = torch.device("cpu") if args.ema_device == "cpu" else None
            engine = EmaEngine(
                engine, is_main=ctx.is_main, decay=args.ema_decay, device=device, full_weights_bytes=full_weights
            )
    engine.checkpoint_bytes += export_bytes(
        numbers, extra_layouts(args), EXPORT_DTYPES[args.export_dtype], lora=lora is not None, ema=args.use_ema
    )
    if ctx.checkpoint:
        with memory_phase("loading the checkpoint"):
            engine.load(ctx.checkpoint)
    return engine


def _engine_of_backend(
    args: argparse.Namespace,
    ctx: Context,
    schedule: Schedule,
    transformer: torch.nn.Module,
    blocks: Sequence[torch.nn.Module],
    make: OptimizerFactory,
    stored: Any,  # noqa: ANN401 - tensors by name, of whichever layout
    lora: LoraWeights | None,
) -> Engine:
    if ctx.backend.engine == "deepspeed":
        from videox.engine.deepspeed import DeepSpeedEngine, DeepSpeedSettings  # DeepSpeed is installed on Linux only

        # A slot that is filled by cost may have several micro-batches, also where a step has one slot per process.
        slots = schedule.settings.slots // ctx.world_size
        micro_batches = slots if args.slot_fill == "fixed" else max(slots, 2)
        return DeepSpeedEngine(
            ctx.accelerator, transformer, make, stored=stored,
            settings=DeepSpeedSettings(args.max_grad_norm, args.train_batch_size, micro_batches),
            output_dir=ctx.output_dir, save_full_weights=args.save_whole_weights, weight_format=lora,
        )  # fmt: skip
    if ctx.backend.engine == "fsdp":
        return FsdpEngine(
            ctx.accelerator, transformer, blocks, make, stored=stored, save_full_weights=args.save_whole_weights,
            weight_format=lora, by_shard=kind_of(optimizer_of(args)).by_shard,
        )  # fmt: skip
    return DdpEngine(ctx.accelerator, transformer, make, lora)


class Records(NamedTuple):
    """What records, limits and saves the steps of a run."""

    recorder: Recorder
    guard: StepGuard
    checkpoints: Checkpointer


def build_records(
    args: argparse.Namespace,
    ctx: Context,
    schedule: Schedule,
    engine: Engine,
    profile: ModelProfile,
    model: Any,  # noqa: ANN401 - of diffusers
    facts: Mapping[str, object],
) -> Records:
    """Prepare the run folder and build recorder, guard and checkpointer.

    Args:
        profile: of the model, for MFU.
        model: of diffusers, for the names of tensors that stay float32.
        facts: task and flow shift, and expert if there are two, for args.json, the manifest and headers of exports.
    """
    resolved = {name: facts[name] for name in ("shift", "clip_image") if name in facts}
    resolved |= {"sample": sample_defaults(args, schedule)}
    prepare_folder(args, ctx, schedule, resolved, engine.checkpoint_bytes)
    disk = Disk(engine.checkpoint_bytes, args.checkpointing_steps, schedule.total, args.checkpoints_total_limit)
    ctx.print(*keep_all_lines(disk))
    bar = ProgressBar(schedule.total, initial=schedule.state.step, enabled=ctx.is_main)
    guard = StepGuard(ctx, schedule.state, args.max_bad_fraction, bar.note, skip_spikes=args.skip_spikes)
    recorder = Recorder(ctx, schedule, _instruments(args, ctx, schedule, engine, profile, bar), guard.count)
    size = args.token_sample_size if args.training_with_video_token_length else args.video_sample_size
    known = {
        "backend": ctx.backend.name, "optimizer": optimizer_of(args), "dtype": args.export_dtype,
        "learning_rate": base_lr(args, schedule), "resolution": f"{size}x{size}",
        "trigger_word": args.trigger_word, **attention_fact(model), **_precisions(args, ctx),
    }  # fmt: skip
    settings = ExportSettings(
        dtype=EXPORT_DTYPES[args.export_dtype],
        keep_fp32=type(model)._keep_in_fp32_modules or (),
        layouts=extra_layouts(args),
        base_model=args.pretrained_model_name_or_path,
        facts={**facts, **{name: getattr(args, name) for name in SIZES}, **known},
        keep=args.checkpoints_total_limit,
        at_end_only=args.export_at == "end",
        keep_best=args.keep_best,
        save_every=args.checkpointing_steps,
        expert=str(facts["expert"]) if "expert" in facts else None,
    )
    every = NEVER if ctx.world_size == 1 else args.replica_check_steps
    replicas = ReplicaCheck(ctx.device, ctx.gather, None if every == AUTO else int(every))
    return Records(recorder, guard, Checkpointer(ctx, schedule.state, engine, recorder, settings, replicas))


def _precisions(args: argparse.Namespace, ctx: Context) -> dict[str, str]:
    """What a checkpoint's manifest stores of quantised weights; a resumed run says if it began with other ones."""
    before = read_manifest(ctx.checkpoint)["description"] if ctx.checkpoint else {}
    for name in PRECISIONS:
        asked, stored = getattr(args, name), before.get(name, BF16)
        if ctx.checkpoint and asked != stored:
            ctx.print(f"warning: --{name} is {asked}, and was {stored} before the resume: the losses change a little")
    return {name: getattr(args, name) for name in PRECISIONS if getattr(args, name) != BF16}


def _instruments(
    args: argparse.Namespace, ctx: Context, schedule: Schedule, engine: Engine, profile: ModelProfile, bar: ProgressBar
) -> Instruments:
    network = profile.network(half=ctx.accelerator.mixed_precision == "bf16")
    meter = run_meter(
        replace(network, frozen=args.lora_rank > 0), peak_tflops=args.peak_tflops, processes=ctx.world_size,
        settings=schedule.settings, device=ctx.device,
    )  # fmt: skip
    every = {VALIDATION: args.validation_steps, SAVE: args.checkpointing_steps}
    tracker = Tracker(
        args.report_to, ctx.output_dir / args.logging_dir, project=args.tracker_project_name, settings=vars(args),
        first_step=schedule.state.step + 1, enabled=ctx.is_main,
    )  # fmt: skip
    tracker.earlier(ctx.output_dir)
    return Instruments(
        bar=bar,
        tracker=tracker,
        meter=meter,
        time_left=TimeLeft(meter, schedule.total, every),
        correct=StepCorrection(args, schedule.state),
        times=step_times(ctx.accelerator, schedule.settings),
        timer=backward_timer(ctx.accelerator, engine.model), memory=_gpu_memory(ctx),
    )  # fmt: skip


def _gpu_memory(ctx: Context) -> GpuMemory | None:
    """What compares the GPU's memory with the estimate of --dry_run; None except on the main process with a GPU."""
    if ctx.device.type != "cuda" or not ctx.is_main:
        return None
    run = ctx.memory.run
    return GpuMemory(ctx.device, run.memory(run.setup).allocated())


def build_validator(
    args: argparse.Namespace,
    ctx: Context,
    schedule: Schedule,
    engine: Engine,
    recorder: Recorder,
    rows: MeasuredRows,
    family: FamilyValidation,
    shift: float,
) -> Validator:
    """What measures the held-out loss and samples clips; prints which rows it measures, and writes held_out.jsonl.

    Also prints what of the prompts is not used as it was written.

    Args:
        rows: of encode_held_out.
        family: how the family predicts and samples.
        shift: flow shift of training.
    """
    seed, clips = schedule.settings.seed, list[SampleClip]()
    ctx.print(*rows.lines())
    if ctx.is_main and rows.records:
        with atomic_write(ctx.output_dir / HELD_OUT_FILE) as temporary:
            temporary.write_bytes(b"".join(map(json_line, rows.records)))
    if (prompts := prompts_of(args)) and family.no_samples:
        ctx.print(f"no sample clips: {family.no_samples}")
    elif prompts:
        defaults = ClipDefaults(
            **sample_defaults(args, schedule),
            steps=args.sample_steps,
            guidance=family.guidance_scale,
            negative_prompt=args.sample_negative_prompt,
            seed=seed % 2**32,
            embedded_guidance=family.embedded_guidance,
            text_tokens=args.tokenizer_max_length,
            ratios=schedule.profile.ratios,
        )
        clips, notes = build_clips(prompts, with_flags(args, defaults))
        ctx.print(*notes)
    ctx.print(*rare_notes(args, schedule.total, held_out=bool(rows.held_out), clips=bool(clips)))
    measure = HeldOutLoss(family.predict, engine.network, shift, seed, SIGMAS, family.given_frames, family.window)
    ema = engine.ema_weights if args.validate_ema and isinstance(engine, EmaEngine) else None
    sampler = Sampler(ctx, recorder, clips, family.pipeline, args.sample_minutes)
    intervals = Intervals(args.validation_steps, args.validation_epochs, args.sample_every)
    return Validator(ctx, recorder, rows, measure, sampler, intervals, ema)


def rare_notes(args: argparse.Namespace, total: int, *, held_out: bool, clips: bool) -> list[str]:
    """A line if the run is so short that there is nothing between its first and its last validation.

    Args:
        total: optimizer steps of the run.
        held_out: it measures a held-out loss.
        clips: it samples clips.
    """
    intervals = {"held-out loss": args.validation_steps if held_out else 0}
    intervals["sample clips"] = (args.sample_every or args.validation_steps) if clips else 0
    rare = [name for name, steps in intervals.items() if steps >= total > 1 and not args.validation_epochs]
    if not rare:
        return []
    flag = (
        f"--validation_steps {args.validation_steps}"
        if "held-out loss" in rare or not args.sample_every
        else "--sample_every"
    )
    return [f"{' and '.join(rare)}: at step 0 and at the end only, since the run has {total} steps (lower {flag})"]


def sample_defaults(args: argparse.Namespace, schedule: Schedule) -> dict[str, Any]:
    """The shape that is most common in the data and the frame rate of training, as fields of ClipDefaults."""
    fps = args.video_sample_fps or typical_fps(schedule.index, schedule.profile.fps) / args.video_sample_stride
    return {"shape": most_common_shape(schedule), "fps": fps}


def clip_limit_at(args: argparse.Namespace, step: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The gradient norm to clip to, as a function of the step's own norm; step: optimizer steps done."""
    return partial(
        clip_limit, step=step, max_grad_norm=args.max_grad_norm, initial_ratio=args.initial_grad_norm_ratio,
        ramp_steps=args.abnormal_norm_clip_start,
    )  # fmt: skip


def sigmas_of_batch(args: argparse.Namespace, batch: Batch, shift: float, window: NoiseWindow = WHOLE) -> torch.Tensor:
    """Sigmas, float32 [B], from the density of the weighting scheme: stratified or drawn independently.

    window: that the density is truncated to; some of the timesteps that are trained lie in it.
    """
    draws, count = uniform_draws(args, batch["strata"], batch["keys"]), args.train_sampling_steps
    # runs of older versions took no density with --uniform_sampling, and go on so
    shaped = not args.uniform_sampling or batch["timesteps"] == ACROSS_STEPS
    scheme = args.weighting_scheme if shaped else "none"
    density = (scheme, args.logit_mean, args.logit_std, args.mode_scale)
    if window == WHOLE:
        return draw_sigmas(timestep_density(draws, *density), shift, count)
    steps = window.steps(shift, count)
    draws = timestep_density(draws_in_window(draws, density, steps, count), *density)
    return draw_sigmas(draws, shift, count, steps)


def extra_layouts(args: argparse.Namespace) -> list[str]:
    """Layouts to write besides diffusers'."""
    return sorted(set(args.export_layouts) - {"diffusers"})
