"""Initial adapters from a LoRA that was trained before (--init_lora_from), by any trainer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from videox.errors import MODEL, UserError, plural
from videox.lora.adapters import Lora, peft_name
from videox.lora.names import HALF, KOHYA_PREFIX, describe_names
from videox.lora.reader import find_lora, lora_names, read_lora
from videox.weights.header import read_metadata
from videox.weights.safetensors_io import TensorSource

FLAG = "--init_lora_from"
OTHER_BASE = "pass the base model that it was trained on, or another LoRA"


def init_from_lora(
    path: Path,
    values: Mapping[str, Tensor],
    lora: Lora,
    load: Callable[..., tuple[dict[str, Tensor], dict[str, Any] | None]],
    *,
    stored: TensorSource,
    family: str,
    expert: str | None = None,
) -> tuple[dict[str, Tensor], list[str]]:
    """Return initial values from a LoRA that was trained before, and the lines that report what was loaded.

    If its alpha differs, the ratio is multiplied into B, so that the model's output is the same as with that LoRA. If
    its rank is lower, the further rows of A are the new ones and the columns of B are 0. Layers that it does not adapt
    keep their new adapters, whose B is 0.

    Args:
        path: a .safetensors file in any layout, or a folder with one, such as a checkpoint.
        values: the result of initial_values.
        lora: the adaptation of this run.
        load: lora_state_dict of the family's pipeline.
        stored: the base model's weights; only their names and shapes are read.
        family: "wan" | "hunyuan".
        expert: that this run trains, of a model of two.

    Raises:
        UserError: (MODEL) it cannot be read, is of another model, adapts other layers, or has a higher rank.
    """
    file = find_lora(path, FLAG, expert)
    adapters, scale = read_lora(file, load, where=FLAG, family=family)
    _check_model(path, adapters, stored)
    _check_run(path, adapters, lora)
    initial, padded = dict(values), set()
    for name, tensor in adapters.items():
        key = peft_name(name)
        if ".lora_A." in name:
            new = values[key].clone()
            new[: len(tensor)] = tensor.float()
            padded |= {name} if len(tensor) < lora.rank else set()
        else:
            new = torch.zeros_like(values[key])
            new[:, : tensor.shape[1]] = tensor.float() * (scale / lora.scale)
        initial[key] = new
    lines = _report(path, lora_names(file), adapters, lora, family, len(padded))
    trained = read_metadata(file).get("expert")
    if trained and trained != expert:
        lines.append(f"note: it was trained as a LoRA of the {trained} expert")
    return initial, lines


def _check_model(path: Path, adapters: Mapping[str, Tensor], stored: TensorSource) -> None:
    """Raise UserError (MODEL) if an adapted layer is not in the base model, or has other widths."""
    known = {name.removesuffix(".weight") for name in stored}
    if missing := sorted({_layer(name) for name in adapters} - known):
        what = f"{path} adapts {len(missing)} {plural(len(missing), 'layer')} that this model does not have, first {missing[0]}"
        raise UserError(FLAG, what, OTHER_BASE, MODEL)
    for name, tensor in sorted(adapters.items()):
        layer, half = _layer(name), name.split(".lora_")[1][0]
        shape = stored.shape(f"{layer}.weight")
        if len(shape) != 2 or tensor.ndim != 2:
            what = f"{path} adapts {layer}, which is a convolution: only linear layers are adapted here"
            raise UserError(FLAG, what, "remove its tensors from the file", MODEL)
        side, width = ("inputs", tensor.shape[1]) if half == "A" else ("outputs", tensor.shape[0])
        if width != shape[half == "A"]:
            what = (
                f"{path} is of a model with other widths: {layer} has {width} {side} in it, {shape[half == 'A']} here"
            )
            raise UserError(FLAG, what, OTHER_BASE, MODEL)


def _check_run(path: Path, adapters: Mapping[str, Tensor], lora: Lora) -> None:
    """Raise UserError (MODEL) if this run does not adapt the same layers, or has a lower rank."""
    if unexpected := sorted(name for name in adapters if _layer(name) not in lora.targets):
        tensors = plural(len(unexpected), "tensor")
        what = f"{path} adapts {len(unexpected)} {tensors} that this run does not, first {unexpected[0]}"
        patterns = sorted({re.sub(r"^.*?\.\d+\.", "", _layer(name)) for name in adapters})
        raise UserError(FLAG, what, f"pass --lora_target_modules {' '.join(patterns)}", MODEL)
    rank = max(tensor.shape[0] for name, tensor in adapters.items() if ".lora_A." in name)
    if rank > lora.rank:
        raise UserError(FLAG, f"{path} has rank {rank}, this run {lora.rank}", f"pass --lora_rank {rank}", MODEL)


def _layer(name: str) -> str:
    return name.split(".lora_")[0]


def _report(
    path: Path, names: list[str], adapters: Mapping[str, Tensor], lora: Lora, family: str, padded: int
) -> list[str]:
    layers = {_layer(name) for name in adapters}
    line = (
        f"starts from the LoRA {path} ({describe_names(names, family)}, {len(layers)} {plural(len(layers), 'layer')})"
    )
    if padded:
        line += f"; {padded} of them have a lower rank and are filled up to {lora.rank}"
    lines = [line]
    if missing := sorted({*lora.targets} - layers):
        lines.append(
            f"note: {len(missing)} of {len(lora.targets)} layers {plural(len(missing), 'is', 'are')} not in it and "
            f"{plural(len(missing), 'begins', 'begin')} at zero, first {missing[0]}"
        )
    has_alpha = any(name.endswith(".alpha") for name in names)
    if names[0].startswith(KOHYA_PREFIX) and HALF.fullmatch(names[0]) and not has_alpha:
        lines.append(
            "note: it has no alphas, so its scale is 1; VideoX-Fun's peft runs leave out theirs (alpha / rank)"
        )
    return lines
