"""Tests of one expert of Wan2.2: under every backend, with EMA, and as a LoRA or DoRA.

The low-noise expert is trained: its weights are transformer_2 of the pipeline, so that a wrong place is found.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import diffusers
import forkserver
import numpy as np
import pytest
import runs
import tiny
import torch
from launch_checks import (
    backend_of,
    check_checkpoint,
    check_export,
    check_launch,
    check_matches_baseline,
    check_resume,
)
from launches import SHARDED_BACKENDS, BackendRuns, exit_codes, output_of
from PIL import Image
from safetensors.torch import load_file

from videox.diffusion.noise_window import NoiseWindow
from videox.models.scheduler import with_shift
from videox.run.checkpoint import verify
from videox.weights.expert_names import EXPERTS
from videox.weights.header import read_metadata

STEPS, RANK, SHIFT = 4, 4, 3.0
WINDOW = NoiseWindow(end=0.875)
EXPERT = {
    "expert": "low_noise", "video_sample_n_frames": 5, "image_sample_size": 64, "tokenizer_max_length": 16,
}  # fmt: skip
LORA = {"lora_rank": RANK, "learning_rate": "1e-2", "export_dtype": "fp32"}
CHECKPOINT_FILE, FILE = "pytorch_lora_weights.safetensors", "pytorch_lora_weights_low_noise.safetensors"
BACKENDS = ("ddp", *SHARDED_BACKENDS)
PROMPT = "a rabbit walks"
SAMPLES = {
    "validation_prompts": [f"{PROMPT} --f 1 --w 64 --h 48"], "sample_steps": 4, "sample_seed": 3,
    "tokenizer_max_length": 16, "mixed_precision": "no", "gradient_checkpointing": None, "low_vram": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> BackendRuns:
    clips = {"validation_prompts": SAMPLES["validation_prompts"], "sample_steps": 2}
    return BackendRuns(tmp_path_factory.mktemp("full"), "wan2.2 normal", STEPS, **EXPERT, **clips)


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> BackendRuns:
    return BackendRuns(tmp_path_factory.mktemp("lora"), "wan2.2 normal", STEPS, **EXPERT, **LORA)


def pipeline_of(model: Path, **experts: torch.nn.Module) -> diffusers.WanPipeline:
    """Return diffusers' pipeline of a model with the trainer's flow shift; experts: in place of those of the model."""
    pipeline = diffusers.WanPipeline.from_pretrained(model, **experts)
    pipeline.register_modules(scheduler=with_shift(pipeline.scheduler, SHIFT))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(pipeline: diffusers.WanPipeline) -> np.ndarray:
    """Return the picture of SAMPLES that a pipeline makes, uint8 [H, W, 3]."""
    frames = pipeline(
        prompt=PROMPT, negative_prompt="", height=48, width=64, num_frames=1, num_inference_steps=4, guidance_scale=4.0,
        max_sequence_length=16, output_type="np", generator=torch.Generator().manual_seed(3),
    ).frames[0]  # fmt: skip
    return (frames[0].clip(0, 1) * 255).round().astype(np.uint8)


def picture_of_script(*words: object) -> np.ndarray:
    """Return the picture that scripts/sample.py makes of the first prompt; the last word is the folder of clips."""
    with runs.restored_process_state():
        os.environ["ACCELERATE_USE_CPU"] = "true"
        assert tiny.load_script("scripts/sample.py").main([str(word) for word in words]) == 0
    (path,) = Path(str(words[-1])).glob("*-prompt-0.png")
    return np.asarray(Image.open(path))


# ------------------------------------------------------------------------------------------------------- full weights


def check_samples(setup: BackendRuns, folder: Path) -> None:
    """Check that the clips, which both experts make, look like those of the baseline, at first and at last."""
    for step in (0, STEPS):
        names = [run / f"samples/step-{step:06d}-prompt-0.png" for run in (folder, setup.baseline)]
        found, wanted = (np.asarray(Image.open(name)).astype(int) for name in names)
        assert np.abs(found - wanted).mean() < 4 and found.std() > 4


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_expert_trains_like_one_process_resumes_and_exports(
    full: BackendRuns, tmp_path: Path, backend: str
) -> None:
    folder = tmp_path / "run"
    if backend == "fsdp2":  # the others are launched by accelerate in test_matrix
        check_launch(full, backend, folder, dump_steps=1)
    else:
        ranks = full.run_ranks(backend, folder, dump_steps=1)
        assert exit_codes(ranks) == [0, 0], output_of(ranks)
        assert f"backend     {backend_of(backend)} (" in ranks[0].output()
    check_matches_baseline(full, folder)
    check_checkpoint(full, backend, folder)
    check_export(full, folder)
    assert [path.name for path in folder.glob("transformer*")] == ["transformer_2"]
    assert read_metadata(folder / "transformer_2")["expert"] == "low_noise"
    check_samples(full, folder)
    steps = WINDOW.steps(SHIFT)
    dumps = [runs.read_dump(path) for path in (folder / "dump/step-1").glob("*.safetensors")]
    t = torch.cat([dump["timestep"] for dump in dumps]).double().numpy() / 1000
    places = (1000 * (1 - t / (SHIFT - (SHIFT - 1) * t)) - steps.start + 0.5) / len(steps)
    assert sorted(np.floor(places * 2)) == [0, 1]  # each rank's sample is in a stratum of its own
    check_resume(full, backend, folder, dump_steps=1)


# ------------------------------------------------------------------------------------------------------------ adapters


def check_adapters(setup: BackendRuns, folder: Path) -> None:
    """Check the files of a LoRA, and that diffusers loads it into its own expert."""
    stored, exported = load_file(folder / f"checkpoint-{STEPS}" / CHECKPOINT_FILE), load_file(folder / FILE)
    assert stored.keys() == exported.keys()
    assert all(torch.equal(stored[name].to(tensor.dtype), tensor) for name, tensor in exported.items())
    assert any(tensor.abs().max() > 1e-4 for name, tensor in exported.items() if "lora_B" in name)
    assert read_metadata(folder / FILE)["expert"] == "low_noise"
    assert verify(folder / f"checkpoint-{STEPS}", hashes=True) == []
    assert not list(folder.glob("transformer*"))
    pipeline = diffusers.WanPipeline.from_pretrained(setup.model)
    pipeline.load_lora_weights(folder, weight_name=FILE, load_into_transformer_2=True)
    pipeline.fuse_lora(components=["transformer_2"])
    pipeline.unload_lora_weights()
    for place in EXPERTS.values():
        before, after = runs.read_weights(setup.model / place), getattr(pipeline, place).state_dict()
        changed = [name for name in after if not torch.equal(after[name], before[name])]
        assert bool(changed) is (place == "transformer_2")


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_lora_of_an_expert_trains_like_one_process_and_resumes(
    lora: BackendRuns, tmp_path: Path, backend: str
) -> None:
    folder = tmp_path / "run"
    ranks = lora.run_ranks(backend, folder)
    assert exit_codes(ranks) == [0, 0], output_of(ranks)
    found, wanted = forkserver.read_steps(folder), forkserver.read_steps(lora.baseline)
    assert [line["rows"] for line in found] == [line["rows"] for line in wanted]
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in wanted], abs=0.02)
    assert [line["grad_norm"] for line in found] == pytest.approx([line["grad_norm"] for line in wanted], rel=0.05)
    trained, expected = (load_file(run / FILE) for run in (folder, lora.baseline))
    assert trained.keys() == expected.keys()
    halves = [torch.cat([t.flatten() for name, t in sorted(file.items()) if "lora_B" in name])
              for file in (trained, expected)]  # fmt: skip
    assert torch.nn.functional.cosine_similarity(*halves, dim=0) > 0.97
    check_adapters(lora, folder)
    last = (folder / FILE).read_bytes()
    check_resume(lora, backend, folder)
    assert (folder / FILE).read_bytes() == last


@pytest.mark.slow
def test_a_dora_of_an_expert_resumes_and_samples_as_in_the_pipeline(full: BackendRuns, tmp_path: Path) -> None:
    flags = {**LORA, **SAMPLES, "lora_type": "dora", "lr_warmup_steps": 0, "checkpointing_steps": STEPS // 2}
    folder = tmp_path / "run"
    outcome = runs.train(full.flags(folder, **flags), runs.train_script("wan2.2"))
    assert outcome.code == 0, outcome.stderr
    names = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    assert set(names) == {FILE} and any("magnitude" in name for name in load_file(folder / FILE))
    shutil.copytree(folder, tmp_path / "whole")
    halfway = folder / f"checkpoint-{STEPS // 2}"
    again = runs.train(full.flags(folder, **flags, resume_from_checkpoint=halfway), runs.train_script("wan2.2"))
    assert again.code == 0, again.stderr
    assert {path.name: path.read_bytes() for path in folder.glob("*.safetensors")} == names
    assert forkserver.read_steps(folder) == forkserver.read_steps(tmp_path / "whole")
    own = np.asarray(Image.open(folder / f"samples/step-{STEPS:06d}-prompt-0.png"))
    pipeline = pipeline_of(full.model)
    before = picture(pipeline)
    pipeline.load_lora_weights(folder, weight_name=FILE, load_into_transformer_2=True)
    assert not hasattr(pipeline.transformer, "peft_config") and pipeline.transformer_2.peft_config
    assert np.array_equal(picture(pipeline), own) and not np.array_equal(before, own)
    assert np.array_equal(picture_of_script(folder, "--output", tmp_path / "clips"), own)


# ----------------------------------------------------------------------------------------------------------------- EMA


@pytest.mark.slow
def test_the_ema_of_an_expert_is_resumed_exported_and_sampled(full: BackendRuns, tmp_path: Path) -> None:
    flags = {**SAMPLES, "use_ema": True, "ema_decay": 0.5, "validate_ema": True, "lr_warmup_steps": 0,
             "export_dtype": "fp32", "learning_rate": "1e-2", "max_grad_norm": 1.0}  # fmt: skip
    folder = tmp_path / "run"
    outcome = runs.train(full.flags(folder, **flags), runs.train_script("wan2.2"))
    assert outcome.code == 0, outcome.stderr
    assert {path.name for path in folder.glob("transformer*")} == {"transformer_2", "transformer_2_ema"}
    weights, averaged = outcome.weights("transformer_2"), outcome.weights("transformer_2_ema")
    assert weights.keys() == averaged.keys() == runs.read_weights(full.model / "transformer_2").keys()
    assert any(not torch.equal(weights[name], averaged[name]) for name in weights)
    assert read_metadata(folder / "transformer_2_ema")["expert"] == "low_noise"
    last = outcome.validation[-1]
    assert last["ema_loss"] != last["loss"]
    # the pipeline with the averaged expert shows what the run's own sample shows, which the EMA makes
    model = diffusers.WanTransformer3DModel.from_pretrained(folder / "transformer_2_ema")
    made = picture(pipeline_of(full.model, transformer_2=model))
    own = np.asarray(Image.open(folder / f"samples/step-{STEPS:06d}-prompt-0.png"))
    assert np.array_equal(made, own)
    assert np.array_equal(picture_of_script(folder, "--ema", "--output", tmp_path / "clips"), own)
    assert not np.array_equal(picture_of_script(folder, "--output", tmp_path / "plain"), own)
    halfway = folder / f"checkpoint-{STEPS // 2}"
    again = runs.train(full.flags(folder, **flags, resume_from_checkpoint=halfway), runs.train_script("wan2.2"))
    assert again.code == 0, again.stderr
    after = again.weights("transformer_2_ema")
    assert all(torch.equal(after[name], averaged[name]) for name in averaged)
    assert again.validation[-1]["ema_loss"] == last["ema_loss"]
