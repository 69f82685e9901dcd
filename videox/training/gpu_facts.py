"""What of the hardware and the libraries runs a training: the lines about it at the start of a run."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend

GIB = 2**30
HEAD_DIM, TOKENS = 128, 1024  # of a head in every published model; kernels are chosen by dtype and width, not length
KERNELS = {"MATH": "unfused", "FLASH_ATTENTION": "flash", "EFFICIENT_ATTENTION": "memory-efficient"}
KERNELS["CUDNN_ATTENTION"] = "cuDNN"


def gpu_name(device: torch.device) -> str:
    """Return name and memory of a GPU, as torch reports them."""
    found = torch.cuda.get_device_properties(device)
    return f"{found.name}, {found.total_memory / GIB:.1f} GiB"


def versions(device: torch.device) -> str:
    """Return the versions of torch and, on a GPU, of CUDA, cuDNN and NCCL, as far as torch was built with them."""
    parts = [f"torch {torch.__version__}"]
    if device.type == "cuda":
        parts += [f"CUDA {torch.version.cuda}"] if torch.version.cuda else []
        if cudnn := torch.backends.cudnn.version():  # 91501 is 9.15.1
            parts.append(f"cuDNN {cudnn // 10_000}.{cudnn // 100 % 100}.{cudnn % 100}")
        if dist.is_nccl_available():
            parts.append(f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
    return ", ".join(parts)


def attention_kernel(device: torch.device, dtype: torch.dtype) -> str:
    """Return the kernel that torch's scaled_dot_product_attention takes for training without a mask.

    torch chooses it by the GPU, dtype and width of a head, and by the switches of torch.backends.cuda. It is asked for
    its choice; that the choice is the fastest kernel can be measured on a GPU alone.

    Args:
        device: where it runs.
        dtype: of queries, keys and values.
    """
    if device.type == "cuda" and not torch.backends.cuda.is_built():
        return "unknown"  # a build for CPUs has no kernels to choose from
    sample = torch.empty(1, 1, TOKENS, HEAD_DIM, dtype=dtype, device=device, requires_grad=True)
    name = SDPBackend(torch._fused_sdp_choice(sample, sample, sample)).name
    return KERNELS.get(name, name.lower())
