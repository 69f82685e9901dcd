"""The command-line flags that both train.py scripts share, in groups. args.py checks them against each other.

Nothing here imports torch, diffusers or accelerate, so that --help and a mistyped flag are answered at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from videox.data.choices import ACCEPTED, BALANCES, GRIDS, MISSING_CAPTIONS, NEXT_EPOCH, READERS, SAMPLINGS
from videox.diffusion.schemes import NUM_TRAIN_TIMESTEPS, WEIGHTING_SCHEMES
from videox.distributed.backends import BACKENDS
from videox.estimate.gpus import GPUS
from videox.lora.kinds import LORA_TYPES, lora_type
from videox.optim.registry import LR_SCHEDULERS, OPTIMIZERS, optimizer_name
from videox.training.argument_parser import (
    AUTO,
    COUNT,
    COUNT_OR_ZERO,
    SHARE,
    OneOrMore,
    Parser,
    number,
    number_or_auto,
)
from videox.training.run_files import ListRecipes
from videox.training.speed_flags import add_speed
from videox.training.validation_flags import add_samples, add_validation
from videox.weights.layout_tables import KOHYA, LAYOUTS, MERGED

LR_WARMUP_STEPS = 500
REPORT_SECONDS = 60.0
EMA_DECAY, EMA_DEVICES = 0.9999, ("accelerator", "cpu")  # the decay is that of diffusers' EMAModel
EXPORT_DTYPES = ("bf16", "fp16", "fp32")
EXPORT_TIMES = ("end", "every")
VAE_DTYPES = ("fp32", "bf16")
PROCESSES = number(int, 1, 65_536)  # of a dry run; its plan holds at least one slot for each of them


INTRODUCTION = """\
train.py needs a model and data. A recipe names the model and has the settings for a GPU; CLIPS is a folder of clips and captions:
  {script} --recipe NAME --train_data_dir CLIPS --output_dir outputs/mine
  recipes for your GPU       {script} --list_recipes
  does it fit, and how long  the same command with --dry_run
  without a recipe           --pretrained_model_name_or_path MODEL --train_data_meta METADATA
  all flags                  {script} --help
  try it without a model     make demo
  from clips to a LoRA       README.md
"""


def make_parser(description: str | None, modes: Sequence[str], recipes: Path) -> Parser:
    """The parser with all shared flags.

    Args:
        description: shown at the top of --help, as written.
        modes: values of --train_mode that the family supports.
        recipes: the folder of the family's recipes.
    """
    usage = "%(prog)s --recipe NAME --train_data_dir CLIPS [flags below]\n"  # argparse's own takes a page
    usage += "       %(prog)s --pretrained_model_name_or_path MODEL --train_data_meta METADATA [flags below]"
    introduction = INTRODUCTION.format(script=f"python scripts/{recipes.name}/train.py")
    parser = Parser(description=description, usage=usage, recipes=recipes, introduction=introduction)
    add_run_files(parser, recipes)
    add_model_and_data(parser)
    add_captions(parser)
    add_shapes(parser)
    add_training(parser, modes)
    add_lora(parser)
    add_optimizer(parser)
    add_timesteps(parser)
    add_memory(parser)
    add_speed(parser)
    add_run(parser)
    add_validation(parser)
    add_samples(parser)
    add_dry_run(parser)
    return parser


def add_run_files(parser: Parser, recipes: Path) -> None:
    """Add the flags that read other flags from files; recipes: the folder of the family's recipes."""
    add = parser.add_argument_group(
        "run files (the command line wins; --flag=false switches a boolean flag off)"
    ).add_argument
    files = "YAML files of flag names and values, or the args.json of a run; a later file wins"
    add("--config", nargs="+", default=[], metavar="FILE", help=files)
    add("--recipe", metavar="NAME", help="flags for a task and a GPU, from config/recipes")
    add(
        "--list_recipes",
        action=ListRecipes,
        folder=recipes,
        help="print the recipes with memory, time and disk, and exit",
    )


