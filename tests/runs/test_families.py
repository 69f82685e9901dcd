"""Tests of every family and mode: bit-identical resume, export into the pipeline, image conditions, refusals."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import originals
import pytest
import runs
import tiny
import torch

from videox.diffusion import conditioning
from videox.encoders import hunyuan_text as text
from videox.encoders import vae
from videox.families import wan as wan_family

families = tiny.load_script("benchmarks/families.py")

CELLS = {cell.name: cell for cell in families.cells()}
# The cell of each family with the most inputs. Each takes about 20 s, so that the others are slow tests.
QUICK = {"wan2.1 i2v with image embedder", "wan2.2 ti2v", "hunyuanvideo i2v token_replace"}


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_dataset(tmp_path_factory.mktemp("data"), copies=2)


def test_every_mode_of_every_trainer_has_a_cell_and_every_trainer_a_quick_one() -> None:
    modes = {(cell.family, cell.mode) for cell in CELLS.values()}
    assert modes == {(family, mode) for family in runs.TRAIN_SCRIPTS for mode in runs.train_script(family).TASKS}
    assert {CELLS[name].family for name in QUICK} == set(runs.TRAIN_SCRIPTS)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CELLS]
)
def test_a_family_and_mode_resumes_loads_and_samples(name: str, metadata: Path, tmp_path: Path) -> None:
    found = families.run_cell(CELLS[name], metadata, tmp_path / "cell")
    assert found.wrong == []
    assert found.losses[-1] < 0.95 * found.losses[0]


@pytest.mark.slow
def test_differences_of_runs_with_different_seeds_are_found(metadata: Path, tmp_path: Path) -> None:
    model = tiny.build_wan_t2v(tmp_path / "model")
    settings = {"max_train_steps": families.STEPS, "validation_rows": 2}
    one, other = (
        runs.train(runs.wan_flags(model, metadata, tmp_path / str(seed), seed=seed, **settings)) for seed in (42, 43)
    )
    assert families.differences(one, one) == []
    assert families.differences(one, other) == [
        "metrics.jsonl", "validation.jsonl", "transformer", "checkpoint-4/transformer", "checkpoint-4/optimizer",
        "trainer_state.json",
    ]  # fmt: skip
    idle = runs.train(runs.wan_flags(model, metadata, tmp_path / "idle", learning_rate=0, max_train_steps=1))
    unloaded, exported = families.load(CELLS["wan2.1 normal"], idle.folder / "transformer")
    wrong = families.sample(CELLS["wan2.1 normal"], model, exported)
    assert (unloaded, wrong) == ([], ["the exported weights sample what the base model samples"])


# ----------------------------------------------------------------------------------------- the image condition is used

CLIPS, HELD_OUT, FRAMES, SIDE, TILE = 64, 8, 5, 64, 16
LEARN = {
    "train_mode": "i2v", "mixed_precision": "no", "gradient_checkpointing": None, "max_train_steps": 200,
    "learning_rate": "4e-03", "lr_warmup_steps": 10, "adam_weight_decay": 0, "max_grad_norm": 1.0, "video_repeat": 100,
    "num_train_epochs": None, "validation_rows": HELD_OUT, "validation_steps": 10**6, "validation_epochs": 0,
    "caption_dropout": 0, "image_sample_size": SIDE, "video_sample_stride": 1,
    "video_sample_n_frames": FRAMES, "checkpointing_steps": 10**6, "train_batch_size": 4, "vae_mini_batch": 4,
}  # fmt: skip

SHORT_PROMPT = {"tokenizer_max_length": 16, "image_embed_interleave": 5}  # the minimum number of text and image tokens


def write_tile_clips(folder: Path) -> tuple[Path, torch.Tensor]:
    """Write static clips, each of 4 x 4 tiles in random colours, all with the same caption.

    The first frame determines the clip, and nothing else does: the caption is always the same, every pattern occurs in
    one clip only, and eight patterns are held out, so that memorizing the training set does not help. The sixteen
    colours of a new pattern can come only from the image condition, or partly from the noisy latents.

    Returns:
        metadata.json and the clips, float32 [N, 3, T, H, W] in [-1, 1].
    """
    draw = np.random.default_rng(0)
    walls = draw.integers(0, 256, (CLIPS, 1, SIDE // TILE, SIDE // TILE, 3), dtype=np.uint8)
    clips = walls.repeat(TILE, 2).repeat(TILE, 3).repeat(FRAMES, 1)
    rows = []
    for number, pixels in enumerate(clips):
        tiny.write_clip(folder / f"{number}.mp4", pixels=pixels)
        rows.append({"file_path": f"{number}.mp4", "text": "a wall of coloured tiles", "type": "video"})
    metadata = folder / "metadata.json"
    metadata.write_text(json.dumps(rows), encoding="utf-8")
    return metadata, torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


INPAINT = {"tokenizer_max_length": 16, "train_mode": "inpaint"}


def wan(folder: Path, clips: torch.Tensor, *, image_embedder: bool) -> Path:
    sizes = {"heads": 4, "head_dim": 24, "layers": 2, "ffn_dim": 192}
    tiny.build_wan_i2v(folder, image_embedder=image_embedder, **sizes)
    tiny.load_script("scripts/demo_model.py").calibrate_latents(folder, clips)
    return folder


def hunyuan(folder: Path, clips: torch.Tensor, *, image_condition_type: str) -> Path:
    sizes = {"heads": 4, "rope_axes": (8, 8, 8), "layers": 1, "single_layers": 2}
    tiny.build_hunyuan_i2v(folder, image_condition_type=image_condition_type, **sizes)
    tiny.load_script("scripts/demo_hunyuan.py").calibrate_scaling_factor(folder, clips)
    return folder


def hide_from_wan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the image condition: mask channels and image embeddings are zero, condition latents are of a grey clip."""
    known_mask = conditioning.known_mask
    for module in (conditioning, wan_family):
        monkeypatch.setattr(
            module, "known_mask", lambda *args, **kwargs: torch.zeros_like(known_mask(*args, **kwargs))
        )


