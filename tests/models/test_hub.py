"""Tests of videox.models.hub: a model id resolves to the downloaded snapshot, or to an error of one line."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import runs
import tiny

from videox.errors import MODEL, UserError
from videox.models.hub import ALLOW_PATTERNS, local_folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield an empty Hub cache, without network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    local_folder.cache_clear()
    yield tmp_path / "hub"
    local_folder.cache_clear()


def test_local_path_is_returned_unchanged(tmp_path: Path, cache: Path) -> None:
    assert local_folder(str(tmp_path)) == tmp_path
    assert local_folder("models/Diffusion_Transformer/none") == Path("models/Diffusion_Transformer/none")
    assert not cache.exists()


def test_cached_snapshot_is_used_offline(tmp_path: Path, cache: Path) -> None:
    commit = "0123456789012345678901234567890123456789"
    cached = cache / "models--maker--tiny-wan"
    shutil.copytree(tiny.build_wan_t2v(tmp_path / "model"), cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text(commit)
    assert local_folder("maker/tiny-wan") == cached / "snapshots" / commit
    metadata = tiny.make_dataset(tmp_path / "data")
    trainer = runs.train_script()
    flags = runs.wan_flags(Path("maker/tiny-wan"), metadata, tmp_path / "out")
    components = trainer.check_model(trainer.parse_args(flags))
    assert components["transformer"].path == cached / "snapshots" / commit / "transformer"


@pytest.mark.parametrize("name", ["maker/unknown", "Wan-AI/Wan2.1-T2V-14B"])
def test_unavailable_model_is_a_one_line_error(cache: Path, name: str) -> None:
    with pytest.raises(UserError) as raised:
        local_folder(name)
    assert raised.value.exit_code == MODEL and raised.value.where == "--pretrained_model_name_or_path"
    line = raised.value.line()
    assert name in line and "not a local folder" in line and "\n" not in line


def test_images_documents_and_pickles_are_not_downloaded() -> None:
    from huggingface_hub.utils import filter_repo_objects

    needed = [
        "model_index.json", "transformer/config.json", "vae/diffusion_pytorch_model.safetensors", "config.json",
        "transformer/diffusion_pytorch_model-00001-of-00006.safetensors", "Wan2.1_VAE.pth", "tokenizer/spiece.model",
        "google/umt5-xxl/tokenizer.json", "models_t5_umt5-xxl-enc-bf16.pth", "tokenizer_2/merges.txt",
        "diffusion_pytorch_model.safetensors.index.json", "image_processor/preprocessor_config.json",
    ]  # fmt: skip
    other = ["README.md", "assets/logo.png", "examples/i2v_input.JPG", "text_encoder/pytorch_model.bin", "LICENSE.txt"]
    assert list(filter_repo_objects([*needed, *other], allow_patterns=ALLOW_PATTERNS)) == needed
