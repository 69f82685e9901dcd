"""Tests of videox.training.validation_loss and sampling: held-out loss, restored state, sample clips."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import tiny
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from videox.diffusion.flow_matching import keyed_noise
from videox.shapes import Bucket
from videox.tracking.jsonl import read_lines
from videox.tracking.preview import THUMB_SIDE
from videox.training.sampling import ClipWriter, SampleClip, SampledClips, TimeLimit, sample_clips
from videox.training.validation_loss import (
    HeldOut,
    HeldOutLoss,
    ValidationLoss,
    append_validation,
    change_since_first,
    evaluation_mode,
    fixed_sigmas,
    validation_loss,
)

SHAPE = Bucket(5, 32, 48)
SETTINGS = {"shape": SHAPE, "fps": 16.0, "steps": 2, "guidance": {"guidance_scale": 3.0}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_wan_t2v(tmp_path_factory.mktemp("wan"))


@pytest.fixture
def transformer(folder: Path) -> WanTransformer3DModel:
    return WanTransformer3DModel.from_pretrained(folder, subfolder="transformer").train()


@pytest.fixture
def pipeline(folder: Path) -> Iterator[WanPipeline]:
    pipeline = WanPipeline.from_pretrained(folder)
    pipeline.transformer.train()
    yield pipeline


def held_out(count: int) -> list[HeldOut]:
    return [
        HeldOut(
            keyed_noise(100 + i, (1, 16, 2 + i % 2, 4, 6)) * 0.5,
            {"prompt_embeds": keyed_noise(200 + i, (1, 8, 32))},
        )
        for i in range(count)
    ]


def predict_with(model: nn.Module):
    def predict(noisy, timestep, sample):
        prompt = sample.conditions["prompt_embeds"]
        return model(hidden_states=noisy, timestep=timestep, encoder_hidden_states=prompt, return_dict=False)[0]

    return predict


def loss_of(model: nn.Module, samples: list[HeldOut], **changed) -> ValidationLoss:
    noise_key = changed.pop("noise_key", 42)
    measure = HeldOutLoss(predict_with(model), model, shift=5.0, noise_key=noise_key, sigmas_per_sample=3)
    return validation_loss(samples, measure, **changed)


def sample(pipeline: WanPipeline, prompts: list[str], folder: Path, step: int, **changed) -> SampledClips:
    """Sample clips; keywords are those of sample_clips or ClipWriter, or replace a setting; clip i has seed + i."""
    keywords = {name: changed.pop(name) for name in ("limit", "collective") if name in changed}
    writing = {name: changed.pop(name) for name in ("enabled", "on_clip") if name in changed}
    seed, shapes = changed.pop("seed", 3), changed.pop("shapes", [SHAPE] * len(prompts))
    clips = [
        SampleClip(prompt, **{**SETTINGS, "shape": shape, **changed}, seed=seed + i)
        for i, (prompt, shape) in enumerate(zip(prompts, shapes, strict=True))
    ]
    return sample_clips(pipeline, clips, ClipWriter(folder, step, **writing), **keywords)


def global_states() -> list[bytes]:
    return [
        torch.get_rng_state().numpy().tobytes(),
        b"".join(np.asarray(part).tobytes() for part in np.random.get_state()[1:]),  # noqa: NPY002 - the state under test
        repr(random.getstate()).encode(),
    ]


@given(count=st.integers(1, 40), shift=st.floats(0.1, 20))
def test_sigmas_are_quantiles_of_the_training_distribution(count, shift):
    sigmas = fixed_sigmas(count, shift)
    assert len(sigmas) == count and all(0 < sigma < 1 for sigma in sigmas) and list(sigmas) == sorted(sigmas)
    for i, sigma in enumerate(sigmas):
        t = sigma / (shift - (shift - 1) * sigma)  # without the shift
        assert t == pytest.approx((i + 0.5) / count, rel=1e-9)


def test_sigma_values_and_invalid_arguments():
    assert fixed_sigmas(2, 5.0) == pytest.approx((5 / 8, 15 / 16), rel=1e-12)
    for count, shift in ((0, 5.0), (3, 0.0), (3, math.nan)):
        with pytest.raises(ValueError, match="at least 1"):
            fixed_sigmas(count, shift)


def test_the_loss_equals_the_formula(transformer):
    samples = held_out(2)
    seen = []

    def predict(noisy, timestep, sample):
        seen.append((noisy.clone(), timestep, sample))
        return torch.full_like(noisy, 0.25, dtype=torch.bfloat16)

    measure = HeldOutLoss(predict, transformer, shift=5.0, noise_key=1, sigmas_per_sample=3)
    result = validation_loss(samples, measure)
    assert [id(sample) for _, _, sample in seen] == [id(samples[0])] * 3 + [id(samples[1])] * 3
    expected, noises = [], []
    for noisy, timestep, sample in seen:
        sigma = timestep.double().item() / 1000
        noise = (noisy.double() - (1 - sigma) * sample.latents.double()) / sigma
        assert noise.std() == pytest.approx(1, abs=0.15)
        noises.append(noise.flatten()[:96])
        expected.append((0.25 - (noise - sample.latents.double())).square().mean().item())
    assert result.mean == pytest.approx(np.mean(expected), rel=1e-5)
    assert result.per_sigma == pytest.approx(np.reshape(expected, (2, 3)).mean(0), rel=1e-5)
    assert [timestep.item() / 1000 for _, timestep, _ in seen[:3]] == pytest.approx(result.sigmas)
    correlation = torch.corrcoef(torch.stack(noises)) - torch.eye(6)
    assert correlation.abs().max() < 0.5  # each sample and each sigma has its own noise


def test_validation_repeats_exactly_and_restores_all_state(transformer):
    transformer.blocks[0].eval()  # a module that is in eval mode during training stays in eval mode
    flags = [module.training for module in transformer.modules()]
    samples = held_out(3)
    before = global_states()
    first = loss_of(transformer, samples)
    assert global_states() == before
    torch.rand(5)
    assert loss_of(transformer, samples) == first
    assert [module.training for module in transformer.modules()] == flags and not all(flags) and any(flags)
    assert all(parameter.grad is None for parameter in transformer.parameters())
    assert loss_of(transformer, samples, noise_key=43).mean != first.mean


def use_global_generators() -> None:
    before = global_states()
    torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002 - the state under test
    assert all(a != b for a, b in zip(before, global_states(), strict=True))


class Noisy(nn.Module):
    """A model with dropout that draws from every global generator."""

    def __init__(self):
        super().__init__()
        self.inner, self.dropout = nn.Linear(6, 6), nn.Dropout(0.5)

    def forward(self, hidden_states, **_):
        assert not torch.is_grad_enabled() and not self.dropout.training
        use_global_generators()
        return (self.dropout(self.inner(hidden_states)),)


def test_dropout_is_off_and_generators_are_restored_after_an_error():
    model = Noisy()
    before = global_states()
    assert loss_of(model, held_out(2)) == loss_of(model, held_out(2))
    assert model.dropout.training and global_states() == before
    with pytest.raises(ZeroDivisionError), evaluation_mode([model]):
        use_global_generators()
        raise ZeroDivisionError
    assert model.dropout.training and global_states() == before and torch.is_grad_enabled()


def test_the_loss_falls_when_the_model_learns(transformer):
    samples = held_out(1)
    before = loss_of(transformer, samples)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=3e-3)
    predict = predict_with(transformer)
    for step in range(30):
        sigma = torch.tensor([(0.37 * step) % 0.98 + 0.01])
        noise = keyed_noise(1000 + step, samples[0].latents.shape)
        noisy = (1 - sigma) * samples[0].latents + sigma * noise
        loss = (predict(noisy, 1000 * sigma, samples[0]) - (noise - samples[0].latents)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = loss_of(transformer, samples)
    assert after.mean < 0.9 * before.mean


@pytest.mark.parametrize(("count", "world_size"), [(3, 2), (5, 4), (2, 4), (4, 2), (1, 3)])
def test_sharded_validation_has_the_same_loss_and_equal_passes_per_rank(transformer, count, world_size):
    samples = held_out(count)
    single = loss_of(transformer, samples)
    tables, passes = [], []

    def record(table):
        tables.append(table)
        return table

    for rank in range(world_size):
        calls = []

        def predict(noisy, timestep, sample, calls=calls):
            calls.append(sample)
            return predict_with(transformer)(noisy, timestep, sample)

        measure = HeldOutLoss(predict, transformer, shift=5.0, noise_key=42, sigmas_per_sample=3)
        validation_loss(samples, measure, rank=rank, world_size=world_size, all_reduce_sum=record)
        passes.append(len(calls))
    total = sum(tables)
    assert len(set(passes)) == 1 and passes[0] == 3 * math.ceil(count / world_size)
    last = loss_of(transformer, samples, rank=world_size - 1, world_size=world_size, all_reduce_sum=lambda _: total)
    assert last == single


def test_samples_and_a_reduction_are_required(transformer):
    for samples, world_size in (([], 1), (held_out(1), 2)):
        with pytest.raises(ValueError, match="samples and a sum are required"):
            loss_of(transformer, samples, world_size=world_size)


def test_lines_of_validation_jsonl(tmp_path):
    path = tmp_path / "validation.jsonl"
    append_validation(path, 0, ValidationLoss(0.1 + 0.2, (0.625, 0.9375), (1 / 3, 2.0)))
    append_validation(path, 20, ValidationLoss(math.nan, (0.625, 0.9375), (math.inf, 2.0)))
    assert read_lines(path) == [
        {"step": 0, "loss": 0.1 + 0.2, "per_sigma": [[0.625, 1 / 3], [0.9375, 2.0]]},
        {"step": 20, "loss": None, "per_sigma": [[0.625, None], [0.9375, 2.0]], "non_finite": True},
    ]
    assert json.loads(path.read_bytes().splitlines()[0])["step"] == 0


@pytest.mark.parametrize(
    ("losses", "text"),
    [
        ([0.5], ""),
        ([0.5, 0.4, 0.2025], " (-59.5 % since step 0)"),
        ([0.5, 0.6], " (+20.0 % since step 0)"),
        ([0.5, math.nan], ""),
        ([math.inf, 0.5], ""),
    ],
)
def test_the_change_since_the_first_validation(tmp_path, losses, text):
    path = tmp_path / "validation.jsonl"
    for step, loss in enumerate(losses):
        append_validation(path, 20 * step, ValidationLoss(loss, (), ()))
    assert change_since_first(path) == text


def test_clips_have_the_frame_rate_and_sampling_restores_all_state(pipeline, tmp_path):
    pipeline.set_progress_bar_config(desc="custom", disable=True)
    pipeline.scheduler.set_timesteps(7)
    scheduler, timesteps = pipeline.scheduler, pipeline.scheduler.timesteps.clone()
    config = dict(pipeline.config)
    before = global_states()
    prompts = ["a bright square moves over a dark background", "../../a cat\n\x1b[31m"]
    result = sample(pipeline, prompts, tmp_path / "samples", 20)
    assert result.warnings == []
    names = ["step-000020-prompt-0.mp4", "step-000020-prompt-1.mp4", "step-000020.png"]
    assert [path.name for path in result.paths] == names == sorted(p.name for p in (tmp_path / "samples").iterdir())
    for path in result.paths[:2]:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            shapes = [frame.to_ndarray(format="rgb24").shape for frame in container.decode(stream)]
            assert (shapes, stream.average_rate) == ([(32, 48, 3)] * 5, 16)
    assert Image.open(result.paths[2]).size[0] > 3 * THUMB_SIDE
    assert global_states() == before
    assert pipeline.scheduler is scheduler and torch.equal(scheduler.timesteps, timesteps)
    assert pipeline._progress_bar_config == {"desc": "custom", "disable": True} and dict(pipeline.config) == config
    assert all(module.training for module in pipeline.transformer.modules())
    assert not any(module.training for module in pipeline.vae.modules())
    assert all(parameter.grad is None for parameter in pipeline.transformer.parameters())


def test_sampling_noise_is_fixed_per_prompt(pipeline, tmp_path):
    def sample_images(step, prompts, **changed):
        paths = sample(pipeline, prompts, tmp_path, step, shapes=[Bucket(1, 32, 48)] * len(prompts), **changed).paths
        assert [path.suffix for path in paths] == [".png"] * (len(prompts) + 1)
        return [np.asarray(Image.open(path)).astype(int) for path in paths[:-1]]

    first = sample_images(10, ["a cat", "a cat"])
    torch.rand(10)
    again = sample_images(20, ["a cat", "a cat"])
    assert np.array_equal(first, again) and not np.array_equal(first[0], first[1])
    assert not np.array_equal(sample_images(30, ["a cat"], seed=4)[0], first[0])
    assert np.array_equal(sample_images(35, ["a cat"], seed=4)[0], first[1])  # prompt i has the noise of seed + i
    with torch.no_grad():
        pipeline.transformer.proj_out.weight.mul_(3)
    assert not np.array_equal(sample_images(40, ["a cat"])[0], first[0])


class FailsInTheMiddle:
    """A forward hook that raises at the given pass of the transformer."""

    def __init__(self, at: int, error: Exception) -> None:
        self.passes, self.at, self.error = 0, at, error

    def __call__(self, *_: object) -> None:
        self.passes += 1
        if self.passes == self.at:
            raise self.error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        pytest.param(TypeError("a kernel"), marks=pytest.mark.slow),
        pytest.param(OSError("gone"), marks=pytest.mark.slow),
    ],
)
def test_a_failed_sample_is_a_warning_and_the_others_are_written(pipeline, tmp_path, error):
    handle = pipeline.transformer.register_forward_hook(FailsInTheMiddle(3, error))
    scheduler = pipeline.scheduler
    result = sample(pipeline, ["bad", "good"], tmp_path, 5)
    assert [path.name for path in result.paths] == ["step-000005-prompt-1.mp4", "step-000005.png"]
    assert result.warnings == [f"no sample at step 5, prompt 0: {type(error).__name__}: {error}"]
    assert pipeline.scheduler is scheduler and pipeline.transformer.training
    handle.remove()
    pipeline.transformer.register_forward_hook(FailsInTheMiddle(3, error))
    with pytest.raises(type(error), match=str(error)):
        sample(pipeline, ["bad", "good"], tmp_path, 5, collective=True)
    assert pipeline.scheduler is scheduler and pipeline.transformer.training and torch.is_grad_enabled()


def test_sharded_sampling_goes_on_if_only_the_decoding_fails(pipeline, tmp_path):
    # no rank waits for another one after the last denoising step
    pipeline.vae.decoder.register_forward_hook(FailsInTheMiddle(1, torch.OutOfMemoryError("out of memory")))
    result = sample(pipeline, ["bad", "good"], tmp_path, 5, collective=True)
    assert [path.name for path in result.paths] == ["step-000005-prompt-1.mp4", "step-000005.png"]
    assert result.warnings == ["no sample at step 5, prompt 0: OutOfMemoryError: out of memory"]


class Answers:
    """Stands for the main rank's clock: whether the time is over, by number of the question."""

    def __init__(self, over_at: int) -> None:
        self.asked, self.over_at = 0, over_at

    def __call__(self, _: bool) -> bool:
        self.asked += 1
        return self.asked >= self.over_at


