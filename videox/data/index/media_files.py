"""Which files of a folder are images or videos: by their suffix where it says so, otherwise by their first bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

from videox.data.media.container import BadMedia, format_of, open_container
from videox.data.media.signatures import kind_of

_IMAGE_SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jfif", ".jpe", ".apng", ".heic", ".heif",
))  # fmt: skip
# A file with one of these suffixes is a row of the folder without being opened, since probing opens it anyway. If it
# is of no known format, its row says so instead of being left out.
MEDIA_SUFFIXES = _IMAGE_SUFFIXES | frozenset((
    ".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".mts", ".m2ts", ".3gp", ".3g2",
    ".ogv", ".vob", ".asf", ".f4v", ".mxf", ".y4m", ".ivf", ".divx", ".m2v", ".qt",
))  # fmt: skip
# Files whose content may begin like that of a video and that have none, by the meaning of their suffix.
_AUDIO_SUFFIXES = frozenset((".m4a", ".m4b", ".m4r", ".mka", ".wma", ".oga", ".opus", ".aac", ".mp3", ".wav", ".flac"))
_THREADS, _CHUNK = 16, 256  # on a network disk most of the time is spent waiting


def is_opened(suffix: str) -> bool:
    """Return whether a file with this suffix is opened to find out whether it is an image or a video."""
    return suffix.lower() not in MEDIA_SUFFIXES and suffix.lower() not in _AUDIO_SUFFIXES


def find_media(folder: Path, listing: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the files of a listing that are images or videos, or whose suffix says so, in the same order.

    Args:
        folder: the folder that the listing is relative to.
        listing: (path without suffix, suffix) of each file; captions are not among them.
    """
    unknown = [pair for pair in listing if is_opened(pair[1])]
    paths = [f"{folder}/{stem}{suffix}" for stem, suffix in unknown]
    chunks = [paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK)]
    with ThreadPoolExecutor(_THREADS) as pool:
        formats = chain.from_iterable(pool.map(lambda chunk: [format_of(Path(path)) for path in chunk], chunks))
        found = {pair for pair, name in zip(unknown, formats, strict=True) if name}
    return [pair for pair in listing if pair[1].lower() in MEDIA_SUFFIXES or pair in found]


def of_kind(folder: Path, media: Sequence[tuple[str, str]], kind: str) -> list[tuple[str, str]]:
    """Return the files that can be trained as a kind, by their content, in the same order.

    An animation is both: a video, or the image of its first frame. A file of no known format is of the kind that its
    suffix says, so that its row names the problem.

    Args:
        folder: the folder that the paths are relative to.
        media: (path without suffix, suffix) of each file, from `find_media`.
        kind: "image" or "video"; every file is opened.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        fits = pool.map(lambda pair: _is_of_kind(folder / (pair[0] + pair[1]), pair[1], kind), media)
        return [pair for pair, fit in zip(media, fits, strict=True) if fit]


def _is_of_kind(path: Path, suffix: str, kind: str) -> bool:
    name = format_of(path)
    if not name:
        return (kind == "image") == (suffix.lower() in _IMAGE_SUFFIXES)
    return kind_of(name) == kind or (kind == "video" and _is_animation(path))


def _is_animation(path: Path) -> bool:
    from videox.data.media.animation import probe_animation  # imported here, because it imports an image decoder

    try:
        return probe_animation(path, open_container(path)) is not None
    except BadMedia:
        return False


def count_suffixes(listing: Iterable[tuple[str, str]], most: int = 12) -> str:
    """Return how many files of a listing have which suffix, the most frequent first: "3 .json, 1 without suffix"."""
    counts = Counter(suffix.lower() or "without suffix" for _, suffix in listing).most_common()
    parts = [f"{count} {suffix}" for suffix, count in counts[:most]]
    others = sum(count for _, count in counts[most:])
    return ", ".join([*parts, f"{others} with other suffixes"] if others else parts)
