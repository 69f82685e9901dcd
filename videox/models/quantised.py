"""Linear layers with frozen weights of 8 or 4 bits, through which gradients flow to their inputs (--base_precision).

torchao and bitsandbytes quantise. Their own layers are not used, because of what these save for the backward pass:
torchao's the weight in bfloat16, and bitsandbytes' the weight outside of autograd's saved tensors, where activation
checkpointing does not replace it by that of the recomputation. Streamed blocks need that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from videox.models.base_precision import FP8, NF4, NF4_GROUP

PIECE = 2**19  # elements of a weight that are computed at a time on a CPU, whose temporary tensors are in float32


def quantise(weight: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """Return a weight's quantised values and their scales, float32.

    8-bit values have the shape of the weight: int8, or uint8 with the bits of float8_e4m3fn, which collectives do not
    accept everywhere. Their scales are [rows, 1]: the largest magnitude of a row divided by that of the dtype. 4-bit
    values are uint8 [elements / 2, 1], two in a byte, with a scale for NF4_GROUP elements in the order of memory: the
    NormalFloat of QLoRA (Dettmers et al. 2023), without a second quantisation of the scales.

    Args:
        weight: bfloat16 or float32 [rows, columns], with an even number of elements.
        precision: FP8, INT8 or NF4.
    """
    shares_groups = precision == NF4 and weight.shape[1] % NF4_GROUP  # between rows
    if weight.device.type != "cpu" or shares_groups:
        return _quantise(weight, precision)
    pieces = [_quantise(piece, precision) for piece in _pieces(weight)]
    values, scales = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return values, scales


def _pieces(weight: Tensor) -> tuple[Tensor, ...]:
    """Return views of some rows each, in order."""
    return weight.split(max(PIECE // weight.shape[1], 1))


def _quantise(weight: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    if precision == NF4:
        from bitsandbytes.functional import quantize_4bit  # an optional package

        values, state = quantize_4bit(weight.contiguous(), blocksize=NF4_GROUP, quant_type="nf4")
        return values, state.absmax
    from torchao.quantization import (  # imported where used: slow
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
        quantize_,
    )

    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    config = Float8WeightOnlyConfig if precision == FP8 else Int8WeightOnlyConfig
    quantize_(layer, config(set_inductor_config=False))
    # torchao gives the layer a method of itself, a cycle that would keep the values until a garbage collection
    vars(layer).pop("extra_repr", None)
    quantised: Any = layer.weight
    values = quantised.qdata.view(torch.uint8) if precision == FP8 else quantised.qdata
    return values.contiguous(), quantised.scale.float().reshape(rows, 1).contiguous()


def empty_quantised(rows: int, columns: int, precision: str) -> tuple[Tensor, Tensor]:
    """Return what `quantise` returns for a weight [rows, columns], on the CPU and without values."""
    if precision == NF4:
        elements = rows * columns
        return torch.empty(elements // 2, 1, dtype=torch.uint8), torch.empty(-(-elements // NF4_GROUP))
    return torch.empty(rows, columns, dtype=torch.uint8 if precision == FP8 else torch.int8), torch.empty(rows, 1)


def dequantise(values: Tensor, scale: Tensor, precision: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return the weight that quantised values stand for: their product with the scales in float32, rounded to dtype.

    Args:
        values, scale, precision: of `quantise`.
        shape: of the weight.
        dtype: of the result.
    """
    if precision == NF4:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        state = QuantState(absmax=scale, shape=shape, blocksize=NF4_GROUP, quant_type="nf4", dtype=dtype)
        return dequantize_4bit(values, state)
    exact = values.view(torch.float8_e4m3fn) if precision == FP8 else values
    weight = exact.to(dtype)  # all values of 8 bits are exact in bfloat16
    if weight.device.type != "cpu":
        return weight.mul_(scale)
    for piece, of_rows in zip(_pieces(weight), _pieces(scale.expand(weight.shape)), strict=True):
        piece.mul_(of_rows[:, :1])
    return weight


class _FrozenProduct(torch.autograd.Function):
    """x W^T + b with a frozen quantised weight W; W itself is there only while it is used."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None, layer: Any) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(values, scale)
        ctx.weight_of = layer.weight_of
        return nn.functional.linear(x, layer.weight_of(values, scale, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        (gradient,) = gradients
        values, scale = ctx.saved_tensors
        return gradient @ ctx.weight_of(values, scale, gradient.dtype), None, None, None, None


class QuantisedLinear(nn.Linear):
    """A linear layer whose frozen weight is quantised.

    Args:
        linear: the layer to replace; only its bias is used where `stored` is given, so that its weight may be on the
            meta device.
        precision: FP8, INT8 or NF4.
        stored: values and scale as `quantise` returns them; None quantises the layer's weight.

    Attributes:
        values, scale: of `quantise`.
        bias: in the dtype of computation, or None.
    """

    def __init__(self, linear: nn.Linear, precision: str, stored: tuple[Tensor, Tensor] | None = None) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate a weight
        self.in_features, self.out_features, self.precision = linear.in_features, linear.out_features, precision
        self._dtype = linear.weight.dtype
        values, scale = quantise(linear.weight.detach(), precision) if stored is None else stored
        self.values = nn.Parameter(values, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Shape and dtype of the weight, on the meta device: peft reads them when it adds an adapter."""
        return torch.empty(self.out_features, self.in_features, dtype=self._dtype, device="meta")

    def weight_of(self, values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the weight, [out_features, in_features]."""
        return dequantise(values, scale, self.precision, torch.Size((self.out_features, self.in_features)), dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b, in the dtype of autocast if it is enabled."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return _FrozenProduct.apply(x, self.values, self.scale, bias, self)


def element_count(model: nn.Module) -> int:
    """Return the number of a model's parameters, where a quantised weight counts as what it stands for."""
    layers = [module for module in model.modules() if isinstance(module, QuantisedLinear)]
    stored = sum(layer.values.numel() + layer.scale.numel() for layer in layers)
    # DeepSpeed's sharded parameters are empty, and have their size as an attribute
    everything = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
    return everything - stored + sum(x.in_features * x.out_features for x in layers)
