"""Tests of --dry_run, --explain and --try_largest_first: they report what a run does, and change nothing else."""

from __future__ import annotations

import json
import re
import resource
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import tiny
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from videox.data.index.index import Index, MediaColumns
from videox.data.plan.balance import PlanBalance
from videox.data.plan.buckets import CROP_RATIOS, SizePolicy, crop_share, exact_sides
from videox.data.plan.plan import largest_bucket, plan_epoch
from videox.data.plan.settings import PlanColumns, PlanSettings
from videox.errors import DOES_NOT_FIT, FLAGS, STORAGE
from videox.estimate.data_report import crop_lines
from videox.estimate.flops import cross_attention_network
from videox.estimate.gpus import GPUS
from videox.estimate.memory import MemorySetup, Parameters
from videox.estimate.mfu import peak_of
from videox.estimate.peak_memory import peak_bytes
from videox.estimate.rates import rates_of
from videox.estimate.report import balance_lines
from videox.estimate.step_time import StepModel
from videox.shapes import token_count
from videox.tracking.jsonl import read_lines

KEYS = {
    "seconds", "step_parts", "mfu", "disk", "gpu_memory", "host", "host_memory",
    "rows", "fates", "attributes", "cropped", "buckets", "global_batch", "steps_per_epoch", "tokens_per_step",
    "flops_per_step", "balance", "balance_unplanned", "mix", "memory",
}  # fmt: skip
ATTRIBUTES = {"repeated", "clipped", "cropped", "upscaled"}
WORLDS = {"1", "8", "64", "512"}
QUICK = {"mixed_precision": "no", "gradient_checkpointing": None, "tokenizer_max_length": 16, "max_train_steps": 3}


def rows_with_sizes(metadata: Path) -> list[dict[str, Any]]:
    """Return the rows of a data set with width, height, num_frames and fps added, so that no file must be probed."""
    columns = {name: {"width": w, "height": h, "num_frames": n, "fps": fps} for name, w, h, n, fps in tiny.DATASET}
    rows = json.loads(metadata.read_text(encoding="utf-8"))
    return [{**row, **columns[row["file_path"]]} for row in rows]


class PlanSetup:
    """A tiny model and clips; and a model folder without weights and metadata without clips, enough for planning."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = tiny.build_wan_t2v(folder / "model")
        self.metadata = tiny.make_dataset(folder / "data", copies=2)
        self.bare = folder / "bare"
        shutil.copytree(self.model, self.bare, ignore=shutil.ignore_patterns("*.safetensors"))
        self.table = folder / "metadata_only" / "metadata.json"
        self.table.parent.mkdir()
        self.table.write_text(json.dumps(rows_with_sizes(self.metadata)), encoding="utf-8")

    def dry_run(self, name: str, code: int = 0, **changes: object) -> tuple[runs.Outcome, dict[str, Any]]:
        """Run --dry_run, which ends with this exit code; return the outcome and plan_report.json."""
        flags = {"dry_run": True, "dry_run_backend": "ddp", "dry_run_processes": 2, **changes}
        outcome = runs.train(runs.wan_flags(self.bare, self.table, self.folder / name, **flags))
        assert outcome.code == code, outcome.stderr
        path = outcome.folder / "plan_report.json"
        return outcome, json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> PlanSetup:
    return PlanSetup(tmp_path_factory.mktemp("dry"))


# ------------------------------------------------------------------------------------------------------------- dry run


def test_a_dry_run_needs_neither_weights_nor_media(setup: PlanSetup) -> None:
    assert not list(setup.bare.rglob("*.safetensors")) and len(list(setup.table.parent.iterdir())) == 1
    outcome, report = setup.dry_run("bare-plan")
    assert set(report) == KEYS
    assert sum(report["fates"].values()) == report["rows"] == len(json.loads(setup.table.read_text()))
    assert set(report["attributes"]) == ATTRIBUTES
    assert all(set(report[name]) == WORLDS for name in ("balance", "balance_unplanned", "mix"))
    assert 0 <= report["cropped"]["median"] <= report["cropped"]["p95"] <= report["cropped"]["max"] < 1
    tokens = sum(bucket["tokens"] * bucket["rows"] for bucket in report["buckets"])
    assert report["tokens_per_step"] * report["steps_per_epoch"] == pytest.approx(tokens)
    assert report["global_batch"] == 2
    written = {path.name for path in outcome.folder.iterdir()}
    assert written == {"plan_report.json", "plan_report.png"}
    assert "fits in 80 GiB" in outcome.stdout and "nothing is trained" in outcome.stdout
    for word in (
        "remainders:", " on 2 GPUs (", "GB per checkpoint", "unplanned", "host memory per machine",
        "the model was trained at 16 fps",
    ):  # fmt: skip
        assert word in outcome.stdout


@pytest.mark.slow
def test_absolute_paths_without_a_data_folder_are_planned(setup: PlanSetup, tmp_path: Path) -> None:
    """VideoX-Fun's DATASET_NAME="": the paths of the list say where the files are."""
    listed = tmp_path / "metadata.json"
    rows = [
        {**row, "file_path": str(setup.metadata.parent / row["file_path"])} for row in rows_with_sizes(setup.metadata)
    ]
    listed.write_text(json.dumps(rows), encoding="utf-8")

    def plan(data_dir: Path | str | None) -> runs.Outcome:
        flags = runs.wan_flags(setup.bare, listed, tmp_path / "out", dry_run=True, train_data_dir=data_dir)
        return runs.train(flags)

    for data_dir in ("", None, setup.metadata.parent):
        outcome = plan(data_dir)
        assert outcome.code == 0 and f"{len(rows)} rows, {len(rows)} usable" in outcome.stdout, outcome.stderr
    refused = plan(tmp_path)
    assert refused.code == 3 and "outside of train_data_dir" in refused.stderr


