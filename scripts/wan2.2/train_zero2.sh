#!/usr/bin/env bash
# Trains both experts of Wan2.2 text-to-video in turn with DeepSpeed ZeRO-2. Flags passed to this script override those below.
set -euo pipefail
cd "$(dirname "$0")/../.."

export MODEL_NAME="${MODEL_NAME:-models/Diffusion_Transformer/Wan2.2-T2V-A14B}"
export DATASET_NAME="${DATASET_NAME-datasets/internal_datasets/}"
export DATASET_META_NAME="${DATASET_META_NAME:-datasets/internal_datasets/metadata.json}"
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# Only for several machines without RDMA. On a single machine, NCCL_P2P_DISABLE=1 turns NVLink off.
# export NCCL_IB_DISABLE=1
# export NCCL_P2P_DISABLE=1

source scripts/machines.sh
accelerate launch "${MACHINES[@]}" --use_deepspeed --deepspeed_config_file config/zero_stage2_config.json \
  --deepspeed_multinode_launcher standard \
  scripts/wan2.2/train.py \
  --pretrained_model_name_or_path="$MODEL_NAME" \
  --train_data_dir="$DATASET_NAME" \
  --train_data_meta="$DATASET_META_NAME" \
  --output_dir="outputs/wan2.2" \
  --image_sample_size=1024 --video_sample_size=256 --token_sample_size=512 \
  --video_sample_stride=3 --video_sample_n_frames=81 \
  --train_batch_size=1 --video_repeat=1 --gradient_accumulation_steps=1 --dataloader_num_workers=8 \
  --num_train_epochs=100 --checkpointing_steps=50 \
  --learning_rate=2e-05 --lr_scheduler="constant_with_warmup" --lr_warmup_steps=100 --seed=42 \
  --gradient_checkpointing --mixed_precision="bf16" \
  --adam_weight_decay=3e-2 --adam_epsilon=1e-10 --vae_mini_batch=1 --max_grad_norm=0.05 \
  --random_hw_adapt --training_with_video_token_length --enable_bucket --uniform_sampling \
  --low_vram --train_mode="normal" --expert="both" --trainable_modules "." --use_deepspeed \
  "$@"
