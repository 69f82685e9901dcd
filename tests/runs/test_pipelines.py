"""Serves both train.py scripts: what the model gets in training is what diffusers' pipeline hands it at inference."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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

import videox.training.schedule as scheduling
from videox.data.dataset import Batch
from videox.data.plan.buckets import Fate
from videox.data.plan.epoch import EpochPlan
from videox.data.plan.plan import plan_epoch
from videox.data.plan.settings import PlanColumns
from videox.diffusion.conditioning import CLIP_MASKS, draw_family, pack_mask
from videox.distributed.accelerator import make_accelerator
from videox.encoders.encode import EncoderInput
from videox.encoders.hunyuan_text import pad_texts, trim_text
from videox.encoders.vae import encode_latents, to_images
from videox.rng import hash_key
from videox.shapes import Bucket

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
}
LONG, SHORT = "two dogs run after a red ball on the grass, a child laughs and claps", "a cup of black coffee"


@dataclass(frozen=True)
class Kind:
    """A model that a script trains and the pipeline that samples from it; sampling: what a user of it passes."""

    build: Callable[[Path], Path]
    script: str
    mode: str
    pipeline: type[DiffusionPipeline]
    transformer: type[torch.nn.Module]
    sampling: Mapping[str, object]

    @property
    def trainer(self) -> ModuleType:
        return tiny.load_script(self.script)


WAN_T2V = Kind(tiny.build_wan_t2v, runs.WAN_SCRIPT, "normal", WanPipeline, WanTransformer3DModel, {"guidance_scale": 1.0})
HUNYUAN_T2V = Kind(tiny.build_hunyuan_t2v, HUNYUAN, "normal", HunyuanVideoPipeline, HunyuanVideoTransformer3DModel, {})


def wan_i2v(image_embedder: bool) -> Kind:
    build = partial(tiny.build_wan_i2v, image_embedder=image_embedder)
    return Kind(build, runs.WAN_SCRIPT, "i2v", WanImageToVideoPipeline, WanTransformer3DModel, {"guidance_scale": 1.0})


def hunyuan_i2v(condition: str, guidance_scale: float) -> Kind:
    build = partial(tiny.build_hunyuan_i2v, image_condition_type=condition)
    pipeline, transformer = HunyuanVideoImageToVideoPipeline, HunyuanVideoTransformer3DModel
    return Kind(build, HUNYUAN, "i2v", pipeline, transformer, {"guidance_scale": guidance_scale})


KINDS = {
    "wan": WAN_T2V,
    "wan-i2v-clip": wan_i2v(image_embedder=True),
    "wan-i2v": wan_i2v(image_embedder=False),
    "hunyuan": HUNYUAN_T2V,
    "hunyuan-token_replace": hunyuan_i2v("token_replace", guidance_scale=6.0),
    "hunyuan-latent_concat": hunyuan_i2v("latent_concat", guidance_scale=1.0),  # it takes no embedded guidance
}
IMAGE_TO_VIDEO = ("hunyuan-token_replace", "hunyuan-latent_concat")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the folder of a kind's model, written at its first use."""
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


def command(kind: Kind, model: Path, metadata: Path, output_dir: Path, **changes: object) -> list[str]:
    where = {
        "pretrained_model_name_or_path": model,
        "train_data_meta": metadata,
        "output_dir": output_dir,
        "train_mode": kind.mode,
    }
    return runs.to_argv({**where, **SETTINGS, **changes})


# ------------------------------------------------------------------------- a step and the pipeline, side by side


@dataclass(frozen=True)
class Call:
    """One call of a transformer: its keywords and the velocity that it gave."""

    keywords: dict[str, Any]
    velocity: torch.Tensor


@contextlib.contextmanager
def listening(transformer: type[torch.nn.Module]) -> Iterator[list[Call]]:
    """Yields the calls of every transformer of a class, as they come."""
    calls: list[Call] = []

    def note(module: torch.nn.Module, args: tuple, keywords: dict[str, Any], output: tuple) -> None:
        if isinstance(module, transformer):
            assert not args
            calls.append(Call(dict(keywords), output[0].detach()))

    hook = torch.nn.modules.module.register_module_forward_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


