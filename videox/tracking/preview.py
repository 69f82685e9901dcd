"""Preview files for a person to look at: video clips, contact sheets of a batch, and loss curves."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image, ImageDraw, ImageFont, ImageOps

from videox.files import atomic_write, write_json_atomically
from videox.run.branch import BEFORE
from videox.tracking.jsonl import read_lines

THUMB_SIDE = 256  # pixels, the longer side of the frames on a contact sheet
GAP = 8  # pixels
CELL_WIDTH = 3 * THUMB_SIDE + 2 * GAP
FONT_SIZE = 13  # pixels
LINE = round(FONT_SIZE * 1.4)  # pixels from one text line to the next
CAPTION_LINES = 3
MAX_CAPTION = 5000  # characters of a caption that are processed: a caption may be megabytes, the lines show far fewer
SHEET_ENTRIES = 64  # image viewers do not open a sheet of many more
# Of the figure with the losses, as shares of its sides: fixed, because a layout that measures the labels takes a third
# of the figure's time. PLOT_POWERS are the powers of ten that are written as digits, so that labels fit in.
PLOT_MARGINS = {"left": 0.1, "right": 0.9, "bottom": 0.08, "top": 0.95, "hspace": 0.15}
PLOT_POWERS = (-3, 4)
# Fonts for captions, in the order in which they are tried. Pillow's built-in font has only Latin letters. The fonts
# that matplotlib installs add Greek, Cyrillic, Armenian, Georgian, Arabic and (the second one) Hebrew. No package that
# the trainer needs has a font for Chinese, Japanese or Korean: for these a system font is used, if one is installed.
MATPLOTLIB_FONTS = ("DejaVuSansMono.ttf", "DejaVuSans.ttf")
SYSTEM_FONTS = ("NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "msyh.ttc", "PingFang.ttc")
NO_FONT = "(no installed font can show this caption)"
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def write_clip(path: Path, frames: np.ndarray, fps: float) -> Path:
    """Write frames as an H.264 clip (4:2:0, BT.709, index at the front, playable everywhere), a single frame as PNG.

    Args:
        path: the file to write; for a single frame the suffix is changed to .png.
        frames: uint8 [T, H, W, 3] with T >= 1; H and W even for T > 1.
        fps: frames per second, above 0.

    Returns:
        The path written. The file is written atomically; equal frames give equal bytes.

    Raises:
        ValueError: for frames of another shape or dtype, odd sides, or a frame rate that is not above 0.
        OSError: if the file cannot be written.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise ValueError(f"frames are {frames.dtype} {frames.shape}, not uint8 [T, H, W, 3]")
    path.parent.mkdir(parents=True, exist_ok=True)
    if len(frames) == 1:
        return _save_png(path.with_suffix(".png"), Image.fromarray(frames[0]))
    _, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise ValueError(f"sides {height}x{width} are not even, which 4:2:0 requires")
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"the frame rate is {fps}, not above 0")
    try:
        with atomic_write(path) as temporary:
            _encode(temporary, frames, Fraction(fps).limit_denominator(1001))
    except av.FFmpegError as error:  # not all of its subclasses are OSErrors
        raise OSError(f"{path} cannot be encoded: {error}") from error
    return path