def test_a_plan_file_is_what_a_run_trains(setup: PlanSetup) -> None:
    steps = {**QUICK, "gradient_accumulation_steps": 2, "dry_run_processes": 1}
    outcome, report = setup.dry_run("plan-1", **steps, dry_run_plan=[1, 2])
    flags = {name: value for name, value in steps.items() if not name.startswith("dry_run")}
    trained = runs.train(runs.wan_flags(setup.model, setup.metadata, setup.folder / "trained", **flags))
    assert trained.code == 0, trained.stderr
    planned = read_lines(outcome.folder / "plan-1.jsonl")
    assert report["steps_per_epoch"] == planned[-1]["step"]
    for record in trained.metrics:
        of_step = [line for line in planned if line["step"] == record["step"]]
        assert [line["row"] for line in of_step] == record["rows"]
        assert [[line["frames"], line["height"], line["width"]] for line in of_step] == record["buckets"]
    two = read_lines(outcome.folder / "plan-2.jsonl")
    assert sorted(line["row"] for line in two) == sorted(line["row"] for line in planned)
    assert {line["rank"] for line in two} == {0, 1}


def test_a_dry_run_does_not_touch_a_running_folder(setup: PlanSetup) -> None:
    folder = setup.folder / "running"
    folder.mkdir()
    (folder / "run_status.json").write_text('{"state": "running"}', encoding="utf-8")
    (folder / "run.lock").write_text("held", encoding="utf-8")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    setup.dry_run("running")
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_only_files_without_sizes_in_the_metadata_are_probed(setup: PlanSetup, tmp_path: Path) -> None:
    rows = rows_with_sizes(setup.metadata)
    del rows[0]["width"]
    metadata = setup.metadata.parent / "one_incomplete.json"
    metadata.write_text(json.dumps(rows[:3]), encoding="utf-8")
    flags = runs.wan_flags(setup.bare, metadata, tmp_path / "out", dry_run=True)
    outcome = runs.train(flags)
    assert outcome.code == 0 and "of 1 file are not known yet" in outcome.stdout, outcome.stderr


@pytest.mark.slow
def test_a_memory_limit_that_is_too_small_is_reported(setup: PlanSetup) -> None:
    outcome, report = setup.dry_run("tight", DOES_NOT_FIT, gpu_memory=1.0)
    assert "does not fit in 1 GiB" in outcome.stdout and report["memory"]["total"] > 2**30
    fast, _ = setup.dry_run("fast", assumed_mfu=0.5, peak_tflops=100)
    assert "50% of 100 TFLOP/s" in fast.stdout


EXPERT_RECIPE = "--recipe t2v-a14b-lora-24gb --dry_run --dry_run_data 200x5s@24fps:1280x720"


def test_two_experts_are_planned_together(tmp_path: Path) -> None:
    words = [*EXPERT_RECIPE.split(), "--output_dir", str(tmp_path)]
    outcome = runs.train([*words, "--expert", "both", "--gpu_price", "2"], runs.train_script("wan2.2"))
    assert outcome.code == 0, outcome.stderr
    report = json.loads((tmp_path / "plan_report.json").read_text(encoding="utf-8"))
    seconds, together = report["seconds"], report["together"]
    assert report["runs"] == ["high_noise", "low_noise"]
    assert together["seconds"] == pytest.approx(
        2 * seconds["run"] - seconds["encoding"], rel=1e-3
    )  # one cache for both
    # of the first run two checkpoints, and of the second one more while it is written
    assert together["disk"] == pytest.approx(report["disk"] * 5 / 3, rel=1e-3)
    title = "2 runs, high_noise then low_noise; all above is of one of them:"
    assert f"{title}\n  together: {together['seconds'] / 3600:.1f} hours on 1 GPU" in outcome.stdout
    assert "at 2 per GPU hour); the second run reads the latent cache of the first\n" in outcome.stdout
    one = runs.train(words, runs.train_script("wan2.2"))
    assert one.code == 0 and "together" not in json.loads((tmp_path / "plan_report.json").read_text(encoding="utf-8"))


