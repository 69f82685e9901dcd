"""Tests that no training step synchronizes the host with the device."""

from __future__ import annotations

from pathlib import Path

import pytest
import runs
import tiny
import torch
from syncs import OWN_CODE, DeviceTensors, record_waits, recording_iterate_steps

from videox.device import AsyncScalars, DeviceEvent, to_device
from videox.optim.ema import Ema, Fp32Params
from videox.training import loop
from videox.training.loop import seed_generators

DEVICE = torch.device("cpu")
STEPS = 4
BUILD = {
    ("wan2.1", "normal"): tiny.build_wan_t2v,
    ("wan2.1", "i2v"): tiny.build_wan_i2v,
    ("wan2.1", "inpaint"): tiny.build_wan_i2v,
    ("hunyuanvideo", "normal"): tiny.build_hunyuan_t2v,
    ("hunyuanvideo", "i2v"): tiny.build_hunyuan_i2v,
}


# ---------------------------------------------------------------------------------------- the counting of the tests


def waits(work: object) -> list[str]:
    """Return what the host waits for in a function of a device tensor and a host tensor."""
    on_device, host = DeviceTensors(), torch.arange(4.0)
    with record_waits(on_device):
        there = host.to(DEVICE, non_blocking=True)
        work(there, host)  # type: ignore[operator]
    return [place.split(" ", 1)[1] for place in on_device.places]


@pytest.mark.parametrize(
    ("work", "what"),
    [
        (lambda d, h: float(d.sum()), "aten._local_scalar_dense.default"),
        (lambda d, h: bool(d.isfinite().all()), "aten._local_scalar_dense.default"),
        (lambda d, h: d.tolist(), "tolist"),
        (lambda d, h: d.mul(2).cpu(), "cpu"),
        (lambda d, h: d.numpy(), "numpy"),
        (lambda d, h: d.to("cpu"), "to('cpu')"),
        (lambda d, h: h.to(DEVICE), "to(device)"),
        (lambda d, h: d.nonzero(), "aten.nonzero.default"),
        (lambda d, h: d[d > 1], "aten.index.Tensor with a mask"),
        (lambda d, h: torch.zeros(4).copy_(d), "copy_"),
        (lambda d, h: torch.zeros(4, device=DEVICE).copy_(h), "copy_"),
        (lambda d, h: h[int(d[0]) :], "aten._local_scalar_dense.default"),
    ],
)
def test_each_kind_of_synchronization_is_counted(work: object, what: str) -> None:
    assert waits(work) == [what]


@pytest.mark.parametrize(
    "work",
    [
        lambda d, h: (float(h.sum()), h.tolist(), h.numpy(), h[h > 1], h.nonzero()),
        lambda d, h: torch.where(d > 1, d, 0) + torch.zeros(4, device=DEVICE).copy_(d),
        lambda d, h: to_device(h, DEVICE) + d,
        lambda d, h: torch.nn.utils.rnn.pad_sequence([d, d[:2]], batch_first=True),
        lambda d, h: AsyncScalars(d.sum(), d.max(), device=DEVICE).read(),
    ],
)
def test_asynchronous_operations_are_not_counted(work: object) -> None:
    assert waits(work) == []


def test_weights_count_as_on_the_device() -> None:
    layer, on_device = torch.nn.Linear(4, 4), DeviceTensors()
    with record_waits(on_device):
        layer(torch.ones(2, 4)).sum().item()
    (place,) = on_device.places
    assert place.startswith(f"{__file__}:")


# ------------------------------------------------------------------------------------------ scalars, events, EMA


def test_async_scalars_round_trip() -> None:
    numbers = AsyncScalars(
        torch.tensor(0.1, dtype=torch.float64), torch.tensor(float("inf")), torch.tensor(True), torch.arange(2.0),
        device=DEVICE,
    )  # fmt: skip
    assert numbers.read() == [0.1, float("inf"), 1.0, 0.0, 1.0]


def test_device_event_of_the_cpu_uses_the_host_clock() -> None:
    times = iter([3.0, 5.5])
    first, second = DeviceEvent(DEVICE, lambda: next(times)), DeviceEvent(DEVICE, lambda: next(times))
    assert second.since(first) == 2.5 and not first.on_device


