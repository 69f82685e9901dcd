"""Builds the optimizer: trainable parameters and their groups, learning-rate schedule, gradient clipping."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers.optimization import get_scheduler

from videox.optim.cpu_offload import CpuOffloadOptimizer
from videox.optim.registry import kind_of, moments_of, optimizer_class
from videox.optim.selection import select_parameters
from videox.optim.state import keep_group_state

ABNORMAL_RATIO = 5.0  # a gradient norm above this multiple of the limit is abnormal ...
ABNORMAL_SQUEEZE = 10.0  # ... and is clipped to the limit divided by norm / limit, at most by this


def choose_trainable(
    module: torch.nn.Module, trainable: Sequence[str], half_lr: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Freeze all parameters that are not selected; return (names at the full learning rate, names at half of it).

    The arguments and errors are those of select_parameters, for the names of the module's parameters.
    """
    full, half = select_parameters([name for name, _ in module.named_parameters()], trainable, half_lr)
    selected = {*full, *half}
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in selected)
    return full, half


def parameter_groups(
    parameters: torch.nn.Module | Mapping[str, torch.nn.Parameter], full: Sequence[str], half: Sequence[str]
) -> list[dict]:
    """Return the optimizer's groups, each with its `rate_factor` (1.0 and 0.5); an empty group is left out.

    Args:
        parameters: parameters by name, or the module that has them.
        full: names at the full learning rate.
        half: names at half the learning rate.
    """
    if isinstance(parameters, torch.nn.Module):
        parameters = dict(parameters.named_parameters())
    groups = [(full, 1.0), (half, 0.5)]
    return [{"params": [parameters[n] for n in names], "rate_factor": factor} for names, factor in groups if names]


def loraplus_groups(parameters: Mapping[str, torch.nn.Parameter], names: Sequence[str], ratio: float) -> list[dict]:
    """Return the groups of a LoRA's parameters, with a higher learning rate for B: LoRA+, arXiv:2402.12354.

    Args:
        parameters: parameters by name.
        names: those of the adapters.
        ratio: learning rate of B divided by that of all others; 1 = one group.
    """
    in_b = {name for name in names if ".lora_B." in name} if ratio != 1 else set()
    groups = [([name for name in names if name not in in_b], 1.0), ([name for name in names if name in in_b], ratio)]
    return [{"params": [parameters[n] for n in chosen], "rate_factor": rate} for chosen, rate in groups if chosen]


def make_optimizer(
    groups: list[dict],
    *,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    epsilon: float,
    name: str = "adamw",
    settings: Mapping[str, Any] | None = None,
) -> torch.optim.Optimizer:
    """Return an optimizer over the groups; AdamW is fused: it allocates no temporaries and can skip steps (step_if).

    Args:
        groups: parameter groups of parameter_groups.
        learning_rate: initial learning rate, until set_learning_rate.
        betas: decays of the moments.
        weight_decay: per unit of learning rate.
        epsilon: added to the root of the second moment.
        name: a name in videox.optim.registry.OPTIMIZERS, or of a class that was tried (videox.optim.custom_class).
        settings: further settings of an optimizer of videox.optim.registry.takes_settings.
    """
    kind = moments_of(name)
    make = optimizer_class(kind, betas=betas, weight_decay=weight_decay, epsilon=epsilon, settings=settings)
    if kind == "adamw":
        make = partial(make, fused=True)
    if kind_of(name).on_host:
        return CpuOffloadOptimizer(groups, make, lr=learning_rate)
    return keep_group_state(make(groups, lr=learning_rate), kind_of(name).group_state)


def lr_schedule(name: str, warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """Return the learning-rate factor as a function of the optimizer step, counted from 0.

    The formulas are diffusers'. Its scheduler object is not used: accelerate would step it once per process, and a
    resumed run would have to restore it. With warm-up, step 0 has the factor 0. "polynomial" ends at the factor 1e-7:
    in diffusers the end is an absolute learning rate of 1e-7, and a lower learning rate would be an error.
    """
    unused = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)  # an argument of get_scheduler
    lambdas = get_scheduler(name, unused, num_warmup_steps=warmup_steps, num_training_steps=total_steps).lr_lambdas
    return lambda step: float(lambdas[0](step))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set each group's learning rate to lr times its rate_factor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):  # torchao's compiled step reads this tensor: write into it
            group["lr"].fill_(lr * group["rate_factor"])
        else:
            group["lr"] = lr * group["rate_factor"]


def clip_limit(
    norm: torch.Tensor, step: int, *, max_grad_norm: float, initial_ratio: float, ramp_steps: int
) -> torch.Tensor:
    """Return the maximum gradient norm of a step: float64 scalar, on the norm's device.

    It falls linearly from max_grad_norm * initial_ratio at step 0 to max_grad_norm at step ramp_steps. After a ramp, a
    norm of more than 5 times the limit is clipped below it, to limit / min(norm / limit, 10).

    Args:
        norm: the gradient norm of this step, before clipping.
        step: optimizer steps already done.
        max_grad_norm: the limit after the ramp.
        initial_ratio: the limit at step 0 divided by max_grad_norm; 1 = no ramp, the limit is max_grad_norm.
        ramp_steps: steps of the ramp, at least 1.
    """
    progress = min(step / ramp_steps, 1.0)
    limit = max_grad_norm * (initial_ratio + (1 - initial_ratio) * progress)
    normal = torch.full_like(norm, limit, dtype=torch.float64)
    if initial_ratio <= 1 or step <= ramp_steps:
        return normal
    excess = norm.double() / limit
    return torch.where(excess > ABNORMAL_RATIO, normal / excess.clamp(max=ABNORMAL_SQUEEZE), normal)


def clip_gradients(parameters: Iterable[torch.nn.Parameter], norm: torch.Tensor, limit: torch.Tensor) -> None:
    """Scale the gradients in place so that their global 2-norm, passed as `norm`, is at most `limit`.

    Bitwise equal to torch.nn.utils.clip_grads_with_norm_, which takes the limit as a Python number: reading it here
    would make the host wait for the device.
    """
    scale = ((norm + 1e-6).reciprocal() * limit.to(norm.dtype)).clamp(max=1.0)
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, scale)


def step_if(optimizer: torch.optim.Optimizer, applied: torch.Tensor) -> None:
    """Step the optimizer if `applied` is true; otherwise weights and moments stay bitwise unchanged.

    torch's fused kernels read `applied` on the device, as they do for torch.amp.GradScaler. Other optimizers cannot:
    for them the host waits for the device and reads it.

    Args:
        optimizer: the optimizer to step.
        applied: boolean scalar on the device.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        if applied:
            optimizer.step()
        return
    # The protocol of GradScaler: a fused optimizer skips the step on the device where found_inf is 1.
    fused: Any = optimizer
    fused.grad_scale, fused.found_inf = None, applied.logical_not().float()
    try:
        optimizer.step()
    finally:
        del fused.grad_scale, fused.found_inf


def gradient_norm(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """Return the global 2-norm of all gradients: a scalar on the parameters' device."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
