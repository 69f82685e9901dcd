"""Serves videox/args.py: each flag is explained, read and bounded; whoever errs is told the way out in one line."""

from __future__ import annotations

import argparse
import ast
import inspect
import math
import re
from pathlib import Path

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

import videox.training.args as flags
import videox.training.dry_run as planning
from videox.errors import FLAGS, UserError
from videox.training.argument_parser import GONE

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "scripts" / "wan2.1" / "train.py"

REPLACED = {
    "auto_tile_batch_size": "slot_fill",
    "keep_all_node_same_token_length": "plan",
    "enable_text_encoder_in_dataloader": "latent_cache",
    "multi_stream": "latent_cache",
    "report_model_info": "metrics",
}
NEVER_READ = (
    "noise_offset", "snr_loss", "random_flip", "max_train_samples", "input_perturbation", "prediction_type", "variant",
    "revision", "non_ema_revision", "push_to_hub", "hub_model_id", "hub_token", "cache_dir", "local_rank",
)  # fmt: skip
PURE_NUMBERS = {
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "logit_mean",
    "lora_alpha",
    "lora_rank",
    "logit_std",
    "mode_scale",
    "seed",
}
UNITS = re.compile(
    r"pixels|frames|steps?\b|epochs|rows|samples|share|times|processes|micro-batches|checkpoints|timesteps|tokens"
    r"|norm|per |this much higher"
)


def shared_parser() -> flags.Parser:
    parser = flags.Parser()
    flags.add_model_and_data(parser)
    flags.add_shapes(parser)
    flags.add_training(parser, modes=("normal", "i2v", "inpaint"))
    flags.add_run(parser)
    planning.add_flags(parser)
    return parser


def actions() -> dict[str, tuple[argparse.Action, str]]:
    """Returns flag -> (action, title of its group), without --help."""
    found = {}
    for group in shared_parser()._action_groups:
        for action in group._group_actions:
            if action.dest != "help":
                found[action.dest] = (action, group.title)
    return found


ACTIONS = actions()
NUMBERS = sorted(name for name, (action, _) in ACTIONS.items() if action.type is not None)


@pytest.fixture
def base(tmp_path: Path) -> list[str]:
    folders = [tmp_path / name for name in ("model", "data", "out")]
    for folder in folders[:2]:
        folder.mkdir()
    return [
        f"--pretrained_model_name_or_path={folders[0]}", f"--train_data_meta={folders[1] / 'metadata.json'}",
        f"--output_dir={folders[2]}",
    ]  # fmt: skip


def parse(words: list[str]) -> argparse.Namespace:
    args = shared_parser().parse(words)
    flags.check(args)
    return args


def refusal(words: list[str]) -> UserError:
    """Returns the refusal that these words meet: exit code 2, one line that names a way out."""
    with pytest.raises(UserError) as refused:
        parse(words)
    assert refused.value.exit_code == FLAGS
    assert refused.value.hint
    assert "\n" not in refused.value.line()
    return refused.value


# ---------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("name", ACTIONS)
def test_every_flag_has_help(name: str) -> None:
    assert ACTIONS[name][0].help, name


@pytest.mark.parametrize("name", NUMBERS)
def test_help_of_a_number_has_its_unit(name: str) -> None:
    action, title = ACTIONS[name]
    assert name in PURE_NUMBERS or UNITS.search(f"{title} {action.help}"), name


@pytest.mark.parametrize("name", NUMBERS)
def test_help_says_what_zero_is(name: str) -> None:
    action, _ = ACTIONS[name]
    try:
        zero = action.type("0")
    except argparse.ArgumentTypeError:
        return
    if isinstance(zero, int) and name != "seed":
        assert "(0 = " in action.help


