"""Transformers for tests of FLOPs and memory: configurations, models and inputs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel
from torch import nn

CONFIGS = json.loads((Path(__file__).parents[1] / "data" / "transformers.json").read_text(encoding="utf-8"))
SMALL_WAN = {
    "num_attention_heads": 3, "attention_head_dim": 32, "ffn_dim": 320, "num_layers": 3, "in_channels": 16,
    "out_channels": 16, "text_dim": 64,
}  # fmt: skip
SMALL_HUNYUAN = {
    "num_attention_heads": 3, "attention_head_dim": 32, "num_layers": 2, "num_single_layers": 3,
    "num_refiner_layers": 2, "mlp_ratio": 4.0, "text_embed_dim": 64, "pooled_projection_dim": 48, "in_channels": 16,
    "out_channels": 16, "rope_axes_dim": (8, 12, 12), "guidance_embeds": True,
}  # fmt: skip
SMALL_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "text": SMALL_WAN,
    "image": {**SMALL_WAN, "in_channels": 36, "image_dim": 40, "added_kv_proj_dim": 96},
    "joint": SMALL_HUNYUAN,
    "joint without guidance": {**SMALL_HUNYUAN, "guidance_embeds": False},
    "joint, first frame replaced": {**SMALL_HUNYUAN, "image_condition_type": "token_replace"},
    "joint, first frame concatenated": {**SMALL_HUNYUAN, "image_condition_type": "latent_concat", "in_channels": 33},
}
TEXT_TOKENS, IMAGE_TOKENS = 40, 17


def is_joint(config: Mapping[str, Any]) -> bool:
    """Return whether latents and text attend to each other jointly (HunyuanVideo)."""
    return "num_single_layers" in config


def build_transformer(config: Mapping[str, Any]) -> nn.Module:
    """Return the transformer of a configuration."""
    return (HunyuanVideoTransformer3DModel if is_joint(config) else WanTransformer3DModel).from_config(config)


def blocks_of(model: Any) -> list[nn.Module]:
    """Return the repeated blocks of a transformer."""
    return (
        list(model.blocks)
        if hasattr(model, "blocks")
        else [*model.transformer_blocks, *model.single_transformer_blocks]
    )


def model_inputs(
    config: Mapping[str, Any], text: int = TEXT_TOKENS, side: int = 16, frames: int = 3, *, by_token: bool = False
) -> tuple[dict[str, Any], int]:
    """Return the keyword arguments of one sample and its number of latent tokens; by_token: each has its timestep."""
    given: dict[str, Any] = {
        "hidden_states": torch.randn(1, config["in_channels"], frames, side, side),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, text, config["text_embed_dim" if is_joint(config) else "text_dim"]),
        "return_dict": False,
    }
    if is_joint(config):
        given |= {
            "encoder_attention_mask": torch.ones(1, text),
            "pooled_projections": torch.randn(1, config["pooled_projection_dim"]),
            "guidance": torch.tensor([6000.0]) if config["guidance_embeds"] else None,
        }
    elif config.get("image_dim"):
        given["encoder_hidden_states_image"] = torch.randn(1, IMAGE_TOKENS, config["image_dim"])
    tokens = frames * (side // 2) ** 2
    if by_token:
        given["timestep"] = given["timestep"].expand(1, tokens)
    return given, tokens