def test_the_other_expert_is_part_of_the_host_memory_of_a_run_with_samples(tmp_path: Path) -> None:
    words = [*EXPERT_RECIPE.split(), "--output_dir", str(tmp_path)]
    samples, line = (
        ["--validation_prompts", "a fox"],
        "too little for the other expert: the run would make no sample clips",
    )
    for limit, fits in ((80, True), (50, False)):
        found = runs.train([*words, *samples, "--host_memory", str(limit)], runs.train_script("wan2.2"))
        assert found.code == 0, found.stderr
        assert "other expert 26.6 GiB" in found.stdout  # 14,288,491,584 parameters in bf16
        assert (line in found.stdout, "without --validation_prompts" in found.stdout) == (not fits, not fits)
    # less host memory is proposed by flags that the GPU has room for
    assert "--base_precision" in found.stdout and "without --stream_blocks" not in found.stdout
    large = runs.train([*words, *samples, "--host_memory", "50", "--gpu_memory", "400"], runs.train_script("wan2.2"))
    assert "without --stream_blocks" in large.stdout
    without = runs.train([*words, "--host_memory", "50"], runs.train_script("wan2.2"))
    assert without.code == 0 and "other expert" not in without.stdout


def test_host_memory_is_judged(tmp_path: Path) -> None:
    """That of this machine without an effect on the exit code; that of --host_memory as the GPU's is."""
    words = "--dry_run --dry_run_model wan2.1-t2v-14b --dry_run_data 20x5s@24fps:1280x720 --mixed_precision bf16 --gpu_memory 400"
    words += f" --lora_rank 16 --gradient_checkpointing --stream_blocks all --low_vram --output_dir {tmp_path}"
    here = runs.train(words.split())
    assert here.code == 0 and "GiB (of this machine, --host_memory states another)" in here.stdout, here.stderr
    enough = runs.train([*words.split(), "--host_memory", "128"])
    assert enough.code == 0 and " GiB: within 128 GiB (of --host_memory), " in enough.stdout
    small = runs.train([*words.split(), "--host_memory", "24"])
    report = json.loads((tmp_path / "plan_report.json").read_text())
    assert small.code == DOES_NOT_FIT and report["host"] > report["host_memory"] == 24 * 2**30
    too_much = (report["host"] - report["host_memory"]) / 2**30
    assert f" GiB: more than 24 GiB (of --host_memory), {too_much:.1f} GiB too much" in small.stdout
    lines = small.stdout.splitlines()
    # each change that is printed gives what it says
    for flags in ("--base_precision int8", "--text_encoder_precision int8"):
        (size,) = [line.split()[-2] for line in lines if line.startswith(f"    {flags} ")]
        changed = runs.train([*words.split(), "--host_memory", "128", *flags.split()])
        report = json.loads((tmp_path / "plan_report.json").read_text())
        assert changed.code == 0 and size == f"{report['host'] / 2**30:.1f}"


def test_a_published_model_and_described_data_need_no_files(tmp_path: Path) -> None:
    words = "--dry_run --dry_run_model wan2.1-t2v-1.3b --dry_run_data 20x5s@24fps:1280x720 4:1024x1024 --mixed_precision bf16"
    words += f" --gpu rtx4090 --gpu_price 0.5 --max_train_steps 100 --checkpointing_steps 10 --output_dir {tmp_path}"
    outcome = runs.train(words.split())
    assert outcome.code == DOES_NOT_FIT, outcome.stderr
    for text in ("20 videos", "4 images", "does not fit in 24 GiB", "--gradient_checkpointing", "at 0.5 per GPU hour"):
        assert text in outcome.stdout, text
    assert "because" not in outcome.stdout
    named = runs.train([*words.split(), "--pretrained_model_name_or_path", "studio/ours"])
    assert (
        "model wan2.1-t2v-1.3b (--dry_run_model), because studio/ours is not a folder on this machine" in named.stdout
    )
    report = json.loads((tmp_path / "plan_report.json").read_text())
    assert report["gpu_memory"] == 24 * 2**30 and report["seconds"]["run"] > 100 * report["seconds"]["step"]
    assert report["disk"] == 10 * report["memory"]["checkpoint"]
    # the proposed flags, applied together, fit
    lines = outcome.stdout.splitlines()
    first = next(number for number, line in enumerate(lines) if "the cheapest changes first" in line)
    flags = [line.strip().split("  ")[0] for line in lines[first + 1 :] if line.strip().startswith("--")]
    fitting = runs.train([*words.split(), *" ".join(flags).replace(" DIR", f" {tmp_path}/cache").split()])
    assert fitting.code == 0 and "fits in 24 GiB" in fitting.stdout, (flags, fitting.stdout)


