"""Closed formulas for the FLOPs of a sample, from a model's dimensions; used by the benchmarks of the plan."""

from __future__ import annotations


def cost_coefficients(*, dim: int, ffn_dim: int, layers: int, text_tokens: int) -> tuple[float, float]:
    """Return (a, b): one sample of S tokens costs a*S + b*S^2 floating-point operations in a forward pass.

    Counts matrix products only, two operations per multiply-add. Per token and block: four projections of
    self-attention, two of cross-attention (its keys and values are computed from the text), two of the feed-forward
    network, and attention to text_tokens. The two products of self-attention give the quadratic term.

    Args:
        dim: hidden size.
        ffn_dim: hidden size of the feed-forward network.
        layers: number of blocks.
        text_tokens: number of text tokens in cross-attention.
    """
    linear = 2 * (4 * dim * dim + 2 * dim * dim + 2 * dim * ffn_dim) + 4 * text_tokens * dim
    return float(layers * linear), float(layers * 4 * dim)


def joint_cost_coefficients(*, dim: int, mlp_ratio: float, layers: int, text_tokens: int) -> tuple[float, float]:
    """Return (a, b) like cost_coefficients, for blocks with joint attention over latents and text.

    Per latent token and block: four projections and the feed-forward network. Attention over S + text_tokens costs
    4 dim (S + text_tokens)^2; the term of the text alone is omitted, because it is the same for every sample.
    """
    linear = 2 * (4 + 2 * mlp_ratio) * dim * dim + 8 * text_tokens * dim
    return float(layers * linear), float(layers * 4 * dim)
