"""Which blocks of a transformer recompute their activations, and which are streamed; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

COPIES_ON_DEVICE = 3  # of offloaded inputs, on the GPU at a time: of the block that computes, and copies on their way

ON_DEVICE = 2  # streamed blocks whose weights are on the GPU at a time: of the block that runs, and of the next one
LEAST_STREAMED = ON_DEVICE + 1  # blocks; fewer need no less memory
GRADIENT_COPIES = 2  # of a streamed block that is trained: as autograd computes them, and on their way to the host


@dataclass(frozen=True)
class Recompute:
    """What the backward pass computes again.

    Attributes:
        share: share of the blocks that are checkpointed, 0 to 1: they save their inputs alone.
        keep: "" recomputes all of a checkpointed block; "attention" keeps the outputs of its attention;
            "self_attention" keeps those whose keys are as many as the queries, and not those of cross-attention.
    """

    share: float = 0.0
    keep: str = ""

    def __str__(self) -> str:
        """Return it in words."""
        if not self.share:
            return "recompute nothing"
        blocks = "all blocks" if self.share == 1 else f"{self.share:g} of the blocks"
        return f"recompute {blocks}" + (f", keep {self.keep.replace('_', '-')}" if self.keep else "")


def select_blocks(count: int, share: float) -> list[int]:
    """Return which of `count` blocks to recompute: a share (0 to 1) of them, evenly spaced.

    Block i is selected when (i + 1) * share reaches the next half, as in the original trainer's selective_ac.
    """
    selected: list[int] = []
    for block in range(count):
        if (block + 1) * share >= len(selected) + 0.5:
            selected.append(block)
    return selected
