"""Reader of diffusion-pipe's dataset configuration (TOML with [[directory]])."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from videox.data.index.folders import FolderRules
from videox.data.index.importers.entry import Entry, Imported, KeyTable, frames_flag, side_of, tables
from videox.data.index.sources import CaptionEdits, Source
from videox.errors import DATA, UserError

_REMOVE = "remove the key to train on the clips alone"
TABLE = KeyTable(
    tool="diffusion-pipe",
    obeyed=frozenset({"path", "num_repeats", "caption_prefix"}),
    shown=frozenset(
        {
            "resolutions", "enable_ar_bucket", "min_ar", "max_ar", "num_ar_buckets", "ar_buckets", "frame_buckets",
            "size_buckets", "shuffle_tags", "cache_shuffle_num", "cache_shuffle_delimiter", "skip_empty_caption",
            "subsample_ratio",
        }
    ),
    unused=frozenset({"shuffle_metadata"}),
    refused={
        "mask_path": _REMOVE, "control_path": _REMOVE, "default_mask_file": _REMOVE,
        "online_captions": "write a list (jsonl) with file_path and text, and remove the key",
    },
)  # fmt: skip


def read(config: Mapping[str, Any], path: Path) -> Imported:
    """Read a parsed configuration; path: of its file.

    Raises:
        UserError: (DATA) a value cannot be used, or a folder is missing or has its captions in captions.json.
    """
    found = Imported("diffusion-pipe's dataset configuration")
    shared = {key: value for key, value in config.items() if key != "directory"}
    found.sort_keys("", shared, TABLE, path)
    for number, values in enumerate(tables(config["directory"], f"{path} directory"), 1):
        entry = Entry(path, f"[[directory]] {number}", values, (shared,))
        found.sort_keys(entry.name, values, TABLE, path)
        found.sources.append(_source(entry))
        found.show(entry, TABLE, _flags(entry))
    found.remarks.append("files without a caption are trained with an empty one (skip_empty_caption = false)")
    return found


def _source(entry: Entry) -> Source:
    folder = entry.tool_path("path")
    if (folder / "captions.json").is_file():
        what = "its captions are in captions.json, which is not read"
        raise UserError(str(folder), what, "write them to .txt files, or pass a list (jsonl) instead", DATA)
    captions = CaptionEdits(prefix=entry.text("caption_prefix"))
    return Source(folder, folder, FolderRules((".txt",), recursive=False), captions, entry.number("num_repeats", 1))


def _flags(entry: Entry) -> list[str]:
    flags = ["--enable_bucket"] if entry.get("enable_ar_bucket") or entry.get("size_buckets") else []
    sizes = [side_of(size) for size in entry.items("resolutions")]
    whole = [size for size in entry.items("size_buckets") if isinstance(size, list) and len(size) == 3]
    sizes += [side_of(size[:2]) for size in whole]
    flags += [f"--video_sample_size {max(sizes)} --image_sample_size {max(sizes)}"] if sizes else []
    frames = entry.items("frame_buckets") or [size[2] for size in whole]
    if any(isinstance(number, int) and number > 1 for number in frames):
        # The tool resamples every video to the model's own rate.
        flags += [*frames_flag(frames), "--video_sample_fps 16 (Wan2.1) or 24 (HunyuanVideo)"]
    shuffled = entry.get("shuffle_tags") or entry.get("cache_shuffle_num")
    return [*flags, "--caption_shuffle_tags"] if shuffled else flags
