"""Writes a transformer as one file in another layout (original or ComfyUI names), one block at a time."""

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
from videox.weights.reader import LayoutTensors, assemble, open_tensors
from videox.weights.safetensors_io import CONFIG
from videox.weights.stream_writer import TensorToWrite, check_bytes, check_folder, plan_tensors, write_folder

COMFYUI_PREFIX = "model.diffusion_model."
ARCHITECTURES = {"wan": "wan2.1", "hunyuan": "hunyuan-video"}


def layout_entries(source: LayoutTensors, layout: str) -> list[Entry]:
    """List the tensors of a transformer in a layout: their names, and which diffusers tensors they are made of.

    ComfyUI reads the published names, and detects a model in its diffusion_models folder by their usual prefix.

    Args:
        source: the transformer.
        layout: "diffusers" | "original" | "comfyui".

    Raises:
        UserError: (MODEL) it is not a transformer of a known family.
    """
    shapes = source.shapes()
    if layout == "diffusers":
        return [Entry(name, shape, (Piece(name, 0, prod(shape)),)) for name, shape in shapes.items()]
    family = layouts.family_of(shapes)
    if family not in ARCHITECTURES:
        known = " or ".join(ARCHITECTURES.values())
        raise UserError(str(source.path), f"is not a {known} transformer", "pass the weights of one", MODEL)
    prefix = COMFYUI_PREFIX if layout == "comfyui" else ""
    return [replace(entry, name=f"{prefix}{entry.name}") for entry in layouts.to_original(family, shapes)]


def to_layout(source: LayoutTensors, layout: str) -> list[LazyTensor]:
    """Return the tensors of layout_entries as lazy tensors. Raises UserError (MODEL) as layout_entries does."""
    tensors = {name: source.lazy(name) for name in source}
    return [assemble(entry, tensors, source.path) for entry in layout_entries(source, layout)]


def export_file(folder: Path, target: Path, layout: str, dtype: torch.dtype, metadata: Mapping[str, str]) -> None:
    """Write the transformer of a diffusers folder as one file of another layout; an existing file is renamed.

    Args:
        folder: diffusers folder with config.json and safetensors.
        target: the file to create; it appears atomically.
        layout: "original" | "comfyui".
        dtype: dtype of all floating-point tensors in the file.
        metadata: fields of the header. The model configuration is added: the width of a head is in no shape.

    Raises:
        UserError: (NUMERICS) a value is not finite in this dtype.
        SaveError: the file cannot be written; nothing is left behind.
    """
    tensors = plan_tensors(to_layout(open_tensors(folder), layout), dtype)
    config = json.dumps(json.loads((folder / CONFIG).read_bytes()), sort_keys=True)
    write_file(target, tensors, {**metadata, "layout": layout, MODEL_CONFIG: config})


def write_file(
    target: Path,
    tensors: list[TensorToWrite],
    metadata: Mapping[str, str],
    *,
    verify: bool = False,
    on_progress: Callable[[int], object] = lambda _: None,
) -> None:
    """Write one safetensors file and check its header; an existing file with other content is renamed.

    Args:
        target: path that ends in .safetensors.
        tensors: tensors to write; each name occurs once.
        metadata: fields of the header.
        verify: also read every byte back and compare its checksum.
        on_progress: called with the number of bytes of each block that was written or read back.

    Raises:
        UserError: (NUMERICS) a value is not finite in its dtype.
        SaveError: the file cannot be written; nothing is left behind.
    """

    def write(folder: Path) -> None:
        checksums = write_folder(
            folder,
            tensors,
            max_shard_size=None,
            with_checksums=verify,
            on_progress=on_progress,
            stem=target.name.removesuffix(".safetensors"),
            metadata=metadata,
        )
        check_folder(folder, tensors)
        if verify:
            check_bytes(folder, checksums, on_progress)

    publish_file(target, write)