def hide_from_hunyuan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the image condition: latents encoded from one frame are zero, and Llava gets a black image.

    Only the latents of the first frame are encoded from one frame.
    """
    encode_moments, to_images = vae.encode_moments, text.to_images

    def without_first_frame(encoder: object, video: torch.Tensor, **settings: object) -> torch.Tensor:
        moments = encode_moments(encoder, video, **settings)
        return torch.zeros_like(moments) if video.shape[2] == 1 else moments

    monkeypatch.setattr(vae, "encode_moments", without_first_frame)
    monkeypatch.setattr(text, "to_images", lambda frames: to_images(torch.full_like(frames, -1)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "build", "kind", "text", "hide"),
    [
        ("wan2.1", wan, {"image_embedder": False}, {"tokenizer_max_length": 16}, hide_from_wan),
        ("wan2.1", wan, {"image_embedder": True}, {}, hide_from_wan),
        ("wan2.1", wan, {"image_embedder": False}, INPAINT, hide_from_wan),
        ("hunyuanvideo", hunyuan, {"image_condition_type": "token_replace"}, SHORT_PROMPT, hide_from_hunyuan),
        ("hunyuanvideo", hunyuan, {"image_condition_type": "latent_concat"}, SHORT_PROMPT, hide_from_hunyuan),
    ],
    ids=["wan2.1", "wan2.1-image-embedder", "wan2.1-inpaint", "token_replace", "latent_concat"],
)
def test_the_image_condition_lowers_the_held_out_loss(
    family: str,
    build: Callable[..., Path],
    kind: dict[str, object],
    text: dict[str, object],
    hide: Callable[[pytest.MonkeyPatch], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The held-out loss with the image condition falls far below that of the same run without it.

    Without the condition the model still learns to denoise tile patterns, from the noisy latents alone. The condition
    is hidden by patching functions of the train script, in training and in validation; model, data, noise and
    timesteps are the same in both runs.
    """
    metadata, clips = write_tile_clips(tmp_path / "data")
    model = build(tmp_path / "model", clips, **kind)
    losses = {}
    for hidden in (False, True):
        if hidden:
            hide(monkeypatch)
        argv = runs.train_flags(family, model, metadata, tmp_path / f"hidden-{hidden}", **LEARN | text)
        outcome = runs.train(argv, runs.train_script(family))
        assert outcome.code == 0, outcome.stderr
        first, last = outcome.validation
        losses[hidden] = last["loss"]
        assert last["loss"] < 0.5 * first["loss"]
    print(f"{family} {kind}: held-out loss {losses[False]:.4f} with the image condition, {losses[True]:.4f} without")
    # inpainting masks one clip in ten completely, and most of the others
    assert losses[False] < (0.8 if text is INPAINT else 0.6) * losses[True]


# ------------------------------------------------------------------------------------------------------------ refusals

