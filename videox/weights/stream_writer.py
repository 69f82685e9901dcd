"""Streaming writer of safetensors: models larger than the memory, one block of one tensor at a time."""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.serialization import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from torch import Tensor

from videox.errors import MODEL, NUMERICS, UserError
from videox.weights.lazy_tensor import (
    BLOCK_BYTES,
    FLOAT8_DTYPES,
    SAFETENSORS_DTYPES,
    BlockReader,
    LazyTensor,
    read_header,
)
from videox.weights.safetensors_io import WEIGHTS, join_first, write_index


@dataclass(frozen=True, slots=True)
class TensorToWrite:
    """A tensor to write and the dtype to write it in.

    Attributes:
        tensor: the source.
        dtype: dtype in the new file.
        delta: called as delta(begin, count), returns the float32 values to add to elements `begin` to
            `begin + count` (a merged LoRA); None adds nothing.
    """

    tensor: LazyTensor
    dtype: torch.dtype
    delta: Callable[[int, int], Tensor] | None = None

    @property
    def nbytes(self) -> int:
        """Size in the new file, in bytes."""
        return self.tensor.numel * self.dtype.itemsize


def plan_tensors(
    tensors: Sequence[LazyTensor], dtype: torch.dtype | None, keep_fp32: Sequence[str] = ()
) -> list[TensorToWrite]:
    """Choose the dtype to write each tensor in; integer and bool tensors keep theirs.

    Args:
        tensors: tensors of a state dict.
        dtype: dtype of the floating-point tensors; None keeps their own, and bfloat16 for 8-bit floats.
        keep_fp32: names of modules whose tensors stay float32; diffusers compares whole components of a name.
    """
    if dtype is None:
        return [
            TensorToWrite(tensor, torch.bfloat16 if tensor.dtype in FLOAT8_DTYPES else tensor.dtype)
            for tensor in tensors
        ]
    planned = []
    for tensor in tensors:
        is_fp32 = any(module in tensor.name.split(".") for module in keep_fp32)
        floating = torch.float32 if is_fp32 else dtype
        planned.append(TensorToWrite(tensor, floating if tensor.dtype.is_floating_point else tensor.dtype))
    return planned


def _shards(tensors: Sequence[TensorToWrite], max_shard_size: int | None, stem: str) -> dict[str, list[TensorToWrite]]:
    """Distribute tensors over files, in order: at most `max_shard_size` bytes per file, or one larger tensor."""
    by_name = {item.tensor.name: item for item in tensors}
    split = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda item: item.nbytes,
        filename_pattern=f"{stem}{{suffix}}.safetensors",
        max_shard_size=sys.maxsize if max_shard_size is None else max_shard_size,
    )
    return {file: [by_name[name] for name in names] for file, names in split.filename_to_tensors.items()}


def _header(tensors: Sequence[TensorToWrite], metadata: Mapping[str, str]) -> bytes:
    """Build the start of a safetensors file: the header's size (u64), then the header padded to 8 bytes.

    safetensors' own writer needs every tensor of the file in memory at once.
    """
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


def _converted_blocks(item: TensorToWrite, reader: BlockReader, non_finite: list[str]) -> Iterator[Tensor]:
    """Yield a tensor's blocks in the dtype to write; append its name to `non_finite` if a value overflows or is NaN.

    Rounding is monotonic, so checking the minimum and maximum of a block is enough, and aminmax propagates NaN. A
    buffer may contain infinities.
    """
    finite = True
    for block in _summed_blocks(item, reader):
        if item.dtype == block.dtype and not block.is_floating_point():
            yield block
            continue
        extremes = torch.stack(torch.aminmax(block))
        allowed = ~extremes.isfinite() if item.tensor.buffer else torch.zeros(2, dtype=torch.bool)
        finite = finite and bool((extremes.float().to(item.dtype).isfinite() | allowed).all())
        # float64 is converted through float32, so rounded twice, as DeepSpeed's zero_to_fp32 script does.
        yield block.float().to(item.dtype) if block.dtype == torch.float64 else block.to(item.dtype)
    if not finite:
        non_finite.append(item.tensor.name)


def _summed_blocks(item: TensorToWrite, reader: BlockReader) -> Iterator[Tensor]:
    """Yield a tensor's blocks; with a delta, their sum with it in float32."""
    if item.delta is None:
        yield from reader.read_blocks(item.tensor)
        return
    begin = 0
    for block in reader.read_blocks(item.tensor):
        yield block.float() + item.delta(begin, block.numel())
        begin += block.numel()


def _byte_blocks(item: TensorToWrite, reader: BlockReader, non_finite: list[str]) -> Iterator[memoryview]:
    for block in _converted_blocks(item, reader, non_finite):
        yield block.view(torch.uint8).numpy().data


