"""Held-out loss: the flow-matching loss on fixed samples, noise and noise levels; training is left unchanged."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from videox.activity import ACTIVITY
from videox.diffusion.flow_matching import add_noise, keyed_noise, shifted, velocity_losses
from videox.diffusion.noise_window import WHOLE, NoiseWindow
from videox.diffusion.schemes import NUM_TRAIN_TIMESTEPS
from videox.rng import Purpose, hash_key
from videox.tracking.jsonl import append_line, read_lines

# (x_t float32 [1, C, T, H, W], timestep float32 [1] = 1000 sigma, sample) -> velocity like x_t
Predict = Callable[[torch.Tensor, torch.Tensor, "HeldOut"], torch.Tensor]


@contextmanager
def evaluation_mode(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Run the block in eval mode and without gradients, and leave no trace of it.

    The train flag of every submodule and the global generators of torch (CPU and current CUDA device), NumPy and
    Python are restored, also after an exception.
    """
    flags = {module: module.training for root in modules for module in root.modules()}
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    python, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - saved, not drawn from
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            for module in flags:
                module.training = False
            yield
    finally:
        for module, training in flags.items():
            module.training = training
        random.setstate(python)
        np.random.set_state(numpy_state)  # noqa: NPY002


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A sample that is never trained on.

    Attributes:
        latents: float32 [1, C, T, H, W], normalised as in training; may be on another device than the model.
        conditions: what else the prediction needs, such as the prompt embedding; passed to `predict` as it is.
    """

    latents: torch.Tensor
    conditions: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ValidationLoss:
    """Loss on the held-out samples, each with equal weight.

    Attributes:
        mean: over samples and noise levels.
        sigmas: the fixed noise levels, increasing.
        per_sigma: mean over the samples at each noise level.
    """

    mean: float
    sigmas: tuple[float, ...]
    per_sigma: tuple[float, ...]


@dataclass(frozen=True)
class HeldOutLoss:
    """How the held-out loss is measured; the same for the whole run.

    Attributes:
        predict: the velocity prediction; it casts and moves the conditions as training does.
        model: what `predict` calls; in eval mode during the measurement.
        shift: shift of sigma, as in training.
        noise_key: integer that the noise is drawn from, such as the run's seed.
        sigmas_per_sample: forward passes for each sample.
        given_frames: leading latent frames that the model is given, of all samples or by sample; they are excluded
            from the loss.
        window: of noise levels that the model is trained at.
    """

    predict: Predict
    model: nn.Module
    shift: float
    noise_key: int
    sigmas_per_sample: int
    given_frames: int | Callable[[HeldOut], int] = 0
    window: NoiseWindow = WHOLE

    def at(self, sample: HeldOut, sigma: float, key: int, device: torch.device | str) -> torch.Tensor:
        """Loss of one sample at one noise level, float32 scalar: x_t = (1 - sigma) x_0 + sigma noise."""
        latents = sample.latents.to(device, torch.float32)
        noise = keyed_noise(key, latents.shape).to(device)
        level = torch.full((1,), sigma, dtype=torch.float32, device=device)
        ACTIVITY.progress()
        prediction = self.predict(add_noise(latents, noise, level), NUM_TRAIN_TIMESTEPS * level, sample)
        given = self.given_frames if isinstance(self.given_frames, int) else self.given_frames(sample)
        generated = (slice(None), slice(None), slice(given, None))
        return velocity_losses(prediction[generated], (noise - latents)[generated], torch.ones_like(level))[0]


def fixed_sigmas(count: int, shift: float, window: NoiseWindow = WHOLE) -> tuple[float, ...]:
    """The noise levels at the middles of `count` equal shares of training's uniform draws, increasing.

    sigma = shift t / (1 + (shift - 1) t) at t = (i + 0.5) / count: the quantiles of the sigmas that training draws;
    with a window, t is at the same places between the ends of the window.

    Args:
        count: at least 1.
        shift: above 0 (1 = no shift).
        window: of noise levels.

    Raises:
        ValueError: if one of them is out of range.
    """
    if count < 1 or not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"{count} sigmas with shift {shift}: at least 1, and a shift above 0")
    places = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    lowest, highest = window.times(shift)
    return tuple(shifted(places if window == WHOLE else lowest + places * (highest - lowest), shift).tolist())


def validation_loss(
    samples: Sequence[HeldOut],
    measure: HeldOutLoss,
    *,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    all_reduce_sum: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> ValidationLoss:
    """Measure the held-out loss. The same weights give the same number, at any step and any number of ranks.

    Every rank runs the same number of forward passes (a rank without a sample repeats one, whose loss is not counted),
    so that sharded models, whose forward pass is a collective, do not hang.

    Args:
        samples: the same ones in the same order on every rank; at least one.
        measure: model and noise levels.
        device: where x_t and the loss are computed.
        rank: of this process.
        world_size: number of processes; sample i belongs to rank i modulo world_size.
        all_reduce_sum: returns the sum of a tensor over all ranks; required if world_size > 1.

    Raises:
        ValueError: there are no samples, or `all_reduce_sum` is required and missing.
    """
    if not samples or (world_size > 1 and all_reduce_sum is None):
        raise ValueError(f"{len(samples)} held-out samples on {world_size} processes: samples and a sum are required")
    sigmas = fixed_sigmas(measure.sigmas_per_sample, measure.shift, measure.window)
    table = torch.zeros(len(samples), len(sigmas), device=device)  # one rank fills each row, so that its sum is exact
    with evaluation_mode([measure.model]):
        for first in range(0, len(samples), world_size):
            index = first + rank
            sample = samples[index % len(samples)]
            keys = [int(hash_key(measure.noise_key, Purpose.VALIDATION, index, i)) for i in range(len(sigmas))]
            losses = [measure.at(sample, sigma, key, device) for sigma, key in zip(sigmas, keys, strict=True)]
            if index < len(samples):
                table[index] = torch.stack(losses)
    if all_reduce_sum is not None:
        table = all_reduce_sum(table)
    cells = table.to("cpu", torch.float64)
    return ValidationLoss(cells.mean().item(), sigmas, tuple(cells.mean(0).tolist()))


def append_validation(
    path: Path,
    step: int,
    result: ValidationLoss,
    ema: ValidationLoss | None = None,
    trained: ValidationLoss | None = None,
) -> None:
    """Append {"step", "loss", "per_sigma": [[sigma, loss], ...]} to validation.jsonl.

    Args:
        path: of the file.
        step: optimizer steps done.
        result: held-out loss of the weights.
        ema: that of their EMA, appended as "ema_loss" and "ema_per_sigma".
        trained: loss of the weights on training rows, appended as "train_loss" and "train_per_sigma".

    Raises:
        UserError: (exit code 5) the file cannot be written.
    """
    line: dict[str, Any] = {"step": step}
    for prefix, loss in (("", result), ("ema_", ema), ("train_", trained)):
        if loss is not None:
            pairs = [list(pair) for pair in zip(loss.sigmas, loss.per_sigma, strict=True)]
            line |= {f"{prefix}loss": loss.mean, f"{prefix}per_sigma": pairs}
    append_line(path, line)


def change_since_first(path: Path) -> str:
    """How the last loss in validation.jsonl differs from the first, for example " (-59.5 % since step 0)".

    Empty where there is only one line, or where one of the two losses is not finite.

    Raises:
        UserError: (exit code 5) a line is not a JSON object.
    """
    first, *later = read_lines(path)
    if not later or not first["loss"] or later[-1]["loss"] is None:
        return ""
    return f" ({100 * (later[-1]['loss'] / first['loss'] - 1):+.1f} % since step {first['step']})"
