"""Converts LoRAs between diffusers' layout and those with the original model's names and fused weights.

ComfyUI's layout has the original names with dots, kohya's (musubi-tuner's) the same with underscores.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from videox.lora.names import KOHYA_PREFIX, Module, parse
from videox.weights.layout_tables import COMFYUI_HUNYUAN
from videox.weights.layouts import published_name, sources, to_diffusers

PREFIX = "diffusion_model."
KOHYA_HALVES = {"lora_A": "lora_down", "lora_B": "lora_up"}
SAME_NAME = ("patch_embedding",)  # modules with the same name in both layouts
ADAPTER_KEY = re.compile(r"(?:base_model\.model\.)?(?:transformer\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
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


def lora_to_kohya(
    state: Mapping[str, Tensor], family: str, alpha: float | Mapping[str, float], *, mlp_ratio: float = 4.0
) -> dict[str, Tensor]:
    """Return a LoRA in kohya's layout, as musubi-tuner writes it: `lora_unet_<module>.lora_down.weight`, ...

    The modules, tensors and alphas are those of lora_to_comfyui; the names are the published ones with underscores.
    ComfyUI reads such files of Wan; of HunyuanVideo it reads them only under its own names of the modules.

    Args, Raises: as lora_to_comfyui.
    """
    converted = {}
    for name, tensor in lora_to_comfyui(state, family, alpha, mlp_ratio=mlp_ratio).items():
        module, kind, weight = re.fullmatch(r"(.+?)\.(lora_[AB]|alpha)(\.weight)?", name.removeprefix(PREFIX)).groups()  # type: ignore[union-attr]
        flat = published_name(f"{module}.weight").removesuffix(".weight").replace(".", "_")
        converted[f"{KOHYA_PREFIX}{flat}.{KOHYA_HALVES.get(kind, kind)}{weight or ''}"] = tensor
    return converted


# --------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Adapter:
    """The adapter of one module of diffusers: its weight W acts as W + scale * B A.

    Attributes:
        a: [rank, inputs], in the file's dtype.
        b: [outputs, rank].
        scale: alpha / rank.
    """

    a: Tensor
    b: Tensor
    scale: float


Parts = dict[Module, dict[str, str]]  # for each module of a file, the tensor names of A, B and alpha


def group_names(names: Iterable[str], family: str) -> tuple[Parts, list[str]]:
    """Return the tensor names of a LoRA by module and part, and those that are no part of an adapter of the family.

    Raises:
        ValueError: two names stand for the same tensor, as in a file with two adapters.
    """
    groups: Parts = {}
    unread = []
    for name in names:
        part = parse(name, family)
        if part is None:
            unread.append(name)
            continue
        group = groups.setdefault(part.module, {})
        if part.kind in group:
            raise ValueError(f"{group[part.kind]} and {name} are the same part of one module")
        group[part.kind] = name
    return groups, unread


def read_adapters(
    state: Mapping[str, Tensor], groups: Parts, family: str, default_scale: Callable[[str, int], float]
) -> dict[str, Adapter]:
    """Return the adapters of a file by diffusers' module names; adapters of fused weights are split.

    Each part of a fused weight gets its own rows of B. If no two parts use the same column, as lora_to_comfyui makes
    it, a part gets only its columns, and the rows of A that belong to them: this restores the adapters that were
    fused. Otherwise every part gets the full A.

    Args:
        state: the tensors of the file.
        groups: the result of group_names.
        family: "wan" | "hunyuan".
        default_scale: alpha / rank of a module without an alpha tensor, from its name and rank.

    Raises:
        ValueError: half of an adapter is missing, or the shapes of A and B do not fit.
    """
    adapters: dict[str, Adapter] = {}
    for module, parts in groups.items():
        if missing := sorted({"A", "B"} - parts.keys()):
            raise ValueError(f"{next(iter(parts.values()))} has no lora_{missing[0]}: half of an adapter is missing")
        a, b = (_matrix(state[parts[half]]) for half in "AB")
        if b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise ValueError(f"{parts['A']} is {list(a.shape)}, {parts['B']} {list(b.shape)}: their ranks differ")
        if not len(a):
            raise ValueError(f"{parts['A']} is {list(a.shape)}: its rank is 0")
        scale = _alpha(parts["alpha"], state) / len(a) if "alpha" in parts else default_scale(module.name, len(a))
        split = _split(module.name, a, b, family) if module.published else {module.name: (a, b)}
        if again := split.keys() & adapters.keys():
            raise ValueError(f"the adapter of {min(again)} is in the file twice")
        adapters |= {name: Adapter(*pair, scale) for name, pair in split.items()}
    return adapters


def _matrix(tensor: Tensor) -> Tensor:
    """Return A or B without the trailing dimensions of 1 that a 1x1 convolution has."""
    while tensor.ndim > 2 and tensor.shape[-1] == 1:
        tensor = tensor.squeeze(-1)
    return tensor


def _alpha(name: str, state: Mapping[str, Tensor]) -> float:
    """Return an alpha as the shortest decimal number that has its float32 value: 0.1 instead of 0.10000000149."""
    if state[name].numel() != 1:
        raise ValueError(f"{name} has {state[name].numel()} values, an alpha has one")
    return float(str(np.float32(state[name].item())))


def _split(module: str, a: Tensor, b: Tensor, family: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A and B of each diffusers module that a published module is made of."""
    width = a.shape[1:].numel()
    entries = to_diffusers(family, {f"{module}.weight": (b.shape[0], width)})
    rows = [torch.cat([b[p.begin // width :][: p.count // width] for p in entry.pieces]) for entry in entries]
    if len(entries) == 1:
        return {entries[0].name.removesuffix(".weight"): (a, rows[0])}
    columns = torch.stack([part.any(0) for part in rows])
    if (columns.sum(0) > 1).any():
        columns = columns.any(1, keepdim=True).expand_as(columns)
    named = zip(entries, rows, columns, strict=True)
    return {entry.name.removesuffix(".weight"): (a[used], part[:, used]) for entry, part, used in named if used.any()}


def lora_to_diffusers(state: Mapping[str, Tensor], family: str) -> dict[str, Tensor] | None:
    """Return a LoRA of any layout by diffusers' names, with alpha / rank in B: the update is B A.

    Args:
        state: the tensors of a LoRA file.
        family: "wan" | "hunyuan".

    Returns:
        None if a name is of no adapter of the family.

    Raises:
        ValueError: as group_names and read_adapters.
    """
    groups, unread = group_names(state, family)
    if unread:
        return None
    converted: dict[str, Tensor] = {}
    for name, adapter in read_adapters(state, groups, family, lambda *_: 1.0).items():
        converted[f"{name}.lora_A.weight"] = adapter.a
        converted[f"{name}.lora_B.weight"] = (adapter.scale * adapter.b.float()).to(adapter.b.dtype)
    return converted
