"""Reader of a folder of images and videos with their captions in text files next to them."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from videox.data.index.columns import Columns
from videox.data.index.formats import Table, encoding_of, read_bytes
from videox.data.index.media_files import count_suffixes, find_media, of_kind
from videox.errors import DATA, FLAGS, UserError, plural

CAPTION_SUFFIXES = (".txt", ".caption")  # of files that hold the caption of the media file of the same name
# Usual names of a list of a folder's files with their captions, which is read where it is passed itself.
_LIST_NAMES = tuple(f"metadata{suffix}" for suffix in (".json", ".jsonl", ".csv", ".tsv", ".parquet"))
_INDEX_SUFFIXES = (".arrow", ".partial")  # of saved indexes, which change while the folder does not


@dataclass(frozen=True)
class FolderRules:
    """Which files of a folder of media and captions are read.

    Attributes:
        caption_suffixes: suffixes of caption files, in lower case and with the dot. Of the default ones, a media file
            may have several caption files that agree; of others, the first one found is used.
        recursive: also read the folders below it.
        kind: "image" or "video": leave out files of the other kind, see `of_kind`; "" reads both.
    """

    caption_suffixes: tuple[str, ...] = CAPTION_SUFFIXES
    recursive: bool = True
    kind: str = ""

    def keeps(self, stem: str) -> bool:
        """Return whether a file is in a folder that is read; stem: its path relative to the source's folder."""
        return self.recursive or "/" not in stem

    def describe(self) -> list[str]:
        """Return what is left out, in words; [] where nothing is."""
        parts = [f"only {self.kind}s"] if self.kind else []
        return parts if self.recursive else [*parts, "only files directly in the folder"]


ALL_FILES = FolderRules()


def list_folder(folder: Path, caption_suffixes: Sequence[str] = CAPTION_SUFFIXES) -> list[tuple[str, str]]:
    """List the files below a folder, sorted, as (path relative to it without suffix, suffix).

    Hidden files and folders, and saved indexes, are skipped; links to folders are not followed.

    Args:
        folder: the folder.
        caption_suffixes: suffixes of caption files, in lower case and with the dot; they may have two (".wan.txt").

    Raises:
        UserError: exit code 2 for a folder that cannot be listed.
    """
    found = []
    for parent, folders, names in os.walk(folder, onerror=_raise_folder_error):
        folders[:] = [name for name in folders if not name.startswith(".")]
        prefix = Path(parent).relative_to(folder)
        for name in names:
            length = next((len(end) for end in caption_suffixes if name.lower().endswith(end)), 0)
            suffix = name[-length:] if length else Path(name).suffix
            if not name.startswith(".") and suffix not in _INDEX_SUFFIXES:
                found.append((str(prefix / name.removesuffix(suffix)), suffix))
    return sorted(found)


