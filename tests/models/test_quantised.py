"""Tests of videox.models.quantised: values as the libraries have them, exact gradients, and what autograd saves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

from videox.models.base_precision import FP8, INT8, NF4, is_quantised, quantised_bytes
from videox.models.quantised import QuantisedLinear, dequantise, element_count, quantise

QUANTISED = (FP8, INT8, NF4)
# Relative error of the weight, L2: of normal weights, and of rows with a few values that are 20 times as large.
ERRORS = {FP8: (0.03, 0.035), INT8: (0.01, 0.06), NF4: (0.10, 0.25)}


def weight_of(rows: int = 96, columns: int = 128, *, heavy: bool = False) -> Tensor:
    torch.manual_seed(0)
    weight = torch.randn(rows, columns)
    if heavy:
        weight[:, ::61] *= 20
    return (weight / columns**0.5).to(torch.bfloat16)


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("precision", QUANTISED)
def test_the_error_of_a_weight_is_that_of_its_precision(precision: str, heavy: bool) -> None:
    weight = weight_of(heavy=heavy)
    values, scale = quantise(weight, precision)
    assert values.nbytes + scale.nbytes == quantised_bytes(precision, weight.numel(), weight.shape[0])
    found = dequantise(values, scale, precision, weight.shape, torch.bfloat16)
    assert found.dtype == torch.bfloat16 and found.shape == weight.shape
    error = float((found.float() - weight.float()).norm() / weight.float().norm())
    limit = ERRORS[precision][heavy]
    assert limit / 8 < error < limit


@pytest.mark.parametrize(("precision", "config"), [(FP8, Float8WeightOnlyConfig), (INT8, Int8WeightOnlyConfig)])
def test_eight_bit_weights_are_those_of_torchao(precision: str, config: type) -> None:
    layer = nn.Linear(128, 96, bias=False, dtype=torch.bfloat16)
    layer.weight = nn.Parameter(weight_of())
    values, scale = quantise(layer.weight.detach(), precision)
    quantize_(layer, config(set_inductor_config=False))
    expected = layer.weight.dequantize()
    assert torch.equal(dequantise(values, scale, precision, expected.shape, torch.bfloat16), expected)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("precision", QUANTISED)
def test_output_and_gradient_are_those_of_the_weight_that_it_stands_for(precision: str, autocast: bool) -> None:
    linear = nn.Linear(128, 96, dtype=torch.bfloat16)
    linear.weight = nn.Parameter(weight_of())
    layer = QuantisedLinear(linear, precision)
    linear.weight = nn.Parameter(layer.weight_of(layer.values, layer.scale, torch.bfloat16), requires_grad=False)
    x, found = torch.randn(2, 5, 128, dtype=torch.float32 if autocast else torch.bfloat16), []
    saved: list[Tensor] = []
    for module in (linear, layer):
        given = x.clone().requires_grad_()
        saved.clear()
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor),
        ):
            output = module(given)
        output.float().square().mean().backward()
        found.append((output.detach(), given.grad))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    # the weight is not saved in bfloat16
    assert max(tensor.nbytes for tensor in saved if tensor.dtype in (torch.int8, torch.uint8)) == layer.values.nbytes
    assert not any(tensor.shape == linear.weight.shape and tensor.is_floating_point() for tensor in saved)
    assert layer.weight.shape == linear.weight.shape and layer.weight.is_meta
    assert element_count(layer) == element_count(linear) == 96 * 128 + 96


def test_norms_modulation_and_convolutions_are_not_quantised() -> None:
    assert is_quantised("blocks.0.attn1.to_q.weight", (96, 96))
    assert is_quantised("transformer_blocks.3.ff.net.0.proj.weight", (384, 96))
    for name, shape in (
        ("norm1.linear.weight", (576, 96)), ("attn.norm_q.weight", (96,)), ("attn1.to_q.bias", (96,)),
        ("scale_shift_table", (6, 96)), ("conv.weight", (96, 16, 1, 2, 2)),
    ):  # fmt: skip
        assert not is_quantised(name, shape)