def add_model_and_data(parser: Parser) -> None:
    """Add the flags for where the model and the data are."""
    add = parser.add_argument_group("model and data").add_argument
    add("--pretrained_model_name_or_path", help="folder of the model, or its id on the Hugging Face Hub")
    add("--transformer_path", help="folder or file of other transformer weights, in any layout")
    add("--vae_path", help="folder or file of another VAE, in any layout")
    metadata = "metadata: .json, .jsonl, .csv, .parquet, or a folder of clip + .txt; several are trained together"
    add("--train_data_meta", nargs="+", action=OneOrMore, help=metadata)
    config = (
        "instead of train_data_meta: a yaml of sources, or the dataset configuration of musubi-tuner, diffusion-pipe, "
        "SimpleTuner, ai-toolkit or sd-scripts"
    )
    add("--dataset_config", metavar="FILE", help=config)
    add(
        "--train_data_dir",
        help="folder that each file_path is relative to; by default the metadata's folder. Without metadata: the folder of clips to train",
    )
    add("--allow_outside_data_dir", action="store_true", help="accept files outside train_data_dir")
    repeat = "times that each video occurs in an epoch; images occur once (0 = once)"
    add("--video_repeat", type=COUNT_OR_ZERO, default=0, help=repeat)
    clips = "clips of video_sample_n_frames frames to take from one video per epoch (fewer if it is too short)"
    add("--clips_per_video", type=COUNT, default=1, help=clips)
    starts = "where clips start: random; uniform: spread evenly; head: one after the other from the first frame"
    add("--clip_sampling", choices=SAMPLINGS, default=SAMPLINGS[0], help=starts)
    loaders = (
        "worker processes that decode media, per training process (0 = decode in the training process, which a file ends "
        "that crashes its decoder; a worker is started again without the file)"
    )
    add("--dataloader_num_workers", type=number(int, 0, 256), default=0, help=loaders)
    add("--video_reader", choices=READERS, default=READERS[0], help="video decoder; both return the same frames")
    bad = "share of rows, 0 to 1, that may be unreadable before the run ends with an error; ten are always allowed"
    add("--max_bad_fraction", type=SHARE, default=0.01, help=bad)
    cache = "folder of the latent cache: encoder outputs are stored and reused; several runs may share it"
    add("--latent_cache", metavar="DIR", help=cache)
    add("--cache_only", action="store_true", help="fill --latent_cache with everything the run needs, then exit")
    variants = "epochs after which clip starts, sizes, crops and masks repeat, to limit the cache's size (0 = never)"
    add("--cache_variants", type=COUNT_OR_ZERO, default=0, help=variants)


def add_captions(parser: Parser) -> None:
    """Add the flags of what is done to captions before they are encoded."""
    add = parser.add_argument_group("captions").add_argument
    add("--caption_dropout", type=SHARE, default=0.1, help="share of captions, 0 to 1, replaced by the empty caption")
    prefix = "text put before each caption, with a space in between unless it ends with one"
    add("--caption_prefix", default="", metavar="TEXT", help=prefix)
    trigger = "replaces [trigger] in captions and prefixes; put before captions that do not have the word"
    add("--trigger_word", default="", metavar="WORD", help=trigger)
    tags = "put the comma-separated parts of each caption in a new random order in every epoch"
    add("--caption_shuffle_tags", action="store_true", help=tags)
    missing = "rows without a caption: empty: train them with the empty caption; refuse: name them and end the run"
    add("--missing_caption", choices=MISSING_CAPTIONS, default=MISSING_CAPTIONS[0], help=missing)


