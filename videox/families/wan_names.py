"""Names of Wan's components, their classes, and the layers that get adapters; imports no torch."""

from __future__ import annotations

LORA_TARGETS = {"blocks": ("attn1", "attn2", "ffn")}  # layers that get adapters, by list of blocks
CLASSES = {"transformer": "diffusers.WanTransformer3DModel", "vae": "diffusers.AutoencoderKLWan"}
CLASSES |= {"text_encoder": "transformers.UMT5EncoderModel", "image_encoder": "transformers.CLIPVisionModel"}
PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")
NAMES = ("scheduler", "tokenizer", "text_encoder", "vae", "transformer")  # folders of a model in diffusers layout
# The picture that CLIP sees: its centre is cut out (diffusers), or its sides are made equal (Wan's own code).
CLIP_IMAGES = CROP, SQUASH = ("crop", "squash")
