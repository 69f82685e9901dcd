"""FLOPs and activation bytes of a transformer, as polynomials in the tokens of a sample.

Everything is counted for one sample of S latent tokens. FLOPs are those of matrix products alone, two for each
multiply-add, as torch's FlopCounterMode counts them; a backward pass costs twice its forward pass, except that no
gradient with respect to the model's inputs is computed. Saved bytes are those of the tensors that autograd saves
between forward and backward, in diffusers' eager blocks with a fused attention kernel, which saves query, key, value
and its output. Transient bytes are those that an operation allocates and frees, at the moment of the highest total.
Copies of weights and the workspace of kernels are not included.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from videox.estimate.polynomial import Polynomial, total
from videox.estimate.traffic import Traffic, cross_attention_traffic, joint_attention_traffic

FREQUENCIES = 256  # channels of the sinusoidal timestep embedding, both families
REFINER_RATIO = 4  # feed-forward width of the text refiner
# Bytes per channel of a token with a modulation of its own: saved by a block, and for a moment of its backward pass.
MODULATED, MODULATING = 6 * 4 + 2 * 4, 2 * 4


@dataclass(frozen=True)
class Block:
    """A repeated block, for one sample.

    forward: FLOPs of its forward pass; attention: those of them without weights; saved: bytes that autograd saves for
    its backward pass; input: bytes of its own input, which is all that is saved of a block under activation
    checkpointing; transient: further bytes that it allocates for a moment at its peak. kept: by the value of
    --gradient_checkpointing_keep, FLOPs that need not be recomputed and bytes that are saved for it: outputs of
    attention, and float32 log-sums of its exponentials. traffic: bytes that all other operators read and write.
    frozen: saved and transient bytes under a LoRA: autograd saves nothing for the gradients of weights and modulation.
    """

    forward: Polynomial
    attention: Polynomial
    saved: Polynomial
    input: Polynomial
    transient: Polynomial
    kept: Mapping[str, tuple[Polynomial, Polynomial]]
    traffic: Traffic
    frozen: tuple[Polynomial, Polynomial]

    def activations(self, *, frozen: bool) -> tuple[Polynomial, Polynomial]:
        """Return saved and transient bytes."""
        return self.frozen if frozen else (self.saved, self.transient)

    def kept_flops(self, keep: str) -> Polynomial:
        """Return the FLOPs that are not recomputed."""
        return self.kept[keep][0] if keep else Polynomial()

    def kept_bytes(self, keep: str) -> Polynomial:
        """Return the bytes that are saved in addition to the input."""
        return self.kept[keep][1] if keep else Polynomial()


@dataclass(frozen=True)
class Network:
    """A transformer, for one sample.

    Attributes:
        blocks: the repeated blocks, in order.
        outside: FLOPs of the forward pass outside the blocks.
        first_layers: the part of outside whose input needs no gradient.
        outside_saved: bytes saved outside the blocks.
        outside_transient: further bytes for a moment outside the blocks, between the two passes.
        outside_frozen: as outside_saved, of frozen weights.
        frozen: the weights get no gradients, as those of a LoRA's base model; the few FLOPs of the adapters are not
            counted.
    """

    blocks: tuple[Block, ...]
    outside: Polynomial
    first_layers: Polynomial
    outside_saved: Polynomial
    outside_transient: Polynomial
    outside_frozen: Polynomial
    frozen: bool = False

    def forward(self, tokens: float) -> float:
        """Return the FLOPs of a forward pass."""
        return self.outside(tokens) + sum(block.forward(tokens) for block in self.blocks)

    def forward_backward(self, tokens: float) -> float:
        """Return the FLOPs of forward and backward pass, without recomputation."""
        return self.forward_backward_polynomial()(tokens)

    def recompute(self, tokens: float, recomputed_blocks: Collection[int], keep: str = "") -> float:
        """Return the FLOPs that activation checkpointing of the blocks with these numbers adds."""
        blocks = [self.blocks[number] for number in recomputed_blocks]
        return sum(block.forward(tokens) - block.kept_flops(keep)(tokens) for block in blocks)

    def saved_bytes(self, tokens: float, recomputed_blocks: Collection[int], keep: str = "") -> float:
        """Return the bytes saved between forward and backward, with activation checkpointing of some blocks."""
        recomputed, outside = set(recomputed_blocks), self.outside_frozen if self.frozen else self.outside_saved
        return outside(tokens) + sum(
            block.input(tokens) + block.kept_bytes(keep)(tokens)
            if number in recomputed
            else block.activations(frozen=self.frozen)[0](tokens)
            for number, block in enumerate(self.blocks)
        )

    def peak_bytes(self, tokens: float, recomputed_blocks: Collection[int], keep: str = "") -> float:
        """Return the peak bytes of activations: all that is saved, one recomputed block, and transient bytes."""
        recomputed, transients = set(recomputed_blocks), [self.outside_transient(tokens)]
        for number, block in enumerate(self.blocks):
            saved, transient = (bytes_of(tokens) for bytes_of in block.activations(frozen=self.frozen))
            again = saved - block.kept_bytes(keep)(tokens) if number in recomputed else 0.0
            transients.append(transient + again)
        return self.saved_bytes(tokens, recomputed_blocks, keep) + max(transients)

    def offloaded_bytes(self, tokens: float, recomputed_blocks: Collection[int]) -> list[float]:
        """Return the bytes that --offload_activations moves to the host, by block, in their order.

        These are the latents' tokens in the inputs of the recomputed blocks, but for the last one, with which the
        backward pass begins.
        """
        return [self.blocks[number].input.linear * tokens for number in sorted(recomputed_blocks)[:-1]]

    def forward_backward_polynomial(self) -> Polynomial:
        """Return `forward_backward` as a polynomial, for columns of token counts."""
        forward = total(self.outside, *(block.forward for block in self.blocks))
        # forward FLOPs of layers whose weights are frozen: the backward pass computes only the gradient of their input
        no_weight_gradients = Polynomial()
        if self.frozen:
            attention = total(*(block.attention for block in self.blocks))
            no_weight_gradients = Polynomial(*(f - a for f, a in zip(forward, attention, strict=True)))
        return Polynomial(
            *(3 * f - i - w for f, i, w in zip(forward, self.first_layers, no_weight_gradients, strict=True))
        )


def cross_attention_network(
    config: Mapping[str, Any], *, text_tokens: int, image_tokens: int, half: bool, cast: bool = True,
    timestep_per_token: bool = False,
) -> Network:  # fmt: skip
    """Return a transformer whose latents attend to each other and then to the text (Wan2.1).

    Args:
        config: of the transformer, as in its config.json.
        text_tokens: tokens of a prompt, padding included.
        image_tokens: tokens of the image condition; 0 without an image embedder.
        half: computes in bfloat16 under autocast, else in float32.
        cast: as in joint_attention_network; it makes no difference here, because every norm returns its input's dtype.
        timestep_per_token: each token has a timestep, and so a modulation, of its own (Wan2.2 TI2V-5B).
    """
    del cast
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    area, text_dim = math.prod(config.get("patch_size", (1, 2, 2))), config["text_dim"]
    inputs, outputs = area * config["in_channels"], area * (config.get("out_channels") or config["in_channels"])
    image_dim = (config.get("image_dim") or 0) if image_tokens else 0
    size, modulation = 2 if half else 4, int(timestep_per_token)
    block = _cross_attention_block(config, text_tokens, image_tokens, half=half, timestep_per_token=timestep_per_token)
    # the timestep's embedding, once for a sample or for each token
    embedding, projection = 2 * FREQUENCIES * dim, 2 * 7 * dim * dim
    first_layers = Polynomial(
        constant=2 * text_tokens * text_dim * dim + (0 if timestep_per_token else embedding),
        linear=2 * inputs * dim + (embedding if timestep_per_token else 0),
    )
    # not among first_layers: the norm before the projection has weights, so that its input needs a gradient
    image_projection = image_tokens * image_dim * (image_dim + dim)
    outside = Polynomial(
        constant=2 * (text_tokens * dim * dim + image_projection) + (0 if timestep_per_token else projection),
        linear=2 * dim * outputs + (projection if timestep_per_token else 0),
    )
    of_timesteps = Polynomial(linear=modulation * (FREQUENCIES * size + dim * (4 + 10 * size)))
    outside_saved = Polynomial(
        constant=3 * text_tokens * dim * size + text_tokens * text_dim * size + image_tokens * dim * (8 + 2 * size),
        linear=dim * (8 + size) + inputs * size + 8 * config["attention_head_dim"],
    )
    outside_transient = Polynomial(linear=dim * (10 if half else 8))
    outside_frozen = _outside_frozen(config, dim) if half else outside_saved
    return Network(
        (block,) * config["num_layers"], total(outside, first_layers), first_layers,
        total(outside_saved, of_timesteps), outside_transient, total(outside_frozen, of_timesteps),
    )  # fmt: skip


def _cross_attention_block(
    config: Mapping[str, Any], text_tokens: int, image_tokens: int, *, half: bool, timestep_per_token: bool
) -> Block:
    """Return a block of cross_attention_network, which has the same arguments."""
    heads, ffn = config["num_attention_heads"], config["ffn_dim"]
    dim, context, size = heads * config["attention_head_dim"], text_tokens + image_tokens, 2 if half else 4
    forward = Polynomial(
        constant=2 * context * 2 * dim * dim,  # keys and values of text and image
        linear=2 * (6 * dim * dim + 2 * dim * ffn) + 4 * context * dim,
        quadratic=4 * dim,
    )
    # float32 in either precision: three norms with their inputs and outputs, their scales and the two gated branches;
    # in the computing precision: both attentions' q, k, v and outputs, the inputs of the linear layers.
    saved = Polynomial(
        constant=context * dim * (8 + 2 * size),
        linear=(dim * (48 + 10 * size) if half else 88 * dim) + 2 * ffn * size + 36 + 8 * heads,
    )
    attention = Polynomial(linear=4 * context * dim, quadratic=4 * dim)
    output = dim * size + 4 * heads
    kept = {
        "attention": (attention, Polynomial(linear=(2 + bool(image_tokens)) * output)),
        "self_attention": (Polynomial(quadratic=4 * dim), Polynomial(linear=output)),
    }
    input_bytes, transient = Polynomial(linear=dim * size), Polynomial(linear=4 * dim if half else 0)
    frozen = _cross_attention_frozen(dim, ffn, heads, context) if half else (saved, transient)
    # float32: the six vectors of a token's modulation, and 1 + scale of two of them
    modulated, modulating = (Polynomial(linear=timestep_per_token * dim * count) for count in (MODULATED, MODULATING))
    traffic = cross_attention_traffic(dim, ffn, context, timestep_per_token=timestep_per_token)
    return Block(
        forward, attention, total(saved, modulated), input_bytes, total(transient, modulating), kept, traffic,
        (total(frozen[0], modulated), total(frozen[1], modulating)),
    )  # fmt: skip


def _cross_attention_frozen(dim: int, ffn: int, heads: int, context: int) -> tuple[Polynomial, Polynomial]:
    """Return the saved and transient bytes of a cross-attention block under a LoRA, in bfloat16.

    Without gradients of the modulation neither the norms' outputs nor the gated branches are saved. At the peak, the
    gradient of the feed-forward layer's activations is there twice: of the layer, and of its adapter.
    """
    saved = Polynomial(constant=6 * context * dim, linear=42 * dim + 4 * ffn + 36 + 8 * heads)
    return saved, Polynomial(linear=max(14 * dim, 9 * dim + 2 * ffn))


def _joint_frozen(dim: int, ratio: float, heads: int, *, single: bool) -> tuple[float, float]:
    """Return the saved and transient bytes per token of a joint block under a LoRA, as _cross_attention_frozen."""
    return dim * (26 + 2 * single + 4 * ratio) + 12 * heads + 8, dim * (2 + 4 * ratio)


def _outside_frozen(config: Mapping[str, Any], dim: int) -> Polynomial:
    """Return the bytes saved outside the blocks under a LoRA: the last norm's input, and rotary embeddings."""
    return Polynomial(linear=4 * dim + 8 * config["attention_head_dim"])


