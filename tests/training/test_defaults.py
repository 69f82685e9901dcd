"""The defaults of the flags are VideoX-Fun's, except for those that docs/defaults.md lists."""

from __future__ import annotations

import re

import runs
import tiny

# The defaults of VideoX-Fun's scripts/wan2.1/train.py (state of May 2026), without flags that it never reads and flags
# that were removed here.
ORIGINAL = {
    "config_path": None, "train_data_dir": None, "train_data_meta": None, "video_repeat": 0, "video_sample_size": 512,
    "image_sample_size": 512, "token_sample_size": 512, "fix_sample_size": None, "video_sample_stride": 4,
    "video_sample_n_frames": 17, "enable_bucket": False, "random_ratio_crop": False, "random_frame_crop": False,
    "random_hw_adapt": False, "training_with_video_token_length": False, "train_batch_size": 16, "vae_mini_batch": 32,
    "dataloader_num_workers": 0, "num_train_epochs": 100, "max_train_steps": None, "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False, "selective_ac": 0, "learning_rate": 1e-4, "scale_lr": False,
    "lr_scheduler": "constant", "lr_warmup_steps": 500, "use_8bit_adam": False, "use_came": False, "adam_beta1": 0.9,
    "adam_beta2": 0.999, "adam_weight_decay": 1e-2, "adam_epsilon": 1e-8, "max_grad_norm": 1.0,
    "abnormal_norm_clip_start": 1000, "initial_grad_norm_ratio": 5, "allow_tf32": False, "use_ema": False,
    "mixed_precision": None, "seed": None, "output_dir": "sd-model-finetuned", "logging_dir": "logs",
    "report_to": "tensorboard", "tracker_project_name": "text2image-fine-tune", "checkpointing_steps": 500,
    "checkpoints_total_limit": None, "resume_from_checkpoint": None, "validation_prompts": None,
    "validation_paths": None, "validation_steps": 2000, "validation_epochs": 5, "train_sampling_steps": 1000,
    "uniform_sampling": False, "weighting_scheme": "none", "logit_mean": 0, "logit_std": 1, "mode_scale": 1.29,
    "motion_sub_loss": False, "motion_sub_loss_ratio": 0.25, "trainable_modules": None,
    "trainable_modules_low_learning_rate": [], "transformer_path": None, "vae_path": None, "train_mode": "normal",
    "low_vram": False, "use_deepspeed": False, "use_fsdp": False, "tokenizer_max_length": 512,
}  # fmt: skip
# Differences that change nothing: an empty list instead of None.
SAME = {"validation_prompts", "validation_paths"}
# Flags whose default is None in both, and means something else here.
OTHER_MEANING = {"seed", "config_path"}
HUNYUAN = {
    "guidance_scale": 6,
    "num_hidden_layers_to_skip": 2,
    "image_embed_interleave": 4,
    "tokenizer_max_length": 256,
}


def defaults_of(family: str) -> dict[str, object]:
    required = ["--pretrained_model_name_or_path=model", "--train_data_meta=meta.json"]
    found = vars(runs.train_script(family).parse_args(required))
    return {**found, "train_data_meta": None}


def listed() -> dict[str, tuple[str, str]]:
    """Return the first table of the page: VideoX-Fun's default and the one here, by flag."""
    table = (tiny.ROOT / "docs/defaults.md").read_text(encoding="utf-8").partition("## Compared with earlier")[0]
    rows = re.findall(r"^\| `--(\w+)`[^|]* \| ([^|]+) \| ([^|]+) \|", table, flags=re.MULTILINE)
    return {flag: (before, here) for flag, before, here in rows}


def test_every_changed_default_is_listed() -> None:
    wan, hunyuan = defaults_of("wan2.1"), defaults_of("hunyuanvideo")
    changed = {name for name, value in ORIGINAL.items() if wan[name] != value}
    changed |= {name for name, value in HUNYUAN.items() if hunyuan[name] != value}
    page = listed()
    assert (changed - SAME) | OTHER_MEANING == set(page)
    for name in ("initial_grad_norm_ratio", "tracker_project_name"):
        assert page[name] == (str(ORIGINAL[name]), str(wan[name])), name
    assert wan["trainable_modules"] == ["."] and wan["flow_shift"] == "auto"


def test_both_families_have_the_same_defaults() -> None:
    wan, hunyuan = defaults_of("wan2.1"), defaults_of("hunyuanvideo")
    assert {name for name in wan.keys() & hunyuan.keys() if wan[name] != hunyuan[name]} == {"tokenizer_max_length"}
