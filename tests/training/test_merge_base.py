"""Tests of videox.training.merge_base: into which weights a LoRA is merged, and what is refused."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import originals
import pytest
import runs
import torch
from networks import SMALL_WAN, build_transformer
from safetensors.torch import save_file

from videox.errors import UserError
from videox.models.component import find_component
from videox.models.configured import Component
from videox.training.merge_base import merge_source

SIZES = {**SMALL_WAN, "num_layers": 1}


def flags(base: Path | None = None, layouts: tuple[str, ...] = ("merged",)) -> argparse.Namespace:
    return argparse.Namespace(
        merge_base=None if base is None else str(base), export_layouts=list(layouts), base_precision="fp8"
    )


def write_model(folder: Path, seed: int, **sizes: Any) -> Path:
    torch.manual_seed(seed)
    build_transformer({**SIZES, **sizes}).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of two transformers, the second one also as a file in 8 bits, and others."""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "model/transformer", 0)
    write_model(folder / "model/transformer_2", 1)
    write_model(folder / "deeper", 1, num_layers=2)
    state = originals.rebuilt(runs.read_weights(folder / "model/transformer_2"), "wan")
    in_8_bits = {name: v.to(torch.float8_e4m3fn) if v.ndim == 2 else v for name, v in state.items()}
    save_file(in_8_bits, folder / "fp8.safetensors")
    return folder


@pytest.fixture
def trained(models: Path) -> Component:
    return find_component(models / "fp8.safetensors", "wan", dict(build_transformer(SIZES).config))


def test_the_transformer_that_the_weights_were_made_of_is_found(models: Path, trained: Component) -> None:
    low = models / "model/transformer_2"
    assert merge_source(flags(models / "model"), trained) == low == merge_source(flags(low), trained)
    assert merge_source(flags(layouts=("diffusers",)), trained) is None
    own = find_component(low, "wan")
    assert merge_source(flags(), own) is None


def refusal(trained: Component, base: Path | None) -> str:
    with pytest.raises(UserError) as refused:
        merge_source(flags(base), trained)
    return refused.value.line()


def test_other_weights_are_refused(models: Path, trained: Component) -> None:
    assert "has 8-bit weights, which the merged model would have, too. Fix: pass --merge_base" in refusal(
        trained, None
    )
    assert "is another model than" in refusal(trained, models / "model/transformer")
    assert "fp8.safetensors has 8-bit weights" in refusal(trained, models / "fp8.safetensors")
    assert "blocks.1." in refusal(trained, models / "deeper")
    assert "--merge_base: " in refusal(trained, models / "missing")


def test_a_base_that_nothing_is_merged_into_is_refused() -> None:
    with pytest.raises(
        UserError, match="--merge_base: has no effect: nothing is merged without --export_layouts merged"
    ):
        runs.train_script().parse_args(
            ["--pretrained_model_name_or_path=m", "--train_data_dir=d", "--train_data_meta=d.json", "--train_mode=normal",
             "--lora_rank=4", "--merge_base=m"]
        )  # fmt: skip
