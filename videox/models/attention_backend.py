"""Attention kernels (--attention_backend) by diffusers' dispatcher: names, what is installed, which is fastest here.

Each backend is tried with a forward and a backward pass before it is used: some have no backward pass, and some do not
run on a device or in a dtype.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn
from torch import Tensor

from videox.device import DeviceEvent
from videox.errors import UserError

AUTO, NATIVE = "auto", "native"
ALIASES = {"cudnn": "_native_cudnn", "flash3": "_flash_3"}
# What --attention_backend auto compares: kernels with a backward pass that are installed as packages or part of torch.
CANDIDATES = (NATIVE, "_native_cudnn", "_native_flash", "flash", "_flash_3", "xformers")
# What to do about a backend that cannot train here, by a part of its name; the first one counts.
HINTS = {
    "sage": "use another backend: sageattention has no backward pass",
    "_hub": "pip install kernels, which downloads this kernel",
    "flash_3": "build FlashAttention-3 from source (hopper/ of the flash-attention repository)",
    "_native": "use native or auto",
    "flash": "pip install flash-attn --no-build-isolation",
    "xformers": "pip install xformers",
}
MOST_TOKENS = 32_768  # of the measurement
TRIALS = 3
TOLERANCE = 0.05  # relative difference of a backend's gradients from torch's own, in bfloat16
WHERE = "--attention_backend"


class AttentionShape(NamedTuple):
    """Sizes of one call of self-attention: samples, tokens, heads, channels of a head."""

    samples: int
    tokens: int
    heads: int
    channels: int


def backend_names() -> list[str]:
    """Return the names of diffusers' attention backends, as the flag takes them; private ones without underscores."""
    return [*ALIASES, *(backend.value.lstrip("_") for backend in AttentionBackendName)]


def find_backend(name: str) -> str:
    """Return diffusers' name of a backend.

    Raises:
        UserError: there is none of this name.
    """
    known = {backend.value.lstrip("_"): backend.value for backend in AttentionBackendName}
    found = ALIASES.get(name) or known.get(name.lstrip("_"))
    if found is None:
        raise UserError(WHERE, f"{name} is not a backend of diffusers", f"use auto, {', '.join(backend_names())}")
    return found


@dataclass(frozen=True)
class Trial:
    """A forward and a backward pass of self-attention with random values, in the layout of the models.

    Attributes:
        shape: of one call.
        device: on which it runs.
        dtype: of query, key and value.
    """

    shape: AttentionShape
    device: torch.device
    dtype: torch.dtype

    def inputs(self) -> list[Tensor]:
        """Return query, key and value [B, S, H, C], and the gradient of the output, equal in each call."""
        samples, tokens, heads, channels = self.shape
        generator = torch.Generator(self.device).manual_seed(0)
        values = torch.randn(
            4, samples, tokens, heads, channels, device=self.device, dtype=self.dtype, generator=generator
        )
        return [values[number] for number in range(4)]

    def run(self, backend: str) -> list[Tensor]:
        """Return the output and the gradients of query, key and value; raises what the backend raises."""
        *given, upstream = self.inputs()
        given = [tensor.requires_grad_() for tensor in map(Tensor.detach, given)]
        with attention_backend(AttentionBackendName(backend)):
            output = dispatch_attention_fn(given[0], given[1], given[2])
        return [output.detach(), *torch.autograd.grad(output, given, upstream)]

    def seconds(self, backend: str) -> float:
        """Return the shortest time of a forward and a backward pass of some; the first one is not counted."""
        self.run(backend)
        times = []
        for _ in range(TRIALS):
            begin = DeviceEvent(self.device)
            self.run(backend)
            times.append(DeviceEvent(self.device).since(begin))
        return min(times)


def failure_of(backend: str, trial: Trial) -> str:
    """Return why a backend cannot train, "" if it can: it is not installed, does not run here, or has other gradients.

    A backend is a library's kernel, which may raise anything.
    """
    try:
        found = trial.run(backend)
    except torch.OutOfMemoryError:
        raise
    except Exception as why:  # noqa: BLE001 - a kernel may raise anything; the message says which one and why
        return " ".join(f"{why}".split())[:200] or type(why).__name__
    for name, ours, theirs in zip(("output", "dq", "dk", "dv"), found, trial.run(NATIVE), strict=True):
        difference = float((ours.float() - theirs.float()).norm() / theirs.float().norm().clamp(min=1e-30))
        if not difference <= TOLERANCE:
            return f"its {name} differs from torch's own by {difference:.2g} of its norm"
    return ""


def check_backend(name: str, trial: Trial) -> str:
    """Return diffusers' name of a backend that can train here.

    Args:
        name: as the flag takes it.
        trial: small, on the device and in the dtype of the run.

    Raises:
        UserError: with the reason, and what to install.
    """
    backend = find_backend(name)
    if backend != NATIVE and (why := failure_of(backend, trial)):
        hint = next((hint for part, hint in HINTS.items() if part in backend), "use native or auto")
        raise UserError(WHERE, f"{name} cannot train on {trial.device} ({why})", hint)
    return backend


def fastest_backend(small: Trial, large: Trial, candidates: Sequence[str]) -> tuple[str, dict[str, float]]:
    """Return the fastest backend that can train here, and the seconds of each that can.

    Args:
        small: decides which backends can.
        large: measured.
        candidates: diffusers' names, such as CANDIDATES.
    """
    times = {}
    for backend in candidates:
        if backend == NATIVE or not failure_of(backend, small):
            times[backend] = large.seconds(backend)
    return min(times, key=times.__getitem__), times


class UnmaskedKernel:
    """Part of an attention processor of diffusers whose calls may need a mask, which most kernels do not take.

    Attributes:
        all_real: no token is masked, so that no mask is needed: only then the chosen kernel computes.
        chosen_backend: as set_attention_backend sets it.
    """

    all_real = False
    chosen_backend: AttentionBackendName | None = None

    @property
    def _attention_backend(self) -> AttentionBackendName | None:
        """The kernel of the next call."""
        return self.chosen_backend if self.all_real or self.chosen_backend is None else AttentionBackendName.NATIVE

    @_attention_backend.setter
    def _attention_backend(self, backend: AttentionBackendName | None) -> None:
        self.chosen_backend = backend


def use_backend(model: Any, backend: str) -> None:  # noqa: ANN401 - of diffusers
    """Let a diffusers model compute its attention by a backend, by diffusers' name."""
    logger = logging.getLogger("diffusers.models.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)  # diffusers warns that backends are experimental
    try:
        model.set_attention_backend(backend)
    finally:
        logger.setLevel(level)


def describe_times(times: dict[str, float], shape: AttentionShape) -> str:
    """Return a line on what was measured."""
    figures = ", ".join(f"{name.lstrip('_')} {1000 * seconds:.3g} ms" for name, seconds in times.items())
    return f"attention kernels, {shape.samples} x {shape.tokens:,} tokens, forward and backward: {figures}"
