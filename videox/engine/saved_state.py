"""Check of the weights and moments that a save would write: finite, and of a size that training can reach."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from videox.optim.state import flatten_state

WEIGHT, EMA = "weight", "EMA"
LARGEST_WEIGHT = 65504.0  # the largest number of float16, in which exported weights are used as well
LARGEST_MOMENT = 1e18  # its square is close to the largest float32
CHECKED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SQUARES = "exp_avg_sq"  # begins the keys of means of squares, whose roots are taken: they are never negative


class SavedTensor(NamedTuple):
    """A tensor, or this rank's shard of it, that a checkpoint contains.

    Attributes:
        kind: WEIGHT, EMA, or the key of an optimizer's state, such as "exp_avg".
        name: of the parameter.
        values: of any shape, dtype and device; only floating-point values of 16 bits or more are checked.
    """

    kind: str
    name: str
    values: Tensor


def weight_tensors(named: Iterable[tuple[str, Tensor]]) -> Iterator[SavedTensor]:
    """Yield weights or their shards as SavedTensor."""
    for name, tensor in named:
        yield SavedTensor(WEIGHT, name, local_part(tensor.detach()))


def moment_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Any, str]) -> Iterator[SavedTensor]:
    """Yield the state of an optimizer of torch, or this rank's shards of it.

    Args:
        optimizer: with any kind of state; quantized moments are checked by their scales.
        names: by parameter.
    """
    for parameter, state in optimizer.state.items():
        tensors = {key: local_part(value) for key, value in state.items() if isinstance(value, Tensor)}
        for key, value in flatten_state(tensors).items():
            if isinstance(value, Tensor):
                yield SavedTensor(key, names[parameter], value)


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a sharded tensor; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def find_fault(tensors: Iterable[SavedTensor]) -> str:
    """Return what is wrong with the first tensor that should not be saved, "" if all are sound.

    A tensor is sound if all values are finite, none of a weight or of its EMA is above 65504 in size and none of a
    moment above 1e18, and no mean of squares is negative. The extremes of each tensor decide; they need one pass over
    the values and no memory beside them. The host waits for the device once, at the end.

    Args:
        tensors: each is dropped before the next one is taken.

    Returns:
        Such as "blocks.0.ffn.weight contains NaN; in all, 3 tensors are refused".
    """
    found: list[tuple[str, str]] = []
    extremes: dict[torch.device, list[Tensor]] = {}
    places: list[tuple[torch.device, int]] = []
    for kind, name, values in tensors:
        if values.dtype not in CHECKED or not values.numel():
            continue
        low, high = torch.aminmax(values)  # both are NaN if any value is
        on_device = extremes.setdefault(values.device, [])
        places.append((values.device, len(on_device)))
        on_device.append(torch.stack((low, high)).double())
        found.append((kind, name))
    on_host = {device: torch.stack(pairs).cpu().tolist() for device, pairs in extremes.items()}
    faults = []
    for (kind, name), (device, place) in zip(found, places, strict=True):
        if problem := _problem(kind, *on_host[device][place]):
            faults.append(f"{name if kind == WEIGHT else f'{kind} of {name}'} {problem}")
    if len(faults) > 1:
        faults[0] += f"; in all, {len(faults)} tensors are refused"
    return faults[0] if faults else ""


def _problem(kind: str, low: float, high: float) -> str:
    """Return what is wrong with a tensor, from its smallest and largest value."""
    if math.isnan(low):
        return "contains NaN"
    largest = LARGEST_WEIGHT if kind in (WEIGHT, EMA) else LARGEST_MOMENT
    value = high if high >= -low else low
    if math.isinf(value):
        return "contains an infinite value"
    if abs(value) > largest:
        return f"has the value {value:.3g}, and none above {largest:,g} is plausible"
    if kind.startswith(SQUARES) and low < 0:
        return f"has the value {low:.3g}, and a mean of squares is never negative"
    return ""
