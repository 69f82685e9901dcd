"""Reads FSDP checkpoints: locates each tensor of a sharded torch.distributed.checkpoint in the files of its ranks.

`.metadata` lists the chunks of each tensor, with file and offset of each chunk. A chunk is a rectangular block of the
tensor, stored as a torch.save archive inside a `.distcp` file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import torch

from videox.errors import MODEL, UserError, plural
from videox.weights.lazy_tensor import CheckpointTensors, FileSpan, LazyTensor
from videox.weights.safe_pickle import OpaqueObject, StoredTensor, damaged_error, read_archive, read_pickle

METADATA = ".metadata"
MODEL_KEY = "model"  # key under which accelerate saves the model
FOLDERS = "pytorch_model_fsdp_*"  # folder names of accelerate
COPY_AGAIN = "copy the complete checkpoint again, or convert another one"

Chunk = tuple[tuple[int, ...], tuple[int, ...], StoredTensor]  # offsets and sizes per dimension, elements


def fsdp_folder(checkpoint: Path, tag: str | None) -> Path | None:
    """Find the folder with the model's `.metadata`; None if this is not an FSDP checkpoint.

    Args:
        checkpoint: a checkpoint that accelerate saved, or the folder of the shards itself.
        tag: name of the folder inside the checkpoint; None searches for accelerate's folder.

    Raises:
        UserError: (MODEL) there are several such folders, or shards without `.metadata`.
    """
    if tag is not None:
        is_name = Path(tag).name == tag
        return checkpoint / tag if is_name and (checkpoint / tag / METADATA).is_file() else None
    folders = [path for path in (checkpoint, *sorted(checkpoint.glob(FOLDERS))) if (path / METADATA).is_file()]
    if len(folders) > 1:
        names = ", ".join(path.name for path in folders)
        raise UserError(str(checkpoint), f"contains several models: {names}", "choose one with --tag", MODEL)
    without_metadata = [
        path.parent for path in (*checkpoint.glob("*.distcp"), *checkpoint.glob(f"{FOLDERS}/*.distcp"))
    ]
    if not folders and without_metadata:
        what = f"has no {METADATA}: its save was interrupted, or the copy is incomplete"
        raise UserError(str(without_metadata[0]), what, COPY_AGAIN, MODEL)
    return folders[0] if folders else None


def read_fsdp(folder: Path) -> CheckpointTensors:
    """Locate the tensors of a sharded checkpoint of torch.distributed.checkpoint.

    Raises:
        UserError: (MODEL) a file is missing, extra, damaged or truncated, or its content contradicts the metadata.
    """
    path = folder / METADATA
    metadata = read_pickle(path).state
    try:
        described = metadata["state_dict_metadata"]
        names = _model_names(path, described, metadata.get("planner_data") or {})
        locations = _locations(metadata["storage_data"])
        files = {location["relative_path"] for location in locations.values()}
        _check_files(folder, files)
        tensors = tuple(_tensor(folder, key, name, described[key].state, locations) for key, name in names.items())
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise damaged_error(path, f"{type(error).__name__}: {error}") from error
    return CheckpointTensors(f"FSDP, {len(files)} {plural(len(files), 'file')}", tensors)


def _is_tensor(described: OpaqueObject) -> bool:
    return described.name.endswith(".TensorStorageMetadata")


def _model_names(
    path: Path, described: Mapping[str, OpaqueObject], paths: Mapping[str, tuple[Any, ...]]
) -> dict[str, str]:
    """Return the state-dict name of each of the model's tensors, by its key in the checkpoint."""
    key_paths = {key: tuple(paths.get(key, (key,))) for key, entry in described.items() if _is_tensor(entry)}
    nested = {key: str(parts[1]) for key, parts in key_paths.items() if len(parts) == 2 and parts[0] == MODEL_KEY}
    names = nested or {key: str(parts[0]) for key, parts in key_paths.items() if len(parts) == 1}
    if not names:
        found = ", ".join(sorted({str(parts[0]) for parts in key_paths.values()})[:8]) or "no tensor"
        what = f"contains no {MODEL_KEY!r} (found: {found})"
        raise UserError(str(path), what, "use the folder with the shards of the model, not of the optimizer", MODEL)
    return names


