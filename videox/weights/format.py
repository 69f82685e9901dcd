"""Serves every engine: what files hold of the model in training, the whole of it or what is trained alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from videox.weights.safetensors_io import NamedTensors, StoredTensors, load_weights, save_weights

TRANSFORMER = "transformer"  # what the weights in training are called in a checkpoint; their average has another name


class WeightFormat(Protocol):
    """What a checkpoint keeps of a model.

    Attributes:
        trained_alone: of what is frozen it keeps nothing: that is read again from where the run began.
    """

    trained_alone: bool

    def save(self, checkpoint: Path, name: str, tensors: NamedTensors, config: str) -> None:
        """Writes an engine's weights into a checkpoint.

        Args:
            name: TRANSFORMER, or that of their average.
            tensors: as Engine.weights yields them, asked for to the last one.
            config: of the model (JSON text).

        Raises:
            OSError, SafetensorError: the first failure to write.
        """

    def load(self, checkpoint: Path, model: nn.Module) -> None:
        """Copies the weights in training of a checkpoint into a whole model. Raises UserError where they do not fit."""

    def stored(self, checkpoint: Path, name: str) -> Mapping[str, Tensor]:
        """Returns what save wrote, by the parameters' names in the model. Raises UserError where it cannot be read."""


class FullWeights:
    """See Kept: a folder in diffusers layout, float32."""

    trained_alone = False

    def save(self, checkpoint: Path, name: str, tensors: NamedTensors, config: str) -> None:
        """As Kept's."""
        save_weights(checkpoint / name, tensors, config)

    def load(self, checkpoint: Path, model: nn.Module) -> None:
        """As Kept's."""
        load_weights(checkpoint / TRANSFORMER, model)

    def stored(self, checkpoint: Path, name: str) -> Mapping[str, Tensor]:
        """As Kept's."""
        return StoredTensors(checkpoint / name)
