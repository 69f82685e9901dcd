"""Tests of tests/support/tiny.py: diffusers and the decoders can read the small models, clips and data sets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import tiny
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLWan,
    DiffusionPipeline,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video, pipeline_hunyuan_video_image2video
from PIL import Image

# name: (build function, its arguments, pipeline class, input channels, frames sampled for num_frames=9)
MODELS: dict[str, tuple[Callable[..., Path], dict, type[DiffusionPipeline], int, int]] = {
    "wan_t2v": (tiny.build_wan_t2v, {}, WanPipeline, 16, 9),
    "wan_i2v": (tiny.build_wan_i2v, {}, WanImageToVideoPipeline, 36, 9),
    "wan_i2v_bare": (tiny.build_wan_i2v, {"image_embedder": False}, WanImageToVideoPipeline, 36, 9),
    "hunyuan_t2v": (tiny.build_hunyuan_t2v, {}, HunyuanVideoPipeline, 16, 9),
    "hunyuan_i2v": (tiny.build_hunyuan_i2v, {}, HunyuanVideoImageToVideoPipeline, 16, 9),
    "hunyuan_i2v_concat": (
        tiny.build_hunyuan_i2v,
        {"image_condition_type": "latent_concat"},
        HunyuanVideoImageToVideoPipeline,
        33,
        5,  # that pipeline drops the four frames of the first latent
    ),
}
HUNYUAN = [name for name in MODELS if name.startswith("hunyuan")]
TEMPLATES = {
    "hunyuan_t2v": pipeline_hunyuan_video.DEFAULT_PROMPT_TEMPLATE,
    "hunyuan_i2v": pipeline_hunyuan_video_image2video.DEFAULT_PROMPT_TEMPLATE,
}
WITHOUT_WEIGHTS = {"transformer": None, "vae": None, "text_encoder": None}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from a name in MODELS to its folder, which is written at the first call."""
    parent = tmp_path_factory.mktemp("models")

    def folder(name: str) -> Path:
        build, keywords, *_ = MODELS[name]
        return parent / name if (parent / name).exists() else build(parent / name, **keywords)

    return folder


def picture(width: int = 48, height: int = 64) -> Image.Image:
    return Image.fromarray(tiny.moving_square(1, width, height)[0])


@pytest.mark.parametrize("name", MODELS)
def test_pipeline_loads_and_samples(built: Callable[[str], Path], name: str) -> None:
    _, _, pipeline_class, channels, frames = MODELS[name]
    folder = built(name)
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 2**20
    assert (
        json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"] == pipeline_class.__name__
    )
    pipeline = pipeline_class.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.transformer.config.in_channels == channels
    low, high = (20_000, 40_000) if name.startswith("wan") else (80_000, 110_000)
    assert low < sum(p.numel() for p in pipeline.transformer.parameters()) < high
    options = {"height": 64, "width": 48, "num_frames": 9, "num_inference_steps": 2, "output_type": "np"}
    options |= {"image": picture()} if "i2v" in name else {}
    first, again, other = (
        pipeline(prompt=prompt, generator=torch.Generator().manual_seed(0), **options).frames
        for prompt in ("a rabbit walks", "a rabbit walks", "a rocket lifts off at night")
    )
    assert first.shape == (1, frames, 64, 48, 3)
    assert np.isfinite(first).all()
    assert first.std() > 0
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)  # the caption has an effect


