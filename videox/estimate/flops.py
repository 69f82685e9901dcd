"""Serves the dry run and the report: what a transformer computes and keeps, as polynomials in a sample's tokens.

Everything is counted for one sample of S latent tokens. Operations are those of matrix products alone, two for each
multiply-add, as torch's FlopCounterMode counts them; a backward pass costs twice its forward pass, except that no
gradient is taken towards the model's inputs. Bytes are those of the tensors that autograd keeps between forward and
backward, in diffusers' eager blocks with a fused attention kernel, which keeps query, key, value and its output; and
of those that an operation makes and leaves, where the most is held. Copies of weights and what a kernel needs for
itself are not among them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from videox.shapes import PATCH

FREQUENCIES = 256  # channels of the timestep's sinusoids, both families
REFINER_RATIO = 4  # feed-forward width of the text refiner


class Polynomial(NamedTuple):
    """constant + linear S + quadratic S^2."""

    constant: float = 0.0
    linear: float = 0.0
    quadratic: float = 0.0

    def __call__(self, tokens: float) -> float:
        """Returns the value at S = tokens."""
        return self.constant + self.linear * tokens + self.quadratic * tokens * tokens


def total(*parts: Polynomial) -> Polynomial:
    """Returns the sum of polynomials."""
    return Polynomial(*(sum(column) for column in zip(*parts, strict=True))) if parts else Polynomial()


@dataclass(frozen=True)
class Block:
    """A repeated block, for one sample.

    forward: operations of its forward pass; attention: those of them that have no weights; kept: bytes that its
    backward pass needs; held: bytes of its own input, which is all that is kept of a block that is recomputed;
    passing: bytes that it holds for a moment besides, when it holds the most.
    """

    forward: Polynomial
    attention: Polynomial
    kept: Polynomial
    held: Polynomial
    passing: Polynomial


@dataclass(frozen=True)
class Network:
    """A transformer, for one sample.

    Attributes:
        blocks: in order.
        ends: operations of the forward pass outside the blocks.
        first: the part of ends whose input needs no gradient.
        ends_kept: bytes kept outside the blocks; ends_passing: held for a moment besides, between the two passes.
        frozen: its weights take no gradients, as those below a LoRA, whose own few operations are not counted.
    """

    blocks: tuple[Block, ...]
    ends: Polynomial
    first: Polynomial
    ends_kept: Polynomial
    ends_passing: Polynomial
    frozen: bool = False

    def forward(self, tokens: float) -> float:
        """Returns the operations of a forward pass."""
        return self.ends(tokens) + sum(block.forward(tokens) for block in self.blocks)

    def model(self, tokens: float) -> float:
        """Returns the operations of forward and backward pass: what is learned from, without recomputation."""
        return self.model_polynomial()(tokens)

    def recomputed(self, tokens: float, chosen: Collection[int]) -> float:
        """Returns the operations that recomputing the blocks with these numbers adds."""
        return sum(self.blocks[number].forward(tokens) for number in chosen)

    def kept(self, tokens: float, chosen: Collection[int]) -> float:
        """Returns the bytes kept between forward and backward when the chosen blocks are recomputed."""
        return self.ends_kept(tokens) + sum(
            (block.held if number in set(chosen) else block.kept)(tokens) for number, block in enumerate(self.blocks)
        )

    def peak(self, tokens: float, chosen: Collection[int]) -> float:
        """Returns the most bytes of activations at once: what is kept, one recomputed block, and what passes."""
        extra = [self.ends_passing(tokens)]
        for number, block in enumerate(self.blocks):
            extra.append(block.passing(tokens) + (block.kept(tokens) if number in set(chosen) else 0.0))
        return self.kept(tokens, chosen) + max(extra)

    def model_polynomial(self) -> Polynomial:
        """Returns `model` as a polynomial, for columns of token counts."""
        forward = total(self.ends, *(block.forward for block in self.blocks))
        weighted = Polynomial()  # whose weights' gradients are not computed
        if self.frozen:
            attention = total(*(block.attention for block in self.blocks))
            weighted = Polynomial(*(f - a for f, a in zip(forward, attention, strict=True)))
        return Polynomial(*(3 * f - i - w for f, i, w in zip(forward, self.first, weighted, strict=True)))


def cross_attention_network(
    config: Mapping[str, Any], *, text_tokens: int, image_tokens: int, half: bool, cast: bool = True
) -> Network:
    """Returns a transformer whose latents attend to each other and then to the text (Wan2.1).

    Args:
        config: of the transformer, as its config.json has it.
        text_tokens: of a prompt, padding included.
        image_tokens: of the image that the prompt shows; 0 without an image embedder.
        half: computes in bfloat16 under autocast, else in float32.
        cast: as joint_attention_network's; here every norm returns what it was given, so that it is all one.
    """
    del cast
    heads, text_dim = config["num_attention_heads"], config["text_dim"]
    dim, ffn = heads * config["attention_head_dim"], config["ffn_dim"]
    area = PATCH**2
    inputs, outputs = area * config["in_channels"], area * (config.get("out_channels") or config["in_channels"])
    image_dim = (config.get("image_dim") or 0) if image_tokens else 0
    context, size = text_tokens + image_tokens, 2 if half else 4
    forward = Polynomial(
        constant=2 * context * 2 * dim * dim,  # keys and values of text and image
        linear=2 * (6 * dim * dim + 2 * dim * ffn) + 4 * context * dim,
        quadratic=4 * dim,
    )
    # float32 in either precision: three norms with their inputs and outputs, their scales and the two gated branches;
    # in the computing precision: both attentions' q, k, v and outputs, the inputs of the linear layers.
    kept = Polynomial(
        constant=context * dim * (8 + 2 * size),
        linear=(dim * (48 + 10 * size) if half else 88 * dim) + 2 * ffn * size + 36 + 8 * heads,
    )
    attention = Polynomial(linear=4 * context * dim, quadratic=4 * dim)
    block = Block(
        forward, attention, kept, held=Polynomial(linear=dim * size), passing=Polynomial(linear=4 * dim if half else 0)
    )
    first = Polynomial(
        constant=2 * (FREQUENCIES * dim + text_tokens * text_dim * dim),
        linear=2 * inputs * dim,
    )
    image = image_tokens * image_dim * (image_dim + dim)  # its first norm has weights, which need the gradient
    ends = Polynomial(
        constant=2 * (7 * dim * dim + text_tokens * dim * dim + image),
        linear=2 * dim * outputs,
    )
    ends_kept = Polynomial(
        constant=3 * text_tokens * dim * size + text_tokens * text_dim * size + image_tokens * dim * (8 + 2 * size),
        linear=dim * (8 + size) + inputs * size + 8 * config["attention_head_dim"],
    )
    ends_passing = Polynomial(linear=dim * (10 if half else 8))
    return Network((block,) * config["num_layers"], total(ends, first), first, ends_kept, ends_passing)


def joint_attention_network(config: Mapping[str, Any], *, text_tokens: int, half: bool, cast: bool = True) -> Network:
    """Returns a transformer whose latents and text attend to each other jointly (HunyuanVideo).

    Args:
        config: of the transformer, as its config.json has it.
        text_tokens: of a prompt.
        half: computes in bfloat16 under autocast, else in float32.
        cast: the weights are float32 and cast by autocast, as under DDP; under ZeRO and FSDP a block finds them in
            bfloat16. Norms with float32 weights return float32, and so do the products with what they return.
    """
    heads, ratio = config["num_attention_heads"], config["mlp_ratio"]
    dim, size, text = heads * config["attention_head_dim"], 2 if half else 4, text_tokens
    replaced = config.get("image_condition_type") == "token_replace"
    area = PATCH**2
    inputs, outputs = area * config["in_channels"], area * (config.get("out_channels") or config["in_channels"])

    def joint(modulation: float, kept_per_token: float, passing_per_token: float) -> Block:
        per_token = 2 * (4 + 2 * ratio) * dim * dim
        forward = Polynomial(
            constant=per_token * text + 4 * dim * text * text + 2 * modulation * dim * dim,
            linear=per_token + 8 * dim * text,
            quadratic=4 * dim,
        )
        return Block(
            forward,
            attention=Polynomial(4 * dim * text * text, 8 * dim * text, 4 * dim),
            kept=Polynomial(kept_per_token * text, kept_per_token),
            held=Polynomial(dim * size * text, dim * size),
            passing=Polynomial(passing_per_token * text, passing_per_token),
        )

    # queries and keys that norms left in float32, in each stream
    wide = cast and half
    double_kept = dim * ((10 + 15 * size + 2 * ratio * size + 6 * wide) if half else 64 + 8 * ratio) + 12 * heads + 8
    single_kept = dim * ((12 + 12 * size + 2 * ratio * size + 4 * wide) if half else 56 + 8 * ratio) + 12 * heads + 4
    # a single stream's attention and feed-forward, put together in the precision of its queries
    single_passing = dim * ((16 + 5 * ratio if wide else 6) if half else 12)
    double = joint(6 + 6 + (6 if replaced else 0), double_kept, dim * (2 if half else 4))
    single = joint(3 + (3 if replaced else 0), single_kept, single_passing)

    refiners, text_dim = config["num_refiner_layers"], config["text_embed_dim"]
    times = 2 + int(bool(config.get("guidance_embeds"))) + int(replaced)  # timestep embedders, the refiner's included
    first = Polynomial(
        constant=2 * dim * (times * FREQUENCIES + text_dim + config["pooled_projection_dim"] + text * text_dim),
        linear=2 * inputs * dim,
    )
    refiner = 2 * text * (4 + 2 * REFINER_RATIO) * dim * dim + 4 * dim * text * text + 2 * 2 * dim * dim
    ends = Polynomial(
        constant=2 * (times + 2) * dim * dim + refiners * refiner + 2 * 2 * dim * dim,
        linear=2 * dim * outputs,
    )
    refiner_kept = text * dim * 21 * size + heads * text * text * size
    ends_kept = Polynomial(
        constant=refiners * refiner_kept + text * (dim + text_dim) * size,
        linear=3 * dim * size + inputs * size + 8 * config["attention_head_dim"],
    )
    blocks = (double,) * config["num_layers"] + (single,) * config["num_single_layers"]
    ends_passing = Polynomial(linear=dim * (10 if half else 20))
    return Network(blocks, total(ends, first), first, ends_kept, ends_passing)
