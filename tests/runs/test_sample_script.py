"""Tests of scripts/sample.py: clips of runs, checkpoints, exports and LoRAs, equal to those of the training."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import pytest
import runs
import tiny

from videox.run.lifecycle import run_script
from videox.tracking.jsonl import read_lines

PROMPTS = ["a rabbit walks --f 5 --w 64 --h 48", "a red ball --f 1 --d 9"]
SETTINGS = {
    "mixed_precision": "no", "max_train_steps": 1, "export_dtype": "fp32", "sample_steps": 2, "tokenizer_max_length": 16,
    "gradient_checkpointing": None, "validation_prompts": PROMPTS, "checkpointing_steps": 1, "learning_rate": 0.01,
    "lr_warmup_steps": 0, "train_batch_size": 2, "gradient_accumulation_steps": 1, "max_grad_norm": 10,
}  # fmt: skip


@dataclass(frozen=True)
class Sampled:
    """What the script did: exit code, output, and the bytes of its clips by name."""

    code: int
    stdout: str
    stderr: str
    clips: dict[str, bytes]


def sample(folder: Path, *words: object) -> Sampled:
    """Run the script in this process; its clips are written to the folder."""
    out, err = io.StringIO(), io.StringIO()
    script = tiny.load_script("scripts/sample.py")
    argv = [*map(str, words), "--output", str(folder)]
    with runs.restored_process_state(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        os.environ["ACCELERATE_USE_CPU"] = "true"
        try:
            run_script(lambda: script.main(argv))
        except SystemExit as end:
            code = int(end.code or 0)
    return Sampled(code, out.getvalue(), err.getvalue(), files_of(folder))


def files_of(folder: Path, step: int | None = None) -> dict[str, bytes]:
    """Return the clips in a folder by their names without the step."""
    pattern = f"step-{step:06d}-*" if step is not None else "step-*-prompt-*"
    return {path.name[12:]: path.read_bytes() for path in sorted(folder.glob(pattern))}


def frames(content: bytes) -> np.ndarray:
    with av.open(io.BytesIO(content)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(int)


def train(folder: Path, family: str = "wan2.1", **changes: object) -> runs.Outcome:
    build = tiny.build_wan_t2v if family == "wan2.1" else tiny.build_hunyuan_t2v
    model, metadata = build(folder / "model"), tiny.make_dataset(folder / "data")
    argv = runs.train_flags(family, model, metadata, folder / "run", **{**SETTINGS, **changes})
    outcome = runs.train(argv, runs.train_script(family))
    assert outcome.code == 0, outcome.stderr
    return outcome


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("full")).folder


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(
        tmp_path_factory.mktemp("lora"), lora_rank=2, learning_rate=0.1, use_ema=True, max_train_steps=2
    ).folder


def test_a_run_is_sampled_as_its_own_clips_were(run: Path, tmp_path: Path) -> None:
    own, first = files_of(run / "samples", 1), files_of(run / "samples", 0)
    assert [*own] == ["prompt-0.mp4", "prompt-1.png"] and own != first
    found = sample(tmp_path / "clips", run)
    assert found.code == 0, found.stderr
    assert found.clips == own
    assert "step 1, flow shift 3, cpu" in found.stdout and (tmp_path / "clips" / "step-000001.png").is_file()
    records = read_lines(tmp_path / "clips" / "clips.jsonl")
    assert [(r["file"], r["frames"], r["steps"]) for r in records] == [
        ("step-000001-prompt-0.mp4", 5, 2), ("step-000001-prompt-1.png", 1, 2),
    ]  # fmt: skip
    assert sample(tmp_path / "clips", run / "checkpoint-1").clips == own  # unchanged: this one wrote to another folder
    assert files_of(tmp_path / "clips-2") == own
    exported = sample(tmp_path / "export", run / "transformer", "--prompt", PROMPTS[1], "--seed", 4)
    assert [*exported.clips] == ["prompt-0.png"] and exported.clips["prompt-0.png"] == own["prompt-1.png"]


@pytest.mark.slow
def test_weights_outside_of_a_run_need_a_base(run: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(run / "transformer", tmp_path / "elsewhere")
    missing = sample(tmp_path / "a", moved, "--prompt", "a cat")
    assert (
        missing.code == 2 and missing.stderr.startswith("error: --base: ") and "Fix: pass the model" in missing.stderr
    )
    flags = ("--resolution", 48, 64, "--frames", 5, "--steps", 1, "--fps", 8, "--dtype", "fp32", "--guidance", 2)
    base = run.parent / "model"
    tuned = sample(tmp_path / "b", moved, "--base", base, "--prompt", "a cat", *flags)
    plain = sample(tmp_path / "c", base, "--prompt", "a cat", *flags)
    assert tuned.code == plain.code == 0, tuned.stderr + plain.stderr
    assert frames(tuned.clips["prompt-0.mp4"]).shape == (5, 48, 64, 3) and tuned.clips != plain.clips
    (record,) = read_lines(tmp_path / "b" / "clips.jsonl")
    assert (record["fps"], record["guidance_scale"], record["seed"]) == (8.0, 2.0, 0)


@pytest.mark.slow
def test_a_lora_is_sampled_with_its_scale(lora: Path, tmp_path: Path) -> None:
    own, base = files_of(lora / "samples", 2), files_of(lora / "samples", 0)  # a new LoRA changes nothing
    found = {scale: sample(tmp_path / f"{scale}", lora, "--lora_scale", scale) for scale in (0, 0.25, 1)}
    assert all(run.code == 0 for run in found.values()), found[1].stderr
    assert found[0].clips == base
    shown = {scale: frames(run.clips["prompt-0.mp4"]) for scale, run in found.items()}
    moved = np.abs(shown[1] - frames(base["prompt-0.mp4"])).mean()
    assert np.abs(shown[1] - frames(own["prompt-0.mp4"])).mean() < 0.1 * moved
    assert 0 < np.abs(shown[0.25] - shown[0]).mean() < 0.95 * moved  # pixels saturate: less than in proportion
    ema = sample(tmp_path / "ema", lora / "checkpoint-2", "--ema")
    assert ema.code == 0 and "transformer_ema" in ema.stdout and ema.clips != found[1].clips


@pytest.mark.slow
def test_a_dora_is_sampled_by_diffusers(tmp_path: Path) -> None:
    outcome = train(tmp_path, lora_rank=2, lora_type="dora", learning_rate=0.1)
    own, base = (frames(files_of(outcome.folder / "samples", step)["prompt-0.mp4"]) for step in (1, 0))
    found = sample(tmp_path / "clips", outcome.folder)
    assert found.code == 0, found.stderr
    moved = np.abs(own - base).mean()
    assert moved > 0 and np.abs(frames(found.clips["prompt-0.mp4"]) - own).mean() < 0.1 * moved


@pytest.mark.slow
def test_a_hunyuan_run_is_sampled_as_its_own_clips_were(tmp_path: Path) -> None:
    outcome = train(tmp_path, "hunyuanvideo")
    found = sample(tmp_path / "clips", outcome.folder)
    assert found.code == 0, found.stderr
    assert found.clips == files_of(outcome.folder / "samples", 1)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["missing"], "error: source: missing does not exist"),
        (["{run}", "--prompt", "a cat --x 1"], "error: --prompt, prompt 0: --x is not an option of a prompt"),
        (["{run}", "--prompt", "a cat", "--image", "a.png"], "error: --image: 1 image, --train_mode normal needs 0"),
        (["{run}", "--ema"], "error: --ema: "),
        (["{run}", "--frames", "6"], "error: --frames: 6: clips have 4k+1 frames. Fix: pass 5."),
        (["{run}/data"], "error: --base: "),
    ],
)
def test_wrong_words_are_one_line_before_any_weight_is_loaded(run, tmp_path, monkeypatch, words, line) -> None:
    script = tiny.load_script("scripts/sample.py")
    monkeypatch.setattr(script, "load_transformer", None)
    (run.parent / "no-run").mkdir(exist_ok=True)
    words = [word.replace("{run}/data", str(run.parent / "no-run")).replace("{run}", str(run)) for word in words]
    found = sample(tmp_path / "clips", *words)
    assert found.code in (2, 4) and found.stderr.startswith(line) and found.stderr.count("\n") == 1
    assert not (tmp_path / "clips").exists()
