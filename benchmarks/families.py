"""Trains, resumes, exports and samples each family in each mode, and writes a table.

    python benchmarks/families.py [--only "wan2.2 i2v low_noise" ...] [--output benchmarks/families.md]

Each cell runs the published command on a small model of the real classes: once for four steps without interruption,
and once for two steps, resumed to four with --resume_from_checkpoint latest. Then the base model's diffusers pipeline
samples a clip with the exported transformer. The two runs must be bit-identical.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/support"))

import diffusers
import numpy as np
import originals
import runs
import tiny
import torch
from diffusers.utils import logging as diffusers_logging
from machine import machine_line
from PIL import Image
from transformers.utils import logging as transformers_logging

from videox.encoders.clip_image import FirstPicture
from videox.weights.expert_names import EXPERTS

STEPS, INTERRUPTED_AT = 4, 2
FUN = "Fun-InP"  # the published layout, of Wan2.1-Fun: trained from it, and loaded into diffusers' pipeline
SIZE = {"height": 48, "width": 64, "num_frames": 9}
CLOCK = (  # fields of metrics.jsonl that differ between equal runs
    "tokens_per_second", "data_wait", "step_seconds", "encode_seconds", "forward_seconds", "backward_seconds",
    "optimizer_seconds",
)  # fmt: skip
TRANSFORMERS = {"wan": "WanTransformer3DModel", "hunyuanvideo": "HunyuanVideoTransformer3DModel"}
HEADER = ("family", "mode", "model", "resumed bit-equal", "export loads", "sampled", "held-out loss, first -> last")


@dataclass(frozen=True)
class Cell:
    """A family, a mode and a kind of model; build writes the model, pipeline and transformer are diffusers classes."""

    family: str
    mode: str
    model: str
    build: Callable[[Path], Path]
    pipeline: str
    transformer: str

    @property
    def name(self) -> str:
        """The name of the cell in tests and on the terminal."""
        return " ".join((self.family, self.mode, self.model)).strip()

    @property
    def place(self) -> str:
        """The place of the trained transformer in the pipeline; `model` is the expert of a model with two."""
        return EXPERTS.get(self.model, "transformer")

    @property
    def shows_first_picture(self) -> bool:
        """Whether CLIP sees the first of two pictures alone, which diffusers' pipeline has to be told."""
        return self.mode == "flf2v" and self.model == FUN


def cells() -> list[Cell]:
    """Return all combinations that differ in a flag or in the model's configuration."""

    def without_embedder(folder: Path) -> Path:
        return tiny.build_wan_i2v(folder, image_embedder=False)

    def fun(folder: Path) -> Path:
        return tiny.build_wan_i2v(folder, image_dim=160)  # CLIP's heads have 80 channels in the original layout

    def latent_concat(folder: Path) -> Path:
        return tiny.build_hunyuan_i2v(folder, image_condition_type="latent_concat")

    wan, wan_image = "WanPipeline", "WanImageToVideoPipeline"
    hunyuan, hunyuan_image = "HunyuanVideoPipeline", "HunyuanVideoImageToVideoPipeline"
    rows = [
        ("wan2.1", "normal", "", tiny.build_wan_t2v, wan),
        ("wan2.1", "i2v", "with image embedder", tiny.build_wan_i2v, wan_image),
        ("wan2.1", "i2v", "without image embedder", without_embedder, wan_image),
        ("wan2.1", "inpaint", "with image embedder", tiny.build_wan_i2v, wan_image),
        ("wan2.1", "inpaint", "without image embedder", without_embedder, wan_image),
        ("wan2.1", "flf2v", "with image embedder", tiny.build_wan_flf2v, wan_image),
        ("wan2.1", "flf2v", "without image embedder", without_embedder, wan_image),
        ("wan2.1", "i2v", FUN, fun, wan_image),
        ("wan2.1", "inpaint", FUN, fun, wan_image),
        ("wan2.1", "flf2v", FUN, fun, wan_image),
        ("wan2.2", "normal", "high_noise", tiny.build_wan22_t2v, wan),
        ("wan2.2", "normal", "low_noise", tiny.build_wan22_t2v, wan),
        ("wan2.2", "i2v", "high_noise", tiny.build_wan22_i2v, wan_image),
        ("wan2.2", "i2v", "low_noise", tiny.build_wan22_i2v, wan_image),
        ("wan2.2", "ti2v", "", tiny.build_wan22_5b, wan),
        ("hunyuanvideo", "normal", "", tiny.build_hunyuan_t2v, hunyuan),
        ("hunyuanvideo", "i2v", "token_replace", tiny.build_hunyuan_i2v, hunyuan_image),
        ("hunyuanvideo", "i2v", "latent_concat", latent_concat, hunyuan_image),
    ]
    return [Cell(*row, transformer=TRANSFORMERS[row[0].rstrip("12.")]) for row in rows]


