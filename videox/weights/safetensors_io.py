"""Reads and writes safetensors in diffusers' layout: streaming, sharded, without pickle."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from videox.errors import MODEL, NUMERICS, UserError
from videox.files import mode_of_umask, publish_folder

WEIGHTS = "diffusion_pytorch_model"  # the stem of diffusers' SAFETENSORS_WEIGHTS_NAME
CONFIG = "config.json"
MAX_SHARD_SIZE = 5 * 1000**3  # bytes

NamedTensors = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


# ------------------------------------------------------------------------------------- writing tensors


def _shards(tensors: NamedTensors, max_shard_size: int) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors in order, contiguous on the CPU, in groups of at most `max_shard_size` bytes or one tensor.

    huggingface_hub.split_torch_state_dict_into_shards needs the full state dict; here tensors arrive one at a time and
    at most one shard is in memory.
    """
    pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
    shard: dict[str, Tensor] = {}
    storages: set[int] = set()
    size = 0
    for name, tensor in pairs:
        tensor = tensor.detach().to("cpu").contiguous()
        if shard and size + tensor.nbytes > max_shard_size:
            yield shard
            shard, storages, size = {}, set(), 0
        if name in shard:
            raise ValueError(f"tensor {name} is given twice")
        # save_file refuses tensors that share memory, such as tied weights and shared lookup tables.
        shard[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in storages else tensor
        storages.add(tensor.untyped_storage().data_ptr())
        size += tensor.nbytes
    yield shard


def _save_file(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> None:
    with mode_of_umask(path):
        save_file(tensors, path, metadata={"format": "pt", **metadata})
        if metadata:
            sort_metadata(path)


def sort_metadata(path: Path) -> None:
    """Sort a header's metadata in place: save_file writes it in random order, so equal saves would differ."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(size))
        entries["__metadata__"] = dict(sorted(entries["__metadata__"].items()))
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > size:
            raise OSError(f"{path.name} has a header of {size} bytes, {len(text)} are needed")
        file.seek(8)
        file.write(text.ljust(size))


def save_tensors(
    folder: Path,
    tensors: NamedTensors,
    *,
    stem: str = WEIGHTS,
    max_shard_size: int = MAX_SHARD_SIZE,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `stem.safetensors`, or shards `stem-00001-of-0000N.safetensors` with `stem.safetensors.index.json`.

    An iterable is consumed to its end even after a write has failed: it may gather each tensor from all ranks, and a
    rank that stops iterating would leave the others waiting in the collective.

    Args:
        folder: folder to write to; created if absent. It must not contain files of this stem: stale shards would be
            loaded together with the new ones.
        tensors: names with tensors of any dtype, device and stride, as a mapping or an iterable of pairs.
        stem: file name without suffix.
        max_shard_size: bytes of tensors per file; a larger tensor gets its own file. At most this and one tensor are
            in memory at a time.
        metadata: fields of each file's header.

    Raises:
        OSError or SafetensorError: the first failed write; the folder is then incomplete and must be deleted.
        ValueError: a name is given twice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stale = sorted(path.name for path in folder.glob(f"{stem}*.safetensors*"))
    if stale:
        raise FileExistsError(f"{folder} already contains {stale[0]}")
    shard_paths: list[Path] = []
    weight_map: dict[str, int] = {}
    total_size = 0
    failure: OSError | SafetensorError | None = None
    for number, shard in enumerate(_shards(tensors, max_shard_size)):
        if duplicates := weight_map.keys() & shard.keys():
            raise ValueError(f"tensor {min(duplicates)} is given twice")
        weight_map |= dict.fromkeys(shard, number)
        total_size += sum(tensor.nbytes for tensor in shard.values())
        shard_paths.append(folder / f"{stem}.part-{number:05d}")
        try:
            if failure is None:
                _save_file(shard_paths[-1], shard, metadata or {})
        except (OSError, SafetensorError) as error:
            failure = error
    if failure is not None:
        raise failure
    count = len(shard_paths)  # known only now, so that shards get their final names here
    names = [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    if count == 1:
        names = [f"{stem}.safetensors"]
    for path, name in zip(shard_paths, names, strict=True):
        path.rename(folder / name)
    if count > 1:
        write_index(folder, stem, {name: names[number] for name, number in weight_map.items()}, total_size)


def write_index(folder: Path, stem: str, weight_map: Mapping[str, str], total_size: int) -> None:
    """Write the index of a sharded model, which diffusers and transformers read.

    Args:
        folder: folder of the shards.
        stem: file name of the shards without suffix.
        weight_map: file name of each tensor.
        total_size: bytes of all tensors.
    """
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def save_weights(
    folder: Path,
    tensors: NamedTensors,
    config: Mapping[str, Any] | str,
    *,
    max_shard_size: int = MAX_SHARD_SIZE,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a model folder that the `from_pretrained` of its diffusers class loads: config.json and safetensors.

    Args:
        folder: folder to write to; created if absent, without weights of an earlier save.
        tensors: the state dict, as a mapping or an iterable of pairs (see save_tensors).
        config: the model's `to_json_string()`, or the same as a mapping (with `_class_name`). The path the model was
            loaded from is left out, so that a checkpoint can be moved.
        max_shard_size: bytes of tensors per file.
        metadata: fields of each file's header.

    Raises:
        OSError or SafetensorError: the first failed write.
    """
    save_tensors(folder, tensors, max_shard_size=max_shard_size, metadata=metadata)
    write_config(folder, config)


def write_config(folder: Path, config: Mapping[str, Any] | str) -> None:
    """Write config.json into a folder, without the path the model was loaded from."""
    plain = dict(json.loads(config) if isinstance(config, str) else config)
    plain.pop("_name_or_path", None)
    (folder / CONFIG).write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------- reading tensors


class TensorSource(Mapping[str, Tensor]):
    """A model's tensors by name, in files below `folder`; each is read when it is accessed."""

    folder: Path

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all tensors, by name, without reading them."""
        return {name: self.shape(name) for name in self}


class StoredTensors(TensorSource):
    """The tensors of one stem in a folder, by name: memory-mapped, each read when it is accessed.

    Args:
        folder: folder that save_tensors or diffusers wrote.
        stem: file name without suffix.

    Raises:
        UserError: (MODEL) there are no such tensors, or a file is missing, truncated or not safetensors.
    """

    def __init__(self, folder: Path, stem: str = WEIGHTS) -> None:
        self.folder = folder
        self._file_of: dict[str, Any] = {}
        for path in _files(folder, stem):
            try:
                handle = safe_open(path, framework="pt")
                self._file_of |= dict.fromkeys(handle.keys(), handle)
            except (OSError, SafetensorError) as error:
                raise _unreadable(path, str(error)) from error

    def __getitem__(self, name: str) -> Tensor:
        return self._file_of[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor from the file's header."""
        return tuple(self._file_of[name].get_slice(name).get_shape())


def _unreadable(path: Path, cause: str) -> UserError:
    return UserError(str(path), f"cannot be read ({cause})", "restore the file, or use another folder", MODEL)


def _files(folder: Path, stem: str) -> list[Path]:
    """List the safetensors files of a stem, from the index if there is one. Raises UserError (MODEL)."""
    index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            strays = [name for name in names if Path(name).name != name]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _unreadable(index, f"{type(error).__name__}: {error}") from error
        if strays:
            raise _unreadable(index, f"it points outside its folder, to {strays[0]!r}")
        return [folder / name for name in names]
    if single.is_file():
        return [single]
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
    what = f"has no {stem}.safetensors (found: {found or 'nothing'})"
    raise UserError(str(folder), what, "use a folder in diffusers layout", MODEL)


def join_first(items: Sequence[str]) -> str:
    """Join the first five items for a message, and the count of the others."""
    return "; ".join(items[:5]) + (f"; and {len(items) - 5} more" if len(items) > 5 else "")


def _differences(stored: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    missing = [f"{name} is missing" for name in sorted(wanted.keys() - stored.keys())]
    return missing + [f"{name} is not in the model" for name in sorted(stored.keys() - wanted.keys())]


def load_weights(
    folder: Path, target: nn.Module | Mapping[str, Tensor], *, strict: bool = True, stem: str = WEIGHTS
) -> list[str]:
    """Copy a folder's weights into existing tensors, in place, cast to their dtype (exact if the dtypes are equal).

    Names and shapes are compared before the first value is copied, so a failed load changes nothing.

    Args:
        folder: folder in diffusers layout, one file or sharded.
        target: a module, or its tensors by name.
        strict: raise for missing or extra tensors; otherwise they are returned.
        stem: file name without suffix.

    Returns:
        The ignored differences, one sentence each (empty if strict).

    Raises:
        UserError: (MODEL) tensors are missing, extra or of another shape, or a file is broken.
        ValueError: a target tensor is on the meta device.
    """
    wanted = target.state_dict() if isinstance(target, nn.Module) else target
    stored = StoredTensors(folder, stem)
    differences = _differences(stored, wanted)
    common = [name for name in wanted if name in stored]
    mismatched = [
        f"{name} is {list(stored.shape(name))}, the model has {list(wanted[name].shape)}"
        for name in common
        if stored.shape(name) != tuple(wanted[name].shape)
    ]
    errors = mismatched + (differences if strict else [])
    if errors:
        raise UserError(str(folder), join_first(errors), "use weights and config of the same model", MODEL)
    with torch.no_grad():
        for name in common:
            if wanted[name].is_meta:
                raise ValueError(f"{name} is on the meta device")
            wanted[name].copy_(stored[name])
    return differences


# ---------------------------------------------------------------------------------------------- export


def _cast(tensors: NamedTensors, dtype: torch.dtype, keep_fp32: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
        if tensor.is_floating_point():
            # diffusers compares whole components of a name at load time (load_model_dict_into_meta).
            is_fp32 = any(module in name.split(".") for module in keep_fp32)
            tensor = tensor.detach().to(torch.float32 if is_fp32 else dtype)
            if not torch.isfinite(tensor).all():
                what = f"has values that are not finite in {str(tensor.dtype).removeprefix('torch.')}"
                raise UserError(name, what, "export an earlier checkpoint", NUMERICS)
        yield name, tensor


def export_transformer(
    state: NamedTensors,
    config: Mapping[str, Any] | str,
    folder: Path,
    dtype: torch.dtype,
    keep_fp32: Sequence[str] = (),
    *,
    max_shard_size: int = MAX_SHARD_SIZE,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write trained weights for inference: the values that `from_pretrained(torch_dtype=dtype)` of them would load.

    Args:
        state: state dict; floating-point tensors are cast, others are unchanged.
        config: as for save_weights.
        folder: the diffusers folder to create; it appears atomically, and an existing one is renamed.
        dtype: dtype of the floating-point tensors.
        keep_fp32: names of modules that stay float32, e.g. the class's `_keep_in_fp32_modules`.
        max_shard_size: bytes of tensors per file.
        metadata: fields of each file's header.

    Raises:
        UserError: (NUMERICS) a tensor is not finite in its dtype; nothing is written.
        SaveError: a file cannot be written; nothing is left behind.
    """
    cast = _cast(state, dtype, keep_fp32)
    publish_folder(
        folder,
        lambda temporary: save_weights(temporary, cast, config, max_shard_size=max_shard_size, metadata=metadata),
    )