def add_shapes(parser: Parser) -> None:
    """Add the flags that decide the size and length of samples."""
    add = parser.add_argument_group("shapes (sizes are in pixels: the side of a square of that area)").add_argument
    size = number(int, 32, 8192)
    video, image = "target size of videos", "target size of images"
    ends = "; with training_with_video_token_length one end of the range of target sizes"
    add("--video_sample_size", type=size, default=512, help=video + ends)
    add("--image_sample_size", type=size, default=512, help=image + ends.replace("one", "the other"))
    budget = "token budget of a video: the target size up to which it has all video_sample_n_frames frames"
    add("--token_sample_size", type=size, default=512, help=budget)
    stride = "every n-th source frame is used (1 = every frame)"
    add("--video_sample_stride", type=COUNT, default=4, help=stride)
    fps = "frames per second to sample videos at, instead of the stride, if the file has a frame rate (0 = off)"
    add("--video_sample_fps", type=number(float, 0, 1000), default=0.0, help=fps)
    add("--video_sample_n_frames", type=COUNT, default=17, help="maximum frames of a clip, 4k+1")
    fixed = "use this one size for all samples"
    add("--fix_sample_size", type=size, nargs=2, metavar=("HEIGHT", "WIDTH"), help=fixed)
    buckets = (
        "keep aspect ratios by buckets; otherwise crop centred squares; fix_sample_size and the next five flags need "
        "buckets"
    )
    add("--enable_bucket", action="store_true", help=buckets)
    grid = "sides of buckets: ratios: the nearest of 40 aspect ratios; exact: the source's own, in multiples of 16"
    add("--bucket_grid", choices=GRIDS, default=GRIDS[0], help=grid)
    sizes = "draw each sample's target size: images up to the larger sample size, videos up to the smaller one"
    add("--random_hw_adapt", action="store_true", help=sizes)
    length = (
        "draw target sizes from the whole range, with fewer frames at larger sizes, within the token budget; "
        "otherwise video_sample_n_frames at every size"
    )
    add("--training_with_video_token_length", action="store_true", help=length)
    add("--random_frame_crop", action="store_true", help="shorten one clip in ten to a random number of frames, 4k+1")
    add("--random_ratio_crop", action="store_true", help="crop to a random aspect ratio; otherwise to the nearest one")
    add("--vae_mini_batch", type=COUNT, default=32, help="samples per VAE call")
    posterior = "latents: sample: drawn from the VAE's posterior; mode: the mode of the posterior"
    add("--vae_sample_mode", choices=("sample", "mode"), default="sample", help=posterior)


def add_training(parser: Parser, modes: Sequence[str]) -> None:
    """Add the flags of what is trained, for how long and in which batches; modes: values of --train_mode."""
    add = parser.add_argument_group("training").add_argument
    add("--train_mode", choices=tuple(modes), default="normal", help="normal is text-to-video; must fit the model")
    trained = "train the parameters whose names contain one of these strings ('.' matches all)"
    add("--trainable_modules", nargs="+", default=["."], help=trained)
    half = "the same, but trained at half the learning rate"
    add("--trainable_modules_low_learning_rate", nargs="+", default=[], help=half)
    add("--train_batch_size", type=COUNT, default=16, help="samples per micro-batch and process")
    fill = (
        "fixed: train_batch_size samples of any size; cost: more samples if they are small, up to the cost of "
        "train_batch_size of the largest ones"
    )
    add("--slot_fill", choices=("fixed", "cost"), default="fixed", help=fill)
    balance = (
        "which micro-batches the processes run at the same time: strict: those of similar cost; mixed: the same, but "
        "only as far as each step stays about as varied as the data; none: random ones"
    )
    add("--balance", choices=BALANCES, default=BALANCES[0], help=balance)
    cost = "cost_model.json of an earlier run: measured costs of samples; by default estimated from the model's sizes"
    add("--cost_model", help=cost)
    launches = (
        "balance each micro-batch as if it had a sample of N tokens more: on a GPU small images take longer than their "
        "FLOPs, the time in which their kernels are launched (0 = none)"
    )
    add("--launch_tokens", type=number(int, 0, 10**6), default=0, help=launches)
    add("--gradient_accumulation_steps", type=COUNT, default=1, help="micro-batches per optimizer step and process")
    add("--num_train_epochs", type=COUNT, default=100, help="epochs to train")
    add("--max_train_steps", type=COUNT, help="optimizer steps to train; overrides num_train_epochs")
    add(
        "--seed", type=number(int, 0, 2**63 - 1), help="seed of all random draws; by default drawn, printed and stored"
    )
    add("--motion_sub_loss", action="store_true", help="add a loss on the difference of consecutive frames")
    add("--motion_sub_loss_ratio", type=SHARE, default=0.25, help="share of motion_sub_loss in the total loss, 0 to 1")
    add("--use_ema", action="store_true", help="keep an exponential moving average (EMA) of the trained weights")
    decay = "largest EMA decay; at optimizer step n the decay is at most n / (9 + n)"
    add("--ema_decay", type=SHARE, default=EMA_DECAY, help=decay)
    where = "where the EMA is stored: accelerator: with the weights; cpu: in host memory"
    add("--ema_device", choices=EMA_DEVICES, default=EMA_DEVICES[0], help=where)


