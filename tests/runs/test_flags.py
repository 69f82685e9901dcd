"""Tests of every flag of scripts/wan2.1/train.py: its effect on plan, tensors, weights or files of real runs.

`covers` states which flags a test is about. The last test compares these with the parser, so that no flag can be added
without an effect that is tested.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
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
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch.overrides import TorchFunctionMode

from videox.data.index.index import load_index
from videox.data.media import decord as decord_reader
from videox.data.plan.buckets import SizePolicy
from videox.data.plan.plan import plan_epoch
from videox.data.plan.settings import PlanSettings, columns_of
from videox.data.plan.timesteps import place_in_stratum
from videox.engine.train_state import ASSIGNMENT_VERSION
from videox.models import attention_backend

COVERED: dict[str, str] = {}  # flag -> test in this file that shows its effect
# flag -> test in another file that shows its effect
COVERED_ELSEWHERE = {
    "clip_image": "test_clip_image.test_features_of_both_layouts",
    "base_precision": "test_small_cards.test_ten_losses_and_a_resumed_run_are_bit_identical",
    "stream_blocks": "test_small_cards.test_streamed_blocks_train_the_same",
    "text_encoder_precision": "test_small_cards.test_a_quantised_text_encoder_trains_and_is_cached_separately",
    "merge_base": "test_small_cards.test_a_base_in_8_bits_is_trained_as_it_is_and_merged_into_its_bf16_model",
    "host_memory": "test_dry_run.test_host_memory_is_judged",
    "dry_run_deepspeed_config": "test_run_memory.test_the_launch_is_that_of_the_launcher_or_of_the_flags",
    "accept_data_change": "test_data_change.test_the_epoch_ends_with_its_own_rows_and_the_new_data_follows",
    "config": "test_run_files.test_the_command_line_wins_and_later_files_win",
    "dry_run_data": "test_dry_run.test_a_published_model_and_described_data_need_no_files",
    "dry_run_model": "test_dry_run.test_a_published_model_and_described_data_need_no_files",
    "gpu": "test_dry_run.test_a_published_model_and_described_data_need_no_files",
    "gpu_price": "test_dry_run.test_a_published_model_and_described_data_need_no_files",
    "lora_type": "test_dora.test_diffusers_and_the_merged_model_equal_the_formula",
    "loraplus_ratio": "test_dora.test_loraplus_has_a_group_of_b_matrices",
    "optimizer_args": "test_custom_class.test_settings_are_parsed_and_checked",
    "recipe": "test_recipes.test_a_recipe_trains_a_small_model",
    "report_seconds": "test_report_page.test_a_run_writes_its_page_and_trains_the_same",
    "watchdog_seconds": "test_hangs.test_a_process_that_hangs_is_named",
    "replica_check_steps": "test_drift.test_drifted_replicas_end_the_run_on_all_ranks",
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
    "caption_prefix": "test_captions_in_runs.test_a_run_trains_what_explain_shows_with_and_without_a_cache",
    "caption_shuffle_tags": "test_captions_in_runs.test_a_run_trains_what_explain_shows_with_and_without_a_cache",
    "launch_tokens": "test_balancing.test_launches_are_balanced_where_they_are_counted",
    "missing_caption": "test_captions_in_runs.test_missing_captions_may_end_the_run",
    "trigger_word": "test_captions_in_runs.test_a_run_trains_what_explain_shows_with_and_without_a_cache",
    "cache_only": "test_cache.test_full_cache_needs_no_encoder_and_changes_nothing",
    "cache_variants": "test_plan.test_clips_and_sizes_repeat_after_cache_variants_epochs",
    "latent_cache": "test_cache.test_full_cache_needs_no_encoder_and_changes_nothing",
    "export_at": "test_lora_files.test_a_run_starts_from_kohya_and_writes_kohya_at_its_end",
    "export_layouts": "test_export.test_a_run_writes_the_requested_layouts",
    "ema_decay": "test_ema.test_one_process_averages_its_fp32_params",
    "ema_device": "test_ema.test_ema_device_is_the_requested_one",
    "use_ema": "test_ema.test_one_process_averages_its_fp32_params",
    "validate_ema": "test_ema.test_validation_and_samples_use_the_ema",
    "init_lora_from": "test_adapters.test_a_lora_starts_from_another_with_any_alpha",
    "lora_alpha": "test_adapters.test_one_process_trains_only_adapters_and_diffusers_loads_them",
    "lora_dropout": "test_adapters.test_lora_resume_is_bit_identical_with_dropout_and_ema",
    "lora_rank": "test_adapters.test_one_process_trains_only_adapters_and_diffusers_loads_them",
    "lora_target_modules": "test_adapters.test_changed_settings_are_an_error_on_resume",
    "dataset_config": "test_data_sources.test_a_folder_described_in_seven_ways_has_one_plan",
    "dump_steps": "test_train.test_a_dump_changes_nothing",
    "optimizer": "test_registry.test_resume_is_bit_identical",
    "use_8bit_adam": "test_registry.test_two_flags_of_one_optimizer_are_equivalent",
    "use_came": "test_registry.test_two_flags_of_one_optimizer_are_equivalent",
    "max_bad_fraction": "test_train.test_too_many_bad_rows_end_the_run",
    "save_whole_weights": "test_backends.test_save_whole_weights_adds_full_weights_to_sharded_checkpoints",
    "early_stop": "test_train.test_a_run_without_progress_ends_early",
    "keep_best": "test_train.test_the_best_checkpoint_is_kept_and_exported",
    "sample_every": "test_train.test_sample_clips_have_their_own_settings_and_interval",
    "sample_fps": "test_sample_requests.test_flags_replace_the_defaults_of_the_run",
    "sample_frames": "test_sample_requests.test_flags_replace_the_defaults_of_the_run",
    "sample_guidance": "test_sample_requests.test_flags_replace_the_defaults_of_the_run",
    "sample_minutes": "test_validation_loss.test_clips_that_do_not_fit_in_the_time_are_left_out",
    "sample_negative_prompt": "test_sample_requests.test_flags_replace_the_defaults_of_the_run",
    "sample_resolution": "test_sample_requests.test_flags_replace_the_defaults_of_the_run",
    "sample_seed": "test_sample_requests.test_flags_replace_the_defaults_of_the_run",
    "sample_steps": "test_sample_requests.test_flags_replace_the_defaults_of_the_run",
    "skip_spikes": "test_spikes.test_a_spike_is_left_out_of_a_run",
    "slot_fill": "test_train.test_an_epoch_trains_each_row_once_and_reports_the_rest",
    "trainable_modules_low_learning_rate": "test_train.test_low_learning_rate_modules_get_half_the_lr",
    "use_deepspeed": "test_train.test_an_error_is_one_line_before_any_weight_is_loaded",
    "use_fsdp": "test_train.test_an_error_is_one_line_before_any_weight_is_loaded",
    "vae_sample_mode": "test_train.test_vae_samples_are_the_mean_plus_keyed_noise",
    "validation_prompts": "test_train.test_sample_clips_have_the_frame_rate_of_the_data",
    "validation_meta": "test_train.test_a_list_of_its_own_is_measured_and_not_trained",
    "validation_share": "test_held_out.test_a_share_holds_out_that_share_of_the_trainable_rows",
    "validation_rows": "test_train.test_validation_is_bit_identical_while_the_lr_is_zero",
    "validation_steps": "test_train.test_validation_does_not_change_training",
}

LR, CLIP = 2e-3, 0.05  # of the published command
LAYERS = 2  # of the tiny model
SHIFT = 3.0  # of its scheduler
QUICK = {"mixed_precision": "no", "gradient_checkpointing": None, "tokenizer_max_length": 16, "caption_dropout": 0}
EPOCH = {**QUICK, "train_batch_size": 4, "gradient_accumulation_steps": 4, "lr_warmup_steps": 0}
STEPS = {
    **QUICK, "train_batch_size": 2, "lr_warmup_steps": 0, "checkpointing_steps": 1, "max_train_steps": 2,
    "dump_steps": [1, 2],
}  # fmt: skip
PLAIN_BUCKETS = {"random_hw_adapt": None, "training_with_video_token_length": None}  # one size for each kind


def covers(*flags: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Mark a test as the one that shows the effect of these flags."""

    def mark(test: Callable[..., None]) -> Callable[..., None]:
        assert not COVERED.keys() & set(flags)
        COVERED.update(dict.fromkeys(flags, test.__name__))
        return test

    return mark


