"""Tests of videox.tracking.preview: frame rate and colors of clips, contact sheets, captions, loss curves."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import matplotlib
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFont

from videox.tracking.preview import (
    FONT_SIZE,
    GAP,
    LINE,
    SHEET_ENTRIES,
    THUMB_SIDE,
    BatchSample,
    SheetEntry,
    _font,
    _wrap,
    plot_losses,
    printable,
    smooth,
    write_batch,
    write_clip,
    write_contact_sheet,
)


def read_back(path: Path) -> tuple[np.ndarray, Fraction, av.VideoStream]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        return frames, stream.average_rate, stream


@pytest.mark.parametrize(
    ("fps", "rate"), [(16.0, 16), (30000 / 1001, Fraction(30000, 1001)), (25 / 3, Fraction(25, 3))]
)
def test_a_clip_has_the_given_frames_and_frame_rate(tmp_path, fps, rate):
    frames = tiny.moving_square(9, 128, 96)
    path = write_clip(tmp_path / "new" / "clip.mp4", frames, fps)
    decoded, average, stream = read_back(path)
    assert (decoded.shape, average) == (frames.shape, rate)
    assert float(stream.duration * stream.time_base) == pytest.approx(9 / fps, rel=1e-3)
    assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
    assert np.abs(decoded.astype(int) - frames).mean() < 3
    assert [p.name for p in path.parent.iterdir()] == ["clip.mp4"]


def test_equal_frames_give_equal_files_with_any_uninitialized_memory(tmp_path):
    code = (
        "import sys, pathlib, numpy as np; from videox.tracking.preview import write_clip\n"
        "blocks = np.random.default_rng(0).integers(0, 255, (9, 30, 52, 3), dtype=np.uint8)\n"
        "write_clip(pathlib.Path(sys.argv[1]), blocks.repeat(8, 1).repeat(8, 2), 16)"
    )
    files = []
    for fill in ("1", "85", "255"):  # glibc fills newly allocated memory with this byte
        path = tmp_path / f"{fill}.mp4"
        environment = os.environ | {"MALLOC_PERTURB_": fill}
        subprocess.run([sys.executable, "-c", code, path], cwd=tiny.ROOT, env=environment, check=True, timeout=60)
        files.append(path.read_bytes())
    assert files[0] == files[1] == files[2]


def test_the_index_of_a_clip_is_before_the_frames(tmp_path):
    content = write_clip(tmp_path / "clip.mp4", tiny.moving_square(5, 64, 64), 16).read_bytes()
    assert 0 < content.index(b"moov") < content.index(b"mdat")


@pytest.mark.parametrize("color", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 120, 40)])
def test_colors_are_right_when_decoded_as_the_file_declares(tmp_path, color):
    frames = np.broadcast_to(np.array(color, np.uint8), (5, 64, 64, 3))
    path = write_clip(tmp_path / "clip.mp4", frames, 16)
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)
        planes = next(container.decode(video=0)).to_ndarray(format="yuv420p").astype(float)
    y, u, v = planes[:64].mean() - 16, planes[64:80].mean() - 128, planes[80:96].mean() - 128
    # BT.709, limited range (ITU-R BT.709-6, sections 3.2 to 3.5)
    luma = y / 219
    red, blue = luma + 1.5748 * v / 224, luma + 1.8556 * u / 224
    green = (luma - 0.2126 * red - 0.0722 * blue) / 0.7152
    assert np.abs(np.array([red, green, blue]) * 255 - color).max() < 4


def test_a_single_frame_is_a_lossless_png(tmp_path):
    frames = tiny.moving_square(1, 33, 17)
    path = write_clip(tmp_path / "clip.mp4", frames, 0.0)
    assert path == tmp_path / "clip.png" and [p.name for p in tmp_path.iterdir()] == ["clip.png"]
    assert np.array_equal(np.asarray(Image.open(path)), frames[0])


@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [
        (np.zeros((5, 33, 32, 3), np.uint8), 16.0, "33x32 are not even"),
        (np.zeros((5, 32, 32, 3), np.float32), 16.0, "not uint8"),
        (np.zeros((5, 3, 32, 32), np.uint8), 16.0, "not uint8 .T, H, W, 3"),
        (np.zeros((0, 32, 32, 3), np.uint8), 16.0, "not uint8"),
        (np.zeros((5, 32, 32, 3), np.uint8), 0.0, "not above 0"),
        (np.zeros((5, 32, 32, 3), np.uint8), math.nan, "not above 0"),
    ],
)
def test_invalid_frames_or_rate_raise_valueerror(tmp_path, frames, fps, message):
    with pytest.raises(ValueError, match=message):
        write_clip(tmp_path / "clip.mp4", frames, fps)
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_written_raises_oserror(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for frames in (tiny.moving_square(5, 64, 64), tiny.moving_square(1, 64, 64)):
        with pytest.raises(OSError, match="file"):
            write_clip(tmp_path / "file" / "clip.mp4", frames, 16)
    (tmp_path / "clip.mp4").mkdir()
    for name in ("clip.mp4", "x" * 250 + ".mp4"):  # a folder; a name too long for a temporary file next to it
        with pytest.raises(OSError, match=name):
            write_clip(tmp_path / name, tiny.moving_square(5, 64, 64), 16)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


UNTRUSTED = 'a "cat"\n\x1b[31m in the rain \u202e\x00 ../../etc/passwd <b>&amp;</b> \ud800 é'


def test_a_batch_is_written_as_clips_images_listing_and_sheet(tmp_path):
    clip, still = tiny.moving_square(9, 128, 96), tiny.moving_square(1, 96, 128, seed=3)
    samples = [
        BatchSample(12, clip, UNTRUSTED, fps=30.0, stride=3),
        BatchSample(7, still, "", fps=0.0),
        BatchSample(12, clip[:5], "again", fps=0.0, stride=2),
    ]
    paths = write_batch(tmp_path / "batch", samples)
    names = ["row-000012.mp4", "row-000007.png", "row-000012-2.mp4", "batch.json", "contact_sheet.png"]
    assert [path.name for path in paths] == names
    assert sorted(path.name for path in (tmp_path / "batch").iterdir()) == sorted(names)
    assert read_back(paths[0])[1] == 10 and read_back(paths[2])[1] == 8
    listing = paths[3].read_bytes()
    assert listing.isascii() and b"\x1b" not in listing and b"\x00" not in listing
    first, second, third = json.loads(listing)
    assert (first["caption"], first["row"], first["bucket"], first["fps"]) == (UNTRUSTED, 12, [9, 96, 128], 10.0)
    assert (second["file"], second["bucket"], second["fps"]) == ("row-000007.png", [1, 128, 96], 0.0)
    assert (third["file"], third["source_fps"], third["fps"], third["stride"]) == ("row-000012-2.mp4", 0.0, 8.0, 2)


def cell(sheet: np.ndarray, top: int, position: int) -> np.ndarray:
    left = GAP + position * (THUMB_SIDE + GAP)
    return sheet[top : top + THUMB_SIDE, left : left + THUMB_SIDE].astype(float)


def test_the_sheet_has_first_middle_and_last_frame_and_text_below_them(tmp_path):
    frames = np.zeros((9, THUMB_SIDE, THUMB_SIDE, 3), np.uint8)
    frames[:, :, :, 0] = np.arange(9)[:, None, None] * 25
    path = write_contact_sheet(
        tmp_path / "sheet.png", [SheetEntry(frames, "row 5", "a red picture that grows bright")]
    )
    sheet = np.asarray(Image.open(path))
    assert [cell(sheet, GAP, position).reshape(-1, 3).mean(0).tolist() for position in range(3)] == [
        [0, 0, 0],
        [100, 0, 0],
        [200, 0, 0],
    ]
    text = sheet[GAP + THUMB_SIDE :]
    assert 100 < (text.sum(axis=2) < 300).sum() < text.shape[0] * text.shape[1] / 5
    without = write_contact_sheet(tmp_path / "other.png", [SheetEntry(frames, "row 5", "a red picture")])
    assert not np.array_equal(np.asarray(Image.open(without)), sheet)


@settings(max_examples=30, deadline=None)
@given(sides=st.lists(st.tuples(st.integers(4, 40), st.integers(4, 40)), min_size=1, max_size=4))
def test_each_row_of_a_sheet_is_as_high_as_its_own_frames(tmp_path_factory, sides):
    frames = [np.full((1, height, width, 3), 90, np.uint8) for height, width in sides]
    path = tmp_path_factory.mktemp("sheet") / "sheet.png"
    sheet = np.asarray(Image.open(write_contact_sheet(path, [SheetEntry(f, "", "i") for f in frames])))
    filled = (sheet == 90).all(axis=2)
    starts = np.flatnonzero(filled[1:, GAP] & ~filled[:-1, GAP]) + 1
    heights = [int(np.argmin(filled[start:, GAP])) for start in starts]
    widths = [int(np.argmin(filled[start, GAP:])) for start in starts]
    assert [max(pair) for pair in zip(heights, widths, strict=True)] == [THUMB_SIDE] * len(sides)
    for (height, width), pair in zip(sides, zip(heights, widths, strict=True), strict=True):
        assert min(pair) == pytest.approx(THUMB_SIDE * min(height, width) / max(height, width), abs=1)
    assert np.diff(starts).tolist() == [h + 2 * LINE + 3 * GAP for h in heights[:-1]] and starts[0] == GAP
    assert len(sheet) == starts[-1] + heights[-1] + 2 * LINE + 3 * GAP


def test_sheets_with_many_entries_and_extreme_aspect_ratios(tmp_path):
    tall, wide = np.full((1, 992, 256, 3), 9, np.uint8), np.full((2, 256, 992, 3), 9, np.uint8)
    entries = [SheetEntry(tall, "tall", ""), SheetEntry(wide, "wide", "x" * 10**6)] * SHEET_ENTRIES
    sheet = Image.open(write_contact_sheet(tmp_path / "sheet.png", entries))
    assert sheet.width < 1800 and sheet.height < 12000
    few = Image.open(write_contact_sheet(tmp_path / "few.png", entries[:SHEET_ENTRIES]))
    assert few.height < sheet.height
    with pytest.raises(ValueError, match="at least one"):
        write_contact_sheet(tmp_path / "none.png", [])


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=300), st.integers(120, 600), st.integers(1, 4))
def test_wrapped_text_fits_and_is_the_text(text, width, lines):
    text = printable(text)
    font = _font(text) or ImageFont.load_default(FONT_SIZE)
    wrapped = _wrap(text, font, width, lines)
    assert len(wrapped) <= lines and all(font.getlength(line) <= width for line in wrapped)
    joined = "".join(wrapped).replace(" ", "")
    if joined.endswith("..."):
        assert text.replace(" ", "").startswith(joined[:-3]) or joined == text.replace(" ", "")
    else:
        assert joined == text.replace(" ", "")


@given(st.text())
def test_printable_text_is_printable_and_stays_the_same(text):
    line = printable(text)
    assert line.isprintable()
    assert printable(line) == line


@pytest.mark.parametrize(
    "caption",
    [
        "кошка идёт под дождём",
        "ένα γατί στη βροχή",
        "hôtel, garçon, naïve, straße",
        "قطة تمشي في المطر",
        "חתול הולך בגשם",
    ],
)
def test_captions_in_other_scripts_have_a_font_without_system_fonts(caption, monkeypatch):
    monkeypatch.setattr("videox.tracking.preview.SYSTEM_FONTS", ())
    font = _font(caption)
    glyphs = {bytes(font.getmask(c)) for c in set(caption) - {" "}}
    assert len(glyphs) == len(set(caption) - {" "})  # a missing character would be a box, the same for all


def test_one_emoji_does_not_hide_a_caption(monkeypatch):
    monkeypatch.setattr("videox.tracking.preview.SYSTEM_FONTS", ())
    assert _font("a cat 🐈 walks in the rain") is not None


def test_a_system_font_is_used_for_characters_that_matplotlibs_fonts_lack(monkeypatch):
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    monkeypatch.setattr("videox.tracking.preview.MATPLOTLIB_FONTS", ("cmr10.ttf",))
    monkeypatch.setattr("videox.tracking.preview.SYSTEM_FONTS", ("not installed.ttf", str(fonts / "DejaVuSans.ttf")))
    assert _font("кошка идёт под дождём").getname() == ("DejaVu Sans", "Book")


def test_the_sheet_says_that_no_font_can_show_a_caption(tmp_path, monkeypatch):
    monkeypatch.setattr("videox.tracking.preview.SYSTEM_FONTS", ())
    frames = tiny.moving_square(1, 64, 64)
    chinese = write_contact_sheet(tmp_path / "chinese.png", [SheetEntry(frames, "row 1", "一只猫在雨中走过街道")])
    monkeypatch.setattr("videox.tracking.preview.MATPLOTLIB_FONTS", ())  # then no caption has a font
    english = write_contact_sheet(tmp_path / "english.png", [SheetEntry(frames, "row 1", "a cat")])
    assert chinese.read_bytes() == english.read_bytes()


@pytest.mark.parametrize("caption", ["一只猫在雨中走过街道" * 50, "x" * 2000, "\u0301", "\u200b", "🐈", " "])
def test_every_caption_can_be_drawn(caption, tmp_path):
    write_contact_sheet(tmp_path / "sheet.png", [SheetEntry(tiny.moving_square(1, 64, 64), "row 1", caption)])


def write_lines(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def step_line(step: int, loss: float | None) -> dict:
    return {"step": step, "loss": loss, "lr": 1e-5 * min(step, 50), "grad_norm": 1 / step, "tokens": 5}


def test_curves_are_plotted_with_gaps_truncated_lines_and_without_validation(tmp_path):
    rng = np.random.default_rng(0)
    losses = [1 / math.sqrt(i) + rng.normal() * 0.1 for i in range(1, 201)]
    metrics = write_lines(tmp_path / "metrics.jsonl", [step_line(i, loss) for i, loss in enumerate(losses, start=1)])
    assert plot_losses(metrics, tmp_path / "validation.jsonl", tmp_path / "plots" / "loss.png")
    alone = np.asarray(Image.open(tmp_path / "plots" / "loss.png").convert("RGB"))
    validation = write_lines(
        tmp_path / "validation.jsonl",
        [{"step": s, "loss": 1 / math.sqrt(s + 1), "per_sigma": []} for s in range(0, 201, 20)],
    )
    with metrics.open("a") as file:
        file.write(json.dumps(step_line(201, None)) + '\n{"step": 202, "lo')
    assert plot_losses(metrics, validation, tmp_path / "plots" / "loss.png")
    both = np.asarray(Image.open(tmp_path / "plots" / "loss.png").convert("RGB")).astype(int)
    assert alone.shape == both.shape and both.shape[0] > 500 and both.shape[1] > 800

    def reddish(picture):
        picture = picture.astype(int)
        return ((picture[..., 0] > 180) & (picture[..., 1] < 80) & (picture[..., 2] < 80)).sum()

    assert reddish(alone) == 0 and reddish(both) > 100
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["loss.png"]


def test_the_corrected_loss_and_the_curve_before_a_branch_are_plotted(tmp_path):
    def purple_columns(picture):
        red, green, blue = (np.asarray(Image.open(picture).convert("RGB")).astype(int)[..., i] for i in range(3))
        found = (abs(red - 148) < 30) & (abs(green - 103) < 30) & (abs(blue - 189) < 30)
        return np.flatnonzero(found.any(0))

    lines = [{**step_line(step, 1.0), "loss_corrected": 0.5} for step in range(1, 101)]
    metrics, picture = write_lines(tmp_path / "metrics.jsonl", lines[50:]), tmp_path / "loss.png"
    assert plot_losses(metrics, tmp_path / "validation.jsonl", picture)
    alone = len(purple_columns(picture))
    (tmp_path / "before").mkdir()
    write_lines(tmp_path / "before/metrics.jsonl", [step_line(step, 1.0) for step in range(1, 51)])  # without it
    assert plot_losses(metrics, tmp_path / "validation.jsonl", picture)
    assert 0.3 * alone < len(purple_columns(picture)) < 0.7 * alone  # half of the axis belongs to the steps before
    write_lines(tmp_path / "before/metrics.jsonl", lines[:50])
    assert plot_losses(metrics, tmp_path / "validation.jsonl", picture)
    assert len(purple_columns(picture)) == pytest.approx(alone, rel=0.1)


def test_without_a_step_nothing_is_plotted(tmp_path):
    assert not plot_losses(tmp_path / "absent.jsonl", tmp_path / "absent.jsonl", tmp_path / "loss.png")
    assert list(tmp_path.iterdir()) == []


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60))
def test_the_smoothed_series_is_bounded_by_the_series_and_starts_at_its_first_value(values):
    series = smooth(np.array(values))
    assert series[0] == pytest.approx(values[0])
    slack = 1e-9 * max(map(abs, values))
    assert all(min(values[: i + 1]) - slack <= x <= max(values[: i + 1]) + slack for i, x in enumerate(series))


def test_smoothing_skips_non_finite_values():
    series = smooth(np.array([math.nan, 2.0, math.nan, 2.0, math.inf]))
    assert math.isnan(series[0]) and series[1:].tolist() == [2.0] * 4
