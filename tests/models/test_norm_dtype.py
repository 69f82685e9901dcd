"""Tests of videox.models.norm_dtype: queries and keys reach attention in the compute dtype on a GPU.

Tensors of the GPU are fake: they have its dtypes and no values. The rules of CUDA's autocast are those of torch.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.cuda.amp.common
from networks import SMALL_CONFIGS, build_transformer, model_inputs
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from videox.models.norm_dtype import NORMS, keep_norm_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
KINDS = ("text", "image", "joint")


def norms_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if name.rpartition(".")[2] in NORMS}


def attention_dtypes(model: nn.Module, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Return the dtypes of queries, keys and values at each call of torch's attention, before its own autocast."""
    seen: list[torch.dtype] = []
    real = nn.functional.scaled_dot_product_attention

    def record(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **settings: Any) -> Any:
        seen.extend((query.dtype, key.dtype, value.dtype))
        return real(query, key, value, *rest, **settings)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", record)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(**inputs)
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_norms_return_the_compute_dtype_under_the_rules_of_cuda(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    model = build_transformer(SMALL_CONFIGS[kind])

    def dtypes() -> set[torch.dtype]:
        found = set()
        for norm in norms_of(model).values():
            weights = {name: torch.empty(p.shape, device=GPU) for name, p in norm.named_parameters()}
            sample = torch.empty(2, *weights["weight"].shape, dtype=torch.bfloat16, device=GPU)
            found.add(torch.func.functional_call(norm, weights, sample).dtype)
        return found

    with FakeTensorMode(), torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        assert dtypes() == {torch.float32}  # this is what makes the function necessary
        assert keep_norm_dtype(model, GPU) == len(norms_of(model)) > 0
        assert dtypes() == {torch.bfloat16}


def test_queries_and_keys_of_hunyuanvideo_have_the_dtype_of_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SMALL_CONFIGS["joint"]
    model, (inputs, _) = build_transformer(config), model_inputs(config)
    assert torch.float32 in attention_dtypes(model, inputs, monkeypatch)
    keep_norm_dtype(model, GPU)
    found = attention_dtypes(model, inputs, monkeypatch)
    assert found and set(found) == {torch.bfloat16}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_on_the_cpu_is_unchanged(kind: str) -> None:
    model = build_transformer(SMALL_CONFIGS[kind])
    assert keep_norm_dtype(model, CPU) == 0
    assert not any(norm._forward_hooks for norm in norms_of(model).values())


@pytest.mark.parametrize("kind", ["text", "image"])
def test_wan_on_the_cpu_would_have_the_same_numbers_with_it(kind: str) -> None:
    config = SMALL_CONFIGS[kind]
    model, (inputs, _) = build_transformer(config), model_inputs(config)
    outputs = []
    for device in (CPU, GPU):
        keep_norm_dtype(model, device)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            outputs.append(model(**inputs)[0])
    assert torch.equal(*outputs)
