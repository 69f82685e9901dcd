"""Tests of videox.models.downloads: unfinished downloads are named, with the command for the model in question."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from transformers import UMT5EncoderModel

from videox.errors import MODEL, UserError
from videox.models.component import diffusers_components, find_component, load_component
from videox.models.downloads import download_command, repository_of
from videox.models.meta_init import build_meta_model
from videox.models.shared_memory import stored_dtype
from videox.weights.file_damage import POINTER

STEM = "diffusion_pytorch_model"
NAMES = ("scheduler", "tokenizer", "text_encoder", "vae", "transformer")
CLASSES = {"transformer": WanTransformer3DModel, "text_encoder": UMT5EncoderModel}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_wan_t2v(tmp_path_factory.mktemp("wan"))


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "Wan2.1-T2V-1.3B-Diffusers"))


def check(folder: Path) -> dict[str, object]:
    return diffusers_components(
        folder, ("WanPipeline",), NAMES, {"transformer": ("wan", None), "vae": ("wan_vae", None)}, ("text_encoder",)
    )


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as raised:
        call()
    assert raised.value.exit_code == MODEL and raised.value.hint and "\n" not in raised.value.line()
    return raised.value.line()


def rename(folder: Path, kind: str) -> None:
    """Store a component's weights in other files."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    file.unlink()
    names = sorted(tensors)
    stem = file.stem
    if kind in ("shards", "numbered", "variant shards"):
        for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
            name = {
                "shards": f"{stem}-{number:05d}-of-00002.safetensors",
                "numbered": f"part_{number}.safetensors",
                "variant shards": f"{stem}.fp16-{number:05d}-of-00002.safetensors",
            }[kind]
            save_file({key: tensors[key] for key in part}, folder / name, metadata={"format": "pt"})
        return
    name = {"renamed": "my_finetune", "fp16": f"{stem}.fp16", "other library": "model" if stem == STEM else STEM}[kind]
    save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["renamed", "fp16", "shards", "numbered", "variant shards", "other library"])
def test_weights_under_other_names_load_equally(model: Path, folder: Path, kind: str) -> None:
    for name in CLASSES:
        rename(folder / name, kind)
    components = check(folder)
    for name, model_class in CLASSES.items():
        loaded = load_component(model_class, components[name], torch.float32).state_dict()
        reference = model_class.from_pretrained(model / name).state_dict()
        assert loaded.keys() == reference.keys()
        assert all(torch.equal(loaded[key], reference[key]) for key in reference)
    assert components["transformer"].config == find_component(model / "transformer", "wan").config
    source = components["transformer"].source()  # as ZeRO-3 and FSDP2 read it
    assert all(torch.equal(source[key], value) for key, value in load_file(next((model / "transformer").glob("*.safetensors"))).items())  # fmt: skip
    assert stored_dtype(folder / "text_encoder") == stored_dtype(model / "text_encoder") == torch.float32
    assert build_meta_model(
        WanTransformer3DModel, source, components["transformer"].inferred_config()
    ).config.num_layers


def test_a_variant_beside_the_weights_is_not_read(folder: Path) -> None:
    file = folder / "transformer" / f"{STEM}.safetensors"
    save_file({"stray": torch.ones(2)}, file.with_name(f"{STEM}.fp16.safetensors"))
    component = check(folder)["transformer"]
    loaded = load_component(WanTransformer3DModel, component, torch.float32).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in load_file(file).items())


# ------------------------------------------------------------------------------------------------- unfinished files

COMMAND = "hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers --local-dir {}"


@pytest.mark.parametrize("name", ["text_encoder", "vae", "transformer"])
def test_a_truncated_file_has_its_size_and_the_command(folder: Path, name: str) -> None:
    (file,) = (folder / name).glob("*.safetensors")
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[: size // 2])
    line = refusal(lambda: check(folder))
    assert str(file) in line and "kB of " in line and COMMAND.format(folder) in line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (POINTER + b"v1\noid sha256:" + b"0" * 64 + b"\nsize 2838276168\n", "is a git-lfs pointer, not the file itself (2.84 GB)"),
        (b"<!DOCTYPE html><html>" + b"x" * 400, "is a web page"),
        (b"\0" * 5000, "begin with zeros"),
        (b"", "is truncated or damaged"),
    ],
)  # fmt: skip
def test_what_a_file_is_instead_is_named(folder: Path, content: bytes, words: str) -> None:
    (file,) = (folder / "transformer").glob("*.safetensors")
    file.write_bytes(content)
    line = refusal(lambda: check(folder))
    assert str(file) in line and words in line and COMMAND.format(folder) in line
    assert ("git lfs pull" in line) == ("git-lfs" in words)
    assert words in refusal(lambda: find_component(file, "wan"))


