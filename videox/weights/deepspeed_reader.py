"""Serves whoever trained with DeepSpeed: finds each tensor of a ZeRO-1, -2 or -3 checkpoint in its ranks' files.

How the elements lie, as DeepSpeed's own zero_to_fp32 reads them. ZeRO-1 and -2: each parameter group is one flat
vector, its parameters end to end, cut into one piece per rank. ZeRO-3: each parameter is cut into one equal piece per
rank, padded at the end, and a rank's file holds its pieces of all parameters end to end. Buffers and frozen parameters
are in the model files. The float32 masters are what is read; the 16-bit copies and the moments stay untouched.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch

from videox.errors import MODEL, UserError
from videox.weights.lazy_tensor import LazyTensor, Shards, Vector, first_elements, renamed, whole
from videox.weights.safe_pickle import Record, StoredTensor, damaged, read_archive
from videox.weights.safetensors_io import few

LATEST = "latest"
OPTIMIZER = "*_optim_states.pt"
OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
SAMPLE = 1024  # elements compared to tell whether two files are of one step
AGAIN = "copy the whole checkpoint again, or convert another one"

Shape = tuple[int, ...]


def tag_folder(checkpoint: Path, tag: str | None) -> Path | None:
    """Returns the folder that holds a DeepSpeed checkpoint's files; None if this is no DeepSpeed checkpoint.

    Args:
        checkpoint: holds `latest` and the folder that it names.
        tag: the folder's name; None takes it from `latest`.

    Raises:
        UserError: (MODEL) the tag leads outside the checkpoint, or to nothing.
    """
    found = sorted(path.parent.name for path in checkpoint.glob(f"*/{OPTIMIZER}"))
    names = list(dict.fromkeys(found))
    if tag is None and not (checkpoint / LATEST).is_file():
        if next(checkpoint.glob(OPTIMIZER), None) is not None:
            what = "holds the ranks' files themselves"
            raise UserError(str(checkpoint), what, f"name the folder above it, with --tag {checkpoint.name}", MODEL)
        if names:
            what = f"has no file '{LATEST}' that says which tag to read (found: {', '.join(names)})"
            raise UserError(str(checkpoint), what, f"give --tag {names[0]}", MODEL)
        return None
    origin = "--tag" if tag is not None else str(checkpoint / LATEST)
    chosen = tag if tag is not None else (checkpoint / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    if chosen not in names:
        if not names and tag is not None and (checkpoint / tag).is_dir():
            return None  # a tag of another backend
        what = f"names the tag {chosen!r}, which has no {OPTIMIZER} (found: {', '.join(names) or 'none'})"
        raise UserError(origin, what, f"give --tag {names[0]}" if names else AGAIN, MODEL)
    return checkpoint / chosen


def read_zero(folder: Path, *, exclude_frozen: bool = False) -> Shards:
    """Returns the tensors of a ZeRO checkpoint, in DeepSpeed's order: buffers, frozen, trained, shared.

    Args:
        folder: of the tag.
        exclude_frozen: leave out the parameters that were not trained.

    Raises:
        UserError: (MODEL) a rank's file is missing, extra, there twice, damaged or of another step.
    """
    optimizers = [_optimizer(path) for path in _ranks(folder, OPTIMIZER_FILE, OPTIMIZER)]
    stage, world = _stage(folder, optimizers[0]), _world(optimizers[0])
    _refuse_count(folder, OPTIMIZER, len(optimizers), world)
    model_files = _ranks(folder, MODEL_FILE, "*_model_states.pt")
    _refuse_count(folder, "*_model_states.pt", len(model_files), world if stage == 3 else 1)
    models = [_model(path) for path in model_files]
    _refuse_mixed(folder, optimizers, models, world)
    groups = [_flat_groups(folder, state, stage) for state in optimizers]
    try:
        tensors = {name: whole(name, stored, buffer=True) for name, stored in _buffers(models[0]).items()}
        if not exclude_frozen:
            tensors |= _frozen(models, stage)
        if stage == 3:
            trained = _trained_stage_3(groups, models[0]["param_shapes"])
        else:
            trained = _trained_stage_2(
                groups, models[0]["param_shapes"], optimizers[0].get("param_alignment_paddings")
            )
            _refuse_other_step(folder, trained, models[0]["module"])
        tensors |= trained
        for name, source in (models[0].get("shared_params") or {}).items():
            if source in tensors:
                tensors[name] = renamed(tensors[source], name)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise damaged(folder, f"{type(error).__name__}: {error}") from error
    kind = f"ZeRO-{stage} of {world} rank{'s' if world > 1 else ''}, step {models[0].get('global_steps', 'unknown')}"
    return Shards(kind, tuple(tensors.values()))


# ------------------------------------------------------------------------------------------- files of the ranks


def _ranks(folder: Path, pattern: re.Pattern[str], what: str) -> list[Path]:
    """Returns the ranks' files in rank order; each rank from 0 on must be there once."""
    found: dict[int, Path] = {}
    for path in sorted(folder.glob(what)):
        match = pattern.fullmatch(path.name)
        if not match or int(match[2]):
            cause = "is of no data-parallel rank" if not match else "belongs to a model that is split over ranks"
            raise UserError(str(path), cause, "convert a checkpoint of ZeRO data parallelism alone", MODEL)
        rank = int(match[1] or 0)
        if rank in found:
            both = f"rank {rank} is there twice: {found[rank].name} and {path.name}"
            raise UserError(str(folder), both, "remove the file that is of another save", MODEL)
        found[rank] = path
    missing = [str(rank) for rank in range(max(found, default=0) + 1) if rank not in found]
    if missing:
        raise UserError(
            str(folder), f"of {what} rank {', '.join(missing)} is missing (found {len(found)})", AGAIN, MODEL
        )
    return [found[rank] for rank in sorted(found)]


