"""Rehearsals of the train scripts on a fake GPU (fake_cuda.py): devices, waits, dtypes and warnings, without a GPU."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import runs
import tiny
import torch
from rehearsals import STEPS, Rehearsals, Report, skip_unless_possible

from videox.tracking.jsonl import read_lines

MODES = [
    ("wan2.1", "normal"),
    ("wan2.1", "i2v"),
    ("wan2.1", "inpaint"),
    ("hunyuanvideo", "normal"),
    ("hunyuanvideo", "i2v"),
]
FEATURES: Mapping[str, Mapping[str, object]] = {
    "plain": {},
    "LoRA": {"lora_rank": 4},
    "EMA": {"use_ema": True},
    "cache": {"cached": True},
    "validation": {"validation_rows": 1, "low_vram": True},
    "streamed": {"lora_rank": 4, "stream_blocks": "all", "offload_activations": True},
    "quantised": {"lora_rank": 4, "base_precision": "int8", "stream_blocks": "all"},
    "trained": {"optimizer": "adamw_offload", "stream_blocks": "all", "gradient_accumulation_steps": 2},
}
BACKENDS = ("fsdp2", "zero2", "zero3")
# Together they touch every mode, feature and backend.
SHORT = [
    ("wan2.1", "normal", "", "validation"),
    ("wan2.1", "i2v", "zero3", "EMA"),
    ("wan2.1", "inpaint", "zero2", "LoRA"),
    ("hunyuanvideo", "normal", "fsdp2", "plain"),
    ("hunyuanvideo", "i2v", "", "cache"),
    ("hunyuanvideo", "normal", "", "streamed"),  # four blocks, of two shapes
    ("hunyuanvideo", "normal", "", "quantised"),
    ("hunyuanvideo", "normal", "", "trained"),
]
FAST = SHORT[3:4]  # the others take half a minute each, and more with sample clips

BF16 = "bfloat16 bfloat16 bfloat16"  # of query, key and value

# Where a step may wait for the GPU, and why: functions of videox and scripts, or of a library that calls none of them.
KNOWN_WAITS: Mapping[str, str] = {
    "videox/families/wan.py encode_captions": "without a cache: the pipeline copies token ids and mask to the GPU",
    "videox/families/wan.py encode_first_frames": "without a cache: the image processor's output is on the host",
    "videox/encoders/vae.py to_images": "without a cache: the image processor's input is on the host",
    "videox/encoders/hunyuan_text.py encode_text": "without a cache: the pipeline reads positions of tokens",
    "videox/encoders/hunyuan_text.py encode_pooled": "without a cache: the pipeline copies token ids to the GPU",
    "videox/encoders/hunyuan_text.py trim_text": "without a cache: the number of tokens decides the shape",
    "videox/engine/deepspeed.py DeepSpeedEngine.update": "DeepSpeed reads overflow and gradient norm in its step",
    "videox/engine/deepspeed.py _BoundedNorms._bounded": "as above: it calls the method of DeepSpeed that computes the norm",
    "videox/distributed/replicas.py ReplicaCheck.compare": "DDP, ZeRO-2: sums of the weights, after the first step and every 100",
    "videox/distributed/collectives.py backward": "DeepSpeed waits for its reductions at the end of backward",
    "videox/engine/deepspeed.py DeepSpeedEngine.fp32_params": "ZeRO-3: DeepSpeed waits for the stream of its reductions, which ended in the step before, for each weight of an EMA",
    "videox/models/trained_stream.py GradientStream.wait": "the host steps on gradients that have to be in its memory",
    "videox/engine/streamed.py StreamedEngine.update": "as above: the host clips by the global norm, and decides whether to step",
    "videox/optim/build.py step_if": "an optimizer in host memory: the host decides whether to step",
    "videox/optim/cpu_offload.py CpuOffloadOptimizer._step_batch": "as above, for weights outside the streamed blocks",
    "deepspeed/accelerator/cuda_accelerator.py CUDA_Accelerator.synchronize": "as above, in a hook of the backward pass",
}

# Warnings that users cannot act on, and why they appear.
KNOWN_WARNINGS: Mapping[str, str] = {
    "Accessing the data pointer of FakeTensor": "only here: DeepSpeed checks the alignment of memory that does not exist",
    "`torch.distributed.all_gather_into_tensor` is deprecated": "DeepSpeed calls it; on a GPU, too",
    "`torch.distributed.reduce_scatter_tensor` is deprecated": "as above",
}


@pytest.fixture(scope="module")
def rehearsals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rehearsals]:
    skip_unless_possible()
    made = Rehearsals(tmp_path_factory.mktemp("rehearsals"))
    yield made
    made.close()


def flags_of(family: str, mode: str, feature: str = "plain") -> dict[str, object]:
    flags = dict(FEATURES[feature])
    if (family, mode) == ("hunyuanvideo", "i2v"):  # the number of text tokens depends on values, which are not there
        flags["cached"] = True
    if feature == "validation" and mode == "normal":  # a clip from an image is sampled at steps that depend on values
        flags["validation_prompts"] = ["a red fox"]
    return flags


def unexpected_waits(report: Report) -> list[str]:
    """Return the waits of all steps but the last, which ends with validation, save and export, that are not known."""
    found = []
    for step, what, own, inner, count in report.waits:
        file, _, function = (own or inner).partition(" ")
        place = f"{file.rpartition(':')[0]} {function.partition('.<locals>')[0]}"
        if 0 < step < STEPS and place not in KNOWN_WAITS:
            found.append(f"step {step}: {count} x {what} at {own} in {inner}")
    return found


def unexpected_warnings(report: Report) -> list[str]:
    lines = [line for line in report.output.splitlines() if re.search(r"^\[W\d|WARNING|Warning:|no sample at", line)]
    return [line for line in (*report.warnings, *lines) if not any(part in line for part in KNOWN_WARNINGS)]


def assert_sound(report: Report) -> None:
    assert report.failure == "" and report.code == 0, report.failure + report.output[-4000:]
    assert report.errors == []
    assert report.steps == STEPS
    assert unexpected_waits(report) == []
    assert unexpected_warnings(report) == []
    attention = [call for call in report.attention if call[0] == "block"]
    assert attention
    assert {dtypes for _, dtypes, *_ in report.attention} == {BF16}
    assert all(contiguous for _, _, contiguous, *_ in report.attention)
    assert not any(masked for *_, masked, _ in attention)  # micro-batches of one sample: all text is real


def assert_visible(report: Report) -> None:
    """The start prints what runs, and each step records its parts, memory and share of the GPU's FLOPs."""
    facts = {name: value for name, _, value in (line.partition("  ") for line in report.output.splitlines())}
    assert facts["GPU"].strip() == "NVIDIA H100 80GB HBM3, 80.0 GiB"
    assert facts["versions"].strip().startswith(f"torch {torch.__version__}")
    assert {"attention", "recompute", "compile", "encoders"} <= facts.keys()
    assert re.search(r"GPU memory so far: peak .* allocated, .* reserved; predicted [\d.]+ GiB", report.output)
    for record in read_lines(report.folder / "metrics.jsonl"):
        parts = [record[f"{part}_seconds"] for part in ("forward", "backward", "optimizer")]
        assert (
            all(seconds > 0 for seconds in parts) and sum(parts) + record["encode_seconds"] <= record["step_seconds"]
        )
        assert record["data_wait"] >= 0 and record["mfu"] > 0 and record["predicted_gib"] > 0
        assert {"peak_allocated_gib", "peak_reserved_gib"} <= record.keys()


