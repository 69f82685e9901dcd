"""Quantises the blocks of a loaded text encoder (--text_encoder_precision), one at a time."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from videox.models.quantised import QuantisedLinear, empty_quantised
from videox.models.quantised_loading import SEED, TEXT, LoadingForward, QuantisationError

IMAGES = "vision"  # in the names of the image encoder of a model that takes text and images


def text_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return name and list of the repeated blocks of a text encoder of transformers, for text and not for images."""
    lists = (pair for pair in model.named_modules() if isinstance(pair[1], nn.ModuleList))
    name, blocks = next((name, blocks) for name, blocks in lists if IMAGES not in name)
    assert isinstance(blocks, nn.ModuleList)
    return name, blocks


def linear_layers(block: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of a block of a text encoder, by name: the layers that are quantised."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def quantise_text_encoder(
    model: nn.Module, precision: str, dtype: torch.dtype, device: torch.device
) -> QuantisationError:
    """Quantise the linear layers of a text encoder's blocks in host memory, and return the error of that.

    Each block is copied to the device and quantised there; where the weights are mapped from their file, no more than
    one block of them is in memory in `dtype`. Embeddings and norms are cast to `dtype`.

    Args:
        model: of transformers, on the CPU, in the dtype of its file; changed in place.
        precision: FP8, INT8 or NF4.
        dtype: of computation.
        device: that quantises.
    """
    name, blocks = text_blocks(model)
    _cast_others(model, name, dtype)
    error, text = QuantisationError(), model.get_submodule(name.rpartition(".")[0])
    block: Any
    for block in blocks:
        block.forward = LoadingForward(block, partial(block.to, device, dtype), linear_layers, precision, error)
    others = _others(text, name.rpartition(".")[2])
    at_rest = [tensor.data for tensor in others]
    for tensor in others:
        tensor.data = tensor.data.to(device)
    with torch.no_grad():
        text(input_ids=_probe(text).to(device), use_cache=False)
    for tensor, data in zip(others, at_rest, strict=True):
        tensor.data = data
    assert len(error.of_blocks) == len(blocks)
    return error


def prepare_quantised(model: nn.Module, precision: str, dtype: torch.dtype) -> None:
    """Give a text encoder the modules of a quantised one, without values in their place.

    For a process that then uses the tensors of another one, which has quantised the same model.
    """
    name, blocks = text_blocks(model)
    _cast_others(model, name, dtype)
    for block in blocks:
        for path, linear in linear_layers(block).items():
            layer = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta", dtype=dtype)
            layer.bias = linear.bias
            empty = empty_quantised(linear.out_features, linear.in_features, precision)
            block.set_submodule(path, QuantisedLinear(layer, precision, empty))


def _others(model: nn.Module, blocks: str) -> list[Tensor]:
    """Return parameters and buffers that are not of the blocks."""
    named = (*model.named_parameters(), *model.named_buffers())
    return [tensor for name, tensor in named if not name.startswith(f"{blocks}.")]


def _cast_others(model: nn.Module, blocks: str, dtype: torch.dtype) -> None:
    """Cast the parameters outside of the blocks; buffers, such as rotary frequencies, keep their dtype."""
    for name, parameter in model.named_parameters():
        if not name.startswith(f"{blocks}.") and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _probe(text: Any) -> Tensor:  # noqa: ANN401 - of transformers
    """Return token ids of a text from a fixed seed, int64 [1, TEXT]."""
    count = text.get_input_embeddings().num_embeddings
    return torch.randint(count, (1, TEXT), generator=torch.Generator().manual_seed(SEED))