@dataclass(frozen=True)
class Pair:
    """A dumped step, what the transformer got and gave in it, and the pipeline's side of the same.

    video: of the pipeline, float [T, 3, H, W] in [0, 1], decoded from the dumped latents.
    """

    kind: Kind
    dump: runs.Dump
    ours: Call
    pipeline: DiffusionPipeline
    theirs: Call
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
    with listening(kind.transformer) as trained:
        outcome = runs.train(command(kind, model, metadata, output_dir, dump_steps=1), kind.trainer)
    assert outcome.code == 0, outcome.stderr
    dump = outcome.dump(1)
    pipeline = kind.pipeline.from_pretrained(model)
    with listening(kind.transformer) as sampled:
        video = sample(kind, pipeline, dump)
    return Pair(kind, dump, *trained, pipeline, sampled[1], video)


def noisy_latents(dump: runs.Dump) -> torch.Tensor:
    return (1 - dump["sigma"].view(-1, 1, 1, 1, 1)) * dump["latents"] + dump["sigma"].view(-1, 1, 1, 1, 1) * dump[
        "noise"
    ]


def sample(kind: Kind, pipeline: DiffusionPipeline, dump: runs.Dump) -> torch.Tensor:
    """Samples two steps, the second from the dumped noisy latents at the dumped sigma, and decodes the dumped latents.

    The dumped first frame, prompt and size are what a user would pass; all else is the pipeline's own choice.
    """
    sigmas = [1.0, dump["sigma"].item()]
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    pipeline.scheduler.set_timesteps = partial(pipeline.scheduler.set_timesteps, sigmas=sigmas)
    pipeline.set_progress_bar_config(disable=True)
    settings = dict(kind.sampling)
    if kind.mode == "i2v":
        settings["image"] = Image.fromarray(dump["pixels"][0, 0].numpy())
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


def given(call: Call) -> dict[str, torch.Tensor]:
    """Returns the keywords that hold anything."""
    return {name: value for name, value in call.keywords.items() if value is not None and name != "return_dict"}


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def test_the_model_gets_what_the_pipeline_gives_it(pair: Pair) -> None:
    ours, theirs = given(pair.ours), given(pair.theirs)
    assert ours.keys() == theirs.keys()
    assert pair.ours.keywords["return_dict"] is pair.theirs.keywords["return_dict"] is False
    if "encoder_attention_mask" in ours:  # the pipeline pads its text, training leaves the padding away
        real = int(theirs["encoder_attention_mask"].sum())
        assert equal(ours["encoder_attention_mask"], torch.ones(1, real))
        for name in ("encoder_attention_mask", "encoder_hidden_states"):
            assert theirs[name].shape[1] > real
            theirs[name] = theirs[name][:, :real]
    assert [name for name in ours if not equal(ours[name], theirs[name])] == []


def test_the_dump_is_what_the_model_got_and_gave(pair: Pair) -> None:
    ours = given(pair.ours)
    dumped = {name for name in pair.dump.tensors if name.startswith("model.")}
    assert dumped == {f"model.{name}" for name in ours}
    assert all(equal(pair.dump[f"model.{name}"], value) for name, value in ours.items())
    assert equal(pair.dump["prediction"], pair.ours.velocity)


def test_the_velocity_is_that_of_the_pipeline(pair: Pair) -> None:
    scale = pair.theirs.velocity.abs().max()
    assert (pair.ours.velocity - pair.theirs.velocity).abs().max() <= 2e-6 * scale
    assert pair.ours.velocity.std() > 0.01


def test_the_picture_and_the_prompt_matter_to_the_model(pair: Pair) -> None:
    """A model that is deaf to an input would hide that the input is wrong."""
    generator = torch.Generator().manual_seed(0)
    for name, value in given(pair.theirs).items():
        other = (
            1 - value if name == "encoder_attention_mask" else value + torch.randn(value.shape, generator=generator)
        )
        with torch.no_grad():
            velocity = pair.pipeline.transformer(**{**pair.theirs.keywords, name: other})[0]
        assert not torch.allclose(velocity, pair.theirs.velocity, rtol=0, atol=1e-5), name


