"""Tests of scripts/*/train_lora.py: VideoX-Fun's LoRA flags mean the same layers, rank and scale in train.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import tiny
import torch
from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel

from videox.errors import FLAGS, UserError
from videox.lora.targets import choose_targets
from videox.training.argument_parser import REMOVED, Parser
from videox.training.flags import make_parser
from videox.training.lora_flags import ALPHA, NO_COUNTERPART, RANK, translate

ROOT = tiny.ROOT
FAMILIES = ("wan2.1", "wan2.2", "hunyuanvideo")
# The --target_name of VideoX-Fun's published commands.
PUBLISHED = {
    "wan2.1": "q,k,v,ffn.0,ffn.2",
    "wan2.2": "q,k,v,ffn.0,ffn.2",
    "hunyuanvideo": "to_q,to_k,to_v,ff.0,ff.2,ff_context.0,ff_context.2",
}
# Flags of VideoX-Fun's train_lora.py (both families) that its train.py has not, or that neither reads.

# Every flag of VideoX-Fun's scripts/wan2.1/train_lora.py, with a value.
ALL_FLAGS = {
    "input_perturbation": "0", "pretrained_model_name_or_path": None, "revision": "main", "variant": "fp16",
    "train_data_dir": None, "train_data_meta": None, "max_train_samples": "10", "validation_prompts": ["a dog", "a cat"],
    "output_dir": None, "cache_dir": "c", "seed": "1", "random_flip": True, "use_came": True, "multi_stream": True,
    "train_batch_size": "1", "vae_mini_batch": "1", "num_train_epochs": "1", "max_train_steps": "1",
    "gradient_accumulation_steps": "1", "gradient_checkpointing": True, "learning_rate": "1e-4", "scale_lr": True,
    "lr_scheduler": "constant", "lr_warmup_steps": "1", "use_8bit_adam": True, "allow_tf32": True, "use_ema": True,
    "non_ema_revision": "x", "dataloader_num_workers": "1", "adam_beta1": "0.9", "adam_beta2": "0.99",
    "adam_weight_decay": "3e-2", "adam_epsilon": "1e-10", "max_grad_norm": "0.05", "push_to_hub": True,
    "hub_token": "x", "prediction_type": "x", "hub_model_id": "x", "logging_dir": "logs", "mixed_precision": "bf16",
    "report_to": "none", "local_rank": "0", "checkpointing_steps": "50", "checkpoints_total_limit": "2",
    "resume_from_checkpoint": "latest", "noise_offset": "0", "validation_epochs": "5", "validation_steps": "100",
    "tracker_project_name": "x", "rank": "64", "network_alpha": "32", "use_peft_lora": True,
    "train_text_encoder": True, "snr_loss": True, "uniform_sampling": True,
    "enable_text_encoder_in_dataloader": True, "enable_bucket": True, "random_ratio_crop": True,
    "random_frame_crop": True, "random_hw_adapt": True, "training_with_video_token_length": True,
    "auto_tile_batch_size": True, "noise_share_in_frames": True, "noise_share_in_frames_ratio": "0.5",
    "motion_sub_loss": True, "motion_sub_loss_ratio": "0.25", "keep_all_node_same_token_length": True,
    "train_sampling_steps": "1000", "token_sample_size": "512", "video_sample_size": "512", "image_sample_size": "512",
    "fix_sample_size": ["512", "512"], "video_sample_stride": "2", "video_sample_n_frames": "81", "video_repeat": "1",
    "config_path": str(ROOT / "config/wan2.1/wan_civitai.yaml"), "transformer_path": "t", "vae_path": "v",
    "save_state": True, "tokenizer_max_length": "512", "use_deepspeed": True, "use_fsdp": True, "low_vram": True,
    "train_mode": "i2v", "weighting_scheme": "none", "logit_mean": "0", "logit_std": "1", "mode_scale": "1.29",
    "lora_skip_name": "x", "target_name": "q,k,v",
}  # fmt: skip


def names_of(family: str):
    return tiny.load_script(f"scripts/{family}/train_lora.py").NAMES


def words_of(family: str, *words: str) -> list[str]:
    return translate(words, names_of(family)).words


@pytest.fixture(scope="module")
def transformers() -> dict[str, torch.nn.Module]:
    """The transformer of each family on the meta device; Wan with its image embedder."""
    with torch.device("meta"):
        wan = WanTransformer3DModel(num_layers=2, image_dim=1280, added_kv_proj_dim=5120)
        expert = WanTransformer3DModel(num_layers=2)
        hunyuan = HunyuanVideoTransformer3DModel(num_layers=2, num_single_layers=2)
    return {"wan2.1": wan, "wan2.2": expert, "hunyuanvideo": hunyuan}


def chosen(model: torch.nn.Module, words: list[str]) -> set[str]:
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    patterns = words[words.index("--lora_target_modules") + 1 :]
    return {*choose_targets(shapes, {}, [word for word in patterns if not word.startswith("--")])}


def linear_layers(model: torch.nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


# ------------------------------------------------------------------------------------------------- which layers


def test_wan_names_mean_the_same_layers(transformers: dict[str, torch.nn.Module]) -> None:
    model = transformers["wan2.1"]
    found = chosen(model, words_of("wan2.1", f"--target_name={PUBLISHED['wan2.1']}", "--use_peft_lora"))
    ends = (
        "attn1.to_q",
        "attn1.to_k",
        "attn1.to_v",
        "attn2.to_q",
        "attn2.to_k",
        "attn2.to_v",
        "ffn.net.0.proj",
        "ffn.net.2",
    )
    assert found == {f"blocks.{block}.{end}" for block in range(2) for end in ends}  # fmt: skip


@pytest.mark.parametrize(
    ("target", "layer"),
    [
        ("self_attn.q", "blocks.0.attn1.to_q"), ("cross_attn.k_img", "blocks.1.attn2.add_k_proj"), ("o", "blocks.0.attn2.to_out.0"),
        ("blocks.1.ffn.0", "blocks.1.ffn.net.0.proj"), ("cross_attn", "blocks.0.attn2.to_v"), ("ffn", "blocks.0.ffn.net.2"),
        ("text_embedding.2", "condition_embedder.text_embedder.linear_2"), ("time_projection.1", "condition_embedder.time_proj"),
        ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"), ("head.head", "proj_out"),
        ("attn1.to_q", "blocks.0.attn1.to_q"), ("to_k", "blocks.1.attn1.to_k"),
    ],
)  # fmt: skip
def test_every_name_of_a_wan_layer_is_translated(
    transformers: dict[str, torch.nn.Module], target: str, layer: str
) -> None:
    assert layer in chosen(transformers["wan2.1"], words_of("wan2.1", "--target_name", target, "--use_peft_lora"))


def test_hunyuan_names_mean_attention_and_feed_forward(transformers: dict[str, torch.nn.Module]) -> None:
    words = words_of("hunyuanvideo", f"--target_name={PUBLISHED['hunyuanvideo']}", "--use_peft_lora")
    found = chosen(transformers["hunyuanvideo"], words)
    for end in ("attn.to_q", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"):
        assert f"transformer_blocks.1.{end}" in found
    assert "context_embedder.token_refiner.refiner_blocks.0.attn.to_q" in found  # as VideoX-Fun, through peft


@pytest.mark.parametrize("family", FAMILIES)
def test_without_peft_and_names_every_linear_layer_is_adapted(
    transformers: dict[str, torch.nn.Module], family: str
) -> None:
    assert chosen(transformers[family], words_of(family, "--rank=4")) == linear_layers(transformers[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_with_peft_and_without_names_the_usual_layers_are_adapted(family: str) -> None:
    assert "--lora_target_modules" not in words_of(family, "--use_peft_lora")


# ------------------------------------------------------------------------------------------------------ the words


@pytest.mark.parametrize("family", FAMILIES)
def test_rank_and_scale_and_their_defaults(family: str) -> None:
    assert words_of(family, "--use_peft_lora") == [f"--lora_rank={RANK}", f"--lora_alpha={ALPHA}"] == ["--lora_rank=128", "--lora_alpha=64"]  # fmt: skip
    words = words_of(family, "--rank", "64", "--use_peft_lora", "--network_alpha=32", "--save_state")
    assert words == ["--lora_rank=64", "--lora_alpha=32"]


@pytest.mark.parametrize("family", FAMILIES)
def test_other_words_keep_their_order_and_values(family: str) -> None:
    other = [
        "--seed",
        "42",
        "--validation_prompts",
        "--a dog",
        "a cat = a cat",
        "--low_vram",
        "--fix_sample_size",
        "96",
        "64",
    ]
    words = words_of(family, *other[:5], "--rank", "8", *other[5:], "--use_peft_lora", "--target_name", "to_q")  # fmt: skip
    assert words == ["--lora_rank=8", "--lora_alpha=64", "--lora_target_modules", "to_q", *other]


@pytest.mark.parametrize("given", ["q,k,v", "q, k ,v,", "q\uff0ck\uff0cv", "q\u3001k\u3001v", "q;k;v"])
def test_names_are_separated_by_any_comma(given: str) -> None:
    words = translate([f"--target_name={given}", "--use_peft_lora"], names_of("wan2.1")).words
    assert words[-4:] == ["--lora_target_modules", "to_q", "to_k", "to_v"]


@pytest.mark.parametrize("words", [["--boundary_type=low"], ["--boundary_type", "low"]])
def test_the_expert_of_wan22_is_that_of_its_boundary_type(words: list[str]) -> None:
    assert words_of("wan2.2", "--seed=1", *words, "--use_peft_lora")[2:] == ["--seed=1", "--expert=low_noise"]
    assert words_of("wan2.2", "--boundary_type=high", "--use_peft_lora")[2:] == ["--expert=high_noise"]
    assert words_of("wan2.1", *words, "--use_peft_lora")[2:] == words  # train.py refuses it


def test_a_boundary_type_without_an_expert_is_refused() -> None:
    for words, value in ((["--boundary_type=full"], "'full'"), (["--boundary_type"], "''")):
        with pytest.raises(UserError, match=f"--boundary_type: {value} has no counterpart here"):
            words_of("wan2.2", *words)


def test_a_difference_of_names_is_said() -> None:
    names = names_of("wan2.1")
    assert not translate(["--target_name=q", "--use_peft_lora"], names).notes
    assert "--use_peft_lora" in translate(["--target_name=q"], names).notes[0]


@pytest.mark.parametrize(
    ("words", "where", "named"),
    [
        (["--lora_skip_name=head"], "--lora_skip_name", "--target_name"),
        (["--train_text_encoder"], "--train_text_encoder", "frozen"),
        (["--noise_share_in_frames"], "--noise_share_in_frames", "remove it"),
        (["--target_name=,"], "--target_name", "names no layer"),
        (["--rank=0"], "--rank", "outside 1"),
        (["--rank", "many"], "--rank", "not a whole number"),
        (["--network_alpha=0"], "--network_alpha", "outside"),
        (["--rank"], "--rank", "expected one argument"),
        (["--rank=8", "--lora_rank=4"], "--lora_rank", "is given together with --rank"),
        (["--lora_alpha", "4", "--network_alpha=8"], "--lora_alpha", "is given together with --network_alpha"),
        (["--target_name=q", "--lora_target_modules", "to_k"], "--lora_target_modules", "together with --target_name"),
        (
            ["--resume_from_checkpoint=o/checkpoint-50.safetensors"],
            "--resume_from_checkpoint",
            "--init_lora_from=o/ch",
        ),
        (["--resume_from_checkpoint", "o/c-5.safetensors"], "--resume_from_checkpoint", "--init_lora_from=o/c-5.saf"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(words: list[str], where: str, named: str) -> None:
    with pytest.raises(UserError) as raised:
        translate(words, names_of("wan2.1"))
    assert raised.value.exit_code == FLAGS and raised.value.where == where and named in raised.value.line()


@pytest.fixture(scope="module")
def parser() -> Parser:
    """The parser of train.py for Wan2.1, with stand-ins for the two flags that the script itself adds."""
    parser = make_parser(None, modes=("normal", "i2v", "inpaint"), recipes=ROOT / "config/recipes/wan2.1")
    for own in ("--config_path", "--tokenizer_max_length"):
        parser.add_argument(own)
    return parser


@pytest.mark.parametrize("flag", sorted(ALL_FLAGS))
def test_every_flag_of_videox_fun_is_translated_or_refused_by_name(parser: Parser, tmp_path: Path, flag: str) -> None:
    """No flag is unknown, and none is refused as a misspelled one."""
    (tmp_path / "data").mkdir()
    needed = {
        "pretrained_model_name_or_path": tmp_path, "train_data_meta": tmp_path / "data", "output_dir": tmp_path / "out",
        "train_data_dir": tmp_path / "data",
    }  # fmt: skip
    words = runs.to_argv({**needed, flag: needed.get(flag) or ALL_FLAGS[flag]})
    try:
        args = parser.parse(words_of("wan2.1", *words))
    except UserError as refused:
        assert refused.where == f"--{flag}"
        assert flag in REMOVED or flag in NO_COUNTERPART, refused.line()
    else:
        assert flag not in REMOVED and flag not in NO_COUNTERPART
        assert args.lora_rank == (64 if flag == "rank" else RANK)


# ----------------------------------------------------------------------------------------------------- the scripts


def run_script(family: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"scripts/{family}/train_lora.py", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--mixed_precision=fp16"], "error: --mixed_precision: invalid choice: 'fp16'"),
        (["--video_sample_n_frames=80"], "error: --video_sample_n_frames: "),
        (["--train_text_encoder"], "error: --train_text_encoder: has no counterpart here"),
    ],
)
def test_errors_are_one_line_before_torch_is_imported(tmp_path: Path, words: list[str], line: str) -> None:
    (tmp_path / "data").mkdir()
    paths = [f"--pretrained_model_name_or_path={tmp_path}", f"--train_data_meta={tmp_path / 'data'}"]
    done = run_script("wan2.1", *paths, "--enable_bucket", f"--output_dir={tmp_path / 'out'}", "--rank=4", *words)
    assert done.returncode == FLAGS and done.stderr.startswith(line) and done.stderr.count("\n") == 1


def test_help_lists_the_flags_of_both() -> None:
    done = run_script("hunyuanvideo", "--help")
    assert done.returncode == 0
    assert all(f"--{flag}" in done.stdout for flag in ("rank", "network_alpha", "lora_rank", "guidance_scale"))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("peft", [True, False])
def test_a_run_equals_that_of_train(tmp_path: Path, family: str, peft: bool) -> None:
    """The losses of train_lora.py are those of train.py with the printed flags, and diffusers loads the LoRA."""
    builders = {"wan2.1": tiny.build_wan_t2v, "wan2.2": tiny.build_wan22_t2v, "hunyuanvideo": tiny.build_hunyuan_t2v}
    build = builders[family]
    model, metadata = build(tmp_path / "model"), tiny.make_dataset(tmp_path / "data")
    base = dict(max_train_steps=2, trainable_modules=None, lr_warmup_steps=0)
    words = runs.train_flags(family, model, metadata, tmp_path / "a", **base, rank=4, network_alpha=2, save_state=True)
    words += ["--use_peft_lora", f"--target_name={PUBLISHED[family]}"] if peft else []
    done = run_script(family, *words)
    assert done.returncode == 0, done.stderr
    assert (
        f"train_lora.py: running {ROOT / 'scripts' / family / 'train.py'} --lora_rank=4 --lora_alpha=2" in done.stdout
    )
    translated = [word.replace(str(tmp_path / "a"), str(tmp_path / "b")) for word in words_of(family, *words)]
    command = [sys.executable, f"scripts/{family}/train.py", *translated]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=240, check=False).returncode == 0
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / out / "metrics.jsonl").read_text().splitlines()]
        for out in "ab"
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    assert list((tmp_path / "a").rglob("pytorch_lora_weights*.safetensors"))
