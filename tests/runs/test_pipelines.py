"""Tests of both train.py scripts: the transformer inputs in training equal those of the diffusers pipeline."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import runs
import tiny
import torch
from accelerate import Accelerator
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.models.transformers import transformer_hunyuan_video
from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video
from PIL import Image

from videox.data.dataset import Batch
from videox.data.plan.buckets import Fate
from videox.data.plan.epoch import EpochPlan
from videox.data.plan.plan import plan_epoch
from videox.data.plan.settings import PlanColumns
from videox.diffusion.conditioning import CLIP_MASKS, draw_family, known_pixels, pack_mask
from videox.distributed.accelerator import make_accelerator
from videox.encoders.encode import EncoderInput
from videox.encoders.hunyuan_text import pad_texts, trim_text
from videox.encoders.vae import encode_moments, sample_latents, to_images
from videox.families.wan import encode_captions
from videox.rng import hash_key
from videox.shapes import Bucket
from videox.training.planning import plan_settings

HUNYUAN = "scripts/hunyuanvideo/train.py"
FRAMES, HEIGHT, WIDTH = 9, 48, 64
SETTINGS: Mapping[str, object] = {
    "video_sample_size": 64,
    "image_sample_size": 64,
    "token_sample_size": 64,
    "video_sample_stride": 1,
    "video_sample_n_frames": FRAMES,
    "enable_bucket": True,
    "uniform_sampling": True,
    "train_batch_size": 1,
    "max_train_steps": 1,
    "mixed_precision": "no",
    "vae_sample_mode": "mode",
    "caption_dropout": 0,
    "seed": 1,
    "report_to": "none",
    "report_seconds": 0,
}
LONG, SHORT = "two dogs run after a red ball on the grass, a child laughs and claps", "a cup of black coffee"


@dataclass(frozen=True)
class ModelKind:
    """A kind of model, its train script and its diffusers pipeline.

    Attributes:
        sampling: arguments that a user passes to the pipeline.
        flags: of the train script.
    """

    build: Callable[[Path], Path]
    script: str
    mode: str
    pipeline: type[DiffusionPipeline]
    transformer: type[torch.nn.Module]
    sampling: Mapping[str, object]
    flags: Mapping[str, object] = field(default_factory=dict)

    @property
    def from_picture(self) -> bool:
        """Whether a clip is sampled from a picture."""
        return self.pipeline not in (WanPipeline, HunyuanVideoPipeline)

    @property
    def trainer(self) -> ModuleType:
        return tiny.load_script(self.script)


WAN_T2V = ModelKind(
    tiny.build_wan_t2v, runs.WAN_SCRIPT, "normal", WanPipeline, WanTransformer3DModel, {"guidance_scale": 1.0}
)
HUNYUAN_T2V = ModelKind(
    tiny.build_hunyuan_t2v, HUNYUAN, "normal", HunyuanVideoPipeline, HunyuanVideoTransformer3DModel, {}
)


def wan_i2v(image_embedder: bool) -> ModelKind:
    build = partial(tiny.build_wan_i2v, image_embedder=image_embedder)
    return ModelKind(
        build, runs.WAN_SCRIPT, "i2v", WanImageToVideoPipeline, WanTransformer3DModel, {"guidance_scale": 1.0}
    )


def hunyuan_i2v(condition: str, guidance_scale: float) -> ModelKind:
    build = partial(tiny.build_hunyuan_i2v, image_condition_type=condition)
    pipeline, transformer = HunyuanVideoImageToVideoPipeline, HunyuanVideoTransformer3DModel
    return ModelKind(build, HUNYUAN, "i2v", pipeline, transformer, {"guidance_scale": guidance_scale})


def ti2v(pipeline: type[DiffusionPipeline], i2v_ratio: int) -> ModelKind:
    script, flags = runs.TRAIN_SCRIPTS["wan2.2"], {"i2v_ratio": i2v_ratio}
    return ModelKind(
        tiny.build_wan22_5b, script, "ti2v", pipeline, WanTransformer3DModel, {"guidance_scale": 1.0}, flags
    )


WAN_FLF2V = replace(wan_i2v(image_embedder=True), build=tiny.build_wan_flf2v, mode="flf2v")
KINDS = {
    "wan": WAN_T2V,
    "wan-flf2v": WAN_FLF2V,
    "wan-i2v-clip": wan_i2v(image_embedder=True),
    "wan-i2v": wan_i2v(image_embedder=False),
    "wan-ti2v, text": ti2v(WanPipeline, i2v_ratio=0),
    "wan-ti2v, picture": ti2v(WanImageToVideoPipeline, i2v_ratio=1),
    "hunyuan": HUNYUAN_T2V,
    "hunyuan-token_replace": hunyuan_i2v("token_replace", guidance_scale=6.0),
    "hunyuan-latent_concat": hunyuan_i2v("latent_concat", guidance_scale=1.0),  # it has no guidance embedding
}
IMAGE_TO_VIDEO = ("hunyuan-token_replace", "hunyuan-latent_concat")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that writes the model of a kind at its first use, and returns its folder."""
    root, built = tmp_path_factory.mktemp("models"), {}

    def folder(name: str) -> Path:
        if name not in built:
            built[name] = KINDS[name].build(root / name)
        return built[name]

    return folder


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> Path:
    media = (("clip.mp4", WIDTH, HEIGHT, FRAMES, 24.0),)
    return tiny.make_dataset(tmp_path_factory.mktemp("data"), media)


