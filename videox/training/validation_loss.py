"""Serves "is it learning?": a held-out loss at fixed noise, and sample clips. Training is left untouched."""

from __future__ import annotations

import copy
import gc
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import nn

from videox.diffusion.flow_matching import NUM_TRAIN_TIMESTEPS, add_noise, keyed_noise, shifted, velocity_losses
from videox.rng import Purpose, hash_key
from videox.tracking.jsonl import append_line, read_lines
from videox.tracking.preview import SheetEntry, write_clip, write_contact_sheet


@contextmanager
def undisturbed(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Runs what is inside in eval mode and without gradients, and leaves no trace of it.

    The train flag of every submodule and the global generators of torch (CPU and current CUDA device), numpy and
    Python are put back, also after an exception.
    """
    flags = {module: module.training for root in modules for module in root.modules()}
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    python, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - kept, not drawn from
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
        latents: float32 [1, C, T, H, W], normalised as in training; may wait on another device than the model's.
        conditions: whatever else the prediction needs, e.g. the prompt embedding; `predict` gets it as it is.
    """

    latents: torch.Tensor
    conditions: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ValidationLoss:
    """Loss on the held-out samples, each of equal weight.

    Attributes:
        mean: over samples and sigmas.
        sigmas: the fixed noise levels, rising.
        per_sigma: mean over the samples at each sigma.
    """

    mean: float
    sigmas: tuple[float, ...]
    per_sigma: tuple[float, ...]


def fixed_sigmas(count: int, shift: float) -> tuple[float, ...]:
    """Returns the noise levels at the middles of `count` equal shares of training's uniform draws, rising.

    sigma = shift t / (1 + (shift - 1) t) at t = (i + 0.5) / count: the quantiles of the sigmas that training draws.

    Args:
        count: at least 1.
        shift: above 0 (1 = none).

    Raises:
        ValueError: if one of them is out of range.
    """
    if count < 1 or not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"{count} sigmas with shift {shift}: at least 1, and a shift above 0")
    return tuple(shifted((torch.arange(count, dtype=torch.float64) + 0.5) / count, shift).tolist())


