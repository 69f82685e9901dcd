"""Tests of videox.models.component: components in foreign layouts load with the same weights and outputs."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import originals
import pytest
import runs
import tiny
import torch
from diffusers import AutoencoderKLWan, HunyuanVideoTransformer3DModel, WanTransformer3DModel
from launches import launcher_flags
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModel, UMT5EncoderModel

from videox.errors import MODEL, UserError
from videox.models.component import (
    check_depth,
    choose_component,
    diffusers_components,
    find_component,
    load_component,
    original_components,
    original_paths,
)
from videox.weights import layouts
from videox.weights.layout_writer import export_file
from videox.weights.lazy_tensor import LazyTensor
from videox.weights.reader import LayoutTensors, open_tensors

YAML = str(tiny.ROOT / "config/wan2.1/wan_civitai.yaml")
CLASSES = {
    "transformer": WanTransformer3DModel,
    "vae": AutoencoderKLWan,
    "text_encoder": UMT5EncoderModel,
    "image_encoder": CLIPVisionModel,
}


@pytest.fixture(scope="module")
def t2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_wan_t2v(tmp_path_factory.mktemp("t2v"))


@pytest.fixture(scope="module")
def i2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_wan_i2v(tmp_path_factory.mktemp("i2v"), image_dim=160)  # two heads of CLIP's 80 channels


@pytest.fixture(scope="module")
def hunyuan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_hunyuan_t2v(tmp_path_factory.mktemp("hunyuan"))


def components_of(folder: Path, **paths: str) -> dict[str, Any]:
    component_paths = original_paths(folder, YAML)
    assert component_paths is not None
    components = original_components(component_paths, YAML, paths.get("transformer_path"), paths.get("vae_path"))
    if components["transformer"].config["image_dim"]:
        components["image_encoder"] = find_component(component_paths["image_encoder"], "clip_vision")
    return components


def assert_equal_models(first: torch.nn.Module, second: torch.nn.Module) -> None:
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def check_error(call: Callable[[], object], *fragments: object) -> None:
    with pytest.raises(UserError) as raised:
        call()
    line = raised.value.line()
    assert raised.value.exit_code == MODEL and raised.value.hint and "\n" not in line
    assert all(str(word) in line for word in fragments), line


# --------------------------------------------------------------------------------------------- Wan's original folder


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_original_folder_loads_the_same_model_as_diffusers(
    task: str, shards: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(task)
    components = components_of(originals.build_wan(tmp_path / "original", model, shards=shards))
    assert set(components) == {"tokenizer", "transformer", "vae", "text_encoder"} | ({"image_encoder"} & {*components})
    assert ("image_encoder" in components) == (task == "i2v")
    for name, model_class in CLASSES.items():
        if name not in components:
            continue
        loaded = load_component(model_class, components[name], torch.float32)
        reference = model_class.from_pretrained(model / name)
        assert_equal_models(loaded, reference)
        assert not loaded.training and all(not p.is_meta for p in loaded.parameters())
        if name in ("transformer", "vae"):
            same = {key: reference.config[key] for key in components[name].config}
            listed = {key: list(v) if isinstance(v, tuple) else v for key, v in components[name].config.items()}
            assert {key: list(v) if isinstance(v, tuple) else v for key, v in same.items()} == listed


@pytest.mark.parametrize("mode", ["i2v", "inpaint", "flf2v"])
def test_a_folder_of_wan_fun_is_read(i2v: Path, tmp_path: Path, mode: str) -> None:
    """Wan2.1-Fun InP has Wan's own tensor names; VideoX-Fun writes the arguments of its class into config.json."""
    folder = originals.build_wan_fun(tmp_path / "fun", i2v)
    trainer = runs.train_script()
    flags = {
        "pretrained_model_name_or_path": folder,
        "train_data_meta": "m.json",
        "output_dir": "out",
        "train_mode": mode,
    }
    components = trainer.check_model(trainer.parse_args(runs.to_argv(flags)))
    assert "image_encoder" in components
    reference = WanTransformer3DModel.from_pretrained(i2v / "transformer")
    assert_equal_models(load_component(WanTransformer3DModel, components["transformer"], torch.float32), reference)


def test_original_transformer_has_the_same_output(i2v: Path, tmp_path: Path) -> None:
    component = components_of(originals.build_wan(tmp_path / "original", i2v))["transformer"]
    inputs = {
        "hidden_states": torch.randn(1, 36, 2, 4, 4),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 7, 32),
        "encoder_hidden_states_image": torch.randn(1, 17, 160),
    }
    with torch.no_grad():
        output = load_component(WanTransformer3DModel, component, torch.float32)(**inputs).sample
        reference = WanTransformer3DModel.from_pretrained(i2v / "transformer")(**inputs).sample
    assert torch.equal(output, reference)  # includes the buffers, which no file contains


