"""Serves whoever comes back with more or fewer devices: a run that changes its number of processes stays the same run.

Every backend goes on at another number of processes with the same rows, noise, timesteps and learning rates, and with
the losses of a run that was never stopped; at the same number, to the last bit.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import forkserver
import numpy as np
import pytest
import runs
import test_backends
import tiny
import torch

from videox.checkpoint import verify
from videox.errors import FLAGS, MODEL, STORAGE
from videox.state import read_state
from videox.zero_universal import bytes_needed

STEPS = 6
BACKENDS = ("ddp", "zero2", "zero3", "fsdp1", "fsdp2")
DIVIDED = BACKENDS[1:]
PRECISIONS = ("no", "bf16")
TOLERANCE = {"no": 1e-6, "bf16": 1e-3}  # of a loss
SLOTS = 4
# Two learning rates and frozen parts at once, as DeepSpeed keeps each group by itself.
PARTS = {"trainable_modules": ["attn1"], "trainable_modules_low_learning_rate": ["ffn"]}


@dataclass(frozen=True)
class Ground:
    """A model and a data set for runs of a step's four micro-batches, whatever the number of processes."""

    folder: Path
    model: Path
    metadata: Path

    @cached_property
    def unbroken(self) -> dict[tuple[str, str, int], Path]:
        return {}

    def flags(self, output_dir: Path, precision: str, world_size: int, **changes: object) -> list[str]:
        asked = {
            "mixed_precision": precision, "max_train_steps": STEPS, "num_train_epochs": None, "lr_warmup_steps": 4,
            "gradient_accumulation_steps": max(SLOTS // world_size, 1), "dump_steps": list(range(1, STEPS + 1)),
            # Adam with a tiny epsilon makes whole steps of gradients that are nothing but the last bit of a sum
            "adam_epsilon": "1e-6", **PARTS,
        }  # fmt: skip
        return runs.wan_plain(self.model, self.metadata, output_dir, **{**asked, **changes})

    def variables(self, backend: str, precision: str, world_size: int) -> dict[str, str]:
        found = test_backends.variables(backend, "wan2.1 normal", world_size)
        if backend.startswith("zero") and precision == "no":
            settings = json.loads((tiny.ROOT / found["ACCELERATE_DEEPSPEED_CONFIG_FILE"]).read_bytes())
            del settings["bf16"], settings["data_types"]
            file = self.folder / f"{backend}-float32.json"
            file.write_text(json.dumps(settings))
            found |= {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file), "ACCELERATE_MIXED_PRECISION": "no"}
        return found

    def start(
        self, backend: str, precision: str, world_size: int, output_dir: Path, **changes: object
    ) -> list[forkserver.Trainer]:
        return forkserver.shared().start_ranks(
            world_size,
            self.flags(output_dir, precision, world_size, **changes),
            output_dir.with_name(f"{output_dir.name}-{time.monotonic_ns()}.log"),
            environment=self.variables(backend, precision, world_size),
        )

    def train(self, backend: str, precision: str, world_size: int, output_dir: Path, **changes: object) -> str:
        """Trains to the end and returns what the first process said."""
        ranks = self.start(backend, precision, world_size, output_dir, **changes)
        codes = [rank.wait() for rank in ranks]
        assert codes == [0] * world_size, "\n".join(rank.said()[-3000:] for rank in ranks)
        return ranks[0].said()

    def whole(self, backend: str, precision: str, world_size: int) -> Path:
        """Returns a run that was never stopped, saved at every second step."""
        key = (backend, precision, world_size)
        if key not in self.unbroken:
            folder = self.folder / "-".join(map(str, key))
            self.train(backend, precision, world_size, folder, checkpointing_steps=2)
            self.unbroken[key] = folder
        return self.unbroken[key]


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    folder = tmp_path_factory.mktemp("ground")
    return Ground(folder, tiny.build_wan_t2v(folder / "model"), tiny.make_dataset(folder / "data", copies=8))


def drawn(output_dir: Path) -> dict[tuple[int, int], dict[str, torch.Tensor]]:
    """Returns what each sample was given, by (step, row): latents, noise, sigma, timestep, weight."""
    found: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
    for path in sorted((output_dir / "dump").glob("step-*/*.safetensors")):
        dump = runs.read_dump(path)
        for number, row in enumerate(dump.rows):
            key = (int(path.parent.name.removeprefix("step-")), row)
            assert key not in found
            found[key] = {name: dump[name][number] for name in ("latents", "noise", "sigma", "timestep", "weight")}
    return found


def assert_same_run(output_dir: Path, whole: Path, precision: str, steps: int = STEPS) -> None:
    """Checks that two runs were given the same to the bit, and learned the same within the precision."""
    found, wanted = forkserver.steps(output_dir), forkserver.steps(whole)
    assert [line["step"] for line in found] == list(range(1, steps + 1))
    for name in ("step", "rows", "buckets", "lr", "tokens"):
        assert [line[name] for line in found] == [line[name] for line in wanted[:steps]], name
    losses = [[line["loss"] for line in lines[:steps]] for lines in (found, wanted)]
    np.testing.assert_allclose(*losses, rtol=0, atol=TOLERANCE[precision])
    norms = [[line["grad_norm"] for line in lines[:steps]] for lines in (found, wanted)]
    np.testing.assert_allclose(*norms, rtol=10 * TOLERANCE[precision])
    given, expected = drawn(output_dir), {key: value for key, value in drawn(whole).items() if key[0] <= steps}
    assert given.keys() == expected.keys()
    for key, tensors in expected.items():
        for name, tensor in tensors.items():
            assert torch.equal(given[key][name], tensor), (key, name)


def chain(ground: Ground, backend: str, precision: str, folder: Path, worlds: Mapping[int, int] | list) -> Path:
    """Trains to each step at its number of processes, in the middle of an epoch."""
    for world_size, last in worlds:
        resume = "latest" if (folder / "metrics.jsonl").exists() else None
        ground.train(backend, precision, world_size, folder, max_train_steps=last, resume_from_checkpoint=resume)
        state = read_state(folder / f"checkpoint-{last}")
        assert (state.epoch, state.epoch_step, state.slots) == (0, last, SLOTS)
    return folder


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_two_go_on_as_one_and_as_four(ground: Ground, tmp_path: Path, backend: str, precision: str) -> None:
    whole = ground.whole(backend, precision, 2)
    for world_size in (1, 4):
        folder = shutil.copytree(whole, tmp_path / f"{world_size}", ignore=shutil.ignore_patterns("dump"))
        said = ground.train(backend, precision, world_size, folder, resume_from_checkpoint=folder / "checkpoint-2")
        shutil.copytree(whole / "dump" / "step-1", folder / "dump" / "step-1")
        shutil.copytree(whole / "dump" / "step-2", folder / "dump" / "step-2")
        assert_same_run(folder, whole, precision)
