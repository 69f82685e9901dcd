"""Captions of a row: how several are stored in one string, which one a sample draws, and the rules that change it.

A row has one caption or a list of them, and optionally prefix, suffix and trigger word of the list it comes from. The
rules of the run (`CaptionRules`) come from flags. The caption of a sample is a pure function of both and of the
sample's key, so that it is known before training and is the same for any number of workers and ranks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from videox.rng import Purpose, hash_key, uniform

TRIGGER = "[trigger]"  # replaced by the trigger word wherever a caption has it
# What else stands for the trigger word in captions that were written by hand or for ai-toolkit. It is reported and not
# replaced: runs that were begun with it continue with the captions that they had.
_OTHER_PLACEHOLDERS = r"(?i)\[(?:trigger|name)\]"
_MARK = "\x1e"  # ASCII record separator: begins a stored text that is more than one plain caption


class RowCaptions(NamedTuple):
    """The captions of a row.

    Attributes:
        captions: at least one; ("",) where the row has none.
        prefix: put before each of them, without a space in between; it is not shuffled with the tags.
        trigger_word: used instead of the run's, if it is not "".
        suffix: put after each of them, without a space in between; it is not shuffled with the tags.
    """

    captions: tuple[str, ...] = ("",)
    prefix: str = ""
    trigger_word: str = ""
    suffix: str = ""


@dataclass(frozen=True)
class CaptionRules:
    """What a run does to each caption.

    Attributes:
        prefix: put before each caption, see `join_prefix`.
        trigger_word: replaces "[trigger]"; put before captions that do not have it. "" = none.
        shuffle_tags: put the comma-separated parts of a caption in a random order.
    """

    prefix: str = ""
    trigger_word: str = ""
    shuffle_tags: bool = False


def pack_captions(row: RowCaptions) -> str:
    """Return the string that metadata and index store for a row; a single plain caption is stored as it is."""
    plain = len(row.captions) == 1 and row == RowCaptions(row.captions)
    if plain and not row.captions[0].startswith(_MARK):
        return row.captions[0]
    return _MARK + json.dumps({name: value for name, value in row._asdict().items() if value}, ensure_ascii=False)


def unpack_captions(text: str) -> RowCaptions:
    """Return the captions that a string of `pack_captions` contains."""
    if not text.startswith(_MARK):
        return RowCaptions((text,))
    stored = json.loads(text[1:])
    return RowCaptions(**{**stored, "captions": tuple(stored["captions"])})


def with_source_rules(text: str, *, prefix: str = "", trigger_word: str = "", suffix: str = "") -> str:
    """Return a row's stored captions with prefix, trigger word and suffix of the list or folder that it comes from.

    Args:
        text: as `pack_captions` returns it.
        prefix: of the source, with the space that separates it; it is put before a prefix that the row already has.
        trigger_word: of the source; "" keeps the row's.
        suffix: of the source, with the space that separates it; it is put after a suffix that the row already has.
    """
    row = unpack_captions(text)
    trigger_word = trigger_word or row.trigger_word
    return pack_captions(RowCaptions(row.captions, prefix + row.prefix, trigger_word, row.suffix + suffix))


def caption_counts(texts: pa.LargeStringArray) -> np.ndarray:
    """Return the number of captions of each row, int64 [rows], at least 1; texts: of `pack_captions`."""
    counts = np.ones(len(texts), np.int64)
    for row in np.flatnonzero(pc.starts_with(texts, _MARK).to_numpy(zero_copy_only=False)):
        counts[row] = len(unpack_captions(texts[int(row)].as_py()).captions)
    return counts


def drawn_caption(keys: int | np.ndarray, counts: int | np.ndarray) -> np.ndarray:
    """Return which caption of their row samples draw, int64 from 0 to counts - 1.

    Args:
        keys: of the samples; they are new in each epoch and for each copy of a row.
        counts: number of captions of each sample's row.
    """
    return np.floor(uniform(keys, Purpose.CAPTION) * counts).astype(np.int64)


def draw_caption(row: RowCaptions, rules: CaptionRules, key: int) -> str:
    """Return the caption of a sample: one of its row's captions, with the rules applied.

    Args:
        row: the captions of the sample's row.
        rules: of the run.
        key: of the sample.
    """
    caption = row.captions[int(drawn_caption(key, len(row.captions)))]
    trigger = row.trigger_word or rules.trigger_word
    if rules.shuffle_tags:
        caption = _shuffle_tags(caption, trigger, key)
    caption = row.prefix + caption + row.suffix
    if (rules.prefix or trigger) and not caption.strip():
        caption = ""  # white space alone is no caption to put something before
    return _insert_trigger(join_prefix(rules.prefix, caption), trigger)


def join_prefix(prefix: str, caption: str) -> str:
    """Return prefix and caption with a space in between, unless the prefix ends with white space.

    Before an empty caption, white space and commas at the prefix's end are removed.
    """
    if not prefix or not caption:
        return caption or prefix.rstrip(" ,\t\n")
    return prefix + caption if prefix[-1].isspace() else f"{prefix} {caption}"


def _insert_trigger(caption: str, trigger: str) -> str:
    if not trigger:
        return caption
    caption = caption.replace(TRIGGER, trigger)
    # as a word of its own: "cat" is not in "catch"
    if re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption):
        return caption
    return f"{trigger}, {caption}" if caption else trigger


def _shuffle_tags(caption: str, trigger: str, key: int) -> str:
    """Return the comma-separated tags of a caption in the order of the key; one that is the trigger word is first."""
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    first = [tag for tag in tags if trigger and tag in (trigger, TRIGGER)]
    others = [tag for tag in tags if tag not in first]
    order = np.argsort(hash_key(key, Purpose.CAPTION_TAGS, np.arange(len(others))), kind="stable")
    return ", ".join([*first, *(others[place] for place in order)])


def rows_without_caption(texts: pa.LargeStringArray) -> np.ndarray:
    """Return bool [rows], True where a row has no caption, or white space alone; texts: of `pack_captions`."""
    empty: np.ndarray = pc.equal(pc.binary_length(pc.utf8_trim_whitespace(texts)), 0).to_numpy(zero_copy_only=False)
    for row in np.flatnonzero(pc.starts_with(texts, _MARK).to_numpy(zero_copy_only=False)):
        captions = unpack_captions(texts[int(row)].as_py()).captions
        empty[row] = not any(caption.strip() for caption in captions)
    return empty


def rows_with_placeholder(texts: pa.LargeStringArray) -> np.ndarray:
    """Return bool [rows], True where captions or prefix have "[trigger]" and the row has no trigger word itself."""
    found: np.ndarray = pc.match_substring(texts, TRIGGER).to_numpy(zero_copy_only=False)
    for row in np.flatnonzero(found):
        found[row] = not unpack_captions(texts[int(row)].as_py()).trigger_word
    return found


def other_placeholders(texts: pa.LargeStringArray) -> tuple[np.ndarray, list[str]]:
    """Return the rows, int64 [n], with placeholders such as "[Trigger]" or "[name]", and these, sorted.

    Args:
        texts: of `pack_captions`; "[trigger]" itself does not count.
    """
    found = pc.match_substring_regex(pc.replace_substring(texts, TRIGGER, ""), _OTHER_PLACEHOLDERS)
    rows = np.flatnonzero(found.to_numpy(zero_copy_only=False))
    spellings = {name for row in rows for name in re.findall(_OTHER_PLACEHOLDERS, texts[int(row)].as_py())}
    return rows, sorted(spellings - {TRIGGER})


def clean_captions(captions: Sequence[str]) -> RowCaptions:
    """Return the captions of a list, those without a visible character left out."""
    kept = tuple(caption for caption in captions if caption.strip())
    return RowCaptions(kept or ("",))
