"""Serves whoever has weights from elsewhere: files of tensors, read by diffusers' names, a part at a time.

A file is told by what is in it. Prefixes that other programs put before every name are taken off, 8-bit floats are
multiplied by their scales, and a pickle is never run. Nothing is read before it is asked for.
"""

from __future__ import annotations

import json
import mmap
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from videox.errors import MODEL, UserError
from videox.weights import layouts
from videox.weights.layouts import Entry
from videox.weights.lazy_tensor import EIGHT_BITS, LazyTensor, cut, read, read_file, renamed, whole
from videox.weights.safe_pickle import StoredTensor, read_archive
from videox.weights.safetensors_io import WEIGHTS, TensorSource, few

ARCHIVES = (".pt", ".pth", ".bin", ".ckpt")
WRAPPERS = ("module", "state_dict", "model")  # keys under which a file of torch.save may hold the tensors
SCALES = (".scale_weight", ".weight_scale")  # of 8-bit weights, as ComfyUI writes them
# What goes with 8-bit weights and is no weight: the scales of activations, which only 8-bit products use, and marks.
MARKS = (".scale_input", ".input_scale", ".comfy_quant")
MARK = "scaled_fp8"


class LayoutTensors(TensorSource):
    """A model's tensors by their names in diffusers, wherever they lie: each read from its file when it is asked for.

    Args:
        path: of the file or folder, for messages.
        stored: the tensors by the names that they have there.
        layout: that these names belong to; None for diffusers' own.
    """

    def __init__(self, path: Path, stored: Mapping[str, LazyTensor], layout: str | None) -> None:
        self.path, self.folder, self.stored, self.layout = path, path, dict(stored), layout
        self._maps: dict[Path, mmap.mmap] = {}
        shapes = {name: tensor.shape for name, tensor in stored.items()}
        if layout is None:
            entries = [Entry(name, shape, ()) for name, shape in shapes.items()]
        else:
            entries = layouts.to_diffusers(layout, shapes)
        self._entries = {entry.name: entry for entry in entries}

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.scattered(name)
        found = self._mapped(tensor)
        return read(tensor) if found is None else found

    def _mapped(self, tensor: LazyTensor) -> Tensor | None:
        """Returns a tensor that lies in one piece as its file's own pages, to be read where they are used, or None.

        Whoever writes to it writes to a copy: the mapping is private.
        """
        run, size = tensor.runs[0], tensor.dtype.itemsize
        in_one_piece = len(tensor.runs) == 1 and tensor.stride is None and tensor.numel == run.count > 0
        if not in_one_piece or tensor.dtype in EIGHT_BITS or run.start % size:
            return None
        if run.path not in self._maps:
            with run.path.open("rb") as file:
                self._maps[run.path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if run.start + run.count * size > len(self._maps[run.path]):
            return None  # cut short since: the plain read says so
        flat = torch.frombuffer(self._maps[run.path], dtype=tensor.dtype, count=run.count, offset=run.start)
        return flat.reshape(tensor.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor, without reading it."""
        return self._entries[name].shape

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of all tensors, by name."""
        return {name: entry.shape for name, entry in self._entries.items()}

    def dtype(self) -> torch.dtype:
        """Returns the dtype of most bytes as they are read."""
        sizes: Counter[torch.dtype] = Counter()
        for tensor in self.stored.values():
            read_as = torch.float32 if tensor.dtype in EIGHT_BITS else tensor.dtype
            sizes[read_as] += tensor.numel * read_as.itemsize
        return sizes.most_common(1)[0][0]

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """Returns rows `begin` to `end` of a tensor, counted along its first dimension, reading no others."""
        tensor = self.scattered(name)
        if tensor.stride is not None:
            return read(tensor)[begin:end].clone()
        row = tensor.numel // tensor.shape[0]
        runs = tuple(cut(tensor, begin * row, (end - begin) * row))
        return read(replace(tensor, shape=(end - begin, *tensor.shape[1:]), runs=runs))

    def scattered(self, name: str) -> LazyTensor:
        """Returns where a tensor's elements lie. Raises UserError (MODEL) if they cannot be put together as they are."""
        return assembled(self._entries[name], self.stored, self.path)

    def name_in_file(self, name: str) -> str:
        """Returns the name that a tensor of diffusers has, or would have, in the file."""
        return name if self.layout is None else layouts.sources(self.layout, name)[0]


def assembled(entry: Entry, stored: Mapping[str, LazyTensor], path: Path) -> LazyTensor:
    """Returns a tensor put together of stretches of stored ones; an entry without pieces is the stored one itself.

    Raises:
        UserError: (MODEL) its parts differ in dtype or scale, or one that is to be cut does not lie contiguous.
    """
    if not entry.pieces:
        return renamed(stored[entry.name], entry.name)
    parts = [stored[piece.name] for piece in entry.pieces]
    first = parts[0]
    if len(parts) == 1 and entry.pieces[0].count == first.numel:
        return replace(first, name=entry.name, shape=entry.shape)
    if any((part.dtype, part.scale, part.stride) != (first.dtype, first.scale, None) for part in parts):
        what = f"{entry.name} is made of parts of different dtypes, scales or strides"
        raise UserError(str(path), what, "save the weights anew in one dtype", MODEL)
    runs = tuple(
        run for piece, part in zip(entry.pieces, parts, strict=True) for run in cut(part, piece.begin, piece.count)
    )
    return LazyTensor(entry.name, first.dtype, entry.shape, runs, scale=first.scale)


def open_tensors(path: Path) -> LayoutTensors:
    """Returns the tensors of a safetensors file, a file of torch.save, or a folder of either kind's shards.

    Raises:
        UserError: (MODEL) there are none, a file is broken or missing, or a pickle names more than tensors.
    """
    files = weight_files(path)
    found: dict[str, LazyTensor] = {}
    for file in files:
        for tensor in _archive(file) if file.suffix in ARCHIVES else _safetensors(file):
            if tensor.name in found:
                raise UserError(
                    str(path), f"holds {tensor.name} twice", "keep one set of weights in the folder", MODEL
                )
            found[tensor.name] = tensor
    found = _unscaled(_unprefixed(found), path)
    layout = layouts.layout_of(found)
    if layout is None:
        published = {layouts.published_name(name): tensor for name, tensor in found.items()}
        if layouts.layout_of(published) == "hunyuan":
            found, layout = published, "hunyuan"
    elif layout == "hunyuan":
        found = {layouts.published_name(name): tensor for name, tensor in found.items()}
    return LayoutTensors(path, found, layout)


def weight_files(path: Path) -> list[Path]:
    """Returns the files that hold a model's tensors: the path itself, or those in the folder. Raises UserError."""
    if path.is_file():
        if path.suffix not in (".safetensors", *ARCHIVES):
            raise UserError(str(path), "is no file of weights", f"give .safetensors or {', '.join(ARCHIVES)}", MODEL)
        return [path]
    found = sorted(path.iterdir()) if path.is_dir() else []
    indices = [file for file in found if file.name.endswith(".safetensors.index.json")]
    if indices:
        return _of_index(indices[0])
    weights = [file for file in found if file.suffix == ".safetensors"]
    stemmed = [file for file in weights if file.name.startswith(WEIGHTS)]
    if not weights:
        names = ", ".join(file.name for file in found[:8]) or (
            "nothing" if path.is_dir() else "no such file or folder"
        )
        raise UserError(
            str(path), f"holds no .safetensors weights (found: {names})", "give safetensors weights", MODEL
        )
    return stemmed or weights


def _of_index(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        strays = [name for name in names if Path(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"cannot be read ({type(error).__name__}: {error})"
        raise UserError(str(index), what, "copy the model anew", MODEL) from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if strays or missing:
        what = f"names {few(strays or missing)}, which is {'outside its folder' if strays else 'missing'}"
        raise UserError(str(index), what, "copy the model anew", MODEL)
    return [index.parent / name for name in names]


def _safetensors(path: Path) -> tuple[LazyTensor, ...]:
    try:
        with safe_open(path, framework="pt"):
            return read_file(path)
    except (SafetensorError, OSError) as why:
        raise UserError(str(path), f"is cut short or damaged ({why})", "copy the model anew", MODEL) from why


def _archive(path: Path) -> list[LazyTensor]:
    if not zipfile.is_zipfile(path):
        what = "is no file of torch.save, or one from before torch 1.6, or cut short"
        raise UserError(str(path), what, "copy it anew, or save its tensors as safetensors", MODEL)
    found: Any = read_archive(path)
    for wrapper in WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
    items = found.items() if isinstance(found, dict) else ()
    tensors = [whole(str(name), value) for name, value in items if isinstance(value, StoredTensor)]
    if not tensors:
        raise UserError(str(path), "holds no tensors by name", "give the weights of a model", MODEL)
    return tensors


def _unprefixed(stored: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    names = [name for name in stored if not name.endswith(MARK)]
    prefix = layouts.shared_prefix(names)
    return {name.removeprefix(prefix): renamed(stored[name], name.removeprefix(prefix)) for name in names}


def _unscaled(stored: dict[str, LazyTensor], path: Path) -> dict[str, LazyTensor]:
    """Returns the weights alone, each 8-bit one with its scale."""
    scales: dict[str, float] = {}
    for name, tensor in stored.items():
        suffix = next((suffix for suffix in SCALES if name.endswith(suffix)), None)
        if suffix is None:
            continue
        if tensor.numel != 1:
            what = f"{name} has {tensor.numel} values; one scale for a whole tensor is read"
            raise UserError(str(path), what, "give the bf16 or fp16 weights", MODEL)
        scales[f"{name.removesuffix(suffix)}.weight"] = float(read(tensor).float().item())
    kept = {name: tensor for name, tensor in stored.items() if not name.endswith((*SCALES, *MARKS))}
    odd = [name for name in scales if name not in kept or kept[name].dtype not in EIGHT_BITS]
    if odd:
        raise UserError(
            str(path), f"has a scale for {few(odd)}, which is no 8-bit weight", "give other weights", MODEL
        )
    return {name: replace(tensor, scale=scales.get(name, 1.0)) for name, tensor in kept.items()}