def planned(tmp_path: Path, words: str) -> tuple[str, dict[str, Any]]:
    """Plan Wan2.1 14B at 81 frames of 480p on eight GPUs; return what is printed, and plan_report.json."""
    model = "--dry_run --dry_run_model wan2.1-t2v-14b --dry_run_data 20x6s@16fps:832x480 --mixed_precision bf16"
    model += " --fix_sample_size 480 832 --enable_bucket --video_sample_n_frames 81 --video_sample_stride 1 --low_vram"
    model += " --train_batch_size 1 --dry_run_backend fsdp2 --dry_run_processes 8"
    outcome = runs.train([*model.split(), *words.split(), "--output_dir", str(tmp_path)])
    assert outcome.code in (0, DOES_NOT_FIT), outcome.stderr
    return outcome.stdout, json.loads((tmp_path / "plan_report.json").read_text())


def test_the_printed_step_is_the_computed_one(setup: PlanSetup) -> None:
    """The step of the report, of the printed lines and of the module are the same; so are hours, MFU and price."""
    flags = {"gpu": "h100", "gpu_price": 3600.0, "max_train_steps": 100, "mixed_precision": "bf16"}
    flags |= {"gradient_checkpointing": None, "tokenizer_max_length": 16, "dry_run_backend": "single"}
    outcome, report = setup.dry_run("computed", dry_run_processes=1, **flags)
    found = re.search(r"step, computed, not measured: (\S+) s, and (\S+) s of encoding; MFU (\S+)%", outcome.stdout)
    step, encoding, mfu = (float(value) for value in found.groups())
    assert step == pytest.approx(report["seconds"]["step"], rel=0.01)
    assert sum(report["step_parts"].values()) == pytest.approx(report["seconds"]["step"], rel=0.01)
    assert encoding == pytest.approx(report["seconds"]["encoding"] / report["steps_per_epoch"], rel=0.01)
    assert report["seconds"]["run"] == pytest.approx(100 * (step + encoding), rel=0.02)
    assert mfu == pytest.approx(100 * report["flops_per_step"] / report["seconds"]["step"] / 989e12, abs=0.06)
    price = float(re.search(r"run of .*, ([\d,.]+) at 3600 per GPU hour", outcome.stdout)[1])  # one per second
    assert price == pytest.approx(report["seconds"]["run"], rel=0.02)

    config = json.loads((setup.bare / "transformer" / "config.json").read_text(encoding="utf-8"))
    network = cross_attention_network(config, text_tokens=16, image_tokens=0, half=True)
    with torch.device("meta"):
        model = WanTransformer3DModel.from_config(config)
    total = sum(p.numel() for p in model.parameters())
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    parameters = Parameters(total, total, blocks[0], total - sum(blocks))
    alone = MemorySetup("single", 1, 1, True, 0.0, True, 0, 1, 1, {})
    computed = StepModel(network, parameters, alone, rates_of(GPUS["h100"], "h100"))
    micro = [  # every micro-batch of this plan has one sample
        computed.micro_batch(1, bucket["tokens"], ()).total() * bucket["rows"] for bucket in report["buckets"]
    ]
    steps = report["steps_per_epoch"]
    expected = sum(micro) / steps + computed.optimizer_step(0).total()
    assert report["seconds"]["step"] == pytest.approx(expected, rel=1e-3)


