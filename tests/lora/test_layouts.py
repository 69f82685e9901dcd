"""Tests of videox.lora.layouts: the updates of all weights are equal in diffusers' and ComfyUI's layouts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import originals
import pytest
import runs
import tiny
import torch
from diffusers import HunyuanVideoPipeline, WanPipeline, WanTransformer3DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from videox.lora.layouts import lora_to_comfyui, lora_to_diffusers
from videox.lora.targets import choose_targets

DATA = Path(__file__).parents[1] / "data"
CONFIGS = json.loads((DATA / "transformers.json").read_text(encoding="utf-8"))
NAMES = json.loads((DATA / "lora_names.json").read_text(encoding="utf-8"))
Sizes = dict[str, tuple[int, ...]]


def linear_shapes(family: str) -> Sizes:
    """Return the weight shapes of a tiny transformer's linear layers, by diffusers' names."""
    script, make = {
        "wan": ("scripts/demo_model.py", "wan_components"),
        "hunyuan": ("scripts/demo_hunyuan.py", "hunyuan_components"),
    }[family]
    components = getattr(tiny.load_script(script), make)(**({"image_dim": 32} if family == "wan" else {}))
    modules = components["transformer"].named_modules()
    return {name: tuple(m.weight.shape) for name, m in modules if isinstance(m, torch.nn.Linear)}


SIZES = {family: linear_shapes(family) for family in ("wan", "hunyuan")}


def random_adapters(
    shapes: Sizes, ranks: dict[str, int], form: str = "transformer.{}.lora_{}.weight"
) -> dict[str, Tensor]:
    converted = {}
    for name, rank in ranks.items():
        converted[form.format(name, "A")] = torch.randn(rank, shapes[name][1], dtype=torch.float64)
        converted[form.format(name, "B")] = torch.randn(shapes[name][0], rank, dtype=torch.float64)
    return converted


def updates_of(state: dict[str, Tensor], alphas: dict[str, float], prefix: str) -> dict[str, Tensor]:
    """Return alpha / rank * B A of every module, by name."""
    actual = {}
    for name, a in state.items():
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            key = module.removeprefix(prefix)
            alpha = alphas[key] if alphas else state[f"{module}.alpha"].item()
            actual[key] = alpha / len(a) * state[f"{module}.lora_B.weight"] @ a
    return actual


def check_same_updates(family: str, state: dict[str, Tensor], alphas: dict[str, float]) -> dict[str, Tensor]:
    """Check the updates of all weights in the original layout; return the LoRA in ComfyUI's layout."""
    split = {f"{name}.weight": torch.zeros(shape, dtype=torch.float64) for name, shape in SIZES[family].items()}
    split |= {f"{name}.weight": delta for name, delta in updates_of(state, alphas, "transformer.").items()}
    expected = originals.rebuilt(split, family)
    converted = lora_to_comfyui(state, family, alphas)
    actual = {}
    for name, delta in updates_of(converted, {}, "diffusion_model.").items():
        actual[to_published(name)] = delta
    for name, tensor in expected.items():
        update = actual.pop(name.removesuffix(".weight"), torch.zeros_like(tensor))
        assert update.shape == tensor.shape and torch.allclose(update, tensor, atol=1e-6), name
    assert not actual
    return converted


def to_published(name: str) -> str:
    for comfyui_name, published_name in (
        ("txt_in.t_embedder.in_layer", "txt_in.t_embedder.mlp.0"), ("txt_in.t_embedder.out_layer", "txt_in.t_embedder.mlp.2"),
        ("txt_in.c_embedder.in_layer", "txt_in.c_embedder.linear_1"), ("txt_in.c_embedder.out_layer", "txt_in.c_embedder.linear_2"),
        ("time_in.in_layer", "time_in.mlp.0"), ("time_in.out_layer", "time_in.mlp.2"),
        ("guidance_in.in_layer", "guidance_in.mlp.0"), ("guidance_in.out_layer", "guidance_in.mlp.2"),
    ):  # fmt: skip
        name = published_name if name == comfyui_name else name
    return name


