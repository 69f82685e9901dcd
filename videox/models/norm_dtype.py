"""Keeps the norms of queries and keys in the compute dtype on a GPU, where autocast would return float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Names of the norms in diffusers' attention modules: of queries and keys, and of those of text or image tokens.
NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


def keep_norm_dtype(model: nn.Module, device: torch.device) -> int:
    """Make the norms of queries and keys return the dtype of their input; return how many norms there are.

    CUDA's autocast computes rms_norm in float32 and returns float32, and diffusers' own RMSNorm returns float32 under
    float32 weights. Queries and keys would then be rotated in float32, and reach attention in another dtype than the
    values: torch's attention casts them back at the cost of several passes over memory, and every other attention
    backend refuses them. The norm itself is computed as before; only its result is rounded to the compute dtype, as in
    a model whose weights are bfloat16.

    Does nothing on a CPU, whose autocast keeps the dtype of Wan's norms: a run there has the numbers it always had.
    That the attention kernels get bfloat16 can be tested by dtypes alone; the gain in time needs a GPU.

    Args:
        model: a transformer of diffusers.
        device: that the model trains on.
    """
    if device.type != "cuda":
        return 0
    norms = [module for name, module in model.named_modules() if name.rpartition(".")[2] in NORMS]
    for norm in norms:
        norm.register_forward_hook(_to_input_dtype)
    return len(norms)


def _to_input_dtype(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    del module
    return output.to(inputs[0].dtype)
