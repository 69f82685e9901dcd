"""Tests of videox.lora.merge and of LoRA exports: a merged model has the output of base model and LoRA."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import diffusers
import originals
import pytest
import runs
import tiny
import torch
from exports import export, header, peak_anonymous, refusal
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from videox.engine.export import earlier_exports
from videox.lora import merge as merging
from videox.lora.adapters import Lora, peft_name
from videox.lora.checkpoint import write_adapters
from videox.lora.merge import LowRankUpdate, lora_updates
from videox.lora.reader import lora_family, lora_file
from videox.lora.targets import choose_targets
from videox.weights.layouts import Entry, Piece
from videox.weights.safetensors_io import StoredTensors

RANK, ALPHA = 4, 6.0
MODELS: dict[str, tuple[Callable[..., Path], str]] = {
    "wan t2v": (tiny.build_wan_t2v, "WanTransformer3DModel"),
    "wan i2v": (tiny.build_wan_i2v, "WanTransformer3DModel"),
    "hunyuan t2v": (tiny.build_hunyuan_t2v, "HunyuanVideoTransformer3DModel"),
    "hunyuan i2v": (tiny.build_hunyuan_i2v, "HunyuanVideoTransformer3DModel"),
}


class TrainedLora:
    """A model of a kind, and a LoRA for it without zeros in its tensors."""

    def __init__(self, kind: str, folder: Path, **sizes: int) -> None:
        build, name = MODELS[kind]
        self.kind, self.model_class, self.model = kind, getattr(diffusers, name), build(folder / "model", **sizes)
        self.family = kind.split()[0]
        stored, draw = StoredTensors(self.model / "transformer"), torch.Generator().manual_seed(1)
        self.pipeline = diffusers.WanPipeline if self.family == "wan" else diffusers.HunyuanVideoPipeline
        targets = choose_targets(
            stored.shapes(),
            runs.train_script({"wan": "wan2.1", "hunyuan": "hunyuanvideo"}[self.family]).LORA_TARGETS,
            None,
        )
        # Also one layer outside the blocks: the halves of norm_out are in reverse order in the original layout.
        self.outside = "norm_out.linear" if self.family == "hunyuan" else "condition_embedder.time_proj"
        self.lora = Lora(RANK, ALPHA, 0.0, tuple(sorted({*targets, self.outside})))
        self.adapters: dict[str, Tensor] = {}
        for target in self.lora.targets:
            outputs, inputs = stored.shape(f"{target}.weight")
            self.adapters[f"{target}.lora_A.weight"] = 0.3 * torch.randn(RANK, inputs, generator=draw)
            self.adapters[f"{target}.lora_B.weight"] = 0.3 * torch.randn(outputs, RANK, generator=draw)
        self.folder = folder / "checkpoint-7"
        tensors = {peft_name(name): tensor for name, tensor in self.adapters.items()}
        write_adapters(self.folder, tensors, self.lora, self.pipeline.save_lora_weights)

    def inputs(self) -> dict[str, Tensor]:
        """Return the transformer's inputs for a clip of two latent frames."""
        config, draw = self.model_class.load_config(self.model / "transformer"), torch.Generator().manual_seed(2)
        actual = {
            "hidden_states": torch.randn(1, config["in_channels"], 2, 8, 8, generator=draw),
            "timestep": torch.tensor([500.0]),
        }
        if self.family == "hunyuan":
            width, pooled = config["text_embed_dim"], config["pooled_projection_dim"]
            actual["encoder_hidden_states"] = torch.randn(1, 6, width, generator=draw)
            actual["encoder_attention_mask"] = torch.ones(1, 6)
            actual["pooled_projections"] = torch.randn(1, pooled, generator=draw)
            if config["guidance_embeds"]:
                actual["guidance"] = torch.tensor([6000.0])
            return actual
        actual["encoder_hidden_states"] = torch.randn(1, 6, config["text_dim"], generator=draw)
        if config["image_dim"]:
            actual["encoder_hidden_states_image"] = torch.randn(1, 257, config["image_dim"], generator=draw)
        return actual

    def output(self, model: torch.nn.Module) -> Tensor:
        with torch.no_grad():
            return model(**self.inputs()).sample

    def base(self) -> torch.nn.Module:
        return self.model_class.from_pretrained(self.model / "transformer")

    def adapted(self, folder: Path) -> torch.nn.Module:
        """Return the base model with a LoRA added to its layers, as diffusers loads it."""
        model = self.base()
        state, metadata = self.pipeline.lora_state_dict(folder, return_lora_metadata=True)
        self.pipeline.load_lora_into_transformer(state, transformer=model, metadata=metadata)
        return model


