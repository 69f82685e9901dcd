"""Tests of videox.training.flow_shift: which flow shift a run has, what a resumed run keeps, and the names of runs."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
import tiny

from videox.errors import FLAGS, MODEL, UserError
from videox.models.config_files import SHIPPED_YAML
from videox.models.configured import Component
from videox.run.checkpoint import publish_checkpoint
from videox.training.flags import make_parser
from videox.training.flow_shift import choose_shift
from videox.training.schedule import name_of_flags
from videox.training.startup import changed_flags

THREE = Component(Path("model/scheduler"), {"flow_shift": 3.0})
SEVEN = Component(Path("model/scheduler"), {"shift": 7.0})
BARE = Component(Path("model/scheduler"), {"_class_name": "UniPCMultistepScheduler"})


def args_of(flow_shift: float | str = "auto", lora_rank: int = 0) -> Namespace:
    return Namespace(flow_shift=flow_shift, lora_rank=lora_rank)


@pytest.fixture
def yaml(tmp_path: Path) -> str:
    path = tmp_path / "other.yaml"
    path.write_text("scheduler_kwargs: {shift: 2.5}\n", encoding="utf-8")
    return str(path)


def checkpoint_with(folder: Path, **description: object) -> Path:
    with publish_checkpoint(folder, 4, is_main=True, gather=lambda x: [x], description=description) as temporary:
        (temporary / "file").write_text("content", encoding="utf-8")
    return folder / "checkpoint-4"


# --------------------------------------------------------------------------------------------------------- new runs


@pytest.mark.parametrize(
    ("flag", "named", "scheduler", "value", "source"),
    [
        (9.0, True, THREE, 9.0, "--flow_shift"),
        (9.0, False, None, 9.0, "--flow_shift"),
        ("auto", True, THREE, 2.5, "--config_path"),
        ("auto", True, None, 2.5, "--config_path"),
        ("auto", False, THREE, 3.0, "the model's scheduler/scheduler_config.json"),
        ("auto", False, SEVEN, 7.0, "the model's scheduler/scheduler_config.json"),
        ("auto", False, None, 5.0, "wan_civitai.yaml: the model's folder has none"),
        ("auto", False, BARE, 5.0, "wan_civitai.yaml: the model's folder has none"),
    ],
)
def test_the_first_source_that_there_is_decides(
    yaml: str, flag: float | str, named: bool, scheduler: Component | None, value: float, source: str
) -> None:
    found = choose_shift(args_of(flag), None, scheduler, named_yaml=yaml if named else None, shipped_yaml=SHIPPED_YAML)
    assert found.value == value and source in found.source and found.notes == ()
    assert str(found).startswith(f"{value:g} (")


def test_a_family_without_a_yaml_needs_a_scheduler_or_the_flag() -> None:
    assert choose_shift(args_of(), None, SEVEN).value == 7.0
    assert choose_shift(args_of(6.0), None, BARE).value == 6.0
    with pytest.raises(UserError) as raised:
        choose_shift(args_of(), None, BARE)
    assert raised.value.exit_code == MODEL and raised.value.where == "scheduler/scheduler_config.json"
    assert "--flow_shift" in raised.value.hint


def test_a_yaml_that_is_named_is_read_also_where_the_flag_decides(tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        choose_shift(args_of(3.0), None, THREE, named_yaml=str(tmp_path / "no.yaml"), shipped_yaml=SHIPPED_YAML)
    assert raised.value.where == "--config_path"


# ----------------------------------------------------------------------------------------------------- resumed runs


@pytest.mark.parametrize("flag", ["auto", 5.0, 9.0])
def test_a_checkpoint_keeps_its_value_and_a_change_is_printed(tmp_path: Path, flag: float | str) -> None:
    checkpoint = checkpoint_with(tmp_path, shift=5.0)
    found = choose_shift(args_of(flag), checkpoint, THREE, shipped_yaml=SHIPPED_YAML)
    assert found.value == 5.0 and "checkpoint-4" in found.source
    if flag == 5.0:
        assert found.notes == ()
        return
    (note,) = found.notes
    other = "9 (--flow_shift)" if flag == 9.0 else "3 (the model's scheduler/scheduler_config.json)"
    assert f"flow shift {other} has no effect" in note and "keeps 5" in note and "--transformer_path" in note
    (note,) = choose_shift(args_of(flag, lora_rank=4), checkpoint, THREE, shipped_yaml=SHIPPED_YAML).notes
    assert "--init_lora_from" in note


@pytest.mark.parametrize(("named", "value"), [(False, 5.0), (True, 2.5)])
def test_a_checkpoint_without_a_shift_resumes_with_that_of_the_yaml(
    tmp_path: Path, yaml: str, named: bool, value: float
) -> None:
    checkpoint = checkpoint_with(tmp_path, task="wan2.1 normal")
    found = choose_shift(args_of(), checkpoint, THREE, named_yaml=yaml if named else None, shipped_yaml=SHIPPED_YAML)
    assert found.value == value and bool(found.notes) is not named
    assert choose_shift(args_of(), checkpoint, SEVEN).value == 7.0  # a family without a yaml
    assert choose_shift(args_of(6.0), checkpoint, SEVEN).value == 7.0


# ---------------------------------------------------------------------------------------------------- flags and names


def asked(*words: str) -> dict[str, object]:
    parser = make_parser(None, modes=("normal",), recipes=tiny.ROOT / "config/recipes/wan2.1")
    parser.add_argument("--config_path")
    return vars(parser.parse(["--pretrained_model_name_or_path=m", "--train_data_meta=d", *words]))


def test_the_name_of_a_run_without_the_flag_is_that_of_earlier_versions() -> None:
    """Earlier versions had no --flow_shift, and the path of the shipped yaml as default of --config_path."""
    before = {name: value for name, value in asked().items() if name != "flow_shift"} | {"config_path": SHIPPED_YAML}
    assert name_of_flags(asked()) == name_of_flags(before)
    assert name_of_flags(asked("--flow_shift=5")) != name_of_flags(before)
    assert name_of_flags(asked("--config_path=other.yaml")) != name_of_flags(before)
    of_hunyuan = {name: value for name, value in asked().items() if name != "config_path"}
    assert name_of_flags(of_hunyuan) == name_of_flags({n: v for n, v in of_hunyuan.items() if n != "flow_shift"})


def test_a_resumed_run_does_not_report_the_new_default_of_config_path(tmp_path: Path) -> None:
    record = {**asked(), "config_path": SHIPPED_YAML}
    (tmp_path / "args.json").write_text(json.dumps({"asked": record}), encoding="utf-8")
    assert changed_flags(tmp_path, asked()) == []
    assert changed_flags(tmp_path, asked("--flow_shift=3")) == []  # choose_shift prints that it has no effect
    (line,) = changed_flags(tmp_path, asked("--config_path=other.yaml"))
    assert line.startswith(f"--config_path was {SHIPPED_YAML} and is other.yaml")


@pytest.mark.parametrize("value", ["0", "-3", "1000", "nan", "inf", "fast", "", "AUTO"])
def test_a_value_that_is_no_shift_is_refused(value: str) -> None:
    with pytest.raises(UserError) as raised:
        asked(f"--flow_shift={value}")
    assert raised.value.exit_code == FLAGS and raised.value.where == "--flow_shift"


def test_values_of_the_flag() -> None:
    assert asked()["flow_shift"] == asked("--flow_shift=auto")["flow_shift"] == "auto"
    assert asked("--flow_shift", "3")["flow_shift"] == 3.0
