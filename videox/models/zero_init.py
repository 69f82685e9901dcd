"""ZeRO-3 initialization: builds the transformer inside deepspeed.zero.Init and fills each rank's own slices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import deepspeed
import torch
from accelerate import Accelerator
from deepspeed.utils import safe_set_local_fp32_param
from diffusers.models.modeling_utils import no_init_weights
from torch import Tensor, nn

from videox.models.meta_init import build_meta_model, fill_shards
from videox.weights.safetensors_io import TensorSource

# With these settings DeepSpeed stores more of a weight than one rank's slice (a secondary partition, quantization
# scales). Filling the slice alone would leave the rest stale, so such a model is loaded as a whole and then sharded
# by DeepSpeed. Each setting is listed with the values that do not have this effect.
EXTRA_COPY_SETTINGS = {
    "zero_hpz_partition_size": (None, 1),
    "zero_quantized_weights": (None, False),
    "zero_quantized_nontrainable_weights": (None, False),
}


def build_sharded(
    model_class: Any,  # noqa: ANN401 - of diffusers
    stored: TensorSource,
    config: Mapping[str, Any] | None,
    accelerator: Accelerator,
) -> nn.Module:
    """Return a model whose parameters a rank holds as a whole only while it shards each of them.

    Args:
        model_class: a class of diffusers.
        stored: the model's weights.
        config: the model's configuration; None reads the one in the weights' folder.
        accelerator: the run's accelerator, with ZeRO-3 resolved.

    Raises:
        UserError: as load_strictly, and for values that are not finite.
    """
    # deepspeed.zero.Init casts everything that is created inside it to its compute dtype. The buffers are therefore
    # taken from a model that was built outside of it.
    plain = build_meta_model(model_class, stored, config)
    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    with (
        no_init_weights(),
        deepspeed.zero.Init(config_dict_or_path=_init_config(settings, accelerator.mixed_precision)),
    ):
        model = model_class.from_config(plain.config)
    for name, module in plain.named_modules():
        for kind, buffer in module.named_buffers(recurse=False):
            setattr(model.get_submodule(name), kind, buffer.to(accelerator.device))
    model.register_to_config(_name_or_path=str(stored.folder))
    fill_shards(_local_shards(model, stored), stored.folder)
    return model.eval()


def set_fp32_params(parameters: Mapping[str, nn.Parameter], stored: Mapping[str, Tensor]) -> None:
    """Set DeepSpeed's float32 parameters to the stored values: DeepSpeed itself copies them from bfloat16 weights.

    Args:
        parameters: the engine's parameters by name; only trainable ones have a float32 copy.
        stored: the values by the same names.
    """
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            values = _local_slice(parameter, stored[name])
            fp32_param = torch.zeros(parameter.ds_tensor.numel(), dtype=torch.float32)  # type: ignore[attr-defined]
            fp32_param[: values.numel()] = values  # the rest is the padding of the last rank's slice
            safe_set_local_fp32_param(parameter, fp32_param)


def _local_shards(model: nn.Module, stored: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (name, this rank's shard, its slice of the stored tensor); the padding behind the shard is zeroed."""
    for name, parameter in model.named_parameters():
        values = _local_slice(parameter, stored[name])
        # torch.empty allocated the partition: uninitialized padding could hold NaN and enter the gradient norm.
        parameter.ds_tensor[values.numel() :] = 0  # type: ignore[attr-defined]
        yield name, parameter.ds_tensor[: values.numel()], values  # type: ignore[attr-defined]


def _local_slice(parameter: Any, tensor: Tensor) -> Tensor:  # noqa: ANN401 - DeepSpeed's attributes
    """Return this rank's slice of a flattened tensor: ZeRO-3 cuts it into equal slices and pads the last one."""
    size = parameter.ds_tensor.numel()
    begin = parameter.ds_zero_partition_rank * size
    return tensor.reshape(-1)[begin : begin + size]


def stores_extra_copies(accelerator: Accelerator) -> bool:
    """Return whether DeepSpeed's settings make it store more than one slice of a weight; see EXTRA_COPY_SETTINGS."""
    zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    offload = zero.get("offload_param") or {}
    return offload.get("device") == "nvme" or any(
        zero.get(key) not in harmless for key, harmless in EXTRA_COPY_SETTINGS.items()
    )


def _init_config(config: Mapping[str, Any], mixed_precision: str) -> dict[str, Any]:
    """Return a DeepSpeed configuration without "auto" values.

    accelerate fills these in when it prepares the model, which is later; at initialization no batch size is known.
    """
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
