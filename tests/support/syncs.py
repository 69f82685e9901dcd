"""Counter of host-device synchronizations in a training step, for machines without a GPU.

On the CPU all tensors are in host memory. So this module tracks the tensors that would be on a GPU: the weights of all
modules, what a factory function creates with `device=`, what `.to(device)` returns, and everything that is computed
from these. Two torch modes then record where such a tensor would be read, or copied while the host waits: `item`,
`tolist`, `cpu`, `numpy`, a truth value, an index; an operator whose output size depends on data; a copy to or from the
host without `non_blocking`. The string `"cpu"` means the host and a torch.device means the device, which is how this
package writes them. Inside C++ code of a library only the dispatched operators are seen.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from videox.training import loop

ROOT = Path(__file__).resolve().parents[2]
OWN_CODE = (str(ROOT / "videox"), str(ROOT / "scripts"))
READS = {Tensor.tolist, Tensor.cpu, Tensor.numpy}
SIZED_BY_DATA = ("aten.nonzero", "aten.masked_select", "aten._unique", "aten.unique")
MOVES = {Tensor.to, Tensor.cuda}


class DeviceTensors:
    """The storages that would be on the device, and the places where the host would wait for it.

    Attributes:
        places: "file:line operation" of each wait, where the line is the innermost one outside torch.
        inside: whether a function runs that was called with a device tensor. Tensors that C++ code creates in it
            without tensor inputs count as device tensors too.
    """

    def __init__(self) -> None:
        self._storages: dict[int, StorageWeakRef] = {}
        self.places: list[str] = []
        self.inside = False

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

    def record_wait(self, operation: str) -> None:
        frame, place = sys._getframe(1), ""
        while frame is not None:
            name = frame.f_code.co_filename
            if name != __file__ and "/torch/" not in name:
                place = f"{name}:{frame.f_lineno} {operation}"
                break
            frame = frame.f_back
        self.places.append(place)


def _storage(tensor: Tensor) -> Any:
    local = tensor._local_tensor if hasattr(tensor, "_local_tensor") else tensor
    return local.untyped_storage()


class _Calls(TorchFunctionMode):
    """Tracks Python-level calls: where tensors are created, moved and read."""

    def __init__(self, on_device: DeviceTensors) -> None:
        super().__init__()
        self.on_device = on_device

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function in READS and self.on_device.has(args[0]):
            self.on_device.record_wait(function.__name__)
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
                self.on_device.record_wait("to(device)")
            result = result.clone()
            self.on_device.add(result)
        if "cpu" in places and self.on_device.has(args[0]):
            self.on_device.record_wait("to('cpu')")
            return result.clone()  # _Operators tracks the clone, which the caller reads
        return result


class _Operators(TorchDispatchMode):
    """Tracks dispatched operators: results computed from device tensors are device tensors."""

    def __init__(self, on_device: DeviceTensors) -> None:
        super().__init__()
        self.on_device = on_device

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name, device = kwargs or {}, str(function), self.on_device
        inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = any(device.has(tensor) for tensor in inputs) or (device.inside and not inputs)
        result = function(*args, **kwargs)
        if name.startswith("aten.copy_"):
            target, source = device.has(args[0]), device.has(args[1])
            if target != source and not (kwargs.get("non_blocking") or (len(args) > 2 and args[2])):
                device.record_wait("copy_")
            return result
        if on_device:
            if name.startswith("aten._local_scalar_dense") or name.startswith(SIZED_BY_DATA):
                device.record_wait(name)
            if name.startswith("aten.index") and _is_mask_index(args):
                device.record_wait(f"{name} with a mask")
            device.add(result)
        return result


def _is_mask_index(args: tuple) -> bool:
    indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)


@contextmanager
def record_waits(on_device: DeviceTensors) -> Iterator[None]:
    """Record waits in this context. The weights of all modules that exist at its start are on the device."""
    for module in [item for item in gc.get_objects() if isinstance(item, torch.nn.Module)]:
        on_device.add([*module._parameters.values(), *module._buffers.values()])
    with _Calls(on_device), _Operators(on_device):
        yield


def recording_iterate_steps() -> tuple[Any, list[list[str]]]:
    """Return a replacement for `loop.iterate_steps`, and a list that gets the waits of each step.

    Validation and saves are not included. Waiting for an event of the previous step is not counted, because the device
    still has queued work then.
    """
    iterate_steps, steps = loop.iterate_steps, []

    def recording(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for step in iterate_steps(*args, **kwargs):
            on_device = DeviceTensors()
            steps.append(on_device.places)
            with record_waits(on_device):
                yield step

    return recording, steps
