"""Measures what the estimates need to know of a module, by building it on the meta device; loads its library."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from videox.estimate.peak_memory import peak_bytes
from videox.models.folder import build_on_meta, load_class
from videox.models.quantised_text import linear_layers, text_blocks

PROBE = (9, 128, 128)  # frames, height and width of the clip on which a VAE's FLOPs are counted


def build(kind: str, config: Mapping[str, Any], *, half: bool = False, tiled: bool = False) -> Any:  # noqa: ANN401 - of either library
    """Return a module on the meta device; the same one for the same arguments.

    Args:
        kind: its class with the package, such as "diffusers.AutoencoderKLWan".
        config: its configuration.
        half: in bfloat16, else in float32.
        tiled: a VAE that encodes in tiles.

    Raises:
        UserError: the class cannot be built from the configuration.
    """
    return _build(kind, json.dumps(config, sort_keys=True), half, tiled)


@cache
def _build(kind: str, config: str, half: bool, tiled: bool) -> Any:  # noqa: ANN401 - of either library
    module: Any = build_on_meta(load_class(kind), json.loads(config))
    if half:  # by torch's own method: that of diffusers would warn about an empty list
        module = nn.Module.to(module, torch.bfloat16)
    if tiled:
        module.enable_tiling()
    return module


def parameter_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter, by name."""
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def element_count(module: nn.Module) -> int:
    """Return the number of elements of a module's parameters and buffers."""
    return sum(tensor.numel() for tensor in (*module.parameters(), *module.buffers()))


def count_without_embeddings(module: nn.Module) -> int:
    """Return the number of parameters of a text encoder that take part in matrix products: all but its embeddings."""
    named = module.named_parameters()
    return sum(p.numel() for name, p in named if "embed" not in name and "shared" not in name)


def linear_counts(module: nn.Module) -> tuple[int, int]:
    """Return elements and rows of the weights of a text encoder that --text_encoder_precision quantises."""
    _, blocks = text_blocks(module)
    shapes = [layer.weight.shape for block in blocks for layer in linear_layers(block).values()]
    return sum(rows * columns for rows, columns in shapes), sum(rows for rows, _ in shapes)


def vae_flops_per_pixel(vae: Any) -> float:  # noqa: ANN401 - a VAE of diffusers, on the meta device
    """Return the FLOPs of a VAE's encoder per pixel and frame, counted on a small clip."""
    clip = torch.empty((1, 3, *PROBE), device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae.encode(clip)
    return counter.get_total_flops() / math.prod(PROBE)


def vae_peak_bytes(vae: Any, size: tuple[int, int, int]) -> int:  # noqa: ANN401 - a VAE of diffusers, on the meta device
    """Return the peak bytes of the activations of a VAE's encoder, without the clip itself.

    Args:
        vae: on the meta device.
        size: frames, height and width of the clip.
    """
    pixels = torch.empty((1, 3, *size), device="meta", dtype=next(vae.parameters()).dtype)
    return peak_bytes(lambda: vae.encode(pixels).latent_dist.mode())
