"""Tests of videox.encoders.offload: weights are on the device only while they are used."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import diffusers
import pytest
import runs
import tiny
import torch
from tensors import DEVICES
from torch import nn

from videox.diffusion.flow_matching import keyed_noise
from videox.encoders.offload import OffloadedModule, OffloadedTransformer


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


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_on_calls_copies_the_weights_for_each_call(device: torch.device) -> None:
    offloaded = OffloadedModule(small_encoder(), device, offload=True)
    host_pointers, expected = data_pointers(offloaded.module), output(offloaded.module, torch.device("cpu"))
    during: list[bool] = []
    offloaded.module[0].register_forward_hook(
        lambda *_: during.append(bool(set(data_pointers(offloaded.module)) & set(host_pointers)))
    )
    with offloaded.on_calls() as module:
        for _ in range(2):
            torch.testing.assert_close(output(module, device), expected)
            assert data_pointers(module) == host_pointers
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            module(torch.zeros(2, 5, device=device))
        torch.testing.assert_close(output(module, device), expected)  # a failure does not end the use
    assert data_pointers(offloaded.module) == host_pointers
    assert during == [False] * 3 and not hasattr(offloaded.module, "_hf_hook")
    output(offloaded.module, torch.device("cpu"))
    assert during[-1]  # outside of the context nothing is copied


def test_on_calls_keeps_a_vae_between_its_encode_and_its_decode(tmp_path: Path) -> None:
    folder = tiny.build_wan_t2v(tmp_path / "model")
    vae = diffusers.AutoencoderKLWan.from_pretrained(folder, subfolder="vae")
    offloaded = OffloadedModule(vae, torch.device("cpu:0"), offload=True)
    host_pointers = data_pointers(vae)
    with offloaded.on_calls():
        latents = vae.encode(keyed_noise(1, (1, 3, 5, 16, 16))).latent_dist.mode()
        copies = data_pointers(vae)
        vae.decode(latents)
        assert data_pointers(vae) == copies and not set(copies) & set(host_pointers)
    assert data_pointers(vae) == host_pointers


class Blocks(nn.Module):
    """Four layers, called one after the other, with a layer before them and a weight that is in none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale = nn.Linear(6, 6), nn.Parameter(torch.ones(6))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x) * self.scale
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("whole", [True, False])
def test_a_transformer_that_does_not_fit_is_copied_block_by_block(device: torch.device, whole: bool) -> None:
    asked: list[int] = []

    def fits(needed: int) -> bool:
        asked.append(needed)
        return whole

    model = Blocks().requires_grad_(False).eval()
    expected = output(model, torch.device("cpu"))
    transformer = OffloadedTransformer(model, model.blocks, device, fits)
    host_pointers = data_pointers(model)
    there: list[list[int]] = []  # the blocks on the device while each block runs

    def note(*_: object) -> None:
        copied = [not set(data_pointers(block)) & set(host_pointers) for block in model.blocks]
        waiting = [bool(block._prefetched) for block in transformer._blocks]
        there.append([number for number in range(4) if copied[number] or waiting[number]])

    for block in model.blocks:
        block[0].register_forward_hook(note)
    for _ in range(2):
        with transformer.on_device() as module:
            assert module is model
            torch.testing.assert_close(output(module, device), expected)
            torch.testing.assert_close(output(module, device), expected)
        assert data_pointers(model) == host_pointers
    one_pass = [[0, 1, 2, 3]] * 4 if whole else [[0, 1], [1, 2], [2, 3], [3]]
    assert there == one_pass * 4
    assert asked == [sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))] * 2
    with transformer.on_device() as module, pytest.raises(RuntimeError, match="mat1 and mat2"):
        module(torch.zeros(2, 5, device=device))
    assert data_pointers(model) == host_pointers and not any(block._prefetched for block in transformer._blocks)


def test_sample_clips_are_the_same_with_low_vram(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline calls one encoder at a time; the other one and the VAE are not on the device meanwhile."""
    model, metadata = tiny.build_wan_t2v(tmp_path / "model"), tiny.make_dataset(tmp_path / "data")
    flags = {
        "max_train_steps": 1, "mixed_precision": "no", "validation_prompts": ["a cat --f 5 --w 64 --h 48"],
        "sample_steps": 2, "tokenizer_max_length": 16,
    }  # fmt: skip
    resident = runs.train(runs.wan_flags(model, metadata, tmp_path / "resident", low_vram=None, **flags))
    used: list[str] = []
    on_device = OffloadedModule.on_device

    @contextmanager
    def record_use(self: OffloadedModule) -> Iterator[nn.Module]:
        used.append(type(self.module).__name__)
        assert used.count("") == len(used) - used.count("") - 1  # every earlier use has ended
        with on_device(self) as module:
            yield module
        used.append("")

    monkeypatch.setattr(OffloadedModule, "on_device", record_use)
    offloaded = runs.train(runs.wan_flags(model, metadata, tmp_path / "offloaded", low_vram=True, **flags))
    assert (resident.code, offloaded.code) == (0, 0), offloaded.stderr
    clips = [sorted((run.folder / "samples").glob("*.mp4")) for run in (resident, offloaded)]
    assert len(clips[0]) == 2
    assert [path.read_bytes() for path in clips[0]] == [path.read_bytes() for path in clips[1]]
    assert {"UMT5EncoderModel", "AutoencoderKLWan"} <= set(used)
