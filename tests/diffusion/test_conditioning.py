"""Tests of videox.diffusion.conditioning and Wan's condition: masks, dropped conditions, channel layout."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import runs
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from videox.diffusion.conditioning import (
    CLIP_MASKS,
    IMAGE_MASKS,
    box_edges,
    concat_first_frame,
    draw_family,
    fill_mask,
    keep_condition,
    known_mask,
    known_pixels,
    mask_name,
    pack_mask,
    replace_first_frame,
)
from videox.distributed.accelerator import make_accelerator
from videox.encoders.encode import EncoderInput
from videox.encoders.vae import encode_moments
from videox.families.wan import encode_first_frames
from videox.rng import hash_key
from videox.shapes import Bucket

GRID = 16  # pixels
MANY = [int(key) for key in hash_key(31, np.arange(10_000))]
KEYS = st.integers(0, 2**64 - 1)
LENGTHS = st.integers(1, 5).map(lambda latent_frames: 4 * latent_frames + 1)
SIDES = st.integers(1, 8).map(lambda cells: GRID * cells)


def filled_mask(family: str, key: int, frames: int, height: int, width: int) -> torch.Tensor:
    mask = torch.zeros(frames, height, width)
    fill_mask(mask, family, key)
    return mask


def key_of_family(family: str, families: dict[str, float] = CLIP_MASKS) -> int:
    return next(key for key in MANY if draw_family(families, key) == family)


# --------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("families", [CLIP_MASKS, IMAGE_MASKS])
def test_each_family_has_its_share(families: dict[str, float]) -> None:
    assert math.isclose(sum(families.values()), 1)
    drawn = Counter(draw_family(families, key) for key in MANY)
    assert drawn.keys() == families.keys()
    for family, share in families.items():
        error = math.sqrt(share * (1 - share) / len(MANY))
        assert abs(drawn[family] / len(MANY) - share) < 4 * error


@settings(deadline=None)
@given(KEYS, LENGTHS, SIDES, SIDES)
def test_named_frames_are_known_and_no_others(key: int, frames: int, height: int, width: int) -> None:
    known = {"first": {0}, "first_and_last": {0, frames - 1}, "nothing": set()}
    for family, whole in known.items():
        mask = filled_mask(family, key, frames, height, width)
        for frame in range(frames):
            assert mask[frame].eq(float(frame in whole)).all()


@settings(deadline=None)
@given(KEYS, st.integers(2, 21), SIDES, SIDES)
def test_random_frames_are_complete_and_never_all_known(key: int, frames: int, height: int, width: int) -> None:
    mask = filled_mask("frames", key, frames, height, width)
    by_frame = mask[:, 0, 0]
    assert torch.equal(mask, by_frame.view(-1, 1, 1).expand_as(mask))
    assert set(by_frame.tolist()) <= {0.0, 1.0} and 0 in by_frame


def test_random_frames_vary_in_number_and_position() -> None:
    known = torch.stack([filled_mask("frames", key, 9, GRID, GRID)[:, 0, 0] for key in MANY[:2000]])
    counts = Counter(known.sum(1).int().tolist())
    assert counts.keys() == set(range(9)) and min(counts.values()) > 100
    assert all(abs(known.mean(0) - 4 / 9) < 0.05)  # half of the frames, minus the one that is never known


@settings(deadline=None)
@given(KEYS, st.integers(0, 4), SIDES, SIDES)
def test_boxes_are_on_the_grid_and_leave_pixels_to_generate(
    key: int, latent_frames: int, height: int, width: int
) -> None:
    mask = filled_mask("boxes", key, 4 * latent_frames + 1, height, width)
    assert torch.equal(mask, mask[:1].expand_as(mask))  # the same in every frame
    cells = mask[0, ::GRID, ::GRID]
    assert torch.equal(mask[0], cells.repeat_interleave(GRID, 0).repeat_interleave(GRID, 1))
    assert set(cells.flatten().tolist()) <= {0.0, 1.0} and 0 in cells


def rectangle(unknown: torch.Tensor) -> bool:
    rows, columns = unknown.any(1), unknown.any(0)
    return bool(unknown.sum() == rows.sum() * columns.sum())


@settings(deadline=None)
@given(KEYS, st.integers(0, 7), SIDES)
def test_a_box_is_a_quarter_to_three_quarters_of_a_side(key: int, number: int, side: int) -> None:
    start, end = box_edges(side, key, number)
    assert start % GRID == end % GRID == 0 and 0 <= start < end <= side
    assert side / 4 - GRID / 2 <= end - start <= max(GRID, 3 * side / 4 + GRID / 2)


def test_boxes_are_one_or_several_and_anywhere() -> None:
    cells = 1 - torch.stack(
        [filled_mask("boxes", key, 1, 16 * GRID, 16 * GRID)[0, ::GRID, ::GRID] for key in MANY[:2000]]
    )
    assert (
        0.25 < sum(map(rectangle, cells)) / len(cells) < 0.5
    )  # one in four is a single box; some boxes are inside others
    assert all(unknown.any(1).sum() >= 4 and unknown.any(0).sum() >= 4 for unknown in cells)
    shares = cells.mean((1, 2))
    assert shares.min() < 0.1 and shares.max() > 0.8
    often = cells.mean(0)
    assert often.min() > 0 and often.max() < 1
    assert often[0, 0] < often[8, 8]  # few boxes reach the edges


@settings(deadline=None)
@given(st.lists(KEYS, min_size=1, max_size=5), SIDES, SIDES)
def test_i2v_masks_know_the_first_frame_of_a_clip_and_nothing_of_an_image(
    keys: list[int], height: int, width: int
) -> None:
    mask = known_mask("i2v", keys, 9, height, width)
    assert mask.shape == (len(keys), 1, 9, height, width) and mask.dtype == torch.float32
    assert mask[:, :, 0].eq(1).all() and mask[:, :, 1:].eq(0).all()
    assert not known_mask("i2v", keys, 1, height, width).any()


def test_inpainting_draws_from_the_families_of_clips_or_of_images() -> None:
    for frames, families in ((9, CLIP_MASKS), (1, IMAGE_MASKS)):
        for key in MANY[:200]:
            wanted = filled_mask(draw_family(families, key), key, frames, 64, 80)
            assert torch.equal(known_mask("inpaint", [key], frames, 64, 80)[0, 0], wanted)


@settings(deadline=None, max_examples=40)
@given(st.lists(KEYS, min_size=2, max_size=6), st.sampled_from(["i2v", "inpaint"]), st.sampled_from([1, 5, 13]))
def test_masks_do_not_depend_on_the_batch(keys: list[int], mode: str, frames: int) -> None:
    together = known_mask(mode, keys, frames, 48, 64)
    kept = keep_condition(together, keys)
    for place, key in enumerate(keys):
        assert torch.equal(known_mask(mode, [key], frames, 48, 64)[0], together[place])
        assert torch.equal(keep_condition(together[place : place + 1], [key])[0], kept[place])
    assert torch.equal(known_mask(mode, keys[::-1], frames, 48, 64).flip(0), together)
    assert torch.equal(keep_condition(together.flip(0), keys[::-1]).flip(0), kept)


# ----------------------------------------------------------------------------------------- dropped conditions


def test_nine_images_in_ten_of_which_nothing_is_known_get_no_condition() -> None:
    kept = keep_condition(known_mask("i2v", MANY, 1, 16, 16), MANY)
    assert kept.shape == (len(MANY), 1, 1, 1, 1) and kept.dtype == torch.float32
    assert set(kept.flatten().tolist()) == {0.0, 1.0}
    assert abs(1 - kept.mean() - 0.9) < 0.01


def test_inpainted_images_keep_their_known_pixels() -> None:
    mask = known_mask("inpaint", MANY, 1, 48, 64)
    known = mask.amax((1, 2, 3, 4)) > 0
    kept = keep_condition(mask, MANY).flatten()
    assert kept[known].eq(1).all()
    assert abs(known.float().mean() - IMAGE_MASKS["boxes"]) < 0.02
    assert abs(1 - kept[~known].mean() - 0.9) < 0.02


def test_clips_always_keep_their_condition() -> None:
    for mode in ("i2v", "inpaint"):
        for frames in (5, 9):
            assert keep_condition(known_mask(mode, MANY[:500], frames, 16, 16), MANY[:500]).eq(1).all()


# ------------------------------------------------------------------------------------------- layout of the channels


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(0, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_pack_mask_equals_a_plain_loop(seed: int, later: int, rows: int, columns: int, count: int) -> None:
    """Any pattern of pixels, mostly known, so that completely known 8 x 8 fields occur."""
    frames = 4 * later + 1
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(count, 1, frames, 8 * rows, 8 * columns, generator=generator) < 0.99).float()
    packed = pack_mask(mask)
    assert packed.shape == (count, 4, later + 1, rows, columns)
    for sample in range(count):
        for frame in range(later + 1):
            for channel in range(4):
                pixels = 0 if frame == 0 else 4 * (frame - 1) + 1 + channel
                for y in range(rows):
                    for x in range(columns):
                        field = mask[sample, 0, pixels, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
                        assert packed[sample, channel, frame, y, x] == float(bool(field.all()))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 4))
def test_hunyuanvideos_first_frame_is_replaced_or_concatenated(seed: int, count: int, frames: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(count, 16, frames, 4, 6, generator=generator)
    first = torch.randn(count, 16, 1, 4, 6, generator=generator)
    before = latents.clone(), first.clone()

    replaced = replace_first_frame(latents, first)
    assert torch.equal(replaced[:, :, :1], first) and torch.equal(replaced[:, :, 1:], latents[:, :, 1:])

    concatenated = concat_first_frame(latents, first)
    assert concatenated.shape == (count, 33, frames, 4, 6)
    assert torch.equal(concatenated[:, :16], latents)
    assert torch.equal(concatenated[:, 16:32, :1], first) and not concatenated[:, 16:32, 1:].any()
    assert concatenated[:, 32, 0].eq(1).all() and not concatenated[:, 32, 1:].any()
    assert torch.equal(latents, before[0]) and torch.equal(first, before[1])


# --------------------------------------------------------------------- Wan's condition, with the trainer's components


@pytest.fixture(scope="module")
def trainer() -> ModuleType:
    return runs.train_script()


@pytest.fixture(scope="module")
def components(trainer: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Return the trainer's own components of an image-to-video model with an image embedder."""
    folder = tmp_path_factory.mktemp("model")
    flags = {
        "pretrained_model_name_or_path": tiny.build_wan_i2v(folder / "wan"),
        "train_data_meta": folder / "metadata.json",
        "output_dir": folder / "out",
        "train_mode": "i2v",
        "mixed_precision": "no",
    }
    with runs.restored_process_state():
        os.environ["ACCELERATE_USE_CPU"] = "true"
        args = trainer.parse_args(runs.to_argv(flags))
        accelerator, _ = make_accelerator(args.mixed_precision)
        yield runs.build_model(trainer, args, accelerator)


