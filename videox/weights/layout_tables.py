"""Tables of module names: diffusers, the published checkpoints, and ComfyUI."""

from __future__ import annotations

import re
from collections.abc import Mapping

LAYOUTS = ("original", "comfyui")  # export layouts in addition to diffusers'
KOHYA = "kohya"  # layout of a LoRA: as musubi-tuner and other trainers on kohya's networks name it
MERGED = "merged"  # value of --export_layouts: the base model with the LoRA merged into it, in diffusers layout

# Module names, original -> diffusers; # stands for a number. Several names: the original module is fused, its rows are
# those of the diffusers modules concatenated. A leading ~ means that the two halves of the rows are swapped.
Table = Mapping[str, tuple[str, ...] | str]

ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
WAN: Table = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
    "blocks.#.modulation": "blocks.#.scale_shift_table",
    "blocks.#.norm3": "blocks.#.norm2",  # norm of the cross-attention; the other two norms have no weights
    "blocks.#.ffn.0": "blocks.#.ffn.net.0.proj",
    "blocks.#.ffn.2": "blocks.#.ffn.net.2",
    **{f"blocks.#.self_attn.{old}": f"blocks.#.attn1.{new}" for old, new in ATTENTION.items()},
    **{f"blocks.#.cross_attn.{old}": f"blocks.#.attn2.{new}" for old, new in ATTENTION.items()},
    "blocks.#.cross_attn.k_img": "blocks.#.attn2.add_k_proj",
    "blocks.#.cross_attn.v_img": "blocks.#.attn2.add_v_proj",
    "blocks.#.cross_attn.norm_k_img": "blocks.#.attn2.norm_added_k",
}

