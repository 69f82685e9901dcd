"""Tests of scripts/demo.py: the demos run to their end, show what was learned and print a valid next command.

Also of the small VAE in config/demo and of its training.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import runs
import tiny
import torch
from diffusers import AutoencoderKLWan
from PIL import Image

from videox.data.media.video import probe
from videox.training.prompts import read_prompts
from videox.weights.expert_names import EXPERTS

demo = tiny.load_script("scripts/demo.py")
demo_model = tiny.load_script("scripts/demo_model.py")
demo_run = sys.modules["demo_run"]  # as the demo imports it
show = tiny.load_script("scripts/demo_show.py")
vae_script = tiny.load_script("scripts/train_demo_vae.py")

KINDS = [(family, mode) for family, modes in demo.MODES.items() for mode in modes]
WAN_KINDS = [kind for kind in KINDS if kind[0] in demo.SHOWN]
HUNYUAN_KINDS = [kind for kind in KINDS if kind[0] == "hunyuanvideo"]
VAE_BYTES = 4_000_000  # at most, of the weights in config/demo


def test_each_family_of_the_demo_has_its_modes() -> None:
    assert {family: set(modes) for family, modes in demo.MODES.items()} == {
        "wan2.1": {"normal", "i2v", "inpaint"}, "wan2.2": {"normal", "i2v", "ti2v"}, "hunyuanvideo": {"normal", "i2v"},
    }  # fmt: skip
    assert set(demo.RECIPES) == set(KINDS) and set(demo.MODES) == set(runs.TRAIN_SCRIPTS)


@pytest.mark.parametrize(("family", "mode"), KINDS)
def test_the_train_script_accepts_the_demos_flags(family: str, mode: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    recipe, paths = demo.RECIPES[family, mode], demo.paths_of(family, mode, tmp_path)
    pictures = paths[paths.index("--validation_paths") + 1 :] if mode != "normal" else []
    for picture in pictures:
        Image.new("RGB", (32, 32)).save(picture)
    command = demo.train_command(family, mode, recipe, paths)
    args = runs.train_script(family).parse_args(command[command.index(runs.TRAIN_SCRIPTS[family]) + 1 :])
    assert (args.train_mode, args.max_train_steps) == (mode, recipe.steps)
    assert args.validation_paths == pictures and len(args.validation_prompts) == (3 if family in demo.SHOWN else 1)
    assert getattr(args, "expert", None) == ("both" if demo_run.trains_experts(family, mode) else None)
    if family in demo.SHOWN and mode != "normal":  # at the size that was trained, not at that of the picture
        sizes = [(prompt.height, prompt.width) for prompt in read_prompts(args.validation_prompts)]
        assert sizes == [(demo.HEIGHT, demo.WIDTH)] * 3
    assert 0 < recipe.checkpoint_steps < recipe.stop_step < recipe.steps  # there is a checkpoint before the stop


def test_the_train_script_accepts_the_flags_of_the_lora() -> None:
    command = demo.train_command("wan2.1", "normal", demo.LORA, ["--train_data_dir", "data", "--output_dir", "run"])
    command += ["--pretrained_model_name_or_path", "model"]
    args = runs.train_script().parse_args(command[command.index(runs.WAN_SCRIPT) + 1 :])
    assert args.lora_rank > 0 and args.max_train_steps == demo.LORA.steps


@pytest.mark.parametrize(("family", "mode"), KINDS)
def test_the_printed_next_command_is_valid(
    family: str, mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo.report(family, mode, tmp_path, ["loss 1.0"], 1.0)
    printed = capsys.readouterr().out
    words = shlex.split(printed[printed.index("accelerate launch") :].replace("\\\n", " "))
    assert words[3] == runs.TRAIN_SCRIPTS[family]
    assert runs.train_script(family).parse_args(words[4:]).train_mode == mode
    variant = demo.MODES[family][mode]
    assert f"models/Diffusion_Transformer/{variant.weights}" in (tiny.ROOT / "models/README.md").read_text("utf-8")
    assert issubclass(getattr(diffusers, variant.pipeline), diffusers.DiffusionPipeline)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--mode", "video"], "error: --mode: unknown mode 'video' for wan2.1. Fix: use normal or i2v or inpaint."),
        (["--family", "hunyuanvideo", "--mode", "inpaint"], "error: --mode: unknown mode 'inpaint' for hunyuanvideo."),
        (["--famly", "hunyuanvideo"], "error: --famly: is not a flag of this script. Fix: did you mean --family."),
        (["--what", "lora", "--mode", "i2v"], "error: --what: lora with wan2.1 and mode i2v: this demo is of wan2.1"),
    ],
)
def test_an_unknown_flag_or_value_is_an_error(
    argv: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output", str(tmp_path / "out"), *argv])
    with pytest.raises(SystemExit) as raised:
        demo.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert raised.value.code == 2 and line.startswith(message)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_the_demo_did_not_create_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("text", encoding="utf-8")
    with pytest.raises(demo.UserError, match="was not created by the demo"):
        demo.new_folder(tmp_path)
    assert (tmp_path / "precious.txt").exists()


def test_earlier_demos_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "wan2.1-normal"
    for number in range(3):
        demo.new_folder(folder)
        (folder / "sample.mp4").write_text(str(number), encoding="utf-8")
    kept = [folder.with_name(f"wan2.1-normal-{name}") for name in ("earlier", "earlier-2")]
    assert [path.joinpath("sample.mp4").read_text("utf-8") for path in (*kept, folder)] == ["0", "1", "2"]
    assert all(f"the earlier demo is now in {path}" in capsys.readouterr().out for path in kept[:1])


SLOW_TRAINING = """
import pathlib, sys, time
run = pathlib.Path(sys.argv[1]); run.mkdir()
for step in range(int(sys.argv[2])):
    with (run / "metrics.jsonl").open("a") as file: file.write("{}\\n")
    time.sleep(0.5)
