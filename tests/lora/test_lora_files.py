"""Tests of videox.lora.reader: files of one set of adapters in every layout give bit-identical adapters."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import diffusers
import lora_files
import peft
import pytest
import runs
import safetensors.torch
import torch
from exports import export, header, refusal
from lora_files import RANK, SCALE, TABLES, Source, make_source, write
from safetensors.torch import load_file, save_file
from torch import Tensor

from videox.errors import UserError
from videox.lora.adapters import Lora, initial_values, peft_name
from videox.lora.convert import to_layout
from videox.lora.initial import init_from_lora
from videox.lora.names import _flatten, _modules, find_module
from videox.lora.reader import find_lora, lora_family, lora_file, read_lora
from videox.weights.layout_tables import COMFYUI_HUNYUAN
from videox.weights.layout_tables import TABLES as MODULE_TABLES
from videox.weights.layouts import family_of
from videox.weights.safetensors_io import StoredTensors

WAN, I2V, HUNYUAN = "wan t2v", "wan i2v", "hunyuan t2v"
PIPELINES = {"wan": diffusers.WanPipeline, "hunyuan": diffusers.HunyuanVideoPipeline}
SETTINGS = {"r": RANK, "lora_alpha": SCALE * RANK, "target_modules": ["to_q"]}


def by_table(layout: str, source: Source, path: Path, **names: bool) -> Path:
    return write(source, layout, path / "lora.safetensors", **names)


def by_diffusers(source: Source, path: Path) -> Path:
    """Let diffusers write its own file, with alpha in the header."""
    layers = {}
    for name, (a, b) in source.adapters.items():
        layers |= {f"{name}.lora_A.weight": a.clone(), f"{name}.lora_B.weight": b}
    PIPELINES[source.family].save_lora_weights(path, layers, transformer_lora_adapter_metadata=SETTINGS)
    return path


def peft_model(source: Source, *, diffusers_names: bool, **settings: object) -> peft.PeftModel:
    layers = source.adapters if diffusers_names else source.published()
    config = peft.LoraConfig(r=RANK, lora_alpha=SCALE * RANK, target_modules=list(layers), **settings)
    model = peft.get_peft_model(lora_files.empty_model(layers), config)
    for name, (a, b) in layers.items():
        layer = model.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(a)
        layer.lora_B["default"].weight.data.copy_(b)
    return model


def by_peft(source: Source, path: Path, *, diffusers_names: bool = False) -> Path:
    """Let peft write its folder: adapter_model.safetensors, and alpha in adapter_config.json."""
    peft_model(source, diffusers_names=diffusers_names).save_pretrained(path)
    return path


def by_injection(source: Source, path: Path) -> Path:
    """Save the trainable tensors of peft's injected layers, as DiffSynth-Studio does; there alpha is the rank."""
    scaled = Source(source.kind, source.folder, {name: (a, SCALE * b) for name, (a, b) in source.adapters.items()})
    model = peft_model(scaled, diffusers_names=False).base_model.model
    tensors = {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}
    save_file(tensors, path / "epoch-0.safetensors")
    return path  # the folder has one LoRA


