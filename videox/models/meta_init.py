"""Sharded initialization for ZeRO-3 and FSDP2: builds a transformer that no rank ever holds as a whole."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from diffusers.models.modeling_utils import no_init_weights
from torch import Tensor, nn

from videox.models.folder import check_keys, convert_load_errors, has_nonfinite, nonfinite_error
from videox.weights.safetensors_io import TensorSource


def build_meta_model(
    model_class: Any,  # noqa: ANN401 - of diffusers
    stored: TensorSource,
    config: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Return the model that a folder's config.json describes: parameters on the meta device, buffers with values.

    Buffers that no file contains, such as the tables of rotary embeddings, are computed here in float32, as
    from_pretrained does. Inside DeepSpeed's own context they would silently be rounded to bfloat16.

    Args:
        model_class: a class of diffusers.
        stored: the model's weights; the file headers are checked against the configuration.
        config: the model's configuration; None reads the one in the weights' folder.

    Raises:
        UserError: as load_strictly.
    """
    folder = stored.folder
    with convert_load_errors(model_class, folder), no_init_weights(), init_empty_weights(include_buffers=False):
        model = model_class.from_config(config or model_class.load_config(folder, local_files_only=True))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    ignored = model_class._keys_to_ignore_on_load_unexpected or ()
    check_keys(
        model_class,
        folder,
        missing=sorted(expected.keys() - stored.keys()),
        unexpected=[name for name in sorted(stored.keys() - expected.keys()) if not _matches_any(ignored, name)],
        mismatched=[name for name in expected if name in stored and stored.shape(name) != expected[name]],
    )
    # Only persistent buffers are in the state dict, and therefore in the files; the others were computed above.
    for name, buffer in model.named_buffers():
        if name in expected:
            buffer.copy_(stored[name])
    model.register_to_config(_name_or_path=str(folder))  # as from_pretrained does
    return model.eval()


def _matches_any(patterns: Iterable[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def is_sharded(model: nn.Module) -> bool:
    """Return whether no rank holds the model's parameters as a whole, so that its shards still have to be filled."""
    return any(parameter.is_meta or hasattr(parameter, "ds_id") for parameter in model.parameters())


def fill_shards(shards: Iterable[tuple[str, Tensor, Tensor]], folder: Path) -> None:
    """Copy stored values into this rank's shards. A collective: if one rank finds a bad value, all ranks raise.

    Args:
        shards: (name, shard, its slice of the stored tensor), in the same order of names on all ranks. The slice of a
            memory-mapped file is read only when it is copied.
        folder: the folder that the slices come from.

    Raises:
        UserError: a value is not finite; the first such tensor is named.
    """
    faults: list[tuple[int, str]] = []
    with torch.no_grad():
        for position, (name, shard, stored) in enumerate(shards):
            shard.copy_(stored)
            if has_nonfinite(stored):
                faults.append((position, name))
    # Every rank reads only its own slices. The exchange makes all ranks raise the same error instead of leaving the
    # others waiting in the next collective.
    gathered: list[Sequence[tuple[int, str]]] = [faults]
    if dist.is_initialized():
        gathered = [()] * dist.get_world_size()
        dist.all_gather_object(gathered, faults)
    if any(gathered):
        _, name = min(fault for faults in gathered for fault in faults)
        raise nonfinite_error(name, folder)
