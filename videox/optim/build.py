"""Serves the training loop: which parameters train at which rate, the schedule as a function of the step, clipping."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers.optimization import SchedulerType, get_scheduler

from videox.errors import UserError
from videox.optim.cpu_offload import CpuOffloadOptimizer
from videox.optim.registry import OPTIMIZERS, moments_of, optimizer_class

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
        UserError: a string matches nothing, or nothing is left to train.
    """
    names = [name for name, _ in module.named_parameters()]
    for flag, patterns in (("trainable_modules", trainable), ("trainable_modules_low_learning_rate", low_rate)):
        for pattern in patterns:
            if pattern != "." and not any(pattern in name for name in names):
                parts = sorted({part for name in names for part in name.split(".")})
                near = difflib.get_close_matches(pattern, parts, 3, 0.4) or parts[:3]
                raise UserError(
                    f"--{flag}", f"{pattern!r} matches no parameter", f"try {', '.join(near)}, or '.' for all"
                )
    full = [name for name in names if matches(name, trainable)]
    half = [name for name in names if matches(name, low_rate) and not matches(name, trainable)]
    if not full and not half:
        raise UserError("--trainable_modules", "nothing is left to train", "give '.' for all")
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
    """Returns an optimizer over the groups; AdamW is fused, which takes no temporaries and can be left (see step_if).

    Args:
        name: of videox.optim.registry.OPTIMIZERS.
    """
    kind = moments_of(name)
    make = optimizer_class(kind, betas=betas, weight_decay=weight_decay, epsilon=epsilon)
    if kind == "adamw":
        make = partial(make, fused=True)
    return (
        CpuOffloadOptimizer(groups, make, lr=learning_rate)
        if OPTIMIZERS[name].on_host
        else make(groups, lr=learning_rate)
    )


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


def clip_limit(
    norm: torch.Tensor, step: int, *, max_grad_norm: float, initial_ratio: float, ramp_steps: int
) -> torch.Tensor:
    """Returns the gradient norm that a step may have: float64 scalar, on the norm's device.

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
    usual = torch.full_like(norm, limit, dtype=torch.float64)
    if initial_ratio <= 1 or step <= ramp_steps:
        return usual
    excess = norm.double() / limit
    return torch.where(excess > ABNORMAL_RATIO, usual / excess.clamp(max=ABNORMAL_SQUEEZE), usual)


def clip_gradients(parameters: Iterable[torch.nn.Parameter], norm: torch.Tensor, limit: torch.Tensor) -> None:
    """Scales the gradients, in place, so that their global 2-norm, given as `norm`, is at most `limit`.

    To the bit as torch.nn.utils.clip_grads_with_norm_, which takes the limit as a number of the host.
    """
    scale = ((norm + 1e-6).reciprocal() * limit.to(norm.dtype)).clamp(max=1.0)
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, scale)


def step_if(optimizer: torch.optim.Optimizer, applied: torch.Tensor) -> None:
    """Steps the optimizer, or leaves weights and moments to the bit as they are.

    torch's fused kernels look at `applied` on the device, as they do for torch.amp.GradScaler. Other optimizers have
    no such thing: for them the host reads it, and waits.

    Args:
        applied: boolean scalar on the device.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        if applied:
            optimizer.step()
        return
    scaled: Any = optimizer
    scaled.grad_scale, scaled.found_inf = None, applied.logical_not().float()
    try:
        optimizer.step()
    finally:
        del scaled.grad_scale, scaled.found_inf


def gradient_norm(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """Returns the global 2-norm of all gradients: a scalar on the parameters' device."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
