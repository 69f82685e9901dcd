"""Serves ZeRO-3 and FSDP2: a transformer divided from its creation, so that no process ever holds the whole of it."""

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

from videox.models.folder import has_not_finite, not_finite, refuse_unmatched, unloadable_refused
from videox.weights.safetensors_io import TensorSource


def skeleton(
    model_class: Any,  # noqa: ANN401 - of diffusers
    stored: TensorSource,
    config: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Returns the model that a folder's config.json describes: parameters on the meta device, buffers with values.

    The buffers that no file holds, such as the tables of rotary embeddings, are computed here in float32, as
    from_pretrained does; inside DeepSpeed's own context they would come out rounded to bfloat16, without a word.

    Args:
        model_class: of diffusers.
        stored: the model's weights; they are checked against the configuration, by their files' headers.
        config: of the model; None for the one in the weights' folder.

    Raises:
        UserError: as load_strictly.
    """
    folder = stored.folder
    with unloadable_refused(model_class, folder), no_init_weights(), init_empty_weights(include_buffers=False):
        model = model_class.from_config(config or model_class.load_config(folder, local_files_only=True))
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    passed_over = model_class._keys_to_ignore_on_load_unexpected or ()
    refuse_unmatched(
        model_class,
        folder,
        missing=sorted(wanted.keys() - stored.keys()),
        unexpected=[name for name in sorted(stored.keys() - wanted.keys()) if not _found(passed_over, name)],
        mismatched=[name for name in wanted if name in stored and stored.shape(name) != wanted[name]],
    )
    for name, buffer in model.named_buffers():
        if name in wanted:
            buffer.copy_(stored[name])
    model.register_to_config(_name_or_path=str(folder))  # as from_pretrained does
    return model.eval()


def _found(patterns: Iterable[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def is_divided(model: nn.Module) -> bool:
    """Returns whether a model's parameters are nowhere whole, so that its shards are yet to be filled."""
    return any(parameter.is_meta or hasattr(parameter, "ds_id") for parameter in model.parameters())


def fill(shards: Iterable[tuple[str, Tensor, Tensor]], folder: Path) -> None:
    """Copies stored values into this process's shards. A collective: what one process finds, all refuse alike.

    Args:
        shards: (name, shard, its slice of the stored tensor), in the same order of names on all processes. A slice of
            a mapped file is read where it is copied, and no further.
        folder: that the slices come from.

    Raises:
        UserError: a value is not finite; the first such tensor is named.
    """
    faults: list[tuple[int, str]] = []
    with torch.no_grad():
        for position, (name, shard, stored) in enumerate(shards):
            shard.copy_(stored)
            if has_not_finite(stored):
                faults.append((position, name))
    found: list[Sequence[tuple[int, str]]] = [faults]
    if dist.is_initialized():
        found = [()] * dist.get_world_size()
        dist.all_gather_object(found, faults)
    if any(found):
        _, name = min(fault for faults in found for fault in faults)
        raise not_finite(name, folder)
