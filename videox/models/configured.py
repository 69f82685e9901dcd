"""Component: a part of a model, by its configuration; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from videox.weights.reader import LayoutTensors
    from videox.weights.safetensors_io import TensorSource


@dataclass(frozen=True)
class Component:
    """A component of a model whose files were checked; none of its weights has been read.

    Attributes:
        path: the component's folder or file.
        config: its configuration, with the keys of its class in diffusers or transformers.
        tensors: where each tensor is stored; None for a folder that the class's from_pretrained reads by itself.
    """

    path: Path
    config: dict[str, Any]
    tensors: LayoutTensors | None = None

    def source(self) -> TensorSource:
        """Return the tensors by diffusers' names, memory-mapped, for reading slices. Raises UserError (MODEL)."""
        from videox.weights.safetensors_io import StoredTensors  # here, because it loads torch

        return StoredTensors(self.path) if self.tensors is None else self.tensors

    def inferred_config(self) -> dict[str, Any] | None:
        """Return the configuration inferred from the weights; None if the folder has diffusers' config.json."""
        return None if self.tensors is None else self.config
