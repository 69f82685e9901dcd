"""Serves videox/hub.py: a model by its id comes from what was fetched, or one line says why it does not."""

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
    """Returns an empty cache of the hub, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    local_folder.cache_clear()
    yield tmp_path / "hub"
    local_folder.cache_clear()


def test_a_folder_is_itself(tmp_path: Path, cache: Path) -> None:
    assert local_folder(str(tmp_path)) == tmp_path
    assert local_folder("models/Diffusion_Transformer/none") == Path("models/Diffusion_Transformer/none")
    assert not cache.exists()


def test_what_was_fetched_is_used_offline(tmp_path: Path, cache: Path) -> None:
    commit = "0123456789012345678901234567890123456789"
    kept = cache / "models--maker--tiny-wan"
    shutil.copytree(tiny.build_wan_t2v(tmp_path / "model"), kept / "snapshots" / commit)
    (kept / "refs").mkdir()
    (kept / "refs/main").write_text(commit)
    assert local_folder("maker/tiny-wan") == kept / "snapshots" / commit
    metadata = tiny.make_dataset(tmp_path / "data")
    trainer = runs.train_script()
    words = runs.wan_flags(Path("maker/tiny-wan"), metadata, tmp_path / "out")
    parts = trainer.check_model(trainer.parse_args(words))
    assert parts["transformer"].path == kept / "snapshots" / commit / "transformer"


@pytest.mark.parametrize("name", ["maker/unknown", "Wan-AI/Wan2.1-T2V-14B"])
def test_what_cannot_be_had_is_one_line(cache: Path, name: str) -> None:
    with pytest.raises(UserError) as refused:
        local_folder(name)
    assert refused.value.exit_code == MODEL and refused.value.where == "--pretrained_model_name_or_path"
    line = refused.value.line()
    assert name in line and "not a folder here" in line and "\n" not in line


def test_pictures_papers_and_pickles_are_not_fetched() -> None:
    from huggingface_hub.utils import filter_repo_objects

    wanted = [
        "model_index.json", "transformer/config.json", "vae/diffusion_pytorch_model.safetensors", "config.json",
        "transformer/diffusion_pytorch_model-00001-of-00006.safetensors", "Wan2.1_VAE.pth", "tokenizer/spiece.model",
        "google/umt5-xxl/tokenizer.json", "models_t5_umt5-xxl-enc-bf16.pth", "tokenizer_2/merges.txt",
        "diffusion_pytorch_model.safetensors.index.json", "image_processor/preprocessor_config.json",
    ]  # fmt: skip
    other = ["README.md", "assets/logo.png", "examples/i2v_input.JPG", "text_encoder/pytorch_model.bin", "LICENSE.txt"]
    assert list(filter_repo_objects([*wanted, *other], allow_patterns=ALLOW_PATTERNS)) == wanted