def _joint_block(
    dim: int,
    ratio: float,
    text: int,
    size: int,
    *,
    modulation: float,
    memory: tuple[float, float, float, float],
    heads: int,
    single: bool,
) -> Block:
    """Return a block in which S latent and `text` text tokens attend to each other.

    Args:
        dim: width of a token.
        ratio: width of the feed-forward layer, in units of dim.
        text: tokens of the text.
        size: bytes of a number in the computing precision.
        modulation: vectors of width dim that the modulation of the block outputs.
        memory: saved and transient bytes per token, and both under a LoRA.
        heads: of the attention.
        single: latents and text are one stream.
    """
    saved, transient, *frozen = memory
    per_token = 2 * (4 + 2 * ratio) * dim * dim
    forward = Polynomial(
        constant=per_token * text + 4 * dim * text * text + 2 * modulation * dim * dim,
        linear=per_token + 8 * dim * text,
        quadratic=4 * dim,
    )
    attention, output = Polynomial(4 * dim * text * text, 8 * dim * text, 4 * dim), dim * size + 4 * heads
    kept = attention, Polynomial(output * text, output)  # all attention is self-attention of latents and text
    return Block(
        forward,
        attention=attention,
        saved=Polynomial(saved * text, saved),
        input=Polynomial(dim * size * text, dim * size),
        transient=Polynomial(transient * text, transient),
        kept={"attention": kept, "self_attention": kept},
        traffic=joint_attention_traffic(dim, ratio, text, single=single),
        frozen=(Polynomial(frozen[0] * text, frozen[0]), Polynomial(frozen[1] * text, frozen[1])),
    )


