"""Tests of videox.models.quantised_loading: block by block, with the error of each, and streamed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import originals
import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel
from networks import CONFIGS, SMALL_CONFIGS, blocks_of, build_transformer, is_joint
from safetensors.torch import load_file, save_file

from videox.errors import UserError
from videox.models.base_precision import FP8, INT8, NF4
from videox.models.component import find_component, load_checked
from videox.models.configured import Component
from videox.models.quantised import QuantisedLinear, quantise
from videox.models.quantised_loading import LoadingForward, load_quantised, probe_inputs, return_freed_memory
from videox.models.streamed_blocks import stream_blocks

CPU = torch.device("cpu")
LISTS = {False: ["blocks"], True: ["transformer_blocks", "single_transformer_blocks"]}
CLASSES = {False: WanTransformer3DModel, True: HunyuanVideoTransformer3DModel}


def saved(name: str, folder: Path) -> tuple[type, Component, list[str]]:
    """Return class, component and lists of blocks of a model that was written to a folder."""
    config = SMALL_CONFIGS[name]
    torch.manual_seed(0)
    build_transformer(config).save_pretrained(folder)
    joint = is_joint(config)
    read: Any = CLASSES[joint].load_config(folder)
    return CLASSES[joint], Component(folder, read), LISTS[joint]


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("text", INT8),
        pytest.param("image", FP8, marks=pytest.mark.slow),
        pytest.param("text", NF4, marks=pytest.mark.slow),
        ("joint, first frame concatenated", NF4),
        pytest.param("joint", FP8, marks=pytest.mark.slow),
    ],
)
def test_only_linear_layers_of_blocks_are_quantised(name: str, precision: str, tmp_path: Path) -> None:
    model_class, component, lists = saved(name, tmp_path)
    model, error = load_quantised(model_class, component, lists, precision, CPU)
    expected = load_checked(model_class, component, torch.bfloat16)
    found, layers = model.state_dict(), {n: m for n, m in model.named_modules() if isinstance(m, QuantisedLinear)}
    kept = {key for key in found if key.rpartition(".")[0] not in layers or key.endswith(".bias")}
    values = expected.state_dict()
    for key in kept:
        assert torch.equal(found[key], values[key]) and found[key].dtype == values[key].dtype, key
    assert values.keys() - kept == {f"{layer}.weight" for layer in layers}
    assert all(layer.startswith(tuple(lists)) and "norm" not in layer for layer in layers)
    layer = next(iter(layers))
    for found_part, part in zip(
        (layers[layer].values, layers[layer].scale), quantise(values[f"{layer}.weight"], precision), strict=True
    ):
        assert torch.equal(found_part, part)
    assert len(error.of_blocks) == len(blocks_of(model))
    low, high = {FP8: (1e-3, 0.05), INT8: (3e-4, 0.02), NF4: (3e-3, 0.15)}[precision]
    assert all(low < each < high for each in error.of_blocks) and low < error.mean() < high
    assert f"differs by {error.mean():.2%} from bfloat16" in str(error)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_loading_twice_gives_equal_weights_and_streaming_equal_outputs(tmp_path: Path) -> None:
    model_class, component, lists = saved("text", tmp_path)
    first, error = load_quantised(model_class, component, lists, NF4, CPU)
    second, again = load_quantised(model_class, component, lists, NF4, CPU)
    assert error == again
    second.requires_grad_(False)
    second.enable_gradient_checkpointing()
    given = probe_inputs(first.config, CPU)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = first(**given)[0]
        assert torch.equal(second(**given)[0], expected)
        stream_blocks(blocks_of(second), range(3), CPU, lambda value: [value])
        assert torch.equal(second(**given)[0], expected)


# a layer that the file of a test has in bfloat16: its name in the file, and in diffusers
KEPT = {
    "wan": ("blocks.0.ffn.0.weight", "blocks.0.ffn.net.0.proj"),
    "hunyuan": ("double_blocks.0.img_mlp.fc1.weight", "transformer_blocks.0.ff.net.0.proj"),
}


@pytest.mark.parametrize("name", ["text", pytest.param("joint", marks=pytest.mark.slow)])
def test_a_file_in_8_bits_is_taken_as_it_is(name: str, tmp_path: Path) -> None:
    """ComfyUI's scaled fp8, with HunyuanVideo's fused projections: values and scale of the file are used unchanged."""
    config = SMALL_CONFIGS[name]
    joint = is_joint(config)
    family = "hunyuan" if joint else "wan"
    kept, layer_kept = KEPT[family]
    torch.manual_seed(0)
    state = originals.rebuilt(build_transformer(config).state_dict(), family)
    stored: dict[str, torch.Tensor] = {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    exact = dict[str, torch.Tensor]()
    for key, value in state.items():
        exact[key] = stored[key] = value.to(torch.bfloat16)
        if value.ndim == 2 and "blocks." in key and key != kept:
            scale = value.abs().max() / 448
            stored[key] = (value / scale).to(torch.float8_e4m3fn)
            stored[f"{key.removesuffix('.weight')}.scale_weight"] = scale
            exact[key] = (stored[key].float() * scale).bfloat16()
    assert kept in exact
    save_file(stored, tmp_path / "fp8.safetensors")
    component = find_component(tmp_path / "fp8.safetensors", family, dict(build_transformer(config).config))
    found, error = load_quantised(CLASSES[joint], component, LISTS[joint], FP8, CPU)
    expected = originals.rebuilt(exact, family, back=False)
    layers = {n: m for n, m in found.named_modules() if isinstance(m, QuantisedLinear)}
    plain = load_checked(CLASSES[joint], component, torch.bfloat16)
    for path, layer in layers.items():
        weight = layer.weight_of(layer.values, layer.scale, torch.bfloat16)
        assert torch.equal(weight, expected[f"{path}.weight"]) == (path != layer_kept), path
        plain.get_submodule(path).weight = torch.nn.Parameter(weight)
    assert [number for number, each in enumerate(error.of_blocks) if each > 0] == [
        0
    ]  # of the layer that is rounded here
    given = probe_inputs(found.config, CPU)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(found(**given)[0], plain(**given)[0])


def test_a_value_of_8_bits_that_is_not_a_number_is_named(tmp_path: Path) -> None:
    state = originals.rebuilt(build_transformer(SMALL_CONFIGS["text"]).state_dict(), "wan")
    stored = {key: value.to(torch.float8_e4m3fn) if value.ndim == 2 else value for key, value in state.items()}
    stored["blocks.1.self_attn.q.weight"].view(torch.uint8)[3, 5] = 0xFF
    save_file(stored, tmp_path / "fp8.safetensors")
    component = find_component(
        tmp_path / "fp8.safetensors", "wan", dict(build_transformer(SMALL_CONFIGS["text"]).config)
    )
    with pytest.raises(UserError, match=r"blocks\.1\.attn1\.to_q\.weight contains values that are not finite"):
        load_quantised(WanTransformer3DModel, component, LISTS[False], FP8, CPU)


def test_a_value_that_is_not_finite_is_named(tmp_path: Path) -> None:
    model_class, component, lists = saved("text", tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["blocks.1.attn1.to_q.weight"][3, 5] = float("inf")
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"blocks\.1\.attn1\.to_q\.weight contains values that are not finite"):
        load_quantised(model_class, component, lists, INT8, CPU)


@pytest.mark.parametrize("config", [*SMALL_CONFIGS.values(), *CONFIGS.values()])
def test_the_probe_has_the_inputs_of_every_model(config: Mapping[str, Any]) -> None:
    """On the meta device, where models of any size run."""
    with torch.device("meta"):
        model = build_transformer(
            {**config, **{key: 1 for key in ("num_layers", "num_single_layers") if key in config}}
        )
    given = probe_inputs(model.config, torch.device("cpu"))
    moved = {key: value.to("meta") if isinstance(value, torch.Tensor) else value for key, value in given.items()}
    assert model(**moved)[0].shape[0] == 1


def test_a_model_of_first_and_last_frames_is_quantised(tmp_path: Path) -> None:
    """Its first forward pass, which loads the blocks, needs the embeddings of two pictures."""
    config = {**SMALL_CONFIGS["image"], "pos_embed_seq_len": 10}
    build_transformer(config).save_pretrained(tmp_path)
    component = Component(tmp_path, dict(WanTransformer3DModel.load_config(tmp_path)))
    model, error = load_quantised(WanTransformer3DModel, component, LISTS[False], INT8, CPU)
    assert len(error.of_blocks) == config["num_layers"] and max(error.of_blocks) > 0
    assert any(isinstance(module, QuantisedLinear) for module in model.modules())


def anonymous_bytes() -> int:
    """Return the anonymous memory of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def test_loading_keeps_no_more_than_the_quantised_weights_and_a_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each block of 8 MB in bfloat16. The heap has blocks of other sizes, which the C library might keep."""
    config = {
        **SMALL_CONFIGS["text"],
        "num_attention_heads": 8,
        "attention_head_dim": 64,
        "ffn_dim": 2048,
        "num_layers": 8,
    }
    build_transformer(config).to(torch.bfloat16).save_pretrained(tmp_path)
    component = Component(tmp_path, dict(WanTransformer3DModel.load_config(tmp_path)))
    found, load = list[int](), LoadingForward.__call__

    def note(self: LoadingForward, *inputs: Any, **named: Any) -> Any:
        output = load(self, *inputs, **named)
        found.append(anonymous_bytes())
        return output

    monkeypatch.setattr(LoadingForward, "__call__", note)
    return_freed_memory()
    model: Any = load_quantised(WanTransformer3DModel, component, LISTS[False], INT8, CPU)[0]
    quantised = sum(parameter.nbytes for parameter in model.blocks[0].parameters())
    block = 2 * quantised  # in bfloat16
    assert found[-1] - found[0] <= (len(found) - 1) * quantised + block, [f"{size / 1e6:.0f} MB" for size in found]
