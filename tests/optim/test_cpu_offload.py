"""Tests of videox.optim.cpu_offload: steps equal those of the plain optimizer, with moments in host memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
import torch
from tensors import DEVICES
from torch import nn

from videox.engine.base import hyperparameters, restore_hyperparameters
from videox.optim.build import clip_gradients, gradient_norm, make_optimizer, set_learning_rate, step_if
from videox.optim.cpu_offload import CpuOffloadOptimizer, thread_notes
from videox.optim.ema import Fp32Params
from videox.optim.registry import kind_of
from videox.optim.state import load_optimizer_tensors, optimizer_tensors
from videox.run.checkpoint import read_manifest
from videox.training.memory_check import try_batch

ADAMW = partial(torch.optim.AdamW, betas=(0.9, 0.99), weight_decay=0.1, eps=1e-8, fused=True)
SHAPES = [(7, 5), (64,), (3, 2, 4), (33, 9), ()]
RATES = [1e-2, 3e-3, 0.0, 2e-2, 1e-3]


def weights(device: torch.device) -> dict[str, nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return {f"p{n}": nn.Parameter(torch.randn(s, generator=draw).to(device)) for n, s in enumerate(SHAPES)}


def optimizer_over(
    parameters: dict[str, nn.Parameter], make: Callable[..., torch.optim.Optimizer]
) -> torch.optim.Optimizer:
    """Return an optimizer over two groups that differ in their hyperparameters."""
    one, other = [parameters[name] for name in ("p0", "p3", "p4")], [parameters[name] for name in ("p1", "p2")]
    groups = [{"params": one, "rate_factor": 1.0}, {"params": other, "rate_factor": 0.5, "weight_decay": 0.0}]
    return make(groups, lr=1e-2)


def set_gradients(parameters: dict[str, nn.Parameter], step: int, *, left_out: str = "") -> None:
    draw = torch.Generator().manual_seed(100 + step)
    for name, parameter in parameters.items():
        gradient = torch.randn(parameter.shape, generator=draw)
        parameter.grad = None if name == left_out else gradient.to(parameter)


def train(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], steps: range) -> None:
    """Run clipped steps at several learning rates; in one a gradient is missing, one is not finite and skipped."""
    for step in steps:
        set_learning_rate(optimizer, RATES[step % len(RATES)])
        set_gradients(parameters, step, left_out="p2" if step == 1 else "")
        if step == 3:
            parameters["p0"].grad[0, 0] = torch.inf
        norm = gradient_norm(parameters.values())
        clip_gradients(parameters.values(), norm, torch.tensor(0.5, dtype=torch.float64, device=norm.device))
        step_if(optimizer, norm.isfinite())
        optimizer.zero_grad(set_to_none=True)


def check_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], device: torch.device) -> None:
    """Check that tensors are equal: bitwise if the device is a CPU, too."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        bits = {"rtol": 0, "atol": 0} if device.type == "cpu" else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(tensor.cpu(), other[name].cpu(), **bits)


