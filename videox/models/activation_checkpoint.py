"""Serves --selective_ac: activations of some blocks are recomputed in the backward pass instead of kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def chosen_blocks(count: int, share: float) -> list[int]:
    """Returns which of `count` blocks to recompute: a share (0 to 1) of them, evenly spaced.

    Block i is chosen when i * share passes the next half, as the original's selective_ac does.
    """
    chosen: list[int] = []
    for block in range(count):
        if (block + 1) * share >= len(chosen) + 0.5:
            chosen.append(block)
    return chosen


def recompute_blocks(model: Any, blocks: Sequence[torch.nn.Module], share: float) -> None:  # noqa: ANN401 - a diffusers model
    """Makes a diffusers model recompute a share of its repeated blocks; the others keep their activations.

    Args:
        model: with diffusers' enable_gradient_checkpointing.
        blocks: its repeated blocks, in order.
        share: 0 to 1.
    """
    chosen = {id(blocks[number]) for number in chosen_blocks(len(blocks), share)}

    def run(block: torch.nn.Module, *inputs: Any) -> Any:  # noqa: ANN401
        return checkpoint(block, *inputs, use_reentrant=False) if id(block) in chosen else block(*inputs)

    model.enable_gradient_checkpointing(run)
