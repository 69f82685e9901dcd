"""The flags of speed and activation memory, and their checks against each other. Imports no torch or diffusers."""

from __future__ import annotations

import argparse

from videox.distributed.backends import Backend
from videox.errors import UserError
from videox.models.base_precision import BF16, PRECISIONS, check_precision_installed
from videox.models.recompute import LEAST_STREAMED, ON_DEVICE
from videox.optim.registry import OPTIMIZERS
from videox.training.argument_parser import AUTO, Parser

KEEPS = ("attention", "self_attention")  # values of --gradient_checkpointing_keep
ALL = "all"  # value of --stream_blocks
ON_HOST = [name for name, optimizer in OPTIMIZERS.items() if optimizer.on_host]
NATIVE = "native"  # the default of --attention_backend: torch's own choice


def add_speed(parser: Parser) -> None:
    """Add the flags of activation memory, compilation and kernels."""
    add = parser.add_argument_group("speed and activation memory").add_argument
    keep = (
        "what recomputed blocks keep: attention: the outputs of attention, which then runs once (less time, more memory); "
        "self_attention: those of self-attention alone; gradients are bit-identical"
    )
    add("--gradient_checkpointing_keep", choices=KEEPS, help=keep)
    memory = (
        "auto: choose for each bucket how much is recomputed, by the estimated memory of the GPU, instead of "
        "gradient_checkpointing, selective_ac and gradient_checkpointing_keep"
    )
    add("--activation_memory", choices=(AUTO,), help=memory)
    offload = (
        "keep the inputs of recomputed blocks in pinned host memory between the passes; gradients are bit-identical"
    )
    add("--offload_activations", action="store_true", help=offload)
    base = (
        "precision of the frozen linear layers of the blocks under a LoRA: bf16 (as computed), fp8 or int8 (torchao), nf4 "
        "(4 bits, bitsandbytes); the start prints how much the outputs of blocks change"
    )
    add("--base_precision", choices=PRECISIONS, default=BF16, help=base)
    text = (
        "precision of the linear layers of the text encoder's blocks, as --base_precision; embeddings differ slightly "
        "and are cached separately"
    )
    add("--text_encoder_precision", choices=PRECISIONS, default=BF16, help=text)
    stream = (
        "weights of N blocks (all; auto: as few as the GPU's memory needs) stay in host memory and are copied to the GPU "
        "when a block runs; with --gradient_checkpointing; without a LoRA gradients are there, too, and --optimizer must "
        "be one of host memory; results are bit-identical"
    )
    add("--stream_blocks", type=stream_count, metavar="auto|N|all", help=stream)
    blocks = (
        "compile the repeated blocks (torch.compile): faster steps after a slow first one, other rounding; not under "
        "ZeRO-3; falls back if it fails"
    )
    add("--compile", action="store_true", help=blocks)
    kernels = (
        "attention kernel, by diffusers' name: native (torch's choice), cudnn, flash, flash3, ...; auto: the fastest one "
        "on this GPU, measured at the start and kept when the run resumes"
    )
    add("--attention_backend", metavar="NAME", default=NATIVE, help=kernels)
    tiles = "encode and decode clips in overlapping tiles: less memory, slightly other latents, which are cached separately"
    add("--vae_tiling", action="store_true", help=tiles)


def stream_count(text: str) -> str | int:
    """Return the value of --stream_blocks: auto, all, or a number of blocks."""
    if text in (AUTO, ALL):
        return text
    if not text.isdecimal() or int(text) < LEAST_STREAMED:
        why = f"{ON_DEVICE} streamed blocks are on the GPU at a time"
        raise argparse.ArgumentTypeError(f"expected auto, all, or at least {LEAST_STREAMED} blocks, since {why}")
    return int(text)


def check_speed(args: argparse.Namespace) -> None:
    """Check the flags of add_speed, gradient_checkpointing and selective_ac against each other.

    Raises:
        UserError: naming two flags that contradict each other, or a flag without effect.
    """
    recomputes = args.gradient_checkpointing or args.selective_ac
    given = {
        "gradient_checkpointing": args.gradient_checkpointing, "selective_ac": args.selective_ac,
        "gradient_checkpointing_keep": args.gradient_checkpointing_keep, "offload_activations": args.offload_activations,
    }  # fmt: skip
    if args.activation_memory and (others := [f"--{name}" for name, value in given.items() if value]):
        what = f"{args.activation_memory} chooses what is recomputed, {' and '.join(others)} is set, too"
        raise UserError("--activation_memory", what, f"remove it, or {' and '.join(others)}")
    for flag in ("gradient_checkpointing_keep", "offload_activations"):
        if given[flag] and not recomputes:
            what = "there are no recomputed blocks without --gradient_checkpointing or --selective_ac"
            raise UserError(f"--{flag}", what, "add one of them, or remove the flag")
    if args.stream_blocks:
        _check_streaming(args)
    if args.base_precision != BF16:
        _check_precision(args)
    check_precision_installed(args.text_encoder_precision, "--text_encoder_precision")


