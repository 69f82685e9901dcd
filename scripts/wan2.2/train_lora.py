r"""Trains LoRAs of Wan2.2 with the flags of VideoX-Fun's train_lora.py: translates them and runs train.py.

    accelerate launch --mixed_precision="bf16" scripts/wan2.2/train_lora.py --boundary_type=low \
      --pretrained_model_name_or_path=models/Diffusion_Transformer/Wan2.2-T2V-A14B \
      --train_data_dir=datasets/internal_datasets/ --train_data_meta=datasets/internal_datasets/metadata.json \
      --output_dir=outputs/wan_lora --rank=64 --network_alpha=32 --target_name="q,k,v,ffn.0,ffn.2" --use_peft_lora

--expert=both instead of --boundary_type trains a LoRA of each expert. It prints the command of train.py that does the
same.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from videox.families.wan_names import LAYER_NAMES
from videox.training.lora_flags import run_translated

NAMES = replace(LAYER_NAMES, choices={"--boundary_type": ("--expert", {"high": "high_noise", "low": "low_noise"})})

if __name__ == "__main__":
    run_translated(Path(__file__).with_name("train.py"), NAMES)
