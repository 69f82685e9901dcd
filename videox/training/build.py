"""Serves both train.py scripts: turns the flags into the parts that a run is built of.

Beside args.py, scheduling.py and planning.py no module takes the parsed flags; everything that these call takes named
parameters. What a family alone knows (its model, its encoders, its inputs) stays in the family's script.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

import videox.estimate.data_report as report
from videox.data.bucket_sampler import BucketBatchSampler
from videox.data.dataset import Batch, TokenLengthDataset
from videox.data.loader import build_loader
from videox.data.plan.plan import plan_epoch
from videox.diffusion.flow_matching import draw_sigmas, timestep_density
from videox.distributed.accelerator import Backend, follow_launcher, gather_objects, make_accelerator
from videox.distributed.straggler import backward_timer
from videox.encoders.encode import Encoder, EncodingSpec, LazyEncoders
from videox.engine.base import DdpEngine, Engine
from videox.engine.deepspeed_universal import announce_conversion
from videox.engine.ema import EmaEngine, average_notes
from videox.engine.export import Exports, export_bytes
from videox.engine.fsdp import OPTIMIZER_FOLDER, FsdpEngine
from videox.engine.fsdp_local_optim import refuse_other_moments
from videox.engine.train_state import TrainState, checkpoint_bytes, plan_inputs, refuse_other_backend
from videox.errors import UserError
from videox.estimate.cost_model import step_times
from videox.estimate.flops import Network
from videox.estimate.mfu import run_meter
from videox.lora.adapters import Adapted, Lora, choose_targets
from videox.lora.checkpoint import LoraWeights, begin_adapters, refuse_other_kind
from videox.models.activation_checkpoint import recompute_blocks
from videox.models.component import Component
from videox.models.meta_init import is_divided
from videox.models.transformer import attach, frozen_notes
from videox.optim.build import choose_trainable, clip_limit, make_optimizer, parameter_groups, schedule
from videox.optim.cpu_offload import thread_notes
from videox.optim.registry import OPTIMIZERS, refuse_unfit
from videox.rng import Purpose, uniform
from videox.run.failure import FailureMonitor
from videox.run.lifecycle import Run, main_first, open_run
from videox.tracking.trackers import check_tracker
from videox.training.args import EXPORT_DTYPES, LR_WARMUP_STEPS, optimizer_of, size_policy
from videox.training.precompute import fill_together, find_missing, format_missing, open_encoder
from videox.training.recorder import Recorder
from videox.training.schedule import Gather, Schedule
from videox.training.validation_loss import HeldOut
from videox.training.validator import Validator, validation_images


def announce(args: argparse.Namespace, accelerator: Accelerator, backend: Backend, run: Run, task: str) -> None:
    """Prints what runs and sets what holds for the whole process; refuses a tracker that is not there.

    Args:
        task: what is trained, and where that was read from.
    """
    check_tracker(args.report_to)
    if args.initial_grad_norm_ratio > 1 and not backend.clips_by_own_norm:
        what = f"{args.initial_grad_norm_ratio:g}: DeepSpeed clips every step to the same norm"
        raise UserError("--initial_grad_norm_ratio", what, "leave the flag out, or launch FSDP or DDP")
    refuse_other_backend(run.resume.path, backend, optimizer_of(args))
    refuse_other_kind(run.resume.path, args.lora_rank)
    refuse_unfit(optimizer_of(args), backend.name, accelerator.mixed_precision, lora=args.lora_rank > 0)
    if run.resume.path and backend.name == "fsdp2":
        refuse_other_moments(run.resume.path / OPTIMIZER_FOLDER, optimizer_of(args), accelerator.num_processes)
    converting = conversion_notes(args, accelerator, run.resume.path) if backend.kind == "zero" else []
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
    facts = report.start_facts(accelerator, backend, task=task, output_dir=Path(args.output_dir))
    changed = report.changed_flags(Path(args.output_dir), vars(args)) if run.resume.path else []
    late = average_notes(run.resume.path, args.use_ema)
    accelerator.print("\n".join([*report.start_lines(facts), *run.notes, *notes(args), *changed, *converting, *late]))


def conversion_notes(args: argparse.Namespace, accelerator: Accelerator, checkpoint: Path | None) -> list[str]:
    """Returns lines on a DeepSpeed checkpoint that this number of processes must convert; refuses where no room is."""
    said: list[str] = []
    if checkpoint is not None:
        work = partial(announce_conversion, checkpoint, Path(args.output_dir), accelerator.num_processes)
        is_main, gather = accelerator.is_main_process, gather_objects(accelerator)
        main_first(lambda: said.extend(work()), is_main=is_main, gather=gather)
    return said


def open_lora(
    args: argparse.Namespace,
    accelerator: Accelerator,
    run: Run,
    schedule_: Schedule,
    part: Component,
    own: Mapping[str, Sequence[str]],
    pipeline_class: Any,  # noqa: ANN401 - of diffusers
) -> LoraWeights | None:
    """Returns what a LoRA run trains and keeps, and says it; None without --lora_rank. part: the transformer."""
    if not args.lora_rank:
        return None
    stored = part.source()
    targets = choose_targets(stored.shapes(), own, args.lora_target_modules)
    lora = Lora(args.lora_rank, args.lora_alpha or float(args.lora_rank), args.lora_dropout, targets)
    adapters, said = begin_adapters(
        lora,
        stored,
        pipeline_class,
        seed=schedule_.settings.seed,
        resume=run.resume.path,
        other=Path(args.init_lora_from) if args.init_lora_from else None,
        first=partial(main_first, is_main=accelerator.is_main_process, gather=gather_objects(accelerator)),
    )
    accelerator.print("\n".join([*said, *frozen_notes(accelerator)]))
    return adapters


def open_engine(
    args: argparse.Namespace,
    accelerator: Accelerator,
    backend: Backend,
    transformer: torch.nn.Module,
    blocks: Sequence[torch.nn.Module],
    schedule_: Schedule,
    part: Component,
    adapters: LoraWeights | None = None,
) -> tuple[Engine, Callable[[int], float]]:
    """Returns the model as its backend trains it, and the learning rate as a function of the optimizer step.

    Freezes what is not to train and sets up recomputation.

    Args:
        transformer: of load_transformer.
        blocks: its repeated blocks, in order.
        schedule_: gives the total steps and the samples per step.
        part: that load_transformer was given.
        adapters: of open_lora; they train, and the transformer is frozen.
    """
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()  # type: ignore[operator]
    elif args.selective_ac:
        recompute_blocks(transformer, blocks, args.selective_ac)
    stored = part.source() if is_divided(transformer) else None
    if adapters is None:
        full, half = choose_trainable(transformer, args.trainable_modules, args.trainable_modules_low_learning_rate)
    else:
        full, half = attach(transformer, adapters.lora, adapters.values, accelerator), []
        stored = Adapted(stored, adapters.values) if stored is not None else None
    slots = schedule_.settings.slots
    base = args.learning_rate * (slots * args.train_batch_size if args.scale_lr else 1)

    def optimizer_over(parameters: Mapping[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
        return make_optimizer(
            parameter_groups(parameters, full, half),
            learning_rate=base,
            betas=(args.adam_beta1, args.adam_beta2),
            weight_decay=args.adam_weight_decay,
            epsilon=args.adam_epsilon,
            name=optimizer_of(args),
        )

    engine: Engine
    whole_bytes = checkpoint_bytes(transformer, trained=4, frozen=4 if adapters is None else 0)
    exported = export_bytes(
        checkpoint_bytes(transformer, trained=1, frozen=1), more_layouts(args), EXPORT_DTYPES[args.export_dtype],
        lora=adapters is not None, averaged=args.use_ema,
    )  # fmt: skip
    if backend.kind == "zero":
        from videox.engine.deepspeed import DeepSpeedEngine  # DeepSpeed is installed on Linux only

        several = slots // accelerator.num_processes
        engine = DeepSpeedEngine(
            accelerator,
            transformer,
            optimizer_over,
            stored=stored,
            max_grad_norm=args.max_grad_norm,
            batch_size=args.train_batch_size,
            micro_batches=several if args.slot_fill == "fixed" else max(several, 2),
            output_dir=Path(args.output_dir),
            whole_weights=args.save_whole_weights,
            kept=adapters,
        )
    elif backend.kind == "fsdp":
        whole = args.save_whole_weights
        engine = FsdpEngine(
            accelerator, transformer, blocks, optimizer_over, stored=stored, whole_weights=whole, kept=adapters,
            by_shard=OPTIMIZERS[optimizer_of(args)].by_shard,
        )  # fmt: skip
    else:
        engine = DdpEngine(accelerator, transformer, optimizer_over, adapters)
    if args.use_ema:
        engine = EmaEngine(
            engine,
            is_main=accelerator.is_main_process,
            decay=args.ema_decay,
            device=torch.device("cpu") if args.ema_device == "cpu" else None,
            whole_bytes=whole_bytes,
        )
    engine.checkpoint_bytes += exported
    factor = schedule(args.lr_scheduler, args.lr_warmup_steps, schedule_.total)
    return engine, lambda step: base * factor(step)


def open_watch(
    args: argparse.Namespace,
    accelerator: Accelerator,
    run: Run,
    gather: Gather,
    schedule_: Schedule,
    engine: Engine,
    resolved: Mapping[str, Any],
    network: Callable[..., Network],
) -> Recorder:
    """Returns the run's records, with what lies behind the resumed step moved aside.

    Args:
        resolved: what followed from the flags beside the schedule, for args.json.
        network: makes the model's operations.
    """
    plan = {
        "run": schedule_.state.run,
        "seed": schedule_.settings.seed,
        "slots": schedule_.settings.slots,
        "total_steps": schedule_.total,
    }
    computed = replace(network(half=accelerator.mixed_precision == "bf16"), frozen=args.lora_rank > 0)
    meter = run_meter(
        computed, peak_tflops=args.peak_tflops, processes=accelerator.num_processes, settings=schedule_.settings,
        device=accelerator.device,
    )  # fmt: skip
    return Recorder(
        Path(args.output_dir),
        run,
        schedule_.state,
        schedule_.total,
        asked=vars(args),
        resolved={**plan, **resolved, "plan": plan_inputs(schedule_.settings)},
        report_to=args.report_to,
        logging_dir=args.logging_dir,
        project=args.tracker_project_name,
        checkpoint_bytes=engine.checkpoint_bytes,
        meter=meter,
        is_main=accelerator.is_main_process,
        gather=gather,
        times=step_times(accelerator, schedule_.settings),
        device=accelerator.device,
        effort=backward_timer(accelerator, engine.model),
    )


def open_data(
    args: argparse.Namespace,
    accelerator: Accelerator,
    gather: Gather,
    planned: Schedule,
    recipes: Sequence[EncodingSpec],
    encoders: LazyEncoders,
) -> tuple[Encoder, TokenLengthDataset, BucketBatchSampler, torch.utils.data.DataLoader]:
    """Returns what encodes, dataset, this process's sampler and the loader over both.

    Args:
        recipes: how a sample's tensors are made.
        encoders: loaded here, unless the cache has everything that they would make.
    """
    if args.cache_only and not args.latent_cache:
        raise UserError("--cache_only", "there is no --latent_cache to fill", "name a folder with --latent_cache")
    encode = open_encoder(
        recipes, args.latent_cache, mode=args.train_mode, device=accelerator.device,
        is_main=accelerator.is_main_process, gather=gather, encoders=encoders,
    )  # fmt: skip
    dataset = TokenLengthDataset(
        planned.index, policy=size_policy(args), reader=args.video_reader, caption_dropout=args.caption_dropout,
        shelf=encode.shelf, always_read=bool(args.dump_steps),
    )  # fmt: skip
    stocks = find_missing(planned.columns, planned.settings, planned.state, planned.total, dataset, encode)
    for line in format_missing(stocks, encode.cache) if encode.cache is not None else ():
        accelerator.print(line, flush=True)  # before the bar, also in a file
    if any(gather(encode.cache is None or any(stock.jobs for stock in stocks))):
        encoders.load(gather)
    sampler = BucketBatchSampler(rank=accelerator.process_index, world_size=accelerator.num_processes)
    pinned = accelerator.device.type == "cuda"
    loader = build_loader(dataset, sampler, workers=args.dataloader_num_workers, pin_memory=pinned)
    return encode, dataset, sampler, loader


def fill_cache(
    args: argparse.Namespace, accelerator: Accelerator, run: Run, gather: Gather, planned: Schedule,
    encode: Encoder, dataset: TokenLengthDataset,
) -> int:  # fmt: skip
    """Makes all that the run needs and the cache has not, each process its share; returns the exit code."""
    return fill_together(
        find_missing(planned.columns, planned.settings, planned.state, planned.total, dataset, encode), encode,
        rank=accelerator.process_index, world_size=accelerator.num_processes, workers=args.dataloader_num_workers,
        gather=gather, say=accelerator.print, status=run.status,
    )  # fmt: skip


def validation_due(args: argparse.Namespace, step: int, epochs: int) -> bool:
    """Returns whether to validate after `step` optimizer steps; epochs: how many just ended, 0 in the midst of one."""
    by_epoch = epochs > 0 and args.validation_epochs > 0 and epochs % args.validation_epochs == 0
    return by_epoch or step % args.validation_steps == 0


def notes(args: argparse.Namespace) -> list[str]:
    """Returns lines on flags that are taken otherwise than a user may think."""
    lines, policy = [], size_policy(args)
    ranged = policy.token_length or policy.random_hw_adapt
    if ranged and policy.image_sample_size < policy.video_sample_size:
        given = (
            f"--image_sample_size {policy.image_sample_size} is below --video_sample_size {policy.video_sample_size}"
        )
        lines.append(f"{given}: sizes run from {policy.low} to {policy.high} all the same")
    if args.lr_scheduler == "constant" and args.lr_warmup_steps != LR_WARMUP_STEPS:
        lines.append("--lr_warmup_steps does nothing with --lr_scheduler constant; constant_with_warmup has a warm-up")
    if OPTIMIZERS[optimizer_of(args)].on_host:
        lines += thread_notes(optimizer_of(args), torch.get_num_threads(), os.cpu_count() or 1, os.environ)
    world = os.environ.get("WORLD_SIZE", "1")
    if "TORCHELASTIC_RUN_ID" in os.environ and "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" not in os.environ:
        lines.append(
            "after Ctrl-C or SIGTERM the launcher waits 30 s and then kills: export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 "
            "where a step and its save take longer"
        )
    one_machine = world == os.environ.get("LOCAL_WORLD_SIZE", world)
    if os.environ.get("NCCL_P2P_DISABLE") == "1" and one_machine and world != "1":
        lines.append("NCCL_P2P_DISABLE=1 turns NVLink off: unset it on a single machine")
    return lines


def clip_limit_of(args: argparse.Namespace) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """Returns the gradient norm to clip to, as a function of (norm, optimizer steps done)."""
    return partial(
        clip_limit,
        max_grad_norm=args.max_grad_norm,
        initial_ratio=args.initial_grad_norm_ratio,
        ramp_steps=args.abnormal_norm_clip_start,
    )


def draw_sigmas_of(args: argparse.Namespace, batch: Batch, shift: float) -> torch.Tensor:
    """Returns sigmas, float32 [B]: stratified over the global batch, or drawn one by one from the scheme's density."""
    if args.uniform_sampling:
        draws = batch["strata"]
    else:
        own = uniform(np.array(batch["keys"], np.uint64), Purpose.TIMESTEP)
        draws = timestep_density(own, args.weighting_scheme, args.logit_mean, args.logit_std, args.mode_scale)
    return draw_sigmas(draws, shift, args.train_sampling_steps)


