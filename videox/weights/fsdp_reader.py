"""Serves whoever trained with FSDP: finds each tensor of a sharded torch.distributed.checkpoint in its ranks' files.

`.metadata` says which box of which tensor lies where in which file; each box is an archive of torch.save inside a
`.distcp` file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import torch

from videox.errors import MODEL, UserError
from videox.weights.lazy_tensor import FileSpan, LazyTensor, Shards
from videox.weights.safe_pickle import Record, StoredTensor, damaged, read_archive, read_pickle

METADATA = ".metadata"
MODEL_KEY = "model"  # under which accelerate saves the model
FOLDERS = "pytorch_model_fsdp_*"  # as accelerate names them
AGAIN = "copy the whole checkpoint again, or convert another one"

Box = tuple[tuple[int, ...], tuple[int, ...], StoredTensor]  # offsets, sizes, elements


def fsdp_folder(checkpoint: Path, tag: str | None) -> Path | None:
    """Returns the folder with the model's `.metadata`; None if this is no FSDP checkpoint.

    Args:
        checkpoint: what accelerate saved, or the folder of the shards itself.
        tag: name of the folder inside the checkpoint; None looks for accelerate's.

    Raises:
        UserError: (MODEL) there are several, or shards without their `.metadata`.
    """
    if tag is not None:
        inside = Path(tag).name == tag
        return checkpoint / tag if inside and (checkpoint / tag / METADATA).is_file() else None
    folders = [path for path in (checkpoint, *sorted(checkpoint.glob(FOLDERS))) if (path / METADATA).is_file()]
    if len(folders) > 1:
        names = ", ".join(path.name for path in folders)
        raise UserError(str(checkpoint), f"holds several models: {names}", "choose one by --tag", MODEL)
    bare = [path.parent for path in (*checkpoint.glob("*.distcp"), *checkpoint.glob(f"{FOLDERS}/*.distcp"))]
    if not folders and bare:
        raise UserError(str(bare[0]), f"has no {METADATA}: its save did not end, or was copied in part", AGAIN, MODEL)
    return folders[0] if folders else None


def read_fsdp(folder: Path) -> Shards:
    """Returns the tensors of a sharded checkpoint of torch.distributed.checkpoint.

    Raises:
        UserError: (MODEL) a file is missing, extra, damaged, cut short, or holds something else than the metadata says.
    """
    path = folder / METADATA
    metadata = read_pickle(path).state
    try:
        described = metadata["state_dict_metadata"]
        names = _model_names(path, described, metadata.get("planner_data") or {})
        places = _places(metadata["storage_data"])
        files = {place["relative_path"] for place in places.values()}
        _refuse_other_files(folder, files)
        tensors = tuple(_tensor(folder, key, name, described[key].state, places) for key, name in names.items())
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise damaged(path, f"{type(error).__name__}: {error}") from error
    return Shards(f"FSDP, {len(files)} file{'s' if len(files) > 1 else ''}", tensors)


def _is_tensor(described: Record) -> bool:
    return described.name.endswith(".TensorStorageMetadata")


def _model_names(path: Path, described: Mapping[str, Record], paths: Mapping[str, tuple[Any, ...]]) -> dict[str, str]:
    """Returns the model's tensors: their key in the checkpoint, and their name in the state dict."""
    full = {key: tuple(paths.get(key, (key,))) for key, entry in described.items() if _is_tensor(entry)}
    nested = {key: str(place[1]) for key, place in full.items() if len(place) == 2 and place[0] == MODEL_KEY}
    names = nested or {key: str(place[0]) for key, place in full.items() if len(place) == 1}
    if not names:
        found = ", ".join(sorted({str(place[0]) for place in full.values()})[:8]) or "no tensor"
        what = f"holds no {MODEL_KEY!r} (found: {found})"
        raise UserError(str(path), what, "name the folder of the model's shards, not of the optimizer's", MODEL)
    return names


