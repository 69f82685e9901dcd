"""Tests of videox.models.folder: every error in a model folder is one line with exit code 4, not a traceback."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from transformers import UMT5EncoderModel

from videox.errors import FLAGS, MODEL, UserError
from videox.models.config_files import read_shift
from videox.models.folder import check_finite, load_strictly, read_component, read_model_folder

ROOT = Path(__file__).resolve().parents[2]
COMPONENTS = ("scheduler", "tokenizer", "text_encoder", "vae", "transformer")
WEIGHTED = ("text_encoder", "vae", "transformer")
CLASSES = {
    "transformer": (WanTransformer3DModel, {"torch_dtype": torch.float32}),
    "vae": (AutoencoderKLWan, {"torch_dtype": torch.float32}),
    "text_encoder": (UMT5EncoderModel, {"dtype": torch.float32}),
}
SHARD_INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_wan_t2v(tmp_path_factory.mktemp("wan"))


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """Return a copy of a complete model, to be damaged."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def read(folder: Path) -> dict[str, dict]:
    return read_model_folder(str(folder), ("WanPipeline",), COMPONENTS, WEIGHTED)


def load(folder: Path, name: str) -> torch.nn.Module:
    model_class, settings = CLASSES[name]
    model = load_strictly(model_class, folder / name, **settings)
    check_finite(model, folder / name)
    return model


def check_error(call: Callable[[], object], *fragments: object) -> UserError:
    """Check for exit code 4 and one line that contains all fragments and a hint; return the error."""
    with pytest.raises(UserError) as raised:
        call()
    line = raised.value.line()
    assert raised.value.exit_code == MODEL
    assert raised.value.hint
    assert "\n" not in line
    assert all(str(word) in line for word in fragments), line
    return raised.value


def weights_of(folder: Path, name: str) -> Path:
    (path,) = (folder / name).glob("*.safetensors")
    return path


def change_weights(folder: Path, name: str, change: Callable[[dict[str, torch.Tensor], str], object]) -> str:
    """Write a component's weights again after change(tensors, key of one of them); return the key."""
    path = weights_of(folder, name)
    tensors = load_file(path)
    key = sorted(tensors)[len(tensors) // 2]
    change(tensors, key)
    save_file(tensors, path, metadata={"format": "pt"})
    return key


def change_config(folder: Path, name: str, **values: object) -> None:
    path = folder / name / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def shard(folder: Path) -> list[str]:
    """Split the transformer's weights into shards with an index; return their names."""
    model = load(folder, "transformer")
    shutil.rmtree(folder / "transformer")
    model.save_pretrained(folder / "transformer", max_shard_size="40KB")
    names = sorted(path.name for path in (folder / "transformer").glob("*.safetensors"))
    assert len(names) > 2
    return names


# ------------------------------------------------------------------------------------------------- a complete model


def test_a_complete_model_passes(model_folder: Path) -> None:
    configs = read(model_folder)
    assert configs[""]["_class_name"] == "WanPipeline"
    assert set(configs) == {"", *COMPONENTS}
    assert configs["transformer"]["in_channels"] == 16
    for name, (model_class, _) in CLASSES.items():
        model = load(model_folder, name)
        assert isinstance(model, model_class)
        stored = load_file(weights_of(model_folder, name))
        loaded = model.state_dict()
        assert all(torch.equal(tensor, loaded[key]) for key, tensor in stored.items())


def test_a_sharded_model_passes(folder: Path) -> None:
    unsharded = load(folder, "transformer").state_dict()
    shard(folder)
    read(folder)
    again = load(folder, "transformer").state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in unsharded.items())