def test_the_timestep_is_a_thousand_sigma_and_the_guidance_a_thousandfold(pair: Pair) -> None:
    ours = given(pair.ours)
    assert equal(ours["timestep"], 1000 * pair.dump["sigma"])
    assert 1 < ours["timestep"].item() < 999
    if "guidance" in ours:
        assert ours["guidance"].tolist() == [6000.0]
    guided = pair.kind.script == HUNYUAN and pair.pipeline.transformer.config.guidance_embeds
    assert ("guidance" in ours) == guided


def test_the_channels_lie_in_the_pipelines_order(pair: Pair) -> None:
    """Says by hand what the comparison with the pipeline says as a whole: where noise, mask and picture are."""
    states, noisy = pair.ours.keywords["hidden_states"], noisy_latents(pair.dump)
    condition = pair.pipeline.transformer.config.get("image_condition_type")
    assert states.shape[1] == pair.pipeline.transformer.config.in_channels
    if condition == "token_replace":
        assert torch.equal(states[:, :, 1:], noisy[:, :, 1:])
        assert not torch.allclose(states[:, :, 0], noisy[:, :, 0], atol=0.1)
        return
    assert torch.equal(states[:, :16], noisy)
    if condition == "latent_concat":
        assert states[:, 16:32, 0].any() and not states[:, 16:32, 1:].any()
        assert states[:, 32, 0].eq(1).all() and states[:, 32, 1:].eq(0).all()
    elif pair.kind.mode == "i2v":
        assert states[:, 16:20, 0].eq(1).all() and states[:, 16:20, 1:].eq(0).all()
        assert states[:, 20:, 1:].any()  # grey has latents of its own
    else:
        assert states.shape[1] == 16


@pytest.mark.parametrize("pair", IMAGE_TO_VIDEO, indirect=True)
def test_the_given_frame_is_encoded_alone(pair: Pair) -> None:
    """An autoencoder that norms over all frames would give another first latent frame to a whole clip."""
    replaced = pair.pipeline.transformer.config.image_condition_type == "token_replace"
    states = pair.ours.keywords["hidden_states"]
    first = states[:, :, :1] if replaced else states[:, 16:32, :1]
    vae, video = pair.pipeline.vae, pair.dump["pixels"].permute(0, 4, 1, 2, 3).float() / 255 * 2 - 1
    with torch.no_grad():
        alone = vae.encode(video[:, :, :1]).latent_dist.mode() * vae.config.scaling_factor
    assert torch.allclose(first, alone, rtol=0, atol=1e-6)
    assert not torch.allclose(first, pair.dump["latents"][:, :, :1], rtol=0, atol=1e-3)


def test_the_pipeline_decodes_the_latents_to_the_autoencoders_clip(pair: Pair) -> None:
    vae, video = pair.pipeline.vae, pair.dump["pixels"].permute(0, 4, 1, 2, 3).float() / 255 * 2 - 1
    with torch.no_grad():
        clip = vae.decode(vae.encode(video).latent_dist.mode()).sample
    wanted = (clip / 2 + 0.5).clamp(0, 1)[0].transpose(0, 1)
    if pair.pipeline.transformer.config.get("image_condition_type") == "latent_concat":
        wanted = wanted[4:]  # this pipeline leaves the first frames away
    assert pair.video.shape == wanted.shape and wanted.std() > 1e-3
    assert torch.allclose(pair.video, wanted, rtol=0, atol=1e-5)


