"""Tests of videox.engine.saved_state: which weights and moments are refused, and how they are named."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from videox.engine.saved_state import EMA, LARGEST_WEIGHT, WEIGHT, SavedTensor, find_fault, moment_tensors
from videox.optim.build import make_optimizer, parameter_groups


def tensors(values: torch.Tensor, kind: str = WEIGHT) -> list[SavedTensor]:
    return [SavedTensor(WEIGHT, "first", torch.ones(3)), SavedTensor(kind, "blocks.0.weight", values)]


@settings(max_examples=40)
@given(
    size=st.integers(1, 300),
    place=st.integers(0, 299),
    value=st.sampled_from([math.nan, math.inf, -math.inf, 65536.0, -1e30, 65504.0, -65504.0, 0.0, 1e-40]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_one_bad_value_anywhere_is_found_and_a_good_one_is_not(
    size: int, place: int, value: float, dtype: torch.dtype
) -> None:
    values = torch.linspace(-1, 1, size, dtype=dtype)
    values[place % size] = value
    stored = float(values[place % size])  # bfloat16 rounds 65504 up
    bad = not math.isfinite(stored) or abs(stored) > LARGEST_WEIGHT
    fault = find_fault(tensors(values))
    assert bool(fault) == bad
    assert not bad or fault.startswith("blocks.0.weight ")


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        (WEIGHT, math.nan, "blocks.0.weight contains NaN"),
        (EMA, -math.inf, "EMA of blocks.0.weight contains an infinite value"),
        (WEIGHT, -70000.0, "blocks.0.weight has the value -7e+04, and none above 65,504 is plausible"),
        ("exp_avg", 3e18, "exp_avg of blocks.0.weight has the value 3e+18, and none above 1e+18 is plausible"),
        ("exp_avg", -1e5, ""),
        ("exp_avg_sq", -1e-12, "exp_avg_sq of blocks.0.weight has the value -1e-12, and a mean of squares is never"),
        ("exp_avg_sq", 1e5, ""),
    ],
)
def test_the_tensor_and_what_was_found_are_named(kind: str, value: float, said: str) -> None:
    values = torch.zeros(5)
    values[3] = value
    assert find_fault(tensors(values, kind)).startswith(said)
    assert bool(find_fault(tensors(values, kind))) == bool(said)


def test_several_bad_tensors_are_counted() -> None:
    bad = [SavedTensor(WEIGHT, f"w{number}", torch.tensor([math.nan])) for number in range(3)]
    assert find_fault(bad) == "w0 contains NaN; in all, 3 tensors are refused"


def test_what_has_no_checked_values_is_sound() -> None:
    assert find_fault([]) == ""
    assert find_fault(tensors(torch.empty(0)) + tensors(torch.tensor([2**60]))) == ""


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_the_moments_of_an_optimizer_are_checked(name: str) -> None:
    model = torch.nn.Linear(64, 64)
    groups = parameter_groups(model, ["weight", "bias"], [])
    asked = {"learning_rate": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.0, "epsilon": 1e-8}
    optimizer = make_optimizer(groups, name=name, **asked)
    names = {parameter: key for key, parameter in model.named_parameters()}
    model(torch.ones(2, 64)).sum().backward()
    optimizer.step()
    assert find_fault(moment_tensors(optimizer, names)) == ""
    moments = [values for _, values in optimizer.state[model.weight].items() if isinstance(values, torch.Tensor)]
    next(values for values in moments if values.is_floating_point() and values.dim())[1] = math.inf
    assert "of weight contains an infinite value" in find_fault(moment_tensors(optimizer, names))