def test_further_flags_are_listed_with_what_they_give(tmp_path: Path) -> None:
    words = "--dry_run --dry_run_model wan2.1-t2v-1.3b --dry_run_data 20x6s@16fps:832x480 --mixed_precision bf16 --gpu h100"
    words += " --fix_sample_size 480 832 --enable_bucket --video_sample_n_frames 81 --video_sample_stride 1"
    words += f" --train_batch_size 1 --gradient_checkpointing --output_dir {tmp_path}"
    outcome = runs.train(words.split())
    assert outcome.code == 0, outcome.stderr
    lines = outcome.stdout.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("what each further flag would give"))
    found = dict(re.findall(r"^  (--.+?) +([+-][\d.]+) s", "\n".join(lines[first:]), re.MULTILINE))
    assert set(found) == {
        "--gradient_checkpointing_keep attention", "--gradient_checkpointing_keep self_attention", "--offload_activations",
        "--compile", "--attention_backend flash3", "--latent_cache DIR --cache_variants 1", "--low_vram", "--vae_dtype bf16",
    }  # fmt: skip
    saved = {name: -float(seconds) for name, seconds in found.items()}
    assert (
        saved["--compile"] > 0.1 and saved["--gradient_checkpointing_keep attention"] > 0.3 and saved["--low_vram"] < 0
    )
    report = json.loads((tmp_path / "plan_report.json").read_text())
    kept = runs.train([*words.split(), "--gradient_checkpointing_keep", "attention"])
    faster = json.loads((tmp_path / "plan_report.json").read_text())
    difference = report["seconds"]["step"] - faster["seconds"]["step"]
    assert difference == pytest.approx(saved["--gradient_checkpointing_keep attention"], rel=0.02)
    assert "--gradient_checkpointing_keep" not in kept.stdout.partition("what each further flag would give")[2]


@pytest.mark.slow
def test_kept_and_offloaded_activations_are_planned(tmp_path: Path) -> None:
    recompute = "--gradient_checkpointing --gpu h100 "
    full, kept, moved = (
        planned(tmp_path, recompute + more)
        for more in ("", "--gradient_checkpointing_keep self_attention", "--offload_activations")
    )
    activations = [report["memory"]["activations"] / 2**30 for _, report in (full, kept, moved)]
    assert activations[1] - activations[0] == pytest.approx(39 * 32_760 * (5120 * 2 + 160) / 2**30, abs=0.1)
    assert activations[0] - activations[2] == pytest.approx(36 * 32_760 * 5120 * 2 / 2**30, abs=0.1)
    again = [float(re.search(r"([\d.]+) PFLOP of recomputation", text)[1]) for text, _ in (full, kept, moved)]
    assert again[1] == pytest.approx((785 + 14) / (785 + 893) * again[0], rel=0.02) and again[2] == again[0]
    assert "offloaded activations 156.0" in moved[0]  # eight processes with 39 buffers of 512 MiB


@pytest.mark.slow
def test_the_choice_of_activation_memory_is_planned(tmp_path: Path) -> None:
    lines = {gib: planned(tmp_path, f"--activation_memory auto --gpu_memory {gib}")[0] for gib in (640, 100, 70)}
    found = {gib: next(line for line in text.splitlines() if "1 x 81x480x832" in line) for gib, text in lines.items()}
    assert "recompute nothing" in found[640] and "keep" in found[100] and "recompute all blocks: " in found[70]
    assert "activation memory, chosen for 100.0 GiB:" in lines[100]


def test_flags_that_a_backend_cannot_have_are_refused_by_a_dry_run(setup: PlanSetup, tmp_path: Path) -> None:
    for changes, words in (
        ({"compile": True, "dry_run_backend": "zero3"}, "zero3 gathers the weights inside of the blocks"),
        ({"attention_backend": "flash7"}, "flash7 is not a backend of diffusers"),
    ):
        flags = {"dry_run": True, "dry_run_backend": "ddp", "dry_run_processes": 2, **changes}
        outcome = runs.train(runs.wan_flags(setup.bare, setup.table, tmp_path, **flags))
        assert outcome.code == FLAGS and words in outcome.stderr and outcome.stderr.count("\n") == 1


def test_estimated_memory_depends_on_the_backend(setup: PlanSetup) -> None:
    two, three = (setup.dry_run(name, dry_run_backend=name)[1]["memory"] for name in ("zero2", "zero3"))
    assert three["weights"] == two["weights"] // 2 and three["masters"] == two["masters"]
    assert three["checkpoint"] < two["checkpoint"]


@pytest.mark.slow
def test_a_lora_and_a_bf16_optimizer_need_less_memory_than_full_training(setup: PlanSetup) -> None:
    full, lora, bf16_optimizer = (
        setup.dry_run(name, mixed_precision="bf16", **flags)[1]
        for name, flags in (("full", {}), ("lora", {"lora_rank": 4}), ("bf16_optimizer", {"optimizer": "adamw_bf16"}))
    )
    outcome = runs.train(
        runs.wan_flags(setup.model, setup.metadata, setup.folder / "adapted", lora_rank=4, max_train_steps=2)
    )
    assert outcome.code == 0, outcome.stderr
    adapters = next((outcome.folder / "checkpoint-2").rglob("pytorch_lora_weights.safetensors"))
    trained = sum(tensor.numel() for tensor in load_file(adapters).values())
    parameters = full["memory"]["gradients"] // 4
    found = lora["memory"]
    assert (found["gradients"], found["optimizer"]) == (4 * trained, 8 * trained)
    assert found["weights"] == 2 * parameters + 4 * trained and found["checkpoint"] == 12 * trained
    assert lora["flops_per_step"] < 0.85 * full["flops_per_step"]
    assert [bf16_optimizer["memory"][name] // parameters for name in ("weights", "gradients", "optimizer")] == [
        2,
        2,
        8,
    ]
    refused = runs.train(runs.wan_flags(setup.bare, setup.table, setup.folder / "no", dry_run=True, optimizer="came",
                                        dry_run_backend="fsdp2", dry_run_processes=2))  # fmt: skip
    assert refused.code == FLAGS and "came does not work under fsdp2" in refused.stderr


