"""Optimizer state as named tensors and back, bit-identical, independent of the order of the parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from videox.errors import MODEL, UserError
from videox.weights.safetensors_io import join_first

QUANTISED = "@"  # separates the key of a quantized moment from the name of one of its tensors
GROUP = "@group"  # "@group0/key" is a value of the first parameter group
GROUP_STATE = "videox_group_state"  # attribute of an optimizer: the keys of its groups that its steps change
STATELESS = ""  # the state key of a parameter that the optimizer has not yet touched
PARAMETER_SHAPED = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
# Suffix of a state key -> Python type of the value, dtype of the tensor that is saved for it.
SCALARS: dict[str, tuple[type, torch.dtype]] = {
    ":bool": (bool, torch.bool),
    ":int": (int, torch.int64),
    ":float": (float, torch.float64),
}


def flatten_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return one parameter's optimizer state, with quantized moments split into their plain tensors."""
    flat: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__") and type(value) is not Tensor:
            names, (signed, _) = value.__tensor_flatten__()  # torchao's 8-bit state
            flat |= {f"{key}{QUANTISED}{name}": getattr(value, name) for name in names}
            flat[f"{key}{QUANTISED}signed"] = bool(signed)
        else:
            flat[key] = value
    return flat


def _unflatten_state(state: dict[str, Any], parameter: nn.Parameter) -> dict[str, Any]:
    """Return the state with quantized moments: the inverse of flatten_state."""
    restored = {key: value for key, value in state.items() if QUANTISED not in key}
    for base in sorted({key.partition(QUANTISED)[0] for key in state if QUANTISED in key}):
        from torchao.optim.subclass_8bit import OptimState8bit  # an optional package, needed by this optimizer anyway

        tensors = {
            key.partition(QUANTISED)[2]: value for key, value in state.items() if key.startswith(base + QUANTISED)
        }
        restored[base] = OptimState8bit(**tensors, dtype=parameter.dtype)
    return restored


def _state_tensor(value: object, where: str) -> tuple[str, Tensor]:
    """Return the suffix of the state key and the tensor for a value of an optimizer's state. Raises TypeError."""
    if type(value) in (Tensor, nn.Parameter):
        assert isinstance(value, Tensor)
        return "", value.detach()
    for suffix, (kind, dtype) in SCALARS.items():
        if type(value) is kind:
            return suffix, torch.tensor(value, dtype=dtype)
    raise TypeError(f"{where} is a {type(value).__name__}; only tensors, int, float and bool can be saved")


def keep_group_state(optimizer: torch.optim.Optimizer, keys: Sequence[str]) -> torch.optim.Optimizer:
    """Have optimizer_tensors and load_optimizer_tensors include these keys of the optimizer's groups; return it."""
    setattr(optimizer, GROUP_STATE, tuple(keys))
    return optimizer


def _group_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {}
    for number, group in enumerate(optimizer.param_groups):
        for key in getattr(optimizer, GROUP_STATE, ()):
            if key in group:
                suffix, tensor = _state_tensor(group[key], f"{key} of group {number}")
                tensors[f"{GROUP}{number}/{key}{suffix}"] = tensor
    return tensors


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]) -> dict[str, Tensor]:
    """Return an optimizer's state as `parameter name/state key` -> tensor, independent of the order of its parameters.

    Hyperparameters are not included: the learning rate is a function of the step, the others are flags of the run. The
    values of keep_group_state are `@group0/key` and so on. A parameter without state yet is marked by an empty tensor,
    so that loading can tell it from one whose state was lost.

    Args:
        optimizer: an optimizer of torch, or one whose state has only tensors, ints, floats and bools.
        names: the name of every parameter of the optimizer, as in the model's `named_parameters()`.

    Returns:
        The state's own tensors (not copies); 0-dim tensors for Python numbers (`key:int`, `key:float`, `key:bool`).

    Raises:
        TypeError: the state has another type of value.
        ValueError: two parameters have one name.
    """
    tensors = _group_tensors(optimizer)
    seen: set[str] = set()
    for _, parameter in _parameters(optimizer):
        name = names[parameter]
        if name in seen:
            raise ValueError(f"two parameters are named {name}")
        seen.add(name)
        state = optimizer.state.get(parameter, {})
        if not state:
            tensors[f"{name}/{STATELESS}"] = torch.empty(0)
        for key, value in flatten_state(state).items():
            suffix, tensor = _state_tensor(value, f"{key} of {name}")
            tensors[f"{name}/{key}{suffix}"] = tensor
    return tensors


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[tuple[dict[str, Any], nn.Parameter]]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield group, parameter


