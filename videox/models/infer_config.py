"""Infers a model's configuration from the shapes of its tensors, for weights without diffusers' config.json.

All shapes are those of diffusers' names. Values that no shape shows (the width of an attention head, for instance)
come from `known`, the closest configuration available, with diffusers' or the original's keys. If it does not have
them either, they are those of the published models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from videox.weights.layouts import Shapes, family_of, layout_of

HEAD_DIM = 128  # channels of an attention head in every published Wan2.1 and HunyuanVideo model
CLIP_HEAD_DIM = 80  # in the published CLIP ViT-H
Config = dict[str, Any]


# Kind of transformer -> configuration key of a number of blocks -> a tensor that each of these blocks has.
BLOCK_TENSORS: Mapping[str, Mapping[str, str]] = {
    "wan": {"num_layers": "blocks.#.ffn.net.0.proj.weight"},
    "hunyuan": {
        "num_layers": "transformer_blocks.#.ff.net.0.proj.weight",
        "num_single_layers": "single_transformer_blocks.#.proj_mlp.weight",
        "num_refiner_layers": "context_embedder.token_refiner.refiner_blocks.#.norm1.weight",
    },
}

# Kind of transformer -> a tensor whose first dimension is the width -> width -> number of blocks in the published
# models: Wan2.1 1.3B and 14B, Wan2.2 5B (dim, num_layers in their config.json), HunyuanVideo (the config.json of
# hunyuanvideo-community/HunyuanVideo).
PUBLISHED_DEPTHS: Mapping[str, tuple[str, Mapping[int, Mapping[str, int]]]] = {
    "wan": (
        "patch_embedding.weight",
        {1536: {"num_layers": 30}, 3072: {"num_layers": 30}, 5120: {"num_layers": 40}},
    ),
    "hunyuan": (
        "x_embedder.proj.weight",
        {3072: {"num_layers": 20, "num_single_layers": 40, "num_refiner_layers": 2}},
    ),
}


def published_depths(kind: str, shapes: Shapes) -> tuple[int | None, Mapping[str, int]]:
    """Return the width of a transformer, and the numbers of blocks of the published model of this width, if any."""
    name, depths = PUBLISHED_DEPTHS.get(kind, ("", {}))
    width = shapes[name][0] if name in shapes else None
    return width, depths.get(width or 0, {})


def module_numbers(shapes: Shapes, prefix: str) -> set[int]:
    """Return the numbers of the numbered modules under a prefix."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return {int(match[1]) for name in shapes if (match := pattern.match(name))}


def count_modules(shapes: Shapes, prefix: str) -> int:
    """Return the number of numbered modules under a prefix, counted up to the highest number."""
    return 1 + max(module_numbers(shapes, prefix), default=-1)


def wan_config(shapes: Shapes, known: Mapping[str, Any]) -> Config:
    """Return the configuration of a Wan2.1 transformer. Raises KeyError naming a tensor that is missing."""
    width, channels, *patch = shapes["patch_embedding.weight"]
    embedder = "condition_embedder"
    image = shapes.get(f"{embedder}.image_embedder.norm1.weight")
    positions = shapes.get(f"{embedder}.image_embedder.pos_embed")
    head_dim = known.get("attention_head_dim") or HEAD_DIM
    if "dim" in known and "num_heads" in known:
        head_dim = known["dim"] // known["num_heads"]
    return {
        "patch_size": tuple(patch),
        "num_attention_heads": width // head_dim,
        "attention_head_dim": head_dim,
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // (patch[0] * patch[1] * patch[2]),
        "text_dim": shapes[f"{embedder}.text_embedder.linear_1.weight"][1],
        "freq_dim": shapes[f"{embedder}.time_embedder.linear_1.weight"][1],
        "ffn_dim": shapes["blocks.0.ffn.net.0.proj.weight"][0],
        "num_layers": count_modules(shapes, "blocks"),
        "cross_attn_norm": "blocks.0.norm2.weight" in shapes,
        "qk_norm": "rms_norm_across_heads" if "blocks.0.attn1.norm_q.weight" in shapes else None,
        "eps": known.get("eps", 1e-6),
        "image_dim": image[0] if image else None,
        "added_kv_proj_dim": width if "blocks.0.attn2.add_k_proj.weight" in shapes else None,
        "rope_max_seq_len": known.get("rope_max_seq_len", 1024),
        "pos_embed_seq_len": positions[1] if positions else None,
    }