def test_videos_trained_as_one_frame_are_named(setup: PlanSetup, tmp_path: Path) -> None:
    rows = rows_with_sizes(setup.metadata)
    shortest = min(row["num_frames"] for row in rows if row.get("type") == "video" or row["file_path"].endswith("mp4"))
    outcome, _ = setup.dry_run("stills", video_sample_stride=shortest)
    assert (
        "videos are trained as a single frame, too short for more at this stride or frame rate: rows "
        in outcome.stdout
    )
    assert "as a single frame" not in setup.dry_run("moving")[0].stdout
    refused = runs.train(runs.wan_flags(setup.bare, setup.table, tmp_path / "out", dry_run=True, validation_rows=99))
    assert "lower --validation_rows" in refused.stderr


def test_an_output_folder_that_cannot_be_written_is_a_one_line_error(setup: PlanSetup, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    refused = runs.train(runs.wan_flags(setup.bare, setup.table, tmp_path / "file" / "out", dry_run=True))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20 * 1024, limits[1]))  # plotting fails as on a full disk
    try:
        full = runs.train(runs.wan_flags(setup.bare, setup.table, tmp_path / "full", dry_run=True))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    for outcome, folder in ((refused, "file/out"), (full, "full")):
        line = outcome.stderr.strip().splitlines()[-1]
        assert outcome.code == STORAGE and "Traceback" not in outcome.stderr
        assert line.startswith(f"error: {tmp_path / folder}: the plan cannot be written (")
    assert [path.name for path in full.folder.iterdir()] == ["plan_report.json"]


def test_impossible_launches_are_refused(setup: PlanSetup, tmp_path: Path) -> None:
    def refused(**flags: object) -> str:
        outcome = runs.train(runs.wan_flags(setup.bare, setup.table, tmp_path / "out", dry_run=True, **flags))
        assert outcome.code == FLAGS, outcome.stderr
        return outcome.stderr

    assert "single is one process, but 8 are planned" in refused(dry_run_backend="single", dry_run_processes=8)
    assert "65537 is outside 1 to 65536" in refused(dry_run_processes=65537)
    assert "65537 is outside 1 to 65536" in refused(dry_run_plan=[8, 65537])


