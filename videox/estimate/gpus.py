"""GPUs that a dry run can plan for: memory, peak FLOPs, bandwidths, from the vendors' data sheets."""

from __future__ import annotations

import re
from typing import NamedTuple

TERA, GIGA = 1e12, 1e9
CUDNN, FLASH = "cudnn", "flash"


class Gpu(NamedTuple):
    """A GPU.

    Attributes:
        device: what torch.cuda.get_device_name contains, matched as whole words.
        gib: memory in GiB, as nvidia-smi reports it.
        bf16: dense bfloat16 FLOPs per second with float32 accumulation.
        fp32: float32 FLOPs per second without TensorFloat-32.
        memory_bandwidth: bytes per second.
        host_bandwidth: bytes per second from host memory, one direction of its PCIe generation.
        attention: the attention kernel that torch takes by itself: CUDNN or FLASH (FlashAttention-2).
        nvlink: bytes per second, one direction, between all GPUs of a machine by NVLink; 0: they have PCIe alone.
    """

    device: str
    gib: float
    bf16: float
    fp32: float
    memory_bandwidth: float
    host_bandwidth: float
    attention: str = FLASH
    nvlink: float = 0.0

    @property
    def link(self) -> float:
        """Bytes per second, one direction, between the GPUs of a machine."""
        return self.nvlink or self.host_bandwidth


PCIE4, PCIE5 = 32 * GIGA, 64 * GIGA
# Sources: NVIDIA's architecture whitepapers GA102 (RTX 30), Ada (RTX 40) and RTX Blackwell (RTX 50), and the data
# sheets of A10, A40, A100, H100, H200, L4, L40S, RTX A6000 and HGX B200. Memory: nvidia-smi on these cards. NVLink:
# half of the sheets' figure, which counts both directions; 400 GB/s of it on A800 and H800. torch prefers cuDNN's
# attention on Hopper and on data-center Blackwell GPUs.
GPUS = {
    "rtx3060": Gpu("RTX 3060", 12.0, 25.5 * TERA, 12.7 * TERA, 360 * GIGA, PCIE4),
    "rtx3090": Gpu("RTX 3090", 24.0, 71 * TERA, 35.6 * TERA, 936 * GIGA, PCIE4),
    "rtx4080": Gpu("RTX 4080", 16.0, 97.5 * TERA, 48.7 * TERA, 717 * GIGA, PCIE4),
    "rtx4090": Gpu("RTX 4090", 24.0, 165.2 * TERA, 82.6 * TERA, 1008 * GIGA, PCIE4),
    "rtx5080": Gpu("RTX 5080", 15.9, 112.6 * TERA, 56.3 * TERA, 960 * GIGA, PCIE5),
    "rtx5090": Gpu("RTX 5090", 31.8, 209.5 * TERA, 104.8 * TERA, 1792 * GIGA, PCIE5),
    "a10": Gpu("A10", 22.5, 125 * TERA, 31.2 * TERA, 600 * GIGA, PCIE4),
    "a40": Gpu("A40", 45.0, 149.7 * TERA, 37.4 * TERA, 696 * GIGA, PCIE4),
    "a6000": Gpu("A6000", 48.0, 154.8 * TERA, 38.7 * TERA, 768 * GIGA, PCIE4),
    "a100-40": Gpu("A100.*40GB", 40.0, 312 * TERA, 19.5 * TERA, 1555 * GIGA, PCIE4, FLASH, 300 * GIGA),
    "a100-80": Gpu("A100", 80.0, 312 * TERA, 19.5 * TERA, 2039 * GIGA, PCIE4, FLASH, 300 * GIGA),
    "a800": Gpu("A800", 80.0, 312 * TERA, 19.5 * TERA, 2039 * GIGA, PCIE4, FLASH, 200 * GIGA),
    "l4": Gpu("L4", 22.5, 121 * TERA, 30.3 * TERA, 300 * GIGA, PCIE4),
    "l40": Gpu("L40", 45.0, 181 * TERA, 90.5 * TERA, 864 * GIGA, PCIE4),
    "l40s": Gpu("L40S", 45.0, 362 * TERA, 91.6 * TERA, 864 * GIGA, PCIE4),
    "h20": Gpu("H20", 95.6, 148 * TERA, 44 * TERA, 4000 * GIGA, PCIE5, CUDNN, 450 * GIGA),
    "h100-pcie": Gpu("H100 PCIe", 79.6, 756 * TERA, 51 * TERA, 2000 * GIGA, PCIE5, CUDNN),
    "h100-nvl": Gpu("H100 NVL", 93.6, 835 * TERA, 60 * TERA, 3900 * GIGA, PCIE5, CUDNN),
    "h100": Gpu("H100", 79.6, 989 * TERA, 67 * TERA, 3350 * GIGA, PCIE5, CUDNN, 450 * GIGA),
    "h800": Gpu("H800", 79.6, 989 * TERA, 67 * TERA, 3350 * GIGA, PCIE5, CUDNN, 200 * GIGA),
    "gh200": Gpu("GH200", 95.6, 989 * TERA, 67 * TERA, 4000 * GIGA, PCIE5, CUDNN),
    "h200": Gpu("H200", 140.4, 989 * TERA, 67 * TERA, 4800 * GIGA, PCIE5, CUDNN, 450 * GIGA),
    "b200": Gpu("B200", 179.1, 2250 * TERA, 75 * TERA, 7700 * GIGA, PCIE5, CUDNN, 900 * GIGA),
    "b300": Gpu("B300", 268.0, 2250 * TERA, 75 * TERA, 7700 * GIGA, PCIE5, CUDNN, 900 * GIGA),
}
DEFAULT_GPU = "h100"  # assumed by a dry run on a machine without a known GPU


def gpu_of_device(name: str) -> Gpu | None:
    """Return the GPU with a device name as torch reports it; None for an unknown one."""
    return next((gpu for gpu in GPUS.values() if re.search(rf"\b{gpu.device}\b", name)), None)


def host_bandwidth_of(gpu: Gpu | None) -> float:
    """Return the bytes per second between host and GPU; PCIe 4.0 where the GPU is unknown."""
    return gpu.host_bandwidth if gpu else PCIE4
