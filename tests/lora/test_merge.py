"""Serves videox/merging.py and what scripts/export.py makes of a LoRA: one model that computes what two did."""

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

from videox.engine.export import earlier
from videox.lora import merge as merging
from videox.lora.adapters import Lora, choose_targets, peft_name
from videox.lora.checkpoint import write_adapters
from videox.lora.merge import LowRankUpdate, lora_updates
from videox.lora.reader import lora_family, lora_file
from videox.weights.layouts import Entry, Piece
from videox.weights.safetensors_io import StoredTensors

RANK, ALPHA = 4, 6.0
MODELS: dict[str, tuple[Callable[..., Path], str]] = {
    "wan t2v": (tiny.build_wan_t2v, "WanTransformer3DModel"),
    "wan i2v": (tiny.build_wan_i2v, "WanTransformer3DModel"),
    "hunyuan t2v": (tiny.build_hunyuan_t2v, "HunyuanVideoTransformer3DModel"),
    "hunyuan i2v": (tiny.build_hunyuan_i2v, "HunyuanVideoTransformer3DModel"),
}


class Trained:
    """A model of a kind, and a LoRA over it whose every number is other than nought."""

    def __init__(self, kind: str, folder: Path, **sizes: int) -> None:
        build, name = MODELS[kind]
        self.kind, self.model_class, self.model = kind, getattr(diffusers, name), build(folder / "model", **sizes)
        self.family = kind.split()[0]
        stored, draw = StoredTensors(self.model / "transformer"), torch.Generator().manual_seed(1)
        self.pipeline = diffusers.WanPipeline if self.family == "wan" else diffusers.HunyuanVideoPipeline
        targets = choose_targets(
            stored.shapes(), runs.train_script({"wan": "wan2.1", "hunyuan": "hunyuanvideo"}[self.family]).ADAPTED, None
        )
        # one layer outside the blocks too: the halves of norm_out are the other way round in the original layout
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
        """Returns what the transformer takes, for a clip of two latent frames."""
        config, draw = self.model_class.load_config(self.model / "transformer"), torch.Generator().manual_seed(2)
        found = {
            "hidden_states": torch.randn(1, config["in_channels"], 2, 8, 8, generator=draw),
            "timestep": torch.tensor([500.0]),
        }
        if self.family == "hunyuan":
            width, pooled = config["text_embed_dim"], config["pooled_projection_dim"]
            found["encoder_hidden_states"] = torch.randn(1, 6, width, generator=draw)
            found["encoder_attention_mask"] = torch.ones(1, 6)
            found["pooled_projections"] = torch.randn(1, pooled, generator=draw)
            if config["guidance_embeds"]:
                found["guidance"] = torch.tensor([6000.0])
            return found
        found["encoder_hidden_states"] = torch.randn(1, 6, config["text_dim"], generator=draw)
        if config["image_dim"]:
            found["encoder_hidden_states_image"] = torch.randn(1, 257, config["image_dim"], generator=draw)
        return found

    def output(self, model: torch.nn.Module) -> Tensor:
        with torch.no_grad():
            return model(**self.inputs()).sample

    def base(self) -> torch.nn.Module:
        return self.model_class.from_pretrained(self.model / "transformer")

    def adapted(self, folder: Path) -> torch.nn.Module:
        """Returns the base with a LoRA beside its layers, as diffusers loads it."""
        model = self.base()
        state, metadata = self.pipeline.lora_state_dict(folder, return_lora_metadata=True)
        self.pipeline.load_lora_into_transformer(state, transformer=model, metadata=metadata)
        return model