@pytest.mark.slow
def test_the_unplanned_balance_needs_a_full_step(setup: PlanSetup) -> None:
    outcome, report = setup.dry_run("few", dry_run_processes=4)
    samples = sum(bucket["rows"] for bucket in report["buckets"])
    table = outcome.stdout.partition("balance by number of processes:")[2]
    assert "balance" not in setup.dry_run("alone", dry_run_processes=1)[0].stdout  # one process waits for no other
    lines = [line.split() for line in table.splitlines()]
    for world in WORLDS:
        value = report["balance_unplanned"][world]
        assert (value is None) == (int(world) > samples)
        row = next(line for line in lines if line[:1] == [world])
        assert row[3] == ("n/a" if value is None else f"{value:.3f}")
        assert int(row[1]) == -(-samples // int(world))
    padded = 1 - samples / 512
    assert f"{padded:.0%} on 512" in outcome.stdout


def test_a_step_variance_ratio_above_its_bound_is_explained() -> None:
    settings = PlanSettings(SizePolicy(video_sample_size=64, image_sample_size=64), batch_size=1, slots=4, seed=0)
    few = {8: PlanBalance(0.5, None, 4.57, 7, 0.01), 64: PlanBalance(0.9, 0.5, 3.9, 70, 0.0)}
    assert "mix above 4: too few steps (7 on 8 processes)" in "\n".join(balance_lines(few, settings))
    assert "too few" not in "\n".join(balance_lines(few, replace(settings, balance="strict")))


@pytest.mark.slow
def test_a_cost_filled_step_is_reported_by_its_mean_batch(setup: PlanSetup) -> None:
    fixed, filled = (setup.dry_run(fill, slot_fill=fill) for fill in ("fixed", "cost"))
    for _, report in (fixed, filled):
        samples = sum(bucket["rows"] for bucket in report["buckets"])
        assert abs(report["global_batch"] * report["steps_per_epoch"] - samples) <= report["steps_per_epoch"]
    assert f"global batch {filled[1]['global_batch']} on average, in 2 slots" in filled[0].stdout
    assert "global batch 2, " in fixed[0].stdout


# ------------------------------------------------------------------------------------------------------------- explain


def test_explain_shows_a_row_as_it_is_trained(setup: PlanSetup) -> None:
    outcome, report = setup.dry_run("explained", explain=0, num_train_epochs=3)
    assert not report and "wide_long" in outcome.stdout and not list(outcome.folder.iterdir())
    plan, _ = setup.dry_run("whole", dry_run_plan=[2])
    line = next(line for line in read_lines(plan.folder / "plan-2.jsonl") if line["row"] == 0)
    explained = next(text for text in outcome.stdout.splitlines() if text.split()[:1] == ["0"])
    assert f"{line['frames']} x {line['height']} x {line['width']}" in explained
    assert f" {line['clip_start']} " in explained
    short, _ = setup.dry_run("short", explain=2, enable_bucket=None, random_hw_adapt=None, video_sample_n_frames=41,
                           training_with_video_token_length=None)  # fmt: skip
    assert "too_short" in short.stdout and "--video_sample_stride 2" in short.stdout
    table = rows_with_sizes(setup.metadata)
    table[0]["text"] = 7
    table[1] |= {"width": 10**9, "height": 720}
    setup.table.with_name("refused.json").write_text(json.dumps(table), encoding="utf-8")
    for row, message in ((0, "kind and size unknown"), (1, "too_large (1000000000x720 is above 64 Mpx)")):
        flags = runs.wan_flags(setup.bare, setup.table.with_name("refused.json"), setup.folder / "no", explain=row)
        assert message in runs.train(flags).stdout
    missing = runs.train(runs.wan_flags(setup.bare, setup.table, setup.folder / "missing", explain=999))
    assert missing.code == FLAGS and "rows 0 to" in missing.stderr


# ---------------------------------------------------------------------------------------------------------- size rules


@given(
    st.integers(64, 4096), st.integers(64, 4096), st.sampled_from([256, 512, 640, 960, 1024]),
)  # fmt: skip
def test_the_exact_grid_crops_little_and_keeps_the_pixel_budget(height: int, width: int, target: int) -> None:
    high, wide = (int(side[0]) for side in exact_sides(np.array([height]), np.array([width]), np.array([target])))
    assert high % 16 == wide % 16 == 0 and min(high, wide) >= 16
    assert high * wide <= max(target, 256) ** 2
    if target >= 512 and max(height, width) <= 8 * min(height, width):
        assert crop_share(height, width, high, wide) <= (0.013 if target > 512 else 1 - (31 / 32) ** 0.5 + 1e-9)
        assert high * wide >= 0.5 * target**2


columns_of = st.lists(
    st.tuples(st.booleans(), st.integers(64, 2000), st.integers(64, 2000), st.integers(1, 300)), min_size=1, max_size=8
)


@settings(max_examples=30)
@given(columns_of, st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_no_epoch_has_a_larger_bucket_than_largest_bucket(
    rows: list[tuple[bool, int, int, int]], token_length: bool, adapt: bool, crop: bool, ratio: bool
) -> None:
    policy = SizePolicy(
        video_sample_size=256, image_sample_size=640, token_sample_size=512, n_frames=33, stride=2, enable_bucket=True,
        random_hw_adapt=adapt, token_length=token_length, random_frame_crop=crop, random_ratio_crop=ratio,
    )  # fmt: skip
    kind, height, width, frames = (np.array(column) for column in zip(*rows, strict=True))
    columns = PlanColumns(kind.astype(np.uint8), width, height, np.where(kind, frames, 1), np.ones(len(rows), bool))
    run = PlanSettings(policy, batch_size=1, slots=1, seed=0)
    largest = largest_bucket(columns, run)
    for epoch in range(12):
        plan = plan_epoch(columns, run, epoch)
        assert max(map(token_count, plan.buckets)) <= token_count(largest)
    assert len(CROP_RATIOS) == 15


def test_peak_bytes_on_meta_equal_those_with_data() -> None:
    vae = AutoencoderKLWan(base_dim=8).eval()
    with torch.device("meta"):
        empty = AutoencoderKLWan(base_dim=8).eval()
    clip = torch.zeros(1, 3, 9, 32, 48)
    real = peak_bytes(lambda: vae.encode(clip).latent_dist.mode())
    assert peak_bytes(lambda: empty.encode(clip.to("meta")).latent_dist.mode()) == pytest.approx(real, rel=0.02)


def test_peak_flops_are_found_by_gpu_name() -> None:
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA H200": 989e12, "Some GPU": None}
    assert {name: peak_of(name) for name in names} == names
    assert peak_of("NVIDIA H100 PCIe") == GPUS["h100-pcie"].bf16


# ------------------------------------------------------------------ trying the largest micro-batch, out of memory, MFU


def test_trying_the_largest_first_changes_nothing(setup: PlanSetup) -> None:
    def run(name: str, **changes: object) -> runs.Outcome:
        flags = {**QUICK, "checkpointing_steps": 3, **changes}
        outcome = runs.train(runs.wan_flags(setup.model, setup.metadata, setup.folder / name, **flags))
        assert outcome.code == 0, outcome.stderr
        return outcome

    off, on = run("off", try_largest_first="off"), run("on", try_largest_first="on")
    assert "the largest micro-batch, 1 x" in on.stdout and "the largest micro-batch" not in off.stdout
    assert "fits: the peak is not measured on a CPU (" in on.stdout and " GiB predicted)" in on.stdout
    assert "warning: all 3 checkpoints" not in on.stdout  # one checkpoint is written
    assert on.losses == off.losses
    for folder in ("transformer", "optimizer"):
        weights, expected = (outcome.weights(f"checkpoint-3/{folder}") for outcome in (on, off))
        assert weights.keys() == expected.keys() and all(
            torch.equal(weights[name], expected[name]) for name in weights
        )


def test_an_out_of_memory_error_names_bucket_phase_and_fix(setup: PlanSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(100))
    forward = WanTransformer3DModel.forward

    def out_of_memory(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(WanTransformer3DModel, "forward", out_of_memory)
    outcome = runs.train(runs.wan_flags(setup.model, setup.metadata, setup.folder / "out", **QUICK))
    bucket = read_lines(outcome.folder / "metrics.jsonl")
    assert outcome.code == outcome.status["exit_code"] == FLAGS and len(bucket) == 2
    line, estimate, *_ = outcome.stderr[outcome.stderr.index("error: ") :].splitlines()
    assert "GPU memory: out of memory (OOM) in the forward pass of the micro-batch 1 x" in line
    assert "estimate for these flags: " in estimate and "GPU: 80.0 GiB (assumed" in estimate
    assert outcome.status["error"] == line


def test_a_run_logs_its_mfu(setup: PlanSetup) -> None:
    def run(peak: float | None) -> list[Mapping[str, Any]]:
        flags = {**QUICK, "max_train_steps": 2, "peak_tflops": peak}
        outcome = runs.train(runs.wan_flags(setup.model, setup.metadata, setup.folder / f"peak-{peak}", **flags))
        assert outcome.code == 0, outcome.stderr
        return outcome.metrics

    slow, fast, unknown_gpu = run(0.001), run(0.002), run(None)
    for record in (*slow, *fast):
        assert record["mfu"] > 0 and record["planned_balance"] == 1
    assert all("mfu" not in record and record["planned_balance"] == 1 for record in unknown_gpu)


def test_a_row_that_is_cropped_much_is_named_once() -> None:
    policy = SizePolicy(video_sample_size=64, image_sample_size=64, enable_bucket=False, n_frames=5)
    media = MediaColumns(np.ones(2), np.array([640, 480]), np.array([80, 120]), np.array([99, 99]))
    index = Index.from_columns(media)
    columns = PlanColumns(index.kind, index.width, index.height, index.frames, index.usable)
    plan = plan_epoch(columns, PlanSettings(policy, batch_size=1, slots=1, seed=0, video_repeat=3), 0)
    assert len(plan.row) == 6
    assert [line.split()[1] for line in crop_lines(index, columns, plan)[1:]] == ["0", "1"]


def test_the_exact_grid_crops_less_than_the_ratio_grid() -> None:
    policy = SizePolicy(video_sample_size=512, image_sample_size=512, enable_bucket=True, n_frames=1)
    columns = PlanColumns(*(np.array([value]) for value in (0, 1000, 700, 1, True)))
    run = PlanSettings(policy, batch_size=1, slots=1, seed=0)
    ratios, exact = (
        plan_epoch(columns, replace(run, policy=replace(policy, grid=grid)), 0) for grid in ("ratios", "exact")
    )
    losses = [float(crop_share(700, 1000, plan.buckets[0].height, plan.buckets[0].width)) for plan in (ratios, exact)]
    assert losses[1] < losses[0] and losses[1] < 0.016