@pytest.mark.parametrize("family", ["wan", "hunyuan"])
def test_adapters_on_every_layer_convert_exactly(family: str) -> None:
    names = list(SIZES[family])
    state = random_adapters(SIZES[family], dict.fromkeys(names, 3))
    converted = check_same_updates(family, state, dict.fromkeys(names, 6.0))
    examples = {
        "wan": ("blocks.1.self_attn.q", "blocks.0.cross_attn.k_img", "blocks.0.ffn.2", "head.head"),
        "hunyuan": ("double_blocks.1.img_attn_qkv", "single_blocks.0.linear1", "double_blocks.0.txt_mlp.fc1"),
    }
    for module in examples[family]:
        assert {
            f"diffusion_model.{module}.{end}" for end in ("lora_A.weight", "lora_B.weight", "alpha")
        } <= converted.keys()
    assert all(
        tensor.shape == () and tensor.dtype == torch.float32 for name, tensor in converted.items() if "alpha" in name
    )
    if family == "hunyuan":
        assert (
            converted["diffusion_model.single_blocks.0.linear1.lora_A.weight"].shape[0] == 12
        )  # four adapters of rank 3
        assert converted["diffusion_model.single_blocks.0.linear1.alpha"] == 24


@settings(max_examples=25)
@given(data=st.data())
def test_any_layers_ranks_and_alphas_convert_exactly(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(sorted(SIZES["hunyuan"])), min_size=1, max_size=8, unique=True))
    ranks = {name: data.draw(st.integers(1, 4)) for name in names}
    alphas = {name: data.draw(st.sampled_from([0.5, 1.0, 4.0])) for name in names}
    check_same_updates("hunyuan", random_adapters(SIZES["hunyuan"], ranks), alphas)


@pytest.mark.parametrize("form", ["{}.lora_{}.weight", "base_model.model.{}.lora_{}.default.weight"])
def test_peft_names_are_accepted(form: str) -> None:
    torch.manual_seed(0)
    plain = random_adapters(SIZES["wan"], {"blocks.0.attn1.to_q": 2})
    torch.manual_seed(0)
    other = random_adapters(SIZES["wan"], {"blocks.0.attn1.to_q": 2}, form)
    first, second = lora_to_comfyui(plain, "wan", 2), lora_to_comfyui(other, "wan", 2)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_tensors_that_are_not_adapters_are_an_error() -> None:
    complete = random_adapters(SIZES["wan"], {"blocks.0.attn1.to_q": 2})
    for state in (
        {"blocks.0.attn1.to_q.weight": torch.ones(2, 2)},
        {name: tensor for name, tensor in complete.items() if "lora_A" in name},
        {name: tensor[:, :1] if "lora_B" in name else tensor for name, tensor in complete.items()},
        {"transformer.stray.lora_A.weight": torch.ones(2, 2), "transformer.stray.lora_B.weight": torch.ones(2, 2)},
    ):
        with pytest.raises(ValueError, match=r"is not|has only|rank"):
            lora_to_comfyui(state, "wan", 1.0)


@settings(max_examples=25)
@given(data=st.data())
def test_fused_adapters_are_split_again(data: st.DataObject) -> None:
    family = data.draw(st.sampled_from(["wan", "hunyuan"]))
    names = data.draw(st.lists(st.sampled_from(sorted(SIZES[family])), min_size=1, max_size=8, unique=True))
    ranks = {name: data.draw(st.integers(1, 4)) for name in names}
    alphas = {name: data.draw(st.sampled_from([0.5, 1.0, 4.0])) for name in names}
    state = random_adapters(SIZES[family], ranks)
    converted = lora_to_comfyui(state, family, alphas)
    restored = lora_to_diffusers(converted, family)
    assert restored is not None
    expected, actual = updates_of(state, alphas, "transformer."), updates_of(restored, ranks, "")
    assert actual.keys() == expected.keys()
    assert all(torch.allclose(actual[name], expected[name], atol=1e-6) for name in expected)
    assert {name: len(restored[f"{name}.lora_A.weight"]) for name in names} == ranks
    assert lora_to_diffusers({**converted, "diffusion_model.x.diff": torch.ones(2)}, family) is None