def test_text_encoder_output_equals_the_original_definition(t2v: Path, tmp_path: Path) -> None:
    folder = originals.build_wan(tmp_path / "original", t2v)
    published = torch.load(folder / originals.T5_FILE, weights_only=True)
    ids = torch.randint(0, len(published["token_embedding.weight"]), (2, 40))
    mask = (torch.arange(40)[None] < torch.tensor([[40], [11]])).long()
    encoder = load_component(UMT5EncoderModel, components_of(folder)["text_encoder"], torch.float32)
    with torch.no_grad():
        actual = encoder(ids, mask).last_hidden_state
        expected = originals.t5_encode(published, ids, mask, layers=2)
    assert torch.allclose(actual * mask[..., None], expected * mask[..., None], atol=1e-5)
    assert actual.std() > 0.1
    half = load_component(UMT5EncoderModel, components_of(folder)["text_encoder"], torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_image_encoder_output_equals_the_original_definition(i2v: Path, tmp_path: Path) -> None:
    folder = originals.build_wan(tmp_path / "original", i2v)
    published = torch.load(folder / originals.CLIP_FILE, weights_only=True)
    encoder = load_component(CLIPVisionModel, components_of(folder)["image_encoder"], torch.float32)
    pixels = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        actual = encoder(pixels, output_hidden_states=True).hidden_states[-2]
        expected = originals.clip_encode(published, pixels, layers=2, heads=2)
    assert torch.allclose(actual, expected, atol=1e-5)


def test_a_diffusers_folder_is_not_an_original_folder(t2v: Path, tmp_path: Path) -> None:
    assert original_paths(t2v, YAML) is None
    assert original_paths(tmp_path, YAML) is None


def test_the_yaml_defines_the_components_paths(t2v: Path, tmp_path: Path) -> None:
    folder = originals.build_wan(tmp_path / "original", t2v)
    (folder / originals.VAE_FILE).rename(folder / "other_vae.pth")
    yaml = tmp_path / "own.yaml"
    yaml.write_text(Path(YAML).read_text().replace("Wan2.1_VAE.pth", "other_vae.pth"))
    component_paths = original_paths(folder, str(yaml))
    assert component_paths and load_component(
        AutoencoderKLWan, original_components(component_paths, str(yaml), None, None)["vae"], torch.float32
    )
    check_error(lambda: components_of(folder), "Wan2.1_VAE.pth")


# --------------------------------------------------------------------------------------------------- single files


def wan_file(t2v: Path, path: Path, prefix: str = "", **more: torch.Tensor) -> Path:
    state = originals.rebuilt(originals.weights(t2v / "transformer"), "wan")
    save_file({f"{prefix}{name}": tensor for name, tensor in state.items()} | more, path)
    return path


@pytest.mark.parametrize(
    "prefix", ["", "model.diffusion_model.", "diffusion_model.", "_orig_mod.", "module._orig_mod."]
)
def test_a_repacked_file_loads_the_same_model(t2v: Path, tmp_path: Path, prefix: str) -> None:
    reference = WanTransformer3DModel.from_pretrained(t2v / "transformer")
    component = find_component(wan_file(t2v, tmp_path / "wan.safetensors", prefix), "wan", {"attention_head_dim": 12})
    assert_equal_models(load_component(WanTransformer3DModel, component, torch.float32), reference)


def test_a_file_of_compiled_blocks_loads_the_same_model(t2v: Path, tmp_path: Path) -> None:
    state = originals.rebuilt(originals.weights(t2v / "transformer"), "wan")
    compiled = {re.sub(r"^(blocks\.\d+\.)", r"\1_orig_mod.", name): tensor for name, tensor in state.items()}
    save_file(compiled, tmp_path / "wan.safetensors")
    component = find_component(tmp_path / "wan.safetensors", "wan", {"attention_head_dim": 12})
    reference = WanTransformer3DModel.from_pretrained(t2v / "transformer")
    assert_equal_models(load_component(WanTransformer3DModel, component, torch.float32), reference)
    del compiled["blocks.1._orig_mod.ffn.0.weight"]
    save_file(compiled, tmp_path / "less.safetensors")
    less = find_component(tmp_path / "less.safetensors", "wan", {"attention_head_dim": 12})
    check_error(lambda: load_component(WanTransformer3DModel, less, torch.float32), "blocks.1.ffn.0.weight is missing")


def test_a_single_file_with_diffusers_names_loads_the_same_model(t2v: Path) -> None:
    path = t2v / "transformer/diffusion_pytorch_model.safetensors"
    component = find_component(path, "wan", {"attention_head_dim": 12})
    assert_equal_models(
        load_component(WanTransformer3DModel, component, torch.float32),
        WanTransformer3DModel.from_pretrained(path.parent),
    )


@pytest.mark.parametrize("layout", ["original", "comfyui"])
@pytest.mark.parametrize("family", ["wan", "hunyuan"])
def test_the_configuration_in_a_file_header_takes_precedence(
    t2v: Path, hunyuan: Path, tmp_path: Path, family: str, layout: str
) -> None:
    folder = {"wan": t2v, "hunyuan": hunyuan}[family] / "transformer"
    export_file(folder, tmp_path / "own.safetensors", layout, torch.float32, {})
    another = {"attention_head_dim": 4, "rope_theta": 7.0, "rope_axes_dim": (2, 1, 1), "eps": 0.5}  # another model's
    config = find_component(tmp_path / "own.safetensors", family, another).config
    stored = json.loads((folder / "config.json").read_bytes())
    for name in another.keys() & stored.keys():
        actual = config[name]
        assert (list(actual) if isinstance(actual, tuple) else actual) == stored[name]
    assert config["attention_head_dim"] == stored["attention_head_dim"] != 128


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_8_bit_weights_are_multiplied_by_their_scales(
    t2v: Path, tmp_path: Path, dtype: torch.dtype, scaled: bool
) -> None:
    state = originals.rebuilt(originals.weights(t2v / "transformer"), "wan")
    stored, expected = {"scaled_fp8": torch.zeros(2).to(dtype)} if scaled else {}, {}
    for number, (name, tensor) in enumerate(state.items()):
        if tensor.ndim == 2:
            scale = 0.01 * (number + 1) if scaled else 1.0
            stored[name] = (tensor / scale).to(dtype)
            expected[name] = stored[name].float() * torch.tensor(scale)
            if scaled:
                stored[f"{name.removesuffix('.weight')}.scale_weight"] = torch.tensor(scale)
                stored[f"{name.removesuffix('.weight')}.scale_input"] = torch.tensor(3.0)
        else:
            stored[name] = expected[name] = tensor.to(torch.float16)
    save_file(stored, tmp_path / "fp8.safetensors")
    component = find_component(tmp_path / "fp8.safetensors", "wan", {"attention_head_dim": 12})
    actual = load_component(WanTransformer3DModel, component, torch.float32).state_dict()
    for name, tensor in originals.rebuilt(expected, "wan", back=False).items():
        assert torch.equal(actual[name], tensor.float()), name


@pytest.mark.parametrize("wrapped", ["module", "state_dict", None])
def test_hunyuans_published_pickle_loads_the_same_model(hunyuan: Path, tmp_path: Path, wrapped: str | None) -> None:
    state = originals.rebuilt(originals.weights(hunyuan / "transformer"), "hunyuan")
    torch.save({wrapped: state} if wrapped else state, tmp_path / "mp_rank_00_model_states.pt")
    reference = HunyuanVideoTransformer3DModel.from_pretrained(hunyuan / "transformer")
    component = find_component(tmp_path / "mp_rank_00_model_states.pt", "hunyuan", dict(reference.config))
    loaded = load_component(HunyuanVideoTransformer3DModel, component, torch.float32)
    assert_equal_models(loaded, reference)
    as_stored = json.loads(loaded.to_json_string()), json.loads(reference.to_json_string())
    as_stored[1].pop("_name_or_path", None)
    assert as_stored[0] == as_stored[1]


def test_contiguous_tensors_are_mapped_copy_on_write(t2v: Path, tmp_path: Path) -> None:
    path = wan_file(t2v, tmp_path / "wan.safetensors")
    before, tensors = path.read_bytes(), open_tensors(path)
    name = "blocks.0.attn1.to_q.weight"
    first, second = tensors[name], tensors[name]
    assert first.data_ptr() == second.data_ptr() and torch.equal(first, originals.weights(t2v / "transformer")[name])
    first.zero_()
    assert not tensors[name].any() and path.read_bytes() == before


def test_slices_can_be_read_alone(hunyuan: Path, tmp_path: Path) -> None:
    state = originals.rebuilt(originals.weights(hunyuan / "transformer"), "hunyuan")
    save_file(state, tmp_path / "hunyuan.safetensors")
    tensors, reference = open_tensors(tmp_path / "hunyuan.safetensors"), originals.weights(hunyuan / "transformer")
    assert set(tensors) == set(reference) and len(tensors) == len(reference)
    for name, tensor in reference.items():
        assert tensors.shape(name) == tuple(tensor.shape)
        begin, end = len(tensor) // 3, len(tensor) - len(tensor) // 5
        assert torch.equal(tensors.rows(name, begin, end), tensor[begin:end])


# ----------------------------------------------------------------------------------------------------------- errors


def test_missing_and_unexpected_tensors_are_named_as_in_the_file(t2v: Path, tmp_path: Path) -> None:
    def load(path: Path) -> object:
        return load_component(
            WanTransformer3DModel, find_component(path, "wan", {"dim": 24, "num_heads": 2}), torch.float32
        )

    path = wan_file(t2v, tmp_path / "extra.safetensors", stray=torch.ones(2))
    check_error(lambda: load(path), path, "stray is not in the model")
    state = load_file(path)
    del state["stray"]
    for name in ("blocks.1.cross_attn.o.bias", "head.head.weight"):
        save_file({key: tensor for key, tensor in state.items() if key != name}, tmp_path / "less.safetensors")
        check_error(lambda: load(tmp_path / "less.safetensors"), name)
    save_file({**state, "blocks.1.ffn.0.weight": torch.ones(5, 24)}, tmp_path / "odd.safetensors")
    check_error(lambda: load(tmp_path / "odd.safetensors"), "blocks.1.ffn.0.weight is [5, 24]")


def without_blocks(path: Path, target: Path, *prefixes: str) -> Path:
    """Write a copy of a safetensors file without the tensors whose names begin with one of the prefixes."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    state = {name: tensor for name, tensor in load_file(path).items() if not name.startswith(prefixes)}
    save_file(state, target, metadata=metadata)
    return target


@pytest.mark.parametrize("layout", ["diffusers", "original", "comfyui"])
@pytest.mark.parametrize(
    ("family", "prefix", "key"),
    [
        ("wan", "blocks.", "num_layers"),
        ("hunyuan", "transformer_blocks.", "num_layers"),
        ("hunyuan", "single_transformer_blocks.", "num_single_layers"),
        ("hunyuan", "context_embedder.token_refiner.refiner_blocks.", "num_refiner_layers"),
    ],
)
def test_missing_blocks_of_a_file_are_an_error(
    tmp_path: Path, family: str, prefix: str, key: str, layout: str
) -> None:
    """Without its last block, a file is that of a shallower model: only a configuration shows that it is missing."""
    if family == "wan":
        folder = tiny.build_wan_t2v(tmp_path / "model") / "transformer"
    else:
        folder = tiny.build_hunyuan_t2v(tmp_path / "model", refiner_layers=2) / "transformer"
    known = json.loads((folder / "config.json").read_bytes())
    depth = known[key]
    path = folder / "diffusion_pytorch_model.safetensors"
    if layout != "diffusers":
        path = tmp_path / "complete.safetensors"
        export_file(folder, path, layout, torch.float32, {})
        if family == "hunyuan":
            prefix = {
                "transformer_blocks.": "double_blocks.",
                "single_transformer_blocks.": "single_blocks.",
            }.get(prefix, "txt_in.individual_token_refiner.blocks.")
    assert find_component(path, family, known).config[key] == depth
    stored = {"comfyui": "model.diffusion_model."}.get(layout, "")
    less = without_blocks(path, tmp_path / "less.safetensors", f"{stored}{prefix}{depth - 1}.")
    named = f"has {depth - 1} of {depth} blocks ({key} = {depth} in the model's configuration)"
    check_error(partial(find_component, less, family, known), less, f"{named}, {prefix}{depth - 1} is missing")
    if layout != "diffusers":  # its header contains the configuration, which takes precedence
        for other in ({}, {**known, key: depth - 1}):
            check_error(partial(find_component, less, family, other), f"{named}, {prefix}{depth - 1} is missing")
        assert find_component(path, family, {**known, key: depth + 1}).config[key] == depth
    else:
        check_error(
            partial(find_component, path, family, {**known, key: depth - 1}),
            f"has {depth} blocks in place of {depth - 1} ({key} = {depth - 1} in",
            f"{prefix}{depth - 1} is left over",
        )


def test_a_gap_between_blocks_is_an_error_without_a_configuration(tmp_path: Path) -> None:
    path = tiny.build_wan_t2v(tmp_path / "model", layers=4) / "transformer/diffusion_pytorch_model.safetensors"
    less = without_blocks(path, tmp_path / "less.safetensors", "blocks.1.", "blocks.2.")
    known = {"attention_head_dim": 12}
    check_error(partial(find_component, less, "wan", known), "has 2 of 4 blocks, blocks.1 is missing")
    check_error(
        partial(find_component, less, "wan", known | {"num_layers": 4}),
        "has 2 of 4 blocks (num_layers = 4 in the model's configuration), blocks.1 is missing",
    )


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_a_transformer_file_has_the_depth_of_the_model_folder(tmp_path: Path, layout: str) -> None:
    model = tiny.build_wan_t2v(tmp_path / "model", layers=3)
    path = model / "transformer/diffusion_pytorch_model.safetensors"
    less = without_blocks(path, tmp_path / "less.safetensors", "blocks.2.")
    if layout == "original":
        folder = originals.build_wan(tmp_path / "original", model)
        call = partial(components_of, folder, transformer_path=str(less))
    else:
        overrides = {"transformer": ("wan", str(less))}
        call = partial(diffusers_components, model, ("WanPipeline",), ("transformer",), overrides, ())
    check_error(call, less, "has 2 of 3 blocks", "blocks.2 is missing")


def test_an_original_folder_without_its_last_blocks_is_an_error(t2v: Path, tmp_path: Path) -> None:
    folder = originals.build_wan(tmp_path / "original", t2v)
    path = folder / "diffusion_pytorch_model.safetensors"
    without_blocks(path, tmp_path / "less.safetensors", "blocks.1.").replace(path)
    check_error(lambda: components_of(folder), "has 1 of 2 blocks", "blocks.1 is missing")


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_a_folder_of_weights_alone_is_read_with_the_models_configuration(
    t2v: Path, tmp_path: Path, layout: str
) -> None:
    """As VideoX-Fun's zero_to_bf16.py writes it: shards, an index with transformers' name, and no config.json."""
    folder, state = tmp_path / "converted", originals.weights(t2v / "transformer")
    folder.mkdir()
    originals.write_shards(folder, originals.rebuilt(state, "wan") if layout == "original" else state, 2)
    (folder / "diffusion_pytorch_model.safetensors.index.json").rename(folder / "model.safetensors.index.json")
    overrides = {"transformer": ("wan", str(folder))}
    component = diffusers_components(t2v, ("WanPipeline",), ("transformer",), overrides, ())["transformer"]
    reference = WanTransformer3DModel.from_pretrained(t2v / "transformer")
    assert_equal_models(load_component(WanTransformer3DModel, component, torch.float32), reference)
    min(folder.glob("*.safetensors")).unlink()
    check_error(partial(find_component, folder, "wan", component.config), "00001-of-00002", "is missing")


@pytest.mark.parametrize("cut", ["folder", "file"])
def test_without_config_the_folders_own_weights_define_the_depth(tmp_path: Path, cut: str) -> None:
    """An original folder without config.json, and a file without header: only the folder's weights show the depth."""
    folder = originals.build_wan(tmp_path / "original", tiny.build_wan_t2v(tmp_path / "model", layers=3))
    weights = folder / "diffusion_pytorch_model.safetensors"
    complete = Path(shutil.copy(weights, tmp_path / "complete.safetensors"))
    less = without_blocks(weights, tmp_path / "less.safetensors", "blocks.2.")
    (folder / "config.json").unlink()
    if cut == "file":
        check_error(
            lambda: components_of(folder, transformer_path=str(less)),
            f"{less}: has 2 of 3 blocks (num_layers = 3 in the model's configuration), blocks.2 is missing",
        )
    else:
        less.replace(weights)
        check_error(lambda: components_of(folder, transformer_path=str(complete)), "blocks.2 is left over")
    weights.unlink()  # nothing shows the depth of a model that is not published
    assert components_of(folder, transformer_path=str(complete))["transformer"].config["num_layers"] == 3


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize(
    ("model", "missing", "line"),
    [
        (
            "Wan2.1-T2V-1.3B",
            "blocks.29.",
            "has 29 of 30 blocks (num_layers = 30 in the published model of width 1536)",
        ),
        ("Wan2.1-T2V-14B", "blocks.39.", "has 39 of 40 blocks (num_layers = 40 in the published model of width 5120)"),
        ("Wan2.1-I2V-14B", "blocks.38.", "has 39 of 40 blocks (num_layers = 40 in"),
        (
            "HunyuanVideo",
            "double_blocks.19.",
            "has 19 of 20 blocks (num_layers = 20 in the published model of width 3072",
        ),
        ("HunyuanVideo", "single_blocks.39.", "has 39 of 40 blocks (num_single_layers = 40 in"),
        ("HunyuanVideo-I2V-33ch", "single_blocks.0.", "has 39 of 40 blocks (num_single_layers = 40 in"),
    ],
)
def test_published_models_define_the_depth_by_their_width(model: str, missing: str, line: str, layout: str) -> None:
    """The published shapes, complete and without one block, with nothing else that shows the number of blocks."""
    family = "hunyuan" if "Hunyuan" in model else "wan"
    _, shapes = originals.published(model)
    if layout == "diffusers":
        shapes = {entry.name: entry.shape for entry in layouts.to_diffusers(family, shapes)}
        missing = missing.replace("double_blocks", "transformer_blocks")
        missing = re.sub("^single_blocks", "single_transformer_blocks", missing)
    complete = unread_tensors(shapes, family if layout == "original" else None)
    check_depth(complete, family, {})
    less = {name: shape for name, shape in shapes.items() if not name.startswith(missing)}
    call = partial(check_depth, unread_tensors(less, complete.layout), family)
    check_error(partial(call, {}), line, f"{missing.rstrip('.')} is missing")
    key = re.search(r"\((\w+) = ", line)[1]
    check_error(partial(call, {key: 3}), f"({key} = 3 in the model's configuration)")  # it precedes


def unread_tensors(shapes: Mapping[str, tuple[int, ...]], layout: str | None) -> LayoutTensors:
    """Tensors of these shapes in a file that is never read."""
    stored = {name: LazyTensor(name, torch.bfloat16, shape, ()) for name, shape in shapes.items()}
    return LayoutTensors(Path("wan.safetensors"), stored, layout)


def test_a_config_that_contradicts_the_weights_is_an_error(t2v: Path, tmp_path: Path) -> None:
    folder = originals.build_wan(tmp_path / "original", t2v)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "in_dim": 36}))
    check_error(lambda: components_of(folder), "in_dim is 36, the weights have 16")


