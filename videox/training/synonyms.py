"""Flags that other trainers have, and what people type: the flag here that does the same, or what to do instead.

Sources of the names: VideoX-Fun, musubi-tuner and kohya's scripts, diffusion-pipe, DiffSynth-Studio, finetrainers, the
example scripts of diffusers and the TrainingArguments of transformers.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping

NEAR = 0.7  # how alike a word and a flag must be, 0 to 1, for the flag to be suggested as its spelling
# Flag here -> names elsewhere, all without dashes.
SAME: Mapping[str, tuple[str, ...]] = {
    "learning_rate": ("lr", "peak_lr", "base_lr", "unet_lr", "transformer_lr"),
    "lr_scheduler": ("scheduler", "lr_scheduler_type", "lr_schedule"),
    "lr_warmup_steps": ("warmup", "warmup_steps", "num_warmup_steps", "lr_num_warmup_steps"),
    "optimizer": ("optim", "optimizer_type", "optimizer_name"),
    "adam_weight_decay": ("weight_decay", "wd"),
    "adam_beta1": ("beta1",),
    "adam_beta2": ("beta2",),
    "adam_epsilon": ("epsilon", "eps", "adam_eps"),
    "max_grad_norm": ("grad_clip", "clip_grad", "clip_grad_norm", "gradient_clipping", "max_norm", "grad_norm"),
    "lora_rank": ("rank", "network_dim", "lora_dim", "lora_r", "dim", "network_rank", "lora"),
    "lora_alpha": ("alpha", "network_alpha"),
    "lora_target_modules": ("target_modules", "target_name", "lora_target", "lora_modules", "lora_layers", "lora_targets"),
    "lora_dropout": ("network_dropout",),
    "init_lora_from": (
        "network_weights", "lora_weights", "lora_path", "lora_checkpoint", "load_lora", "pretrained_lora_path",
        "lora_weight",
    ),
    "train_batch_size": ("batch_size", "bs", "batch", "micro_batch_size", "per_device_train_batch_size",
                         "per_gpu_batch_size", "micro_batch_size_per_gpu"),
    "num_train_epochs": ("epochs", "epoch", "num_epochs", "max_epochs", "max_train_epochs", "n_epochs"),
    "max_train_steps": ("steps", "max_steps", "num_steps", "train_steps", "iterations", "num_iterations", "total_steps"),
    "gradient_accumulation_steps": ("grad_accum", "grad_accum_steps", "accumulation_steps", "gradient_accumulation",
                                    "accumulate_grad_batches", "accum"),
    "gradient_checkpointing": ("use_gradient_checkpointing", "activation_checkpointing", "grad_checkpointing", "ac"),
    "mixed_precision": ("precision", "dtype", "weight_dtype"),
    "video_sample_size": ("resolution", "size", "video_size", "video_resolution", "sample_size"),
    "image_sample_size": ("image_size", "image_resolution"),
    "video_sample_n_frames": ("num_frames", "n_frames", "frames", "max_frames", "max_num_frames", "video_length",
                              "video_frames", "target_frames", "clip_length"),
    "video_sample_stride": ("stride", "frame_stride", "frame_interval", "sample_stride", "frame_skip"),
    "video_sample_fps": ("fps", "target_fps", "video_fps", "source_fps"),
    "video_repeat": ("repeat", "repeats", "num_repeats", "dataset_repeat"),
    "enable_bucket": ("bucket", "buckets", "use_bucket", "enable_ar_bucket", "ar_buckets", "aspect_ratio_bucketing"),
    "train_data_dir": ("data", "data_dir", "data_root", "dataset", "dataset_dir", "dataset_path", "dataset_base_path",
                       "instance_data_dir", "instance_data_root", "video_dir", "train_dir"),
    "train_data_meta": ("metadata", "meta", "data_meta", "metadata_path", "dataset_metadata_path", "metadata_file",
                        "data_json", "caption_file"),
    "caption_dropout": ("caption_dropout_rate", "caption_drop", "text_dropout", "cfg_dropout", "proportion_empty_prompts"),
    "dataloader_num_workers": ("num_workers", "workers", "data_workers", "max_data_loader_n_workers",
                               "dataset_num_workers"),
    "latent_cache": ("cache", "cache_latents", "latents_cache", "cache_directory", "cache_path", "latent_dir",
                     "cache_latents_to_disk", "precompute_latents"),
    "pretrained_model_name_or_path": ("model", "model_name", "model_path", "model_id", "model_dir", "base_model",
                                      "pretrained_model", "pretrained_model_path", "pretrained_path", "ckpt_dir"),
    "transformer_path": ("transformer", "dit", "dit_path", "unet", "unet_path", "transformer_weights", "ckpt_path"),
    "vae_path": ("vae", "vae_ckpt", "vae_model_path"),
    "output_dir": ("output", "out", "out_dir", "outdir", "output_path", "output_folder", "save_dir", "save_path",
                   "exp_dir", "results_dir", "o"),
    "tracker_project_name": ("wandb_project", "project", "project_name", "tracker_name", "log_tracker_name", "run_name",
                             "wandb_run_name", "experiment_name"),
    "report_to": ("log_with", "logger", "tracker", "wandb", "tensorboard", "use_wandb"),
    "logging_dir": ("log_dir", "logdir"),
    "checkpointing_steps": ("save_steps", "save_every", "save_every_n_steps", "save_interval", "ckpt_every",
                            "checkpoint_steps", "checkpointing_step", "checkpoint_every", "save_freq"),
    "checkpoints_total_limit": ("save_total_limit", "checkpoints_limit", "keep_last", "max_checkpoints",
                                "save_last_n_steps", "checkpoint_limit"),
    "resume_from_checkpoint": ("resume", "resume_from", "resume_path", "auto_resume", "load_checkpoint"),
    "seed": ("random_seed", "manual_seed", "global_seed", "rng_seed"),
    "use_ema": ("ema", "with_ema"),
    "ema_decay": ("ema_rate", "ema_beta", "ema_momentum"),
    "validation_prompts": ("prompt", "prompts", "sample_prompts", "validation_prompt", "sample_prompt", "eval_prompts"),
    "validation_steps": ("eval_steps", "val_steps", "validation_every", "eval_every"),
    "sample_every": ("sample_every_n_steps", "sample_every_steps"),
    "sample_resolution": ("validation_size", "sample_width", "sample_height"),
    "sample_frames": ("sample_num_frames",),
    "sample_guidance": ("sample_guidance_scale", "sample_cfg"),
    "sample_negative_prompt": ("negative_prompt", "validation_negative_prompt"),
    "validation_epochs": ("sample_every_n_epochs", "eval_every_n_epochs", "val_epochs"),
    "validation_paths": ("validation_images", "validation_image", "validation_videos"),
    "validation_rows": ("val_size", "eval_size", "num_validation_samples"),
    "validation_share": ("validation_split", "val_split", "eval_split", "validation_fraction"),
    "validation_meta": ("validation_data", "val_data", "eval_data", "validation_dataset", "eval_dataset", "val_data_meta"),
    "train_mode": ("task", "mode", "training_mode", "train_type", "model_type"),
    "trainable_modules": ("trainable_models", "trainable_layers", "trainable"),
    "weighting_scheme": ("loss_weighting", "timestep_weighting", "weighting"),
    "flow_shift": ("discrete_flow_shift", "sample_shift", "shift", "timestep_shift", "flow_matching_shift"),
    "train_sampling_steps": ("num_train_timesteps", "num_timesteps"),
    "low_vram": ("lowvram", "offload", "cpu_offload", "enable_model_cpu_offload", "vae_cpu_offload"),
    "selective_ac": ("selective_checkpointing", "gradient_checkpointing_ratio"),
    "use_8bit_adam": ("adam8bit", "use_8bit_adamw", "adamw8bit"),
    "export_layouts": ("lora_format", "save_format", "export_format"),
    "export_dtype": ("save_precision", "save_dtype"),
    "dry_run": ("dryrun", "estimate", "plan"),
    "compile": ("torch_compile", "compile_model", "use_compile"),
    "offload_activations": ("gradient_checkpointing_cpu_offload", "activation_offloading", "offload_checkpoints"),
    "base_precision": ("fp8_base", "fp8_scaled", "quantize", "quantize_base", "transformer_dtype", "base_model_precision"),
    "text_encoder_precision": ("fp8_t5", "fp8_llm", "fp8_text_encoder", "text_encoder_dtype", "quantize_text_encoder"),
    "stream_blocks": ("blocks_to_swap", "block_swap", "block_swap_h2d_only", "blocks_swap"),
    "vae_tiling": ("enable_vae_tiling", "vae_enable_tiling", "tiled_vae"),
    "deterministic": ("use_deterministic", "full_determinism"),
}  # fmt: skip

LAUNCHER = "pass it to accelerate launch, in front of the script's name"
FROZEN = "remove it: the encoders and the VAE are frozen"
ATTENTION = "use --attention_backend, for example flash or xformers; by default torch selects a kernel"
SMALLER = "remove it; --dry_run prints what a run needs, and which settings need less memory"
WHOLE_MODEL = "pass the folder of the whole model as --pretrained_model_name_or_path"
# Name elsewhere -> what to do instead.
INSTEAD: Mapping[str, str] = {
    "save_state": "remove it: every checkpoint contains the state that --resume_from_checkpoint needs",
    "use_peft_lora": "remove it: --lora_rank selects a LoRA. train_lora.py takes the flags of VideoX-Fun's train_lora.py",
    "network_module": "remove it: --lora_rank selects a LoRA",
    "use_lora": "use --lora_rank N, which selects a LoRA",
    "lora_skip_name": "name the layers to train with --lora_target_modules",
    "boundary_type": "use --expert high_noise or --expert low_noise of scripts/wan2.2/train.py",
    "fp16": "use --mixed_precision=bf16; float16 is not supported",
    **dict.fromkeys(("bf16", "amp"), "use --mixed_precision=bf16"),
    "fp32": "use --mixed_precision=no",
    "sample_at_first": "remove it: clips are sampled at step 0, too",
    "height": "use --fix_sample_size HEIGHT WIDTH, or --video_sample_size for an area",
    "width": "use --fix_sample_size HEIGHT WIDTH, or --video_sample_size for an area",
    **dict.fromkeys(("train_text_encoder", "train_vae", "text_encoder_lr"), FROZEN),
    **dict.fromkeys(
        ("sdpa", "xformers", "flash_attn", "flash3", "attn_mode", "use_flash_attn", "enable_xformers_memory_efficient_attention",
         "sage_attn"), ATTENTION,
    ),
    "fp8": SMALLER,
    **dict.fromkeys(
        ("t5", "t5_path", "text_encoder", "text_encoder1", "text_encoder2", "text_encoder_path", "clip", "clip_path",
         "tokenizer", "tokenizer_path"), WHOLE_MODEL,
    ),
    **dict.fromkeys(
        ("num_processes", "num_machines", "machine_rank", "multi_gpu", "gpu_ids", "main_process_ip", "main_process_port",
         "deepspeed_config_file", "deepspeed_multinode_launcher", "zero_stage", "nproc_per_node", "nnodes", "node_rank",
         "master_addr", "master_port", "num_gpus", "fsdp_sharding_strategy", "fsdp_auto_wrap_policy", "fsdp_version",
         "fsdp_state_dict_type", "num_cpu_threads_per_process"), LAUNCHER,
    ),
}  # fmt: skip

SYNONYMS: Mapping[str, str] = {
    **{name: f"did you mean --{flag}" for flag, names in SAME.items() for name in names},
    **INSTEAD,
}


def hint_for(word: str, flags: Collection[str]) -> str | None:
    """Return the hint for a word that is not a flag: what to type instead; None if it is unknown.

    Args:
        word: as typed, with its dashes and without a value.
        flags: the flags of the script, with their dashes; a synonym of any other flag is unknown.
    """
    name = word.lstrip("-").replace("-", "_").lower()
    if f"--{name}" in flags:
        return f"did you mean --{name}"
    hint = SYNONYMS.get(name)
    meant = hint.removeprefix("did you mean ") if hint and hint.startswith("did you mean ") else None
    return hint if meant is None or meant in flags else None


def nearest_hint(word: str, flags: Collection[str]) -> str:
    """Return how to fix an unknown flag: the flag here that does the same, or the one with the nearest spelling.

    Args:
        word: as typed, with or without dashes.
        flags: the option strings of the script.
    """
    hint = hint_for(f"--{word.lstrip('-')}", flags)  # before the spelling: --lr is nearer to --help
    if hint is not None:
        return hint
    names = [flag[2:] for flag in flags if flag.startswith("--")]
    near = difflib.get_close_matches(word.lstrip("-"), names, 1, NEAR)
    if near:
        return f"did you mean --{near[0]}"
    close = difflib.get_close_matches(
        word.lstrip("-"), list(SYNONYMS), 1, NEAR
    )  # a misspelled name of another trainer
    return (hint_for(close[0], flags) if close else None) or "see --help"