REFINER, REFINED = "txt_in.individual_token_refiner.blocks.#", "context_embedder.token_refiner.refiner_blocks.#"
DOUBLE, SINGLE = "transformer_blocks.#", "single_transformer_blocks.#"
HUNYUAN: Table = {
    "img_in.proj": "x_embedder.proj",
    "txt_in.input_embedder": "context_embedder.proj_in",
    "txt_in.t_embedder.mlp.0": "context_embedder.time_text_embed.timestep_embedder.linear_1",
    "txt_in.t_embedder.mlp.2": "context_embedder.time_text_embed.timestep_embedder.linear_2",
    "txt_in.c_embedder.linear_1": "context_embedder.time_text_embed.text_embedder.linear_1",
    "txt_in.c_embedder.linear_2": "context_embedder.time_text_embed.text_embedder.linear_2",
    f"{REFINER}.norm1": f"{REFINED}.norm1",
    f"{REFINER}.norm2": f"{REFINED}.norm2",
    f"{REFINER}.self_attn_qkv": tuple(f"{REFINED}.attn.to_{x}" for x in "qkv"),
    f"{REFINER}.self_attn_proj": f"{REFINED}.attn.to_out.0",
    f"{REFINER}.mlp.fc1": f"{REFINED}.ff.net.0.proj",
    f"{REFINER}.mlp.fc2": f"{REFINED}.ff.net.2",
    f"{REFINER}.adaLN_modulation.1": f"{REFINED}.norm_out.linear",
    "time_in.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "time_in.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.mlp.0": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.mlp.2": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "double_blocks.#.img_mod.linear": f"{DOUBLE}.norm1.linear",
    "double_blocks.#.img_attn_qkv": tuple(f"{DOUBLE}.attn.to_{x}" for x in "qkv"),
    "double_blocks.#.img_attn_q_norm": f"{DOUBLE}.attn.norm_q",
    "double_blocks.#.img_attn_k_norm": f"{DOUBLE}.attn.norm_k",
    "double_blocks.#.img_attn_proj": f"{DOUBLE}.attn.to_out.0",
    "double_blocks.#.img_mlp.fc1": f"{DOUBLE}.ff.net.0.proj",
    "double_blocks.#.img_mlp.fc2": f"{DOUBLE}.ff.net.2",
    "double_blocks.#.txt_mod.linear": f"{DOUBLE}.norm1_context.linear",
    "double_blocks.#.txt_attn_qkv": tuple(f"{DOUBLE}.attn.add_{x}_proj" for x in "qkv"),
    "double_blocks.#.txt_attn_q_norm": f"{DOUBLE}.attn.norm_added_q",
    "double_blocks.#.txt_attn_k_norm": f"{DOUBLE}.attn.norm_added_k",
    "double_blocks.#.txt_attn_proj": f"{DOUBLE}.attn.to_add_out",
    "double_blocks.#.txt_mlp.fc1": f"{DOUBLE}.ff_context.net.0.proj",
    "double_blocks.#.txt_mlp.fc2": f"{DOUBLE}.ff_context.net.2",
    "single_blocks.#.modulation.linear": f"{SINGLE}.norm.linear",
    "single_blocks.#.linear1": (*(f"{SINGLE}.attn.to_{x}" for x in "qkv"), f"{SINGLE}.proj_mlp"),
    "single_blocks.#.linear2": f"{SINGLE}.proj_out",
    "single_blocks.#.q_norm": f"{SINGLE}.attn.norm_q",
    "single_blocks.#.k_norm": f"{SINGLE}.attn.norm_k",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "~norm_out.linear",  # the original has shift, scale; diffusers has scale, shift
}
# ComfyUI's own names for HunyuanVideo's modules, which it writes when it saves a model -> published names.
COMFYUI_NORMS = {
    f"{comfyui}.{kind}_norm.{leaf}": f"{published}{kind[0]}_norm.weight"
    for comfyui, published in (
        ("double_blocks.#.img_attn.norm", "double_blocks.#.img_attn_"),
        ("double_blocks.#.txt_attn.norm", "double_blocks.#.txt_attn_"),
        ("single_blocks.#.norm", "single_blocks.#."),
    )
    for kind in ("query", "key")
    for leaf in ("scale", "weight")
}
COMFYUI_HUNYUAN: Mapping[str, str] = {
    "txt_in.t_embedder.in_layer": "txt_in.t_embedder.mlp.0",
    "txt_in.t_embedder.out_layer": "txt_in.t_embedder.mlp.2",
    "txt_in.c_embedder.in_layer": "txt_in.c_embedder.linear_1",
    "txt_in.c_embedder.out_layer": "txt_in.c_embedder.linear_2",
    f"{REFINER}.self_attn.qkv": f"{REFINER}.self_attn_qkv",
    f"{REFINER}.self_attn.proj": f"{REFINER}.self_attn_proj",
    f"{REFINER}.mlp.0": f"{REFINER}.mlp.fc1",
    f"{REFINER}.mlp.2": f"{REFINER}.mlp.fc2",
    **{f"{x}_in.in_layer": f"{x}_in.mlp.0" for x in ("time", "guidance")},
    **{f"{x}_in.out_layer": f"{x}_in.mlp.2" for x in ("time", "guidance")},
    **{
        f"double_blocks.#.{side}_{comfyui}": f"double_blocks.#.{side}_{published}"
        for side in ("img", "txt")
        for comfyui, published in (
            ("mod.lin", "mod.linear"), ("attn.qkv", "attn_qkv"), ("attn.proj", "attn_proj"), ("mlp.0", "mlp.fc1"),
            ("mlp.2", "mlp.fc2"),
        )
    },
    "single_blocks.#.modulation.lin": "single_blocks.#.modulation.linear",
    **COMFYUI_NORMS,
}  # fmt: skip

