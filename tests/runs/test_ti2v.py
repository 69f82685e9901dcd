"""Tests of scripts/wan2.2/train.py with --train_mode ti2v: flags, models in both layouts, runs, samples, dry runs."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import originals
import pytest
import runs
import tiny
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from PIL import Image
from safetensors.torch import load_file

from videox.errors import FLAGS, MODEL, UserError
from videox.models.scheduler import with_shift
from videox.shapes import Ratios
from videox.tracking.preview import write_clip
from videox.weights.header import read_metadata

PROMPT, SIDES = "a rabbit walks", {"height": 32, "width": 64}
SETTINGS: dict[str, Any] = {
    "expert": None, "train_mode": "ti2v", "mixed_precision": "no", "export_dtype": "fp32", "tokenizer_max_length": 16,
    "gradient_checkpointing": None, "low_vram": None, "video_sample_n_frames": 9, "image_sample_size": 64,
    "learning_rate": 0.01, "lr_warmup_steps": 0, "max_grad_norm": 10, "max_train_steps": 1, "validation_rows": 2,
    "sample_steps": 2, "sample_seed": 3, "dump_steps": 1, "latent_cache": "on", "video_sample_stride": 1,
    "motion_sub_loss": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_wan22_5b(tmp_path_factory.mktemp("model") / "wan")


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_image(tmp_path_factory.mktemp("picture") / "start.png", 64, 32)


@pytest.fixture(scope="module")
def trained(model: Path, picture: Path, tmp_path_factory: pytest.TempPathFactory) -> runs.Outcome:
    folder = tmp_path_factory.mktemp("run")
    metadata = tiny.make_dataset(
        folder / "data", (("clip.mp4", 96, 64, 9, 24.0), ("other.mp4", 64, 64, 9, 24.0)), copies=2
    )
    size = f"--f 5 --w {SIDES['width']} --h {SIDES['height']}"
    prompts = [f"{PROMPT} {size}", f"{PROMPT} {size} --i {picture}"]
    changes = {**SETTINGS, "latent_cache": folder / "cache", "validation_prompts": prompts, "cache_variants": 1}
    return runs.train(
        runs.train_flags("wan2.2", model, metadata, folder / "out", **changes), runs.train_script("wan2.2")
    )


def parsed(model: Path, **flags: object) -> Namespace:
    words = {"pretrained_model_name_or_path": model, "train_data_meta": "m.json", "output_dir": "out", **flags}
    return runs.train_script("wan2.2").parse_args(runs.to_argv(words))


def refusal(action: Callable[[], Any]) -> UserError:
    with pytest.raises(UserError) as raised:
        action()
    return raised.value


# ------------------------------------------------------------------------------------------------------- a run


def test_a_run_trains_caches_and_validates(trained: runs.Outcome, model: Path) -> None:
    assert trained.code == 0, trained.stderr
    assert "first frame given to the model in 50% of the clips (--i2v_ratio)" in trained.stdout
    assert "flow shift  5 (the model's scheduler/scheduler_config.json)" in trained.stdout
    assert all(side % 32 == 0 for record in trained.metrics for _, *sides in record["buckets"] for side in sides)
    base, weights = runs.read_weights(model / "transformer"), trained.weights()
    assert base.keys() == weights.keys() and any(not torch.equal(base[name], weights[name]) for name in base)
    header = read_metadata(trained.folder / "transformer")
    assert header["task"] == "wan2.2 ti2v" and "expert" not in header and "boundary" not in header
    assert trained.validation[-1]["loss"] != trained.validation[0]["loss"]
    dump = trained.dump(1)
    frames, height, width = dump["latents"].shape[2:]
    assert dump["latents"].shape[1] == 48 and (height, width) == (dump.bucket[1] // 16, dump.bucket[2] // 16)
    assert dump["timestep"].shape[1] == frames * (height // 2) * (width // 2)


def test_samples_are_those_of_both_pipelines_of_diffusers(trained: runs.Outcome, model: Path, picture: Path) -> None:
    transformer = WanTransformer3DModel.from_pretrained(trained.folder / "transformer")
    given = {"prompt": PROMPT, "negative_prompt": "", **SIDES, "num_frames": 5, "num_inference_steps": 2}
    given |= {"guidance_scale": 5.0, "max_sequence_length": 16, "output_type": "np"}
    for number, (kind, more) in enumerate(
        ((WanPipeline, {}), (WanImageToVideoPipeline, {"image": Image.open(picture).convert("RGB")}))
    ):
        pipeline = kind.from_pretrained(model, transformer=transformer)
        assert pipeline.config.expand_timesteps
        pipeline.register_modules(scheduler=with_shift(pipeline.scheduler, 5.0))
        pipeline.set_progress_bar_config(disable=True)
        frames = pipeline(**given, **more, generator=torch.Generator().manual_seed(3 + number)).frames[0]
        pixels = (frames.clip(0, 1) * 255).round().astype(np.uint8)
        path = write_clip(trained.folder / f"wanted-{number}.mp4", pixels, 24.0)
        own = trained.folder / f"samples/step-000001-prompt-{number}.mp4"
        assert path.read_bytes() == own.read_bytes()


def test_the_sample_script_makes_the_clips_of_the_run(trained: runs.Outcome, tmp_path: Path) -> None:
    script = tiny.load_script("scripts/sample.py")
    with runs.restored_process_state():
        os.environ["ACCELERATE_USE_CPU"] = "true"
        assert script.main([str(trained.folder), "--output", str(tmp_path / "clips")]) == 0
    for number in (0, 1):
        name = f"step-000001-prompt-{number}.mp4"
        assert (tmp_path / "clips" / name).read_bytes() == (trained.folder / "samples" / name).read_bytes()


@pytest.mark.slow
def test_a_lora_resumes_and_loads_into_both_pipelines(model: Path, tmp_path: Path) -> None:
    data = (("clip.mp4", 96, 64, 9, 24.0), ("other.mp4", 64, 64, 9, 24.0))
    metadata = tiny.make_dataset(tmp_path / "data", data, copies=2)
    changes = {**SETTINGS, "latent_cache": None, "lora_rank": 4, "max_train_steps": 4, "checkpointing_steps": 2}
    flags = runs.train_flags("wan2.2", model, metadata, tmp_path / "out", **changes)
    whole = runs.train(flags, runs.train_script("wan2.2"))
    assert whole.code == 0, whole.stderr
    (file,) = whole.folder.glob("*.safetensors")
    before, losses = load_file(file), [record["loss"] for record in whole.metrics]
    resume = ["--resume_from_checkpoint", str(whole.folder / "checkpoint-2")]
    again = runs.train([*flags, *resume], runs.train_script("wan2.2"))
    assert again.code == 0, again.stderr
    after = load_file(file)
    assert [record["loss"] for record in again.metrics] == losses
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert any(tensor.abs().max() > 1e-4 for name, tensor in after.items() if "lora_B" in name)
    for kind in (WanPipeline, WanImageToVideoPipeline):
        pipeline = kind.from_pretrained(model)
        weights = {name: value.clone() for name, value in pipeline.transformer.state_dict().items()}
        pipeline.load_lora_weights(whole.folder, weight_name=file.name)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        fused = pipeline.transformer.state_dict()
        assert fused.keys() == weights.keys() and any(not torch.equal(fused[name], weights[name]) for name in weights)


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("flags", "where", "what"),
    [
        ({"train_mode": "ti2v", "expert": "low_noise"}, "--expert", "low_noise: Wan2.2 TI2V-5B has one transformer"),
        ({"train_mode": "ti2v", "other_transformer_path": "x"}, "--other_transformer_path", "x: Wan2.2 TI2V-5B has"),
        ({"expert": "low_noise", "i2v_ratio": 0.2}, "--i2v_ratio", "0.2: only --train_mode ti2v trains"),
    ],
)
def test_flags_of_the_other_models_are_refused(flags: dict[str, object], where: str, what: str, model: Path) -> None:
    error = refusal(lambda: parsed(model, **flags))
    assert (error.where, error.exit_code) == (where, FLAGS) and error.what.startswith(what)


def test_models_of_the_other_modes_are_refused(model: Path, tmp_path: Path) -> None:
    script, experts = runs.train_script("wan2.2"), tiny.build_wan22_t2v(tmp_path / "experts")
    error = refusal(lambda: script.check_model(parsed(experts, train_mode="ti2v")))
    assert error.exit_code == MODEL and "has no expand_timesteps" in error.what
    error = refusal(lambda: script.check_model(parsed(model, expert="high_noise")))
    assert error.exit_code == MODEL and "--train_mode ti2v" in error.hint
    wan21 = runs.train_script("wan2.1")
    words = {"pretrained_model_name_or_path": model, "train_data_meta": "m.json", "output_dir": "out"}
    error = refusal(lambda: wan21.check_model(wan21.parse_args(runs.to_argv(words))))
    assert error.exit_code == MODEL and "scripts/wan2.2/train.py --train_mode ti2v" in error.hint
    other = {"train_mode": "ti2v", "transformer_path": experts / "transformer"}
    error = refusal(lambda: script.check_model(parsed(model, **other)))
    assert error.exit_code == MODEL and "takes 16 channels" in error.what


def test_sizes_of_samples_are_multiples_of_32(model: Path, tmp_path: Path) -> None:
    metadata = tiny.make_dataset(tmp_path / "data", (("clip.mp4", 64, 64, 9, 24.0),))
    changes = {**SETTINGS, "latent_cache": None, "sample_resolution": [48, 64], "max_train_steps": 1}
    argv = runs.train_flags("wan2.2", model, metadata, tmp_path / "out", **changes)
    outcome = runs.train(argv, runs.train_script("wan2.2"))
    assert outcome.code == FLAGS
    assert "error: --sample_resolution: 48 64: sides are multiples of 32. Fix: pass 64 64" in outcome.stderr


# ------------------------------------------------------------------------------------------------ original layout


def test_the_original_layout_has_the_same_components(model: Path, tmp_path: Path) -> None:
    folder = originals.build_wan(tmp_path / "original", model)
    (folder / "Wan2.1_VAE.pth").rename(folder / "Wan2.2_VAE.pth")
    script = runs.train_script("wan2.2")
    args = parsed(folder, train_mode="ti2v")
    components = script.check_model(args)
    for name in ("transformer", "vae"):
        tensors, expected = components[name].source(), runs.read_weights(model / name)
        assert set(tensors) == set(expected)
        assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    profile, trained = script.expert_profile(args, components), script.describe(args, components, None)
    assert profile.ratios == Ratios(4, 16, 2) and profile.fps == 24.0
    assert trained.shift.value == 5.0 and trained.boundary is None
    config = json.loads((model / "vae/config.json").read_text(encoding="utf-8"))
    same = ("base_dim", "z_dim", "dim_mult", "num_res_blocks", "temperal_downsample", "is_residual", "patch_size")
    assert {name: components["vae"].config[name] for name in same} == {name: config[name] for name in same}
    assert len(components["vae"].config["latents_mean"]) == 48


# -------------------------------------------------------------------------------------------------------- dry run


def test_a_dry_run_of_the_published_model_counts_its_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {
        "dry_run": True, "dry_run_model": "wan2.2-ti2v-5b", "train_mode": "ti2v", "dry_run_data": "20x6s@24fps:1280x704",
        "output_dir": tmp_path, "enable_bucket": True, "fix_sample_size": [704, 1280], "video_sample_n_frames": 121,
        "video_sample_fps": 24, "gradient_checkpointing": True, "mixed_precision": "bf16", "latent_cache": tmp_path / "c",
        "gpu_memory": 80, "optimizer": "adamw8bit", "train_batch_size": 1,
    }  # fmt: skip
    assert runs.train_script("wan2.2").main(runs.to_argv(words)) == 0
    printed = capsys.readouterr().out
    assert "flow shift 5 (the model's scheduler in config/models/wan2.2-ti2v-5b.json)" in printed
    report = json.loads((tmp_path / "plan_report.json").read_text(encoding="utf-8"))
    (bucket,) = report["buckets"]
    assert (bucket["frames"], bucket["height"], bucket["width"], bucket["tokens"]) == (121, 704, 1280, 27_280)
    assert 70 < report["memory"]["total"] / 2**30 < 80