def command(kind: ModelKind, model: Path, metadata: Path, output_dir: Path, **changes: object) -> list[str]:
    paths = {
        "pretrained_model_name_or_path": model,
        "train_data_meta": metadata,
        "output_dir": output_dir,
        "train_mode": kind.mode,
    }
    return runs.to_argv({**paths, **SETTINGS, **kind.flags, **changes})


# -------------------------------------------------------------------------- a training step compared with the pipeline


@dataclass(frozen=True)
class Call:
    """One call of a transformer: its keyword arguments and its output."""

    keywords: dict[str, Any]
    velocity: torch.Tensor


@contextlib.contextmanager
def recorded_calls(transformer: type[torch.nn.Module]) -> Iterator[list[Call]]:
    """Yield a list to which every call of a transformer of this class is appended."""
    calls: list[Call] = []

    def record(module: torch.nn.Module, args: tuple, keywords: dict[str, Any], output: tuple) -> None:
        if isinstance(module, transformer):
            assert not args
            calls.append(Call(dict(keywords), output[0].detach()))

    hook = torch.nn.modules.module.register_module_forward_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


@dataclass(frozen=True)
class Pair:
    """A dumped training step with its transformer call, and the same step done by the pipeline.

    Attributes:
        training: transformer call of the training step.
        sampling: transformer call of the pipeline.
        video: output of the pipeline, float [T, 3, H, W] in [0, 1], decoded from the dumped latents.
    """

    kind: ModelKind
    dump: runs.Dump
    training: Call
    pipeline: DiffusionPipeline
    sampling: Call
    video: torch.Tensor


