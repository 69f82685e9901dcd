"""Tests of videox.training.gpu_facts: what the start of a run prints about the hardware and the libraries."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from videox.training.gpu_facts import KERNELS, attention_kernel, gpu_name, versions

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_gpu_and_versions_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=int(79.6 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91501)
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    assert versions(GPU) == f"torch {torch.__version__}, CUDA 12.9, cuDNN 9.15.1"  # a build without NCCL
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    assert gpu_name(GPU) == "NVIDIA H100 80GB HBM3, 79.6 GiB"
    assert versions(GPU) == f"torch {torch.__version__}, CUDA 12.9, cuDNN 9.15.1, NCCL 2.27.5"
    assert versions(CPU) == f"torch {torch.__version__}"


def test_the_kernel_is_the_one_that_torch_chooses() -> None:
    assert attention_kernel(CPU, torch.bfloat16) == "flash"
    with sdpa_kernel(SDPBackend.MATH):
        assert attention_kernel(CPU, torch.bfloat16) == "unfused"


def test_a_build_without_cuda_has_no_kernel_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert attention_kernel(GPU, torch.bfloat16) == "unknown"


@pytest.mark.parametrize("kernel", SDPBackend.__members__.values(), ids=str)
def test_every_kernel_has_a_name(kernel: SDPBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda query, key, value: int(kernel.value))
    assert attention_kernel(CPU, torch.bfloat16) == KERNELS.get(kernel.name, kernel.name.lower())
