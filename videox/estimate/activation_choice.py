"""Which activations to recompute for samples of a size: as few as the memory of a GPU allows (--activation_memory)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from videox.estimate.flops import Network
from videox.models.recompute import Recompute, select_blocks
from videox.shapes import USUAL, Bucket, Ratios, token_count

SHARES = tuple(eighth / 8 for eighth in range(1, 9))
CHOICES = (Recompute(), *(Recompute(share, keep) for share in SHARES for keep in ("attention", "self_attention", "")))
MOST_NAMED = 6  # buckets of a line


def choose_recompute(
    network: Network, tokens: int, fits: Callable[[Recompute], bool], choices: Sequence[Recompute] = CHOICES
) -> Recompute:
    """Return the choice with the fewest recomputed FLOPs that fits; all blocks if none does.

    Args:
        network: the transformer.
        tokens: of a sample.
        fits: whether a step fits in memory.
        choices: those that the backend allows.
    """

    def cost(choice: Recompute) -> tuple[float, float]:
        blocks = select_blocks(len(network.blocks), choice.share)
        return network.recompute(tokens, blocks, choice.keep), network.saved_bytes(tokens, blocks, choice.keep)

    return next((choice for choice in sorted(choices, key=cost) if fits(choice)), Recompute(1.0))


def choice_lines(
    samples: Mapping[Bucket, int], choose: Callable[[int, int], Recompute], gib: float, *, most: int = MOST_NAMED,
    ratios: Ratios = USUAL,
) -> list[str]:  # fmt: skip
    """Return lines on what is recomputed in each bucket: one for each choice, the largest buckets first.

    Args:
        samples: of the largest micro-batch of each bucket.
        choose: from samples and tokens.
        gib: memory of the GPU.
        most: buckets that a line names.
        ratios: of the model.
    """
    by_choice: dict[Recompute, list[Bucket]] = {}
    tokens = {bucket: token_count(bucket, ratios) for bucket in samples}
    for bucket in sorted(samples, key=lambda bucket: -samples[bucket] * tokens[bucket]):
        by_choice.setdefault(choose(samples[bucket], tokens[bucket]), []).append(bucket)
    lines = [f"activation memory, chosen for {gib:.1f} GiB:"]
    return lines + [f"  {choice}: {_named(buckets, samples, most)}" for choice, buckets in by_choice.items()]


def _named(buckets: Sequence[Bucket], samples: Mapping[Bucket, int], most: int) -> str:
    named = [f"{samples[b]} x {b.frames}x{b.height}x{b.width}" for b in buckets[:most]]
    further = f" and {len(buckets) - most} smaller ones" if len(buckets) > most else ""
    return ", ".join(named) + further