def test_ema_update_does_not_synchronize() -> None:
    weights = {"a": torch.full((3,), 2.0)}
    ema = Ema(Fp32Params(("a",), weights.__getitem__, lambda name, new: None), decay=0.5)
    on_device = DeviceTensors()
    with record_waits(on_device):
        on_device.add([weights, ema.shards])
        there = [torch.tensor(applied).to(DEVICE, non_blocking=True) for applied in (True, False, True)]
        for applied in there:
            weights["a"] += 1
            ema.update(applied)
    assert on_device.places == []
    assert ema.updates == 2
    assert ema.shards["a"].tolist() == pytest.approx([3 + (5 - 3) * (1 - 2 / 11)] * 3)


# ------------------------------------------------------------------------------------------------- training runs


def waits_of_run(
    family: str, mode: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **asked: object
) -> list[list[str]]:
    """Return the places where the host waits in each step of a run, except the last, which ends in a save."""
    model, metadata = BUILD[family, mode](folder / "model"), tiny.make_dataset(folder / "data")
    script = runs.train_script(family)
    flags = {"max_train_steps": STEPS, "train_mode": mode, "checkpointing_steps": STEPS, **asked}
    if "latent_cache" in asked:
        filled = runs.train(
            runs.train_flags(family, model, metadata, folder / "fill", cache_only=True, **flags), script
        )
        assert filled.code == 0, filled.stderr
    iterate_steps, steps = recording_iterate_steps()
    monkeypatch.setattr(loop, "iterate_steps", iterate_steps)
    done = runs.train(runs.train_flags(family, model, metadata, folder / "out", **flags), script)
    assert done.code == 0, done.stderr
    assert [record["step"] for record in done.metrics] == list(range(1, STEPS + 1))
    assert len(steps) == STEPS and steps[-1]  # the save reads the weights, so waits must be seen
    return steps[:-1]


@pytest.mark.parametrize(
    ("family", "mode"), [pytest.param("wan2.1", "i2v", marks=pytest.mark.slow), ("hunyuanvideo", "normal")]
)
def test_no_step_waits_for_the_device(family: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = waits_of_run(family, mode, tmp_path, monkeypatch, latent_cache=tmp_path / "cache")
    assert found == [[]] * (STEPS - 1)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "mode"), BUILD)
@pytest.mark.parametrize(
    "asked",
    [
        {"train_batch_size": 2, "gradient_accumulation_steps": 2, "use_ema": True, "motion_sub_loss": True},
        {"initial_grad_norm_ratio": 5.0, "abnormal_norm_clip_start": 1, "mixed_precision": "no"},
        {"lora_rank": 4, "gradient_checkpointing": None},
    ],
    ids=["EMA", "spikes", "LoRA"],
)
def test_no_step_waits_with_any_feature(
    family: str, mode: str, asked: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = waits_of_run(family, mode, tmp_path, monkeypatch, latent_cache=tmp_path / "cache", **asked)
    assert found == [[]] * (STEPS - 1)


# Without a cache the encoders' libraries need their inputs, images and text lengths, on the host.
ENCODING = {("vae.py", "cpu"), ("vae.py", "numpy"), ("hunyuan_text.py", "aten._local_scalar_dense.default")}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "mode"), BUILD)
def test_without_a_cache_only_encoders_wait(
    family: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {place for step in waits_of_run(family, mode, tmp_path, monkeypatch) for place in step}
    ours = {(Path(place.split(":")[0]).name, place.split(" ", 1)[1]) for place in places if place.startswith(OWN_CODE)}
    assert ours <= ENCODING
    theirs = ("/diffusers/pipelines/", "/transformers/")
    assert all(place.startswith(OWN_CODE) or any(part in place for part in theirs) for place in places), places


@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
def test_seed_generators_equals_torch_manual_seed(seed: int) -> None:
    torch.manual_seed(seed)
    expected = torch.randn(5)
    seed_generators(seed)
    assert torch.equal(torch.randn(5), expected)
