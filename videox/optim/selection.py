"""Which parameters of a model are trained, by their names; imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from videox.errors import UserError


def select_parameters(
    names: Sequence[str], trainable: Sequence[str], half_lr: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Return the names of the parameters at the full learning rate, and of those at half of it.

    A parameter is selected if its name contains one of the strings; "." selects all, also names without a dot. Names
    that match both lists train at the full learning rate.

    Args:
        names: of all parameters.
        trainable: strings that select parameters at the full learning rate.
        half_lr: strings that select parameters at half the learning rate.

    Raises:
        UserError: a string matches nothing, or no parameter is selected.
    """
    for flag, patterns in (("trainable_modules", trainable), ("trainable_modules_low_learning_rate", half_lr)):
        for pattern in patterns:
            if pattern != "." and not any(pattern in name for name in names):
                parts = sorted({part for name in names for part in name.split(".")})
                similar = difflib.get_close_matches(pattern, parts, 3, 0.4) or parts[:3]
                hint = f"try {', '.join(similar)}, or '.' for all"
                raise UserError(f"--{flag}", f"{pattern!r} matches no parameter", hint)
    full = [name for name in names if matches(name, trainable)]
    half = [name for name in names if matches(name, half_lr) and not matches(name, trainable)]
    if not full and not half:
        raise UserError("--trainable_modules", "no parameter is trainable", "pass '.' to train all")
    return full, half


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Return whether a parameter's name is selected by one of the strings ("." selects all)."""
    return any(pattern == "." or pattern in name for pattern in patterns)
