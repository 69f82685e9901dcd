"""Tests of videox.training.run_files: flags from YAML files, recipes and the args.json of a run."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

from videox.errors import UserError
from videox.training.argument_parser import Parser
from videox.training.flags import make_parser
from videox.training.run_files import recipe_table

REQUIRED = ("--pretrained_model_name_or_path=model", "--train_data_meta=meta.json")


@pytest.fixture
def parser(tmp_path: Path) -> Parser:
    return make_parser(None, modes=("normal", "i2v"), recipes=tmp_path / "recipes" / "wan2.1")


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def line_of(parser: Parser, *words: str) -> str:
    with pytest.raises(UserError) as caught:
        parser.parse([*REQUIRED, *words])
    return caught.value.line()


FLAGS = """\
mixed_precision: no
enable_bucket: true
low_vram: false
learning_rate: 1e-4
max_grad_norm: 5.e-2
train_batch_size: 2
try_largest_first: off
export_layouts: [diffusers, comfyui]
fix_sample_size: [480, 832]
validation_prompts:
  - "a film: of rain"
seed: 7
"""


def test_a_yaml_file_equals_the_same_flags(parser: Parser, tmp_path: Path) -> None:
    file = write(tmp_path / "run.yaml", FLAGS)
    words = (
        "--mixed_precision=no --enable_bucket --learning_rate=1e-4 --max_grad_norm=0.05 --train_batch_size=2 "
        "--try_largest_first=off --export_layouts diffusers comfyui --fix_sample_size 480 832 --seed=7"
    )
    typed = parser.parse([*REQUIRED, *words.split(), "--validation_prompts", "a film: of rain"])
    read = parser.parse([*REQUIRED, "--config", file])
    assert read.config == [file]
    assert vars(read) == {**vars(typed), "config": [file]}


def test_the_command_line_wins_and_later_files_win(parser: Parser, tmp_path: Path) -> None:
    recipe = write(
        tmp_path / "recipes/wan2.1/lora-24gb.yaml", "seed: 1\nlora_rank: 16\nlearning_rate: 1e-4\nlow_vram: true\n"
    )
    first = write(tmp_path / "a.yaml", "seed: 2\nlora_rank: 32\ngradient_checkpointing: true\n")
    second = write(tmp_path / "b.yaml", "lora_rank: 64\nlow_vram: false\nlearning_rate: null\n")
    assert Path(recipe).exists()
    words = ["--seed=3", "--recipe", "lora-24gb", "--config", first, second, "--gradient_checkpointing=false"]
    args = parser.parse([*REQUIRED, *words])
    default = parser.parse(REQUIRED).learning_rate
    assert (args.seed, args.lora_rank, args.low_vram, args.gradient_checkpointing) == (3, 64, False, False)
    assert args.learning_rate == default
    args = parser.parse([*REQUIRED, "--config", first, "--config", second])
    assert args.lora_rank == 64 and args.seed is None, "as argparse has it, the last --config counts"


def test_required_flags_may_come_from_a_file(parser: Parser, tmp_path: Path) -> None:
    file = write(tmp_path / "run.yaml", "pretrained_model_name_or_path: models/wan\ntrain_data_meta: clips\n")
    args = parser.parse(["--config", file])
    assert (args.pretrained_model_name_or_path, args.train_data_meta) == ("models/wan", "clips")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learning_rat: 1", "key learning_rat: is not a flag of this script. Fix: did you mean --learning_rate"),
        ("train_batch_size: 0", "--train_batch_size in {file}: 0 is outside 1 to 1000000000"),
        ("train_batch_size: 1.5", "--train_batch_size in {file}: '1.5' is not a whole number"),
        ("enable_bucket: 1", "key enable_bucket: 1 is neither true nor false"),
        ("seed: [1]", "key seed: is a list. Fix: write one value"),
        ("seed: {a: 1}", "key seed: has keys of its own"),
        ("validation_prompts: [a: b]", "the item {{'a': 'b'}} is not a single value. Fix: put quotes around"),
        ("recipe: x", "key recipe: is not allowed in a run file"),
        ("- seed", "it is not a mapping of flag names to values"),
        ("seed: [", "is not a run file (while parsing"),
        ("seed: ${nothing}", "is not a run file (Interpolation key"),
    ],
)
def test_mistakes_name_the_file_and_the_key(parser: Parser, tmp_path: Path, text: str, expected: str) -> None:
    file = write(tmp_path / "run.yaml", text)
    line = line_of(parser, "--config", file)
    assert expected.format(file=file) in line and file in line


def test_files_and_recipes_that_do_not_exist_are_named(parser: Parser, tmp_path: Path) -> None:
    write(tmp_path / "recipes/wan2.1/t2v-1.3b-lora-24gb.yaml", "seed: 1")
    assert "nowhere.yaml cannot be read" in line_of(parser, "--config", "nowhere.yaml")
    assert "use t2v-1.3b-lora-24gb, or see --list_recipes" in line_of(parser, "--recipe", "t2v-1.3b-lora-24")
    assert "is not a recipe of this script" in line_of(parser, "--recipe", "../secrets")
    for size in ("16gb", "80gb"):  # a name that may mean several recipes: all of them
        write(tmp_path / f"recipes/wan2.1/t2v-1.3b-lora-{size}.yaml", "seed: 1")
    several = "use t2v-1.3b-lora-16gb, t2v-1.3b-lora-24gb, t2v-1.3b-lora-80gb, or see"
    assert several in line_of(parser, "--recipe", "t2v-1.3b-lora-4090")
    assert "use t2v-1.3b-lora-24gb, or see" in line_of(parser, "--recipe", "t2v-1.3b-lora-24")


def test_a_mistyped_choice_is_named(parser: Parser) -> None:
    assert line_of(parser, "--gpu", "4090").endswith("Fix: did you mean rtx4090.")
    assert line_of(parser, "--gpu", "H100").endswith("Fix: did you mean h100.")
    assert line_of(parser, "--gpu", "tpu-v5").endswith("Fix: see --help.")


def test_a_value_of_the_command_line_is_not_blamed_on_a_file(parser: Parser, tmp_path: Path) -> None:
    file = write(tmp_path / "run.yaml", "seed: 1\n")
    assert line_of(parser, "--config", file, "--seed=x").startswith("error: --seed: 'x' is not a whole number")


def test_a_boolean_flag_takes_true_and_false_only(parser: Parser) -> None:
    assert parser.parse([*REQUIRED, "--low_vram=true"]).low_vram
    assert not parser.parse([*REQUIRED, "--low_vram", "--low_vram=false"]).low_vram
    assert parser.parse([*REQUIRED, "--low_vram=false", "--low_vram"]).low_vram
    assert "maybe is neither true nor false" in line_of(parser, "--low_vram=maybe")


def test_the_record_of_a_run_repeats_it(parser: Parser, tmp_path: Path) -> None:
    asked = parser.parse(
        [*REQUIRED, "--lora_rank=8", "--low_vram", "--output_dir=out", "--resume_from_checkpoint=latest", "--dry_run"]
    )
    record = {"asked": vars(asked), "resolved": {"seed": 123}}
    file = write(tmp_path / "args.json", json.dumps(record))
    args = parser.parse(["--config", file, "--output_dir=again"])
    changed = {"config": [file], "output_dir": "again", "seed": 123, "resume_from_checkpoint": None, "dry_run": False}
    assert args == Namespace(**{**vars(asked), **changed})
    file = write(tmp_path / "other.json", "[]")
    assert "it has no key `asked`" in line_of(parser, "--config", file)


def test_the_table_has_a_row_for_each_recipe(
    parser: Parser, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "recipes" / "wan2.1"
    for name in ("a-24gb", "b-80gb"):
        launch = "accelerate launch --num_processes 8 train.py" if name == "b-80gb" else "python train.py"
        sample = "gpu: rtx4090\nvideo_sample_size: 640\nvideo_sample_n_frames: 81\n"
        write(folder / f"{name}.yaml", f"# Launch: {launch}\n{sample}seed: 1")
    row = {
        "gpus": 1,
        "gib": 20.04,
        "card_gib": 24,
        "seconds_per_step": 3.21,
        "hours": 7,
        "disk_gb": 2.6,
        "what": "LoRA",
    }
    recipes = {"a-24gb": row, "b-80gb": {**row, "card_gib": 80}}
    write(folder.parent / "figures.json", json.dumps({"data": "200 clips", "recipes": {"wan2.1": recipes}}))
    header, first, second, _, data, _, _, _, launch = recipe_table(folder)
    assert " ".join(first.split()) == "a-24gb 1 x rtx4090 20.0 of 24 GiB 81 x 640 x 640 3.2 s 7 h 3 GB LoRA"
    assert header.index("memory") == first.index("20.0") == second.index("20.0") and "200 clips" in data
    assert launch == "b-80gb: accelerate launch --num_processes 8 train.py --recipe b-80gb ..."
    with pytest.raises(SystemExit) as ended:
        parser.parse(["--list_recipes"])
    assert ended.value.code == 0 and first in capsys.readouterr().out


def test_an_empty_command_line_prints_what_to_do(parser: Parser, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parser.parse([])
    text = capsys.readouterr().err
    assert ended.value.code == 2 and len(text.splitlines()) == 8
    for words in (
        "--recipe NAME --train_data_dir CLIPS",
        "--pretrained_model_name_or_path",
        "--list_recipes",
        "make demo",
        "README.md",
    ):
        assert words in text