def _restore_value(key: str, tensor: Tensor, group: Mapping[str, Any], device: torch.device) -> tuple[str, Any]:
    """Return the state key and the original value, on the moments' device or on the CPU if torch expects it there."""
    base, colon, kind = key.rpartition(":")
    if colon and f":{kind}" in SCALARS:
        return base, tensor.item()
    # Only fused and capturable kernels read the step counter on the device (torch.optim.Optimizer.load_state_dict).
    on_cpu = key == "step" and not (group.get("capturable") or group.get("fused"))
    return key, tensor.to("cpu" if on_cpu else device, copy=True)


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str], tensors: Mapping[str, Tensor]
) -> None:
    """Load the state that optimizer_tensors returned, bit-identically; hyperparameters are not changed.

    Args:
        optimizer: an optimizer over the same parameters by name, in any order and grouping.
        names: as for optimizer_tensors.
        tensors: e.g. StoredTensors(folder, stem), or a dict.

    Raises:
        UserError: (MODEL) a parameter's state is missing, unexpected or of another shape; the optimizer is then
            unchanged.
    """
    keys_of: dict[str, list[str]] = {}
    for tensor_name in tensors:
        name, _, key = tensor_name.rpartition("/")
        keys_of.setdefault(name, []).append(key)
    in_groups = {name: keys_of.pop(name) for name in [*keys_of] if name.startswith(GROUP)}
    own_names = {names[parameter] for _, parameter in _parameters(optimizer)}
    own_groups = {f"{GROUP}{number}" for number in range(len(optimizer.param_groups))}
    faults = [f"no state for {name}" for name in sorted(own_names - keys_of.keys())]
    faults += [f"state for {name}, which is not trainable" for name in sorted(keys_of.keys() - own_names)]
    faults += [
        f"state of {name.removeprefix('@')}, of several learning rates" for name in in_groups.keys() - own_groups
    ]
    restored: dict[nn.Parameter, dict[str, Any]] = {}
    state_device: torch.device | None = getattr(optimizer, "state_device", None)  # of CpuOffloadOptimizer
    for group, parameter in _parameters(optimizer):
        name = names[parameter]
        state = restored[parameter] = {}
        for key in keys_of.get(name, []):
            if key == STATELESS:
                continue
            base, value = _restore_value(key, tensors[f"{name}/{key}"], group, state_device or parameter.device)
            state[base] = value
            if base in PARAMETER_SHAPED and value.shape != parameter.shape:
                faults.append(f"{base} of {name} is {list(value.shape)}, the parameter {list(parameter.shape)}")
    if faults:
        raise UserError(
            "optimizer state", join_first(faults), "resume with the model and flags it was saved with", MODEL
        )
    for name, keys in in_groups.items():
        group = optimizer.param_groups[int(name.removeprefix(GROUP))]
        for key in keys:
            device = group[key].device if isinstance(group.get(key), Tensor) else torch.device("cpu")
            base, value = _restore_value(key, tensors[f"{name}/{key}"], {"fused": True}, device)
            group[base] = value
    for parameter, state in restored.items():
        optimizer.state.pop(parameter, None)
        if state:
            optimizer.state[parameter] = _unflatten_state(state, parameter)
