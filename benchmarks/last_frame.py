"""Overfits one clip from its first and last frame, and from its first frame alone; writes last_frame.md.

    python benchmarks/last_frame.py [--steps 100] [--output benchmarks/last_frame.md]

Both runs have equal flags, data and seed; --train_mode flf2v gives the model both frames, i2v hides the last one. The
model is that of the Wan2.1 demo, without an image embedder, so that it takes both modes.

- One clip: a scene of the demo, learned from random weights. Measured: the loss on the clip at fixed noise, and how
  far the sampled clip is from it, between the normalised latents of the VAE.
- Clips that were not trained: each fades from one pattern to another, and every pattern occurs in one clip only, so
  that only the last frame says where a clip goes. Measured: the loss on eight held-out clips.

If the last frame does not lower every figure, the command fails, and nothing is written.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/support"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import demo_data
import demo_model
import demo_show
import numpy as np
import runs
import tiny
import torch
from PIL import Image

from videox.data.media.video import read_clip

SHOWN, HIDDEN = MODES = ("flf2v", "i2v")
SCENE = demo_data.SCENES[1]  # people walk by: the end is not that of the beginning
PATTERNS, HELD_OUT, TILE = 40, 8, 16
FRAMES, HEIGHT, WIDTH = demo_show.FRAMES, demo_show.HEIGHT, demo_show.WIDTH
FLAGS = {
    "mixed_precision": "no", "gradient_checkpointing": None, "low_vram": None, "caption_dropout": 0,
    "tokenizer_max_length": 16, "vae_sample_mode": "mode", "cache_variants": 1, "clip_sampling": "head",
    "fix_sample_size": [HEIGHT, WIDTH], "video_sample_n_frames": FRAMES, "num_train_epochs": None, "video_repeat": 200,
    "lr_scheduler": "cosine", "lr_warmup_steps": 20, "adam_beta2": 0.95, "adam_weight_decay": 0, "max_grad_norm": 1,
    "train_batch_size": 4, "learning_rate": "2e-3", "checkpointing_steps": 10**6, "validation_steps": 10**6,
    "validation_epochs": 0, "random_hw_adapt": None, "training_with_video_token_length": None,
}  # fmt: skip


def build_model(folder: Path) -> Path:
    """Write the demo's image-to-video model with its trained VAE; return the folder."""
    demo_model.build_wan_i2v(folder, image_embedder=False, **demo_model.WAN_DEMO)
    demo_model.use_trained_vae(folder)
    return folder


def train(
    model: Path, metadata: Path, folder: Path, steps: int, family: str = "wan2.1", **changes: object
) -> runs.Outcome:
    """Run the train script; raises SystemExit with its output if it fails."""
    flags = {**FLAGS, "latent_cache": folder.parent / "cache", "max_train_steps": steps, **changes}
    outcome = runs.train(runs.train_flags(family, model, metadata, folder, **flags), runs.train_script(family))
    if outcome.code:
        raise SystemExit(f"{folder.name} ended with {outcome.code}: {outcome.stderr[-3000:]}")
    return outcome


# ----------------------------------------------------------------------------------------------------------- one clip


def write_pictures(data: Path, clip: Path) -> list[Path]:
    """Write the first and the last frame of a clip as the model gets it; return their paths."""
    frames = read_clip(clip, [0, (FRAMES - 1) * demo_show.STRIDE], HEIGHT, WIDTH)
    paths = [data / "first.png", data / "last.png"]
    for path, frame in zip(paths, frames, strict=True):
        Image.fromarray(frame).save(path)
    return paths


def learn_one_clip(mode: str, model: Path, data: Path, folder: Path, steps: int) -> dict[str, float]:
    """Learn the clip of a data folder by heart; return the figures by name."""
    (row,) = json.loads((data / "metadata.json").read_text(encoding="utf-8"))
    clip = data / row["file_path"]
    pictures = write_pictures(data, clip)[: 2 if mode == SHOWN else 1]
    outcome = train(
        model, data / "metadata.json", folder, steps, train_mode=mode, video_sample_stride=demo_show.STRIDE,
        validation_meta=data / "metadata.json", train_data_dir=None, sample_every=steps, sample_steps=20,
        sample_guidance=1, validation_prompts=[f"{row['text']} --w {WIDTH} --h {HEIGHT}"], validation_paths=pictures,
    )  # fmt: skip
    vae = demo_show.AutoencoderKLWan.from_pretrained(model / "vae", torch_dtype=torch.float32)
    (learned,) = demo_show.training_clips(data, [row], vae)
    path = folder / "samples" / f"step-{steps:06d}-prompt-0.mp4"
    (sampled,) = demo_show.generated_clips([path], [SCENE], vae)
    apart = (sampled.latents - learned.latents).square()
    return {
        "loss on the clip": float(outcome.validation[-1]["loss"]),
        "distance of the sampled clip": float(apart.mean()),
        "distance of its last latent frame": float(apart[:, -1].mean()),
    }


# ------------------------------------------------------------------------------------------------------ held-out clips