def add_lora(parser: Parser) -> None:
    """Add the flags of LoRA training."""
    add = parser.add_argument_group("LoRA").add_argument
    rank = "train a LoRA of this rank (0 = train the model's own weights)"
    add("--lora_rank", type=number(int, 0, 4096), default=0, help=rank)
    kinds = "lora, or dora: also train the norm of each row of the adapted weights"
    add("--lora_type", type=lora_type, default=LORA_TYPES[0], metavar="{" + ",".join(LORA_TYPES) + "}", help=kinds)
    add(
        "--lora_alpha",
        type=number(float, 1e-6, 1e6),
        help="the adapters' output is scaled by alpha / rank; default: the rank",
    )
    targets = "linear layers that get adapters, by parts of their names; default: attention and feed-forward layers"
    add("--lora_target_modules", nargs="+", help=targets)
    dropout = "dropout on the adapters' inputs, share 0 to 0.99 (0 = off)"
    add("--lora_dropout", type=number(float, 0, 0.99), default=0.0, help=dropout)
    plus = "LoRA+: the learning rate of the adapters' B matrices is this many times that of A (1 = off)"
    add("--loraplus_ratio", type=number(float, 1, 1000), default=1.0, help=plus)
    add("--init_lora_from", help="file or folder of a LoRA to start from, in any layout")


def add_optimizer(parser: Parser) -> None:
    """Add the flags of the optimizer, the learning rate and gradient clipping."""
    add = parser.add_argument_group("optimizer (steps are optimizer steps)").add_argument
    add("--learning_rate", type=number(float, 0, 10), default=1e-4, help="peak learning rate, per step")
    add("--lr_scheduler", choices=LR_SCHEDULERS, default="constant", help="learning-rate schedule over the steps")
    add("--lr_warmup_steps", type=COUNT_OR_ZERO, default=LR_WARMUP_STEPS, help="warm-up steps (0 = no warm-up)")
    add("--scale_lr", action="store_true", help="multiply the learning rate by the samples per optimizer step")
    names = f"one of {', '.join(OPTIMIZERS)} (compared in README_TRAIN.md), or a class such as torch.optim.RAdam"
    add("--optimizer", type=optimizer_name, metavar="NAME", default="adamw", help=names)
    settings = "settings of prodigy or of an optimizer class, such as betas=0.9,0.99 weight_decay=0"
    add("--optimizer_args", nargs="+", metavar="KEY=VALUE", default=[], help=settings)
    add("--use_8bit_adam", action="store_true", help="same as --optimizer adamw8bit")
    add("--use_came", action="store_true", help="same as --optimizer came")
    add("--adam_beta1", type=number(float, 0, 0.999999), default=0.9, help="decay of the first moment")
    add("--adam_beta2", type=number(float, 0, 0.9999999), default=0.999, help="decay of the second moment")
    decay = "decoupled weight decay, per unit of learning rate (0 = off)"
    add("--adam_weight_decay", type=number(float, 0, 10), default=1e-2, help=decay)
    epsilon = "added to the square root of the second moment"
    add("--adam_epsilon", type=number(float, 1e-30, 1), default=1e-8, help=epsilon)
    clip = "global gradient norm to clip to (1e12 practically disables clipping)"
    add("--max_grad_norm", type=number(float, 1e-12, 1e12), default=1.0, help=clip)
    spikes = (
        "leave out a step whose loss or gradient norm is a spike: above exp(m + 6 * 1.4826 * MAD), with the median m "
        "and the MAD of the logarithms in up to 128 steps before it; without this flag spikes are only printed"
    )
    add("--skip_spikes", action="store_true", help=spikes)
    ratio = "the clipping norm starts at this many times max_grad_norm and decreases to it (1 = off)"
    add("--initial_grad_norm_ratio", type=number(float, 1, 1e6), default=1.0, help=ratio)
    add(
        "--abnormal_norm_clip_start",
        type=COUNT,
        default=1000,
        help="step at which that decrease ends; from then on, unusually large gradient norms are clipped harder",
    )


