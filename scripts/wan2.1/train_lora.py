r"""Trains a LoRA of Wan2.1 with the flags of VideoX-Fun's train_lora.py: translates them and runs train.py.

    accelerate launch --mixed_precision="bf16" scripts/wan2.1/train_lora.py \
      --pretrained_model_name_or_path=models/Diffusion_Transformer/Wan2.1-T2V-14B \
      --train_data_dir=datasets/internal_datasets/ --train_data_meta=datasets/internal_datasets/metadata.json \
      --output_dir=outputs/wan_lora --rank=64 --network_alpha=32 --target_name="q,k,v,ffn.0,ffn.2" --use_peft_lora

It prints the command of train.py that does the same.
"""

from __future__ import annotations

from pathlib import Path

from videox.families.wan_names import LAYER_NAMES as NAMES
from videox.training.lora_flags import run_translated

if __name__ == "__main__":
    run_translated(Path(__file__).with_name("train.py"), NAMES)
