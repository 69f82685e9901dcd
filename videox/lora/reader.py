"""Reads LoRA files of any layout: finds them, detects the family, and returns the adapters by diffusers' names."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from videox.errors import LOAD_ERRORS, MODEL, UserError
from videox.lora.foreign import MERGE, OTHER_ADAPTERS, UNQUANTIZE, explain_unread, foreign_model
from videox.lora.layouts import Adapter, group_names, read_adapters
from videox.lora.names import family_of_names
from videox.weights.expert_names import EXPERTS, lora_stem
from videox.weights.file_damage import describe_damage, describe_pointer
from videox.weights.header import parse_json_object, read_metadata
from videox.weights.lazy_tensor import FLOAT8_DTYPES
from videox.weights.reader import FP8_MARKER, IGNORED_SUFFIXES, SCALE_SUFFIXES

STEM = "pytorch_lora_weights"  # the stem of diffusers' LORA_WEIGHT_NAME_SAFE
PEFT_STEM, PEFT_CONFIG = "adapter_model", "adapter_config.json"  # as PeftModel.save_pretrained names them
# Stems of the file to read in a folder, besides diffusers': of peft and diffusion-pipe, of VideoX-Fun.
OTHER_STEMS = (PEFT_STEM, "lora_diffusion_pytorch_model")
EXPERT_STEMS = tuple(lora_stem(STEM, expert) for expert in EXPERTS)
PREFIX = "transformer."  # diffusers' name of the adapted component in such a file
SETTINGS = "lora_adapter_metadata"  # key of the settings of the LoRA in the header of diffusers' files
HALF_MARKS = (".lora_A.", ".lora_down.", ".lora.down.")  # every LoRA has a tensor name that contains one of them
UNSUPPORTED = {"use_dora": "a DoRA", "lora_bias": "a LoRA with trained biases", "use_qalora": "a QALoRA"}


def lora_file(source: Path, expert: str | None = None) -> Path | None:
    """Return the LoRA file for a checkpoint, a folder or a file; None if it is not a LoRA.

    Args:
        expert: of a folder with LoRAs of both experts of Wan2.2, the one to take; None: the first that is there.
    """
    if source.is_dir():
        return next((file for file in _files(source, expert) if lora_names(file)), None)
    return source if lora_names(source) else None


def _files(folder: Path, expert: str | None) -> list[Path]:
    """Return the paths in a folder that may have its LoRA, the first choice first."""
    experts = list(EXPERTS) if expert is None else [expert]
    stems = [STEM, *(lora_stem(STEM, name) for name in experts), *OTHER_STEMS]
    inside = [folder / name / f"{lora_stem(STEM, name)}.safetensors" for name in experts]
    return [*(folder / f"{stem}.safetensors" for stem in stems), *inside]


def lora_names(path: Path) -> list[str]:
    """Return the names of the tensors in a file if they are adapters (LoRA, LoKr, LoHa, ...), else an empty list."""
    if path.suffix != ".safetensors" or not path.is_file():
        return []
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
    except (OSError, SafetensorError):
        return []  # not a LoRA; reading the file as a model reports what is wrong with it
    is_adapter = any(mark in name or OTHER_ADAPTERS.search(name) for name in names for mark in HALF_MARKS)
    return names if is_adapter else []


def lora_family(path: Path) -> str:
    """Return the family whose transformer a LoRA adapts, from its tensors' names: "wan" | "hunyuan"."""
    return family_of_names(lora_names(path))