@pytest.fixture(scope="module", params=MODELS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TrainedLora:
    return TrainedLora(request.param, tmp_path_factory.mktemp("trained"))


def test_merged_model_has_the_output_of_base_and_lora(trained: TrainedLora, tmp_path: Path) -> None:
    export(trained.folder, tmp_path / "merged", "--layout", "diffusers", "--base", trained.model, "--verify")
    model = trained.model_class.from_pretrained(tmp_path / "merged")
    base = trained.base().state_dict()
    for name, tensor in model.state_dict().items():
        module, expected = name.removesuffix(".weight"), base[name]
        if module in trained.lora.targets:
            a, b = (trained.adapters[f"{module}.lora_{half}.weight"] for half in "AB")
            expected = expected + ALPHA / RANK * b @ a
            assert (expected - base[name]).abs().max() > 0.1
            assert torch.allclose(tensor, expected, rtol=0, atol=1e-5), name
        else:
            assert torch.equal(tensor, expected), name
    expected, actual = trained.output(trained.adapted(trained.folder)), trained.output(model)
    assert (
        torch.allclose(actual, expected, rtol=0, atol=1e-5)
        or (actual - expected).abs().max() < 1e-5 * expected.abs().max()
    )
    assert (trained.output(trained.base()) - expected).abs().max() > 0.01


def test_merged_weights_are_bit_identical_in_every_layout(trained: TrainedLora, tmp_path: Path) -> None:
    """For every layout of the base model: fused q, k, v and mlp, swapped halves, and separate weights."""
    export(trained.folder, tmp_path / "merged", "--layout", "diffusers", "--base", trained.model)
    expected = originals.rebuilt(originals.weights(tmp_path / "merged"), trained.family)
    base = tmp_path / "base.safetensors"
    save_file(originals.rebuilt(originals.weights(trained.model / "transformer"), trained.family), base)
    config = ["--config", trained.model / "transformer/config.json"]
    for source, more in ((trained.model / "transformer", []), (base, config)):
        output = tmp_path / f"{len(more)}.safetensors"
        export(
            trained.folder / "pytorch_lora_weights.safetensors",
            output,
            "--layout",
            "original",
            "--base",
            source,
            *more,
        )
        stored = load_file(output)
        assert stored.keys() == expected.keys()
        assert all(torch.equal(stored[name], tensor) for name, tensor in expected.items())
    export(trained.folder, tmp_path / "back", "--layout", "diffusers", "--base", base, *config, "--dtype", "bf16")
    half = trained.model_class.from_pretrained(tmp_path / "merged", torch_dtype=torch.bfloat16).state_dict()
    stored = originals.weights(tmp_path / "back")
    assert all(torch.equal(stored[name], tensor) for name, tensor in half.items())


def test_a_lora_converts_between_checkpoint_comfyui_and_diffusers(trained: TrainedLora, tmp_path: Path) -> None:
    """From a checkpoint to ComfyUI's file, from that to diffusers' file, and from each into a merged model."""
    folder, names = trained.folder, trained.adapters
    export(folder, tmp_path / "comfyui.safetensors", "--layout", "comfyui")
    comfyui = load_file(tmp_path / "comfyui.safetensors")
    assert all(name.startswith("diffusion_model.") for name in comfyui)
    assert sum(name.endswith(".alpha") for name in comfyui) == len(comfyui) / 3
    assert lora_family(tmp_path / "comfyui.safetensors") == trained.family
    export(tmp_path / "comfyui.safetensors", tmp_path / "plain.safetensors", "--layout", "diffusers")
    plain = load_file(tmp_path / "plain.safetensors")
    for name in names:
        module = name.split(".lora_")[0]
        a, b = (names[f"{module}.lora_{half}.weight"] for half in "AB")
        x, y = (plain[f"transformer.{module}.lora_{half}.weight"] for half in "AB")
        assert len(x) == RANK and torch.allclose(y @ x, ALPHA / RANK * b @ a, atol=1e-5), module
    reference = None
    for number, source in enumerate((folder, tmp_path / "comfyui.safetensors", tmp_path / "plain.safetensors")):
        export(source, tmp_path / f"{number}", "--layout", "diffusers", "--base", trained.model)
        actual = originals.weights(tmp_path / f"{number}")
        reference = reference or actual
        assert all(torch.allclose(actual[name], tensor, rtol=0, atol=1e-5) for name, tensor in reference.items())


@given(data=st.data())
def test_any_slice_of_an_update_is_bit_identical_to_the_full_update(data: st.DataObject) -> None:
    """Blocks of a file start at any element, and the sums must be equal in every layout."""
    rows, width, rank = (data.draw(st.integers(1, most)) for most in (40, 7, 3))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    update = LowRankUpdate(torch.randn(rank, width, generator=draw), torch.randn(rows, rank, generator=draw), 1.5)
    begin = data.draw(st.integers(0, rows * width - 1))
    count = data.draw(st.integers(1, rows * width - begin))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "ROWS", data.draw(st.sampled_from([3, 8, 512])))
        full = update.elements(0, rows * width)
        assert torch.equal(update.elements(begin, count), full[begin : begin + count])
        assert torch.allclose(full.reshape(rows, width), 1.5 * update.b @ update.a, atol=1e-6)
        halves = (Piece("w", rows // 2 * width, (rows - rows // 2) * width), Piece("w", 0, rows // 2 * width))
        entry = Entry("x", (rows + 1, width), (*halves, Piece("other", 0, width)))
        swapped = torch.cat([full[rows // 2 * width :], full[: rows // 2 * width], torch.zeros(width)])
        end = data.draw(st.integers(begin + 1, (rows + 1) * width))
        assert torch.equal(merging._update_slice(entry, {"w": update}, begin, end - begin), swapped[begin:end])


def test_mismatched_models_and_loras_are_errors(tmp_path: Path) -> None:
    wan, hunyuan = (TrainedLora(kind, tmp_path / kind) for kind in ("wan t2v", "hunyuan t2v"))
    new = tmp_path / "new"
    line = refusal(wan.folder, new, "--layout", "diffusers", "--base", hunyuan.model)
    assert "blocks.0.attn1.to_k.weight has an adapter but does not exist in the base model" in line
    for base in ("/nope", "Nobody-At/all"):
        line = refusal(wan.folder, new, "--layout", "diffusers", "--base", base)
        assert line.startswith("error: --base: ")
    line = refusal(wan.folder, "/proc/out.safetensors", "--layout", "comfyui")
    assert line.startswith("error: output: ") and "cannot be written" in line
    assert "is inside" in refusal(wan.folder, wan.folder / "out.safetensors", "--layout", "comfyui")
    assert "is not a LoRA" in refusal(wan.model, new, "--layout", "diffusers", "--base", wan.model)
    assert "original is not a layout of a LoRA" in refusal(
        wan.folder, new.with_suffix(".safetensors"), "--layout", "original"
    )
    assert "not the name of a .safetensors" in refusal(wan.folder, new, "--layout", "comfyui")
    state = load_file(wan.folder / "pytorch_lora_weights.safetensors")
    half = next(name for name in state if ".lora_B." in name)
    wrong_shape = {**state, half: torch.ones(7, RANK)}
    save_file(wrong_shape, tmp_path / "odd.safetensors")
    assert "its adapter [7, " in refusal(
        tmp_path / "odd.safetensors", new, "--layout", "diffusers", "--base", wan.model
    )
    save_file({name: t for name, t in state.items() if name != half}, tmp_path / "lone.safetensors")
    assert "half of an adapter is missing" in refusal(
        tmp_path / "lone.safetensors", new, "--layout", "diffusers", "--base", wan.model
    )
    save_file({name: 1e30 * t for name, t in state.items()}, tmp_path / "far.safetensors")
    line = refusal(tmp_path / "far.safetensors", new, "--layout", "diffusers", "--base", wan.model)
    assert "not finite" in line
    assert not new.exists() and lora_file(wan.model / "transformer") is None
    assert lora_updates({}, 1.0) == {}


def test_a_run_exports_merged_lora_and_ema(tmp_path: Path) -> None:
    """At the end of the run and in each checkpoint, with a base model in the original layout."""
    model = tiny.build_wan_t2v(tmp_path / "model")
    original, metadata = originals.build_wan(tmp_path / "original", model), tiny.make_dataset(tmp_path / "data")
    flags = {"max_train_steps": 2, "checkpointing_steps": 1, "tokenizer_max_length": 16, "lr_warmup_steps": 0}
    flags |= {"lora_rank": RANK, "lora_alpha": ALPHA, "learning_rate": "1e-2", "use_ema": True, "ema_decay": 0.5}
    flags |= {"export_dtype": "fp32", "export_layouts": ["merged", "comfyui"]}
    outcome = runs.train(runs.wan_flags(original, metadata, tmp_path / "run", **flags))
    assert outcome.code == 0, outcome.stderr
    base, merged_weights = originals.weights(model / "transformer"), []
    folders = [(tmp_path / "run/checkpoint-2", tmp_path / "run"), *(
        (tmp_path / f"run/checkpoint-{n}", tmp_path / f"run/checkpoint-{n}/exports") for n in (1, 2)
    )]  # fmt: skip
    for checkpoint, exported in folders:
        for name in ("transformer", "transformer_ema"):
            adapters = load_file(
                (checkpoint if name == "transformer" else checkpoint / name) / "pytorch_lora_weights.safetensors"
            )
            actual = diffusers.WanTransformer3DModel.from_pretrained(exported / f"{name}_merged").state_dict()
            for key, tensor in base.items():
                module = f"transformer.{key.removesuffix('.weight')}"
                update = 0.0
                if f"{module}.lora_A.weight" in adapters:
                    update = ALPHA / RANK * adapters[f"{module}.lora_B.weight"] @ adapters[f"{module}.lora_A.weight"]
                    assert update.abs().max() > 1e-4
                assert torch.allclose(actual[key], tensor + update, rtol=0, atol=1e-6), (exported, name, key)
            merged_weights.append(actual["blocks.0.attn1.to_q.weight"])
            place = exported if name == "transformer" else exported / name
            assert (place / "pytorch_lora_weights_comfyui.safetensors").is_file()
    # the end of the run and its last checkpoint
    assert torch.equal(merged_weights[0], merged_weights[4]) and torch.equal(merged_weights[1], merged_weights[5])
    assert not torch.equal(merged_weights[0], merged_weights[1]) and not torch.equal(
        merged_weights[0], merged_weights[2]
    )
    check_headers(tmp_path / "run", original)
    ema_checkpoint = tmp_path / "run/checkpoint-2/transformer_ema"
    export(ema_checkpoint, tmp_path / "merged", "--layout", "diffusers", "--base", original)
    assert torch.equal(originals.weights(tmp_path / "merged")["blocks.0.attn1.to_q.weight"], merged_weights[1])

    # without --export_layouts earlier exports are left as they are and named in a warning
    assert earlier_exports(tmp_path / "run", 2) == {}
    del flags["export_layouts"]
    flags |= {"max_train_steps": 3, "resume_from_checkpoint": "latest"}
    outcome = runs.train(runs.wan_flags(original, metadata, tmp_path / "run", **flags))
    assert outcome.code == 0, outcome.stderr
    names = [f"{name} (step 2)" for name in (
        "pytorch_lora_weights_comfyui.safetensors", "transformer_ema/pytorch_lora_weights_comfyui.safetensors",
        "transformer_ema_merged/", "transformer_merged/",
    )]  # fmt: skip
    (line,) = [line for line in outcome.stderr.splitlines() if "exports of an earlier step" in line]
    assert f"warning: {', '.join(names)} in " in line and "not of step 3" in line
    assert (tmp_path / "run/pytorch_lora_weights-superseded.safetensors").is_file()


def check_headers(run: Path, base: Path) -> None:
    """Check the training metadata in every export of a LoRA, and in files that are converted from its checkpoint."""
    paths = [run / "pytorch_lora_weights.safetensors", run / "pytorch_lora_weights_comfyui.safetensors"]
    paths += [next((run / name).glob("*.safetensors")) for name in ("transformer_merged", "transformer_ema")]
    converted = run.parent / "made"
    for number, layout in enumerate(("comfyui", "diffusers")):
        paths.append(converted / f"{number}.safetensors")
        export(run / "checkpoint-2", paths[-1], "--layout", layout)
    paths.append(converted / "merged.safetensors")
    export(run / "checkpoint-2", paths[-1], "--layout", "original", "--base", base)
    for path in paths:
        metadata = header(path)
        assert metadata["base_model"] == "original" and metadata["modelspec.title"] == "original fine-tuned", path
        assert metadata["task"] == "wan2.1 normal" and metadata["steps"] == "2" and metadata["shift"] == "5.0", path
        assert metadata["rank"] == f"{RANK}" and metadata["video_sample_n_frames"] == "13", path
        assert metadata["trainer"].startswith("videox "), path
        # alpha is in B already in this file: its header must not apply it twice
        assert float(metadata["alpha"]) == (RANK if path.name == "1.safetensors" else ALPHA), path
    state, settings = diffusers.WanPipeline.lora_state_dict(run, return_lora_metadata=True)
    assert state.keys() == load_file(paths[0]).keys() and settings["transformer.lora_alpha"] == ALPHA
    pipeline = diffusers.WanPipeline.from_pretrained(run.parent / "model")
    pipeline.load_lora_weights(run)
    assert next(iter(pipeline.transformer.peft_config.values())).lora_alpha == ALPHA


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Compare models of 90 and 400 MB with a LoRA on every layer: one file with original names, merged and plain."""
    peaks: dict[str, list[int]] = {"merged": [], "original": []}
    for layers in (2, 10):
        trained = TrainedLora("wan t2v", tmp_path / f"{layers}", heads=12, head_dim=64, ffn_dim=3072, layers=layers)
        folder = trained.model / "transformer"
        jobs = {"merged": [trained.folder, "--base", folder], "original": [folder]}
        for name, (source, *more) in jobs.items():
            output = tmp_path / f"{name}-{layers}.safetensors"
            words = [sys.executable, "scripts/export.py", source, output, "--layout", "original", *more]
            peaks[name].append(peak_anonymous([str(word) for word in words]))
            assert output.stat().st_size > layers * 9.4e6 * 4
    print({name: [f"{peak / 2**20:.0f} MiB" for peak in actual] for name, actual in peaks.items()})
    for small, large in peaks.values():
        assert large - small < 48 * 2**20  # the file is 300 MB larger
        assert large < 800 * 2**20  # mostly the imports of torch, diffusers and peft
