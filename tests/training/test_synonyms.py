"""Tests of videox.training.synonyms: a flag of another trainer names the flag here, and hides no flag of a script."""

from __future__ import annotations

import pytest
import tiny

from videox.errors import FLAGS, UserError
from videox.training.argument_parser import REMOVED
from videox.training.flags import make_parser
from videox.training.synonyms import INSTEAD, NEAR, SAME, SYNONYMS

PARSER = make_parser(None, modes=("normal", "i2v"), recipes=tiny.ROOT / "config/recipes/wan2.1")
FLAGS_HERE = {name[2:] for name in PARSER._option_string_actions if name.startswith("--")}


def hint(word: str) -> str:
    with pytest.raises(UserError) as raised:
        PARSER.parse([word, "1"])
    assert raised.value.exit_code == FLAGS and raised.value.where == word
    assert "\n" not in raised.value.line()
    return raised.value.hint


@pytest.mark.parametrize(
    ("word", "flag"),
    [
        ("--lr", "learning_rate"), ("--rank", "lora_rank"), ("--network_dim", "lora_rank"), ("--dim", "lora_rank"),
        ("--network_alpha", "lora_alpha"), ("--batch_size", "train_batch_size"), ("--epochs", "num_train_epochs"),
        ("--resolution", "video_sample_size"), ("--output", "output_dir"), ("-o", "output_dir"),
        ("--max-train-epochs", "num_train_epochs"), ("--LR", "learning_rate"), ("-lr", "learning_rate"),
        ("--num_frames", "video_sample_n_frames"), ("--save_every_n_steps", "checkpointing_steps"),
        ("--resume", "resume_from_checkpoint"), ("--dit", "transformer_path"), ("--data", "train_data_dir"),
        ("--weight-decay", "adam_weight_decay"), ("--target_name", "lora_target_modules"), ("--model", "pretrained_model_name_or_path"),
        ("--learning-rate", "learning_rate"), ("--Train-Batch-Size", "train_batch_size"), ("--steps", "max_train_steps"),
        ("--optimizer_type", "optimizer"), ("--network_weights", "init_lora_from"), ("--sample_prompts", "validation_prompts"),
        ("--discrete_flow_shift", "flow_shift"), ("--rnk", "lora_rank"), ("--lrr", "learning_rate"),
        ("--epohcs", "num_train_epochs"),
    ],
)  # fmt: skip
def test_what_people_type_names_the_flag(word: str, flag: str) -> None:
    assert hint(word) == f"did you mean --{flag}"


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("--save_state", "every checkpoint contains the state"),
        ("--save_stat", "every checkpoint contains the state"),
        ("--use_peft_lora", "--lora_rank selects a LoRA"),
        ("--fp16", "--mixed_precision=bf16"),
        ("--num_processes", "accelerate launch, in front of"),
        ("--deepspeed_config_file", "accelerate launch, in front of"),
        ("--blocks_to_swap", "--stream_blocks"),
        ("--xformers", "use --attention_backend"),
        ("--width", "--fix_sample_size HEIGHT WIDTH"),
        ("--local-rank", "never used it"),
    ],
)
def test_what_has_no_counterpart_says_what_to_do(word: str, words: str) -> None:
    assert words in hint(word)


@pytest.mark.parametrize("word", ["--qqq", "--", "--x", "--foo_bar"])
def test_a_word_far_from_every_flag_gets_no_guess(word: str) -> None:
    assert hint(word) == "see --help"


def test_no_synonym_hides_a_flag_and_each_names_one() -> None:
    assert set(SAME) <= FLAGS_HERE
    for family in ("wan2.1", "wan2.2", "hunyuanvideo"):
        source = (tiny.ROOT / f"scripts/{family}/train.py").read_text(encoding="utf-8")
        assert not [name for name in SYNONYMS if f'add("--{name}"' in source]
    assert not set(SYNONYMS) & FLAGS_HERE
    assert not set(SYNONYMS) & set(REMOVED)
    assert 0.6 < NEAR < 1


def test_every_synonym_has_one_meaning() -> None:
    names = [name for others in SAME.values() for name in others] + [*INSTEAD]
    assert len(names) == len({*names})
    assert all(name == name.lower().replace("-", "_").strip("_") for name in names)
    assert all(text[0].islower() or text.startswith("Wan") for text in INSTEAD.values())


@pytest.mark.parametrize("name", sorted(SYNONYMS))
def test_every_flag_named_in_a_hint_exists(name: str) -> None:
    launcher_and_scripts = {"--config_path", "--expert"}  # of Wan only
    words = {word.strip(".,;:").split("=")[0] for word in SYNONYMS[name].split() if word.startswith("--")}
    assert not {word for word in words - launcher_and_scripts if word[2:] not in FLAGS_HERE}
    assert hint(f"--{name}") == SYNONYMS[name]