@pytest.mark.parametrize("model", ["Wan2.1-T2V-14B", "Wan2.1-I2V-14B"])
def test_names_are_those_of_published_loras(model: str) -> None:
    """Compare the default target layers of the published configuration with the names in published LoRAs."""
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in WanTransformer3DModel.from_config(CONFIGS[model]).named_parameters()}
    targets = choose_targets(shapes, runs.train_script("wan2.1").LORA_TARGETS, None)
    layers = {name: shapes[f"{name}.weight"] for name in targets if name.split(".")[1] in ("28", "33", "34")}
    converted, published_names = (
        lora_to_comfyui(random_adapters(layers, dict.fromkeys(layers, 1)), "wan", 1.0),
        set(NAMES[model]["names"]),
    )
    assert published_names <= converted.keys()

    if (
        model == "Wan2.1-T2V-14B"
    ):  # no other names, except alphas: that LoRA has none, since its alphas equal the ranks
        published_name, other_names = (
            {re.sub(r"\d+", "#", name, count=1) for name in names} for names in (converted, published_names)
        )
        assert {name for name in published_name - other_names if not name.endswith(".alpha")} == {
            "diffusion_model.blocks.#.self_attn.v.lora_A.weight"  # the recorded list of names was cut here
        }


def test_comfyui_names_are_read() -> None:
    published_names = NAMES["HunyuanVideo"]["names"]
    width = {"img_attn.qkv": 12, "txt_attn.qkv": 12, "img_mlp.0": 16, "img_mod.lin": 24}
    state = {}
    for name in published_names:
        module = name.removeprefix("diffusion_model.double_blocks.15.").partition(".lora")[0]
        out, inputs = width.get(module, 4), 16 if module == "img_mlp.2" else 4
        state[name] = torch.randn((2, inputs) if "down" in name else (out, 2))
    actual = lora_to_diffusers(state, "hunyuan")
    assert actual is not None
    attention = [f"attn.{layer}" for layer in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")]
    other_names = ["attn.to_out.0", "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "norm1.linear"]
    assert {name.partition(".lora_")[0] for name in actual} == {
        f"transformer_blocks.15.{layer}" for layer in (*attention, *other_names)
    }
    fused = state["diffusion_model.double_blocks.15.img_attn.qkv.lora_up.weight"]
    fused = fused @ state["diffusion_model.double_blocks.15.img_attn.qkv.lora_down.weight"]
    key = "transformer_blocks.15.attn.to_k.lora_{}.weight"
    assert torch.allclose(actual[key.format("B")] @ actual[key.format("A")], fused[4:8])


@pytest.mark.parametrize(("family", "pipeline"), [("wan", WanPipeline), ("hunyuan", HunyuanVideoPipeline)])
def test_diffusers_reads_the_converted_lora(family: str, pipeline: type) -> None:
    """diffusers' own converter of such files finds the same modules and the same updates.

    Its converter for HunyuanVideo fails for alphas. They have no effect if they equal the ranks, and are left out for
    it.
    """
    names = [n for n in SIZES[family] if ".attn1." in n or (".attn." in n and n.startswith("transformer_blocks"))]
    state = random_adapters(SIZES[family], dict.fromkeys(names, 4))
    alphas = dict.fromkeys(names, 8.0 if family == "wan" else 4.0)
    converted = lora_to_comfyui(state, family, alphas)
    restored = pipeline.lora_state_dict(
        {k: v for k, v in converted.items() if family == "wan" or not k.endswith(".alpha")}
    )
    expected = updates_of(state, alphas, "transformer.")
    actual = {
        n: restored[f"transformer.{n}.lora_B.weight"] @ restored[f"transformer.{n}.lora_A.weight"] for n in expected
    }
    assert len(restored) == 2 * len(expected)
    assert all(torch.allclose(actual[name], expected[name]) for name in expected)
