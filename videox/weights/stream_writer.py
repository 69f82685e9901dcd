"""Serves whoever writes a model larger than the memory: a diffusers folder, one block of one tensor at a time."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from videox.errors import MODEL, NUMERICS, UserError
from videox.weights.lazy_tensor import BLOCK, EIGHT_BITS, SAFETENSORS_DTYPES, Blocks, LazyTensor, header
from videox.weights.safetensors_io import WEIGHTS, few


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor to write and the dtype to write it in.

    Attributes:
        added: returns what is added, in float32, to elements `begin` to `begin + count`; None adds nothing.
    """

    tensor: LazyTensor
    dtype: torch.dtype
    added: Callable[[int, int], Tensor] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.tensor.numel * self.dtype.itemsize


def planned(tensors: Sequence[LazyTensor], dtype: torch.dtype | None, keep_fp32: Sequence[str] = ()) -> list[Planned]:
    """Returns what is to be written: floating tensors in `dtype` or float32, others as they are.

    Args:
        tensors: of a state dict.
        dtype: of the floating tensors; None as they are stored, 8-bit ones as bfloat16.
        keep_fp32: parts of names that stay float32; diffusers compares the whole parts of a name.
    """
    if dtype is None:
        return [Planned(tensor, torch.bfloat16 if tensor.dtype in EIGHT_BITS else tensor.dtype) for tensor in tensors]
    found = []
    for tensor in tensors:
        kept = any(module in tensor.name.split(".") for module in keep_fp32)
        floating = torch.float32 if kept else dtype
        found.append(Planned(tensor, floating if tensor.dtype.is_floating_point else tensor.dtype))
    return found


