"""Peak memory of a function, measured by running it on tensors without data (meta or fake tensors)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _StorageTracker(TorchDispatchMode):
    """Adds the size of each storage that an operation allocates, and subtracts it when the storage is freed."""

    def __init__(self, ignore: Callable[[Tensor], bool] | None) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._ignore, self._live = ignore, set[int]()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        arguments: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the operation returns
        result = func(*arguments, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and not (self._ignore and self._ignore(tensor)):
                self._track(tensor.untyped_storage())
        return result

    def _track(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._live:
            return
        self._live.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._live.discard(key)
        self.now -= size


def peak_bytes(run: Callable[[], object], ignore: Callable[[Tensor], bool] | None = None) -> int:
    """Return the most bytes of tensors that a function allocates at once, without those that existed before.

    It runs without gradients, on the device of its tensors; on the meta device nothing is computed. The workspace of
    kernels is not seen.

    Args:
        run: the function.
        ignore: returns whether a tensor that an operation returned is not counted (None = all are counted).
    """
    with torch.no_grad(), _StorageTracker(ignore) as tracker:
        run()
    return tracker.peak


def module_bytes(module: nn.Module, element_size: int) -> int:
    """Return the bytes of a module's parameters and buffers, in a dtype of element_size bytes."""
    return element_size * sum(tensor.numel() for tensor in (*module.parameters(), *module.buffers()))
