"""Reads DeepSpeed checkpoints: locates each tensor of a ZeRO-1, -2 or -3 checkpoint in the files of its ranks.

The data layout, as DeepSpeed's own zero_to_fp32 reads it:
- ZeRO-1 and -2: each parameter group is one flat tensor, the concatenation of its parameters, split evenly over the
  ranks.
- ZeRO-3: each parameter is split into equal pieces, one per rank, with padding at the end; a rank's file contains the
  concatenation of its pieces of all parameters.
- Buffers and frozen parameters are in the model files.
Only the float32 master weights are read, not the 16-bit copies and the optimizer's moments.

torch.load(weights_only=True, mmap=True) does not replace the parsing here, see safe_pickle.py and BlockReader, and
zero_to_fp32 does not either: it loads with weights_only=False, which runs code in a file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch

from videox.errors import MODEL, UserError, plural
from videox.weights.lazy_tensor import (
    CheckpointTensors,
    FlatTensor,
    LazyTensor,
    first_elements,
    from_stored,
    with_name,
)
from videox.weights.safe_pickle import OpaqueObject, StoredTensor, damaged_error, read_archive
from videox.weights.safetensors_io import join_first

LATEST = "latest"
OPTIMIZER = "*_optim_states.pt"
OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
SAMPLE = 1024  # elements per tensor that are compared to detect files of different steps
COPY_AGAIN = "copy the complete checkpoint again, or convert another one"

Shape = tuple[int, ...]


def tag_folder(checkpoint: Path, tag: str | None) -> Path | None:
    """Find the folder with a DeepSpeed checkpoint's files; None if this is not a DeepSpeed checkpoint.

    Args:
        checkpoint: folder with the file `latest` and the folder that it names.
        tag: name of the folder; None reads it from `latest`.

    Raises:
        UserError: (MODEL) the tag names a folder outside the checkpoint, or one without such files.
    """
    names = sorted({path.parent.name for path in checkpoint.glob(f"*/{OPTIMIZER}")})
    if tag is None and not (checkpoint / LATEST).is_file():
        if next(checkpoint.glob(OPTIMIZER), None) is not None:
            what = "directly contains the files of the ranks"
            raise UserError(str(checkpoint), what, f"pass its parent folder, with --tag {checkpoint.name}", MODEL)
        if names:
            what = f"has no file '{LATEST}' with the tag to read (found: {', '.join(names)})"
            raise UserError(str(checkpoint), what, f"pass --tag {names[0]}", MODEL)
        return None
    origin = "--tag" if tag is not None else str(checkpoint / LATEST)
    chosen = tag if tag is not None else (checkpoint / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    if chosen not in names:
        if not names and tag is not None and (checkpoint / tag).is_dir():
            return None  # a folder of another backend, such as FSDP
        what = f"names the tag {chosen!r}, which has no {OPTIMIZER} (found: {', '.join(names) or 'none'})"
        raise UserError(origin, what, f"pass --tag {names[0]}" if names else COPY_AGAIN, MODEL)
    return checkpoint / chosen


def read_zero(folder: Path, *, exclude_frozen: bool = False) -> CheckpointTensors:
    """Locate the tensors of a ZeRO checkpoint, in DeepSpeed's order: buffers, frozen, trained, shared.

    Args:
        folder: the folder of the tag.
        exclude_frozen: leave out the frozen parameters.

    Raises:
        UserError: (MODEL) a rank's file is missing, extra, duplicated, damaged or of another step.
    """
    optimizers = [_read_optimizer(path) for path in _rank_files(folder, OPTIMIZER_FILE, OPTIMIZER)]
    stage, world = _stage(folder, optimizers[0]), _world_size(optimizers[0])
    _check_count(folder, OPTIMIZER, len(optimizers), world)
    model_files = _rank_files(folder, MODEL_FILE, "*_model_states.pt")
    _check_count(folder, "*_model_states.pt", len(model_files), world if stage == 3 else 1)
    models = [_read_model(path) for path in model_files]
    _check_same_save(folder, optimizers, models, world)
    flat_groups = [_flat_groups(folder, state, stage) for state in optimizers]
    try:
        tensors = {name: from_stored(name, stored, buffer=True) for name, stored in _buffers(models[0]).items()}
        if not exclude_frozen:
            tensors |= _frozen(models, stage)
        if stage == 3:
            trained = _trained_stage_3(flat_groups, models[0]["param_shapes"])
        else:
            trained = _trained_stage_2(
                flat_groups, models[0]["param_shapes"], optimizers[0].get("param_alignment_paddings")
            )
            _check_same_step(folder, trained, models[0]["module"])
        tensors |= trained
        for name, source in (models[0].get("shared_params") or {}).items():
            if source in tensors:
                tensors[name] = with_name(tensors[source], name)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise damaged_error(folder, f"{type(error).__name__}: {error}") from error
    kind = f"ZeRO-{stage} of {world} {plural(world, 'rank')}, step {models[0].get('global_steps', 'unknown')}"
    return CheckpointTensors(kind, tuple(tensors.values()))


# ------------------------------------------------------------------------------------------------- rank files


def _rank_files(folder: Path, pattern: re.Pattern[str], glob: str) -> list[Path]:
    """List the files of the ranks in rank order; each rank from 0 on must have exactly one."""
    found: dict[int, Path] = {}
    for path in sorted(folder.glob(glob)):
        match = pattern.fullmatch(path.name)
        if not match or int(match[2]):
            what = "has no data-parallel rank in its name" if not match else "belongs to a tensor-parallel model"
            raise UserError(str(path), what, "convert a checkpoint of plain ZeRO data parallelism", MODEL)
        rank = int(match[1] or 0)
        if rank in found:
            what = f"has two files of rank {rank}: {found[rank].name} and {path.name}"
            raise UserError(str(folder), what, "remove the file that belongs to another save", MODEL)
        found[rank] = path
    missing = [str(rank) for rank in range(max(found, default=0) + 1) if rank not in found]
    if missing:
        what = f"is missing {glob} of rank {', '.join(missing)} (found {len(found)})"
        raise UserError(str(folder), what, COPY_AGAIN, MODEL)
    return [found[rank] for rank in sorted(found)]


def _check_count(folder: Path, glob: str, found: int, saved: int) -> None:
    if found != saved:
        word = "missing" if found < saved else "too many"
        what = f"contains {found} {plural(found, 'file')} {glob}, {saved} {plural(saved, 'was', 'were')} saved: {abs(saved - found)} {word}"
        raise UserError(str(folder), what, COPY_AGAIN, MODEL)


def _read_keys(path: Path, *keys: str) -> dict[str, Any]:
    content = read_archive(path)
    if not isinstance(content, dict):
        raise damaged_error(path, "it contains a single tensor")
    missing = [key for key in keys if key not in content]
    if missing:
        what = f"has no {', '.join(missing)}, so it is not part of a ZeRO checkpoint"
        raise UserError(str(path), what, "convert a checkpoint of DeepSpeed ZeRO-1, -2 or -3", MODEL)
    return content


def _read_optimizer(path: Path) -> dict[str, Any]:
    state = _read_keys(path, "optimizer_state_dict")["optimizer_state_dict"]
    if not isinstance(state, dict) or not {"zero_stage", "partition_count"} <= state.keys():
        raise UserError(str(path), "has no zero_stage", "convert a checkpoint of DeepSpeed ZeRO-1, -2 or -3", MODEL)
    return state


def _read_model(path: Path) -> dict[str, Any]:
    content = _read_keys(path, "module", "buffer_names", "param_shapes")
    if content.get("mp_world_size", 1) != 1:
        what = f"is one of {content['mp_world_size']} parts of a tensor-parallel model"
        raise UserError(str(path), what, "convert a checkpoint of plain ZeRO data parallelism", MODEL)
    return content


STAGES = {"optimizer_states": 1, "gradients": 2, "weights": 3}  # members of DeepSpeed's ZeroStageEnum


def _stage(folder: Path, state: Mapping[str, Any]) -> int:
    stage = state["zero_stage"]
    if isinstance(stage, OpaqueObject):  # ZeroStageEnum: pickled by value, by Python 3.11.0 to 3.11.3 by name
        stage = stage.arguments[0] if stage.arguments else None
        stage = STAGES.get(stage, stage) if isinstance(stage, str) else stage
    if stage not in (1, 2, 3):
        raise UserError(str(folder), f"has ZeRO stage {stage!r}", "convert a checkpoint of stage 1, 2 or 3", MODEL)
    return int(stage)


def _world_size(state: Mapping[str, Any]) -> int:
    count = state["partition_count"]
    return (
        max(count) if isinstance(count, list) else int(count)
    )  # one per parameter group; expert groups may have fewer


def _flat_groups(folder: Path, state: Mapping[str, Any], stage: int) -> list[StoredTensor]:
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    groups = state.get(key)
    groups = [groups] if isinstance(groups, StoredTensor) else groups
    if not isinstance(groups, list) or not all(
        isinstance(group, StoredTensor) and len(group.shape) == 1 and group.contiguous for group in groups
    ):
        raise UserError(str(folder), f"contains no {key}", "convert a checkpoint with its optimizer state", MODEL)
    if {group.dtype for group in groups} - {torch.float32}:
        raise UserError(
            str(folder), f"{key} is not float32", "convert a checkpoint with float32 master weights", MODEL
        )
    return groups


# ----------------------------------------------------------------------------------------------- consistency


def _optimizer_step(state: Mapping[str, Any]) -> dict[str, Any]:
    """Read what tells two saves of an optimizer apart: its step counters and its settings (learning rate etc.)."""
    base = state.get("base_optimizer_state") or state.get("optimizer_state_dict")
    if not isinstance(base, dict):
        return {}
    counters = [
        entry["step"] for entry in base.get("state", {}).values() if isinstance(entry, dict) and "step" in entry
    ]
    steps = {
        float(first_elements(from_stored("step", step), 1)) if isinstance(step, StoredTensor) else float(step)
        for step in counters
        if isinstance(step, int | float) or (isinstance(step, StoredTensor) and step.numel == 1)
    }
    settings = [
        {key: value for key, value in group.items() if isinstance(value, bool | int | float | str)}
        for group in base.get("param_groups", [])
    ]
    return {"optimizer step": sorted(steps), "optimizer settings": settings}


def _check_same_save(
    folder: Path, optimizers: Sequence[Mapping[str, Any]], models: Sequence[Mapping[str, Any]], world: int
) -> None:
    """Raise UserError (MODEL) if the files record different steps, settings, shapes or world sizes."""
    model_keys = ("global_steps", "global_samples", "dp_world_size", "ds_version", "param_shapes")
    of_optimizers = [
        _optimizer_step(state) | {key: state.get(key) for key in ("partition_count", "ds_version")}
        for state in optimizers
    ]
    of_models = [{key: model.get(key) for key in model_keys} for model in models]
    for fields in (of_optimizers, of_models):
        first = fields[0]
        for rank, other in enumerate(fields):
            # A field that a file lacks is not a difference: not every optimizer counts its steps.
            differing = [key for key in other if other[key] and first[key] and other[key] != first[key]]
            if differing:
                values = f"{first[differing[0]]} and {other[differing[0]]}"
                values = values if len(values) < 100 else "they differ"
                what = f"mixes files of different saves: {differing[0]} of ranks 0 and {rank}: {values}"
                raise UserError(str(folder), what, COPY_AGAIN, MODEL)
    saved_world = of_models[0]["dp_world_size"]
    if saved_world not in (None, world):
        what = (
            f"mixes files of different saves: {saved_world} ranks in the model files, {world} in the optimizer files"
        )
        raise UserError(str(folder), what, COPY_AGAIN, MODEL)


def _check_same_step(folder: Path, trained: Mapping[str, LazyTensor], module: Mapping[str, Any]) -> None:
    """Raise UserError (MODEL) if the model file belongs to another step than the optimizer files.

    After each step DeepSpeed copies the float32 master weights into the model's 16-bit weights, so in one save the
    first elements of both are equal after rounding.
    """
    differing = []
    for name, tensor in trained.items():
        copy = module.get(name)
        if isinstance(copy, StoredTensor) and copy.shape == tensor.shape and copy.contiguous:
            weights = first_elements(from_stored(name, copy), SAMPLE)
            fp32_params = first_elements(tensor, SAMPLE).to(weights.dtype)
            if not torch.isclose(fp32_params, weights, rtol=0, atol=0, equal_nan=True).all():
                differing.append(name)
    if differing:
        what = "mixes files of different saves: the model file and the optimizer files have different values in "
        raise UserError(str(folder), what + join_first(differing), COPY_AGAIN, MODEL)


# ---------------------------------------------------------------------------------------------------- tensors


def _buffers(model: Mapping[str, Any]) -> dict[str, StoredTensor]:
    names = set(model["buffer_names"])
    return {name: stored for name, stored in model["module"].items() if name in names}


def _frozen(models: Sequence[Mapping[str, Any]], stage: int) -> dict[str, LazyTensor]:
    shapes = models[0].get("frozen_param_shapes") or {}
    tensors = {}
    for name, shape in shapes.items():
        pieces = [model["frozen_param_fragments"][name] for model in models]
        if stage < 3:
            tensors[name] = from_stored(name, pieces[0])
        else:
            tensors[name] = LazyTensor(name, pieces[0].dtype, shape, tuple(FlatTensor(pieces).spans(0, prod(shape))))
    return tensors


def _trained_stage_2(
    ranks: Sequence[Sequence[StoredTensor]],
    shapes: Sequence[Mapping[str, Shape]],
    paddings: Sequence[Sequence[int]] | None,
) -> dict[str, LazyTensor]:
    tensors: dict[str, LazyTensor] = {}
    for number, (group, pieces) in enumerate(zip(shapes, zip(*ranks, strict=True), strict=True)):
        flat, at = FlatTensor(pieces), 0
        gaps = paddings[number] if paddings is not None else [0] * len(group)
        for (name, shape), gap in zip(group.items(), gaps, strict=True):
            tensors[name] = LazyTensor(name, torch.float32, shape, tuple(flat.spans(at, prod(shape))))
            at += prod(shape) + gap
        # DeepSpeed pads the group's end to a multiple of 2 * ranks (align_to in zero_to_fp32). The exact padding is
        # not saved, so both lengths are rounded up before they are compared.
        align = 2 * len(ranks)
        if ceil(at / align) != ceil(flat.length / align):
            raise ValueError(f"parameter group {number} has {flat.length} elements, its parameters have {at}")
    return tensors


def _trained_stage_3(
    ranks: Sequence[Sequence[StoredTensor]], shapes: Sequence[Mapping[str, Shape]]
) -> dict[str, LazyTensor]:
    # One offset for all ranks: each has an equal piece of every parameter, so pieces start at the same offset.
    flats, at = [FlatTensor(groups) for groups in ranks], 0
    tensors: dict[str, LazyTensor] = {}
    for name, shape in ((name, shape) for group in shapes for name, shape in group.items()):
        numel = prod(shape)
        share = ceil(numel / len(flats))  # elements per rank, the last ranks with padding
        spans = [
            span
            for rank, flat in enumerate(flats)
            for span in flat.spans(at, max(0, min(share, numel - rank * share)))
        ]
        tensors[name] = LazyTensor(name, torch.float32, shape, tuple(spans))
        at += share
    lengths = {flat.length for flat in flats}
    if lengths != {at}:
        raise ValueError(f"the ranks have {sorted(lengths)} elements each, the parameters need {at}")
    return tensors