def _refuse_count(folder: Path, what: str, found: int, wanted: int) -> None:
    if found != wanted:
        word = "missing" if found < wanted else "too many"
        cause = f"has {found} of {what} where {wanted} were saved: {abs(wanted - found)} {word}"
        raise UserError(str(folder), cause, AGAIN, MODEL)


def _content(path: Path, *keys: str) -> dict[str, Any]:
    content = read_archive(path)
    if not isinstance(content, dict):
        raise damaged(path, "it holds a bare tensor")
    missing = [key for key in keys if key not in content]
    if missing:
        cause = f"has no {', '.join(missing)}: it is not of a ZeRO checkpoint"
        raise UserError(str(path), cause, "convert what DeepSpeed saved with ZeRO-1, -2 or -3", MODEL)
    return content


def _optimizer(path: Path) -> dict[str, Any]:
    state = _content(path, "optimizer_state_dict")["optimizer_state_dict"]
    if not isinstance(state, dict) or not {"zero_stage", "partition_count"} <= state.keys():
        raise UserError(str(path), "has no zero_stage", "convert what DeepSpeed saved with ZeRO-1, -2 or -3", MODEL)
    return state


def _model(path: Path) -> dict[str, Any]:
    content = _content(path, "module", "buffer_names", "param_shapes")
    if content.get("mp_world_size", 1) != 1:
        cause = f"is one of {content['mp_world_size']} parts of a model that is split over ranks"
        raise UserError(str(path), cause, "convert a checkpoint of ZeRO data parallelism alone", MODEL)
    return content


STAGES = {"optimizer_states": 1, "gradients": 2, "weights": 3}  # of DeepSpeed's ZeroStageEnum


def _stage(folder: Path, state: Mapping[str, Any]) -> int:
    stage = state["zero_stage"]
    if isinstance(stage, Record):  # an enumeration of DeepSpeed's: by value, or under early Pythons 3.11 by name
        stage = stage.arguments[0] if stage.arguments else None
        stage = STAGES.get(stage, stage) if isinstance(stage, str) else stage
    if stage not in (1, 2, 3):
        raise UserError(str(folder), f"is of ZeRO stage {stage!r}", "convert a checkpoint of stage 1, 2 or 3", MODEL)
    return int(stage)


def _world(state: Mapping[str, Any]) -> int:
    count = state["partition_count"]
    return max(count) if isinstance(count, list) else int(count)  # by parameter group; experts may have fewer


def _flat_groups(folder: Path, state: Mapping[str, Any], stage: int) -> list[StoredTensor]:
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    groups = state.get(key)
    groups = [groups] if isinstance(groups, StoredTensor) else groups
    if not isinstance(groups, list) or not all(
        isinstance(group, StoredTensor) and len(group.shape) == 1 and group.contiguous for group in groups
    ):
        raise UserError(str(folder), f"holds no {key}", "convert a checkpoint with its optimizer state", MODEL)
    if {group.dtype for group in groups} - {torch.float32}:
        raise UserError(str(folder), f"{key} is not float32", "convert a checkpoint with float32 masters", MODEL)
    return groups


# ------------------------------------------------------------------------------------------------- of one step


