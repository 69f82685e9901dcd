"""Reader of our own dataset configuration (yaml with `sources`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from videox.data.index.folders import CAPTION_SUFFIXES, FolderRules
from videox.data.index.importers.entry import Entry, Imported, KeyTable, suffix_of, tables
from videox.data.index.sources import CaptionEdits, Source
from videox.errors import DATA, UserError

TABLE = KeyTable(
    tool="this trainer",
    obeyed=frozenset(
        {
            "path", "data_dir", "caption_extension", "caption_prefix", "caption_suffix", "default_caption", "repeats",
            "only", "recursive",
        }
    ),
    shown=frozenset(),
    unused=frozenset(),
    refused={},
)  # fmt: skip
KINDS = {"images": "image", "videos": "video", "": ""}


def read(config: Mapping[str, Any], path: Path) -> Imported:
    """Read a parsed configuration; path: of its file, which its paths are relative to.

    Raises:
        UserError: (DATA) a key is unknown, a value cannot be used, or a folder or list is missing.
    """
    found = Imported("this trainer's dataset configuration")
    (defaults,) = tables([config.get("defaults") or {}], f"{path} defaults")
    found.unknown += [key for key in config if key not in ("defaults", "sources")]
    found.sort_keys("defaults", defaults, TABLE, path)
    for number, values in enumerate(config["sources"], 1):
        entry = Entry(path, f"sources {number}", {"path": values} if isinstance(values, str) else values, (defaults,))
        if not isinstance(entry.own, Mapping):
            raise UserError(entry.where, f"{values!r} is neither a path nor a mapping", "correct the file", DATA)
        found.sort_keys(entry.name, entry.own, TABLE, path)
        found.sources.append(_source(entry))
    if found.unknown:
        hint = f"the keys of a source are {', '.join(TABLE.known())}"
        raise UserError(str(path), f"unknown keys: {', '.join(found.unknown)}", hint, DATA)
    return found


def _source(entry: Entry) -> Source:
    here = (entry.config.resolve().parent,)
    if not entry.get("path"):
        raise UserError(entry.where, "path is missing", "add path: the folder or list of this source", DATA)
    place = entry.path("path", here)
    data_dir = place if place.is_dir() else place.parent
    if entry.get("data_dir"):
        data_dir = entry.path("data_dir", here)
    only = entry.text("only")
    if only not in KINDS:
        entry.fail("only", f"{only!r} is not images or videos", "use one of them, or remove the key")
    suffixes = suffix_of(entry, "caption_extension", "") if entry.get("caption_extension") else CAPTION_SUFFIXES
    captions = CaptionEdits(
        missing=entry.text("default_caption"), prefix=entry.text("caption_prefix"), suffix=entry.text("caption_suffix")
    )
    rules = FolderRules(suffixes, entry.flag("recursive", True), KINDS[only])
    weight = entry.number("repeats", 1)
    return Source(place, data_dir, rules, captions, weight, allow_absolute=not entry.get("data_dir"))
