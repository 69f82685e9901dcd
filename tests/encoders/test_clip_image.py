"""Tests of the picture that CLIP sees: as in Wan's own code (squash), or as diffusers' processor makes it (crop)."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import originals
import pytest
import runs
import tiny
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from videox.distributed.accelerator import make_accelerator
from videox.encoders.clip_image import SquashProcessor
from videox.encoders.encode import EncoderInput
from videox.families.wan import choose_clip_image, encode_first_frames
from videox.run.checkpoint import publish_checkpoint

SIDE = 56


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_wan_i2v(tmp_path_factory.mktemp("i2v") / "wan", image_dim=160)


@pytest.fixture(scope="module")
def folders(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"diffusers": model, "original": originals.build_wan(tmp_path_factory.mktemp("o") / "wan", model)}


def video() -> torch.Tensor:
    """Return clips that are not square, [2, 3, 5, 64, 96] in [-1, 1]."""
    clips = np.stack([tiny.moving_square(5, 96, 64, seed) for seed in range(2)])
    return 2 * (torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 255) - 1


def pictures() -> list[Image.Image]:
    return [Image.fromarray(tiny.moving_square(5, 96, 64, seed)[0]) for seed in range(2)]


def wans_own(frames: torch.Tensor, processor: Any) -> torch.Tensor:
    """Return the input of CLIP as Wan's code defines it, for frames [B, 3, H, W] in [-1, 1]."""
    resized = torch.nn.functional.interpolate(frames, size=(SIDE, SIDE), mode="bicubic", align_corners=False)
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    return (resized * 0.5 + 0.5 - mean) / std


def test_the_picture_is_squashed_as_in_wans_own_code() -> None:
    crop = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    squash = SquashProcessor(SIDE, crop.image_mean, crop.image_std)
    found = squash(images=pictures(), return_tensors="pt").pixel_values
    assert found.shape == (2, 3, SIDE, SIDE) and found.dtype == torch.float32
    assert torch.allclose(found, wans_own(video()[:, :, 0], crop), rtol=0, atol=1e-5)
    assert torch.equal(squash(pictures()[0]).pixel_values, found[:1])  # one picture, as the pipeline passes it
    cropped = crop(images=pictures(), return_tensors="pt").pixel_values
    assert (found - cropped).abs().mean() > 0.1


def parsed(folder: Path, clip_image: str | None, mode: str = "i2v") -> Namespace:
    words = {
        "pretrained_model_name_or_path": folder, "train_data_meta": "m.json", "output_dir": "out", "train_mode": mode,
        "mixed_precision": "no", "clip_image": clip_image,
    }  # fmt: skip
    return runs.train_script().parse_args(runs.to_argv(words))


@pytest.mark.parametrize(
    ("layout", "flag", "kind"),
    [("diffusers", None, "crop"), ("original", None, "squash"), ("diffusers", "squash", "squash"), ("original", "crop", "crop")],
)  # fmt: skip
def test_features_of_both_layouts(
    layout: str, flag: str | None, kind: str, folders: dict[str, Path], model: Path
) -> None:
    args = parsed(folders[layout], flag)
    with runs.restored_process_state():
        os.environ["ACCELERATE_USE_CPU"] = "true"
        accelerator, _ = make_accelerator("no")
        wan = runs.build_model(runs.train_script(), args, accelerator)
        features = encode_first_frames(wan.encoders, "i2v", EncoderInput(video(), ["", ""], [0, 1]))
        with torch.no_grad():
            sampled = wan.encoders().pipeline.encode_image(pictures()[0])  # what sample clips use
    processor = CLIPImageProcessor.from_pretrained(model / "image_processor")
    pixels = processor(images=pictures(), return_tensors="pt").pixel_values
    if kind == "squash":
        pixels = wans_own(video()[:, :, 0], processor)
    with torch.no_grad():
        encoder = wan.encoders().image_encoder.module
        expected = encoder(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
    assert torch.allclose(features, expected, rtol=1e-4, atol=1e-4)
    assert torch.allclose(sampled, features[:1], rtol=1e-4, atol=1e-5)
    (spec,) = (spec for spec in wan.encode.specs if spec.name == "image_embeds")
    assert spec.settings == ("squash" if kind == "squash" else "")  # so that each has a cache entry of its own


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_between_two_pictures_a_model_of_one_sees_the_first(layout: str, folders: dict[str, Path]) -> None:
    """Wan2.1-Fun InP and Wan2.1-I2V have no positions for a second picture: it is known by its latents alone."""
    first, last = (Image.fromarray(tiny.moving_square(5, 96, 64, 0)[frame]) for frame in (0, -1))
    with runs.restored_process_state():
        os.environ["ACCELERATE_USE_CPU"] = "true"
        accelerator, _ = make_accelerator("no")
        wan = runs.build_model(runs.train_script(), parsed(folders[layout], None, "flf2v"), accelerator)
        inputs = EncoderInput(video(), ["", ""], [0, 1])
        features = encode_first_frames(wan.encoders, "flf2v", inputs, wan.pictures)
        alone = encode_first_frames(wan.encoders, "i2v", inputs)
        with torch.no_grad():
            sampled = wan.encoders().pipeline.encode_image([first, last])  # as diffusers' pipeline asks
    (spec,) = (spec for spec in wan.encode.specs if spec.name == "image_embeds")
    assert wan.pictures == 1 and spec.shape(None)[0] == features.shape[1] and spec.uses == ("frame", "mask")
    assert torch.equal(features, alone) and torch.allclose(sampled, features[:1], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        other = wan.encoders().pipeline.encode_image(last)
    assert not torch.allclose(other, sampled, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("recorded", "kept"), [({}, "crop"), ({"clip_image": "squash"}, "squash")])
def test_a_resumed_run_keeps_the_way_it_began_with(recorded: dict[str, str], kept: str, tmp_path: Path) -> None:
    with publish_checkpoint(tmp_path, 4, is_main=True, gather=lambda x: [x], description=recorded) as temporary:
        (temporary / "file").write_text("content", encoding="utf-8")
    for original in (False, True):
        found = choose_clip_image(None, tmp_path, original=original, checkpoint=tmp_path / "checkpoint-4")
        assert found.config["clip_image"] == kept
    assert choose_clip_image(None, tmp_path, original=True).config["clip_image"] == "squash"
    assert choose_clip_image(None, tmp_path, original=False).config["clip_image"] == "crop"
