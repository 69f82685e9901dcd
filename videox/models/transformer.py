"""Loads the transformer to train in the form that its backend needs, and adds LoRA adapters to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from videox.distributed.backends import backend_name
from videox.lora.adapters import Lora, add_adapters, cast_base
from videox.lora.dora import compute_norms_in_float32
from videox.models.component import load_checked
from videox.models.configured import Component
from videox.models.meta_init import build_meta_model, is_sharded


def load_transformer(
    model_class: Any,  # noqa: ANN401 - of diffusers
    component: Component,
    accelerator: Accelerator,
    *,
    fp32_params: bool = True,
) -> Any:  # noqa: ANN401 - as above
    """Return the transformer to train; under ZeRO-3 and FSDP2 no rank ever holds all of its weights.

    Under ZeRO-3 it is already sharded. Under FSDP2 its parameters are on the meta device until the engine allocates
    each rank's own shards.

    Args:
        model_class: a class of diffusers.
        component: the transformer's files.
        accelerator: the run's accelerator.
        fp32_params: True loads float32 weights, which the optimizer steps; False loads the dtype of computation,
            except under FSDP1.

    Raises:
        UserError: the weights do not match the configuration, or are not finite (FSDP2: raised when the engine reads
            them).
    """
    backend = backend_name(accelerator)
    # FSDP1 flattens a block's tensors into one tensor of one dtype. The adapters in it are float32, so the frozen
    # weights have to be float32, too.
    half = not fp32_params and accelerator.mixed_precision == "bf16" and backend != "fsdp1"
    dtype = torch.bfloat16 if half else torch.float32
    if backend == "fsdp2":
        model = build_meta_model(model_class, component.source(), component.inferred_config())
        cast_base(model, dtype)
        return model
    if backend == "zero3":
        from videox.models.zero_init import build_sharded, stores_extra_copies  # DeepSpeed is installed on Linux only

        if not stores_extra_copies(accelerator):
            return build_sharded(model_class, component.source(), component.inferred_config(), accelerator)
    return load_checked(model_class, component, dtype)


def frozen_notes(accelerator: Accelerator) -> list[str]:
    """Return a note for the user where the backend stores frozen weights in more memory than another backend would."""
    if backend_name(accelerator) != "fsdp1" or accelerator.mixed_precision != "bf16":
        return []
    return ["FSDP1 stores the frozen weights in float32; --fsdp_version 2 stores them in bfloat16, half the memory"]


def attach_adapters(
    transformer: nn.Module, lora: Lora, values: Mapping[str, Tensor], accelerator: Accelerator
) -> list[str]:
    """Add adapters to a transformer of load_transformer, as its backend needs them, and freeze all other weights.

    Returns:
        The names of the adapters' parameters, the only trainable ones.
    """
    device, dtype = torch.device("cpu"), torch.float32
    if any(parameter.is_meta for parameter in transformer.parameters()):
        device = torch.device("meta")
    elif is_sharded(transformer):
        # deepspeed.initialize shards parameters that are not sharded yet, which need its compute dtype and device.
        device = accelerator.device
        dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    add_adapters(transformer, lora, values, device=device, dtype=dtype)
    compute_norms_in_float32(transformer)
    return list(values)