def _encode(path: Path, frames: np.ndarray, rate: Fraction) -> None:
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        # mbtree=0: x264's macroblock tree reads uninitialized memory, so that equal frames sometimes give other bytes
        options = {"crf": "16", "preset": "fast", "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = int(Colorspace.ITU709)
        context.color_range = int(ColorRange.MPEG)
        for pixels in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24").reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def _save_png(path: Path, picture: Image.Image) -> Path:
    with atomic_write(path) as temporary:
        picture.save(temporary, format="PNG")
    return path


@dataclass(frozen=True, slots=True)
class BatchSample:
    """One sample of a batch as the model receives it.

    Attributes:
        row: metadata row number.
        frames: uint8 [T, H, W, 3], after crop and resize.
        caption: the caption used in training (empty if it was dropped).
        fps: frames per second of the source file, 0 for an image or if the file does not state it.
        stride: number of source frames from one frame of the sample to the next.
    """

    row: int
    frames: np.ndarray
    caption: str
    fps: float
    stride: float = 1


def write_batch(folder: Path, samples: Sequence[BatchSample], unknown_fps: float = 16.0) -> list[Path]:
    """Write samples as clips and images, with batch.json (shapes, rows, captions) and contact_sheet.png.

    File names contain row numbers only: captions are untrusted text and never become part of a path. The frame rate
    of a clip is the source's divided by the stride, so that it plays at the speed of the source.

    Args:
        folder: created if it does not exist.
        samples: at least one; clips have even sides.
        unknown_fps: of clips whose file has no frame rate.

    Returns:
        The paths written, the contact sheet last.

    Raises:
        ValueError: as raised by `write_clip` and `write_contact_sheet`.
        OSError: if a file cannot be written.
    """
    repeats: Counter[int] = Counter()
    paths, entries, records = [], [], []
    for sample in samples:
        repeats[sample.row] += 1
        suffix = f"-{repeats[sample.row]}" if repeats[sample.row] > 1 else ""  # a batch may have the same row twice
        count, height, width, _ = sample.frames.shape
        fps = (sample.fps or unknown_fps) / sample.stride
        paths.append(write_clip(folder / f"row-{sample.row:06d}{suffix}.mp4", sample.frames, fps))
        title = f"row {sample.row}   {count} x {height} x {width}" + (f" at {fps:.4g} fps" if count > 1 else "")
        entries.append(SheetEntry(sample.frames, title, sample.caption))
        records.append(
            {
                "file": paths[-1].name,
                "row": int(sample.row),
                "bucket": [count, height, width],
                "fps": fps if count > 1 else 0.0,
                "source_fps": float(sample.fps),
                "stride": sample.stride,
                "caption": sample.caption,
            }
        )
    listing = folder / "batch.json"
    write_json_atomically(listing, records)
    return [*paths, listing, write_contact_sheet(folder / "contact_sheet.png", entries)]


@dataclass(frozen=True, slots=True)
class SheetEntry:
    """One clip of a contact sheet: uint8 [T, H, W, 3], a title (e.g. row and bucket), a caption."""

    frames: np.ndarray
    title: str
    caption: str


def write_contact_sheet(path: Path, entries: Sequence[SheetEntry]) -> Path:
    """Write a PNG with the first, middle and last frame of each clip, and its title and caption below them.

    Each row is as high as its own frames and captions need; the frames of a row are aligned at the bottom.

    Args:
        path: the .png file to write; its folder is created.
        entries: at least one; only the first SHEET_ENTRIES are drawn, the others are counted.

    Raises:
        ValueError: without entries.
        OSError: if the file cannot be written.
    """
    if not entries:
        raise ValueError("a contact sheet needs at least one clip")
    cells = [_cell(entry) for entry in entries[:SHEET_ENTRIES]]
    columns = 1 if len(cells) <= 4 else 2
    rows = [cells[first : first + columns] for first in range(0, len(cells), columns)]
    tops = list(accumulate(map(_row_height, rows), initial=GAP))
    omitted = len(entries) - len(cells)
    size = (columns * (CELL_WIDTH + 2 * GAP) + GAP, tops[-1] + (LINE if omitted else 0))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for row, top in zip(rows, tops[:-1], strict=True):
        for column, cell in enumerate(row):
            _draw_cell(sheet, draw, cell, GAP + column * (CELL_WIDTH + 2 * GAP), top + _thumbnails_height(row))
    if omitted:
        font = ImageFont.load_default(FONT_SIZE)
        draw.text((GAP, size[1] - LINE - GAP // 2), f"and {omitted} more", fill="black", font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    return _save_png(path, sheet)


@dataclass(frozen=True, slots=True)
class _Cell:
    """The part of a sheet for one clip: thumbnails with sides of at most THUMB_SIDE, title, lines of the caption."""

    thumbnails: list[Image.Image]
    title: str
    caption: list[str]
    font: Font


def _cell(entry: SheetEntry) -> _Cell:
    count = len(entry.frames)
    thumbnails = [
        ImageOps.contain(Image.fromarray(entry.frames[frame]), (THUMB_SIDE, THUMB_SIDE))
        for frame in sorted({0, count // 2, count - 1})
    ]
    caption = printable(entry.caption[:MAX_CAPTION]) or "(no caption)"
    font = _font(caption)
    if font is None:  # a row of empty boxes would look like a caption that is broken in the data
        caption, font = NO_FONT, ImageFont.load_default(FONT_SIZE)
    return _Cell(thumbnails, entry.title, _wrap(caption, font, CELL_WIDTH, CAPTION_LINES), font)


def _thumbnails_height(row: Sequence[_Cell]) -> int:
    return max(thumbnail.height for cell in row for thumbnail in cell.thumbnails)


def _row_height(row: Sequence[_Cell]) -> int:
    return _thumbnails_height(row) + (1 + max(len(cell.caption) for cell in row)) * LINE + 3 * GAP


def _draw_cell(sheet: Image.Image, draw: ImageDraw.ImageDraw, cell: _Cell, left: int, bottom: int) -> None:
    """Draw a cell whose thumbnails end at the line `bottom`, in pixels from the top of the sheet."""
    for position, thumbnail in enumerate(cell.thumbnails):
        sheet.paste(thumbnail, (left + position * (THUMB_SIDE + GAP), bottom - thumbnail.height))
    below = bottom + GAP // 2
    draw.text((left, below), cell.title, fill="#0b3d91", font=ImageFont.load_default(FONT_SIZE))
    for number, text in enumerate(cell.caption, start=1):
        draw.text((left, below + number * LINE), text, fill="black", font=cell.font)


def printable(text: str) -> str:
    """Return text as one line: each run of white space becomes a space, control characters become their escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text.split()))


def _font(text: str) -> Font | None:
    """Return the first font that has at least nine tenths of the characters of a text, None if there is none."""
    from matplotlib import get_data_path  # imported here because it loads slowly

    installed = Path(get_data_path(), "fonts", "ttf")
    for name in (*(str(installed / name) for name in MATPLOTLIB_FONTS), *SYSTEM_FONTS):
        try:
            font = ImageFont.truetype(name, FONT_SIZE)
        except OSError:  # not installed
            continue
        # Pillow does not report missing glyphs. Fonts draw the same glyph, a box, for every character that they lack;
        # U+10FFFF is never a character.
        box = bytes(font.getmask("\U0010ffff"))
        if sum(bytes(font.getmask(character)) == box for character in set(text)) <= len(set(text)) / 10:
            return font
    return None


def _wrap(text: str, font: Font, width: int, lines: int) -> list[str]:
    """Break text into at most `lines` lines of at most `width` pixels; " ..." marks text that does not fit.

    Pillow's own ImageText.wrap breaks at spaces only, and fails on Chinese and Japanese, which have none.
    """
    # textwrap counts characters, so each one is assumed to be as wide as the widest; most captions are drawn in a
    # monospaced font, where this is exact
    columns = int(width / max(font.getlength(character) for character in {"M", *text}))
    wrapped = textwrap.wrap(text, columns)
    if len(wrapped) > lines:
        wrapped = [*wrapped[: lines - 1], wrapped[lines - 1][: columns - 4] + " ..."]
    return wrapped


def plot_losses(metrics_path: Path, validation_path: Path, out_png: Path) -> bool:
    """Plot a run's curves from metrics.jsonl and, if it exists, validation.jsonl, with those before a branch.

    The upper panel has the training loss of each step (faint), the moving average of the corrected loss (of the loss
    itself for steps without one), and the held-out loss; the lower panel has the learning rate and the gradient norm.

    Returns:
        False if there is no step to plot.

    Raises:
        OSError: if the PNG file cannot be written.
        UserError: (exit code 5) for a line that is not a JSON object.
    """
    # Imported here because it loads slowly; Figure instead of pyplot because pyplot keeps global state.
    from matplotlib.figure import Figure

    steps = _series(metrics_path, ("step", "loss", "lr", "grad_norm"))
    if not len(steps):
        return False
    figure = Figure(figsize=(9, 6.5), dpi=110)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1], gridspec_kw=PLOT_MARGINS)
    upper.plot(steps[:, 0], steps[:, 1], color="tab:blue", alpha=0.3, linewidth=1, label="training loss, each step")
    corrected = _series(metrics_path, ("step", "loss_corrected"), only_with="loss_corrected")
    if len(corrected):
        label = "training loss, corrected for noise levels and buckets"
        upper.plot(corrected[:, 0], corrected[:, 1], color="tab:purple", alpha=0.35, linewidth=1)
        upper.plot(corrected[:, 0], smooth(corrected[:, 1]), color="tab:purple", linewidth=2, label=label)
    before = steps[steps[:, 0] < corrected[0, 0]] if len(corrected) else steps
    if len(before) > len(steps) // 20:  # of an earlier version
        upper.plot(before[:, 0], smooth(before[:, 1]), color="tab:blue", linewidth=2, label="training loss, smoothed")
    held_out = _series(validation_path, ("step", "loss"))
    if len(held_out):
        upper.plot(held_out[:, 0], held_out[:, 1], color="tab:red", marker="o", label="held-out loss, fixed noise")
    beside = _series(validation_path, ("step", "train_loss"), only_with="train_loss")
    if len(beside):
        upper.plot(beside[:, 0], beside[:, 1], color="tab:orange", marker=".", label="training rows, fixed noise")
    upper.set_ylabel("loss")
    upper.grid(alpha=0.3)
    upper.legend()
    lower.plot(steps[:, 0], steps[:, 2], color="tab:green", label="learning rate")
    lower.set(xlabel="optimizer step", ylabel="learning rate")
    lower.grid(alpha=0.3)
    norms = lower.twinx()
    norms.plot(steps[:, 0], steps[:, 3], color="tab:gray", alpha=0.6, linewidth=1, label="gradient norm")
    norms.set(ylabel="gradient norm")
    lower.legend(handles=[*lower.lines, *norms.lines])
    for axes in (upper, lower, norms):
        axes.ticklabel_format(axis="y", scilimits=PLOT_POWERS)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out_png) as temporary:
        figure.savefig(temporary, format="png")
    return True


def smooth(values: np.ndarray, memory: float = 20.0) -> np.ndarray:
    """Return the exponential moving average of a series, without bias at its start; non-finite values are skipped.

    Args:
        values: float [n].
        memory: approximate number of past values that the average covers.
    """
    decay = 1 - 1 / memory
    total = weight = 0.0
    result = np.full(len(values), np.nan)
    for i, value in enumerate(values):
        total, weight = decay * total, decay * weight
        if math.isfinite(value):
            total, weight = total + value, weight + 1
        if weight:
            result[i] = total / weight
    return result


def _series(path: Path, names: Sequence[str], only_with: str = "step") -> np.ndarray:
    """Return float64 [lines, names] from a JSON Lines file; null becomes NaN, a truncated last line is ignored.

    The lines of a run in another folder, that this one continues, come first.

    only_with: lines without this key are left out.
    """
    records = [*read_lines(path.parent / BEFORE / path.name), *read_lines(path)]
    values = [[record[name] for name in names] for record in records if only_with in record]
    return np.array(values, dtype=np.float64).reshape(-1, len(names))
