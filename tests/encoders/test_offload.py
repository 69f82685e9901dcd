"""Tests of videox.encoders.offload: weights are on the device only while they are used."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import runs
import tiny
import torch
from tensors import DEVICES
from torch import nn

from videox.diffusion.flow_matching import keyed_noise
from videox.encoders.offload import OffloadedModule


def small_encoder() -> nn.Module:
    """Return a small frozen encoder with parameters and buffers, one weight shared by two layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6))
    module[2].weight = module[0].weight
    return module.requires_grad_(False).eval()


def data_pointers(module: nn.Module) -> list[int]:
    return [tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())]


def output(module: nn.Module, device: torch.device) -> torch.Tensor:
    return module(keyed_noise(1, (3, 6)).to(device)).cpu()


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_weights_are_on_the_device_only_during_use(device: torch.device) -> None:
    offloaded = OffloadedModule(small_encoder(), device, offload=True)
    host_pointers = data_pointers(offloaded.module)
    expected = output(offloaded.module, torch.device("cpu"))
    for _ in range(3):
        with offloaded.on_device() as module:
            assert module is offloaded.module
            assert not set(data_pointers(module)) & set(host_pointers)
            assert all(tensor.device.type == device.type for tensor in (*module.parameters(), *module.buffers()))
            copies = [weakref.ref(tensor.data.untyped_storage()) for tensor in module.parameters()]
            torch.testing.assert_close(output(module, device), expected)
        gc.collect()
        assert [copy() for copy in copies] == [None] * len(copies)  # the device copies are freed
        assert data_pointers(offloaded.module) == host_pointers  # the tensors point at the host weights again
        assert all(tensor.device.type == "cpu" for tensor in offloaded.module.parameters())
        torch.testing.assert_close(output(offloaded.module, torch.device("cpu")), expected, rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_shared_weights_stay_shared(device: torch.device) -> None:
    offloaded = OffloadedModule(small_encoder(), device, offload=True)
    with offloaded.on_device() as module:
        assert module[0].weight is module[2].weight
    assert offloaded.module[0].weight is offloaded.module[2].weight


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_weights_are_offloaded_after_a_failure(device: torch.device) -> None:
    offloaded = OffloadedModule(small_encoder(), device, offload=True)
    host_pointers = data_pointers(offloaded.module)
    with pytest.raises(RuntimeError, match="mat1 and mat2"), offloaded.on_device() as module:
        module(torch.zeros(2, 5, device=device))
    assert data_pointers(offloaded.module) == host_pointers


def test_weights_are_offloaded_if_the_copy_fails_half_way() -> None:
    module = small_encoder()
    module.append(nn.Linear(6, 6, device="meta").requires_grad_(False))  # a meta tensor has no values to copy
    offloaded = OffloadedModule(module, torch.device("cpu:0"), offload=True)
    host_pointers = data_pointers(offloaded.module)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="meta"), offloaded.on_device():
            pass
        assert data_pointers(offloaded.module) == host_pointers


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_a_nested_use_does_not_end_the_outer_one(device: torch.device) -> None:
    offloaded = OffloadedModule(small_encoder(), device, offload=True)
    host_pointers = data_pointers(offloaded.module)
    with offloaded.on_device() as module:
        outer = data_pointers(module)
        with offloaded.on_device() as again:
            assert data_pointers(again) == outer  # no second copy
        assert data_pointers(module) == outer
        output(module, device)
    assert data_pointers(offloaded.module) == host_pointers


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_a_module_without_offload_stays_on_the_device(device: torch.device) -> None:
    module = small_encoder()
    resident = OffloadedModule(module, device, offload=False)
    pointers = data_pointers(module)
    assert all(tensor.device.type == device.type for tensor in (*module.parameters(), *module.buffers()))
    with resident.on_device() as on_device:
        assert on_device is module
        assert data_pointers(on_device) == pointers
    assert data_pointers(module) == pointers


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_prefetched_weights_are_used_and_copied_once(device: torch.device) -> None:
    offloaded = OffloadedModule(small_encoder(), device, offload=True)
    host_pointers, expected = data_pointers(offloaded.module), output(offloaded.module, torch.device("cpu"))
    offloaded.prefetch()
    prefetched = [copy.data_ptr() for copy in offloaded._prefetched]
    offloaded.prefetch()
    assert (
        data_pointers(offloaded.module) == host_pointers
        and [copy.data_ptr() for copy in offloaded._prefetched] == prefetched
    )
    with offloaded.on_device() as module:
        offloaded.prefetch()  # does nothing: the weights are on the device
        assert data_pointers(module) == prefetched and not set(prefetched) & set(host_pointers)
        torch.testing.assert_close(output(module, device), expected)
    assert data_pointers(offloaded.module) == host_pointers and not offloaded._prefetched


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_nothing_is_copied_back(device: torch.device) -> None:
    offloaded = OffloadedModule(small_encoder(), device, offload=True)
    tensors = [tensor for _, tensor in offloaded._host_weights]
    before = [(tensor._version, tensor.data_ptr(), tensor.clone()) for tensor in tensors]
    for _ in range(2):
        offloaded.prefetch()
        with offloaded.on_device() as module:
            output(module, device)
    for tensor, (version, place, values) in zip(tensors, before, strict=True):
        assert (tensor._version, tensor.data_ptr()) == (version, place)  # it was not written to
        assert torch.equal(tensor, values)


def test_low_vram_is_bit_identical_and_prefetches_the_next_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, metadata = tiny.build_wan_i2v(tmp_path / "model"), tiny.make_dataset(tmp_path / "data")
    events: list[str] = []
    prefetch, on_device = OffloadedModule.prefetch, OffloadedModule.on_device

    def record_prefetch(self: OffloadedModule) -> None:
        if not self._uses and not self._prefetched:
            events.append(f"prefetch {type(self.module).__name__}")
        prefetch(self)

    @contextmanager
    def record_use(self: OffloadedModule) -> Iterator[nn.Module]:
        with on_device(self) as module:
            yield module
        events.append(f"offload {type(self.module).__name__}")

    flags = {"train_mode": "i2v", "max_train_steps": 2, "mixed_precision": "no"}
    resident = runs.train(runs.wan_flags(model, metadata, tmp_path / "staying", low_vram=None, **flags))
    monkeypatch.setattr(OffloadedModule, "prefetch", record_prefetch)
    monkeypatch.setattr(OffloadedModule, "on_device", record_use)
    offloaded = runs.train(runs.wan_flags(model, metadata, tmp_path / "resting", low_vram=True, **flags))
    assert (resident.code, offloaded.code) == (0, 0), offloaded.stderr
    keys = ("step", "loss", "grad_norm", "rows")
    assert [[line[key] for key in keys] for line in offloaded.metrics] == [
        [line[key] for key in keys] for line in resident.metrics
    ]
    actual, expected = offloaded.weights(), resident.weights()
    assert actual.keys() == expected.keys() and all(torch.equal(actual[name], expected[name]) for name in actual)
    vae, text, image = "AutoencoderKLWan", "UMT5EncoderModel", "CLIPVisionModel"
    # The VAE is last and alone on the device. It encodes the clip, and then the known pixels.
    step = [
        f"prefetch {text}", f"prefetch {image}", f"offload {text}", f"prefetch {vae}", f"offload {image}",
        f"offload {vae}",
    ]  # fmt: skip
    assert events[-8:] == [*step, f"prefetch {vae}", f"offload {vae}"]
