"""Serves who wants one model of a LoRA and its base: their sum in float32, a block of one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from videox.errors import MODEL, UserError
from videox.weights.layout_writer import laid_out, relaid
from videox.weights.layouts import Entry
from videox.weights.reader import LayoutTensors
from videox.weights.safetensors_io import few
from videox.weights.stream_writer import Planned, planned

ROWS = 512  # of a product made at a time, counted from the first: a sum is then the same to the bit in every layout


@dataclass(frozen=True)
class LowRank:
    """What a LoRA adds to a weight: scale * B A.

    Attributes:
        a: float32 [rank, inputs].
        b: float32 [outputs, rank].
        scale: alpha / rank.
    """

    a: Tensor
    b: Tensor
    scale: float

    def elements(self, begin: int, count: int) -> Tensor:
        """Returns elements `begin` to `begin + count` of scale * B A, in memory order, float32."""
        width = self.a.shape[1]
        first = begin // width // ROWS * ROWS
        last = -(-(begin + count) // width)
        made = [self.scale * (self.b[row : row + ROWS] @ self.a) for row in range(first, last, ROWS)]
        return torch.cat(made).reshape(-1)[begin - first * width :][:count]


def low_rank(adapters: Mapping[str, Tensor], scale: float) -> dict[str, LowRank]:
    """Returns what adapters add, by the name of the weight in diffusers.

    Args:
        adapters: `blocks.0.attn1.to_q.lora_A.weight` and the like.
        scale: alpha / rank.

    Raises:
        UserError: (MODEL) something else than the two halves of adapters.
    """
    halves = {f"{name.split('.lora_')[0]}.lora_{half}.weight" for name in adapters for half in "AB"}
    if stray := sorted(halves ^ adapters.keys()):
        hint = "give a LoRA of A and B alone"
        raise UserError("LoRA", f"{few(stray)}: half an adapter, or something else", hint, MODEL)
    modules = sorted({name.split(".lora_")[0] for name in adapters})
    pairs = {name: [adapters[f"{name}.lora_{half}.weight"].float() for half in "AB"] for name in modules}
    return {f"{name}.weight": LowRank(a, b, scale) for name, (a, b) in pairs.items()}


def merged(
    base: LayoutTensors,
    changes: Mapping[str, LowRank],
    layout: str,
    dtype: torch.dtype | None,
    keep_fp32: Sequence[str] = (),
) -> list[Planned]:
    """Returns a base with a LoRA in it, to be written in a layout: each sum in float32, rounded once.

    Args:
        base: a transformer in any layout.
        changes: of low_rank.
        layout: "diffusers" | "original" | "comfyui".
        dtype: of the floating tensors; None as the base stores them, 8-bit ones as bfloat16.
        keep_fp32: parts of names that stay float32.

    Raises:
        UserError: (MODEL) an adapter has no weight in the base, or one of another shape.
    """
    refuse_strangers(base, changes)
    tensors = relaid(base, layout)
    plan = planned(tensors, dtype, keep_fp32)
    return list(_with(changes, zip(plan, laid_out(base, layout), strict=True)))


def _with(changes: Mapping[str, LowRank], plan: Iterable[tuple[Planned, Entry]]) -> Iterable[Planned]:
    for item, entry in plan:
        touched = any(piece.name in changes for piece in entry.pieces)
        yield replace(item, added=partial(_added, entry, changes)) if touched else item


def _added(entry: Entry, changes: Mapping[str, LowRank], begin: int, count: int) -> Tensor:
    """Returns what is added to elements `begin` to `begin + count` of a tensor that is made of diffusers' tensors."""
    found, at = torch.zeros(count), 0  # at: where the piece begins in the tensor
    for piece in entry.pieces:
        low, high = max(begin, at), min(begin + count, at + piece.count)
        if low < high and piece.name in changes:
            found[low - begin : high - begin] = changes[piece.name].elements(piece.begin + low - at, high - low)
        at += piece.count
    return found


def refuse_strangers(base: LayoutTensors, changes: Mapping[str, LowRank]) -> None:
    """Raises UserError (MODEL) where an adapter has no weight in the base, or one of another shape."""
    shapes, faults = base.shapes(), []
    for name, change in changes.items():
        adapted = (change.b.shape[0], *change.a.shape[1:])
        if name not in shapes:
            faults.append(f"{name} is adapted, and is not there")
        elif shapes[name] != adapted:
            faults.append(f"{name} is {list(shapes[name])}, its adapter {list(adapted)}")
    if faults:
        raise UserError(str(base.path), few(faults), "give the model that the LoRA was trained on", MODEL)
