"""Tests of scripts/export.py and of a run's own exports: round trips are bit-identical and compute the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import originals
import pytest
import runs
import tiny
import torch
from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel
from exports import export, header, refusal
from safetensors.torch import load_file, save_file

from videox.models.component import find_component, load_component
from videox.run.checkpoint import verify

MODELS: dict[str, tuple[Callable[..., Path], type]] = {
    "wan t2v": (tiny.build_wan_t2v, WanTransformer3DModel),
    "wan i2v": (tiny.build_wan_i2v, WanTransformer3DModel),
    "hunyuan t2v": (tiny.build_hunyuan_t2v, HunyuanVideoTransformer3DModel),
    "hunyuan i2v": (tiny.build_hunyuan_i2v, HunyuanVideoTransformer3DModel),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, type]:
    build, model_class = MODELS[request.param]
    return request.param, build(tmp_path_factory.mktemp("model")) / "transformer", model_class


@pytest.mark.parametrize("layout", ["original", "comfyui"])
def test_round_trip_is_bit_identical(model: tuple[str, Path, type], tmp_path: Path, layout: str) -> None:
    name, folder, model_class = model
    state = originals.weights(folder)
    assert export(folder, tmp_path / "out.safetensors", "--layout", layout, "--verify") == 0
    prefix = "model.diffusion_model." if layout == "comfyui" else ""
    wanted = originals.rebuilt(state, "wan" if name.startswith("wan") else "hunyuan")
    stored = load_file(tmp_path / "out.safetensors")
    assert stored.keys() == {f"{prefix}{key}" for key in wanted}
    assert all(torch.equal(stored[f"{prefix}{key}"], tensor) for key, tensor in wanted.items())
    other, config = {"original": "comfyui", "comfyui": "original"}[layout], ["--config", folder / "config.json"]
    export(tmp_path / "out.safetensors", tmp_path / "other.safetensors", "--layout", other, *config)
    again = load_file(tmp_path / "other.safetensors")
    bare = {key.removeprefix("model.diffusion_model."): tensor for key, tensor in again.items()}
    assert bare.keys() == wanted.keys() and all(torch.equal(bare[key], tensor) for key, tensor in wanted.items())
    assert export(tmp_path / "out.safetensors", tmp_path / "back", "--layout", "diffusers", *config) == 0
    again = model_class.from_pretrained(tmp_path / "back")
    original = model_class.from_pretrained(folder)
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in original.state_dict().items())
    configs = [json.loads(loaded.to_json_string()) for loaded in (again, original)]
    configs = [{key: value for key, value in config.items() if key != "_name_or_path"} for config in configs]
    assert configs[0] == configs[1]


def test_fused_single_block_computes_the_same_as_the_split_one() -> None:
    """The original has one matmul for q, k, v and mlp, and shift before scale; both are computed by its definition."""
    components = tiny.load_script("scripts/demo_hunyuan.py").hunyuan_components()
    transformer = components["transformer"]
    fused = originals.rebuilt(transformer.state_dict(), "hunyuan")
    width, x = transformer.config.num_attention_heads * transformer.config.attention_head_dim, torch.randn(1, 5, 24)
    assert width == 24
    block = transformer.single_transformer_blocks[1]
    q, k, v, mlp = torch.nn.functional.linear(
        x, fused["single_blocks.1.linear1.weight"], fused["single_blocks.1.linear1.bias"]
    ).split([width, width, width, int(width * transformer.config.mlp_ratio)], -1)
    parts = (block.attn.to_q, block.attn.to_k, block.attn.to_v, block.proj_mlp)
    for found, part in zip((q, k, v, mlp), parts, strict=True):
        assert torch.allclose(found, part(x), atol=1e-6)
    shift, scale = torch.nn.functional.linear(
        torch.nn.functional.silu(x[:, 0]),
        fused["final_layer.adaLN_modulation.1.weight"],
        fused["final_layer.adaLN_modulation.1.bias"],
    ).chunk(2, -1)
    normed = torch.nn.functional.layer_norm(x, (width,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    assert torch.allclose(transformer.norm_out(x, x[:, 0]), normed, atol=1e-5)


def test_fused_double_block_attention_is_split_correctly() -> None:
    """Compare q, k and v of image and text, from the published fused weight and from diffusers' projections."""
    transformer = tiny.load_script("scripts/demo_hunyuan.py").hunyuan_components()["transformer"]
    with torch.no_grad():
        for parameter in transformer.parameters():  # norms and biases too
            parameter.add_(
                0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    fused, x = originals.rebuilt(transformer.state_dict(), "hunyuan"), torch.randn(1, 5, 24)
    attention = transformer.transformer_blocks[1].attn
    for stream, names, norms in (
        ("img", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k")),
        ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")),
    ):
        prefix = f"double_blocks.1.{stream}_attn_"
        q, k, v = torch.nn.functional.linear(x, fused[f"{prefix}qkv.weight"], fused[f"{prefix}qkv.bias"]).chunk(3, -1)
        parts = [getattr(attention, name)(x) for name in names]
        assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip((q, k, v), parts, strict=True))
        for part, norm, name in zip((q, k), norms, "qk", strict=True):
            heads = part.unflatten(-1, (attention.heads, -1))
            wanted = torch.nn.functional.rms_norm(heads, heads.shape[-1:], fused[f"{prefix}{name}_norm.weight"], 1e-6)
            assert torch.allclose(getattr(attention, norm)(heads), wanted, atol=1e-5)


@pytest.mark.parametrize("image_dim", [None, 32])
def test_published_names_compute_the_same_as_the_model(image_dim: int | None) -> None:
    """Wan computed from published weights by its modules' definitions: exchanging any two names changes the output."""
    sizes = {"image_dim": image_dim, "condition_channels": 20} if image_dim else {}
    transformer = tiny.load_script("scripts/demo_model.py").wan_components(**sizes)["transformer"]
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw))
    w, config = originals.rebuilt(transformer.state_dict(), "wan"), transformer.config
    x = torch.randn(2, config.in_channels, 3, 4, 6, generator=draw)
    t, text = torch.tensor([37.0, 901.0]), torch.randn(2, 512, config.text_dim, generator=draw)
    image = torch.randn(2, 257, image_dim, generator=draw) if image_dim else None
    sizes = {"layers": config.num_layers, "heads": config.num_attention_heads}
    with torch.no_grad():
        wanted = transformer(x, t, text, image).sample
        assert torch.allclose(originals.wan_forward(w, x, t, text, image, **sizes), wanted, rtol=1e-4, atol=1e-3)
        # Of the blocks only the last one is changed.
        for name in (name for name in w if not name.startswith("blocks.0.")):
            moved = {**w, name: w[name] + torch.randn(w[name].shape, generator=draw)}
            found = originals.wan_forward(moved, x, t, text, image, **sizes)
            assert (found - wanted).abs().max() > 0.01, name


