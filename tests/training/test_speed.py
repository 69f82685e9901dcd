"""Tests of videox.training.speed: combinations of flags that are refused before anything is loaded."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import runs
import torch

from videox.distributed.backends import BACKENDS
from videox.errors import UserError
from videox.models import attention_backend, base_precision
from videox.training import speed
from videox.training.speed_flags import check_backend_flags

PATHS = ["--pretrained_model_name_or_path", "model", "--train_data_meta", "metadata.json"]

STREAMED = ["--lora_rank=4", "--gradient_checkpointing"]
TRAINED = ["--optimizer=adamw_offload", "--gradient_checkpointing"]


@pytest.mark.parametrize(
    ("flags", "backend", "message"),
    [
        (["--compile"], "zero3", "--compile: zero3 gathers the weights inside of the blocks"),
        (["--gradient_checkpointing", "--gradient_checkpointing_keep=attention"], "zero3", "--gradient_checkpointing_keep: attention: zero3"),
        (["--lora_rank=4", "--lora_type=dora"], "zero3", "--lora_type: dora: peft reads a layer's weights after ZeRO-3"),
        (["--deterministic", "--attention_backend=flash"], "single", "--attention_backend: flash: only torch's own kernels"),
        (["--attention_backend=flahs"], "single", "--attention_backend: flahs"),
        ([*STREAMED, "--stream_blocks=all"], "zero2", "--stream_blocks: zero2 stores the weights in its own way"),
        ([*TRAINED, "--stream_blocks=all"], "ddp", "--stream_blocks: ddp reduces gradients on the GPUs"),
        ([*TRAINED, "--stream_blocks=all"], "fsdp2", "--stream_blocks: fsdp2 stores the weights in its own way"),
        ([*STREAMED, "--base_precision=fp8"], "fsdp2", "--base_precision: fp8: fsdp2 stores the frozen weights"),
    ],
)  # fmt: skip
def test_a_combination_that_cannot_work_is_refused(flags: list[str], backend: str, message: str) -> None:
    args = runs.train_script().parse_args([*PATHS, *flags])
    with pytest.raises(UserError, match=re.escape(message)):
        check_backend_flags(args, BACKENDS[backend], half=True)


@pytest.mark.parametrize("backend", ["single", "ddp", "zero2", "fsdp1", "fsdp2"])
def test_the_flags_work_elsewhere(backend: str) -> None:
    args = runs.train_script().parse_args(
        [*PATHS, "--compile", "--lora_rank=4", "--lora_type=dora", "--deterministic"]
    )
    check_backend_flags(args, BACKENDS[backend], half=True)


@pytest.mark.parametrize("backend", ["single", "ddp"])
def test_small_cards_are_trained_on_by_one_process_and_ddp(backend: str) -> None:
    words = [*PATHS, *STREAMED, "--offload_activations", "--stream_blocks=3", "--base_precision=int8"]
    args = runs.train_script().parse_args(words)
    check_backend_flags(args, BACKENDS[backend], half=True)
    with pytest.raises(UserError, match="--base_precision: int8: quantised weights are computed with in bfloat16"):
        check_backend_flags(args, BACKENDS[backend], half=False)


def test_trained_blocks_are_streamed_in_one_process() -> None:
    args = runs.train_script().parse_args([*PATHS, *TRAINED, "--stream_blocks=all", "--use_ema", "--ema_device=cpu"])
    check_backend_flags(args, BACKENDS["single"], half=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_text_encoder_may_be_quantised_in_every_training_in_bfloat16(backend: str) -> None:
    args = runs.train_script().parse_args([*PATHS, "--text_encoder_precision=nf4"])
    check_backend_flags(args, BACKENDS[backend], half=True)
    with pytest.raises(UserError, match="--text_encoder_precision: nf4: quantised weights are computed with in"):
        check_backend_flags(args, BACKENDS[backend], half=False)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gradient_checkpointing", "--stream_blocks=all"], "--stream_blocks: all: weights that are trained stay in host memory, and adamw steps on the GPU. Fix: use --optimizer adamw_offload or adamw_bf16_offload, or add --lora_rank."),
        ([*TRAINED, "--stream_blocks=all", "--use_ema"], "--stream_blocks: all: weights that are trained stay in host memory, and their EMA is on the GPU. Fix: add --ema_device cpu"),
        ([TRAINED[0], "--stream_blocks=4"], "--stream_blocks: 4: a streamed block has to be recomputed"),
        (["--lora_rank=4", "--stream_blocks=all"], "--stream_blocks: all: a streamed block has to be recomputed"),
        ([*STREAMED, "--stream_blocks=auto", "--compile"], "--stream_blocks: compiled blocks cannot be streamed"),
        ([*STREAMED, "--stream_blocks=2"], "at least 3 blocks, since 2 streamed blocks are on the GPU at a time"),
        ([*STREAMED, "--stream_blocks=some"], "auto, all, or at least 3 blocks"),
        (["--base_precision=nf4"], "--base_precision: nf4: only frozen weights are quantised"),
        ([*STREAMED, "--lora_type=dora", "--base_precision=int8"], "--base_precision: int8: a DoRA needs the norms"),
        ([*STREAMED, "--compile", "--base_precision=int8"], "--base_precision: int8: quantised blocks cannot be compiled"),
    ],
)  # fmt: skip
def test_flags_of_small_cards_that_contradict_others_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(UserError) as raised:
        runs.train_script().parse_args([*PATHS, *flags])
    assert message in str(raised.value)


@pytest.mark.parametrize(("precision", "package"), [("fp8", "torchao"), ("int8", "torchao"), ("nf4", "bitsandbytes")])
def test_a_package_that_is_missing_is_named_with_its_version(
    precision: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_precision, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=f"{precision} needs {package}, which is not installed. Fix: pip install {package}=="
    ):
        runs.train_script().parse_args([*PATHS, *STREAMED, f"--base_precision={precision}"])
    with pytest.raises(UserError, match=f"--text_encoder_precision: {precision} needs {package}"):
        runs.train_script().parse_args([*PATHS, f"--text_encoder_precision={precision}"])


# ------------------------------------------------------------------------------------------------ attention kernel


def on_ranks(work: Callable[[int, Callable[[Any], list[Any]]], Any], world: int = 2) -> list[Any]:
    """Return what `work` returns on each rank, all at once; it gets its rank, and a function that gathers."""
    barrier, slots = threading.Barrier(world, timeout=60), [None] * world

    def run(rank: int) -> Any:
        def gather(value: Any) -> list[Any]:
            slots[rank] = value
            barrier.wait()
            found = list(slots)
            barrier.wait()
            return found

        return work(rank, gather)

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(run, range(world)))


def test_the_main_process_measures_the_attention_kernel_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    printed: list[str] = []

    def fastest(small: Any, large: Any, candidates: Any) -> tuple[str, dict[str, float]]:
        measured.append(large.shape.tokens)
        return "_native_math", {"_native_math": 0.001, "native": 0.002}

    one_at_a_time, check = threading.Lock(), attention_backend.check_backend

    def checked(*arguments: Any) -> str:
        with one_at_a_time:  # the kernels that torch may use are a setting of the whole process
            return check(*arguments)

    monkeypatch.setattr(attention_backend, "fastest_backend", fastest)
    monkeypatch.setattr(attention_backend, "check_backend", checked)
    config = SimpleNamespace(num_attention_heads=2, attention_head_dim=16)
    schedule = SimpleNamespace(plan=SimpleNamespace(bucket_tokens=lambda: [100, 900]))

    def choose(rank: int, gather: Callable[[Any], list[Any]]) -> str:
        ctx: Any = SimpleNamespace(
            device=torch.device("cpu"), accelerator=SimpleNamespace(mixed_precision="no"), checkpoint=None,
            is_main=rank == 0, gather=gather, print=lambda *lines: printed.extend(lines if rank == 0 else ()),
        )  # fmt: skip
        args: Any = SimpleNamespace(attention_backend="auto")
        return speed.choose_attention(args, ctx, schedule, SimpleNamespace(config=config))  # type: ignore[arg-type]

    assert on_ranks(choose) == ["_native_math"] * 2
    assert measured == [900], "the other ranks do not measure: each could find another kernel"
    assert "native_math 1 ms, native 2 ms" in printed[0] and printed[1] == "attention  native_math"
