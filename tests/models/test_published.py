"""Tests of videox.models.published: configurations of published models for dry runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel
from networks import CONFIGS

from videox.errors import UserError
from videox.models.folder import build_on_meta
from videox.models.published import dry_run_components, published_models

PARAMETERS = {
    "wan2.1-t2v-1.3b": 1_418_996_800, "wan2.1-t2v-14b": 14_288_491_584, "wan2.1-i2v-14b": 16_394_878_784,
    "wan2.1-flf2v-14b": 16_395_536_704, "wan2.1-fun-1.3b-inp": 1_564_428_608,
    "wan2.2-t2v-a14b": 14_288_491_584, "wan2.2-i2v-a14b": 14_288_901_184, "wan2.2-ti2v-5b": 4_999_787_712,
    "hunyuanvideo-t2v": 12_821_012_544,
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_published_configuration_builds_the_published_model(name: str) -> None:
    components = dry_run_components(name, name.split("-")[0])
    kind = WanTransformer3DModel if name.startswith("wan") else HunyuanVideoTransformer3DModel
    transformer = build_on_meta(kind, components["transformer"].config)
    assert sum(p.numel() for p in transformer.parameters()) == PARAMETERS[name]


def test_the_files_of_wan_fun_have_the_size_of_its_parameters() -> None:
    """The published files of the transformer are in bfloat16, two bytes per parameter: 3.13 and 32.8 GB."""
    names = ("wan2.1-fun-1.3b-inp", "wan2.1-i2v-14b")
    assert [round(2 * PARAMETERS[name] / 1e9, 2) for name in names] == [3.13, 32.79]
    fun, i2v = (dry_run_components(name, "wan2.1") for name in ("wan2.1-fun-14b-inp", "wan2.1-i2v-14b"))
    assert fun["transformer"].config == i2v["transformer"].config and "scheduler" not in fun


def test_every_family_has_models() -> None:
    assert published_models("wan2.1") == [
        "wan2.1-flf2v-14b", "wan2.1-fun-1.3b-inp", "wan2.1-fun-14b-inp", "wan2.1-i2v-14b", "wan2.1-t2v-1.3b",
        "wan2.1-t2v-14b",
    ]  # fmt: skip
    assert published_models("wan2.2") == ["wan2.2-i2v-a14b", "wan2.2-t2v-a14b", "wan2.2-ti2v-5b"]
    assert published_models("hunyuanvideo") == ["hunyuanvideo-i2v", "hunyuanvideo-t2v"]


def test_a_folder_with_one_config_is_completed_by_the_most_similar_model(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    own = {**CONFIGS["Wan2.1-T2V-1.3B"], "num_layers": 7}
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(own))
    components = dry_run_components(str(tmp_path), "wan2.1")
    assert components["transformer"].config == own
    assert components["text_encoder"].config["d_model"] == 4096 and "image_encoder" not in components
    image = {**CONFIGS["Wan2.1-I2V-14B"], "num_layers": 7}
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(image))
    assert "image_encoder" in dry_run_components(str(tmp_path), "wan2.1")


def test_unknown_names_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"did you mean wan2\.1-t2v-14b"):
        dry_run_components("wan2.1-t2v-14", "wan2.1")
    with pytest.raises(UserError, match="has no configuration of a transformer"):
        dry_run_components(str(tmp_path), "wan2.1")