@dataclass(frozen=True)
class CellResult:
    """Outcome of a cell: three lists of problems, empty if there are none, and the held-out losses."""

    differences: list[str]
    not_loaded: list[str]
    not_sampled: list[str]
    losses: list[float]

    @property
    def wrong(self) -> list[str]:
        """All problems."""
        return [*self.differences, *self.not_loaded, *self.not_sampled]


def run_cell(cell: Cell, metadata: Path, folder: Path) -> CellResult:
    """Train without and with an interruption, and sample with the exported weights; all files go to folder."""
    model = cell.build(folder / "model")
    trained = originals.build_wan_fun(folder / "published", model) if cell.model == FUN else model
    whole, interrupted = folder / "whole", folder / "interrupted"
    asked = {
        "train_mode": cell.mode,
        "checkpointing_steps": INTERRUPTED_AT,
        "validation_rows": 2,
        "max_train_steps": STEPS,
        **({"expert": cell.model if cell.model in EXPERTS else None} if cell.family == "wan2.2" else {}),
    }
    argvs = (
        runs.train_flags(cell.family, trained, metadata, whole, **asked),
        runs.train_flags(cell.family, trained, metadata, interrupted, **{**asked, "max_train_steps": INTERRUPTED_AT}),
        runs.train_flags(cell.family, trained, metadata, interrupted, **asked, resume_from_checkpoint="latest"),
    )
    outcomes = [runs.train(argv, runs.train_script(cell.family)) for argv in argvs]
    failed = [f"a run ended with {run.code}: {run.stderr[-2000:]}" for run in outcomes if run.code]
    if failed:
        return CellResult(failed, failed, failed, [])
    not_loaded, exported = load(cell, whole / cell.place)
    not_sampled = sample(cell, model, exported) if exported is not None else ["nothing to sample with"]
    losses = [record["loss"] for record in outcomes[0].validation]
    return CellResult(differences(outcomes[0], outcomes[2], cell.place), not_loaded, not_sampled, losses)


def differences(one: runs.Outcome, other: runs.Outcome, exported: str = "transformer") -> list[str]:
    """Return what differs between two runs: metrics (not timings), weights, optimizer, position, validation.

    exported: the folder of the exported weights.
    """
    found = []
    numbers = [
        [{name: value for name, value in record.items() if name not in CLOCK} for record in run.metrics]
        for run in (one, other)
    ]
    if numbers[0] != numbers[1] or len(numbers[0]) != STEPS:
        found.append("metrics.jsonl")
    # The interrupted run was validated once more, at the step where it ended.
    measured = [{record["step"]: record["loss"] for record in run.validation} for run in (one, other)]
    if any(measured[0][step] != measured[1][step] for step in (0, STEPS)):
        found.append("validation.jsonl")
    for name in (exported, f"checkpoint-{STEPS}/transformer", f"checkpoint-{STEPS}/optimizer"):
        here, there = one.weights(name), other.weights(name)
        same = here.keys() == there.keys() and all(torch.equal(here[key], there[key]) for key in here)
        if not same or not here:
            found.append(name)
    states = [json.loads((run.folder / f"checkpoint-{STEPS}/trainer_state.json").read_text()) for run in (one, other)]
    for state in states:
        del state["run"]  # the run's name, which is unique
    return found if states[0] == states[1] else [*found, "trainer_state.json"]


def load(cell: Cell, folder: Path) -> tuple[list[str], torch.nn.Module | None]:
    """Return the missing, unexpected and mismatched keys, and the transformer."""
    transformer, report = getattr(diffusers, cell.transformer).from_pretrained(
        folder, torch_dtype=torch.float32, output_loading_info=True
    )
    return [
        key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in report[kind]
    ], transformer