def _files(tensors: Sequence[Planned], max_shard_size: float, stem: str) -> dict[str, list[Planned]]:
    """Returns the tensors of each file, in order, at most `max_shard_size` bytes or one tensor to a file."""
    shards: list[list[Planned]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    return {f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _header(tensors: Sequence[Planned], metadata: Mapping[str, str]) -> bytes:
    """Returns the beginning of a safetensors file: the header's size (u64) and the header, padded to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": dict(sorted({"format": "pt", **metadata}.items()))}
    end = 0
    for item in tensors:
        begin, end = end, end + item.nbytes
        entries[item.tensor.name] = {
            "dtype": SAFETENSORS_DTYPES[item.dtype],
            "shape": list(item.tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _converted(item: Planned, blocks: Blocks, faults: list[str]) -> Iterator[Tensor]:
    """Yields a tensor's blocks in the dtype to write; notes it as a fault if a value is not finite there.

    Rounding keeps order, so that a block's extremes decide; aminmax hands a NaN on. A buffer may hold infinities.
    """
    sound = True
    for block in _summed(item, blocks):
        if item.dtype == block.dtype and not block.is_floating_point():
            yield block
            continue
        extremes = torch.stack(torch.aminmax(block))
        allowed = ~extremes.isfinite() if item.tensor.buffer else torch.zeros(2, dtype=torch.bool)
        sound = sound and bool((extremes.float().to(item.dtype).isfinite() | allowed).all())
        # By way of float32, as DeepSpeed's script goes: a float64 is rounded twice.
        yield block.float().to(item.dtype) if block.dtype == torch.float64 else block.to(item.dtype)
    if not sound:
        faults.append(item.tensor.name)


def _summed(item: Planned, blocks: Blocks) -> Iterator[Tensor]:
    """Yields a tensor's blocks; where something is added, the sum in float32."""
    if item.added is None:
        yield from blocks.of(item.tensor)
        return
    begin = 0
    for block in blocks.of(item.tensor):
        yield block.float() + item.added(begin, block.numel())
        begin += block.numel()


def _bytes(item: Planned, blocks: Blocks, faults: list[str]) -> Iterator[memoryview]:
    for block in _converted(item, blocks, faults):
        yield block.view(torch.uint8).numpy().data


def write_folder(
    folder: Path,
    tensors: Sequence[Planned],
    *,
    max_shard_size: float,
    with_checksums: bool = False,
    told: Callable[[int], object] = lambda _: None,
    stem: str = WEIGHTS,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, int]:
    """Writes `stem*.safetensors`, and the index that diffusers looks for if there are several.

    Memory: two blocks of 16 MiB, whatever the sizes; a tensor that lies strided in its file, which DeepSpeed and FSDP
    do not write for what they train, is held whole.

    Args:
        folder: exists and is empty.
        tensors: each name once.
        max_shard_size: bytes of tensors per file; a larger tensor has a file of its own.
        with_checksums: compute what check_bytes compares.
        told: called with the bytes of each block that is written.
        stem: of the files' names.
        metadata: for each file's header.

    Returns:
        The checksum (CRC-32) of each tensor's bytes, by name; 0 without them.

    Raises:
        UserError: (NUMERICS) names the tensors that are not finite in their new dtype; (MODEL) a file that is
            read from is cut short.
        OSError: the disk refused.
    """
    faults: list[str] = []
    checksums: dict[str, int] = {}
    weight_map: dict[str, str] = {}
    with Blocks() as blocks:
        for name, shard in _files(tensors, max_shard_size, stem).items():
            ordered = sorted(shard, key=lambda item: -item.dtype.itemsize)  # each starts at a multiple of its itemsize
            with (folder / name).open("xb") as file:
                file.write(_header(ordered, metadata or {}))
                for item in ordered:
                    checksum = 0
                    for data in _bytes(item, blocks, faults):
                        file.write(data)
                        checksum = zlib.crc32(data, checksum) if with_checksums else 0
                        told(data.nbytes)
                    checksums[item.tensor.name] = checksum
            weight_map |= {item.tensor.name: name for item in ordered}
    if faults:
        what = f"{len(faults)} tensor{'s are' if len(faults) > 1 else ' is'} not finite as converted: {few(faults)}"
        raise UserError("weights", what, "convert an earlier checkpoint; this one has diverged", NUMERICS)
    if len(set(weight_map.values())) > 1:
        index = {
            "metadata": {"total_size": sum(item.nbytes for item in tensors)},
            "weight_map": dict(sorted(weight_map.items())),
        }
        text = json.dumps(index, indent=2) + "\n"
        (folder / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")
    return checksums


def check_folder(folder: Path, tensors: Sequence[Planned]) -> None:
    """Opens what was written, as a reader does, and compares names, shapes, dtypes and sizes.

    Raises:
        OSError: something is not as it was written: the disk lost it.
    """
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no mapping
                    piece = file.get_slice(name)
                    found[name] = tuple(piece.get_shape()), piece.get_dtype()
        except SafetensorError as error:
            raise OSError(f"{path.name} cannot be read back: {error}") from error
        entries, data = header(path)
        size = data + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if path.stat().st_size != size:
            raise OSError(f"{path.name} has {path.stat().st_size} bytes where {size} were written")
    wanted = {item.tensor.name: (item.tensor.shape, SAFETENSORS_DTYPES[item.dtype]) for item in tensors}
    if found != wanted:
        other = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise OSError(f"reads back otherwise than it was written: {few(other)}")


def check_bytes(folder: Path, checksums: dict[str, int], told: Callable[[int], object] = lambda _: None) -> None:
    """Reads every byte back and compares it with what was written.

    Raises:
        OSError: something is not as it was written.
    """
    other = []
    for path in folder.glob("*.safetensors"):
        entries, data = header(path)
        with path.open("rb", buffering=0) as file:
            for name, entry in entries.items():
                begin, end = entry["data_offsets"]
                file.seek(data + begin)
                checksum = 0
                while begin < end:
                    block = file.read(min(BLOCK, end - begin))
                    if not block:
                        raise OSError(f"{path.name} ends within {name}")
                    checksum, begin = zlib.crc32(block, checksum), begin + len(block)
                    told(len(block))
                if checksum != checksums[name]:
                    other.append(name)
    if other:
        raise OSError(f"reads back otherwise than it was written: {few(other)}")


def refuse_other_model(tensors: Sequence[Planned], model: dict[str, tuple[int, ...]], origin: str) -> None:
    """Compares names and shapes with those of the model that a config describes.

    Args:
        tensors: what is to be written.
        model: shape of each tensor of the model's state dict.
        origin: of the config, for the message.

    Raises:
        UserError: (MODEL) names what is missing, extra or of another shape.
    """
    shapes = {item.tensor.name: item.tensor.shape for item in tensors}
    faults = [f"{name} is missing" for name in sorted(model.keys() - shapes.keys())]
    faults += [f"{name} is not in the model" for name in sorted(shapes.keys() - model.keys())]
    faults += [
        f"{name} is {list(shapes[name])}, the model has {list(model[name])}"
        for name in sorted(shapes.keys() & model.keys())
        if prod(shapes[name]) != prod(model[name]) or tuple(shapes[name]) != tuple(model[name])
    ]
    if faults:
        raise UserError(origin, f"describes another model: {few(faults)}", "give the right one by --config", MODEL)
