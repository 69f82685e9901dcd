"""Serves both train.py scripts: the transformer as its backend is to train it, from a folder of diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator

from videox.creation import skeleton
from videox.distributed import resolved
from videox.model_folder import load_whole


def load_transformer(model_class: Any, folder: Path, accelerator: Accelerator) -> Any:  # noqa: ANN401 - of diffusers
    """Returns the transformer in float32; under ZeRO-3 and FSDP2 nothing of it is ever whole in a process.

    ZeRO-3's is divided already; FSDP2's has no memory until its engine gives each process that of its own shards.

    Raises:
        Refusal: its weights are not those of its configuration, or (FSDP2: when its engine reads them) not finite.
    """
    backend = resolved(accelerator)
    if backend == "fsdp2":
        return skeleton(model_class, folder)
    if backend == "zero3":
        from videox.zero_creation import create  # DeepSpeed is installed on Linux only

        return create(model_class, folder, accelerator)
    return load_whole(model_class, folder)
