"""Export of the weights in training for use by other programs, in each checkpoint and at the end of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from videox.engine.base import Engine, write_on_main
from videox.engine.ema import EMA_FOLDER, EmaEngine
from videox.errors import SaveError, UserError
from videox.lora.reader import STEM
from videox.weights.format import TRANSFORMER, ExportOptions
from videox.weights.header import read_metadata
from videox.weights.layout_tables import MERGED

FOLDER = "exports"  # in a checkpoint


def export_weights(engine: Engine, output_dir: Path, options: ExportOptions, *, is_main: bool) -> None:
    """Write output_dir/transformer for use, and transformer_ema if the engine has an EMA; called on all ranks.

    Args:
        engine: the engine, between two steps.
        output_dir: of the run, or another folder.
        options: dtype, layouts and headers of the files.
        is_main: true on the one rank that writes; the others take part in gathering.

    Raises:
        UserError: (NUMERICS) a tensor is not finite in its dtype; that folder is not written.
        SaveError: a file could not be written.
    """
    sources: dict[str, Callable[[], AbstractContextManager[None]]] = {TRANSFORMER: nullcontext}
    if isinstance(engine, EmaEngine):
        sources[EMA_FOLDER] = engine.ema_weights
    failures = []
    for name, in_place in sources.items():

        def write(weights: Iterator[tuple[str, Tensor]], name: str = name) -> None:
            engine.weight_format.export(output_dir, name, weights, engine.config, options)

        with in_place():
            failures.append(write_on_main(engine.weights(), write, (UserError, SaveError), is_main=is_main))
    # Raised after the last collective: an exception before it would leave the other ranks waiting.
    for failure in failures:
        if failure is not None:
            raise failure


def earlier_exports(output_dir: Path, step: int) -> dict[str, int]:
    """Return the exports in a run's folder whose headers have an earlier step than this one, each with its step."""
    steps_of_exports = {}
    for path in sorted([*output_dir.glob("*.safetensors"), *output_dir.glob(f"{TRANSFORMER}*/*.safetensors")]):
        is_export = path.name.startswith((TRANSFORMER, STEM)) or path.parent != output_dir
        if not is_export or "-superseded" in str(path.relative_to(output_dir)):
            continue
        steps = read_metadata(path).get("steps", "")
        if steps.isdecimal() and int(steps) < step:
            in_folder = path.parent != output_dir and not path.name.startswith(STEM)
            name = f"{path.parent.name}/" if in_folder else str(path.relative_to(output_dir))
            steps_of_exports[name] = int(steps)
    return steps_of_exports


def export_bytes(numbers: int, layouts: Sequence[str], dtype: torch.dtype, *, lora: bool, ema: bool) -> int:
    """Return the disk space that exports need while a checkpoint is written, in bytes.

    Args:
        numbers: parameters of the full model.
        layouts: layouts to write in addition to diffusers'.
        dtype: of the exported tensors.
        lora: the run trains adapters, so only the merged model has the size of the full model.
        ema: an EMA is exported, too.
    """
    # Other layouts of a full model are made from a diffusers folder, which is written first and deleted afterwards.
    models = int(MERGED in layouts) if lora else len(layouts) + bool(layouts)
    return models * (1 + ema) * numbers * dtype.itemsize