time.sleep(float(sys.argv[3]))
"""


def test_a_slow_training_goes_on_and_one_without_a_new_step_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_run, "STEP_TIMEOUT", 2.5)
    command = [sys.executable, "-c", SLOW_TRAINING]
    demo_run.train([*command, str(tmp_path / "slow"), "7", "0"], [tmp_path / "slow"], tmp_path / "slow.log")
    with pytest.raises(demo.UserError, match=r"no new step for 2\.5 s"):
        demo_run.train([*command, str(tmp_path / "hung"), "1", "600"], [tmp_path / "hung"], tmp_path / "hung.log")


def test_the_steps_of_a_second_run_count_too(tmp_path: Path) -> None:
    folders = demo_run.run_folders("wan2.2", "i2v", tmp_path)
    assert [folder.name for folder in folders] == ["high_noise", "low_noise"]
    for family, mode in (("wan2.1", "normal"), ("wan2.2", "ti2v")):
        assert demo_run.run_folders(family, mode, tmp_path) == [tmp_path]
    assert demo_run.recorded_bytes(folders) == 0
    for number, folder in enumerate(folders):
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
        assert demo_run.recorded_bytes(folders) == 3 * (number + 1)


def test_make_passes_what_is_asked_for() -> None:
    for variables, expected in (
        ([], ("wan2.1", "normal", "full")),
        (["FAMILY=hunyuanvideo", "MODE=i2v"], ("hunyuanvideo", "i2v", "full")),
        (["WHAT=lora"], ("wan2.1", "normal", "lora")),
    ):
        printed = subprocess.run(
            ["make", "-n", "demo", *variables], cwd=tiny.ROOT, capture_output=True, text=True, check=True
        ).stdout
        assert 'scripts/demo.py --family "{}" --mode "{}" --what "{}"'.format(*expected) in printed


@pytest.mark.slow
def test_the_data_is_the_same_in_every_run(tmp_path: Path) -> None:
    one, other = demo.build_data(tmp_path / "one"), demo.build_data(tmp_path / "other", held_out={demo.HELD_OUT_PHOTO})
    assert [row for row in one if row["file_path"] != demo.HELD_OUT_PHOTO] == other and len(one) == len(other) + 1
    media = {path.name for path in (tmp_path / "one").iterdir()} - {"metadata.json"}
    assert {row["file_path"] for row in one} == media
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes() for name in media)


def test_the_scenes_are_the_same_in_every_run(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "other"]
    one, other = (demo.build_scenes(folder, demo.SCENES, demo.SOURCE_FRAMES) for folder in folders)
    assert one == other and [row["text"] for row in one] == [scene.caption for scene in demo.SCENES]
    for row in one:
        clip, same = (folder / row["file_path"] for folder in folders)
        assert clip.read_bytes() == same.read_bytes() and probe(clip).frames == demo.SOURCE_FRAMES
        with Image.open(demo.first_frame(clip)) as picture:
            assert picture.size == (probe(clip).width, probe(clip).height)


# --------------------------------------------------------------------------------------------------- comparison


def shown(caption: str, latents: torch.Tensor) -> object:
    return show.Shown(caption, np.zeros((demo.FRAMES, demo.HEIGHT, demo.WIDTH, 3), np.uint8), latents)


def test_a_generated_clip_is_compared_with_every_training_clip(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    latents = [torch.randn(16, 3, 10, 16, generator=draw) for _ in range(3)]
    trained = [shown(f"clip {i}", latent) for i, latent in enumerate(latents)]
    near = [shown(f"clip {i}", latent + 0.1) for i, latent in enumerate(latents)]
    lines, right = show.table(near, trained)
    assert right == 3 and [line.split()[i] for i, line in enumerate(lines)] == ["[0.010]"] * 3
    assert all(
        1.5 < value < 2.5
        for i, row in enumerate(show.distances(near, trained))
        for j, value in enumerate(row)
        if i != j
    )
    _, right = show.table([shown("clip 0", latents[1]), shown("clip 1", latents[1])], trained)
    assert right == 1
    show.write_comparison(tmp_path / "sheet.png", trained, [("generated", clip) for clip in near])
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 1000  # pairs: a training clip and a generated one in each row


def test_motions_are_compared_whatever_the_picture_is() -> None:
    def moving(left: int, background: int) -> object:
        frames = np.full((demo.FRAMES, demo.HEIGHT, demo.WIDTH, 3), background, np.uint8)
        for time, frame in enumerate(frames):
            frame[16:40, left + 8 * time : left + 8 * time + 16] = 255
        return show.Shown(f"from {left}", frames, torch.zeros(1))

    clips = [moving(0, 20), moving(48, 60)]
    still = show.Shown("from 0", np.repeat(clips[0].frames[:1], demo.FRAMES, axis=0), torch.zeros(1))
    assert show.motion_table(clips, clips)[1] == 2
    assert show.likeness(show.motion(clips[0].frames), show.motion(clips[0].frames)) == pytest.approx(1)
    assert show.likeness(show.motion(clips[0].frames), show.motion(clips[1].frames)) < 0.5
    assert show.likeness(show.motion(still.frames), show.motion(clips[0].frames)) == 0
    fainter = show.Shown("from 0", clips[0].frames // 2, torch.zeros(1))
    assert show.likeness(show.motion(fainter.frames), show.motion(clips[0].frames)) > 0.99


# ---------------------------------------------------------------------------------------------------------- VAE


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    return AutoencoderKLWan.from_pretrained(demo_model.TRAINED_VAE, torch_dtype=torch.float32)


def test_the_vae_of_the_demo_is_small_and_states_its_sources(vae: AutoencoderKLWan) -> None:
    files = list(demo_model.TRAINED_VAE.iterdir())
    assert sum(path.stat().st_size for path in files) < VAE_BYTES
    assert (vae.config.z_dim, vae.config.scale_factor_spatial, vae.config.scale_factor_temporal) == (16, 8, 4)
    page = (demo_model.TRAINED_VAE.parent / "README.md").read_text(encoding="utf-8")
    assert "scripts/train_demo_vae.py" in page and "CC BY 3.0" in page
    assert all(name in page for name, *_ in (*vae_script.CLIPS, *vae_script.PHOTOS))


LEAST_PSNR = 18.0  # dB; the mean colour of each clip gives 12 to 14


def test_the_vae_reconstructs_the_clips_of_the_demo(vae: AutoencoderKLWan, tmp_path: Path) -> None:
    rows = demo.build_scenes(tmp_path / "data", demo.SCENES, demo.SOURCE_FRAMES)
    clips = demo.training_clips(tmp_path / "data", rows, vae)
    latents = torch.stack([clip.latents for clip in clips])
    assert latents.shape == (3, 16, (demo.FRAMES + 3) // 4, demo.HEIGHT // 8, demo.WIDTH // 8)
    assert abs(latents.mean().item()) < 0.3 and 0.6 < latents.std().item() < 1.5
    mean, std = (torch.tensor(v)[:, None, None, None] for v in (vae.config.latents_mean, vae.config.latents_std))
    with torch.no_grad():
        restored = vae.decode(latents * std + mean).sample
    pixels = torch.from_numpy(np.stack([clip.frames for clip in clips])).permute(0, 4, 1, 2, 3) / 127.5 - 1
    error = (restored - pixels).square().mean(dim=(1, 2, 3, 4)) / 4  # for values from 0 to 1
    assert (-10 * error.log10()).min() > LEAST_PSNR


def test_the_vae_training_resumes_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {**vae_script.ARCHITECTURE, "base_dim": 4}
    draw = np.random.default_rng(0)
    scenes = [[torch.from_numpy(draw.integers(0, 256, (9, 72, 80, 3), dtype=np.uint8))]]
    monkeypatch.setattr(vae_script, "FRAMES", (5,))
    weights = []
    for name, parts in (("whole", (4,)), ("parts", (3, 4))):
        for steps in parts:
            with demo_model.seeded(0):
                vae = AutoencoderKLWan(**small)
            plan = vae_script.Schedule(2, 2, images=2)
            vae_script.fit(vae, scenes, plan, tmp_path / f"{name}.pt", seed=0, until=steps)
        weights.append(vae.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_convolutions_of_single_frames_have_the_values_of_the_class() -> None:
    with demo_model.seeded(0):
        vae = AutoencoderKLWan(**{**vae_script.ARCHITECTURE, "base_dim": 4}).requires_grad_(False)
        pixels = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    plain = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
    with vae_script.single_frame_convolutions():
        fast = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
    torch.testing.assert_close(fast, plain)


# -------------------------------------------------------------------------------------------------- whole demos


def run_demo(output: Path, *words: str) -> str:
    command = [sys.executable, "scripts/demo.py", "--output", str(output), *words]
    done = subprocess.run(command, cwd=tiny.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def check_run(folder: Path, family: str, mode: str, steps: int) -> Path:
    """Check that each run of a demo finished, with each step once, and that its weights differ from the model's.

    Returns:
        The folder of the last run.
    """
    for run, name in zip(demo_run.run_folders(family, mode, folder / "run"), EXPERTS.values(), strict=False):
        outcome = runs.Outcome(0, "", "", run, 0.0)
        assert (outcome.status["state"], outcome.status["step"]) == ("finished", steps)
        assert [record["step"] for record in outcome.metrics] == list(range(1, steps + 1))
        base, trained = runs.read_weights(folder / "model" / name), outcome.weights(name)
        assert base.keys() == trained.keys()
        assert any(not torch.equal(base[key].bfloat16().float(), trained[key].float()) for key in base)
        assert (run / "report.html").is_file()
    return run


LEAST_LIKENESS = 0.3  # of a generated clip's motion to that of its clip; a still has 0


@pytest.mark.slow
@pytest.mark.parametrize(("family", "mode"), WAN_KINDS)
def test_the_wan_demo_shows_what_it_learned(family: str, mode: str, tmp_path: Path) -> None:
    printed = run_demo(tmp_path, "--family", family, "--mode", mode)
    folder, recipe = tmp_path / f"{family}-{mode}", demo.RECIPES[family, mode]
    run = check_run(folder, family, mode, recipe.steps)
    vae = demo.load_vae(folder / "model")
    rows = json.loads((folder / "data/metadata.json").read_text(encoding="utf-8"))
    trained = demo.training_clips(folder / "data", rows, vae)
    paths = [run / "samples" / f"step-{recipe.steps:06d}-prompt-{number}.mp4" for number in range(3)]
    generated = demo.generated_clips(paths, demo.SCENES, vae)
    if mode != "inpaint":
        assert show.table(generated, trained)[1] == 3 and "3 of 3 generated clips are nearest" in printed
    if mode == "i2v":  # the pictures move on as their clips do
        assert show.motion_table(generated, trained)[1] == 3 and "3 of 3 move most like" in printed
        moved = [
            show.likeness(show.motion(a.frames), show.motion(b.frames))
            for a, b in zip(generated, trained, strict=True)
        ]
        assert min(moved) > LEAST_LIKENESS
    sampled = probe(folder / "sample.mp4")
    assert (sampled.frames, sampled.height, sampled.width) == (demo.FRAMES, demo.HEIGHT, demo.WIDTH)
    assert (folder / "comparison.png").is_file()


@pytest.mark.slow
def test_the_lora_demo_shows_the_difference(tmp_path: Path) -> None:
    printed = run_demo(tmp_path, "--what", "lora")
    numbers = {
        title: [float(word.strip("[]")) for word in line.split(title)[1].split()[:4]]
        for line in printed.splitlines()
        for title in ("with the LoRA ", "without it ")
        if f"    {title}" in line
    }
    own, *others = numbers["with the LoRA "]
    assert own < min(others) and own < numbers["without it "][0]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "mode"), HUNYUAN_KINDS)
def test_the_hunyuan_demo_runs_to_its_end(family: str, mode: str, tmp_path: Path) -> None:
    run_demo(tmp_path, "--family", family, "--mode", mode)
    folder, recipe = tmp_path / f"{family}-{mode}", demo.RECIPES[family, mode]
    check_run(folder, family, mode, recipe.steps)
    validation = demo_run.json_lines(folder / "run/validation.jsonl")
    assert validation[-1]["loss"] < 0.7 * validation[0]["loss"]
    sampled = probe(folder / "sample.mp4")
    assert (sampled.frames, sampled.height, sampled.width) == (17, 96, 160)
    assert (folder / "run/samples" / f"step-{recipe.steps:06d}-prompt-0.mp4").is_file()
    rows = json.loads((folder / "data/metadata.json").read_text(encoding="utf-8"))
    assert (demo.HELD_OUT_PHOTO in [row["file_path"] for row in rows]) == (mode == "normal")
