"""Converts the tensors of a transformer in its original layout to diffusers' names, with diffusers' configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers

from videox.errors import MODEL, UserError
from videox.models import infer_config
from videox.models.component import CLASS_NAMES, check_depth
from videox.weights import layouts
from videox.weights.lazy_tensor import LazyTensor
from videox.weights.reader import LayoutTensors
from videox.weights.safetensors_io import join_first


def to_diffusers(
    path: Path, tensors: Sequence[LazyTensor], kind: str, config: Mapping[str, Any] | None
) -> tuple[list[LazyTensor], dict[str, Any]]:
    """Return the tensors by diffusers' names, and the configuration of diffusers' class. No value is read.

    Args:
        path: the checkpoint, for messages.
        tensors: its tensors, by original or diffusers' names.
        kind: of infer_config.foreign_kind.
        config: the original configuration; None for a model of a published width, where the shapes show all of it.

    Raises:
        UserError: (MODEL) tensors or blocks are missing, or the configuration contradicts the tensors.
    """
    layout = layouts.layout_of([tensor.name for tensor in tensors])
    source = LayoutTensors(path, {tensor.name: tensor for tensor in tensors}, layout)
    known = config or {}
    if config is None and not infer_config.published_depths(kind, source.shapes())[1]:
        what = "has no config.json, and is not of the width of a published model"
        hint = "pass --config FILE, the config.json in the transformer folder of the model that was trained"
        raise UserError(str(path), what, hint, MODEL)
    try:
        found = infer_config.CONFIGS[kind](source.shapes(), known)
    except KeyError as missing:
        what = f"has no {source.name_in_file(str(missing.args[0]))}, which every model of the kind {kind} has"
        raise UserError(str(path), what, "convert a checkpoint of the whole model", MODEL) from missing
    except (ValueError, ZeroDivisionError, TypeError, IndexError) as error:
        what = f"has tensors of unexpected shapes ({error})"
        raise UserError(str(path), what, "pass --config FILE, the config.json of the trained model", MODEL) from error
    check_depth(source, kind, known)
    if faults := infer_config.contradictions(found, known):
        what = f"does not fit the config.json: {join_first(faults)}"
        raise UserError(str(path), what, "pass --config FILE, the config.json of the trained model", MODEL)
    model_class = {"_class_name": CLASS_NAMES[kind], "_diffusers_version": diffusers.__version__}
    return [source.lazy(name) for name in source], {**model_class, **found}
