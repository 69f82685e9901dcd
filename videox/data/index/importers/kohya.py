"""Reader of kohya's sd-scripts dataset configuration (TOML or JSON with [[datasets.subsets]])."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from videox.data.index.folders import FolderRules
from videox.data.index.importers.entry import Entry, Imported, KeyTable, side_of, suffix_of, tables
from videox.data.index.sources import CaptionEdits, Source

_OTHER_LOSS = "remove the subset, or the key to train it like the others"
TABLE = KeyTable(
    tool="sd-scripts",
    obeyed=frozenset(
        {"image_dir", "caption_extension", "num_repeats", "caption_prefix", "caption_suffix", "class_tokens"}
    ),
    shown=frozenset(
        {
            "resolution", "batch_size", "enable_bucket", "bucket_no_upscale", "bucket_reso_steps", "min_bucket_reso",
            "max_bucket_reso", "skip_image_resolution", "shuffle_caption", "caption_separator", "keep_tokens",
            "keep_tokens_separator", "secondary_separator", "enable_wildcard", "caption_dropout_rate",
            "caption_dropout_every_n_epochs", "caption_tag_dropout_rate", "color_aug", "flip_aug",
            "face_crop_aug_range", "random_crop", "token_warmup_min", "token_warmup_step", "network_multiplier",
        }
    ),
    unused=frozenset({"cache_info", "resize_interpolation"}),
    refused={
        "is_reg": _OTHER_LOSS,
        "metadata_file": "write a list (jsonl) with file_path and text, and pass it with --train_data_meta",
        "conditioning_data_dir": "remove the key to train on the clips alone",
    },
)  # fmt: skip


def read(config: Mapping[str, Any], path: Path) -> Imported:
    """Read a parsed configuration; path: of its file.

    Raises:
        UserError: (DATA) a value cannot be used, or a folder is missing.
    """
    found = Imported("the dataset configuration of kohya's sd-scripts")
    (general,) = tables([config.get("general") or {}], f"{path} [general]")
    found.unknown += [key for key in config if key not in ("general", "datasets")]
    found.sort_keys("[general]", general, TABLE, path)
    for number, dataset in enumerate(tables(config["datasets"], f"{path} datasets"), 1):
        shared = {key: value for key, value in dataset.items() if key != "subsets"}
        found.sort_keys(f"[[datasets]] {number}", shared, TABLE, path)
        for position, values in enumerate(tables(dataset.get("subsets"), f"{path} subsets"), 1):
            entry = Entry(path, f"[[datasets]] {number} [[datasets.subsets]] {position}", values, (shared, general))
            found.sort_keys(entry.name, values, TABLE, path)
            found.sources.append(_source(entry))
            found.show(entry, TABLE, _flags(entry))
    if any(source.captions.first_line for source in found.sources):
        found.remarks.append("as sd-scripts does, only the first line of a caption file is used")
    return found


def _source(entry: Entry) -> Source:
    folder = entry.tool_path("image_dir")
    captions = CaptionEdits(
        first_line=not entry.flag("enable_wildcard"),
        missing=entry.text("class_tokens"),
        prefix=f"{entry.text('caption_prefix')} " if entry.text("caption_prefix") else "",
        suffix=f" {entry.text('caption_suffix')}" if entry.text("caption_suffix") else "",
    )
    rules = FolderRules(suffix_of(entry, "caption_extension", ".caption"), recursive=False)
    return Source(folder, folder, rules, captions, entry.number("num_repeats", 1))


def _flags(entry: Entry) -> list[str]:
    flags = ["--enable_bucket"] if entry.get("enable_bucket") else []
    side = side_of(entry.get("resolution"))
    flags += [f"--image_sample_size {side} --video_sample_size {side}"] if side else []
    flags += [f"--train_batch_size {entry.get('batch_size')}"] if entry.get("batch_size") else []
    flags += ["--caption_shuffle_tags"] if entry.get("shuffle_caption") else []
    dropout = entry.get("caption_dropout_rate")
    return [*flags, f"--caption_dropout {dropout}"] if dropout is not None else flags
