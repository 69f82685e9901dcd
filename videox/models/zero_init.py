"""Serves ZeRO-3: the transformer is made inside DeepSpeed's context, and each process reads its own slices of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import deepspeed
import torch
from accelerate import Accelerator
from deepspeed.utils import safe_set_local_fp32_param
from diffusers.models.modeling_utils import no_init_weights
from torch import Tensor, nn

from videox.models.meta_init import fill, skeleton
from videox.weights.safetensors_io import TensorSource

# With these DeepSpeed keeps more of a weight than one slice in memory, and whoever writes that slice alone would leave
# the rest behind: such a model is loaded whole, and divided by DeepSpeed afterwards.
KEEPS_MORE = {
    "zero_hpz_partition_size": (None, 1),
    "zero_quantized_weights": (None, False),
    "zero_quantized_nontrainable_weights": (None, False),
}


def create(
    model_class: Any,  # noqa: ANN401 - of diffusers
    stored: TensorSource,
    config: Mapping[str, Any] | None,
    accelerator: Accelerator,
) -> nn.Module:
    """Returns a model whose parameters were never whole on a process for longer than their own division took.

    Args:
        model_class: of diffusers.
        stored: the model's weights.
        config: of the model; None for the one in the weights' folder.
        accelerator: of the run, with ZeRO-3 resolved.

    Raises:
        UserError: as load_strictly, and for values that are not finite.
    """
    plain = skeleton(model_class, stored, config)
    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    with (
        no_init_weights(),
        deepspeed.zero.Init(config_dict_or_path=_for_creation(settings, accelerator.mixed_precision)),
    ):
        model = model_class.from_config(plain.config)
    for name, module in plain.named_modules():
        for kind, buffer in module.named_buffers(recurse=False):
            setattr(model.get_submodule(name), kind, buffer.to(accelerator.device))
    model.register_to_config(_name_or_path=str(stored.folder))
    fill(_shards(model, stored), stored.folder)
    return model.eval()


def set_masters(parameters: Mapping[str, nn.Parameter], stored: Mapping[str, Tensor]) -> None:
    """Sets DeepSpeed's float32 masters to the stored values: it took them from weights rounded to bfloat16.

    Args:
        parameters: of the model by name, in the engine; only those that train have masters.
        stored: the values by the same names.
    """
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            own = _slice(parameter, stored[name])
            master = torch.zeros(parameter.ds_tensor.numel(), dtype=torch.float32)  # type: ignore[attr-defined]
            master[: own.numel()] = own
            safe_set_local_fp32_param(parameter, master)


def _shards(model: nn.Module, stored: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yields (name, this process's shard, its slice of the stored tensor); the padding behind the shard is zeroed."""
    for name, parameter in model.named_parameters():
        own = _slice(parameter, stored[name])
        parameter.ds_tensor[own.numel() :] = 0  # type: ignore[attr-defined]
        yield name, parameter.ds_tensor[: own.numel()], own  # type: ignore[attr-defined]


def _slice(parameter: Any, whole: Tensor) -> Tensor:  # noqa: ANN401 - DeepSpeed's attributes
    """Returns what this process keeps of a tensor: equal slices of it, flattened, the last one padded."""
    size = parameter.ds_tensor.numel()
    begin = parameter.ds_zero_partition_rank * size
    return whole.reshape(-1)[begin : begin + size]


def keeps_more(accelerator: Accelerator) -> bool:
    """Returns whether DeepSpeed is to keep more of a weight in memory than one slice, so that create cannot serve."""
    zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    offload = zero.get("offload_param") or {}
    return offload.get("device") == "nvme" or any(zero.get(key) not in usual for key, usual in KEEPS_MORE.items())


def _for_creation(config: Mapping[str, Any], mixed_precision: str) -> dict[str, Any]:
    """Returns a DeepSpeed configuration with nothing to be filled in later: creation knows no batch."""
    settled = _without_auto(config)
    settled |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    settled["bf16"] = {**settled.get("bf16", {}), "enabled": mixed_precision == "bf16"}
    settled.pop("train_batch_size", None)
    return settled


def _without_auto(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_auto(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if value != "auto"
    }
