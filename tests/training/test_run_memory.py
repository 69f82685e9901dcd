"""Tests of videox.training.run_memory: encoders, adapters, smaller samples and proposals, with small models."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from proposed import ROOT, launched, output_flags
from transformers import UMT5Config, UMT5EncoderModel

from videox.data.plan.plan import plan_epoch
from videox.data.plan.settings import columns_of
from videox.distributed.backends import BACKENDS
from videox.errors import UserError
from videox.estimate.duration import Speed
from videox.estimate.flops import cross_attention_network
from videox.estimate.gpus import GPUS
from videox.estimate.measure import count_without_embeddings, vae_flops_per_pixel
from videox.estimate.memory import SAFE_SHARE, BlockWeights, Encoders, Parameters, frozen_bytes
from videox.estimate.model_profile import ModelProfile
from videox.estimate.peak_memory import peak_bytes
from videox.estimate.stand_in_data import describe_data
from videox.lora.targets import choose_targets
from videox.models.configured import Component
from videox.models.quantised_loading import load_quantised
from videox.models.quantised_text import quantise_text_encoder
from videox.models.streamed_blocks import stream_blocks
from videox.models.trained_stream import stream_trained
from videox.training.flags import make_parser
from videox.training.planning import plan_settings
from videox.training.run_memory import Launch, RunMemory, launch_of

TRANSFORMER = {
    "num_attention_heads": 3, "attention_head_dim": 32, "ffn_dim": 320, "num_layers": 3, "in_channels": 16,
    "out_channels": 16, "text_dim": 64, "patch_size": [1, 2, 2], "cross_attn_norm": True, "freq_dim": 256,
}  # fmt: skip
VAE = {"base_dim": 8}
TEXT = {"vocab_size": 50, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
BLOCKS = {"blocks": ("attn1", "attn2", "ffn")}
PARSER = make_parser("", modes=("normal",), recipes=ROOT / "config/recipes/wan2.1")
BUCKETS = [
    "--enable_bucket",
    "--training_with_video_token_length",
    "--random_hw_adapt",
    "--video_sample_n_frames",
    "81",
]
SIZES = [*BUCKETS, "--token_sample_size", "640", "--video_sample_size", "640", "--image_sample_size", "1024"]
SMALL_CLIPS = [
    *BUCKETS[:-1],
    "9",
    "--token_sample_size",
    "64",
    "--video_sample_size",
    "64",
    "--image_sample_size",
    "64",
]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "ACCELERATE_DEEPSPEED_CONFIG_FILE", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)


def parse(folder: Path, *flags: str) -> argparse.Namespace:
    return PARSER.parse([*output_flags(folder), "--dry_run_model", "small", *flags])


def run_memory(folder: Path, *flags: str, **variables: str) -> RunMemory:
    """Return the memory of a run of the small model, as a dry run has it."""
    args = parse(folder, *flags)
    launch = launch_of(variables, args)
    profile = ModelProfile(
        fps=16,
        task="text-to-video",
        network=partial(cross_attention_network, TRANSFORMER, text_tokens=512, image_tokens=0),
        blocks=BLOCKS,
        components={
            "transformer": ("diffusers.WanTransformer3DModel", TRANSFORMER),
            "vae": ("diffusers.AutoencoderKLWan", VAE),
            "text_encoder": ("transformers.UMT5EncoderModel", TEXT),
        },
    )
    columns = columns_of(describe_data(args.dry_run_data), by_second=args.video_sample_fps > 0)
    settings = plan_settings(
        args, seed=args.seed, slots=launch.processes * args.gradient_accumulation_steps, min_frames=1,
        cost_linear=profile.cost[0], cost_quadratic=profile.cost[1], barrier=BACKENDS[launch.backend].barrier,
        accumulation=args.gradient_accumulation_steps,
    )  # fmt: skip
    return RunMemory(args, profile, launch, columns, settings)


def loaded_bytes(module: torch.nn.Module) -> int:
    """Return the bytes of a module's weights and buffers, as it is loaded."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def test_encoders_are_as_large_as_they_are_loaded(tmp_path: Path) -> None:
    run = run_memory(tmp_path, *SMALL_CLIPS, "--mixed_precision", "bf16")
    text, vae = UMT5EncoderModel(UMT5Config(**TEXT)), AutoencoderKLWan(**VAE)
    in_float32 = run.encoders(replace(run.setup, half=False))
    assert in_float32.weights == {"text_encoder": loaded_bytes(text), "vae": loaded_bytes(vae)}
    found = run.encoders(run.setup)
    assert found.weights == {"text_encoder": loaded_bytes(text.bfloat16()), "vae": loaded_bytes(vae)}
    clip = torch.zeros(1, 3, *run.largest)
    measured = peak_bytes(lambda: vae.encode(clip).latent_dist.mode()) + clip.nbytes
    assert found.vae_peak == pytest.approx(measured, rel=0.02)
    smaller = replace(run.setup, tokens=run.setup.tokens // 2)
    assert run.encoders(smaller).vae_peak == found.vae_peak * smaller.tokens / run.setup.tokens


def test_a_vae_in_bfloat16_needs_half_the_memory(tmp_path: Path) -> None:
    full, half = (run_memory(tmp_path, *SMALL_CLIPS, "--vae_dtype", dtype) for dtype in ("fp32", "bf16"))
    found = full.encoders(full.setup), half.encoders(half.setup)
    assert 2 * found[1].weights["vae"] == found[0].weights["vae"]
    assert found[1].weights["text_encoder"] == found[0].weights["text_encoder"]
    assert 0.5 < found[1].vae_peak / found[0].vae_peak < 0.65  # the video is there in float32, too
    speed, plan = Speed(GPUS["h100"], 900e12, 0.4, False), plan_epoch(full.columns, full.settings, 0)
    for run in (full, half):
        run.args.tokenizer_max_length = 16
    captions = speed.float32_seconds(
        len(plan.row) * 2 * 16 * count_without_embeddings(UMT5EncoderModel(UMT5Config(**TEXT)))
    )
    seconds = [run.encoding_seconds(plan, speed) - captions for run in (full, half)]
    assert seconds[0] == pytest.approx(2 * seconds[1])  # TF32, in which torch computes convolutions, and bfloat16


def test_low_vram_copies_the_text_encoder_for_each_micro_batch(tmp_path: Path) -> None:
    speed, flags = Speed(GPUS["h100"], 900e12, 0.4, False), ("--low_vram", "--latent_cache", "c")
    found = []
    for chosen in ((), flags[:1], flags):
        run = run_memory(tmp_path, *SMALL_CLIPS, *chosen)
        run.args.tokenizer_max_length = 16
        plan = plan_epoch(run.columns, run.settings, 0)
        found.append(run.encoding_seconds(plan, speed))
    largest = max(run.encoders(run.setup).weights.values())
    assert found[1] - found[0] == pytest.approx(len(plan.micro_bucket) * largest / 64e9)
    assert found[2] == found[0]


def test_parameters_are_those_that_train(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = WanTransformer3DModel.from_config(TRANSFORMER)
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    whole = sum(p.numel() for p in model.parameters())
    full = run_memory(tmp_path).parameters(0)
    assert (full.total, full.trainable, full.block, full.outside) == (whole, whole, blocks[0], whole - sum(blocks))
    attention = run_memory(tmp_path, "--trainable_modules", "attn1").parameters(0)
    trained = sum(p.numel() for name, p in model.named_parameters() if "attn1" in name)
    assert (attention.total, attention.trainable) == (whole, trained)
    assert [block.trained for block in full.blocks] == [block.elements for block in full.blocks] == blocks
    assert [block.trained for block in attention.blocks] == [trained // len(blocks)] * len(blocks)

    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    targets = choose_targets(shapes, BLOCKS, None)
    sides = [shapes[f"{target}.weight"] for target in targets]
    assert len(targets) == 3 * (4 + 4 + 2)  # q, k, v and output of both attentions, and two feed-forward layers
    adapters = sum(8 * (outputs + inputs) for outputs, inputs in sides)
    lora = run_memory(tmp_path, "--lora_rank", "8").parameters(8)
    assert (lora.total, lora.trainable, lora.block) == (whole + adapters, adapters, blocks[0])
    dora = run_memory(tmp_path, "--lora_rank", "8", "--lora_type", "dora").parameters(8)
    assert dora.trainable == adapters + sum(outputs for outputs, _ in sides)


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_frozen_weights_are_as_large_as_they_are_loaded(tmp_path: Path, precision: str) -> None:
    """Resident, and with all blocks streamed. The few parameters that diffusers keeps in float32 are in the 5 %."""
    torch.manual_seed(0)
    WanTransformer3DModel.from_config(TRANSFORMER).save_pretrained(tmp_path / "model")
    component = Component(tmp_path / "model", dict(WanTransformer3DModel.load_config(tmp_path / "model")))
    model, _ = load_quantised(WanTransformer3DModel, component, ["blocks"], precision, torch.device("cpu"))
    flags = [
        "--lora_rank",
        "4",
        "--mixed_precision",
        "bf16",
        "--gradient_checkpointing",
        "--base_precision",
        precision,
    ]
    run = run_memory(tmp_path, *SMALL_CLIPS, *flags, "--stream_blocks", "all")
    assert run.setup.streamed == 3
    parameters = run.parameters(4)
    in_blocks = sum(block.bytes_in(precision, 2) for block in parameters.blocks)
    assert in_blocks == pytest.approx(sum(p.nbytes for p in model.blocks.parameters()), rel=0.05)
    whole = frozen_bytes(parameters, replace(run.setup, streamed=0))
    stream = stream_blocks(model.requires_grad_(False).blocks, range(3), torch.device("cpu"), lambda value: [value])
    found = frozen_bytes(parameters, run.setup)
    assert list(model.blocks.parameters()) == []
    assert found.resident == whole.resident - in_blocks
    assert found.resting == pytest.approx(stream.bytes, rel=0.1)  # small tensors are aligned to 256 bytes
    assert found.on_device()[1] == 2 * found.streamed_block


def test_trained_blocks_are_as_large_as_they_are_streamed(tmp_path: Path) -> None:
    """Weights and gradients, on the host and on the device; small tensors are aligned to 256 bytes."""
    flags = ["--optimizer", "adamw_bf16_offload", "--mixed_precision", "bf16", "--gradient_checkpointing"]
    run = run_memory(tmp_path, *SMALL_CLIPS, *flags, "--stream_blocks", "all", "--dry_run_processes", "1")
    memory = run.memory(run.setup)
    model = WanTransformer3DModel.from_config(TRANSFORMER).to(torch.bfloat16)
    outside = sum(p.nbytes for name, p in model.named_parameters() if not name.startswith("blocks."))
    stream = stream_trained(model.blocks, range(3), torch.device("cpu"))
    assert memory.host["streamed blocks"] == pytest.approx(stream.weights.bytes, rel=0.1)
    assert memory.host["streamed gradients"] == pytest.approx(stream.gradients.bytes, rel=0.1)
    buffers = sum(buffer.nbytes for buffer in stream.weights._buffers)
    assert memory.states["weights"] == pytest.approx(outside + buffers, rel=0.05)
    of_block = sum(p.nbytes for p in model.blocks[0].parameters())
    assert memory.states["gradients"] == pytest.approx(outside + of_block + stream.gradients._buffer.nbytes, rel=0.05)
    assert memory.states["optimizer"] == 0


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_a_quantised_text_encoder_is_as_large_as_it_is_loaded(tmp_path: Path, precision: str) -> None:
    run = run_memory(tmp_path, *SMALL_CLIPS, "--mixed_precision", "bf16", "--text_encoder_precision", precision)
    torch.manual_seed(0)
    encoder = UMT5EncoderModel(UMT5Config(**TEXT)).bfloat16()
    whole = sum(parameter.nbytes for parameter in encoder.parameters())
    quantise_text_encoder(encoder, precision, torch.bfloat16, torch.device("cpu"))
    size = sum(parameter.nbytes for parameter in encoder.parameters())
    assert run.encoders(run.setup).weights["text_encoder"] == size < whole
    plain = run.encoders(replace(run.setup, text_precision="bf16")).weights["text_encoder"]
    assert plain == whole
    assert (
        run.memory(run.setup).states["encoders"]
        < run.memory(replace(run.setup, text_precision="bf16")).states["encoders"]
    )


def test_auto_streams_as_few_blocks_as_necessary(tmp_path: Path) -> None:
    flags = ["--lora_rank", "4", "--mixed_precision", "bf16", "--gradient_checkpointing", "--stream_blocks", "auto"]
    run = run_memory(tmp_path, *SMALL_CLIPS, *flags)
    run.parameters = lambda rank: Parameters(
        10**9 + 10, 10, 10**8, 0, (BlockWeights(10**8, 10**8, 10**4, 10**6),) * 10
    )
    counts = {}
    for count in (0, *range(3, 11)):
        counts[count] = run.memory(replace(run.setup, streamed=count)).total()
    for count, total in counts.items():
        assert run.streamed(total / SAFE_SHARE) == count
    assert run.streamed(counts[10] / 2) == 10  # as near as it gets


def test_smaller_samples_are_those_of_a_run_with_their_flags(tmp_path: Path) -> None:
    run = run_memory(tmp_path, *SIZES)
    smaller = list(run._smaller_samples())
    assert [samples.flags.split()[1] for samples in smaller[:5]] == ["512", "448", "384", "320", "256"]
    assert [samples.flags.split()[-1] for samples in smaller[5:]] == ["49", "33", "17"]
    for samples in smaller:
        assert run_memory(tmp_path, *SIZES, *samples.flags.split()).setup.tokens == samples.tokens < run.setup.tokens
    assert [s.tokens for s in smaller] == sorted((s.tokens for s in smaller), reverse=True)
    fixed = ["--enable_bucket", "--fix_sample_size", "480", "832"]
    assert not list(run_memory(tmp_path, *fixed)._smaller_samples())


def test_weights_are_cast_where_the_engine_keeps_them_in_float32(tmp_path: Path) -> None:
    def peaks(*flags: str) -> tuple[bool, bool]:
        run = run_memory(tmp_path, "--mixed_precision", "bf16", *flags)
        given: dict[str, Any] = {}

        def network(**keywords: bool) -> Any:
            given.update(keywords)
            return cross_attention_network(TRANSFORMER, text_tokens=512, image_tokens=0, **keywords)

        object.__setattr__(run.model, "network", network)
        frozen = run.network(run.setup).frozen
        assert given["half"] is True
        return given["cast"], frozen

    eight = ["--dry_run_processes", "8", "--dry_run_backend"]
    assert peaks() == (True, False) and peaks(*eight, "ddp") == (True, False)
    assert peaks(*eight, "zero3") == (False, False) and peaks(*eight, "fsdp2") == (False, False)
    assert peaks("--optimizer", "adamw_bf16") == (False, False) and peaks("--lora_rank", "4") == (False, True)


def test_the_launch_is_that_of_the_launcher_or_of_the_flags(tmp_path: Path) -> None:
    deepspeed = {"ACCELERATE_USE_DEEPSPEED": "true", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "4"}
    config = str(ROOT / "config/zero_stage3_config_cpu_offload.json")
    found = launch_of({**deepspeed, "ACCELERATE_DEEPSPEED_CONFIG_FILE": config}, parse(tmp_path))
    assert (found.backend, found.processes, found.per_host, found.half) == ("zero3", 16, 4, False)
    assert found.zero["offload_param"] == {"device": "cpu"} and found.zero["sub_group_size"] == 10**9
    fsdp = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "WORLD_SIZE": "2",
        "ACCELERATE_MIXED_PRECISION": "bf16",
    }
    assert launch_of(fsdp, parse(tmp_path)) == Launch("fsdp2", 2, 2, True, {})
    assert launch_of({}, parse(tmp_path)) == Launch("single", 1, 1, False, {})
    planned = parse(tmp_path, "--dry_run_deepspeed_config", "config/zero_stage3_config_cpu_offload.json")
    assert launch_of({}, planned).zero["offload_param"] == {"device": "cpu"}  # relative to the repository
    assert launch_of({"WORLD_SIZE": "32"}, parse(tmp_path)) == Launch("ddp", 32, 8, False, {})
    stated = ["--dry_run_processes", "16", "--dry_run_backend", "zero2"]
    assert launch_of(fsdp, parse(tmp_path, *stated)) == Launch("zero2", 16, 8, True, {})
    with pytest.raises(UserError, match="single is one process, but 16 are planned"):
        launch_of({}, parse(tmp_path, *stated[:3], "single"))


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--lora_rank", "64"],
        ["--optimizer", "adamw_bf16", "--mixed_precision", "bf16"],
        ["--optimizer", "adamw_offload", "--gradient_accumulation_steps", "2", "--train_batch_size", "4"],
        ["--dry_run_processes", "2", "--dry_run_backend", "ddp"],
        ["--dry_run_processes", "8", "--dry_run_backend", "fsdp2"],
        ["--dry_run_processes", "8", "--dry_run_backend", "zero2"],
    ],
    ids=" ".join,
)
def test_the_proposed_flags_make_the_run_that_was_estimated(flags: list[str], tmp_path: Path) -> None:
    """At every limit, each proposal is typed as it is printed, and the run of these flags has its memory."""
    run = run_memory(tmp_path, *SIZES, *flags)
    run._vae_peak = lambda tiled: 10.0**8
    base = run.memory(run.setup).total()
    tried = 0
    for share in (0.6, 0.35):
        for proposal in run.proposals(share * base / SAFE_SHARE):
            words, variables = [*SIZES, *flags], dict[str, str]()
            for step in proposal.changes:
                more, changed = launched(step.change.flags)
                words, variables = [*words, *more], {**variables, **changed}
            typed = run_memory(tmp_path, *words, **variables)
            vae = 10.0**8 * typed.setup.tokens / run.setup.tokens
            typed.encoders = lambda setup, typed=typed, vae=vae: Encoders(typed.__class__.encoders(typed, setup).weights, vae)  # type: ignore[method-assign]  # fmt: skip
            typed._vae_peak = lambda tiled: 0.0
            assert typed.memory(typed.setup).total() == pytest.approx(proposal.changes[-1].total, rel=1e-6), words
            tried += 1
            if step := next((s for s in proposal.changes if "--train_batch_size 1" in s.change.flags), None):
                samples = run.args.train_batch_size * run.args.gradient_accumulation_steps
                assert typed.args.gradient_accumulation_steps == samples, step
    assert tried


