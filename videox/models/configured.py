"""Component: a part of a model, by its configuration; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from videox.errors import MODEL, UserError

if TYPE_CHECKING:
    from videox.weights.reader import LayoutTensors
    from videox.weights.safetensors_io import TensorSource


class Configuration(dict[str, Any]):
    """The configuration of a component; a key that is missing is a UserError (MODEL) that names the file.

    Args:
        values: by key.
        path: of the component.
    """

    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        super().__init__(values)
        self.path = path

    def __missing__(self, key: str) -> NoReturn:
        file = self.path if self.path.suffix else self.path / "config.json"
        raise UserError(str(file), f"has no {key}", "download the model again", MODEL)


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

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", Configuration(self.config, self.path))

    def source(self) -> TensorSource:
        """Return the tensors by diffusers' names, memory-mapped, for reading slices. Raises UserError (MODEL)."""
        from videox.weights.safetensors_io import StoredTensors  # here, because it loads torch

        return StoredTensors(self.path) if self.tensors is None else self.tensors

    def count(self, key: str) -> int:
        """Return a whole number above 0 of the configuration. Raises UserError (MODEL) for any other value."""
        value = self.config[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            what = f"{key} is {str(value)[:60]}, expected a whole number above 0"
            raise UserError(str(self.path / "config.json"), what, "download the model again", MODEL)
        return value

    def inferred_config(self) -> dict[str, Any] | None:
        """Return the configuration inferred from the weights; None if the folder has diffusers' config.json."""
        return None if self.tensors is None else self.config
