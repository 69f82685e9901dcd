"""The start of a run: checks before any weight is loaded, the lines it prints first, and its folder."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from videox.distributed.accelerator import compute_dtype
from videox.distributed.backends import BACKENDS, Backend
from videox.distributed.collectives import run_on_main
from videox.engine.deepspeed_universal import announce_conversion, saved_world_size
from videox.engine.ema import ema_notes
from videox.engine.fsdp import OPTIMIZER_FOLDER
from videox.engine.fsdp_local_optim import refuse_other_optimizer_state
from videox.engine.resume import refuse_other_backend
from videox.engine.train_state import plan_inputs
from videox.errors import MODEL, UserError, plural
from videox.files import write_json_atomically
from videox.lora.checkpoint import check_checkpoint_kind
from videox.optim.registry import check_supported, is_class_name
from videox.run.branch import copy_curves
from videox.run.folder import require_disk_space, rewind
from videox.tracking.events import append_event
from videox.tracking.trackers import check_tracker
from videox.training.args import optimizer_of
from videox.training.context import Context
from videox.training.data_record import write_data_report
from videox.training.flow_shift import FlowShift, with_default_yaml
from videox.training.gpu_facts import attention_kernel, gpu_name, versions
from videox.training.notes import notes
from videox.training.numerics import apply_numerics
from videox.training.optimizer import try_optimizer
from videox.training.sample_requests import check_pictures
from videox.training.schedule import Schedule
from videox.training.speed_flags import AUTO, NATIVE, check_backend_flags
from videox.training.validation_flags import prompts_of

DIFFERENCES = (
    "latent frame 0 is trained like all others, except where it is given (HunyuanVideo and TI2V-5B image-to-video)",
    "trainable weights are float32 (bfloat16 with optimizers named _bf16); only compute is bfloat16, where requested",
    "--uniform_sampling covers the timesteps in each step and from step to step; no process keeps a part of them",
    "max_grad_norm clips from the first step on",
    "in buckets each clip keeps its own aspect ratio; each row is seen once per epoch unless flags say otherwise",
)


def announce(args: argparse.Namespace, ctx: Context, task: str, shift: FlowShift) -> None:
    """Check backend, optimizer, tracker and checkpoint against each other, set torch's numerics, and print what runs.

    Args:
        task: what is trained, in words.
        shift: flow shift of the run.

    Raises:
        UserError: two of them cannot work together.
    """
    check_tracker(args.report_to)
    check_pictures(prompts_of(args))
    optimizer, checkpoint, backend = optimizer_of(args), ctx.checkpoint, ctx.backend
    if args.initial_grad_norm_ratio > 1 and not backend.clips_by_own_norm:
        what = f"{args.initial_grad_norm_ratio:g}: DeepSpeed clips every step to the same norm"
        raise UserError("--initial_grad_norm_ratio", what, "remove the flag, or launch FSDP or DDP")
    tried = try_optimizer(args)
    refuse_other_backend(checkpoint, backend, optimizer)
    check_checkpoint_kind(checkpoint, args.lora_rank)
    check_supported(optimizer, backend.name, ctx.accelerator.mixed_precision, lora=args.lora_rank > 0)
    check_backend_flags(args, backend, half=ctx.accelerator.mixed_precision == "bf16")
    if is_class_name(optimizer) and backend.engine == "deepspeed":
        refuse_under_deepspeed(ctx, optimizer)
    if checkpoint and backend.engine == "fsdp":
        refuse_other_optimizer_state(checkpoint / OPTIMIZER_FOLDER, optimizer, ctx.world_size)
    conversion = conversion_notes(ctx) if backend.engine == "deepspeed" else []
    apply_numerics(args)
    changed = changed_flags(ctx.output_dir, vars(args)) if checkpoint else []
    ema = ema_notes(checkpoint, args.use_ema)
    planned = planned_backend_notes(args.dry_run_backend, backend)
    ctx.print(
        *start_lines(args, ctx, task, shift), *planned, *shift.notes, *tried, *ctx.run.notes, *notes(args), *changed
    )
    ctx.print(*conversion, *ema)


def refuse_under_deepspeed(ctx: Context, optimizer: str) -> None:
    """Raise UserError where DeepSpeed would replace an optimizer class, or convert its moments as if they were Adam's.

    Args:
        optimizer: dotted name of the class.
    """
    offload = ctx.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"].get("offload_optimizer")
    if (offload or {}).get("device", "none") != "none":
        what = (
            f"the DeepSpeed file offloads the optimizer, and DeepSpeed would step its own Adam instead of {optimizer}"
        )
        raise UserError("--optimizer", what, "use adamw, or remove offload_optimizer from the DeepSpeed file")
    if ctx.checkpoint is not None and (saved := saved_world_size(ctx.checkpoint)) != ctx.world_size:
        of_them = f"{saved} {plural(saved, 'process', 'processes')}"
        what = f"{ctx.checkpoint.name} was saved by {of_them}, and only AdamW's moments are converted"
        raise UserError("--resume_from_checkpoint", what, f"launch {of_them}", MODEL)


def start_lines(args: argparse.Namespace, ctx: Context, task: str, shift: FlowShift) -> list[str]:
    """The first lines of a run: one fact each, aligned, then the differences to the original trainer."""
    facts = {
        "backend": f"{ctx.backend.name} ({ctx.backend.description})",
        "processes": ctx.world_size,
        "task": task,
        "device": ctx.device,
        "precision": {"bf16": "bf16 computation"}.get(ctx.accelerator.mixed_precision, "float32 throughout"),
        **computing(args, ctx),
        "flow shift": shift,
        "output_dir": ctx.output_dir,
    }
    width = max(map(len, facts))
    return [
        *(f"{name:<{width}}  {value}" for name, value in facts.items()),
        "differences to the original trainer (loss curves are not comparable):",
        *(f"  - {line}" for line in DIFFERENCES),
    ]


def computing(args: argparse.Namespace, ctx: Context) -> dict[str, str]:
    """What computes, and how: the GPU, versions, attention kernel, recomputation, dtypes of the frozen encoders."""
    device, dtype = ctx.device, compute_dtype(ctx.accelerator)
    text = "bf16" if dtype == torch.bfloat16 else "fp32"
    if args.attention_backend == NATIVE:
        attention = f"torch's, {attention_kernel(device, dtype)} kernel"
    else:
        attention = "the fastest one, measured below" if args.attention_backend == AUTO else args.attention_backend
    return {
        **({"GPU": gpu_name(device)} if device.type == "cuda" else {}),
        "versions": versions(device),
        "attention": attention,
        "recompute": recomputed(args),
        "compile": "the repeated blocks" if args.compile else "off",
        "encoders": f"VAE {args.vae_dtype}, text {text}",
    }


def recomputed(args: argparse.Namespace) -> str:
    """Return in words which activations are recomputed, kept and moved to the host."""
    if args.activation_memory:
        return "by the memory of the GPU, listed below"
    share = 1.0 if args.gradient_checkpointing else args.selective_ac
    if not share:
        return "no block"
    parts = ["every block" if share == 1 else f"{share:g} of the blocks"]
    if args.gradient_checkpointing_keep:
        parts.append(f"without {args.gradient_checkpointing_keep.replace('_', '-')}")
    if args.offload_activations:
        parts.append("inputs in host memory")
    return ", ".join(parts)


def changed_flags(output_dir: Path, now: Mapping[str, object]) -> list[str]:
    """A line for each flag whose value differs from the one in the folder's args.json."""
    try:
        before = json.loads((output_dir / "args.json").read_text(encoding="utf-8"))["asked"]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # a new folder
    # flow_shift: a resumed run keeps its own, and says so where the flag has another
    expected = {
        "resume_from_checkpoint",
        "accept_data_change",
        "output_dir",
        "verify",
        "skip_verify",
        "config",
        "recipe",
        "flow_shift",
    }
    before, values = with_default_yaml(before), json.loads(json.dumps(with_default_yaml(now)))
    names = [name for name in values if name not in expected and name in before and before[name] != values[name]]
    return [f"--{name} was {before[name]} and is {values[name]} from this step on" for name in names]


