"""What is wrong with a weights file that cannot be read, in words: a git-lfs pointer, a web page, half a file, ..."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

POINTER, MOST_POINTER_BYTES = b"version https://git-lfs.github.com/spec/", 1024
MOST_HEADER_BYTES = 100_000_000  # safetensors refuses longer headers


def describe_pointer(path: Path) -> str:
    """Return what a git-lfs pointer is, a text with the size and hash of the file that is meant; "" for other files.

    Raises:
        OSError: the file cannot be read.
    """
    if not path.is_file() or path.stat().st_size > MOST_POINTER_BYTES:
        return ""
    with path.open("rb") as file:
        text = file.read(MOST_POINTER_BYTES)
    if not text.startswith(POINTER):
        return ""
    size = re.search(rb"\nsize (\d+)", text)
    return f"is a git-lfs pointer, not the file itself{f' ({format_size(int(size[1]))})' if size else ''}"


def describe_damage(path: Path, cause: str) -> str:
    """Return what is wrong with a .safetensors file whose header cannot be read.

    Args:
        path: the file.
        cause: what safetensors says, used where nothing else is found.
    """
    with path.open("rb") as file:
        start = file.read(512)
    if pointer := describe_pointer(path):
        return pointer
    if re.match(rb"\s*<(!doctype|html)", start, re.IGNORECASE):
        return "is a web page, not the file that the page shows"
    if zipfile.is_zipfile(path) or re.match(rb"\x80[\x02-\x05]", start):
        return "is a pickle, as torch.save writes it, under the name of a safetensors file"
    size, stated = path.stat().st_size, _stated_size(path)
    if stated is not None and size < stated:
        cause = f"has {format_size(size)} of {format_size(stated)}"
    elif size and not start.strip(b"\0"):
        cause = f"its {format_size(size)} begin with zeros"
    return f"is truncated or damaged ({cause})"


def _stated_size(path: Path) -> int | None:
    """Return the size that a safetensors file's header states, in bytes; None if the header is not complete."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= MOST_HEADER_BYTES:
            return None
        text = file.read(length)
    if len(text) < length:
        return None
    try:
        tensors = [entry for name, entry in json.loads(text).items() if name != "__metadata__"]
        return 8 + length + max((entry["data_offsets"][1] for entry in tensors), default=0)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError, IndexError):
        return None


def format_size(count: int) -> str:
    """Return a number of bytes in a decimal unit, such as "2.84 GB"."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"
