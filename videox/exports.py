"""Serves whoever takes trained weights elsewhere: another program's names in one file, written a block at a time."""

from __future__ import annotations

import filecmp
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError

from videox import __version__, layouts
from videox.errors import MODEL, Refusal
from videox.files import aside, flush, flush_tree, unused
from videox.shards import Scattered
from videox.streaming import Planned, check_bytes, check_folder, planned, write_folder
from videox.tensor_files import LayoutTensors, assembled, open_tensors
from videox.weights import SaveFailed

LAYOUTS = ("original", "comfyui")  # beside diffusers'
COMFYUI_PREFIX = "model.diffusion_model."
ARCHITECTURES = {"wan": "wan2.1", "hunyuan": "hunyuan-video"}


def describe(base_model: str, facts: Mapping[str, object]) -> dict[str, str]:
    """Returns what a file of trained weights says of itself in its header.

    Args:
        base_model: that was trained, as the user named it; of a folder here the last name alone is told.
        facts: task, steps, sizes and the like; None is left out.
    """
    base_model = Path(base_model).resolve().name if Path(base_model).exists() else base_model
    said = {name: str(value) for name, value in sorted(facts.items()) if value is not None}
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": f"{base_model} fine-tuned",
        "modelspec.prediction_type": "flow",
        "trainer": f"videox {__version__}",
        "base_model": base_model,
        **said,
    }


def relaid(source: LayoutTensors, layout: str) -> list[Scattered]:
    """Returns a transformer's tensors as they are called and cut in a layout: "diffusers", "original" or "comfyui".

    ComfyUI reads the published names, and knows a model in its diffusion_models folder by their usual prefix.

    Raises:
        Refusal: (MODEL) it is no transformer of a known family.
    """
    tensors = {name: source.scattered(name) for name in source}
    if layout == "diffusers":
        return list(tensors.values())
    family = layouts.family_of(tensors)
    if family not in ARCHITECTURES:
        known = " or ".join(ARCHITECTURES.values())
        raise Refusal(str(source.path), f"is no transformer of {known}", "give one", MODEL)
    entries = layouts.to_original(family, source.shapes())
    found = [assembled(entry, tensors, source.path) for entry in entries]
    prefix = COMFYUI_PREFIX if layout == "comfyui" else ""
    return [Scattered(f"{prefix}{t.name}", t.dtype, t.shape, t.runs, t.stride, t.buffer, t.scale) for t in found]


def export_file(folder: Path, target: Path, layout: str, dtype: torch.dtype, metadata: Mapping[str, str]) -> None:
    """Writes the transformer of a diffusers folder as one file of another layout; what stood there is moved aside.

    Args:
        folder: with config.json and safetensors.
        target: the file to make, whole or absent.
        layout: "original" | "comfyui".
        dtype: of all floating tensors.
        metadata: for the header.

    Raises:
        Refusal: (NUMERICS) a value is not finite in this dtype.
        SaveFailed: the disk refused; nothing is left behind.
    """
    tensors = planned(relaid(open_tensors(folder), layout), dtype)
    write_file(target, tensors, {**metadata, "layout": layout})


def write_file(
    target: Path,
    tensors: list[Planned],
    metadata: Mapping[str, str],
    *,
    verify: bool = False,
    told: Callable[[int], object] = lambda _: None,
) -> None:
    """Writes one safetensors file, checked by its header; a file that stands there with other content is moved aside.

    Args:
        target: ends in .safetensors.
        tensors: each name once.
        metadata: for the header.
        verify: read every byte back, too.
        told: called with the bytes of each block that is written or read back.

    Raises:
        Refusal: (NUMERICS) a value is not finite in its dtype.
        SaveFailed: the disk refused; nothing is left behind.
    """
    temporary = aside(target)
    try:
        temporary.mkdir(parents=True)
        checksums = write_folder(
            temporary,
            tensors,
            max_shard_size=float("inf"),
            with_checksums=verify,
            told=told,
            stem=target.name.removesuffix(".safetensors"),
            metadata=metadata,
        )
        check_folder(temporary, tensors)
        if verify:
            check_bytes(temporary, checksums, told)
        flush_tree(temporary)
        made = temporary / target.name
        if target.is_file() and filecmp.cmp(made, target, shallow=False):
            return
        if os.path.lexists(target):
            target.rename(unused(target.with_name(f"{target.stem}-superseded{target.suffix}")))
        made.rename(target)
        flush(target.parent)
    except (OSError, SafetensorError) as error:
        raise SaveFailed(f"{target}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