def test_the_shift_is_that_of_the_models_scheduler(
    models: Callable[[str], Path], metadata: Path, tmp_path: Path
) -> None:
    """The pipeline's own scheduler, asked for the same share of the way, comes to the same timestep."""
    model = models("hunyuan")
    scheduler = HunyuanVideoPipeline.from_pretrained(model, vae=None, transformer=None).scheduler
    argv = command(HUNYUAN_T2V, model, metadata, tmp_path / "out", dump_steps=[1, 2, 3], max_train_steps=3)
    outcome = runs.train(argv, HUNYUAN_T2V.trainer)
    shift, seen = scheduler.config.shift, set()
    for step in (1, 2, 3):
        dump = outcome.dump(step)
        sigma = dump["sigma"].double().item()
        place = round(1000 * sigma / (shift - (shift - 1) * sigma))  # the training timestep before the shift
        scheduler.set_timesteps(sigmas=[place / 1000])
        assert abs(scheduler.timesteps[0] / dump["timestep"][0] - 1) < 1e-6
        seen.add(place)
    assert len(seen) == 3


# -------------------------------------------------------------------------------- Wan: first and last frame known


def test_first_and_last_are_given_as_the_pipeline_gives_them(models: Callable[[str], Path], tmp_path: Path) -> None:
    key = next(
        key for key in map(int, hash_key(3, np.arange(100))) if draw_family(CLIP_MASKS, key) == "first_and_last"
    )
    pixels = torch.from_numpy(tiny.moving_square(13, WIDTH, HEIGHT, seed=4))[None]
    kind = KINDS["wan-i2v"]
    with opened(kind, models("wan-i2v"), tmp_path) as (_, _, components, _):
        video = 2 * (pixels.permute(0, 4, 1, 2, 3).float() / 255) - 1
        known, mask = kind.trainer.known_pixels("inpaint", EncoderInput(video, [""], [key]))
        latents = encode_latents(components.encoders().vae, known, keys=None, mini_batch=1)
        ours = torch.cat([pack_mask(mask), kind.trainer.normalise(components, latents)], 1)
        pipeline = components.encoders().pipeline
        first, last = (
            pipeline.video_processor.preprocess(Image.fromarray(pixels[0, place].numpy()), HEIGHT, WIDTH)
            for place in (0, -1)
        )
        with torch.no_grad():
            _, theirs = pipeline.prepare_latents(
                first, 1, 16, HEIGHT, WIDTH, 13, torch.float32, torch.device("cpu"), last_image=last
            )
    assert equal(ours, theirs)
    assert ours[0, :4, :, 0, 0].T.tolist() == [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]


# ------------------------------------------------------------------------------- a micro-batch, without its run


@contextlib.contextmanager
def opened(
    kind: Kind, model: Path, tmp_path: Path, **changes: object
) -> Iterator[tuple[Any, Accelerator, Any, torch.nn.Module]]:
    """Yields flags, accelerator, components and prepared model, as a run has them before its first step."""
    argv = command(kind, model, tmp_path / "metadata.json", tmp_path / "out", **changes)
    with runs.restored_process_state():
        os.environ["ACCELERATE_USE_CPU"] = "true"
        args = kind.trainer.parse_args(argv)
        accelerator, _ = make_accelerator(args.mixed_precision)
        components = runs.load_components(kind.trainer, args, accelerator)
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
    kind: Kind, args: Any, components: Any, captions: list[str], video: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Returns what HunyuanVideo is given of captions and the frames that they go with, as training makes it."""
    raw, recipes = EncoderInput(video, captions, [0] * len(captions)), {r.name: r for r in components.encode.specs}
    embeds, mask = pad_texts(recipes["prompt_embeds"].encode(raw))
    return {"prompt_embeds": embeds, "prompt_mask": mask, "pooled": recipes["pooled"].encode(raw)}


def padded_text(args: Any, components: Any, captions: list[str], video: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the text as diffusers' pipeline pads and masks it."""
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
    """What a micro-batch came to: its loss, the prediction's gradient, and the weights' by name."""

    loss: float
    prediction: torch.Tensor
    weights: dict[str, torch.Tensor]