@pytest.mark.parametrize("name", ["tokenizer/tokenizer.json", "text_encoder/model.safetensors", "scheduler/scheduler_config.json"])  # fmt: skip
def test_any_pointer_of_a_component_is_found(folder: Path, name: str) -> None:
    assert (folder / name).exists()
    (folder / name).write_bytes(POINTER + b"v1\noid sha256:00\nsize 4548\n")
    assert f"{folder / name}: is a git-lfs pointer, not the file itself (4.55 kB)" in refusal(lambda: check(folder))


@pytest.mark.parametrize("suffix", [".aria2", ".incomplete", ".part", ".crdownload"])
def test_the_mark_of_a_running_download_is_seen(folder: Path, suffix: str) -> None:
    (file,) = (folder / "vae").glob("*.safetensors")
    file.with_name(f"{file.name}{suffix}").write_bytes(b"..")
    line = refusal(lambda: check(folder))
    assert f"{file}: is unfinished: {file.name}{suffix} is next to it" in line and COMMAND.format(folder) in line


@pytest.mark.parametrize("name", ["model_index.json", "transformer/config.json", f"vae/{STEM}.safetensors"])
def test_a_link_to_nothing_is_named(folder: Path, name: str) -> None:
    """A snapshot of the Hub's cache that was copied without its blobs, or a blob that was deleted."""
    (folder / name).unlink()
    (folder / name).symlink_to("../../blobs/0123")
    line = refusal(lambda: check(folder))
    assert f"{folder / name}: is a link to ../../blobs/0123, which does not exist" in line and "cp -rL" in line
    assert COMMAND.format(folder) in line


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("place", [".cache/huggingface/download/transformer", "transformer"])
def test_a_missing_shard_is_named_with_its_unfinished_download(folder: Path, index: bool, place: str) -> None:
    model = WanTransformer3DModel.from_pretrained(folder / "transformer")
    shutil.rmtree(folder / "transformer")
    model.save_pretrained(folder / "transformer", max_shard_size="40KB")
    shards = sorted((folder / "transformer").glob("*.safetensors"))
    shards[1].unlink()
    if not index:
        (folder / "transformer" / f"{STEM}.safetensors.index.json").unlink()
    (folder / place).mkdir(parents=True, exist_ok=True)
    (folder / place / "q1w2.0123.incomplete").write_bytes(b"..")
    line = refusal(lambda: check(folder))
    assert shards[1].name in line and "is missing" in line and COMMAND.format(folder) in line
    assert f"an unfinished download is in {folder / place}" in line


def test_weights_that_never_came_are_named(folder: Path) -> None:
    for file in (folder / "transformer").glob("*.safetensors"):
        file.unlink()
    line = refusal(lambda: check(folder))
    assert "contains no .safetensors weights (found: config.json)" in line and COMMAND.format(folder) in line
    shutil.rmtree(folder / "transformer")
    assert COMMAND.format(folder) in refusal(lambda: check(folder))


def test_a_folder_without_model_index_has_the_command(folder: Path) -> None:
    (folder / "model_index.json").unlink()
    assert COMMAND.format(folder) in refusal(lambda: check(folder))


def test_folders_beside_the_model_have_a_way_out(folder: Path, tmp_path: Path) -> None:
    assert f"is one component of a model (found: config.json, {STEM}.safetensors). Fix: pass {folder}." in refusal(
        lambda: check(folder / "transformer")
    )
    assert f"pass {folder}." in refusal(lambda: check(tmp_path))
    shutil.copytree(folder / "transformer", tmp_path / "outputs/transformer")
    assert f"--transformer_path={tmp_path / 'outputs/transformer'}" in refusal(lambda: check(tmp_path / "outputs"))


def test_a_whole_model_as_transformer_path_means_its_transformer(model: Path, folder: Path) -> None:
    for path in (folder, folder / "transformer"):
        overrides = {"transformer": ("wan", str(path)), "vae": ("wan_vae", str(folder))}
        found = diffusers_components(model, ("WanPipeline",), NAMES, overrides, ())
        assert found["transformer"].path == folder / "transformer" and found["vae"].path.name == "vae"


