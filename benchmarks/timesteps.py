"""Trains small models with three ways to draw timesteps, and measures how evenly each covers the range.

    python benchmarks/timesteps.py [--seeds 8] [--only wan2.1 hunyuanvideo] [--output benchmarks/timesteps.md]

The models have the real classes; data order, noise and timesteps are those of the plan that a training run would get.
The three ways differ in nothing but the timesteps: of one seed, they have the same initial weights, samples and noise.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/support"))

import numpy as np
import torch
from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel
from machine import machine_line
from point_sets import discrepancy, largest_gap

from videox.data.plan.buckets import SizePolicy
from videox.data.plan.plan import plan_epoch
from videox.data.plan.settings import PlanColumns, PlanSettings
from videox.data.plan.timesteps import ACROSS_STEPS, BLOCK_STEPS, PER_STEP, place_in_stratum
from videox.diffusion.flow_matching import add_noise, batch_noise, draw_sigmas, velocity_losses
from videox.rng import Purpose, hash_key, uniform
from videox.training.validation_loss import fixed_sigmas

INDEPENDENT = "independent"
WAYS = {
    INDEPENDENT: "independent draws",
    PER_STEP: "strata in each step (before)",
    ACROSS_STEPS: "strata that move from step to step",
}
STEPS = {1: 200, 4: 50}  # optimizer steps by batch size: 200 samples each
CLIPS, HELD_OUT, LEVELS = 64, 16, 8
SHAPE = (4, 2, 6, 6)  # of the latents: few channels, which models of this width learn in 200 steps
MOTIONS, TEXT_TOKENS, TEXT_DIM, POOLED_DIM = 4, 4, 16, 8
WINDOW = 16
POLICY = SizePolicy(
    video_sample_size=64, image_sample_size=64, n_frames=5, stride=1,
    enable_bucket=True, random_hw_adapt=False, token_length=False, random_frame_crop=False,
)  # fmt: skip


@dataclass(frozen=True)
class Clips:
    """Latents float32 [N, *SHAPE] and for each its motion, int64 [N], which is also its caption."""

    latents: torch.Tensor
    motions: torch.Tensor


@dataclass(frozen=True)
class Family:
    """A family: flow shift, learning rate, and build, which returns a model and a function that calls it.

    The function takes the model, noisy latents [B, *SHAPE], sigmas [B] and motions [B].
    """

    name: str
    shift: float
    learning_rate: float
    build: Callable[[int], tuple[torch.nn.Module, Callable[..., torch.Tensor]]]


def make_clips(count: int, seed: int) -> Clips:
    """Return clips of bright spots. A spot moves in one of MOTIONS directions, and each direction has a color."""
    rng = np.random.default_rng(seed)
    channels, frames, height, width = SHAPE
    motions, phases = rng.integers(0, MOTIONS, count), rng.random((count, 2))
    colors = np.random.default_rng(0).normal(size=(MOTIONS, channels))[motions]
    rows, columns = np.arange(height)[:, None] / height, np.arange(width)[None] / width
    latents = np.empty((count, *SHAPE))
    for clip, (motion, (down, right), color) in enumerate(zip(motions, phases, colors, strict=True)):
        angle = 2 * np.pi * motion / MOTIONS
        for frame in range(frames):
            moved = 0.2 * frame
            spot = np.cos(2 * np.pi * (rows - down - moved * np.sin(angle)))
            spot = spot + np.cos(2 * np.pi * (columns - right - moved * np.cos(angle)))
            latents[clip, :, frame] = color[:, None, None] * (0.4 + 0.6 * spot)
    scaled = latents / latents.std()
    return Clips(torch.from_numpy(scaled).float(), torch.from_numpy(motions))


def caption_embeddings() -> tuple[torch.Tensor, torch.Tensor]:
    """Return prompt embeddings [MOTIONS, TEXT_TOKENS, TEXT_DIM] and pooled ones [MOTIONS, POOLED_DIM]."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(MOTIONS, TEXT_TOKENS, TEXT_DIM, generator=generator)
    return tokens, torch.randn(MOTIONS, POOLED_DIM, generator=generator)


def build_wan(seed: int) -> tuple[torch.nn.Module, Callable[..., torch.Tensor]]:
    """Return a small WanTransformer3DModel and the function that calls it."""
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=SHAPE[0], out_channels=SHAPE[0], text_dim=TEXT_DIM,
        freq_dim=64, ffn_dim=64, num_layers=1, rope_max_seq_len=64,
    )  # fmt: skip
    text, _ = caption_embeddings()

    def call(noisy: torch.Tensor, sigmas: torch.Tensor, motions: torch.Tensor) -> torch.Tensor:
        return model(noisy, 1000 * sigmas, text[motions], return_dict=False)[0]

    return model, call


