"""Names of Wan's components, their classes, and the layers that get adapters; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from videox.training.lora_flags import LayerNames

LORA_TARGETS = {"blocks": ("attn1", "attn2", "ffn")}  # layers that get adapters, by list of blocks
CLASSES = {"transformer": "diffusers.WanTransformer3DModel", "vae": "diffusers.AutoencoderKLWan"}
CLASSES |= {"text_encoder": "transformers.UMT5EncoderModel", "image_encoder": "transformers.CLIPVisionModel"}
PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")
NAMES = ("scheduler", "tokenizer", "text_encoder", "vae", "transformer")  # folders of a model in diffusers layout
# The picture that CLIP sees: its centre is cut out (diffusers), or its sides are made equal (Wan's own code).
CLIP_IMAGES = CROP, SQUASH = ("crop", "squash")
# Layers of Wan's own code, which VideoX-Fun uses -> diffusers.
LAYER_NAMES = LayerNames(
    diffusers={
        "self_attn": "attn1", "cross_attn": "attn2", "q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0",
        "k_img": "add_k_proj", "v_img": "add_v_proj", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2",
        "text_embedding.0": "condition_embedder.text_embedder.linear_1",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
        "text_embedding": "condition_embedder.text_embedder",
        "time_embedding.0": "condition_embedder.time_embedder.linear_1",
        "time_embedding.2": "condition_embedder.time_embedder.linear_2",
        "time_embedding": "condition_embedder.time_embedder",
        "time_projection.1": "condition_embedder.time_proj", "time_projection": "condition_embedder.time_proj",
        "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
        "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2", "img_emb": "condition_embedder.image_embedder",
        "head.head": "proj_out", "head": "proj_out",
    },
    every=("blocks", "condition_embedder", "proj_out"),
)  # fmt: skip


def pictures_of(config: Mapping[str, Any]) -> int:
    """Return the number of pictures of a clip whose CLIP features a transformer attends to, if it attends to any.

    Wan2.1-FLF2V takes those of the first and the last frame. Others know a last frame by its latents alone, as
    Wan2.1-Fun InP does in VideoX-Fun.
    """
    return 2 if config.get("pos_embed_seq_len") else 1
