"""Tests of videox.errors: the words of messages."""

from __future__ import annotations

from videox.errors import plural


def test_a_count_of_one_has_the_singular() -> None:
    assert [f"{count} {plural(count, 'row')}" for count in (0, 1, 2)] == ["0 rows", "1 row", "2 rows"]
    assert plural(1, "entry is", "entries are") == "entry is"
    assert plural(3, "entry is", "entries are") == "entries are"
