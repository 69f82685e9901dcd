"""Serves whoever opens a checkpoint that others wrote: pickles and torch archives are read without running anything.

A pickle is a program: it names functions and calls them. Here a name stands for a plain value, for one of the four
functions that describe a tensor or the member of an enumeration, or for an inert Record, and every name that is not in
the tables below ends the read. No library unpickles anything: what comes out is built by this module alone. Tensors
stay in their file and are described by where they lie.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any, NoReturn, cast

import torch

from videox.errors import MODEL, UserError

PLAIN: Mapping[str, Any] = {
    "builtins.set": set,
    "builtins.dict": dict,
    "builtins.list": list,
    "__builtin__.set": set,  # as protocol 2 spells it
    "collections.OrderedDict": OrderedDict,
    "collections.defaultdict": defaultdict,
    "torch.Size": tuple,
    **{
        f"torch.{name}": getattr(torch, name)
        for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    },
}
STORAGES: Mapping[str, torch.dtype] = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
# What DeepSpeed, torch.distributed.checkpoint and a script's own state put beside the tensors.
INERT = frozenset(
    [
        "argparse.Namespace",
        "_codecs.encode",
        "pathlib.PosixPath",
        "pathlib.WindowsPath",
        "pathlib._local.PosixPath",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.runtime.zero.offload_config.OffloadDeviceEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
        "numpy.dtype",
        "numpy.ndarray",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar",
        "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray._reconstruct",
        "torch.Tensor",
        "torch.device",
        "torch.nn.parameter.Parameter",
        "torch.serialization._get_layout",
        "torch.distributed.checkpoint.filesystem._StorageInfo",
        "torch.distributed.checkpoint.metadata.BytesStorageMetadata",
        "torch.distributed.checkpoint.metadata.ChunkStorageMetadata",
        "torch.distributed.checkpoint.metadata.Metadata",
        "torch.distributed.checkpoint.metadata.MetadataIndex",
        "torch.distributed.checkpoint.metadata.StorageMeta",
        "torch.distributed.checkpoint.metadata.TensorProperties",
        "torch.distributed.checkpoint.metadata.TensorStorageMetadata",
        "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
    ]
)
# Bytes that are no pickle may raise nearly anything while they are read, as Python's manual of the module says.
DAMAGE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    MemoryError,
    RuntimeError,  # by zipfile, for a member that is encrypted, or compressed in a way it does not know
)


class Record:
    """Stands for an object of a class that is not loaded: what it was made with, and the state it was given."""

    name = ""
    arguments: tuple[Any, ...] = ()
    state: Any = None  # of a dataclass: its fields by name

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __setitem__(self, key: object, value: object) -> None:
        """Takes an entry of a mapping's subclass, and forgets it."""

    def append(self, item: object) -> None:
        """Takes an item of a list's subclass, and forgets it."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that lies in a file: byte of its first element, dtype, shape, and strides in elements."""

    path: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements."""
        return prod(self.shape)

    @property
    def span(self) -> int:
        """Elements from the first to the last in the file, both counted."""
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))

    @property
    def contiguous(self) -> bool:
        """Whether the elements lie one after the other in the order of the last dimension first."""
        expected = 1
        for size, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and step != expected:
                return self.numel == 0
            expected *= size
        return True


@dataclass(frozen=True, slots=True)
class _Storage:
    start: int
    dtype: torch.dtype
    count: int


class _Reader(pickle.Unpickler):
    """Unpickles by the tables above.

    Functions are bound methods, and a class is made anew for each mention: no pickle changes what the next one finds.
    """

    def __init__(self, stream: io.BufferedIOBase, path: Path, members: Mapping[str, tuple[int, int]]) -> None:
        super().__init__(stream)
        self._path, self._members = path, members

    def find_class(self, module: str, name: str) -> object:
        full = f"{module}.{name}"
        if full in PLAIN:
            return PLAIN[full]
        if full in STORAGES:
            return STORAGES[full]
        rebuild = {
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_parameter": self._parameter,
            "torch._tensor._rebuild_from_type_v2": self._from_type,
            **dict.fromkeys(("builtins.getattr", "__builtin__.getattr"), self._member),
        }
        if full in rebuild:
            return rebuild[full]
        if full in INERT:
            return type("Record", (Record,), {"name": full})
        self._refuse_name(full)

    def _refuse_name(self, full: str) -> NoReturn:
        _refuse(self._path, f"its pickle names {full}, which no checkpoint of tensors needs; nothing of it was run")

    def _member(self, kind: object, name: object) -> Record:
        """Stands for getattr, by which early Pythons 3.11 pickle an enumeration's member: nothing is looked up."""
        if not (isinstance(kind, type) and issubclass(kind, Record) and isinstance(name, str)):
            self._refuse_name("builtins.getattr of something else")
        return kind(name)

    def persistent_load(self, pid: tuple[str, torch.dtype, str, str, int]) -> _Storage:
        kind, dtype, key, _, count = pid
        start, size = self._members[str(key)]
        if kind != "storage" or not isinstance(dtype, torch.dtype) or count * dtype.itemsize > size:
            raise ValueError(f"storage {key!r} has {size} bytes for {count} elements of {dtype}")
        return _Storage(start, dtype, count)

    def _tensor(
        self, storage: _Storage, offset: int, shape: Sequence[int], stride: Sequence[int], *_: object
    ) -> StoredTensor:
        itemsize = storage.dtype.itemsize
        tensor = StoredTensor(
            self._path, storage.start + offset * itemsize, storage.dtype, tuple(shape), tuple(stride)
        )
        if min(offset, *shape, *stride, 0) < 0 or (tensor.numel and offset + tensor.span > storage.count):
            raise ValueError(f"a tensor of {list(shape)} reaches beyond its storage")
        return tensor

    def _parameter(self, tensor: StoredTensor, *_: object) -> StoredTensor:
        return tensor

    def _from_type(
        self, rebuild: Callable[..., StoredTensor], kind: object, arguments: Sequence[object], state: object
    ) -> StoredTensor:
        del kind, state
        return rebuild(*arguments)


