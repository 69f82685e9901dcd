"""Serves the HunyuanVideo script: text without its padding, so that attention needs no mask where all is real."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence


def trim_text(embeds: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns embeddings and mask cut to the batch's longest text; the model's output stays what it was.

    A text without any real token keeps its first one: a mask that is zero everywhere would make the model's mean over
    the text a division by zero.

    Args:
        embeds: [B, L, D].
        mask: [B, L], the first tokens of each row 1, the rest 0.

    Returns:
        [B, longest, D] and [B, longest] float32.
    """
    kept = mask.clone().float()
    kept[:, 0] = 1
    longest = int(kept.sum(1).max())
    return embeds[:, :longest], kept[:, :longest]


def join_text(texts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns embeddings [B, longest, D], zeros past each text's end, and their mask, float32 [B, longest].

    Args:
        texts: embeddings [L, D] of each text, all of whose tokens are real.
    """
    lengths = torch.tensor([len(text) for text in texts])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).float()
    return pad_sequence(list(texts), batch_first=True), mask.to(texts[0].device)