def _check_precision(args: argparse.Namespace) -> None:
    """Raise UserError where --base_precision cannot work with another flag, or needs a package."""
    value = args.base_precision
    if not args.lora_rank:
        what = f"{value}: only frozen weights are quantised, and without --lora_rank all of them are trained"
        raise UserError("--base_precision", what, "add --lora_rank, or remove the flag")
    if args.lora_type == "dora":
        what = f"{value}: a DoRA needs the norms of the weights in full precision"
        raise UserError("--base_precision", what, "train with --lora_type lora, or remove the flag")
    if args.compile:
        raise UserError("--base_precision", f"{value}: quantised blocks cannot be compiled", "remove --compile")
    check_precision_installed(value)


def _check_streaming(args: argparse.Namespace) -> None:
    """Raise UserError where --stream_blocks cannot work with another flag."""
    value = args.stream_blocks
    if not args.lora_rank and not (args.optimizer in OPTIMIZERS and OPTIMIZERS[args.optimizer].on_host):
        what = f"{value}: weights that are trained stay in host memory, and {args.optimizer} steps on the GPU"
        raise UserError("--stream_blocks", what, f"use --optimizer {' or '.join(ON_HOST)}, or add --lora_rank")
    if not args.lora_rank and args.use_ema and args.ema_device != "cpu":
        what = f"{value}: weights that are trained stay in host memory, and their EMA is on the GPU"
        raise UserError("--stream_blocks", what, "add --ema_device cpu, or remove --use_ema")
    if not args.gradient_checkpointing:
        what = f"{value}: a streamed block has to be recomputed, or its weights would stay on the GPU"
        raise UserError(
            "--stream_blocks", what, "use --gradient_checkpointing (not --selective_ac or --activation_memory)"
        )
    if args.compile:
        raise UserError("--stream_blocks", "compiled blocks cannot be streamed", "remove --compile, or this flag")


def check_backend_flags(args: argparse.Namespace, backend: Backend, *, half: bool) -> None:
    """Raise UserError if a flag of speed cannot be used under a backend, or names an unknown attention kernel.

    half: the run computes in bfloat16.
    """
    if args.base_precision != BF16 and backend.engine != "replicated":
        what = f"{args.base_precision}: {backend.name} stores the frozen weights in its own way"
        raise UserError("--base_precision", what, "launch one process or DDP, or remove the flag")
    if args.base_precision != BF16 and not half:
        what = f"{args.base_precision}: quantised weights are computed with in bfloat16"
        raise UserError("--base_precision", what, "add --mixed_precision bf16, or remove the flag")
    if args.text_encoder_precision != BF16 and not half:
        what = f"{args.text_encoder_precision}: quantised weights are computed with in bfloat16"
        raise UserError("--text_encoder_precision", what, "add --mixed_precision bf16, or remove the flag")
    if args.compile and not backend.compiles:
        what = f"{backend.name} gathers the weights inside of the blocks, so that they cannot be compiled"
        raise UserError("--compile", what, "remove the flag, or launch FSDP2")
    if args.gradient_checkpointing_keep and not backend.keeps_attention:
        what = f"{args.gradient_checkpointing_keep}: {backend.name} gathers weights while blocks are recomputed"
        raise UserError("--gradient_checkpointing_keep", what, "remove the flag, or launch FSDP2")
    if args.stream_blocks and backend.engine != "replicated":
        what = f"{backend.name} stores the weights in its own way"
        raise UserError("--stream_blocks", what, "launch one process or DDP, or remove the flag")
    if args.stream_blocks and not args.lora_rank and backend.name != "single":
        what = f"{backend.name} reduces gradients on the GPUs, and those of streamed blocks are in host memory"
        raise UserError("--stream_blocks", what, "launch one process, add --lora_rank, or remove the flag")
    if args.lora_rank and args.lora_type == "dora" and backend.name == "zero3":
        what = "dora: peft reads a layer's weights after ZeRO-3 has released them"
        raise UserError("--lora_type", what, "launch ZeRO-2, FSDP or DDP, or train with --lora_type lora")
    if args.deterministic and args.attention_backend != NATIVE:
        what = f"{args.attention_backend}: only torch's own kernels are known to be deterministic"
        raise UserError("--attention_backend", what, "remove the flag, or --deterministic")
    if args.attention_backend not in (AUTO, NATIVE):
        from videox.models.attention_backend import find_backend  # imported for a name to look up: it loads diffusers

        find_backend(args.attention_backend)
