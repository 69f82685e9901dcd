"""The computed step of the published models, for tests."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from videox.estimate.flops import cross_attention_network, joint_attention_network
from videox.estimate.gpus import GPUS
from videox.estimate.memory import MemorySetup, Parameters
from videox.estimate.rates import rates_of
from videox.estimate.step_time import StepModel

ROOT = Path(__file__).resolve().parents[2]
COUNTS = json.loads((ROOT / "tests/data/estimate/tables.json").read_text(encoding="utf-8"))["models"]
PUBLISHED = ("wan2.1-t2v-1.3b", "wan2.1-t2v-14b", "hunyuanvideo-t2v")
SETUP = MemorySetup("single", 1, 1, True, 1.0, False, 0, 100, 1, {})


def step_of(
    name: str, gpu: str = "h100", *, compiled: bool = False, kernel: str = "native", **changes: Any
) -> StepModel:
    """Return the step of a published model, trained as a whole on one GPU, with changed settings."""
    config = json.loads((ROOT / f"config/models/{name}.json").read_text(encoding="utf-8"))["components"]["transformer"]
    joint = "num_single_layers" in config
    network = (
        joint_attention_network(config, text_tokens=256, half=True)
        if joint
        else cross_attention_network(config, text_tokens=512, image_tokens=0, half=True)
    )
    total, block, outside = COUNTS[name]
    setup = replace(SETUP, **changes)
    trainable = 2_400_000 * setup.lora_rank if setup.lora else total
    parameters = Parameters(total, trainable, block, outside)
    return StepModel(
        replace(network, frozen=setup.lora), parameters, setup, rates_of(GPUS[gpu], gpu, backend=kernel), compiled
    )