def write_fades(folder: Path) -> Path:
    """Write clips that fade from one pattern of coloured tiles to another; return the path of metadata.json."""
    draw = np.random.default_rng(0)
    patterns = draw.integers(0, 256, (PATTERNS, 2, HEIGHT // TILE, WIDTH // TILE, 3)).repeat(TILE, 2).repeat(TILE, 3)
    share = np.linspace(0, 1, FRAMES)[:, None, None, None]
    rows = []
    for number, (first, last) in enumerate(patterns):
        tiny.write_clip(folder / f"{number}.mp4", pixels=((1 - share) * first + share * last).astype(np.uint8))
        rows.append({"file_path": f"{number}.mp4", "text": "a wall of coloured tiles", "type": "video"})
    metadata = folder / "metadata.json"
    metadata.write_text(json.dumps(rows), encoding="utf-8")
    return metadata


def learn_fades(mode: str, model: Path, metadata: Path, folder: Path, steps: int) -> dict[str, float]:
    """Learn the fading clips; return the figure by name."""
    held_out = {"train_mode": mode, "validation_rows": HELD_OUT, "video_sample_stride": 1}
    outcome = train(model, metadata, folder, steps, **held_out)
    return {f"loss on {HELD_OUT} held-out clips": float(outcome.validation[-1]["loss"])}


# -------------------------------------------------------------------------------------------------------------- report


def rows_of(figures: Mapping[str, Mapping[str, float]]) -> list[tuple[str, float, float, float]]:
    """Return (name, with both frames, with the first alone, their ratio) of each figure; figures: by mode."""
    shown, hidden = (figures[mode] for mode in MODES)
    return [(name, value, hidden[name], hidden[name] / value) for name, value in shown.items()]


def page(
    one: Mapping[str, Mapping[str, float]], fades: Mapping[str, Mapping[str, float]], steps: int, seconds: float
) -> str:
    """Return last_frame.md."""
    head = ["| figure | first and last frame | first frame alone | ratio |", "| --- | --- | --- | --- |"]

    def table(figures: Mapping[str, Mapping[str, float]]) -> list[str]:
        rows = rows_of(figures)
        return [*head, *(f"| {name} | {a:.4f} | {b:.4f} | {ratio:.2f} |" for name, a, b, ratio in rows)]

    return "\n".join([
        "# What the last frame is worth", "",
        f"Written by `python benchmarks/last_frame.py` on {date.today():%d %B %Y}: the Wan2.1 demo's model from random "
        f"weights, {steps} steps of {FLAGS['train_batch_size']} samples in float32, with `--train_mode flf2v` (first and "
        "last frame) and `i2v` (first frame alone), otherwise with equal flags, data and seed. Lower is better; the ratio "
        "is the second value divided by the first.", "",
        "## One clip, learned by heart", "",
        f"A scene of the demo, {FRAMES} frames of {WIDTH}x{HEIGHT}. The loss is measured at fixed noise. Distances are mean "
        "squared differences of normalised latents between the clip and the one that the trainer sampled from the "
        "picture or pictures: 0 for equal clips, about 2 for different ones.", "",
        *table(one), "",
        "## Clips that were not trained", "",
        f"{PATTERNS} clips that fade from one pattern of tiles to another, {HELD_OUT} of them held out. No pattern occurs "
        "twice.", "",
        *table(fades), "",
        f"The four runs took {seconds:.0f} s of processor time on a machine with {os.cpu_count()} CPU cores; torch "
        f"{version('torch').split('+')[0]}, diffusers {version('diffusers')}.", "",
    ])  # fmt: skip


def parse(description: str, script: Path, steps: str) -> argparse.Namespace:
    """Parse the flags of a benchmark whose page stands beside it; steps: help of --steps."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help=steps)
    parser.add_argument("--output", type=Path, default=script.with_suffix(".md"), help="page to write")
    return parser.parse_args()


def main() -> int:
    """Train the four runs, print the figures and write the page; return 1 if the last frame does not help."""
    args = parse(__doc__, Path(__file__), "optimizer steps of each run")
    with tempfile.TemporaryDirectory(prefix="videox-last-frame-") as name:
        folder = Path(name)
        model = build_model(folder / "model")
        demo_data.build_scenes(folder / "scene", (SCENE,), demo_show.SOURCE_FRAMES)
        metadata = write_fades(folder / "fades")
        one = {
            mode: learn_one_clip(mode, model, folder / "scene", folder / f"one-{mode}", args.steps) for mode in MODES
        }
        fades = {mode: learn_fades(mode, model, metadata, folder / f"fades-{mode}", args.steps) for mode in MODES}
    rows = [*rows_of(one), *rows_of(fades)]
    for label, shown, hidden, ratio in rows:
        print(f"{label}: {shown:.4f} from first and last frame, {hidden:.4f} from the first alone, ratio {ratio:.2f}")
    if wrong := [label for label, _, _, ratio in rows if not ratio > 1]:
        print(f"WRONG: the last frame does not lower: {', '.join(wrong)}")
        return 1
    args.output.write_text(page(one, fades, args.steps, time.process_time()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
