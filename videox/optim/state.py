"""Serves resume: an optimizer's state as named tensors and back, bit for bit, whatever the order of its parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from videox.errors import MODEL, UserError
from videox.weights.safetensors_io import few

QUANTISED = "@"  # between the key of a quantised moment and the name of one of its parts
STATELESS = ""  # the state key of a parameter that the optimizer has not yet touched
PARAMETER_SHAPED = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
SCALARS: dict[str, tuple[type, torch.dtype]] = {  # suffix of a state key -> the Python type that the tensor stands for
    ":bool": (bool, torch.bool),
    ":int": (int, torch.int64),
    ":float": (float, torch.float64),
}


def _flat_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an optimizer's state of one parameter with quantised moments taken apart into their plain tensors."""
    flat: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__") and type(value) is not Tensor:
            parts, (signed, _) = value.__tensor_flatten__()  # torchao's 8-bit state
            flat |= {f"{key}{QUANTISED}{part}": getattr(value, part) for part in parts}
            flat[f"{key}{QUANTISED}signed"] = bool(signed)
        else:
            flat[key] = value
    return flat


def _quantised(state: dict[str, Any], parameter: nn.Parameter) -> dict[str, Any]:
    """Returns the inverse of _flat_state."""
    whole = {key: value for key, value in state.items() if QUANTISED not in key}
    for base in sorted({key.partition(QUANTISED)[0] for key in state if QUANTISED in key}):
        from torchao.optim.subclass_8bit import OptimState8bit  # whoever wrote it has the package

        parts = {
            key.partition(QUANTISED)[2]: value for key, value in state.items() if key.startswith(base + QUANTISED)
        }
        whole[base] = OptimState8bit(**parts, dtype=parameter.dtype)
    return whole


def _state_tensor(value: object, where: str) -> tuple[str, Tensor]:
    """Returns the suffix of the state key and the tensor for a value of an optimizer's state. Raises TypeError."""
    if type(value) in (Tensor, nn.Parameter):
        assert isinstance(value, Tensor)
        return "", value.detach()
    for suffix, (kind, dtype) in SCALARS.items():
        if type(value) is kind:
            return suffix, torch.tensor(value, dtype=dtype)
    raise TypeError(f"{where} is a {type(value).__name__}; only tensors, int, float and bool can be kept")


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]) -> dict[str, Tensor]:
    """Returns an optimizer's state as `parameter name/state key` -> tensor, whatever the order of its parameters.

    Hyperparameters are not part of it: the learning rate is a function of the step, the rest are flags of the run.
    A parameter without state yet is marked by an empty tensor, so that loading can tell it from a lost one.

    Args:
        optimizer: of torch, or one whose state holds tensors, ints, floats and bools.
        names: the name of every parameter of the optimizer, as in the model's `named_parameters()`.

    Returns:
        The state's own tensors (not copies); 0-dim tensors for Python numbers (`key:int`, `key:float`, `key:bool`).

    Raises:
        TypeError: the state holds something else.
        ValueError: two parameters have one name.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[str] = set()
    for _, parameter in _parameters(optimizer):
        name = names[parameter]
        if name in seen:
            raise ValueError(f"two parameters are named {name}")
        seen.add(name)
        state = optimizer.state.get(parameter, {})
        if not state:
            tensors[f"{name}/{STATELESS}"] = torch.empty(0)
        for key, value in _flat_state(state).items():
            suffix, tensor = _state_tensor(value, f"{key} of {name}")
            tensors[f"{name}/{key}{suffix}"] = tensor
    return tensors


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[tuple[dict[str, Any], nn.Parameter]]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield group, parameter


def _restored(key: str, tensor: Tensor, group: Mapping[str, Any], device: torch.device) -> tuple[str, Any]:
    """Returns the state key and the value as the optimizer had it, on the moments' device or where torch wants it."""
    base, colon, kind = key.rpartition(":")
    if colon and f":{kind}" in SCALARS:
        return base, tensor.item()
    # Only fused and capturable kernels read the step counter on the device (torch.optim.Optimizer.load_state_dict).
    on_cpu = key == "step" and not (group.get("capturable") or group.get("fused"))
    return key, tensor.to("cpu" if on_cpu else device, copy=True)


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str], tensors: Mapping[str, Tensor]
) -> None:
    """Gives an optimizer the state that optimizer_tensors returned, bit for bit; its hyperparameters stay as they are.

    Args:
        optimizer: over the same parameters by name, in any order and grouping.
        names: as for optimizer_tensors.
        tensors: e.g. StoredTensors(folder, stem), or a dict.

    Raises:
        UserError: (MODEL) a parameter's state is missing, extra or of another shape; the optimizer is then unchanged.
    """
    keys_of: dict[str, list[str]] = {}
    for full in tensors:
        name, _, key = full.rpartition("/")
        keys_of.setdefault(name, []).append(key)
    owned = {names[parameter]: parameter for _, parameter in _parameters(optimizer)}
    faults = [f"no state for {name}" for name in sorted(owned.keys() - keys_of.keys())]
    faults += [f"state for {name}, which is not trained" for name in sorted(keys_of.keys() - owned.keys())]
    restored: dict[nn.Parameter, dict[str, Any]] = {}
    elsewhere: torch.device | None = getattr(optimizer, "state_device", None)  # videox.optim.cpu_offload's
    for group, parameter in _parameters(optimizer):
        name = names[parameter]
        state = restored[parameter] = {}
        for key in keys_of.get(name, []):
            if key == STATELESS:
                continue
            base, value = _restored(key, tensors[f"{name}/{key}"], group, elsewhere or parameter.device)
            state[base] = value
            if base in PARAMETER_SHAPED and value.shape != parameter.shape:
                faults.append(f"{base} of {name} is {list(value.shape)}, the parameter {list(parameter.shape)}")
    if faults:
        raise UserError("optimizer state", few(faults), "resume with the model and flags it was saved with", MODEL)
    for parameter, state in restored.items():
        optimizer.state.pop(parameter, None)
        if state:
            optimizer.state[parameter] = _quantised(state, parameter)
