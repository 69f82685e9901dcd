"""Tests of videox.training.args: every flag has help, is read and is bounded; errors are one line with a fix."""

from __future__ import annotations

import argparse
import ast
import inspect
import math
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

import videox.training.args as flags
from videox.distributed.environment import SET_TOGETHER
from videox.errors import DOES_NOT_FIT, FLAGS, UserError
from videox.training.argument_parser import REMOVED, SHARE, Parser, number
from videox.training.data_sources import sources_of
from videox.training.flags import make_parser

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "scripts" / "wan2.1" / "train.py"
SCRIPTS = (TRAIN, ROOT / "scripts/wan2.2/train.py")

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
    r"GiB|pixels|frames|steps?\b|epochs|rows?\b|samples|share|times|processes|micro-batches|checkpoints|timesteps|tokens"
    r"|norm|per |this much higher|GPU hour|blocks"
)


def shared_parser() -> Parser:
    return make_parser(None, modes=("normal", "i2v", "inpaint"), recipes=tiny.ROOT / "config/recipes/wan2.1")


def actions() -> dict[str, tuple[argparse.Action, str]]:
    """Return flag -> (action, title of its group), without --help."""
    actions = {}
    for group in shared_parser()._action_groups:
        for action in group._group_actions:
            if action.dest != "help":
                actions[action.dest] = (action, group.title)
    return actions


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
    flags.check_args(args)
    return args


def error_of(words: list[str]) -> UserError:
    """Return the error that these words raise; it must have exit code 2, one line and a hint."""
    with pytest.raises(UserError) as error:
        parse(words)
    assert error.value.exit_code == FLAGS
    assert error.value.hint
    assert "\n" not in error.value.line()
    return error.value


# ---------------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("name", ACTIONS)
def test_every_flag_has_help(name: str) -> None:
    assert ACTIONS[name][0].help, name


@pytest.mark.parametrize("name", NUMBERS)
def test_help_of_a_number_has_a_unit(name: str) -> None:
    action, title = ACTIONS[name]
    assert name in PURE_NUMBERS or UNITS.search(f"{title} {action.help}"), name


@pytest.mark.parametrize("name", NUMBERS)
def test_help_explains_zero(name: str) -> None:
    action, _ = ACTIONS[name]
    try:
        zero = action.type("0")
    except (argparse.ArgumentTypeError, UserError):
        return
    if isinstance(zero, int) and not name.endswith("seed"):
        assert "(0 = " in action.help


