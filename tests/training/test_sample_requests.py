"""Tests of videox.training.sample_requests and validation_flags: what options and flags make of a clip."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import runs
import tiny
from hypothesis import given
from hypothesis import strategies as st

from videox.errors import UserError
from videox.shapes import Bucket
from videox.training.prompts import parse_line, read_prompts
from videox.training.sample_requests import (
    ClipDefaults,
    build_clips,
    check_pictures,
    guidance_of,
    shape_of,
    sides_of_ratio,
    with_flags,
)
from videox.training.sampling import SampleClip
from videox.training.validation_flags import check_samples, prompts_of, with_pictures

WAN = ClipDefaults(Bucket(81, 480, 832), 16.0, 25, 5.0, "", 7, embedded_guidance=False)
HUNYUAN = dataclasses.replace(WAN, fps=24.0, guidance=6.0, embedded_guidance=True)


def shape(line: str, picture: tuple[int, int] | None = None) -> tuple[tuple[int, int, int], bool]:
    found, notes = shape_of(parse_line(f"a cat {line}", "here"), WAN.shape, picture)
    return tuple(found), bool(notes)


@pytest.mark.parametrize(
    ("line", "expected", "noted"),
    [
        ("", (81, 480, 832), False),
        ("--w 640 --h 352 --f 33", (33, 352, 640), False),
        ("--f 1", (1, 480, 832), False),
        ("--f 4", (1, 480, 832), True),
        ("--f 80", (77, 480, 832), True),
        ("--w 1920 --h 1080", (81, 1088, 1920), True),
        ("--w 416", (81, 240, 416), False),
        ("--h 240", (81, 240, 416), False),
        ("--w 16 --h 16", (81, 16, 16), False),
    ],
)
def test_sizes_follow_the_options(line: str, expected: tuple[int, int, int], noted: bool) -> None:
    assert shape(line) == (expected, noted)


@pytest.mark.parametrize(
    ("line", "picture", "expected"),
    [
        ("", (1080, 1920), (81, 480, 848)),  # 0.566 instead of 0.5625; 480 x 832 would be 0.577
        ("", (1920, 1080), (81, 848, 480)),
        ("", (1000, 1250), (81, 560, 704)),
        ("--w 640", (500, 1000), (81, 320, 640)),
        ("--h 640", (1000, 500), (81, 640, 320)),
        ("--w 832 --h 480", (1000, 1000), (81, 480, 832)),  # cropped, as asked
    ],
)
def test_a_picture_gives_the_ratio_unless_both_sides_are_given(line, picture, expected) -> None:
    assert shape(line, picture)[0] == expected


@given(ratio=st.floats(0.25, 4), area=st.floats(96**2, 1500**2))
def test_sides_have_the_area_and_the_ratio(ratio: float, area: float) -> None:
    height, width = sides_of_ratio(area, ratio)
    assert height % 16 == width % 16 == 0 and min(height, width) >= 16
    assert 0.6 < height * width / area < 1.7
    # rounding a side to a multiple of 16 moves the ratio by at most half of that
    assert abs(np.log(width / height / ratio)) <= np.log(1 + 8 / (min(height, width) - 8)) + 1e-9


@pytest.mark.parametrize(
    ("line", "wan", "hunyuan", "note"),
    [
        ("", {"guidance_scale": 5.0}, {"guidance_scale": 6.0, "true_cfg_scale": 1.0}, ""),
        ("--l 3", {"guidance_scale": 3.0}, {"guidance_scale": 6.0, "true_cfg_scale": 3.0}, ""),
        ("--g 4", {"guidance_scale": 4.0}, {"guidance_scale": 4.0, "true_cfg_scale": 1.0}, "is used as --l"),
        ("--g 4 --l 0", {"guidance_scale": 0.0}, {"guidance_scale": 4.0, "true_cfg_scale": 0.0}, "has no effect"),
    ],
)
def test_guidance_is_that_of_the_family(line: str, wan: dict, hunyuan: dict, note: str) -> None:
    prompt = parse_line(f"a cat {line}", "here")
    found, notes = guidance_of(prompt, WAN)
    assert found == wan and len(notes) == bool(note) and note in "".join(notes)
    assert guidance_of(prompt, HUNYUAN) == (hunyuan, [])


def test_a_clip_has_its_options_else_the_defaults(tmp_path: Path) -> None:
    picture = tiny.write_image(tmp_path / "fox.png", 128, 64)
    lines = ["a cat", "a dog --d 9 --s 3 --n blurry --fs 9 --fps 8 --f 17", f"a fox --i {picture}"]
    defaults = dataclasses.replace(WAN, shape=Bucket(5, 64, 64), negative_prompt="ugly")
    (cat, dog, fox), notes = build_clips(read_prompts(lines), defaults)
    assert notes == []
    assert cat == SampleClip("a cat", Bucket(5, 64, 64), 16.0, 7, 25, {"guidance_scale": 5.0}, "ugly")
    assert dog == SampleClip("a dog", Bucket(17, 64, 64), 8.0, 9, 3, {"guidance_scale": 5.0}, "blurry", 9.0)
    assert fox.seed == 9 and fox.shape == Bucket(5, 48, 96) and fox.image.size == (96, 48)
    assert fox.facts()["image"] == str(picture) and "image" in fox.arguments() and "image" not in cat.arguments()


def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "fox.png").write_bytes(b"not a picture")
    prompts = read_prompts(["a cat", f"a fox --i {tmp_path / 'fox.png'}"])
    for check in (lambda: check_pictures(prompts), lambda: build_clips(prompts, WAN)):
        with pytest.raises(UserError) as raised:
            check()
        assert raised.value.where == "--validation_prompts, prompt 1" and "fox.png is " in raised.value.what


def test_pictures_come_from_the_option_or_in_order_from_the_flag() -> None:
    prompts = read_prompts(["a", "b --i b.png", "c"])
    found = with_pictures(prompts, ["a.png", "c.png"], "i2v", "--validation_paths")
    assert [str(prompt.image) for prompt in found] == ["a.png", "b.png", "c.png"]
    for paths in ([], ["a.png"], ["a.png", "b.png", "c.png"]):
        with pytest.raises(UserError, match=rf"{len(paths)} images?, --train_mode i2v needs 2"):
            with_pictures(prompts, paths, "i2v", "--validation_paths")
    with pytest.raises(UserError, match=r"--i b\.png: --train_mode normal starts from no picture"):
        with_pictures(prompts, [], "normal", "--validation_paths")


def test_a_clip_between_two_pictures_has_both(tmp_path: Path) -> None:
    prompts = read_prompts(["a", "b --i b.png", "c --ei z.png --i c.png"])
    found = with_pictures(prompts, ["a.png", "y.png", "z.png"], "flf2v", "--validation_paths")
    assert [(str(p.image), str(p.last_image)) for p in found] == [
        ("a.png", "y.png"), ("b.png", "z.png"), ("c.png", "z.png"),
    ]  # fmt: skip
    with pytest.raises(UserError, match="0 images, --train_mode flf2v needs 3"):
        with_pictures(prompts, [], "flf2v", "--validation_paths")
    with pytest.raises(UserError, match=r"--ei z\.png: --train_mode i2v has no last frame"):
        with_pictures(prompts, ["a.png"], "i2v", "--validation_paths")
    first, last = (tiny.write_image(tmp_path / f"{name}.png", seed=number) for number, name in enumerate("fl"))
    (clip,), _ = build_clips(read_prompts([f"a --i {first} --ei {last} --f 9 --w 64 --h 48"]), WAN)
    given = clip.arguments()
    assert given["image"].size == given["last_image"].size == (64, 48)
    assert given["image"].tobytes() != given["last_image"].tobytes()
    assert clip.facts()["last_image"] == str(last)
    with pytest.raises(UserError, match="a clip between two pictures has at least 5"):
        build_clips(read_prompts([f"a --i {first} --ei {last} --f 1"]), WAN)


def test_prompts_are_padded_as_in_training() -> None:
    (clip,), _ = build_clips(read_prompts(["a cat"]), dataclasses.replace(WAN, text_tokens=16))
    assert clip.arguments()["max_sequence_length"] == clip.facts()["text_tokens"] == 16
    (clip,), _ = build_clips(read_prompts(["a cat"]), WAN)
    assert "max_sequence_length" not in clip.arguments()  # the pipeline's own


# ------------------------------------------------------------------------------------------------------------- flags


def parse(tmp_path: Path, *words: str):
    required = [
        "--pretrained_model_name_or_path",
        str(tmp_path / "model"),
        "--train_data_meta",
        str(tmp_path / "m.json"),
    ]
    return runs.train_script().parse_args([*required, "--output_dir", str(tmp_path / "out"), *words])


def test_flags_replace_the_defaults_of_the_run(tmp_path: Path) -> None:
    run = ClipDefaults(Bucket(5, 64, 64), 8.0, 25, 5.0, "", 1, embedded_guidance=False)
    assert with_flags(parse(tmp_path), run) == run
    flags = "--sample_resolution 96 160 --sample_frames 9 --sample_fps 24 --sample_steps 4 --sample_guidance 0 --sample_seed 0"
    found = with_flags(parse(tmp_path, *flags.split(), "--sample_negative_prompt", "blurry"), run)
    assert found == ClipDefaults(Bucket(9, 96, 160), 24.0, 4, 0.0, "blurry", 0, embedded_guidance=False)


@pytest.mark.parametrize(
    ("words", "where", "what"),
    [
        ("--sample_resolution 100 64", "--sample_resolution", "100 64: sides are multiples of 16"),
        ("--sample_frames 8", "--sample_frames", "8: clips have 4k+1 frames"),
        ("--validation_prompts none.txt", "--validation_prompts", "none.txt does not exist"),
        ("--validation_prompts cat --validation_paths a.png", "--validation_paths", "1 image, --train_mode normal needs 0"),
        ("--train_mode i2v --validation_prompts cat", "--validation_paths", "0 images, --train_mode i2v needs 1"),
        ("--train_mode i2v --validation_prompts cat --validation_paths none.png", "--validation_prompts, prompt 0",
         "the picture none.png does not exist"),
    ],
)  # fmt: skip
def test_wrong_flags_are_reported_before_anything_slow(tmp_path: Path, words: str, where: str, what: str) -> None:
    with pytest.raises(UserError) as raised:
        parse(tmp_path, *words.split())
    assert (raised.value.where, raised.value.what) == (where, what)


def test_many_processes_do_not_wait_longer_than_they_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = parse(tmp_path, "--sample_minutes", "500")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="the processes wait for each other for an hour at most"):
        check_samples(args)


def test_the_best_checkpoint_and_an_early_stop_need_held_out_rows(tmp_path: Path) -> None:
    for words in (["--keep_best"], ["--early_stop", "3"]):
        with pytest.raises(UserError, match="there is no held-out loss without --validation_rows"):
            parse(tmp_path, *words)
        assert parse(tmp_path, *words, "--validation_rows", "1").validation_rows == 1


def test_only_one_flag_names_the_held_out_rows(tmp_path: Path) -> None:
    for words in (["--validation_share", "0.1"], ["--validation_meta", str(tmp_path / "held_out.json")]):
        assert parse(tmp_path, *words, "--keep_best").keep_best
        with pytest.raises(UserError) as refused:
            parse(tmp_path, "--validation_rows", "2", *words)
        assert (refused.value.where, refused.value.what) == (
            words[0], "contradicts --validation_rows: each names the rows of the held-out loss",
        )  # fmt: skip


def test_a_run_reads_its_prompts_from_files(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat --w 64\na dog\n", encoding="utf-8")
    args = parse(tmp_path, "--validation_prompts", str(path), "a fox")
    assert [prompt.text for prompt in prompts_of(args)] == ["a cat", "a dog", "a fox"]