def model_inputs(trainer: ModuleType, components: Any, video: torch.Tensor, mode: str, keys: list[int]) -> dict:
    """Return the model's inputs for the images of a micro-batch, as training builds them."""
    args, count, bucket = SimpleNamespace(train_mode=mode), len(keys), Bucket(*video.shape[2:])
    specs = [spec for spec in components.encode.specs if spec.name in ("moments", "prompt_embeds")]
    encoded = {spec.name: list(torch.zeros(count, *spec.shape(bucket))) for spec in specs}
    if mode != "normal":
        known, _ = known_pixels(mode, video, keys)
        encoded["known"] = list(encode_moments(components.encoders().vae, known, mini_batch=count)[:, :16])
        sources = EncoderInput(video, [""] * count, keys)
        encoded["image_embeds"] = list(encode_first_frames(components.encoders, mode, sources))
    batch = {"keys": keys, "variants": keys, "bucket": bucket}
    return trainer.encode_batch(args, replace(components, encode=lambda _: encoded), batch, None)[1]


def video_of(frames: int, count: int = 1, height: int = 64, width: int = 96) -> torch.Tensor:
    clips = np.stack([tiny.moving_square(frames, width, height, seed) for seed in range(count)])
    return 2 * (torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 255) - 1


def normalised(components: Any, video: torch.Tensor) -> torch.Tensor:
    vae = components.encoders().vae.module
    with torch.no_grad():
        z = vae.encode(video).latent_dist.mode()
    mean, std = (torch.tensor(v).view(1, 16, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    return (z - mean) / std


def clip_features(components: Any, image: torch.Tensor) -> torch.Tensor:
    """Return the features before the last layer for an image [3, H, W] in [-1, 1], by the components alone."""
    pixels = Image.fromarray(((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
    pipeline = components.encoders().pipeline
    with torch.no_grad():
        seen = pipeline.image_processor(images=pixels, return_tensors="pt").pixel_values
        return pipeline.image_encoder(pixel_values=seen, output_hidden_states=True).hidden_states[-2][0]


def test_the_condition_is_four_mask_channels_and_latents_of_known_pixels(trainer: ModuleType, components: Any) -> None:
    keys = [key_of_family(family) for family in CLIP_MASKS]
    video = video_of(9, len(keys))
    condition = model_inputs(trainer, components, video, "inpaint", keys)["condition"]
    assert condition.shape == (len(keys), 20, 3, 8, 12)
    mask = known_mask("inpaint", keys, 9, 64, 96)
    assert torch.equal(condition[:, :4], pack_mask(mask))
    grey = torch.where(mask > 0, video, torch.zeros(()))  # 0 is the middle of [-1, 1]
    assert torch.allclose(condition[:, 4:], normalised(components, grey), rtol=0, atol=1e-5)
    latents = condition[:, 4:]
    assert all(not torch.allclose(a, b, atol=0.01) for a, b in zip(latents, latents.roll(1, 0), strict=True))


def test_first_and_last_frame_are_known_in_flf2v() -> None:
    mask = known_mask("flf2v", [3, 4], 9, 32, 48)
    assert torch.equal(mask, known_mask("flf2v", [5, 6], 9, 32, 48))
    assert mask[:, :, [0, -1]].eq(1).all() and mask[:, :, 1:-1].eq(0).all()
    assert mask_name("flf2v", 3, 9) == "first_and_last" != mask_name("i2v", 3, 9)
    assert not known_mask("flf2v", [3], 1, 32, 48).any() and mask_name("flf2v", 3, 1) == "nothing"


def test_the_condition_is_the_posteriors_mode_for_any_key(trainer: ModuleType, components: Any) -> None:
    video = video_of(9)
    one, other = (model_inputs(trainer, components, video, "i2v", [key])["condition"] for key in (MANY[0], MANY[1]))
    assert torch.equal(one, other)


def test_text_to_video_has_no_condition(trainer: ModuleType, components: Any) -> None:
    assert model_inputs(trainer, components, video_of(9), "normal", [MANY[0]]).keys() == {"prompt_embeds"}


def test_an_image_has_a_grey_or_a_zero_condition(trainer: ModuleType, components: Any) -> None:
    nothing = torch.zeros(1, 1, 1, 16, 16)
    dropped = next(key for key in MANY if not keep_condition(nothing, [key]).item())
    kept = next(key for key in MANY if keep_condition(nothing, [key]).item())
    video = video_of(1, 2)
    given = model_inputs(trainer, components, video, "i2v", [dropped, kept])
    assert not given["condition"][0].any()
    assert not given["condition"][1, :4].any()
    grey = normalised(components, torch.zeros(1, 3, 1, 64, 96))
    assert torch.allclose(given["condition"][1:, 4:], grey, rtol=0, atol=1e-5) and grey.any()
    assert given["image_embeds"].shape[0] == 2 and not given["image_embeds"].any()


def test_image_features_of_a_clip_are_those_of_its_first_frame(trainer: ModuleType, components: Any) -> None:
    video = video_of(9, 2)
    embeds = model_inputs(trainer, components, video, "i2v", MANY[:2])["image_embeds"]
    for sample, features in zip(video, embeds, strict=True):
        assert torch.allclose(features, clip_features(components, sample[:, 0]), rtol=0, atol=1e-5)
    assert not torch.allclose(embeds[0], embeds[1], atol=1e-3)
    assert not torch.allclose(embeds[0], clip_features(components, video[0, :, -1]), atol=1e-4)


def test_features_are_zero_where_nothing_of_the_first_frame_is_known(trainer: ModuleType, components: Any) -> None:
    def known_first(key: int) -> bool:
        return bool(filled_mask("frames", key, 9, 64, 96)[0, 0, 0])

    of_frames = [key for key in MANY if draw_family(CLIP_MASKS, key) == "frames"]
    cases = {
        key_of_family("nothing"): False,
        next(key for key in of_frames if not known_first(key)): False,
        next(key for key in of_frames if known_first(key)): True,
        key_of_family("first_and_last"): True,
    }
    video = video_of(9, len(cases))
    embeds = model_inputs(trainer, components, video, "inpaint", list(cases))["image_embeds"]
    for sample, features, known in zip(video, embeds, cases.values(), strict=True):
        wanted = clip_features(components, sample[:, 0]) if known else torch.zeros_like(features)
        assert torch.allclose(features, wanted, rtol=0, atol=1e-5)


def test_features_do_not_depend_on_unknown_pixels(trainer: ModuleType, components: Any) -> None:
    """Two clips that differ only in unknown pixels have equal inputs."""
    key = next(
        key for key in MANY
        if draw_family(CLIP_MASKS, key) == "boxes" and filled_mask("boxes", key, 9, 64, 96).any()
    )  # fmt: skip
    unknown = 1 - known_mask("inpaint", [key], 9, 64, 96)
    one = video_of(9)
    other = torch.where(unknown > 0, -one, one)
    first, second = (model_inputs(trainer, components, video, "inpaint", [key]) for video in (one, other))
    assert not torch.equal(one, other)
    assert all(torch.equal(first[name], second[name]) for name in ("condition", "image_embeds"))
    assert first["image_embeds"].any()