DIFFUSERS, COMFYUI = {"diffusers_names": True}, {"comfyui_names": True}
FIRST, LAST = (".0.",), (".1.",)  # blocks
FILES = {  # name -> kind of model, parts of the names of the adapted layers (all: none), writer
    "diffusers": (WAN, (), by_diffusers),
    "diffusers, i2v": (I2V, (), by_diffusers),
    "diffusers, HunyuanVideo": (HUNYUAN, (), by_diffusers),
    "diffusers, one block": (WAN, LAST, by_diffusers),
    "diffusion-pipe": (WAN, (), partial(by_table, "diffusion-pipe, ai-toolkit")),
    "ai-toolkit, i2v": (I2V, (), partial(by_table, "diffusion-pipe, ai-toolkit")),
    "ai-toolkit, one block": (WAN, LAST, partial(by_table, "diffusion-pipe, ai-toolkit")),
    "diffusion-pipe, HunyuanVideo": (HUNYUAN, (), partial(by_table, "diffusion-pipe, HunyuanVideo")),
    "dots, alpha": (WAN, (), partial(by_table, "dotted down/up")),
    "dots, alpha, i2v, one block": (I2V, FIRST, partial(by_table, "dotted down/up")),
    "dots, alpha, ComfyUI's names": (HUNYUAN, (), partial(by_table, "dotted down/up", **COMFYUI)),
    "dots, alpha, no prefix": (WAN, (), partial(by_table, "dotted down/up, no prefix")),
    "dots and underscores": (WAN, (), partial(by_table, "mixed separators")),
    "musubi": (WAN, (), partial(by_table, "musubi-tuner")),
    "musubi, i2v": (I2V, (), partial(by_table, "musubi-tuner")),
    "musubi, last block": (WAN, LAST, partial(by_table, "musubi-tuner")),
    "musubi, attention": (WAN, ("attn",), partial(by_table, "musubi-tuner")),
    "musubi, HunyuanVideo": (HUNYUAN, (), partial(by_table, "musubi-tuner")),
    "musubi, HunyuanVideo, single blocks": (HUNYUAN, ("single_",), partial(by_table, "musubi-tuner")),
    "kohya, ComfyUI's names": (HUNYUAN, LAST, partial(by_table, "musubi-tuner", **COMFYUI)),
    "VideoX-Fun": (WAN, (), partial(by_table, "VideoX-Fun network")),
    "VideoX-Fun, i2v": (I2V, (), partial(by_table, "VideoX-Fun network")),
    "VideoX-Fun, HunyuanVideo": (HUNYUAN, (), partial(by_table, "VideoX-Fun network", **DIFFUSERS)),
    "VideoX-Fun, peft": (WAN, FIRST, partial(by_table, "VideoX-Fun peft")),
    "VideoX-Fun, peft, for ComfyUI": (WAN, (), partial(by_table, "VideoX-Fun peft, for ComfyUI")),
    "DiffSynth": (WAN, (), by_injection),
    "DiffSynth, i2v, one block": (I2V, LAST, by_injection),
    "DiffSynth, by its names": (I2V, (), partial(by_table, "DiffSynth-Studio")),
    "peft": (WAN, (), by_peft),
    "peft, i2v, one block": (I2V, FIRST, by_peft),
    "peft, HunyuanVideo, diffusers' names": (HUNYUAN, (), partial(by_peft, diffusers_names=True)),
    "peft, HunyuanVideo, fused": (HUNYUAN, LAST, by_peft),
    "compiled": (WAN, (), partial(by_table, "compiled, dotted")),
    "compiled, kohya": (I2V, (), partial(by_table, "compiled, kohya")),
    "compiled blocks": (HUNYUAN, (), partial(by_table, "compiled blocks, kohya")),
    "OneTrainer": (HUNYUAN, (), partial(by_table, "OneTrainer", **DIFFUSERS)),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    return {kind: make_source(kind, tmp_path_factory.mktemp("model")) for kind in lora_files.BUILDERS}


def read(path: Path, pipeline: str, family: str | None = None) -> tuple[dict[str, Tensor], float]:
    return read_lora(path, PIPELINES[pipeline].lora_state_dict, where="--init_lora_from", family=family)


def check_equal(adapters: dict[str, Tensor], scale: float, source: Source) -> None:
    """Check that what was read is bit-identical to the adapters of the source."""
    names = {name.split(".lora_")[0] for name in adapters}
    assert names == source.adapters.keys()
    for name, (a, b) in source.adapters.items():
        assert torch.equal(adapters[f"{name}.lora_A.weight"], a), name
        assert torch.equal(scale * adapters[f"{name}.lora_B.weight"], SCALE * b), name


@pytest.mark.parametrize("name", FILES)
def test_every_layout_is_read_as_the_same_adapters(sources: dict[str, Source], tmp_path: Path, name: str) -> None:
    kind, parts, writer = FILES[name]
    source = sources[kind].keep(*parts) if parts else sources[kind]
    path = writer(source, tmp_path)
    adapters, scale = read(path, source.family)
    check_equal(adapters, scale, source)
    file = path if path.is_file() else next(path.glob("*.safetensors"))
    assert lora_family(file) == source.family and lora_file(file) == file


def test_the_matrix_has_thirty_files_in_eight_layouts() -> None:
    assert len(FILES) >= 30
    rows = {writer.args[0] for _, _, writer in FILES.values() if isinstance(writer, partial) and writer.args}
    assert rows == TABLES["layouts"].keys()  # each row of the table is used


@pytest.mark.parametrize("name", FILES)
def test_exported_to_three_layouts_and_back_nothing_changes(
    sources: dict[str, Source], tmp_path: Path, name: str
) -> None:
    kind, parts, writer = FILES[name]
    source = sources[kind].keep(*parts) if parts else sources[kind]
    adapters, scale = read(writer(source, tmp_path), source.family)
    for layout in ("diffusers", "comfyui", "kohya"):
        path = tmp_path / f"{layout}.safetensors"
        save_file(
            {n: t.contiguous().clone() for n, t in to_layout(adapters, scale, source.family, layout).items()}, path
        )
        check_equal(*read(path, source.family), source)


def test_the_modules_of_the_tables_are_those_of_the_reader() -> None:
    """Every name of every table is found, and no two modules have the same name with underscores."""
    for family in ("wan", "hunyuan"):
        for old, new in TABLES["modules"][family]["names"].items():
            found = find_module(old.replace("#", "17"), family)
            assert found is not None and found.published and found.name == old.replace("#", "17")
            assert all(find_module(part.replace("#", "3"), family) for part in new)
        templates = [*MODULE_TABLES[family]]
        flat = [_flatten(name) for name in templates]
        assert len(set(flat)) == len(flat)
        assert len(_modules(family)) >= len(flat)
    own = {_flatten(name): published for name, published in COMFYUI_HUNYUAN.items()}
    assert all(_modules("hunyuan")[name].name == published for name, published in own.items())


@pytest.mark.parametrize("converter", ["musubi", "dotted"])
def test_diffusers_own_converters_find_the_same_updates(
    sources: dict[str, Source], tmp_path: Path, converter: str
) -> None:
    """diffusers converts whole Wan files of these layouts; it scales A, so the products are compared."""
    layout = {"musubi": "musubi-tuner", "dotted": "dotted down/up"}[converter]
    for kind in (WAN, I2V):
        path = write(sources[kind], layout, tmp_path / "lora.safetensors")
        theirs = diffusers.WanPipeline.lora_state_dict(tmp_path, weight_name=path.name)
        adapters, scale = read(path, "wan")
        assert theirs.keys() == {f"transformer.{name}" for name in adapters}
        for name in sources[kind].adapters:
            ours = scale * adapters[f"{name}.lora_B.weight"] @ adapters[f"{name}.lora_A.weight"]
            a, b = (theirs[f"transformer.{name}.lora_{half}.weight"] for half in "AB")
            assert torch.allclose(b @ a, ours, atol=1e-5), name
        kohya = to_layout(adapters, scale, "wan", "kohya")
        assert kohya.keys() == load_file(path).keys() if converter == "musubi" else kohya


def test_peft_settings_give_each_module_its_scale(sources: dict[str, Source], tmp_path: Path) -> None:
    source = sources[WAN]
    patterns = {"alpha_pattern": {"blocks.0.self_attn.q": 12, "ffn.2": 2}}
    peft_model(source, diffusers_names=False, use_rslora=True, **patterns).save_pretrained(tmp_path)
    adapters, factor = read(tmp_path, "wan")
    scales = {"blocks.0.attn1.to_q": 12, "blocks.0.ffn.net.2": 2, "blocks.1.ffn.net.2": 2}
    for name, (a, b) in source.adapters.items():
        expected = scales.get(name, SCALE * RANK) / RANK**0.5 * b
        assert torch.allclose(factor * adapters[f"{name}.lora_B.weight"], expected)
        assert torch.equal(adapters[f"{name}.lora_A.weight"], a)


# ---------------------------------------------------------------------------------------------------- what is refused


def write_names(names: list[str], path: Path, metadata: dict[str, str] | None = None) -> Path:
    save_file({name: torch.ones(2, 2) for name in names}, path, metadata=metadata)
    return path


@pytest.mark.parametrize("kind", [kind for kind in TABLES["other_kinds"] if kind != "source"])
def test_other_kinds_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = write_names(TABLES["other_kinds"][kind], tmp_path / "other.safetensors")
    for family in ("wan", "hunyuan"):
        with pytest.raises(UserError) as refused:
            read(path, family, family=family)
        assert kind in refused.value.what and str(path) in refused.value.what and refused.value.exit_code == 4
    is_lora = any("lora_" in name.split("_blocks")[-1] for name in TABLES["other_kinds"][kind])
    if is_lora or kind in ("LoKr", "LoHa"):
        assert lora_file(path) == path


@pytest.mark.parametrize("kind", ["LoKr", "LoHa", "DoRA"])
def test_other_kinds_of_peft_are_refused_by_name(sources: dict[str, Source], tmp_path: Path, kind: str) -> None:
    layers = sources[WAN].keep("attn1").published()
    config = {
        "LoKr": peft.LoKrConfig(r=2, target_modules=list(layers)),
        "LoHa": peft.LoHaConfig(r=2, target_modules=list(layers)),
        "DoRA": peft.LoraConfig(r=2, target_modules=list(layers), use_dora=True),
    }[kind]
    peft.get_peft_model(lora_files.empty_model(layers), config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"is a {kind}.*extract_lora"):
        read(tmp_path, "wan")


def test_loras_of_other_models_are_refused(sources: dict[str, Source], tmp_path: Path) -> None:
    """FLUX.1 has the names and widths of HunyuanVideo: only the header tells them apart."""
    path = write(sources[HUNYUAN], "musubi-tuner", tmp_path / "flux.safetensors")
    save_file(load_file(path), path, metadata={"ss_base_model_version": "flux1", "format": "pt"})
    with pytest.raises(UserError, match="is a LoRA of FLUX: its header has ss_base_model_version = flux1"):
        read(path, "hunyuan")
    with pytest.raises(UserError, match="adapts layers that Wan does not have: "):
        read(write(sources[HUNYUAN], "musubi-tuner", path), "wan", family="wan")


def test_damaged_files_are_explained(sources: dict[str, Source], tmp_path: Path) -> None:
    path = write(sources[WAN], "musubi-tuner", tmp_path / "lora.safetensors")
    state = load_file(path)
    half = "lora_unet_blocks_0_ffn_0.lora_up.weight"
    for change, message in (
        ({half: None}, "half of an adapter is missing"),
        ({half: torch.ones(3, RANK + 1)}, "their ranks differ"),
        ({"diffusion_model." + half.removeprefix("lora_unet_"): state[half].clone()}, "the same part of one module"),
        ({"stray": torch.ones(1)}, "belong to no LoRA: stray"),
    ):
        changed = {name: tensor for name, tensor in {**state, **change}.items() if tensor is not None}
        save_file(changed, path)
        with pytest.raises(UserError, match=message):
            read(path, "wan")
    zeros = {
        "diffusion_model.blocks.0.norm3.diff": torch.zeros(4),
        "diffusion_model.blocks.0.norm3.diff_b": torch.zeros(4),
    }
    save_file({**state, **zeros}, path)  # a difference of zero changes nothing
    check_equal(*read(path, "wan"), sources[WAN])
    two = tmp_path / "two"
    two.mkdir()
    for name in ("epoch-0", "epoch-1"):
        write(sources[WAN], "DiffSynth-Studio", two / f"{name}.safetensors")
    with pytest.raises(UserError, match=r"contains 2 LoRAs \(epoch-0.safetensors, epoch-1.safetensors\)"):
        read(two, "wan")
    for name in (half, half.replace("lora_up.weight", "alpha")):
        save_file({**state, name: torch.full_like(state[name], torch.nan)}, path)
        with pytest.raises(UserError, match=r"values that are not finite, in blocks\.0\.ffn\.net\.0\.proj"):
            read(path, "wan")
    with pytest.raises(UserError, match=r"contains no LoRA.*--transformer_path"):
        read(next(sources[WAN].folder.glob("*.safetensors")), "wan")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("kind", [WAN, HUNYUAN])
def test_8_bit_floats_are_read_with_all_their_values(
    sources: dict[str, Source], tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    source = sources[kind]
    pairs = {name: tuple(part.to(dtype).float() for part in pair) for name, pair in source.adapters.items()}
    path = write(source, "musubi-tuner", tmp_path / "lora.safetensors")
    save_file({n: t if n.endswith(".alpha") else t.to(dtype) for n, t in load_file(path).items()}, path)
    adapters, scale = read(path, source.family)
    check_equal({name: t.float() for name, t in adapters.items()}, scale, Source(kind, source.folder, pairs))
    for layout in ("diffusers", "comfyui", "kohya"):  # 8-bit floats can be neither added nor compared
        assert all(t.isfinite().all() for t in to_layout(adapters, scale, source.family, layout).values())


@pytest.mark.parametrize("suffix", [".scale_weight", ".weight_scale"])
@pytest.mark.parametrize("layout", ["musubi-tuner", "diffusion-pipe, ai-toolkit", "OneTrainer"])
def test_8_bit_floats_are_multiplied_by_their_scales(
    sources: dict[str, Source], tmp_path: Path, layout: str, suffix: str
) -> None:
    source = sources[WAN]
    path = write(source, layout, tmp_path / "lora.safetensors", diffusers_names=layout == "OneTrainer")
    stored = load_file(path)
    halves = [name for name in stored if name.endswith(".weight")]
    scales = {f"{name.removesuffix('.weight')}{suffix}": torch.tensor(0.25) for name in halves}
    scaled = {name: (4 * stored[name]).to(torch.float8_e5m2) for name in halves}
    save_file({**stored, **scaled, **scales, "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}, path)
    adapters, scale = read(path, "wan")
    pairs = {}
    for name, (a, b) in source.adapters.items():
        b = b if scale != 1 else SCALE * b  # of a layout without alpha
        pairs[name] = tuple((4 * part).to(torch.float8_e5m2).float() / 4 for part in (a, b))
    for name, (a, b) in pairs.items():
        assert torch.equal(adapters[f"{name}.lora_A.weight"], a) and torch.equal(adapters[f"{name}.lora_B.weight"], b)


def test_other_quantized_values_and_odd_alphas_are_refused(sources: dict[str, Source], tmp_path: Path) -> None:
    path = write(sources[WAN], "musubi-tuner", tmp_path / "lora.safetensors")
    state = load_file(path)
    module = "lora_unet_blocks_0_ffn_0"
    half, alpha = f"{module}.lora_up.weight", f"{module}.alpha"
    eight = {half: state[half].to(torch.float8_e4m3fn)}
    scale = f"{module}.lora_up.scale_weight"
    for change, message in (
        ({half: state[half].to(torch.int8)}, rf"quantized in a way.*: {half} has torch\.int8\. Fix: multiply"),
        ({scale: torch.ones(())}, f"{half} is scaled and has no 8-bit floats"),
        ({**eight, scale: torch.ones(3)}, f"{half} has 3 scales"),
        ({**eight, f"{module}.lora_up.weight_scale_2": torch.ones(3)}, r"with quantized values: .*Fix: multiply"),
        ({alpha: torch.zeros(())}, "has an alpha of 0"),
        ({alpha: torch.ones(2)}, f"{alpha} has 2 values, an alpha has one.*Fix: copy or download"),
        ({half: torch.ones(3, 0), half.replace("up", "down"): torch.ones(0, 3)}, "its rank is 0"),
        ({"diffusion_model.blocks.0.norm3.set_weight": torch.ones(3)}, "whole tensors that replace.*extract_lora"),
    ):
        save_file({**state, **change}, path)
        with pytest.raises(UserError, match=message):
            read(path, "wan")
    save_file({**state, alpha: torch.tensor([2], dtype=torch.int64), f"{module}.comfy_quant": torch.ones(3)}, path)
    check_equal(*read(path, "wan"), sources[WAN])  # SCALE * RANK is 2
    del state[alpha]
    save_file(state, path)  # kohya's networks take the rank for an alpha that a module does not have
    adapters, factor = read(path, "wan")
    b = sources[WAN].adapters["blocks.0.ffn.net.0.proj"][1]
    assert torch.equal(factor * adapters["blocks.0.ffn.net.0.proj.lora_B.weight"], b)


def test_what_a_file_is_instead_of_a_lora_is_named(sources: dict[str, Source], tmp_path: Path) -> None:
    path = write(sources[WAN], "musubi-tuner", tmp_path / "lora.safetensors")
    content = path.read_bytes()
    tensors = safetensors.torch.load(content)  # load_file would map the file, which is overwritten
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"is truncated or damaged \(has .* kB of .* kB\)\. Fix: copy or download"):
        read(path, "wan")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4548\n")
    with pytest.raises(UserError, match=r"is a git-lfs pointer, .*4.55 kB.*run `git lfs pull`"):
        read(path, "wan")
    path.write_text("<!DOCTYPE html><html>Sign in</html>")
    with pytest.raises(UserError, match="is a web page"):
        read(path, "wan")
    torch.save(tensors, path)
    with pytest.raises(UserError, match=r"is a pickle, as torch\.save writes it.*save its tensors as safetensors"):
        read(path, "wan")


# ------------------------------------------------------------------------------------------------------ a run's start


def start(
    source: Source, path: Path, *, rank: int = RANK, alpha: float = RANK, targets: tuple[str, ...] = (),
    expert: str | None = None,
):  # fmt: skip
    """Return the initial values of a run that starts from a file, its new values, and the lines that it prints."""
    stored = StoredTensors(source.folder)
    lora = Lora(rank, alpha, 0.0, targets or tuple(sorted(source.adapters)))
    new, family = initial_values(lora, stored, 7), family_of(stored)
    loader = PIPELINES[source.family].lora_state_dict
    values, lines = init_from_lora(path, new, lora, loader, stored=stored, family=family, expert=expert)
    return values, new, lines


def test_of_a_folder_with_both_experts_the_trained_one_is_taken(sources: dict[str, Source], tmp_path: Path) -> None:
    source, folder = sources[WAN], tmp_path / "both"
    files = {name: folder / f"pytorch_lora_weights_{name}.safetensors" for name in ("high_noise", "low_noise")}
    folder.mkdir()
    for number, (expert, file) in enumerate(files.items()):
        write(source.keep(f".{number}."), "musubi-tuner", file)
        assert lora_file(folder, expert) == find_lora(folder, "--x", expert) == file
    with pytest.raises(UserError, match=f"contains LoRAs of both experts.*pass {files['high_noise']} or"):
        find_lora(folder, "--x")
    for expert, file in files.items():  # as --expert both writes them
        (tmp_path / "runs" / expert).mkdir(parents=True)
        inside = file.rename(tmp_path / "runs" / expert / file.name)
        assert lora_file(tmp_path / "runs", expert) == find_lora(tmp_path / "runs", "--x", expert) == inside
    files["high_noise"] = tmp_path / "runs/high_noise" / files["high_noise"].name
    only = files["high_noise"].rename(folder / files["high_noise"].name)
    assert lora_file(folder) == find_lora(folder, "--x") == only and lora_file(folder, "low_noise") is None


def test_a_start_from_the_lora_of_the_other_expert_is_said(sources: dict[str, Source], tmp_path: Path) -> None:
    path = write(sources[WAN], "musubi-tuner", tmp_path / "lora.safetensors")
    save_file(load_file(path), path, metadata={"expert": "high_noise"})
    note = "note: it was trained as a LoRA of the high_noise expert"
    assert note in start(sources[WAN], path, expert="low_noise")[2]
    assert note not in start(sources[WAN], path, expert="high_noise")[2]


def test_a_partial_lora_leaves_the_rest_at_zero_and_says_so(sources: dict[str, Source], tmp_path: Path) -> None:
    source = sources[WAN]
    path = write(source.keep(".1."), "musubi-tuner", tmp_path / "lora.safetensors")
    values, new, lines = start(source, path)
    for name, (a, b) in source.adapters.items():
        keys = [peft_name(f"{name}.lora_{half}.weight") for half in "AB"]
        if name.startswith("blocks.1."):
            assert torch.equal(values[keys[0]], a) and torch.equal(values[keys[1]], SCALE * b)
        else:
            assert torch.equal(values[keys[0]], new[keys[0]]) and not values[keys[1]].any()
    assert lines == [
        f"starts from the LoRA {path} (kohya's names, 10 layers)",
        "note: 10 of 20 layers are not in it and begin at zero, first blocks.0.attn1.to_k",
    ]


def test_a_lower_rank_is_filled_up_and_a_higher_one_refused(sources: dict[str, Source], tmp_path: Path) -> None:
    source = sources[HUNYUAN]
    path = write(source, "musubi-tuner", tmp_path / "lora.safetensors")
    values, new, lines = start(source, path, rank=6, alpha=3.0)
    for name, (a, b) in source.adapters.items():
        first, second = (values[peft_name(f"{name}.lora_{half}.weight")] for half in "AB")
        assert torch.equal(first[:RANK], a) and torch.equal(
            first[RANK:], new[peft_name(f"{name}.lora_A.weight")][RANK:]
        )
        assert torch.equal(second[:, :RANK], b) and not second[:, RANK:].any()  # both have alpha / rank = 0.5
    assert "of them have a lower rank and are filled up to 6" in lines[0]
    with pytest.raises(UserError, match=r"has rank 4, this run 2\. Fix: pass --lora_rank 4"):
        start(source, path, rank=2)


def test_loras_that_do_not_fit_the_run_are_refused_with_the_flag(sources: dict[str, Source], tmp_path: Path) -> None:
    wan, i2v = sources[WAN], sources[I2V]
    path = write(i2v, "musubi-tuner", tmp_path / "lora.safetensors")
    with pytest.raises(
        UserError, match=r"adapts 4 layers that this model does not have, first blocks\.0\.attn2\.add_k_proj"
    ):
        start(wan, path)
    targets = tuple(name for name in i2v.adapters if "attn1" in name)
    with pytest.raises(
        UserError, match=r"pass --lora_target_modules attn1\.to_k attn1\.to_out\.0 attn1\.to_q"
    ) as refused:
        start(i2v, path, targets=targets)
    assert "tensors that this run does not" in refused.value.what
    wide = {name: (torch.ones(RANK, 2 * a.shape[1]), b) for name, (a, b) in wan.adapters.items()}
    path = write(Source(WAN, wan.folder, wide), "VideoX-Fun peft, for ComfyUI", tmp_path / "wide.safetensors")
    with pytest.raises(UserError, match=r"is of a model with other widths: blocks.0.attn1.to_k has \d+ inputs"):
        start(wan, path)
    lines = start(wan, write(wan, "VideoX-Fun peft, for ComfyUI", path))[2]
    assert lines[0].endswith("(VideoX-Fun's names, 20 layers)") and "it has no alphas, so its scale is 1" in lines[1]


# --------------------------------------------------------------------------------------------------------- a run's end


def test_a_run_starts_from_kohya_and_writes_kohya_at_its_end(sources: dict[str, Source], tmp_path: Path) -> None:
    source = sources[WAN]
    model, metadata = source.folder.parent, runs.tiny.make_dataset(tmp_path / "data")
    start_from = write(source.keep(".1."), "musubi-tuner", tmp_path / "musubi.safetensors")
    flags = {
        "max_train_steps": 1, "checkpointing_steps": 1, "tokenizer_max_length": 16, "lr_warmup_steps": 0,
        "lora_rank": RANK, "lora_alpha": 2 * RANK, "init_lora_from": start_from, "export_dtype": "fp32",
        "export_layouts": ["kohya", "comfyui"], "export_at": "end", "learning_rate": "1e-3",
    }  # fmt: skip
    outcome = runs.train(runs.wan_flags(model, metadata, tmp_path / "my-style", **flags))
    assert outcome.code == 0, outcome.stderr
    assert "10 of 20 layers are not in it and begin at zero" in outcome.stdout
    run = tmp_path / "my-style"
    assert not (run / "checkpoint-1" / "exports").exists()
    files = [run / f"pytorch_lora_weights{end}.safetensors" for end in ("", "_kohya", "_comfyui")]
    first, scale = read(files[0], "wan")
    for file in files[1:]:
        other, factor = read(file, "wan")
        assert factor == scale == 2 and other.keys() == first.keys()
        assert all(torch.equal(other[name], tensor) for name, tensor in first.items())
    check_manager_fields(files, run)
    for layout in ("kohya", "comfyui"):  # from the checkpoint's records
        path = tmp_path / f"{layout}.safetensors"
        export(run / "checkpoint-1", path, "--layout", layout)
        expected = load_file(run / f"pytorch_lora_weights_{layout}.safetensors")
        made = load_file(path)
        assert made.keys() == expected.keys() and all(torch.equal(made[name], expected[name]) for name in made)
        ours, theirs = header(path), header(run / f"pytorch_lora_weights_{layout}.safetensors")
        shared = [name for name in theirs if name.startswith(("ss_", "modelspec.")) and name != "ss_output_name"]
        assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}


def check_manager_fields(files: list[Path], run: Path) -> None:
    """Check the fields that managers read, against the run's own records."""
    asked = json.loads((run / "args.json").read_text(encoding="utf-8"))["asked"]
    size = asked["token_sample_size" if asked["training_with_video_token_length"] else "video_sample_size"]
    for file in files:
        fields = header(file)
        assert TABLES["headers"]["wan"].items() <= fields.items()
        expected = {
            "modelspec.title": f"{fields['base_model']} fine-tuned", "modelspec.resolution": f"{size}x{size}",
            "ss_network_dim": f"{RANK}", "ss_network_alpha": f"{2 * RANK}", "ss_steps": "1",
            "ss_learning_rate": "0.001", "ss_optimizer": asked["optimizer"], "ss_discrete_flow_shift": fields["shift"],
            "ss_output_name": "my-style",
        }  # fmt: skip
        assert expected.items() <= fields.items()
        assert len(fields["modelspec.date"]) == len("2026-01-31")
        assert "modelspec.trigger_phrase" not in fields  # this run has none


def test_kohya_is_a_layout_of_loras_only(sources: dict[str, Source], tmp_path: Path) -> None:
    line = refusal(sources[WAN].folder, tmp_path / "x.safetensors", "--layout", "kohya")
    assert line.startswith("error: --layout: kohya is a layout of LoRAs only")
