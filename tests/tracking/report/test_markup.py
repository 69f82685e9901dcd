"""Tests of videox.tracking.report.markup: no text becomes markup, whatever it contains."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_folders import HOSTILE, Parsed

from videox.tracking.report.markup import MAX_TEXT, Markup, duration, escaped, facts, number, table, tag


def is_kept(character: str) -> bool:
    return character.isprintable() or character in "\n\t\xa0\u3000"


@given(st.text(alphabet=st.characters(codec=None), max_size=60), st.text(max_size=20))
def test_any_text_is_one_text_and_one_attribute(text, other):
    page = tag("p", text, other, title=text, data_x=other)
    parsed = Parsed(page)
    ((name, attributes),) = parsed.elements
    assert name == "p" and set(attributes) == {"title", "data-x"}
    shown = "".join(parsed.text)
    assert shown == attributes["title"] + attributes["data-x"]
    assert [c for c in shown if is_kept(c) and c != "\ufffd"] == [
        c for c in text + other if is_kept(c) and c != "\ufffd" and not 0xD800 <= ord(c) <= 0xDFFF
    ]
    page.encode("utf-8")  # no half of a surrogate pair is left


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_stay_texts_in_tables_and_lists(text):
    for page in (table(("a", text), [(text, 1), (2.5, text)]), facts([(text, text)])):
        names = {name for name, _ in Parsed(page).elements}
        assert names <= {"div", "table", "thead", "tbody", "tr", "th", "td", "dl", "dt", "dd"}
        assert all(not key.startswith("on") for _, attributes in Parsed(page).elements for key in attributes)


def test_markup_is_inserted_and_empty_attributes_are_left_out():
    page = tag("a", tag("b", "<"), None, href=Markup("x"), hidden=True, title=None, disabled=False, class_="c")
    assert page == '<a href="x" hidden class="c"><b>&lt;</b></a>'


def test_long_texts_are_cut():
    assert len(escaped("x" * 10**6)) < MAX_TEXT + 10


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1.23456, "1.235"), (12345.6, "12,346"), (1e-5, "1e-05"), (float("nan"), "-"), (1.5e9, "1.5e+09")],
)
def test_numbers_have_four_digits(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(5, "5 s"), (200, "3 min"), (3599.9, "1 h 00 min"), (7500, "2 h 05 min"), (90_000, "1 d 1 h"), (-1, "-")],
)
def test_durations_are_words(seconds, text):
    assert duration(seconds) == text