def gradients(kind: Kind, model: Path, tmp_path: Path, batch: Batch, **changes: object) -> Gradients:
    predictions: list[torch.Tensor] = []
    with opened(kind, model, tmp_path, **changes) as (args, accelerator, components, prepared):

        def keep(module: torch.nn.Module, inputs: tuple, output: tuple) -> None:
            output[0].retain_grad()
            predictions.append(output[0])

        components.transformer.register_forward_hook(keep)
        loss = kind.trainer.accumulate_gradients(args, accelerator, components, prepared, batch, None)
        weights = {name: weight.grad for name, weight in components.transformer.named_parameters()}
    (prediction,) = predictions
    return Gradients(loss.item(), prediction.grad, weights)


def by_frame(gradient: torch.Tensor) -> list[float]:
    return gradient.abs().amax((0, 1, 3, 4)).tolist()


@pytest.mark.parametrize("motion", [False, True])
@pytest.mark.parametrize("name", ["hunyuan", *IMAGE_TO_VIDEO])
def test_only_a_given_frame_is_outside_hunyuans_loss(
    name: str, motion: bool, models: Callable[[str], Path], tmp_path: Path
) -> None:
    batch = batch_of([SHORT], frames=17)
    found = gradients(KINDS[name], models(name), tmp_path, batch, motion_sub_loss=motion)
    first, *rest = by_frame(found.prediction)
    assert len(rest) == 4 and min(rest) > 0 and found.loss > 0
    assert (first == 0) == (name in IMAGE_TO_VIDEO)


@pytest.mark.parametrize("name", ["hunyuan", "wan", "wan-i2v-clip"])
def test_images_are_trained(name: str, models: Callable[[str], Path], tmp_path: Path) -> None:
    found = gradients(KINDS[name], models(name), tmp_path, batch_of([LONG, SHORT], frames=1))
    assert found.loss > 0.1 and found.prediction.shape[2] == 1
    assert all(found.prediction.abs().amax((1, 2, 3, 4)) > 0)
    norm = torch.stack([grad.norm() for grad in found.weights.values() if grad is not None]).norm()
    assert norm > 1e-3


@pytest.mark.parametrize("name", ["wan", "wan-i2v", "hunyuan", *IMAGE_TO_VIDEO])
def test_a_batch_without_any_caption_stays_finite(name: str, models: Callable[[str], Path], tmp_path: Path) -> None:
    found = gradients(KINDS[name], models(name), tmp_path, batch_of(["", ""]))
    assert 0.1 < found.loss < 100
    assert all(torch.isfinite(grad).all() for grad in found.weights.values() if grad is not None)


# ----------------------------------------------------------------- HunyuanVideo: a given frame alone is no clip

LADDER: Mapping[str, object] = {
    "video_sample_size": 64,
    "image_sample_size": 320,  # sizes 64, 192, 320
    "token_sample_size": 128,  # frames 17, 5, 1
    "video_sample_n_frames": 17,
    "training_with_video_token_length": True,
    "random_frame_crop": True,
}


def test_image_to_video_leaves_out_what_teaches_nothing(models: Callable[[str], Path], tmp_path: Path) -> None:
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


def plans(kind: Kind, tmp_path: Path, min_frames: int, **changes: object) -> Iterator[EpochPlan]:
    """Yields thirty epochs over two clips, one of the fewest frames of all, and an image."""
    args = kind.trainer.parse_args(
        command(kind, tmp_path / "model", tmp_path / "metadata.json", tmp_path / "out", **changes)
    )
    settings = scheduling.plan_settings(args, seed=5, slots=1, min_frames=min_frames)
    side, frames = np.full(4, 1024, np.int32), np.array([60, 5, 4, 1], np.int32)
    columns = PlanColumns(np.array([1, 1, 1, 0], np.uint8), side, side, frames, np.ones(4, bool))
    return (plan_epoch(columns, settings, epoch) for epoch in range(30))


