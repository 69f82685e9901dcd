"""Tests of scripts/demo.py: the demo of each family and mode runs to its end and prints a valid next command."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import runs
import tiny
import torch
from PIL import Image

from videox.data.media.video import probe

demo = tiny.load_script("scripts/demo.py")

KINDS = [(family, mode) for family, modes in demo.MODES.items() for mode in modes]


def test_both_families_have_both_modes() -> None:
    assert {family: set(modes) for family, modes in demo.MODES.items()} == {
        family: {"normal", "i2v"} for family in runs.TRAIN_SCRIPTS
    }


@pytest.mark.parametrize(("family", "mode"), KINDS)
def test_the_train_script_accepts_the_demos_flags(family: str, mode: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "data" / demo.HELD_OUT_PHOTO)
    command = demo.train_command(family, mode, tmp_path / "model", tmp_path / "data", tmp_path / "run")
    flags = command[command.index(runs.TRAIN_SCRIPTS[family]) + 1 :]
    args = runs.train_script(family).parse_args(flags)
    assert (args.train_mode, args.max_train_steps) == (mode, demo.STEPS)
    assert [Path(path).name for path in args.validation_paths] == ([demo.HELD_OUT_PHOTO] if mode == "i2v" else [])
    assert demo.CHECKPOINT_STEPS < demo.STOP_STEP < demo.STEPS  # there is a checkpoint before the stop


@pytest.mark.parametrize(("family", "mode"), KINDS)
def test_the_printed_next_command_is_valid(
    family: str, mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo.report(family, mode, tmp_path, [{"step": 0, "loss": 2.0}, {"step": 60, "loss": 1.0}], 1.0)
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
        (["--mode", "inpaint"], "error: --mode: unknown mode 'inpaint' for wan2.1. Fix: use normal or i2v."),
        (["--family", "hunyuanvideo", "--mode", "video"], "error: --mode: unknown mode 'video' for hunyuanvideo."),
        (["--famly", "hunyuanvideo"], "error: --famly: is not a flag of this script. Fix: did you mean --family."),
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


def test_a_folder_that_the_demo_did_not_create_is_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("text", encoding="utf-8")
    with pytest.raises(demo.UserError, match="was not created by the demo"):
        demo.reset_folder(tmp_path)
    assert (tmp_path / "precious.txt").exists()


def test_make_passes_family_and_mode() -> None:
    for variables, expected in (
        ([], ("wan2.1", "normal")),
        (["FAMILY=hunyuanvideo", "MODE=i2v"], ("hunyuanvideo", "i2v")),
    ):
        printed = subprocess.run(
            ["make", "-n", "demo", *variables], cwd=tiny.ROOT, capture_output=True, text=True, check=True
        ).stdout
        assert 'scripts/demo.py --family "{}" --mode "{}"'.format(*expected) in printed


def test_the_data_is_the_same_in_every_run(tmp_path: Path) -> None:
    one, other = demo.build_data(tmp_path / "one"), demo.build_data(tmp_path / "other", held_out={demo.HELD_OUT_PHOTO})
    assert [row for row in one if row["file_path"] != demo.HELD_OUT_PHOTO] == other and len(one) == len(other) + 1
    media = {path.name for path in (tmp_path / "one").iterdir()} - {"metadata.json"}
    assert {row["file_path"] for row in one} == media
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes() for name in media)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "mode"), KINDS)
def test_the_demo_runs_to_its_end(family: str, mode: str, tmp_path: Path) -> None:
    command = [sys.executable, "scripts/demo.py", "--family", family, "--mode", mode, "--output", str(tmp_path)]
    outcome = runs.run_command(command, tmp_path / f"{family}-{mode}" / "run")
    assert outcome.code == 0, outcome.stderr + outcome.stdout
    assert (outcome.status["state"], outcome.status["step"]) == ("finished", demo.STEPS)
    assert [record["step"] for record in outcome.metrics] == list(range(1, demo.STEPS + 1))
    assert outcome.validation[-1]["loss"] < 0.7 * outcome.validation[0]["loss"]
    base, trained = runs.read_weights(outcome.folder.parent / "model" / "transformer"), outcome.weights()
    assert base.keys() == trained.keys()
    assert any(not torch.equal(base[name].bfloat16().float(), trained[name].float()) for name in base)
    sampled = probe(outcome.folder.parent / "sample.mp4")
    assert (sampled.frames, sampled.height, sampled.width) == (17, 96, 160)
    assert (outcome.folder / "samples" / f"step-{demo.STEPS:06d}-prompt-0.mp4").is_file()
    rows = json.loads((outcome.folder.parent / "data" / "metadata.json").read_text(encoding="utf-8"))
    assert (demo.HELD_OUT_PHOTO in [row["file_path"] for row in rows]) == (mode == "normal")
