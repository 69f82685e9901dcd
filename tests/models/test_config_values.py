"""Tests of videox.models.config_values: wrong types and absurd numbers in a model's configuration are named."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import runs
import tiny

from videox.errors import MODEL, UserError
from videox.models.component import CLASS_NAMES
from videox.models.config_values import value_fault

EVIL = [None, -1, 2**31, 1e308, "text", [], {}, [1, "2"], True, float("nan"), "x" * 10_000]
NOT_JSON = [
    "",
    "[",
    "null",
    "3",
    '"x"',
    "[1]",
    "[" * 100_000 + "]" * 100_000,
    '{"a":' + "[" * 5_000 + "]" * 5_000 + "}",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_wan_t2v(tmp_path_factory.mktemp("model") / "model")


@pytest.mark.parametrize(
    ("kind", "changes", "fault"),
    [
        ("wan", {"num_layers": 2**31}, "num_layers is 2147483648, expected a whole number from 0 to 10,000,000"),
        ("wan", {"in_channels": []}, "in_channels is [], expected a whole number from 0 to 10,000,000"),
        (
            "wan",
            {"patch_size": [1, 2.5, 2]},
            "patch_size is [1, 2.5, 2], expected a list of a whole number from 0 to 10,000,000",
        ),
        ("wan", {"eps": float("nan")}, "eps is nan, expected a number"),
        ("wan", {"image_dim": "1280"}, "image_dim is '1280', expected a whole number from 0 to 10,000,000 or null"),
        ("wan_vae", {"is_residual": "no"}, "is_residual is 'no', expected true or false"),
        ("hunyuan", {"num_layers": True}, "num_layers is True, expected a whole number from 0 to 10,000,000"),
        ("wan", {"num_layers": 40, "unknown_to_the_class": {}, "image_dim": None, "eps": 1}, ""),
    ],
)
def test_the_first_value_of_another_type_is_named(kind: str, changes: dict[str, object], fault: str) -> None:
    assert value_fault(getattr(diffusers, CLASS_NAMES[kind]), changes) == fault


def test_the_values_of_the_published_models_fit() -> None:
    configs = [
        json.loads(path.read_text(encoding="utf-8")) for path in (tiny.ROOT / "config" / "models").rglob("*.json")
    ]
    named = [part for config in configs for part in config["components"].values()]
    known = [part for part in named if part.get("_class_name") in CLASS_NAMES.values()]
    assert len(known) == len(list((tiny.ROOT / "config" / "models").glob("*.json")))  # a transformer each
    assert [value_fault(getattr(diffusers, part["_class_name"]), part) for part in known] == [""] * len(known)


@pytest.mark.parametrize("name", ["transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"])
def test_a_damaged_configuration_is_one_line_with_file_and_key(model: Path, tmp_path: Path, name: str) -> None:
    script = runs.train_script()
    args = script.parse_args(runs.wan_flags(model, tmp_path / "metadata.json", tmp_path / "out"))
    path = model / name
    sound = path.read_text(encoding="utf-8")
    config = json.loads(sound)
    mutants = {json.dumps(config | {key: EVIL[(at + len(key)) % len(EVIL)]}): key for at, key in enumerate(config)}
    refused = 0
    try:
        for text, key in {**mutants, **dict.fromkeys(NOT_JSON, "")}.items():
            path.write_text(text, encoding="utf-8")
            try:
                script.describe(args, script.check_model(args))
            except UserError as error:
                assert error.exit_code == MODEL and name.partition("/")[0] in error.where, error.line()
                assert key in error.what or name.startswith("scheduler"), error.line()
                refused += 1
        assert refused >= len(NOT_JSON)
    finally:
        path.write_text(sound, encoding="utf-8")
