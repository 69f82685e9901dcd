"""Checks the values of a component's configuration against the types that its diffusers class states."""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

LARGEST = 10**7  # of a whole number: no size, count or vocabulary of a model is near it
_SHOWN = 60


def value_fault(model_class: type, config: Mapping[str, Any]) -> str:
    """Return what is wrong with the first value of a configuration that has another type than its class states.

    Whole numbers must be 0 to 10^7, others finite: a number of layers of 2^31 would fill the memory before anything
    could refuse it.

    Args:
        model_class: a class of diffusers whose __init__ has type hints.
        config: values by the names of its parameters; other names are ignored.

    Returns:
        "key is value, expected type"; "" if all values fit.
    """
    hints = get_type_hints(inspect.unwrap(model_class.__init__))  # type: ignore[misc]
    for name, value in config.items():
        if name in hints and not _fits(value, hints[name]):
            return f"{name} is {_shown(value)}, expected {_words(hints[name])}"
    return ""


def number_fault(config: Mapping[str, Any]) -> str:
    """Return what is wrong with the first number of a configuration, at any depth, that no model can have.

    Whole numbers above 10^7, also below -10^7, and numbers that are not finite. Classes of transformers would try to
    build a model of 2^31 layers.

    Returns:
        "key is value, expected ..."; "" if all numbers are possible.
    """
    left: list[tuple[str, Any]] = list(config.items())
    while left:
        name, value = left.pop()
        if isinstance(value, Mapping):
            left += [(f"{name}.{key}", inner) for key, inner in value.items()]
        elif isinstance(value, list):
            left += [(name, inner) for inner in value]
        elif isinstance(value, int) and abs(value) > LARGEST:
            return f"{name} is {_shown(value)}, expected a whole number up to {LARGEST:,}"
        elif isinstance(value, float) and not math.isfinite(value):
            return f"{name} is {value}, expected a number"
    return ""


def _fits(value: object, hint: Any) -> bool:  # noqa: ANN401 - a type hint may be any object
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin in (tuple, list):
        # diffusers writes tuple[int] for tuples of any length
        kinds = [part for part in parts if part is not Ellipsis]
        return isinstance(value, list) and all(any(_fits(item, kind) for kind in kinds) for item in value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if hint in (bool, str, type(None)):
        return isinstance(value, hint)
    return True


def _shown(value: object) -> str:
    """Return a value for a message, cut to a readable length."""
    # Python refuses to convert whole numbers of more than 4300 digits to decimal text.
    text = (
        f"a number of {value.bit_length()} bits"
        if isinstance(value, int) and value.bit_length() > 200
        else repr(value)
    )
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _words(hint: Any) -> str:  # noqa: ANN401 - a type hint may be any object
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(part) for part in parts))
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin in (tuple, list):
        return f"a list of {' or '.join(dict.fromkeys(_words(part) for part in parts if part is not Ellipsis))}"
    return {int: f"a whole number from 0 to {LARGEST:,}", float: "a number", bool: "true or false",
            str: "a text", type(None): "null"}.get(hint, str(hint))  # fmt: skip
