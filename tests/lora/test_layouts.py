"""Serves videox/lora_layouts.py: the change of every weight is the same under the other program's names."""

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

from videox.lora.adapters import choose_targets
from videox.lora.layouts import lora_to_comfyui, lora_to_diffusers

DATA = Path(__file__).parents[1] / "data"
CONFIGS = json.loads((DATA / "transformers.json").read_text(encoding="utf-8"))
NAMES = json.loads((DATA / "lora_names.json").read_text(encoding="utf-8"))
Sizes = dict[str, tuple[int, ...]]


def linears(family: str) -> Sizes:
    """Returns the weight shapes of a tiny transformer's linear layers, by diffusers' names."""
    script, make = {
        "wan": ("scripts/demo_model.py", "wan_components"),
        "hunyuan": ("scripts/demo_hunyuan.py", "hunyuan_components"),
    }[family]
    components = getattr(tiny.load_script(script), make)(**({"image_dim": 32} if family == "wan" else {}))
    modules = components["transformer"].named_modules()
    return {name: tuple(m.weight.shape) for name, m in modules if isinstance(m, torch.nn.Linear)}


SIZES = {family: linears(family) for family in ("wan", "hunyuan")}


def adapter(shapes: Sizes, ranks: dict[str, int], form: str = "transformer.{}.lora_{}.weight") -> dict[str, Tensor]:
    made = {}
    for name, rank in ranks.items():
        made[form.format(name, "A")] = torch.randn(rank, shapes[name][1], dtype=torch.float64)
        made[form.format(name, "B")] = torch.randn(shapes[name][0], rank, dtype=torch.float64)
    return made


def changes(state: dict[str, Tensor], alphas: dict[str, float], prefix: str) -> dict[str, Tensor]:
    """Returns alpha / rank * B A of every module, by name."""
    found = {}
    for name, a in state.items():
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            key = module.removeprefix(prefix)
            alpha = alphas[key] if alphas else state[f"{module}.alpha"].item()
            found[key] = alpha / len(a) * state[f"{module}.lora_B.weight"] @ a
    return found


def assert_same_change(family: str, state: dict[str, Tensor], alphas: dict[str, float]) -> dict[str, Tensor]:
    """Checks the change of the whole model, laid out as its maker has it, and returns what ComfyUI gets."""
    split = {f"{name}.weight": torch.zeros(shape, dtype=torch.float64) for name, shape in SIZES[family].items()}
    split |= {f"{name}.weight": delta for name, delta in changes(state, alphas, "transformer.").items()}
    wanted = originals.rebuilt(split, family)
    made = lora_to_comfyui(state, family, alphas)
    found = {}
    for name, delta in changes(made, {}, "diffusion_model.").items():
        found[published(name)] = delta
    for name, tensor in wanted.items():
        change = found.pop(name.removesuffix(".weight"), torch.zeros_like(tensor))
        assert change.shape == tensor.shape and torch.allclose(change, tensor, atol=1e-6), name
    assert not found
    return made


def published(name: str) -> str:
    for theirs, ours in (
        ("txt_in.t_embedder.in_layer", "txt_in.t_embedder.mlp.0"), ("txt_in.t_embedder.out_layer", "txt_in.t_embedder.mlp.2"),
        ("txt_in.c_embedder.in_layer", "txt_in.c_embedder.linear_1"), ("txt_in.c_embedder.out_layer", "txt_in.c_embedder.linear_2"),
        ("time_in.in_layer", "time_in.mlp.0"), ("time_in.out_layer", "time_in.mlp.2"),
        ("guidance_in.in_layer", "guidance_in.mlp.0"), ("guidance_in.out_layer", "guidance_in.mlp.2"),
    ):  # fmt: skip
        name = ours if name == theirs else name
    return name


@pytest.mark.parametrize("family", ["wan", "hunyuan"])
def test_an_adapter_on_every_layer(family: str) -> None:
    names = list(SIZES[family])
    state = adapter(SIZES[family], dict.fromkeys(names, 3))
    made = assert_same_change(family, state, dict.fromkeys(names, 6.0))
    marks = {
        "wan": ("blocks.1.self_attn.q", "blocks.0.cross_attn.k_img", "blocks.0.ffn.2", "head.head"),
        "hunyuan": ("double_blocks.1.img_attn_qkv", "single_blocks.0.linear1", "double_blocks.0.txt_mlp.fc1"),
    }
    for module in marks[family]:
        assert {
            f"diffusion_model.{module}.{end}" for end in ("lora_A.weight", "lora_B.weight", "alpha")
        } <= made.keys()
    assert all(
        tensor.shape == () and tensor.dtype == torch.float32 for name, tensor in made.items() if "alpha" in name
    )
    if family == "hunyuan":
        assert made["diffusion_model.single_blocks.0.linear1.lora_A.weight"].shape[0] == 12  # four ranks of 3
        assert made["diffusion_model.single_blocks.0.linear1.alpha"] == 24


@settings(max_examples=25)
@given(data=st.data())
def test_any_choice_of_layers_ranks_and_alphas(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(sorted(SIZES["hunyuan"])), min_size=1, max_size=8, unique=True))
    ranks = {name: data.draw(st.integers(1, 4)) for name in names}
    alphas = {name: data.draw(st.sampled_from([0.5, 1.0, 4.0])) for name in names}
    assert_same_change("hunyuan", adapter(SIZES["hunyuan"], ranks), alphas)