@pytest.mark.parametrize("name", ["Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"])
def test_a_truncated_pickle_has_the_command(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "Wan2.1-T2V-14B"
    folder.mkdir()
    torch.save({"a": torch.ones(1000)}, folder / name)
    (folder / name).write_bytes((folder / name).read_bytes()[:2000])
    line = refusal(lambda: find_component(folder / name, "wan_vae"))
    assert "or is truncated" in line and f"hf download Wan-AI/Wan2.1-T2V-14B --local-dir {folder}" in line


def test_a_folder_that_does_not_exist_has_the_command_by_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "models/Wan2.1-T2V-14B"
    assert f"download it with `hf download Wan-AI/Wan2.1-T2V-14B --local-dir {folder}`" in refusal(
        lambda: check(folder)
    )
    assert "hf download" not in refusal(lambda: check(tmp_path / "other"))


def test_the_original_layout_of_hunyuanvideo_is_named(tmp_path: Path) -> None:
    (tmp_path / "HunyuanVideo/hunyuan-video-t2v-720p").mkdir(parents=True)
    line = refusal(lambda: check(tmp_path / "HunyuanVideo"))
    assert "HunyuanVideo in the original layout" in line
    assert f"hf download hunyuanvideo-community/HunyuanVideo --local-dir {tmp_path / 'HunyuanVideo'}-diffusers" in line


# ---------------------------------------------------------------------------------------------- the model in question


@pytest.mark.parametrize(
    ("name", "files", "expected"),
    [
        ("Wan2.1-T2V-14B", {}, "Wan-AI/Wan2.1-T2V-14B"),
        ("Wan2.1-T2V-14B", {"model_index.json": "{}"}, "Wan-AI/Wan2.1-T2V-14B-Diffusers"),
        ("Wan2.1-I2V-14B-720P-Diffusers", {}, "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers"),
        ("Wan2___1-T2V-1.3B", {}, "Wan-AI/Wan2.1-T2V-1.3B"),
        ("HunyuanVideo", {}, "hunyuanvideo-community/HunyuanVideo"),
        ("hunyuanvideo-i2v-33ch", {}, "hunyuanvideo-community/HunyuanVideo-I2V-33ch"),
        ("models--Wan-AI--Wan2.1-T2V-14B", {}, "Wan-AI/Wan2.1-T2V-14B"),
        ("models--some-team--my-wan_v2.1", {}, "some-team/my-wan_v2.1"),
        ("mine", {".git/config": '[remote "origin"]\n\turl = https://huggingface.co/Wan-AI/Wan2.1-I2V-14B-480P\n'},
         "Wan-AI/Wan2.1-I2V-14B-480P"),
        ("mine", {".git/config": '[remote "origin"]\n\turl = git@hf.co:team/wan.git\n\tfetch = +refs\n'}, "team/wan"),
        ("mine", {".git/config": '[remote "origin"]\n\turl = https://example.com/a/b\n'}, None),
        ("mine", {".git/config": "\0 no configuration"}, None),
        ("mine", {"config.json": {"_class_name": "WanModel", "dim": 5120, "in_dim": 16}}, "Wan-AI/Wan2.1-T2V-14B"),
        ("mine", {"config.json": {"_class_name": "WanModel", "dim": 5120, "in_dim": 36}}, "Wan-AI/Wan2.1-I2V-14B-480P"),
        ("mine", {"model_index.json": "{}", "transformer/config.json": {
            "_class_name": "WanTransformer3DModel", "num_attention_heads": 12, "attention_head_dim": 128,
            "in_channels": 16}}, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
        ("mine", {"transformer/config.json": {"_class_name": "HunyuanVideoTransformer3DModel"}},
         "hunyuanvideo-community/HunyuanVideo"),
        ("mine", {"transformer/config.json": {"_class_name": "HunyuanVideoTransformer3DModel",
         "image_condition_type": "token_replace"}}, "hunyuanvideo-community/HunyuanVideo-I2V"),
        ("mine", {"model_index.json": {"boundary_ratio": 0.9}, "transformer/config.json": {
            "_class_name": "WanTransformer3DModel", "num_attention_heads": 40, "attention_head_dim": 128,
            "in_channels": 36}}, "Wan-AI/Wan2.2-I2V-A14B-Diffusers"),
        ("mine", {"low_noise_model/config.json": {"_class_name": "WanModel", "dim": 5120, "in_dim": 16}},
         "Wan-AI/Wan2.2-T2V-A14B"),
        ("mine", {"config.json": {"_class_name": "WanModel", "dim": [5120], "in_dim": {}}}, None),
        ("mine", {"config.json": [1]}, None),
        ("mine", {}, None),
    ],
)  # fmt: skip
def test_the_model_in_question(tmp_path: Path, name: str, files: dict, expected: str | None) -> None:
    root = tmp_path / name
    root.mkdir()
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content if isinstance(content, str) else json.dumps(content))
    assert repository_of(root) == expected
    if name.startswith("models--"):
        snapshot = root / "snapshots/0123"
        snapshot.mkdir(parents=True)
        assert download_command(snapshot) == f"hf download {expected} --cache-dir {tmp_path}"
    else:
        assert download_command(root) == f"hf download {expected or 'ORGANIZATION/MODEL'} --local-dir {root}"


def test_the_folder_of_an_expert_belongs_to_its_model(tmp_path: Path) -> None:
    root = tmp_path / "Wan2.2-T2V-A14B"
    (root / "high_noise_model").mkdir(parents=True)
    expected = f"hf download Wan-AI/Wan2.2-T2V-A14B --local-dir {root}"
    assert download_command(root / "high_noise_model") == download_command(root) == expected


def test_the_default_cache_needs_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--a--b/snapshots/0").mkdir(parents=True)
    assert download_command(tmp_path / "models--a--b/snapshots/0") == "hf download a/b"