# two steps a clip: a clip asks before its first step and after it, not after the last one
@pytest.mark.parametrize(("over_at", "finished", "left"), [(1, 0, "prompts 0, 1 were"), (2, 0, "prompts 0, 1 were"),
                                                           (3, 1, "prompt 1 was"), (4, 1, "prompt 1 was"), (5, 2, "")])  # fmt: skip
def test_clips_that_do_not_fit_in_the_time_are_left_out(pipeline, tmp_path, over_at, finished, left):
    scheduler = pipeline.scheduler
    result = sample(pipeline, ["one", "two"], tmp_path, 5, limit=TimeLimit(120, Answers(over_at)))
    assert len(result.paths) == finished + bool(finished)  # and the contact sheet
    assert result.warnings == ([f"step 5: {left} not sampled within --sample_minutes 2"] if left else [])
    assert pipeline.scheduler is scheduler and pipeline.transformer.training


def test_a_time_limit_counts_from_its_start():
    assert TimeLimit(1e-9).is_over() and not TimeLimit(1000).is_over()


def test_clips_of_one_step_have_their_own_settings(pipeline, tmp_path):
    finished = []
    shapes = [Bucket(5, 32, 48), Bucket(9, 64, 32), Bucket(1, 48, 48)]
    result = sample(pipeline, ["a", "b", "c"], tmp_path / "one", 5, shapes=shapes, on_clip=finished.append)
    assert result.warnings == [] and [clip.frames.shape[:3] for clip in finished] == shapes
    assert [clip.path.name for clip in finished] == [path.name for path in result.paths[:3]]
    assert all(clip.seconds > 0 and clip.clip.facts()["guidance_scale"] == 3.0 for clip in finished)
    shifted, other = [], []
    sample(pipeline, ["a"], tmp_path / "two", 5, flow_shift=9.0, on_clip=shifted.append)
    sample(pipeline, ["a"], tmp_path / "three", 5, guidance={"guidance_scale": 9.0}, on_clip=other.append)
    pictures = [finished[0].frames, shifted[0].frames, other[0].frames]
    assert not any(np.array_equal(pictures[i], pictures[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert pipeline.scheduler.config.flow_shift == 3.0  # of the model


def test_sizes_that_the_pipeline_refuses_are_a_warning(pipeline, tmp_path):
    result = sample(pipeline, ["a cat"], tmp_path, 5, shapes=[Bucket(5, 33, 48)])
    assert result.paths == [] and "ValueError" in result.warnings[0] and "\n" not in result.warnings[0]


def test_nonfinite_samples_are_a_warning(pipeline, tmp_path):
    with torch.no_grad():
        pipeline.transformer.proj_out.bias.fill_(math.nan)
    result = sample(pipeline, ["a cat"], tmp_path, 5)
    assert result.paths == [] and result.warnings == ["no sample at step 5, prompt 0: the picture is not finite"]


def test_a_folder_that_cannot_be_written_is_a_warning(pipeline, tmp_path):
    (tmp_path / "samples").write_text("in the way")
    result = sample(pipeline, ["a cat"], tmp_path / "samples", 5)
    assert result.paths == [] and len(result.warnings) == 2 and "was not written" in result.warnings[0]


def test_a_rank_that_does_not_write_takes_part_in_sampling(pipeline, tmp_path):
    passes = []
    handle = pipeline.transformer.register_forward_hook(lambda *_: passes.append(1))
    result = sample(pipeline, ["a cat"], tmp_path / "s", 5, enabled=False)
    handle.remove()
    assert len(passes) == 4 and result.paths == [] and not (tmp_path / "s").exists()
