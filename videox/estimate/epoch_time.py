"""Time of an epoch's steps from the computed time of its micro-batches, and what further flags would give."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from videox.estimate.step_time import Parts, StepModel
from videox.shapes import USUAL, Bucket, Ratios, token_count

GIB = 2**30
ALONE = "padding of the last step"  # what "waiting" is on one GPU: slots of a step that have no sample
SMALL_SHARE = 0.02  # parts of a step below this share are not named
LEAST_GAIN = GIB / 20  # bytes of a GPU that are printed as more than 0.0 GiB
MOST_BUCKETS = 8  # sizes of micro-batches that are listed
NAMES = {
    "attention": "attention", "matmul": "matrix products", "memory": "memory traffic",
    "communication": "communication", "host": "copies to the host", "launches": "kernel launches",
    "waiting": "waiting for other GPUs", "assumed": "the model's FLOPs",
}  # fmt: skip


@dataclass(frozen=True)
class SizeTime:
    """Micro-batches of one size.

    Attributes:
        bucket: size of the samples.
        samples: of a micro-batch.
        count: micro-batches of an epoch.
        parts: seconds of one of them.
        flops: of the model, without recomputation.
    """

    bucket: Bucket
    samples: int
    count: int
    parts: Parts
    flops: float


@dataclass(frozen=True)
class EpochTime:
    """The computed time of an epoch.

    Attributes:
        sizes: of the micro-batches, the longest time of the epoch first.
        steps: optimizer steps.
        gpus: number of GPUs.
        peak: bfloat16 FLOPs per second of a GPU.
        step: seconds of a mean step on one GPU, with what it waits for the others; without encoding.
    """

    sizes: tuple[SizeTime, ...]
    steps: int
    gpus: int
    peak: float
    step: Parts

    def seconds(self) -> float:
        """Return the seconds of the epoch, without encoding."""
        return self.step.total() * self.steps

    def mfu(self) -> float:
        """Return the share of the GPUs' FLOPs that go into the model, without encoding, 0 to 1."""
        return sum(size.count * size.flops for size in self.sizes) / (self.seconds() * self.peak * self.gpus)

    def seconds_of(self, buckets: Sequence[Bucket]) -> list[float]:
        """Return the seconds of an epoch's micro-batches of each bucket, of all GPUs together."""
        found = dict.fromkeys(buckets, 0.0)
        for size in self.sizes:
            found[size.bucket] += size.count * size.parts.total()
        return list(found.values())

    def idle(self) -> int:
        """Return in how many micro-batches of the epoch a GPU waits for kernel launches."""
        return sum(size.count for size in self.sizes if size.parts.launches > 0)


def epoch_time(
    model: StepModel,
    micro_batches: Mapping[tuple[Bucket, int], int],
    recompute: Callable[[int], tuple[Collection[int], str]],
    steps: int,
    balance: float,
    ratios: Ratios = USUAL,
) -> EpochTime:
    """Return the time of an epoch.

    Args:
        model: of the step.
        micro_batches: number of those of each bucket and number of samples.
        recompute: returns the numbers of the recomputed blocks, and what they keep, by the tokens of a sample.
        steps: optimizer steps of the epoch.
        balance: share of the GPUs' time in which none waits for another, 0 to 1.
        ratios: of the model.
    """
    sizes, backward = [], 0.0
    for (bucket, samples), count in micro_batches.items():
        tokens = token_count(bucket, ratios)
        parts = model.micro_batch(samples, tokens, *recompute(tokens))
        flops = samples * model.network.forward_backward(tokens)
        sizes.append(SizeTime(bucket, samples, count, parts, flops))
        backward += count * model.backward(samples, tokens).total()
    gpus, step = model.setup.processes, Parts()
    for size in sizes:
        step = step.plus(size.parts, size.count / (gpus * steps))
    step = step._replace(waiting=step.total() * (1 / balance - 1))
    step = step.plus(model.optimizer_step(backward / sum(micro_batches.values())))
    ordered = sorted(sizes, key=lambda size: -size.count * size.parts.total())
    return EpochTime(tuple(ordered), steps, gpus, model.rates.peak, step)