def find_lora(path: Path, where: str, expert: str | None = None) -> Path:
    """Return the LoRA file that a path stands for: the path itself, or the one file of a known name in a folder.

    Args:
        where: the flag or argument that the path was passed by, for the error message.
        expert: of a folder with LoRAs of both experts of Wan2.2, the one to take.

    Raises:
        UserError: (MODEL) it is no .safetensors file, or a folder without a LoRA, or with several.
    """
    if path.is_file() and path.suffix != ".safetensors":
        what = f"{path} is not a .safetensors file, and a pickle may contain code"
        raise UserError(where, what, "pass a LoRA in safetensors format", MODEL)
    if not path.is_dir():
        return path
    named = {file.stem: file for file in _files(path, None) if file.stem in EXPERT_STEMS and file.is_file()}
    if expert is None and len(named) > 1:
        hint = f"pass {' or '.join(map(str, named.values()))}"
        raise UserError(where, f"{path} contains LoRAs of both experts of Wan2.2", hint, MODEL)
    if known := [file for file in _files(path, expert) if file.is_file()]:
        return known[0]
    found = [file for file in sorted(path.glob("*.safetensors")) if lora_names(file)]
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:4])
        raise UserError(where, f"{path} contains {len(found)} LoRAs ({names})", f"pass {found[-1]}", MODEL)
    if not found:
        what = f"{path} cannot be read (it contains no LoRA)"
        raise UserError(where, what, f"pass a LoRA file, or a folder with {STEM}.safetensors", MODEL)
    return found[0]


def read_lora(
    path: Path,
    load: Callable[..., tuple[dict[str, Tensor], dict[str, Any] | None]],
    *,
    where: str,
    family: str | None = None,
    expert: str | None = None,
) -> tuple[dict[str, Tensor], float]:
    """Return a LoRA's adapters by diffusers' names without their prefix, and the factor of B A.

    The factor is alpha / rank of all adapters. If it differs between them, it is 1, and float32 B contains it.

    Args:
        path: a .safetensors file in any layout, or a folder with one.
        load: lora_state_dict of the family's pipeline, which reads the files of diffusers' own layout.
        where: the flag or argument that the path was passed by, for the error message.
        family: the family that the LoRA must be of, "wan" | "hunyuan"; None detects it.
        expert: as for find_lora.

    Raises:
        UserError: (MODEL) it cannot be read, or is of a kind that this trainer does not support.
    """
    file = find_lora(path, where, expert)
    try:
        adapters = _read_file(file, load, where, family)
    except (*LOAD_ERRORS, SafetensorError) as error:
        cause = " ".join(str(error).split())[:200]
        what, hint = f"cannot be read ({cause})", "copy or download the file again, or pass another LoRA"
        if isinstance(error, SafetensorError) and file.is_file():
            what = describe_damage(file, cause)
            hint = "run `git lfs pull` in its folder" if describe_pointer(file) else "copy or download the file again"
            hint = "save its tensors as safetensors" if "pickle" in what else hint
        raise UserError(where, f"{file} {what}", hint, MODEL) from error
    _check_values(adapters, file, where)
    scales = {adapter.scale for adapter in adapters.values()}
    factor = next(iter(scales)) if len(scales) == 1 else 1.0
    tensors: dict[str, Tensor] = {}
    for name, adapter in adapters.items():
        b = adapter.b if len(scales) == 1 else adapter.scale * adapter.b.float()
        tensors |= {f"{name}.lora_A.weight": adapter.a, f"{name}.lora_B.weight": b}
    return tensors, factor


def _check_values(adapters: Mapping[str, Adapter], path: Path, where: str) -> None:
    """Raise UserError (MODEL) for a value that is not finite, which fails the first step, and for an alpha of 0."""
    for name, adapter in adapters.items():
        if not (
            math.isfinite(adapter.scale) and all(part.float().isfinite().all() for part in (adapter.a, adapter.b))
        ):
            hint = "pass another file, such as one that was saved before its training failed"
            raise UserError(where, f"{path} has values that are not finite, in {name}", hint, MODEL)
        if adapter.scale == 0:
            what = f"{path} has an alpha of 0, which switches its adapters off, in {name}"
            raise UserError(where, what, "set each alpha to the one of the training (often the rank)", MODEL)


