"""Serves whoever puts a model together again: a tensor that lies in pieces in many files, read a block at a time."""

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
from videox.weights.safe_pickle import StoredTensor, damaged
from videox.weights.safetensors_io import WEIGHTS, StoredTensors

BLOCK = 16 * 2**20  # bytes read at a time: small beside any memory, large beside the cost of a read
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
EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)  # read only: what comes out is float32


@dataclass(frozen=True, slots=True)
class FileSpan:
    """Elements that lie one after the other in a file, from byte `start` on."""

    path: Path
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor whose elements, first to last, are those of its runs, first to last.

    Attributes:
        name: in the model's state dict.
        dtype: as stored.
        shape: of the whole tensor.
        runs: together as many elements as the shape has; with a stride, the span of memory that it strides over.
        stride: in elements, where the stored tensor is not contiguous; None otherwise.
        buffer: not trained; it may hold infinities on purpose, as masks do.
        scale: what the stored values of an 8-bit float are to be multiplied by.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    runs: tuple[FileSpan, ...]
    stride: tuple[int, ...] | None = None
    buffer: bool = False
    scale: float = 1.0

    @property
    def numel(self) -> int:
        """Elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Shards:
    """What a checkpoint holds: `kind` in words, its tensors by name, and what the user should hear."""

    kind: str
    tensors: tuple[LazyTensor, ...]
    notes: tuple[str, ...] = ()


def whole(name: str, stored: StoredTensor, *, buffer: bool = False) -> LazyTensor:
    """Returns a tensor that lies in one file."""
    if stored.contiguous:
        runs = (FileSpan(stored.path, stored.start, stored.numel),)
        return LazyTensor(name, stored.dtype, stored.shape, runs, buffer=buffer)
    runs = (FileSpan(stored.path, stored.start, stored.span),)
    return LazyTensor(name, stored.dtype, stored.shape, runs, stored.stride, buffer)


def renamed(tensor: LazyTensor, name: str) -> LazyTensor:
    """Returns the same elements under another name."""
    return replace(tensor, name=name)


class Vector:
    """Flat tensors laid end to end, from which stretches are cut.

    Args:
        parts: one-dimensional, contiguous, of one dtype.
    """

    def __init__(self, parts: Sequence[StoredTensor]) -> None:
        self._parts = parts
        self._ends = list(accumulate(part.numel for part in parts))
        self.length = self._ends[-1] if parts else 0

    def cut(self, begin: int, count: int) -> Iterator[FileSpan]:
        """Yields the runs of `count` elements from element `begin` on. Raises ValueError beyond the end."""
        if begin + count > self.length:
            raise ValueError(f"{begin + count} elements are needed, {self.length} are there")
        index = bisect_right(self._ends, begin)
        while count > 0:
            part = self._parts[index]
            skipped = begin - (self._ends[index] - part.numel)
            taken = min(count, part.numel - skipped)
            if taken:
                yield FileSpan(part.path, part.start + skipped * part.dtype.itemsize, taken)
            begin, count, index = begin + taken, count - taken, index + 1


class Blocks:
    """Reads scattered tensors through one buffer; keeps files open, fewer than the system allows.

    Plain reads, not memory-mapping: a file that ends early or a disk that fails is then an error with a name, and the
    memory of the process does not grow with the files.
    """

    def __init__(self) -> None:
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._limit = 1024 if allowed == resource.RLIM_INFINITY else max(8, min(1024, allowed - 64))
        self._open: OrderedDict[Path, FileIO] = OrderedDict()
        self._buffer = bytearray(BLOCK)

    def __enter__(self) -> Blocks:
        return self

    def __exit__(self, *raised: object) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def of(self, tensor: LazyTensor) -> Iterator[Tensor]:
        """Yields all elements in order as flat tensors of the stored dtype, each valid until the next is asked for.

        8-bit floats come out as float32, multiplied by their scale.

        Raises:
            UserError: (MODEL) a file has been cut short, or cannot be read.
        """
        if tensor.dtype in EIGHT_BITS:
            yield from (block.float() * tensor.scale for block in self._blocks(tensor))
            return
        if tensor.stride is None:
            yield from self._blocks(tensor)
            return
        span = torch.cat([block.clone() for block in self._blocks(tensor)])
        yield span.as_strided(tensor.shape, tensor.stride).reshape(-1)

    def _blocks(self, tensor: LazyTensor) -> Iterator[Tensor]:
        itemsize, filled, view = tensor.dtype.itemsize, 0, memoryview(self._buffer)
        for run in tensor.runs:
            at, left = run.start, run.count * itemsize
            while left:
                size = min(left, len(view) - filled)
                self._fill(run.path, at, view[filled : filled + size])
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
                    raise damaged(path, f"it ends before byte {at + len(view)}")
                view = view[count:]
        except OSError as error:
            raise damaged(path, str(error)) from error

    def _file(self, path: Path) -> FileIO:
        if path not in self._open:
            if len(self._open) >= self._limit:
                self._open.popitem(last=False)[1].close()
            self._open[path] = FileIO(path)
        self._open.move_to_end(path)
        return self._open[path]


def first_elements(tensor: LazyTensor, count: int) -> Tensor:
    """Returns at most the first `count` elements of a tensor, flat, in memory of their own. Raises UserError (MODEL)."""
    runs, left = [], min(count, sum(run.count for run in tensor.runs))
    for run in tensor.runs:
        runs.append(replace(run, count=min(run.count, left)))
        left -= runs[-1].count
    with Blocks() as blocks:
        parts = [block.clone() for block in blocks.of(replace(tensor, runs=tuple(runs), stride=None))]
    return torch.cat(parts) if parts else torch.empty(0, dtype=tensor.dtype)


def header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Returns the header of a sound safetensors file, without its metadata, and the byte at which the data begins."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(size))
    entries.pop("__metadata__", None)
    return entries, 8 + size


def read_file(path: Path) -> tuple[LazyTensor, ...]:
    """Returns the tensors of a sound safetensors file. Raises UserError (MODEL) for a dtype that torch does not have."""
    dtypes = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}
    entries, data = header(path)
    tensors = []
    for name, entry in entries.items():
        if entry["dtype"] not in dtypes:
            what = f"{name} has the dtype {entry['dtype']}"
            raise UserError(str(path), what, f"convert weights of {', '.join(dtypes)}", MODEL)
        shape, begin = tuple(entry["shape"]), entry["data_offsets"][0]
        run = FileSpan(path, data + begin, prod(shape))
        tensors.append(LazyTensor(name, dtypes[entry["dtype"]], shape, (run,)))
    return tuple(tensors)


def read_whole(folder: Path) -> tuple[LazyTensor, ...]:
    """Returns the tensors of a diffusers folder. Raises UserError (MODEL): nothing there, or a broken file."""
    StoredTensors(folder)  # refuses what is missing, cut short or points elsewhere
    index = folder / f"{WEIGHTS}.safetensors.index.json"
    files = {f"{WEIGHTS}.safetensors"}
    if index.is_file():
        files = set(json.loads(index.read_bytes())["weight_map"].values())
    return tuple(tensor for file in sorted(files) for tensor in read_file(folder / file))


def cut(tensor: LazyTensor, begin: int, count: int) -> Iterator[FileSpan]:
    """Yields the runs of `count` elements from element `begin` on of a tensor that lies contiguous in its files."""
    itemsize = tensor.dtype.itemsize
    for run in tensor.runs:
        skipped = min(begin, run.count)
        taken = min(count, run.count - skipped)
        if taken > 0:
            yield FileSpan(run.path, run.start + skipped * itemsize, taken)
        begin, count = begin - skipped, count - max(taken, 0)


def read(tensor: LazyTensor) -> Tensor:
    """Returns a tensor in memory of its own, in its stored dtype; 8-bit floats as float32. Raises UserError (MODEL)."""
    dtype = torch.float32 if tensor.dtype in EIGHT_BITS else tensor.dtype
    found, at = torch.empty(tensor.numel, dtype=dtype), 0
    with Blocks() as blocks:
        for block in blocks.of(tensor):
            found[at : at + block.numel()] = block
            at += block.numel()
    return found.reshape(tensor.shape)
