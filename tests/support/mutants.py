"""Mutants of JSON files: other types, absurd numbers, deep nesting, lost or foreign keys, truncated files."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

DEEP = 20_000  # levels of nesting, far more than a JSON parser follows by recursion
VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 7, 2**31, 2**63, -(2**40), 10**30, 10**400, 0.5, 1e308, -1e-300, float("nan"),
    float("inf"), "", "text", "../../etc", "\x00\x1b[31m", "x" * 10_000, [], [[]], [None], [2**31] * 4, {}, {"a": {"b": 1}},
)  # fmt: skip
WHOLE_FILES = (
    b"", b"\x00" * 64, b"null", b"[]", b"{}", b"0", b'"text"', b"{" * DEEP, b"[" * DEEP + b"]" * DEEP, b"\xff\xfe{\x00}\x00",
    b"\xef\xbb\xbf{}", b"<html>404</html>", b'{"a": ' * DEEP + b"1" + b"}" * DEEP,
)  # fmt: skip


def mutants(content: bytes, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield `count` mutants of a JSON file, each with words on what was changed; equal seeds give equal mutants."""
    draw = random.Random(seed)
    kinds: list[Callable[[random.Random, bytes], tuple[str, bytes]]] = [
        _other_value, _other_value, _other_value, _removed, _nested, _truncated, _changed_byte, _whole_file,
    ]  # fmt: skip
    for number in range(count):
        yield kinds[number % len(kinds)](draw, content)


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*place, key)
        yield from _places(inner, (*place, key))


def _random_place(draw: random.Random, content: Any) -> tuple[Any, Any, str]:
    """Return the container and key of a random value, and its path in words; shallow places as often as deep ones."""
    places = list(_places(content))
    depth = draw.choice(sorted({len(place) for place in places}))
    *outer, last = draw.choice([place for place in places if len(place) == depth])
    for key in outer:
        content = content[key]
    return content, last, ".".join(map(str, [*outer, last]))


def _other_value(draw: random.Random, content: bytes) -> tuple[str, bytes]:
    data = json.loads(content)
    container, key, words = _random_place(draw, data)
    value = draw.choice(VALUES)
    container[key] = value
    return f"{words} = {str(value)[:40] if not isinstance(value, int) else hex(value)[:40]}", _text(data)


def _removed(draw: random.Random, content: bytes) -> tuple[str, bytes]:
    data = json.loads(content)
    container, key, words = _random_place(draw, data)
    if isinstance(container, dict) and draw.random() < 0.3:
        container[f"{key}_"] = container.pop(key)
        return f"{words} renamed", _text(data)
    del container[key]
    return f"without {words}", _text(data)


def _nested(draw: random.Random, content: bytes) -> tuple[str, bytes]:
    data = json.loads(content)
    container, key, words = _random_place(draw, data)
    container[key] = "DEEP"
    depth = draw.choice([50, 900, DEEP])
    opened, closed = draw.choice([(b"[", b"]"), (b'{"a":', b"}")])
    return f"{words} nested {depth}", _text(data).replace(b'"DEEP"', opened * depth + b"1" + closed * depth)


def _truncated(draw: random.Random, content: bytes) -> tuple[str, bytes]:
    size = draw.randrange(len(content))
    return f"truncated to {size} bytes", content[:size]


def _changed_byte(draw: random.Random, content: bytes) -> tuple[str, bytes]:
    place, value = draw.randrange(len(content)), draw.randrange(256)
    return f"byte {place} = {value}", content[:place] + bytes([value]) + content[place + 1 :]


def _whole_file(draw: random.Random, content: bytes) -> tuple[str, bytes]:
    other = draw.choice(WHOLE_FILES)
    return f"replaced by {other[:20]!r}", other


def _text(data: Any) -> bytes:
    # Python refuses to convert whole numbers of more than 4300 digits; none here has as many.
    return json.dumps(data, ensure_ascii=False).encode("utf-8", "surrogatepass")
