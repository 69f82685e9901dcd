"""Bytes that the operators of a block read and write which are neither matrix products nor attention.

Norms, modulation, rotary embedding, activation functions, residuals and casts are limited by the memory of a GPU.
Counted are the operators of diffusers' eager blocks under CUDA's autocast to bfloat16, for one sample: each reads its
inputs and writes its output, 2 bytes a number in bfloat16 and 4 in float32. Casts of weights are not included, nor the
angles of the rotary embedding, which all heads share. A test counts the operators on a GPU without memory: the bytes
of the forward pass agree within 1 %, those of the backward pass within 5 %, because slices are put together there. In
float32 the casts are missing and other operators move more; the same counts are used.

Fused are the operators between two matrix products, which --compile makes one kernel: it reads its inputs, and writes
its output and what is saved for the other pass, once. That is the most that compilation can give.
"""

from __future__ import annotations

from dataclasses import dataclass

from videox.estimate.polynomial import Polynomial

Passes = tuple[Polynomial, Polynomial]  # of the forward and of the backward pass


@dataclass(frozen=True)
class Traffic:
    """Bytes of a block's small operators in both passes, for one sample.

    Attributes:
        eager, fused: without and with --compile.
        adapters, fused_adapters: what a LoRA's adapters add, with their own matrix products, which are so narrow that
            memory limits them, too.
    """

    eager: Passes
    fused: Passes
    adapters: Passes
    fused_adapters: Passes


# Bytes per token in the forward and in the backward pass: per channel (DIM), per channel of the feed-forward layer
# (FFN), per channel of a latent token alone (ROPE: rotary embedding), and per token and channel of the text (TEXT).
WAN_DIM, WAN_FFN, WAN_TEXT = (286, 450), (4, 8), (20, 34)
WAN_FUSED = ((76, 82), (4, 6), (13, 19))
# Of a block whose modulation differs from token to token (Wan2.2 TI2V-5B). Fused, its six vectors are read once in
# bfloat16 in each pass, and their gradients written once.
WAN_TOKEN_DIM, WAN_TOKEN_FUSED = (410, 650), (76 + 12, 82 + 24)
DOUBLE_DIM, DOUBLE_ROPE, DOUBLE_FFN = (192, 406), (104, 92), (4, 8)
SINGLE_DIM, SINGLE_ROPE, SINGLE_FFN = (168, 394), (104, 92), (8, 8)
DOUBLE_FUSED = ((62, 70), (0, 0), (4, 6))
SINGLE_FUSED = ((48, 60), (0, 0), (6, 6))
# Of an adapter beside a linear layer. Forward: the input is read by the first matrix, the second one writes the
# output; scaling and sum read and write outputs. Backward: the same matrices twice, the scaling, and the sum of the
# input's gradients.
ADAPTER_IN, ADAPTER_OUT, FUSED_OUT = (2, 10), (12, 8), (8, 8)


def _adapters(layers: list[tuple[float, float]], outputs: tuple[int, int]) -> tuple[float, float]:
    """Return the bytes per token of adapters beside linear layers of these numbers of inputs and outputs."""
    forward, backward = (
        sum(inward * inputs + outward * output for inputs, output in layers)
        for inward, outward in zip(ADAPTER_IN, outputs, strict=True)
    )
    return forward, backward


def cross_attention_traffic(dim: int, ffn: int, context: int, *, timestep_per_token: bool = False) -> Traffic:
    """Return the traffic of a block of latents that attend to each other and then to a context (Wan2.1).

    Args:
        dim: width of a token.
        ffn: width of the feed-forward layer.
        context: tokens of text and image.
        timestep_per_token: each token has a modulation of its own, which is read and written beside it.
    """
    eager, fused = (WAN_TOKEN_DIM, WAN_TOKEN_FUSED) if timestep_per_token else (WAN_DIM, WAN_FUSED[0])

    def passes(per_dim: tuple[int, int], per_ffn: tuple[int, int], per_text: tuple[int, int]) -> Passes:
        forward, backward = (
            Polynomial(text * context * dim, a * dim + b * ffn)
            for a, b, text in zip(per_dim, per_ffn, per_text, strict=True)
        )
        return forward, backward

    # q, k, v and output of self-attention, q and output of cross-attention; its k and v are of the context
    latents, of_context = [*[(dim, dim)] * 6, (dim, ffn), (ffn, dim)], [(dim, dim)] * 2

    def adapters(outputs: tuple[int, int]) -> Passes:
        found = zip(_adapters(of_context, outputs), _adapters(latents, outputs), strict=True)  # type: ignore[arg-type]
        forward, backward = (Polynomial(context * text, own) for text, own in found)
        return forward, backward

    return Traffic(
        passes(eager, WAN_FFN, WAN_TEXT), passes(fused, *WAN_FUSED[1:]),
        adapters(ADAPTER_OUT), adapters(FUSED_OUT),
    )  # fmt: skip


def joint_attention_traffic(dim: int, ratio: float, text: int, *, single: bool) -> Traffic:
    """Return the traffic of a block in which latents and text attend to each other jointly (HunyuanVideo).

    Args:
        dim: width of a token.
        ratio: width of the feed-forward layer, in units of dim.
        text: tokens of the text.
        single: latents and text are one stream; otherwise each has layers of its own.
    """

    def passes(per_dim: tuple[int, int], rope: tuple[int, int], per_ffn: tuple[int, int]) -> Passes:
        forward, backward = (
            Polynomial((a + b * ratio) * text * dim, (a + of_latents + b * ratio) * dim)
            for a, of_latents, b in zip(per_dim, rope, per_ffn, strict=True)
        )
        return forward, backward

    ffn = ratio * dim
    # the layers of one token: of its stream, or of both
    layers = (
        [*[(dim, dim)] * 3, (dim, ffn), (dim + ffn, dim)] if single else [*[(dim, dim)] * 4, (dim, ffn), (ffn, dim)]
    )

    def adapters(outputs: tuple[int, int]) -> Passes:
        forward, backward = (Polynomial(text * own, own) for own in _adapters(layers, outputs))
        return forward, backward

    per_dim, rope, per_ffn = (SINGLE_DIM, SINGLE_ROPE, SINGLE_FFN) if single else (DOUBLE_DIM, DOUBLE_ROPE, DOUBLE_FFN)
    fused = SINGLE_FUSED if single else DOUBLE_FUSED
    return Traffic(passes(per_dim, rope, per_ffn), passes(*fused), adapters(ADAPTER_OUT), adapters(FUSED_OUT))
