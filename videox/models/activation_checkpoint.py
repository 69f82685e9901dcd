"""Selective activation checkpointing (--selective_ac): a share of the blocks recomputes its activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def select_blocks(count: int, share: float) -> list[int]:
    """Return which of `count` blocks to recompute: a share (0 to 1) of them, evenly spaced.

    Block i is selected when (i + 1) * share reaches the next half, as in the original trainer's selective_ac.
    """
    selected: list[int] = []
    for block in range(count):
        if (block + 1) * share >= len(selected) + 0.5:
            selected.append(block)
    return selected


def recompute_blocks(model: Any, blocks: Sequence[torch.nn.Module], share: float) -> None:  # noqa: ANN401 - a diffusers model
    """Make a diffusers model recompute a share of its repeated blocks; the other blocks store their activations.

    Args:
        model: a diffusers model with enable_gradient_checkpointing.
        blocks: the model's repeated blocks, in order.
        share: the share of blocks to recompute, 0 to 1.
    """
    selected = {id(blocks[number]) for number in select_blocks(len(blocks), share)}

    def run(block: torch.nn.Module, *inputs: Any) -> Any:  # noqa: ANN401
        return checkpoint(block, *inputs, use_reentrant=False) if id(block) in selected else block(*inputs)

    model.enable_gradient_checkpointing(run)