def test_help_can_be_printed(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        tiny.load_script("scripts/wan2.1/train.py").parse_args(["--help"])
    assert end.value.code == 0
    output = capsys.readouterr().out
    assert all(f"--{name} " in output or f"--{name}\n" in output for name in (*ACTIONS, "tokenizer_max_length"))


# -------------------------------------------------------------------------------------------------- every flag is read


def flags_that_are_read() -> set[str]:
    """Return the attributes of `args` that script and package read, and those that two functions read by getattr."""
    source = inspect.getsource(flags.check_args) + inspect.getsource(flags.optimizer_of)
    by_name = ("use_deepspeed", "use_fsdp", "use_8bit_adam", "use_came")
    found = {name for name in by_name if f'"{name}"' in source}
    # the flags of another trainer, which train_lora.py translates, are not ours
    modules = [path for path in (ROOT / "videox").rglob("*.py") if path.name != "lora_flags.py"]
    for path in (*SCRIPTS, *modules):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args":
                found.add(node.attr)
    return found


def own_flags_of_the_scripts() -> set[str]:
    """Return the flags that the scripts of Wan add, and the modules of its families for them."""
    trees = [ast.parse(path.read_text()) for path in (*SCRIPTS, *(ROOT / "videox/families").glob("*.py"))]
    calls = (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args)
    texts = (call.args[0].value for call in calls if isinstance(call.args[0], ast.Constant))
    return {text.removeprefix("--") for text in texts if isinstance(text, str) and text.startswith("--")}


def test_every_flag_is_read_and_every_read_is_a_flag() -> None:
    acts_by_itself = {"list_recipes"}  # an argparse action that prints and exits
    own = {"clip_image", "config_path", "tokenizer_max_length", "expert", "other_transformer_path", "i2v_ratio"}
    all_flags = set(ACTIONS) - acts_by_itself | (own_flags_of_the_scripts() & own)
    assert own < all_flags
    assert flags_that_are_read() == all_flags


# ------------------------------------------------------------------------------------------------------- removed flags


def test_all_removed_flags_are_listed() -> None:
    assert set(REMOVED) == set(REPLACED) | set(NEVER_READ)
    assert not set(REMOVED) & set(ACTIONS)


@pytest.mark.parametrize("form", ["--{}", "--{}=1", "--{} 1"])
@pytest.mark.parametrize("name", [*REPLACED, *NEVER_READ])
def test_a_removed_flag_names_its_replacement(base: list[str], name: str, form: str) -> None:
    error = error_of([*base, *form.format(name).split()])
    assert error.where == f"--{name}"
    assert error.hint == REMOVED[name]
    assert REPLACED.get(name, "never used it") in error.hint
    assert error.line() == error_of(form.format(name).split()).line()  # reported first, before missing flags


# ------------------------------------------------------------------------------------------------------- unknown flags


@pytest.mark.parametrize(
    ("word", "suggestion"),
    [
        ("--gradient_ckeckpointing", "--gradient_checkpointing"),
        ("--learning-rate=1e-5", "--learning_rate"),
        ("--resume_from_checkpoints=latest", "--resume_from_checkpoint"),
        ("--train_data_metta=x", "--train_data_meta"),
        ("--video_sampl_size=256", "--video_sample_size"),
        ("--enable_buckets", "--enable_bucket"),
    ],
)
def test_a_misspelled_flag_suggests_the_nearest(base: list[str], word: str, suggestion: str) -> None:
    for words in ([*base, word], [word]):  # also when required flags are missing
        error = error_of(words)
        assert error.where == word.split("=")[0]
        assert error.hint == f"did you mean {suggestion}"


@pytest.mark.parametrize("name", sorted(ACTIONS))
def test_abbreviations_are_not_allowed(base: list[str], name: str) -> None:
    short = f"--{name[:-1]}"
    if short[2:] not in ACTIONS:
        assert error_of([*base, short, "1"]).where == short


@pytest.mark.parametrize("word", ["stray", "-x", "--", "--zzzzzzzzzzzzzzzzzz"])
def test_stray_words_are_refused(base: list[str], word: str) -> None:
    error = error_of([*base, word])
    assert error.where == word
    assert "not a flag" in error.what


@pytest.mark.parametrize("missing", ["pretrained_model_name_or_path", "train_data_meta"])
def test_a_missing_flag_is_named(base: list[str], missing: str) -> None:
    error = error_of([word for word in base if missing not in word])
    assert error.where == f"--{missing}"
    assert error.what.startswith("no ") and "--" in error.hint


@pytest.mark.parametrize("name", ACTIONS)
def test_two_dashes_are_no_value(base: list[str], name: str) -> None:
    with pytest.raises(UserError) as refused:
        parse([*base, f"--{name}=--"])
    assert refused.value.where == f"--{name}" and refused.value.what == "'--' is not a value"


def test_a_prompt_may_begin_with_dashes(base: list[str]) -> None:
    prompts = ["--a dog runs", "a cat = a cat"]
    assert parse([*base, "--validation_prompts", *prompts]).validation_prompts == prompts


# -------------------------------------------------------------------------------------------------------------- values

EXTREME_VALUES = ["0", "-0", "-1", "nan", "inf", "-inf", "1e400", "1e308", "-1e-9", "", " ", "text", "0x10", "1e3", "9" * 5000, "½",
        "%s", "None", "True", "[1]", "18446744073709551616"]  # fmt: skip


def words_of(name: str, value: str) -> list[str]:
    count = ACTIONS[name][0].nargs
    return (
        [f"--{name}={value}"] if count is None else [f"--{name}", *[value] * (count if isinstance(count, int) else 1)]
    )


@pytest.mark.parametrize("name", NUMBERS)
def test_extreme_numbers_are_refused_or_valid(base: list[str], name: str) -> None:
    for value in EXTREME_VALUES:
        try:
            found = getattr(parse([*base, "--enable_bucket", *words_of(name, value)]), name)
        except UserError as error:
            assert error.exit_code == FLAGS
            assert "\n" not in error.line()
            continue
        for item in found if isinstance(found, list) else [found]:
            assert isinstance(item, int | float)
            assert math.isfinite(item)
            assert item >= 0 or name in {"logit_mean", "mode_scale"}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400", "text", "", "9" * 5000])
def test_no_number_is_infinite_or_text(base: list[str], name: str, value: str) -> None:
    assert error_of([*base, *words_of(name, value)]).where == f"--{name}"


@given(st.integers(-50, 50), st.integers(0, 50), st.integers(-200, 200))
def test_integers_are_within_their_bounds(low: int, width: int, value: int) -> None:
    kind = number(int, low, low + width)
    if low <= value <= low + width:
        assert kind(str(value)) == value
    else:
        with pytest.raises(argparse.ArgumentTypeError, match=re.escape(f"{value} is outside {low} to {low + width}")):
            kind(str(value))


@pytest.mark.parametrize("value", ["inf", "1e400", "nan", "-inf"])
def test_a_number_without_an_upper_bound_must_be_finite(value: str) -> None:
    assert number(float, 0)("1e300") == 1e300
    with pytest.raises(argparse.ArgumentTypeError, match="outside 0 or more"):
        number(float, 0)(value)


@given(st.floats(), st.floats(0, 1))
def test_shares_are_between_zero_and_one(value: float, share: float) -> None:
    assert SHARE(repr(share)) == share
    if not 0 <= value <= 1:
        with pytest.raises(argparse.ArgumentTypeError):
            SHARE(repr(value))


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
        assert error_of([*base, f"--{name}={value}"]).where == f"--{name}"


@pytest.mark.parametrize("name", [n for n, (action, _) in ACTIONS.items() if action.choices])
def test_an_invalid_choice_lists_the_valid_ones(base: list[str], name: str) -> None:
    error = error_of([*base, f"--{name}=nonsense"])
    assert error.where == f"--{name}"
    assert all(choice in error.what for choice in ACTIONS[name][0].choices)


# -------------------------------------------------------------------------------------------------------- across flags


@pytest.mark.parametrize(
    ("words", "where", "message"),
    [
        (["--gradient_checkpointing", "--selective_ac=0.5"], "--selective_ac", "--gradient_checkpointing"),
        (["--gradient_checkpointing_keep=attention"], "--gradient_checkpointing_keep", "--selective_ac"),
        (["--offload_activations"], "--offload_activations", "--gradient_checkpointing"),
        (["--activation_memory=auto", "--gradient_checkpointing"], "--activation_memory", "--gradient_checkpointing"),
        (["--activation_memory=auto", "--selective_ac=0.5"], "--activation_memory", "--selective_ac"),
        (
            ["--activation_memory=auto", "--gradient_checkpointing_keep=attention", "--offload_activations"],
            "--activation_memory",
            "--gradient_checkpointing_keep and --offload_activations",
        ),
        (["--random_hw_adapt"], "--random_hw_adapt", "--enable_bucket"),
        (["--training_with_video_token_length"], "--training_with_video_token_length", "--enable_bucket"),
        (["--random_frame_crop"], "--random_frame_crop", "--enable_bucket"),
        (["--random_ratio_crop"], "--random_ratio_crop", "--enable_bucket"),
        (["--fix_sample_size", "480", "832"], "--fix_sample_size", "--enable_bucket"),
        (["--validate_ema"], "--validate_ema", "--use_ema"),
        (["--ema_decay=0.99"], "--ema_decay", "--use_ema"),
        (["--ema_device=cpu"], "--ema_device", "--use_ema"),
        (["--verify", "--skip_verify"], "--skip_verify", "--verify"),
        (["--logging_dir=../logs"], "--logging_dir", "outside --output_dir"),
        (["--logging_dir=/logs"], "--logging_dir", "outside --output_dir"),
        (["--logging_dir=a/../../logs"], "--logging_dir", "outside --output_dir"),
        (["--use_deepspeed"], "--use_deepspeed", "accelerate launch"),
        (["--use_fsdp"], "--use_fsdp", "accelerate launch"),
    ],
)
def test_contradictory_flags_are_both_named(
    base: list[str], monkeypatch: pytest.MonkeyPatch, words: list[str], where: str, message: str
) -> None:
    for variable in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(variable, raising=False)
    error = error_of([*base, *words])
    assert error.where == where
    assert message in error.line()


@pytest.mark.parametrize("backend", ["deepspeed", "fsdp"])
def test_backend_flags_are_accepted_under_their_launcher(
    base: list[str], monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    launched = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "WORLD_SIZE": "1"}
    name = f"ACCELERATE_USE_{backend.upper()}"
    for variable, value in {**launched, name: "true", SET_TOGETHER[name][0]: "2"}.items():
        monkeypatch.setenv(variable, value)
    assert getattr(parse([*base, f"--use_{backend}"]), f"use_{backend}")
    assert not getattr(parse(base), f"use_{backend}")  # the flag is optional


def test_the_output_folder_must_be_separate(base: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder, message in [("model", "model"), ("data", "train_data_dir"), ("", "model"), ("file", "is a file")]:
        error = error_of([*base, f"--output_dir={tmp_path / folder}"])
        assert error.where == "--output_dir"
        assert message in error.what
    for inside in ("transformer", "runs/new"):
        assert "is inside --pretrained" in error_of([*base, f"--output_dir={tmp_path / 'model' / inside}"]).what
    for flag in ("transformer_path", "vae_path"):
        component = [f"--{flag}={tmp_path / 'parts' / 'own'}"]
        assert (
            f"is or contains --{flag}"
            in error_of([*base, *component, f"--output_dir={tmp_path / 'parts' / 'own'}"]).what
        )
        assert (
            f"is inside --{flag}" in error_of([*base, *component, f"--output_dir={tmp_path / 'parts/own/run'}"]).what
        )
        parse([*base, *component, f"--output_dir={tmp_path / 'parts'}"])
    parse([*base, f"--output_dir={tmp_path / 'data' / 'runs'}"])
    parse([*base, f"--output_dir={tmp_path / 'new' / 'run'}"])
    assert not (tmp_path / "new").exists()  # the check creates no folder


def test_the_output_folder_is_resolved_through_links(base: list[str], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "model")
    assert error_of([*base, f"--output_dir={tmp_path / 'link'}"]).where == "--output_dir"


@pytest.mark.parametrize("name", flags.PATHS)
def test_impossible_paths_are_refused(base: list[str], tmp_path: Path, name: str) -> None:
    assert error_of([*base, f"--{name}={'x' * 5000}"]).where == f"--{name}"
    assert error_of([*base, f"--{name}={tmp_path / ('y' * 300)}"]).where == f"--{name}"


def test_the_data_folder_defaults_to_that_of_the_metadata(base: list[str], tmp_path: Path) -> None:
    assert sources_of(parse(base)).data_dir == tmp_path / "data"
    assert sources_of(parse([*base, f"--train_data_meta={tmp_path / 'data'}"])).data_dir == tmp_path / "data"
    assert sources_of(parse([*base, f"--train_data_dir={tmp_path}/elsewhere"])).data_dir == tmp_path / "elsewhere"


# ----------------------------------------------------------------------------------------------- the published command

PUBLISHED = """--image_sample_size=1024 --video_sample_size=256 --token_sample_size=512 --video_sample_stride=3
--video_sample_n_frames=81 --train_batch_size=1 --video_repeat=1 --gradient_accumulation_steps=1
--dataloader_num_workers=8 --num_train_epochs=100 --checkpointing_steps=50 --learning_rate=2e-05
--lr_scheduler=constant_with_warmup --lr_warmup_steps=100 --seed=42 --gradient_checkpointing --mixed_precision=bf16
--adam_weight_decay=3e-2 --adam_epsilon=1e-10 --vae_mini_batch=1 --max_grad_norm=0.05 --random_hw_adapt
--training_with_video_token_length --enable_bucket --uniform_sampling --low_vram --train_mode=normal
--trainable_modules ."""


def test_the_published_wan_command_is_accepted(base: list[str]) -> None:
    args = tiny.load_script("scripts/wan2.1/train.py").parse_args([*base, *PUBLISHED.split()])
    policy = flags.size_policy(args)
    assert policy.video_sizes() == policy.image_sizes() == (256, 384, 512, 640, 768, 896, 1024)
    assert [policy.max_frames(size) for size in policy.video_sizes()] == [81, 81, 81, 49, 33, 25, 17]
    assert policy.stride == 3
    assert (args.learning_rate, args.adam_epsilon, args.max_grad_norm) == (2e-5, 1e-10, 0.05)
    assert args.trainable_modules == ["."]


def test_the_fixed_size_is_in_the_size_policy(base: list[str]) -> None:
    args = parse([*base, "--enable_bucket", "--fix_sample_size", "480", "832"])
    assert flags.size_policy(args).fix_sample_size == (480, 832)
    assert flags.size_policy(parse(base)).fix_sample_size is None


# ------------------------------------------------------------------------------------ flags before the heavy imports

HEAVY = ("torch", "diffusers", "accelerate", "transformers", "deepspeed", "peft")


def imported_by(code: str) -> set[str]:
    """Returns the heavy packages that a fresh interpreter has imported after running the code."""
    report = f"import sys; print([name for name in {HEAVY} if name in sys.modules])"
    command = [sys.executable, "-c", f"{code}\n{report}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return set(ast.literal_eval(done.stdout.splitlines()[-1]))


def test_the_modules_of_the_flags_import_nothing_heavy() -> None:
    modules = ("flags", "args", "argument_parser")
    assert imported_by("\n".join(f"import videox.training.{name}" for name in modules)) == set()


def imported_until_exit(script: str, words: list[str], code: int) -> set[str]:
    """Return the heavy modules that a script has imported when it exits, which it must do with this code."""
    run = f"""
        import runpy, sys
        sys.argv = [{script!r}, *{words!r}]
        try:
            runpy.run_path({script!r}, run_name="__main__")
        except SystemExit as end:
            assert end.code == {code}, end.code
        else:
            raise AssertionError("it went on")
    """
    return imported_by(textwrap.dedent(run))


@pytest.mark.parametrize("family", ["wan2.1", "hunyuanvideo"])
@pytest.mark.parametrize(
    ("words", "code"),
    [(["--help"], 0), (["--learning_rat=1"], FLAGS), (["--lr", "1"], FLAGS), (["--list_recipes"], 0), ([], FLAGS)],
)
def test_help_and_wrong_flags_are_answered_before_the_heavy_imports(family: str, words: list[str], code: int) -> None:
    script = f"scripts/{family}/train.py"
    assert imported_until_exit(script, words, code) == set()


@pytest.mark.parametrize(
    ("family", "model", "gpu", "code"),
    [
        pytest.param("wan2.1", "wan2.1-t2v-1.3b", "rtx4090", 0, marks=pytest.mark.slow),
        ("wan2.1", "wan2.1-t2v-14b", "rtx3060", DOES_NOT_FIT),
        ("hunyuanvideo", "hunyuanvideo-t2v", "h100", 0),
    ],
)
def test_the_dry_run_of_a_published_model_imports_nothing_heavy(
    family: str, model: str, gpu: str, code: int, tmp_path: Path
) -> None:
    script = f"scripts/{family}/train.py"
    words = f"--dry_run --dry_run_model {model} --dry_run_data 20x5s@24fps:1280x720 --gpu {gpu} --seed 1 --lora_rank 8"
    words += " --mixed_precision bf16 --gradient_checkpointing --low_vram --train_batch_size 1 --enable_bucket"
    assert imported_until_exit(script, [*words.split(), "--output_dir", str(tmp_path)], code) == set()
    assert (tmp_path / "plan_report.json").is_file() and (tmp_path / "plan_report.png").is_file()


@pytest.mark.parametrize("family", ["wan2.1", "hunyuanvideo"])
def test_help_shows_no_empty_default(family: str) -> None:
    done = subprocess.run(
        [sys.executable, f"scripts/{family}/train.py", "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    shown = " ".join(done.stdout.split())
    assert "(default: 512)" in shown and not re.search(r"\(default: *\)", shown)
