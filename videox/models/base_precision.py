"""Precisions of the frozen weights under a LoRA (--base_precision), and the bytes that they take; imports no torch."""

from __future__ import annotations

BF16 = "bf16"  # the default: as computed in
FP8, INT8, NF4 = "fp8", "int8", "nf4"
PRECISIONS = (BF16, FP8, INT8, NF4)
NF4_GROUP = 64  # elements that share a scale; 8-bit weights have a scale for each row (output feature)
SCALE = 4  # bytes


def quantised_bytes(precision: str, elements: int, rows: int) -> float:
    """Return the bytes of weights of linear layers.

    Args:
        precision: FP8, INT8 or NF4.
        elements: of the weights.
        rows: of the weights.
    """
    if precision == NF4:
        return elements / 2 + SCALE * elements / NF4_GROUP
    return float(elements + SCALE * rows)