class CachedRuns:
    """Trains one model on one data set; runs with equal settings are run once."""

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
        """Train now, in a new folder."""
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
def cached_run(tmp_path_factory: pytest.TempPathFactory) -> CachedRuns:
    return CachedRuns(tmp_path_factory.mktemp("runs"))


def buckets(outcome: runs.Outcome) -> list[tuple[int, int, int]]:
    """Return (frames, height, width) of every trained sample."""
    return [tuple(bucket) for record in outcome.metrics for bucket in record["buckets"]]


def sizes(outcome: runs.Outcome, images: bool) -> set[int]:
    """Return the sizes that images or clips were trained at, rounded to multiples of 32."""
    sides = [(h, w) for frames, h, w in buckets(outcome) if (frames == 1) == images]
    return {32 * round(math.sqrt(h * w) / 32) for h, w in sides}


def rows(outcome: runs.Outcome) -> list[int]:
    return [row for record in outcome.metrics for row in record["rows"]]


def lrs(outcome: runs.Outcome) -> list[float]:
    return [record["lr"] for record in outcome.metrics]


def dumps(outcome: runs.Outcome, steps: int = 2, micros: int = 1) -> list[list[runs.Dump]]:
    return [[outcome.dump(step, micro) for micro in range(micros)] for step in range(1, steps + 1)]


def values(outcome: runs.Outcome, name: str) -> torch.Tensor:
    """Return a dumped tensor of the samples of all steps, concatenated."""
    return torch.cat([dump[name] for step in dumps(outcome) for dump in step])


# ------------------------------------------------------------------------------------------------------ model and data


@covers("pretrained_model_name_or_path", "transformer_path", "vae_path")
@pytest.mark.slow
def test_components_are_loaded_from_the_given_folders(cached_run: CachedRuns) -> None:
    other = tiny.build_wan_t2v(cached_run.folder / "other_model", seed=1)
    no_training = {**STEPS, "learning_rate": 0, "max_train_steps": 1, "dump_steps": 1, "vae_sample_mode": "mode"}
    own, all_other = cached_run(no_training), cached_run(no_training, model=other)
    transformer = cached_run(no_training, transformer_path=other / "transformer")
    vae = cached_run(no_training, vae_path=other / "vae")
    other_weights = runs.read_weights(other / "transformer")
    for outcome, wanted in (
        (own, cached_run.base_weights()),
        (all_other, other_weights),
        (transformer, other_weights),
    ):
        now = outcome.weights("checkpoint-1/transformer")
        assert all(torch.equal(now[name], wanted[name]) for name in wanted)
    latents = [outcome.dump(1)["latents"] for outcome in (own, transformer, vae, all_other)]
    assert torch.equal(latents[0], latents[1]) and torch.equal(latents[2], latents[3])
    assert not torch.allclose(latents[0], latents[2], atol=0.1)
    text = [outcome.dump(1)["model.encoder_hidden_states"] for outcome in (own, transformer, vae, all_other)]
    assert torch.equal(text[0], text[1]) and torch.equal(text[0], text[2]) and not torch.equal(text[0], text[3])