@pytest.fixture(scope="module", params=KINDS)
def pair(
    request: pytest.FixtureRequest,
    models: Callable[[str], Path],
    metadata: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Pair:
    kind, model = KINDS[request.param], models(request.param)
    output_dir = tmp_path_factory.mktemp("runs") / "out"
    with recorded_calls(kind.transformer) as trained:
        outcome = runs.train(command(kind, model, metadata, output_dir, dump_steps=1), kind.trainer)
    assert outcome.code == 0, outcome.stderr
    dump = outcome.dump(1)
    pipeline = kind.pipeline.from_pretrained(model)
    with recorded_calls(kind.transformer) as sampled:
        video = sample(kind, pipeline, dump)
    return Pair(kind, dump, *trained, pipeline, sampled[1], video)


def noisy_latents(dump: runs.Dump) -> torch.Tensor:
    return (1 - dump["sigma"].view(-1, 1, 1, 1, 1)) * dump["latents"] + dump["sigma"].view(-1, 1, 1, 1, 1) * dump[
        "noise"
    ]


def sample(kind: ModelKind, pipeline: DiffusionPipeline, dump: runs.Dump) -> torch.Tensor:
    """Sample two steps, the second from the dumped noisy latents at the dumped sigma; decode the dumped latents.

    The dumped first frame, prompt and size are passed as a user would; everything else is chosen by the pipeline.
    """
    sigmas = [1.0, dump["sigma"].item()]
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    pipeline.scheduler.set_timesteps = partial(pipeline.scheduler.set_timesteps, sigmas=sigmas)
    pipeline.set_progress_bar_config(disable=True)
    settings = dict(kind.sampling)
    if kind.from_picture:
        settings["image"] = Image.fromarray(dump["pixels"][0, 0].numpy())
    if kind.mode == "flf2v":
        settings["last_image"] = Image.fromarray(dump["pixels"][0, -1].numpy())
    if kind.script == HUNYUAN:
        settings["sigmas"] = sigmas
    latents = (noisy_latents(dump), dump["latents"])
    frames = pipeline(
        prompt=dump.captions[0],
        height=dump.bucket[1],
        width=dump.bucket[2],
        num_frames=dump.bucket[0],
        num_inference_steps=2,
        callback_on_step_end=lambda _, step, timestep, tensors: {"latents": latents[step]},
        output_type="pt",
        **settings,
    ).frames
    return frames[0]


def inputs_of(call: Call) -> dict[str, torch.Tensor]:
    """Return the keyword arguments that are not None, without return_dict."""
    return {name: value for name, value in call.keywords.items() if value is not None and name != "return_dict"}


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def test_transformer_inputs_equal_those_of_the_pipeline(pair: Pair) -> None:
    inputs, pipeline_inputs = inputs_of(pair.training), inputs_of(pair.sampling)
    assert inputs.keys() == pipeline_inputs.keys()
    assert pair.training.keywords["return_dict"] is pair.sampling.keywords["return_dict"] is False
    if "encoder_attention_mask" in inputs:  # the pipeline pads its text, training removes the padding
        real = int(pipeline_inputs["encoder_attention_mask"].sum())
        assert equal(inputs["encoder_attention_mask"], torch.ones(1, real))
        for name in ("encoder_attention_mask", "encoder_hidden_states"):
            assert pipeline_inputs[name].shape[1] > real
            pipeline_inputs[name] = pipeline_inputs[name][:, :real]
    assert [name for name in inputs if not equal(inputs[name], pipeline_inputs[name])] == []


def test_the_dump_has_inputs_and_output_of_the_transformer(pair: Pair) -> None:
    inputs = inputs_of(pair.training)
    dumped = {name for name in pair.dump.tensors if name.startswith("model.")}
    assert dumped == {f"model.{name}" for name in inputs}
    assert all(equal(pair.dump[f"model.{name}"], value) for name, value in inputs.items())
    assert equal(pair.dump["prediction"], pair.training.velocity)


def test_the_velocity_equals_that_of_the_pipeline(pair: Pair) -> None:
    scale = pair.sampling.velocity.abs().max()
    assert (pair.training.velocity - pair.sampling.velocity).abs().max() <= 2e-6 * scale
    assert pair.training.velocity.std() > 0.01


def test_every_input_changes_the_output(pair: Pair) -> None:
    """A model that ignores an input would hide a wrong value of it."""
    generator = torch.Generator().manual_seed(0)
    for name, value in inputs_of(pair.sampling).items():
        other = (
            1 - value if name == "encoder_attention_mask" else value + torch.randn(value.shape, generator=generator)
        )
        with torch.no_grad():
            velocity = pair.pipeline.transformer(**{**pair.sampling.keywords, name: other})[0]
        assert not torch.allclose(velocity, pair.sampling.velocity, rtol=0, atol=1e-5), name


def test_timestep_and_guidance_are_scaled_by_a_thousand(pair: Pair) -> None:
    inputs = inputs_of(pair.training)
    if pair.kind.mode == "ti2v":  # of each token of three latent frames
        first, later = inputs["timestep"].view(3, -1)[0], inputs["timestep"].view(3, -1)[1:]
        assert torch.all(later == 1000 * pair.dump["sigma"]) and first.unique().numel() == 1
        assert first[0] == (0 if pair.kind.from_picture else later[0, 0])
        return
    assert equal(inputs["timestep"], 1000 * pair.dump["sigma"])
    assert 1 < inputs["timestep"].item() < 999
    if "guidance" in inputs:
        assert inputs["guidance"].tolist() == [6000.0]
    guided = pair.kind.script == HUNYUAN and pair.pipeline.transformer.config.guidance_embeds
    assert ("guidance" in inputs) == guided


def test_the_channel_order_of_noise_mask_and_image(pair: Pair) -> None:
    """Checks explicitly, without the pipeline, which channels contain noise, mask and image latents."""
    states, noisy = pair.training.keywords["hidden_states"], noisy_latents(pair.dump)
    condition = pair.pipeline.transformer.config.get("image_condition_type")
    assert states.shape[1] == pair.pipeline.transformer.config.in_channels
    if condition == "token_replace":
        assert torch.equal(states[:, :, 1:], noisy[:, :, 1:])
        assert not torch.allclose(states[:, :, 0], noisy[:, :, 0], atol=0.1)
        return
    if pair.kind.mode == "ti2v":
        assert torch.equal(states[:, :, 1:], noisy[:, :, 1:])
        clean = pair.dump["latents"][:, :, 0] if pair.kind.from_picture else noisy[:, :, 0]
        assert torch.allclose(states[:, :, 0], clean, rtol=0, atol=1e-5)  # the picture alone, and as part of the clip
        return
    assert torch.equal(states[:, :16], noisy)
    if condition == "latent_concat":
        assert states[:, 16:32, 0].any() and not states[:, 16:32, 1:].any()
        assert states[:, 32, 0].eq(1).all() and states[:, 32, 1:].eq(0).all()
    elif pair.kind.mode == "i2v":
        assert states[:, 16:20, 0].eq(1).all() and states[:, 16:20, 1:].eq(0).all()
        assert states[:, 20:, 1:].any()  # the latents of grey frames are not zero
    elif pair.kind.mode == "flf2v":  # of the last four frames, the last one is known
        assert states[:, 16:20, 0].eq(1).all() and states[:, 19, -1].eq(1).all()
        assert states[:, 16:20, 1:-1].eq(0).all() and states[:, 16:19, -1].eq(0).all()
        assert pair.training.keywords["encoder_hidden_states_image"].shape[0] == 2  # CLIP's features of both
    else:
        assert states.shape[1] == 16


@pytest.mark.parametrize("pair", IMAGE_TO_VIDEO, indirect=True)
def test_the_given_frame_is_encoded_separately(pair: Pair) -> None:
    """A VAE that normalizes over all frames computes another first latent frame for a full clip."""
    replaced = pair.pipeline.transformer.config.image_condition_type == "token_replace"
    states = pair.training.keywords["hidden_states"]
    first = states[:, :, :1] if replaced else states[:, 16:32, :1]
    vae, video = pair.pipeline.vae, pair.dump["pixels"].permute(0, 4, 1, 2, 3).float() / 255 * 2 - 1
    with torch.no_grad():
        single = vae.encode(video[:, :, :1]).latent_dist.mode() * vae.config.scaling_factor
    assert torch.allclose(first, single, rtol=0, atol=1e-6)
    assert not torch.allclose(first, pair.dump["latents"][:, :, :1], rtol=0, atol=1e-3)


def test_the_pipeline_decodes_the_latents_to_the_vae_clip(pair: Pair) -> None:
    vae, video = pair.pipeline.vae, pair.dump["pixels"].permute(0, 4, 1, 2, 3).float() / 255 * 2 - 1
    with torch.no_grad():
        clip = vae.decode(vae.encode(video).latent_dist.mode()).sample
    wanted = (clip / 2 + 0.5).clamp(0, 1)[0].transpose(0, 1)
    if pair.pipeline.transformer.config.get("image_condition_type") == "latent_concat":
        wanted = wanted[4:]  # this pipeline drops the first frames
    assert pair.video.shape == wanted.shape and wanted.std() > 1e-3
    assert torch.allclose(pair.video, wanted, rtol=0, atol=1e-5)


def test_the_shift_is_that_of_the_model_scheduler(
    models: Callable[[str], Path], metadata: Path, tmp_path: Path
) -> None:
    """The scheduler of the pipeline, set to the same unshifted sigma, has the same timestep."""
    model = models("hunyuan")
    scheduler = HunyuanVideoPipeline.from_pretrained(model, vae=None, transformer=None).scheduler
    argv = command(HUNYUAN_T2V, model, metadata, tmp_path / "out", dump_steps=[1, 2, 3], max_train_steps=3)
    outcome = runs.train(argv, HUNYUAN_T2V.trainer)
    shift, seen = scheduler.config.shift, set()
    for step in (1, 2, 3):
        dump = outcome.dump(step)
        sigma = dump["sigma"].double().item()
        index = round(1000 * sigma / (shift - (shift - 1) * sigma))  # the training timestep before the shift
        scheduler.set_timesteps(sigmas=[index / 1000])
        assert abs(scheduler.timesteps[0] / dump["timestep"][0] - 1) < 1e-6
        seen.add(index)
    assert len(seen) == 3


# ------------------------------------------------------------------------------------- Wan: first and last frame known


def test_first_and_last_frame_conditions_equal_those_of_the_pipeline(
    models: Callable[[str], Path], tmp_path: Path
) -> None:
    key = next(
        key for key in map(int, hash_key(3, np.arange(100))) if draw_family(CLIP_MASKS, key) == "first_and_last"
    )
    pixels = torch.from_numpy(tiny.moving_square(13, WIDTH, HEIGHT, seed=4))[None]
    kind = KINDS["wan-i2v"]
    with open_run(kind, models("wan-i2v"), tmp_path) as (_, _, components, _):
        video = 2 * (pixels.permute(0, 4, 1, 2, 3).float() / 255) - 1
        known, mask = known_pixels("inpaint", video, [key])
        moments = encode_moments(components.encoders().vae, known, mini_batch=1)
        latents = sample_latents(moments, moments.shape[1] // 2, keys=None)
        condition = torch.cat([pack_mask(mask), components.normalise(latents)], 1)
        pipeline = components.encoders().pipeline
        first, last = (
            pipeline.video_processor.preprocess(Image.fromarray(pixels[0, index].numpy()), HEIGHT, WIDTH)
            for index in (0, -1)
        )
        with torch.no_grad():
            _, expected = pipeline.prepare_latents(
                first, 1, 16, HEIGHT, WIDTH, 13, torch.float32, torch.device("cpu"), last_image=last
            )
    assert equal(condition, expected)
    assert condition[0, :4, :, 0, 0].T.tolist() == [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]


# ----------------------------------------------------------------------------------------------------- one micro-batch


@contextlib.contextmanager
def open_run(
    kind: ModelKind, model: Path, tmp_path: Path, **changes: object
) -> Iterator[tuple[Any, Accelerator, Any, torch.nn.Module]]:
    """Yield flags, accelerator, components and prepared model in the state before the first step of a run."""
    argv = command(kind, model, tmp_path / "metadata.json", tmp_path / "out", **changes)
    with runs.restored_process_state():
        os.environ["ACCELERATE_USE_CPU"] = "true"
        args = kind.trainer.parse_args(argv)
        accelerator, _ = make_accelerator(args.mixed_precision)
        components = runs.build_model(kind.trainer, args, accelerator)
        yield args, accelerator, components, accelerator.prepare_model(components.transformer.train())


def batch_of(captions: Sequence[str], frames: int = FRAMES, height: int = 32, width: int = 48) -> Batch:
    count = len(captions)
    clips = [tiny.moving_square(frames, width, height, seed) for seed in range(count)]
    keys = [int(key) for key in hash_key(11, np.arange(count))]
    return Batch(
        pixels=torch.from_numpy(np.stack(clips)),
        decoded=list(range(count)),
        real=[True] * count,
        cached=[{}] * count,
        sample_keys=[None] * count,
        captions=list(captions),
        weights=np.full(count, 1 / count),
        strata=(np.arange(count) + 0.6) / count,
        timesteps="across_steps",
        keys=keys,
        variants=keys,
        rows=list(range(count)),
        frame_indices=[list(range(frames))] * count,
        bucket=Bucket(frames, height, width),
        step=0,
        micro=0,
        last=True,
        bad=[],
    )


def prompts_of(
    kind: ModelKind, args: Any, components: Any, captions: list[str], video: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return the text inputs of HunyuanVideo for captions and their frames, computed as in training."""
    inputs = EncoderInput(video, captions, [0] * len(captions))
    specs = {spec.name: spec for spec in components.encode.specs}
    embeds, mask = pad_texts(specs["prompt_embeds"].encode(inputs))
    return {"prompt_embeds": embeds, "prompt_mask": mask, "pooled": specs["pooled"].encode(inputs)}


def padded_text(args: Any, components: Any, captions: list[str], video: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the text inputs as the diffusers pipeline computes them, padded and masked."""
    pipeline = components.encoders().pipeline
    template = sys.modules[type(pipeline).__module__].DEFAULT_PROMPT_TEMPLATE
    settings = {"max_sequence_length": args.tokenizer_max_length, "num_hidden_layers_to_skip": 2}
    images: list[list] = [[] for _ in captions]
    if components.condition is not None:
        settings["image_embed_interleave"] = {"token_replace": 4, "latent_concat": 2}[components.condition]
        images = [[[image]] for image in to_images(video[:, :, 0])]
    with torch.no_grad():
        texts = [
            pipeline._get_llama_prompt_embeds(*image, [caption], template, **settings)
            for image, caption in zip(images, captions, strict=True)
        ]
    embeds, masks = zip(*texts, strict=True)
    return {"prompt_embeds": torch.cat(embeds), "prompt_mask": torch.cat(masks).float()}


@dataclass(frozen=True)
class Gradients:
    """Results of a micro-batch: loss, gradient of the prediction, gradients of the weights by name."""

    loss: float
    prediction: torch.Tensor
    weights: dict[str, torch.Tensor]


def gradients(kind: ModelKind, model: Path, tmp_path: Path, batch: Batch, **changes: object) -> Gradients:
    predictions: list[torch.Tensor] = []
    with open_run(kind, model, tmp_path, **changes) as (args, accelerator, components, prepared):

        def record(module: torch.nn.Module, inputs: tuple, output: tuple) -> None:
            output[0].retain_grad()
            predictions.append(output[0])

        components.transformer.register_forward_hook(record)
        loss = kind.trainer.accumulate_gradients(args, accelerator, components, prepared, batch, None).sum()
        weights = {name: weight.grad for name, weight in components.transformer.named_parameters()}
    (prediction,) = predictions
    return Gradients(loss.item(), prediction.grad, weights)


def max_per_frame(gradient: torch.Tensor) -> list[float]:
    return gradient.abs().amax((0, 1, 3, 4)).tolist()


@pytest.mark.parametrize("motion", [False, True])
@pytest.mark.parametrize("name", ["hunyuan", *IMAGE_TO_VIDEO])
def test_only_the_given_frame_is_excluded_from_the_hunyuan_loss(
    name: str, motion: bool, models: Callable[[str], Path], tmp_path: Path
) -> None:
    batch = batch_of([SHORT], frames=17)
    found = gradients(KINDS[name], models(name), tmp_path, batch, motion_sub_loss=motion)
    first, *rest = max_per_frame(found.prediction)
    assert len(rest) == 4 and min(rest) > 0 and found.loss > 0
    assert (first == 0) == (name in IMAGE_TO_VIDEO)


@pytest.mark.parametrize("name", ["hunyuan", "wan", "wan-i2v-clip"])
def test_image_batches_have_gradients(name: str, models: Callable[[str], Path], tmp_path: Path) -> None:
    found = gradients(KINDS[name], models(name), tmp_path, batch_of([LONG, SHORT], frames=1))
    assert found.loss > 0.1 and found.prediction.shape[2] == 1
    assert all(found.prediction.abs().amax((1, 2, 3, 4)) > 0)
    norm = torch.stack([grad.norm() for grad in found.weights.values() if grad is not None]).norm()
    assert norm > 1e-3


@pytest.mark.parametrize("name", ["wan", "wan-i2v", "hunyuan", *IMAGE_TO_VIDEO])
def test_a_batch_of_empty_captions_is_finite(name: str, models: Callable[[str], Path], tmp_path: Path) -> None:
    found = gradients(KINDS[name], models(name), tmp_path, batch_of(["", ""]))
    assert 0.1 < found.loss < 100
    assert all(torch.isfinite(grad).all() for grad in found.weights.values() if grad is not None)


# --------------------------------------------------- HunyuanVideo: image-to-video clips need more than the given frame

LADDER: Mapping[str, object] = {
    "video_sample_size": 64,
    "image_sample_size": 320,  # sizes 64, 192, 320
    "token_sample_size": 128,  # frames 17, 5, 1
    "video_sample_n_frames": 17,
    "training_with_video_token_length": True,
    "random_frame_crop": True,
}


@pytest.mark.slow
def test_image_to_video_leaves_out_images_and_short_clips(models: Callable[[str], Path], tmp_path: Path) -> None:
    media = (
        ("whole.mp4", 320, 240, 17, 24.0),
        ("brief.mp4", 320, 240, 4, 24.0),
        ("picture.png", 320, 240, 0, 0.0),
        ("barely.mp4", 320, 240, 5, 24.0),
    )
    metadata = tiny.make_dataset(tmp_path / "data", media)
    kind = KINDS["hunyuan-token_replace"]
    argv = command(
        kind, models("hunyuan-token_replace"), metadata, tmp_path / "out", **LADDER, max_train_steps=None,
        num_train_epochs=3,
    )  # fmt: skip
    outcome = runs.train(argv, kind.trainer)
    assert outcome.code == 0, outcome.stderr
    assert sorted(row for record in outcome.metrics for row in record["rows"]) == [0, 0, 0, 3, 3, 3]
    assert min(frames for record in outcome.metrics for frames, _, _ in record["buckets"]) >= 5
    assert "rows: 4 = 2 trained + 2 too_short" in outcome.stdout


def plans(kind: ModelKind, tmp_path: Path, min_frames: int, **changes: object) -> Iterator[EpochPlan]:
    """Yield thirty epochs over a long clip, a clip with the minimum number of frames, a shorter one, and an image."""
    args = kind.trainer.parse_args(
        command(kind, tmp_path / "model", tmp_path / "metadata.json", tmp_path / "out", **changes)
    )
    settings = plan_settings(args, seed=5, slots=1, min_frames=min_frames)
    side, frames = np.full(4, 1024, np.int32), np.array([60, 5, 4, 1], np.int32)
    columns = PlanColumns(np.array([1, 1, 1, 0], np.uint8), side, side, frames, np.ones(4, bool))
    return (plan_epoch(columns, settings, epoch) for epoch in range(30))


def test_no_bucket_of_image_to_video_has_only_the_given_frame(tmp_path: Path) -> None:
    kind = KINDS["hunyuan-token_replace"]
    lengths, sizes = set(), set()
    for plan in plans(kind, tmp_path, 5, **LADDER):
        assert [Fate(fate) for fate in plan.fates] == [Fate.TRAINED, Fate.TRAINED, Fate.TOO_SHORT, Fate.TOO_SHORT]
        lengths |= {bucket.frames for bucket in plan.buckets}
        sizes |= {bucket.height for bucket in plan.buckets}
    assert lengths <= {5, 9, 13, 17} and {5, 17} <= lengths
    assert sizes == {64, 192}
    text_to_video = {bucket.frames for plan in plans(HUNYUAN_T2V, tmp_path, 1, **LADDER) for bucket in plan.buckets}
    assert 1 in text_to_video  # with the same flags


# ----------------------------------------------------------------------- HunyuanVideo: trimmed text equals masked text


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A list that records, for each joint attention over video and text, whether it had a mask."""
    seen: list[bool] = []
    attend = transformer_hunyuan_video.dispatch_attention_fn

    def record(*args: torch.Tensor, attn_mask: torch.Tensor | None = None, **rest: object) -> torch.Tensor:
        seen.append(attn_mask is not None)
        return attend(*args, attn_mask=attn_mask, **rest)

    monkeypatch.setattr(transformer_hunyuan_video, "dispatch_attention_fn", record)
    return seen


def run_backward(transformer: torch.nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the velocity, and the gradients of the weights for a weighted sum over it."""
    transformer.zero_grad()
    velocity = transformer(**inputs)[0]
    (velocity * torch.linspace(-1, 1, velocity.numel()).view_as(velocity)).sum().backward()
    return velocity.detach(), {name: weight.grad for name, weight in transformer.named_parameters()}


def relative_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest absolute difference divided by the largest absolute value of `other`."""
    return ((one - other).abs().max() / other.abs().max()).item()


def largest_difference(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Return the largest `relative_difference` over gradients by name.

    Gradients below 1e-7 of the largest one are rounding errors and are left out: a bias of all keys shifts the inputs
    of a softmax equally, and the softmax over a single text token is always 1.
    """
    assert found.keys() == wanted.keys()
    floor = 1e-7 * max(gradient.abs().max() for gradient in wanted.values())
    real = [name for name, gradient in wanted.items() if gradient.abs().max() > floor]
    assert len(real) >= 0.95 * len(wanted)
    assert all(found[name].abs().max() <= floor for name in wanted.keys() - set(real))
    return max(relative_difference(found[name], wanted[name]) for name in real)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "captions",
    [
        pytest.param([LONG], marks=pytest.mark.slow),
        pytest.param([""], marks=pytest.mark.slow),
        [LONG, SHORT, ""],
        pytest.param([SHORT] * 3, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", ["hunyuan", *IMAGE_TO_VIDEO])
def test_trimmed_text_equals_masked_text(
    name: str,
    captions: list[str],
    checkpointing: bool,
    models: Callable[[str], Path],
    masks: list[bool],
    tmp_path: Path,
) -> None:
    kind, model = KINDS[name], models(name)
    video = 2 * (batch_of(captions)["pixels"].permute(0, 4, 1, 2, 3).float() / 255) - 1
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(len(captions), 16, 3, 4, 6, generator=generator)
    first = torch.randn(len(captions), 16, 1, 4, 6, generator=generator)
    sigmas = torch.linspace(0.3, 0.9, len(captions))
    with open_run(kind, model, tmp_path) as (args, _, components, _):
        trimmed = prompts_of(kind, args, components, captions, video)
        padded = {**trimmed, **padded_text(args, components, captions, video)}
        if checkpointing:
            components.transformer.enable_gradient_checkpointing()
        inputs = kind.trainer.transformer_inputs(components, latents, sigmas, {**trimmed, "first_frame": first})
        velocity, weights = run_backward(components.transformer, inputs)
        blocks = (*components.transformer.transformer_blocks, *components.transformer.single_transformer_blocks)
        all_real = len({int(length) for length in padded["prompt_mask"].sum(1)}) == 1
        assert masks == [not all_real] * len(blocks) * (2 if checkpointing else 1)
        inputs = kind.trainer.transformer_inputs(components, latents, sigmas, {**padded, "first_frame": first})

    reference = HunyuanVideoTransformer3DModel.from_pretrained(model / "transformer").train()
    wanted, wanted_weights = run_backward(reference, inputs)
    assert trimmed["prompt_embeds"].shape[1] < padded["prompt_embeds"].shape[1]
    assert relative_difference(velocity, wanted) < 2e-6
    assert largest_difference(weights, wanted_weights) < 1e-5


def test_recomputation_uses_the_mask_of_each_micro_batch(
    models: Callable[[str], Path], masks: list[bool], tmp_path: Path
) -> None:
    """With activation checkpointing, each micro-batch recomputes its blocks with its own mask or without one."""
    batches = [batch_of([LONG]), batch_of([LONG, SHORT, ""]), batch_of([SHORT])]
    sums: list[dict[str, torch.Tensor]] = []
    for checkpointing in (False, True):
        with open_run(HUNYUAN_T2V, models("hunyuan"), tmp_path) as (args, accelerator, components, prepared):
            if checkpointing:
                components.transformer.enable_gradient_checkpointing()
            masks.clear()
            for batch in batches:
                HUNYUAN_T2V.trainer.accumulate_gradients(args, accelerator, components, prepared, batch, None)
            calls = len(masks) // 3
            assert masks == [False] * calls + [True] * calls + [False] * calls
            assert calls == 4 * (2 if checkpointing else 1)
            sums.append({name: weight.grad.clone() for name, weight in components.transformer.named_parameters()})
    without, recomputed = sums
    assert largest_difference(recomputed, without) < 1e-6


@pytest.mark.parametrize("name", ["hunyuan", *IMAGE_TO_VIDEO])
def test_a_long_caption_is_cut_equally_in_a_batch_and_alone(
    name: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    kind, captions = KINDS[name], [LONG * 40, SHORT]
    video = 2 * (batch_of(captions)["pixels"].permute(0, 4, 1, 2, 3).float() / 255) - 1
    with open_run(kind, models(name), tmp_path) as (args, _, components, _):
        together = prompts_of(kind, args, components, captions, video)
        for row, caption in enumerate(captions):
            single = prompts_of(kind, args, components, [caption], video[row : row + 1])
            length = int(together["prompt_mask"][row].sum())
            assert single["prompt_mask"].tolist() == [[1.0] * length]
            assert torch.allclose(together["prompt_embeds"][row, :length], single["prompt_embeds"][0], atol=1e-5)
    cut, short = together["prompt_mask"].sum(1).tolist()
    assert cut == together["prompt_mask"].shape[1] and cut - short > 200


def test_a_prompt_without_tokens_is_finite(models: Callable[[str], Path], tmp_path: Path) -> None:
    latents, sigmas = torch.randn(2, 16, 2, 4, 6, generator=torch.Generator().manual_seed(3)), torch.tensor([0.4, 0.8])
    with open_run(HUNYUAN_T2V, models("hunyuan"), tmp_path) as (_, _, components, _), torch.no_grad():
        pipeline = components.encoders().pipeline
        embeds, _ = pipeline._get_llama_prompt_embeds(["", LONG], pipeline_hunyuan_video.DEFAULT_PROMPT_TEMPLATE)
        no_tokens = torch.zeros(embeds.shape[:2])
        conditions = {"pooled": pipeline._get_clip_prompt_embeds(["", LONG])}
        velocities = []
        for text, mask in ((embeds, no_tokens), trim_text(embeds, no_tokens)):
            conditions |= {"prompt_embeds": text, "prompt_mask": mask}
            inputs = HUNYUAN_T2V.trainer.transformer_inputs(components, latents, sigmas, conditions)
            velocities.append(components.transformer(**inputs)[0])
    untrimmed, trimmed = velocities
    assert not torch.isfinite(untrimmed).any()
    assert torch.isfinite(trimmed).all()


def test_a_wan_prompt_without_tokens_is_finite(models: Callable[[str], Path], tmp_path: Path) -> None:
    latents, sigmas = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(3)), torch.tensor([0.4])
    with open_run(WAN_T2V, models("wan"), tmp_path) as (_, _, components, _), torch.no_grad():
        embeds = torch.zeros_like(encode_captions(components.encoders, 512, EncoderInput(latents, [""], [0])))
        inputs = WAN_T2V.trainer.transformer_inputs(latents, sigmas, {"prompt_embeds": embeds})
        assert torch.isfinite(components.transformer(**inputs)[0]).all()
