"""Converts LoRAs between diffusers' layout and ComfyUI's, which has the original model's names and fused weights."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from videox.weights.layout_tables import COMFYUI_HUNYUAN
from videox.weights.layouts import published_name, sources, to_diffusers

PREFIX = "diffusion_model."
SAME_NAME = ("patch_embedding",)  # modules with the same name in both layouts
ADAPTER_KEY = re.compile(r"(?:base_model\.model\.)?(?:transformer\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
ORIGINAL_KEY = re.compile(r"diffusion_model\.(.+)\.(alpha|lora_(?:A|B|down|up)\.weight)")
HALVES = {"lora_A.weight": "A", "lora_down.weight": "A", "lora_B.weight": "B", "lora_up.weight": "B", "alpha": "alpha"}
# ComfyUI accepts only its own names for these modules of HunyuanVideo; for the blocks also the published names.
EMBEDDERS = {
    published: comfyui
    for comfyui, published in COMFYUI_HUNYUAN.items()
    if "#" not in published and published.startswith(("txt_in.", "time_in.", "guidance_in."))
}


def lora_to_comfyui(
    state: Mapping[str, Tensor], family: str, alpha: float | Mapping[str, float], *, mlp_ratio: float = 4.0
) -> dict[str, Tensor]:
    """Return a LoRA in ComfyUI's layout: `diffusion_model.<module>.lora_A.weight`, `.lora_B.weight`, `.alpha`.

    The update of a weight is alpha / rank * B A in both layouts. If several weights are fused into one published
    weight (HunyuanVideo's q, k, v and mlp), their adapters become one adapter of the fused weight without loss: the A
    matrices are stacked, the B matrices are blocks on a diagonal, and the rank is the sum of the ranks.

    Args:
        state: diffusers' or peft's names, e.g. `transformer.blocks.0.attn1.to_q.lora_A.weight`; A is [rank, in, ...],
            B is [out, rank, ...].
        family: "wan" | "hunyuan".
        alpha: for all modules, or by diffusers' module name.
        mlp_ratio: from HunyuanVideo's configuration; gives the rows of a fused mlp without an adapter of its own.

    Raises:
        ValueError: a name is not a half of an adapter, a half is missing, or the ranks of A and B differ.
    """
    adapters = _adapter_pairs(state)
    alphas = {name: float(alpha[name] if isinstance(alpha, Mapping) else alpha) for name in adapters}
    converted: dict[str, Tensor] = {}
    done: set[str] = set()
    for name, (a, b) in adapters.items():
        if name in done:
            continue
        original, parts = sources(family, f"{name}.weight")
        if original == f"{name}.weight" and name not in SAME_NAME:
            raise ValueError(f"{name} is not a module of {family}")
        modules = [part.removesuffix(".weight") for part in parts]
        scale = alphas[name]
        if len(modules) > 1:
            done |= set(modules)
            a, b, scale = _fuse(modules, adapters, alphas, mlp_ratio)
        elif modules[0].startswith("~"):  # the halves of the output (shift and scale) are in reverse order
            b = torch.cat(b.chunk(2)[::-1])
        target = original.removesuffix(".weight")
        target = f"{PREFIX}{EMBEDDERS.get(target, target)}"
        converted[f"{target}.lora_A.weight"], converted[f"{target}.lora_B.weight"] = a.contiguous(), b.contiguous()
        converted[f"{target}.alpha"] = torch.tensor(scale, dtype=torch.float32)
    return converted


def _adapter_pairs(state: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A and B of each module, by its name in diffusers."""
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if not (match := ADAPTER_KEY.fullmatch(name)):
            raise ValueError(f"{name} is not lora_A or lora_B of an adapter")
        halves.setdefault(match[1], {})[match[2]] = tensor
    for name, pair in halves.items():
        if len(pair) < 2:
            raise ValueError(f"{name} has only lora_{next(iter(pair))}")
        if pair["A"].shape[0] != pair["B"].shape[1]:
            raise ValueError(f"{name} has rank {pair['A'].shape[0]} in A and {pair['B'].shape[1]} in B")
    return {name: (pair["A"], pair["B"]) for name, pair in halves.items()}


def _fuse(
    modules: list[str], adapters: Mapping[str, tuple[Tensor, Tensor]], alphas: Mapping[str, float], mlp_ratio: float
) -> tuple[Tensor, Tensor, float]:
    """Return A, B and alpha of the fused weight of these modules; modules without an adapter have a zero update."""
    adapted = [name for name in modules if name in adapters]
    width = adapters[adapted[0]][0].shape[1]
    rows = [adapters[name][1].shape[0] if name in adapters else width for name in modules]
    if modules[-1].endswith("proj_mlp") and modules[-1] not in adapters:
        rows[-1] = int(width * mlp_ratio)
    scales = {name: alphas[name] / adapters[name][0].shape[0] for name in adapted}
    rank = sum(adapters[name][0].shape[0] for name in adapted)
    equal_scales = len(set(scales.values())) == 1
    first = adapters[adapted[0]][1]
    b, row, column = first.new_zeros(sum(rows), rank), 0, 0
    for name, count in zip(modules, rows, strict=True):
        if name in adapters:
            block = adapters[name][1]
            # The file has one alpha for the fused weight: scales that differ are multiplied into B.
            b[row : row + count, column : column + block.shape[1]] = block if equal_scales else block * scales[name]
            column += block.shape[1]
        row += count
    alpha = rank * scales[adapted[0]] if equal_scales else float(rank)
    return torch.cat([adapters[name][0] for name in adapted]), b, alpha


def lora_to_diffusers(state: Mapping[str, Tensor], family: str) -> dict[str, Tensor] | None:
    """Return a LoRA of lora_to_comfyui's layout by diffusers' names, with alpha / rank in B: the update is B A.

    Each part of a fused weight gets its own rows of B, without the columns that are all zero in these rows, and the
    rows of A that belong to the remaining columns. This restores the adapters that lora_to_comfyui fused.

    Args:
        state: `diffusion_model.<module>.lora_A.weight` (or lora_down), `.lora_B.weight` (or lora_up), and `.alpha` if
            it differs from the rank.
        family: "wan" | "hunyuan".

    Returns:
        None if a name is of another layout.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if not (match := ORIGINAL_KEY.fullmatch(name)):
            return None
        modules.setdefault(match[1], {})[HALVES[match[2]]] = tensor
    converted: dict[str, Tensor] = {}
    for module, tensors in modules.items():
        if not {"A", "B"} <= tensors.keys() or tensors["A"].ndim != 2:
            return None
        a, b = tensors["A"], tensors["B"]
        scale = float(tensors["alpha"]) / len(a) if "alpha" in tensors else 1.0
        entries = to_diffusers(family, {published_name(f"{module}.weight"): (b.shape[0], a.shape[1])})
        for entry in entries:
            rows = torch.cat([b[p.begin // a.shape[1] :][: p.count // a.shape[1]] for p in entry.pieces])
            used = rows.any(0) if len(entries) > 1 else torch.ones(len(a), dtype=torch.bool)
            if used.any():
                target = entry.name.removesuffix(".weight")
                converted[f"{target}.lora_A.weight"] = a[used]
                converted[f"{target}.lora_B.weight"] = (scale * rows[:, used].float()).to(b.dtype)
    return converted
