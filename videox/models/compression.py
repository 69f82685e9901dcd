"""A model's ratios of compression, from the configurations of its VAE and its transformer. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from videox.errors import MODEL, UserError
from videox.models.configured import Component
from videox.shapes import USUAL, Ratios

DOWNSAMPLE = (False, True, True)  # of Wan's VAE, where its configuration has no temperal_downsample


def wan_ratios(components: Mapping[str, Component]) -> Ratios:
    """Return the ratios of a Wan model: from the layers of its VAE, and the transformer's patches.

    Raises:
        UserError: (MODEL) scale_factor_spatial or scale_factor_temporal, which diffusers' pipelines use, differ from
            the layers, or tokens are not of one latent frame and as high as wide.
    """
    vae, transformer = components["vae"], components["transformer"]
    stages = vae.config.get("temperal_downsample", DOWNSAMPLE)
    spatial = 2 ** len(stages) * (vae.config.get("patch_size") or 1)
    found = {"scale_factor_spatial": spatial, "scale_factor_temporal": 2 ** sum(map(bool, stages))}
    for key, usual in (("scale_factor_spatial", USUAL.spatial), ("scale_factor_temporal", USUAL.temporal)):
        if (stated := vae.config.get(key, usual)) != found[key]:
            what = f"{key} is {stated}, its layers give {found[key]}"
            raise UserError(_file(vae), what, f"set {key} to {found[key]}, or download the model again", MODEL)
    patch = _whole_patch(transformer.config.get("patch_size", (1, USUAL.patch, USUAL.patch)), transformer)
    return Ratios(found["scale_factor_temporal"], spatial, patch)


def hunyuan_ratios(components: Mapping[str, Component]) -> Ratios:
    """Return the ratios of a HunyuanVideo model, as its configurations state them. Raises UserError (MODEL)."""
    vae, transformer = components["vae"], components["transformer"]
    side = transformer.config.get("patch_size", USUAL.patch)
    patch = _whole_patch((transformer.config.get("patch_size_t", 1), side, side), transformer)
    spatial = vae.config.get("spatial_compression_ratio", USUAL.spatial)
    return Ratios(vae.config.get("temporal_compression_ratio", USUAL.temporal), spatial, patch)


def _whole_patch(patch: Any, transformer: Component) -> int:  # noqa: ANN401 - of a configuration
    frames, height, width = patch
    if frames != 1 or height != width:
        what = f"patches of {frames} x {height} x {width} latents make a token, expected 1 x n x n"
        raise UserError(_file(transformer), what, "use a model whose tokens are squares of one latent frame", MODEL)
    return int(height)


def _file(component: Component) -> str:
    return str(component.path if component.path.suffix else component.path / "config.json")
