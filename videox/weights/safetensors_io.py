"""Serves whoever keeps tensors: weights as safetensors in diffusers' layout, whole or absent, nothing pickled."""

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
from videox.files import publish_folder

WEIGHTS = "diffusion_pytorch_model"  # the stem of diffusers' SAFETENSORS_WEIGHTS_NAME
CONFIG = "config.json"
MAX_SHARD_SIZE = 5 * 1000**3  # bytes

NamedTensors = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


# ------------------------------------------------------------------------------------- writing tensors


def _shards(tensors: NamedTensors, max_shard_size: int) -> Iterator[dict[str, Tensor]]:
    """Yields the tensors in order, contiguous on the CPU, grouped to at most `max_shard_size` bytes or to one."""
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
        # safetensors refuses two names over one memory, which tied weights and shared look-up tables are.
        shard[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in storages else tensor
        storages.add(tensor.untyped_storage().data_ptr())
        size += tensor.nbytes
    yield shard


def _save_file(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file with the permissions of the user's umask; safetensors alone makes it 0600."""
    path.touch(exist_ok=False)
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt", **metadata})
    if metadata:
        sort_metadata(path)
    path.chmod(mode)


def sort_metadata(path: Path) -> None:
    """Puts a header's metadata in order: safetensors writes another one each time, and equal saves would differ."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(size))
        entries["__metadata__"] = dict(sorted(entries["__metadata__"].items()))
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > size:
            raise OSError(f"{path.name} has a header of {size} bytes where {len(text)} are needed")
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
    """Writes `stem.safetensors`, or shards `stem-00001-of-0000N.safetensors` with `stem.safetensors.index.json`.

    An iterable is consumed to its end even after a write has failed: it may gather each tensor from all processes, and
    a process that stopped asking would leave the others waiting.

    Args:
        folder: where to write; made if absent. It must hold no file of this stem, since stale shards would be loaded.
        tensors: names with tensors of any dtype, device and stride, as a mapping or one by one.
        stem: file name without suffix.
        max_shard_size: bytes of tensors per file; a larger tensor has a file of its own. At most this and one tensor
            are held at a time.
        metadata: for each file's header.

    Raises:
        OSError or SafetensorError: the first failure to write (the folder is then to be dropped).
        ValueError: a name is given twice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stale = sorted(path.name for path in folder.glob(f"{stem}*.safetensors*"))
    if stale:
        raise FileExistsError(f"{folder} already holds {stale[0]}")
    parts: list[Path] = []
    weight_map: dict[str, int] = {}
    total_size = 0
    failure: OSError | SafetensorError | None = None
    for number, shard in enumerate(_shards(tensors, max_shard_size)):
        twice = weight_map.keys() & shard.keys()
        if twice:
            raise ValueError(f"tensor {min(twice)} is given twice")
        weight_map |= dict.fromkeys(shard, number)
        total_size += sum(tensor.nbytes for tensor in shard.values())
        parts.append(folder / f"{stem}.part-{number:05d}")
        try:
            if failure is None:
                _save_file(parts[-1], shard, metadata or {})
        except (OSError, SafetensorError) as error:
            failure = error
    if failure is not None:
        raise failure
    names = [f"{stem}-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    if len(parts) == 1:
        names = [f"{stem}.safetensors"]
    for part, name in zip(parts, names, strict=True):
        part.rename(folder / name)
    if len(parts) > 1:
        index = {
            "metadata": {"total_size": total_size},
            "weight_map": {name: names[number] for name, number in sorted(weight_map.items())},
        }
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def save_weights(
    folder: Path,
    tensors: NamedTensors,
    config: Mapping[str, Any] | str,
    *,
    max_shard_size: int = MAX_SHARD_SIZE,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a model folder that the `from_pretrained` of its diffusers class loads: config.json and safetensors.

    Args:
        folder: where to write; made if absent, without weights of an earlier save.
        tensors: the state dict, as a mapping or one by one (see save_tensors).
        config: the model's `to_json_string()`, or the same as a mapping (with `_class_name`). The path that the model
            once came from is left out: a checkpoint must be movable.
        max_shard_size: bytes per file.
        metadata: for each file's header.

    Raises:
        OSError or SafetensorError: the first failure to write.
    """
    save_tensors(folder, tensors, max_shard_size=max_shard_size, metadata=metadata)
    write_config(folder, config)


def write_config(folder: Path, config: Mapping[str, Any] | str) -> None:
    """Writes config.json into a folder, without the path that the model once came from."""
    plain = dict(json.loads(config) if isinstance(config, str) else config)
    plain.pop("_name_or_path", None)
    (folder / CONFIG).write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------- reading tensors


class TensorSource(Mapping[str, Tensor]):
    """A model's tensors by name, in files below `folder`, each read when it is asked for."""

    folder: Path

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor, without reading it."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of all tensors, by name, without reading them."""
        return {name: self.shape(name) for name in self}


class StoredTensors(TensorSource):
    """The tensors of one stem in a folder, by name: memory-mapped, each read when it is asked for.

    Args:
        folder: what save_tensors or diffusers wrote.
        stem: file name without suffix.

    Raises:
        UserError: (MODEL) there are no such tensors, or a file is missing, cut short or not safetensors.
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
        """Returns the shape of a tensor from the file's header, without reading it."""
        return tuple(self._file_of[name].get_slice(name).get_shape())


def _unreadable(path: Path, cause: str) -> UserError:
    return UserError(str(path), f"cannot be read ({cause})", "restore the file, or name another folder", MODEL)


def _files(folder: Path, stem: str) -> list[Path]:
    """Returns the safetensors files of a stem; those of the index where there is one. Raises UserError (MODEL)."""
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
    raise UserError(
        str(folder), f"has no {stem}.safetensors (found: {found or 'nothing'})", "name a diffusers folder", MODEL
    )


def few(faults: Sequence[str]) -> str:
    """Returns the first five faults in one sentence, with the count of the rest."""
    return "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")


def _differences(stored: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    missing = [f"{name} is missing" for name in sorted(wanted.keys() - stored.keys())]
    return missing + [f"{name} is not in the model" for name in sorted(stored.keys() - wanted.keys())]


def load_weights(
    folder: Path, target: nn.Module | Mapping[str, Tensor], *, strict: bool = True, stem: str = WEIGHTS
) -> list[str]:
    """Copies a folder's weights into existing tensors, in place; the dtype of these wins (equal dtypes: exact).

    Names and shapes are compared before the first value is copied, so a refused folder changes nothing.

    Args:
        folder: diffusers layout, whole or sharded.
        target: a module, or its tensors by name.
        strict: refuse a missing or extra tensor; otherwise they are returned.
        stem: file name without suffix.

    Returns:
        The differences that were passed over, one sentence each (none if strict).

    Raises:
        UserError: (MODEL) names the tensors that are missing, extra or of another shape, or the file that is broken.
        ValueError: a target tensor has no memory to copy into (meta device).
    """
    wanted = target.state_dict() if isinstance(target, nn.Module) else target
    stored = StoredTensors(folder, stem)
    differences = _differences(stored, wanted)
    common = [name for name in wanted if name in stored]
    wrong = [
        f"{name} is {list(stored.shape(name))}, the model has {list(wanted[name].shape)}"
        for name in common
        if stored.shape(name) != tuple(wanted[name].shape)
    ]
    refused = wrong + (differences if strict else [])
    if refused:
        hint = "use the weights and the config of one and the same model"
        raise UserError(str(folder), few(refused), hint, MODEL)
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
            # diffusers compares the whole parts of a name, at load (load_model_dict_into_meta).
            kept = any(module in name.split(".") for module in keep_fp32)
            tensor = tensor.detach().to(torch.float32 if kept else dtype)
            if not torch.isfinite(tensor).all():
                kind = str(tensor.dtype).removeprefix("torch.")
                raise UserError(
                    name, f"has values that are not finite in {kind}", "export an earlier checkpoint", NUMERICS
                )
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
    """Writes trained weights for use: what `from_pretrained(torch_dtype=dtype)` of the float32 folder would hold.

    Args:
        state: state dict; floating tensors are cast, others kept as they are.
        config: as for save_weights.
        folder: the diffusers folder to make; whole or absent, an existing one is moved aside.
        dtype: of the floating tensors.
        keep_fp32: parts of names that stay float32, e.g. the class's `_keep_in_fp32_modules`.
        max_shard_size: bytes per file.
        metadata: for each file's header.

    Raises:
        UserError: (NUMERICS) a tensor is not finite in its dtype; nothing is written.
        SaveError: the disk refused; nothing is left behind.
    """
    cast = _cast(state, dtype, keep_fp32)
    publish_folder(
        folder, lambda made: save_weights(made, cast, config, max_shard_size=max_shard_size, metadata=metadata)
    )