def test_help_can_be_printed(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        tiny.load_script("scripts/wan2.1/train.py").parse_args(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"--{name} " in shown or f"--{name}\n" in shown for name in (*ACTIONS, "tokenizer_max_length"))


# -------------------------------------------------------------------------------------------------- every flag is read


def read_flags() -> set[str]:
    """Returns the attributes of `args` that script and package read, and those that two functions read by getattr."""
    read = inspect.getsource(flags.check) + inspect.getsource(flags.optimizer_of)
    by_name = ("use_deepspeed", "use_fsdp", "use_8bit_adam", "use_came")
    found = {name for name in by_name if f'"{name}"' in read}
    for path in (TRAIN, *(ROOT / "videox").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args":
                found.add(node.attr)
    return found


def own_flags_of_the_script() -> set[str]:
    calls = (n for n in ast.walk(ast.parse(TRAIN.read_text())) if isinstance(n, ast.Call) and n.args)
    texts = (call.args[0].value for call in calls if isinstance(call.args[0], ast.Constant))
    return {text.removeprefix("--") for text in texts if isinstance(text, str) and text.startswith("--")}


def test_every_flag_is_read_and_every_read_is_a_flag() -> None:
    every = set(ACTIONS) | (own_flags_of_the_script() & {"config_path", "tokenizer_max_length"})
    assert {"config_path", "tokenizer_max_length"} < every
    assert read_flags() == every


# ------------------------------------------------------------------------------------------------- flags that are gone


def test_the_table_of_gone_flags_is_whole() -> None:
    assert set(GONE) == set(REPLACED) | set(NEVER_READ)
    assert not set(GONE) & set(ACTIONS)


@pytest.mark.parametrize("form", ["--{}", "--{}=1", "--{} 1"])
@pytest.mark.parametrize("name", [*REPLACED, *NEVER_READ])
def test_a_gone_flag_is_answered_by_what_replaces_it(base: list[str], name: str, form: str) -> None:
    refused = refusal([*base, *form.format(name).split()])
    assert refused.where == f"--{name}"
    assert refused.hint == GONE[name]
    assert REPLACED.get(name, "never read it") in refused.hint
    assert refused.line() == refusal(form.format(name).split()).line()  # said first, whatever else is missing


# ------------------------------------------------------------------------------------------------- unknown flags


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("--gradient_ckeckpointing", "--gradient_checkpointing"),
        ("--learning-rate=1e-5", "--learning_rate"),
        ("--resume_from_checkpoints=latest", "--resume_from_checkpoint"),
        ("--train_data_metta=x", "--train_data_meta"),
        ("--video_sampl_size=256", "--video_sample_size"),
        ("--enable_buckets", "--enable_bucket"),
    ],
)
def test_a_misspelt_flag_names_the_nearest(base: list[str], word: str, meant: str) -> None:
    for words in ([*base, word], [word]):  # also where the flag that was meant is required
        refused = refusal(words)
        assert refused.where == word.split("=")[0]
        assert refused.hint == f"did you mean {meant}"


@pytest.mark.parametrize("name", sorted(ACTIONS))
def test_abbreviations_are_off(base: list[str], name: str) -> None:
    short = f"--{name[:-1]}"
    if short[2:] not in ACTIONS:
        assert refusal([*base, short, "1"]).where == short


@pytest.mark.parametrize("word", ["stray", "-x", "--", "--zzzzzzzzzzzzzzzzzz"])
def test_stray_words_are_refused(base: list[str], word: str) -> None:
    refused = refusal([*base, word])
    assert refused.where == word
    assert "not a flag" in refused.what


@pytest.mark.parametrize("missing", ["pretrained_model_name_or_path", "train_data_meta"])
def test_a_missing_flag_is_named(base: list[str], missing: str) -> None:
    refused = refusal([word for word in base if missing not in word])
    assert refused.where == f"--{missing}"
    assert "required" in refused.what


def test_a_prompt_may_begin_with_dashes(base: list[str]) -> None:
    prompts = ["--a dog runs", "a cat = a cat"]
    assert parse([*base, "--validation_prompts", *prompts]).validation_prompts == prompts


# -------------------------------------------------------------------------------------------------- values

EVIL = ["0", "-0", "-1", "nan", "inf", "-inf", "1e400", "1e308", "-1e-9", "", " ", "text", "0x10", "1e3", "9" * 5000, "½",
        "%s", "None", "True", "[1]", "18446744073709551616"]  # fmt: skip


def words_of(name: str, value: str) -> list[str]:
    count = ACTIONS[name][0].nargs
    return (
        [f"--{name}={value}"] if count is None else [f"--{name}", *[value] * (count if isinstance(count, int) else 1)]
    )


@pytest.mark.parametrize("name", NUMBERS)
def test_no_value_of_a_number_does_more_than_be_refused(base: list[str], name: str) -> None:
    for value in EVIL:
        try:
            found = getattr(parse([*base, "--enable_bucket", *words_of(name, value)]), name)
        except UserError as refused:
            assert refused.exit_code == FLAGS
            assert "\n" not in refused.line()
            continue
        for number in found if isinstance(found, list) else [found]:
            assert isinstance(number, int | float)
            assert math.isfinite(number)
            assert number >= 0 or name in {"logit_mean", "mode_scale"}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400", "text", "", "9" * 5000])
