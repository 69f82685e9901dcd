"""Tests of videox.training.startup: lines on flags whose effect differs from what a user may expect."""

from __future__ import annotations

import pytest
import tiny

from videox.distributed.backends import BACKENDS
from videox.training.flags import make_parser
from videox.training.notes import notes
from videox.training.startup import planned_backend_notes, recomputed

PARSER = make_parser("", modes=("normal",), recipes=tiny.ROOT / "config/recipes/wan2.1")


def lines_about(flag: str, *flags: str) -> list[str]:
    planned = ["--dry_run", "--dry_run_data", "10:512x512", "--dry_run_model", "small"]
    return [line for line in notes(PARSER.parse([*planned, *flags])) if line.startswith(flag)]


@pytest.mark.parametrize(
    ("planned", "launched", "differs"),
    [(None, "single", False), ("zero3", "single", True), ("zero3", "zero3", False), ("single", "ddp", False)],
)
def test_a_launch_under_another_backend_than_planned_is_a_warning(planned: str, launched: str, differs: bool) -> None:
    lines = planned_backend_notes(planned, BACKENDS[launched])
    assert [line.startswith(f"warning: the settings were planned for {planned}") for line in lines] == [True] * differs


def test_copies_of_the_encoders_are_named_where_each_micro_batch_waits_for_them() -> None:
    (line,) = lines_about("--low_vram", "--low_vram")
    assert "for each micro-batch" in line and "--latent_cache" in line
    assert lines_about("--low_vram") == lines_about("--low_vram", "--low_vram", "--latent_cache", "cache") == []


def test_deterministic_does_not_reach_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)
    assert lines_about("--deterministic", "--deterministic") == []
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    (line,) = lines_about("--deterministic", "--deterministic")
    assert "DeepSpeed's own kernels" in line
    assert lines_about("--deterministic") == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "no block"),
        (["--gradient_checkpointing"], "every block"),
        (["--selective_ac=0.5"], "0.5 of the blocks"),
        (["--gradient_checkpointing", "--gradient_checkpointing_keep=self_attention"], "every block, without self-attention"),
        (["--gradient_checkpointing", "--offload_activations"], "every block, inputs in host memory"),
        (["--activation_memory=auto"], "by the memory of the GPU, listed below"),
    ],
)  # fmt: skip
def test_the_start_names_what_is_recomputed(flags: list[str], words: str) -> None:
    assert (
        recomputed(PARSER.parse(["--dry_run", "--dry_run_data", "10:512x512", "--dry_run_model", "small", *flags]))
        == words
    )