def _locations(
    storage: Mapping[OpaqueObject, OpaqueObject],
) -> dict[tuple[str, tuple[int, ...] | None], dict[str, Any]]:
    """Return file, offset and length of each chunk, by the tensor's key and the chunk's offsets."""
    return {(index.state["fqn"], index.state.get("offset")): info.state for index, info in storage.items()}


def _check_files(folder: Path, named: set[str]) -> None:
    present = {path.name for path in folder.glob("*.distcp")}
    outside = sorted(name for name in named if Path(name).name != name)
    if outside:
        raise UserError(str(folder / METADATA), f"points outside its folder, to {outside[0]!r}", COPY_AGAIN, MODEL)
    for problem, names in (("is missing", named - present), ("has the extra files", present - named)):
        if names:
            counts = f"{len(present)} {plural(len(present), 'file')} found, {METADATA} lists {len(named)}"
            what = f"{problem} {', '.join(sorted(names)[:5])} ({counts})"
            raise UserError(str(folder), what, COPY_AGAIN, MODEL)


def _tensor(
    folder: Path,
    key: str,
    name: str,
    described: Mapping[str, Any],
    locations: Mapping[tuple[str, tuple[int, ...] | None], Mapping[str, Any]],
) -> LazyTensor:
    shape, dtype = tuple(described["size"]), _dtype(described["properties"])
    chunks: list[Chunk] = []
    for chunk in described["chunks"]:
        offsets, sizes = tuple(chunk.state["offsets"]), tuple(chunk.state["sizes"])
        if prod(sizes):
            chunks.append((offsets, sizes, _open_chunk(folder, locations[key, offsets], sizes, dtype)))
    return LazyTensor(name, dtype, shape, tuple(_row_major_spans(name, shape, chunks)))


def _dtype(properties: OpaqueObject) -> torch.dtype:
    dtype = properties.state[0]
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{dtype!r} is not a dtype")
    return dtype


def _open_chunk(folder: Path, location: Mapping[str, Any], sizes: tuple[int, ...], dtype: torch.dtype) -> StoredTensor:
    path = folder / location["relative_path"]
    if location.get("transform_descriptors"):
        raise UserError(str(path), "is compressed or encrypted", "save it without storage extensions", MODEL)
    stored = read_archive(path, location["offset"], location["length"])
    if not isinstance(stored, StoredTensor) or (stored.shape, stored.dtype) != (sizes, dtype) or not stored.contiguous:
        raise damaged_error(path, f"the content at byte {location['offset']} is not what {METADATA} describes")
    return stored


def _row_major_spans(name: str, shape: tuple[int, ...], chunks: list[Chunk]) -> Iterator[FileSpan]:
    """Yield the spans of all chunks in row-major order of the full tensor; the chunks must tile it exactly."""
    pieces = sorted((piece for chunk in chunks for piece in _chunk_spans(shape, *chunk)), key=lambda piece: piece[0])
    end = 0
    for begin, span in pieces:
        if begin != end:
            raise ValueError(f"the shards of {name} overlap or leave a gap at element {min(begin, end)}")
        end = begin + span.count
        yield span
    if end != prod(shape):
        raise ValueError(f"the shards of {name} contain {end} of {prod(shape)} elements")


def _chunk_spans(
    shape: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...], stored: StoredTensor
) -> Iterator[tuple[int, FileSpan]]:
    """Yield the parts of a chunk that are contiguous in the full tensor, each with its first element's index there."""
    if any(low + size > limit for low, size, limit in zip(offsets, sizes, shape, strict=True)):
        raise ValueError(f"a shard at {list(offsets)} of {list(sizes)} is not inside {list(shape)}")
    strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    # Behind the last sharded axis the chunk has the full tensor's sizes, so all of that is one contiguous part.
    axis = max((axis for axis in range(len(shape)) if sizes[axis] != shape[axis]), default=0)
    length = prod(sizes[axis:])
    for number, index in enumerate(product(*(range(size) for size in sizes[:axis]))):
        first = sum((low + at) * stride for low, at, stride in zip(offsets[:axis], index, strides[:axis], strict=True))
        first += sum(low * stride for low, stride in zip(offsets[axis:], strides[axis:], strict=True))
        yield first, FileSpan(stored.path, stored.start + number * length * stored.dtype.itemsize, length)
