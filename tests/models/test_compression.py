"""Tests of videox.models.compression: ratios of published models, and of configurations that contradict themselves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import AutoencoderKLWan

from videox.errors import MODEL, UserError
from videox.models.compression import hunyuan_ratios, wan_ratios
from videox.models.configured import Component
from videox.models.published import dry_run_components, published_models
from videox.shapes import USUAL, Bucket, Ratios, latent_shape

RESIDUAL: Mapping[str, Any] = {
    "base_dim": 4, "z_dim": 8, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "is_residual": True, "in_channels": 12,
    "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16, "latents_mean": [0.0] * 8, "latents_std": [1.0] * 8,
}  # fmt: skip


def components(vae: Mapping[str, Any], **transformer: object) -> dict[str, Component]:
    return {"vae": Component(Path("vae"), dict(vae)), "transformer": Component(Path("transformer"), transformer)}


@pytest.mark.parametrize("family", ["wan2.1", "wan2.2", "hunyuanvideo"])
def test_ratios_of_the_published_models(family: str) -> None:
    ratios = hunyuan_ratios if family == "hunyuanvideo" else wan_ratios
    found = {name: ratios(dry_run_components(name, family)) for name in published_models(family)}
    assert found == {name: Ratios(4, 16, 2) if name == "wan2.2-ti2v-5b" else USUAL for name in found}


@pytest.mark.parametrize(
    "config",
    [
        RESIDUAL,
        {**RESIDUAL, "patch_size": None, "in_channels": 3, "out_channels": 3, "scale_factor_spatial": 8},
        {"base_dim": 3, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
    ],
)
def test_ratios_are_those_of_the_encoders_output(config: Mapping[str, Any]) -> None:
    ratios = wan_ratios(components(config))
    bucket = Bucket(2 * ratios.temporal + 1, 2 * ratios.grid, 3 * ratios.grid)
    with torch.no_grad():
        moments = AutoencoderKLWan(**config).encode(torch.zeros(1, 3, *bucket)).latent_dist.parameters
    assert moments.shape[2:] == latent_shape(bucket, ratios)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scale_factor_spatial": 8}, "scale_factor_spatial is 8, its layers give 16"),
        ({"temperal_downsample": [True, True, True]}, "scale_factor_temporal is 4, its layers give 8"),
    ],
)
def test_a_vae_that_contradicts_itself_is_refused(changed: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        wan_ratios(components({**RESIDUAL, **changed}))
    assert error.value.exit_code == MODEL and message in error.value.what


def test_tokens_of_several_frames_are_refused() -> None:
    with pytest.raises(UserError) as error:
        wan_ratios(components(RESIDUAL, patch_size=[2, 2, 2]))
    assert error.value.where == "transformer/config.json" and "2 x 2 x 2" in error.value.what
    assert wan_ratios(components(RESIDUAL, patch_size=[1, 3, 3])) == Ratios(4, 16, 3)


def test_a_tiny_model_has_the_ratios_of_the_published_one(tmp_path: Path) -> None:
    model, script = tiny.build_wan22_5b(tmp_path / "model"), tiny.load_script("scripts/wan2.2/train.py")
    args = script.parse_args(
        ["--pretrained_model_name_or_path", str(model), "--train_mode", "ti2v", "--train_data_meta", "m.json",
         "--output_dir", str(tmp_path / "out")]
    )  # fmt: skip
    assert wan_ratios(script.check_model(args)) == Ratios(4, 16, 2)
