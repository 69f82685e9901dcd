r"""Trains a LoRA of Wan2.1 with the flags of VideoX-Fun's train_lora.py: translates them and runs train.py.

    accelerate launch --mixed_precision="bf16" scripts/wan2.1/train_lora.py \
      --pretrained_model_name_or_path=models/Diffusion_Transformer/Wan2.1-T2V-14B \
      --train_data_dir=datasets/internal_datasets/ --train_data_meta=datasets/internal_datasets/metadata.json \
      --output_dir=outputs/wan_lora --rank=64 --network_alpha=32 --target_name="q,k,v,ffn.0,ffn.2" --use_peft_lora

It prints the command of train.py that does the same.
"""

from __future__ import annotations

from pathlib import Path

from videox.training.lora_flags import LayerNames, run_translated

# Layers of Wan2.1's own code, which VideoX-Fun uses -> diffusers.
NAMES = LayerNames(
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

if __name__ == "__main__":
    run_translated(Path(__file__).with_name("train.py"), NAMES)