def sample(cell: Cell, model: Path, exported: torch.nn.Module) -> list[str]:
    """Return the problems of a clip sampled with the exported weights: shape, values, or equal to the base model's.

    The base model samples from the same noise with its weights rounded like the exported ones, so that rounding alone
    makes no difference.
    """
    size = {**SIZE, "height": 64} if cell.mode == "ti2v" else SIZE  # its sides are multiples of 32
    given = {**size, "num_inference_steps": 3, "output_type": "np"}
    if cell.mode not in ("normal", "ti2v"):
        given["image"] = Image.fromarray(tiny.moving_square(1, SIZE["width"], SIZE["height"])[0])
    if cell.mode == "flf2v":
        given["last_image"] = Image.fromarray(tiny.moving_square(9, SIZE["width"], SIZE["height"])[-1])
    clips = []
    base = getattr(diffusers, cell.transformer).from_pretrained(model / cell.place, torch_dtype=torch.bfloat16)
    for transformer in (exported, base.float()):
        transformer = deepcopy(
            transformer
        )  # tensors of a mapped file are unaligned, for which kernels round differently
        pipeline = getattr(diffusers, cell.pipeline).from_pretrained(model, **{cell.place: transformer})
        if cell.shows_first_picture:
            pipeline.register_modules(image_processor=FirstPicture(pipeline.image_processor))
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        clips.append(pipeline(prompt="a rabbit walks", generator=generator, **given).frames[0])
    # This pipeline removes the first latent frame, whose four frames are the given picture.
    frames = SIZE["num_frames"] - (4 if cell.model == "latent_concat" else 0)
    wrong = []
    if clips[0].shape != (frames, size["height"], size["width"], 3):
        wrong.append(f"the clip has the shape {clips[0].shape}")
    if not np.isfinite(clips[0]).all() or not clips[0].std() > 0:
        wrong.append("the clip is empty or not finite")
    return wrong if not np.array_equal(*clips) else [*wrong, "the exported weights sample what the base model samples"]


def row(cell: Cell, found: CellResult) -> tuple[str, ...]:
    """Return one row of the table."""
    losses = f"{found.losses[0]:.4f} -> {found.losses[-1]:.4f}" if found.losses else "none"
    good = ["yes" if not wrong else "NO" for wrong in (found.differences, found.not_loaded, found.not_sampled)]
    return (cell.family, cell.mode, cell.model or "text only", *good, losses)


def read_rows(file: Path) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Return the rows of an existing table, by family, mode and model."""
    split = (tuple(line.strip("| ").split(" | ")) for line in file.read_text(encoding="utf-8").splitlines())
    names = {row(cell, CellResult([], [], [], []))[:3] for cell in cells()}
    return {line[:3]: line for line in split if len(line) == len(HEADER) and line[:3] in names}


def page(lines: list[tuple[str, ...]]) -> str:
    """Return the report as Markdown."""
    table = [HEADER, ["---"] * len(HEADER), *lines]
    return "\n".join(
        [
            "# What trains, resumes, loads and samples",
            "",
            f"Measured by `python benchmarks/families.py`: the published command in bf16 for {STEPS} steps, once without interruption",
            f"and once as {INTERRUPTED_AT} steps and a resume, on small models of the real classes with random weights.",
            "",
            *("| " + " | ".join(line) + " |" for line in table),
            "",
            "- Resumed bit-equal: metrics of all steps, held-out losses, float32 weights, optimizer, position and exported weights.",
            "- Export loads: `from_pretrained` reports no missing, unexpected or mismatched tensor.",
            "- Sampled: the base model's diffusers pipeline with the exported transformer samples a finite clip of the right shape;",
            "  it differs from the clip that the base model, also rounded to bf16, samples from the same noise.",
            "- Held-out loss: measured on two held-out rows at fixed noise.",
            "",
            f"{machine_line('torch', 'diffusers')}.",
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="Markdown file to write (default: print only)")
    only = "names of cells; the other rows of the output stay (default: all cells)"
    parser.add_argument("--only", nargs="+", choices=[cell.name for cell in cells()], metavar="CELL", help=only)
    args = parser.parse_args()
    found_rows = read_rows(args.output) if args.only and args.output and args.output.exists() else {}
    wrong = []
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="videox-families-") as name:
        metadata = tiny.make_dataset(Path(name) / "data", copies=2)
        for number, cell in enumerate(cell for cell in cells() if not args.only or cell.name in args.only):
            found = run_cell(cell, metadata, Path(name) / f"cell-{number}")
            line = row(cell, found)
            found_rows[line[:3]] = line
            wrong += [f"{cell.name}: {what}" for what in found.wrong]
            print(*line, sep="\t", flush=True)
    print("\n".join(wrong), file=sys.stderr)
    order = [row(cell, CellResult([], [], [], []))[:3] for cell in cells()]
    text = page([found_rows[name] for name in order if name in found_rows])
    print(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