def test_checking_a_folder_loads_no_weight(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(torch, "empty", refuse)
    monkeypatch.setattr(torch, "frombuffer", refuse)
    monkeypatch.setattr(torch.nn.Module, "__init__", refuse)
    assert set(read(model_folder)) == {"", *COMPONENTS}


# ------------------------------------------------------------------------------------------------- the folder


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    raised = check_error(lambda: read(tmp_path / "nothing"), tmp_path / "nothing", "not a local folder")
    assert raised.where == "--pretrained_model_name_or_path"


def test_a_file_instead_of_a_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check_error(lambda: read(tmp_path / "file"), "not a local folder")


def test_a_folder_without_model_index_is_an_error(folder: Path, tmp_path: Path) -> None:
    (folder / "model_index.json").unlink()
    check_error(lambda: read(folder), "without model_index.json", "transformer, vae")
    (tmp_path / "empty").mkdir()
    check_error(lambda: read(tmp_path / "empty"), "without model_index.json", "found: nothing")


@pytest.mark.parametrize("mark", ["Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"])
def test_the_original_layout_is_recognized_by_its_files(tmp_path: Path, mark: str) -> None:
    for name in (mark, "config.json", "diffusion_pytorch_model.safetensors"):
        (tmp_path / name).write_text("{}")
    check_error(lambda: read(tmp_path), "original layout", mark, "diffusers layout")


def test_the_hint_names_the_accepted_layouts(tmp_path: Path) -> None:
    check_error(
        lambda: read(tmp_path), "found: nothing", "WanPipeline model in diffusers layout, or Wan2.1 in the original"
    )
    (tmp_path / "Wan2.1_VAE.pth").write_text("")
    raised = check_error(
        lambda: read_model_folder(str(tmp_path), ("HunyuanVideoPipeline",), (), ()), "is Wan2.1 in the original layout"
    )
    assert raised.hint == "pass a HunyuanVideoPipeline model in diffusers layout"


def test_a_long_list_of_names_is_shortened(tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / f"name-{number:02}").write_text("")
    raised = check_error(
        lambda: read_component(tmp_path / "vae", check_weights=True), "does not exist", "name-07 and 42 more"
    )
    assert "name-08" not in raised.what
    raised = check_error(
        lambda: read_component(tmp_path, check_weights=True), "has no config.json", "name-07 and 42 more"
    )
    assert "name-08" not in raised.what


@pytest.mark.parametrize("name", ["HunyuanVideoPipeline", None])
def test_another_pipeline_class_is_named(folder: Path, name: str | None) -> None:
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name}))
    check_error(lambda: read(folder), f"is a {name} model", "WanPipeline")


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_missing_component_is_named(folder: Path, name: str) -> None:
    shutil.rmtree(folder / name)
    check_error(lambda: read(folder), folder / name, "complete the model folder", "model_index.json")


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_component_without_configuration_is_an_error(folder: Path, name: str) -> None:
    for path in (folder / name).glob("*config.json"):
        path.unlink()
    check_error(lambda: read(folder), folder / name, "config.json")


def test_a_missing_component_in_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    check_error(
        lambda: read_component(tmp_path / "none" / "transformer", check_weights=True), "none/transformer", "nothing"
    )


BAD_JSON = {
    "cut": b'{"a": 1',
    "empty": b"",
    "a list": b"[1]",
    "null": b"null",
    "not text": b"\xff\xfe",
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("content", BAD_JSON.values(), ids=BAD_JSON)
@pytest.mark.parametrize(
    "name", ["model_index.json", "transformer/config.json", "scheduler/scheduler_config.json", f"vae/{SHARD_INDEX}"]
)
def test_bad_json_is_an_error(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    check_error(lambda: read(folder), folder / name, "JSON")


# ------------------------------------------------------------------------------------------------- weight files


def test_a_missing_shard_is_named_with_its_tensor_count(folder: Path) -> None:
    names = shard(folder)
    weight_map = json.loads((folder / "transformer" / SHARD_INDEX).read_text())["weight_map"]
    (folder / "transformer" / names[1]).unlink()
    count = list(weight_map.values()).count(names[1])
    check_error(lambda: read(folder), folder / "transformer" / names[1], f"is missing, with {count} tensors")


@pytest.mark.parametrize("weight_map", [None, [], "text", {"a": 3}, {"a": ["b"]}, {"a": None}])
def test_an_index_without_a_weight_map_is_an_error(folder: Path, weight_map: object) -> None:
    (folder / "transformer" / SHARD_INDEX).write_text(json.dumps({"weight_map": weight_map}))
    check_error(lambda: read(folder), SHARD_INDEX, "weight_map")


@pytest.mark.parametrize("name", WEIGHTED)
@pytest.mark.parametrize("length", [0, 4, 8, 100, -1000, -1])
def test_truncated_weights_are_an_error(folder: Path, name: str, length: int) -> None:
    path = weights_of(folder, name)
    path.write_bytes(path.read_bytes()[:length])
    check_error(lambda: read(folder), path, "truncated or damaged")


@pytest.mark.parametrize("name", WEIGHTED)
def test_weights_that_are_missing_or_not_safetensors_are_an_error(folder: Path, name: str) -> None:
    path = weights_of(folder, name)
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    check_error(lambda: read(folder), folder / name, "safetensors")


def test_a_component_without_weights_passes_if_none_are_required(folder: Path) -> None:
    weights_of(folder, "transformer").unlink()
    with_weights = tuple(name for name in WEIGHTED if name != "transformer")
    assert "transformer" in read_model_folder(str(folder), ("WanPipeline",), COMPONENTS, with_weights)


# ----------------------------------------------------------------------------------------------------------- tensors


@pytest.mark.parametrize("name", WEIGHTED)
def test_a_missing_tensor_is_an_error(folder: Path, name: str) -> None:
    key = change_weights(folder, name, lambda tensors, key: tensors.pop(key))
    check_error(lambda: load(folder, name), folder / name, "1 missing key for", key)


@pytest.mark.parametrize("name", WEIGHTED)
def test_an_unexpected_tensor_is_an_error(folder: Path, name: str) -> None:
    change_weights(folder, name, lambda tensors, _: tensors.update({"stray.weight": torch.ones(2)}))
    check_error(lambda: load(folder, name), folder / name, "1 unexpected key for", "stray.weight")


@pytest.mark.parametrize("name", WEIGHTED)
def test_a_tensor_of_another_shape_is_an_error(folder: Path, name: str) -> None:
    change_weights(folder, name, lambda tensors, key: tensors.update({key: torch.ones(2, 7)}))
    check_error(lambda: load(folder, name), folder / name, CLASSES[name][0].__name__)


@pytest.mark.parametrize("name", WEIGHTED)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_value_that_is_not_finite_is_an_error(folder: Path, name: str, value: str) -> None:
    key = change_weights(folder, name, lambda tensors, key: tensors[key].view(-1)[-1:].fill_(float(value)))
    check_error(lambda: load(folder, name), folder / name, key, "not finite")


def test_tensors_missing_in_the_index_are_an_error(folder: Path) -> None:
    names = shard(folder)
    index = folder / "transformer" / SHARD_INDEX
    content = json.loads(index.read_text())
    content["weight_map"] = {key: name for key, name in content["weight_map"].items() if name != names[0]}
    index.write_text(json.dumps(content))
    read(folder)  # every file is complete ...
    check_error(lambda: load(folder, "transformer"), "missing keys")  # ... but a tensor is missing


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("transformer", {"num_layers": 3}),
        ("transformer", {"num_layers": "two"}),
        ("transformer", {"num_layers": None}),
        ("transformer", {"attention_head_dim": 0}),
        ("transformer", {"in_channels": 36}),
        ("vae", {"dim_mult": "text"}),
        ("vae", {"z_dim": 48}),
        ("text_encoder", {"num_layers": 3}),
        ("text_encoder", {"d_model": 64}),
        ("text_encoder", {"d_model": "text"}),
    ],
)
def test_a_configuration_that_does_not_match_its_weights_is_an_error(folder: Path, name: str, values: dict) -> None:
    change_config(folder, name, **values)
    check_error(lambda: load(folder, name), folder / name, CLASSES[name][0].__name__)