def validation_loss(
    samples: Sequence[HeldOut],
    predict: Callable[[torch.Tensor, torch.Tensor, HeldOut], torch.Tensor],
    *,
    model: nn.Module,
    shift: float,
    sigmas_per_sample: int,
    noise_key: int,
    given_frames: int = 0,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    all_reduce_sum: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> ValidationLoss:
    """Measures the flow-matching loss on held-out samples with noise and sigmas that stay the same for the whole run.

    x_t = (1 - sigma) x_0 + sigma noise, target = noise - x_0, mean squared error in float32. The same weights give the
    same number, at any step; at any number of processes too, as far as the kernels do.

    Every rank makes the same number of forward passes (a rank without a sample repeats one, and its loss is not
    counted), so that sharded models, whose forward pass is a collective, do not hang.

    Args:
        samples: the same ones in the same order on every rank; at least one.
        predict: (x_t float32 [1, C, T, H, W], timestep float32 [1] = 1000 sigma, sample) -> velocity like x_t. It
            casts and moves the conditions as training does.
        model: what `predict` calls; it is in eval mode meanwhile, and its train flags are put back.
        shift: of sigma, as in training.
        sigmas_per_sample: forward passes for each sample.
        noise_key: one whole number for the run, e.g. its seed.
        given_frames: leading latent frames that the model is given; they are outside the loss.
        device: where x_t and the loss are computed.
        rank: of this process,
        world_size: of so many; sample i belongs to rank i modulo world_size.
        all_reduce_sum: returns the sum of a tensor over all ranks; needed where world_size > 1.

    Raises:
        ValueError: without samples, or without `all_reduce_sum` where it is needed.
    """
    if not samples or (world_size > 1 and all_reduce_sum is None):
        raise ValueError(f"{len(samples)} held-out samples on {world_size} processes: samples and a sum are needed")
    sigmas = fixed_sigmas(sigmas_per_sample, shift)
    table = torch.zeros(
        len(samples), len(sigmas), device=device
    )  # a cell has one owner, so its sum over ranks is exact
    with undisturbed([model]):
        for first in range(0, len(samples), world_size):
            index = first + rank
            sample = samples[index % len(samples)]
            losses = [
                _loss_at(
                    sample,
                    predict,
                    sigma,
                    int(hash_key(noise_key, Purpose.VALIDATION, index, i)),
                    given_frames,
                    device,
                )
                for i, sigma in enumerate(sigmas)
            ]
            if index < len(samples):
                table[index] = torch.stack(losses)
    if all_reduce_sum is not None:
        table = all_reduce_sum(table)
    cells = table.to("cpu", torch.float64)
    return ValidationLoss(cells.mean().item(), sigmas, tuple(cells.mean(0).tolist()))


def _loss_at(
    sample: HeldOut,
    predict: Callable[[torch.Tensor, torch.Tensor, HeldOut], torch.Tensor],
    sigma: float,
    key: int,
    given_frames: int,
    device: torch.device | str,
) -> torch.Tensor:
    latents = sample.latents.to(device, torch.float32)
    noise = keyed_noise(key, latents.shape).to(device)
    level = torch.full((1,), sigma, dtype=torch.float32, device=device)
    prediction = predict(add_noise(latents, noise, level), NUM_TRAIN_TIMESTEPS * level, sample)
    made = (slice(None), slice(None), slice(given_frames, None))
    return velocity_losses(prediction[made], (noise - latents)[made], torch.ones_like(level))[0]


def append_validation(path: Path, step: int, result: ValidationLoss, average: ValidationLoss | None = None) -> None:
    """Appends {"step", "loss", "per_sigma": [[sigma, loss], ...]} to validation.jsonl.

    Args:
        path: of the file.
        step: optimizer steps done.
        result: of the weights.
        average: of their EMA, appended as "ema_loss" and "ema_per_sigma".

    Raises:
        UserError: (exit code 5) if the file cannot be written.
    """
    line: dict[str, Any] = {"step": step}
    for prefix, found in (("", result), ("ema_", average)):
        if found is not None:
            pairs = [list(pair) for pair in zip(found.sigmas, found.per_sigma, strict=True)]
            line |= {f"{prefix}loss": found.mean, f"{prefix}per_sigma": pairs}
    append_line(path, line)


def change_since_first(path: Path) -> str:
    """Returns how the last loss in validation.jsonl differs from the first, e.g. " (-59.5 % since step 0)".

    Nothing where there is one line only, or where either loss is not finite.

    Raises:
        UserError: (exit code 5) for a line that is not a JSON object.
    """
    first, *later = read_lines(path)
    if not later or not first["loss"] or later[-1]["loss"] is None:
        return ""
    return f" ({100 * (later[-1]['loss'] / first['loss'] - 1):+.1f} % since step {first['step']})"


class Sampler(Protocol):
    """What `sample_clips` needs of a diffusers text-to-video pipeline."""

    scheduler: Any
    components: dict[str, Any]

    def set_progress_bar_config(self, **settings: Any) -> None:  # noqa: ANN401 - as in diffusers
        """Sets tqdm's keywords."""

    def __call__(self, **arguments: Any) -> Any:  # noqa: ANN401 - as in diffusers
        """Returns an object with `frames`, float [1, T, H, W, 3] in [0, 1]."""


@dataclass(frozen=True, slots=True)
class SampledClips:
    """What `sample_clips` wrote (the contact sheet last), and a line for each thing that went wrong."""

    paths: list[Path]
    warnings: list[str]


def sample_clips(
    pipeline: Sampler,
    prompts: Sequence[str],
    *,
    images: Sequence[Image.Image] = (),
    negative_prompt: str = "",
    height: int,
    width: int,
    num_frames: int,
    fps: float,
    seed: int,
    steps: int,
    guidance_scale: float,
    folder: Path,
    step: int,
    prompt_embeddings: Sequence[tuple[torch.Tensor, torch.Tensor | None]] | None = None,
    write: bool = True,
    collective: bool = False,
) -> SampledClips:
    """Samples a clip for each prompt with the weights as they are, and writes them with a contact sheet.

    Prompt i starts from the noise of a CPU generator seeded with seed + i, so that the clips of two steps differ by
    the training alone. The pipeline's scheduler, its train flags and the global generators are put back.

    A clip that fails never stops the training: running out of memory, an error of a kernel or of a size, a picture
    that is not finite and a full disk each become a line of `warnings`. Autocast is the caller's.

    Args:
        pipeline: built, with the transformer in training; its other modules where they are needed.
        prompts: at least one; they title the contact sheet.
        images: what each clip starts from, in image-to-video.
        negative_prompt: used where guidance_scale > 1.
        height: pixels, a multiple of 16.
        width: pixels, a multiple of 16.
        num_frames: 4k+1; one frame is written as .png.
        fps: the model's frames per second (Wan 16, HunyuanVideo 24).
        seed: of the noise.
        steps: denoising steps.
        guidance_scale: classifier-free guidance (1 = off).
        folder: e.g. output_dir/samples; the files are step-000020-prompt-0.mp4 ... and step-000020.png.
        step: optimizer steps done.
        prompt_embeddings: (prompt, negative or None) for each prompt, [1, L, D], where no text encoder is resident.
        write: False on every process but the one that writes.
        collective: True where the transformer is sharded, so that all processes call this together. An error of the
            sampling then is not caught, since the others would wait for ever in a collective that this one left.

    Returns:
        The paths written by this process and the warnings.
    """
    result = SampledClips([], [])
    entries: list[SheetEntry] = []
    for number, prompt in enumerate(prompts):
        embeddings = prompt_embeddings[number] if prompt_embeddings is not None else None
        arguments: dict[str, object] = {
            "height": height,
            "width": width,
            "num_frames": num_frames,
            "num_inference_steps": steps,
            "guidance_scale": guidance_scale,
            "generator": torch.Generator("cpu").manual_seed(seed + number),
            "output_type": "np",
        }
        if images:
            arguments["image"] = images[number]
        if embeddings is None:
            arguments |= {"prompt": prompt, "negative_prompt": negative_prompt}
        else:
            arguments |= {"prompt_embeds": embeddings[0], "negative_prompt_embeds": embeddings[1]}
        frames = _sample(pipeline, arguments, f"step {step}, prompt {number}", result.warnings, collective)
        if frames is None or not write:
            continue
        path = folder / f"step-{step:06d}-prompt-{number}.mp4"
        try:
            result.paths.append(write_clip(path, frames, fps))
        except OSError as error:
            result.warnings.append(f"{path} was not written: {error}")
        entries.append(SheetEntry(frames, f"step {step}   prompt {number}   {fps:.4g} fps", prompt))
    if entries:
        sheet = folder / f"step-{step:06d}.png"
        try:
            result.paths.append(write_contact_sheet(sheet, entries))
        except OSError as error:
            result.warnings.append(f"{sheet} was not written: {error}")
    return result


def _sample(
    pipeline: Sampler, arguments: Mapping[str, object], name: str, warnings: list[str], collective: bool
) -> np.ndarray | None:
    """Returns uint8 [T, H, W, 3], or None and a new line in `warnings`."""
    scheduler, bar = pipeline.scheduler, dict(getattr(pipeline, "_progress_bar_config", {}))
    modules = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    pipeline.scheduler = copy.deepcopy(scheduler)  # set_timesteps and step write into it
    pipeline.set_progress_bar_config(**bar | {"disable": True})
    failure = ""
    try:
        with undisturbed(modules):
            pixels = np.asarray(pipeline(**arguments).frames[0], dtype=np.float32)
    except (RuntimeError, ValueError) as error:  # out of memory is a RuntimeError
        if collective:
            raise
        failure = f"{type(error).__name__}: {str(error).strip() or 'no message'}"
    finally:
        pipeline.scheduler = scheduler
        pipeline.set_progress_bar_config(**bar)
    if failure:
        gc.collect()  # the traceback's tensors are free only now, after the except block
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    elif not np.isfinite(pixels).all():
        failure = "the picture is not finite"
    if failure:
        warnings.append(f"no sample at {name}: {failure.splitlines()[0]}")
        return None
    return (pixels.clip(0, 1) * 255).round().astype(np.uint8)