def hunyuan_config(shapes: Shapes, known: Mapping[str, Any]) -> Config:
    """Return the configuration of a HunyuanVideo transformer.

    No shape shows the image condition type token_replace: it is taken from `known`.

    Raises:
        KeyError: naming a tensor that is missing.
    """
    width, channels, patch_t, patch, _ = shapes["x_embedder.proj.weight"]
    head_dim = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    latent = shapes["proj_out.weight"][0] // (patch_t * patch * patch)
    condition = known.get("image_condition_type")
    # With latent_concat the input has the image's latents and a mask as additional channels. The weights decide; a
    # known configuration may be that of another base model.
    if channels != latent:
        condition = "latent_concat"
    elif condition == "latent_concat":
        condition = None
    return {
        "in_channels": channels,
        "out_channels": latent,
        "num_attention_heads": width // head_dim,
        "attention_head_dim": head_dim,
        "num_layers": count_modules(shapes, "transformer_blocks"),
        "num_single_layers": count_modules(shapes, "single_transformer_blocks"),
        "num_refiner_layers": count_modules(shapes, "context_embedder.token_refiner.refiner_blocks"),
        "mlp_ratio": shapes["transformer_blocks.0.ff.net.0.proj.weight"][0] / width,
        "patch_size": patch,
        "patch_size_t": patch_t,
        "qk_norm": "rms_norm",
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
        "text_embed_dim": shapes["context_embedder.proj_in.weight"][1],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "rope_theta": known.get("rope_theta", 256.0),
        "rope_axes_dim": tuple(known.get("rope_axes_dim", (16, 56, 56))),
        "image_condition_type": condition,
    }


