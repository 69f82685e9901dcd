"""Serves both train.py scripts: the transformer as its backend is to train it, from whatever layout it is in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from videox.models.meta_init import is_divided, skeleton
from videox.distributed.accelerator import resolved
from videox.lora.adapters import Lora, add_adapters, store_base
from videox.models.component import Component, load_whole


def load_transformer(
    model_class: Any,  # noqa: ANN401 - of diffusers
    part: Component,
    accelerator: Accelerator,
    *,
    fp32_params: bool = True,
) -> Any:  # noqa: ANN401 - as above
    """Returns the transformer to train; under ZeRO-3 and FSDP2 nothing of it is ever whole in a process.

    ZeRO-3's is divided already; FSDP2's has no memory until its engine gives each process that of its own shards.

    Args:
        model_class: of diffusers.
        part: to load.
        accelerator: of the run.
        masters: in float32; else in the dtype of computation, except under FSDP1.

    Raises:
        UserError: its weights are not those of its configuration, or (FSDP2: when its engine reads them) not finite.
    """
    backend = resolved(accelerator)
    # FSDP1 lays a block's tensors end to end, in one dtype: that of the float32 adapters beside the frozen ones.
    half = not fp32_params and accelerator.mixed_precision == "bf16" and backend != "fsdp1"
    dtype = torch.bfloat16 if half else torch.float32
    if backend == "fsdp2":
        made = skeleton(model_class, part.source(), part.own_config())
        store_base(made, dtype)
        return made
    if backend == "zero3":
        from videox.models.zero_init import create, keeps_more  # DeepSpeed is installed on Linux only

        if not keeps_more(accelerator):
            return create(model_class, part.source(), part.own_config(), accelerator)
    return load_whole(model_class, part, dtype)


def frozen_notes(accelerator: Accelerator) -> list[str]:
    """Returns a line where the backend keeps frozen weights in more memory than another would."""
    if resolved(accelerator) != "fsdp1" or accelerator.mixed_precision != "bf16":
        return []
    return ["FSDP1 keeps the frozen weights in float32; with --fsdp_version 2 they take half of that"]


def attach(transformer: nn.Module, lora: Lora, values: Mapping[str, Tensor], accelerator: Accelerator) -> list[str]:
    """Adds adapters to a transformer of load_transformer, in the form that its backend takes, and freezes the rest.

    Returns:
        The names of the adapters' parameters, which alone are to train.
    """
    device, dtype = torch.device("cpu"), torch.float32
    if any(parameter.is_meta for parameter in transformer.parameters()):
        device = torch.device("meta")
    elif is_divided(transformer):  # DeepSpeed divides what it finds whole, in the one dtype that it computes in
        device = accelerator.device
        dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    add_adapters(transformer, lora, values, device=device, dtype=dtype)
    return list(values)