@pytest.mark.parametrize("form", ["{}.lora_{}.weight", "base_model.model.{}.lora_{}.default.weight"])
def test_pefts_own_names_are_known(form: str) -> None:
    torch.manual_seed(0)
    plain = adapter(SIZES["wan"], {"blocks.0.attn1.to_q": 2})
    torch.manual_seed(0)
    other = adapter(SIZES["wan"], {"blocks.0.attn1.to_q": 2}, form)
    one, two = lora_to_comfyui(plain, "wan", 2), lora_to_comfyui(other, "wan", 2)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_what_is_no_adapter_is_refused() -> None:
    whole = adapter(SIZES["wan"], {"blocks.0.attn1.to_q": 2})
    for state in (
        {"blocks.0.attn1.to_q.weight": torch.ones(2, 2)},
        {name: tensor for name, tensor in whole.items() if "lora_A" in name},
        {name: tensor[:, :1] if "lora_B" in name else tensor for name, tensor in whole.items()},
        {"transformer.stray.lora_A.weight": torch.ones(2, 2), "transformer.stray.lora_B.weight": torch.ones(2, 2)},
    ):
        with pytest.raises(ValueError, match=r"is not|has only|rank"):
            lora_to_comfyui(state, "wan", 1.0)


@settings(max_examples=25)
@given(data=st.data())
def test_what_was_fused_comes_apart(data: st.DataObject) -> None:
    family = data.draw(st.sampled_from(["wan", "hunyuan"]))
    names = data.draw(st.lists(st.sampled_from(sorted(SIZES[family])), min_size=1, max_size=8, unique=True))
    ranks = {name: data.draw(st.integers(1, 4)) for name in names}
    alphas = {name: data.draw(st.sampled_from([0.5, 1.0, 4.0])) for name in names}
    state = adapter(SIZES[family], ranks)
    made = lora_to_comfyui(state, family, alphas)
    back = lora_to_diffusers(made, family)
    assert back is not None
    wanted, found = changes(state, alphas, "transformer."), changes(back, ranks, "")
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], wanted[name], atol=1e-6) for name in wanted)
    assert {name: len(back[f"{name}.lora_A.weight"]) for name in names} == ranks
    assert lora_to_diffusers({**made, "diffusion_model.x.diff": torch.ones(2)}, family) is None


@pytest.mark.parametrize("model", ["Wan2.1-T2V-14B", "Wan2.1-I2V-14B"])
def test_names_are_those_of_loras_that_others_made(model: str) -> None:
    """The layers that are adapted by default, of the real configuration, and names that were seen in the wild."""
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in WanTransformer3DModel.from_config(CONFIGS[model]).named_parameters()}
    targets = choose_targets(shapes, runs.train_script("wan2.1").ADAPTED, None)
    layers = {name: shapes[f"{name}.weight"] for name in targets if name.split(".")[1] in ("28", "33", "34")}
    made, seen = lora_to_comfyui(adapter(layers, dict.fromkeys(layers, 1)), "wan", 1.0), set(NAMES[model]["names"])
    assert seen <= made.keys()

    if model == "Wan2.1-T2V-14B":  # nothing else, but for the alphas: in that LoRA they are the ranks
        ours, others = ({re.sub(r"\d+", "#", name, count=1) for name in names} for names in (made, seen))
        assert {name for name in ours - others if not name.endswith(".alpha")} == {
            "diffusion_model.blocks.#.self_attn.v.lora_A.weight"  # where the list was cut
        }


def test_comfyuis_own_names_are_read() -> None:
    seen = NAMES["HunyuanVideo"]["names"]
    width = {"img_attn.qkv": 12, "txt_attn.qkv": 12, "img_mlp.0": 16, "img_mod.lin": 24}
    state = {}
    for name in seen:
        module = name.removeprefix("diffusion_model.double_blocks.15.").partition(".lora")[0]
        out, inputs = width.get(module, 4), 16 if module == "img_mlp.2" else 4
        state[name] = torch.randn((2, inputs) if "down" in name else (out, 2))
    found = lora_to_diffusers(state, "hunyuan")
    assert found is not None
    attention = [f"attn.{layer}" for layer in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")]
    others = ["attn.to_out.0", "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "norm1.linear"]
    assert {name.partition(".lora_")[0] for name in found} == {
        f"transformer_blocks.15.{layer}" for layer in (*attention, *others)
    }
    fused = state["diffusion_model.double_blocks.15.img_attn.qkv.lora_up.weight"]
    fused = fused @ state["diffusion_model.double_blocks.15.img_attn.qkv.lora_down.weight"]
    key = "transformer_blocks.15.attn.to_k.lora_{}.weight"
    assert torch.allclose(found[key.format("B")] @ found[key.format("A")], fused[4:8])


@pytest.mark.parametrize(("family", "pipeline"), [("wan", WanPipeline), ("hunyuan", HunyuanVideoPipeline)])
def test_diffusers_reads_it_back(family: str, pipeline: type) -> None:
    """diffusers has a converter for such files: it finds the same modules and the same change.

    That of HunyuanVideo stumbles over alphas, which say nothing where they equal the ranks, and are left out for it.
    """
    names = [n for n in SIZES[family] if ".attn1." in n or (".attn." in n and n.startswith("transformer_blocks"))]
    state = adapter(SIZES[family], dict.fromkeys(names, 4))
    alphas = dict.fromkeys(names, 8.0 if family == "wan" else 4.0)
    made = lora_to_comfyui(state, family, alphas)
    back = pipeline.lora_state_dict({k: v for k, v in made.items() if family == "wan" or not k.endswith(".alpha")})
    wanted = changes(state, alphas, "transformer.")
    found = {n: back[f"transformer.{n}.lora_B.weight"] @ back[f"transformer.{n}.lora_A.weight"] for n in wanted}
    assert len(back) == 2 * len(wanted)
    assert all(torch.allclose(found[name], wanted[name]) for name in wanted)
