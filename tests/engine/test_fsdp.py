"""Tests of videox.engine.fsdp: what can be checked of its GPU paths without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties
from torch.testing._internal.distributed.fake_pg import FakeStore

from videox.engine import fsdp
from videox.engine.base import NO_BOUNDS, Bounds, may_step

GPU = torch.device("cuda", 0)
META = torch.device("meta")  # in place of a GPU, for operations that need CUDA even on fake tensors


@pytest.fixture
def rank_0_of_2() -> Iterator[None]:
    """A process group of two ranks whose collectives do nothing, as rank 0."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


def sharded(device: torch.device) -> Any:
    """Return what _full_tensor reads of rank 0's ShardedTensor [4, 4] in a process group for tensors of `device`."""
    placements = [ShardMetadata([2 * rank, 0], [2, 4], f"rank:{rank}/{device.type}") for rank in range(2)]
    mine = torch.ones(2, 4, device=device)
    found = SimpleNamespace(
        _process_group=dist.group.WORLD,
        metadata=lambda: ShardedTensorMetadata(placements, torch.Size([4, 4]), TensorProperties()),
        local_shards=lambda: [Shard(mine, placements[0])],
        size=lambda: torch.Size([4, 4]),
        dtype=torch.float32,
        _get_preferred_device=lambda: device,
    )
    found.gather = lambda dst, out: ShardedTensor.gather(found, dst, out)
    return found


@pytest.mark.usefixtures("rank_0_of_2")
@pytest.mark.parametrize("device", [torch.device("cpu"), META], ids=str)
def test_fsdp1_gathers_a_weight_on_the_device_of_the_process_group(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: list[torch.device] = []

    def gather(tensor: torch.Tensor, gather_list: list[torch.Tensor] | None = None, **settings: Any) -> None:
        devices.extend([tensor.device, *(each.device for each in gather_list or [])])

    monkeypatch.setattr(dist, "gather", gather)
    monkeypatch.setattr(fsdp, "ShardedTensor", SimpleNamespace)
    copied: list[torch.device] = []

    def cpu(tensor: torch.Tensor) -> torch.Tensor:
        copied.append(tensor.device)
        return torch.empty(tensor.shape)

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    full = fsdp._full_tensor(sharded(device))
    assert copied == [device]
    assert set(devices) == {device}, "NCCL refuses a collective over tensors on different devices"
    assert full.device.type == "cpu" and full.shape == (4, 4)


@pytest.mark.parametrize(("norm", "loss"), [(1.0, 2.0), (float("inf"), 2.0), (1.0, float("nan"))])
def test_a_step_is_skipped_by_a_flag_on_the_device_of_the_parameters(norm: float, loss: float) -> None:
    applied = may_step(torch.tensor(norm), torch.tensor(loss), NO_BOUNDS)
    assert applied.dtype == torch.bool and bool(applied) == (norm == 1.0 and loss == 2.0)
    with FakeTensorMode():  # parameters on the CPU (fsdp_offload_params), loss on the GPU
        offloaded = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64, device=GPU)
        assert may_step(*offloaded, Bounds(1.0, 1.0)).device.type == "cpu"
        assert (offloaded[0].isfinite() & offloaded[1].isfinite()).device == GPU, "else the copy is not needed"
