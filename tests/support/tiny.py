"""Small models, clips, images and data sets for the tests, with the real classes and codecs."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import av
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]

# (file name, width, height, frames, frames per second), with 0 frames for images. The clips have three lengths and are
# wide, tall and square; the shortest one has 5 frames at stride 2.
DATASET = (
    ("wide_long.mp4", 160, 96, 41, 24.0),
    ("tall_middle.mp4", 96, 160, 21, 30.0),
    ("square_short.mp4", 128, 128, 9, 25.0),
    ("wide_middle.mp4", 144, 112, 21, 24.0),
    ("wide.png", 192, 128, 0, 0.0),
    ("tall.jpg", 96, 144, 0, 0.0),
)
CAPTIONS = (
    "a bright square moves over a dark background",
    "a rabbit walks out of its burrow in the morning light",
    "people ride bikes through a city street",
    "a man in a car talks to the camera",
    "a cup of black coffee on a wooden table",
    "a rocket lifts off at night with a bright flame",
)


def load_script(relative: str) -> ModuleType:
    """Return a script as a module, by its path from the repository root: `wan2.1` is not an importable name."""
    path = ROOT / relative
    name = "script_" + "".join(c if c.isalnum() else "_" for c in relative.removesuffix(".py"))
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before execution: dataclasses look up their module by name
    sys.path.insert(0, str(path.parent))  # as when it is run, for imports from its own folder
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def build_wan_t2v(folder: Path, **sizes: int | float) -> Path:
    """Write a Wan2.1 text-to-video model with 28 thousand parameters; see scripts/demo_model.py."""
    return load_script("scripts/demo_model.py").build_wan_t2v(folder, **sizes)


def build_wan_i2v(folder: Path, *, image_embedder: bool = True, **sizes: int | float) -> Path:
    """Write a Wan2.1 image-to-video model with 35 thousand parameters; see scripts/demo_model.py."""
    return load_script("scripts/demo_model.py").build_wan_i2v(folder, image_embedder=image_embedder, **sizes)


def build_wan_flf2v(folder: Path, **sizes: int | float) -> Path:
    """Write a Wan2.1 first-and-last-frame model with an image embedder; see scripts/demo_model.py."""
    return load_script("scripts/demo_model.py").build_wan_i2v(folder, both_frames=True, **sizes)


def build_wan22_t2v(folder: Path, **sizes: int | float) -> Path:
    """Write a Wan2.2 text-to-video model: two transformers of 28 thousand parameters; see scripts/demo_model.py."""
    return load_script("scripts/demo_model.py").build_wan22(folder, **sizes)


def build_wan22_i2v(folder: Path, **sizes: int | float) -> Path:
    """Write a Wan2.2 image-to-video model, without an image embedder; see scripts/demo_model.py."""
    return load_script("scripts/demo_model.py").build_wan22(folder, images=True, **sizes)


def build_wan22_5b(folder: Path, **sizes: int | float) -> Path:
    """Write a Wan2.2 TI2V-5B: a VAE with 48 channels and 4x16x16 compression; see scripts/demo_model.py."""
    return load_script("scripts/demo_model.py").build_wan22_5b(folder, **sizes)


def build_hunyuan_t2v(folder: Path, **sizes: int | float | tuple[int, int, int]) -> Path:
    """Write a HunyuanVideo text-to-video model with 96 thousand parameters; see scripts/demo_hunyuan.py."""
    return load_script("scripts/demo_hunyuan.py").build_hunyuan_t2v(folder, **sizes)


def build_hunyuan_i2v(
    folder: Path, *, image_condition_type: str = "token_replace", **sizes: int | float | tuple[int, int, int]
) -> Path:
    """Write a HunyuanVideo image-to-video model with 96 thousand parameters; see scripts/demo_hunyuan.py."""
    return load_script("scripts/demo_hunyuan.py").build_hunyuan_i2v(
        folder, image_condition_type=image_condition_type, **sizes
    )


def moving_square(frames: int, width: int, height: int, seed: int = 0) -> np.ndarray:
    """Return uint8 [frames, height, width, 3]: a color gradient with a bright square that moves in each frame.

    The square's side is a quarter of each side of the frame; its left edge in frame i is `square_left(i, width)`. The
    colors of the gradient depend on the seed.
    """
    colors = np.random.default_rng(seed).uniform(20, 140, size=(2, 3))
    ramp = np.linspace(0, 1, width)[None, :, None] * 0.5 + np.linspace(0, 1, height)[:, None, None] * 0.5
    background = (colors[0] * (1 - ramp) + colors[1] * ramp).astype(np.uint8)
    clip = np.repeat(background[None], frames, axis=0)
    for i in range(frames):
        left, top = square_left(i, width), height * 3 // 8
        clip[i, top : top + height // 4, left : left + width // 4] = 235
    return clip


def square_left(frame: int, width: int) -> int:
    """Return the left edge of the moving square in pixels: 3 more per frame, modulo the free width."""
    return 3 * frame % (width - width // 4 + 1)


def write_clip(
    path: Path,
    frames: int = 21,
    width: int = 128,
    height: int = 96,
    fps: float = 24.0,
    *,
    pixels: np.ndarray | None = None,
    codec: str = "libx264",
    seed: int = 0,
) -> Path:
    """Write a clip with a real codec and return its path; sides must be even.

    Args:
        path: the suffix selects the container (.mp4, .mkv, .mov, .avi, ...).
        pixels: uint8 [frames, height, width, 3] instead of the moving square; its own shape is used then.
    """
    pixels = moving_square(frames, width, height, seed) if pixels is None else pixels
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=round(fps))
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1  # the same bytes on every machine
        if codec == "libx264":
            stream.options = {"crf": "12", "preset": "ultrafast"}
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_image(path: Path, width: int = 128, height: int = 96, *, seed: int = 0) -> Path:
    """Write one frame of the moving square as an image (.png, .jpg, .webp, ...) and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(moving_square(1, width, height, seed)[0]).save(path)
    return path


def make_dataset(
    folder: Path,
    media: tuple[tuple[str, int, int, int, float], ...] = DATASET,
    *,
    copies: int = 1,
    declare_sizes: bool = False,
) -> Path:
    """Write clips and images with captions and return the path of folder/metadata.json.

    Args:
        folder: the train_data_dir; file paths in the metadata are relative to it.
        media: rows of (file name, width, height, frames, fps); 0 frames for an image.
        copies: number of rows per file (each with another caption), for longer epochs without more files.
        declare_sizes: also write width, height, num_frames and fps into the rows.
    """
    rows = []
    for position, (name, width, height, frames, fps) in enumerate(media):
        if frames:
            write_clip(folder / name, frames, width, height, fps, seed=position)
        else:
            write_image(folder / name, width, height, seed=position)
        for copy in range(copies):
            row = {
                "file_path": name,
                "text": CAPTIONS[(position + copy) % len(CAPTIONS)],
                "type": "video" if frames else "image",
            }
            if declare_sizes:
                row |= {"width": width, "height": height}
                row |= {"num_frames": frames, "fps": fps} if frames else {}
            rows.append(row)
    metadata = folder / "metadata.json"
    metadata.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    return metadata
