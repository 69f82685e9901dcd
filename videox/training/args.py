"""Serves both train.py scripts: flags in groups, ranges, flags that are gone, and checks across flags."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from videox.data.media.video import READERS
from videox.data.plan.buckets import GRIDS, SizePolicy
from videox.data.plan.settings import BALANCES, SAMPLINGS
from videox.diffusion.flow_matching import NUM_TRAIN_TIMESTEPS, WEIGHTING_SCHEMES
from videox.errors import UserError
from videox.optim.build import SCHEDULES
from videox.optim.registry import OPTIMIZERS, refuse_absent
from videox.run.folder import refuse_taken
from videox.training.argument_parser import COUNT, COUNT_OR_ZERO, SHARE, Parser, number
from videox.weights.layout_writer import LAYOUTS, MERGED

LR_WARMUP_STEPS = 500
EMA_DECAY, EMA_DEVICES = 0.9999, ("accelerator", "cpu")  # the decay is that of diffusers' EMAModel
EXPORT_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PATHS = (
    "pretrained_model_name_or_path", "transformer_path", "vae_path", "train_data_dir", "train_data_meta", "output_dir",
    "resume_from_checkpoint", "cost_model", "latent_cache", "init_lora_from",
)  # fmt: skip


def add_model_and_data(parser: Parser) -> None:
    """Adds the flags for where model and data come from."""
    group = parser.add_argument_group("model and data")
    add = group.add_argument
    add("--pretrained_model_name_or_path", required=True, help="folder of the model, or its id on the hub")
    add("--transformer_path", help="folder or file of other transformer weights, any layout (none = the model's own)")
    add("--vae_path", help="folder or file of another VAE, any layout (none = the model's own)")
    add("--train_data_dir", help="folder that file_path entries are relative to (none = the metadata's own folder)")
    add("--train_data_meta", required=True, help="metadata: .json, .jsonl, .csv, .parquet, or a folder of clip + .txt")
    add("--allow_outside_data_dir", action="store_true", help="allow files outside train_data_dir (off = refused)")
    add(
        "--video_repeat",
        type=COUNT_OR_ZERO,
        default=0,
        help="times a video occurs in an epoch; images once (0 = once)",
    )
    add(
        "--clips_per_video",
        type=COUNT,
        default=1,
        help="clips of n_frames that a video gives in an epoch at most, as many as it holds (1 = off)",
    )
    add(
        "--clip_sampling",
        choices=SAMPLINGS,
        default=SAMPLINGS[0],
        help="where clips begin: anywhere, spread evenly, or at multiples of their own length from the beginning",
    )
    add("--caption_dropout", type=SHARE, default=0.1, help="share of captions, 0 to 1, trained as empty (0 = off)")
    add(
        "--dataloader_num_workers",
        type=number(int, 0, 256),
        default=0,
        help="decoding processes (0 = decode in the loop)",
    )
    add("--video_reader", choices=READERS, default=READERS[0], help="decoder; both give equal frames")
    add(
        "--max_bad_fraction",
        type=SHARE,
        default=0.01,
        help="share of rows, 0 to 1, that may be unreadable before the run stops; ten always may",
    )
    kept = "folder in which what the encoders make is kept and found again; runs may share it (none = off)"
    add("--latent_cache", metavar="DIR", help=kept)
    add(
        "--cache_only",
        action="store_true",
        help="fill --latent_cache with all that the run needs, and end (off = train)",
    )
    turns = "clip starts, sizes and masks are drawn for so many epochs and then come again (0 = drawn anew in each)"
    add("--cache_variants", type=COUNT_OR_ZERO, default=0, help=turns)


def add_shapes(parser: Parser) -> None:
    """Adds the flags that decide sizes."""
    group = parser.add_argument_group("shapes (pixels of a square's side unless said otherwise)")
    add = group.add_argument
    size = number(int, 32, 8192)
    add("--video_sample_size", type=size, default=512, help="target size of videos")
    add("--image_sample_size", type=size, default=512, help="target size of images")
    add(
        "--token_sample_size", type=size, default=512, help="size that sets the token budget, n_frames x size^2 pixels"
    )
    add(
        "--video_sample_stride",
        type=COUNT,
        default=4,
        help="source frames from one kept frame to the next (1 = every frame)",
    )
    add(
        "--video_sample_fps",
        type=number(float, 0, 1000),
        default=0.0,
        help="frames to keep per second of video, in place of the stride where a file tells its rate (0 = off)",
    )
    add("--video_sample_n_frames", type=COUNT, default=17, help="frames of a clip at most, 4k+1")
    add(
        "--fix_sample_size",
        type=number(int, 32, 8192),
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="one size for all samples (none = off)",
    )
    add("--enable_bucket", action="store_true", help="keep aspect ratios by buckets (off = centre-cropped squares)")
    grid = "sides of buckets: 40 aspect ratios, or exact: the source's own, in multiples of 16"
    add("--bucket_grid", choices=GRIDS, default=GRIDS[0], help=grid)
    add("--random_hw_adapt", action="store_true", help="draw sizes between the sample sizes (off = one size)")
    add(
        "--training_with_video_token_length",
        action="store_true",
        help="fewer frames at larger sizes, within the token budget (off = n_frames at every size)",
    )
    add("--random_frame_crop", action="store_true", help="one clip in ten is shortened to a random 4k+1 (off = whole)")
    add("--random_ratio_crop", action="store_true", help="crop to a random aspect ratio (off = nearest to the source)")
    add("--vae_mini_batch", type=COUNT, default=32, help="samples per VAE call")
    add("--vae_sample_mode", choices=("sample", "mode"), default="sample", help="posterior: drawn by key, or its mean")


def add_training(parser: Parser, modes: Sequence[str]) -> None:
    """Adds the flags of the optimizer step; modes: values of train_mode that the family has."""
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--train_mode", choices=tuple(modes), default="normal", help="normal = text-to-video; must fit the model")
    add(
        "--trainable_modules",
        nargs="+",
        default=["."],
        help="train parameters whose names contain one of these ('.' = all)",
    )
    add(
        "--trainable_modules_low_learning_rate",
        nargs="+",
        default=[],
        help="the same at half the learning rate (empty = none)",
    )
    add("--train_batch_size", type=COUNT, default=16, help="samples per micro-batch and process")
    add("--lora_rank", type=number(int, 0, 4096), default=0, help="train a LoRA of this rank (0 = the model itself)")
    add("--lora_alpha", type=number(float, 1e-6, 1e6), help="its changes count alpha / rank (none = the rank)")
    add(
        "--lora_target_modules",
        nargs="+",
        help="linear layers that it changes, by one or more parts of their names (none = attention and feed-forward)",
    )
    add(
        "--lora_dropout",
        type=number(float, 0, 0.99),
        default=0.0,
        help="share of a layer's inputs it misses (0 = off)",
    )
    add("--init_lora_from", help="file or folder of a LoRA to begin with, any layout (none = a new one)")
    add(
        "--slot_fill",
        choices=("fixed", "cost"),
        default="fixed",
        help="fixed: train_batch_size samples; cost: as many small ones as cost the same",
    )
    add(
        "--balance",
        choices=BALANCES,
        default=BALANCES[0],
        help="what runs side by side costs alike: mixed, while steps stay as varied as the data; strict, further (none = off)",
    )
    add(
        "--cost_model",
        help="cost_model.json of an earlier run, for what a sample costs (none = from the model's dimensions)",
    )
    add("--gradient_accumulation_steps", type=COUNT, default=1, help="micro-batches per optimizer step and process")
    add("--num_train_epochs", type=COUNT, default=100, help="epochs")
    add("--max_train_steps", type=COUNT, help="optimizer steps; wins over num_train_epochs (none = by epochs)")
    add("--learning_rate", type=number(float, 0, 10), default=1e-4, help="per optimizer step")
    add("--lr_scheduler", choices=SCHEDULES, default="constant", help="a function of the optimizer step")
    add("--lr_warmup_steps", type=COUNT_OR_ZERO, default=LR_WARMUP_STEPS, help="optimizer steps of warm-up (0 = off)")
    add("--scale_lr", action="store_true", help="learning rate x samples per optimizer step (off = as given)")
    add("--optimizer", choices=tuple(OPTIMIZERS), default="adamw", help="what steps the weights; see README_TRAIN.md")
    add("--use_8bit_adam", action="store_true", help="the same as --optimizer adamw8bit (off = as --optimizer says)")
    add("--use_came", action="store_true", help="the same as --optimizer came (off = as --optimizer says)")
    add("--adam_beta1", type=number(float, 0, 0.999999), default=0.9, help="decay of the first moment")
    add("--adam_beta2", type=number(float, 0, 0.9999999), default=0.999, help="decay of the second moment")
    add(
        "--adam_weight_decay",
        type=number(float, 0, 10),
        default=1e-2,
        help="of all parameters, per unit of learning rate (0 = off)",
    )
    add("--adam_epsilon", type=number(float, 1e-30, 1), default=1e-8, help="added to the root of the second moment")
    add(
        "--max_grad_norm",
        type=number(float, 1e-12, 1e12),
        default=1.0,
        help="global gradient norm to clip to (1e12 = off)",
    )
    add(
        "--initial_grad_norm_ratio",
        type=number(float, 1, 1e6),
        default=1.0,
        help="max_grad_norm starts this much higher and falls (1 = off)",
    )
    add("--abnormal_norm_clip_start", type=COUNT, default=1000, help="optimizer step at which that fall ends")
    add(
        "--gradient_checkpointing", action="store_true", help="recompute every block in the backward pass (off = keep)"
    )
    add(
        "--selective_ac",
        type=SHARE,
        default=0.0,
        help="share of blocks, 0 to 1, to recompute without gradient_checkpointing (0 = off)",
    )
    add(
        "--mixed_precision",
        choices=("no", "bf16"),
        help="precision of computation; weights stay float32 (none = the launcher's)",
    )
    add("--allow_tf32", action="store_true", help="TensorFloat-32 in float32 matrix products on GPUs (off = full)")
    add("--seed", type=number(int, 0, 2**63 - 1), help="of every random draw (none = drawn, printed and stored)")
    add(
        "--uniform_sampling",
        action="store_true",
        help="timesteps stratified over the global batch (off = drawn one by one)",
    )
    add(
        "--train_sampling_steps",
        type=number(int, 1, NUM_TRAIN_TIMESTEPS),
        default=NUM_TRAIN_TIMESTEPS,
        help="train the noisiest of 1000 timesteps (1000 = all)",
    )
    add(
        "--weighting_scheme",
        choices=WEIGHTING_SCHEMES,
        default="none",
        help="timestep density without uniform_sampling, and loss weight (none = even draws, weight 1)",
    )
    add("--logit_mean", type=number(float, -20, 20), default=0.0, help="of logit_normal")
    add("--logit_std", type=number(float, 1e-6, 20), default=1.0, help="of logit_normal")
    add("--mode_scale", type=number(float, -1, 1.75), default=1.29, help="of mode")
    add("--use_ema", action="store_true", help="keep a moving average of the float32 weights (off = none)")
    add(
        "--ema_decay",
        type=SHARE,
        default=EMA_DECAY,
        help="share of itself that the average keeps per optimizer step n, at most; n / (9 + n) at first",
    )
    add(
        "--ema_device",
        choices=EMA_DEVICES,
        default=EMA_DEVICES[0],
        help="where the average is kept: beside the weights, or in host memory",
    )
    add("--motion_sub_loss", action="store_true", help="mix in the error of frame-to-frame change (off = none)")
    add("--motion_sub_loss_ratio", type=SHARE, default=0.25, help="its share, 0 to 1")
    add("--low_vram", action="store_true", help="encoders are on the GPU only while used (off = they stay)")
    add(
        "--use_deepspeed",
        action="store_true",
        help="say that the launcher runs DeepSpeed (off = the launcher decides)",
    )
    add("--use_fsdp", action="store_true", help="say that the launcher runs FSDP (off = the launcher decides)")


def add_run(parser: Parser) -> None:
    """Adds the flags for what a run writes and when."""
    group = parser.add_argument_group("run (steps are optimizer steps)")
    add = group.add_argument
    add("--output_dir", default="sd-model-finetuned", help="folder of everything that the run writes")
    add("--logging_dir", default="logs", help="tracker's folder inside output_dir")
    add("--report_to", default="tensorboard", help="tracker: tensorboard or wandb (none = off)")
    add("--tracker_project_name", default="videox", help="name of the run in the tracker")
    add(
        "--checkpointing_steps",
        type=COUNT,
        default=500,
        help="steps from one checkpoint to the next; the end is always saved",
    )
    add("--checkpoints_total_limit", type=COUNT, help="keep this many checkpoints (none = all)")
    add(
        "--save_whole_weights",
        action="store_true",
        help="checkpoints of ZeRO-3 and FSDP also hold transformer/ for diffusers, float32 (off = shards alone; ZeRO-2, "
        "DDP and one process hold it in any case)",
    )
    add("--resume_from_checkpoint", help="'latest' or the path of a checkpoint (none = a new run)")
    add(
        "--verify",
        action="store_true",
        help="check all hashes of the checkpoint before resuming (off = after a crash only)",
    )
    add(
        "--export_layouts",
        nargs="+",
        choices=("diffusers", *LAYOUTS, MERGED),
        default=["diffusers"],
        help="of the trained weights, at the end and in each checkpoint's exports/; diffusers' is always written at the "
        "end (original, comfyui: one file more each; merged: a LoRA's base with the LoRA in it, a diffusers folder)",
    )
    add("--export_dtype", choices=tuple(EXPORT_DTYPES), default="bf16", help="of what is exported")
    add(
        "--validation_rows",
        type=COUNT_OR_ZERO,
        default=0,
        help="rows kept out of training for the validation loss (0 = off)",
    )
    add(
        "--validate_ema",
        action="store_true",
        help="sample clips with the average of --use_ema, measure it beside the weights (off = the weights alone)",
    )
    add("--validation_prompts", nargs="+", default=[], help="prompts to sample clips from (empty = off)")
    add("--validation_paths", nargs="+", default=[], help="images that these clips start from (empty = text-to-video)")
    add("--validation_steps", type=COUNT, default=2000, help="steps from one validation to the next")
    add("--validation_epochs", type=COUNT_OR_ZERO, default=5, help="epochs from one validation to the next (0 = off)")
    add(
        "--dump_steps",
        type=COUNT,
        nargs="+",
        default=[],
        help="steps whose tensors are written to output_dir/dump (empty = off)",
    )


def size_policy(args: argparse.Namespace, min_frames: int = 1) -> SizePolicy:
    """Returns the flags that decide sizes; raises UserError when they contradict each other."""
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
    )


def check(args: argparse.Namespace) -> None:
    """Checks flags against each other and against the file system, before anything slow.

    Raises:
        UserError: naming both flags.
    """
    size_policy(args)
    if args.gradient_checkpointing and args.selective_ac:
        raise UserError(
            "--selective_ac", "contradicts --gradient_checkpointing, which recomputes every block", "give one of them"
        )
    without_effect = {"validate_ema": False, "ema_decay": EMA_DECAY, "ema_device": EMA_DEVICES[0]}
    for flag, default in without_effect.items():
        if not args.use_ema and getattr(args, flag) != default:
            raise UserError(
                f"--{flag}", "there is no average without --use_ema", "add --use_ema, or leave the flag out"
            )
    _check_lora(args)
    refuse_absent(optimizer_of(args))
    for marker, variable in (("use_deepspeed", "ACCELERATE_USE_DEEPSPEED"), ("use_fsdp", "ACCELERATE_USE_FSDP")):
        if getattr(args, marker) and os.environ.get(variable, "false").lower() not in ("true", "1"):
            raise UserError(
                f"--{marker}", "the launcher does not run it", f"add --{marker} to accelerate launch, or drop it here"
            )
    for flag in PATHS:
        if path := getattr(args, flag):
            refuse_impossible(f"--{flag}", path)
    wanted = len(args.validation_prompts) if args.train_mode != "normal" else 0
    if len(args.validation_paths) != wanted:
        what = f"{len(args.validation_paths)} images, --train_mode {args.train_mode} samples from {wanted}"
        raise UserError(
            "--validation_paths", what, "give one image for each of --validation_prompts in i2v and inpaint"
        )
    parts = {flag: getattr(args, flag) for flag in ("transformer_path", "vae_path")}
    refuse_taken(args.output_dir, model=args.pretrained_model_name_or_path, data=data_dir(args), parts=parts)


def optimizer_of(args: argparse.Namespace) -> str:
    """Returns the optimizer that was asked for, by whichever flag; raises UserError where two flags disagree."""
    asked = {"use_8bit_adam": "adamw8bit", "use_came": "came"}
    chosen = {"optimizer": args.optimizer} if args.optimizer != "adamw" else {}
    chosen |= {flag: name for flag, name in asked.items() if getattr(args, flag)}
    if len({*chosen.values()}) > 1:
        named = " and ".join(f"--{flag}" for flag in chosen)
        raise UserError(f"--{next(iter(chosen))}", f"{named} ask for two optimizers", "give one of them")
    return next(iter(chosen.values()), "adamw")


def with_fp32_params(args: argparse.Namespace) -> bool:
    """Returns whether the transformer's own weights are loaded in float32: they train, and no less will do."""
    return not args.lora_rank and OPTIMIZERS[optimizer_of(args)].fp32_params