def conversion_notes(ctx: Context) -> list[str]:
    """Lines on a DeepSpeed checkpoint that has to be converted for this number of processes.

    Raises:
        UserError: there is not enough free disk space for it.
    """
    lines: list[str] = []
    if ctx.checkpoint is not None:
        convert = partial(announce_conversion, ctx.checkpoint, ctx.output_dir, ctx.world_size)
        run_on_main(lambda: lines.extend(convert()), is_main=ctx.is_main, gather=ctx.gather)
    return lines


def planned_backend_notes(planned: str | None, backend: Backend) -> list[str]:
    """A warning if the settings, usually those of a recipe, were planned for a backend that needs other memory."""
    if planned is None or planned == backend.name or (backend.full_weights and BACKENDS[planned].full_weights):
        return []
    return [
        f"warning: the settings were planned for {planned}, this launch is {backend.name}, whose memory differs: launch "
        "it as --list_recipes shows"
    ]


def prepare_folder(
    args: argparse.Namespace, ctx: Context, schedule: Schedule, resolved: Mapping[str, Any], checkpoint_bytes: int
) -> None:
    """Move aside what an earlier run wrote after the step to resume from, and write args.json; all ranks call it.

    The launch is recorded in events.jsonl, and report.html begins.

    Args:
        resolved: values that follow from the flags, besides the schedule's, for args.json.
        checkpoint_bytes: size of one checkpoint, for which there must be enough free disk space.

    Raises:
        UserError: there is not.
    """
    state = schedule.state
    values = {
        "run": state.run, "seed": schedule.settings.seed, "slots": schedule.settings.slots,
        "total_steps": schedule.total, **resolved, "plan": plan_inputs(schedule.settings),
    }  # fmt: skip
    if changes := schedule.data_changes:
        values["data_changes"] = changes

    def prepare() -> None:
        require_disk_space(ctx.output_dir, checkpoint_bytes)
        moved = rewind(ctx.output_dir, state.step)
        if ctx.checkpoint:
            try:
                copy_curves(ctx.checkpoint, ctx.output_dir, state.step, state.run)
            except OSError as why:
                ctx.print(f"warning: the curves before step {state.step} are not shown ({why})")
        changed = changed_flags(ctx.output_dir, vars(args)) if ctx.checkpoint else []
        write_json_atomically(ctx.output_dir / "args.json", {"asked": vars(args), "resolved": values})
        append_event(
            ctx.output_dir, "launch", state.step, command=shlex.join(["python", *sys.argv]), script=sys.argv[0],
            processes=ctx.world_size, backend=ctx.backend.name, device=str(ctx.device), changed=changed,
            resumed_from=str(ctx.checkpoint) if ctx.checkpoint else None, moved=moved.name if moved else None,
        )  # fmt: skip
        if args.report_seconds > 0:
            write_data_report(ctx.output_dir, schedule)
        ctx.report.start()

    run_on_main(prepare, is_main=ctx.is_main, gather=ctx.gather)
