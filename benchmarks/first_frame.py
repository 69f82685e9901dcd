"""Trains a small TI2V model from the first frame of its clips, and with that frame hidden; writes first_frame.md.

    python benchmarks/first_frame.py [--steps 100] [--output benchmarks/first_frame.md]

Model, data, seed and flags are those of last_frame.py, except for the mode, which is --train_mode ti2v of Wan2.2.

- One clip: learned by heart with --i2v_ratio 1 and sampled from its first frame, and with --i2v_ratio 0 and sampled
  from its caption alone. Measured: how far the sampled clip is from it.
- Clips that were not trained: each fades from one pattern to another, and every pattern occurs in one clip only.
  Both runs have --i2v_ratio 1; the hidden frame has latents of zeros, so that the loss is of the same frames.

If the first frame does not lower every figure, the command fails, and nothing is written.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/support"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import demo_data
import demo_model
import demo_show
import torch
from last_frame import (
    FLAGS,
    FRAMES,
    HEIGHT,
    HELD_OUT,
    PATTERNS,
    SCENE,
    WIDTH,
    parse,
    train,
    write_fades,
    write_pictures,
)
from torch import Tensor

from videox.families import wan_ti2v

SHOWN, HIDDEN = "first frame", "hidden"
LONGER = 4  # as many steps for the fading clips: to copy a frame takes longer to learn than one clip
trained = partial(train, family="wan2.2", train_mode="ti2v", expert=None)


def build_model(folder: Path) -> Path:
    """Write the model of the TI2V demo; return the folder."""
    demo_model.build_wan22_5b(folder, residual_vae=False, **demo_model.WAN_DEMO)
    demo_model.use_trained_vae(folder)
    return folder


@contextmanager
def hidden_frame() -> Iterator[None]:
    """Give the transformer zeros instead of the latents of the first frame, in training and in validation."""
    own = wan_ti2v.given_frame

    def given_frame(first: Tensor, *others: object) -> dict[str, Tensor]:
        return own(torch.zeros_like(first), *others)  # type: ignore[arg-type]

    wan_ti2v.given_frame = given_frame  # type: ignore[assignment]
    yield
    wan_ti2v.given_frame = own


def learn_one_clip(name: str, model: Path, data: Path, folder: Path, steps: int) -> dict[str, float]:
    """Learn the clip of a data folder by heart; return the figures by name."""
    (row,) = json.loads((data / "metadata.json").read_text(encoding="utf-8"))
    picture = f" --i {write_pictures(data, data / row['file_path'])[0]}" if name == SHOWN else ""
    trained(
        model, data / "metadata.json", folder, steps, video_sample_stride=demo_show.STRIDE, sample_every=steps,
        i2v_ratio=1 if name == SHOWN else 0, train_data_dir=None, sample_steps=20, sample_guidance=1,
        validation_prompts=[f"{row['text']} --f {FRAMES} --w {WIDTH} --h {HEIGHT}{picture}"],
    )  # fmt: skip
    vae = demo_show.AutoencoderKLWan.from_pretrained(model / "vae", torch_dtype=torch.float32)
    (learned,) = demo_show.training_clips(data, [row], vae)
    path = folder / "samples" / f"step-{steps:06d}-prompt-0.mp4"
    (sampled,) = demo_show.generated_clips([path], [SCENE], vae)
    apart = (sampled.latents - learned.latents).square()
    return {
        "distance of the sampled clip": float(apart.mean()),
        "distance of its last latent frame": float(apart[:, -1].mean()),
    }


def learn_fades(name: str, model: Path, metadata: Path, folder: Path, steps: int) -> dict[str, float]:
    """Learn the fading clips; return the figure by name."""
    with nullcontext() if name == SHOWN else hidden_frame():
        outcome = trained(model, metadata, folder, steps, i2v_ratio=1, validation_rows=HELD_OUT, video_sample_stride=1)
    return {f"loss on {HELD_OUT} held-out clips": float(outcome.validation[-1]["loss"])}


def page(rows: list[tuple[str, float, float]], steps: int, seconds: float) -> str:
    """Return first_frame.md; rows: name, figure from the first frame, and without it."""
    return "\n".join([
        "# What the first frame is worth to TI2V", "",
        f"Written by `python benchmarks/first_frame.py` on {date.today():%d %B %Y}: the TI2V demo's model from random "
        f"weights, steps of {FLAGS['train_batch_size']} samples in float32, `--train_mode ti2v`. Lower is better; the "
        "ratio is the second value divided by the first. The sampled clip is that of `--i2v_ratio 1` from the first frame "
        f"and of `--i2v_ratio 0` from the caption, after one scene of the demo ({FRAMES} frames of {WIDTH}x{HEIGHT}) was learned by "
        f"heart in {steps} steps; distances are mean squared differences of normalised latents. The held-out clips are of "
        f"{PATTERNS} that fade from one pattern of tiles to another, after {LONGER * steps} steps; there the hidden frame is zeros.", "",
        "| figure | from the first frame | without it | ratio |", "| --- | --- | --- | --- |",
        *(f"| {name} | {shown:.4f} | {hidden:.4f} | {hidden / shown:.2f} |" for name, shown, hidden in rows), "",
        f"The four runs took {seconds:.0f} s of processor time on a machine with {os.cpu_count()} CPU cores; torch "
        f"{version('torch').split('+')[0]}, diffusers {version('diffusers')}.", "",
    ])  # fmt: skip


def main() -> int:
    """Train the four runs, print the figures and write the page; return 1 if the first frame does not help."""
    args = parse(__doc__, Path(__file__), f"optimizer steps for the one clip, {LONGER} times as many for the others")
    with tempfile.TemporaryDirectory(prefix="videox-first-frame-") as name:
        folder = Path(name)
        model = build_model(folder / "model")
        demo_data.build_scenes(folder / "scene", (SCENE,), demo_show.SOURCE_FRAMES)
        metadata = write_fades(folder / "fades")
        figures = {
            kind: learn_one_clip(kind, model, folder / "scene", folder / f"one-{kind}", args.steps)
            | learn_fades(kind, model, metadata, folder / f"fades-{kind}", LONGER * args.steps)
            for kind in (SHOWN, HIDDEN)
        }
    rows = [(name, value, figures[HIDDEN][name]) for name, value in figures[SHOWN].items()]
    for label, shown, hidden in rows:
        print(f"{label}: {shown:.4f} from the first frame, {hidden:.4f} without it, ratio {hidden / shown:.2f}")
    if wrong := [label for label, shown, hidden in rows if not shown < hidden]:
        print(f"WRONG: the first frame does not lower: {', '.join(wrong)}")
        return 1
    args.output.write_text(page(rows, args.steps, time.process_time()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
