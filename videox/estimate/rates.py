"""What a GPU reaches of its data sheet in each kind of work: assumed shares, which a measurement replaces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from videox.estimate.gpus import CUDNN, FLASH, TERA, Gpu


class Share(NamedTuple):
    """Share of the bfloat16 peak that attention reaches, 0 to 1; backward with its recomputed scores."""

    forward: float
    backward: float


# Large bfloat16 products on an H100 at its power limit: about 710 of 989 TFLOP/s.
MATMUL = 0.72
MEMORY = 0.9  # a copy within HBM: 3.0 of 3.35 TB/s on an H100
HOST = 0.86  # of PCIe, from pinned memory: 55 of 64 GB/s
LINK = 0.8  # NCCL's all-gather within a machine: 360 of 450 GB/s on H100, 235 of 300 on A100
NETWORK = 50e9  # bytes per second and GPU between machines: an adapter of 400 Gbit/s for each GPU, as a DGX H100 has
# Head width 128, without a mask, from 16k tokens on. cuDNN: 520 and 440 TFLOP/s on an H100. FlashAttention-2: 35 % of
# an H100 (arXiv 2407.08608), at best 73 % forward and 63 % backward of an A100 (arXiv 2307.08691).
# FlashAttention-3: 620 TFLOP/s forward at 16k tokens (PyTorch's benchmark, pull request 2391).
HOPPER = {CUDNN: Share(0.525, 0.445), FLASH: Share(0.35, 0.3), "flash3": Share(0.625, 0.53)}
OTHERS = Share(0.65, 0.55)
KERNELS = {"cudnn": CUDNN, "flash": FLASH, "native_flash": FLASH, "flash_varlen": FLASH, "flash3": "flash3"}


@dataclass(frozen=True)
class Rates:
    """What a GPU is assumed to reach.

    Attributes:
        gpu: its data sheet.
        name: of the GPU.
        peak: peak bfloat16 FLOPs per second; the MFU is relative to it.
        matmul: FLOPs per second of matrix products in the compute dtype.
        attention, attention_backward: FLOPs per second of attention's passes.
        memory: bytes per second of the GPU's memory, read and written.
        host: bytes per second between host and GPU.
        link: bytes per second between the GPUs of a machine, one direction.
        kernel: of attention.
    """

    gpu: Gpu
    name: str
    peak: float
    matmul: float
    attention: float
    attention_backward: float
    memory: float
    host: float
    link: float
    kernel: str

    def words(self) -> str:
        """Return the rates and what is assumed, for the report."""
        tera = self.peak / TERA
        shares = (self.attention / self.peak, self.attention_backward / self.peak)
        return (
            f"{self.name}: {tera:g} TFLOP/s; assumed: matrix products reach {self.matmul / self.peak:.0%} of it, attention "
            f"({self.kernel}) {shares[0]:.0%} forward and {shares[1]:.0%} backward, memory {MEMORY:.0%} of "
            f"{self.gpu.memory_bandwidth / TERA:.3g} TB/s"
        )

    def between(self, *, machines: int) -> float:
        """Return the bytes per second between GPUs of so many machines, one direction."""
        return min(self.link, LINK * NETWORK) if machines > 1 else self.link


def kernel_of(gpu: Gpu, backend: str) -> str:
    """Return the kernel that a value of --attention_backend means; torch's own choice for an unknown one."""
    return KERNELS.get(backend, gpu.attention)


def rates_of(
    gpu: Gpu, name: str, *, peak: float | None = None, backend: str = "native", half: bool = True, tf32: bool = False
) -> Rates:
    """Return the assumed rates of a GPU.

    Args:
        gpu: its data sheet.
        name: of the GPU.
        peak: bfloat16 FLOPs per second, None for those of the data sheet.
        backend: of --attention_backend.
        half: computes in bfloat16; otherwise in float32.
        tf32: float32 matrix products use TensorFloat-32, at half of the bfloat16 peak.
    """
    peak = gpu.bf16 if peak is None else peak
    kernel = kernel_of(gpu, backend)
    share = HOPPER[kernel] if gpu.attention == CUDNN else OTHERS
    computing = peak if half else peak / 2 if tf32 else gpu.fp32
    return Rates(
        gpu, name, peak, MATMUL * computing, share.forward * computing, share.backward * computing,
        MEMORY * gpu.memory_bandwidth, HOST * gpu.host_bandwidth, LINK * gpu.link, kernel if half else "float32",
    )  # fmt: skip
