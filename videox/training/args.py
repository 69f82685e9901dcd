"""Checks across flags, and values that follow from several flags. Imports no torch, diffusers or accelerate."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from videox.distributed.environment import check_environment_once
from videox.errors import MODEL, UserError
from videox.optim.registry import check_installed, kind_of, parse_settings, takes_settings
from videox.run.folder import refuse_output_dir_conflicts
from videox.shapes import USUAL, Ratios
from videox.training.flags import EMA_DECAY, EMA_DEVICES
from videox.training.speed_flags import check_speed
from videox.training.validation_flags import check_samples, check_validation
from videox.weights.layout_tables import KOHYA, MERGED

if TYPE_CHECKING:
    from videox.data.plan.buckets import SizePolicy

PATHS = (
    "pretrained_model_name_or_path", "transformer_path", "vae_path", "train_data_dir", "train_data_meta", "dataset_config",
    "output_dir", "resume_from_checkpoint", "cost_model", "latent_cache", "init_lora_from",
    "validation_meta", "merge_base",
)  # fmt: skip

NOT_GIVEN = {  # flag that is required -> what is wrong without it, and how to fix it
    "pretrained_model_name_or_path": (
        "no model is given",
        "pass a model folder or an id of the Hugging Face Hub, or --recipe NAME, which names a model (see --list_recipes)",
    ),
    "train_data_meta": (
        "no data is given",
        "pass a folder of clips and captions with --train_data_dir, or a list of them with --train_data_meta",
    ),
}


def size_policy(args: argparse.Namespace, min_frames: int = 1, ratios: Ratios = USUAL) -> SizePolicy:
    """Build the size policy from the flags; min_frames, ratios: of the model. Raises UserError where flags differ."""
    from videox.data.plan.buckets import SizePolicy  # imported here, because --help does not need numpy

    return SizePolicy(
        video_sample_size=args.video_sample_size,
        image_sample_size=args.image_sample_size,
        token_sample_size=args.token_sample_size,
        n_frames=args.video_sample_n_frames,
        stride=args.video_sample_stride,
        sample_fps=args.video_sample_fps,
        enable_bucket=args.enable_bucket,
        random_hw_adapt=args.random_hw_adapt,
        token_length=args.training_with_video_token_length,
        random_frame_crop=args.random_frame_crop,
        random_ratio_crop=args.random_ratio_crop,
        fix_sample_size=tuple(args.fix_sample_size) if args.fix_sample_size else None,
        min_frames=min_frames,
        grid=args.bucket_grid,
        ratios=ratios,
    )


def check_args(args: argparse.Namespace) -> None:
    """Check the flags against each other and against the file system, before anything slow.

    Raises:
        UserError: naming the flags that contradict each other, or the path that cannot be used.
    """
    _check_required(args)
    if not is_dry_run(args):  # a dry run plans for the launch that the variables describe, and starts nothing
        check_environment_once(os.environ, args.mixed_precision)
    size_policy(args, ratios=USUAL)  # the model is not known yet; the plan is made with its own
    if args.gradient_checkpointing and args.selective_ac:
        raise UserError(
            "--selective_ac", "contradicts --gradient_checkpointing, which recomputes every block", "use one of them"
        )
    check_speed(args)
    output_dir, logging_dir = Path(args.output_dir), Path(os.path.normpath(Path(args.output_dir) / args.logging_dir))
    if not logging_dir.is_relative_to(os.path.normpath(output_dir)):
        what = f"{args.logging_dir!r} is outside --output_dir"
        raise UserError("--logging_dir", what, "pass the name of a folder inside it, such as logs")
    if args.verify and args.skip_verify:
        raise UserError("--skip_verify", "contradicts --verify", "use one of them")
    without_effect = {"validate_ema": False, "ema_decay": EMA_DECAY, "ema_device": EMA_DEVICES[0]}
    for flag, default in without_effect.items():
        if not args.use_ema and getattr(args, flag) != default:
            raise UserError(f"--{flag}", "there is no EMA without --use_ema", "add --use_ema, or remove the flag")
    _check_lora(args)
    _check_optimizer(args)
    for marker, variable in (("use_deepspeed", "ACCELERATE_USE_DEEPSPEED"), ("use_fsdp", "ACCELERATE_USE_FSDP")):
        if getattr(args, marker) and os.environ.get(variable, "false").lower() not in ("true", "1"):
            raise UserError(
                f"--{marker}",
                "the launcher does not run it",
                f"add --{marker} to accelerate launch, or remove it here",
            )
    _check_paths(args)
    check_validation(args)
    check_samples(args)


def _check_optimizer(args: argparse.Namespace) -> None:
    check_installed(optimizer_of(args))
    if args.optimizer_args and not takes_settings(optimizer_of(args)):
        what = f"{optimizer_of(args)} has flags of its own, such as --adam_beta1 and --adam_weight_decay"
        raise UserError("--optimizer_args", what, "use them, or an optimizer class such as torch.optim.RAdam")
    parse_settings(args.optimizer_args)


def _check_paths(args: argparse.Namespace) -> None:
    """Refuse paths that cannot be looked up, and an output folder in the model or around the data."""
    for flag in PATHS:
        value = getattr(args, flag)
        for path in value if isinstance(value, list) else [value]:
            if path:
                refuse_impossible(f"--{flag}", path)
    _check_merge_base(args.merge_base)
    parts = {flag: getattr(args, flag) for flag in ("transformer_path", "vae_path", "merge_base")}
    if planned_model(args) or (args.dry_run_data and is_dry_run(args)):
        return  # what is only described is not in any folder
    from videox.training.data_sources import sources_of  # imported here, because --help needs no reader of lists

    flag = "dataset_config" if args.dataset_config else "train_data_dir"
    for folder in dict.fromkeys(source.data_dir for source in sources_of(args).sources):
        refuse_output_dir_conflicts(
            args.output_dir, model=args.pretrained_model_name_or_path, data=folder, parts=parts, data_flag=flag
        )


def _check_merge_base(path: str | None) -> None:
    """Raise UserError (MODEL) where --merge_base is a path that does not exist; a Hub id is looked up later."""
    if path is None or Path(path).exists():
        return
    from videox.models.hub import HUB_ID  # imported here, because --help does not need it

    if not HUB_ID.fullmatch(path):
        raise UserError("--merge_base", f"{path} does not exist", "pass the folder or file of the bf16 model", MODEL)


def _check_required(args: argparse.Namespace) -> None:
    """Raise UserError unless the model and the data are given, or a dry run has a description of them."""
    data = args.train_data_meta or args.train_data_dir or args.dataset_config
    given = {
        "pretrained_model_name_or_path": (args.pretrained_model_name_or_path, args.dry_run_model),
        "train_data_meta": (data, args.dry_run_data),
    }
    for flag, (value, stand_in) in given.items():
        if not value and not (stand_in and is_dry_run(args)):
            raise UserError(f"--{flag}", *NOT_GIVEN[flag])


def planned_model(args: argparse.Namespace) -> str | None:
    """The --dry_run_model of a dry run; None where a model folder is read: in a run, and where there is one."""
    given = args.pretrained_model_name_or_path
    return args.dry_run_model if is_dry_run(args) and not (given and Path(given).exists()) else None


def is_dry_run(args: argparse.Namespace) -> bool:
    """Whether the flags ask for a plan alone: --dry_run or --explain."""
    return bool(args.dry_run or args.explain is not None)


def optimizer_of(args: argparse.Namespace) -> str:
    """The optimizer, from whichever flag names it; raises UserError where two flags disagree."""
    asked = {"use_8bit_adam": "adamw8bit", "use_came": "came"}
    chosen = {"optimizer": args.optimizer} if args.optimizer != "adamw" else {}
    chosen |= {flag: name for flag, name in asked.items() if getattr(args, flag)}
    if len({*chosen.values()}) > 1:
        named = " and ".join(f"--{flag}" for flag in chosen)
        raise UserError(f"--{next(iter(chosen))}", f"{named} name two optimizers", "use one of them")
    return next(iter(chosen.values()), "adamw")


def with_fp32_params(args: argparse.Namespace) -> bool:
    """Whether the transformer's weights are loaded in float32: they are trained, by an optimizer that needs it."""
    return not args.lora_rank and kind_of(optimizer_of(args)).fp32_params


