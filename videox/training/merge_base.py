"""The weights that a LoRA is merged into for the layout merged: the run's own, or those of --merge_base."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path

from videox.errors import MODEL, UserError
from videox.models.base_precision import BF16
from videox.models.component import check_shapes
from videox.models.configured import Component
from videox.models.hub import local_folder
from videox.weights.expert_names import EXPERTS
from videox.weights.layout_tables import MERGED
from videox.weights.lazy_tensor import FLOAT8_DTYPES
from videox.weights.reader import LayoutTensors, open_tensors

FLAG = "--merge_base"
# Folders of transformers in a model's folder: of diffusers' layout, and of Wan2.2's original one.
PARTS = (*EXPERTS.values(), "high_noise_model", "low_noise_model")
# Relative difference of weights from which they are those of another model. Float8 with a scale differs by 3 %,
# without one by up to 15 %; independent weights differ by 140 %.
OTHER_MODEL = 0.25


def merge_source(args: argparse.Namespace, component: Component) -> Path | None:
    """The folder or file of the weights to merge into, other than the run's own; None for the run's own.

    Args:
        component: the transformer that is trained.

    Raises:
        UserError: the run's own weights are those in 8 bits that it computes with, or --merge_base has 8-bit weights,
            or is not the same model.
    """
    if MERGED not in args.export_layouts:
        return None
    if args.merge_base is None:
        if args.base_precision != BF16 and component.tensors is not None and has_8_bits(component.tensors):
            what = f"{MERGED}: {component.path} has 8-bit weights, which the merged model would have, too"
            hint = f"pass {FLAG} with the folder or file of the bf16 model that they were made of, or remove {MERGED}"
            raise UserError("--export_layouts", what, hint)
        return None
    path = local_folder(args.merge_base, FLAG)
    if not path.exists():
        raise UserError(FLAG, f"{path} does not exist", "pass the folder or file of the bf16 model", MODEL)
    own = component.tensors or open_tensors(component.path)
    differences = {candidate: _difference(candidate, own) for candidate in _transformers(path)}
    nearest = min(differences, key=lambda candidate: differences[candidate])
    if differences[nearest] > OTHER_MODEL:
        what = f"{nearest} is another model than {component.path}: the weights differ by {differences[nearest]:.0%}"
        raise UserError(FLAG, what, "pass the bf16 model that the run's weights were made of", MODEL)
    return nearest


def has_8_bits(tensors: LayoutTensors) -> bool:
    """Return whether a file has weights in 8-bit floats."""
    return any(tensor.dtype in FLOAT8_DTYPES for tensor in tensors.stored.values())


def _transformers(path: Path) -> list[Path]:
    """Return the folders of the transformers in a model's folder; the path itself where there are none."""
    inside = [path / part for part in PARTS if (path / part).is_dir()]
    return inside or [path]


def _difference(path: Path, own: LayoutTensors) -> float:
    """Return |weights - own| / |weights| of the first row of each matrix, L2 norms. Raises UserError (MODEL)."""
    tensors = open_tensors(path)
    check_shapes(tensors, own.shapes())
    if has_8_bits(tensors):
        what, hint = f"{path} has 8-bit weights", "pass the bf16 model that they were made of"
        raise UserError(FLAG, what, hint, MODEL)
    return _relative_difference(tensors, own, own.shapes())


def _relative_difference(tensors: LayoutTensors, own: LayoutTensors, shapes: Mapping[str, tuple[int, ...]]) -> float:
    difference = total = 0.0
    for name in (name for name, shape in shapes.items() if len(shape) == 2):
        row, other = (source.rows(name, 0, 1).double() for source in (tensors, own))
        difference += float((row - other).square().sum())
        total += float(row.square().sum())
    return math.sqrt(difference / max(total, 1e-300))