def tensors_of(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    return optimizer_tensors(optimizer, {parameter: name for name, parameter in parameters.items()})


@pytest.mark.parametrize("stage_bytes", [0, 1024, 2**20], ids=["one by one", "a few", "at once"])
@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_steps_equal_the_plain_optimizers(device: torch.device, stage_bytes: int) -> None:
    offload_params, plain_params = weights(device), weights(device)
    offload = optimizer_over(offload_params, partial(CpuOffloadOptimizer, make=ADAMW, stage_bytes=stage_bytes))
    plain = optimizer_over(plain_params, ADAMW)
    for step in range(8):
        train(offload, offload_params, range(step, step + 1))
        train(plain, plain_params, range(step, step + 1))
        check_same(offload_params, plain_params, device)
        check_same(tensors_of(offload, offload_params), tensors_of(plain, plain_params), device)
    assert all(
        group["lr"] == other["lr"] for group, other in zip(offload.param_groups, plain.param_groups, strict=True)
    )


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_gradients_and_weights_are_staged_in_host_memory(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = weights(device)
    param_pointers = {tensor.untyped_storage().data_ptr() for tensor in parameters.values()}
    staged: list[tuple[str, bool]] = []
    inner_step = torch.optim.AdamW.step

    def recording_step(self: torch.optim.AdamW, *given: Any) -> Any:
        for host_param in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            for tensor in (host_param, host_param.grad):
                assert tensor.untyped_storage().data_ptr() not in param_pointers
                staged.append((tensor.device.type, tensor.is_pinned()))
        return inner_step(self, *given)

    monkeypatch.setattr(torch.optim.AdamW, "step", recording_step)
    optimizer = optimizer_over(parameters, partial(CpuOffloadOptimizer, make=ADAMW, stage_bytes=0))
    set_gradients(parameters, 0)
    param_pointers |= {parameter.grad.untyped_storage().data_ptr() for parameter in parameters.values()}
    optimizer.step()
    assert staged == [("cpu", device.type == "cuda")] * (2 * len(SHAPES))
    for parameter in parameters.values():
        assert {tensor.device.type for tensor in optimizer.state[parameter].values()} == {"cpu"}
    stages = sum(stage.numel() for stage in optimizer._stages)
    assert stages == 2 * 2 * max(-(-parameter.numel() * 4 // 64) * 64 for parameter in parameters.values())
    # between steps the host has only the moments: the host parameters have no memory
    assert [host_param.numel() for host_param in optimizer._host_params.values()] == [0] * len(SHAPES)


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_a_weight_changed_by_other_code_is_stepped_from_its_new_value(device: torch.device) -> None:
    offload_params, plain_params = weights(device), weights(device)
    offload, plain = (
        optimizer_over(offload_params, partial(CpuOffloadOptimizer, make=ADAMW)),
        optimizer_over(plain_params, ADAMW),
    )
    for optimizer, parameters in ((offload, offload_params), (plain, plain_params)):
        train(optimizer, parameters, range(2))
        with torch.no_grad():
            parameters["p1"].fill_(3.0)
            parameters["p0"].data = torch.full_like(parameters["p0"], -2.0)
        train(optimizer, parameters, range(2, 3))
    check_same(offload_params, plain_params, device)


@pytest.mark.parametrize("direction", ["to the host", "from the host", "on the host"])
@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_moments_move_between_host_and_device_on_resume(device: torch.device, direction: str) -> None:
    """Each optimizer loads the other's moments to its own device and continues as an uninterrupted run."""
    plain, offload = ADAMW, partial(CpuOffloadOptimizer, make=ADAMW)
    before, after = {
        "to the host": (plain, offload),
        "from the host": (offload, plain),
        "on the host": (offload, offload),
    }[direction]
    uninterrupted, first = weights(device), weights(device)
    train(optimizer_over(uninterrupted, before), uninterrupted, range(5))
    saved = optimizer_over(first, before)
    train(saved, first, range(2))
    second = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in first.items()}
    resumed = optimizer_over(second, after)
    settings = hyperparameters(resumed)
    load_optimizer_tensors(resumed, {p: name for name, p in second.items()}, tensors_of(saved, first))
    assert hyperparameters(resumed) == settings
    for parameter in second.values():
        devices = {tensor.device.type for tensor in resumed.state[parameter].values()}
        assert devices == {"cpu" if after is offload else device.type}
    train(resumed, second, range(2, 5))
    check_same(second, uninterrupted, device)


def test_restored_hyperparameters_are_used_by_the_next_step() -> None:
    offload_params, plain_params = weights(DEVICES[0]), weights(DEVICES[0])
    offload, plain = (
        optimizer_over(offload_params, partial(CpuOffloadOptimizer, make=ADAMW)),
        optimizer_over(plain_params, ADAMW),
    )
    for optimizer, parameters in ((offload, offload_params), (plain, plain_params)):
        changed_groups = [{**group, "betas": (0.5, 0.6), "weight_decay": 0.3} for group in hyperparameters(optimizer)]
        restore_hyperparameters(optimizer, changed_groups)
        train(optimizer, parameters, range(3))
    check_same(offload_params, plain_params, DEVICES[0])
    assert [group["rate_factor"] for group in offload.param_groups] == [1.0, 0.5]


@pytest.mark.slow
def test_bfloat16_weights_are_rounded_as_by_the_plain_optimizer() -> None:
    settings: dict[str, Any] = {"betas": (0.9, 0.99), "weight_decay": 0.1, "epsilon": 1e-8, "learning_rate": 1e-2}
    trained = []
    for name in ("adamw_bf16", "adamw_bf16_offload"):
        parameters = {key: nn.Parameter(tensor.detach().bfloat16()) for key, tensor in weights(DEVICES[0]).items()}
        groups = [{"params": list(parameters.values()), "rate_factor": 1.0}]
        optimizer = make_optimizer(groups, name=name, **settings)
        for step in range(4):
            set_learning_rate(optimizer, RATES[step])
            set_gradients(parameters, step)
            torch.manual_seed(step)
            optimizer.step()
        trained.append({**parameters, **tensors_of(optimizer, parameters)})
        assert {tensor.dtype for tensor in optimizer.state[parameters["p0"]].values()} == {torch.float32}
    check_same(*trained, DEVICES[0])


class EngineStub:
    """The attributes of an engine that try_batch uses."""

    def __init__(self) -> None:
        self.model = nn.Linear(100, 100)

    def fp32_params(self) -> Any:
        named = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        return Fp32Params(tuple(named), named.__getitem__, lambda name, values: named[name].copy_(values))

    def zero_grad(self) -> None:
        self.model.zero_grad(set_to_none=True)


@pytest.mark.parametrize(
    ("name", "per_parameter"), [("adamw", 8), ("adamw8bit", 2), ("adamw_bf16", 8), ("adamw_offload", 0)]
)
def test_memory_check_allocates_what_the_moments_will_take(
    name: str, per_parameter: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine: Any = EngineStub()
    allocated: list[int] = []
    empty = torch.empty

    def recording_empty(*given: Any, **by_name: Any) -> torch.Tensor:
        tensor = empty(*given, **by_name)
        allocated.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(torch, "empty", recording_empty)
    try_batch(engine, {}, lambda batch: None, moment_bytes=kind_of(name).moment_bytes)  # type: ignore[arg-type]
    assert sum(allocated) == per_parameter * (100 * 100 + 100)


def test_a_launch_with_too_few_threads_gets_a_note() -> None:
    (line,) = thread_notes("adamw_offload", 1, 64, {"LOCAL_WORLD_SIZE": "4"})
    assert "adamw_offload steps on the host with 1 of 16 cores" in line and "--num_cpu_threads_per_process 16" in line
    assert thread_notes("adamw_offload", 16, 64, {"LOCAL_WORLD_SIZE": "4"}) == []
    assert thread_notes("adamw_offload", 16, 64, {}) != []
    assert thread_notes("adamw_offload", 1, 1, {}) == []


@pytest.mark.slow
def test_resume_with_and_without_cpu_offload_is_bit_identical(tmp_path: Path) -> None:
    model, metadata = tiny.build_wan_t2v(tmp_path / "model"), tiny.make_dataset(tmp_path / "data", copies=2)

    def run(name: str, optimizer: str, **changes: object) -> runs.Outcome:
        flags = {"optimizer": optimizer, "max_train_steps": 3, "checkpointing_steps": 1, "num_train_epochs": None}
        flags |= {"trainable_modules": ["attn1."], "learning_rate": "1e-3", "mixed_precision": "no"}
        outcome = runs.train(runs.train_flags("wan2.1", model, metadata, tmp_path / name, **flags, **changes))
        assert outcome.code == 0, outcome.stderr
        return outcome

    expected = run("plain", "adamw")
    run("mixed", "adamw")
    for step, optimizer in ((1, "adamw_offload"), (2, "adamw")):
        for late in range(step + 1, 4):
            shutil.rmtree(tmp_path / "mixed" / f"checkpoint-{late}")
        mixed = run("mixed", optimizer, resume_from_checkpoint="latest")
    saved_by = [read_manifest(mixed.folder / f"checkpoint-{n}")["description"]["optimizer"] for n in (1, 2, 3)]
    assert saved_by == ["adamw", "adamw_offload", "adamw"]
    assert mixed.losses == expected.losses and len(expected.losses) == 3
    for folder in ("transformer", "checkpoint-3/transformer", "checkpoint-3/optimizer"):
        offload_params, plain_params = mixed.weights(folder), expected.weights(folder)
        assert offload_params.keys() == plain_params.keys() and all(
            torch.equal(offload_params[name], plain_params[name]) for name in offload_params
        ), folder
