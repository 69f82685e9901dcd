"""Tests of videox.training.speed: combinations of flags that are refused before anything is loaded."""

from __future__ import annotations

import re

import pytest
import runs

from videox.distributed.backends import BACKENDS
from videox.errors import UserError
from videox.training.speed_flags import check_backend_flags

PATHS = ["--pretrained_model_name_or_path", "model", "--train_data_meta", "metadata.json"]


@pytest.mark.parametrize(
    ("flags", "backend", "message"),
    [
        (["--compile"], "zero3", "--compile: zero3 gathers the weights inside of the blocks"),
        (["--gradient_checkpointing", "--gradient_checkpointing_keep=attention"], "zero3", "--gradient_checkpointing_keep: attention: zero3"),
        (["--lora_rank=4", "--lora_type=dora"], "zero3", "--lora_type: dora: peft reads a layer's weights after ZeRO-3"),
        (["--deterministic", "--attention_backend=flash"], "single", "--attention_backend: flash: only torch's own kernels"),
        (["--attention_backend=flahs"], "single", "--attention_backend: flahs"),
    ],
)  # fmt: skip
def test_a_combination_that_cannot_work_is_refused(flags: list[str], backend: str, message: str) -> None:
    args = runs.train_script().parse_args([*PATHS, *flags])
    with pytest.raises(UserError, match=re.escape(message)):
        check_backend_flags(args, BACKENDS[backend])


@pytest.mark.parametrize("backend", ["single", "ddp", "zero2", "fsdp1", "fsdp2"])
def test_the_flags_work_elsewhere(backend: str) -> None:
    args = runs.train_script().parse_args(
        [*PATHS, "--compile", "--lora_rank=4", "--lora_type=dora", "--deterministic"]
    )
    check_backend_flags(args, BACKENDS[backend])
