"""Reads weights in any supported layout by their diffusers names, lazily.

The layout is detected from the tensor names. Prefixes that other programs add to every name are stripped, 8-bit floats
are multiplied by their scales, and no code in a pickle is run. A tensor is read when it is accessed.
"""

from __future__ import annotations

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
from videox.weights.lazy_tensor import (
    FLOAT8_DTYPES,
    LazyTensor,
    from_stored,
    read_safetensors,
    read_tensor,
    slice_spans,
    with_name,
)
from videox.weights.safe_pickle import StoredTensor, read_archive
from videox.weights.safetensors_io import TensorSource, join_first
from videox.weights.weight_files import TORCH_SUFFIXES, weight_files

WRAPPER_KEYS = ("module", "state_dict", "model")  # keys under which a torch.save file may store the state dict
COMPILED = "_orig_mod."  # torch.compile inserts it as the name of the module that it wraps
SCALE_SUFFIXES = (".scale_weight", ".weight_scale")  # scales of 8-bit weights, as ComfyUI names them
# Other tensors in files of 8-bit weights: activation scales, which only 8-bit matmuls use, and format markers.
IGNORED_SUFFIXES = (".scale_input", ".input_scale", ".comfy_quant")
FP8_MARKER = "scaled_fp8"


class LayoutTensors(TensorSource):
    """A model's tensors by their diffusers names; each is read from its file when it is accessed.

    Args:
        path: the file or folder, for messages.
        stored: the tensors by their names in the file.
        layout: the layout of these names; None for diffusers.
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
        tensor = self.lazy(name)
        mapped = self._memory_mapped(tensor)
        return read_tensor(tensor) if mapped is None else mapped

    def _memory_mapped(self, tensor: LazyTensor) -> Tensor | None:
        """Map a tensor that is contiguous in its file into memory; None if it is not contiguous or not aligned.

        Pages are then read on first use and do not count as anonymous memory. The mapping is copy-on-write.
        """
        span, size = tensor.spans[0], tensor.dtype.itemsize
        is_contiguous = len(tensor.spans) == 1 and tensor.stride is None and tensor.numel == span.count > 0
        if not is_contiguous or tensor.dtype in FLOAT8_DTYPES or span.start % size:
            return None
        if span.path not in self._maps:
            with span.path.open("rb") as file:
                self._maps[span.path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if span.start + span.count * size > len(self._maps[span.path]):
            return None  # truncated after it was opened: read_tensor reports it, a mapping would raise SIGBUS
        flat = torch.frombuffer(self._maps[span.path], dtype=tensor.dtype, count=span.count, offset=span.start)
        return flat.reshape(tensor.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        return self._entries[name].shape

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all tensors, by name."""
        return {name: entry.shape for name, entry in self._entries.items()}

    def dtype(self) -> torch.dtype:
        """Return the dtype that most bytes have after reading."""
        sizes: Counter[torch.dtype] = Counter()
        for tensor in self.stored.values():
            read_as = torch.float32 if tensor.dtype in FLOAT8_DTYPES else tensor.dtype
            sizes[read_as] += tensor.numel * read_as.itemsize
        return sizes.most_common(1)[0][0]

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """Read rows `begin` to `end` of a tensor (first dimension), and only these."""
        tensor = self.lazy(name)
        if tensor.stride is not None:
            return read_tensor(tensor)[begin:end].clone()
        row = tensor.numel // tensor.shape[0]
        spans = tuple(slice_spans(tensor, begin * row, (end - begin) * row))
        return read_tensor(replace(tensor, shape=(end - begin, *tensor.shape[1:]), spans=spans))

    def eight_bit(self, name: str) -> tuple[Tensor, float] | None:
        """Return the bits of a float8_e4m3fn tensor, uint8, and its scale; None for a tensor of another dtype."""
        tensor = self.lazy(name)
        if tensor.dtype != torch.float8_e4m3fn:
            return None
        return read_tensor(replace(tensor, dtype=torch.uint8, scale=1.0)), tensor.scale

    def lazy(self, name: str) -> LazyTensor:
        """Return a tensor without reading it. Raises UserError (MODEL) if its pieces cannot be concatenated."""
        return assemble(self._entries[name], self.stored, self.path)

    def name_in_file(self, name: str) -> str:
        """Return the name that a diffusers tensor has, or would have, in the file."""
        return name if self.layout is None else layouts.sources(self.layout, name)[0]


