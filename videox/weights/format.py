"""What a checkpoint stores of the model in training: its full weights, or the trainable parameters only (LoRA)."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from videox.weights.expert_names import TRANSFORMER, exported_name, lora_stem
from videox.weights.layout_writer import export_file
from videox.weights.safetensors_io import NamedTensors, StoredTensors, export_transformer, load_weights, save_weights

EXPORT_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # by their command-line names


@dataclass(frozen=True)
class ExportOptions:
    """How weights are exported for use.

    Attributes:
        dtype: of the floating tensors.
        keep_fp32: parts of names of tensors that stay float32.
        layouts: layouts to write in addition to diffusers' ("original", "comfyui", "merged").
        metadata: key-value pairs for the header of each file.
        only_layouts: of full weights, keep the files of `layouts` and delete the diffusers folder.
        expert: which transformer of a model of two is exported; it is part of the names. None: the only one.
    """

    dtype: torch.dtype
    keep_fp32: Sequence[str] = ()
    layouts: Sequence[str] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    only_layouts: bool = False
    expert: str | None = None

    def folder(self, name: str) -> str:
        """Return the folder for weights of this name: of a low-noise expert transformer_2 in place of transformer."""
        return exported_name(name, self.expert)

    def stem(self, stem: str) -> str:
        """Return the stem of a LoRA file, which names the expert."""
        return lora_stem(stem, self.expert)


class WeightFormat(Protocol):
    """What a checkpoint stores of a model, and how it is written and read.

    Attributes:
        trainable_only: frozen parameters are not stored; a resumed run reads them from the base model again.
    """

    trainable_only: bool

    def save(self, checkpoint: Path, name: str, tensors: NamedTensors, config: str) -> None:
        """Write an engine's weights into a checkpoint.

        Args:
            checkpoint: folder of the checkpoint.
            name: TRANSFORMER, or the name of the EMA weights.
            tensors: what Engine.weights yields; it is consumed to its end, since every yield may be a collective.
            config: configuration of the model (JSON text).

        Raises:
            OSError, SafetensorError: the first failure to write.
        """

    def export(self, output_dir: Path, name: str, tensors: NamedTensors, config: str, options: ExportOptions) -> None:
        """Write an engine's weights for use by other programs.

        Args:
            output_dir: of the run, or another folder.
            name: as for save.
            tensors: as for save.
            config: of the model (JSON text).
            options: dtype, layouts and headers of the files.

        Raises:
            UserError: (NUMERICS) a value is not finite in its dtype; nothing is written.
            SaveError: the disk refused; files that were there before are unchanged.
        """

    def load(self, checkpoint: Path, model: nn.Module) -> None:
        """Copy the weights of a checkpoint into an unsharded model. Raises UserError if names or shapes differ."""

    def stored(self, checkpoint: Path, name: str) -> Mapping[str, Tensor]:
        """Return what save wrote, by parameter name in the model. Raises UserError if it cannot be read."""


class FullWeights:
    """WeightFormat that stores all weights: a folder in diffusers layout, float32."""

    trainable_only = False

    def save(self, checkpoint: Path, name: str, tensors: NamedTensors, config: str) -> None:
        """As WeightFormat.save."""
        save_weights(checkpoint / name, tensors, config)

    def export(self, output_dir: Path, name: str, tensors: NamedTensors, config: str, options: ExportOptions) -> None:
        """As WeightFormat.export: a diffusers folder, and one file next to it for each other layout."""
        folder = output_dir / options.folder(name)
        export_transformer(tensors, config, folder, options.dtype, options.keep_fp32, metadata=options.metadata)
        for layout in options.layouts:
            target = folder.with_name(f"{folder.name}_{layout}.safetensors")
            export_file(folder, target, layout, options.dtype, options.metadata)
        if options.only_layouts:  # export_file reads the folder, so it has to be written first
            shutil.rmtree(folder)

    def load(self, checkpoint: Path, model: nn.Module) -> None:
        """As WeightFormat.load."""
        load_weights(checkpoint / TRANSFORMER, model)

    def stored(self, checkpoint: Path, name: str) -> Mapping[str, Tensor]:
        """As WeightFormat.stored."""
        return StoredTensors(checkpoint / name)