def test_no_download_is_attempted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert os.environ.get("HF_HUB_OFFLINE") is None
    check_error(lambda: load_strictly(WanTransformer3DModel, folder / "nothing"), "nothing")


# ---------------------------------------------------------------------------------------------------- flow shift


def test_the_published_yaml_has_shift_5() -> None:
    assert read_shift(str(ROOT / "config" / "wan2.1" / "wan_civitai.yaml")) == 5.0


BAD_YAML = {
    "no shift": "scheduler_kwargs: {}", "nothing": "", "a list": "[1, 2]", "text": "scheduler_kwargs: {shift: much}",
    "none": "scheduler_kwargs: {shift: null}", "broken": "scheduler_kwargs: [", "tabs": "a:\n\t- b", "a tag": "!!python/object:os.system {}",
    "zero": "scheduler_kwargs: {shift: 0}", "negative": "scheduler_kwargs: {shift: -1}", "nan": "scheduler_kwargs: {shift: .nan}",
    "infinite": "scheduler_kwargs: {shift: .inf}", "environment": "scheduler_kwargs: {shift: '${oc.env:HOME}'}",
    "scalar": "5.0", "a key twice": "scheduler_kwargs: {shift: 5.0, shift: 3.0}", "deep": "[" * 20_000,
    "an alias bomb": "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in pairwise("abcdefghijklmnop")),
}  # fmt: skip


@pytest.mark.parametrize("content", BAD_YAML.values(), ids=BAD_YAML)
def test_a_yaml_without_a_usable_shift_is_an_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(UserError) as raised:
        read_shift(str(path))
    assert raised.value.exit_code == FLAGS
    assert raised.value.where == "--config_path"
    assert "5.0" in raised.value.hint or "interpolation" in raised.value.what
    assert "\n" not in raised.value.line()


@pytest.mark.parametrize("name", ["missing.yaml", ".", "x" * 5000])
def test_an_unreadable_yaml_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError) as raised:
        read_shift(str(tmp_path / name))
    assert raised.value.where == "--config_path"


@pytest.mark.parametrize(
    ("file", "class_name"),
    [
        ("model_index.json", "HunyuanVideo15Pipeline"),  # diffusers
        ("config.json", "HunyuanVideo_1_5_Pipeline"),  # Tencent
        ("transformer/480p_t2v/config.json", "HunyuanVideo_1_5_DiffusionTransformer"),
    ],
)
def test_hunyuanvideo_15_is_refused_by_name(tmp_path: Path, file: str, class_name: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"_class_name": class_name}), encoding="utf-8")
    with pytest.raises(UserError, match=r"is HunyuanVideo-1\.5, .*not supported\. Fix: pass a HunyuanVideoPipeline"):
        read_model_folder(str(tmp_path), ("HunyuanVideoPipeline",), (), ())