@pytest.fixture(scope="module", params=MODELS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(request.param, tmp_path_factory.mktemp("trained"))


def test_a_merged_model_computes_what_base_and_lora_compute(trained: Trained, tmp_path: Path) -> None:
    export(trained.folder, tmp_path / "merged", "--layout", "diffusers", "--base", trained.model, "--verify")
    model = trained.model_class.from_pretrained(tmp_path / "merged")
    base = trained.base().state_dict()
    for name, tensor in model.state_dict().items():
        module, wanted = name.removesuffix(".weight"), base[name]
        if module in trained.lora.targets:
            a, b = (trained.adapters[f"{module}.lora_{half}.weight"] for half in "AB")
            wanted = wanted + ALPHA / RANK * b @ a
            assert (wanted - base[name]).abs().max() > 0.1
            assert torch.allclose(tensor, wanted, rtol=0, atol=1e-5), name
        else:
            assert torch.equal(tensor, wanted), name
    wanted, found = trained.output(trained.adapted(trained.folder)), trained.output(model)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-5) or (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert (trained.output(trained.base()) - wanted).abs().max() > 0.01


def test_every_layout_holds_the_same_merged_weights(trained: Trained, tmp_path: Path) -> None:
    """Bit for bit, whatever the base's layout: q, k, v and mlp side by side, halves exchanged, or each by itself."""
    export(trained.folder, tmp_path / "merged", "--layout", "diffusers", "--base", trained.model)
    wanted = originals.rebuilt(originals.weights(tmp_path / "merged"), trained.family)
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
        assert stored.keys() == wanted.keys()
        assert all(torch.equal(stored[name], tensor) for name, tensor in wanted.items())
    export(trained.folder, tmp_path / "back", "--layout", "diffusers", "--base", base, *config, "--dtype", "bf16")
    half = trained.model_class.from_pretrained(tmp_path / "merged", torch_dtype=torch.bfloat16).state_dict()
    stored = originals.weights(tmp_path / "back")
    assert all(torch.equal(stored[name], tensor) for name, tensor in half.items())


def test_a_lora_is_written_as_others_read_it(trained: Trained, tmp_path: Path) -> None:
    """From a checkpoint to ComfyUI's file, from that to diffusers', and from either into the model."""
    folder, names = trained.folder, trained.adapters
    export(folder, tmp_path / "comfyui.safetensors", "--layout", "comfyui")
    theirs = load_file(tmp_path / "comfyui.safetensors")
    assert all(name.startswith("diffusion_model.") for name in theirs)
    assert sum(name.endswith(".alpha") for name in theirs) == len(theirs) / 3
    assert lora_family(tmp_path / "comfyui.safetensors") == trained.family
    export(tmp_path / "comfyui.safetensors", tmp_path / "plain.safetensors", "--layout", "diffusers")
    again = load_file(tmp_path / "plain.safetensors")
    for name in names:
        module = name.split(".lora_")[0]
        a, b = (names[f"{module}.lora_{half}.weight"] for half in "AB")
        x, y = (again[f"transformer.{module}.lora_{half}.weight"] for half in "AB")
        assert len(x) == RANK and torch.allclose(y @ x, ALPHA / RANK * b @ a, atol=1e-5), module
    known = None
    for number, source in enumerate((folder, tmp_path / "comfyui.safetensors", tmp_path / "plain.safetensors")):
        export(source, tmp_path / f"{number}", "--layout", "diffusers", "--base", trained.model)
        found = originals.weights(tmp_path / f"{number}")
        known = known or found
        assert all(torch.allclose(found[name], tensor, rtol=0, atol=1e-5) for name, tensor in known.items())


@given(data=st.data())
def test_any_stretch_of_a_change_is_that_of_the_whole(data: st.DataObject) -> None:
    """Also to the bit: a file's blocks begin anywhere, and every layout holds the same sums."""
    rows, width, rank = (data.draw(st.integers(1, most)) for most in (40, 7, 3))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    change = LowRankUpdate(torch.randn(rank, width, generator=draw), torch.randn(rows, rank, generator=draw), 1.5)
    begin = data.draw(st.integers(0, rows * width - 1))
    count = data.draw(st.integers(1, rows * width - begin))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "ROWS", data.draw(st.sampled_from([3, 8, 512])))
        whole = change.elements(0, rows * width)
        assert torch.equal(change.elements(begin, count), whole[begin : begin + count])
        assert torch.allclose(whole.reshape(rows, width), 1.5 * change.b @ change.a, atol=1e-6)
        halves = (Piece("w", rows // 2 * width, (rows - rows // 2) * width), Piece("w", 0, rows // 2 * width))
        entry = Entry("x", (rows + 1, width), (*halves, Piece("other", 0, width)))
        turned = torch.cat([whole[rows // 2 * width :], whole[: rows // 2 * width], torch.zeros(width)])
        end = data.draw(st.integers(begin + 1, (rows + 1) * width))
        assert torch.equal(merging._update_slice(entry, {"w": change}, begin, end - begin), turned[begin:end])


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    wan, hunyuan = (Trained(kind, tmp_path / kind) for kind in ("wan t2v", "hunyuan t2v"))
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
    assert "original is not a layout of a LoRA" in refusal(wan.folder, new.with_suffix(".safetensors"), "--layout", "original")
    assert "not the name of a .safetensors" in refusal(wan.folder, new, "--layout", "comfyui")
    state = load_file(wan.folder / "pytorch_lora_weights.safetensors")
    lone = next(name for name in state if ".lora_B." in name)
    odd = {**state, lone: torch.ones(7, RANK)}
    save_file(odd, tmp_path / "odd.safetensors")
    assert "its adapter [7, " in refusal(
        tmp_path / "odd.safetensors", new, "--layout", "diffusers", "--base", wan.model
    )
    save_file({name: t for name, t in state.items() if name != lone}, tmp_path / "lone.safetensors")
    assert "half of an adapter is missing" in refusal(
        tmp_path / "lone.safetensors", new, "--layout", "diffusers", "--base", wan.model
    )
    save_file({name: 1e30 * t for name, t in state.items()}, tmp_path / "far.safetensors")
    line = refusal(tmp_path / "far.safetensors", new, "--layout", "diffusers", "--base", wan.model)
    assert "not finite" in line
    assert not new.exists() and lora_file(wan.model / "transformer") is None
    assert lora_updates({}, 1.0) == {}


def test_a_run_merges_its_lora_and_its_average(tmp_path: Path) -> None:
    """At its end and in each checkpoint, from the base in its original layout."""
    model = tiny.build_wan_t2v(tmp_path / "model")
    original, metadata = originals.build_wan(tmp_path / "original", model), tiny.make_dataset(tmp_path / "data")
    asked = {"max_train_steps": 2, "checkpointing_steps": 1, "tokenizer_max_length": 16, "lr_warmup_steps": 0}
    asked |= {"lora_rank": RANK, "lora_alpha": ALPHA, "learning_rate": "1e-2", "use_ema": True, "ema_decay": 0.5}
    asked |= {"export_dtype": "fp32", "export_layouts": ["merged", "comfyui"]}
    outcome = runs.train(runs.wan_flags(original, metadata, tmp_path / "run", **asked))
    assert outcome.code == 0, outcome.stderr
    base, seen = originals.weights(model / "transformer"), []
    places = [(tmp_path / "run/checkpoint-2", tmp_path / "run"), *(
        (tmp_path / f"run/checkpoint-{n}", tmp_path / f"run/checkpoint-{n}/exports") for n in (1, 2)
    )]  # fmt: skip
    for checkpoint, exported in places:
        for name in ("transformer", "transformer_ema"):
            adapters = load_file(
                (checkpoint if name == "transformer" else checkpoint / name) / "pytorch_lora_weights.safetensors"
            )
            found = diffusers.WanTransformer3DModel.from_pretrained(exported / f"{name}_merged").state_dict()
            for key, tensor in base.items():
                module = f"transformer.{key.removesuffix('.weight')}"
                change = 0.0
                if f"{module}.lora_A.weight" in adapters:
                    change = ALPHA / RANK * adapters[f"{module}.lora_B.weight"] @ adapters[f"{module}.lora_A.weight"]
                    assert change.abs().max() > 1e-4
                assert torch.allclose(found[key], tensor + change, rtol=0, atol=1e-6), (exported, name, key)
            seen.append(found["blocks.0.attn1.to_q.weight"])
            place = exported if name == "transformer" else exported / name
            assert (place / "pytorch_lora_weights_comfyui.safetensors").is_file()
    assert torch.equal(seen[0], seen[4]) and torch.equal(seen[1], seen[5])  # of the end and of the last checkpoint
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
    assert_headers(tmp_path / "run", original)
    averaged = tmp_path / "run/checkpoint-2/transformer_ema"
    export(averaged, tmp_path / "merged", "--layout", "diffusers", "--base", original)
    assert torch.equal(originals.weights(tmp_path / "merged")["blocks.0.attn1.to_q.weight"], seen[1])

    # without --export_layouts what they made stands where it is, and is named
    assert earlier(tmp_path / "run", 2) == {}
    del asked["export_layouts"]
    asked |= {"max_train_steps": 3, "resume_from_checkpoint": "latest"}
    outcome = runs.train(runs.wan_flags(original, metadata, tmp_path / "run", **asked))
    assert outcome.code == 0, outcome.stderr
    names = [f"{name} (step 2)" for name in (
        "pytorch_lora_weights_comfyui.safetensors", "transformer_ema/pytorch_lora_weights_comfyui.safetensors",
        "transformer_ema_merged/", "transformer_merged/",
    )]  # fmt: skip
    (line,) = [line for line in outcome.stderr.splitlines() if "exported earlier" in line]
    assert f"warning: {', '.join(names)} in " in line and "are not of step 3" in line
    assert (tmp_path / "run/pytorch_lora_weights-superseded.safetensors").is_file()


def assert_headers(run: Path, base: Path) -> None:
    """Checks what every export of a LoRA, and what is made of its checkpoint, says of its training."""
    paths = [run / "pytorch_lora_weights.safetensors", run / "pytorch_lora_weights_comfyui.safetensors"]
    paths += [next((run / name).glob("*.safetensors")) for name in ("transformer_merged", "transformer_ema")]
    made = run.parent / "made"
    for number, layout in enumerate(("comfyui", "diffusers")):
        paths.append(made / f"{number}.safetensors")
        export(run / "checkpoint-2", paths[-1], "--layout", layout)
    paths.append(made / "merged.safetensors")
    export(run / "checkpoint-2", paths[-1], "--layout", "original", "--base", base)
    for path in paths:
        said = header(path)
        assert said["base_model"] == "original" and said["modelspec.title"] == "original fine-tuned", path
        assert said["task"] == "wan2.1 normal" and said["steps"] == "2" and said["shift"] == "5.0", path
        assert said["rank"] == f"{RANK}" and said["video_sample_n_frames"] == "13", path
        assert said["trainer"].startswith("videox "), path
        # what is in B already is not counted twice
        assert float(said["alpha"]) == (RANK if path.name == "1.safetensors" else ALPHA), path
    state, settings = diffusers.WanPipeline.lora_state_dict(run, return_lora_metadata=True)
    assert state.keys() == load_file(paths[0]).keys() and settings["transformer.lora_alpha"] == ALPHA
    pipeline = diffusers.WanPipeline.from_pretrained(run.parent / "model")
    pipeline.load_lora_weights(run)
    assert next(iter(pipeline.transformer.peft_config.values())).lora_alpha == ALPHA


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A model of 400 MB in place of 90, with a LoRA on every layer: into one file of original names, and plain."""
    peaks: dict[str, list[int]] = {"merged": [], "original": []}
    for layers in (2, 10):
        trained = Trained("wan t2v", tmp_path / f"{layers}", heads=12, head_dim=64, ffn_dim=3072, layers=layers)
        folder = trained.model / "transformer"
        jobs = {"merged": [trained.folder, "--base", folder], "original": [folder]}
        for name, (source, *more) in jobs.items():
            output = tmp_path / f"{name}-{layers}.safetensors"
            words = [sys.executable, "scripts/export.py", source, output, "--layout", "original", *more]
            peaks[name].append(peak_anonymous([str(word) for word in words]))
            assert output.stat().st_size > layers * 9.4e6 * 4
    print({name: [f"{peak / 2**20:.0f} MiB" for peak in found] for name, found in peaks.items()})
    for small, large in peaks.values():
        assert large - small < 48 * 2**20  # the file is 300 MB larger
        assert large < 800 * 2**20  # most of it is torch, diffusers and peft
