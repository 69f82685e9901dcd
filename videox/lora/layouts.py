"""Serves who takes a LoRA elsewhere: diffusers' adapters under the names, and over the fused weights, of ComfyUI."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from videox.weights.layout_tables import COMFYUI_HUNYUAN
from videox.weights.layouts import published_name, sources, to_diffusers

PREFIX = "diffusion_model."
SAME = ("patch_embedding",)  # called alike on both sides
KEY = re.compile(r"(?:base_model\.model\.)?(?:transformer\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
ORIGINAL_KEY = re.compile(r"diffusion_model\.(.+)\.(alpha|lora_(?:A|B|down|up)\.weight)")
PARTS = {"lora_A.weight": "A", "lora_down.weight": "A", "lora_B.weight": "B", "lora_up.weight": "B", "alpha": "alpha"}
# ComfyUI knows these modules of HunyuanVideo by its own names alone, the blocks also by the published ones.
EMBEDDERS = {
    published: comfyui
    for comfyui, published in COMFYUI_HUNYUAN.items()
    if "#" not in published and published.startswith(("txt_in.", "time_in.", "guidance_in."))
}


def lora_to_comfyui(
    state: Mapping[str, Tensor], family: str, alpha: float | Mapping[str, float], *, mlp_ratio: float = 4.0
) -> dict[str, Tensor]:
    """Returns a LoRA as ComfyUI reads it: `diffusion_model.<module>.lora_A.weight`, `.lora_B.weight`, `.alpha`.

    The change of a weight is alpha / rank * B A in both. Where the published weights are fused (HunyuanVideo's q, k, v
    and mlp), the adapters of the parts become one over the fused weight, exactly: their A one under the other, their B
    as blocks on a diagonal, the rank the sum of theirs.

    Args:
        state: diffusers' or peft's names, e.g. `transformer.blocks.0.attn1.to_q.lora_A.weight`; A is [rank, in, ...],
            B is [out, rank, ...].
        family: "wan" | "hunyuan".
        alpha: of all modules, or by diffusers' module name.
        mlp_ratio: of HunyuanVideo's configuration; the rows of an mlp that has no adapter beside q, k, v that have.

    Raises:
        ValueError: a name that is no half of an adapter, a half without the other, or ranks that differ.
    """
    found = _modules(state)
    alphas = {name: float(alpha[name] if isinstance(alpha, Mapping) else alpha) for name in found}
    made: dict[str, Tensor] = {}
    done: set[str] = set()
    for name, (a, b) in found.items():
        if name in done:
            continue
        original, parts = sources(family, f"{name}.weight")
        if original == f"{name}.weight" and name not in SAME:
            raise ValueError(f"{name} is no module of {family}")
        modules = [part.removesuffix(".weight") for part in parts]
        scale = alphas[name]
        if len(modules) > 1:
            done |= set(modules)
            a, b, scale = _fused(modules, found, alphas, mlp_ratio)
        elif modules[0].startswith("~"):
            b = torch.cat(b.chunk(2)[::-1])
        target = original.removesuffix(".weight")
        target = f"{PREFIX}{EMBEDDERS.get(target, target)}"
        made[f"{target}.lora_A.weight"], made[f"{target}.lora_B.weight"] = a.contiguous(), b.contiguous()
        made[f"{target}.alpha"] = torch.tensor(scale, dtype=torch.float32)
    return made


def _modules(state: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns A and B of each module, by its name in diffusers."""
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if not (match := KEY.fullmatch(name)):
            raise ValueError(f"{name} is no half of an adapter")
        halves.setdefault(match[1], {})[match[2]] = tensor
    for name, pair in halves.items():
        if len(pair) < 2:
            raise ValueError(f"{name} has lora_{next(iter(pair))} alone")
        if pair["A"].shape[0] != pair["B"].shape[1]:
            raise ValueError(f"{name} has rank {pair['A'].shape[0]} in A and {pair['B'].shape[1]} in B")
    return {name: (pair["A"], pair["B"]) for name, pair in halves.items()}


def _fused(
    modules: list[str], found: Mapping[str, tuple[Tensor, Tensor]], alphas: Mapping[str, float], mlp_ratio: float
) -> tuple[Tensor, Tensor, float]:
    """Returns A, B and alpha over the fused weight of these modules; those without an adapter change nothing."""
    there = [name for name in modules if name in found]
    width = found[there[0]][0].shape[1]
    rows = [found[name][1].shape[0] if name in found else width for name in modules]
    if modules[-1].endswith("proj_mlp") and modules[-1] not in found:
        rows[-1] = int(width * mlp_ratio)
    scales = {name: alphas[name] / found[name][0].shape[0] for name in there}
    rank = sum(found[name][0].shape[0] for name in there)
    alike = len(set(scales.values())) == 1
    first = found[there[0]][1]
    b, row, column = first.new_zeros(sum(rows), rank), 0, 0
    for name, count in zip(modules, rows, strict=True):
        if name in found:
            block = found[name][1]
            # scales that differ go into B, so that one alpha is right for all
            b[row : row + count, column : column + block.shape[1]] = block if alike else block * scales[name]
            column += block.shape[1]
        row += count
    return torch.cat([found[name][0] for name in there]), b, rank * scales[there[0]] if alike else float(rank)


def lora_to_diffusers(state: Mapping[str, Tensor], family: str) -> dict[str, Tensor] | None:
    """Returns a LoRA of lora_to_comfyui's layout by diffusers' names, with alpha / rank in B: the change is B A.

    Of a fused weight each part has its own rows of B, without the columns that are nought in them, and the rows of A
    that go with the rest: what lora_to_comfyui put together comes apart as it was.

    Args:
        state: `diffusion_model.<module>.lora_A.weight` (or lora_down), `.lora_B.weight` (or lora_up), `.alpha`, if
            other than the rank.
        family: "wan" | "hunyuan".

    Returns:
        None where some name is of another layout.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if not (match := ORIGINAL_KEY.fullmatch(name)):
            return None
        modules.setdefault(match[1], {})[PARTS[match[2]]] = tensor
    made: dict[str, Tensor] = {}
    for module, parts in modules.items():
        if not {"A", "B"} <= parts.keys() or parts["A"].ndim != 2:
            return None
        a, b = parts["A"], parts["B"]
        scale = float(parts["alpha"]) / len(a) if "alpha" in parts else 1.0
        entries = to_diffusers(family, {published_name(f"{module}.weight"): (b.shape[0], a.shape[1])})
        for entry in entries:
            rows = torch.cat([b[p.begin // a.shape[1] :][: p.count // a.shape[1]] for p in entry.pieces])
            used = rows.any(0) if len(entries) > 1 else torch.ones(len(a), dtype=torch.bool)
            if used.any():
                target = entry.name.removesuffix(".weight")
                made[f"{target}.lora_A.weight"] = a[used]
                made[f"{target}.lora_B.weight"] = (scale * rows[:, used].float()).to(b.dtype)
    return made
