"""NVIDIA GPUs of this machine, read from the driver's library (NVML) without torch, and the build of torch.

Used where torch is not yet imported or cannot be: the checks at the start of a run, and `python -m videox.doctor`.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# In the order in which they are tried; the second is where WSL2 has the libraries of the Windows driver.
NVML_LIBRARIES = ("libnvidia-ml.so.1", "/usr/lib/wsl/lib/libnvidia-ml.so.1")
TEXT_BYTES = 96  # NVML_DEVICE_NAME_V2_BUFFER_SIZE of nvml.h, the longest of the texts that are read
# Files of a driver: where one of them exists and NVML cannot be read, the number of GPUs is unknown, not zero.
DRIVER_FILES = ("dev/nvidia0", "dev/nvidiactl", "dev/nvhost-gpu", "dev/nvmap", "dev/dxg", "proc/driver/nvidia")


@dataclass(frozen=True)
class Gpu:
    """A GPU as its driver describes it: name, memory in bytes, compute capability, whether it is divided (MIG)."""

    name: str
    memory: int
    capability: tuple[int, int]
    divided: bool


@dataclass(frozen=True)
class Driver:
    """The driver, its highest CUDA version as (major, minor), and all its GPUs, also those that are hidden."""

    version: str
    cuda: tuple[int, int]
    gpus: tuple[Gpu, ...]


class _Memory(ctypes.Structure):
    """nvmlMemory_t of nvml.h, in bytes."""

    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


@dataclass(frozen=True)
class TorchBuild:
    """torch as installed, read from its files: version, and the CUDA, HIP and XPU versions that it was built for."""

    version: str
    cuda: str | None
    hip: str | None
    xpu: str | None


def torch_build() -> TorchBuild | None:
    """Return the build of the installed torch without importing it; None if it is not installed."""
    found = importlib.util.find_spec("torch")
    folders = [Path(place) for place in (found.submodule_search_locations or ())] if found else []
    for file in (folder / "version.py" for folder in folders):
        if file.is_file():
            text = file.read_text(encoding="utf-8")
            values = dict(re.findall(r"^(\w+)(?:\s*:[^=]+)?\s*=\s*'([^']*)'", text, flags=re.MULTILINE))
            return TorchBuild(values.get("__version__", "?"), *(values.get(name) for name in ("cuda", "hip", "xpu")))
    return None


@cache
def driver() -> Driver | None:
    """Return NVIDIA's driver and GPUs; None if there is no driver, or it does not answer."""
    for name in NVML_LIBRARIES:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        return _read(library) if library.nvmlInit_v2() == 0 else None
    return None


def _read(nvml: ctypes.CDLL) -> Driver:
    text = ctypes.create_string_buffer(TEXT_BYTES)
    nvml.nvmlSystemGetDriverVersion(text, TEXT_BYTES)
    number = ctypes.c_int(0)
    nvml.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(number))  # 1000 major + 10 minor
    version, cuda = text.value.decode(), (number.value // 1000, number.value % 1000 // 10)
    count = ctypes.c_uint(0)
    nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    gpus = []
    for index in range(count.value):
        handle = ctypes.c_void_p()
        if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) != 0:
            continue  # a GPU of another user or container
        name, memory = ctypes.create_string_buffer(TEXT_BYTES), _Memory()
        major, minor, mode, pending = (ctypes.c_int(0) for _ in range(4))
        nvml.nvmlDeviceGetName(handle, name, TEXT_BYTES)
        nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
        nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
        nvml.nvmlDeviceGetMigMode(handle, ctypes.byref(mode), ctypes.byref(pending))  # stays 0 without MIG
        gpus.append(Gpu(name.value.decode(), int(memory.total), (major.value, minor.value), bool(mode.value)))
    return Driver(version, cuda, tuple(gpus))


def count_visible(environment: Mapping[str, str], gpus: int) -> int:
    """Return how many of `gpus` GPUs CUDA_VISIBLE_DEVICES leaves visible; an invalid entry hides those after it."""
    text = environment.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return gpus
    count = 0
    for entry in (part.strip() for part in text.split(",")):
        known = int(entry) < gpus if entry.isdecimal() else entry.startswith(("GPU-", "MIG-"))
        if not known:
            break
        count += 1
    return count


def visible_gpus(environment: Mapping[str, str], root: Path = Path("/")) -> int | None:
    """Return the number of GPUs that torch can use, without importing it; None where only torch can tell.

    Args:
        environment: with CUDA_VISIBLE_DEVICES.
        root: of the file system, for the driver's files.
    """
    build = torch_build()
    plugins = importlib.metadata.entry_points(group="torch.backends")  # devices of other makers
    if build is None or build.hip or build.xpu or plugins:
        return None
    if build.cuda is None:
        return 0
    found = driver()
    if found is None:
        return None if any((root / file).exists() for file in DRIVER_FILES) else 0
    if any(gpu.divided for gpu in found.gpus):
        return None
    return count_visible(environment, len(found.gpus))
