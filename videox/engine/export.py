"""Serves both training loops: what a run gives away of its weights, in each checkpoint and at its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from videox.engine.base import Engine
from videox.engine.ema import export_weights
from videox.engine.train_state import TrainState
from videox.errors import UserError
from videox.lora.reader import STEM
from videox.weights.format import TRANSFORMER
from videox.weights.header import describe, header_of, name_of
from videox.weights.layout_writer import MERGED

FOLDER = "exports"  # in a checkpoint


@dataclass(frozen=True)
class Exports:
    """Writes the weights in training for use; all processes call its methods together.

    Attributes:
        engine: with the weights.
        state: tells the steps and the seed when the weights are written.
        output_dir: of the run.
        dtype: of the floating tensors.
        keep_fp32: parts of names that stay float32.
        layouts: beside diffusers'.
        base_model: that is trained, as the user named it.
        facts: for the files' headers.
        is_main: on the one process that writes; the others take part in gathering.
        warn: tells the user of an export that cannot be.
    """

    engine: Engine
    state: TrainState
    output_dir: Path
    dtype: torch.dtype
    keep_fp32: Sequence[str]
    layouts: Sequence[str]
    base_model: str
    facts: Mapping[str, object]
    is_main: bool
    warn: Callable[[str], None]

    def about(self) -> dict[str, object]:
        """Returns what a checkpoint's manifest says of the run, for who exports it later."""
        return {**self.facts, "base_model": name_of(self.base_model)}

    def __call__(self) -> None:
        """Writes output_dir/transformer and the other layouts. Raises UserError, SaveError as export_weights does."""
        self._write(self.output_dir, only_layouts=False)
        if self.is_main and (stale := earlier(self.output_dir, self.state.step)):
            what = ", ".join(f"{name} (step {step})" for name, step in stale.items())
            self.warn(
                f"warning: {what} in {self.output_dir} were exported earlier and are not of step {self.state.step}: "
                f"this run's --export_layouts does not ask for them"
            )

    def save(self, folder: Path) -> None:
        """Writes a checkpoint's files, and the other layouts in its exports/; what cannot be exported is told.

        Raises:
            OSError, SafetensorError, SaveError: a write failed, after every collective is through.
        """
        self.engine.save(folder, self.state)
        if not self.layouts:
            return
        try:
            self._write(folder / FOLDER, only_layouts=True)
        except UserError as why:  # on the one process that writes, with every collective through
            self.warn(f"warning: checkpoint-{self.state.step} has not all exports: {why.where} {why.what}")

    def _write(self, folder: Path, *, only_layouts: bool) -> None:
        metadata = describe(self.base_model, {**self.facts, "steps": self.state.step, "seed": self.state.seed})
        export_weights(
            self.engine,
            folder,
            self.dtype,
            self.keep_fp32,
            layouts=self.layouts,
            metadata=metadata,
            only_layouts=only_layouts,
            is_main=self.is_main,
        )


def earlier(output_dir: Path, step: int) -> dict[str, int]:
    """Returns the exports in a run's folder whose headers tell of a step before this one, each with that step."""
    found = {}
    for path in sorted([*output_dir.glob("*.safetensors"), *output_dir.glob(f"{TRANSFORMER}*/*.safetensors")]):
        ours = path.name.startswith((TRANSFORMER, STEM)) or path.parent != output_dir
        if not ours or "-superseded" in str(path.relative_to(output_dir)):
            continue
        steps = header_of(path).get("steps", "")
        if steps.isdecimal() and int(steps) < step:
            folder = path.parent != output_dir and not path.name.startswith(STEM)
            name = f"{path.parent.name}/" if folder else str(path.relative_to(output_dir))
            found[name] = int(steps)
    return found


def export_bytes(numbers: int, layouts: Sequence[str], dtype: torch.dtype, *, lora: bool, averaged: bool) -> int:
    """Returns what exports take of the disk while a checkpoint is written.

    Args:
        numbers: of the whole model.
        layouts: beside diffusers'.
        dtype: of the tensors.
        lora: only what is merged has the size of the model.
        averaged: an average is exported too.
    """
    # a whole model's layouts are made of a folder in diffusers'
    models = int(MERGED in layouts) if lora else len(layouts) + bool(layouts)
    return models * (1 + averaged) * numbers * dtype.itemsize
