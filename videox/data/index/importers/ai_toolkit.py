"""Reader of the `datasets:` of ai-toolkit's job file (yaml), or of a file with this part alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from videox.data.index.folders import FolderRules
from videox.data.index.importers.entry import Entry, Imported, KeyTable, frames_flag, side_of, suffix_of, tables
from videox.data.index.sources import CaptionEdits, Source

_REMOVE = "remove the key to train on the clips alone"
_FOLDERS = ("folder_path", "dataset_path")
TABLE = KeyTable(
    tool="ai-toolkit",
    obeyed=frozenset({*_FOLDERS, "caption_ext", "caption_type", "default_caption", "num_repeats", "num_frames"}),
    shown=frozenset(
        {
            "resolution", "buckets", "bucket_tolerance", "square_crop", "scale", "random_scale", "random_crop",
            "shrink_video_to_frames", "fps", "do_i2v", "trigger_word", "random_triggers", "random_triggers_max",
            "caption_dropout_rate", "token_dropout_rate", "shuffle_tokens", "keep_tokens", "flip_x", "flip_y",
            "augments", "augmentations", "shuffle_augmentations", "loss_multiplier", "network_weight",
            "use_short_captions", "replacements", "standardize_images", "poi",
        }
    ),
    unused=frozenset(
        {
            "type", "cache_latents", "cache_latents_to_disk", "cache_clip_vision_to_disk", "cache_text_embeddings",
            "num_workers", "prefetch_factor", "pin_memory", "debug", "fast_image_size", "guidance_type",
            "control_transparent_color", "full_size_control_images", "invert_mask", "mask_min_value", "extra_values",
            "replay_transforms", "clip_image_augmentations", "clip_image_shuffle_augmentations",
        }
    ),
    refused={
        "is_reg": "remove the data set, or the key to train it like the others",
        **dict.fromkeys(
            (
                "control_path", "inpaint_path", "mask_path", "alpha_mask", "unconditional_path", "clip_image_path",
                "clip_image_from_same_folder", "controls",
            ),
            _REMOVE,
        ),
    },
)  # fmt: skip


def read(config: Mapping[str, Any], path: Path) -> Imported:
    """Read a parsed job file, or a mapping with `datasets` alone; path: of its file.

    Raises:
        UserError: (DATA) a value cannot be used, a folder is missing, or a data set is a JSON file of captions.
    """
    found = Imported("the datasets of an ai-toolkit job")
    for process, values in _datasets(config, path):
        name = f"datasets {len(found.sources) + 1}"
        found.sort_keys(name, values, TABLE, path)
        entry = Entry(path, name, values, ({"trigger_word": process.get("trigger_word")},))
        found.sources.append(_source(entry))
        found.show(entry, TABLE, _flags(entry))
    return found


def processes(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the mappings that may have `datasets`: the processes of a job, or the file itself."""
    job = config.get("config")
    listed = (job if isinstance(job, Mapping) else config).get("process")
    return [p for p in listed if isinstance(p, Mapping)] if isinstance(listed, list) else [config]


def _datasets(config: Mapping[str, Any], path: Path) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    where = f"{path} datasets"
    return [(process, values) for process in processes(config) for values in tables(process.get("datasets"), where)]


def _source(entry: Entry) -> Source:
    key = next((key for key in ("dataset_path", "folder_path") if entry.get(key)), "folder_path")
    folder = entry.tool_path(key)
    if not folder.is_dir():
        what = f"{entry.get(key)!r} is a file of captions, which is not read"
        entry.fail(key, what, "write a list (jsonl) with file_path and text, and pass it with --train_data_meta")
    suffixes = suffix_of(entry, "caption_type" if entry.get("caption_type") else "caption_ext", ".txt")
    kind = "video" if entry.number("num_frames", 1, 1) > 1 else "image"
    captions = CaptionEdits(missing=entry.text("default_caption"))
    return Source(folder, folder, FolderRules(suffixes, kind=kind), captions, entry.number("num_repeats", 1))


def _flags(entry: Entry) -> list[str]:
    sizes = entry.get("resolution", 512)
    side = max((side_of(size) for size in (sizes if isinstance(sizes, list) else [sizes])), default=0)
    is_video = entry.number("num_frames", 1, 1) > 1
    flags = [f"--{'video' if is_video else 'image'}_sample_size {side}"]
    flags += ["--enable_bucket"] if entry.get("buckets", True) else []
    if is_video:
        flags += frames_flag(entry.get("num_frames"))
        if entry.get("shrink_video_to_frames", True):
            flags.append("--video_sample_stride N, with N near the length of a video divided by num_frames")
        else:
            flags.append(f"--video_sample_fps {entry.get('fps', 16)}")
    flags += [f"--trigger_word {entry.get('trigger_word')!r}"] if entry.get("trigger_word") else []
    flags += ["--caption_shuffle_tags"] if entry.get("shuffle_tokens") else []
    return [*flags, f"--caption_dropout {entry.get('caption_dropout_rate', 0.0)}"]