T2V = {
    "wan2.1": (tiny.build_wan_t2v, ("scheduler", "tokenizer", "text_encoder", "vae", "transformer")),
    "hunyuanvideo": (
        tiny.build_hunyuan_t2v,
        ("scheduler", "tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "vae", "transformer"),
    ),
}
I2V = {
    "wan2.1": (tiny.build_wan_i2v, (*T2V["wan2.1"][1], "image_encoder", "image_processor")),
    "hunyuanvideo": (tiny.build_hunyuan_i2v, (*T2V["hunyuanvideo"][1], "image_processor")),
}
KINDS = {"normal": T2V, "i2v": I2V}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Return a function that builds the model of a family and mode once, and returns its folder."""
    folder = tmp_path_factory.mktemp("built")

    def model(family: str, mode: str) -> Path:
        path = folder / f"{family}-{mode}"
        return path if path.exists() else KINDS[mode][family][0](path)

    return model


def error_line(family: str, model: Path, metadata: Path, folder: Path, code: int, **changes: object) -> str:
    """Return the one error line of a refused run, after checking that run_status.json contains it too."""
    outcome = runs.train(runs.train_flags(family, model, metadata, folder, **changes), runs.train_script(family))
    assert outcome.code == code, outcome.stderr
    (line,) = outcome.stderr.splitlines()
    status = outcome.status
    assert (status["state"], status["exit_code"], status["step"], status["error"]) == ("failed", code, 0, line)
    assert line.startswith("error: ") and " Fix: " in line
    return line


@pytest.mark.parametrize(("family", "mode"), [(family, mode) for mode in KINDS for family in KINDS[mode]])
def test_component_lists_match_the_pipeline(family: str, mode: str, built: Callable[[str, str], Path]) -> None:
    index = json.loads((built(family, mode) / "model_index.json").read_text(encoding="utf-8"))
    components = {name for name, parts in index.items() if isinstance(parts, list) and parts[0] is not None}
    assert components == set(KINDS[mode][family][1])


@pytest.mark.parametrize(
    ("family", "mode", "missing"),
    [(family, mode, name) for mode in KINDS for family in KINDS[mode] for name in KINDS[mode][family][1]],
)
def test_a_model_without_one_component_is_refused(
    family: str, mode: str, missing: str, built: Callable[[str, str], Path], metadata: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(built(family, mode), tmp_path / "model")
    shutil.rmtree(model / missing)
    line = error_line(family, model, metadata, tmp_path / "out", 4, train_mode=mode)
    assert f"{model / missing}: does not exist " in line and "complete the model folder" in line


@pytest.mark.parametrize(
    ("family", "made_for", "mode", "message"),
    [
        ("wan2.1", "normal", "i2v", "the transformer takes 16 channels: it is made for --train_mode normal"),
        ("wan2.1", "normal", "inpaint", "the transformer takes 16 channels: it is made for --train_mode normal"),
        ("wan2.1", "i2v", "normal", "the transformer takes 36 channels: it is made for --train_mode i2v or inpaint"),
        ("hunyuanvideo", "normal", "i2v", "image_condition_type is None: it is made for --train_mode normal"),
        ("hunyuanvideo", "i2v", "normal", "image_condition_type is token_replace: it is made for --train_mode i2v"),
    ],
)
def test_weights_of_another_mode_are_refused(
    family: str,
    made_for: str,
    mode: str,
    message: str,
    built: Callable[[str, str], Path],
    metadata: Path,
    tmp_path: Path,
) -> None:
    line = error_line(family, built(family, made_for), metadata, tmp_path / "out", 4, train_mode=mode)
    assert line.startswith(f"error: --train_mode {mode}: ") and message in line


@pytest.mark.parametrize(("family", "other"), [("wan2.1", "hunyuanvideo"), ("hunyuanvideo", "wan2.1")])
def test_a_model_of_another_family_is_refused(
    family: str, other: str, built: Callable[[str, str], Path], metadata: Path, tmp_path: Path
) -> None:
    line = error_line(family, built(other, "normal"), metadata, tmp_path / "out", 4)
    assert "Pipeline model. Fix: pass a " in line


def test_hunyuanvideo_has_no_inpainting(built: Callable[[str, str], Path], metadata: Path, tmp_path: Path) -> None:
    model = built("hunyuanvideo", "i2v")
    argv = runs.train_flags("hunyuanvideo", model, metadata, tmp_path / "out", train_mode="inpaint")
    outcome = runs.train(argv, runs.train_script("hunyuanvideo"))
    (line,) = outcome.stderr.splitlines()
    assert outcome.code == 2 and line.startswith("error: --train_mode: invalid choice: 'inpaint'")
    assert "normal" in line and "i2v" in line
    assert not outcome.folder.exists()  # flags are checked before any folder is created


# ------------------------------------------------------------------------------------------ clips between two pictures


FLOAT32 = {"mixed_precision": "no", "export_dtype": "fp32"}  # exported as trained: equal clips


@pytest.mark.slow
def test_a_model_of_one_picture_samples_between_two(metadata: Path, tmp_path: Path) -> None:
    """The run's own clip is that of scripts/sample.py, and the last picture changes it; of Wan2.1-Fun InP's layout."""
    model = originals.build_wan_fun(tmp_path / "fun", tiny.build_wan_i2v(tmp_path / "model", image_dim=160))
    pictures = [tiny.write_image(tmp_path / f"{seed}.png", 64, 48, seed=seed) for seed in range(3)]
    clips = {}
    for last in (1, 2):
        shown = {"validation_prompts": ["a rabbit walks --f 5"], "validation_paths": [pictures[0], pictures[last]]}
        flags = {"train_mode": "flf2v", "max_train_steps": 1, "sample_steps": 2, **FLOAT32, **shown}
        outcome = runs.train(runs.wan_flags(model, metadata, tmp_path / f"run-{last}", **flags))
        assert outcome.code == 0, outcome.stderr
        assert "CLIP image  squash" in outcome.stdout
        clips[last] = (outcome.folder / "samples/step-000001-prompt-0.mp4").read_bytes()
    assert clips[1] != clips[2]
    with runs.restored_process_state():
        os.environ["ACCELERATE_USE_CPU"] = "true"
        script = tiny.load_script("scripts/sample.py")
        assert script.main([str(tmp_path / "run-1"), "--output", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again/step-000001-prompt-0.mp4").read_bytes() == clips[1]