@covers("train_data_dir", "train_data_meta")
def test_files_are_relative_to_the_data_folder(cached_run: CachedRuns, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    metadata = tmp_path / "elsewhere" / "two.json"
    metadata.write_text(json.dumps([cached_run.table[1], cached_run.table[5]]), encoding="utf-8")
    one = {**STEPS, "max_train_steps": 1, "dump_steps": 1, "train_batch_size": 1, "gradient_accumulation_steps": 2}
    outcome = cached_run(one, metadata=metadata, train_data_dir=cached_run.metadata.parent)
    assert sorted(rows(outcome)) == [0, 1]
    captions = {caption for dump in dumps(outcome, 1, 2)[0] for caption in dump.captions}
    assert captions == {cached_run.table[1]["text"], cached_run.table[5]["text"]}
    missing = runs.train(runs.wan_flags(cached_run.model, metadata, tmp_path / "out", train_data_dir=None))
    assert missing.code == 3 and "none of its 2 files exists" in missing.stderr


@covers("allow_outside_data_dir")
def test_paths_outside_the_data_folder_need_the_flag(cached_run: CachedRuns, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    shutil.copy(cached_run.metadata.parent / "wide.png", tmp_path / "wide.png")
    metadata = tmp_path / "data" / "metadata.json"
    metadata.write_text(json.dumps([{"file_path": "../wide.png", "text": "outside"}]), encoding="utf-8")
    refused = runs.train(runs.wan_flags(cached_run.model, metadata, tmp_path / "out"))
    assert refused.code == 3 and "../wide.png" in refused.stderr and not refused.metrics
    assert rows(cached_run(STEPS, metadata=metadata, max_train_steps=1, allow_outside_data_dir=True)) == [0]


@covers("video_repeat")
@pytest.mark.slow
def test_videos_are_repeated_and_images_are_not(cached_run: CachedRuns) -> None:
    times = Counter(rows(cached_run(video_repeat=3)))
    assert times == {row: 3 if cached_run.kind(row) == "video" else 1 for row in range(len(cached_run.table))}
    assert set(Counter(rows(cached_run(video_repeat=0))).values()) == {1}


@pytest.mark.slow
@covers("caption_dropout")
def test_dropped_captions_are_trained_as_empty(cached_run: CachedRuns) -> None:
    texts = {row["text"] for row in cached_run.table}
    kept, dropped = cached_run(STEPS), cached_run(STEPS, caption_dropout=1)
    assert all(set(dump.captions) <= texts for step in dumps(kept) for dump in step)
    assert {caption for step in dumps(dropped) for dump in step for caption in dump.captions} == {""}
    assert not values(dropped, "model.encoder_hidden_states")[
        :, 1:
    ].any()  # an empty caption is one end-of-sequence token
    some = cached_run(STEPS, caption_dropout=0.5, train_batch_size=12, fix_sample_size=[64, 64], max_train_steps=1)
    assert 0 < some.dump(1).captions.count("") < len(some.dump(1).captions)


@pytest.mark.slow
@covers("dataloader_num_workers")
@pytest.mark.parametrize("workers", [0, 2])
def test_the_number_of_data_workers(cached_run: CachedRuns, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    trainer, seen = runs.train_script(), []
    step = trainer.accumulate_gradients

    def count_processes(*arguments, **settings) -> torch.Tensor:
        seen.append({child.pid for child in multiprocessing.active_children()})
        return step(*arguments, **settings)

    monkeypatch.setattr(trainer, "accumulate_gradients", count_processes)
    outcome = cached_run.fresh(**STEPS, dataloader_num_workers=workers)
    assert [len(processes) for processes in seen] == [workers] * 2 and seen[0] == seen[1]
    assert outcome.losses == cached_run(STEPS).losses  # and nothing else changes
    assert not multiprocessing.active_children()


@pytest.mark.slow
@covers("video_reader")
def test_clips_are_read_by_the_selected_reader(cached_run: CachedRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    read, files = decord_reader.read, []

    def record(path: Path, *arguments, **settings) -> None:
        files.append(path.name)
        read(path, *arguments, **settings)

    monkeypatch.setattr(decord_reader, "read", record)
    by_pyav = cached_run.fresh(**EPOCH, max_train_steps=1, dump_steps=1)
    assert not files
    by_decord = cached_run.fresh(**EPOCH, max_train_steps=1, dump_steps=1, video_reader="decord")
    videos = {cached_run.table[row]["file_path"] for row in rows(by_decord) if cached_run.kind(row) == "video"}
    assert set(files) == videos != set()
    one, other = dumps(by_pyav, 1, 4)[0], dumps(by_decord, 1, 4)[0]
    assert all(torch.equal(a["pixels"], b["pixels"]) for a, b in zip(one, other, strict=True))


# -------------------------------------------------------------------------------------------------------------- shapes


@pytest.mark.slow
@covers("image_sample_size", "video_sample_size")
def test_images_and_clips_have_the_requested_sizes(cached_run: CachedRuns) -> None:
    default = cached_run(**PLAIN_BUCKETS)
    assert (sizes(default, images=True), sizes(default, images=False)) == ({96}, {64})
    images, videos = (
        cached_run(**PLAIN_BUCKETS, image_sample_size=128),
        cached_run(**PLAIN_BUCKETS, video_sample_size=96),
    )
    assert (sizes(images, images=True), sizes(images, images=False)) == ({128}, {64})
    assert (sizes(videos, images=True), sizes(videos, images=False)) == ({96}, {96})


@covers("token_sample_size", "training_with_video_token_length")
@pytest.mark.slow
def test_larger_clips_are_shorter_within_the_token_budget(cached_run: CachedRuns) -> None:
    def longest(outcome: runs.Outcome) -> dict[int, int]:
        longest_of: dict[int, int] = {}
        for row, (frames, height, width) in zip(rows(outcome), buckets(outcome), strict=True):
            size = 32 * round(math.sqrt(height * width) / 32)
            if cached_run.kind(row) == "video":
                longest_of[size] = max(frames, longest_of.get(size, 0))
        return longest_of

    assert longest(cached_run(video_repeat=2)) == {64: 13, 96: 5}  # 13 frames at 64 have the tokens of 5 at 96
    assert longest(cached_run(video_repeat=2, token_sample_size=96)) == {64: 13, 96: 13}
    smaller = cached_run(training_with_video_token_length=None)
    assert longest(smaller) == {64: 13}  # clips keep the smaller size


@pytest.mark.slow
@covers("video_sample_stride")
@pytest.mark.parametrize("stride", [1, 3])
def test_sampled_frames_are_a_stride_apart(cached_run: CachedRuns, stride: int) -> None:
    outcome = cached_run(STEPS, video_sample_stride=stride)
    clips = [frames for step in dumps(outcome) for dump in step for frames in dump.frame_indices if len(frames) > 1]
    assert clips and {b - a for frames in clips for a, b in itertools.pairwise(frames)} == {stride}


ONE_EPOCH_STEPS = {
    **STEPS,
    "fix_sample_size": [64, 64],
    "video_sample_n_frames": 5,
    "train_batch_size": 64,
}  # one step of images, one of clips


def sampled(outcome: runs.Outcome) -> list[tuple[int, list[int]]]:
    """Return (row, source frames) of every dumped sample."""
    pairs = [zip(dump.rows, dump.frame_indices, strict=True) for step in dumps(outcome) for dump in step]
    return [pair for dumped in pairs for pair in dumped]


@covers("video_sample_fps")
def test_sampled_frames_follow_the_source_frame_rate(cached_run: CachedRuns) -> None:
    fps_of = {name: fps for name, *_, fps in tiny.DATASET}
    fps = [fps_of[row["file_path"]] for row in cached_run.table]
    seen = set()
    for row, frames in sampled(cached_run(ONE_EPOCH_STEPS, video_sample_fps=10)):
        if len(frames) > 1:
            seen.add(fps[row])
            assert [i - frames[0] for i in frames] == [math.floor(n * fps[row] / 10 + 1e-6) for n in range(5)]
    assert seen == {24.0, 30.0}  # at 25 fps the short clip has four frames, which becomes one (4k+1)


@pytest.mark.slow
@covers("clips_per_video", "clip_sampling")
def test_a_long_video_yields_several_clips_per_epoch(cached_run: CachedRuns) -> None:
    lengths = {name: frames for name, _, _, frames, _ in tiny.DATASET}
    starts: dict[int, list[int]] = {}
    for row, frames in sampled(cached_run(ONE_EPOCH_STEPS, clips_per_video=2, clip_sampling="head")):
        starts.setdefault(row, []).append(frames[0])
    for row, entry in enumerate(cached_run.table):  # five frames at stride 2 span nine source frames
        assert sorted(starts[row]) == ([0, 9] if lengths[entry["file_path"]] >= 20 else [0])


@covers("balance")
@pytest.mark.slow
def test_balance_changes_the_order_of_rows(cached_run: CachedRuns) -> None:
    orders = [rows(cached_run(balance=balance)) for balance in ("mixed", "strict", "none")]
    assert len({tuple(sorted(order)) for order in orders}) == 1
    assert orders[1] != orders[2]


def test_a_run_trains_the_planned_samples(cached_run: CachedRuns) -> None:
    outcome = cached_run(STEPS, gradient_accumulation_steps=2)
    written = json.loads((outcome.folder / "args.json").read_text())["resolved"]["plan"]
    assert written.pop("dealing") == ASSIGNMENT_VERSION
    settings = PlanSettings(**{**written, "policy": SizePolicy(**written["policy"])})
    index = load_index(cached_run.metadata.with_name("metadata.json.videox-index.arrow"), cached_run.metadata.parent)
    plan = plan_epoch(columns_of(index, by_second=False), settings, 0)
    for step in range(2):
        for micro, planned in enumerate(plan.micro_batches(step, 0, 1)):
            dump = outcome.dump(step + 1, micro)
            starts = [frames[0] for frames in dump.frame_indices]
            assert (dump.rows, starts) == (planned.rows.tolist(), planned.starts.tolist())
            assert tuple(dump.bucket) == planned.bucket


@covers("cost_model")
def test_a_new_run_uses_the_cost_model_of_an_earlier_one(cached_run: CachedRuns, tmp_path: Path) -> None:
    model = tmp_path / "cost_model.json"
    model.write_text(json.dumps({"linear": 3.0, "quadratic": 0.25}))
    outcome = cached_run(STEPS, cost_model=model, max_train_steps=1)
    plan = json.loads((outcome.folder / "args.json").read_text())["resolved"]["plan"]
    assert (plan["cost_linear"], plan["cost_quadratic"]) == (3.0, 0.25)


@covers("video_sample_n_frames")
def test_the_maximum_number_of_frames(cached_run: CachedRuns) -> None:
    assert max(frames for frames, _, _ in buckets(cached_run(**PLAIN_BUCKETS))) == 13
    assert max(frames for frames, _, _ in buckets(cached_run(**PLAIN_BUCKETS, video_sample_n_frames=5))) == 5


@pytest.mark.slow
@covers("fix_sample_size")
def test_a_fixed_sample_size(cached_run: CachedRuns) -> None:
    assert {(h, w) for _, h, w in buckets(cached_run(fix_sample_size=[48, 80]))} == {(48, 80)}


@pytest.mark.slow
@covers("enable_bucket")
def test_without_buckets_samples_are_squares_of_full_length(cached_run: CachedRuns) -> None:
    outcome = cached_run(**PLAIN_BUCKETS, enable_bucket=None, video_sample_n_frames=9)
    assert {bucket for bucket in buckets(outcome)} == {(9, 64, 64), (1, 96, 96)}
    short = {row for row, entry in enumerate(cached_run.table) if entry["file_path"] == "square_short.mp4"}
    assert set(rows(outcome)) == set(range(len(cached_run.table))) - short
    assert len({h / w for _, h, w in buckets(cached_run(**PLAIN_BUCKETS))}) >= 3


@covers("random_hw_adapt")
@pytest.mark.slow
def test_sizes_are_drawn_between_the_sample_sizes(cached_run: CachedRuns, tmp_path: Path) -> None:
    media = (("image.png", 128, 128, 0, 0.0), ("clip.mp4", 128, 128, 9, 24.0))
    both = {"metadata": tiny.make_dataset(tmp_path, media, copies=12), "training_with_video_token_length": None}
    one, several = cached_run(**both, random_hw_adapt=None), cached_run(**both)
    assert sizes(one, images=True) == {96} and sizes(several, images=True) == {64, 96}
    assert sizes(one, images=False) == sizes(several, images=False) == {64}  # clips never exceed the smaller size


@covers("random_frame_crop")
@pytest.mark.slow
def test_random_frame_crop_shortens_a_tenth_of_the_clips(cached_run: CachedRuns, tmp_path: Path) -> None:
    metadata = tiny.make_dataset(tmp_path, (("long.mp4", 64, 64, 25, 24.0),))
    small = {"image_sample_size": 32, "video_sample_size": 32, "train_batch_size": 64, "video_repeat": 64}
    one_size = {**EPOCH, **PLAIN_BUCKETS, **small}
    full = cached_run(one_size, metadata=metadata)
    cropped = cached_run(one_size, metadata=metadata, random_frame_crop=True)
    assert {frames for frames, _, _ in buckets(full)} == {13}
    lengths = Counter(frames for frames, _, _ in buckets(cropped))
    assert set(lengths) <= {5, 9, 13} and 0 < lengths[5] + lengths[9] <= 64 // 4 and lengths.total() == 64


@covers("random_ratio_crop")
@pytest.mark.slow
def test_random_ratio_crop_draws_aspect_ratios(cached_run: CachedRuns, tmp_path: Path) -> None:
    metadata = tiny.make_dataset(tmp_path, (("square.png", 128, 128, 0, 0.0),), copies=16)
    nearest = cached_run(metadata=metadata)
    drawn = cached_run(metadata=metadata, random_ratio_crop=True)
    assert {h / w for _, h, w in buckets(nearest)} == {1}
    assert len({h / w for _, h, w in buckets(drawn)}) >= 4


@pytest.mark.slow
@covers("vae_mini_batch")
@pytest.mark.parametrize(("mini_batch", "calls"), [(1, [1, 1, 1, 1]), (3, [3, 1]), (4, [4]), (32, [4])])
def test_the_vae_encodes_mini_batches(
    cached_run: CachedRuns, monkeypatch: pytest.MonkeyPatch, mini_batch: int, calls: list[int]
) -> None:
    encode, seen = AutoencoderKLWan.encode, []

    def record(self: AutoencoderKLWan, x: torch.Tensor, *arguments, **settings):
        seen.append(len(x))
        return encode(self, x, *arguments, **settings)

    monkeypatch.setattr(AutoencoderKLWan, "encode", record)
    four = {
        **STEPS,
        "max_train_steps": 1,
        "dump_steps": 1,
        "train_batch_size": 4,
        "fix_sample_size": [64, 64],
        "seed": 4,
    }
    images = cached_run.folder / "images" / "metadata.json"
    if not images.exists():
        tiny.make_dataset(images.parent, (("image.png", 64, 64, 0, 0.0),), copies=4)
    outcome = cached_run.fresh(**four, metadata=images, vae_mini_batch=mini_batch)
    assert seen == calls
    other = cached_run(four, metadata=images, vae_mini_batch=2)
    assert torch.allclose(outcome.dump(1)["latents"], other.dump(1)["latents"], atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ training


@pytest.fixture(scope="module")
def image_model(cached_run: CachedRuns) -> Path:
    return tiny.build_wan_i2v(cached_run.folder / "image_model", image_embedder=False)


@covers("train_mode")
@pytest.mark.slow
def test_the_train_mode_sets_the_inputs_and_must_fit_the_model(
    cached_run: CachedRuns, image_model: Path, tmp_path: Path
) -> None:
    clips = {**STEPS, "metadata": tiny.make_dataset(tmp_path, (("long.mp4", 64, 64, 25, 24.0),), copies=8)}
    one = {**clips, **PLAIN_BUCKETS, "train_batch_size": 8, "max_train_steps": 1, "dump_steps": 1}
    assert cached_run(one).dump(1)["model.hidden_states"].shape[1] == 16  # only the noisy latents
    known = {}
    for mode in ("i2v", "inpaint"):
        inputs = cached_run(one, model=image_model, train_mode=mode).dump(1)["model.hidden_states"]
        assert inputs.shape[1] == 36
        known[mode] = inputs[:, 16:20].mean(dim=(3, 4))  # known share of each frame: [B, 4, t]
    first_frame = torch.tensor([[1.0, 0, 0, 0]] * 4)
    assert torch.equal(known["i2v"], first_frame.expand(8, 4, 4))
    assert len({tuple(shares.flatten().tolist()) for shares in known["inpaint"]}) > 2
    for model, mode, fits in ((cached_run.model, "i2v", "normal"), (image_model, "normal", "i2v or inpaint")):
        outcome = runs.train(runs.wan_flags(model, cached_run.metadata, tmp_path / mode, train_mode=mode))
        assert outcome.code == 4 and f"made for --train_mode {fits}" in outcome.stderr


@covers("trainable_modules")
def test_only_parameters_that_match_trainable_modules_are_trained(cached_run: CachedRuns) -> None:
    base = cached_run.base_weights()
    now = cached_run(STEPS, trainable_modules=["ffn", "norm_q"]).weights("checkpoint-2/transformer")
    assert {name for name in base if not torch.equal(base[name], now[name])} == {
        name for name in base if "ffn" in name or "norm_q" in name
    }
    full = cached_run(STEPS).weights("checkpoint-2/transformer")
    assert not any(torch.equal(base[name], full[name]) for name in base)


@covers("train_batch_size", "gradient_accumulation_steps")
def test_micro_batches_per_step_and_samples_per_micro_batch(cached_run: CachedRuns) -> None:
    one_bucket = {**STEPS, "fix_sample_size": [64, 64], "video_sample_n_frames": 1}
    for batch, accumulation in ((1, 1), (2, 1), (2, 3)):
        outcome = cached_run(one_bucket, train_batch_size=batch, gradient_accumulation_steps=accumulation)
        for step in (1, 2):
            files = list((outcome.folder / "dump" / f"step-{step}").iterdir())
            assert len(files) == accumulation
            assert max(len(runs.read_dump(path).rows) for path in files) == batch


@pytest.mark.slow
@covers("num_train_epochs", "max_train_steps")
def test_a_run_ends_after_its_epochs_or_its_steps(cached_run: CachedRuns) -> None:
    one, two = cached_run(), cached_run(num_train_epochs=2)
    assert len(rows(one)) == len(cached_run.table) and Counter(rows(two)) == dict.fromkeys(
        range(len(cached_run.table)), 2
    )
    per_epoch = len(one.metrics)
    assert len(cached_run(max_train_steps=per_epoch - 1).metrics) == per_epoch - 1
    assert len(cached_run(max_train_steps=per_epoch + 1).metrics) == per_epoch + 1  # more than the one requested epoch


@covers("learning_rate", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm")
@pytest.mark.parametrize(
    ("changes", "reference"),
    [
        ({}, {}),
        ({"learning_rate": 5e-4}, {"learning_rate": 5e-4}),
        ({"adam_beta1": 0.5}, {"betas": (0.5, 0.999)}),
        pytest.param({"adam_beta2": 0.5}, {"betas": (0.9, 0.5)}, marks=pytest.mark.slow),
        pytest.param({"adam_weight_decay": 2.0}, {"weight_decay": 2.0}, marks=pytest.mark.slow),
        pytest.param({"adam_epsilon": 1e-2}, {"epsilon": 1e-2}, marks=pytest.mark.slow),
        # with a large epsilon AdamW does not undo the clipping
        ({"adam_epsilon": 1e-2, "max_grad_norm": 0.01}, {"epsilon": 1e-2, "limits": [0.01, 0.01]}),
        ({"adam_epsilon": 1e-2, "max_grad_norm": 1e6}, {"epsilon": 1e-2, "limits": [1e6, 1e6]}),
    ],
)
def test_optimizer_settings_are_used(cached_run: CachedRuns, changes: dict, reference: dict) -> None:
    outcome = cached_run(STEPS, **changes)
    now = outcome.weights("checkpoint-2/transformer")

    def largest_difference(**settings) -> float:
        transformer, _, _ = runs.replay(cached_run.model, dumps(outcome), **settings)
        return max(float((tensor - now[name]).abs().max()) for name, tensor in transformer.state_dict().items())

    assert largest_difference(**reference) <= 1e-6
    for name in reference:  # and with any one of the settings left at its default the result differs
        assert largest_difference(**{other: value for other, value in reference.items() if other != name}) > 1e-5


@covers("initial_grad_norm_ratio", "abnormal_norm_clip_start")
def test_the_clip_norm_ramps_down_and_shrinks_for_abnormal_norms(cached_run: CachedRuns) -> None:
    settings = {"max_train_steps": 5, "dump_steps": [1, 2, 3, 4, 5], "adam_epsilon": 1e-2}
    outcome = cached_run(STEPS, **settings, initial_grad_norm_ratio=4, abnormal_norm_clip_start=3)
    norms = [record["grad_norm"] for record in outcome.metrics]
    assert min(norms) > 5 * CLIP
    reduced = CLIP / min(norms[4] / CLIP, 10)  # after the ramp, more than 5 times the limit is abnormal
    now = outcome.weights("checkpoint-5/transformer")
    for limits, equal in (([4 * CLIP, 3 * CLIP, 2 * CLIP, CLIP, reduced], True), ([CLIP] * 5, False)):
        transformer, _, _ = runs.replay(cached_run.model, dumps(outcome, 5), epsilon=1e-2, limits=limits)
        difference = max(float((tensor - now[name]).abs().max()) for name, tensor in transformer.state_dict().items())
        assert (difference <= 1e-6) == equal


@pytest.mark.slow
@covers("lr_scheduler", "lr_warmup_steps", "scale_lr")
def test_the_learning_rate_is_a_function_of_the_step(cached_run: CachedRuns) -> None:
    four = {**STEPS, "max_train_steps": 4, "dump_steps": None}
    assert lrs(cached_run(four)) == [LR] * 4
    assert lrs(cached_run(four, lr_warmup_steps=2)) == pytest.approx([0, LR / 2, LR, LR])
    falling = [LR, 0.75 * LR, 0.5 * LR, 0.25 * LR]
    linear = cached_run(four, lr_scheduler="linear")
    assert lrs(linear) == pytest.approx(falling)
    cosine = [LR * (0.5 + 0.5 * math.cos(math.pi * step / 4)) for step in range(4)]
    assert lrs(cached_run(four, lr_scheduler="cosine")) == pytest.approx(cosine)
    scaled = cached_run(four, scale_lr=True, gradient_accumulation_steps=3)
    assert lrs(scaled) == pytest.approx([6 * LR] * 4)  # three micro-batches of two
    one, other = (run.weights("checkpoint-4/transformer")["scale_shift_table"] for run in (cached_run(four), linear))
    assert not torch.allclose(one, other, atol=LR / 4)


@pytest.mark.slow
@covers("seed")
def test_a_seed_determines_the_run_and_is_drawn_if_not_given(cached_run: CachedRuns) -> None:
    def summary(outcome: runs.Outcome) -> list[object]:
        return [(record["rows"], record["loss"]) for record in outcome.metrics]

    first = cached_run(STEPS)
    assert summary(cached_run.fresh(**STEPS)) == summary(first)
    other = cached_run(STEPS, seed=43)
    assert rows(other) != rows(first) and not set(other.losses) & set(first.losses)
    drawn = [cached_run.fresh(**{**STEPS, "seed": None}) for _ in range(2)]
    assert summary(drawn[0]) != summary(drawn[1])
    stored = json.loads((drawn[0].folder / "args.json").read_text(encoding="utf-8"))["resolved"]["seed"]
    assert f"seed {stored}, " in drawn[0].stdout
    assert summary(cached_run(STEPS, seed=stored)) == summary(drawn[0])


@pytest.mark.slow
@covers(
    "gradient_checkpointing", "selective_ac", "activation_memory", "gradient_checkpointing_keep", "offload_activations"
)
def test_blocks_are_recomputed_in_the_backward_pass(cached_run: CachedRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, calls = WanTransformerBlock.forward, Counter()

    def record(self: WanTransformerBlock, *arguments, **settings) -> torch.Tensor:
        calls[name] += 1
        return forward(self, *arguments, **settings)

    monkeypatch.setattr(WanTransformerBlock, "forward", record)
    cases = {
        "none": {}, "all": {"gradient_checkpointing": True}, "half": {"selective_ac": 0.5}, "all_selective": {"selective_ac": 1},
        "kept": {"gradient_checkpointing": True, "gradient_checkpointing_keep": "attention", "offload_activations": True},
        "roomy": {"activation_memory": "auto"}, "tight": {"activation_memory": "auto", "gpu_memory": 1},
    }  # fmt: skip
    outcomes = {}
    for name, changes in cases.items():
        outcomes[name] = cached_run.fresh(**{**STEPS, **changes})
    steps = 2
    assert calls == {
        "none": 2 * steps, "all": 4 * steps, "half": 3 * steps, "all_selective": 4 * steps, "kept": 4 * steps,
        "roomy": 2 * steps, "tight": 4 * steps,
    }  # fmt: skip
    assert "recompute nothing: 2 x " in outcomes["roomy"].stdout
    assert "activation memory, chosen for 1.0 GiB:\n  recompute all blocks: 2 x " in outcomes["tight"].stdout
    for outcome in outcomes.values():
        assert outcome.losses == outcomes["none"].losses
        assert outcome.metrics[1]["grad_norm"] == pytest.approx(outcomes["none"].metrics[1]["grad_norm"], rel=1e-6)


@covers("attention_backend")
def test_the_attention_kernel_is_measured_once_and_kept(
    cached_run: CachedRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    used, registry = Counter[str](), attention_dispatch._AttentionBackendRegistry
    math_kernel = registry._backends[AttentionBackendName._NATIVE_MATH]

    def record(*arguments, **settings) -> torch.Tensor:
        used["math"] += 1
        return math_kernel(*arguments, **settings)

    monkeypatch.setitem(registry._backends, AttentionBackendName._NATIVE_MATH, record)
    monkeypatch.setattr(attention_backend, "CANDIDATES", ("_native_math", "flash"))
    try:
        first = cached_run.fresh(**STEPS, attention_backend="auto")
        assert used["math"] and re.search(
            r"attention kernels, 1 x [\d,]+ tokens.* native_math [\d.]+ ms", first.stdout
        )
        manifest = json.loads((first.folder / "checkpoint-1" / "manifest.json").read_text(encoding="utf-8"))
        assert manifest["description"]["attention_backend"] == "_native_math"
        monkeypatch.setattr(attention_backend, "fastest_backend", None)  # what would measure again
        again = cached_run.fresh(
            **STEPS,
            attention_backend="auto",
            output_dir=first.folder,
            resume_from_checkpoint=first.folder / "checkpoint-1",
        )
        assert "attention  native_math (as before)" in again.stdout and again.losses == first.losses
    finally:
        registry.set_active_backend(AttentionBackendName.NATIVE)
    manifest = json.loads((cached_run(STEPS).folder / "checkpoint-1" / "manifest.json").read_text(encoding="utf-8"))
    assert "attention_backend" not in manifest["description"]


@pytest.mark.slow
@covers("compile")
@pytest.mark.parametrize(
    "changes", [{}, {"gradient_checkpointing": True}, {"lora_rank": 4, "mixed_precision": "bf16"}], ids=str
)
def test_compiled_blocks_train_alike(cached_run: CachedRuns, changes: dict[str, object]) -> None:
    plain, compiled = cached_run.fresh(**{**STEPS, **changes}), cached_run.fresh(**{**STEPS, **changes}, compile=True)
    assert "compile    repeated blocks" in compiled.stdout and "cannot be compiled" not in compiled.stdout
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-3)
    for before, after in zip(plain.metrics, compiled.metrics, strict=True):
        assert after["grad_norm"] == pytest.approx(before["grad_norm"], rel=1e-2)


@covers("vae_tiling")
def test_tiled_latents_have_their_own_entries_in_the_cache(
    cached_run: CachedRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiled, enable = Counter[str](), AutoencoderKLWan.enable_tiling

    def record(self: AutoencoderKLWan, *arguments, **settings) -> None:
        tiled["calls"] += 1
        enable(self, *arguments, **settings)

    monkeypatch.setattr(AutoencoderKLWan, "enable_tiling", record)
    cache = cached_run.folder / "tiles"
    one = {**STEPS, "max_train_steps": 1, "dump_steps": None, "latent_cache": cache, "cache_only": True}

    def stored(**changes: object) -> tuple[int, int]:
        """Fill the cache; return how many entries it had before, and how many the run needs."""
        found = re.search(r"(\d+) of (\d+) entries exist", cached_run.fresh(**one, **changes).stdout)
        return int(found[1]), int(found[2])

    (before, needed), (same, _), (text, other) = stored(), stored(), stored(vae_tiling=True)
    assert (before, same, other) == (0, needed, needed)
    assert 0 < text < needed  # embeddings of captions do not depend on the VAE
    assert tiled["calls"] == 1


@covers("mixed_precision")
def test_bf16_is_used_for_compute_and_float32_for_weights(cached_run: CachedRuns) -> None:
    full, half = cached_run(STEPS), cached_run(STEPS, mixed_precision="bf16")
    for outcome, dtype in ((full, torch.float32), (half, torch.bfloat16)):
        dump = outcome.dump(1)
        assert dump["model.encoder_hidden_states"].dtype == dtype
        assert torch.equal(
            dump["prediction"], dump["prediction"].to(dtype).float()
        )  # has the precision of the forward pass
        for name in ("latents", "noise", "sigma", "timestep", "target", "loss"):
            assert dump[name].dtype == torch.float32
        assert {w.dtype for w in outcome.weights("checkpoint-2/transformer").values()} == {torch.float32}
    assert not torch.equal(full.dump(1)["prediction"], full.dump(1)["prediction"].bfloat16().float())
    assert full.losses != half.losses == pytest.approx(full.losses, rel=0.03)
    from_launcher = cached_run(STEPS, mixed_precision=None)  # the launcher sets nothing here: full precision
    assert from_launcher.losses == full.losses


@covers("allow_tf32")
def test_tf32_is_enabled_by_its_flag(cached_run: CachedRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, seen = runs.train_script(), []
    step = trainer.accumulate_gradients

    def record(*arguments, **settings) -> torch.Tensor:
        seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
        return step(*arguments, **settings)

    monkeypatch.setattr(trainer, "accumulate_gradients", record)
    one = {**STEPS, "max_train_steps": 1}
    cached_run.fresh(**one)
    cached_run.fresh(**one, allow_tf32=True)
    # Convolutions use TF32 by torch's own default; the flag governs matrix products alone.
    assert seen == [(False, True), (True, True)]


@pytest.mark.slow
@covers("deterministic")
def test_deterministic_algorithms_are_used_by_their_flag(
    cached_run: CachedRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, seen = runs.train_script(), []
    step = trainer.accumulate_gradients

    def record(*arguments, **settings) -> torch.Tensor:
        cudnn = torch.backends.cuda.cudnn_sdp_enabled()
        seen.append((torch.are_deterministic_algorithms_enabled(), cudnn, os.environ.get("CUBLAS_WORKSPACE_CONFIG")))
        return step(*arguments, **settings)

    monkeypatch.setattr(trainer, "accumulate_gradients", record)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    plain, deterministic = cached_run(STEPS), cached_run.fresh(**STEPS, deterministic=True)
    assert seen[-2:] == [(True, False, ":4096:8")] * 2 and set(seen[:-2]) <= {(False, True, None)}
    assert deterministic.losses == plain.losses, "a run on the CPU has the same numbers with the flag"


@covers("vae_dtype")
def test_the_vae_computes_in_its_dtype(cached_run: CachedRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, encode = [], AutoencoderKLWan.encode

    def record(vae: AutoencoderKLWan, video: torch.Tensor, *rest, **settings):
        seen.append((vae.dtype, video.dtype))
        return encode(vae, video, *rest, **settings)

    monkeypatch.setattr(AutoencoderKLWan, "encode", record)
    full = cached_run(STEPS)
    half = cached_run.fresh(**{**STEPS, "max_train_steps": 1}, vae_dtype="bf16")
    assert set(seen) >= {(torch.bfloat16, torch.bfloat16)}
    assert (
        "\nencoders    VAE bf16, text fp32\n" in half.stdout and "\nencoders    VAE fp32, text fp32\n" in full.stdout
    )
    assert f"\nversions    torch {torch.__version__}\n" in half.stdout
    assert "\nattention   torch's, flash kernel\nrecompute   no block\n" in half.stdout
    latents = [outcome.dump(1)["latents"] for outcome in (full, half)]
    assert latents[1].dtype == torch.float32 and not torch.equal(*latents)
    torch.testing.assert_close(latents[1], latents[0], rtol=0.1, atol=0.1)


@covers("low_vram")
@pytest.mark.parametrize("low_vram", [True, False])
def test_low_vram_moves_encoders_off_the_device_between_uses(cached_run: CachedRuns, low_vram: bool) -> None:
    """`.to` is made to copy, as a move to a GPU does, which shows whether the weights are in host memory or moved."""

    class CopyingTo(TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), settings=None):
            moved = function(*arguments, **(settings or {}))
            return moved.clone() if function is torch.Tensor.to else moved

    one_process = {"distributed_type": DistributedType.NO, "num_processes": 1}
    trainer, accelerator = (
        runs.train_script(),
        SimpleNamespace(device=torch.device("cpu"), mixed_precision="no", **one_process),
    )
    argv = runs.wan_flags(cached_run.model, cached_run.metadata, cached_run.folder / "unused", low_vram=low_vram)

    def addresses(module: torch.nn.Module) -> list[int]:
        return [tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())]

    with CopyingTo():
        args = trainer.parse_args(argv)
        encoders = trainer.load_encoders(args, trainer.check_model(args), 5.0, accelerator, lambda x: [x])
        for encoder in (encoders.text_encoder, encoders.vae):
            before = addresses(encoder.module)
            with encoder.on_device() as module:
                within = addresses(module)
            assert addresses(encoder.module) == before
            assert not set(within) & set(before) if low_vram else within == before


@covers("uniform_sampling")
def test_timesteps_cover_the_range_in_each_step_and_from_step_to_step(cached_run: CachedRuns) -> None:
    def draws(outcome: runs.Outcome) -> list[list[int]]:
        found = []
        for step in dumps(outcome, micros=4):
            sigma = torch.cat([dump["sigma"][np.array(dump.rows) >= 0] for dump in step]).double()
            t = sigma / (SHIFT - (SHIFT - 1) * sigma)
            found.append(sorted((1000 * (1 - t)).round().long().tolist()))  # the drawn ones of 1000 timesteps
        return found

    settings = {**STEPS, "gradient_accumulation_steps": 4, "fix_sample_size": [64, 64], "video_sample_n_frames": 1}
    places = place_in_stratum(42, np.arange(2))  # of seed 42
    expected = [
        np.floor(1000 * (np.arange(n) + place) / n).astype(int).tolist()
        for n, place in zip((8, 4), places, strict=True)
    ]
    assert draws(cached_run(settings)) == expected
    assert draws(cached_run(settings, uniform_sampling=None)) != expected


@covers("train_sampling_steps")
def test_fewer_sampling_steps_keep_the_noisiest_timesteps(cached_run: CachedRuns) -> None:
    assert set(values(cached_run(STEPS, train_sampling_steps=1), "timestep").tolist()) == {1000.0}
    sigma = values(cached_run(STEPS, train_sampling_steps=100), "sigma").double()
    t = sigma / (SHIFT - (SHIFT - 1) * sigma)
    assert t.min() > 0.9 and len(set(t.tolist())) == len(t)
    assert values(cached_run(STEPS), "sigma").min() < SHIFT * 0.9 / (1 + (SHIFT - 1) * 0.9)


@covers("weighting_scheme", "logit_mean", "logit_std", "mode_scale")
@pytest.mark.slow
def test_weighting_schemes_change_loss_weights_and_timesteps(cached_run: CachedRuns) -> None:
    base = {**STEPS, "uniform_sampling": None}

    def times(**changes: object) -> torch.Tensor:
        sigma = values(cached_run(base, **changes), "sigma").double()
        return 1 - sigma / (SHIFT - (SHIFT - 1) * sigma)  # the drawn value, from 0 = noise to 1

    def weights(**changes: object) -> tuple[torch.Tensor, torch.Tensor]:
        outcome = cached_run(base, **changes)
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


@covers("motion_sub_loss", "motion_sub_loss_ratio")
@pytest.mark.slow
def test_the_motion_loss_is_added(cached_run: CachedRuns, tmp_path: Path) -> None:
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
        dump = cached_run(long, **changes).dump(1)
        assert dump["target"].shape[2] == 4  # latent frames
        error = dump["prediction"] - dump["target"]
        plain, motion = (part.square().mean(dim=(1, 2, 3, 4)) for part in (error, error[:, :, 1:] - error[:, :, :-1]))
        assert torch.allclose(dump["loss"], (1 - ratio) * plain + ratio * motion, rtol=1e-5)
        assert not torch.allclose(plain, motion, rtol=0.05)


@covers("config_path", "flow_shift")
def test_the_shift_comes_from_the_flag_else_the_yaml_else_the_model(cached_run: CachedRuns, tmp_path: Path) -> None:
    yaml = tmp_path / "other.yaml"
    yaml.write_text("scheduler_kwargs: {shift: 1.0}\n", encoding="utf-8")
    unshifted = values(cached_run(STEPS, config_path=yaml), "sigma").double()
    for shift, changes in ((3, {}), (7, {"flow_shift": 7.0, "config_path": yaml})):
        sigma = values(cached_run(STEPS, **changes), "sigma").double()
        assert torch.allclose(sigma, shift * unshifted / (1 + (shift - 1) * unshifted), atol=1e-6)
        assert not torch.allclose(sigma, unshifted, atol=0.05)


@covers("tokenizer_max_length")
def test_the_maximum_number_of_caption_tokens(cached_run: CachedRuns) -> None:
    full, cut = cached_run(STEPS).dump(1), cached_run(STEPS, tokenizer_max_length=3).dump(1)
    assert full["model.encoder_hidden_states"].shape[1] == 16
    assert cut["model.encoder_hidden_states"].shape[1] == 3
    assert cut["model.encoder_hidden_states"].all()  # all captions are longer, so there is no padding


# -------------------------------------------------------------------------------------------------------------- output


@covers("output_dir")
def test_all_files_are_written_below_the_output_folder(cached_run: CachedRuns, tmp_path: Path) -> None:
    cached_run(STEPS)  # an earlier run has written the index beside the metadata
    before = {path for path in cached_run.folder.rglob("*") if path.is_file()}
    out = tmp_path / "some" / "where"
    outcome = cached_run.fresh(**STEPS, output_dir=out)
    names = {path.name for path in outcome.folder.iterdir()}
    assert {"metrics.jsonl", "run_status.json", "args.json", "transformer", "checkpoint-2", "dump"} <= names
    assert before == {path for path in cached_run.folder.rglob("*") if path.is_file()}
    assert [path.name for path in tmp_path.iterdir()] == ["some"]


def saved_steps(outcome: runs.Outcome) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in outcome.folder.glob("checkpoint-*"))


@pytest.mark.slow
@covers("checkpointing_steps", "checkpoints_total_limit")
def test_checkpoints_are_saved_and_pruned_as_requested(cached_run: CachedRuns) -> None:
    five = {**STEPS, "max_train_steps": 5, "dump_steps": None}
    assert saved_steps(cached_run(five, checkpointing_steps=2)) == [2, 4, 5]
    assert saved_steps(cached_run(five, checkpointing_steps=100)) == [5]
    assert saved_steps(cached_run(five, checkpointing_steps=1, checkpoints_total_limit=2)) == [4, 5]


@covers("resume_from_checkpoint")
def test_a_resumed_run_equals_an_uninterrupted_one(cached_run: CachedRuns, tmp_path: Path) -> None:
    full = cached_run(STEPS, max_train_steps=4, dump_steps=None)
    cached_run.fresh(**{**STEPS, "dump_steps": None}, output_dir=tmp_path / "out")
    more = {**STEPS, "max_train_steps": 4, "dump_steps": None, "resume_from_checkpoint": "latest"}
    resumed = cached_run.fresh(**more, output_dir=tmp_path / "out")
    assert resumed.losses == full.losses and rows(resumed) == rows(full)
    one, other = (run.weights("checkpoint-4/transformer") for run in (resumed, full))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@covers("verify", "skip_verify")
def test_hashes_are_checked_unless_that_is_skipped(cached_run: CachedRuns, tmp_path: Path) -> None:
    first = cached_run.fresh(**STEPS, output_dir=tmp_path / "out")
    path = first.folder / "checkpoint-2/transformer/diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1  # one bit of one weight; size and header are unchanged
    path.write_bytes(content)
    shutil.rmtree(first.folder / "checkpoint-1")
    argv = runs.wan_flags(
        cached_run.model,
        cached_run.metadata,
        first.folder,
        **STEPS,
        resume_from_checkpoint=first.folder / "checkpoint-2",
    )
    for flags in ([], ["--verify"]):
        refused = runs.train([*argv, *flags])
        assert refused.code == 4 and "checkpoint-2" in refused.stderr and "sha256" in refused.stderr
    skipped = runs.train([*argv, "--skip_verify"])
    assert skipped.code == 0 and "hashes verified" not in skipped.stdout
    assert runs.train([*argv, "--verify", "--skip_verify"]).code == 2


def test_other_users_may_read_what_the_umask_lets_them_read(cached_run: CachedRuns) -> None:
    run, mask = cached_run(STEPS), os.umask(0)
    os.umask(mask)
    for path in run.folder.rglob("*"):
        allowed = 0o777 if path.is_dir() else 0o666
        assert path.stat().st_mode & 0o777 == allowed & ~mask, path


@pytest.mark.slow
@covers("export_dtype")
def test_the_export_has_the_requested_dtype(cached_run: CachedRuns) -> None:
    fp32_params = cached_run(STEPS).weights("checkpoint-2/transformer")
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        exported = cached_run(STEPS, export_dtype=name).weights()
        assert exported["blocks.0.attn1.to_q.weight"].dtype == dtype
        assert exported["scale_shift_table"].dtype == torch.float32  # one of those that diffusers keeps in float32
        assert all(torch.equal(tensor, fp32_params[key].to(tensor.dtype)) for key, tensor in exported.items())


@covers("report_to", "logging_dir", "tracker_project_name")
def test_the_tracker_writes_to_the_logging_dir(cached_run: CachedRuns) -> None:
    without = cached_run(STEPS)
    assert not list(without.folder.rglob("events.out.tfevents.*"))
    changes = {"report_to": "tensorboard", "logging_dir": "curves", "tracker_project_name": "rabbits"}
    (events,) = cached_run(STEPS, **changes).folder.rglob("events.out.tfevents.*")
    assert events.relative_to(cached_run(STEPS, **changes).folder).parts[:2] == ("curves", "rabbits")
    assert b"train/loss" in events.read_bytes()


@covers("validation_paths")
@pytest.mark.slow
def test_sample_clips_start_from_the_validation_images(
    cached_run: CachedRuns, image_model: Path, tmp_path: Path
) -> None:
    images = [tiny.write_image(tmp_path / f"{number}.png", 128, 96, seed=number) for number in range(2)]

    def samples(*paths: Path) -> list[bytes]:
        settings = {**STEPS, "model": image_model, "train_mode": "i2v", "max_train_steps": 1, "dump_steps": None}
        prompts = {"validation_prompts": ["a rabbit walks"] * len(paths), "validation_paths": list(paths)}
        folder = cached_run(settings, **prompts).folder / "samples"
        return [path.read_bytes() for path in sorted(folder.glob("step-000000-prompt-*"))]

    one, other = samples(images[0]), samples(images[1])
    assert len(one) == len(other) == 1 and one != other
    assert samples(images[0], images[1])[0] == one[0]
    argv = runs.wan_flags(cached_run.model, cached_run.metadata, tmp_path / "out", validation_paths=images)
    assert runs.train(argv).code == 2  # text-to-video does not use them


@covers("validation_epochs")
@pytest.mark.slow
def test_validation_runs_every_n_epochs(cached_run: CachedRuns) -> None:
    one_step = {
        "fix_sample_size": [64, 64],
        "video_sample_n_frames": 1,
        "train_batch_size": 16,
    }  # one step is one epoch
    four = {**one_step, "num_train_epochs": 4, "validation_rows": 1, "validation_steps": 10**6}
    for every, due in ((2, [0, 2, 4]), (3, [0, 3, 4]), (0, [0, 4])):
        outcome = cached_run(**four, validation_epochs=every)
        assert [record["step"] for record in outcome.validation] == due and len(outcome.metrics) == 4


# -------------------------------------------------------------------------------------------------------- completeness


def test_every_flag_of_the_parser_is_covered_by_a_test(cached_run: CachedRuns) -> None:
    flags = set(
        vars(
            runs.train_script().parse_args(
                runs.wan_flags(cached_run.model, cached_run.metadata, cached_run.folder / "unused")
            )
        )
    )
    assert not COVERED.keys() & COVERED_ELSEWHERE.keys()
    assert COVERED.keys() | COVERED_ELSEWHERE.keys() == flags
    for name in COVERED_ELSEWHERE.values():
        module, test = name.split(".")
        (path,) = (tiny.ROOT / "tests").rglob(f"{module}.py")
        assert re.search(rf"^def {test}\b", path.read_text(encoding="utf-8"), flags=re.MULTILINE), name


def test_the_flags_of_the_published_command_are_covered_here() -> None:
    paths = {"pretrained_model_name_or_path", "train_data_dir", "train_data_meta", "output_dir"}
    assert paths | runs.WAN_FLAGS.keys() <= COVERED.keys()
