"""Which linear layers get adapters, and the size of these; imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from videox.errors import UserError


def choose_targets(
    shapes: Mapping[str, Sequence[int]], defaults: Mapping[str, Sequence[str]], patterns: Sequence[str] | None
) -> tuple[str, ...]:
    """Return the names of the linear layers to adapt.

    A pattern is one or more complete components of a name: "attn1" selects every linear layer below it, "to_q" each
    layer of this name, "attn1.to_q" those that are inside an attn1.

    Args:
        shapes: shapes of the model's weights, by name.
        defaults: the family's patterns, by the name of a list of blocks. They are matched only inside that list:
            layers outside the blocks, such as the refiner of the prompt, have similar names.
        patterns: patterns that are matched in the whole model; None uses the family's defaults.

    Raises:
        UserError: a pattern matches no linear layer.
    """
    linear = [name for name in map(_linear, sorted(shapes)) if name and len(shapes[f"{name}.weight"]) == 2]
    if patterns is not None:
        matches = {pattern: [name for name in linear if _matches(name, pattern)] for pattern in patterns}
    else:
        matches = {
            f"{blocks}.*.{pattern}": [
                name for name in linear if name.startswith(f"{blocks}.") and _matches(name, pattern)
            ]
            for blocks, block_patterns in defaults.items()
            for pattern in block_patterns
        }
    for pattern, names in matches.items():
        if not names:
            parts = sorted({part for name in linear for part in name.split(".") if not part.isdigit()})
            similar = difflib.get_close_matches(pattern, parts, 3, 0.4) or parts[:3]
            hint = f"try {', '.join(similar)}"
            raise UserError("--lora_target_modules", f"{pattern!r} matches no linear layer", hint)
    return tuple(sorted({name for names in matches.values() for name in names}))


def adapter_sizes(
    shapes: Mapping[str, Sequence[int]], targets: Sequence[str], rank: int, *, dora: bool = False
) -> dict[str, int]:
    """Return the number of parameters in the two matrices of each target, and in the magnitudes of a DoRA.

    Args:
        shapes: shapes of the model's weights, by name.
        targets: names of the adapted layers.
        rank: the adapters' rank.
        dora: each target has magnitudes.
    """
    of_targets = {target: shapes[f"{target}.weight"] for target in targets}
    return {target: rank * sum(shape) + dora * shape[0] for target, shape in of_targets.items()}


def _linear(name: str) -> str:
    """Return the name of the layer that a weight may belong to, "" for other tensors."""
    layer, _, kind = name.rpartition(".")
    return layer if kind == "weight" else ""


def _matches(name: str, pattern: str) -> bool:
    return f".{pattern}." in f".{name}."
