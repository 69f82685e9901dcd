"""Tests of scripts/wan2.1/train.py: the published command, one training step recomputed, bad samples, error lines."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import runs
import tiny
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from forkserver import TIMING_KEYS
from PIL import Image
from safetensors.torch import load_file, save_file

from videox.data.plan.buckets import Fate
from videox.tracking.jsonl import read_lines
from videox.training import data as data_pipeline

METRICS_KEYS = {
    "step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "data_wait", "planned_balance", "step_seconds",
    "encode_seconds", "forward_seconds", "backward_seconds", "optimizer_seconds", "rows", "buckets",
}  # fmt: skip
FLOAT32 = {"mixed_precision": "no", "gradient_checkpointing": None}
LR, CLIP = 2e-3, 0.05  # of the published command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_wan_t2v(tmp_path_factory.mktemp("model") / "wan")


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_dataset(tmp_path_factory.mktemp("data"), copies=2)


def metrics_of(outcome: runs.Outcome) -> list[dict]:
    """Return the metrics without the measured times."""
    return [{name: value for name, value in record.items() if name not in TIMING_KEYS} for record in outcome.metrics]


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ----------------------------------------------------------------------------------------------- the published command


@pytest.fixture(scope="module")
def launched(model: Path, metadata: Path, tmp_path_factory: pytest.TempPathFactory) -> runs.Outcome:
    """The published command through accelerate launch, with two data loader workers, for two epochs."""
    argv = runs.wan_flags(
        model, metadata, tmp_path_factory.mktemp("runs") / "out",
        dataloader_num_workers=2, num_train_epochs=2, checkpointing_steps=10, report_to=None,
    )  # fmt: skip
    return runs.launch(argv, ["--mixed_precision=bf16"])


@pytest.mark.slow
def test_the_published_command_trains_to_the_end(launched: runs.Outcome, metadata: Path) -> None:
    assert launched.code == 0, launched.stderr
    rows = len(json.loads(metadata.read_text(encoding="utf-8")))
    records = launched.metrics
    assert [record["step"] for record in records] == list(range(1, 2 * rows + 1))
    assert all(record.keys() == METRICS_KEYS for record in records)
    assert all(math.isfinite(record["loss"]) and record["grad_norm"] > 0 for record in records)
    for epoch in (records[:rows], records[rows:]):
        assert sorted(row for record in epoch for row in record["rows"]) == list(range(rows))
    for record in records:
        ((frames, height, width),) = record["buckets"]
        assert record["tokens"] == ((frames - 1) // 4 + 1) * (height // 16) * (width // 16)
    status = launched.status
    assert (status["state"], status["exit_code"], status["step"], status["error"]) == ("finished", 0, 2 * rows, "")
    written = json.loads((launched.folder / "args.json").read_text(encoding="utf-8"))
    assert written["asked"]["video_sample_n_frames"] == 13
    assert (written["resolved"]["seed"], written["resolved"]["slots"], written["resolved"]["shift"]) == (42, 1, 3.0)
    assert list(launched.folder.rglob("events.out.tfevents.*"))  # the default tracker
    saved = sorted(path.name for path in launched.folder.glob("checkpoint-*"))
    assert saved == ["checkpoint-10", "checkpoint-20", f"checkpoint-{2 * rows}"]


@pytest.mark.slow
def test_diffusers_samples_with_the_export_of_the_published_command(launched: runs.Outcome, model: Path) -> None:
    transformer = WanTransformer3DModel.from_pretrained(launched.folder / "transformer")
    pipeline = WanPipeline.from_pretrained(model, transformer=transformer)
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": 48, "width": 64, "num_frames": 9, "num_inference_steps": 3, "output_type": "np"}
    frames = pipeline("a rabbit walks", generator=torch.Generator().manual_seed(0), **size).frames
    assert frames.shape == (1, 9, 48, 64, 3) and np.isfinite(frames).all()
    base = runs.read_weights(model / "transformer")
    trained = launched.weights()
    assert trained.keys() == base.keys()
    assert any(not torch.equal(trained[name].float(), base[name].bfloat16().float()) for name in base)


@pytest.mark.slow
def test_a_launched_run_equals_one_in_this_process(
    launched: runs.Outcome, model: Path, metadata: Path, tmp_path: Path
) -> None:
    argv = runs.wan_flags(model, metadata, tmp_path / "out", num_train_epochs=2, checkpointing_steps=10)
    in_process = runs.train(argv)  # decodes in this process, without workers
    assert metrics_of(in_process) == metrics_of(launched)
    assert equal(in_process.weights(), launched.weights())


# ----------------------------------------------------------------------------------------- a training step, recomputed


def run_four_steps(model: Path, metadata: Path, output_dir: Path, **changes: object) -> runs.Outcome:
    """Run four optimizer steps in float32, each of two micro-batches of two samples, and dump all of them."""
    settings = {
        **FLOAT32, "train_batch_size": 2, "gradient_accumulation_steps": 2, "max_train_steps": 4,
        "checkpointing_steps": 4, "vae_sample_mode": "mode", "dump_steps": [1, 2, 3, 4], **changes,
    }  # fmt: skip
    outcome = runs.train(runs.wan_flags(model, metadata, output_dir, **settings))
    assert outcome.code == 0, outcome.stderr
    return outcome


@pytest.fixture(scope="module")
def stepped(model: Path, metadata: Path, tmp_path_factory: pytest.TempPathFactory) -> runs.Outcome:
    return run_four_steps(model, metadata, tmp_path_factory.mktemp("stepped") / "out")


def dumps_of(outcome: runs.Outcome) -> list[list[runs.Dump]]:
    """Return the dumped micro-batches of each step."""
    steps = range(1, 1 + len(outcome.metrics))
    return [[outcome.dump(step, micro) for micro in range(2)] for step in steps]


def real_positions(dump: runs.Dump) -> list[int]:
    """Return the positions in a micro-batch that are not padding."""
    return [position for position, row in enumerate(dump.rows) if row >= 0]


def decode(path: Path, frames: list[int]) -> np.ndarray:
    """Decode a file from its first to its last frame and return the requested frames."""
    if path.suffix in (".png", ".jpg"):
        return np.array(Image.open(path).convert("RGB"))[None]
    with av.open(str(path)) as container:
        video = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    return video[frames]


def resize_and_crop(frames: np.ndarray, height: int, width: int) -> torch.Tensor:
    """Scale frames in float until they cover height x width and crop the center: float32 [T, height, width, 3]."""
    scale = max(height / frames.shape[1], width / frames.shape[2])
    size = (max(height, round(frames.shape[1] * scale)), max(width, round(frames.shape[2] * scale)))
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    scaled = torch.nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return scaled[:, :, top : top + height, left : left + width].permute(0, 2, 3, 1)


@pytest.mark.slow
def test_dumped_pixels_are_the_frames_of_the_dumped_indices(stepped: runs.Outcome, metadata: Path) -> None:
    table = json.loads(metadata.read_text(encoding="utf-8"))
    kinds = Counter()
    for dump in (dump for step in dumps_of(stepped) for dump in step):
        for position in real_positions(dump):
            row, indices = table[dump.rows[position]], dump.frame_indices[position]
            frames, height, width = dump.bucket
            assert len(indices) == frames and all(b - a == 2 for a, b in itertools.pairwise(indices))
            wanted = resize_and_crop(decode(metadata.parent / row["file_path"], indices), height, width)
            assert (dump["pixels"][position].float() - wanted).abs().max() <= 3
            assert dump.captions[position] in (row["text"], "")
            kinds[row["type"]] += 1
    assert kinds["video"] >= 3 and kinds["image"] >= 2


def test_dump_and_metrics_have_the_same_schedule(stepped: runs.Outcome) -> None:
    for record, step in zip(stepped.metrics, dumps_of(stepped), strict=True):
        assert [dump.rows[i] for dump in step for i in real_positions(dump)] == record["rows"]
        assert [dump.bucket for dump in step for _ in real_positions(dump)] == record["buckets"]
        weights = torch.cat([dump["weight"][real_positions(dump)] for dump in step])
        assert weights.tolist() == [1 / len(record["rows"])] * len(record["rows"])
        assert all(dump["weight"][i] == 0 for dump in step for i, row in enumerate(dump.rows) if row < 0)


def posterior(model: Path, dump: runs.Dump) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of the VAE posterior on dumped pixels, and latents_mean and latents_std."""
    vae = AutoencoderKLWan.from_pretrained(model / "vae").eval()
    with torch.no_grad():
        distribution = vae.encode(dump["pixels"].permute(0, 4, 1, 2, 3).float() / 255 * 2 - 1).latent_dist
    latents_mean, latents_std = (
        torch.tensor(values).view(1, 16, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return distribution.mean, distribution.std, latents_mean, latents_std


def test_dumped_latents_are_those_of_the_vae(stepped: runs.Outcome, model: Path) -> None:
    for dump in (dump for step in dumps_of(stepped) for dump in step):
        mean, _, latents_mean, latents_std = posterior(model, dump)
        assert torch.allclose(dump["latents"], (mean - latents_mean) / latents_std, rtol=0, atol=1e-5)


def test_prompt_embeddings_equal_those_of_the_pipeline(stepped: runs.Outcome, model: Path) -> None:
    pipeline = WanPipeline.from_pretrained(model, transformer=None, vae=None)
    for dump in (dump for step in dumps_of(stepped) for dump in step):
        with torch.no_grad():
            wanted, _ = pipeline.encode_prompt(
                dump.captions, do_classifier_free_guidance=False, max_sequence_length=512
            )
        assert wanted.shape[1] == 512
        assert torch.equal(dump["model.encoder_hidden_states"], wanted)
        length = len(pipeline.tokenizer(dump.captions[0])["input_ids"])
        assert not dump["model.encoder_hidden_states"][0, length:].any()


def test_sigmas_are_stratified_over_the_step_and_shifted(stepped: runs.Outcome) -> None:
    for step in dumps_of(stepped):
        sigma = torch.cat([dump["sigma"][real_positions(dump)] for dump in step]).double()
        assert torch.equal(
            torch.cat([dump["timestep"] for dump in step]), 1000 * torch.cat([d["sigma"] for d in step])
        )
        index = 1000 * (1 - sigma / (3 - 2 * sigma))  # sigma = 3 t / (1 + 2 t), t = 1 - index / 1000
        assert (index - index.round()).abs().max() < 1e-2  # one of 1000 timesteps
        grid = sorted(index.round().long().tolist())
        assert torch.allclose(sigma, 3 * (1 - index.round() / 1000) / (1 + 2 * (1 - index.round() / 1000)), atol=1e-7)
        for stratum, timestep in enumerate(grid):  # one sample in each stratum of the range
            assert 1000 * stratum / len(grid) - 1 < timestep < 1000 * (stratum + 1) / len(grid)


def key_of(*parts: int) -> int:
    """Return the RNG key of a sequence of integers: the splitmix64 finalizer, folded over them."""
    key, top = 0, 2**64
    for part in parts:
        key = (key * 0xD1342543DE82EF95 + part + 0x9E3779B97F4A7C15) % top
        key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9 % top
        key = (key ^ (key >> 27)) * 0x94D049BB133111EB % top
        key ^= key >> 31
    return key


def noise_of(key: int, shape: torch.Size) -> torch.Tensor:
    drawn = np.random.Generator(np.random.Philox(key=key)).standard_normal(tuple(shape), dtype=np.float32)
    return torch.from_numpy(drawn)


SAMPLE, POSTERIOR, NOISE = 1, 13, 14  # values of videox.rng.Purpose


def test_noise_is_normal_and_keyed_by_sample(stepped: runs.Outcome) -> None:
    pool = []
    for dump in (dump for step in dumps_of(stepped) for dump in step):
        for i in real_positions(dump):
            sample = key_of(42, 0, dump.rows[i], 0, SAMPLE)  # seed, epoch, row, copy
            assert torch.equal(dump["noise"][i], noise_of(key_of(sample, NOISE), dump["noise"][i].shape))
            pool.append(dump["noise"][i].flatten())
    values = torch.cat(pool)
    share = len(values) ** -0.5  # one standard error of the mean
    assert abs(values.mean()) < 4 * share and abs(values.std() - 1) < 4 * share
    assert abs((values.abs() < 1).float().mean() - 0.6827) < 4 * share and abs(values.pow(4).mean() - 3) < 40 * share
    starts = torch.stack([noise[:192] for noise in pool])
    assert (torch.corrcoef(starts) - torch.eye(len(starts))).abs().max() < 0.4


def test_vae_samples_are_the_mean_plus_keyed_noise(model: Path, metadata: Path, tmp_path: Path) -> None:
    outcome = run_four_steps(
        model, metadata, tmp_path / "out", vae_sample_mode="sample", max_train_steps=1, dump_steps=[1]
    )
    largest = 0.0
    for dump in dumps_of(outcome)[0]:
        mean, deviation, latents_mean, latents_std = posterior(model, dump)
        for i in real_positions(dump):
            key = key_of(key_of(42, 0, dump.rows[i], 0, SAMPLE), POSTERIOR)
            z = mean[i] + deviation[i] * noise_of(key, mean.shape[1:])
            assert torch.allclose(dump["latents"][i], ((z - latents_mean) / latents_std)[0], rtol=0, atol=1e-5)
            largest = max(
                largest, float((dump["latents"][i] - ((mean[i] - latents_mean) / latents_std)[0]).abs().max())
            )
    assert largest > 1e-3  # so the mean alone would fail this test


def test_plain_torch_trains_to_the_same_losses_and_weights(stepped: runs.Outcome, model: Path) -> None:
    for dump in (dump for step in dumps_of(stepped) for dump in step):
        sigma = dump["sigma"].view(-1, 1, 1, 1, 1)
        assert torch.equal(dump["model.hidden_states"], (1 - sigma) * dump["latents"] + sigma * dump["noise"])
        assert torch.equal(dump["target"], dump["noise"] - dump["latents"])

    transformer, losses, norms = runs.replay(model, dumps_of(stepped), warm_up=2)
    assert losses == pytest.approx(stepped.losses, abs=1e-6)
    assert norms == pytest.approx([record["grad_norm"] for record in stepped.metrics], rel=1e-5)
    assert min(norms) > 4 * CLIP  # so every step is clipped
    assert [record["lr"] for record in stepped.metrics] == pytest.approx([0, LR / 2, LR, LR], rel=1e-12)
    saved, base = stepped.weights("checkpoint-4/transformer"), runs.read_weights(model / "transformer")
    for name, tensor in transformer.state_dict().items():
        assert torch.allclose(tensor, saved[name], rtol=0, atol=1e-6), name
    assert max((saved[name] - base[name]).abs().max() for name in base) > LR  # while training moved them much more


def test_a_dump_changes_nothing(stepped: runs.Outcome, model: Path, metadata: Path, tmp_path: Path) -> None:
    without = run_four_steps(model, metadata, tmp_path / "out", dump_steps=None)
    assert not (without.folder / "dump").exists()
    assert metrics_of(without) == metrics_of(stepped)
    assert equal(without.weights("checkpoint-4/transformer"), stepped.weights("checkpoint-4/transformer"))


# ------------------------------------------------------------------------------------------------ trainable parameters


def changed(outcome: runs.Outcome, model: Path, step: int) -> set[str]:
    """Return the names of the tensors of a checkpoint that are not bitwise equal to the base model."""
    base, now = runs.read_weights(model / "transformer"), outcome.weights(f"checkpoint-{step}/transformer")
    assert base.keys() == now.keys()
    return {name for name in base if not torch.equal(base[name], now[name])}


def test_a_dot_trains_all_parameters(stepped: runs.Outcome, model: Path) -> None:
    names = set(runs.read_weights(model / "transformer"))
    assert "scale_shift_table" in names
    assert changed(stepped, model, 4) == names


def test_trainable_modules_freeze_the_rest(model: Path, metadata: Path, tmp_path: Path) -> None:
    argv = runs.wan_flags(model, metadata, tmp_path / "out", **FLOAT32, max_train_steps=3, trainable_modules=["attn1"])
    names = set(runs.read_weights(model / "transformer"))
    assert changed(runs.train(argv), model, 3) == {name for name in names if "attn1" in name}


def test_low_learning_rate_modules_get_half_the_lr(model: Path, metadata: Path, tmp_path: Path) -> None:
    lr = 0.25  # large enough that float32 weights keep enough digits of the update
    settings = {
        **FLOAT32, "max_train_steps": 1, "lr_warmup_steps": 0, "learning_rate": lr, "adam_weight_decay": 0,
        "trainable_modules": ["attn1"], "trainable_modules_low_learning_rate": ["ffn", "attn1.to_q"],
    }  # fmt: skip
    outcome = runs.train(runs.wan_flags(model, metadata, tmp_path / "out", **settings))
    base, now = runs.read_weights(model / "transformer"), outcome.weights("checkpoint-1/transformer")
    assert changed(outcome, model, 1) == {name for name in base if "attn1" in name or "ffn" in name}
    for name in base:  # the first step of Adam is the LR itself, for any gradient
        wanted = lr * ("attn1" in name) or lr / 2 * ("ffn" in name)
        assert (now[name] - base[name]).abs().median().item() == pytest.approx(wanted, rel=1e-4), name


# ----------------------------------------------------------------------------------------------------------- one epoch


def mixed_data(folder: Path) -> Path:
    """Write 17 good rows of three lengths and four aspect ratios, and one row of each kind that cannot be trained."""
    media = [
        (f"clip-{number}.mp4", *size, frames, 24.0)
        for number, (size, frames) in enumerate(
            (size, frames) for size in ((128, 128), (160, 96), (96, 160), (144, 112)) for frames in (9, 17, 33)
        )
    ]
    images = [(f"image-{number}.png", 96 + 32 * number, 128, 0, 0.0) for number in range(5)]
    metadata = tiny.make_dataset(folder, (*media, *images))
    rows = json.loads(metadata.read_text(encoding="utf-8"))
    tiny.write_image(folder / "speck.png", 8, 8)
    rows[3:3] = [
        {"file_path": "gone.mp4", "text": "a missing file"},
        {"text": "a row without a file"},
        {"file_path": "speck.png", "text": "eight pixels"},
    ]
    metadata.write_text(json.dumps(rows), encoding="utf-8")
    return metadata


@pytest.mark.parametrize("slot_fill", [pytest.param("fixed", marks=pytest.mark.slow), "cost"])
def test_an_epoch_trains_each_row_once_and_reports_the_rest(model: Path, tmp_path: Path, slot_fill: str) -> None:
    metadata = mixed_data(tmp_path / "data")
    argv = runs.wan_flags(
        model, metadata, tmp_path / "out", train_batch_size=2, gradient_accumulation_steps=2, slot_fill=slot_fill
    )
    outcome = runs.train(argv)
    assert outcome.code == 0, outcome.stderr
    seen = [row for record in outcome.metrics for row in record["rows"]]
    assert sorted(seen) == [0, 1, 2, *range(6, 20)] and len(seen) % 2
    assert f"rows: 20 = 17 {Fate.TRAINED.name.lower()} + 1 too_small + 2 refused" in outcome.stdout
    assert all(len(record["rows"]) == len(record["buckets"]) for record in outcome.metrics)
    buckets = {tuple(bucket) for record in outcome.metrics for bucket in record["buckets"]}
    assert len({frames for frames, _, _ in buckets}) >= 3 and len({h / w for _, h, w in buckets}) >= 4
    largest = max(len(record["rows"]) for record in outcome.metrics)
    assert 2 < largest <= 4 if slot_fill == "fixed" else largest > 4  # more samples per slot where they are small


# ---------------------------------------------------------------------------------------------------------- validation

SMALL_STEPS = {**FLOAT32, "tokenizer_max_length": 16}


@pytest.mark.slow
def test_validation_is_bit_identical_while_the_lr_is_zero(model: Path, metadata: Path, tmp_path: Path) -> None:
    settings = {"learning_rate": 0, "validation_rows": 2, "validation_steps": 2, "num_train_epochs": 2}
    outcome = runs.train(runs.wan_flags(model, metadata, tmp_path / "out", **settings))
    assert outcome.code == 0, outcome.stderr
    records = outcome.validation
    assert [record["step"] for record in records] == [0, *range(2, 21, 2)]
    assert len({json.dumps([record["loss"], record["per_sigma"]]) for record in records}) == 1
    assert len(records[0]["per_sigma"]) == 4 and len({loss for _, loss in records[0]["per_sigma"]}) == 4
    trained = Counter(row for record in outcome.metrics for row in record["rows"])
    assert len(trained) == 10 and set(trained.values()) == {2}  # two of the 12 rows are held out


def test_held_out_rows_are_captioned_clips_and_named(model: Path, tmp_path: Path) -> None:
    metadata = tiny.make_dataset(tmp_path / "data", copies=2)
    table = json.loads(metadata.read_text(encoding="utf-8"))
    for row in (0, 6):
        table[row]["text"] = ""
    metadata.write_text(json.dumps(table), encoding="utf-8")
    settings = {"validation_rows": 3, "max_train_steps": 1, "video_sample_n_frames": 5, **SMALL_STEPS}
    outcome = runs.train(runs.wan_flags(model, metadata, tmp_path / "out", **settings))
    assert outcome.code == 0, outcome.stderr
    records = read_lines(outcome.folder / "held_out.jsonl")
    assert [record["set"] for record in records] == ["held_out"] * 3 + ["training"] * 3
    rows = [record["row"] for record in records]
    assert len(set(rows)) == 6 and all(table[row]["type"] == "video" and table[row]["text"] for row in rows[:3])
    assert not {row for line in outcome.metrics for row in line["rows"]} & set(rows[:3])
    assert [record["file"] for record in records] == [table[row]["file_path"] for row in rows]
    assert [record["caption"] for record in records] == [table[row]["text"] for row in rows]
    assert f"held out for validation: row {rows[0]} {records[0]['file']} (" in outcome.stdout
    first, last = outcome.validation
    assert first["train_loss"] != first["loss"] and len(last["train_per_sigma"]) == 4
    assert [sigma for sigma, _ in first["train_per_sigma"]] == [sigma for sigma, _ in first["per_sigma"]]
    assert f"training rows {last['train_loss']:.4f}; " in outcome.stdout + outcome.stderr


def test_a_list_of_its_own_is_measured_and_not_trained(model: Path, metadata: Path, tmp_path: Path) -> None:
    """--validation_meta: all of its rows that the training could use, beside as many training rows."""
    table = json.loads(metadata.read_text(encoding="utf-8"))
    clips = [row for row in table if row["type"] == "video"]
    for number in (0, 1):
        tiny.write_clip(tmp_path / f"own/{number}.mp4", frames=30, seed=100 + number)
    tiny.write_clip(tmp_path / "own/small.mp4", width=64, height=12)
    rows = [{"file_path": f"{name}.mp4", "text": f"caption {name}"} for name in (0, "small", 1)]
    listed = tmp_path / "own/list.json"
    listed.write_text(json.dumps(rows), encoding="utf-8")
    settings = {"max_train_steps": 2, "train_data_dir": None, **SMALL_STEPS}
    without = runs.train(runs.wan_flags(model, metadata, tmp_path / "without", **settings))
    outcome = runs.train(runs.wan_flags(model, metadata, tmp_path / "out", validation_meta=listed, **settings))
    assert (outcome.code, without.code) == (0, 0), outcome.stderr
    assert metrics_of(outcome) == metrics_of(without) and len(clips) > 2  # the training is the same one
    records = read_lines(outcome.folder / "held_out.jsonl")
    assert [(line["set"], line["file"], line["caption"]) for line in records[:2]] == [
        ("held_out", "0.mp4", "caption 0"), ("held_out", "1.mp4", "caption 1"),
    ]  # fmt: skip
    assert [line["set"] for line in records[2:]] == ["training"] * 2
    assert {line["file"] for line in records[2:]} <= {row["file_path"] for row in clips}
    assert "--validation_meta: 1 of its 3 rows is not measured (1 too_small)" in outcome.stdout
    assert [line["step"] for line in outcome.validation] == [0, 2] and outcome.validation[1]["train_loss"] > 0
    report = json.loads((outcome.folder / "args.json").read_text(encoding="utf-8"))["resolved"]["plan"]
    assert report["held_out_list"] and "held_out_share" not in report

    listed.write_text(json.dumps([rows[1]]), encoding="utf-8")
    refused = runs.train(runs.wan_flags(model, metadata, tmp_path / "refused", validation_meta=listed, **settings))
    assert "--validation_meta: none of its 1 row can be measured (1 too_small)" in refused.stderr


@pytest.mark.slow
def test_a_run_without_progress_ends_early(model: Path, metadata: Path, tmp_path: Path) -> None:
    settings = {"learning_rate": 0, "validation_rows": 1, "validation_steps": 1, "early_stop": 2, "max_train_steps": 9}
    outcome = runs.train(runs.wan_flags(model, metadata, tmp_path / "out", **settings))
    assert outcome.code == 0, outcome.stderr
    assert [record["step"] for record in outcome.validation] == [0, 1, 2]
    assert outcome.status["state"] == "finished" and outcome.status["step"] == len(outcome.metrics) == 2
    assert (
        "the run ends at step 2: the held-out loss has had no new minimum for 2 validations"
        in outcome.stdout + outcome.stderr
    )
    assert (outcome.folder / "checkpoint-2").is_dir() and outcome.weights()
    events = [json.loads(line) for line in (outcome.folder / "events.jsonl").read_text("utf-8").splitlines()]
    assert [(event["event"], event["step"]) for event in events] == [("launch", 0), ("early_stop", 2), ("end", 2)]


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_and_exported(model: Path, metadata: Path, tmp_path: Path) -> None:
    settings = {
        "validation_rows": 2, "validation_steps": 1, "keep_best": True, "max_train_steps": 6, "learning_rate": 0.02,
        "lr_warmup_steps": 0, "max_grad_norm": 10, "checkpointing_steps": 6, "export_dtype": "fp32", "caption_dropout": 0,
    }  # fmt: skip
    for limit in (None, 1):
        changes = {**settings, "checkpoints_total_limit": limit}
        outcome = runs.train(runs.wan_flags(model, metadata, tmp_path / f"out-{limit}", **changes))
        assert outcome.code == 0, outcome.stderr
        losses = [record["loss"] for record in outcome.validation]
        best = losses.index(min(losses))
        assert best > 0
        names = {path.name for path in outcome.folder.iterdir()}
        assert {name for name in names if name.startswith("best")} == {f"best-{best}"}
        assert {name for name in names if name.startswith("checkpoint")} == {f"checkpoint-{best}", "checkpoint-6"}
        assert equal(outcome.weights(f"best-{best}/transformer"), outcome.weights(f"checkpoint-{best}/transformer"))
        assert not [name for name in names if name.startswith(".trash")]


def test_validation_does_not_change_training(model: Path, metadata: Path, tmp_path: Path) -> None:
    settings = {"validation_rows": 2, "max_train_steps": 4}
    rarely = runs.train(runs.wan_flags(model, metadata, tmp_path / "rarely", **settings))
    prompts = {"validation_prompts": ["a rabbit walks"], "validation_steps": 2}
    often = runs.train(runs.wan_flags(model, metadata, tmp_path / "often", **settings, **prompts))
    assert metrics_of(rarely) == metrics_of(often) and equal(rarely.weights(), often.weights())
    assert [record["step"] for record in rarely.validation] == [0, 4]
    assert [record["step"] for record in often.validation] == [0, 2, 4]
    assert often.validation[0]["loss"] == rarely.validation[0]["loss"] != often.validation[2]["loss"]


@pytest.mark.slow
def test_sample_clips_have_the_frame_rate_of_the_data(model: Path, tmp_path: Path) -> None:
    clips = [(f"{fps}.mp4", 128, 128, 21, float(fps)) for fps in (12, 24, 30)]
    metadata = tiny.make_dataset(tmp_path / "data", tuple(clips))
    settings = {"validation_prompts": ["a rabbit walks", "a red ball"], "max_train_steps": 2, "validation_steps": 1}
    outcome = runs.train(
        runs.wan_flags(model, metadata, tmp_path / "out", video_sample_stride=3, image_sample_size=64, **settings)
    )
    assert outcome.code == 0, outcome.stderr
    samples = outcome.folder / "samples"
    for step in range(3):
        assert (samples / f"step-{step:06d}.png").is_file()
        for prompt in range(2):
            with av.open(str(samples / f"step-{step:06d}-prompt-{prompt}.mp4")) as container:
                stream = container.streams.video[0]
                assert float(stream.average_rate) == 24 / 3  # median of the source frame rates, every third frame
                shape = [stream.frames, stream.height, stream.width]
                assert shape in [bucket for record in outcome.metrics for bucket in record["buckets"]]


@pytest.mark.slow
def test_sample_clips_have_their_own_settings_and_interval(model: Path, metadata: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "# one a line\na cat --w 64 --h 48 --f 5 --s 1\na dog --w 48 --h 48 --f 1 --d 3\n", encoding="utf-8"
    )
    settings = {
        "validation_prompts": [prompts], "sample_every": 2, "sample_steps": 2, "sample_fps": 5, "max_train_steps": 3,
        "report_to": "tensorboard", "validation_epochs": 0, **SMALL_STEPS,
    }  # fmt: skip
    outcome = runs.train(runs.wan_flags(model, metadata, tmp_path / "out", **settings))
    assert outcome.code == 0, outcome.stderr
    records = read_lines(outcome.folder / "samples.jsonl")
    files = [f"samples/step-{step:06d}-prompt-{name}" for step in (0, 2, 3) for name in ("0.mp4", "1.png")]
    assert [record["file"] for record in records] == files
    assert all((outcome.folder / file).is_file() for file in files)
    assert {(r["width"], r["height"], r["frames"], r["fps"], r["steps"]) for r in records[::2]} == {
        (64, 48, 5, 5.0, 1)
    }
    assert {(r["width"], r["frames"], r["seed"], r["steps"]) for r in records[1::2]} == {(48, 1, 3, 2)}
    assert {r["text_tokens"] for r in records} == {16}  # as in training
    (events,) = outcome.folder.rglob("events.out.tfevents.*")
    assert b"samples/prompt-0" in events.read_bytes() and b"GIF89a" in events.read_bytes()


@pytest.mark.slow
def test_samples_that_fail_never_end_a_run(
    model: Path, metadata: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    settings = {"validation_prompts": ["a cat"], "max_train_steps": 1}
    with monkeypatch.context() as patched:  # loading the encoders, or the pipeline itself, fails
        patched.setattr(runs.train_script(), "sampling_pipeline", out_of_memory)
        outcome = runs.train(runs.wan_flags(model, metadata, tmp_path / "pipeline", **settings))
    assert outcome.code == 0 and len(outcome.metrics) == 1, outcome.stderr
    assert "warning: no samples at step 0: OutOfMemoryError: CUDA out of memory" in outcome.stdout + outcome.stderr
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "samples").write_text("a file in the way", encoding="utf-8")
    outcome = runs.train(runs.wan_flags(model, metadata, tmp_path / "file", **settings))
    assert outcome.code == 0 and "was not written" in outcome.stdout + outcome.stderr, outcome.stderr


# ------------------------------------------------------------------------------------------------------------ learning

OVERFIT = {
    **FLOAT32, "max_train_steps": 300, "learning_rate": "2e-03", "lr_warmup_steps": 10, "adam_weight_decay": 0,
    "max_grad_norm": 1.0, "video_repeat": 100, "num_train_epochs": None, "validation_rows": 1,
    "validation_steps": 10**6, "validation_epochs": 0, "caption_dropout": 0, "tokenizer_max_length": 16,
    "image_sample_size": 64, "video_sample_stride": 1, "video_sample_n_frames": 5, "checkpointing_steps": 10**6,
}  # fmt: skip


@pytest.fixture(scope="module")
def one_clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of width 96 and a data set with one clip in two rows; one row is held out.

    The output layer is zero at first, so the loss cannot fall by only making the output smaller.
    """
    folder = tmp_path_factory.mktemp("one_clip")
    model = tiny.build_wan_t2v(folder / "model", heads=4, head_dim=24, layers=2, ffn_dim=192)
    clip = tiny.moving_square(5, 64, 64)
    tiny.load_script("scripts/demo_model.py").calibrate_latents(
        model, torch.from_numpy(clip)[None].permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    )
    weights = load_file(model / "transformer/diffusion_pytorch_model.safetensors")
    for name in ("proj_out.weight", "proj_out.bias"):
        weights[name].zero_()
    save_file(weights, model / "transformer/diffusion_pytorch_model.safetensors", {"format": "pt"})
    tiny.write_clip(folder / "data" / "clip.mp4", pixels=clip)
    metadata = folder / "data" / "metadata.json"
    metadata.write_text(json.dumps([{"file_path": "clip.mp4", "text": "a bright square moves"}] * 2), "utf-8")
    return model, metadata


def loss_ratio(one_clip: tuple[Path, Path], folder: Path) -> float:
    """Return the held-out loss after 300 steps, at fixed noise, divided by that before training."""
    outcome = runs.train(runs.wan_flags(*one_clip, folder, **OVERFIT))
    assert outcome.code == 0, outcome.stderr
    first, last = outcome.validation
    assert (first["step"], last["step"]) == (0, 300)
    return last["loss"] / first["loss"]


@pytest.mark.slow
def test_one_clip_is_learned(one_clip: tuple[Path, Path], tmp_path: Path) -> None:
    ratio = loss_ratio(one_clip, tmp_path / "out")
    print(f"one clip: the held-out loss is {ratio:.3f} of step 0's")
    assert ratio <= 0.7


@pytest.mark.slow
def test_shuffled_targets_teach_nothing(
    one_clip: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the targets of training are shuffled, element by element and differently in every step.

    Using another noise for the target would not be enough: the clip is the same in every sample, so the model could
    still learn minus the clip. Shuffling keeps the mean and variance of a target, and the input has no information
    about it.
    """
    velocity_losses, generator = runs.train_script().velocity_losses, torch.Generator().manual_seed(0)

    def shuffled(prediction: torch.Tensor, target: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        elements = target.flatten(1)
        elements = elements[:, torch.randperm(elements.shape[1], generator=generator)]
        return velocity_losses(prediction, elements.view_as(target), weights)

    monkeypatch.setattr(runs.train_script(), "velocity_losses", shuffled)
    ratio = loss_ratio(one_clip, tmp_path / "out")
    print(f"shuffled targets: the held-out loss is {ratio:.3f} of step 0's")
    assert ratio > 0.9


# --------------------------------------------------------------------------------------------------------- bad samples


def damaged_run(
    model: Path,
    metadata: Path,
    output_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[], None],
    **changes,
) -> runs.Outcome:
    """Train, and damage the data after the index was built and before the first batch is read."""
    real_loader = data_pipeline.BatchLoader

    def build_then_damage(*arguments, **settings) -> object:
        loader = real_loader(*arguments, **settings)
        damage()
        return loader

    monkeypatch.setattr(data_pipeline, "BatchLoader", build_then_damage)
    return runs.train(runs.wan_flags(model, metadata, output_dir, **changes))


def corrupt_frames(path: Path) -> None:
    """Corrupt the compressed frames of an mp4, without changing its index, size and modification time."""
    stamp, content = path.stat(), bytearray(path.read_bytes())
    first, last = content.index(b"mdat") + 4, content.index(b"moov") - 4
    content[first:last] = bytes(byte ^ 0xA5 for byte in content[first:last])
    path.write_bytes(content)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


def test_files_that_become_bad_have_no_weight_and_are_left_out_later(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    media = [(f"{name}.mp4", 128, 128, 13, 24.0) for name in ("cut", "good", "gone", "fine", "other", "spoilt")]
    metadata = tiny.make_dataset(tmp_path / "data", tuple(media))
    data = metadata.parent

    def damage() -> None:
        content = (data / "cut.mp4").read_bytes()
        (data / "cut.mp4").write_bytes(content[: len(content) // 2])
        (data / "gone.mp4").unlink()
        (data / "other.mp4").write_bytes((data / "good.mp4").read_bytes())
        corrupt_frames(data / "spoilt.mp4")

    settings = {
        **FLOAT32, "train_batch_size": 3, "num_train_epochs": 2, "image_sample_size": 64, "dump_steps": [1, 2],
        "vae_mini_batch": 8,
    }  # fmt: skip
    outcome = damaged_run(model, metadata, tmp_path / "out", monkeypatch, damage, **settings)
    assert outcome.code == 0, outcome.stderr
    assert outcome.status["state"] == "finished"

    bad = {record["row"]: record for record in outcome.bad_samples}
    assert {row: record["class"] for row, record in bad.items()} == {
        0: "changed", 2: "missing", 4: "changed", 5: "undecodable",
    }  # fmt: skip
    assert len(outcome.bad_samples) == 4  # each row once
    for row, record in bad.items():
        assert record["path"] == str(data / media[row][0]) and record["detail"]
        assert record["rank"] == 0 and row in outcome.metrics[record["step"] - 1]["rows"]
    for step in (1, 2):
        dump = outcome.dump(step)
        assert dump["weight"].tolist() == [0.0 if row in bad else 1 / 3 for row in dump.rows]
        assert all(not dump["pixels"][i].any() for i, row in enumerate(dump.rows) if row in bad)
        expected = float((dump["loss"].double() * dump["weight"]).sum())
        assert outcome.metrics[step - 1]["loss"] == pytest.approx(expected, rel=1e-12)  # divided by the planned three
    first, second = outcome.metrics[:2], outcome.metrics[2:]
    assert sorted(row for record in first for row in record["rows"]) == list(range(6))
    assert all(record["rows"] and set(record["rows"]) <= {1, 3} for record in second) and second


def test_a_bad_sample_has_zero_weight(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of a step with a bad sample is the sum over its good ones, each with its planned weight."""
    media = [(f"{name}.mp4", 128, 128, 13, 24.0) for name in ("one", "two", "three", "four")]
    settings = {
        **FLOAT32, "train_batch_size": 4, "max_train_steps": 1, "image_sample_size": 64, "dump_steps": [1],
        "vae_mini_batch": 4,
    }  # fmt: skip
    metadata = tiny.make_dataset(tmp_path / "data", tuple(media))
    good = runs.train(runs.wan_flags(model, metadata, tmp_path / "good", **settings))
    remove = (metadata.parent / "three.mp4").unlink
    bad = damaged_run(model, metadata, tmp_path / "bad", monkeypatch, remove, **settings)
    (before, after), position = (good.dump(1), bad.dump(1)), good.dump(1).rows.index(2)
    assert before.rows == after.rows and after["weight"][position] == 0
    good_positions = [i for i in range(4) if i != position]
    assert torch.allclose(before["loss"][good_positions], after["loss"][good_positions], rtol=1e-6)
    assert bad.losses[0] == pytest.approx(float(before["loss"][good_positions].double().sum()) / 4, rel=1e-6)


@pytest.mark.parametrize(("allowed", "code"), [(0, 3), (1, 0)])
def test_too_many_bad_rows_end_the_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: float, code: int
) -> None:
    media = [(f"{number}.png", 64, 64, 0, 0.0) for number in range(16)]
    metadata = tiny.make_dataset(tmp_path / "data", tuple(media))

    def damage() -> None:
        for number in range(11):  # ten bad rows are always allowed
            (metadata.parent / f"{number}.png").unlink()

    settings = {"train_batch_size": 16, "image_sample_size": 64, "max_bad_fraction": allowed, "vae_mini_batch": 16}
    outcome = damaged_run(model, metadata, tmp_path / "out", monkeypatch, damage, **settings)
    assert outcome.code == code, outcome.stderr
    assert sorted(record["row"] for record in outcome.bad_samples) == list(range(11))
    assert outcome.status["exit_code"] == code
    if code:
        last = outcome.stderr.splitlines()[-1]
        assert last.startswith("error: --max_bad_fraction: 11 of 16 rows are unreadable. Fix: ")
        assert outcome.status["state"] == "failed" and outcome.status["error"] == last


@pytest.mark.slow
def test_steps_of_only_bad_samples_are_skipped(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten bad rows are always allowed, also in consecutive steps."""
    media = [(f"{number}.png", 64, 64, 0, 0.0) for number in range(12)]
    metadata = tiny.make_dataset(tmp_path / "data", tuple(media))

    def damage() -> None:
        for number in range(10):
            (metadata.parent / f"{number}.png").unlink()

    settings = {**FLOAT32, "image_sample_size": 64, "num_train_epochs": 2, "checkpointing_steps": 1}
    outcome = damaged_run(model, metadata, tmp_path / "out", monkeypatch, damage, **settings)
    assert outcome.code == 0, outcome.stderr
    assert sorted(record["row"] for record in outcome.bad_samples) == list(range(10))
    assert all(outcome.metrics[bad["step"] - 1]["rows"] == [bad["row"]] for bad in outcome.bad_samples)
    skipped = {record["step"] for record in outcome.bad_samples}
    before = runs.read_weights(model / "transformer")
    for step in range(1, 13):
        after = outcome.weights(f"checkpoint-{step}/transformer")
        assert equal(before, after) == (step in skipped or step == 1)  # the LR of the first step is 0
        before = after
    assert all(set(record["rows"]) <= {10, 11} for record in outcome.metrics[12:])


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.fixture(scope="module")
def unloadable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose transformer has only NaN weights, so a run that loads them fails with that message."""
    folder = tiny.build_wan_t2v(tmp_path_factory.mktemp("unloadable") / "wan")
    path = folder / "transformer/diffusion_pytorch_model.safetensors"
    save_file({name: tensor.fill_(math.nan) for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    return folder


def test_nonfinite_weights_are_an_error_at_load(unloadable: Path, metadata: Path, tmp_path: Path) -> None:
    outcome = runs.train(runs.wan_flags(unloadable, metadata, tmp_path / "out"))
    assert outcome.code == 4 and "values that are not finite" in outcome.status["error"]


def edit_json(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | changes), encoding="utf-8")


def image_to_video(model: Path) -> dict[str, object]:
    edit_json(model / "transformer/config.json", in_channels=36, image_dim=1280)
    return {}


def other_class(model: Path) -> dict[str, object]:
    edit_json(model / "model_index.json", _class_name="HunyuanVideoPipeline")
    return {}


def no_text_encoder(model: Path) -> dict[str, object]:
    shutil.rmtree(model / "text_encoder")
    return {}


def cut_weights(model: Path) -> dict[str, object]:
    path = model / "vae/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])
    return {}


def nameless_rows(model: Path) -> dict[str, object]:
    metadata = model.parent / "nameless.json"
    metadata.write_text(json.dumps([{"text": "a row without a file"}] * 3), encoding="utf-8")
    return {"train_data_meta": metadata, "train_data_dir": model.parent}


def empty_yaml(model: Path) -> dict[str, object]:
    (model.parent / "empty.yaml").write_text("scheduler_kwargs: {}\n", encoding="utf-8")
    return {"config_path": model.parent / "empty.yaml"}


# case: (function that makes the change, exit code, part of the error line, whether the run folder exists by then)
ERRORS = {
    "no model folder": (lambda _: {"pretrained_model_name_or_path": "no/such/folder"}, 4, "is not a local folder", True),
    "another model": (other_class, 4, "is a HunyuanVideoPipeline model. Fix: pass a WanPipeline", True),
    "incomplete model": (no_text_encoder, 4, "text_encoder: does not exist", True),
    "cut weights": (cut_weights, 4, "is truncated or damaged", True),
    "image-to-video model": (image_to_video, 4, "--train_mode normal: the transformer takes 36 channels: it is made for --train_mode i2v", True),
    "no metadata": (lambda _: {"train_data_meta": "no/such.json"}, 2, "no/such.json", True),
    "rows without a file": (nameless_rows, 3, "nameless.json: no row has file_path; columns found: 'text'", True),
    "no shift": (empty_yaml, 2, "Fix: set scheduler_kwargs.shift", True),
    "unknown tracker": (lambda _: {"report_to": "paper"}, 2, "paper", True),
    "misspelled flag": (lambda _: {"learning_rat": 1}, 2, "--learning_rat: is not a flag of this script. Fix: did you mean --learning_rate.", False),
    "abbreviated flag": (lambda _: {"max_grad": 1}, 2, "--max_grad: is not a flag", False),
    "removed flag": (lambda _: {"auto_tile_batch_size": True}, 2, "--auto_tile_batch_size: was removed. Fix: use --slot_fill cost", False),
    "value out of range": (lambda _: {"caption_dropout": 1.5}, 2, "--caption_dropout: 1.5 is outside 0 to 1", False),
    "frames": (lambda _: {"video_sample_n_frames": 14}, 2, "--video_sample_n_frames: 14 is not 4k+1. Fix: use 13 or 17", False),
    "free text for the mode": (lambda _: {"train_mode": "control"}, 2, "--train_mode: invalid choice: 'control'", False),
    "marker without launcher": (lambda _: {"use_deepspeed": True}, 2, "--use_deepspeed: the launcher does not run it", False),
    "other marker without launcher": (lambda _: {"use_fsdp": True}, 2, "--use_fsdp: the launcher does not run it", False),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_is_one_line_before_any_weight_is_loaded(
    unloadable: Path, metadata: Path, tmp_path: Path, case: str
) -> None:
    prepare, code, message, folder_open = ERRORS[case]
    model = shutil.copytree(unloadable, tmp_path / "model")
    outcome = runs.train(runs.wan_flags(model, metadata, tmp_path / "out", **prepare(model)))
    assert outcome.code == code
    lines = outcome.stderr.splitlines()
    assert len(lines) == 1, outcome.stderr
    assert lines[0].startswith("error: ") and message in lines[0] and " Fix: " in lines[0]
    if folder_open:
        status = outcome.status
        assert (status["state"], status["exit_code"], status["error"]) == ("failed", code, lines[0])
        assert status["step"] == 0
    else:
        assert not outcome.folder.exists()


def test_an_output_folder_with_a_run_is_refused_and_not_changed(
    unloadable: Path, metadata: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"step":1,"loss":0.5}\n', encoding="utf-8")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    outcome = runs.train(runs.wan_flags(unloadable, metadata, out))
    assert outcome.code == 2
    (line,) = outcome.stderr.splitlines()
    assert (
        "already contains a run" in line
        and "--resume_from_checkpoint latest" in line
        and "another --output_dir" in line
    )
    after = {path.name: path.read_bytes() for path in out.iterdir()}
    assert {name: after.get(name) for name in before} == before and "run_status.json" not in after


def test_a_row_without_a_file_does_not_end_the_run(model: Path, metadata: Path, tmp_path: Path) -> None:
    data = shutil.copytree(metadata.parent, tmp_path / "data", ignore=shutil.ignore_patterns("*.arrow"))
    rows = json.loads((data / metadata.name).read_text(encoding="utf-8"))[:4]
    (data / metadata.name).write_text(json.dumps([{"text": "no file"}, *rows]), encoding="utf-8")
    outcome = runs.train(runs.wan_flags(model, data / metadata.name, tmp_path / "out"))
    assert outcome.code == 0, outcome.stderr
    assert "rows: 5 = 4 trained + 1 refused" in outcome.stdout
    assert "1 row cannot be used: no_file_path (first: row 0" in outcome.stdout
    assert sorted(row for record in outcome.metrics for row in record["rows"]) == [1, 2, 3, 4]


@pytest.mark.slow
def test_an_error_of_a_real_process_is_one_line(unloadable: Path, metadata: Path, tmp_path: Path) -> None:
    argv = runs.wan_flags(unloadable, metadata, tmp_path / "out", pretrained_model_name_or_path="no/such/folder")
    outcome = runs.run_command([sys.executable, runs.WAN_SCRIPT, *argv], tmp_path / "out")
    assert outcome.code == 4
    assert outcome.stderr.splitlines() == [outcome.status["error"]]