def assemble(entry: Entry, stored: Mapping[str, LazyTensor], path: Path) -> LazyTensor:
    """Concatenate pieces of stored tensors into a lazy tensor; an entry without pieces is the stored tensor itself.

    Raises:
        UserError: (MODEL) the source tensors differ in dtype or scale, or one that has to be split is not contiguous.
    """
    if not entry.pieces:
        return with_name(stored[entry.name], entry.name)
    parts = [stored[piece.name] for piece in entry.pieces]
    first = parts[0]
    if len(parts) == 1 and entry.pieces[0].count == first.numel:
        return replace(first, name=entry.name, shape=entry.shape)
    if any((part.dtype, part.scale, part.stride) != (first.dtype, first.scale, None) for part in parts):
        what = f"{entry.name} is made of tensors of different dtypes, scales or strides"
        raise UserError(str(path), what, "save the weights again in one dtype", MODEL)
    spans = tuple(
        span
        for piece, part in zip(entry.pieces, parts, strict=True)
        for span in slice_spans(part, piece.begin, piece.count)
    )
    return LazyTensor(entry.name, first.dtype, entry.shape, spans, scale=first.scale)


def open_tensors(path: Path) -> LayoutTensors:
    """Open a safetensors file, a torch.save file, or a folder of safetensors shards.

    Raises:
        UserError: (MODEL) there are no weights, a file is broken or missing, or a pickle names other objects.
    """
    files = weight_files(path)
    tensors: dict[str, LazyTensor] = {}
    for file in files:
        for tensor in _read_torch_file(file) if file.suffix in TORCH_SUFFIXES else _open_safetensors(file):
            if tensor.name in tensors:
                first = tensors[tensor.name].spans[0].path.name
                what = f"contains {tensor.name} twice, in {first} and {file.name}"
                raise UserError(str(path), what, "keep only one set of weights in the folder", MODEL)
            tensors[tensor.name] = tensor
    tensors = _attach_scales(_strip_prefix(tensors), path)
    layout = layouts.layout_of(tensors)
    if layout == "hunyuan":  # ComfyUI saves some of its modules under other names
        tensors = {layouts.published_name(name): tensor for name, tensor in tensors.items()}
    return LayoutTensors(path, tensors, layout)


def _open_safetensors(path: Path) -> tuple[LazyTensor, ...]:
    try:
        with safe_open(path, framework="pt"):
            return read_safetensors(path)
    except (SafetensorError, OSError) as why:
        raise UserError(str(path), f"is truncated or damaged ({why})", "copy the model again", MODEL) from why


def _read_torch_file(path: Path) -> list[LazyTensor]:
    if not zipfile.is_zipfile(path):
        what = "is not a torch.save file, or was saved before torch 1.6, or is truncated"
        raise UserError(str(path), what, "copy it again, or save its tensors as safetensors", MODEL)
    content: Any = read_archive(path)
    for key in WRAPPER_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    items = content.items() if isinstance(content, dict) else ()
    tensors = [from_stored(str(name), value) for name, value in items if isinstance(value, StoredTensor)]
    if not tensors:
        raise UserError(str(path), "contains no state dict", "pass the weights of a model", MODEL)
    return tensors


def _strip_prefix(stored: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    names = [name for name in stored if not name.endswith(FP8_MARKER)]
    plain = {name: name.replace(COMPILED, "") for name in names}
    prefix = layouts.shared_prefix(plain.values())
    return {
        name.removeprefix(prefix): with_name(stored[old], name.removeprefix(prefix)) for old, name in plain.items()
    }


def _attach_scales(stored: dict[str, LazyTensor], path: Path) -> dict[str, LazyTensor]:
    """Return the weights without their scale tensors; each 8-bit weight has its scale attached."""
    scales: dict[str, float] = {}
    for name, tensor in stored.items():
        suffix = next((suffix for suffix in SCALE_SUFFIXES if name.endswith(suffix)), None)
        if suffix is None:
            continue
        if tensor.numel != 1:
            what = f"{name} has {tensor.numel} values; only one scale per tensor is supported"
            raise UserError(str(path), what, "use the bf16 or fp16 weights", MODEL)
        scales[f"{name.removesuffix(suffix)}.weight"] = float(read_tensor(tensor).float().item())
    suffixes = (*SCALE_SUFFIXES, *IGNORED_SUFFIXES)
    weights = {name: tensor for name, tensor in stored.items() if not name.endswith(suffixes)}
    stray = [name for name in scales if name not in weights or weights[name].dtype not in FLOAT8_DTYPES]
    if stray:
        what = f"has a scale for {join_first(stray)}, which is not an 8-bit weight"
        raise UserError(str(path), what, "use other weights", MODEL)
    return {name: replace(tensor, scale=scales.get(name, 1.0)) for name, tensor in weights.items()}
