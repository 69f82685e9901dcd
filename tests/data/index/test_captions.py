"""Tests of videox.data.index.captions: how captions are stored, which one a sample draws, and the rules for them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from videox.data.index.captions import (
    CaptionRules,
    RowCaptions,
    caption_counts,
    draw_caption,
    drawn_caption,
    join_prefix,
    other_placeholders,
    pack_captions,
    rows_with_placeholder,
    rows_without_caption,
    unpack_captions,
    with_source_rules,
)
from videox.data.index.table import string_array

KEYS = st.integers(0, 2**64 - 1)
TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
NONE = CaptionRules()


def draw(caption: str, *, key: int = 0, row_prefix: str = "", **rules: object) -> str:
    return draw_caption(RowCaptions((caption,), row_prefix), CaptionRules(**rules), key)


# ------------------------------------------------------------------------------------------------------------ storage


@given(st.lists(TEXT, min_size=1, max_size=4), TEXT, TEXT)
def test_captions_are_stored_in_one_string(captions: list[str], prefix: str, trigger: str) -> None:
    row = RowCaptions(tuple(captions), prefix, trigger)
    assert unpack_captions(pack_captions(row)) == row
    assert caption_counts(string_array([pack_captions(row), "x"])).tolist() == [len(captions), 1]


def test_a_plain_caption_is_stored_as_it_is() -> None:
    """So that the fingerprints of existing indexes, and with them the checkpoints of older runs, stay valid."""
    for caption in ("", "a dog", '["a"]', "[trigger]", "ü\0"):
        assert pack_captions(RowCaptions((caption,))) == caption


def test_rows_without_caption_are_found() -> None:
    rows = [
        RowCaptions(),
        RowCaptions((" \n",)),
        RowCaptions(("",), prefix="p"),
        RowCaptions(("", "a")),
        RowCaptions(("a",)),
    ]
    assert rows_without_caption(string_array(map(pack_captions, rows))).tolist() == [True, True, True, False, False]


def test_placeholders_are_found_unless_the_row_has_a_word() -> None:
    texts = ["[trigger] runs", "a dog", pack_captions(RowCaptions(("x",), prefix="[trigger],"))]
    texts.append(with_source_rules("[trigger] runs", trigger_word="ohwx"))
    assert rows_with_placeholder(string_array(texts)).tolist() == [True, False, True, False]


def test_placeholders_in_other_words_are_found() -> None:
    texts = ["[trigger] runs", "[Trigger] runs", "a dog", "[trigger] and [NAME]", "[triggers]", "trigger [na me]"]
    texts.append(pack_captions(RowCaptions(("a", "b"), prefix="[TRIGGER] ")))
    rows, spellings = other_placeholders(string_array(texts))
    assert rows.tolist() == [1, 3, 6] and spellings == ["[NAME]", "[TRIGGER]", "[Trigger]"]
    rows, spellings = other_placeholders(string_array(["[trigger]"]))
    assert not len(rows) and not spellings


# -------------------------------------------------------------------------------------------------------------- draws


def test_each_caption_of_a_row_is_drawn_equally_often() -> None:
    numbers = drawn_caption(np.arange(30_000, dtype=np.uint64), 3)
    assert np.abs(np.bincount(numbers, minlength=3) / 30_000 - 1 / 3).max() < 0.01
    assert drawn_caption(np.arange(9, dtype=np.uint64), 1).tolist() == [0] * 9


@given(KEYS, st.integers(1, 5))
def test_a_draw_depends_on_the_key_alone(key: int, count: int) -> None:
    number = int(drawn_caption(key, count))
    assert 0 <= number < count and int(drawn_caption(np.array([key], np.uint64), np.array([count]))[0]) == number
    row = RowCaptions(tuple(map(str, range(count))))
    assert draw_caption(row, NONE, key) == draw_caption(row, NONE, key) == str(number)


@given(TEXT, KEYS)
def test_without_rules_a_single_caption_is_unchanged(caption: str, key: int) -> None:
    assert draw(caption, key=key) == caption


# -------------------------------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize(
    ("prefix", "caption", "joined"),
    [
        ("photo of", "a dog", "photo of a dog"), ("TOK, ", "a dog", "TOK, a dog"), ("", "a dog", "a dog"),
        ("TOK, ", "", "TOK"), ("", "", ""), ("line\n", "a dog", "line\na dog"),
    ],
)  # fmt: skip
def test_prefix(prefix: str, caption: str, joined: str) -> None:
    assert join_prefix(prefix, caption) == joined == draw(caption, prefix=prefix)


@pytest.mark.parametrize(
    ("caption", "trained"),
    [
        ("[trigger] runs", "cat runs"), ("a [trigger], a [trigger]", "a cat, a cat"), ("a cat runs", "a cat runs"),
        ("to catch", "cat, to catch"), ("", "cat"), ("a dog", "cat, a dog"), ("Cat", "cat, Cat"),
    ],
)  # fmt: skip
def test_trigger_word_replaces_the_placeholder_or_comes_first(caption: str, trained: str) -> None:
    assert draw(caption, trigger_word="cat") == trained


def test_trigger_word_with_signs_is_one_word() -> None:
    assert draw("<s0><s1> runs", trigger_word="<s0><s1>") == "<s0><s1> runs"
    assert draw("runs", trigger_word="a+b(c") == "a+b(c, runs"


def test_prefixes_and_trigger_word_together() -> None:
    assert draw("a dog", prefix="photo of [trigger],", trigger_word="tok") == "photo of tok, a dog"
    assert draw("a dog", prefix="film", row_prefix="set one: ", trigger_word="tok") == "tok, film set one: a dog"
    row = RowCaptions(("a dog",), trigger_word="own")
    assert draw_caption(row, CaptionRules(trigger_word="tok"), 0) == "own, a dog"


def test_rules_of_a_source_keep_those_of_the_row() -> None:
    packed = with_source_rules(pack_captions(RowCaptions(("a", "b"))), prefix="p", trigger_word="t")
    assert unpack_captions(packed) == RowCaptions(("a", "b"), "p", "t")
    assert unpack_captions(with_source_rules(packed, prefix="q, ")) == RowCaptions(("a", "b"), "q, p", "t")
    assert with_source_rules("a dog") == "a dog"


@given(st.lists(st.text("abc ", min_size=1, max_size=3), max_size=6), KEYS)
def test_shuffling_keeps_every_tag(tags: list[str], key: int) -> None:
    shuffled = draw(",".join(tags), key=key, shuffle_tags=True)
    kept = [tag.strip() for tag in tags if tag.strip()]
    assert Counter(shuffled.split(", ") if shuffled else []) == Counter(kept)
    assert draw(",".join(tags), key=key, shuffle_tags=True) == shuffled


def test_shuffled_tags_reach_every_order_and_keep_prefix_and_trigger_first() -> None:
    orders = Counter(draw("a, b,c", key=key, shuffle_tags=True, prefix="p,") for key in range(3000))
    assert len(orders) == 6 and min(orders.values()) > 400 and all(order.startswith("p, ") for order in orders)
    for caption in ("x, tok, y", "x, [trigger], y", "x, y"):
        found = {draw(caption, key=key, shuffle_tags=True, trigger_word="tok") for key in range(50)}
        assert found == {"tok, x, y", "tok, y, x"}
