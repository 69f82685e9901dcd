"""Trains the runs of a command one after the other: of --expert both one for each expert of Wan2.2."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from videox.distributed.restart import restart
from videox.errors import STOPPED
from videox.families.wan_experts import runs_of
from videox.lora.reader import STEM
from videox.models.config_files import read_json
from videox.run.folder import resolve_resume
from videox.run.status import read_status
from videox.training.context import Context
from videox.training.launch import launch
from videox.training.schedule import WITHOUT_NUMBERS
from videox.weights.expert_names import TRANSFORMER, exported_name, lora_stem

RECORD = "args.json"
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
    """Return the flags by which the second run follows the first: its seed, and its weights for sample clips."""
    seed = first.seed if first.seed is not None else read_json(Path(first.output_dir) / RECORD)["resolved"]["seed"]
    return {"seed": seed, "other_transformer_path": None if first.lora_rank else first.output_dir}
