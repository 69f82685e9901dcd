"""DoRA (arXiv:2402.09353): W acts as m (W + s B A) / |W + s B A| with trained m; |.| is the norm of each row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn

from videox.lora.adapters import MAGNITUDE, Lora, peft_name
from videox.lora.merge import ROWS, LowRankUpdate, lora_updates
from videox.weights.reader import LayoutTensors
from videox.weights.safetensors_io import TensorSource


def initial_magnitudes(
    lora: Lora, stored: TensorSource, values: Mapping[str, Tensor], *, resumed: bool
) -> dict[str, Tensor]:
    """Return m = |W + s B A| of each target, float32 [out] by parameter name: the output is then that of the LoRA.

    Args:
        lora: scale s and target layers.
        stored: the base model's weights W.
        values: initial A and B, by parameter name.
        resumed: a checkpoint will replace the values, so that no weight need be read for them.
    """
    magnitudes = {}
    if resumed:
        return {
            peft_name(f"{target}{MAGNITUDE}"): torch.ones(stored.shape(f"{target}.weight")[0])
            for target in lora.targets
        }
    for target in lora.targets:
        a, b = (values[peft_name(f"{target}.lora_{half}.weight")] for half in "AB")
        magnitudes[peft_name(f"{target}{MAGNITUDE}")] = torch.cat(
            [
                row_norms(rows, part @ a, lora.scale)
                for rows, part in zip(stored[f"{target}.weight"].split(ROWS), b.split(ROWS), strict=True)
            ]
        )
    return magnitudes


def row_norms(weight: Tensor, lora_weight: Tensor, scaling: float, adapter_name: str | None = None) -> Tensor:
    """Return |W + s B A| in float32: [out].

    Args:
        weight: W [out, in].
        lora_weight: B A [out, in].
        scaling: s.
        adapter_name: not used; peft passes it.
    """
    del adapter_name
    return torch.linalg.vector_norm(weight.float() + scaling * lora_weight.float(), dim=1)


def compute_norms_in_float32(model: nn.Module) -> None:
    """Have peft's layers divide by norms in float32.

    peft rounds them to the dtype of the weights: in bfloat16 the scale of a row would jump by up to 0.4 % between
    steps.
    """
    for module in model.modules():
        if isinstance(module, DoraLinearLayer):
            module.get_weight_norm = row_norms


@dataclass(frozen=True)
class DoraUpdate(LowRankUpdate):
    """A DoRA's update of one weight: m (W + s B A) / |W + s B A| - W.

    Attributes:
        base: the base model.
        name: the weight's name in diffusers.
        magnitude: m, float32 [outputs].
    """

    base: LayoutTensors
    name: str
    magnitude: Tensor

    def elements(self, begin: int, count: int) -> Tensor:
        """Return elements `begin` to `begin + count` of the update, in memory order, float32."""
        outputs, width = len(self.b), self.a.shape[1]
        first = begin // width // ROWS * ROWS
        last = -(-(begin + count) // width)
        blocks = [self._rows(row, min(row + ROWS, outputs)) for row in range(first, last, ROWS)]
        return torch.cat(blocks).reshape(-1)[begin - first * width :][:count]

    def _rows(self, begin: int, end: int) -> Tensor:
        weight, update = self.base.rows(self.name, begin, end).float(), self.b[begin:end] @ self.a
        factor = self.magnitude[begin:end] / row_norms(weight, update, self.scale)
        return factor[:, None] * (weight + self.scale * update) - weight


def dora_updates(adapters: Mapping[str, Tensor], scale: float, base: LayoutTensors) -> dict[str, DoraUpdate]:
    """Return the updates of a DoRA, by the name of the weight in diffusers.

    Args:
        adapters: A, B and magnitudes by names such as `blocks.0.attn1.to_q.lora_magnitude_vector`.
        scale: alpha / rank.
        base: the base model.
    """
    pairs = lora_updates({name: tensor for name, tensor in adapters.items() if MAGNITUDE not in name}, scale)
    magnitudes = {name: adapters[name.removesuffix(".weight") + MAGNITUDE].float() for name in pairs}
    return {name: DoraUpdate(pair.a, pair.b, scale, base, name, magnitudes[name]) for name, pair in pairs.items()}
