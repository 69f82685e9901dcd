"""Reader of musubi-tuner's dataset configuration (TOML or JSON with [general] and [[datasets]])."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from videox.data.index.folders import FolderRules
from videox.data.index.importers.entry import Entry, Imported, KeyTable, frames_flag, side_of, suffix_of, tables
from videox.data.index.sources import Source
from videox.errors import DATA, UserError

FOLDERS = {"image_directory": "image", "video_directory": "video"}
LISTS = {"image_jsonl_file": "image", "video_jsonl_file": "video"}
_CONTROL = "remove the key to train on the clips alone"
TABLE = KeyTable(
    tool="musubi-tuner",
    obeyed=frozenset({*FOLDERS, *LISTS, "caption_extension", "num_repeats"}),
    shown=frozenset(
        {
            "resolution", "enable_bucket", "bucket_no_upscale", "batch_size", "target_frames", "frame_extraction",
            "frame_stride", "frame_sample", "max_frames", "source_fps",
        }
    ),
    unused=frozenset(
        {
            "cache_directory", "skip_corrupted_cache", "debug_dataset", "no_resize_control", "control_resolution",
            "flux_kontext_no_resize_control", "qwen_image_edit_no_resize_control", "qwen_image_edit_control_resolution",
            "fp_latent_window_size", "fp_1f_clean_indices", "fp_1f_target_index", "fp_1f_no_post",
        }
    ),
    refused={"control_directory": _CONTROL, "multiple_target": _CONTROL},
)  # fmt: skip
DEFAULT_SIZE, DEFAULT_FRAMES, MAX_FRAMES = [960, 544], [1], 129
ALL_CLIPS = 1000  # more than any video has: --clips_per_video takes as many as fit


def read(config: Mapping[str, Any], path: Path) -> Imported:
    """Read a parsed configuration; path: of its file.

    Raises:
        UserError: (DATA) a value cannot be used, or a folder or list is missing.
    """
    found = Imported("musubi-tuner's dataset configuration")
    (general,) = tables([config.get("general") or {}], f"{path} [general]")
    found.unknown += [key for key in config if key not in ("general", "datasets")]
    found.sort_keys("[general]", general, TABLE, path)
    for number, values in enumerate(tables(config["datasets"], f"{path} datasets"), 1):
        entry = Entry(path, f"[[datasets]] {number}", values, (general,))
        found.sort_keys(entry.name, values, TABLE, path)
        given = [key for key in (*FOLDERS, *LISTS) if values.get(key)]
        if len(given) != 1:
            what = f"{' and '.join(given) or 'none'} of {', '.join((*FOLDERS, *LISTS))} is given"
            raise UserError(entry.where, what, "give exactly one of them", DATA)
        found.sources.append(_source(entry, given[0]))
        found.show(entry, TABLE, _flags(entry, (FOLDERS | LISTS)[given[0]]))
    found.remarks.append("files without a caption are trained with an empty one; musubi-tuner leaves them out")
    return found


def _source(entry: Entry, key: str) -> Source:
    place, weight = entry.tool_path(key), entry.number("num_repeats", 1)
    if key in LISTS:
        return Source(place, _folder_of_list(place), weight=weight, allow_absolute=True)
    suffixes = suffix_of(entry, "caption_extension", ".txt")
    return Source(place, place, FolderRules(suffixes, recursive=False, kind=FOLDERS[key]), weight=weight)


def _folder_of_list(path: Path) -> Path:
    """Return the folder that the paths of a list are relative to: the working directory if it has the first file."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            row = json.loads(next((line for line in file if line.strip()), "null"))
    except (OSError, ValueError):
        return path.parent  # read_metadata reports it
    first = next((row[key] for key in ("video_path", "image_path", "file_path") if key in row), "") if row else ""
    return Path.cwd() if first and not Path(first).is_absolute() and (Path.cwd() / first).exists() else path.parent


def _flags(entry: Entry, kind: str) -> list[str]:
    size = entry.get("resolution", DEFAULT_SIZE)
    flags = [f"--{kind}_sample_size {side_of(size)}", "--enable_bucket"]
    if not entry.get("enable_bucket", False):
        width, height = size if isinstance(size, list) and len(size) == 2 else (size, size)
        flags = [f"--enable_bucket --fix_sample_size {height} {width}"]
    flags += [f"--train_batch_size {entry.get('batch_size')}"] if entry.get("batch_size") else []
    if kind == "image":
        return flags
    mode = entry.get("frame_extraction", "head")
    whole = mode == "full"
    flags += frames_flag(entry.get("max_frames", MAX_FRAMES) if whole else entry.get("target_frames", DEFAULT_FRAMES))
    clips = {
        "chunk": f"--clip_sampling head --clips_per_video {ALL_CLIPS}",
        "slide": f"--clip_sampling uniform --clips_per_video {ALL_CLIPS}",
        "uniform": f"--clip_sampling uniform --clips_per_video {entry.get('frame_sample', 1)}",
    }
    flags.append(clips.get(str(mode), "--clip_sampling head"))
    # With source_fps the tool resamples to the model's own rate, otherwise it uses every frame.
    resampled = "--video_sample_fps 16 (Wan2.1) or 24 (HunyuanVideo)"
    return [*flags, resampled if entry.get("source_fps") else "--video_sample_stride 1"]