def _steps(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what an optimizer's state says of when it was saved: its step counters and settings."""
    base = state.get("base_optimizer_state") or state.get("optimizer_state_dict")
    if not isinstance(base, dict):
        return {}
    counters = [
        entry["step"] for entry in base.get("state", {}).values() if isinstance(entry, dict) and "step" in entry
    ]
    steps = {
        float(first_elements(whole("step", step), 1)) if isinstance(step, StoredTensor) else float(step)
        for step in counters
        if isinstance(step, int | float) or (isinstance(step, StoredTensor) and step.numel == 1)
    }
    settings = [
        {key: value for key, value in group.items() if isinstance(value, bool | int | float | str)}
        for group in base.get("param_groups", [])
    ]
    return {"optimizer step": sorted(steps), "optimizer settings": settings}


def _refuse_mixed(
    folder: Path, optimizers: Sequence[Mapping[str, Any]], models: Sequence[Mapping[str, Any]], world: int
) -> None:
    """Refuses files that were not saved together, as far as what they say of themselves shows it."""
    said = [_steps(state) | {key: state.get(key) for key in ("partition_count", "ds_version")} for state in optimizers]
    told = [
        {
            key: model.get(key)
            for key in ("global_steps", "global_samples", "dp_world_size", "ds_version", "param_shapes")
        }
        for model in models
    ]
    for facts in (said, told):
        for rank, fact in enumerate(facts):
            # What a file does not say is no contradiction: an optimizer may count no steps.
            other = [key for key in fact if fact[key] and facts[0][key] and fact[key] != facts[0][key]]
            if other:
                values = f"{facts[0][other[0]]} and {fact[other[0]]}"
                values = values if len(values) < 100 else "they differ"
                cause = f"mixes files of different saves: {other[0]} of ranks 0 and {rank}: {values}"
                raise UserError(str(folder), cause, AGAIN, MODEL)
    if told[0]["dp_world_size"] not in (None, world):
        cause = (
            f"mixes files of different saves: {told[0]['dp_world_size']} ranks by the model, {world} by the optimizer"
        )
        raise UserError(str(folder), cause, AGAIN, MODEL)


def _refuse_other_step(folder: Path, trained: Mapping[str, LazyTensor], module: Mapping[str, Any]) -> None:
    """Refuses a model file of another step: after each step DeepSpeed copies the masters into the model's weights."""
    other = []
    for name, tensor in trained.items():
        copy = module.get(name)
        if isinstance(copy, StoredTensor) and copy.shape == tensor.shape and copy.contiguous:
            weights = first_elements(whole(name, copy), SAMPLE)
            fp32_params = first_elements(tensor, SAMPLE).to(weights.dtype)
            if not torch.isclose(fp32_params, weights, rtol=0, atol=0, equal_nan=True).all():
                other.append(name)
    if other:
        cause = (
            f"mixes files of different saves: the model file has other values than the optimizer files in {few(other)}"
        )
        raise UserError(str(folder), cause, AGAIN, MODEL)


# ---------------------------------------------------------------------------------------------------- tensors


def _buffers(model: Mapping[str, Any]) -> dict[str, StoredTensor]:
    names = set(model["buffer_names"])
    return {name: stored for name, stored in model["module"].items() if name in names}


def _frozen(models: Sequence[Mapping[str, Any]], stage: int) -> dict[str, LazyTensor]:
    shapes = models[0].get("frozen_param_shapes") or {}
    found = {}
    for name, shape in shapes.items():
        pieces = [model["frozen_param_fragments"][name] for model in models]
        if stage < 3:
            found[name] = whole(name, pieces[0])
        else:
            found[name] = LazyTensor(name, pieces[0].dtype, shape, tuple(Vector(pieces).cut(0, prod(shape))))
    return found


def _trained_stage_2(
    ranks: Sequence[Sequence[StoredTensor]],
    shapes: Sequence[Mapping[str, Shape]],
    paddings: Sequence[Sequence[int]] | None,
) -> dict[str, LazyTensor]:
    tensors: dict[str, LazyTensor] = {}
    for number, (group, pieces) in enumerate(zip(shapes, zip(*ranks, strict=True), strict=True)):
        vector, at = Vector(pieces), 0
        gaps = paddings[number] if paddings is not None else [0] * len(group)
        for (name, shape), gap in zip(group.items(), gaps, strict=True):
            tensors[name] = LazyTensor(name, torch.float32, shape, tuple(vector.cut(at, prod(shape))))
            at += prod(shape) + gap
        align = 2 * len(ranks)  # the padding at the end; its exact size needs the living optimizer
        if ceil(at / align) != ceil(vector.length / align):
            raise ValueError(f"parameter group {number} has {vector.length} elements, its parameters {at}")
    return tensors


def _trained_stage_3(
    ranks: Sequence[Sequence[StoredTensor]], shapes: Sequence[Mapping[str, Shape]]
) -> dict[str, LazyTensor]:
    vectors, at = [Vector(groups) for groups in ranks], 0
    tensors: dict[str, LazyTensor] = {}
    for name, shape in ((name, shape) for group in shapes for name, shape in group.items()):
        numel = prod(shape)
        share = ceil(numel / len(vectors))
        runs = [
            run
            for rank, vector in enumerate(vectors)
            for run in vector.cut(at, max(0, min(share, numel - rank * share)))
        ]
        tensors[name] = LazyTensor(name, torch.float32, shape, tuple(runs))
        at += share
    lengths = {vector.length for vector in vectors}
    if lengths != {at}:
        raise ValueError(f"the ranks hold {sorted(lengths)} elements each, the parameters need {at}")
    return tensors
