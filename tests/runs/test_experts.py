"""Tests of scripts/wan2.2/train.py: an expert is trained on its noise levels, exported, and sampled with the other."""

from __future__ import annotations

import json
import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import originals
import pytest
import runs
import tiny
import torch
from diffusers import WanPipeline
from PIL import Image

from videox.diffusion.noise_window import NoiseWindow
from videox.errors import FLAGS, MODEL, UserError
from videox.families import wan_both
from videox.families.wan_experts import other_expert
from videox.models.scheduler import with_shift
from videox.weights.expert_names import EXPERTS
from videox.weights.header import read_metadata

BOUNDARY, SHIFT = 0.875, 3.0
PROMPT = "a rabbit walks"
SCRIPT = runs.TRAIN_SCRIPTS["wan2.2"]
SETTINGS = {
    "mixed_precision": "no", "max_train_steps": 1, "export_dtype": "fp32", "sample_steps": 4, "tokenizer_max_length": 16,
    "gradient_checkpointing": None, "checkpointing_steps": 1, "learning_rate": 0.01, "lr_warmup_steps": 0,
    "max_grad_norm": 10, "low_vram": None, "video_sample_n_frames": 5, "image_sample_size": 64, "sample_seed": 3,
    "dump_steps": 1, "train_batch_size": 2, "validation_rows": 1,
}  # fmt: skip
SAMPLES = {"validation_prompts": [f"{PROMPT} --f 1 --w 64 --h 48"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_wan22_t2v(tmp_path_factory.mktemp("model") / "wan")


@pytest.fixture(scope="module")
def train(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., runs.Outcome]:
    folder = tmp_path_factory.mktemp("runs")
    metadata = tiny.make_dataset(folder / "data")

    def start(name: str, **changes: object) -> runs.Outcome:
        argv = runs.train_flags("wan2.2", model, metadata, folder / name, **{**SETTINGS, **changes})
        return runs.train(argv, runs.train_script("wan2.2"))

    return start


class Both:
    """Runs of --expert both in this process.

    Attributes:
        commands: that were to replace the process.
        variables: that each command was to get.
    """

    def __init__(self, train: Callable[..., runs.Outcome]) -> None:
        self._train, self.commands, self.variables = train, [], []

    def train(self, name: str, **changes: object) -> runs.Outcome:
        """Train; where the process would become another one, the command is kept, and it returns."""

        def keep(command: list[str], environment: dict[str, str]) -> int:
            self.commands.append(command)
            self.variables.append(environment)
            return 0

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(wan_both, "restart", keep)
            return self._train(name, expert="both", **changes)

    def next(self) -> runs.Outcome:
        """Run the last command."""
        interpreter, unbuffered, script, *words = self.commands[-1]
        assert (interpreter, unbuffered, script) == (sys.executable, "-u", str(runs.ROOT / SCRIPT))
        return runs.train(words, runs.train_script("wan2.2"))


@pytest.fixture(scope="module")
def both(train: Callable[..., runs.Outcome]) -> Both:
    return Both(train)


@pytest.fixture(scope="module")
def high(both: Both) -> runs.Outcome:
    outcome = both.train("both", **SAMPLES)
    return replace(outcome, folder=outcome.folder / "high_noise")


@pytest.fixture(scope="module")
def low(both: Both, high: runs.Outcome) -> runs.Outcome:
    assert high.code == 0
    return replace(both.next(), folder=high.folder.with_name("low_noise"))


def parsed(model: Path, **flags: object) -> Namespace:
    words = {"pretrained_model_name_or_path": model, "train_data_meta": "m.json", "output_dir": "out", **flags}
    return runs.train_script("wan2.2").parse_args(runs.to_argv(words))


def refusal(action: Callable[[], Any]) -> UserError:
    with pytest.raises(UserError) as raised:
        action()
    return raised.value


# ------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(("expert", "words"), [("high_noise", "sigma 0.875 to 1"), ("low_noise", "sigma 0 to 0.875")])
def test_an_expert_trains_and_validates_in_its_window(expert: str, words: str, request: pytest.FixtureRequest) -> None:
    outcome: runs.Outcome = request.getfixturevalue(expert.removesuffix("_noise"))
    assert outcome.code == 0, outcome.stderr
    assert f"expert      {expert}, {words} (the boundary is 0.875)" in outcome.stdout
    assert f"flow shift  {SHIFT:g} (the model's scheduler/scheduler_config.json)" in outcome.stdout
    dumps = [runs.read_dump(path) for path in sorted((outcome.folder / "dump/step-1").glob("*.safetensors"))]
    timesteps = torch.cat([dump["timestep"] for dump in dumps])
    levels = [sigma for sigma, _ in outcome.validation[-1]["per_sigma"]]
    inside = (lambda value: value >= BOUNDARY) if expert == "high_noise" else (lambda value: value < BOUNDARY)
    assert len(timesteps) and all(inside(t / 1000) for t in timesteps.tolist())
    assert len(levels) == 4 and all(map(inside, levels))


def test_the_other_expert_and_the_layout_stay_as_they_are(high: runs.Outcome, low: runs.Outcome, model: Path) -> None:
    for outcome, expert in ((high, "high_noise"), (low, "low_noise")):
        (exported,) = (path.name for path in outcome.folder.glob("transformer*"))
        assert exported == EXPERTS[expert]
        base, trained = runs.read_weights(model / exported), outcome.weights(exported)
        assert base.keys() == trained.keys()
        assert any(not torch.equal(base[name], trained[name]) for name in base)
        header = read_metadata(outcome.folder / exported)
        assert (header["expert"], header["boundary"], header["task"]) == (expert, "0.875", "wan2.2 normal")
        assert header["modelspec.timestep_range"] == {"high_noise": "875,1000", "low_noise": "0,875"}[expert]


def test_samples_are_those_of_the_pipeline_with_both_trained_experts(
    high: runs.Outcome, low: runs.Outcome, model: Path, tmp_path: Path
) -> None:
    own = np.asarray(Image.open(low.folder / "samples/step-000001-prompt-0.png"))
    whole = shutil.copytree(model, tmp_path / "model")
    for outcome, name in zip((high, low), EXPERTS.values(), strict=True):  # as a user puts the exports into the model
        shutil.copytree(outcome.folder / name, whole / name, dirs_exist_ok=True)
    pipeline = WanPipeline.from_pretrained(whole)
    assert pipeline.config.boundary_ratio == BOUNDARY
    pipeline.register_modules(scheduler=with_shift(pipeline.scheduler, SHIFT))
    pipeline.set_progress_bar_config(disable=True)
    calls = {name: count_calls(getattr(pipeline, name)) for name in EXPERTS.values()}
    sample = partial(
        pipeline, prompt=PROMPT, negative_prompt="", height=48, width=64, num_frames=1, num_inference_steps=4,
        guidance_scale=4.0, max_sequence_length=16, output_type="np",
    )  # fmt: skip
    frames = sample(generator=torch.Generator().manual_seed(3)).frames[0]
    assert {name: len(seen) for name, seen in calls.items()} == {
        "transformer": 4,
        "transformer_2": 4,
    }  # two steps each
    assert np.array_equal((frames[0].clip(0, 1) * 255).round().astype(np.uint8), own)
    before = np.asarray(Image.open(low.folder / "samples/step-000000-prompt-0.png"))
    assert not np.array_equal(before, own)


def count_calls(module: torch.nn.Module) -> list[int]:
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_the_sample_script_makes_the_clips_of_the_run(low: runs.Outcome, tmp_path: Path) -> None:
    script = tiny.load_script("scripts/sample.py")
    with runs.restored_process_state():
        os.environ["ACCELERATE_USE_CPU"] = "true"
        assert script.main([str(low.folder), "--output", str(tmp_path / "clips")]) == 0
    name = "step-000001-prompt-0.png"
    assert (tmp_path / "clips" / name).read_bytes() == (low.folder / "samples" / name).read_bytes()


@pytest.fixture(scope="module")
def lora(train: Callable[..., runs.Outcome]) -> runs.Outcome:
    changes = {"lora_rank": 2, "lora_alpha": 4, "export_layouts": ["comfyui"], "validation_rows": None}
    return train("style/low_noise", expert="low_noise", **changes)


def test_a_lora_is_named_for_its_expert_and_loads_into_it(lora: runs.Outcome, model: Path) -> None:
    outcome = lora
    assert outcome.code == 0, outcome.stderr
    names = {path.name for path in outcome.folder.glob("*.safetensors")}
    stem = "pytorch_lora_weights_low_noise"
    assert names == {f"{stem}.safetensors", f"{stem}_comfyui.safetensors"}
    headers = [read_metadata(outcome.folder / name) for name in names]
    assert all(header["expert"] == "low_noise" for header in headers)
    assert all(header["modelspec.timestep_range"] == "0,875" for header in headers)
    assert all(header["ss_output_name"] == "style_low_noise" for header in headers)  # of the folder of both runs
    assert f"trained weights: {outcome.folder / stem}.safetensors" in outcome.stderr
    pipeline = WanPipeline.from_pretrained(model)
    pipeline.load_lora_weights(outcome.folder, weight_name=f"{stem}.safetensors", load_into_transformer_2=True)
    adapted = {name: hasattr(getattr(pipeline, name), "peft_config") for name in EXPERTS.values()}
    assert adapted == {"transformer": False, "transformer_2": True}


def test_the_lora_of_the_other_expert_is_in_the_clips(lora: runs.Outcome, model: Path) -> None:
    script, args = runs.train_script("wan2.2"), parsed(model, expert="high_noise", other_transformer_path=lora.folder)
    components = script.check_model(args)
    assert components["other"].path == model / "transformer_2"
    accelerator = SimpleNamespace(device=torch.device("cpu"), mixed_precision="no")
    with script.load_other(args, components["other"], accelerator, lambda value: [value]).on_device() as other:
        found = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    pipeline = WanPipeline.from_pretrained(model)
    base = {name: tensor.clone() for name, tensor in pipeline.transformer_2.state_dict().items()}
    name = "pytorch_lora_weights_low_noise.safetensors"
    pipeline.load_lora_weights(lora.folder, weight_name=name, load_into_transformer_2=True)
    pipeline.fuse_lora(components=["transformer_2"])
    pipeline.unload_lora_weights()
    expected = pipeline.transformer_2.state_dict()
    assert found.keys() == expected.keys() == base.keys()
    assert any(not torch.equal(found[name], base[name]) for name in base)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-7)


def test_a_lora_of_another_model_is_refused_before_it_is_added(
    lora: runs.Outcome, model: Path, tmp_path: Path
) -> None:
    wider = tiny.build_wan22_t2v(tmp_path / "wider", ffn_dim=48)
    args = parsed(wider, expert="high_noise", other_transformer_path=lora.folder)
    component = runs.train_script("wan2.2").check_model(args)["other"]
    error = refusal(lambda: wan_both.merge_of_other(args, component, torch.float32))
    assert error.where == "--other_transformer_path" and "has an adapter for blocks.0.ffn" in error.what
    assert wan_both.merge_of_other(parsed(model, expert="high_noise"), component, torch.float32) is None


def test_a_folder_with_both_experts_is_sampled_with_both(
    high: runs.Outcome, low: runs.Outcome, model: Path, tmp_path: Path
) -> None:
    script = tiny.load_script("scripts/sample.py")
    for words, expert in (([], "low_noise"), (["--expert", "high_noise"], "high_noise")):
        flags = script.parse_flags([str(low.folder.parent), *words])
        source = script.find_source(flags)
        run, other = (low, high) if expert == "low_noise" else (high, low)
        assert source.weights == run.folder / EXPERTS[expert] and source.asked["expert"] == expert
        args = script.trainer_flags(runs.train_script("wan2.2"), script.FAMILIES["Wan2.2"], source, model, flags)
        assert (args.expert, args.transformer_path) == (expert, str(source.weights))
        assert Path(args.other_transformer_path) in (other.folder, other.folder / EXPERTS[other_expert(expert)])
    both = tmp_path / "exports"
    for run, name in ((high, "transformer"), (low, "transformer_2")):
        shutil.copytree(run.folder / name, both / name)
    flags = script.parse_flags([str(both), "--base", str(model)])
    source = script.find_source(flags)
    assert (source.weights, source.other) == (both / "transformer_2", both / "transformer")
    assert (
        script.trainer_flags(runs.train_script("wan2.2"), script.FAMILIES["Wan2.2"], source, model, flags).expert
        == "low_noise"
    )


# ---------------------------------------------------------------------------------------------- both in one command


def test_the_second_run_is_a_run_like_any_other(both: Both, high: runs.Outcome, low: runs.Outcome) -> None:
    assert len(both.commands) == 1 and low.code == 0, low.stderr
    asked = [json.loads((run.folder / "args.json").read_text())["asked"] for run in (high, low)]
    different = {name for name in asked[0] if asked[0][name] != asked[1][name]}
    assert different == {"expert", "output_dir", "other_transformer_path"}
    assert [values["expert"] for values in asked] == list(EXPERTS)
    assert asked[1]["other_transformer_path"] == str(high.folder)
    assert f"two runs: high_noise in {high.folder}, then low_noise in {low.folder}" in high.stdout
    assert "two runs" not in low.stdout
    states = [(run.status["state"], run.status["exit_code"]) for run in (high, low)]
    assert states == [("finished", 0)] * 2
    assert all("ACCELERATE_USE_CPU" in variables for variables in both.variables)


def test_a_finished_first_run_is_not_opened_again(both: Both, high: runs.Outcome, low: runs.Outcome) -> None:
    before = [(path, path.stat().st_mtime_ns) for path in sorted(high.folder.rglob("*"))]
    outcome = both.train("both", resume_from_checkpoint="latest", **SAMPLES)
    assert outcome.code == 0, outcome.stderr
    assert len(both.commands) == 1  # this process trains the second one
    assert f"high_noise is trained, {high.folder} is finished; now low_noise" in outcome.stdout
    assert "all of them are done" in outcome.stdout and str(low.folder) in outcome.stdout
    assert before == [(path, path.stat().st_mtime_ns) for path in sorted(high.folder.rglob("*"))]


@pytest.mark.parametrize(
    ("changes", "finished"),
    [
        ({}, True), ({"dataloader_num_workers": 2}, True), ({"resume_from_checkpoint": None}, False),
        ({"max_train_steps": 2}, False), ({"learning_rate": 0.5}, False), ({"export_layouts": ["comfyui"]}, False),
        ({"lora_rank": 2}, False), ({"output_dir": "elsewhere"}, False),
    ],
)  # fmt: skip
def test_what_reopens_a_finished_run(high: runs.Outcome, changes: dict[str, object], finished: bool) -> None:
    asked = json.loads((high.folder / "args.json").read_text())["asked"]
    args = Namespace(**{**asked, "resume_from_checkpoint": "latest", **changes})
    assert wan_both.is_finished(args) == finished


def test_an_occupied_second_folder_is_refused_before_the_first_run(both: Both, high: runs.Outcome) -> None:
    assert high.code == 0
    (high.folder.parent.parent / "taken/low_noise/checkpoint-3").mkdir(parents=True)
    outcome = both.train("taken")
    assert outcome.code == FLAGS and "low_noise already contains a run (it has checkpoint-3)" in outcome.stderr
    assert not (outcome.folder / "high_noise/metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("flags", "where", "words"),
    [
        ({"other_transformer_path": "o"}, "--other_transformer_path", "each expert is sampled with the other one"),
        (
            {"transformer_path": "t"},
            "--transformer_path",
            "does not contain the folders transformer and transformer_2",
        ),
        ({"resume_from_checkpoint": "c/checkpoint-5"}, "--resume_from_checkpoint", "is a checkpoint of one expert"),
    ],
)
def test_flags_that_both_cannot_share_are_refused(model: Path, flags: dict[str, str], where: str, words: str) -> None:
    error = refusal(lambda: parsed(model, expert="both", **flags))
    assert error.where == where and words in error.line()


def test_an_expert_is_not_trained_into_the_folder_of_both(high: runs.Outcome, model: Path) -> None:
    folder = high.folder.parent
    error = refusal(lambda: parsed(model, expert="high_noise", output_dir=folder))
    assert error.where == "--output_dir" and f"pass {folder}/high_noise, or --expert both" in error.line()
    parsed(model, expert="high_noise", output_dir=folder / "high_noise")


def test_the_seed_that_the_first_run_drew_is_that_of_the_second(high: runs.Outcome) -> None:
    asked = json.loads((high.folder / "args.json").read_text())["asked"]
    found = wan_both.links(Namespace(**{**asked, "seed": None}))
    assert found == {"seed": 42, "other_transformer_path": str(high.folder)}
    dora = wan_both.links(Namespace(**{**asked, "lora_type": "dora"}))
    assert dora["other_transformer_path"] is None


def test_a_window_of_the_second_expert_without_timesteps_is_refused_first(both: Both, high: runs.Outcome) -> None:
    assert high.code == 0
    outcome = both.train("narrow", train_sampling_steps=50)
    assert outcome.code == FLAGS and "error: --train_sampling_steps: 50: none of these" in outcome.stderr
    assert not (outcome.folder / "high_noise/metrics.jsonl").exists()


# ------------------------------------------------------------------------------------------------- refusals


def test_an_expert_has_to_be_chosen(model: Path) -> None:
    error = refusal(lambda: parsed(model))
    assert (error.where, error.exit_code) == ("--expert", FLAGS) and "pass --expert both" in error.line()


def test_a_run_resumes_with_its_own_expert(high: runs.Outcome, train: Callable[..., runs.Outcome]) -> None:
    assert high.code == 0
    changes = {"expert": "low_noise", "resume_from_checkpoint": "latest", "max_train_steps": 2}
    outcome = train("both/high_noise", **changes)
    assert outcome.code == MODEL
    assert "error: --expert: low_noise, checkpoint-1 is of the high_noise expert. Fix: pass --expert" in outcome.stderr


def test_each_script_refuses_the_models_of_the_other(model: Path, tmp_path: Path) -> None:
    words = {"pretrained_model_name_or_path": model, "train_data_meta": "m.json", "output_dir": "out"}
    wan21 = runs.train_script("wan2.1")
    error = refusal(lambda: wan21.check_model(wan21.parse_args(runs.to_argv(words))))
    assert error.exit_code == MODEL and error.hint == "use scripts/wan2.2/train.py"
    old = tiny.build_wan_t2v(tmp_path / "old")
    shutil.copytree(old / "transformer", old / "transformer_2")
    error = refusal(lambda: runs.train_script("wan2.2").check_model(parsed(old, expert="high_noise")))
    assert error.exit_code == MODEL and "has no boundary_ratio" in error.what
    error = refusal(
        lambda: runs.train_script("wan2.2").check_model(parsed(model, expert="high_noise", train_mode="i2v"))
    )
    assert error.where == "--train_mode i2v" and "takes 16 channels" in error.what


def test_a_window_without_timesteps_is_refused(model: Path) -> None:
    script, args = runs.train_script("wan2.2"), parsed(model, expert="low_noise", train_sampling_steps=50)
    error = refusal(lambda: script.describe(args, script.check_model(args), None))
    assert error.where == "--train_sampling_steps" and "none of these" in error.what


# --------------------------------------------------------------------------------------------- original layout


@pytest.mark.parametrize(("mode", "boundary", "shift"), [("normal", 0.875, 12.0), ("i2v", 0.9, 5.0)])
def test_the_original_layout_has_both_experts_boundary_and_shift(
    mode: str, boundary: float, shift: float, model: Path, tmp_path: Path
) -> None:
    source = model if mode == "normal" else tiny.build_wan22_i2v(tmp_path / "i2v")
    folder, script = originals.build_wan22(tmp_path / "original", source), runs.train_script("wan2.2")
    windows = {"high_noise": NoiseWindow(lowest=boundary), "low_noise": NoiseWindow(end=boundary)}
    for expert, place in EXPERTS.items():
        args = parsed(folder, expert=expert, train_mode=mode)
        components = script.check_model(args)
        trained = script.describe(args, components, None)
        assert (trained.boundary, trained.shift.value, trained.window) == (boundary, shift, windows[expert])
        others = {"transformer": place, "other": EXPERTS["low_noise" if expert == "high_noise" else "high_noise"]}
        for name, stored in others.items():
            tensors, expected = components[name].source(), runs.read_weights(source / stored)
            assert set(tensors) == set(expected)
            assert all(torch.equal(tensors[key], expected[key]) for key in expected)
