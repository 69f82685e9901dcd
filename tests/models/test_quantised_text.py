"""Tests of videox.models.quantised_text: which layers of text encoders are quantised, with which values and error."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    UMT5Config,
    UMT5EncoderModel,
)

from videox.models.base_precision import FP8, INT8, NF4
from videox.models.configured import Component
from videox.models.folder import load_strictly
from videox.models.quantised import QuantisedLinear, quantise
from videox.models.quantised_text import prepare_quantised, quantise_text_encoder
from videox.models.shared_memory import load_frozen

CPU = torch.device("cpu")
LLAMA = {
    "vocab_size": 200, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
}
MODELS: dict[str, tuple[Any, Any]] = {
    "umt5": (
        UMT5EncoderModel,
        lambda: UMT5Config(vocab_size=200, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4),
    ),
    "llama": (LlamaModel, lambda: LlamaConfig(**LLAMA)),
    "llava": (
        LlavaForConditionalGeneration,
        lambda: LlavaConfig(
            text_config=LlamaConfig(**LLAMA), vision_config={"model_type": "clip_vision_model", **VISION}
        ),
    ),
}


def saved(kind: str, folder: Path, dtype: torch.dtype) -> tuple[Any, Component]:
    model_class, config = MODELS[kind]
    torch.manual_seed(0)
    model_class(config()).to(dtype).save_pretrained(folder)
    return model_class, Component(folder, {})


def load(kind: str, folder: Path, precision: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, Any]:
    """Return the quantised model, the error, and the bfloat16 model."""
    model_class, component = saved(kind, folder, dtype)
    errors = []

    def change(model: nn.Module, fill: bool) -> None:
        assert fill
        errors.append(quantise_text_encoder(model, precision, torch.bfloat16, CPU))

    model = load_frozen(
        model_class, component, torch.bfloat16, pinned=False, gather=lambda value: [value], change=change
    )
    return model, errors[0], load_strictly(model_class, folder, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("kind", "precision"), [("umt5", INT8), pytest.param("llama", FP8, marks=pytest.mark.slow), ("llava", NF4)]
)
def test_only_linear_layers_of_text_blocks_are_quantised(kind: str, precision: str, tmp_path: Path) -> None:
    model, error, plain = load(kind, tmp_path, precision)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantisedLinear)}
    per_block = 7
    assert len(layers) == 2 * per_block and not any("vision" in name for name in layers)
    expected, found = plain.state_dict(), model.state_dict()
    for name, value in expected.items():
        if name.removesuffix(".weight") not in layers:
            assert torch.equal(found[name], value) and found[name].dtype == value.dtype, name
    for name, buffer in plain.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name
    for name, layer in layers.items():
        values, scale = quantise(expected[f"{name}.weight"], precision)
        assert torch.equal(layer.values, values) and torch.equal(layer.scale, scale)
    assert len(error.of_blocks) == 2
    low, high = {FP8: (1e-3, 0.05), INT8: (3e-4, 0.02), NF4: (3e-3, 0.15)}[precision]
    assert all(low < each < high for each in error.of_blocks)
    tokens = torch.tensor([[5, 6, 7, 1]])
    with torch.no_grad():
        outputs = [each(input_ids=tokens, output_hidden_states=True).hidden_states[-1] for each in (model, plain)]
    assert 0 < float((outputs[0] - outputs[1]).norm() / outputs[1].norm()) < 0.3


def test_a_model_stored_in_bfloat16_gives_equal_values(tmp_path: Path) -> None:
    wide, error, _ = load("umt5", tmp_path / "wide", NF4)
    stored, again, _ = load("umt5", tmp_path / "stored", NF4, torch.bfloat16)
    assert error == again
    expected = wide.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in stored.state_dict().items())


def test_a_process_without_values_has_the_same_tensors(tmp_path: Path) -> None:
    """So that those of the process that quantises can take their place."""
    model_class, _ = saved("llama", tmp_path, torch.float32)
    filled, empty = (load_strictly(model_class, tmp_path, dtype=torch.float32) for _ in range(2))
    quantise_text_encoder(filled, INT8, torch.bfloat16, CPU)
    prepare_quantised(empty, INT8, torch.bfloat16)
    expected = {name: (p.shape, p.dtype) for name, p in filled.named_parameters()}
    found = {name: (p.shape, p.dtype) for name, p in empty.named_parameters()}
    layers = [name for name, module in filled.named_modules() if isinstance(module, QuantisedLinear)]
    for name, described in expected.items():
        if name.rpartition(".")[0] in layers or "norm" not in name:
            assert found[name] == described, name
    for name in layers:
        assert filled.get_submodule(name).weight.dtype == empty.get_submodule(name).weight.dtype == torch.bfloat16


def test_weights_of_a_block_are_gone_once_it_is_quantised(tmp_path: Path) -> None:
    model_class, _ = saved("umt5", tmp_path, torch.bfloat16)
    model = load_strictly(model_class, tmp_path, dtype=torch.bfloat16)
    weights = [weakref.ref(block.layer[0].SelfAttention.q.weight) for block in model.encoder.block]
    quantise_text_encoder(model, INT8, torch.bfloat16, CPU)
    gc.collect()
    assert [weight() for weight in weights] == [None, None]
