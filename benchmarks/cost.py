"""Serves the plan and the dry run: what a sample costs, from a model's dimensions alone."""

from __future__ import annotations


def cost_coefficients(*, dim: int, ffn_dim: int, layers: int, text_tokens: int) -> tuple[float, float]:
    """Returns (a, b): one sample of S tokens costs a*S + b*S^2 floating-point operations in a forward pass.

    Counts matrix products only, two operations per multiply-add: per token and block four projections of
    self-attention, two of cross-attention (its keys and values belong to the text), two of the feed-forward net, and
    attention to text_tokens; self-attention's two products give the quadratic term.

    Args:
        dim: hidden size; ffn_dim: of the feed-forward net; layers: blocks; text_tokens: of cross-attention.
    """
    linear = 2 * (4 * dim * dim + 2 * dim * dim + 2 * dim * ffn_dim) + 4 * text_tokens * dim
    return float(layers * linear), float(layers * 4 * dim)


def joint_cost_coefficients(*, dim: int, mlp_ratio: float, layers: int, text_tokens: int) -> tuple[float, float]:
    """Returns (a, b) as cost_coefficients for blocks in which latents and text attend to each other jointly.

    Per latent token and block four projections and the feed-forward net; attention over S + text_tokens costs
    4 dim (S + text_tokens)^2, of which the part of the text alone is left out, since it is the same for every sample.
    """
    linear = 2 * (4 + 2 * mlp_ratio) * dim * dim + 8 * text_tokens * dim
    return float(layers * linear), float(layers * 4 * dim)
