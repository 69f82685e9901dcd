"""Trains a run that overfits and one that does not, and checks what the trainer says of both; writes overfitting.md.

    python benchmarks/overfitting.py [--steps 600] [--output benchmarks/overfitting.md]

Both runs are the published Wan2.1 command on a small model of the real classes, with equal flags, an equal number of
steps and the same eight held-out clips (--validation_meta): one trains 4 clips, the other 200 of the same kind. The
command checks the sentences, the curves and --keep_best against validation.jsonl, and measures the exported weights
of the best and of the last step on clips that neither run has seen. If a check fails, so does
the command, and nothing is written.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/support"))

import av
import numpy as np
import runs
import tiny
import torch
from diffusers import AutoencoderKLWan
from machine import machine_line
from matplotlib.figure import Figure
from pictures import IMAGES, save_small

FEW, MANY, HELD_OUT = 4, 200, 8
FRAMES, HEIGHT, WIDTH = 5, 48, 64
VALIDATIONS = 12  # of a run
# Each clip has a caption of its own, as in a data set: what a model learns by heart, it learns of captions. All are
# words of the small tokenizer.
COLOURS, THINGS = (
    ("white", "red", "green", "orange", "gray", "black"),
    ("rabbit", "bus", "cat", "rocket", "bike", "taxi"),
)
PLACES = ("street", "mountains", "sea", "beach", "forest", "meadow")
# Wan2.1's flow shift for 480p. With 8, most of the loss is of noise levels at which all clips look alike: 4 clips are
# then learnt by heart without a rise of the held-out loss.
MODEL = {"heads": 4, "head_dim": 24, "layers": 2, "ffn_dim": 192, "flow_shift": 3.0}
FLAGS = {
    "video_sample_size": 48, "token_sample_size": 48, "image_sample_size": 48, "video_sample_n_frames": FRAMES,
    "video_sample_stride": 1, "train_batch_size": 4, "num_train_epochs": None, "tokenizer_max_length": 16,
    "learning_rate": "3e-3", "adam_weight_decay": "0", "max_grad_norm": 1.0, "gradient_checkpointing": False,
    "mixed_precision": "no", "keep_best": True, "checkpoints_total_limit": 1, "export_dtype": "fp32", "low_vram": None,
    "cache_variants": 1,
}  # fmt: skip
SENTENCE = re.compile(r"step (\d+): held-out loss (\S+?)(?: \([^)]*\))?; (.*)")


@dataclass(frozen=True)
class Trained:
    """A run: its folder, validation.jsonl, the sentence of each validation by step, and corrected losses."""

    name: str
    folder: Path
    validation: list[dict]
    sentences: dict[int, str]
    steps: list[dict]
    seconds: float

    @property
    def best(self) -> dict:
        """The validation with the lowest held-out loss."""
        return min(self.validation, key=lambda line: line["loss"])


def write_clips(folder: Path, count: int, first_seed: int) -> Path:
    """Write clips of twelve coloured fields that move to the right; each has colours and a caption of its own."""
    rows = []
    for seed in range(first_seed, first_seed + count):
        draw = np.random.default_rng(seed)
        fields = draw.integers(0, 256, (3, 4, 3), np.uint8)
        colour, thing, place = (draw.choice(words) for words in (COLOURS, THINGS, PLACES))
        picture = fields.repeat(HEIGHT // 3, axis=0).repeat(WIDTH // 4, axis=1)
        pixels = np.stack([np.roll(picture, 2 * frame, axis=1) for frame in range(FRAMES)])
        tiny.write_clip(folder / f"{seed}.mp4", pixels=pixels)
        rows.append({"file_path": f"{seed}.mp4", "text": f"a {colour} {thing}, {place}", "type": "video"})
    metadata = folder / "metadata.json"
    metadata.write_text(json.dumps(rows), encoding="utf-8")
    return metadata


def normalise_latents(model: Path, metadata: Path) -> None:
    """Write the mean and the deviation of each latent channel of some clips into the VAE's configuration.

    A published VAE has those of its training data there. With random weights and the published values, clips would
    hardly differ in latent space, and nothing could be learnt by heart.
    """
    vae = AutoencoderKLWan.from_pretrained(model, subfolder="vae")
    latents = []
    for path in sorted(metadata.parent.glob("*.mp4")):
        with av.open(str(path)) as container:
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        with torch.no_grad():
            latents.append(vae.encode(pixels).latent_dist.mode())
    found = torch.cat(latents)
    means, deviations = found.mean((0, 2, 3, 4)), found.std((0, 2, 3, 4))
    path = model / "vae/config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"latents_mean": means.tolist(), "latents_std": deviations.tolist()}
    path.write_text(json.dumps(config, indent=1), encoding="utf-8")


def train(model: Path, metadata: Path, folder: Path, held_out: Path, **changes: object) -> runs.Outcome:
    """Run the train script with the flags of all runs here; raises SystemExit with its output if it fails."""
    cache = {"latent_cache": folder.parent / "cache"}
    flags = {**FLAGS, **cache, "validation_meta": held_out, "train_data_dir": None, **changes}
    outcome = runs.train(runs.wan_flags(model, metadata, folder, **flags))
    if outcome.code:
        raise SystemExit(f"{folder.name} ended with {outcome.code}: {outcome.stderr[-3000:]}")
    return outcome


def train_and_read(name: str, model: Path, metadata: Path, folder: Path, held_out: Path, steps: int) -> Trained:
    """Train for a number of steps and read what the run wrote."""
    every = max(steps // VALIDATIONS, 1)
    flags = {"max_train_steps": steps, "validation_steps": every, "checkpointing_steps": every}
    begin = time.monotonic()
    outcome = train(model, metadata, folder, held_out, **flags)
    seconds = time.monotonic() - begin
    found = (SENTENCE.search(line) for line in (outcome.stdout + outcome.stderr).splitlines())
    sentences = {int(match[1]): match[3].strip() for match in found if match}
    return Trained(name, folder, outcome.validation, sentences, outcome.metrics, seconds)


def loss_of_weights(model: Path, weights: Path, metadata: Path, fresh: Path, folder: Path) -> float:
    """Return the loss of exported weights on clips of their own, at another noise than that of the runs."""
    once = {"max_train_steps": 1, "learning_rate": 0, "seed": 7, "keep_best": False, "checkpoints_total_limit": None}
    outcome = train(model, metadata, folder, fresh, transformer_path=weights, **once)
    return float(outcome.validation[0]["loss"])


def wrong_of(run: Trained, *, overfits: bool) -> list[str]:
    """Return what the run said or kept that validation.jsonl does not show; [] if all is right."""
    wrong, best, last = [], run.best, run.validation[-1]
    exported = sorted(path.name for path in run.folder.glob("best-*"))
    if exported != [f"best-{best['step']}"]:
        wrong.append(f"--keep_best exported {exported}, the lowest held-out loss is at step {best['step']}")
    if not (run.folder / f"checkpoint-{best['step']}").is_dir():
        wrong.append(f"there is no checkpoint-{best['step']}")
    if run.sentences.keys() != {line["step"] for line in run.validation}:
        wrong.append("a validation has no sentence")
    for step, words in run.sentences.items():
        before = [line for line in run.validation if line["step"] <= step]
        lowest = min(before, key=lambda line: line["loss"])
        named = f"best at step {lowest['step']}: {lowest['loss']:.4f}"
        if len(before) > 1 and (named if lowest["step"] < step else "the lowest so far") not in words:
            wrong.append(f"step {step}: {words!r}, but the lowest is at step {lowest['step']}")
    said = [step for step, words in run.sentences.items() if "overfitting since" in words]
    if overfits and not (said and f"overfitting since step {best['step']}" in run.sentences[last["step"]]):
        wrong.append(f"the last sentence does not say overfitting since step {best['step']}")
    if overfits and not (last["loss"] > best["loss"] and last["train_loss"] < best["train_loss"]):
        wrong.append("the curves do not part")
    if not overfits and said:
        wrong.append(f"overfitting was said at steps {said}")
    return wrong


def draw(few: Trained, many: Trained, path: Path) -> None:
    """Write the curves of both runs side by side."""
    figure = Figure(figsize=(11, 4), dpi=110, layout="constrained")
    for axes, run in zip(figure.subplots(1, 2, sharey=True), (few, many), strict=True):
        steps = [line["step"] for line in run.validation]
        corrected = [(line["step"], line["loss_corrected"]) for line in run.steps if "loss_corrected" in line]
        axes.plot(
            *zip(*corrected, strict=True), color="tab:purple", alpha=0.4, linewidth=1, label="corrected training loss"
        )
        axes.plot(steps, [line["loss"] for line in run.validation], color="tab:red", marker="o", label="held-out rows")
        axes.plot(
            steps,
            [line["train_loss"] for line in run.validation],
            color="tab:orange",
            marker=".",
            label="training rows",
        )
        axes.axvline(run.best["step"], color="tab:gray", linestyle=":", label=f"best-{run.best['step']}")
        axes.set(title=run.name, xlabel="optimizer step", ylim=(0, 1.6))
        axes.grid(alpha=0.3)
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    buffer.seek(0)
    save_small(buffer, path)


def page(few: Trained, many: Trained, fresh: dict[str, tuple[float, float]], steps: int) -> str:
    """Return overfitting.md."""
    lines = [
        "# A run that overfits, and one that does not", "",
        f"Written by `python benchmarks/overfitting.py`: two runs of {steps} steps with equal flags and the same "
        f"{HELD_OUT} held-out clips, one on {FEW} clips and one on {MANY}. A tiny Wan2.1 with random weights "
        "(LR 3e-3, flow shift 3, 4 samples per step), in float32 on a CPU.", "",
        f"![Held-out and training loss of both runs](../docs/images/{PICTURE})", "",
    ]  # fmt: skip
    for run in (few, many):
        lines += [
            f"## {run.name}",
            "",
            "| step | held-out rows | training rows | the sentence |",
            "| --- | --- | --- | --- |",
        ]
        lines += [
            f"| {line['step']} | {line['loss']:.4f} | {line['train_loss']:.4f} | {run.sentences.get(line['step'], '')} |"
            for line in run.validation
        ]
        best, last = fresh[run.name]
        lines += [
            "",
            f"`--keep_best` exported `best-{run.best['step']}`. On {HELD_OUT} other clips, at other noise, the weights of "
            f"`best-{run.best['step']}` have the loss {best:.4f} and those of the last step {last:.4f}. The run took "
            f"{run.seconds:.0f} s.",
            "",
        ]
    return "\n".join([*lines, machine_line("torch", "diffusers"), ""])


PICTURE = "overfitting.png"


def main() -> int:
    """Train both runs, check them and write page and picture; return 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps of each run")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"), help="page to write")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="videox-overfitting-") as name:
        folder = Path(name)
        model = tiny.build_wan_t2v(folder / "model", **MODEL)
        held_out = write_clips(folder / "held_out", HELD_OUT, 10_000)
        fresh = write_clips(folder / "fresh", HELD_OUT, 20_000)
        normalise_latents(model, write_clips(folder / "statistics", 16, 30_000))
        found: list[Trained] = []
        losses: dict[str, tuple[float, float]] = {}
        wrong: list[str] = []
        for label, count in ((f"{FEW} clips", FEW), (f"{MANY} clips", MANY)):
            metadata = write_clips(folder / f"data-{count}", count, 0)
            run = train_and_read(label, model, metadata, folder / f"run-{count}", held_out, args.steps)
            weights = [run.folder / f"best-{run.best['step']}/transformer", run.folder / "transformer"]
            if run.best is run.validation[-1]:
                del weights[1]  # they are the same
            fresh_losses = [
                loss_of_weights(model, path, metadata, fresh, folder / f"fresh-{count}-{path.parent.name}")
                for path in weights
            ]
            best, last = fresh_losses[0], fresh_losses[-1]
            found.append(run)
            losses[label] = best, last
            wrong += [f"{label}: {what}" for what in wrong_of(run, overfits=count == FEW)]
            if count == FEW and best >= last:
                wrong.append(
                    f"{label}: on other clips the best weights have the loss {best:.4f}, the last ones {last:.4f}"
                )
            for step, words in run.sentences.items():
                print(f"{label}, step {step}: {words}", flush=True)
            print(
                f"{label}: on other clips, best-{run.best['step']} {best:.4f}, last {last:.4f}; {run.seconds:.0f} s",
                flush=True,
            )
        if not wrong:
            draw(*found, IMAGES / PICTURE)
            args.output.write_text(page(*found, losses, args.steps), encoding="utf-8")
    for line in wrong:
        print(f"WRONG: {line}")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
