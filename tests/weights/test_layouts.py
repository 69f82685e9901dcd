"""Tests of videox.weights.layouts: each published tensor maps to one place in the diffusers model and back."""

from __future__ import annotations

import itertools
from math import prod

import originals
import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, HunyuanVideoTransformer3DModel, WanTransformer3DModel
from diffusers.loaders import single_file_utils
from hypothesis import given
from hypothesis import strategies as st

from videox.models.infer_config import CONFIGS
from videox.weights import layouts

CLASSES = {"wan": WanTransformer3DModel, "hunyuan": HunyuanVideoTransformer3DModel}
CONVERTERS = {
    "wan": single_file_utils.convert_wan_transformer_to_diffusers,
    "hunyuan": single_file_utils.convert_hunyuan_video_transformer_to_diffusers,
    "wan_vae": single_file_utils.convert_wan_vae_to_diffusers,
}
# model -> (layout, tensors in the published file, parameters)
PUBLISHED = {
    "Wan2.1-T2V-1.3B": ("wan", 825, 1_418_996_800),
    "Wan2.1-T2V-14B": ("wan", 1095, 14_288_491_584),
    "Wan2.1-I2V-14B": ("wan", 1303, 16_394_878_784),
    "HunyuanVideo": ("hunyuan", 856, 12_821_012_544),
    "HunyuanVideo-I2V": ("hunyuan", 856, 12_821_012_544),
    "HunyuanVideo-I2V-33ch": ("hunyuan", 852, 12_810_991_680),
}