def test_no_number_is_infinite_or_text(base: list[str], name: str, value: str) -> None:
    assert refusal([*base, *words_of(name, value)]).where == f"--{name}"


@given(st.integers(-50, 50), st.integers(0, 50), st.integers(-200, 200))
def test_whole_numbers_lie_within_their_bounds(low: int, width: int, value: int) -> None:
    kind = flags.number(int, low, low + width)
    if low <= value <= low + width:
        assert kind(str(value)) == value
    else:
        with pytest.raises(argparse.ArgumentTypeError, match=re.escape(f"{value} is outside {low} to {low + width}")):
            kind(str(value))


@pytest.mark.parametrize("value", ["inf", "1e400", "nan", "-inf"])
def test_a_number_without_an_upper_bound_is_finite_all_the_same(value: str) -> None:
    assert flags.number(float, 0)("1e300") == 1e300
    with pytest.raises(argparse.ArgumentTypeError, match="outside 0 or more"):
        flags.number(float, 0)(value)


@given(st.floats(), st.floats(0, 1))
def test_shares_lie_between_zero_and_one(value: float, share: float) -> None:
    assert flags.SHARE(repr(share)) == share
    if not 0 <= value <= 1:
        with pytest.raises(argparse.ArgumentTypeError):
            flags.SHARE(repr(value))


@pytest.mark.parametrize(
    ("name", "accepted", "refused"),
    [
        ("caption_dropout", ["0", "1", "0.1"], ["1.01", "-0.1"]),
        ("train_batch_size", ["1", "64"], ["0", "1.5"]),
        ("video_sample_n_frames", ["1", "5", "81"], ["0", "80", "82"]),
        ("train_sampling_steps", ["1", "1000"], ["0", "1001"]),
        ("seed", ["0", str(2**63 - 1)], ["-1", str(2**63)]),
        ("mode_scale", ["-1", "1.75"], ["-1.01", "1.76"]),
        ("max_grad_norm", ["0.05", "1e12"], ["0"]),
        ("initial_grad_norm_ratio", ["1", "5"], ["0.5"]),
        ("video_sample_size", ["32", "8192"], ["31", "8193"]),
        ("adam_beta2", ["0", "0.95"], ["1"]),
    ],
)
def test_bounds_of_single_flags(base: list[str], name: str, accepted: list[str], refused: list[str]) -> None:
    for value in accepted:
        found = getattr(parse([*base, f"--{name}={value}"]), name)
        assert found == type(found)(value)
    for value in refused:
        assert refusal([*base, f"--{name}={value}"]).where == f"--{name}"


@pytest.mark.parametrize("name", [n for n, (action, _) in ACTIONS.items() if action.choices])
def test_a_choice_that_is_none_lists_those_that_are(base: list[str], name: str) -> None:
    refused = refusal([*base, f"--{name}=nonsense"])
    assert refused.where == f"--{name}"
    assert all(choice in refused.what for choice in ACTIONS[name][0].choices)


# ---------------------------------------------------------------------------------------------- across flags


@pytest.mark.parametrize(
    ("words", "where", "said"),
    [
        (["--gradient_checkpointing", "--selective_ac=0.5"], "--selective_ac", "--gradient_checkpointing"),
        (["--random_hw_adapt"], "--random_hw_adapt", "--enable_bucket"),
        (["--training_with_video_token_length"], "--training_with_video_token_length", "--enable_bucket"),
        (["--random_frame_crop"], "--random_frame_crop", "--enable_bucket"),
        (["--random_ratio_crop"], "--random_ratio_crop", "--enable_bucket"),
        (["--fix_sample_size", "480", "832"], "--fix_sample_size", "--enable_bucket"),
        (["--validate_ema"], "--validate_ema", "--use_ema"),
        (["--ema_decay=0.99"], "--ema_decay", "--use_ema"),
        (["--ema_device=cpu"], "--ema_device", "--use_ema"),
        (["--use_deepspeed"], "--use_deepspeed", "accelerate launch"),
        (["--use_fsdp"], "--use_fsdp", "accelerate launch"),
    ],
)
def test_contradictions_name_both_sides(
    base: list[str], monkeypatch: pytest.MonkeyPatch, words: list[str], where: str, said: str
) -> None:
    for variable in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(variable, raising=False)
    refused = refusal([*base, *words])
    assert refused.where == where
    assert said in refused.line()