def wan_vae_config(shapes: Shapes, known: Mapping[str, Any]) -> Config:
    """Return the configuration of Wan's autoencoder. Raises KeyError naming a tensor that is missing."""
    if any(name.startswith("encoder.down_blocks.0.resnets.") for name in shapes):
        return _residual_vae_config(shapes, known)
    base, stages, downsample = shapes["encoder.conv_in.weight"][0], [], []
    blocks = count_modules(shapes, "encoder.down_blocks")
    # diffusers numbers residual blocks and downsamplers in one list: each downsampler ends a stage.
    ends = [i for i in range(blocks) if f"encoder.down_blocks.{i}.resample.1.weight" in shapes]
    for end in [*ends, blocks]:
        stages.append(shapes[f"encoder.down_blocks.{end - 1}.conv2.weight"][0] // base)
        if end < blocks:
            downsample.append(f"encoder.down_blocks.{end}.time_conv.weight" in shapes)
    latents = {name: known[name] for name in ("latents_mean", "latents_std") if name in known}
    return {
        "base_dim": base,
        "z_dim": shapes["post_quant_conv.weight"][0],
        "dim_mult": stages,
        "num_res_blocks": ends[0] if ends else blocks,
        "temperal_downsample": downsample,
        **latents,
    }


def _residual_vae_config(shapes: Shapes, known: Mapping[str, Any]) -> Config:
    """Return the configuration of the autoencoder of Wan2.2 TI2V-5B, whose blocks have shortcuts around them."""
    base, channels = shapes["encoder.conv_in.weight"][:2]
    blocks = range(count_modules(shapes, "encoder.down_blocks"))
    resnets = count_modules(shapes, "encoder.down_blocks.0.resnets")
    stages = [shapes[f"encoder.down_blocks.{i}.resnets.{resnets - 1}.conv2.weight"][0] // base for i in blocks]
    sampled = [i for i in blocks if f"encoder.down_blocks.{i}.downsampler.resample.1.weight" in shapes]
    downsample = [f"encoder.down_blocks.{i}.downsampler.time_conv.weight" in shapes for i in sampled]
    patch = math.isqrt(channels // 3)
    latents = {name: known[name] for name in ("latents_mean", "latents_std") if name in known}
    return {
        "base_dim": base,
        "decoder_base_dim": shapes["decoder.norm_out.gamma"][0] // stages[0],
        "z_dim": shapes["post_quant_conv.weight"][0],
        "dim_mult": stages,
        "num_res_blocks": resnets,
        "temperal_downsample": downsample,
        "is_residual": True,
        "in_channels": channels,
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "patch_size": patch if patch > 1 else None,
        "scale_factor_temporal": 2 ** sum(downsample),
        "scale_factor_spatial": 2 ** len(sampled) * patch,
        **latents,
    }


def umt5_config(shapes: Shapes, known: Mapping[str, Any]) -> Config:
    """Return the configuration of a UMT5 encoder. Raises KeyError naming a tensor that is missing."""
    attention = "encoder.block.0.layer.0.SelfAttention"
    buckets, heads = shapes[f"{attention}.relative_attention_bias.weight"]
    vocabulary, width = shapes["shared.weight"]
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shapes[f"{attention}.q.weight"][0] // heads,
        "d_ff": shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
        "num_layers": count_modules(shapes, "encoder.block"),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": known.get("max_dist", 128),
        "dropout_rate": known.get("dropout", 0.0),
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
        "is_encoder_decoder": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def clip_vision_config(shapes: Shapes, known: Mapping[str, Any]) -> Config:
    """Return the configuration of CLIP's image encoder.

    Raises:
        KeyError: naming a tensor that is missing.
        ValueError: its width is not a multiple of the head width.
    """
    positions, width = shapes["embeddings.position_embedding.weight"]
    if not known.get("num_heads") and width % CLIP_HEAD_DIM:
        raise ValueError(f"its width {width} is not a multiple of the {CLIP_HEAD_DIM} channels of a CLIP head")
    patch = shapes["embeddings.patch_embedding.weight"][-1]
    return {
        "hidden_size": width,
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": count_modules(shapes, "encoder.layers"),
        "num_attention_heads": known.get("num_heads") or width // CLIP_HEAD_DIM,
        "image_size": patch * round((positions - 1) ** 0.5),
        "patch_size": patch,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
    }


CONFIGS: Mapping[str, Callable[[Shapes, Mapping[str, Any]], Config]] = {
    "wan": wan_config, "hunyuan": hunyuan_config, "wan_vae": wan_vae_config, "umt5": umt5_config, "clip_vision": clip_vision_config,
}  # fmt: skip
# Keys of an original config.json -> diffusers' keys of the same values, which must not contradict the weights.
ORIGINAL_KEYS = {"in_dim": "in_channels", "out_dim": "out_channels", "ffn_dim": "ffn_dim", "num_layers": "num_layers"}


def contradictions(config: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    """Return a description of each value of an original config.json that differs from the weights."""
    return [
        f"{original} is {known[original]}, the weights have {config[key]}"
        for original, key in ORIGINAL_KEYS.items()
        if original in known and key in config and known[original] != config[key]
    ]


def foreign_kind(names: Iterable[str], config: Mapping[str, Any] | None) -> str | None:
    """Return the kind of a transformer whose names or configuration diffusers cannot read; None for any other model.

    Args:
        names: names of its tensors.
        config: its configuration; None if there is none.
    """
    names = list(names)
    if (layout := layout_of(names)) in BLOCK_TENSORS:
        return layout
    # A width and a number of heads are in the configurations of Wan's original code; diffusers' have the heads' width.
    is_foreign = config is not None and {"dim", "num_heads"} <= {*config}
    family = family_of(names)
    return family if is_foreign and family in BLOCK_TENSORS else None
