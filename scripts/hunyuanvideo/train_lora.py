r"""Trains a LoRA of HunyuanVideo with the flags of VideoX-Fun's train_lora.py: translates them and runs train.py.

    accelerate launch --mixed_precision="bf16" scripts/hunyuanvideo/train_lora.py \
      --pretrained_model_name_or_path=models/Diffusion_Transformer/HunyuanVideo \
      --train_data_dir=datasets/internal_datasets/ --train_data_meta=datasets/internal_datasets/metadata.json \
      --output_dir=outputs/hunyuan_lora --rank=64 --network_alpha=32 \
      --target_name="to_q,to_k,to_v,ff.0,ff.2,ff_context.0,ff_context.2" --use_peft_lora

It prints the command of train.py that does the same.
"""

from __future__ import annotations

from pathlib import Path

from videox.training.lora_flags import LayerNames, run_translated

# VideoX-Fun's layers have diffusers' names, but the names of its published command for the feed-forward layers match
# none of them: there, only attention is trained. Here the names mean the layers that they describe.
NAMES = LayerNames(
    diffusers={
        "ff.0": "ff.net.0.proj", "ff.2": "ff.net.2", "ff_context.0": "ff_context.net.0.proj",
        "ff_context.2": "ff_context.net.2",
    },
    every=("transformer_blocks", "single_transformer_blocks", "context_embedder", "time_text_embed", "norm_out",
           "proj_out"),
)  # fmt: skip

if __name__ == "__main__":
    run_translated(Path(__file__).with_name("train.py"), NAMES)
