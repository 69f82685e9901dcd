"""Serves both train.py scripts: the transformer as its backend is to train it, from whatever layout it is in."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator

from videox.creation import skeleton
from videox.distributed import resolved
from videox.model_parts import Part, load_whole


def load_transformer(model_class: Any, part: Part, accelerator: Accelerator) -> Any:  # noqa: ANN401 - of diffusers
    """Returns the transformer in float32; under ZeRO-3 and FSDP2 nothing of it is ever whole in a process.

    ZeRO-3's is divided already; FSDP2's has no memory until its engine gives each process that of its own shards.

    Raises:
        Refusal: its weights are not those of its configuration, or (FSDP2: when its engine reads them) not finite.
    """
    backend = resolved(accelerator)
    if backend == "fsdp2":
        return skeleton(model_class, part.source(), part.own_config())
    if backend == "zero3":
        from videox.zero_creation import create, keeps_more  # DeepSpeed is installed on Linux only

        if not keeps_more(accelerator):
            return create(model_class, part.source(), part.own_config(), accelerator)
    return load_whole(model_class, part)