def test_no_size_of_a_token_ladder_leaves_the_given_frame_alone(tmp_path: Path) -> None:
    kind = KINDS["hunyuan-token_replace"]
    lengths, sizes = set(), set()
    for plan in plans(kind, tmp_path, 5, **LADDER):
        assert [Fate(fate) for fate in plan.fates] == [Fate.TRAINED, Fate.TRAINED, Fate.TOO_SHORT, Fate.TOO_SHORT]
        lengths |= {bucket.frames for bucket in plan.buckets}
        sizes |= {bucket.height for bucket in plan.buckets}
    assert lengths <= {5, 9, 13, 17} and {5, 17} <= lengths
    assert sizes == {64, 192}
    alone = {bucket.frames for plan in plans(HUNYUAN_T2V, tmp_path, 1, **LADDER) for bucket in plan.buckets}
    assert 1 in alone  # what text-to-video does with the same flags


# ----------------------------------------------------------------------- HunyuanVideo: trimmed against masked text


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Notes for each attention over picture and text whether it had a mask."""
    seen: list[bool] = []
    attend = transformer_hunyuan_video.dispatch_attention_fn

    def note(*args: torch.Tensor, attn_mask: torch.Tensor | None = None, **rest: object) -> torch.Tensor:
        seen.append(attn_mask is not None)
        return attend(*args, attn_mask=attn_mask, **rest)

    monkeypatch.setattr(transformer_hunyuan_video, "dispatch_attention_fn", note)
    return seen


def run_backward(transformer: torch.nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Returns the velocity and the weights' gradients of a sum over it whose terms weigh differently."""
    transformer.zero_grad()
    velocity = transformer(**inputs)[0]
    (velocity * torch.linspace(-1, 1, velocity.numel()).view_as(velocity)).sum().backward()
    return velocity.detach(), {name: weight.grad for name, weight in transformer.named_parameters()}


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Returns the largest difference, relative to the largest number."""
    return ((one - other).abs().max() / other.abs().max()).item()


def farthest(ours: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Returns the largest `apart` over gradients by name.

    A gradient below a ten-millionth of the largest is rounding alone: a bias of all keys shifts each softmax's inputs
    alike, and the softmax over a single text token is 1 whatever they are.
    """
    assert ours.keys() == wanted.keys()
    floor = 1e-7 * max(gradient.abs().max() for gradient in wanted.values())
    real = [name for name, gradient in wanted.items() if gradient.abs().max() > floor]
    assert len(real) >= 0.95 * len(wanted)
    assert all(ours[name].abs().max() <= floor for name in wanted.keys() - set(real))
    return max(apart(ours[name], wanted[name]) for name in real)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("captions", [[LONG], [""], [LONG, SHORT, ""], [SHORT, SHORT, SHORT]])
