"""Precisions of frozen weights (--base_precision, --text_encoder_precision), and their bytes; imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from videox.errors import UserError

BF16 = "bf16"  # the default: in the dtype of computation
FP8, INT8, NF4 = "fp8", "int8", "nf4"
PRECISIONS = (BF16, FP8, INT8, NF4)
PACKAGES = {FP8: "torchao==0.18.0", INT8: "torchao==0.18.0", NF4: "bitsandbytes==0.50.2"}
QUANTISED_ENCODER = "text_encoder"  # what --text_encoder_precision quantises; a second one (CLIP) is small
NF4_GROUP = 64  # elements that share a scale; 8-bit weights have a scale for each row (output feature)
SCALE = 4  # bytes


def is_quantised(name: str, shape: Sequence[int]) -> bool:
    """Return whether a parameter of a repeated block is a weight of a linear layer that is quantised.

    Modulation, by which norms are scaled and shifted, keeps its precision: its layers are parts of norms in diffusers.

    Args:
        name: of the parameter, in the block or in the model.
        shape: of the parameter.
    """
    *modules, kind = name.split(".")
    return kind == "weight" and len(shape) == 2 and not any(module.startswith("norm") for module in modules)


def quantised_bytes(precision: str, elements: int, rows: int) -> float:
    """Return the bytes of weights of linear layers with their scales.

    Args:
        precision: FP8, INT8 or NF4.
        elements: of the weights.
        rows: of the weights.
    """
    if precision == NF4:
        return elements / 2 + SCALE * elements / NF4_GROUP
    return float(elements + SCALE * rows)


def check_precision_installed(precision: str, flag: str = "--base_precision") -> None:
    """Raise UserError, which names the flag, if the package that quantises to a precision is not installed."""
    package = PACKAGES.get(precision, "")
    if package and find_spec(package.partition("=")[0]) is None:
        what = f"{precision} needs {package.partition('=')[0]}, which is not installed"
        raise UserError(flag, what, f"pip install {package}")