RESIDUAL = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2"}
RESNET = {**RESIDUAL, "shortcut": "conv_shortcut"}
WAN_VAE: Table = {
    "conv1": "quant_conv",
    "conv2": "post_quant_conv",
    **{f"{side}.conv1": f"{side}.conv_in" for side in ("encoder", "decoder")},
    **{f"{side}.head.0": f"{side}.norm_out" for side in ("encoder", "decoder")},
    **{f"{side}.head.2": f"{side}.conv_out" for side in ("encoder", "decoder")},
    **{
        f"{side}.middle.{number}.{old}": f"{side}.mid_block.resnets.{number // 2}.{new}"
        for side in ("encoder", "decoder")
        for number in (0, 2)
        for old, new in RESIDUAL.items()
    },
    **{
        f"{side}.middle.1.{name}": f"{side}.mid_block.attentions.0.{name}"
        for side in ("encoder", "decoder")
        for name in ("norm", "to_qkv", "proj")
    },
    **{f"encoder.downsamples.#.{old}": f"encoder.down_blocks.#.{new}" for old, new in RESNET.items()},
    "encoder.downsamples.#.resample.1": "encoder.down_blocks.#.resample.1",
    "encoder.downsamples.#.time_conv": "encoder.down_blocks.#.time_conv",
    # The original numbers the decoder's blocks consecutively; layouts.py converts these numbers to (block, index).
    **{f"decoder.resnets.#.#.{old}": f"decoder.up_blocks.#.resnets.#.{new}" for old, new in RESNET.items()},
    "decoder.upsamplers.#.resample.1": "decoder.up_blocks.#.upsamplers.0.resample.1",
    "decoder.upsamplers.#.time_conv": "decoder.up_blocks.#.upsamplers.0.time_conv",
    # Wan2.2 TI2V-5B numbers blocks and the modules inside each; layouts.py converts the last one, the sampler.
    **{f"encoder.resnets.#.#.{old}": f"encoder.down_blocks.#.resnets.#.{new}" for old, new in RESNET.items()},
    **{
        f"{side}.{name}.#.{leaf}": f"{side}.{blocks}.#.{name}.{leaf}"
        for side, blocks, name in (
            ("encoder", "down_blocks", "downsampler"), ("decoder", "up_blocks", "upsampler"),
        )
        for leaf in ("resample.1", "time_conv")
    },
}  # fmt: skip

LAYER = "encoder.block.#.layer"
UMT5: Table = {
    "token_embedding": "shared",
    "norm": "encoder.final_layer_norm",
    "blocks.#.norm1": f"{LAYER}.0.layer_norm",
    **{f"blocks.#.attn.{x}": f"{LAYER}.0.SelfAttention.{x}" for x in "qkvo"},
    "blocks.#.pos_embedding.embedding": f"{LAYER}.0.SelfAttention.relative_attention_bias",
    "blocks.#.norm2": f"{LAYER}.1.layer_norm",
    "blocks.#.ffn.gate.0": f"{LAYER}.1.DenseReluDense.wi_0",
    "blocks.#.ffn.fc1": f"{LAYER}.1.DenseReluDense.wi_1",
    "blocks.#.ffn.fc2": f"{LAYER}.1.DenseReluDense.wo",
}

CLIP_VISION: Table = {
    "visual.cls_embedding": "embeddings.class_embedding",
    "visual.pos_embedding": "embeddings.position_embedding.weight",
    "visual.patch_embedding": "embeddings.patch_embedding",
    "visual.pre_norm": "pre_layrnorm",
    "visual.post_norm": "post_layernorm",
    "visual.transformer.#.norm1": "encoder.layers.#.layer_norm1",
    "visual.transformer.#.norm2": "encoder.layers.#.layer_norm2",
    "visual.transformer.#.attn.to_qkv": tuple(f"encoder.layers.#.self_attn.{x}_proj" for x in "qkv"),
    "visual.transformer.#.attn.proj": "encoder.layers.#.self_attn.out_proj",
    "visual.transformer.#.mlp.0": "encoder.layers.#.mlp.fc1",
    "visual.transformer.#.mlp.2": "encoder.layers.#.mlp.fc2",
}

TABLES: Mapping[str, Table] = {
    "wan": WAN, "hunyuan": HUNYUAN, "wan_vae": WAN_VAE, "umt5": UMT5, "clip_vision": CLIP_VISION,
}  # fmt: skip
# One tensor that identifies each layout: its original name and its diffusers name.
MARKERS = {
    "wan": ("head.modulation", "condition_embedder.time_proj.weight"),
    "hunyuan": ("txt_in.individual_token_refiner.blocks.0.norm1.weight", "context_embedder.proj_in.weight"),
    "wan_vae": ("decoder.middle.0.residual.0.gamma", "decoder.mid_block.resnets.0.norm1.gamma"),
    "umt5": ("blocks.0.ffn.gate.0.weight", "encoder.final_layer_norm.weight"),
    "clip_vision": ("visual.cls_embedding", "embeddings.class_embedding"),
}
# Tensors of CLIP that Wan does not use: the text tower and the final projection.
UNUSED = {"clip_vision": re.compile(r"textual\.|log_scale$|visual\.head$")}
