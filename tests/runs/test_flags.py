"""Serves scripts/wan2.1/train.py: every flag does something, shown on plan, tensors, weights or files, by real runs.

`shows` says which flags a test is about; the last test holds that against the parser, so that a flag without an
effect, or without a test, cannot be added.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import runs
import tiny
import torch
from accelerate import DistributedType
from diffusers import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch.overrides import TorchFunctionMode

from videox.data.index.index import load_index
from videox.data.media import decord as decord_reader
from videox.data.plan.buckets import SizePolicy
from videox.data.plan.plan import plan_epoch
from videox.data.plan.settings import PlanSettings, columns_of
from videox.engine.train_state import DEALING

SHOWN: dict[str, str] = {}  # flag -> the test here that shows its effect
# flag -> the test elsewhere that does
SHOWN_ELSEWHERE = {
    "assumed_mfu": "test_dry_run.test_a_memory_limit_that_is_too_small_is_reported",
    "bucket_grid": "test_dry_run.test_the_exact_grid_crops_less_than_the_ratio_grid",
    "dry_run": "test_dry_run.test_a_dry_run_needs_neither_weights_nor_media",
    "dry_run_backend": "test_dry_run.test_estimated_memory_depends_on_the_backend",
    "dry_run_plan": "test_dry_run.test_a_plan_file_is_what_a_run_trains",
    "dry_run_processes": "test_dry_run.test_a_dry_run_needs_neither_weights_nor_media",
    "explain": "test_dry_run.test_explain_shows_a_row_as_it_is_trained",
    "gpu_memory": "test_dry_run.test_a_memory_limit_that_is_too_small_is_reported",
    "peak_tflops": "test_dry_run.test_a_run_logs_its_mfu",
    "try_largest_first": "test_dry_run.test_trying_the_largest_first_changes_nothing",
    "cache_only": "test_cache.test_full_cache_needs_no_encoder_and_changes_nothing",
    "cache_variants": "test_plan.test_clips_and_sizes_come_again_after_so_many_epochs",
    "latent_cache": "test_cache.test_full_cache_needs_no_encoder_and_changes_nothing",
    "export_layouts": "test_export.test_a_run_writes_the_requested_layouts",
    "ema_decay": "test_ema.test_one_process_averages_its_masters",
    "ema_device": "test_ema.test_the_average_is_kept_where_it_was_asked_for",
    "use_ema": "test_ema.test_one_process_averages_its_masters",
    "validate_ema": "test_ema.test_validation_measures_the_average_and_samples_with_it",
    "init_lora_from": "test_adapters.test_a_lora_begins_with_another_whatever_its_alpha",
    "lora_alpha": "test_adapters.test_one_process_trains_adapters_alone_and_diffusers_loads_them",
    "lora_dropout": "test_adapters.test_a_resumed_lora_repeats_its_dropout_and_its_average",
    "lora_rank": "test_adapters.test_one_process_trains_adapters_alone_and_diffusers_loads_them",
    "lora_target_modules": "test_adapters.test_what_would_change_a_resumed_lora_is_refused",
    "dump_steps": "test_train.test_a_dump_changes_nothing",
    "optimizer": "test_registry.test_a_resumed_run_goes_on_to_the_bit",
    "use_8bit_adam": "test_registry.test_two_names_of_one_optimizer",
    "use_came": "test_registry.test_two_names_of_one_optimizer",
    "max_bad_fraction": "test_train.test_more_bad_rows_than_allowed_end_the_run",
    "save_whole_weights": "test_backends.test_save_whole_weights_adds_full_weights_to_sharded_checkpoints",
    "slot_fill": "test_train.test_an_epoch_trains_each_row_once_and_accounts_for_the_rest",
    "trainable_modules_low_learning_rate": "test_train.test_the_low_rate_list_gets_half",
    "use_deepspeed": "test_train.test_a_refusal_is_one_line_before_any_weight_is_loaded",
    "use_fsdp": "test_train.test_a_refusal_is_one_line_before_any_weight_is_loaded",
    "vae_sample_mode": "test_train.test_a_posteriors_sample_is_its_mean_and_keyed_noise",
    "validation_prompts": "test_train.test_sample_clips_play_as_fast_as_the_data",
    "validation_rows": "test_train.test_validation_repeats_to_the_bit_while_nothing_trains",
    "validation_steps": "test_train.test_a_validation_changes_nothing",
}

RATE, CLIP = 2e-3, 0.05  # of the users' command
LAYERS = 2  # of the tiny model
QUICK = {"mixed_precision": "no", "gradient_checkpointing": None, "tokenizer_max_length": 16, "caption_dropout": 0}
EPOCH = {**QUICK, "train_batch_size": 4, "gradient_accumulation_steps": 4, "lr_warmup_steps": 0}
STEPS = {
    **QUICK, "train_batch_size": 2, "lr_warmup_steps": 0, "checkpointing_steps": 1, "max_train_steps": 2,
    "dump_steps": [1, 2],
}  # fmt: skip
PLAIN_BUCKETS = {"random_hw_adapt": None, "training_with_video_token_length": None}  # one size for each kind


def shows(*flags: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Marks a test as the one that shows the effect of these flags."""

    def mark(test: Callable[..., None]) -> Callable[..., None]:
        assert not SHOWN.keys() & set(flags)
        SHOWN.update(dict.fromkeys(flags, test.__name__))
        return test

    return mark