def read_folder(folder: Path, data_dir: Path, rules: FolderRules = ALL_FILES) -> Table:
    """Read a folder of media and captions.

    Returns:
        Columns file_path (relative to data_dir) and text, and notes for the start report; also the column type where
        the rules ask for images, so that an animation is trained as its first frame.

    Raises:
        UserError: exit code 3 if two files state different captions of one media file, or no media file is read.
    """
    listing = list_folder(folder, rules.caption_suffixes)
    others = [pair for pair in listing if pair[1].lower() not in rules.caption_suffixes]
    near = [pair for pair in others if rules.keeps(pair[0])]
    found = find_media(folder, [pair for pair in near if pair[1].lower() not in CAPTION_SUFFIXES])
    media = of_kind(folder, found, rules.kind) if rules.kind else found
    if not media:
        raise _no_media_error(folder, listing, rules)
    captions = _caption_files(folder, listing, rules)
    files = [captions.get(_caption_key(stem), []) for stem, _ in media]
    texts = [_read_only_caption(paths) if paths else "" for paths in files]
    prefix = Path(os.path.relpath(os.path.realpath(folder), os.path.realpath(data_dir)))
    columns: Columns = {"file_path": [str(prefix / (stem + suffix)) for stem, suffix in media], "text": texts}
    if rules.kind == "image":
        columns["type"] = ["image"] * len(media)
    passed_over = sorted({*near} - {*found})
    left_out = sorted({*others} - {*passed_over} - {*media})
    names = " or ".join(rules.caption_suffixes)
    without_caption = [stem + suffix for (stem, suffix), paths in zip(media, files, strict=True) if not paths]
    without_media = sorted(captions.keys() - {_caption_key(stem) for stem, _ in (*media, *left_out)})
    notes = []
    if left_out:
        first, only = "".join(left_out[0]), ", ".join(rules.describe())
        notes.append(
            f"{len(left_out)} {plural(len(left_out), 'file is', 'files are')} not read (first: {first!r}): {only}"
        )
    if passed_over:
        named, first = count_suffixes(passed_over), "".join(passed_over[0])
        notes.append(
            f"{len(passed_over)} {plural(len(passed_over), 'file is', 'files are')} neither image, video nor caption, by "
            f"{plural(len(passed_over), 'its', 'their')} content ({named}; first: {first!r})"
        )
    if without_caption and (lists := [name for name in map("".join, passed_over) if name in _LIST_NAMES]):
        notes.append(f"warning: {lists[0]} is not read for captions, --train_data_meta {folder / lists[0]} reads it")
    if without_caption:
        count, first = len(without_caption), without_caption[0]
        have, their = plural(count, "file has", "files have"), plural(count, "its", "their")
        notes.append(f"{count} media {have} no {names} file, {their} caption is empty (first: {first!r})")
    if without_media:
        count = len(without_media)
        have = plural(count, "file has no media file and is", "files have no media file and are")
        notes.append(f"{count} {names} {have} ignored (first: {without_media[0]!r})")
    return columns, notes


def _caption_key(stem: str) -> str:
    """Return what a media file and its caption have in common; macOS and Linux write one name in two Unicode forms."""
    return unicodedata.normalize("NFC", stem)


def _caption_files(folder: Path, listing: Sequence[tuple[str, str]], rules: FolderRules) -> dict[str, list[Path]]:
    """Return the caption files by `_caption_key`: all of them, or the first one if the source has its own suffixes."""
    found: dict[str, list[Path]] = {}
    for wanted in rules.caption_suffixes:
        for stem, suffix in reversed(listing):  # of x.TXT and x.txt, x.txt is the first one
            if suffix.lower() == wanted:
                found.setdefault(_caption_key(stem), []).append(folder / (stem + suffix))
    if rules.caption_suffixes == CAPTION_SUFFIXES:
        return found
    return {stem: paths[:1] for stem, paths in found.items()}


def _read_only_caption(paths: Sequence[Path]) -> str | bytes:
    """Return the caption of a media file; its files, if there are several, must agree."""
    (first, caption), *others = ((path, _read_caption(path)) for path in paths)
    for path, other in others:
        if other != caption:
            what = f"{first.name} and {path.name} state different captions of one media file"
            raise UserError(str(path.parent), what, "remove one of the two files", DATA)
    return caption


def _read_caption(path: Path) -> str | bytes:
    """Read a caption; bytes that are not text are returned unchanged and become the row's problem "bad_text"."""
    content = read_bytes(path)
    try:
        return content.decode(encoding_of(content)).strip()
    except UnicodeDecodeError:
        return content


def _no_media_error(folder: Path, listing: Sequence[tuple[str, str]], rules: FolderRules) -> UserError:
    folders = len({os.path.dirname(stem) for stem, _ in listing})  # noqa: PTH120 - strings of a listing
    what = f"0 samples: no {rules.kind or 'image or video'} among the {len(listing)} {plural(len(listing), 'file')} in {folders} {plural(folders, 'folder')} at and below {folder.absolute()}"
    what = f"{what} ({count_suffixes(listing)})" if listing else f"0 samples: {folder.absolute()} has no files"
    if not rules.recursive:
        what += "; the folders in it are not read"
    linked = [path.name for path in folder.iterdir() if path.is_symlink() and path.is_dir()]
    if linked:
        what += f"; {len(linked)} {plural(len(linked), 'link to a folder is', 'links to folders are')} not followed (first: {linked[0]!r})"
    return UserError(str(folder), what, "pass the folder that contains the clips, or a metadata file", DATA)


def _raise_folder_error(error: OSError) -> NoReturn:
    raise UserError(str(error.filename), f"cannot be listed ({error.strerror})", "check its permissions", FLAGS)
