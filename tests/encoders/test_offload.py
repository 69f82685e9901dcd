"""Serves videox/offload.py: weights are on the device while they are used and at no other time."""

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
from torch import nn

from videox.diffusion.flow_matching import keyed_noise
from videox.encoders.offload import OffloadedModule

# To torch "cpu:0" is a device like any other: `.to` copies host tensors to it. So the copies can be followed without
# an accelerator; with one, it is tested as well.
DEVICES = [torch.device("cpu:0"), *([torch.device("cuda:0")] if torch.cuda.is_available() else [])]


def frozen() -> nn.Module:
    """Returns a small frozen encoder with parameters and buffers, one weight shared by two layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6))
    module[2].weight = module[0].weight
    return module.requires_grad_(False).eval()


def storages(module: nn.Module) -> list[int]:
    return [tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())]


def output(module: nn.Module, device: torch.device) -> torch.Tensor:
    return module(keyed_noise(1, (3, 6)).to(device)).cpu()


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_weights_are_on_the_device_only_while_awake(device: torch.device) -> None:
    resting = OffloadedModule(frozen(), device, offload=True)
    host = storages(resting.module)
    wanted = output(resting.module, torch.device("cpu"))
    for _ in range(3):
        with resting.on_device() as module:
            assert module is resting.module
            assert not set(storages(module)) & set(host)
            assert all(tensor.device.type == device.type for tensor in (*module.parameters(), *module.buffers()))
            copies = [weakref.ref(tensor.data.untyped_storage()) for tensor in module.parameters()]
            torch.testing.assert_close(output(module, device), wanted)
        gc.collect()
        assert [copy() for copy in copies] == [None] * len(copies)  # the device's copies are gone
        assert storages(resting.module) == host  # and the same weights rest where they did
        assert all(tensor.device.type == "cpu" for tensor in resting.module.parameters())
        torch.testing.assert_close(output(resting.module, torch.device("cpu")), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_shared_weights_stay_shared(device: torch.device) -> None:
    resting = OffloadedModule(frozen(), device, offload=True)
    with resting.on_device() as module:
        assert module[0].weight is module[2].weight
    assert resting.module[0].weight is resting.module[2].weight


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_weights_rest_after_a_failure(device: torch.device) -> None:
    resting = OffloadedModule(frozen(), device, offload=True)
    host = storages(resting.module)
    with pytest.raises(RuntimeError, match="mat1 and mat2"), resting.on_device() as module:
        module(torch.zeros(2, 5, device=device))
    assert storages(resting.module) == host


def test_weights_rest_when_waking_fails_half_way() -> None:
    module = frozen()
    module.append(nn.Linear(6, 6, device="meta").requires_grad_(False))  # has no values that could be copied
    resting = OffloadedModule(module, torch.device("cpu:0"), offload=True)
    host = storages(resting.module)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="meta"), resting.on_device():
            pass
        assert storages(resting.module) == host


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_a_use_within_a_use_does_not_end_it(device: torch.device) -> None:
    resting = OffloadedModule(frozen(), device, offload=True)
    host = storages(resting.module)
    with resting.on_device() as module:
        outer = storages(module)
        with resting.on_device() as again:
            assert storages(again) == outer  # no second copy
        assert storages(module) == outer
        output(module, device)
    assert storages(resting.module) == host


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_a_module_that_does_not_rest_stays(device: torch.device) -> None:
    module = frozen()
    staying = OffloadedModule(module, device, offload=False)
    there = storages(module)
    assert all(tensor.device.type == device.type for tensor in (*module.parameters(), *module.buffers()))
    with staying.on_device() as on_device:
        assert on_device is module
        assert storages(on_device) == there
    assert storages(module) == there


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_what_was_called_is_there_when_it_wakes_and_is_copied_once(device: torch.device) -> None:
    resting = OffloadedModule(frozen(), device, offload=True)
    host, wanted = storages(resting.module), output(resting.module, torch.device("cpu"))
    resting.prefetch()
    called = [copy.data_ptr() for copy in resting._prefetched]
    resting.prefetch()
    assert storages(resting.module) == host and [copy.data_ptr() for copy in resting._prefetched] == called
    with resting.on_device() as module:
        resting.prefetch()  # it is there already
        assert storages(module) == called and not set(called) & set(host)
        torch.testing.assert_close(output(module, device), wanted)
    assert storages(resting.module) == host and not resting._prefetched


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_nothing_is_copied_back(device: torch.device) -> None:
    resting = OffloadedModule(frozen(), device, offload=True)
    tensors = [tensor for _, tensor in resting._host_weights]
    before = [(tensor._version, tensor.data_ptr(), tensor.clone()) for tensor in tensors]
    for _ in range(2):
        resting.prefetch()
        with resting.on_device() as module:
            output(module, device)
    for tensor, (version, place, values) in zip(tensors, before, strict=True):
        assert (tensor._version, tensor.data_ptr()) == (version, place)  # nobody wrote to it
        assert torch.equal(tensor, values)


def test_a_run_is_the_same_and_each_encoder_is_called_before_the_one_before_it_rests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, metadata = tiny.build_wan_i2v(tmp_path / "model"), tiny.make_dataset(tmp_path / "data")
    said: list[str] = []
    call, on_device = OffloadedModule.prefetch, OffloadedModule.on_device

    def note_call(self: OffloadedModule) -> None:
        if not self._uses and not self._prefetched:
            said.append(f"call {type(self.module).__name__}")
        call(self)

    @contextmanager
    def note_awake(self: OffloadedModule) -> Iterator[nn.Module]:
        with on_device(self) as module:
            yield module
        said.append(f"rest {type(self.module).__name__}")

    flags = {"train_mode": "i2v", "max_train_steps": 2, "mixed_precision": "no"}
    staying = runs.train(runs.wan_flags(model, metadata, tmp_path / "staying", low_vram=None, **flags))
    monkeypatch.setattr(OffloadedModule, "call", note_call)
    monkeypatch.setattr(OffloadedModule, "awake", note_awake)
    resting = runs.train(runs.wan_flags(model, metadata, tmp_path / "resting", low_vram=True, **flags))
    assert (staying.code, resting.code) == (0, 0), resting.stderr
    same = ("step", "loss", "grad_norm", "rows")
    assert [[line[key] for key in same] for line in resting.metrics] == [
        [line[key] for key in same] for line in staying.metrics
    ]
    found, wanted = resting.weights(), staying.weights()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in found)
    vae, text, image = "AutoencoderKLWan", "UMT5EncoderModel", "CLIPVisionModel"
    # the VAE last, and alone: it encodes the clip, and then what is known of it
    step = [f"call {text}", f"call {image}", f"rest {text}", f"call {vae}", f"rest {image}", f"rest {vae}"]
    assert said[-8:] == [*step, f"call {vae}", f"rest {vae}"]
