"""Writes a LoRA as one file in a layout: for diffusers, ComfyUI, or kohya's trainers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from videox.errors import NUMERICS, UserError
from videox.files import publish_file
from videox.lora.facts import dtype_name, make_metadata, weights_date
from videox.lora.header import manager_fields
from videox.lora.layouts import lora_to_comfyui, lora_to_kohya
from videox.lora.reader import PREFIX
from videox.weights.layout_tables import KOHYA
from videox.weights.layout_writer import ARCHITECTURES
from videox.weights.safetensors_io import join_first, save_tensors


def to_layout(
    adapters: Mapping[str, Tensor], scale: float, family: str, layout: str, *, mlp_ratio: float = 4.0
) -> dict[str, Tensor]:
    """Return a LoRA in a layout.

    Args:
        adapters: A and B by diffusers' names without prefix.
        scale: the factor of B A.
        family: "wan" | "hunyuan".
        layout: "diffusers": the scale is multiplied into B, so that a loader does not need alpha; "comfyui" | "kohya":
            each module has an alpha.
        mlp_ratio: from HunyuanVideo's configuration.
    """
    if layout == "diffusers":
        return {
            f"{PREFIX}{name}": (scale * t.float()).to(t.dtype) if ".lora_B." in name else t
            for name, t in adapters.items()
        }
    ranks = {name.split(".lora_")[0]: len(t) for name, t in adapters.items() if ".lora_A." in name}
    alphas = {name: scale * rank for name, rank in ranks.items()}
    convert = lora_to_kohya if layout == KOHYA else lora_to_comfyui
    return convert(adapters, family, alphas, mlp_ratio=mlp_ratio)


def write_lora(
    source: Path,
    output: Path,
    tensors: Mapping[str, Tensor],
    family: str,
    *,
    layout: str,
    scale: float,
    ranks: set[int],
    base: str | None = None,
) -> None:
    """Write a LoRA file, with a header that describes its training and the file.

    Args:
        source: the weights that it comes from; what is known of their training is copied to the header.
        output: the .safetensors file to create.
        tensors: the result of to_layout, in the dtypes of the file.
        family: "wan" | "hunyuan".
        layout: of the tensors.
        scale: the factor of B A before to_layout.
        ranks: of the adapters; one value is written to the header.
        base: the base model, as the user named it; None takes it from what is known of the source.

    Raises:
        UserError: (NUMERICS) a value is not finite.
        OSError, SaveError: the file cannot be written.
    """
    if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise UserError(str(source), f"{join_first(bad)}: not finite in this dtype", "use another --dtype", NUMERICS)
    rank = next(iter(ranks)) if len(ranks) == 1 else None
    # The header has one rank, and the alpha that matches the tensors in this file.
    alpha = None if rank is None else rank * (1.0 if layout == "diffusers" else scale)
    facts: dict[str, str | None] = {
        "architecture": f"{ARCHITECTURES[family]}/lora",
        "layout": layout,
        "dtype": dtype_name(tensors.values()),
        "rank": None if rank is None else f"{rank}",
        "alpha": None if alpha is None else f"{alpha:g}",
    }
    metadata = make_metadata(source, facts, base)
    metadata |= manager_fields(metadata, family, rank=rank, alpha=alpha, date=weights_date(source))
    output.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    publish_file(output, lambda folder: save_tensors(folder, contiguous, stem=output.stem, metadata=metadata))


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return the tensors in a dtype, None keeps theirs; alphas stay float32."""
    return {name: t if name.endswith(".alpha") else t.to(dtype or t.dtype) for name, t in tensors.items()}