@pytest.mark.parametrize("backend", ["deepspeed", "fsdp"])
def test_what_the_launcher_runs_may_be_said(base: list[str], monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{backend.upper()}", "true")
    assert getattr(parse([*base, f"--use_{backend}"]), f"use_{backend}")
    assert not getattr(parse(base), f"use_{backend}")  # and need not


def test_output_has_a_folder_of_its_own(base: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder, said in [("model", "model"), ("data", "train_data_dir"), ("", "model"), ("file", "is a file")]:
        refused = refusal([*base, f"--output_dir={tmp_path / folder}"])
        assert refused.where == "--output_dir"
        assert said in refused.what
    for inside in ("transformer", "runs/new"):
        assert "is inside --pretrained" in refusal([*base, f"--output_dir={tmp_path / 'model' / inside}"]).what
    for flag in ("transformer_path", "vae_path"):
        part = [f"--{flag}={tmp_path / 'parts' / 'own'}"]
        assert f"is or contains --{flag}" in refusal([*base, *part, f"--output_dir={tmp_path / 'parts' / 'own'}"]).what
        assert f"is inside --{flag}" in refusal([*base, *part, f"--output_dir={tmp_path / 'parts/own/run'}"]).what
        parse([*base, *part, f"--output_dir={tmp_path / 'parts'}"])
    parse([*base, f"--output_dir={tmp_path / 'data' / 'runs'}"])
    parse([*base, f"--output_dir={tmp_path / 'new' / 'run'}"])
    assert not (tmp_path / "new").exists()  # checking makes nothing


def test_output_is_found_out_behind_a_link(base: list[str], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "model")
    assert refusal([*base, f"--output_dir={tmp_path / 'link'}"]).where == "--output_dir"


@pytest.mark.parametrize("name", flags.PATHS)
def test_impossible_paths_are_refused(base: list[str], tmp_path: Path, name: str) -> None:
    assert refusal([*base, f"--{name}={'x' * 5000}"]).where == f"--{name}"
    assert refusal([*base, f"--{name}={tmp_path / ('y' * 300)}"]).where == f"--{name}"


def test_data_folder_is_the_metadatas_where_none_is_given(base: list[str], tmp_path: Path) -> None:
    assert flags.data_dir(parse(base)) == tmp_path / "data"
    assert flags.data_dir(parse([*base, f"--train_data_meta={tmp_path / 'data'}"])) == tmp_path / "data"
    assert flags.data_dir(parse([*base, f"--train_data_dir={tmp_path}/elsewhere"])) == tmp_path / "elsewhere"


# ---------------------------------------------------------------------------------------- the published command

PUBLISHED = """--image_sample_size=1024 --video_sample_size=256 --token_sample_size=512 --video_sample_stride=3
--video_sample_n_frames=81 --train_batch_size=1 --video_repeat=1 --gradient_accumulation_steps=1
--dataloader_num_workers=8 --num_train_epochs=100 --checkpointing_steps=50 --learning_rate=2e-05
--lr_scheduler=constant_with_warmup --lr_warmup_steps=100 --seed=42 --gradient_checkpointing --mixed_precision=bf16
--adam_weight_decay=3e-2 --adam_epsilon=1e-10 --vae_mini_batch=1 --max_grad_norm=0.05 --random_hw_adapt
--training_with_video_token_length --enable_bucket --uniform_sampling --low_vram --train_mode=normal
--trainable_modules ."""


def test_the_published_wan_command_is_taken_as_it_is(base: list[str]) -> None:
    args = tiny.load_script("scripts/wan2.1/train.py").parse_args([*base, *PUBLISHED.split()])
    policy = flags.size_policy(args)
    assert policy.video_sizes() == policy.image_sizes() == (256, 384, 512, 640, 768, 896, 1024)
    assert [policy.max_frames(size) for size in policy.video_sizes()] == [81, 81, 81, 49, 33, 25, 17]
    assert policy.stride == 3
    assert (args.learning_rate, args.adam_epsilon, args.max_grad_norm) == (2e-5, 1e-10, 0.05)
    assert args.trainable_modules == ["."]


def test_the_fixed_size_reaches_the_policy(base: list[str]) -> None:
    args = parse([*base, "--enable_bucket", "--fix_sample_size", "480", "832"])
    assert flags.size_policy(args).fix_sample_size == (480, 832)
    assert flags.size_policy(parse(base)).fix_sample_size is None