def write_folder(
    folder: Path,
    tensors: Sequence[TensorToWrite],
    *,
    max_shard_size: int | None,
    with_checksums: bool = False,
    on_progress: Callable[[int], object] = lambda _: None,
    stem: str = WEIGHTS,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, int]:
    """Write `stem*.safetensors`, and with several files the index that diffusers reads.

    Memory: two blocks of 16 MiB for models of any size. Only a tensor that is strided in its source file, which
    DeepSpeed and FSDP do not write for trainable parameters, is read into memory in full.

    Args:
        folder: an existing empty folder.
        tensors: tensors to write; each name occurs once.
        max_shard_size: bytes of tensors per file; a larger tensor gets its own file. None writes one file.
        with_checksums: compute the checksums that check_bytes compares.
        on_progress: called with the number of bytes of each block that was written.
        stem: file name without suffix.
        metadata: fields of each file's header.

    Returns:
        The checksum (CRC-32) of each tensor's bytes, by name; 0 without `with_checksums`.

    Raises:
        UserError: (NUMERICS) tensors are not finite in their new dtype; (MODEL) a source file is truncated.
        OSError: a file cannot be written.
    """
    non_finite: list[str] = []
    checksums: dict[str, int] = {}
    weight_map: dict[str, str] = {}
    with BlockReader() as reader:
        for name, shard in _shards(tensors, max_shard_size, stem).items():
            ordered = sorted(shard, key=lambda item: -item.dtype.itemsize)  # aligns each tensor
            with (folder / name).open("xb") as file:
                file.write(_header(ordered, metadata or {}))
                for item in ordered:
                    checksum = 0
                    for data in _byte_blocks(item, reader, non_finite):
                        file.write(data)
                        checksum = zlib.crc32(data, checksum) if with_checksums else 0
                        on_progress(data.nbytes)
                    checksums[item.tensor.name] = checksum
            weight_map |= {item.tensor.name: name for item in ordered}
    if non_finite:
        count = f"{len(non_finite)} tensor{'s are' if len(non_finite) > 1 else ' is'}"
        what = f"{count} not finite after conversion: {join_first(non_finite)}"
        raise UserError("weights", what, "use an earlier checkpoint, from before training diverged", NUMERICS)
    if len(set(weight_map.values())) > 1:
        write_index(folder, stem, weight_map, sum(item.nbytes for item in tensors))
    return checksums


def check_folder(folder: Path, tensors: Sequence[TensorToWrite]) -> None:
    """Open the written files with safetensors and compare names, shapes, dtypes and file sizes.

    Raises:
        OSError: something differs from what was written: the disk lost data.
    """
    stored: dict[str, tuple[tuple[int, ...], str]] = {}
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                    piece = file.get_slice(name)
                    stored[name] = tuple(piece.get_shape()), piece.get_dtype()
        except SafetensorError as error:
            raise OSError(f"{path.name} cannot be read back: {error}") from error
        entries, data = read_header(path)
        size = data + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if path.stat().st_size != size:
            raise OSError(f"{path.name} has {path.stat().st_size} bytes, {size} were written")
    wanted = {item.tensor.name: (item.tensor.shape, SAFETENSORS_DTYPES[item.dtype]) for item in tensors}
    if stored != wanted:
        differing = sorted(name for name in wanted.keys() | stored.keys() if wanted.get(name) != stored.get(name))
        raise OSError(f"differs from what was written: {join_first(differing)}")


def check_bytes(
    folder: Path, checksums: dict[str, int], on_progress: Callable[[int], object] = lambda _: None
) -> None:
    """Read every byte back and compare the checksums with those of what was written.

    Raises:
        OSError: a tensor's bytes differ from what was written.
    """
    differing = []
    for path in folder.glob("*.safetensors"):
        entries, data = read_header(path)
        with path.open("rb", buffering=0) as file:
            for name, entry in entries.items():
                begin, end = entry["data_offsets"]
                file.seek(data + begin)
                checksum = 0
                while begin < end:
                    block = file.read(min(BLOCK_BYTES, end - begin))
                    if not block:
                        raise OSError(f"{path.name} ends within {name}")
                    checksum, begin = zlib.crc32(block, checksum), begin + len(block)
                    on_progress(len(block))
                if checksum != checksums[name]:
                    differing.append(name)
    if differing:
        raise OSError(f"differs from what was written: {join_first(differing)}")


def refuse_other_model(tensors: Sequence[TensorToWrite], model: dict[str, tuple[int, ...]], origin: str) -> None:
    """Compare names and shapes with those of the model that a config describes.

    Args:
        tensors: the tensors to write.
        model: shape of each tensor in the model's state dict.
        origin: path of the config, for the message.

    Raises:
        UserError: (MODEL) tensors are missing, extra or of another shape.
    """
    shapes = {item.tensor.name: item.tensor.shape for item in tensors}
    differences = [f"{name} is missing" for name in sorted(model.keys() - shapes.keys())]
    differences += [f"{name} is not in the model" for name in sorted(shapes.keys() - model.keys())]
    differences += [
        f"{name} is {list(shapes[name])}, the model has {list(model[name])}"
        for name in sorted(shapes.keys() & model.keys())
        if prod(shapes[name]) != prod(model[name]) or tuple(shapes[name]) != tuple(model[name])
    ]
    if differences:
        what = f"describes another model: {join_first(differences)}"
        raise UserError(origin, what, "pass the config.json of the trained model with --config", MODEL)
