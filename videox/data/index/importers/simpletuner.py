"""Reader of SimpleTuner's multidatabackend.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from videox.data.index.folders import FolderRules
from videox.data.index.importers.entry import Entry, Imported, KeyTable, frames_flag, side_of, tables
from videox.data.index.sources import CaptionEdits, Source

_REMOVE = "remove the key to train on the clips alone"
# Entries that hold caches or conditions of other entries, and no samples of their own.
WITHOUT_SAMPLES = ("text_embeds", "image_embeds", "conditioning_image_embeds", "distillation_cache", "eval")
STRATEGIES = ("textfile", "filename", "instanceprompt", "instance_prompt")
TABLE = KeyTable(
    tool="SimpleTuner",
    obeyed=frozenset(
        {
            "id", "type", "dataset_type", "disabled", "disable", "instance_data_dir", "caption_strategy",
            "instance_prompt", "prepend_instance_prompt", "only_instance_prompt", "repeats",
        }
    ),
    shown=frozenset(
        {
            "resolution", "resolution_type", "minimum_image_size", "maximum_image_size", "target_downsample_size",
            "minimum_aspect_ratio", "maximum_aspect_ratio", "max_upscale_threshold", "crop", "crop_style",
            "crop_aspect", "crop_aspect_buckets", "video", "probability", "max_num_samples", "start_epoch",
            "start_step", "end_epoch", "end_step", "caption_shuffle", "disable_multiline_split",
            "timestep_sampling_offset", "caption_filter_list",
        }
    ),
    unused=frozenset(
        {
            "cache_dir", "cache_dir_vae", "cache_dir_conditioning_image_embeds", "write_batch_size",
            "text_encoder_batch_size", "text_cache_ondemand", "text_cache_disable", "text_embeds", "image_embeds",
            "conditioning_image_embeds", "conditioning_image_embed_batch_size", "metadata_backend",
            "metadata_update_interval", "vae_cache_clear_each_epoch", "vae_cache_ondemand", "vae_cache_disable",
            "disable_vae_cache", "skip_file_discovery", "preserve_data_backend_cache", "hash_filenames",
            "delete_unwanted_images", "delete_problematic_images", "delete_nsfw_images", "audio",
        }
    ),
    refused={
        "is_regularisation_data": "remove the entry, or the key to train it like the others",
        "is_regularization_data": "remove the entry, or the key to train it like the others",
        "slider_strength": "remove the entry, or the key to train it like the others",
        **dict.fromkeys(("conditioning_data", "conditioning", "conditioning_type", "grounding"), _REMOVE),
    },
)  # fmt: skip


def read(config: Sequence[Any], path: Path) -> Imported:
    """Read a parsed configuration; path: of its file.

    Raises:
        UserError: (DATA) a value cannot be used, a folder is missing, or an entry is not a local folder of files.
    """
    found = Imported("SimpleTuner's multidatabackend.json")
    for number, values in enumerate(tables(config, str(path)), 1):
        entry = Entry(path, f"entry {number} ({values.get('id', 'without id')!r})", values)
        if entry.flag("disabled") or entry.flag("disable"):
            found.remarks.append(f"{entry.name} is disabled")
        elif (kind := entry.get("dataset_type", "image")) in WITHOUT_SAMPLES:
            found.remarks.append(f"{entry.name} is of type {kind}: it has no samples to train")
        else:
            found.sort_keys(entry.name, values, TABLE, path)
            found.sources.append(_source(entry, str(kind)))
            found.show(entry, TABLE, _flags(entry, str(kind)))
    if any(source.captions == CaptionEdits(prefix=source.captions.prefix) for source in found.sources):
        found.remarks.append(
            "a caption file is one caption; SimpleTuner takes each of its lines as a caption of its own"
        )
    return found


def _source(entry: Entry, kind: str) -> Source:
    if kind not in ("image", "video"):
        entry.fail("dataset_type", f"{kind!r} is not image or video", "set disabled to true for this entry")
    if entry.get("type", "local") != "local":
        entry.fail("type", f"{entry.get('type')!r} is not a local folder", "copy the files, and set type to local")
    strategy = entry.text("caption_strategy", "filename")  # the tool's own default
    if strategy not in STRATEGIES:
        hint = "write a list (jsonl) with file_path and text, and pass it with --train_data_meta"
        entry.fail("caption_strategy", f"{strategy!r} is not one of {', '.join(STRATEGIES[:3])}", hint)
    prompt = entry.text("instance_prompt")
    captions = CaptionEdits(from_name=strategy == "filename")
    if strategy.startswith("instance") or entry.flag("only_instance_prompt"):
        if not prompt:
            entry.fail("instance_prompt", "is missing, and every caption is to be it", "add it")
        captions = CaptionEdits(fixed=prompt)
    elif entry.flag("prepend_instance_prompt"):
        captions = CaptionEdits(from_name=strategy == "filename", prefix=f"{prompt} ")
    folder = entry.tool_path("instance_data_dir")
    # Its repeats are counted on top of the first time.
    return Source(folder, folder, FolderRules((".txt",), kind=kind), captions, 1 + entry.number("repeats", 0))


def _flags(entry: Entry, kind: str) -> list[str]:
    size, unit = entry.get("resolution"), entry.get("resolution_type", "pixel_area")
    side = side_of((size * 1e6) ** 0.5 if unit == "area" and isinstance(size, int | float) else size)
    flags = [f"--enable_bucket --{kind}_sample_size {side}"] if side else ["--enable_bucket"]
    if kind == "video":
        (video,) = tables([entry.get("video", {})], f"{entry.where}, key video")
        flags += frames_flag(video.get("num_frames") or video.get("max_frames"))
        flags.append("--video_sample_stride 1")
    return [*flags, "--caption_shuffle_tags"] if entry.get("caption_shuffle") else flags
