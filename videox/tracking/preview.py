"""Serves the eyes: clips, contact sheets and loss curves, so that a person sees at a glance what is trained on."""

from __future__ import annotations

import math
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
from videox.tracking.jsonl import read_lines

THUMB_SIDE = 256  # pixels, the longer side of a contact sheet's pictures
GAP = 8
CELL_WIDTH = 3 * THUMB_SIDE + 2 * GAP
FONT_SIZE = 15
LINE = round(FONT_SIZE * 1.35)
CAPTION_LINES = 3
LONGEST = 5000  # characters of a caption that are looked at; it may be megabytes, and the lines hold far fewer
SHEET_ENTRIES = 64  # more would make a sheet that no viewer opens
UNKNOWN_FPS = 16.0  # a clip whose file tells no frame rate is shown at Wan's
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
# Searched among the system's fonts, in this order, for captions that Pillow's own Latin font cannot show.
FONTS = ("NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "msyh.ttc", "PingFang.ttc", "DejaVuSans.ttf")


def write_clip(path: Path, frames: np.ndarray, fps: float) -> Path:
    """Writes frames as H.264 (4:2:0, BT.709, index at the front, so that any player shows it), one frame as PNG.

    Args:
        path: the file to write; of one frame the suffix becomes .png.
        frames: uint8 [T, H, W, 3] with T >= 1; H and W even for T > 1.
        fps: frames per second, above 0.

    Returns:
        The path written. The file appears whole or not at all; equal frames give equal bytes.

    Raises:
        ValueError: for frames of another shape or dtype, odd sides or a rate that is not above 0.
        OSError: if the file cannot be written.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise ValueError(f"frames are {frames.dtype} {frames.shape}, not uint8 [T, H, W, 3]")
    path.parent.mkdir(parents=True, exist_ok=True)
    if len(frames) == 1:
        return _save_png(path.with_suffix(".png"), Image.fromarray(frames[0]))
    _, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise ValueError(f"sides {height}x{width} are not even, as 4:2:0 needs them")
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"the rate is {fps} frames per second, not above 0")
    try:
        with atomic_write(path) as aside:
            _encode(aside, frames, Fraction(fps).limit_denominator(1001))
    except av.FFmpegError as error:  # its classes are not all OSErrors
        raise OSError(f"{path} cannot be encoded: {error}") from error
    return path


def _encode(path: Path, frames: np.ndarray, rate: Fraction) -> None:
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        # x264's macroblock tree reads memory that was never set: with it, equal frames give other bytes now and then
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
    with atomic_write(path) as aside:
        picture.save(aside, format="PNG")
    return path


@dataclass(frozen=True, slots=True)
class BatchSample:
    """One sample of a batch, as the model gets it.

    Attributes:
        row: its metadata row number.
        frames: uint8 [T, H, W, 3], after crop and resize.
        caption: the text trained with (empty where it was dropped).
        fps: frames per second of the source file, 0 for an image or where the file does not tell.
        stride: source frames from one kept frame to the next.
    """

    row: int
    frames: np.ndarray
    caption: str
    fps: float
    stride: float = 1


def write_batch(folder: Path, samples: Sequence[BatchSample]) -> list[Path]:
    """Writes samples as clips and images, with batch.json (shapes, rows, captions) and contact_sheet.png.

    File names carry row numbers only: a caption is a stranger's text and never becomes part of a path. Clips play at
    the source's rate divided by the stride, so they move as fast as the source does.

    Args:
        folder: made if it is not there.
        samples: at least one; the sides of clips are even.

    Returns:
        The paths written, the contact sheet last.

    Raises:
        ValueError: as `write_clip` and `write_contact_sheet`.
        OSError: if a file cannot be written.
    """
    seen: Counter[int] = Counter()
    paths, entries, records = [], [], []
    for sample in samples:
        seen[sample.row] += 1
        again = f"-{seen[sample.row]}" if seen[sample.row] > 1 else ""  # a repeated row may stand in a batch twice
        count, height, width, _ = sample.frames.shape
        fps = (sample.fps or UNKNOWN_FPS) / sample.stride
        paths.append(write_clip(folder / f"row-{sample.row:06d}{again}.mp4", sample.frames, fps))
        title = f"row {sample.row}   {count} x {height} x {width}" + (f"   {fps:.4g} fps" if count > 1 else "")
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
    """Writes a PNG with the first, middle and last frame of each clip, its title and its caption under them.

    Each row is as high as its own pictures and captions, the pictures of a row stand on one line.

    Args:
        path: the .png to write; its folder is made.
        entries: at least one; after SHEET_ENTRIES of them the rest is only counted.

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
    left_out = len(entries) - len(cells)
    size = (columns * (CELL_WIDTH + 2 * GAP) + GAP, tops[-1] + (LINE if left_out else 0))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for row, top in zip(rows, tops[:-1], strict=True):
        for column, cell in enumerate(row):
            _draw_cell(sheet, draw, cell, GAP + column * (CELL_WIDTH + 2 * GAP), top + _pictures_height(row))
    if left_out:
        font = ImageFont.load_default(FONT_SIZE)
        draw.text((GAP, size[1] - LINE - GAP // 2), f"and {left_out} more", fill="black", font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    return _save_png(path, sheet)


@dataclass(frozen=True, slots=True)
class _Cell:
    """What a sheet shows of one clip: pictures of at most THUMB_SIDE a side, a title, the caption's lines."""

    pictures: list[Image.Image]
    title: str
    caption: list[str]
    font: Font


def _cell(entry: SheetEntry) -> _Cell:
    count = len(entry.frames)
    pictures = [
        ImageOps.contain(Image.fromarray(entry.frames[frame]), (THUMB_SIDE, THUMB_SIDE))
        for frame in sorted({0, count // 2, count - 1})
    ]
    caption = printable(entry.caption[:LONGEST]) or "(no caption)"
    font = _font(caption)
    if font is None:
        caption, font = "(no font of this system shows this caption)", ImageFont.load_default(FONT_SIZE)
    return _Cell(pictures, entry.title, _wrap(caption, font, CELL_WIDTH, CAPTION_LINES), font)


def _pictures_height(row: Sequence[_Cell]) -> int:
    return max(picture.height for cell in row for picture in cell.pictures)


def _row_height(row: Sequence[_Cell]) -> int:
    return _pictures_height(row) + (1 + max(len(cell.caption) for cell in row)) * LINE + 3 * GAP


def _draw_cell(sheet: Image.Image, draw: ImageDraw.ImageDraw, cell: _Cell, left: int, bottom: int) -> None:
    """Draws a cell whose pictures stand on the line `bottom`, in pixels from the sheet's top."""
    for position, picture in enumerate(cell.pictures):
        sheet.paste(picture, (left + position * (THUMB_SIDE + GAP), bottom - picture.height))
    below = bottom + GAP // 2
    draw.text((left, below), cell.title, fill="#0b3d91", font=ImageFont.load_default(FONT_SIZE))
    for number, text in enumerate(cell.caption, start=1):
        draw.text((left, below + number * LINE), text, fill="black", font=cell.font)


def printable(text: str) -> str:
    """Returns text on one line: spaces and line breaks become a space, other control characters their escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text.split()))


def _font(text: str) -> Font | None:
    """Returns a font that shows the text, or None: a row of empty boxes would say less than a sentence."""
    rare = {c for c in text if ord(c) > 0x7E}
    font: Font = ImageFont.load_default(FONT_SIZE)
    if _shows(font, rare):
        return font
    for name in FONTS:
        try:
            font = ImageFont.truetype(name, FONT_SIZE)
        except OSError:  # this system has no such font
            continue
        if _shows(font, rare):
            return font
    return None


def _shows(font: Font, characters: set[str]) -> bool:
    """Tells whether at least nine tenths of the characters have a picture of their own."""
    box = bytes(font.getmask("\U0010ffff"))  # never a character: the font's sign for what it lacks
    missing = sum(bytes(font.getmask(c)) == box for c in characters)
    return missing <= len(characters) / 10


def _wrap(text: str, font: Font, width: int, lines: int) -> list[str]:
    """Breaks text into at most `lines` lines of at most `width` pixels, at spaces where there are some."""
    result: list[str] = []
    rest = text
    while rest and len(result) < lines:
        fits = _fitting(rest, font, width)
        if fits < len(rest) and " " in rest[:fits]:
            fits = rest.rindex(" ", 0, fits) + 1
        result.append(rest[:fits].rstrip())
        rest = rest[fits:].lstrip()
    if rest and result:
        result[-1] = result[-1][: _fitting(result[-1], font, width - round(font.getlength(" ...")))] + " ..."
    return result


def _fitting(text: str, font: Font, width: int) -> int:
    """Returns how many characters of text, at least one, fit in `width` pixels."""
    low, high = 1, min(len(text), width)  # no character that shows is narrower than a pixel
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle - 1)
    return low


def plot_losses(metrics_path: Path, validation_path: Path, out_png: Path) -> bool:
    """Draws a run's curves from metrics.jsonl and, where there is one, validation.jsonl.

    The upper panel has the training loss, faint, its exponential mean, and the validation loss; the lower one the
    learning rate and the gradient norm.

    Returns:
        False if there is no step to draw.

    Raises:
        OSError: if the picture cannot be written.
        UserError: (exit code 5) for a line that is not a JSON object.
    """
    from matplotlib.figure import Figure  # here, since it loads slowly; without pyplot: no state of the process

    steps = _series(metrics_path, ("step", "loss", "lr", "grad_norm"))
    if not len(steps):
        return False
    figure = Figure(figsize=(9, 6.5), dpi=110, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    upper.plot(steps[:, 0], steps[:, 1], color="tab:blue", alpha=0.3, linewidth=1, label="training, each step")
    upper.plot(steps[:, 0], smooth(steps[:, 1]), color="tab:blue", linewidth=2, label="training, smoothed")
    held_out = _series(validation_path, ("step", "loss"))
    if len(held_out):
        upper.plot(held_out[:, 0], held_out[:, 1], color="tab:red", marker="o", label="held out, fixed noise")
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
    out_png.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out_png) as aside:
        figure.savefig(aside, format="png")
    return True


def smooth(values: np.ndarray, memory: float = 20.0) -> np.ndarray:
    """Returns the exponential mean of a series, without a bias at its start; NaN counts for nothing.

    Args:
        values: float [n].
        memory: how many values it looks back, about.
    """
    keep = 1 - 1 / memory
    total = weight = 0.0
    result = np.full(len(values), np.nan)
    for i, value in enumerate(values):
        total, weight = keep * total, keep * weight
        if math.isfinite(value):
            total, weight = total + value, weight + 1
        if weight:
            result[i] = total / weight
    return result


def _series(path: Path, names: Sequence[str]) -> np.ndarray:
    """Returns float64 [lines, names] of a file of JSON lines; null is NaN, and a torn last line is left out."""
    values = [[record[name] for name in names] for record in read_lines(path)]
    return np.array(values, dtype=np.float64).reshape(-1, len(names))