class Bench:
    """Runs the trainer over one model and one data set; equal settings run once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = tiny.build_wan_t2v(folder / "model")
        self.metadata = tiny.make_dataset(folder / "data", copies=2)
        self.table = json.loads(self.metadata.read_text(encoding="utf-8"))
        self._done: dict[str, runs.Outcome] = {}

    def __call__(self, base: dict[str, object] = EPOCH, **changes: object) -> runs.Outcome:
        settings = {**base, **changes}
        name = repr(sorted(settings.items()))
        if name not in self._done:
            self._done[name] = self.fresh(**settings)
        return self._done[name]

    def fresh(self, **settings: object) -> runs.Outcome:
        """Runs at once, in a folder of its own."""
        model, metadata = settings.pop("model", self.model), settings.pop("metadata", self.metadata)
        output_dir = settings.pop("output_dir", self.folder / f"run-{len(list(self.folder.iterdir()))}")
        outcome = runs.train(runs.wan_flags(model, metadata, output_dir, **settings))
        assert outcome.code == 0, outcome.stderr
        return outcome

    def base_weights(self) -> dict[str, torch.Tensor]:
        return runs.read_weights(self.model / "transformer")

    def kind(self, row: int) -> str:
        return self.table[row]["type"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


def buckets(outcome: runs.Outcome) -> list[tuple[int, int, int]]:
    """Returns (frames, height, width) of every sample that was trained."""
    return [tuple(bucket) for record in outcome.metrics for bucket in record["buckets"]]


def sizes(outcome: runs.Outcome, images: bool) -> set[int]:
    """Returns the nearest ladder sizes, multiples of 32, that images or clips were trained at."""
    chosen = [(h, w) for frames, h, w in buckets(outcome) if (frames == 1) == images]
    return {32 * round(math.sqrt(h * w) / 32) for h, w in chosen}


def rows(outcome: runs.Outcome) -> list[int]:
    return [row for record in outcome.metrics for row in record["rows"]]


def rates(outcome: runs.Outcome) -> list[float]:
    return [record["lr"] for record in outcome.metrics]


def dumps(outcome: runs.Outcome, steps: int = 2, micros: int = 1) -> list[list[runs.Dump]]:
    return [[outcome.dump(step, micro) for micro in range(micros)] for step in range(1, steps + 1)]


def values(outcome: runs.Outcome, name: str) -> torch.Tensor:
    """Returns a tensor of the dump, for the samples of all steps one after the other."""
    return torch.cat([dump[name] for step in dumps(outcome) for dump in step])


# ------------------------------------------------------------------------------------------ model and data


@shows("pretrained_model_name_or_path", "transformer_path", "vae_path")
def test_each_part_comes_from_the_folder_that_was_named(bench: Bench) -> None:
    other = tiny.build_wan_t2v(bench.folder / "other_model", seed=1)
    still = {**STEPS, "learning_rate": 0, "max_train_steps": 1, "dump_steps": 1, "vae_sample_mode": "mode"}
    own, all_other = bench(still), bench(still, model=other)
    transformer = bench(still, transformer_path=other / "transformer")
    vae = bench(still, vae_path=other / "vae")
    theirs = runs.read_weights(other / "transformer")
    for outcome, wanted in ((own, bench.base_weights()), (all_other, theirs), (transformer, theirs)):
        now = outcome.weights("checkpoint-1/transformer")
        assert all(torch.equal(now[name], wanted[name]) for name in wanted)
    latents = [outcome.dump(1)["latents"] for outcome in (own, transformer, vae, all_other)]
    assert torch.equal(latents[0], latents[1]) and torch.equal(latents[2], latents[3])
    assert not torch.allclose(latents[0], latents[2], atol=0.1)
    text = [outcome.dump(1)["model.encoder_hidden_states"] for outcome in (own, transformer, vae, all_other)]
    assert torch.equal(text[0], text[1]) and torch.equal(text[0], text[2]) and not torch.equal(text[0], text[3])


@shows("train_data_dir", "train_data_meta")
def test_files_are_looked_for_below_the_data_folder(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    metadata = tmp_path / "elsewhere" / "two.json"
    metadata.write_text(json.dumps([bench.table[1], bench.table[5]]), encoding="utf-8")
    one = {**STEPS, "max_train_steps": 1, "dump_steps": 1, "train_batch_size": 1, "gradient_accumulation_steps": 2}
    outcome = bench(one, metadata=metadata, train_data_dir=bench.metadata.parent)
    assert sorted(rows(outcome)) == [0, 1]
    captions = {caption for dump in dumps(outcome, 1, 2)[0] for caption in dump.captions}
    assert captions == {bench.table[1]["text"], bench.table[5]["text"]}
    lost = runs.train(runs.wan_flags(bench.model, metadata, tmp_path / "out", train_data_dir=None))
    assert lost.code == 3 and "none of its 2 files exists" in lost.stderr


@shows("allow_outside_data_dir")
def test_a_path_may_lead_outside_only_when_allowed(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    shutil.copy(bench.metadata.parent / "wide.png", tmp_path / "wide.png")
    metadata = tmp_path / "data" / "metadata.json"
    metadata.write_text(json.dumps([{"file_path": "../wide.png", "text": "outside"}]), encoding="utf-8")
    refused = runs.train(runs.wan_flags(bench.model, metadata, tmp_path / "out"))
    assert refused.code == 3 and "../wide.png" in refused.stderr and not refused.metrics
    assert rows(bench(STEPS, metadata=metadata, max_train_steps=1, allow_outside_data_dir=True)) == [0]


@shows("video_repeat")
def test_videos_occur_so_often_and_images_once(bench: Bench) -> None:
    times = Counter(rows(bench(video_repeat=3)))
    assert times == {row: 3 if bench.kind(row) == "video" else 1 for row in range(len(bench.table))}
    assert set(Counter(rows(bench(video_repeat=0))).values()) == {1}


@shows("caption_dropout")
def test_dropped_captions_are_trained_as_empty(bench: Bench) -> None:
    texts = {row["text"] for row in bench.table}
    kept, dropped = bench(STEPS), bench(STEPS, caption_dropout=1)
    assert all(set(dump.captions) <= texts for step in dumps(kept) for dump in step)
    assert {caption for step in dumps(dropped) for dump in step for caption in dump.captions} == {""}
    assert not values(dropped, "model.encoder_hidden_states")[:, 1:].any()  # an empty caption is one end token
    some = bench(STEPS, caption_dropout=0.5, train_batch_size=12, fix_sample_size=[64, 64], max_train_steps=1)
    assert 0 < some.dump(1).captions.count("") < len(some.dump(1).captions)


@shows("dataloader_num_workers")
@pytest.mark.parametrize("workers", [0, 2])
def test_so_many_processes_decode(bench: Bench, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    trainer, seen = runs.train_script(), []
    step = trainer.accumulate_gradients

    def count_processes(*arguments, **settings) -> torch.Tensor:
        seen.append({child.pid for child in multiprocessing.active_children()})
        return step(*arguments, **settings)

    monkeypatch.setattr(trainer, "accumulate_gradients", count_processes)
    outcome = bench.fresh(**STEPS, dataloader_num_workers=workers)
    assert [len(processes) for processes in seen] == [workers] * 2 and seen[0] == seen[1]
    assert outcome.losses == bench(STEPS).losses  # and it changes nothing else
    assert not multiprocessing.active_children()


@shows("video_reader")
def test_clips_are_read_by_the_reader_that_was_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    read, files = decord_reader.read, []

    def note(path: Path, *arguments, **settings) -> None:
        files.append(path.name)
        read(path, *arguments, **settings)

    monkeypatch.setattr(decord_reader, "read", note)
    by_pyav = bench.fresh(**EPOCH, max_train_steps=1, dump_steps=1)
    assert not files
    by_decord = bench.fresh(**EPOCH, max_train_steps=1, dump_steps=1, video_reader="decord")
    videos = {bench.table[row]["file_path"] for row in rows(by_decord) if bench.kind(row) == "video"}
    assert set(files) == videos != set()
    one, other = dumps(by_pyav, 1, 4)[0], dumps(by_decord, 1, 4)[0]
    assert all(torch.equal(a["pixels"], b["pixels"]) for a, b in zip(one, other, strict=True))


# ------------------------------------------------------------------------------------------ shapes


@shows("image_sample_size", "video_sample_size")
def test_images_and_clips_have_the_sizes_asked_for(bench: Bench) -> None:
    wide = bench(**PLAIN_BUCKETS)
    assert (sizes(wide, images=True), sizes(wide, images=False)) == ({96}, {64})
    images, videos = bench(**PLAIN_BUCKETS, image_sample_size=128), bench(**PLAIN_BUCKETS, video_sample_size=96)
    assert (sizes(images, images=True), sizes(images, images=False)) == ({128}, {64})
    assert (sizes(videos, images=True), sizes(videos, images=False)) == ({96}, {96})


@shows("token_sample_size", "training_with_video_token_length")
def test_larger_clips_are_shorter_within_the_token_budget(bench: Bench) -> None:
    def longest(outcome: runs.Outcome) -> dict[int, int]:
        found: dict[int, int] = {}
        for row, (frames, height, width) in zip(rows(outcome), buckets(outcome), strict=True):
            size = 32 * round(math.sqrt(height * width) / 32)
            if bench.kind(row) == "video":
                found[size] = max(frames, found.get(size, 0))
        return found

    assert longest(bench(video_repeat=2)) == {64: 13, 96: 5}  # 13 frames at 64 are 5 at 96
    assert longest(bench(video_repeat=2, token_sample_size=96)) == {64: 13, 96: 13}
    smaller = bench(training_with_video_token_length=None)
    assert longest(smaller) == {64: 13}  # clips stay at the smaller size


@shows("video_sample_stride")
@pytest.mark.parametrize("stride", [1, 3])
def test_kept_frames_are_a_stride_apart(bench: Bench, stride: int) -> None:
    outcome = bench(STEPS, video_sample_stride=stride)
    clips = [frames for step in dumps(outcome) for dump in step for frames in dump.frame_indices if len(frames) > 1]
    assert clips and {b - a for frames in clips for a, b in itertools.pairwise(frames)} == {stride}


WHOLE = {**STEPS, "fix_sample_size": [64, 64], "video_sample_n_frames": 5, "train_batch_size": 64}  # images, clips


def sampled(outcome: runs.Outcome) -> list[tuple[int, list[int]]]:
    """Returns (row, source frames) of every sample in the dumps."""
    pairs = [zip(dump.rows, dump.frame_indices, strict=True) for step in dumps(outcome) for dump in step]
    return [pair for several in pairs for pair in several]


@shows("video_sample_fps")
def test_kept_frames_follow_the_sources_rate(bench: Bench) -> None:
    files = {name: rate for name, *_, rate in tiny.DATASET}
    rates = [files[row["file_path"]] for row in bench.table]
    seen = set()
    for row, frames in sampled(bench(WHOLE, video_sample_fps=10)):
        if len(frames) > 1:
            seen.add(rates[row])
            assert [i - frames[0] for i in frames] == [math.floor(n * rates[row] / 10 + 1e-6) for n in range(5)]
    assert seen == {24.0, 30.0}  # at 25 the short clip holds four frames, which is one of 4k+1


@shows("clips_per_video", "clip_sampling")
def test_a_long_video_gives_several_clips_in_an_epoch(bench: Bench) -> None:
    lengths = {name: frames for name, _, _, frames, _ in tiny.DATASET}
    starts: dict[int, list[int]] = {}
    for row, frames in sampled(bench(WHOLE, clips_per_video=2, clip_sampling="head")):
        starts.setdefault(row, []).append(frames[0])
    for row, entry in enumerate(bench.table):  # five frames at stride 2 take nine
        assert sorted(starts[row]) == ([0, 9] if lengths[entry["file_path"]] >= 20 else [0])


@shows("balance")
def test_balance_decides_what_runs_side_by_side(bench: Bench) -> None:
    orders = [rows(bench(balance=balance)) for balance in ("mixed", "strict", "none")]
    assert len({tuple(sorted(order)) for order in orders}) == 1
    assert orders[1] != orders[2]


def test_what_runs_is_what_was_planned(bench: Bench) -> None:
    outcome = bench(STEPS, gradient_accumulation_steps=2)
    asked = json.loads((outcome.folder / "args.json").read_text())["resolved"]["plan"]
    assert asked.pop("dealing") == DEALING
    settings = PlanSettings(**{**asked, "policy": SizePolicy(**asked["policy"])})
    index = load_index(bench.metadata.with_name("metadata.json.videox-index.arrow"), bench.metadata.parent)
    plan = plan_epoch(columns_of(index, by_second=False), settings, 0)
    ran = [
        (step, 0, micro, row, *dump.bucket, frames[0])
        for step in range(2)
        for micro in range(2)
        for dump in [outcome.dump(step + 1, micro)]
        for row, frames in zip(dump.rows, dump.frame_indices, strict=True)
    ]
    assert ran == [sample for sample in plan.executed_samples(1) if sample.step < 2]


@shows("cost_model")
def test_a_new_run_takes_the_costs_of_an_earlier_one(bench: Bench, tmp_path: Path) -> None:
    model = tmp_path / "cost_model.json"
    model.write_text(json.dumps({"linear": 3.0, "quadratic": 0.25}))
    outcome = bench(STEPS, cost_model=model, max_train_steps=1)
    plan = json.loads((outcome.folder / "args.json").read_text())["resolved"]["plan"]
    assert (plan["cost_linear"], plan["cost_quadratic"]) == (3.0, 0.25)


@shows("video_sample_n_frames")
def test_clips_have_so_many_frames_at_most(bench: Bench) -> None:
    assert max(frames for frames, _, _ in buckets(bench(**PLAIN_BUCKETS))) == 13
    assert max(frames for frames, _, _ in buckets(bench(**PLAIN_BUCKETS, video_sample_n_frames=5))) == 5


@shows("fix_sample_size")
def test_one_size_for_all(bench: Bench) -> None:
    assert {(h, w) for _, h, w in buckets(bench(fix_sample_size=[48, 80]))} == {(48, 80)}


@shows("enable_bucket")
def test_without_buckets_all_are_squares_of_full_length(bench: Bench) -> None:
    outcome = bench(**PLAIN_BUCKETS, enable_bucket=None, video_sample_n_frames=9)
    assert {bucket for bucket in buckets(outcome)} == {(9, 64, 64), (1, 96, 96)}
    short = {row for row, entry in enumerate(bench.table) if entry["file_path"] == "square_short.mp4"}
    assert set(rows(outcome)) == set(range(len(bench.table))) - short
    assert len({h / w for _, h, w in buckets(bench(**PLAIN_BUCKETS))}) >= 3


@shows("random_hw_adapt")
def test_sizes_are_drawn_between_the_sample_sizes(bench: Bench, tmp_path: Path) -> None:
    media = (("image.png", 128, 128, 0, 0.0), ("clip.mp4", 128, 128, 9, 24.0))
    both = {"metadata": tiny.make_dataset(tmp_path, media, copies=12), "training_with_video_token_length": None}
    one, several = bench(**both, random_hw_adapt=None), bench(**both)
    assert sizes(one, images=True) == {96} and sizes(several, images=True) == {64, 96}
    assert sizes(one, images=False) == sizes(several, images=False) == {64}  # clips go up to the smaller size


@shows("random_frame_crop")
def test_a_tenth_of_the_clips_is_shortened(bench: Bench, tmp_path: Path) -> None:
    metadata = tiny.make_dataset(tmp_path, (("long.mp4", 64, 64, 25, 24.0),))
    small = {"image_sample_size": 32, "video_sample_size": 32, "train_batch_size": 64, "video_repeat": 64}
    one_size = {**EPOCH, **PLAIN_BUCKETS, **small}
    whole = bench(one_size, metadata=metadata)
    cropped = bench(one_size, metadata=metadata, random_frame_crop=True)
    assert {frames for frames, _, _ in buckets(whole)} == {13}
    lengths = Counter(frames for frames, _, _ in buckets(cropped))
    assert set(lengths) <= {5, 9, 13} and 0 < lengths[5] + lengths[9] <= 64 // 4 and lengths.total() == 64


@shows("random_ratio_crop")
def test_aspect_ratios_are_drawn(bench: Bench, tmp_path: Path) -> None:
    metadata = tiny.make_dataset(tmp_path, (("square.png", 128, 128, 0, 0.0),), copies=16)
    nearest = bench(metadata=metadata)
    drawn = bench(metadata=metadata, random_ratio_crop=True)
    assert {h / w for _, h, w in buckets(nearest)} == {1}
    assert len({h / w for _, h, w in buckets(drawn)}) >= 4


@shows("vae_mini_batch")
@pytest.mark.parametrize(("mini_batch", "calls"), [(1, [1, 1, 1, 1]), (3, [3, 1]), (4, [4]), (32, [4])])
def test_the_autoencoder_sees_so_many_samples_at_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, mini_batch: int, calls: list[int]
) -> None:
    encode, seen = AutoencoderKLWan.encode, []

    def note(self: AutoencoderKLWan, x: torch.Tensor, *arguments, **settings):
        seen.append(len(x))
        return encode(self, x, *arguments, **settings)

    monkeypatch.setattr(AutoencoderKLWan, "encode", note)
    four = {
        **STEPS,
        "max_train_steps": 1,
        "dump_steps": 1,
        "train_batch_size": 4,
        "fix_sample_size": [64, 64],
        "seed": 4,
    }
    images = bench.folder / "images" / "metadata.json"
    if not images.exists():
        tiny.make_dataset(images.parent, (("image.png", 64, 64, 0, 0.0),), copies=4)
    outcome = bench.fresh(**four, metadata=images, vae_mini_batch=mini_batch)
    assert seen == calls
    whole = bench(four, metadata=images, vae_mini_batch=2)
    assert torch.allclose(outcome.dump(1)["latents"], whole.dump(1)["latents"], atol=1e-5)


# ------------------------------------------------------------------------------------------ training


@pytest.fixture(scope="module")
def image_model(bench: Bench) -> Path:
    return tiny.build_wan_i2v(bench.folder / "image_model", image_embedder=False)


@shows("train_mode")
def test_the_mode_decides_what_the_model_is_given_and_must_fit_it(
    bench: Bench, image_model: Path, tmp_path: Path
) -> None:
    clips = {**STEPS, "metadata": tiny.make_dataset(tmp_path, (("long.mp4", 64, 64, 25, 24.0),), copies=8)}
    one = {**clips, **PLAIN_BUCKETS, "train_batch_size": 8, "max_train_steps": 1, "dump_steps": 1}
    assert bench(one).dump(1)["model.hidden_states"].shape[1] == 16  # the noisy latents alone
    known = {}
    for mode in ("i2v", "inpaint"):
        given = bench(one, model=image_model, train_mode=mode).dump(1)["model.hidden_states"]
        assert given.shape[1] == 36
        known[mode] = given[:, 16:20].mean(dim=(3, 4))  # share of each frame that is given: [B, 4, t]
    first_frame = torch.tensor([[1.0, 0, 0, 0]] * 4)
    assert torch.equal(known["i2v"], first_frame.expand(8, 4, 4))
    assert len({tuple(shares.flatten().tolist()) for shares in known["inpaint"]}) > 2
    for model, mode, fits in ((bench.model, "i2v", "normal"), (image_model, "normal", "i2v or inpaint")):
        outcome = runs.train(runs.wan_flags(model, bench.metadata, tmp_path / mode, train_mode=mode))
        assert outcome.code == 4 and f"made for --train_mode {fits}" in outcome.stderr


@shows("trainable_modules")
def test_only_names_that_contain_a_string_are_trained(bench: Bench) -> None:
    base = bench.base_weights()
    now = bench(STEPS, trainable_modules=["ffn", "norm_q"]).weights("checkpoint-2/transformer")
    assert {name for name in base if not torch.equal(base[name], now[name])} == {
        name for name in base if "ffn" in name or "norm_q" in name
    }
    everything = bench(STEPS).weights("checkpoint-2/transformer")
    assert not any(torch.equal(base[name], everything[name]) for name in base)


@shows("train_batch_size", "gradient_accumulation_steps")
def test_a_step_has_so_many_micro_batches_of_so_many_samples(bench: Bench) -> None:
    one_bucket = {**STEPS, "fix_sample_size": [64, 64], "video_sample_n_frames": 1}
    for batch, accumulation in ((1, 1), (2, 1), (2, 3)):
        outcome = bench(one_bucket, train_batch_size=batch, gradient_accumulation_steps=accumulation)
        for step in (1, 2):
            files = list((outcome.folder / "dump" / f"step-{step}").iterdir())
            assert len(files) == accumulation
            assert max(len(runs.read_dump(path).rows) for path in files) == batch


@shows("num_train_epochs", "max_train_steps")
def test_a_run_ends_after_its_epochs_or_its_steps(bench: Bench) -> None:
    one, two = bench(), bench(num_train_epochs=2)
    assert len(rows(one)) == len(bench.table) and Counter(rows(two)) == dict.fromkeys(range(len(bench.table)), 2)
    per_epoch = len(one.metrics)
    assert len(bench(max_train_steps=per_epoch - 1).metrics) == per_epoch - 1
    assert len(bench(max_train_steps=per_epoch + 1).metrics) == per_epoch + 1  # more than the one epoch asked for


@shows("learning_rate", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm")
@pytest.mark.parametrize(
    ("changes", "by_hand"),
    [
        ({}, {}),
        ({"learning_rate": 5e-4}, {"learning_rate": 5e-4}),
        ({"adam_beta1": 0.5}, {"betas": (0.5, 0.999)}),
        ({"adam_beta2": 0.5}, {"betas": (0.9, 0.5)}),
        ({"adam_weight_decay": 2.0}, {"weight_decay": 2.0}),
        ({"adam_epsilon": 1e-2}, {"epsilon": 1e-2}),
        # where epsilon is large, AdamW does not undo the clipping
        ({"adam_epsilon": 1e-2, "max_grad_norm": 0.01}, {"epsilon": 1e-2, "limits": [0.01, 0.01]}),
        ({"adam_epsilon": 1e-2, "max_grad_norm": 1e6}, {"epsilon": 1e-2, "limits": [1e6, 1e6]}),
    ],
)
def test_the_optimizer_has_the_numbers_asked_for(bench: Bench, changes: dict, by_hand: dict) -> None:
    outcome = bench(STEPS, **changes)
    now = outcome.weights("checkpoint-2/transformer")

    def farthest(**settings) -> float:
        transformer, _, _ = runs.replay(bench.model, dumps(outcome), **settings)
        return max(float((tensor - now[name]).abs().max()) for name, tensor in transformer.state_dict().items())

    assert farthest(**by_hand) <= 1e-6
    for name in by_hand:  # and with any one of the numbers left at the command's own it is another result
        assert farthest(**{other: value for other, value in by_hand.items() if other != name}) > 1e-5


@shows("initial_grad_norm_ratio", "abnormal_norm_clip_start")
def test_the_norm_to_clip_to_falls_and_then_squeezes_what_is_abnormal(bench: Bench) -> None:
    settings = {"max_train_steps": 5, "dump_steps": [1, 2, 3, 4, 5], "adam_epsilon": 1e-2}
    outcome = bench(STEPS, **settings, initial_grad_norm_ratio=4, abnormal_norm_clip_start=3)
    norms = [record["grad_norm"] for record in outcome.metrics]
    assert min(norms) > 5 * CLIP
    squeezed = CLIP / min(norms[4] / CLIP, 10)  # after the ramp, more than 5 times the limit is abnormal
    now = outcome.weights("checkpoint-5/transformer")
    for limits, near in (([4 * CLIP, 3 * CLIP, 2 * CLIP, CLIP, squeezed], True), ([CLIP] * 5, False)):
        transformer, _, _ = runs.replay(bench.model, dumps(outcome, 5), epsilon=1e-2, limits=limits)
        far = max(float((tensor - now[name]).abs().max()) for name, tensor in transformer.state_dict().items())
        assert (far <= 1e-6) == near


@shows("lr_scheduler", "lr_warmup_steps", "scale_lr")
def test_the_learning_rate_is_a_function_of_the_step(bench: Bench) -> None:
    four = {**STEPS, "max_train_steps": 4, "dump_steps": None}
    assert rates(bench(four)) == [RATE] * 4
    assert rates(bench(four, lr_warmup_steps=2)) == pytest.approx([0, RATE / 2, RATE, RATE])
    falling = [RATE, 0.75 * RATE, 0.5 * RATE, 0.25 * RATE]
    linear = bench(four, lr_scheduler="linear")
    assert rates(linear) == pytest.approx(falling)
    cosine = [RATE * (0.5 + 0.5 * math.cos(math.pi * step / 4)) for step in range(4)]
    assert rates(bench(four, lr_scheduler="cosine")) == pytest.approx(cosine)
    scaled = bench(four, scale_lr=True, gradient_accumulation_steps=3)
    assert rates(scaled) == pytest.approx([6 * RATE] * 4)  # three micro-batches of two
    one, other = (run.weights("checkpoint-4/transformer")["scale_shift_table"] for run in (bench(four), linear))
    assert not torch.allclose(one, other, atol=RATE / 4)


@shows("seed")
def test_a_seed_makes_the_run_and_without_one_it_is_drawn(bench: Bench) -> None:
    def story(outcome: runs.Outcome) -> list[object]:
        return [(record["rows"], record["loss"]) for record in outcome.metrics]

    first = bench(STEPS)
    assert story(bench.fresh(**STEPS)) == story(first)
    other = bench(STEPS, seed=43)
    assert rows(other) != rows(first) and not set(other.losses) & set(first.losses)
    drawn = [bench.fresh(**{**STEPS, "seed": None}) for _ in range(2)]
    assert story(drawn[0]) != story(drawn[1])
    stored = json.loads((drawn[0].folder / "args.json").read_text(encoding="utf-8"))["resolved"]["seed"]
    assert f"seed {stored}, " in drawn[0].stdout
    assert story(bench(STEPS, seed=stored)) == story(drawn[0])


@shows("gradient_checkpointing", "selective_ac")
def test_blocks_are_computed_again_in_the_backward_pass(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, calls = WanTransformerBlock.forward, Counter()

    def note(self: WanTransformerBlock, *arguments, **settings) -> torch.Tensor:
        calls[name] += 1
        return forward(self, *arguments, **settings)

    monkeypatch.setattr(WanTransformerBlock, "forward", note)
    ways = {
        "kept": {}, "all": {"gradient_checkpointing": True}, "half": {"selective_ac": 0.5}, "whole": {"selective_ac": 1},
    }  # fmt: skip
    found = {}
    for name, changes in ways.items():
        found[name] = bench.fresh(**{**STEPS, **changes})
    steps = 2
    assert calls == {"kept": 2 * steps, "all": 4 * steps, "half": 3 * steps, "whole": 4 * steps}
    for outcome in found.values():
        assert outcome.losses == found["kept"].losses
        assert outcome.metrics[1]["grad_norm"] == pytest.approx(found["kept"].metrics[1]["grad_norm"], rel=1e-6)


@shows("mixed_precision")
def test_bf16_computes_and_float32_stays_in_the_weights(bench: Bench) -> None:
    full, half = bench(STEPS), bench(STEPS, mixed_precision="bf16")
    for outcome, dtype in ((full, torch.float32), (half, torch.bfloat16)):
        dump = outcome.dump(1)
        assert dump["model.encoder_hidden_states"].dtype == dtype
        assert torch.equal(dump["prediction"], dump["prediction"].to(dtype).float())  # as precise as its computation
        for name in ("latents", "noise", "sigma", "timestep", "target", "loss"):
            assert dump[name].dtype == torch.float32
        assert {w.dtype for w in outcome.weights("checkpoint-2/transformer").values()} == {torch.float32}
    assert not torch.equal(full.dump(1)["prediction"], full.dump(1)["prediction"].bfloat16().float())
    assert full.losses != half.losses == pytest.approx(full.losses, rel=0.03)
    from_launcher = bench(STEPS, mixed_precision=None)  # the launcher says nothing here: full precision
    assert from_launcher.losses == full.losses


@shows("allow_tf32")
def test_tf32_is_on_while_training_when_allowed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, seen = runs.train_script(), []
    step = trainer.accumulate_gradients

    def note(*arguments, **settings) -> torch.Tensor:
        seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
        return step(*arguments, **settings)

    monkeypatch.setattr(trainer, "accumulate_gradients", note)
    one = {**STEPS, "max_train_steps": 1}
    bench.fresh(**one)
    bench.fresh(**one, allow_tf32=True)
    assert seen == [(False, False), (True, True)]


@shows("low_vram")
@pytest.mark.parametrize("low_vram", [True, False])
def test_encoders_leave_the_device_between_uses(bench: Bench, low_vram: bool) -> None:
    """A move that copies, as one to a GPU does, shows where the weights are: in host memory, or in the copies."""

    class Elsewhere(TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), settings=None):
            moved = function(*arguments, **(settings or {}))
            return moved.clone() if function is torch.Tensor.to else moved

    alone = {"distributed_type": DistributedType.NO, "num_processes": 1}
    trainer, accelerator = runs.train_script(), SimpleNamespace(device=torch.device("cpu"), mixed_precision="no", **alone)
    argv = runs.wan_flags(bench.model, bench.metadata, bench.folder / "unused", low_vram=low_vram)

    def places(module: torch.nn.Module) -> list[int]:
        return [tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())]

    with Elsewhere():
        args = trainer.parse_args(argv)
        encoders = trainer.load_encoders(args, trainer.check_model(args), 5.0, accelerator, lambda x: [x])
        for encoder in (encoders.text_encoder, encoders.vae):
            before = places(encoder.module)
            with encoder.on_device() as module:
                within = places(module)
            assert places(encoder.module) == before
            assert not set(within) & set(before) if low_vram else within == before


@shows("uniform_sampling")
def test_timesteps_are_stratified_over_the_step(bench: Bench) -> None:
    def strata(outcome: runs.Outcome) -> list[list[int]]:
        found = []
        for step in dumps(outcome, micros=4):
            sigma = torch.cat([dump["sigma"][np.array(dump.rows) >= 0] for dump in step]).double()
            draw = 1 - sigma / (5 - 4 * sigma) + 5e-4  # the middle of one of 1000 timesteps
            found.append(sorted((draw * len(sigma)).long().tolist()))
        return found

    settings = {**STEPS, "gradient_accumulation_steps": 4, "fix_sample_size": [64, 64], "video_sample_n_frames": 1}
    assert strata(bench(settings)) == [list(range(8)), list(range(4))]
    assert strata(bench(settings, uniform_sampling=None)) != [list(range(8)), list(range(4))]


@shows("train_sampling_steps")
def test_fewer_sampling_steps_are_the_noisiest(bench: Bench) -> None:
    assert set(values(bench(STEPS, train_sampling_steps=1), "timestep").tolist()) == {1000.0}
    sigma = values(bench(STEPS, train_sampling_steps=100), "sigma").double()
    t = sigma / (5 - 4 * sigma)
    assert t.min() > 0.9 and len(set(t.tolist())) == len(t)
    assert values(bench(STEPS), "sigma").min() < 5 * 0.9 / (1 + 4 * 0.9)


@shows("weighting_scheme", "logit_mean", "logit_std", "mode_scale")
def test_schemes_weigh_the_loss_and_shape_the_timesteps(bench: Bench) -> None:
    own = {**STEPS, "uniform_sampling": None}

    def times(**changes: object) -> torch.Tensor:
        sigma = values(bench(own, **changes), "sigma").double()
        return 1 - sigma / (5 - 4 * sigma)  # what was drawn, from 0 = noise to 1

    def weights(**changes: object) -> tuple[torch.Tensor, torch.Tensor]:
        outcome = bench(own, **changes)
        errors = [dump["prediction"] - dump["target"] for step in dumps(outcome) for dump in step]
        plain = torch.cat([error.square().mean(dim=(1, 2, 3, 4)) for error in errors])
        return values(outcome, "loss") / plain, values(outcome, "sigma")

    weight, sigma = weights(weighting_scheme="none")
    assert torch.allclose(weight, torch.ones_like(weight))
    weight, sigma = weights(weighting_scheme="sigma_sqrt")
    assert torch.allclose(weight, 1 / sigma**2, rtol=1e-4)
    weight, sigma = weights(weighting_scheme="cosmap")
    assert torch.allclose(weight, 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2)), rtol=1e-4)

    drawn = times(weighting_scheme="none")
    normal = torch.special.ndtri(drawn + 5e-4)
    for mean, spread in ((0.0, 1.0), (1.5, 1.0), (0.0, 0.3)):
        changes = {} if (mean, spread) == (0.0, 1.0) else {"logit_mean": mean, "logit_std": spread}
        found = times(weighting_scheme="logit_normal", **changes)
        assert torch.allclose(found, torch.sigmoid(mean + spread * normal), atol=5e-3)
    for scale in (1.29, 0.5):
        found = times(weighting_scheme="mode", **({} if scale == 1.29 else {"mode_scale": scale}))
        u = drawn + 5e-4
        wanted = 1 - u - scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
        assert torch.allclose(found, wanted, atol=5e-3)


@shows("motion_sub_loss", "motion_sub_loss_ratio")
def test_the_motion_loss_is_mixed_in(bench: Bench, tmp_path: Path) -> None:
    metadata = tiny.make_dataset(tmp_path, (("long.mp4", 64, 64, 25, 24.0),), copies=2)
    long = {
        **STEPS,
        **PLAIN_BUCKETS,
        "metadata": metadata,
        "train_batch_size": 2,
        "max_train_steps": 1,
        "dump_steps": 1,
    }
    for changes, ratio in (
        ({}, 0.0),
        ({"motion_sub_loss": True}, 0.25),
        ({"motion_sub_loss": True, "motion_sub_loss_ratio": 0.8}, 0.8),
    ):
        dump = bench(long, **changes).dump(1)
        assert dump["target"].shape[2] == 4  # latent frames
        error = dump["prediction"] - dump["target"]
        plain, motion = (part.square().mean(dim=(1, 2, 3, 4)) for part in (error, error[:, :, 1:] - error[:, :, :-1]))
        assert torch.allclose(dump["loss"], (1 - ratio) * plain + ratio * motion, rtol=1e-5)
        assert not torch.allclose(plain, motion, rtol=0.05)


@shows("config_path")
def test_the_shift_comes_from_the_yaml(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("scheduler_kwargs: {shift: 1.0}\n", encoding="utf-8")
    five = values(bench(STEPS), "sigma").double()
    one = values(bench(STEPS, config_path=tmp_path / "other.yaml"), "sigma").double()
    assert torch.allclose(five, 5 * one / (1 + 4 * one), atol=1e-6) and not torch.allclose(five, one, atol=0.05)


@shows("tokenizer_max_length")
def test_captions_have_so_many_tokens_at_most(bench: Bench) -> None:
    whole, cut = bench(STEPS).dump(1), bench(STEPS, tokenizer_max_length=3).dump(1)
    assert whole["model.encoder_hidden_states"].shape[1] == 16
    assert cut["model.encoder_hidden_states"].shape[1] == 3
    assert cut["model.encoder_hidden_states"].all()  # no caption is as short as that: nothing is padding


# ------------------------------------------------------------------------------------------ what a run writes


@shows("output_dir")
def test_everything_is_written_below_the_output_folder(bench: Bench, tmp_path: Path) -> None:
    before = {path for path in bench.folder.rglob("*") if path.is_file()}
    out = tmp_path / "some" / "where"
    outcome = bench.fresh(**STEPS, output_dir=out)
    names = {path.name for path in outcome.folder.iterdir()}
    assert {"metrics.jsonl", "run_status.json", "args.json", "transformer", "checkpoint-2", "dump"} <= names
    assert before == {path for path in bench.folder.rglob("*") if path.is_file()}
    assert [path.name for path in tmp_path.iterdir()] == ["some"]


def saved_steps(outcome: runs.Outcome) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in outcome.folder.glob("checkpoint-*"))


@shows("checkpointing_steps", "checkpoints_total_limit")
def test_checkpoints_come_when_asked_for_and_the_oldest_go(bench: Bench) -> None:
    five = {**STEPS, "max_train_steps": 5, "dump_steps": None}
    assert saved_steps(bench(five, checkpointing_steps=2)) == [2, 4, 5]
    assert saved_steps(bench(five, checkpointing_steps=100)) == [5]
    assert saved_steps(bench(five, checkpointing_steps=1, checkpoints_total_limit=2)) == [4, 5]


@shows("resume_from_checkpoint")
def test_a_run_goes_on_where_it_ended(bench: Bench, tmp_path: Path) -> None:
    whole = bench(STEPS, max_train_steps=4, dump_steps=None)
    bench.fresh(**{**STEPS, "dump_steps": None}, output_dir=tmp_path / "out")
    more = {**STEPS, "max_train_steps": 4, "dump_steps": None, "resume_from_checkpoint": "latest"}
    resumed = bench.fresh(**more, output_dir=tmp_path / "out")
    assert resumed.losses == whole.losses and rows(resumed) == rows(whole)
    one, other = (run.weights("checkpoint-4/transformer") for run in (resumed, whole))
    assert all(torch.equal(one[name], other[name]) for name in one)


@shows("verify")
def test_hashes_are_checked_when_asked_for(bench: Bench, tmp_path: Path) -> None:
    first = bench.fresh(**STEPS, output_dir=tmp_path / "out")
    path = first.folder / "checkpoint-2/transformer/diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1  # one bit of one weight: size and header stay
    path.write_bytes(content)
    shutil.rmtree(first.folder / "checkpoint-1")
    argv = runs.wan_flags(
        bench.model, bench.metadata, first.folder, **STEPS, resume_from_checkpoint=first.folder / "checkpoint-2"
    )
    refused = runs.train([*argv, "--verify"])
    assert refused.code == 4 and "checkpoint-2" in refused.stderr
    assert runs.train(argv).code == 0


@shows("export_dtype")
def test_the_export_has_the_precision_asked_for(bench: Bench) -> None:
    fp32_params = bench(STEPS).weights("checkpoint-2/transformer")
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        exported = bench(STEPS, export_dtype=name).weights()
        assert exported["blocks.0.attn1.to_q.weight"].dtype == dtype
        assert exported["scale_shift_table"].dtype == torch.float32  # one of those that diffusers keeps so
        assert all(torch.equal(tensor, fp32_params[key].to(tensor.dtype)) for key, tensor in exported.items())


@shows("report_to", "logging_dir", "tracker_project_name")
def test_the_tracker_writes_where_it_is_told(bench: Bench) -> None:
    silent = bench(STEPS)
    assert not list(silent.folder.rglob("events.out.tfevents.*"))
    changes = {"report_to": "tensorboard", "logging_dir": "curves", "tracker_project_name": "rabbits"}
    (events,) = bench(STEPS, **changes).folder.rglob("events.out.tfevents.*")
    assert events.relative_to(bench(STEPS, **changes).folder).parts[:2] == ("curves", "rabbits")
    assert b"train/loss" in events.read_bytes()


@shows("validation_paths")
def test_sample_clips_start_from_the_images_that_were_named(bench: Bench, image_model: Path, tmp_path: Path) -> None:
    images = [tiny.write_image(tmp_path / f"{number}.png", 128, 96, seed=number) for number in range(2)]

    def samples(*paths: Path) -> list[bytes]:
        settings = {**STEPS, "model": image_model, "train_mode": "i2v", "max_train_steps": 1, "dump_steps": None}
        prompts = {"validation_prompts": ["a rabbit walks"] * len(paths), "validation_paths": list(paths)}
        folder = bench(settings, **prompts).folder / "samples"
        return [path.read_bytes() for path in sorted(folder.glob("step-000000-prompt-*"))]

    one, other = samples(images[0]), samples(images[1])
    assert len(one) == len(other) == 1 and one != other
    assert samples(images[0], images[1])[0] == one[0]
    argv = runs.wan_flags(bench.model, bench.metadata, tmp_path / "out", validation_paths=images)
    assert runs.train(argv).code == 2  # text-to-video has no use for them


@shows("validation_epochs")
def test_validation_comes_after_so_many_epochs(bench: Bench) -> None:
    one_step = {"fix_sample_size": [64, 64], "video_sample_n_frames": 1, "train_batch_size": 16}  # is an epoch
    four = {**one_step, "num_train_epochs": 4, "validation_rows": 1, "validation_steps": 10**6}
    for every, due in ((2, [0, 2, 4]), (3, [0, 3, 4]), (0, [0, 4])):
        outcome = bench(**four, validation_epochs=every)
        assert [record["step"] for record in outcome.validation] == due and len(outcome.metrics) == 4


# ------------------------------------------------------------------------------------------ nothing is left out


def test_every_flag_of_the_parser_has_an_effect_that_a_test_shows(bench: Bench) -> None:
    flags = set(vars(runs.train_script().parse_args(runs.wan_flags(bench.model, bench.metadata, bench.folder / "unused"))))
    assert not SHOWN.keys() & SHOWN_ELSEWHERE.keys()
    assert SHOWN.keys() | SHOWN_ELSEWHERE.keys() == flags
    for place in SHOWN_ELSEWHERE.values():
        module, test = place.split(".")
        (path,) = (tiny.ROOT / "tests").rglob(f"{module}.py")
        assert re.search(rf"^def {test}\b", path.read_text(encoding="utf-8"), flags=re.MULTILINE), place


def test_the_users_command_is_shown_here() -> None:
    paths = {"pretrained_model_name_or_path", "train_data_dir", "train_data_meta", "output_dir"}
    assert paths | runs.WAN_FLAGS.keys() <= SHOWN.keys()
