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
from videox.models.hub import ALLOW_PATTERNS, local_folder, snapshot_folder


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


# ------------------------------------------------------------------------------------------ folders of the Hub's cache


def snapshots(cache: Path, *commits: str, main: str | None = None) -> Path:
    """Make a model's folder of the Hub's cache with these snapshots."""
    model = cache / "models--Wan-AI--Wan2.1-T2V-14B"
    (model / "blobs").mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "snapshots").mkdir()
    for commit in commits:
        (model / "snapshots" / commit).mkdir()
    if main:
        (model / "refs/main").write_text(f"{main}\n")
    return model


@pytest.mark.parametrize("inside", ["", "snapshots", "snapshots/aaaa"])
@pytest.mark.parametrize(("commits", "main"), [(("aaaa",), None), (("aaaa", "bbbb"), "aaaa"), (("aaaa",), "cccc")])
def test_a_models_folder_of_the_cache_means_its_snapshot(
    tmp_path: Path, cache: Path, commits: tuple[str, ...], main: str | None, inside: str
) -> None:
    model = snapshots(tmp_path, *commits, main=main)
    assert local_folder(str(model / inside)) == model / "snapshots/aaaa"


@pytest.mark.parametrize(
    ("commits", "main", "words"),
    [
        (
            (),
            None,
            "without a snapshot. Fix: complete the download with `hf download Wan-AI/Wan2.1-T2V-14B --cache-dir",
        ),
        (("aaaa", "bbbb"), None, "with 2 snapshots"),
        (("aaaa", "bbbb"), "cccc", "none is that of refs/main"),
    ],
)
def test_an_unclear_snapshot_is_an_error(
    tmp_path: Path, cache: Path, commits: tuple[str, ...], main: str | None, words: str
) -> None:
    model = snapshots(tmp_path, *commits, main=main)
    with pytest.raises(UserError) as raised:
        snapshot_folder(model, "--transformer_path")
    assert raised.value.exit_code == MODEL and raised.value.where == "--transformer_path"
    assert words in raised.value.line()
    assert all(str(model / "snapshots" / commit) in raised.value.hint for commit in commits)


@pytest.mark.parametrize("inside", ["hub", ""])
def test_the_whole_cache_is_an_error_that_names_its_models(tmp_path: Path, cache: Path, inside: str) -> None:
    model = snapshots(tmp_path / "hub", "aaaa")
    with pytest.raises(UserError) as raised:
        local_folder(str(tmp_path / inside))
    assert str(model) in raised.value.hint and "cache of the Hub with 1 models" in raised.value.what


def test_an_unfinished_download_of_the_cache_is_named(tmp_path: Path, cache: Path) -> None:
    """A killed download leaves blobs/*.incomplete, and no link in the snapshot."""
    from videox.models.folder import read_component

    model = snapshots(tmp_path, "aaaa", main="aaaa")
    blob = model / "blobs/0123"
    blob.write_text("{}")
    folder = model / "snapshots/aaaa/transformer"
    folder.mkdir()
    (folder / "config.json").symlink_to(blob)
    (model / "blobs/4567.incomplete").write_bytes(b"..")
    with pytest.raises(UserError) as raised:
        read_component(folder, check_weights=True)
    line = raised.value.line()
    assert f"an unfinished download is in {model / 'blobs'}" in line
    assert f"`hf download Wan-AI/Wan2.1-T2V-14B --cache-dir {tmp_path}`" in line
