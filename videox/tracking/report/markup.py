"""HTML from Python values: everything that is not markup already is escaped."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

MAX_TEXT = 2000  # characters of a text on the page: a caption or an error may be megabytes
EMPTY = {"input", "img", "meta", "br"}  # elements without an end tag


class Markup(str):
    """HTML that is inserted as it is."""

    __slots__ = ()


def escaped(value: object, limit: int = MAX_TEXT) -> str:
    """Return a value as text for HTML: escaped, printable, and at most `limit` characters long.

    Characters that a page cannot contain (controls, halves of a surrogate pair) become U+FFFD.
    """
    text = str(value)
    if len(text) > limit:
        text = f"{text[:limit]} ..."
    kept = (c if c.isprintable() or c in "\n\t\u200d\u200c\u3000\xa0" or ord(c) > 0xFFFF else "\ufffd" for c in text)
    return html.escape("".join(kept).encode("utf-8", "replace").decode("utf-8"))


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """Return an element; children and attribute values are escaped unless they are Markup.

    Args:
        name: of the element.
        children: their texts follow one another; None is left out.
        attributes: `class_` is the attribute class and `data_x` data-x; True is an attribute without a value, None and
            False are no attribute.
    """
    parts = [f"<{name}"]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        attribute = key.rstrip("_").replace("_", "-")
        text = value if isinstance(value, Markup) else escaped(value)
        parts.append(f" {attribute}" if value is True else f' {attribute}="{text}"')
    parts.append(">")
    if name not in EMPTY:
        parts += [joined(children), f"</{name}>"]
    return Markup("".join(parts))


def joined(children: Iterable[object]) -> Markup:
    """Return the children one after the other, those that are not Markup escaped."""
    given = (child for child in children if child is not None)
    return Markup("".join(child if isinstance(child, Markup) else escaped(child) for child in given))


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, page_size: int = 25) -> Markup:
    """Return a table with `page_size` rows a page; numbers are right-aligned."""
    rows = list(rows)
    numbers = [_is_number(value) for value in rows[0]] if rows else [False] * len(head)
    body = [
        tag("tr", *(tag("td", _cell(value), class_="n" if _is_number(value) else None, dir="auto") for value in row))
        for row in rows
    ]
    heads = zip(head, numbers, strict=True)
    titles = tag("thead", tag("tr", *(tag("th", name, scope="col", class_="n" if n else None) for name, n in heads)))
    content = tag("table", titles, tag("tbody", *body, class_="pages", data_size=page_size))
    return tag("div", content, class_="wide", tabindex="0", role="region", aria_label=" / ".join(head))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cell(value: object) -> object:
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value).lower()
    if isinstance(value, float):
        return number(value)
    return f"{value:,}" if isinstance(value, int) else value


def facts(pairs: Iterable[tuple[str, object]]) -> Markup:
    """Return a list of names and values; pairs without a value are left out."""
    shown = [(name, value) for name, value in pairs if value not in (None, "")]
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", _cell(value), dir="auto")) for name, value in shown))


def number(value: float) -> str:
    """Return a number with four significant digits, "-" if it is not finite."""
    if not math.isfinite(value):
        return "-"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Return a duration in words, such as "2 h 05 min"."""
    if not math.isfinite(seconds) or seconds < 0:
        return "-"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def moment(seconds: object) -> str:
    """Return a time given in seconds since 1970, in UTC; "" if it is none."""
    if not isinstance(seconds, (int, float)) or not 0 < seconds < 1e11:
        return ""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
