"""Serves the dry run: how many bytes a computation holds at once, found by running it on tensors without data."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Held(TorchDispatchMode):
    """Adds up the storages that operations make, and takes them off when they are freed."""

    def __init__(self, leave: Callable[[Tensor], bool] | None) -> None:
        super().__init__()
        self.now = self.most = 0
        self._leave, self._known = leave, set[int]()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        given: tuple[Any, ...] = (),
        by_name: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the operation returns
        result = func(*given, **(by_name or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and not (self._leave and self._leave(tensor)):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        name, size = storage._cdata, storage.nbytes()
        if name in self._known:
            return
        self._known.add(name)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._free, name, size)

    def _free(self, name: int, size: int) -> None:
        self._known.discard(name)
        self.now -= size


def peak_bytes(run: Callable[[], object], leave: Callable[[Tensor], bool] | None = None) -> int:
    """Returns the most bytes of tensors that a function holds at once, those it was given left out.

    It runs without gradients, on whatever device its tensors are; on the meta device nothing is computed. What a
    kernel needs for itself is not seen.

    Args:
        run: the function.
        leave: of the tensors that operations return, those that do not count (None = all do).
    """
    with torch.no_grad(), _Held(leave) as held:
        run()
    return held.most


def module_bytes(module: nn.Module, element_size: int) -> int:
    """Returns the bytes of a module's parameters and buffers, in a dtype of element_size bytes."""
    return element_size * sum(tensor.numel() for tensor in (*module.parameters(), *module.buffers()))