def add_timesteps(parser: Parser) -> None:
    """Add the flags of how timesteps are drawn and losses weighted."""
    add = parser.add_argument_group("timesteps and loss weights").add_argument
    strata = "timesteps that cover the range in each step and from step to step; otherwise draw each independently"
    add("--uniform_sampling", action="store_true", help=strata)
    shift = (
        "flow shift of the noise levels, in training, held-out loss and sample clips (1 = none); auto: of a yaml that "
        "--config_path names (Wan2.1), else of the model's scheduler"
    )
    add("--flow_shift", type=number_or_auto(0.001, 999), default=AUTO, help=shift)
    noisiest = "train only on this many of the 1000 timesteps, the noisiest ones (1000 = all)"
    last = NUM_TRAIN_TIMESTEPS
    add("--train_sampling_steps", type=number(int, 1, last), default=last, help=noisiest)
    scheme = "weight of the loss (sigma_sqrt, cosmap) or density of the timesteps (logit_normal, mode); none: neither"
    add("--weighting_scheme", choices=WEIGHTING_SCHEMES, default="none", help=scheme)
    add("--logit_mean", type=number(float, -20, 20), default=0.0, help="mean of the logit_normal density")
    deviation = "standard deviation of the logit_normal density"
    add("--logit_std", type=number(float, 1e-6, 20), default=1.0, help=deviation)
    add("--mode_scale", type=number(float, -1, 1.75), default=1.29, help="scale of the mode density")


def add_memory(parser: Parser) -> None:
    """Add the flags of precision and GPU memory, and those that state the backend."""
    add = parser.add_argument_group("precision, memory, backend").add_argument
    precision = "compute precision, by default the launcher's; only bf16 optimizers keep trained weights in bf16"
    add("--mixed_precision", choices=("no", "bf16"), help=precision)
    add("--allow_tf32", action="store_true", help="allow TensorFloat-32 in float32 matrix products on GPUs")
    same = "use deterministic algorithms on GPUs, so that a resumed run is bit-identical; slower (CPUs always are)"
    add("--deterministic", action="store_true", help=same)
    vae = "dtype that the VAE computes in; bf16 is faster and needs half the memory, and changes the latents slightly"
    add("--vae_dtype", choices=VAE_DTYPES, default=VAE_DTYPES[0], help=vae)
    full = "recompute the activations of every block in the backward pass, to save memory"
    add("--gradient_checkpointing", action="store_true", help=full)
    selective = "instead of gradient_checkpointing: recompute only this share of the blocks, 0 to 1 (0 = off)"
    add("--selective_ac", type=SHARE, default=0.0, help=selective)
    add("--low_vram", action="store_true", help="offload the encoders to host memory while they are not used")
    add("--use_deepspeed", action="store_true", help="refuse to start unless the launcher runs DeepSpeed")
    add("--use_fsdp", action="store_true", help="refuse to start unless the launcher runs FSDP")


def add_run(parser: Parser) -> None:
    """Add the flags of checkpoints, exports and trackers."""
    add = parser.add_argument_group("run (steps are optimizer steps)").add_argument
    add("--output_dir", default="sd-model-finetuned", help="folder of everything that the run writes")
    add("--logging_dir", default="logs", help="folder of the tracker inside output_dir")
    add("--report_to", default="tensorboard", help="tracker: tensorboard, wandb or none")
    add("--tracker_project_name", default="videox", help="name of the run in the tracker")
    page = (
        "least seconds between two pages: output_dir/report.html shows the run, its data and its samples (0 = no page)"
    )
    add("--report_seconds", type=number(float, 0, 10**6), default=REPORT_SECONDS, help=page)
    hang = (
        "end a run in which no process makes progress for so long, and name the process (default: 10 times the slowest "
        "step, at least 120 s, and longer for data, saves and whatever is not part of every step; 0 = never)"
    )
    add("--watchdog_seconds", type=number_or_auto(0, 10**6), default=AUTO, help=hang)
    replicas = (
        "steps between comparisons of the weights that all processes have alike (DDP, ZeRO-2), which are also compared "
        "before each save; auto: 100, or more where they would take more than 0.1 %% of the time (0 = never)"
    )
    add("--replica_check_steps", type=number_or_auto(0, 10**9, int), default=AUTO, help=replicas)
    save = "steps between checkpoints; the last step is always saved"
    add("--checkpointing_steps", type=COUNT, default=500, help=save)
    add("--checkpoints_total_limit", type=COUNT, help="keep this many newest checkpoints; by default all")
    full = (
        "checkpoints of ZeRO-3 and FSDP also contain transformer/ for diffusers in float32 (ZeRO-2, DDP and one "
        "process always write it)"
    )
    add("--save_whole_weights", action="store_true", help=full)
    add("--resume_from_checkpoint", help="'latest', or the path of a checkpoint")
    accept = (
        "go on although the data has changed since the checkpoint: the current epoch ends with the rows that it began "
        "with, then the new data is trained (now: the rest of the current epoch is left out)"
    )
    add("--accept_data_change", nargs="?", choices=ACCEPTED, const=NEXT_EPOCH, metavar="now", help=accept)
    add("--verify", action="store_true", help="check the hashes of a checkpoint before a resume: the default")
    skip = "check only sizes and headers of a checkpoint's files before a resume, not their hashes"
    add("--skip_verify", action="store_true", help=skip)
    layouts = (
        "layouts of the exported weights, at the end and in the exports/ folder of each checkpoint; diffusers: "
        "always, at the end only; original, comfyui, kohya (LoRA only): one file; merged: base model with the LoRA "
        "merged, for diffusers"
    )
    choices = ("diffusers", *LAYOUTS, KOHYA, MERGED)
    add("--export_layouts", nargs="+", choices=choices, default=["diffusers"], help=layouts)
    base = (
        "folder or file of the bf16 model, in any layout, that the layout merged merges the LoRA into (default: the weights "
        "that are trained; those in 8 bits are not merged into)"
    )
    add("--merge_base", metavar="PATH", help=base)
    times = "when --export_layouts are written: end: at the end of the run only; every: also in each checkpoint"
    add("--export_at", choices=EXPORT_TIMES, default="every", help=times)
    add("--export_dtype", choices=EXPORT_DTYPES, default="bf16", help="dtype of exported weights")
    dump = "steps whose tensors are written to output_dir/dump, for debugging"
    add("--dump_steps", type=COUNT, nargs="+", default=[], help=dump)