def joint_attention_network(config: Mapping[str, Any], *, text_tokens: int, half: bool, cast: bool = True) -> Network:
    """Return a transformer whose latents and text attend to each other jointly (HunyuanVideo).

    Args:
        config: of the transformer, as in its config.json.
        text_tokens: tokens of a prompt.
        half: computes in bfloat16 under autocast, else in float32.
        cast: the weights are float32 and cast by autocast, as under DDP; under ZeRO and FSDP the weights of a block
            are bfloat16. Norms with float32 weights return float32, and so do products with their results.
    """
    heads, ratio = config["num_attention_heads"], config["mlp_ratio"]
    dim, size, text = heads * config["attention_head_dim"], 2 if half else 4, text_tokens
    replaced = config.get("image_condition_type") == "token_replace"
    area = config.get("patch_size", 2) ** 2 * config.get("patch_size_t", 1)
    inputs, outputs = area * config["in_channels"], area * (config.get("out_channels") or config["in_channels"])

    # norms with float32 weights return queries and keys in float32, in each stream
    float32_qk = cast and half
    double_saved = (
        dim * ((10 + 15 * size + 2 * ratio * size + 6 * float32_qk) if half else 64 + 8 * ratio) + 12 * heads + 8
    )
    single_saved = (
        dim * ((12 + 12 * size + 2 * ratio * size + 4 * float32_qk) if half else 56 + 8 * ratio) + 12 * heads + 4
    )
    # attention and feed-forward of a single-stream block are concatenated in the dtype of its queries
    single_transient = dim * ((16 + 5 * ratio if float32_qk else 6) if half else 12)
    joint_block = partial(_joint_block, dim, ratio, text, size, heads=heads)
    memory = {False: (double_saved, dim * (2 if half else 4)), True: (single_saved, single_transient)}
    less = half and not cast
    frozen = {kind: _joint_frozen(dim, ratio, heads, single=kind) for kind in memory} if less else memory
    modulations = {False: 6 + 6 + 6 * replaced, True: 3 + 3 * replaced}
    double, single = (
        joint_block(modulation=modulations[kind], memory=(*memory[kind], *frozen[kind]), single=kind)
        for kind in (False, True)
    )

    refiners, text_dim = config["num_refiner_layers"], config["text_embed_dim"]
    embedders = (
        2 + int(bool(config.get("guidance_embeds"))) + int(replaced)
    )  # timestep embedders, including the refiner's
    first_layers = Polynomial(
        constant=2 * dim * (embedders * FREQUENCIES + text_dim + config["pooled_projection_dim"] + text * text_dim),
        linear=2 * inputs * dim,
    )
    refiner = 2 * text * (4 + 2 * REFINER_RATIO) * dim * dim + 4 * dim * text * text + 2 * 2 * dim * dim
    outside = Polynomial(
        constant=2 * (embedders + 2) * dim * dim + refiners * refiner + 2 * 2 * dim * dim,
        linear=2 * dim * outputs,
    )
    refiner_saved = text * dim * 21 * size + heads * text * text * size
    outside_saved = Polynomial(
        constant=refiners * refiner_saved + text * (dim + text_dim) * size,
        linear=3 * dim * size + inputs * size + 8 * config["attention_head_dim"],
    )
    blocks = (double,) * config["num_layers"] + (single,) * config["num_single_layers"]
    outside_transient = Polynomial(linear=dim * (10 if half else 20))
    outside_frozen = _outside_frozen(config, dim) if less else outside_saved
    return Network(
        blocks, total(outside, first_layers), first_layers, outside_saved, outside_transient, outside_frozen
    )
