"""Wan2.2's two experts in one command: one trained after the other, and the LoRA of the one that is sampled only."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from diffusers import WanPipeline
from torch import nn

from videox.distributed.restart import restart
from videox.errors import MODEL, STOPPED, UserError
from videox.families.wan_experts import other_expert, runs_of
from videox.lora.merge import LowRankUpdate, lora_updates
from videox.lora.reader import STEM, lora_file, read_lora
from videox.models.config_files import read_json
from videox.models.configured import Component
from videox.models.shared_memory import Change
from videox.run.folder import resolve_resume
from videox.run.status import read_status
from videox.training.context import Context
from videox.training.launch import launch
from videox.training.schedule import WITHOUT_NUMBERS
from videox.weights.expert_names import TRANSFORMER, exported_name, lora_stem

RECORD = "args.json"
OTHER = "--other_transformer_path"
# A finished run is opened again if one of these flags has changed, or one that changes numbers.
TRAINED_ON = {"max_train_steps", "num_train_epochs", "export_dtype", "export_layouts", "early_stop"}

Train = Callable[[argparse.Namespace, Context], int]


def train_in_turn(
    args: argparse.Namespace, command: Sequence[str], train: Train, check: Callable[[argparse.Namespace], object]
) -> int:
    """Train the runs that a command asks for, and return the exit code.

    The second run gets processes of its own, which replace those of the first: nothing of the first expert remains in
    memory. They run the same command with the flags of the second run, which is a run like any other.

    Args:
        command: path of the script and its flags.
        train: trains one run.
        check: raises UserError where the second run could not begin; called before the first one trains.

    Raises:
        UserError: see `launch`.
    """
    environment = dict(os.environ)  # as the launcher has set it
    first, *others = runs_of(args)
    if not others:
        return launch(first, train)
    (second,) = others
    if is_finished(first):
        return launch(argparse.Namespace(**{**vars(second), **links(first)}), partial(_train_second, train, first))
    code = launch(first, partial(_train_first, train, check, second))
    if code or args.cache_only:
        return code
    flags = {"expert": second.expert, "output_dir": second.output_dir, **links(first)}
    words = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    code = restart([sys.executable, "-u", *command, *words], environment)
    if code == STOPPED and os.environ.get("RANK", "0") == "0":
        sys.stderr.write(
            f"stopped: {first.output_dir} is finished, {second.output_dir} has not begun; resume with "
            "--resume_from_checkpoint latest\n"
        )
    return code


def _train_first(
    train: Train, check: Callable[[argparse.Namespace], object], second: argparse.Namespace, args: argparse.Namespace,
    ctx: Context,
) -> int:  # fmt: skip
    check(second)
    resolve_resume(second.resume_from_checkpoint, Path(second.output_dir), lambda _: [])
    ctx.print(f"two runs: {args.expert} in {args.output_dir}, then {second.expert} in {second.output_dir}")
    return train(args, ctx)


def _train_second(train: Train, first: argparse.Namespace, args: argparse.Namespace, ctx: Context) -> int:
    ctx.print(f"{first.expert} is trained, {first.output_dir} is finished; now {args.expert}")
    return train(args, ctx)


def is_finished(args: argparse.Namespace) -> bool:
    """Return whether the run of these flags has finished, so that it has nothing more to train or to export.

    It has not if a flag that changes its length or its numbers is another one now.
    """
    folder, expert = Path(args.output_dir), args.expert
    status = read_status(folder)
    if args.resume_from_checkpoint is None or status is None or status.state != "finished":
        return False
    weights = f"{lora_stem(STEM, expert)}.safetensors" if args.lora_rank else exported_name(TRANSFORMER, expert)
    asked = read_json(folder / RECORD)["asked"]
    now = json.loads(json.dumps({name: vars(args)[name] for name in {*vars(args)} - (WITHOUT_NUMBERS - TRAINED_ON)}))
    return (folder / weights).exists() and all(asked.get(name, value) == value for name, value in now.items())


def links(first: argparse.Namespace) -> dict[str, object]:
    """Return the flags by which the second run follows the first: its seed, and its weights for sample clips.

    The weights of a DoRA are not merged into the other expert, which is then that of the model.
    """
    seed = first.seed if first.seed is not None else read_json(Path(first.output_dir) / RECORD)["resolved"]["seed"]
    return {"seed": seed, "other_transformer_path": None if first.lora_type == "dora" else first.output_dir}


# -------------------------------------------------------------------------------------- a LoRA of the other expert


def other_lora(args: argparse.Namespace) -> Path | None:
    """Return the LoRA file that --other_transformer_path means; None if it means weights, or is not given."""
    given = args.other_transformer_path
    return lora_file(Path(given), other_expert(args.expert)) if given else None


def other_weights(args: argparse.Namespace) -> str | None:
    """Return the weights that --other_transformer_path means; None: those of the model, to which a LoRA is added."""
    return None if other_lora(args) else args.other_transformer_path


def merge_of_other(args: argparse.Namespace, component: Component, dtype: torch.dtype) -> Change | None:
    """Return what adds the LoRA of --other_transformer_path to the loaded expert, and casts it; None without one.

    Args:
        component: the other expert.
        dtype: of computation.

    Raises:
        UserError: (MODEL) the LoRA cannot be read, or is of another model.
    """
    path = other_lora(args)
    if path is None:
        return None
    updates = lora_updates(*read_lora(path, WanPipeline.lora_state_dict, where=OTHER, family="wan"))
    shapes = component.source().shapes()
    for name, update in updates.items():
        if shapes.get(name) != (update.b.shape[0], update.a.shape[1]):
            what = f"{path} has an adapter for {name}, which this model lacks or has in another size"
            raise UserError(OTHER, what, "pass a LoRA of this model", MODEL)
    return partial(merge_and_cast, updates, dtype)


@torch.no_grad()
def merge_and_cast(
    updates: Mapping[str, LowRankUpdate], dtype: torch.dtype, model: nn.Module, has_values: bool
) -> None:
    """Add updates to the weights of a diffusers model, each sum in float32 and rounded once, and cast the model.

    What the class keeps in float32 becomes float32.

    Args:
        updates: by the names of the weights.
        model: changed in place.
        has_values: as for Change.
    """
    kept = {*(getattr(model, "_keep_in_fp32_modules", None) or ())}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        target = torch.float32 if kept & {*name.split(".")} else dtype
        if name in updates and has_values:
            update = updates[name]
            tensor.data = (tensor.float() + update.scale * (update.b @ update.a)).to(target)
        elif tensor.is_floating_point():
            tensor.data = tensor.data.to(target)
