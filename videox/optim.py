"""Serves the training loop: which parameters train at which rate, the schedule as a function of the step, clipping."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from diffusers.optimization import SchedulerType, get_scheduler

from videox.errors import Refusal
from videox.optimizers import optimizer_class

SCHEDULES = tuple(kind.value for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT)
ABNORMAL_RATIO = 5.0  # a norm this many times the limit counts as abnormal ...
ABNORMAL_SQUEEZE = 10.0  # ... and is clipped below the limit by its own ratio, at most by this


def choose_trainable(
    module: torch.nn.Module, trainable: Sequence[str], low_rate: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Freezes everything but the chosen parameters and returns (names at the full rate, names at half of it).

    A parameter is chosen when its name contains one of the strings; "." means all, also those at the top level whose
    names have no dot. Names that match both lists train at the full rate.

    Raises:
        Refusal: a string matches nothing, or nothing is left to train.
    """
    names = [name for name, _ in module.named_parameters()]
    for flag, patterns in (("trainable_modules", trainable), ("trainable_modules_low_learning_rate", low_rate)):
        for pattern in patterns:
            if pattern != "." and not any(pattern in name for name in names):
                parts = sorted({part for name in names for part in name.split(".")})
                near = difflib.get_close_matches(pattern, parts, 3, 0.4) or parts[:3]
                raise Refusal(
                    f"--{flag}", f"{pattern!r} matches no parameter", f"try {', '.join(near)}, or '.' for all"
                )
    full = [name for name in names if matches(name, trainable)]
    half = [name for name in names if matches(name, low_rate) and not matches(name, trainable)]
    if not full and not half:
        raise Refusal("--trainable_modules", "nothing is left to train", "give '.' for all")
    chosen = {*full, *half}
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in chosen)
    return full, half


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Returns whether a parameter's name is chosen by one of the strings ("." chooses all)."""
    return any(pattern == "." or pattern in name for pattern in patterns)


def parameter_groups(
    parameters: torch.nn.Module | Mapping[str, torch.nn.Parameter], full: Sequence[str], half: Sequence[str]
) -> list[dict]:
    """Returns the optimizer's groups, each with its `rate_factor` (1.0 and 0.5); an empty group is left out.

    Args:
        parameters: by name, or the module that has them.
        full: names at the full rate; half: at half of it.
    """
    if isinstance(parameters, torch.nn.Module):
        parameters = dict(parameters.named_parameters())
    groups = [(full, 1.0), (half, 0.5)]
    return [{"params": [parameters[n] for n in names], "rate_factor": factor} for names, factor in groups if names]


def make_optimizer(
    groups: list[dict],
    *,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    epsilon: float,
    name: str = "adamw",
) -> torch.optim.Optimizer:
    """Returns an optimizer over the groups; AdamW is fused on a GPU, where its loop makes full-size temporaries.

    Args:
        name: of videox.optimizers.OPTIMIZERS.
    """
    make = optimizer_class(name, betas=betas, weight_decay=weight_decay, epsilon=epsilon)
    if name == "adamw":
        fused = all(p.is_cuda for group in groups for p in group["params"])
        return make(groups, lr=learning_rate, fused=fused or None)
    return make(groups, lr=learning_rate)


def schedule(name: str, warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """Returns the learning rate's factor as a function of the optimizer step, counted from 0.

    The formulas are diffusers'; only their scheduler object is left out, since accelerate would step it once per
    process, and a resumed run would have to restore it. With warm-up, step 0 has the factor 0. The end of "polynomial"
    is a share, 1e-7, of the learning rate: a rate below diffusers' own end would be an error there.
    """
    nothing = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    lambdas = get_scheduler(name, nothing, num_warmup_steps=warmup_steps, num_training_steps=total_steps).lr_lambdas
    return lambda step: float(lambdas[0](step))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets each group to rate times its rate_factor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):  # torchao's compiled step reads it there
            group["lr"].fill_(rate * group["rate_factor"])
        else:
            group["lr"] = rate * group["rate_factor"]


def clip_limit(norm: float, step: int, *, max_grad_norm: float, initial_ratio: float, ramp_steps: int) -> float:
    """Returns the gradient norm that a step may have.

    It falls linearly from max_grad_norm * initial_ratio at step 0 to max_grad_norm at step ramp_steps. After a ramp, a
    norm of more than 5 times the limit is clipped below it, to limit / min(norm / limit, 10).

    Args:
        norm: of this step, before clipping.
        step: optimizer steps done.
        initial_ratio: 1 = no ramp, the limit is max_grad_norm.
        ramp_steps: at least 1.
    """
    progress = min(step / ramp_steps, 1.0)
    limit = max_grad_norm * (initial_ratio + (1 - initial_ratio) * progress)
    if initial_ratio > 1 and step > ramp_steps and norm / limit > ABNORMAL_RATIO:
        return limit / min(norm / limit, ABNORMAL_SQUEEZE)
    return limit


def clip_gradients(parameters: Iterable[torch.nn.Parameter], norm: torch.Tensor, limit: float) -> None:
    """Scales the gradients, in place, so that their global 2-norm, given as `norm`, is at most `limit`."""
    torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)


def gradient_norm(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """Returns the global 2-norm of all gradients: a scalar on the parameters' device."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
