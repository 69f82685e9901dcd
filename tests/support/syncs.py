"""Serves the tests that count how often the host waits for the device in a step, on a machine that has no device.

On the CPU every tensor is the host's. So each is followed from where it would be on a GPU: the weights of all modules,
what a factory is given the device for, what `.to(device)` returns, and whatever is computed from one of these. torch
shows where such a tensor would be read, or copied while the host waits: `item`, `tolist`, `cpu`, `numpy`, a truth
value, an index; an operator whose output's size is data; a copy to or from the host that is not `non_blocking`.
`"cpu"` as a word is the host, a torch.device is the device, as this package writes both. In what a library does inside
C++ only the operators are seen.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
OURS = (str(ROOT / "videox"), str(ROOT / "scripts"))
READS = {Tensor.tolist, Tensor.cpu, Tensor.numpy}
SIZED_BY_DATA = ("aten.nonzero", "aten.masked_select", "aten._unique", "aten.unique")
MOVES = {Tensor.to, Tensor.cuda}


class OnDevice:
    """The storages that would be on the device, and the places where the host would wait for it.

    Attributes:
        places: "file:line what" of each wait: the innermost line outside torch.
    """

    def __init__(self) -> None:
        self._storages: dict[int, StorageWeakRef] = {}
        self.places: list[str] = []
        self.inside = False  # a function that was given one of its tensors: what C++ makes there is beside it

    def add(self, tensors: object) -> None:
        for tensor in pytree.tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                storage = _storage(tensor)
                self._storages[storage._cdata] = StorageWeakRef(storage)

    def has(self, tensor: object) -> bool:
        if not isinstance(tensor, Tensor):
            return False
        found = self._storages.get(_storage(tensor)._cdata)
        return found is not None and not found.expired()

    def wait(self, what: str) -> None:
        frame, place = sys._getframe(1), ""
        while frame is not None:
            name = frame.f_code.co_filename
            if name != __file__ and "/torch/" not in name:
                place = f"{name}:{frame.f_lineno} {what}"
                break
            frame = frame.f_back
        self.places.append(place)


def _storage(tensor: Tensor) -> Any:
    local = tensor._local_tensor if hasattr(tensor, "_local_tensor") else tensor
    return local.untyped_storage()


class _Calls(TorchFunctionMode):
    """Follows what Python asks for by name: where tensors are made, moved and read."""

    def __init__(self, on_device: OnDevice) -> None:
        super().__init__()
        self.on_device = on_device

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function in READS and self.on_device.has(args[0]):
            self.on_device.wait(function.__name__)
        self.on_device.inside = any(self.on_device.has(leaf) for leaf in pytree.tree_leaves((args, kwargs)))
        try:
            result = function(*args, **kwargs)
        finally:
            self.on_device.inside = False
        if function in MOVES:
            return self._moved(args, kwargs, result)
        if isinstance(kwargs.get("device"), torch.device) and isinstance(result, Tensor):
            self.on_device.add(result)
        return result

    def _moved(self, args: tuple, kwargs: dict, result: Tensor) -> Tensor:
        places = [place for place in (*args[1:], *kwargs.values()) if isinstance(place, (str, torch.device))]
        waits = not kwargs.get("non_blocking")
        if any(isinstance(place, torch.device) for place in places) and not self.on_device.has(args[0]):
            if waits:
                self.on_device.wait("to(device)")
            result = result.clone()
            self.on_device.add(result)
        if "cpu" in places and self.on_device.has(args[0]):
            self.on_device.wait("to('cpu')")
            return result.clone()  # the operators' mode follows it all the same: it is read by whoever asked for it
        return result


class _Operators(TorchDispatchMode):
    """Follows what is computed."""

    def __init__(self, on_device: OnDevice) -> None:
        super().__init__()
        self.on_device = on_device

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name, there = kwargs or {}, str(function), self.on_device
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        follows = any(there.has(tensor) for tensor in given) or (there.inside and not given)
        result = function(*args, **kwargs)
        if name.startswith("aten.copy_"):
            to, source = there.has(args[0]), there.has(args[1])
            if to != source and not (kwargs.get("non_blocking") or (len(args) > 2 and args[2])):
                there.wait("copy_")
            return result
        if follows:
            if name.startswith("aten._local_scalar_dense") or name.startswith(SIZED_BY_DATA):
                there.wait(name)
            if name.startswith("aten.index") and _by_truth(args):
                there.wait(f"{name} by truth values")
            there.add(result)
        return result


def _by_truth(args: tuple) -> bool:
    indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)


@contextmanager
def counting(on_device: OnDevice) -> Iterator[None]:
    """Counts inside. The weights of all modules that there are now are on the device."""
    for module in [thing for thing in gc.get_objects() if isinstance(thing, torch.nn.Module)]:
        on_device.add([*module._parameters.values(), *module._buffers.values()])
    with _Calls(on_device), _Operators(on_device):
        yield


def counted_steps(script: ModuleType) -> tuple[Any, list[list[str]]]:
    """Returns a `walk` for a train script, and a list that gets the places of each step, without validation and saves.

    Waiting for a moment of the step before is none of them: the device has work behind it.
    """
    walk, steps = script.walk, []

    def counted_walk(*given: Any, **named: Any) -> Iterator[Any]:
        for step in walk(*given, **named):
            on_device = OnDevice()
            steps.append(on_device.places)
            with counting(on_device):
                yield step

    return counted_walk, steps
