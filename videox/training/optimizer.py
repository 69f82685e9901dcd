"""The optimizer that the flags select: its settings, its parameter groups, and the trial of a class by dotted name."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from videox.engine.base import OptimizerFactory
from videox.optim.build import loraplus_groups, make_optimizer, parameter_groups
from videox.optim.custom_class import check_settings, try_class
from videox.optim.registry import CLASSES, is_class_name, optimizer_class, parse_settings, takes_settings
from videox.training.args import optimizer_of

ADAM_FLAGS = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 1e-2, "adam_epsilon": 1e-8}
CLASS_OF = {"prodigy": "prodigyopt.Prodigy"}  # names whose settings are those of a class


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of make_optimizer, besides the learning rate."""
    return {
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "epsilon": args.adam_epsilon,
        "settings": parse_settings(args.optimizer_args),
    }


def try_optimizer(args: argparse.Namespace) -> list[str]:
    """Try an optimizer whose settings the user states, before anything is loaded, and return the lines to print.

    Raises:
        UserError: it does not exist, does not accept its settings, or cannot be resumed bit-identically.
    """
    name = optimizer_of(args)
    if not takes_settings(name):
        return []
    class_name = CLASS_OF.get(name, name)
    settings = settings_of(args)
    check_settings(class_name, settings["settings"])
    kind, line = try_class(
        class_name,
        optimizer_class(name, **settings),
        learning_rate=args.learning_rate,
        rate_factors=_rate_factors(args),
        matrices_only=args.lora_rank > 0 and args.lora_type == "lora",
    )
    CLASSES[class_name] = kind
    unused = [f"--{flag}" for flag, default in ADAM_FLAGS.items() if getattr(args, flag) != default]
    if is_class_name(name) and unused:
        return [line, f"{', '.join(unused)} have no effect on {name}: pass its settings by --optimizer_args"]
    if name == "prodigy" and args.learning_rate < 0.1:
        return [line, f"prodigy multiplies its own step size by --learning_rate, {args.learning_rate:g}; 1 is usual"]
    return [line]


def make_groups(
    args: argparse.Namespace, parameters: Mapping[str, torch.nn.Parameter], full: Sequence[str], half: Sequence[str]
) -> list[dict]:
    """The parameter groups; full, half: names of those at the full and at half the learning rate."""
    if args.loraplus_ratio != 1:
        return loraplus_groups(parameters, full, args.loraplus_ratio)
    return parameter_groups(parameters, full, half)


def optimizer_factory(
    args: argparse.Namespace, learning_rate: float, full: Sequence[str], half: Sequence[str]
) -> OptimizerFactory:
    """Makes the optimizer over named parameters; full, half: as in make_groups."""

    def make(parameters: Mapping[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
        groups = make_groups(args, parameters, full, half)
        return make_optimizer(groups, learning_rate=learning_rate, name=optimizer_of(args), **settings_of(args))

    return make


def _rate_factors(args: argparse.Namespace) -> tuple[float, ...]:
    if args.loraplus_ratio != 1:
        return (1.0, args.loraplus_ratio)
    return (1.0, 0.5) if args.trainable_modules_low_learning_rate else (1.0,)