def model_shapes(layout: str, config: dict) -> dict[str, tuple[int, ...]]:
    """The shapes of the diffusers class for a configuration, without allocating it."""
    with init_empty_weights():
        model = CLASSES[layout].from_config(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def mapped(layout: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    entries = layouts.to_diffusers(layout, shapes)
    assert len({entry.name for entry in entries}) == len(entries)
    return {entry.name: entry.shape for entry in entries}


@pytest.mark.parametrize("model", PUBLISHED)
def test_every_published_tensor_maps_to_diffusers_and_back(model: str) -> None:
    layout, tensors, parameters = PUBLISHED[model]
    config, shapes = originals.published(model)
    assert (len(shapes), sum(prod(shape) for shape in shapes.values())) == (tensors, parameters)
    assert layouts.layout_of(shapes) == layout
    wanted = model_shapes(layout, config)
    assert mapped(layout, shapes) == wanted
    assert layouts.family_of(wanted) == layout and layouts.layout_of(wanted) is None
    assert {entry.name: entry.shape for entry in layouts.to_original(layout, wanted)} == shapes
    # Every element of each side is used exactly once.
    for entries, source in (
        (layouts.to_diffusers(layout, shapes), shapes),
        (layouts.to_original(layout, wanted), wanted),
    ):
        used: dict[str, list[tuple[int, int]]] = {}
        for piece in itertools.chain.from_iterable(entry.pieces for entry in entries):
            used.setdefault(piece.name, []).append((piece.begin, piece.begin + piece.count))
        for name, shape in source.items():
            ends = sorted(used[name])
            assert ends[0][0] == 0 and ends[-1][1] == prod(shape)
            assert all(a[1] == b[0] for a, b in itertools.pairwise(ends))


@pytest.mark.parametrize("model", PUBLISHED)
def test_configuration_is_inferred_from_the_shapes(model: str) -> None:
    layout, *_ = PUBLISHED[model]
    config, shapes = originals.published(model)
    known = {"image_condition_type": config["image_condition_type"]} if layout == "hunyuan" else {}
    found = CONFIGS[layout](mapped(layout, shapes), known)
    same = {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}
    assert {name: same[name] for name in config} == config


@pytest.mark.parametrize("model", PUBLISHED)
def test_diffusers_converter_agrees(model: str) -> None:
    """Compare values too: every row has a unique number, in tensors whose other dimensions are 1.

    diffusers' converter splits along the first dimension at published sizes, which these tensors keep.
    """
    layout, *_ = PUBLISHED[model]
    _, shapes = originals.published(model)
    first = {name: shape for name, shape in shapes.items() if all(f".{n}." not in name for n in range(1, 40))}
    number, state = 0, {}
    for name, shape in first.items():
        state[name] = torch.arange(number, number + shape[0]).reshape(shape[0], *[1] * (len(shape) - 1))
        number += shape[0]
    theirs = CONVERTERS[layout](dict(state))
    entries = layouts.to_diffusers(layout, first)
    assert {entry.name for entry in entries} == theirs.keys()
    for entry in entries:
        rows = [
            state[piece.name].flatten()[piece.begin // (row := prod(first[piece.name][1:])) :][: piece.count // row]
            for piece in entry.pieces
        ]
        assert torch.equal(torch.cat(rows), theirs[entry.name].flatten()), entry.name


def test_vae_layout_equals_diffusers_converter() -> None:
    with init_empty_weights():
        state = AutoencoderKLWan().state_dict()
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    original = {entry.name: (entry.shape, entry.pieces[0].name) for entry in layouts.to_original("wan_vae", wanted)}
    assert len(original) == len(wanted) and layouts.layout_of(original) == "wan_vae"
    theirs = CONVERTERS["wan_vae"]({name: source for name, (_, source) in original.items()})
    assert all(name == source for name, source in theirs.items()) and theirs.keys() == wanted.keys()
    shapes = {name: shape for name, (shape, _) in original.items()}
    assert mapped("wan_vae", shapes) == wanted
    config = CONFIGS["wan_vae"](wanted, {})
    default = {"base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4]}
    default |= {"num_res_blocks": 2, "temperal_downsample": [False, True, True]}
    assert config == default


@given(blocks=st.integers(1, 4), resnets=st.integers(1, 3), z=st.integers(2, 4))
def test_vae_of_any_depth_round_trips(blocks: int, resnets: int, z: int) -> None:
    sizes = {"base_dim": 2, "z_dim": z, "dim_mult": [*[1, 2, 1, 2][:blocks], 1], "num_res_blocks": resnets}
    sizes["temperal_downsample"] = [False, True, True, True][:blocks]
    with init_empty_weights():
        state = AutoencoderKLWan(**sizes).state_dict()
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    shapes = {entry.name: entry.shape for entry in layouts.to_original("wan_vae", wanted)}
    assert mapped("wan_vae", shapes) == wanted
    assert CONFIGS["wan_vae"](wanted, {}) == sizes


COMFYUI = {
    "double_blocks.3.img_attn.qkv.weight": "double_blocks.3.img_attn_qkv.weight",
    "double_blocks.3.txt_attn.proj.bias": "double_blocks.3.txt_attn_proj.bias",
    "double_blocks.3.img_attn.norm.query_norm.scale": "double_blocks.3.img_attn_q_norm.weight",
    "double_blocks.3.txt_attn.norm.key_norm.weight": "double_blocks.3.txt_attn_k_norm.weight",
    "double_blocks.3.img_mlp.0.weight": "double_blocks.3.img_mlp.fc1.weight",
    "double_blocks.3.txt_mod.lin.bias": "double_blocks.3.txt_mod.linear.bias",
    "single_blocks.7.norm.query_norm.scale": "single_blocks.7.q_norm.weight",
    "single_blocks.7.modulation.lin.weight": "single_blocks.7.modulation.linear.weight",
    "txt_in.individual_token_refiner.blocks.0.self_attn.qkv.weight": (
        "txt_in.individual_token_refiner.blocks.0.self_attn_qkv.weight"
    ),
    "txt_in.individual_token_refiner.blocks.1.mlp.2.bias": "txt_in.individual_token_refiner.blocks.1.mlp.fc2.bias",
    "txt_in.t_embedder.in_layer.weight": "txt_in.t_embedder.mlp.0.weight",
    "txt_in.c_embedder.out_layer.bias": "txt_in.c_embedder.linear_2.bias",
    "time_in.in_layer.weight": "time_in.mlp.0.weight",
    "guidance_in.out_layer.bias": "guidance_in.mlp.2.bias",
}


@pytest.mark.parametrize(("comfyui", "published"), COMFYUI.items(), ids=COMFYUI)
def test_comfyui_names_map_to_published_names(comfyui: str, published: str) -> None:
    assert layouts.published_name(comfyui) == published


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_names_are_unchanged(model: str) -> None:
    _, shapes = originals.published(model)
    assert [layouts.published_name(name) for name in shapes] == list(shapes)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "model.model.", "module."])
def test_shared_prefix_is_detected(prefix: str) -> None:
    assert layouts.shared_prefix([f"{prefix}blocks.0.ffn.0.weight", f"{prefix}head.modulation"]) == prefix
    assert layouts.shared_prefix([f"{prefix}blocks.0.ffn.0.weight", "other"]) == ""


def test_unknown_tensor_keeps_its_name() -> None:
    shapes = {"blocks.0.self_attn.q.weight": (4, 4), "blocks.0.self_attn.q.lora": (2,), "stray": (3,)}
    assert [entry.name for entry in layouts.to_diffusers("wan", shapes)] == [
        "blocks.0.attn1.to_q.weight", "blocks.0.self_attn.q.lora", "stray",
    ]  # fmt: skip