def _check_lora(args: argparse.Namespace) -> None:
    if not args.lora_rank:
        for flag, default in (
            ("lora_alpha", None), ("lora_target_modules", None), ("lora_dropout", 0.0), ("init_lora_from", None),
        ):  # fmt: skip
            if getattr(args, flag) != default:
                raise UserError(
                    f"--{flag}", "there is no LoRA without --lora_rank", "add --lora_rank, or leave it out"
                )
        if MERGED in args.export_layouts:
            what = "merged: there is no LoRA without --lora_rank"
            raise UserError("--export_layouts", what, "add --lora_rank, or leave it out")
        return
    for flag, usual in (("trainable_modules", ["."]), ("trainable_modules_low_learning_rate", [])):
        if getattr(args, flag) != usual:
            what = f"{' '.join(getattr(args, flag))}: a LoRA trains its adapters alone"
            raise UserError(f"--{flag}", what, "name the layers by --lora_target_modules, or leave --lora_rank out")
    if args.save_whole_weights:
        what = "a LoRA's checkpoints hold its adapters whole, and nothing of what is frozen"
        raise UserError("--save_whole_weights", what, "leave it out")
    if "original" in args.export_layouts:
        raise UserError(
            "--export_layouts", "a LoRA has no layout called original", "give comfyui (its names), or merged"
        )


def refuse_impossible(flag: str, path: str) -> None:
    """Raises UserError for a path that the file system cannot even be asked about: too long, or a loop of links."""
    try:
        Path(path).resolve().exists()
    except (OSError, RuntimeError) as why:
        raise UserError(flag, f"{path} cannot be looked up ({why})", "give another path") from why


def data_dir(args: argparse.Namespace) -> Path:
    """Returns the folder that file_path entries are relative to."""
    meta = Path(args.train_data_meta)
    return Path(args.train_data_dir) if args.train_data_dir else (meta if meta.is_dir() else meta.parent)
