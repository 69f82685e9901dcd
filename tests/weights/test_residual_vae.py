"""Tests of the original layout of Wan2.2 TI2V-5B's VAE: names, and the configuration that its shapes show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan
from hypothesis import given, settings
from hypothesis import strategies as st

from videox.models.infer_config import CONFIGS
from videox.weights import layouts

ROOT = Path(__file__).resolve().parents[2]
# Names of the published file, as the converter of diffusers' repository reads them.
PUBLISHED = {
    "encoder.conv1.weight": "encoder.conv_in.weight",
    "encoder.downsamples.0.downsamples.0.residual.0.gamma": "encoder.down_blocks.0.resnets.0.norm1.gamma",
    "encoder.downsamples.1.downsamples.0.shortcut.weight": "encoder.down_blocks.1.resnets.0.conv_shortcut.weight",
    "encoder.downsamples.1.downsamples.1.residual.6.bias": "encoder.down_blocks.1.resnets.1.conv2.bias",
    "encoder.downsamples.0.downsamples.2.resample.1.weight": "encoder.down_blocks.0.downsampler.resample.1.weight",
    "encoder.downsamples.2.downsamples.2.time_conv.bias": "encoder.down_blocks.2.downsampler.time_conv.bias",
    "encoder.middle.1.to_qkv.weight": "encoder.mid_block.attentions.0.to_qkv.weight",
    "decoder.upsamples.0.upsamples.2.residual.3.gamma": "decoder.up_blocks.0.resnets.2.norm2.gamma",
    "decoder.upsamples.0.upsamples.3.resample.1.bias": "decoder.up_blocks.0.upsampler.resample.1.bias",
    "decoder.upsamples.1.upsamples.3.time_conv.weight": "decoder.up_blocks.1.upsampler.time_conv.weight",
    "decoder.head.2.weight": "decoder.conv_out.weight",
    "conv2.bias": "post_quant_conv.bias",
}


def shapes_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    with init_empty_weights():
        return {name: tuple(tensor.shape) for name, tensor in AutoencoderKLWan(**config).state_dict().items()}


def back_and_forth(shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """Return the diffusers name of each original one, and the shapes after both conversions."""
    original = layouts.to_original("wan_vae", shapes)
    assert len({entry.name for entry in original}) == len(shapes) and not {entry.name for entry in original} & {
        name for name in shapes if "block" in name
    }
    entries = layouts.to_diffusers("wan_vae", {entry.name: entry.shape for entry in original})
    return {entry.pieces[0].name: entry.name for entry in entries}, {entry.name: entry.shape for entry in entries}


def test_the_published_vae_has_its_names_and_configuration() -> None:
    published = json.loads((ROOT / "config/models/wan2.2-ti2v-5b.json").read_text(encoding="utf-8"))
    config = published["components"]["vae"]
    shapes = shapes_of(config)
    names, again = back_and_forth(shapes)
    assert again == shapes and layouts.layout_of(names) == "wan_vae"
    assert {name: names.get(name) for name in PUBLISHED} == PUBLISHED
    known = {name: config[name] for name in ("latents_mean", "latents_std")}
    found = CONFIGS["wan_vae"](shapes, known)
    assert found == {name: value for name, value in config.items() if name != "attn_scales"}


@settings(max_examples=12)
@given(
    blocks=st.integers(1, 3),
    resnets=st.integers(1, 3),
    patch=st.sampled_from([None, 2]),
    decoder=st.sampled_from([2, 6]),
)
def test_a_vae_of_any_depth_round_trips(blocks: int, resnets: int, patch: int | None, decoder: int) -> None:
    channels = 3 * (patch or 1) ** 2
    config = {
        "base_dim": 2, "decoder_base_dim": decoder, "z_dim": 3, "dim_mult": [1, 2, 2, 2][: blocks + 1] if blocks > 1 else [1, 1],
        "num_res_blocks": resnets, "temperal_downsample": [False, True, True][:blocks], "is_residual": True,
        "in_channels": channels, "out_channels": channels, "patch_size": patch,
    }  # fmt: skip
    shapes = shapes_of(config)
    assert back_and_forth(shapes)[1] == shapes
    found = CONFIGS["wan_vae"](shapes, {})
    assert {name: found[name] for name in config} == config
    assert found["scale_factor_spatial"] == 2**blocks * (patch or 1)
    assert found["scale_factor_temporal"] == 2 ** sum(config["temperal_downsample"])


def test_the_yaml_has_the_published_statistics() -> None:
    content = yaml.safe_load((ROOT / "config/wan2.2/wan_civitai_ti2v.yaml").read_text(encoding="utf-8"))
    published = json.loads((ROOT / "config/models/wan2.2-ti2v-5b.json").read_text(encoding="utf-8"))
    for name in ("latents_mean", "latents_std"):
        assert content["vae_kwargs"][name] == published["components"]["vae"][name]
        assert len(content["vae_kwargs"][name]) == 48
