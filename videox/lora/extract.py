"""Extracts a LoRA from two models: the best low-rank approximation of the difference of their linear layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from videox.errors import MODEL, NUMERICS, UserError
from videox.weights.reader import LayoutTensors
from videox.weights.safetensors_io import join_first

OVERSAMPLING, ITERATIONS = 16, 6  # of the randomized SVD: further columns, and power iterations
FULL_SVD_BELOW = 8  # matrices whose smaller side is below this many ranks get a full SVD, which is fast enough there


@dataclass
class Extraction:
    """A LoRA that approximates the difference of two models.

    Attributes:
        adapters: A [rank, inputs] and B [outputs, rank] by diffusers' names; the difference is about B A.
        errors: ||D - B A|| / ||D|| of each adapted layer (Frobenius norm of its difference D), by name.
        error: the same of all linear layers together.
        left_out: tensors that differ and are no weights of linear layers: norms, biases, convolutions.
        left_out_share: their part of the squared norm of the whole difference, 0 to 1.
    """

    adapters: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    error: float = 0.0
    left_out: list[str] = field(default_factory=list)
    left_out_share: float = 0.0


def extract_lora(
    tuned: LayoutTensors,
    base: LayoutTensors,
    rank: int,
    dtype: torch.dtype = torch.float32,
    on_layer: Callable[[], object] = lambda: None,
) -> Extraction:
    """Return the LoRA of a rank that is nearest to the difference of two models; one layer is in memory at a time.

    Layers that do not differ get no adapter. All adapters have the same rank: a layer with fewer rows or columns gets
    zeros.

    Args:
        tuned: the transformer after training, in any layout.
        base: the same before training, in any layout.
        rank: of the adapters.
        dtype: of the adapters; the errors include its rounding.
        on_layer: called after each tensor.

    Raises:
        UserError: (MODEL) the models have different tensors, or do not differ in a linear layer; (NUMERICS) a value is
            not finite.
    """
    check_same_model(tuned, base)
    found = Extraction()
    squares = {"difference": 0.0, "rest": 0.0, "left out": 0.0}
    for name in sorted(tuned):
        difference = tuned[name].float() - base[name].float()
        size = float(difference.double().square().sum())
        if not math.isfinite(size):
            raise UserError(str(tuned.path), f"{name} is not finite", "use another checkpoint", NUMERICS)
        layer = name.removesuffix(".weight")
        if size and difference.ndim == 2 and layer != name:
            a, b = (half.to(dtype) for half in low_rank(difference, rank))
            rest = float((difference - b.float() @ a.float()).double().square().sum())
            found.adapters |= {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
            found.errors[layer] = math.sqrt(rest / size)
            squares["difference"] += size
            squares["rest"] += rest
        elif size:
            found.left_out.append(name)
            squares["left out"] += size
        on_layer()
    if not found.adapters:
        what = f"has no linear layer that differs from {base.path}"
        raise UserError(str(tuned.path), what, "pass the weights after training, and the base model", MODEL)
    found.error = math.sqrt(squares["rest"] / squares["difference"])
    found.left_out_share = squares["left out"] / (squares["left out"] + squares["difference"])
    return found


def check_same_model(tuned: LayoutTensors, base: LayoutTensors) -> None:
    """Raise UserError (MODEL) if two models have different tensors or shapes."""
    ours, theirs = tuned.shapes(), base.shapes()
    faults = [f"{name} is in one of them only" for name in sorted(ours.keys() ^ theirs.keys())]
    differing = [name for name in sorted(ours.keys() & theirs.keys()) if ours[name] != theirs[name]]
    faults += [f"{name} is {list(theirs[name])}, {list(ours[name])} after training" for name in differing]
    if faults:
        what = f"is not the base of {tuned.path}: {join_first(faults)}"
        raise UserError(str(base.path), what, "pass the model that the training began with", MODEL)


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A [rank, inputs] and B [outputs, rank] such that B A is the nearest matrix of this rank.

    By the singular value decomposition (Eckart and Young 1936), randomized for large matrices (Halko, Martinsson and
    Tropp, "Finding structure with randomness", 2011) with a fixed seed. The singular values are shared evenly: B has
    U sqrt(S), A has sqrt(S) V'.

    Args:
        matrix: float32 [outputs, inputs].
        rank: at least 1; above the smaller side of the matrix the further rows of A and columns of B are 0.
    """
    outputs, inputs = matrix.shape
    smaller = min(outputs, inputs)
    if smaller < max(FULL_SVD_BELOW * rank, rank + OVERSAMPLING):
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        v = v.T
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, q=rank + OVERSAMPLING, niter=ITERATIONS)
    kept = min(rank, smaller)
    root = s[:kept].clamp(min=0).sqrt()
    a, b = matrix.new_zeros(rank, inputs), matrix.new_zeros(outputs, rank)
    a[:kept], b[:, :kept] = root[:, None] * v[:, :kept].T, u[:, :kept] * root
    return a, b
