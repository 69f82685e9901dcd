"""Serves whoever has a LoRA in a file: where it is, whose it is, and its adapters by diffusers' names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from videox.errors import MODEL, UNLOADABLE, UserError
from videox.lora.layouts import lora_to_diffusers

STEM = "pytorch_lora_weights"  # that of diffusers' LORA_WEIGHT_NAME_SAFE
PREFIX = "transformer."  # diffusers' name, in such a file, of the part that is adapted
HALVES = (".lora_A.", ".lora_down.")  # one of them is in some name of every LoRA
HUNYUAN = ("transformer_blocks", "double_blocks", "single_blocks")  # parts of names that no Wan has


def lora_file(source: Path) -> Path | None:
    """Returns the LoRA that a checkpoint, a folder or a file of adapters is; None where it is something else."""
    path = source / f"{STEM}.safetensors" if source.is_dir() else source
    return path if lora_names(path) else None


def lora_names(path: Path) -> list[str]:
    """Returns the names of the tensors in a file, if they are adapters."""
    if path.suffix != ".safetensors" or not path.is_file():
        return []
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
    except (OSError, SafetensorError):
        return []  # whoever reads it as a model says what is wrong
    return names if any(half in name for name in names for half in HALVES) else []


def lora_family(path: Path) -> str:
    """Returns whose transformer a LoRA adapts, by its tensors' names: "wan" | "hunyuan"."""
    return "hunyuan" if any(part in name for name in lora_names(path) for part in HUNYUAN) else "wan"


def read_lora(
    path: Path, load: Callable[..., tuple[dict[str, Tensor], dict[str, Any] | None]], *, where: str
) -> tuple[dict[str, Tensor], float]:
    """Returns a LoRA's adapters by diffusers' names without their prefix, and what B A is multiplied by.

    Args:
        path: a .safetensors file in ComfyUI's layout or any that diffusers reads, or a folder with one of diffusers'.
        load: lora_state_dict of the family's pipeline.
        where: what the user gave, for the refusal.

    Raises:
        UserError: (MODEL) it cannot be read, or is of a kind that no run here trains.
    """
    if path.is_file() and path.suffix != ".safetensors":
        what = f"{path} is no .safetensors file, and a pickle may hold code"
        raise UserError(where, what, "give a LoRA in safetensors", MODEL)
    try:
        own = lora_to_diffusers(load_file(path), lora_family(path)) if lora_names(path) else None
        if own is not None:  # diffusers' converters know the published widths alone, and stumble over some alphas
            return own, 1.0
        found, metadata = load(
            path if path.is_dir() else path.parent,
            weight_name=f"{STEM}.safetensors" if path.is_dir() else path.name,
            return_lora_metadata=True, local_files_only=True, use_safetensors=True,
        )  # fmt: skip
    except (*UNLOADABLE, SafetensorError) as why:
        cause = " ".join(str(why).split())[:200]
        raise UserError(
            where, f"{path} cannot be read ({cause})", f"give a LoRA with {STEM}.safetensors", MODEL
        ) from why
    return {key.removeprefix(PREFIX): tensor for key, tensor in found.items()}, _scale_of(metadata or {}, path, where)


def _scale_of(metadata: Mapping[str, Any], path: Path, where: str) -> float:
    """Returns alpha / rank as a file's header says; without one it is in the tensors already."""
    said = {key.removeprefix(PREFIX): value for key, value in metadata.items()}
    unusual = [key for key in ("alpha_pattern", "rank_pattern", "use_dora", "use_rslora") if said.get(key)]
    if unusual:
        what = f"{path} has {unusual[0]} = {said[unusual[0]]}, which no run here trains"
        raise UserError(where, what, "give a LoRA of one rank and one alpha", MODEL)
    return float(said["lora_alpha"]) / float(said["r"]) if "lora_alpha" in said and "r" in said else 1.0