def test_weights_of_another_kind_are_an_error(t2v: Path, hunyuan: Path, tmp_path: Path) -> None:
    folder = originals.build_wan(tmp_path / "original", t2v)
    check_error(lambda: find_component(folder / originals.VAE_FILE, "wan"), "wan_vae")
    check_error(lambda: find_component(next((hunyuan / "transformer").glob("*.safetensors")), "wan"), "hunyuan")
    check_error(lambda: find_component(tmp_path / "none.safetensors", "wan"), "none.safetensors")
    (tmp_path / "text.txt").write_text("")
    check_error(lambda: find_component(tmp_path / "text.txt", "wan"), "is not a weights file")


def test_a_folder_of_another_class_is_an_error(t2v: Path, hunyuan: Path) -> None:
    for kind, folder, named, expected in (
        ("wan", hunyuan / "transformer", "HunyuanVideoTransformer3DModel", "WanTransformer3DModel"),
        ("hunyuan", t2v / "transformer", "WanTransformer3DModel", "HunyuanVideoTransformer3DModel"),
        ("wan_vae", hunyuan / "vae", "AutoencoderKLHunyuanVideo", "AutoencoderKLWan"),
        ("hunyuan_vae", t2v / "vae", "AutoencoderKLWan", "AutoencoderKLHunyuanVideo"),
        ("wan_vae", t2v / "transformer", "WanTransformer3DModel", "AutoencoderKLWan"),
    ):
        for check_weights in (True, False):
            check_error(
                partial(find_component, folder, kind, check_weights=check_weights),
                folder,
                f"is {named}, not {expected}",
            )