@pytest.mark.parametrize("name", ["hunyuan", *IMAGE_TO_VIDEO])
def test_trimmed_text_gives_what_masked_text_gives(
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
    with opened(kind, model, tmp_path) as (args, _, components, _):
        trimmed = prompts_of(kind, args, components, captions, video)
        padded = {**trimmed, **padded_text(args, components, captions, video)}
        if checkpointing:
            components.transformer.enable_gradient_checkpointing()
        inputs = kind.trainer.transformer_inputs(components, latents, sigmas, {**trimmed, "first_frame": first}, 6.0)
        velocity, weights = run_backward(components.transformer, inputs)
        blocks = (*components.transformer.transformer_blocks, *components.transformer.single_transformer_blocks)
        all_real = len({int(length) for length in padded["prompt_mask"].sum(1)}) == 1
        assert masks == [not all_real] * len(blocks) * (2 if checkpointing else 1)
        inputs = kind.trainer.transformer_inputs(components, latents, sigmas, {**padded, "first_frame": first}, 6.0)

    untouched = HunyuanVideoTransformer3DModel.from_pretrained(model / "transformer").train()
    wanted, wanted_weights = run_backward(untouched, inputs)
    assert trimmed["prompt_embeds"].shape[1] < padded["prompt_embeds"].shape[1]
    assert apart(velocity, wanted) < 2e-6
    assert farthest(weights, wanted_weights) < 1e-5


def test_recomputation_keeps_each_micro_batchs_mask(
    models: Callable[[str], Path], masks: list[bool], tmp_path: Path
) -> None:
    """Micro-batches with and without a mask follow each other; each recomputes its blocks as it computed them."""
    batches = [batch_of([LONG]), batch_of([LONG, SHORT, ""]), batch_of([SHORT])]
    sums: list[dict[str, torch.Tensor]] = []
    for checkpointing in (False, True):
        with opened(HUNYUAN_T2V, models("hunyuan"), tmp_path) as (args, accelerator, components, prepared):
            if checkpointing:
                components.transformer.enable_gradient_checkpointing()
            masks.clear()
            for batch in batches:
                HUNYUAN_T2V.trainer.accumulate_gradients(args, accelerator, components, prepared, batch, None)
            calls = len(masks) // 3
            assert masks == [False] * calls + [True] * calls + [False] * calls
            assert calls == 4 * (2 if checkpointing else 1)
            sums.append({name: weight.grad.clone() for name, weight in components.transformer.named_parameters()})
    kept, recomputed = sums
    assert farthest(recomputed, kept) < 1e-6


@pytest.mark.parametrize("name", ["hunyuan", *IMAGE_TO_VIDEO])
def test_a_caption_past_the_limit_is_cut_in_a_batch_as_it_is_alone(
    name: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    kind, captions = KINDS[name], [LONG * 40, SHORT]
    video = 2 * (batch_of(captions)["pixels"].permute(0, 4, 1, 2, 3).float() / 255) - 1
    with opened(kind, models(name), tmp_path) as (args, _, components, _):
        together = prompts_of(kind, args, components, captions, video)
        for row, caption in enumerate(captions):
            alone = prompts_of(kind, args, components, [caption], video[row : row + 1])
            length = int(together["prompt_mask"][row].sum())
            assert alone["prompt_mask"].tolist() == [[1.0] * length]
            assert torch.allclose(together["prompt_embeds"][row, :length], alone["prompt_embeds"][0], atol=1e-5)
    cut, short = together["prompt_mask"].sum(1).tolist()
    assert cut == together["prompt_mask"].shape[1] and cut - short > 200


def test_a_prompt_without_a_real_token_stays_finite(models: Callable[[str], Path], tmp_path: Path) -> None:
    latents, sigmas = torch.randn(2, 16, 2, 4, 6, generator=torch.Generator().manual_seed(3)), torch.tensor([0.4, 0.8])
    with opened(HUNYUAN_T2V, models("hunyuan"), tmp_path) as (_, _, components, _), torch.no_grad():
        pipeline = components.encoders().pipeline
        embeds, _ = pipeline._get_llama_prompt_embeds(["", LONG], pipeline_hunyuan_video.DEFAULT_PROMPT_TEMPLATE)
        nothing = torch.zeros(embeds.shape[:2])
        given = {"pooled": pipeline._get_clip_prompt_embeds(["", LONG])}
        velocities = []
        for text, mask in ((embeds, nothing), trim_text(embeds, nothing)):
            given |= {"prompt_embeds": text, "prompt_mask": mask}
            inputs = HUNYUAN_T2V.trainer.transformer_inputs(components, latents, sigmas, given, 6.0)
            velocities.append(components.transformer(**inputs)[0])
    untrimmed, trimmed = velocities
    assert not torch.isfinite(untrimmed).any()
    assert torch.isfinite(trimmed).all()


def test_wans_text_without_a_real_token_stays_finite(models: Callable[[str], Path], tmp_path: Path) -> None:
    latents, sigmas = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(3)), torch.tensor([0.4])
    with opened(WAN_T2V, models("wan"), tmp_path) as (_, _, components, _), torch.no_grad():
        embeds = torch.zeros_like(WAN_T2V.trainer.encode_prompts(components.encoders(), [""], 512))
        inputs = WAN_T2V.trainer.transformer_inputs(latents, sigmas, {"prompt_embeds": embeds})
        assert torch.isfinite(components.transformer(**inputs)[0]).all()