def _refuse(path: Path, what: str) -> NoReturn:
    raise UserError(str(path), what, "use a checkpoint from somebody you trust, or save it again", MODEL)


def damaged(path: Path, cause: str) -> UserError:
    """Returns the refusal of a file that cannot be read."""
    return UserError(
        str(path), f"is damaged or cut short ({cause})", "copy the file again, or take another save", MODEL
    )


def read_pickle(path: Path) -> Record:
    """Returns the object in a bare pickle, the `.metadata` of torch.distributed.checkpoint.

    Raises:
        UserError: (MODEL) it names something that is not on the list, or it is no whole pickle.
    """
    try:
        with path.open("rb") as stream:
            found = _Reader(stream, path, {}).load()
            if not isinstance(found, Record):
                raise TypeError(f"it holds a {type(found).__name__}")
            return found
    except DAMAGE as error:
        raise damaged(path, f"{type(error).__name__}: {error}") from error


class _Window(io.RawIOBase):
    """A part of an open file as a file of its own; `stream` is unbuffered."""

    def __init__(self, stream: io.FileIO, start: int, length: int) -> None:
        super().__init__()
        self._stream, self._start, self._length, self._at = stream, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence] + offset)
        return self._at

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._at)]
        self._stream.seek(self._start + self._at)
        count = self._stream.readinto(view)
        self._at += count
        return count


def _members(stream: IO[bytes], archive: zipfile.ZipFile, start: int) -> tuple[str, dict[str, tuple[int, int]]]:
    """Returns the folder inside an archive of torch.save, and for each storage its place in the file and its bytes."""
    roots = [name.removesuffix("/data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ValueError("it is no file of torch.save")
    found = {}
    infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    ends = [*(info.header_offset for info in infos[1:]), archive.start_dir]
    for info, end in zip(infos, ends, strict=True):
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{info.filename} is compressed")
        if info.filename.startswith(f"{roots[0]}/data/"):
            stream.seek(info.header_offset)
            mark, name, extra = struct.unpack("<4s22xHH", stream.read(30))  # a zip's local file header
            if mark != b"PK\3\4":
                raise ValueError(f"{info.filename} is not where the list of members says")
            place = info.header_offset + 30 + name + extra
            if place + info.file_size > end:
                raise ValueError(f"{info.filename} reaches into what follows it")
            found[info.filename.removeprefix(f"{roots[0]}/data/")] = (start + place, info.file_size)
    return roots[0], found


def read_archive(path: Path, start: int = 0, length: int | None = None) -> dict[str, Any] | StoredTensor:
    """Returns the dict or tensor of a torch.save; a StoredTensor stands for each tensor, a Record for other objects.

    Args:
        path: a `.pt` file, or a file of torch.distributed.checkpoint, which holds many archives one after the other.
        start: byte of the archive's beginning.
        length: bytes of the archive; None: to the file's end.

    Raises:
        UserError: (MODEL) it names something that is not on the list, is cut short, or is not of torch.save.
    """
    try:
        with path.open("rb", buffering=0) as file:
            size = path.stat().st_size
            length = size - start if length is None else length
            if start < 0 or length < 0 or start + length > size:
                raise ValueError(f"it has {size} bytes, {start + length} are needed")
            stream = cast("IO[bytes]", io.BufferedReader(_Window(file, start, length)))
            with zipfile.ZipFile(stream) as archive:
                root, members = _members(stream, archive, start)
                if f"{root}/byteorder" in archive.namelist() and archive.read(f"{root}/byteorder") != b"little":
                    raise ValueError("its numbers are big-endian")
                found = _Reader(io.BytesIO(archive.read(f"{root}/data.pkl")), path, members).load()
                if not isinstance(found, dict | StoredTensor):
                    raise TypeError(f"it holds a {type(found).__name__}")
                return found
    except DAMAGE as error:
        raise damaged(path, f"{type(error).__name__}: {error}") from error