@dataclass(frozen=True)
class FlagGain:
    """What one further flag changes.

    Attributes:
        flags: as typed.
        seconds: of a step, encoding included; negative: it saves them.
        gpu, host: bytes of a GPU's and of a machine's memory.
        words: what else it needs; "" nothing.
    """

    flags: str
    seconds: float
    gpu: float
    host: float = 0.0
    words: str = ""


def shares(parts: Parts, gpus: int = 1) -> Iterator[tuple[str, float]]:
    """Yield the names of the parts of a step on so many GPUs and their shares, the largest first, no small ones."""
    names = NAMES if gpus > 1 else {**NAMES, "waiting": ALONE}
    total = parts.total()
    named = sorted(parts._asdict().items(), key=lambda item: -item[1])
    yield from ((names[name], value / total) for name, value in named if value >= SMALL_SHARE * total)


def limit_words(parts: Parts, gpus: int = 1) -> str:
    """Return what takes the time of a step on so many GPUs, the largest part first."""
    (first, share), *others = shares(parts, gpus)
    rest = ", ".join(f"{name} {part:.0%}" for name, part in others)
    return f"limited by {first} ({share:.0%}" + (f"; {rest})" if rest else ")")


def step_time_lines(time: EpochTime, encoding: float, assumed: str, *, most: int = MOST_BUCKETS) -> list[str]:
    """Return lines on the time of a step, its MFU and what limits it, and of each size of micro-batches.

    Args:
        time: of the epoch.
        encoding: seconds of encoding in a step; 0 with a latent cache.
        assumed: the rates of the GPU, in words.
        most: sizes that are listed.
    """
    encoded = f", and {encoding:.3g} s of encoding" if encoding else ""
    source = "at an assumed MFU" if time.step.assumed else "computed, not measured"
    lines = [
        f"step, {source}: {time.step.total():.3g} s{encoded}; MFU {time.mfu():.1%} (without encoding); "
        f"{limit_words(time.step, time.gpus)}",
        f"  {assumed}",
    ]
    if len(time.sizes) > 1:
        lines.append("  micro-batches, the longest time of an epoch first:")
        lines += [f"    {_size_words(size, time.peak)}" for size in time.sizes[:most]]
        if len(time.sizes) > most:
            lines.append(f"    and {len(time.sizes) - most} other sizes")
    return lines


def _size_words(size: SizeTime, peak: float) -> str:
    bucket, seconds = size.bucket, size.parts.total()
    name = f"{size.samples} x {bucket.frames}x{bucket.height}x{bucket.width}"
    largest, share = next(shares(size.parts))
    return f"{name:>20} {seconds:>8.3g} s, MFU {size.flops / (seconds * peak):>5.1%}, {largest} {share:.0%}"


def gain_lines(gains: Sequence[FlagGain]) -> list[str]:
    """Return the table of what each further flag would give alone, the most time saved first.

    Flags that would save neither time nor memory are left out.
    """
    gains = [gain for gain in gains if gain.seconds < 0 or gain.gpu < -LEAST_GAIN]
    if not gains:
        return []
    width = max(len(gain.flags) for gain in gains)
    lines = [
        "what each further flag would give alone, computed, not measured (a step, encoding included; memory of a GPU):"
    ]
    for gain in sorted(gains, key=lambda gain: gain.seconds):
        host = f", {gain.host / GIB:+.1f} GiB of host memory" if gain.host else ""
        words = f"; {gain.words}" if gain.words else ""
        lines.append(f"  {gain.flags:<{width}} {gain.seconds:>+9.3g} s {gain.gpu / GIB:>+8.1f} GiB{host}{words}")
    return lines
