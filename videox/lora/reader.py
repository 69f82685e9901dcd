"""Reads LoRA files: finds them, detects the family, and returns the adapters by diffusers' names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from videox.errors import LOAD_ERRORS, MODEL, UserError
from videox.lora.layouts import lora_to_diffusers

STEM = "pytorch_lora_weights"  # the stem of diffusers' LORA_WEIGHT_NAME_SAFE
PREFIX = "transformer."  # diffusers' name of the adapted component in such a file
HALF_MARKS = (".lora_A.", ".lora_down.")  # every LoRA has a tensor name that contains one of them
HUNYUAN_MODULES = ("transformer_blocks", "double_blocks", "single_blocks")  # parts of names that Wan does not have


def lora_file(source: Path) -> Path | None:
    """Return the LoRA file for a checkpoint, a folder or a file; None if it is not a LoRA."""
    path = source / f"{STEM}.safetensors" if source.is_dir() else source
    return path if lora_names(path) else None


def lora_names(path: Path) -> list[str]:
    """Return the names of the tensors in a file if they are adapters, else an empty list."""
    if path.suffix != ".safetensors" or not path.is_file():
        return []
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
    except (OSError, SafetensorError):
        return []  # not a LoRA; reading the file as a model reports what is wrong with it
    return names if any(half in name for name in names for half in HALF_MARKS) else []


def lora_family(path: Path) -> str:
    """Return the family whose transformer a LoRA adapts, from its tensors' names: "wan" | "hunyuan"."""
    return "hunyuan" if any(module in name for name in lora_names(path) for module in HUNYUAN_MODULES) else "wan"


def read_lora(
    path: Path, load: Callable[..., tuple[dict[str, Tensor], dict[str, Any] | None]], *, where: str
) -> tuple[dict[str, Tensor], float]:
    """Return a LoRA's adapters by diffusers' names without their prefix, and the factor of B A.

    Args:
        path: a .safetensors file in ComfyUI's layout or any that diffusers reads, or a folder with diffusers' file.
        load: lora_state_dict of the family's pipeline.
        where: the flag or argument that the path was passed by, for the error message.

    Raises:
        UserError: (MODEL) it cannot be read, or is of a kind that this trainer does not support.
    """
    if path.is_file() and path.suffix != ".safetensors":
        what = f"{path} is not a .safetensors file, and a pickle may contain code"
        raise UserError(where, what, "pass a LoRA in safetensors format", MODEL)
    try:
        converted = lora_to_diffusers(load_file(path), lora_family(path)) if lora_names(path) else None
        # diffusers' own converters support only the published widths, and fail for some alphas.
        if converted is not None:
            return converted, 1.0
        adapters, metadata = load(
            path if path.is_dir() else path.parent,
            weight_name=f"{STEM}.safetensors" if path.is_dir() else path.name,
            return_lora_metadata=True, local_files_only=True, use_safetensors=True,
        )  # fmt: skip
    except (*LOAD_ERRORS, SafetensorError) as error:
        cause = " ".join(str(error).split())[:200]
        hint = f"pass a LoRA with {STEM}.safetensors"
        raise UserError(where, f"{path} cannot be read ({cause})", hint, MODEL) from error
    scale = _scale_of(metadata or {}, path, where)
    return {key.removeprefix(PREFIX): tensor for key, tensor in adapters.items()}, scale


def _scale_of(metadata: Mapping[str, Any], path: Path, where: str) -> float:
    """Return alpha / rank from a file's header; without a header it is 1, since diffusers has multiplied it into B."""
    settings = {key.removeprefix(PREFIX): value for key, value in metadata.items()}
    unsupported = [key for key in ("alpha_pattern", "rank_pattern", "use_dora", "use_rslora") if settings.get(key)]
    if unsupported:
        what = f"{path} has {unsupported[0]} = {settings[unsupported[0]]}, which is not supported"
        raise UserError(where, what, "pass a LoRA with one rank and one alpha for all layers", MODEL)
    if "lora_alpha" not in settings or "r" not in settings:
        return 1.0
    return float(settings["lora_alpha"]) / float(settings["r"])