def _places(storage: Mapping[Record, Record]) -> dict[tuple[str, tuple[int, ...] | None], dict[str, Any]]:
    """Returns where each box lies, by the tensor's key and the box's offsets."""
    return {(index.state["fqn"], index.state.get("offset")): info.state for index, info in storage.items()}


def _refuse_other_files(folder: Path, named: set[str]) -> None:
    there = {path.name for path in folder.glob("*.distcp")}
    outside = sorted(name for name in named if Path(name).name != name)
    if outside:
        raise UserError(str(folder / METADATA), f"points outside its folder, to {outside[0]!r}", AGAIN, MODEL)
    for word, names in (("lacks", named - there), ("also holds", there - named)):
        if names:
            what = f"{word} {', '.join(sorted(names)[:5])} ({len(there)} files found, {METADATA} names {len(named)})"
            raise UserError(str(folder), what, AGAIN, MODEL)


def _tensor(
    folder: Path,
    key: str,
    name: str,
    described: Mapping[str, Any],
    places: Mapping[tuple[str, tuple[int, ...] | None], Mapping[str, Any]],
) -> LazyTensor:
    shape, dtype = tuple(described["size"]), _dtype(described["properties"])
    boxes: list[Box] = []
    for chunk in described["chunks"]:
        offsets, sizes = tuple(chunk.state["offsets"]), tuple(chunk.state["sizes"])
        if prod(sizes):
            boxes.append((offsets, sizes, _box(folder, places[key, offsets], sizes, dtype)))
    return LazyTensor(name, dtype, shape, tuple(_runs(name, shape, boxes)))


def _dtype(properties: Record) -> torch.dtype:
    dtype = properties.state[0]
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{dtype!r} is no dtype")
    return dtype


def _box(folder: Path, place: Mapping[str, Any], sizes: tuple[int, ...], dtype: torch.dtype) -> StoredTensor:
    path = folder / place["relative_path"]
    if place.get("transform_descriptors"):
        raise UserError(str(path), "is compressed or encrypted", "save it without extensions", MODEL)
    stored = read_archive(path, place["offset"], place["length"])
    if not isinstance(stored, StoredTensor) or (stored.shape, stored.dtype) != (sizes, dtype) or not stored.contiguous:
        raise damaged(path, f"at byte {place['offset']} lies something else than {METADATA} says")
    return stored


def _runs(name: str, shape: tuple[int, ...], boxes: list[Box]) -> Iterator[FileSpan]:
    """Yields the elements of all boxes in the order of the whole tensor; the boxes must tile it."""
    pieces = sorted((piece for box in boxes for piece in _rows(shape, *box)), key=lambda piece: piece[0])
    end = 0
    for begin, run in pieces:
        if begin != end:
            raise ValueError(f"the shards of {name} overlap or leave a gap at element {min(begin, end)}")
        end = begin + run.count
        yield run
    if end != prod(shape):
        raise ValueError(f"the shards of {name} hold {end} of {prod(shape)} elements")


def _rows(
    shape: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...], stored: StoredTensor
) -> Iterator[tuple[int, FileSpan]]:
    """Yields a box's stretches that are one piece in the whole tensor too, each with its place there (elements)."""
    if any(low + size > limit for low, size, limit in zip(offsets, sizes, shape, strict=True)):
        raise ValueError(f"a shard at {list(offsets)} of {list(sizes)} is not inside {list(shape)}")
    strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    cut = max((axis for axis in range(len(shape)) if sizes[axis] != shape[axis]), default=0)
    length = prod(sizes[cut:])
    for number, index in enumerate(product(*(range(size) for size in sizes[:cut]))):
        place = sum((low + at) * stride for low, at, stride in zip(offsets[:cut], index, strides[:cut], strict=True))
        place += sum(low * stride for low, stride in zip(offsets[cut:], strides[cut:], strict=True))
        yield place, FileSpan(stored.path, stored.start + number * length * stored.dtype.itemsize, length)
