"""Tests of videox.optim.build: trainable parameters of a real Wan, learning-rate schedules, gradient clipping."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import WanTransformer3DModel
from diffusers.optimization import get_scheduler
from hypothesis import given
from hypothesis import strategies as st

from videox.diffusion.flow_matching import keyed_noise
from videox.errors import FLAGS, UserError
from videox.optim.build import (
    choose_trainable,
    clip_gradients,
    clip_limit,
    gradient_norm,
    lr_schedule,
    make_optimizer,
    parameter_groups,
    set_learning_rate,
)
from videox.optim.registry import LR_SCHEDULERS

ADAM = {"betas": (0.9, 0.999), "weight_decay": 3e-2, "epsilon": 1e-10}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_wan_t2v(tmp_path_factory.mktemp("wan"))


@pytest.fixture
def model(folder: Path) -> WanTransformer3DModel:
    return WanTransformer3DModel.from_pretrained(folder, subfolder="transformer").train()


def names_of(model: torch.nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def trainable_names(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def backward(model: WanTransformer3DModel) -> None:
    """Compute the gradients of a real step."""
    latents, text = keyed_noise(1, (1, 16, 2, 4, 6)), keyed_noise(2, (1, 8, 32))
    output = model(latents, torch.tensor([500.0]), text, return_dict=False)[0]
    (output - keyed_noise(3, output.shape)).square().mean().backward()


# ---------------------------------------------------------------------------------------------- trainable parameters


def test_a_dot_selects_all_parameters(model: WanTransformer3DModel) -> None:
    full, half = choose_trainable(model, ["."], [])
    assert "scale_shift_table" in full  # a top-level parameter: its name has no dot
    assert full == names_of(model)
    assert half == []
    assert trainable_names(model) == set(full)


@pytest.mark.parametrize("patterns", [["attn1"], ["blocks.0."], ["scale_shift_table"], ["attn1", "ffn", "proj_out"]])
def test_a_string_selects_the_names_that_contain_it(model: WanTransformer3DModel, patterns: list[str]) -> None:
    full, half = choose_trainable(model, patterns, [])
    assert full == [name for name in names_of(model) if any(pattern in name for pattern in patterns)]
    assert 0 < len(full) < len(names_of(model))
    assert half == []
    assert trainable_names(model) == set(full)


def test_frozen_parameters_get_no_gradient(model: WanTransformer3DModel) -> None:
    full, _ = choose_trainable(model, ["attn2"], [])
    backward(model)
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == set(full)


def test_a_second_selection_replaces_the_first(model: WanTransformer3DModel) -> None:
    choose_trainable(model, ["attn1"], [])
    choose_trainable(model, ["."], [])
    assert trainable_names(model) == set(names_of(model))


@pytest.mark.parametrize(("full_flag", "pattern", "similar"), [(True, "atn1", "attn1"), (False, "blokcs", "blocks")])
def test_a_string_without_a_match_is_an_error_with_similar_names(
    model: WanTransformer3DModel, full_flag: bool, pattern: str, similar: str
) -> None:
    before = trainable_names(model)
    with pytest.raises(UserError) as raised:
        choose_trainable(model, ["attn1", pattern] if full_flag else ["attn1"], [] if full_flag else [pattern])
    assert raised.value.exit_code == FLAGS
    assert raised.value.where == f"--trainable_modules{'' if full_flag else '_low_learning_rate'}"
    assert pattern in raised.value.what
    assert similar in raised.value.hint
    assert trainable_names(model) == before


def test_the_hint_always_has_some_names(model: WanTransformer3DModel) -> None:
    with pytest.raises(UserError) as raised:
        choose_trainable(model, ["zzzzzzzz"], [])
    named = raised.value.hint.removeprefix("try ").split(", or ")[0].split(", ")
    assert len(named) == 3
    assert all(any(name in parameter for parameter in names_of(model)) for name in named)


def test_no_trainable_parameter_is_an_error(model: WanTransformer3DModel) -> None:
    with pytest.raises(UserError) as raised:
        choose_trainable(model, [], [])
    assert raised.value.where == "--trainable_modules"


# ------------------------------------------------------------------------------------------------ learning rates


def test_names_in_both_lists_train_at_the_full_lr(model: WanTransformer3DModel) -> None:
    full, half = choose_trainable(model, ["attn1"], ["blocks"])
    assert not set(full) & set(half)
    assert set(full) | set(half) == {name for name in names_of(model) if "blocks" in name}
    assert all("attn1" in name for name in full)
    assert all("attn1" not in name for name in half)


def test_two_learning_rates_are_applied(model: WanTransformer3DModel) -> None:
    full, half = choose_trainable(model, ["attn1"], ["ffn"])
    groups = parameter_groups(model, full, half)
    assert [group["rate_factor"] for group in groups] == [1.0, 0.5]
    optimizer = make_optimizer(groups, learning_rate=1e-3, **(ADAM | {"weight_decay": 0.0}))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for lr in (1e-3, 4e-3):
        set_learning_rate(optimizer, lr)
        assert [group["lr"] for group in optimizer.param_groups] == [lr, lr / 2]
        model.zero_grad()
        start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        backward(model)
        optimizer.state.clear()  # the first step of Adam changes each element by the learning rate
        optimizer.step()
        for name, parameter in model.named_parameters():
            change = (parameter.detach() - start[name]).abs().max()
            expected = lr if name in full else lr / 2 if name in half else 0.0
            assert float(change) == pytest.approx(expected, rel=1e-2), name
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters() if n not in {*full, *half})


def test_an_empty_group_is_left_out(model: WanTransformer3DModel) -> None:
    full, half = choose_trainable(model, [], ["ffn"])
    assert full == []
    (group,) = parameter_groups(model, full, half)
    assert group["rate_factor"] == 0.5
    assert len(group["params"]) == len(half)


def test_the_optimizer_is_bit_identical_to_torch_adamw(model: WanTransformer3DModel, folder: Path) -> None:
    full, _ = choose_trainable(model, ["."], [])
    other = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer").train()
    optimizer_built = make_optimizer(parameter_groups(model, full, []), learning_rate=1e-3, **ADAM)
    adam = {"betas": (0.9, 0.999), "weight_decay": 3e-2, "eps": 1e-10}
    plain = torch.optim.AdamW(other.parameters(), lr=1e-3, fused=True, **adam)
    for _ in range(3):
        for one_model, optimizer in ((model, optimizer_built), (other, plain)):
            optimizer.zero_grad()
            backward(one_model)
            optimizer.step()
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


# ------------------------------------------------------------------------------------------------------ schedule


def test_all_diffusers_schedules_are_available() -> None:
    expected_names = {"constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"}
    assert set(LR_SCHEDULERS) == expected_names


@pytest.mark.parametrize("name", LR_SCHEDULERS)
@pytest.mark.parametrize("warmup", [0, 1, 10, 49, 80])
def test_schedule_equals_diffusers_at_every_step(name: str, warmup: int) -> None:
    parameter = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=50)
    factor = lr_schedule(name, warmup, 50)
    for step in range(50):
        assert factor(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-15)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("name", LR_SCHEDULERS)
def test_schedule_is_a_function_of_the_step_only(name: str) -> None:
    first, second = lr_schedule(name, 10, 50), lr_schedule(name, 10, 50)
    forward = [first(step) for step in range(50)]
    backward_order = [second(step) for step in reversed(range(50))]
    assert forward == backward_order[::-1]
    assert all(0 <= value <= 1 for value in forward)
    assert forward[10] == 1.0


def test_warm_up_is_linear_from_zero() -> None:
    factor = lr_schedule("constant_with_warmup", 100, 1000)
    assert [factor(step) for step in (0, 1, 50, 99, 100, 5000)] == [0.0, 0.01, 0.5, 0.99, 1.0, 1.0]


# ------------------------------------------------------------------------------------------------------ clipping


LIMITS = {"max_grad_norm": 0.05, "initial_ratio": 5.0, "ramp_steps": 1000}


@pytest.mark.parametrize(
    ("norm", "step", "limit"),
    [
        (0.0, 0, 0.25),
        (9.0, 0, 0.25),
        (9.0, 500, 0.15),
        (0.01, 1000, 0.05),
        (9.0, 1000, 0.05),
        (0.25, 1001, 0.05),  # exactly five times the limit is not abnormal
        (0.3, 1001, 0.05 / 6),
        (0.5, 1001, 0.005),
        (9.0, 1001, 0.005),  # never below a tenth of the limit
        (math.inf, 2000, 0.005),
    ],
)
def test_clip_limit_ramp_and_abnormal_norms(norm: float, step: int, limit: float) -> None:
    assert clip_limit(torch.tensor(norm), step, **LIMITS).item() == pytest.approx(limit)


@given(st.floats(0, 1e6), st.integers(0, 10_000), st.integers(1, 2000), st.floats(1e-6, 1e3))
def test_without_a_ramp_the_limit_is_max_grad_norm(norm: float, step: int, ramp: int, limit: float) -> None:
    actual = clip_limit(torch.tensor(norm), step, max_grad_norm=limit, initial_ratio=1.0, ramp_steps=ramp)
    assert actual.item() == pytest.approx(limit)


@given(st.integers(1, 2000), st.floats(1.001, 100), st.floats(0, 1e3))
def test_the_limit_never_rises(ramp: int, ratio: float, norm: float) -> None:
    values = [
        clip_limit(torch.tensor(norm), step, max_grad_norm=0.05, initial_ratio=ratio, ramp_steps=ramp).item()
        for step in range(0, ramp + 3, max(1, ramp // 20))
    ]
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(values))
    assert values[0] == pytest.approx(0.05 * ratio)


@pytest.mark.parametrize("ratio_to_norm", [0.01, 0.5, 1.0, 2.0, 1e9])
def test_clipping_is_bit_identical_to_torch(model: WanTransformer3DModel, folder: Path, ratio_to_norm: float) -> None:
    other = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer").train()
    choose_trainable(model, ["blocks"], [])
    choose_trainable(other, ["blocks"], [])
    for one_model in (model, other):
        backward(one_model)
    norm = gradient_norm(model.parameters())
    limit = float(norm) * ratio_to_norm
    expected = torch.nn.utils.clip_grad_norm_(other.parameters(), limit)
    clip_gradients(model.parameters(), norm, torch.tensor(limit, dtype=torch.float64))
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    by_hand = math.sqrt(sum(float(p.grad.double().square().sum()) for p in other.parameters() if p.grad is not None))
    assert float(gradient_norm(other.parameters())) == pytest.approx(by_hand, rel=1e-5)
    for optimizer_built, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert (optimizer_built.grad is None) == (theirs.grad is None)
        assert optimizer_built.grad is None or torch.equal(optimizer_built.grad, theirs.grad)
    assert float(gradient_norm(model.parameters())) <= limit * (1 + 1e-5)
    if ratio_to_norm > 1:
        assert float(gradient_norm(model.parameters())) == float(norm)
