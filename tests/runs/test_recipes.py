"""Tests of config/recipes: every recipe parses, fits its card, has the figures of a fresh dry run, and trains."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import runs
import tiny

RECIPES = tiny.ROOT / "config" / "recipes"
NAMES = [(path.parent.name, path.stem) for path in sorted(RECIPES.glob("*/*.yaml"))]
FAST = {("wan2.1", "t2v-1.3b-lora-24gb"), ("hunyuanvideo", "t2v-lora-80gb")}  # wan2.2 has the sizes of wan2.1
CASES = [pytest.param(*case, marks=() if case in FAST else pytest.mark.slow) for case in NAMES]
COMMENT = ("# For: ", "# Needs: ", "# Change first: ", "# Launch: ", "# Dry run: ")
# the small models of the tests take the recipe's settings at sizes that a processor trains in seconds
SMALL = {
    "video_sample_size": 64, "image_sample_size": 64, "token_sample_size": 64, "video_sample_n_frames": 9,
    "video_sample_fps": 8, "max_train_steps": 1, "lr_warmup_steps": 1, "dataloader_num_workers": 0, "report_to": "none", "report_seconds": 0,
}  # fmt: skip
MODELS = {
    ("wan2.1", "t2v"): tiny.build_wan_t2v, ("wan2.1", "i2v"): tiny.build_wan_i2v,
    ("wan2.2", "t2v"): tiny.build_wan22_t2v, ("wan2.2", "i2v"): tiny.build_wan22_i2v,
    ("wan2.2", "ti2"): tiny.build_wan22_5b,
    ("hunyuanvideo", "t2v"): tiny.build_hunyuan_t2v, ("hunyuanvideo", "i2v"): tiny.build_hunyuan_i2v,
}  # fmt: skip


@pytest.fixture(scope="module")
def recipes() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recipes", tiny.ROOT / "benchmarks" / "recipes.py")
    assert spec is not None and spec.loader is not None
    sys.modules["recipes"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["recipes"])
    return sys.modules["recipes"]


def figures() -> dict[str, Any]:
    return json.loads((RECIPES / "figures.json").read_text(encoding="utf-8"))["recipes"]


@pytest.mark.parametrize(("family", "name"), NAMES)
def test_a_recipe_parses_and_says_whom_it_is_for(family: str, name: str, recipes: ModuleType) -> None:
    args = runs.train_script(family).parse_args(
        ["--recipe", name, "--train_data_meta=meta.json", f"--output_dir=out/{name}"]
    )
    assert args.recipe == name and args.mixed_precision == "bf16" and args.gpu and args.dry_run_model
    fps = 24 if name.startswith("ti2v") else {"wan2.1": 16, "wan2.2": 16, "hunyuanvideo": 24}[family]
    assert args.video_sample_fps == fps
    path = RECIPES / family / f"{name}.yaml"
    lines = path.read_text(encoding="utf-8").splitlines()[: len(COMMENT)]
    assert all(line.startswith(start) for line, start in zip(lines, COMMENT, strict=True))
    row = figures()[family][name]
    assert lines[-1] == f"# Dry run: {recipes.line_of(row)}"
    assert lines[0] == f"# For: {row['what']}."
    assert f"scripts/{family}/train.py" in lines[3]


def test_every_recipe_fits_its_card_with_a_margin() -> None:
    rows = figures()
    assert {(family, name) for family in rows for name in rows[family]} == set(NAMES)
    tight = [name for family in rows for name, row in rows[family].items() if row["gib"] > 0.95 * row["card_gib"]]
    assert not tight


@pytest.mark.parametrize(("family", "name"), CASES)
def test_the_figures_are_those_of_a_fresh_dry_run(family: str, name: str, recipes: ModuleType, tmp_path: Path) -> None:
    assert recipes.figures(family, name, tmp_path) == figures()[family][name]
    report = json.loads((tmp_path / "plan_report.json").read_text(encoding="utf-8"))
    readme = (tiny.ROOT / "README.md").read_text(encoding="utf-8")
    if row := re.search(rf"\| `{re.escape(name)}` \| [\d.]+ \| (\d+) \|", readme):
        assert round(report["host"] / 1e9) == int(row[1])


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), CASES)
def test_a_recipe_trains_a_small_model(family: str, name: str, tmp_path: Path) -> None:
    model, data = tmp_path / "model", tmp_path / "data"
    MODELS[family, name[:3]](model)
    tiny.make_dataset(data)
    paths = {
        "recipe": name, "pretrained_model_name_or_path": model, "train_data_meta": data / "metadata.json",
        "output_dir": tmp_path / "out", "latent_cache": tmp_path / "cache",
    }  # fmt: skip
    outcome = runs.train(runs.to_argv({**paths, **SMALL}), runs.train_script(family))
    assert outcome.code == 0, outcome.stderr
    weights = "pytorch_lora_weights*.safetensors" if "lora" in name else "transformer/config.json"
    assert [*(tmp_path / "out").glob(weights)]