def transformer_inputs(model: WanTransformer3DModel | HunyuanVideoTransformer3DModel) -> dict[str, torch.Tensor]:
    """Return arguments of forward() for 3 latent frames of 8 x 6, with every input that this model accepts."""
    config = model.config
    inputs = {"hidden_states": torch.randn(1, config.in_channels, 3, 8, 6), "timestep": torch.tensor([500.0])}
    if isinstance(model, WanTransformer3DModel):
        inputs["encoder_hidden_states"] = torch.randn(1, 512, config.text_dim)
        if config.image_dim is not None:
            inputs["encoder_hidden_states_image"] = torch.randn(1, 17, config.image_dim)
        return inputs
    inputs["encoder_hidden_states"] = torch.randn(1, 7, config.text_embed_dim)
    inputs["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
    inputs["pooled_projections"] = torch.randn(1, config.pooled_projection_dim)
    if config.guidance_embeds:
        inputs["guidance"] = torch.tensor([6000.0])
    return inputs


@pytest.mark.parametrize("name", MODELS)
def test_gradient_reaches_every_weight(built: Callable[[str], Path], name: str) -> None:
    model = MODELS[name][2].from_pretrained(built(name)).transformer.train()
    torch.manual_seed(0)
    prediction = model(**transformer_inputs(model), return_dict=False)[0]
    assert prediction.shape == (1, 16, 3, 8, 6)
    (prediction - torch.randn_like(prediction)).square().mean().backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    assert not [key for key, grad in gradients.items() if grad is None or not grad.isfinite().all()]
    assert not [key for key, grad in gradients.items() if not grad.any()]


def test_image_embedder_exists_or_is_null(built: Callable[[str], Path]) -> None:
    for name, exists in (("wan_i2v", True), ("wan_i2v_bare", False)):
        folder = built(name)
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        config = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
        for component in ("image_encoder", "image_processor"):
            assert (folder / component).exists() == exists
            assert (index[component] != [None, None]) == exists
        assert (config["image_dim"], config["added_kv_proj_dim"]) == ((32, 24) if exists else (None, None))


def test_each_known_word_is_one_t5_token(built: Callable[[str], Path]) -> None:
    tokenizer = WanPipeline.from_pretrained(built("wan_t2v"), **WITHOUT_WEIGHTS).tokenizer
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    rows = [tokenizer(caption)["input_ids"] for caption in tiny.CAPTIONS]
    assert all(row[-1] == 1 and 0 not in row and 2 not in row for row in rows)
    assert len({tuple(row) for row in rows}) == len(rows)
    words = {word for caption in tiny.CAPTIONS for word in caption.split()}
    assert len({token for row in rows for token in row} - {1}) == len(words)  # each known word is one token
    for row, caption in zip(rows, tiny.CAPTIONS, strict=True):
        assert tokenizer.decode(row, skip_special_tokens=True) == caption


def test_hunyuan_has_the_published_condition_guidance_and_scheduler(built: Callable[[str], Path]) -> None:
    expected = {"hunyuan_t2v": (None, True), "hunyuan_i2v": ("token_replace", True)}
    expected["hunyuan_i2v_concat"] = ("latent_concat", False)
    for name, (condition, guidance) in expected.items():
        folder = built(name)
        config = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
        assert (config["image_condition_type"], config["guidance_embeds"]) == (condition, guidance)
        scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
        assert (scheduler["_class_name"], scheduler["shift"]) == ("FlowMatchEulerDiscreteScheduler", 7.0)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_has_crop_start_tokens_before_the_caption(built: Callable[[str], Path], name: str) -> None:
    template = TEMPLATES[name]
    tokenizer = MODELS[name][2].from_pretrained(built(name), **WITHOUT_WEIGHTS, text_encoder_2=None).tokenizer
    before, after = template["template"].split("{}")
    begin = tokenizer(before)["input_ids"]
    assert len(begin) == template["crop_start"]
    for caption in (*tiny.CAPTIONS, "", "zebra's \n 42 ünknown"):
        row = tokenizer(template["template"].format(caption))["input_ids"]
        assert row[: len(begin)] == begin
        assert tokenizer.decode(row[len(begin) :]) == caption + after
    rows = [tokenizer(caption, add_special_tokens=False)["input_ids"] for caption in tiny.CAPTIONS]
    assert [len(row) for row in rows] == [len(caption.split()) for caption in tiny.CAPTIONS]
    if "image_emb_start" in template:
        places = [i for i, token in enumerate(begin) if token == tokenizer.convert_tokens_to_ids("<image>")]
        assert places == [template["image_emb_start"]]


@pytest.mark.parametrize("name", HUNYUAN)
def test_empty_caption_leaves_one_text_token(built: Callable[[str], Path], name: str) -> None:
    pipeline = MODELS[name][2].from_pretrained(built(name), transformer=None, vae=None)
    image = {"image": picture()} if "i2v" in name else {}
    images = 288 if "i2v" in name else 0  # the pipeline uses every second of the 576 image tokens
    for caption, tokens in (("", 1), ("a rabbit walks out of its burrow", 8)):
        with torch.no_grad():
            embeds, pooled, mask = pipeline.encode_prompt(prompt=caption, **image)
        assert mask.tolist() == [[1] * (images + tokens) + [0] * (embeds.shape[1] - images - tokens)]
        assert embeds.isfinite().all()
        assert pooled.isfinite().all()
        assert embeds[mask.bool()][images:].std() > 0.1  # embeddings near 0 would make the captions have no effect


def test_each_known_word_is_one_clip_token(built: Callable[[str], Path]) -> None:
    tokenizer = HunyuanVideoPipeline.from_pretrained(built("hunyuan_t2v"), **WITHOUT_WEIGHTS).tokenizer_2
    rows = [tokenizer(caption)["input_ids"] for caption in tiny.CAPTIONS]
    assert {(row[0], row[-1]) for row in rows} == {(len(tokenizer) - 2, len(tokenizer) - 1)}
    for row, caption in zip(rows, tiny.CAPTIONS, strict=True):
        assert len(row) == 2 + len(caption.split())  # each known word is one token
        assert tokenizer.decode(row, skip_special_tokens=True) == caption
    for code in range(33, 127):  # an unknown token is the end token, at which the pooling ends
        assert tokenizer.eos_token_id not in tokenizer(f"x{chr(code)} {chr(code)}x {chr(code)}")["input_ids"][:-1]


@pytest.mark.parametrize("name", MODELS)
def test_equal_arguments_give_equal_files(built: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    build, keywords, *_ = MODELS[name]
    folder = built(name)
    state = torch.random.get_rng_state()
    again = build(tmp_path / "again", **keywords)
    other = build(tmp_path / "other", seed=1, **keywords)
    assert torch.equal(state, torch.random.get_rng_state())
    names = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    assert all((folder / name).read_bytes() == (again / name).read_bytes() for name in names)
    for weights in (p for p in names if p.suffix == ".safetensors"):
        assert (folder / weights).read_bytes() != (other / weights).read_bytes()


def test_calibration_gives_latents_of_standard_deviation_1(tmp_path: Path) -> None:
    clips = torch.stack([torch.from_numpy(tiny.moving_square(9, 64, 48, seed)) for seed in range(3)])
    clips = clips.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    wan, hunyuan = tiny.build_wan_i2v(tmp_path / "wan"), tiny.build_hunyuan_i2v(tmp_path / "hunyuan")
    tiny.load_script("scripts/demo_model.py").calibrate_latents(wan, clips)
    tiny.load_script("scripts/demo_hunyuan.py").calibrate_scaling_factor(hunyuan, clips)

    vae = AutoencoderKLWan.from_pretrained(wan / "vae")
    with torch.no_grad():
        latents = vae.encode(clips).latent_dist.sample().transpose(0, 1).flatten(1)
    latents = (latents - torch.tensor(vae.config.latents_mean)[:, None]) / torch.tensor(vae.config.latents_std)[
        :, None
    ]
    assert latents.mean(dim=1).abs().max() < 0.05
    assert (latents.std(dim=1) - 1).abs().max() < 0.05

    vae = AutoencoderKLHunyuanVideo.from_pretrained(hunyuan / "vae")
    with torch.no_grad():
        latents = vae.encode(clips).latent_dist.sample() * vae.config.scaling_factor
    assert abs(latents.std() - 1) < 0.02


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_clip_reads_back(tmp_path: Path, suffix: str) -> None:
    path = tiny.write_clip(tmp_path / f"clip{suffix}", frames=13, width=96, height=64, fps=24)
    with av.open(str(path)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert float(container.streams.video[0].average_rate) == 24.0
    assert frames.shape == (13, 64, 96, 3)
    for i in range(13):  # the square's position shows the number of the frame
        bright = np.flatnonzero(frames[i, 32, :, 0] > 200)
        assert abs(int(bright[0]) - tiny.square_left(i, 96)) <= 1


def test_the_dataset_matches_its_metadata(tmp_path: Path) -> None:
    rows = json.loads(tiny.make_dataset(tmp_path, copies=2, declare_sizes=True).read_text(encoding="utf-8"))
    assert len(rows) == 2 * len(tiny.DATASET)
    lengths = set()
    for row in rows:
        path = tmp_path / row["file_path"]
        if row["type"] == "image":
            assert Image.open(path).size == (row["width"], row["height"])
            continue
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert (stream.width, stream.height, stream.frames) == (row["width"], row["height"], row["num_frames"])
            lengths.add(stream.frames)
    assert len(lengths) >= 3