def start(args: argparse.Namespace, train: Callable[..., int]) -> int:
    """Opens processes and run folder, calls train(args, accelerator, backend, run, gather), returns its exit code."""
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()  # a bar for each part of the model, done in an instant, hides what matters
    follow_launcher(os.environ)
    accelerator, backend = make_accelerator(args.mixed_precision)
    gather, peers = gather_objects(accelerator), FailureMonitor()
    if accelerator.num_processes > 1:
        accelerator.print(*peers.join(accelerator.process_index, gather, os.environ), sep="\n", end="")
    opened = open_run(
        Path(args.output_dir),
        resume=args.resume_from_checkpoint,
        verify=args.verify,
        is_main=accelerator.is_main_process,
        gather=gather,
    )
    with peers.first_cause(), opened as run, peers.first_cause():  # inside, so that run_status.json gets the cause
        peers.status = run.status
        code = train(args, accelerator, backend, run, gather)
    peers.leave()
    return code


def open_validator(
    args: argparse.Namespace,
    accelerator: Accelerator,
    backend: Backend,
    watch: Recorder,
    planned: Schedule,
    *,
    engine: Engine,
    held_out: Sequence[HeldOut],
    predict: Callable[[torch.Tensor, torch.Tensor, HeldOut], torch.Tensor],
    pipeline: Callable[[], AbstractContextManager[Any]],
    shift: float,
    guidance_scale: float,
    given_frames: int = 0,
) -> Validator:
    """Returns what looks at the model on the way; sample clips have the size of the commonest bucket.

    Args:
        engine: with the model; held_out, predict, pipeline, shift, guidance_scale, given_frames: as Validator's.
    """
    # of the first epoch, so that the clips of two steps, or of a resumed run, differ by the training alone
    shape = plan_epoch(planned.columns, planned.settings, 0).commonest_bucket()
    return Validator(
        accelerator,
        watch,
        model=engine.network,
        held_out=held_out,
        predict=predict,
        prompts=args.validation_prompts,
        images=validation_images(args.validation_paths, shape),
        pipeline=pipeline,
        shape=shape,
        fps=args.video_sample_fps or report.typical_fps(planned.index) / args.video_sample_stride,
        shift=shift,
        guidance_scale=guidance_scale,
        seed=planned.settings.seed,
        collective=not backend.whole_weights,
        averaged=engine.averaged if args.validate_ema and isinstance(engine, EmaEngine) else None,
        given_frames=given_frames,
    )