def test_a_class_name_unknown_to_diffusers_is_ignored(t2v: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(t2v / "transformer", tmp_path / "own")
    config = json.loads((folder / "config.json").read_text()) | {"_class_name": "OurOwnWan"}
    (folder / "config.json").write_text(json.dumps(config))
    assert find_component(folder, "wan").config["_class_name"] == "OurOwnWan"


@pytest.mark.parametrize("names", ["Tencent", "ComfyUI", "diffusers"])
def test_a_transformer_of_hunyuanvideo_15_is_refused_by_name(hunyuan: Path, tmp_path: Path, names: str) -> None:
    state = originals.weights(hunyuan / "transformer")
    more = {"diffusers": "cond_type_embed.weight", "ComfyUI": "model.diffusion_model.cond_type_embedding.weight"}
    if names != "diffusers":
        state = originals.rebuilt(state, "hunyuan")
    prefix = "model.diffusion_model." if names == "ComfyUI" else ""
    state = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    save_file({**state, more.get(names, "vision_in.proj.0.weight"): torch.ones(2)}, tmp_path / "new.safetensors")
    check_error(lambda: find_component(tmp_path / "new.safetensors", "hunyuan"), "is HunyuanVideo-1.5, which has")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text('{"_class_name": "HunyuanVideo_1_5_DiffusionTransformer"}')
    shutil.copy(tmp_path / "new.safetensors", folder / "diffusion_pytorch_model.safetensors")
    check_error(lambda: find_component(folder, "hunyuan"), "is HunyuanVideo-1.5, which has")


def test_a_missing_path_is_reported_with_its_flag(t2v: Path, tmp_path: Path) -> None:
    for argument in (str(tmp_path / "nope"), "Some-Team/some-model"):
        check_error(
            lambda argument=argument: choose_component("vae", argument, t2v / "vae", "wan_vae", {}),
            f"--vae_path: {argument} does not exist",
        )
    assert choose_component("vae", None, t2v / "vae", "wan_vae", {}) == find_component(t2v / "vae", "wan_vae")
    assert choose_component("vae", str(t2v / "vae"), tmp_path, "wan_vae", {}).path == t2v / "vae"


def test_a_lora_is_not_a_component(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_lora_weights.safetensors"
    halves = {f"transformer.blocks.0.attn1.to_q.lora_{half}.weight": torch.ones(2, 2) for half in "AB"}
    save_file(halves, path)
    for argument in (path, tmp_path):
        check_error(partial(find_component, argument, "wan"), argument, "is a LoRA", "--init_lora_from")


def test_files_missing_in_the_original_folder_are_named(t2v: Path, tmp_path: Path) -> None:
    folder = originals.build_wan(tmp_path / "original", t2v)
    config = (folder / "config.json").read_text()
    (folder / "config.json").unlink()
    check_error(lambda: components_of(folder), folder, "has no config.json", f"found: {originals.VAE_FILE}")
    (folder / "config.json").write_text(config)
    (folder / originals.VAE_FILE).unlink()
    check_error(
        lambda: components_of(folder), f"{originals.VAE_FILE}: does not exist (found in its parent folder: config.json"
    )


def test_an_image_encoder_with_a_fractional_number_of_heads_is_an_error(tmp_path: Path) -> None:
    model = tiny.build_wan_i2v(tmp_path / "narrow")  # its encoder is 32 wide
    folder = originals.build_wan(tmp_path / "original", model)
    check_error(
        lambda: components_of(folder), originals.CLIP_FILE, "its width 32 is not a multiple of the 80 channels"
    )


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


@pytest.mark.parametrize("name", [originals.VAE_FILE, originals.T5_FILE, "transformer.pt"])
def test_code_in_a_pickle_is_not_run(t2v: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    folder = originals.build_wan(tmp_path / "original", t2v)
    torch.save({"weight": torch.ones(2), "other": Harmful()}, folder / name)
    argument = {"transformer_path": str(folder / name)} if name == "transformer.pt" else {}
    check_error(lambda: components_of(folder, **argument), name, "no code was run")
    (folder / name).write_bytes(pickle.dumps(Harmful()))
    check_error(lambda: components_of(folder, **argument), name, "is not a torch.save file")
    (folder / name).write_bytes((t2v / "model_index.json").read_bytes())
    check_error(lambda: components_of(folder, **argument), name)
    assert not (tmp_path / "ran").exists()


def test_truncated_files_are_errors(t2v: Path, tmp_path: Path) -> None:
    folder = originals.build_wan(tmp_path / "original", t2v, shards=2)
    for path in [*folder.glob("*.pth"), *folder.glob("*.safetensors")]:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        check_error(lambda: components_of(folder), path.name)
        path.write_bytes(content)
    assert components_of(folder)
    next(folder.glob("*-00002-of-00002.safetensors")).unlink()
    check_error(lambda: components_of(folder), "00002-of-00002", "missing")


# --------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_dataset(tmp_path_factory.mktemp("data"))


SHORT = {"max_train_steps": 2, "checkpointing_steps": 2, "tokenizer_max_length": 16, "train_batch_size": 2}


def trained(model: Path, metadata: Path, out: Path, **changes: object) -> runs.Outcome:
    outcome = runs.train(runs.wan_flags(model, metadata, out, **{**SHORT, **changes}))
    assert outcome.code == 0, outcome.stderr
    return outcome


def test_training_from_the_original_layout_is_bit_identical(t2v: Path, metadata: Path, tmp_path: Path) -> None:
    """All components are the same, and with one flow shift the losses and trained weights are bitwise equal."""
    folder = originals.build_wan(tmp_path / "original", t2v, shards=2)
    shutil.copytree(t2v, tmp_path / "diffusers")
    first, second = (
        trained(tmp_path / name, metadata, tmp_path / f"{name}-run", flow_shift=shift)
        for name, shift in (("original", None), ("diffusers", 5.0))  # 5.0: of the shipped yaml
    )
    assert first.losses == second.losses and len(first.losses) == 2
    weights, reference = first.weights(), second.weights()
    assert weights.keys() == reference.keys() and all(
        torch.equal(weights[name], reference[name]) for name in reference
    )
    assert folder.is_dir()


@pytest.mark.slow
def test_image_to_video_trains_from_the_original_layout(i2v: Path, metadata: Path, tmp_path: Path) -> None:
    """CLIP's activation is the published one here, but quick_gelu in the tiny model: losses are not compared."""
    folder = originals.build_wan(tmp_path / "original", i2v, dtype=torch.bfloat16)
    outcome = trained(folder, metadata, tmp_path / "run", train_mode="i2v", tokenizer_max_length=512)
    assert len(outcome.losses) == 2 and outcome.status["state"] == "finished"
    again = WanTransformer3DModel.from_pretrained(outcome.folder / "transformer")
    assert again.config.image_dim == 160


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", "zero3", "fsdp2"])
def test_backends_load_and_shard_the_original_layout_bit_identically(
    t2v: Path, metadata: Path, tmp_path: Path, backend: str
) -> None:
    """Two processes train bit-identically from the original folder and from diffusers'; so does the export."""
    originals.build_wan(tmp_path / "original", t2v, shards=2)
    shutil.copytree(t2v, tmp_path / "diffusers")
    actual = []
    for name in ("original", "diffusers"):
        settings = {**SHORT, "export_layouts": "original", "flow_shift": 5.0}
        flags = runs.wan_flags(tmp_path / name, metadata, tmp_path / f"{name}-run", **settings)
        outcome = runs.launch(flags, launcher_flags(backend, "wan2.1 normal", 2))
        assert outcome.code == 0, outcome.stderr[-4000:]
        actual.append((outcome.losses, load_file(tmp_path / f"{name}-run/transformer_original.safetensors")))
        saved = load_file(tmp_path / f"{name}-run/checkpoint-2/exports/transformer_original.safetensors")
        assert all(torch.equal(saved[key], tensor) for key, tensor in actual[-1][1].items())
    (losses, weights), (known_losses, reference) = actual
    assert losses == known_losses and len(losses) == 2
    assert weights.keys() == reference.keys() and all(
        torch.equal(weights[name], reference[name]) for name in reference
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["repack.safetensors", "mp_rank_00_model_states.pt"])
def test_hunyuan_trains_from_its_single_file(hunyuan: Path, metadata: Path, tmp_path: Path, name: str) -> None:
    state = originals.rebuilt(originals.weights(hunyuan / "transformer"), "hunyuan")
    if name.endswith(".pt"):
        torch.save({"module": state}, tmp_path / name)
    else:
        save_file({f"model.diffusion_model.{key}": tensor for key, tensor in state.items()}, tmp_path / name)
    vae = next((hunyuan / "vae").glob("*.safetensors"))
    torch.save({"state_dict": {f"vae.{key}": tensor for key, tensor in load_file(vae).items()}}, tmp_path / "vae.pt")
    settings = {"max_train_steps": 2, "train_batch_size": 2, "tokenizer_max_length": 16}
    files = {"transformer_path": tmp_path / name, "vae_path": tmp_path / "vae.pt"}
    trainer = runs.train_script("hunyuanvideo")
    first, second = (
        runs.train(
            runs.train_flags("hunyuanvideo", hunyuan, metadata, tmp_path / out, **settings, **argument), trainer
        )
        for out, argument in (("files", files), ("folder", {}))
    )
    assert (first.code, second.code) == (0, 0), first.stderr + second.stderr
    assert first.losses == second.losses and len(first.losses) == 2


def test_a_videox_fun_folder_is_identified_by_its_tensors(t2v: Path, metadata: Path, tmp_path: Path) -> None:
    """VideoX-Fun's checkpoint-N/transformer names diffusers' class, but has original tensors and a wrong default
    value.
    """
    folder = originals.build_wan(tmp_path / "original", t2v)
    theirs = tmp_path / "checkpoint-7/transformer"
    theirs.mkdir(parents=True)
    for path in folder.glob("diffusion_pytorch_model*"):
        shutil.copy(path, theirs)
    config = json.loads((folder / "config.json").read_text())
    more = {"_class_name": "WanTransformer3DModel", "in_channels": 16, "hidden_size": 2048}
    (theirs / "config.json").write_text(json.dumps({**config, **more}))
    component = find_component(theirs, "wan")
    reference = WanTransformer3DModel.from_pretrained(t2v / "transformer")
    assert_equal_models(load_component(WanTransformer3DModel, component, torch.float32), reference)
