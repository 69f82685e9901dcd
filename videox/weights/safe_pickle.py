"""Safe reader of pickles and torch.save archives from untrusted sources: it never runs code from a file.

A pickle is a program: it names functions and calls them. Here a name is mapped to a plain value, to one of the four
functions that describe a tensor or an enum member, or to an inert OpaqueObject; every name that is not in the tables
below ends the read with an error. No class of another library is imported or instantiated. Tensors stay in their file
and are described by dtype, shape and byte offset.

torch.load(weights_only=True, mmap=True) with torch.serialization.safe_globals does not replace this module (checked
with torch 2.13):
- `.distcp` files contain many archives one after the other, and torch.load maps whole files only;
- the `.metadata` of torch.distributed.checkpoint is a bare pickle of protocol 4, and its unpickler reads protocol 2;
- a file that is truncated while it is mapped kills the process with SIGBUS instead of raising an error.
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

PLAIN_TYPES: Mapping[str, Any] = {
    "builtins.set": set,
    "builtins.dict": dict,
    "builtins.list": list,
    "__builtin__.set": set,  # its name in protocol 2
    "collections.OrderedDict": OrderedDict,
    "collections.defaultdict": defaultdict,
    "torch.Size": tuple,
    **{
        f"torch.{name}": getattr(torch, name)
        for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    },
}
STORAGE_DTYPES: Mapping[str, torch.dtype] = {
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
# Objects that DeepSpeed, torch.distributed.checkpoint and training scripts save next to the tensors.
OPAQUE_NAMES = frozenset(
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
# Unpickling damaged bytes may raise nearly any exception, as the documentation of Python's pickle module warns.
READ_ERRORS = (
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
    RuntimeError,  # raised by zipfile for a member that is encrypted or has an unknown compression
)


class OpaqueObject:
    """Placeholder for an object whose class is not imported: its constructor arguments and its pickled state."""

    name = ""
    arguments: tuple[Any, ...] = ()
    state: Any = None  # for a dataclass: its fields by name

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __setitem__(self, key: object, value: object) -> None:
        """Discard an entry of a pickled dict subclass."""

    def append(self, item: object) -> None:
        """Discard an item of a pickled list subclass."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file: byte offset of its first element, dtype, shape, and strides in elements."""

    path: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def extent(self) -> int:
        """Number of elements in the file from the tensor's first to its last, both included."""
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))

    @property
    def contiguous(self) -> bool:
        """Whether the elements are stored in row-major order without gaps."""
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


class _SafeUnpickler(pickle.Unpickler):
    """Unpickler that resolves names through the tables above only.

    Its functions are bound methods and each mention of an opaque class creates a new class, so that a pickle that sets
    attributes on them cannot change how the next pickle is read.
    """

    def __init__(self, stream: io.BufferedIOBase, path: Path, members: Mapping[str, tuple[int, int]]) -> None:
        super().__init__(stream)
        self._path, self._members = path, members

    def find_class(self, module: str, name: str) -> object:
        full = f"{module}.{name}"
        if full in PLAIN_TYPES:
            return PLAIN_TYPES[full]
        if full in STORAGE_DTYPES:
            return STORAGE_DTYPES[full]
        rebuild = {
            "torch._utils._rebuild_tensor_v2": self._rebuild_tensor,
            "torch._utils._rebuild_parameter": self._rebuild_parameter,
            "torch._tensor._rebuild_from_type_v2": self._rebuild_from_type,
            **dict.fromkeys(("builtins.getattr", "__builtin__.getattr"), self._getattr),
        }
        if full in rebuild:
            return rebuild[full]
        if full in OPAQUE_NAMES:
            return type("OpaqueObject", (OpaqueObject,), {"name": full})
        self._refuse_name(full)

    def _refuse_name(self, full: str) -> NoReturn:
        what = f"its pickle names {full}, which no checkpoint of tensors needs; no code was run"
        raise UserError(str(self._path), what, "use a checkpoint from a source you trust, or save it again", MODEL)

    def _getattr(self, kind: object, name: object) -> OpaqueObject:
        """Replace getattr, with which Python 3.11.0 to 3.11.3 pickle an enum member; no attribute is looked up."""
        if not (isinstance(kind, type) and issubclass(kind, OpaqueObject) and isinstance(name, str)):
            self._refuse_name("builtins.getattr of something other than an enum")
        return kind(name)

    def persistent_load(self, pid: tuple[str, torch.dtype, str, str, int]) -> _Storage:
        kind, dtype, key, _, count = pid
        start, size = self._members[str(key)]  # KeyError outside an archive: it is reported as damage
        if kind != "storage" or not isinstance(dtype, torch.dtype) or count * dtype.itemsize > size:
            raise ValueError(f"storage {key!r} has {size} bytes for {count} elements of {dtype}")
        return _Storage(start, dtype, count)

    def _rebuild_tensor(
        self, storage: _Storage, offset: int, shape: Sequence[int], stride: Sequence[int], *_: object
    ) -> StoredTensor:
        itemsize = storage.dtype.itemsize
        tensor = StoredTensor(
            self._path, storage.start + offset * itemsize, storage.dtype, tuple(shape), tuple(stride)
        )
        if min(offset, *shape, *stride, 0) < 0 or (tensor.numel and offset + tensor.extent > storage.count):
            raise ValueError(f"a tensor of {list(shape)} reaches beyond its storage")
        return tensor

    def _rebuild_parameter(self, tensor: StoredTensor, *_: object) -> StoredTensor:
        return tensor

    def _rebuild_from_type(
        self, rebuild: Callable[..., StoredTensor], kind: object, arguments: Sequence[object], state: object
    ) -> StoredTensor:
        del kind, state
        return rebuild(*arguments)