def build_hunyuan(seed: int) -> tuple[torch.nn.Module, Callable[..., torch.Tensor]]:
    """Return a small HunyuanVideoTransformer3DModel and the function that calls it."""
    torch.manual_seed(seed)
    model = HunyuanVideoTransformer3DModel(
        in_channels=SHAPE[0], out_channels=SHAPE[0], num_attention_heads=2, attention_head_dim=16, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=TEXT_DIM,
        pooled_projection_dim=POOLED_DIM, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    text, pooled = caption_embeddings()

    def call(noisy: torch.Tensor, sigmas: torch.Tensor, motions: torch.Tensor) -> torch.Tensor:
        mask, guidance = torch.ones(len(motions), TEXT_TOKENS), torch.full_like(sigmas, 6000.0)
        inputs = (noisy, 1000 * sigmas, text[motions], mask, pooled[motions], guidance)
        return model(*inputs, return_dict=False)[0]

    return model, call


FAMILIES = (Family("wan2.1", 3.0, 1e-2, build_wan), Family("hunyuanvideo", 7.0, 1e-2, build_hunyuan))


def planned(seed: int, batch: int, way: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield for each step of a run its rows, the keys of their draws, and their timestep draws in (0, 1)."""
    same = np.full(CLIPS, 64, np.int32)
    columns = PlanColumns(np.ones(CLIPS, np.uint8), same, same, np.full(CLIPS, 5, np.int32), np.ones(CLIPS, bool))
    timesteps = PER_STEP if way == INDEPENDENT else way
    settings = PlanSettings(POLICY, batch_size=batch, slots=1, seed=seed, timesteps=timesteps)
    step = epoch = 0
    while True:
        plan = plan_epoch(columns, settings, epoch, first_step=step)
        for epoch_step in range(plan.n_steps):
            (micro,) = plan.micro_batches(epoch_step, 0, 1)
            draws = uniform(micro.keys, Purpose.TIMESTEP) if way == INDEPENDENT else micro.strata
            yield micro.rows, micro.keys, draws
        step, epoch = step + plan.n_steps, epoch + 1


def train(family: Family, batch: int, way: str, seed: int) -> float:
    """Train a model and return its held-out loss at fixed noise, the mean over all clips and noise levels."""
    clips, held_out = make_clips(CLIPS, seed=100), make_clips(HELD_OUT, seed=101)
    model, call = family.build(seed)  # equal for the three ways
    optimizer = torch.optim.AdamW(model.parameters(), lr=family.learning_rate, weight_decay=0.01, fused=True)
    steps = planned(seed, batch, way)
    for step in range(STEPS[batch]):
        optimizer.param_groups[0]["lr"] = family.learning_rate * min((step + 1) / 5, 1 - step / STEPS[batch])
        rows, keys, draws = next(steps)
        noise = batch_noise([int(hash_key(key, Purpose.NOISE)) for key in keys], SHAPE)
        latents, sigmas = clips.latents[rows], draw_sigmas(draws, family.shift)
        prediction = call(add_noise(latents, noise, sigmas), sigmas, clips.motions[rows])
        velocity_losses(prediction, noise - latents, torch.ones(len(rows))).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return held_out_loss(call, held_out, family.shift)


@torch.no_grad()
def held_out_loss(call: Callable[..., torch.Tensor], clips: Clips, shift: float) -> float:
    """Return the loss on clips that were not trained, with noise and noise levels that are the same in every run."""
    losses = []
    for level, sigma in enumerate(fixed_sigmas(LEVELS, shift)):
        noise = batch_noise([1000 * level + clip for clip in range(HELD_OUT)], SHAPE)
        sigmas = torch.full((HELD_OUT,), sigma)
        prediction = call(add_noise(clips.latents, noise, sigmas), sigmas, clips.motions)
        losses.append(velocity_losses(prediction, noise - clips.latents, torch.ones(HELD_OUT)).mean().item())
    return float(np.mean(losses))


def draws_of(way: str, batch: int, seeds: int, count: int) -> np.ndarray:
    """Return the first `count` draws of runs of several seeds in the order of training, float64 [seeds, count]."""
    runs = []
    for seed in range(seeds):
        steps, found = planned(seed, batch, way), []
        while len(found) < count:
            found += next(steps)[2].tolist()
        runs.append(found[:count])
    return np.array(runs)


def window_lines(seeds: int) -> Iterator[str]:
    """Yield the table of discrepancies of all windows of WINDOW draws."""
    yield "| | batch 1: mean | largest | batch 4: mean | largest |"
    yield "| --- | --- | --- | --- | --- |"
    for way, title in WAYS.items():
        cells = []
        for batch in STEPS:
            windows = np.lib.stride_tricks.sliding_window_view(draws_of(way, batch, seeds, 512), WINDOW, axis=1)
            measured = discrepancy(windows[:, ::batch])  # windows of whole steps
            cells += [f"{measured.mean():.3f}", f"{measured.max():.3f}"]
        yield f"| {title} | {' | '.join(cells)} |"


def period_lines(seeds: int, occurrences: int = 50) -> Iterator[str]:
    """Yield the table of what a bucket gets that occurs in every m-th step, at batch 1."""
    golden = (5**0.5 - 1) / 2
    steps = np.arange(occurrences)
    rng = np.random.default_rng(0)
    ways: dict[str, Callable[[int], np.ndarray]] = {
        "independent draws": lambda _: rng.random((seeds, occurrences)),
        "one sequence for the whole run": lambda m: (rng.random((seeds, 1)) + m * steps * golden) % 1,
        f"a new start every {BLOCK_STEPS} steps": lambda m: np.stack(
            [place_in_stratum(seed, m * steps) for seed in range(seeds)]
        ),
    }
    shown = (1, 2, 3, 5, 8, 13, 21, 34, 55)
    yield f"| every m-th step, m = | {' | '.join(map(str, shown))} | worst of 1 to 55 |"
    yield f"| --- |{' --- |' * (len(shown) + 1)}"
    for title, points in ways.items():
        gaps = {m: float(largest_gap(points(m)).mean()) for m in range(1, 56)}
        worst = max(gaps, key=lambda m: gaps[m])
        yield f"| {title} | {' | '.join(f'{gaps[m]:.2f}' for m in shown)} | {gaps[worst]:.2f} (m = {worst}) |"


def loss_lines(losses: dict[tuple[str, int, str], list[float]]) -> Iterator[str]:
    """Yield the table of held-out losses; the difference is that of the pairs of runs with the same seed."""
    yield "| family | batch | timesteps | mean | sd | against independent draws | lower in |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for (family, batch, way), values in losses.items():
        found, base = np.array(values), np.array(losses[family, batch, INDEPENDENT])
        change = (found - base) / base.mean()
        error = change.std(ddof=1) / np.sqrt(len(change))
        against = "" if way == INDEPENDENT else f"{change.mean():+.1%} ± {error:.1%}"
        lower = "" if way == INDEPENDENT else f"{np.count_nonzero(change < 0)} of {len(change)}"
        numbers = f"{found.mean():.4f} | {found.std(ddof=1):.4f} | {against} | {lower}"
        yield f"| {family} | {batch} | {WAYS[way]} | {numbers} |"


PAGE = """# How timesteps are drawn

Written by `python benchmarks/timesteps.py --seeds {seeds} --output benchmarks/timesteps.md` on a {machine}.

## Held-out loss

Small models of the real classes, trained on {clips} synthetic latents of {shape}, AdamW, the learning rate decayed to 0; {one} steps at
batch 1, {four} at batch 4. The loss on {held_out} other latents at fixed noise and {levels} fixed noise levels; {seeds} seeds. Runs of one
seed differ in nothing but the timesteps; ± is the standard error of the mean difference.

{losses}

## Star discrepancy of any {window} draws in a row

The largest difference between the share of draws below x and x itself, over all x: 0.03 at best for {window} draws.

{windows}

## What a bucket gets that occurs in every m-th step

The widest part of the range without a draw after 50 occurrences at batch 1, the mean over {period_seeds} seeds. The golden ratio is nearly
periodic in Fibonacci numbers of steps; a new start of the sequence every {block} steps ends that.

{periods}
"""


def main() -> None:
    """Run everything and print or write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=8, help="runs per cell")
    parser.add_argument("--only", nargs="+", default=[family.name for family in FAMILIES], help="families to train")
    parser.add_argument("--rate", type=float, help="another learning rate")
    parser.add_argument("--output", type=Path, help="Markdown file to write (default: print only)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    losses: dict[tuple[str, int, str], list[float]] = {}
    for family in (family for family in FAMILIES if family.name in args.only):
        rated = replace(family, learning_rate=args.rate or family.learning_rate)
        for batch in STEPS:
            for way in WAYS:
                if (batch, way) == (1, PER_STEP):  # with one sample per step these are the same draws
                    losses[family.name, batch, way] = losses[family.name, batch, INDEPENDENT]
                    continue
                begin = time.process_time()
                losses[family.name, batch, way] = [train(rated, batch, way, seed) for seed in range(args.seeds)]
                seconds = (time.process_time() - begin) / args.seeds
                print(family.name, batch, way, losses[family.name, batch, way], f"{seconds:.1f} s each", flush=True)
    page = PAGE.format(
        seeds=args.seeds, machine=machine_line("torch", "diffusers"), clips=CLIPS, shape=" x ".join(map(str, SHAPE)),
        one=STEPS[1], four=STEPS[4], held_out=HELD_OUT, levels=LEVELS, window=WINDOW, period_seeds=200,
        block=BLOCK_STEPS, losses="\n".join(loss_lines(losses)), windows="\n".join(window_lines(8)),
        periods="\n".join(period_lines(200)),
    )  # fmt: skip
    print(page)
    if args.output:
        args.output.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