def export_of(
    args: argparse.Namespace,
    accelerator: Accelerator,
    engine: Engine,
    model: Any,  # noqa: ANN401 - of diffusers
    state: TrainState,
    facts: Mapping[str, object],
    warn: Callable[[str], None],
) -> Exports:
    """Returns what writes checkpoints and, at the end, the trained weights in the layouts that were asked for.

    Args:
        model: of diffusers, for the names of what stays float32.
        state: of the run.
        facts: task, backend and shift, for the files' headers.
        warn: tells the user of an export that cannot be.
    """
    asked = (
        "video_sample_size", "image_sample_size", "token_sample_size", "video_sample_n_frames", "video_sample_stride",
    )  # fmt: skip
    return Exports(
        engine,
        state,
        Path(args.output_dir),
        dtype=EXPORT_DTYPES[args.export_dtype],
        keep_fp32=type(model)._keep_in_fp32_modules or (),
        layouts=more_layouts(args),
        base_model=args.pretrained_model_name_or_path,
        facts={**facts, **{name: getattr(args, name) for name in asked}, "dtype": args.export_dtype},
        is_main=accelerator.is_main_process,
        warn=warn,
    )


def more_layouts(args: argparse.Namespace) -> list[str]:
    """Returns the layouts to write beside diffusers'."""
    return sorted(set(args.export_layouts) - {"diffusers"})