@pytest.mark.slow
@pytest.mark.parametrize("frames", ["17", "33", "41"])
def test_the_memory_of_a_vae_that_encodes_in_parts_is_that_of_the_whole_clip(frames: str, tmp_path: Path) -> None:
    run = run_memory(tmp_path, *SMALL_CLIPS[:-7], frames, *SMALL_CLIPS[-6:], "--video_sample_stride", "1")
    assert run.largest.frames == int(frames)
    whole = run._measure_vae(tiled=False)
    run.model = replace(run.model, vae_frames=4)
    assert run._measure_vae(tiled=False) == whole


def test_encoding_takes_the_flops_of_pixels_and_captions(tmp_path: Path) -> None:
    speed = Speed(GPUS["a100-80"], 300e12, 0.4, False)
    run = run_memory(tmp_path, *SIZES, "--mixed_precision", "bf16")
    run.args.tokenizer_max_length = 512
    plan = plan_epoch(run.columns, run.settings, 0)
    sizes = np.diff(plan.micro_first).tolist()
    samples = [(plan.buckets[number], size) for number, size in zip(plan.micro_bucket, sizes, strict=True)]
    pixels = sum(size * bucket.frames * bucket.height * bucket.width for bucket, size in samples)
    with torch.device("meta"):
        vae, text = AutoencoderKLWan(**VAE), UMT5EncoderModel(UMT5Config(**TEXT))
    captions = 200 * 2 * 512 * count_without_embeddings(text)
    clips = vae_flops_per_pixel(vae) * pixels / (0.4 * 150e12)  # convolutions: TF32, by torch's own default
    for half, peak in ((True, 300e12), (False, 19.5e12)):
        run.setup = replace(run.setup, half=half)
        assert run.encoding_seconds(plan, speed) == pytest.approx(clips + captions / (0.4 * peak), rel=1e-9)
