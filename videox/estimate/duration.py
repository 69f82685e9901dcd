"""Duration and price of a run, from FLOPs, the plan's balance and the data sheet of a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from videox.estimate.gpus import Gpu
from videox.estimate.memory import MemorySetup, Parameters
from videox.optim.registry import OPTIMIZERS, kind_of, moments_of

# Kernels of a block's forward pass, traced in diffusers' eager blocks of both families; the backward pass has twice as
# many. The host queues them one by one, and a GPU with little work waits for it. The time of one is a rough figure
# for a server's processor, until it is measured beside a GPU.
LAUNCHES_PER_BLOCK, SECONDS_PER_LAUNCH = 82, 7e-6


@dataclass(frozen=True)
class Speed:
    """The assumed speed of a GPU.

    Attributes:
        gpu: its data sheet.
        peak: bfloat16 FLOPs per second; of the data sheet, or as the user states it.
        mfu: share of the peak that is used, 0 to 1.
        tf32: float32 matrix products use TensorFloat-32, at half the bfloat16 peak, as convolutions always do.
        source: peak and share in words, for the report.
    """

    gpu: Gpu
    peak: float
    mfu: float
    tf32: bool
    source: str

    def seconds(self, flops: float) -> float:
        """Return the time of bfloat16 FLOPs."""
        return flops / (self.peak * self.mfu)

    def float32_seconds(self, flops: float) -> float:
        """Return the time of float32 matrix products, at the same share of the peak."""
        return flops / ((self.peak / 2 if self.tf32 else self.gpu.fp32) * self.mfu)

    def convolution_seconds(self, flops: float) -> float:
        """Return the time of float32 convolutions: torch lets cuDNN compute them in TensorFloat-32 by default."""
        return flops / (self.peak / 2 * self.mfu)


@dataclass(frozen=True)
class Duration:
    """Seconds of a run on all its GPUs.

    Attributes:
        epoch: training of one epoch, without encoding.
        encoding: encoding of one epoch's clips and captions.
        epochs: epochs of the run.
        cached: encoding is done once, in the first epochs, and not in each.
        variants: epochs after which the cache has every output.
    """

    epoch: float
    encoding: float
    epochs: float
    cached: bool
    variants: int

    def run(self) -> float:
        """Return the seconds of the whole run."""
        encoded_epochs = min(self.epochs, self.variants) if self.cached and self.variants else self.epochs
        return self.epoch * self.epochs + self.encoding * encoded_epochs


def launch_seconds(blocks: int, recomputed: int) -> float:
    """Return the least time of a micro-batch's forward and backward pass: that of launching its kernels.

    Args:
        blocks: repeated blocks of the transformer.
        recomputed: those of them under activation checkpointing, which run forward twice.
    """
    return (3 * blocks + recomputed) * LAUNCHES_PER_BLOCK * SECONDS_PER_LAUNCH


def idle_seconds(work: np.ndarray, launches: float) -> tuple[float, int]:
    """Return how long a GPU waits for launches in all micro-batches together, and in how many of them it waits.

    Args:
        work: float64 [micro-batches], the GPU's own seconds for each.
        launches: of launch_seconds.
    """
    waits = np.maximum(launches - work, 0.0)
    return float(waits.sum()), int(np.count_nonzero(waits))


def offload_seconds(parameters: Parameters, setup: MemorySetup, gpu: Gpu) -> float:
    """Return the least time per optimizer step that copies between host and GPU take.

    An optimizer in host memory receives each gradient and returns each weight. Offloaded bfloat16 weights are copied
    in for the forward and for the backward pass.
    """
    share, moved = 1 / setup.processes, 0.0
    if kind_of(setup.optimizer).on_host:
        moved += 2 * OPTIMIZERS[moments_of(setup.optimizer)].weight_bytes * parameters.trainable
    if setup.offloads("optimizer"):
        moved += (4 + 2) * parameters.trainable * share
    if setup.offloads("param"):
        moved += 2 * 2 * parameters.total * share
    return moved / gpu.host_bandwidth


def format_duration(seconds: float) -> str:
    """Return a duration in its natural unit."""
    for limit, unit, name in ((90, 1, "seconds"), (90 * 60, 60, "minutes"), (72 * 3600, 3600, "hours")):
        if seconds < limit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds / 86_400:,.1f} days"


def format_gpu_time(seconds: float, gpus: int, price: float | None) -> str:
    """Return duration, GPU hours and price.

    Args:
        seconds: duration on all GPUs.
        gpus: number of GPUs.
        price: of a GPU hour; None: not stated.
    """
    hours = seconds * gpus / 3600
    cost = "" if price is None else f", {hours * price:,.2f} at {price:g} per GPU hour"
    return f"{format_duration(seconds)} on {gpus} {'GPU' if gpus == 1 else 'GPUs'} ({hours:,.3g} GPU hours{cost})"