def test_dtype_and_float32_modules_match_from_pretrained(model: tuple[str, Path, type], tmp_path: Path) -> None:
    _, folder, model_class = model
    export(folder, tmp_path / "half", "--layout", "diffusers", "--dtype", "bf16")
    half = model_class.from_pretrained(folder, torch_dtype=torch.bfloat16).state_dict()
    stored = originals.weights(tmp_path / "half")
    assert all(torch.equal(stored[key], half[key]) and stored[key].dtype == half[key].dtype for key in half)
    export(folder, tmp_path / "half.safetensors", "--layout", "original", "--dtype", "fp16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "half.safetensors").values()} == {torch.float16}


def test_8_bit_weights_are_exported_as_bf16(tmp_path: Path) -> None:
    folder = tiny.build_wan_t2v(tmp_path / "model") / "transformer"
    state = originals.rebuilt(originals.weights(folder), "wan")
    stored = {name: t.to(torch.float8_e4m3fn) if t.ndim == 2 else t.to(torch.bfloat16) for name, t in state.items()}
    save_file({**stored, "blocks.0.ffn.0.scale_weight": torch.tensor(2.0)}, tmp_path / "fp8.safetensors")
    export(tmp_path / "fp8.safetensors", tmp_path / "out", "--layout", "diffusers", "--config", folder / "config.json")
    found = originals.weights(tmp_path / "out")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert torch.equal(found["blocks.0.ffn.net.0.proj.weight"], 2 * stored["blocks.0.ffn.0.weight"].bfloat16())


def test_nothing_is_overwritten_and_failures_leave_nothing(tmp_path: Path) -> None:
    folder = tiny.build_wan_t2v(tmp_path / "model") / "transformer"
    (tmp_path / "there.safetensors").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("")
    assert "exists" in refusal(folder, tmp_path / "there.safetensors", "--layout", "original")
    assert "not the name of a .safetensors" in refusal(folder, tmp_path / "name", "--layout", "original")
    assert "not empty" in refusal(folder, tmp_path / "full", "--layout", "diffusers")
    state = load_file(next(folder.glob("*.safetensors")))
    key = "blocks.0.ffn.net.0.proj.weight"
    save_file({**state, key: torch.full_like(state[key], 1e38)}, next(folder.glob("*.safetensors")))
    assert "not finite" in refusal(folder, tmp_path / "out.safetensors", "--layout", "original", "--dtype", "fp16")
    assert {path.name for path in tmp_path.iterdir()} == {"there.safetensors", "full", "model"}


def test_output_inside_the_source_or_a_checkpoint_is_refused(run: runs.Outcome, tmp_path: Path) -> None:
    checkpoint = run.folder / "checkpoint-1"
    for source, place in (
        (checkpoint, checkpoint / "transformer"),
        (checkpoint / "transformer", checkpoint),
        (run.folder / "transformer_original.safetensors", checkpoint / "new"),
        (run.folder / "transformer", run.folder / "transformer"),
    ):
        assert "is inside" in refusal(source, place / "out.safetensors", "--layout", "original")
    line = refusal(checkpoint, tmp_path / "q.safetensors", "--layout", "diffusers")
    assert line.startswith("error: output: ") and "pass a folder" in line
    assert refusal(checkpoint, checkpoint / "new", "--layout", "diffusers").startswith("error: output: ")
    assert verify(checkpoint, hashes=True) == [] and not list(tmp_path.iterdir())


def test_wrong_flags_are_named(tmp_path: Path) -> None:
    folder, out = tiny.build_wan_t2v(tmp_path / "model") / "transformer", tmp_path / "out.safetensors"
    assert refusal(folder, out, "--layut", "comfyui") == (
        "error: --layut: is not a flag of this script. Fix: did you mean --layout."
    )
    assert refusal(folder, out, "--layout", "comfy").startswith("error: --layout: invalid choice")
    line = refusal(folder, out, "--layout", "original", "--config", tmp_path / "nope")
    assert line.startswith("error: --config: ") and "is not a file" in line


def test_unwritable_output_is_reported(tmp_path: Path) -> None:
    folder = tiny.build_wan_t2v(tmp_path / "model") / "transformer"
    (tmp_path / "file").write_text("")
    line = refusal(folder, tmp_path / "file/out.safetensors", "--layout", "original")
    assert line.startswith("error: output: ") and "cannot be written" in line and ".tmp-" not in line
    assert refusal(folder, "/proc/out.safetensors", "--layout", "original").startswith("error: output: ")


def test_sources_without_a_transformer_are_refused(tmp_path: Path) -> None:
    model = tiny.build_wan_t2v(tmp_path / "model")
    assert "wan_vae" in refusal(model / "vae", tmp_path / "out.safetensors", "--layout", "original")
    assert "does not exist" in refusal(tmp_path / "none", tmp_path / "out.safetensors", "--layout", "original")
    shards = tmp_path / "checkpoint-1"
    (shards / "global_step1").mkdir(parents=True)
    (shards / "latest").write_text("global_step1")
    (shards / "global_step1/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"")
    assert "zero_to_bf16.py" in refusal(shards, tmp_path / "out.safetensors", "--layout", "original")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> runs.Outcome:
    """A run from Wan's original folder that trained one step and exported every layout."""
    folder = tmp_path_factory.mktemp("run")
    original = originals.build_wan(folder / "original", tiny.build_wan_t2v(folder / "model"))
    settings = {"max_train_steps": 1, "tokenizer_max_length": 16, "train_batch_size": 2, "export_dtype": "fp32"}
    settings["lr_warmup_steps"] = 0  # otherwise the learning rate of the first step is 0
    layouts = ["diffusers", "original", "comfyui"]
    metadata = tiny.make_dataset(folder / "data")
    outcome = runs.train(runs.wan_flags(original, metadata, folder / "out", export_layouts=layouts, **settings))
    assert outcome.code == 0, outcome.stderr
    return outcome


def test_a_run_writes_the_requested_layouts(run: runs.Outcome) -> None:
    wanted = originals.rebuilt(run.weights(), "wan")
    for layout, prefix in (("original", ""), ("comfyui", "model.diffusion_model.")):
        stored = load_file(run.folder / f"transformer_{layout}.safetensors")
        assert stored.keys() == {f"{prefix}{name}" for name in wanted}
        assert all(torch.equal(stored[f"{prefix}{name}"], tensor) for name, tensor in wanted.items())
    start = originals.weights(run.folder.parent / "original")
    trained = load_file(run.folder / "transformer_original.safetensors")
    assert trained.keys() == start.keys() and not torch.equal(trained["head.head.weight"], start["head.head.weight"])


def test_trained_weights_compute_the_same_from_every_export(run: runs.Outcome) -> None:
    """Load the exports with the strict loader and diffusers' own converter, and compute them by definition."""
    folder, path = run.folder / "transformer", run.folder / "transformer_original.safetensors"
    model = WanTransformer3DModel.from_pretrained(folder)
    draw, config = torch.Generator().manual_seed(3), model.config
    x, t = torch.randn(1, config.in_channels, 2, 8, 8, generator=draw), torch.tensor([420.0])
    text = torch.randn(1, 16, config.text_dim, generator=draw)
    component = find_component(path, "wan", {"attention_head_dim": config.attention_head_dim})
    theirs = WanTransformer3DModel.from_single_file(path, config=str(folder), local_files_only=True)
    comfyui = run.folder / "transformer_comfyui.safetensors"
    comfyui = WanTransformer3DModel.from_single_file(comfyui, config=str(folder), local_files_only=True)
    with torch.no_grad():
        wanted = model(x, t, text).sample
        for other in (load_component(WanTransformer3DModel, component, torch.float32), theirs, comfyui):
            known = other.state_dict()
            assert all(torch.equal(known[name], tensor) for name, tensor in model.state_dict().items())
            assert torch.allclose(other(x, t, text).sample, wanted, rtol=0, atol=1e-5)
        sizes = {"layers": config.num_layers, "heads": config.num_attention_heads}
        found = originals.wan_forward(load_file(path), x, t, text, None, **sizes)
        assert torch.allclose(found, wanted, atol=1e-5)
        start = originals.weights(run.folder.parent / "original")
        before = originals.wan_forward(start, x, t, text, None, **sizes)
        assert not torch.allclose(before, wanted, atol=1e-4)


def test_checkpoint_contains_the_layouts(run: runs.Outcome) -> None:
    exports = run.folder / "checkpoint-1/exports"
    assert verify(run.folder / "checkpoint-1", hashes=True) == []
    names = {f"transformer_{layout}.safetensors" for layout in ("original", "comfyui")}
    assert {path.name for path in exports.iterdir()} == names
    for name in names:  # this is the last step, so they equal the final exports, headers included
        assert (exports / name).read_bytes() == (run.folder / name).read_bytes()


def test_headers_describe_the_training(run: runs.Outcome) -> None:
    for path in (
        next((run.folder / "transformer").glob("*.safetensors")),
        run.folder / "transformer_original.safetensors",
    ):
        metadata = header(path)
        assert metadata["format"] == "pt" and metadata["trainer"].startswith("videox ")
        assert metadata["base_model"] == "original" and metadata["task"] == "wan2.1 normal"
        assert metadata["steps"] == "1" and metadata["seed"] == "42"
        assert metadata["shift"] == "5.0" and metadata["video_sample_n_frames"] == "13"


def test_training_facts_are_kept_across_exports(run: runs.Outcome, tmp_path: Path) -> None:
    """From the run's own file, from its checkpoint's records, and from files exported from either."""
    names = ("base_model", "task", "steps", "seed", "shift", "video_sample_n_frames", "video_sample_size", "trainer")
    wanted = {name: header(run.folder / "transformer_original.safetensors")[name] for name in names}
    assert wanted["base_model"] == "original"
    export(run.folder / "checkpoint-1", tmp_path / "one.safetensors", "--layout", "comfyui")
    export(tmp_path / "one.safetensors", tmp_path / "two", "--layout", "diffusers", "--dtype", "bf16")
    export(run.folder / "transformer", tmp_path / "three.safetensors", "--layout", "original")
    files = [
        tmp_path / "one.safetensors",
        next((tmp_path / "two").glob("*.safetensors")),
        tmp_path / "three.safetensors",
    ]
    for path, layout in zip(files, ("comfyui", "diffusers", "original"), strict=True):
        metadata = header(path)
        assert {name: metadata[name] for name in names} == wanted and metadata["layout"] == layout
        assert metadata["modelspec.title"] == "original fine-tuned"
    state = originals.weights(run.folder.parent / "model/transformer")
    save_file(originals.rebuilt(state, "wan"), tmp_path / "theirs.safetensors", metadata={"task": "unknown"})
    config = ["--config", run.folder.parent / "model/transformer/config.json"]
    export(tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors", "--layout", "comfyui", *config)
    metadata = header(tmp_path / "ours.safetensors")
    assert metadata["modelspec.title"] == "theirs" and not {"base_model", "task"} & metadata.keys()


def test_single_file_contains_its_configuration(model: tuple[str, Path, type], tmp_path: Path) -> None:
    """The head width of Wan is in no shape: exported files are read back without --config."""
    _, folder, model_class = model
    export(folder, tmp_path / "one.safetensors", "--layout", "original")
    export(tmp_path / "one.safetensors", tmp_path / "two.safetensors", "--layout", "comfyui")
    export(tmp_path / "two.safetensors", tmp_path / "back", "--layout", "diffusers")
    found, wanted = (model_class.load_config(place) for place in (tmp_path / "back", folder))
    assert {k: v for k, v in found.items() if k != "_name_or_path"} == {
        k: v for k, v in wanted.items() if k != "_name_or_path"
    }
    other = {"WanTransformer3DModel": tiny.build_hunyuan_t2v, "HunyuanVideoTransformer3DModel": tiny.build_wan_t2v}
    config = other[model_class.__name__](tmp_path / "other") / "transformer/config.json"
    line = refusal(tmp_path / "one.safetensors", tmp_path / "new", "--layout", "diffusers", "--config", config)
    assert line.startswith("error: --config: ") and f"the weights are of a {model_class.__name__}" in line


def test_file_of_a_run_needs_no_config(run: runs.Outcome, tmp_path: Path) -> None:
    export(run.folder / "transformer_comfyui.safetensors", tmp_path / "back", "--layout", "diffusers")
    trained, exported = run.weights(), originals.weights(tmp_path / "back")
    assert trained.keys() == exported.keys()
    assert all(torch.equal(trained[name], exported[name]) for name in trained)


def test_exported_checkpoint_can_be_trained_on(run: runs.Outcome, tmp_path: Path) -> None:
    export(run.folder / "checkpoint-1", tmp_path / "one.safetensors", "--layout", "original")
    known = load_file(run.folder / "transformer_original.safetensors")
    stored = load_file(tmp_path / "one.safetensors")
    assert stored.keys() == known.keys() and all(torch.equal(stored[name], known[name]) for name in known)
    model, metadata = run.folder.parent / "original", run.folder.parent / "data/metadata.json"
    frozen = {"learning_rate": 0, "max_train_steps": 1, "tokenizer_max_length": 16, "train_batch_size": 2}
    words = runs.wan_flags(
        model, metadata, tmp_path / "out", transformer_path=tmp_path / "one.safetensors", export_dtype="fp32", **frozen
    )
    outcome = runs.train(words)
    assert outcome.code == 0, outcome.stderr
    after, before = outcome.weights(), run.weights()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in after)