@pytest.mark.parametrize(
    ("family", "mode", "backend", "feature"),
    [run if run in FAST else pytest.param(*run, marks=pytest.mark.slow) for run in SHORT],
)
def test_short_rehearsal(rehearsals: Rehearsals, family: str, mode: str, backend: str, feature: str) -> None:
    report = rehearsals.run(family, mode, backend, **flags_of(family, mode, feature))
    assert_sound(report)
    assert_visible(report)
    assert backend or report.races == []  # the waits of sharding backends are not all known to the fake GPU


def test_short_rehearsals_touch_every_axis() -> None:
    families, modes, backends, features = zip(*SHORT, strict=True)
    assert set(zip(families, modes, strict=True)) == set(MODES)
    assert set(backends) == {"", *BACKENDS}
    assert set(features) == set(FEATURES)


@pytest.mark.slow
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize(("family", "mode"), MODES)
def test_every_feature_in_every_mode(rehearsals: Rehearsals, family: str, mode: str, feature: str) -> None:
    report = rehearsals.run(family, mode, **flags_of(family, mode, feature))
    assert_sound(report)
    assert report.races == []


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("family", "mode"), MODES)
def test_rank_0_of_every_sharded_backend(rehearsals: Rehearsals, family: str, mode: str, backend: str) -> None:
    assert_sound(rehearsals.run(family, mode, backend, **flags_of(family, mode)))