def _check_lora(args: argparse.Namespace) -> None:
    if args.merge_base and MERGED not in args.export_layouts:
        what = f"has no effect: nothing is merged without --export_layouts {MERGED}"
        raise UserError("--merge_base", what, f"add {MERGED} to --export_layouts, or remove the flag")
    if not args.lora_rank:
        for flag, default in (
            ("lora_alpha", None), ("lora_target_modules", None), ("lora_dropout", 0.0), ("init_lora_from", None),
            ("lora_type", "lora"), ("loraplus_ratio", 1.0),
        ):  # fmt: skip
            if getattr(args, flag) != default:
                raise UserError(
                    f"--{flag}", "there is no LoRA without --lora_rank", "add --lora_rank, or remove the flag"
                )
        if of_lora := [layout for layout in (KOHYA, MERGED) if layout in args.export_layouts]:
            what = f"{of_lora[0]}: there is no LoRA without --lora_rank"
            raise UserError("--export_layouts", what, f"add --lora_rank, or remove {of_lora[0]}")
        return
    for flag, usual in (("trainable_modules", ["."]), ("trainable_modules_low_learning_rate", [])):
        if getattr(args, flag) != usual:
            what = f"{' '.join(getattr(args, flag))}: a LoRA run trains its adapters only"
            raise UserError(f"--{flag}", what, "select layers by --lora_target_modules, or remove --lora_rank")
    if args.save_whole_weights:
        what = "checkpoints of a LoRA run contain all of its adapters, and no frozen weights"
        raise UserError("--save_whole_weights", what, "remove the flag")
    if "original" in args.export_layouts:
        raise UserError("--export_layouts", "a LoRA has no layout called original", "use comfyui, kohya or merged")
    if args.lora_type == "dora" and (others := {*args.export_layouts} - {"diffusers", MERGED}):
        what = f"{' and '.join(sorted(others))}: a DoRA is written for diffusers, or merged into the model"
        raise UserError("--export_layouts", what, f"use {MERGED}, then scripts/export.py for other layouts")


def refuse_impossible(flag: str, path: str) -> None:
    """Raise UserError for a path that cannot be looked up: too long, or a loop of symbolic links."""
    try:
        Path(path).resolve().exists()
    except (OSError, RuntimeError) as why:
        raise UserError(flag, f"{path} cannot be looked up ({why})", "use another path") from why
