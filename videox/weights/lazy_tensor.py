"""Lazy tensors: where a tensor's elements are stored, in one file or many, and how to read them in blocks."""

from __future__ import annotations

import json
import resource
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from io import FileIO
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from videox.errors import MODEL, UserError
from videox.weights.safe_pickle import StoredTensor, damaged_error
from videox.weights.safetensors_io import WEIGHTS, StoredTensors

BLOCK_BYTES = 16 * 2**20  # read at a time: negligible memory, and large enough that the cost per read call is hidden
SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
FLOAT8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)  # never written; they are read as float32


@dataclass(frozen=True, slots=True)
class FileSpan:
    """`count` consecutive elements in a file, starting at byte `start`."""

    path: Path
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor that is still in its files: the concatenation of its spans, in order.

    Attributes:
        name: key in the model's state dict.
        dtype: dtype in the file.
        shape: shape of the full tensor.
        spans: file spans with as many elements in total as the shape has; with a stride, the memory range it covers.
        stride: stride in elements if the stored tensor is not contiguous; None otherwise.
        buffer: whether it is a buffer, which is not trained and may contain infinities on purpose (masks).
        scale: factor for the stored values of an 8-bit float tensor.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    spans: tuple[FileSpan, ...]
    stride: tuple[int, ...] | None = None
    buffer: bool = False
    scale: float = 1.0

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class CheckpointTensors:
    """The tensors of a checkpoint.

    Attributes:
        kind: description of the checkpoint for messages, e.g. "ZeRO-3 of 8 ranks, step 500".
        tensors: one LazyTensor per name.
        notes: sentences to print to the user.
    """

    kind: str
    tensors: tuple[LazyTensor, ...]
    notes: tuple[str, ...] = ()


def from_stored(name: str, stored: StoredTensor, *, buffer: bool = False) -> LazyTensor:
    """Make a LazyTensor of a tensor that is stored in one file."""
    if stored.contiguous:
        spans = (FileSpan(stored.path, stored.start, stored.numel),)
        return LazyTensor(name, stored.dtype, stored.shape, spans, buffer=buffer)
    spans = (FileSpan(stored.path, stored.start, stored.extent),)
    return LazyTensor(name, stored.dtype, stored.shape, spans, stored.stride, buffer)


def with_name(tensor: LazyTensor, name: str) -> LazyTensor:
    """Return the same tensor under another name."""
    return replace(tensor, name=name)


class FlatTensor:
    """The concatenation of flat tensors, of which any range can be located.

    Args:
        parts: one-dimensional contiguous tensors of one dtype.
    """

    def __init__(self, parts: Sequence[StoredTensor]) -> None:
        self._parts = parts
        self._ends = list(accumulate(part.numel for part in parts))
        self.length = self._ends[-1] if parts else 0

    def spans(self, begin: int, count: int) -> Iterator[FileSpan]:
        """Yield the spans of `count` elements from element `begin` on. Raises ValueError beyond the end."""
        if begin + count > self.length:
            raise ValueError(f"{begin + count} elements are needed, {self.length} are stored")
        index = bisect_right(self._ends, begin)
        while count > 0:
            part = self._parts[index]
            skipped = begin - (self._ends[index] - part.numel)
            taken = min(count, part.numel - skipped)
            if taken:
                yield FileSpan(part.path, part.start + skipped * part.dtype.itemsize, taken)
            begin, count, index = begin + taken, count - taken, index + 1


