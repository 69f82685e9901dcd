"""Duration and price of a run, from the computed steps and the time of encoding."""

from __future__ import annotations

from dataclasses import dataclass

from videox.estimate.gpus import Gpu

ENCODER_SHARE = 0.35  # of the peak of their dtype: assumed, for convolutions and for text


@dataclass(frozen=True)
class Speed:
    """The assumed speed of a GPU for the encoders.

    Attributes:
        gpu: its data sheet.
        peak: bfloat16 FLOPs per second; of the data sheet, or as the user states it.
        mfu: share of the peak that is used, 0 to 1.
        tf32: float32 matrix products use TensorFloat-32, at half the bfloat16 peak, as convolutions always do.
    """

    gpu: Gpu
    peak: float
    mfu: float
    tf32: bool

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


def three_digits(number: float) -> str:
    """Return a number in words: three digits, and all of them from 1,000 on."""
    return f"{number:,.0f}" if number >= 999.5 else f"{number:.3g}"


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
    return f"{format_duration(seconds)} on {gpus} {'GPU' if gpus == 1 else 'GPUs'} ({three_digits(hours)} GPU hours{cost})"
