"""Optimizer classes by dotted name (--optimizer torch.optim.RAdam): import, and a trial on small parameters.

The trial finds out, before any weight is loaded, whether a class can be used here, what a checkpoint must contain of
it to resume bit-identically, and whether ranks that step shards of the parameters compute the same as one process.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from videox.errors import LOAD_ERRORS, UserError
from videox.optim.build import set_learning_rate
from videox.optim.registry import REPLICATED, Optimizer
from videox.optim.state import keep_group_state, load_optimizer_tensors, optimizer_tensors

# Shapes of the trial's parameters. Each half of the first one is large enough for the 8-bit moments of bitsandbytes.
MATRICES, VECTORS = ((128, 96), (32, 16), (16, 24)), ((24,), (3,))
STEPS = 3  # in the trial before its state is saved, and as many after it
RATES = (0.0, 1.0, 1.0, 0.5, 1.0, 1.0)  # of the steps; with warm-up, the first step of a run has the rate 0
SAME = 1e-3  # shards and whole parameters may differ by this share of the largest update
NOT_STATE = ("params", "lr", "rate_factor")  # keys of parameter groups that the trainer sets itself
OWN_MODES = "switches the weights between its train and eval modes, which the trainer does not"
MIXES = "its step of a value depends on other values, and this backend shards them"
KEEPS = "it stores more than numbers and tensors of a parameter's shape, and DeepSpeed flattens the parameters"

Make = Callable[..., torch.optim.Optimizer]  # from parameter groups and lr


def import_class(name: str) -> type[torch.optim.Optimizer]:
    """Return the optimizer class of a dotted name. Raises UserError if there is none."""
    module_name, _, class_name = name.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError, TypeError) as error:
        hint = "install the package that contains it, or correct the name"
        raise UserError("--optimizer", f"{module_name} cannot be imported ({error})", hint) from error
    found = getattr(module, class_name, None)
    if isinstance(found, type) and issubclass(found, torch.optim.Optimizer):
        return found
    classes = [key for key, value in vars(module).items() if isinstance(value, type)]
    classes = [key for key in classes if issubclass(getattr(module, key), torch.optim.Optimizer)]
    what = f"{name} does not exist" if found is None else f"{name} is no subclass of torch.optim.Optimizer"
    similar = difflib.get_close_matches(class_name, classes, 3, 0.4) or sorted(classes)[:3] or ["another module"]
    raise UserError("--optimizer", what, f"try {', '.join(similar)}")


def check_settings(name: str, settings: Mapping[str, Any]) -> None:
    """Raise UserError if the class has no learning rate, or none of its settings has one of these names."""
    parameters = inspect.signature(import_class(name)).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    if "lr" not in parameters:
        raise UserError("--optimizer", f"{name} has no learning rate lr", "use another optimizer")
    accepted = [key for key in [*parameters][1:] if key != "lr"]
    for key in settings:
        if key not in accepted:
            hint = f"use {', '.join(accepted)}"
            raise UserError("--optimizer_args", f"{key} is not a setting of {name}", hint)


def try_class(
    name: str, make: Make, *, learning_rate: float, rate_factors: Sequence[float], matrices_only: bool
) -> tuple[Optimizer, str]:
    """Try an optimizer on small parameters; return what is known of it then, and a line with all of its settings.

    Args:
        name: of the optimizer, for messages.
        make: makes it from parameter groups and lr, with its settings.
        learning_rate: of the run.
        rate_factors: of the run's parameter groups.
        matrices_only: all parameters of the run are matrices, as those of a LoRA.

    Raises:
        UserError: it cannot be made, cannot step, or cannot resume bit-identically from tensors and numbers.
    """
    shapes = MATRICES if matrices_only else (*MATRICES, *VECTORS)
    if hasattr(import_class(name), "eval"):
        raise UserError("--optimizer", f"{name} {OWN_MODES}", "use another optimizer")
    with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(io.StringIO()):
        with _refused_if_it_raises(name):
            whole = make(_groups(_parameters(shapes), rate_factors), lr=learning_rate)
        defaults = {key: value for key, value in whole.defaults.items() if key not in NOT_STATE}
        changed, group_state, moments = _check_resume(name, make, shapes, rate_factors)
        backends: tuple[str, ...] = REPLICATED
        reason = MIXES
        if _same_in_shards(make, shapes, rate_factors, changed):
            backends = (*backends, "fsdp1", "fsdp2")
            reason = KEEPS
            numbers_only = not changed and _has_plain_state(make, shapes, rate_factors)
            if numbers_only and _same_in_shards(make, shapes, rate_factors, flat_groups=True):
                backends, reason = (*backends, "zero2", "zero3"), ""
    settings = ", ".join(f"{key}={value}" for key, value in defaults.items())
    line = f"optimizer   {name}({settings}): {8 + moments} bytes per trainable parameter"
    kind = Optimizer("", "", backends, reason, True, 8 + moments, by_shard=True, group_state=group_state)
    return kind, line


@contextmanager
def _refused_if_it_raises(name: str) -> Iterator[None]:
    try:
        yield
    except LOAD_ERRORS as error:
        cause = " ".join(str(error).split())[:200]
        what = f"{name} fails on small parameters ({type(error).__name__}: {cause})"
        raise UserError("--optimizer", what, "change --optimizer_args, or use another optimizer") from error


# ------------------------------------------------------------------------------------------- parameters of the trial


def _parameters(shapes: Sequence[tuple[int, ...]]) -> list[nn.Parameter]:
    """Return parameters about as large as a model's weights, the second half of each ten times as large.

    The last matrix is 0, as the B of new LoRA adapters.
    """
    draw = torch.Generator().manual_seed(0)
    values = [_uneven(torch.randn(shape, generator=draw)) * 1e-2 for shape in shapes]
    values[len(MATRICES) - 1].zero_()
    return [nn.Parameter(value) for value in values]


def _uneven(values: Tensor) -> Tensor:
    """Multiply the second half of a tensor by ten, so that the halves' norms differ."""
    flat = values.flatten()
    flat[len(flat) // 2 :] *= 10
    return flat.view_as(values)


def _gradients(step: int, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Return the gradients of a step: mostly the same in each, so that an estimate of the step size increases."""
    always, now = torch.Generator().manual_seed(99), torch.Generator().manual_seed(step + 1)
    return [
        _uneven(torch.randn(shape, generator=always) + 0.3 * torch.randn(shape, generator=now)) for shape in shapes
    ]


def _groups(parameters: Sequence[nn.Parameter], rate_factors: Sequence[float]) -> list[dict[str, Any]]:
    count = len(rate_factors)
    return [{"params": list(parameters[n::count]), "rate_factor": rate} for n, rate in enumerate(rate_factors)]


def _step(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor], step: int) -> None:  # fmt: skip
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    torch.default_generator.manual_seed(step)  # as in training, where each step begins with a seed of its own
    set_learning_rate(optimizer, RATES[step])
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# --------------------------------------------------------------------------------------------------------- the trials


def _check_resume(
    name: str, make: Make, shapes: Sequence[tuple[int, ...]], rate_factors: Sequence[float]
) -> tuple[tuple[str, ...], tuple[str, ...], int]:
    """Save and resume in the middle of the steps; raise UserError unless the result is bit-identical.

    Returns:
        The keys of the groups that these steps changed, those that a checkpoint must contain, and the bytes of moments
        per parameter, rounded up.
    """
    with _refused_if_it_raises(name):
        parameters = _parameters(shapes)
        optimizer = make(_groups(parameters, rate_factors), lr=1.0)
        before = [{**group} for group in optimizer.param_groups]
        for step in range(STEPS):
            _step(optimizer, parameters, _gradients(step, shapes), step)
        names = {parameter: f"parameter {number}" for number, parameter in enumerate(parameters)}
        changed = _changed_keys(before, optimizer.param_groups)
        kept = tuple(sorted({*changed, *_unsettable_numbers(name, before)}))
        saved = optimizer_tensors(keep_group_state(optimizer, kept), names)
        saved = {key: tensor.clone() for key, tensor in saved.items()}
        copies = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
        resumed = keep_group_state(make(_groups(copies, rate_factors), lr=1.0), kept)
        load_optimizer_tensors(resumed, {copy: f"parameter {n}" for n, copy in enumerate(copies)}, saved)
        for step in range(STEPS, 2 * STEPS):
            _step(optimizer, parameters, _gradients(step, shapes), step)
            _step(resumed, copies, _gradients(step, shapes), step)
    if not all(parameter.isfinite().all() for parameter in parameters):
        raise UserError("--optimizer", f"{name} gives values that are not finite", "use another optimizer")
    if not all(torch.equal(first, second) for first, second in zip(parameters, copies, strict=True)):
        what = f"{name} does not resume bit-identically from its state: it stores values elsewhere"
        raise UserError("--optimizer", what, "use another optimizer")
    size = sum(tensor.numel() * tensor.element_size() for tensor in saved.values() if tensor.dim())
    return changed, kept, math.ceil(size / sum(parameter.numel() for parameter in parameters))


def _changed_keys(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    keys = {
        key
        for old, new in zip(before, after, strict=True)
        for key, value in new.items()
        if key not in NOT_STATE and not (key in old and _equal(old[key], value))
    }
    return tuple(sorted(keys))


def _unsettable_numbers(name: str, groups: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return the keys of numbers in the groups that the class has no setting for: later steps may change them."""
    settable = inspect.signature(import_class(name)).parameters
    kinds = (int, float, Tensor)  # not bool: a flag of a parent class
    found = {key for group in groups for key, value in group.items() if type(value) in kinds and key not in settable}
    return found - {*NOT_STATE}


def _equal(first: object, second: object) -> bool:
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return first is not second and isinstance(first, Tensor) and isinstance(second, Tensor) and torch.equal(first, second)  # fmt: skip
    return type(first) is type(second) and first == second


def _has_plain_state(make: Make, shapes: Sequence[tuple[int, ...]], rate_factors: Sequence[float]) -> bool:
    """Return whether the state of a parameter is numbers and tensors of its shape."""
    parameters = _parameters(shapes)
    optimizer = make(_groups(parameters, rate_factors), lr=1.0)
    for step in range(STEPS):
        _step(optimizer, parameters, _gradients(step, shapes), step)
    return all(
        isinstance(value, (int, float)) or (type(value) is Tensor and value.shape in (parameter.shape, ()))
        for parameter in parameters
        for value in optimizer.state[parameter].values()
    )


def _same_in_shards(
    make: Make,
    shapes: Sequence[tuple[int, ...]],
    rate_factors: Sequence[float],
    changed: Sequence[str] = (),
    *,
    flat_groups: bool = False,
) -> bool:
    """Return whether two ranks that step a half of each parameter compute what one process computes.

    Args:
        make: makes the optimizer.
        shapes: of the parameters.
        rate_factors: of the groups.
        changed: keys of the groups whose values must be equal, too: each rank changes its own.
        flat_groups: the halves of a group are one tensor, which replaces the parameters of a made optimizer, as in
            DeepSpeed; otherwise each half is a tensor, from which the optimizer is made, as in FSDP.
    """
    whole = _parameters(shapes)
    optimizer = make(_groups(whole, rate_factors), lr=1.0)
    for step in range(2 * STEPS):
        _step(optimizer, whole, _gradients(step, shapes), step)
    updates = [after.detach() - before.detach() for after, before in zip(whole, _parameters(shapes), strict=True)]
    try:
        halves = [_updates_of_half(make, shapes, rate_factors, half, flat_groups=flat_groups) for half in (0, 1)]
    except LOAD_ERRORS:
        return False  # it needs complete parameters; it steps them, as was just seen
    for _, groups in halves:
        for mine, all_of in zip(groups, optimizer.param_groups, strict=True):
            if not all(_equal(mine[key], all_of[key]) for key in changed):
                return False
    largest = max(float(update.abs().max()) for update in updates)
    joined = [torch.cat([first, second]) for first, second in zip(halves[0][0], halves[1][0], strict=True)]
    return all(
        bool((update.flatten() - parts).abs().max() <= SAME * largest)
        for update, parts in zip(_in_groups(updates, rate_factors) if flat_groups else updates, joined, strict=True)
    )


def _updates_of_half(
    make: Make, shapes: Sequence[tuple[int, ...]], rate_factors: Sequence[float], half: int, *, flat_groups: bool
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Return the updates of one rank's shards after all steps, flat, of each parameter or group; and its groups."""
    values = [parameter.detach() for parameter in _parameters(shapes)]
    gradients = [_gradients(step, shapes) for step in range(2 * STEPS)]
    if flat_groups:
        values = _in_groups(values, rate_factors)
        gradients = [_in_groups(each, rate_factors) for each in gradients]
    parts = [nn.Parameter(_half(value, half)) for value in values]
    before = [part.detach().clone() for part in parts]
    if flat_groups:
        optimizer = make(_groups(_parameters(shapes), rate_factors), lr=1.0)
        for group, part in zip(optimizer.param_groups, parts, strict=True):
            group["params"] = [part]
    else:
        optimizer = make(_groups(parts, rate_factors), lr=1.0)
    for step, each in enumerate(gradients):
        _step(optimizer, parts, [_half(gradient, half) for gradient in each], step)
    updates = [part.detach() - value for part, value in zip(parts, before, strict=True)]
    return updates, optimizer.param_groups


def _half(values: Tensor, half: int) -> Tensor:
    flat = values.flatten()
    middle = len(flat) // 2
    return (flat[middle:] if half else flat[:middle]).clone()


def _in_groups(values: Sequence[Tensor], rate_factors: Sequence[float]) -> list[Tensor]:
    """Return the values of each group as one flat tensor."""
    count = len(rate_factors)
    return [torch.cat([value.flatten() for value in values[n::count]]) for n in range(count)]