def _read_file(
    path: Path, load: Callable[..., tuple[dict[str, Tensor], dict[str, Any] | None]], where: str, family: str | None
) -> dict[str, Adapter]:
    header = read_metadata(path)
    if model := foreign_model(header):
        raise UserError(where, f"{path} is {model}", "pass a LoRA of the model that is trained", MODEL)
    with safe_open(path, "pt") as opened:
        names = list(opened.keys())
    family = family or family_of_names(names)
    of_8_bits = {name for name in names if name.endswith((*SCALE_SUFFIXES, *IGNORED_SUFFIXES, FP8_MARKER))}
    groups, unread = group_names((name for name in names if name not in of_8_bits), family)
    settings = parse_json_object(header.get(SETTINGS, "{}"))
    published = any(module.published for module in groups)  # diffusers converts these for published widths only
    if not (unread or published or of_8_bits) and all(name.startswith(PREFIX) for name in names):
        state, loaded = load(
            path.parent, weight_name=path.name, return_lora_metadata=True, local_files_only=True, use_safetensors=True
        )
        settings = loaded or settings
        groups, unread = group_names(state, family)
    else:
        state = load_file(path)
        # Some programs write a zero difference for each norm; it changes nothing.
        zeros = [name for name in unread if re.search(r"\.diff(_b|_m)?$", name) and not state[name].any()]
        unread = [name for name in unread if name not in zeros]
    if unread or not groups:
        what, hint = explain_unread(unread, family, has_adapters=bool(groups))
        raise UserError(where, f"{path} {what}", hint, MODEL)
    settings = {key.removeprefix(PREFIX): value for key, value in settings.items()}
    if not settings and path.stem == PEFT_STEM and (config := path.with_name(PEFT_CONFIG)).is_file():
        settings = parse_json_object(config.read_text(encoding="utf-8", errors="replace"))
    return read_adapters(_dequantize(state, path, where), groups, family, _scale_rule(settings, path, where))


def _dequantize(state: Mapping[str, Tensor], path: Path, where: str) -> dict[str, Tensor]:
    """Return the tensors of a LoRA, 8-bit floats multiplied by their scales.

    8-bit floats without a scale become bfloat16, which has all of their values; those with one become float32.

    Raises:
        UserError: (MODEL) A or B has integers, or a scale is not one number for 8-bit floats.
    """
    halves = {name: tensor for name, tensor in state.items() if name.endswith(".weight")}
    scales = {
        f"{name.removesuffix(suffix)}.weight": tensor
        for name, tensor in state.items() for suffix in SCALE_SUFFIXES if name.endswith(suffix)
    }  # fmt: skip
    eight_bits = {name: tensor for name, tensor in halves.items() if tensor.dtype in FLOAT8_DTYPES}
    faults = [f"{name} has {tensor.dtype}" for name, tensor in halves.items() if not tensor.is_floating_point()]
    faults += [f"{name} is scaled and has no 8-bit floats" for name in scales if name not in eight_bits]
    faults += [f"{name} has {scale.numel()} scales" for name, scale in scales.items() if scale.numel() != 1]
    if faults:
        raise UserError(where, f"{path} is quantized in a way that cannot be read: {faults[0]}", UNQUANTIZE, MODEL)
    floats = {
        name: tensor.float() * scales[name].float().reshape(()) if name in scales else tensor.to(torch.bfloat16)
        for name, tensor in eight_bits.items()
    }
    return {**state, **floats}


def _scale_rule(settings: Mapping[str, Any], path: Path, where: str) -> Callable[[str, int], float]:
    """Return alpha / rank as a function of a module's name and rank, from peft's settings; 1 without settings.

    peft's rule: alpha_pattern has regular expressions of the ends of names; use_rslora divides by the rank's root.
    """
    for key, kind in UNSUPPORTED.items():
        if settings.get(key):
            raise UserError(where, f"{path} is {kind}: it has {key} = {settings[key]}", MERGE, MODEL)
    alpha, patterns = settings.get("lora_alpha"), settings.get("alpha_pattern") or {}

    def scale(module: str, rank: int) -> float:
        own = next((patterns[key] for key in patterns if re.match(rf"(.*\.)?({key})$", module)), alpha)
        if own is None:
            return 1.0
        return float(own) / (math.sqrt(rank) if settings.get("use_rslora") else rank)

    return scale