class BlockReader:
    """Reads lazy tensors block by block through one buffer; keeps files open, fewer than the open-file limit.

    It uses plain reads, not mmap (so not torch.load(mmap=True) either): a file that was truncated, or a disk that
    fails, is then an error that names the file and not a SIGBUS that kills the process, and resident memory does not
    grow with the files.
    """

    def __init__(self) -> None:
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._limit = 1024 if allowed == resource.RLIM_INFINITY else max(8, min(1024, allowed - 64))
        self._open: OrderedDict[Path, FileIO] = OrderedDict()
        self._buffer = bytearray(BLOCK_BYTES)

    def __enter__(self) -> BlockReader:
        return self

    def __exit__(self, *raised: object) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def read_blocks(self, tensor: LazyTensor) -> Iterator[Tensor]:
        """Yield all elements in order as flat tensors of the stored dtype; each is valid until the next is requested.

        8-bit floats are yielded as float32, multiplied by their scale.

        Raises:
            UserError: (MODEL) a file is truncated or cannot be read.
        """
        if tensor.dtype in FLOAT8_DTYPES:
            yield from (block.float() * tensor.scale for block in self._raw_blocks(tensor))
            return
        if tensor.stride is None:
            yield from self._raw_blocks(tensor)
            return
        # A strided tensor is the one case that is read into memory in full: its elements are not in file order.
        memory = torch.cat([block.clone() for block in self._raw_blocks(tensor)])
        yield memory.as_strided(tensor.shape, tensor.stride).reshape(-1)

    def _raw_blocks(self, tensor: LazyTensor) -> Iterator[Tensor]:
        itemsize, filled, view = tensor.dtype.itemsize, 0, memoryview(self._buffer)
        for span in tensor.spans:
            at, left = span.start, span.count * itemsize
            while left:
                size = min(left, len(view) - filled)
                self._fill(span.path, at, view[filled : filled + size])
                filled, at, left = filled + size, at + size, left - size
                if filled == len(view):
                    yield torch.frombuffer(self._buffer, dtype=tensor.dtype, count=filled // itemsize)
                    filled = 0
        if filled:
            yield torch.frombuffer(self._buffer, dtype=tensor.dtype, count=filled // itemsize)

    def _fill(self, path: Path, at: int, view: memoryview) -> None:
        try:
            file = self._file(path)
            file.seek(at)
            while view:
                count = file.readinto(view)
                if not count:
                    raise damaged_error(path, f"it ends before byte {at + len(view)}")
                view = view[count:]
        except OSError as error:
            raise damaged_error(path, str(error)) from error

    def _file(self, path: Path) -> FileIO:
        if path not in self._open:
            if len(self._open) >= self._limit:
                self._open.popitem(last=False)[1].close()
            self._open[path] = FileIO(path)
        self._open.move_to_end(path)
        return self._open[path]


def first_elements(tensor: LazyTensor, count: int) -> Tensor:
    """Read at most the first `count` elements of a tensor, as a flat tensor. Raises UserError (MODEL)."""
    spans, left = [], min(count, sum(span.count for span in tensor.spans))
    for span in tensor.spans:
        spans.append(replace(span, count=min(span.count, left)))
        left -= spans[-1].count
    with BlockReader() as reader:
        parts = [block.clone() for block in reader.read_blocks(replace(tensor, spans=tuple(spans), stride=None))]
    return torch.cat(parts) if parts else torch.empty(0, dtype=tensor.dtype)


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Read the header of a valid safetensors file; return its entries without `__metadata__`, and the data's offset.

    safetensors' own reader checks the file but does not report where in it a tensor starts.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(size))
    entries.pop("__metadata__", None)
    return entries, 8 + size


def read_safetensors(path: Path) -> tuple[LazyTensor, ...]:
    """Locate the tensors of a valid safetensors file. Raises UserError (MODEL) for a dtype unknown to torch."""
    dtypes = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}
    entries, data = read_header(path)
    tensors = []
    for name, entry in entries.items():
        if entry["dtype"] not in dtypes:
            what = f"{name} has the dtype {entry['dtype']}"
            raise UserError(str(path), what, f"use weights in one of the dtypes {', '.join(dtypes)}", MODEL)
        shape, begin = tuple(entry["shape"]), entry["data_offsets"][0]
        span = FileSpan(path, data + begin, prod(shape))
        tensors.append(LazyTensor(name, dtypes[entry["dtype"]], shape, (span,)))
    return tuple(tensors)


def read_folder(folder: Path) -> tuple[LazyTensor, ...]:
    """Locate the tensors of a diffusers folder. Raises UserError (MODEL) if it has none or a file is broken."""
    StoredTensors(folder)  # raises for files that are missing, truncated or outside the folder
    index = folder / f"{WEIGHTS}.safetensors.index.json"
    files = {f"{WEIGHTS}.safetensors"}
    if index.is_file():
        files = set(json.loads(index.read_bytes())["weight_map"].values())
    return tuple(tensor for file in sorted(files) for tensor in read_safetensors(folder / file))


def slice_spans(tensor: LazyTensor, begin: int, count: int) -> Iterator[FileSpan]:
    """Yield the spans of `count` elements from element `begin` on; the tensor has no stride."""
    itemsize = tensor.dtype.itemsize
    for span in tensor.spans:
        skipped = min(begin, span.count)
        taken = min(count, span.count - skipped)
        if taken > 0:
            yield FileSpan(span.path, span.start + skipped * itemsize, taken)
        begin, count = begin - skipped, count - max(taken, 0)


def read_tensor(tensor: LazyTensor) -> Tensor:
    """Read a tensor into memory in its stored dtype, 8-bit floats as float32. Raises UserError (MODEL)."""
    dtype = torch.float32 if tensor.dtype in FLOAT8_DTYPES else tensor.dtype
    flat, at = torch.empty(tensor.numel, dtype=dtype), 0
    with BlockReader() as reader:
        for block in reader.read_blocks(tensor):
            flat[at : at + block.numel()] = block
            at += block.numel()
    return flat.reshape(tensor.shape)