def add_dry_run(parser: Parser) -> None:
    """Add the flags of --dry_run and --explain, and those of the hardware that estimates assume."""
    add = parser.add_argument_group("dry run and estimates").add_argument
    dry_run = "print what would be trained and what it needs, then exit, with code 8 if it does not fit the GPU"
    add("--dry_run", action="store_true", help=dry_run)
    explain = "print how this row of the metadata is used in every epoch, then exit (0 = the first row)"
    add("--explain", type=COUNT_OR_ZERO, metavar="ROW", help=explain)
    plans = "dry run: also write the plan of the first epoch, as plan-N.jsonl for each of these numbers of processes"
    add("--dry_run_plan", type=PROCESSES, nargs="+", default=[], metavar="PROCESSES", help=plans)
    add("--dry_run_processes", type=PROCESSES, help="dry run: number of processes; by default as launched")
    add("--dry_run_backend", choices=tuple(BACKENDS), help="dry run: backend; by default as launched")
    config = "dry run: DeepSpeed configuration file, whose offload settings count; by default the launcher's"
    add("--dry_run_deepspeed_config", metavar="FILE", help=config)
    model = "dry run: a published model by name, or a folder with config.json files, instead of a model folder"
    add("--dry_run_model", metavar="NAME", help=model)
    data = "dry run: describe the data instead of reading it: COUNTxSECONDSs@FPSfps:WIDTHxHEIGHT, COUNT:WIDTHxHEIGHT"
    add("--dry_run_data", nargs="+", default=[], metavar="DATA", help=data)
    add("--gpu", choices=tuple(GPUS), help="dry run: the GPU to plan for; sets its memory and speed")
    memory = "dry run and --activation_memory: memory of a GPU in GiB; a dry run takes that of --gpu, or 80"
    add("--gpu_memory", type=number(float, 1, 10**4), help=memory)
    host = "dry run: memory of each machine in GiB that the run must fit in; by default that of this machine"
    add("--host_memory", type=number(float, 1, 10**5), help=host)
    add("--gpu_price", type=number(float, 0, 10**6), help="dry run: price of a GPU hour, to print the cost (0 = free)")
    mfu = (
        "dry run: take this MFU (model FLOPs utilization, share of the GPU's peak, 0 to 1) instead of computing the time of "
        "a step; a run measures its own"
    )
    add("--assumed_mfu", type=number(float, 0.001, 1), help=mfu)
    first = (
        "before the first step, try whether the largest micro-batch of all epochs fits in memory; the training does "
        "not change (auto: on GPUs)"
    )
    add("--try_largest_first", choices=("auto", "on", "off"), default="auto", help=first)
    peak = "bf16 peak of a GPU without sparsity, in TFLOP per second; by default looked up by the GPU's name"
    add("--peak_tflops", type=number(float, 0.001, 10**6), help=peak)