def damaged_error(path: Path, cause: str) -> UserError:
    """Make the error for a file that cannot be read."""
    return UserError(
        str(path), f"is damaged or truncated ({cause})", "copy the file again, or use another save", MODEL
    )


def read_pickle(path: Path) -> OpaqueObject:
    """Read the object in a bare pickle, such as the `.metadata` of torch.distributed.checkpoint.

    Raises:
        UserError: (MODEL) the pickle names an object that is not in the tables, or is damaged.
    """
    try:
        with path.open("rb") as stream:
            found = _SafeUnpickler(stream, path, {}).load()
            if not isinstance(found, OpaqueObject):
                raise TypeError(f"it contains a {type(found).__name__}")
            return found
    except READ_ERRORS as error:
        raise damaged_error(path, f"{type(error).__name__}: {error}") from error


class _Window(io.RawIOBase):
    """A byte range of an open file, as a file object; `stream` is unbuffered."""

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
    """Return the root folder inside a torch.save archive, and (offset in the file, size in bytes) of each storage.

    The offsets are taken from the local file headers, as torch does, and checked against the central directory: a
    forged archive must not make a storage overlap another member.
    """
    roots = [name.removesuffix("/data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ValueError("it was not written by torch.save")
    found = {}
    infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    ends = [*(info.header_offset for info in infos[1:]), archive.start_dir]
    for info, end in zip(infos, ends, strict=True):
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{info.filename} is compressed")
        if info.filename.startswith(f"{roots[0]}/data/"):
            stream.seek(info.header_offset)
            magic, name_length, extra_length = struct.unpack("<4s22xHH", stream.read(30))  # a zip's local file header
            if magic != b"PK\3\4":
                raise ValueError(f"{info.filename} is not at the offset in the central directory")
            place = info.header_offset + 30 + name_length + extra_length
            if place + info.file_size > end:
                raise ValueError(f"{info.filename} overlaps the next member")
            found[info.filename.removeprefix(f"{roots[0]}/data/")] = (start + place, info.file_size)
    return roots[0], found


def read_archive(path: Path, start: int = 0, length: int | None = None) -> dict[str, Any] | StoredTensor:
    """Read the dict or tensor of a torch.save archive, with a StoredTensor per tensor and OpaqueObjects for the rest.

    Args:
        path: a `.pt` file, or a file of torch.distributed.checkpoint, which contains many archives in a row.
        start: byte offset of the archive.
        length: size of the archive in bytes; None means up to the end of the file.

    Raises:
        UserError: (MODEL) the pickle names an object that is not in the tables, or the archive is damaged, truncated
            or not written by torch.save.
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
                    raise ValueError("its values are big-endian")
                found = _SafeUnpickler(io.BytesIO(archive.read(f"{root}/data.pkl")), path, members).load()
                if not isinstance(found, dict | StoredTensor):
                    raise TypeError(f"it contains a {type(found).__name__}")
                return found
    except READ_ERRORS as error:
        raise damaged_error(path, f"{type(error).__name__}: {error}") from error