# ------------------------------------------------------------------------------------------- mutants

MUTANTS = {
    "wrong device": (
        "sigmas = to_device(build.sigmas_of_batch(args, batch, wan.shift), device)",
        "sigmas = build.sigmas_of_batch(args, batch, wan.shift)",
    ),
    "wait in the loop": (
        "report = loop.agree(",
        "loss.total.item(); report = loop.agree(",
    ),
}


# Changes of a module before the run, and what is then found. Each removes one wait.
WAITS = {
    "copy is not waited for": "WeightCopies.wait = lambda self: None",
    "copy does not wait": (
        "WeightCopies.start = lambda self, target, source: "
        "[self.stream.__enter__(), target.copy_(source, non_blocking=True), self.stream.__exit__()]"
    ),
}


def mutant(name: str, folder: Path) -> Path:
    """Return a copy of Wan2.1's train script with one change, next to the configuration that it reads."""
    source = (tiny.ROOT / runs.WAN_SCRIPT).read_text(encoding="utf-8")
    before, after = MUTANTS[name]
    assert source.count(before) == 1
    script = folder / runs.WAN_SCRIPT
    script.parent.mkdir(parents=True)
    script.write_text(source.replace(before, after), encoding="utf-8")
    (folder / "config").symlink_to(tiny.ROOT / "config")
    return script


@pytest.mark.slow
def test_a_tensor_on_the_wrong_device_is_found(rehearsals: Rehearsals, tmp_path: Path) -> None:
    report = rehearsals.run("wan2.1", "normal", cached=True, script=mutant("wrong device", tmp_path))
    assert report.code != 0
    (error,) = report.errors
    assert "cuda:0" in error and "cpu" in error


@pytest.mark.slow
def test_a_wait_in_the_loop_is_found(rehearsals: Rehearsals, tmp_path: Path) -> None:
    report = rehearsals.run("wan2.1", "normal", cached=True, script=mutant("wait in the loop", tmp_path))
    assert report.code == 0, report.failure
    found = unexpected_waits(report)
    assert len(found) == STEPS - 1
    assert all("a value at scripts/wan2.1/train.py:" in wait and wait.endswith(" train") for wait in found)


@pytest.mark.slow
@pytest.mark.parametrize("change", WAITS)
def test_a_wait_of_streamed_blocks_that_is_removed_is_found(
    rehearsals: Rehearsals, tmp_path: Path, change: str
) -> None:
    """A copy that the block does not wait for is read too early; one that does not wait replaces what is in use."""
    script = tmp_path / runs.TRAIN_SCRIPTS["hunyuanvideo"]
    script.parent.mkdir(parents=True)
    source = (tiny.ROOT / runs.TRAIN_SCRIPTS["hunyuanvideo"]).read_text(encoding="utf-8")
    before = "\n\ndef main("
    assert source.count(before) == 1
    removed = f"\n\nfrom videox.models.streamed_blocks import WeightCopies\n{WAITS[change]}\n"
    script.write_text(source.replace(before, removed + before), encoding="utf-8")
    (tmp_path / "config").symlink_to(tiny.ROOT / "config")
    flags = {**flags_of("hunyuanvideo", "normal", "streamed"), "cached": True, "offload_activations": None}
    report = rehearsals.run("hunyuanvideo", "normal", script=script, **flags)
    assert report.code == 0, report.failure
    expected = "copy_.default writes" if change == "copy does not wait" else "reads"
    assert report.races and all("step" in race for race in report.races)
    assert any(expected in race for race in report.races)
