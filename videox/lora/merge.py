"""Merges a LoRA into its base model: the sum in float32, computed block by block of each tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from videox.errors import MODEL, UserError
from videox.weights.layout_writer import layout_entries, to_layout
from videox.weights.layouts import Entry
from videox.weights.reader import LayoutTensors
from videox.weights.safetensors_io import join_first
from videox.weights.stream_writer import TensorToWrite, plan_tensors

# Rows of B A that are computed at a time. Blocks always start at a multiple of it, whichever elements are requested:
# the matrix products then have the same shapes, and the sums are bit-identical in every layout.
ROWS = 512


@dataclass(frozen=True)
class LowRankUpdate:
    """A LoRA's update of one weight: scale * B A.

    Attributes:
        a: float32 [rank, inputs].
        b: float32 [outputs, rank].
        scale: alpha / rank.
    """

    a: Tensor
    b: Tensor
    scale: float

    def elements(self, begin: int, count: int) -> Tensor:
        """Return elements `begin` to `begin + count` of scale * B A, in memory order, float32."""
        width = self.a.shape[1]
        first = begin // width // ROWS * ROWS
        last = -(-(begin + count) // width)
        blocks = [self.scale * (self.b[row : row + ROWS] @ self.a) for row in range(first, last, ROWS)]
        return torch.cat(blocks).reshape(-1)[begin - first * width :][:count]


def lora_updates(adapters: Mapping[str, Tensor], scale: float) -> dict[str, LowRankUpdate]:
    """Return the updates of a LoRA, by the name of the weight in diffusers.

    Args:
        adapters: tensors by names such as `blocks.0.attn1.to_q.lora_A.weight`.
        scale: alpha / rank.

    Raises:
        UserError: (MODEL) a tensor that is not A or B of an adapter, or a missing half.
    """
    halves = {f"{name.split('.lora_')[0]}.lora_{half}.weight" for name in adapters for half in "AB"}
    if stray := sorted(halves ^ adapters.keys()):
        what = f"{join_first(stray)}: half of an adapter is missing, or it is another kind of tensor"
        raise UserError("LoRA", what, "pass a LoRA that has only lora_A and lora_B tensors", MODEL)
    modules = sorted({name.split(".lora_")[0] for name in adapters})
    pairs = {name: [adapters[f"{name}.lora_{half}.weight"].float() for half in "AB"] for name in modules}
    return {f"{name}.weight": LowRankUpdate(a, b, scale) for name, (a, b) in pairs.items()}


def merge_lora(
    base: LayoutTensors,
    updates: Mapping[str, LowRankUpdate],
    layout: str,
    dtype: torch.dtype | None,
    keep_fp32: Sequence[str] = (),
) -> list[TensorToWrite]:
    """Return the tensors of a base model with a LoRA merged in, to be written in a layout.

    Each sum is computed in float32 and rounded once.

    Args:
        base: a transformer in any layout.
        updates: the result of lora_updates.
        layout: "diffusers" | "original" | "comfyui".
        dtype: dtype of the floating-point tensors; None keeps the base's, 8-bit ones become bfloat16.
        keep_fp32: parts of names that stay float32.

    Raises:
        UserError: (MODEL) an adapted weight does not exist in the base, or has another shape.
    """
    check_base(base, updates)
    tensors = to_layout(base, layout)
    plan = plan_tensors(tensors, dtype, keep_fp32)
    return list(_with_updates(updates, zip(plan, layout_entries(base, layout), strict=True)))


def _with_updates(
    updates: Mapping[str, LowRankUpdate], plan: Iterable[tuple[TensorToWrite, Entry]]
) -> Iterable[TensorToWrite]:
    for item, entry in plan:
        is_adapted = any(piece.name in updates for piece in entry.pieces)
        yield replace(item, delta=partial(_update_slice, entry, updates)) if is_adapted else item


def _update_slice(entry: Entry, updates: Mapping[str, LowRankUpdate], begin: int, count: int) -> Tensor:
    """Return the update of elements `begin` to `begin + count` of a tensor made of pieces of diffusers' tensors."""
    update, offset = torch.zeros(count), 0  # offset: where the piece begins in the tensor
    for piece in entry.pieces:
        low, high = max(begin, offset), min(begin + count, offset + piece.count)
        if low < high and piece.name in updates:
            update[low - begin : high - begin] = updates[piece.name].elements(piece.begin + low - offset, high - low)
        offset += piece.count
    return update


def check_base(base: LayoutTensors, updates: Mapping[str, LowRankUpdate]) -> None:
    """Raise UserError (MODEL) if an adapted weight does not exist in the base model, or has another shape."""
    shapes, faults = base.shapes(), []
    for name, update in updates.items():
        adapted = (update.b.shape[0], *update.a.shape[1:])
        if name not in shapes:
            faults.append(f"{name} has an adapter but does not exist in the base model")
        elif shapes[name] != adapted:
            faults.append(f"{name} is {list(shapes[name])}, its adapter {list(adapted)}")
    if faults:
        raise UserError(str(base.path), join_first(faults), "pass the base model that the LoRA was trained on", MODEL)
