"""Serves whoever takes trained weights elsewhere: another program's names in one file, written a block at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path

import torch

from videox.errors import MODEL, UserError
from videox.files import publish_file
from videox.weights import layouts
from videox.weights.header import MODEL_CONFIG
from videox.weights.layouts import Entry, Piece
from videox.weights.lazy_tensor import LazyTensor
from videox.weights.reader import LayoutTensors, assembled, open_tensors
from videox.weights.safetensors_io import CONFIG
from videox.weights.stream_writer import Planned, check_bytes, check_folder, planned, write_folder

LAYOUTS = ("original", "comfyui")  # beside diffusers'
MERGED = "merged"  # what --export_layouts calls a LoRA's base with the LoRA in it, in diffusers' layout
COMFYUI_PREFIX = "model.diffusion_model."
ARCHITECTURES = {"wan": "wan2.1", "hunyuan": "hunyuan-video"}


def laid_out(source: LayoutTensors, layout: str) -> list[Entry]:
    """Returns a transformer's tensors as they are called and made of diffusers' in a layout.

    ComfyUI reads the published names, and knows a model in its diffusion_models folder by their usual prefix.

    Args:
        source: the transformer.
        layout: "diffusers" | "original" | "comfyui".

    Raises:
        UserError: (MODEL) it is no transformer of a known family.
    """
    shapes = source.shapes()
    if layout == "diffusers":
        return [Entry(name, shape, (Piece(name, 0, prod(shape)),)) for name, shape in shapes.items()]
    family = layouts.family_of(shapes)
    if family not in ARCHITECTURES:
        known = " or ".join(ARCHITECTURES.values())
        raise UserError(str(source.path), f"is no transformer of {known}", "give one", MODEL)
    prefix = COMFYUI_PREFIX if layout == "comfyui" else ""
    return [replace(entry, name=f"{prefix}{entry.name}") for entry in layouts.to_original(family, shapes)]


def relaid(source: LayoutTensors, layout: str) -> list[LazyTensor]:
    """Returns where the elements of each tensor of laid_out lie. Raises UserError (MODEL) as it does."""
    tensors = {name: source.scattered(name) for name in source}
    return [assembled(entry, tensors, source.path) for entry in laid_out(source, layout)]


def export_file(folder: Path, target: Path, layout: str, dtype: torch.dtype, metadata: Mapping[str, str]) -> None:
    """Writes the transformer of a diffusers folder as one file of another layout; what stood there is moved aside.

    Args:
        folder: with config.json and safetensors.
        target: the file to make, whole or absent.
        layout: "original" | "comfyui".
        dtype: of all floating tensors.
        metadata: for the header, which also gets the configuration: no shape tells how wide a head is.

    Raises:
        UserError: (NUMERICS) a value is not finite in this dtype.
        SaveError: the disk refused; nothing is left behind.
    """
    tensors = planned(relaid(open_tensors(folder), layout), dtype)
    config = json.dumps(json.loads((folder / CONFIG).read_bytes()), sort_keys=True)
    write_file(target, tensors, {**metadata, "layout": layout, MODEL_CONFIG: config})


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
        UserError: (NUMERICS) a value is not finite in its dtype.
        SaveError: the disk refused; nothing is left behind.
    """

    def write(folder: Path) -> None:
        checksums = write_folder(
            folder,
            tensors,
            max_shard_size=float("inf"),
            with_checksums=verify,
            told=told,
            stem=target.name.removesuffix(".safetensors"),
            metadata=metadata,
        )
        check_folder(folder, tensors)
        if verify:
            check_bytes(folder, checksums, told)

    publish_file(target, write)
