"""Tests of every number that the estimates compute, and of where the numbers come from.

tests/data/estimate/tables.json notices a change of any number (benchmarks/estimates.py writes it), but it is computed
by the code that it guards. What the numbers are compared with:

- FLOPs: torch's FlopCounterMode on the real classes (test_flops.py), and counts published for the large models there.
- Activations: the tensors that autograd saves, and the peak of a traced pass (test_flops.py).
- States: the bytes that the engines allocate (test_memory.py), and the arithmetic below.
- Parameters of the published models: the arithmetic below, from the widths of the layers.
- Cards: cores, clocks and memory buses of the vendors' data sheets (test_gpus.py).
- Encoders, adapters and smaller samples: modules that are built, and runs with these flags (test_run_memory.py).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from videox.estimate import advice, duration, flops, memory
from videox.estimate.memory import Memory, Parameters, checkpoint_size, state_bytes

ROOT = Path(__file__).resolve().parents[2]
TABLE_NAMES = ("models", "networks", "memory", "changes", "proposals", "durations", "steps", "gpus")


@pytest.fixture(scope="module")
def estimates() -> ModuleType:
    name = "estimates_of_benchmarks"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / "estimates.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="module")
def stored(estimates: ModuleType) -> dict[str, Any]:
    return estimates.stored()


@pytest.fixture(scope="module")
def computed(estimates: ModuleType, stored: dict[str, Any]) -> dict[str, Any]:
    return estimates.as_stored(estimates.tables(stored["models"]))


@pytest.mark.parametrize("table", TABLE_NAMES)
def test_no_number_has_changed(table: str, stored: dict[str, Any], computed: dict[str, Any]) -> None:
    """If a change is meant: python benchmarks/estimates.py --write, and look at the differences."""
    assert set(stored) == set(computed) == set(TABLE_NAMES)
    assert set(stored[table]) == set(computed[table])
    for name, row in computed[table].items():
        assert row == stored[table][name], f"{table}: {name}"


def wan_parameters(config: dict[str, Any]) -> tuple[int, int]:
    """Return (of a block, outside) the parameters of a Wan2.1 transformer without an image embedder, by its widths."""
    d, f, text = config["num_attention_heads"] * config["attention_head_dim"], config["ffn_dim"], config["text_dim"]
    latent = 4 * config["in_channels"]  # a token is 2 x 2 pixels
    attention = 4 * (d * d + d) + 2 * d  # q, k, v, output, and the norms of q and k
    block = 2 * attention + (d * f + f) + (f * d + d) + 2 * d + 6 * d  # the norm before the text, and the modulation
    times = (256 * d + d) + (d * d + d) + (d * 6 * d + 6 * d)
    texts = (text * d + d) + (d * d + d)
    return block, (latent * d + d) + times + texts + (d * latent + latent) + 2 * d


@pytest.mark.parametrize("name", ["wan2.1-t2v-1.3b", "wan2.1-t2v-14b"])
def test_parameters_follow_from_the_widths_of_the_layers(
    name: str, estimates: ModuleType, stored: dict[str, Any]
) -> None:
    config = estimates.configs()[name]
    block, outside = wan_parameters(config)
    assert stored["models"][name] == [config["num_layers"] * block + outside, block, outside]


# bytes per parameter of weights, fp32 parameters, gradients and moments, by hand
BILLION = Parameters(10**9, 10**9, 5 * 10**7, 10**8)
STATES = {
    # AdamW under autocast: float32 weight, gradient and two moments
    "all defaults": (4, 0, 4, 8),
    # bfloat16 weight and gradient, two float32 moments
    "bf16 optimizer": (2, 0, 2, 8),
    # float32 weight and gradient, two moments of one byte
    "8-bit moments": (4, 0, 4, 2),
    "both": (2, 0, 2, 2),
    "moments in host memory": (4, 0, 4, 0),
    "ddp": (4, 0, 4, 8),
    # DeepSpeed: a bfloat16 weight, and a shard of the float32 parameter, gradient and two moments, on 8 GPUs
    "published, zero2": (2, 4 / 8, 4 / 8, 8 / 8),
    "published, zero3": (2 / 8, 4 / 8, 4 / 8, 8 / 8),
    "published, fsdp1": (4 / 8, 0, 4 / 8, 8 / 8),
    "fsdp2": (4 / 16, 0, 4 / 16, 8 / 16),
    "zero2, optimizer offloaded": (2, 0, 0, 0),
    "zero3, all offloaded": (0, 0, 0, 0),
}


@pytest.mark.parametrize("name", STATES)
def test_states_follow_from_the_bytes_per_parameter(name: str, estimates: ModuleType) -> None:
    weights, masters, gradients, optimizer = (size * 1e9 for size in STATES[name])
    expected = {"weights": weights, "masters": masters, "gradients": gradients, "optimizer": optimizer}
    assert state_bytes(BILLION, estimates.setup_of(name)) == expected


def test_a_lora_stores_the_frozen_weights_once(estimates: ModuleType) -> None:
    """A billion frozen weights in bfloat16; ten million adapter weights as AdamW trains them, 16 bytes each."""
    setup, parameters = estimates.setup_of("lora, 24 GB"), Parameters(1_010_000_000, 10**7, 5 * 10**7, 10**8)
    states = state_bytes(parameters, setup)
    assert sum(states.values()) == 2e9 + 16e7 and states["weights"] == 2e9 + 4e7
    # under ZeRO-3 on 4 GPUs: all weights in bfloat16, and 16 bytes per adapter weight, in shards
    assert sum(state_bytes(parameters, estimates.setup_of("lora under zero3")).values()) == (2 * 1.01e9 + 16e7) / 4
    # FSDP1 has frozen weights in float32, and a gradient of each weight of the flattened blocks
    sharded = state_bytes(parameters, estimates.setup_of("lora under fsdp1"))
    assert sharded["gradients"] == 4 * (1.01e9 - 1e8) / 4 and sharded["weights"] == 4 * 1.01e9 / 4
    # the adapters alone are saved, with two moments
    assert checkpoint_size(parameters, setup) == 12e7


def test_the_total_is_states_and_the_largest_phase() -> None:
    """5 % of fragments and 1.5 GB of context, on top of 10 + 4 GB."""
    found = Memory({"weights": 10e9}, {"training": {"activations": 3e9, "communication": 1e9}, "step": {"x": 2e9}}, {})
    assert found.total() == pytest.approx(14e9 * 1.05 + 1.5e9)
    assert found.at_peak() == pytest.approx(
        {"weights": 10e9, "activations": 3e9, "communication": 1e9, "context": 1.5e9, "fragments": 0.7e9}
    )


def test_records_cannot_be_changed() -> None:
    for module in (flops, memory, duration, advice):
        for kind in vars(module).values():
            if dataclasses.is_dataclass(kind) and isinstance(kind, type) and kind.__module__ == module.__name__:
                record = object.__new__(kind)
                with pytest.raises(dataclasses.FrozenInstanceError):
                    setattr(record, dataclasses.fields(kind)[0].name, 1)


def test_the_tables_are_written_as_they_are_read(
    estimates: ModuleType, stored: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimates, "TABLES", tmp_path / "tables.json")
    estimates.write(stored)
    assert estimates.stored() == stored
    assert json.loads((ROOT / "tests/data/estimate/tables.json").read_text(encoding="utf-8")) == stored
