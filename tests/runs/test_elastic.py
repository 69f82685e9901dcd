"""Serves whoever comes back with more or fewer devices: a run that changes its number of processes stays the same run.

Every backend goes on at another number of processes with the same rows, noise, timesteps and learning rates, and with
the losses of a run that was never stopped; at the same number, to the last bit.
"""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import forkserver
import numpy as np
import pytest
import runs
import test_backends
import tiny
import torch
from safetensors.torch import save_file

from videox.engine.deepspeed_universal import TAG, announce_conversion, bytes_needed, converted
from videox.engine.train_state import read_state
from videox.errors import FLAGS, MODEL, STORAGE, UserError
from videox.run.checkpoint import verify
from videox.weights.deepspeed_reader import read_zero
from videox.weights.lazy_tensor import Blocks

STEPS = 6
BACKENDS = ("ddp", "zero2", "zero3", "fsdp1", "fsdp2")
ZERO = ("zero2", "zero3")
PRECISIONS = ("no", "bf16")
HALFWAY = 2
TOLERANCE = {"no": 1e-6, "bf16": 1e-3}  # of a loss; ten times as much, relative, of a gradient norm
SLOTS = 4
# Two learning rates and frozen parts at once, as DeepSpeed keeps each group by itself.
PARTS = {"trainable_modules": ["attn1"], "trainable_modules_low_learning_rate": ["ffn"]}


@dataclass(frozen=True)
class Ground:
    """A model and a data set for runs of a step's four micro-batches, whatever the number of processes."""

    folder: Path
    model: Path
    metadata: Path
    unbroken: dict[tuple[str, str, int], Path] = field(default_factory=dict)

    def flags(self, output_dir: Path, precision: str, world_size: int, **changes: object) -> list[str]:
        asked = {
            "mixed_precision": precision, "max_train_steps": STEPS, "num_train_epochs": None, "lr_warmup_steps": 4,
            "gradient_accumulation_steps": max(SLOTS // world_size, 1), "dump_steps": list(range(1, STEPS + 1)),
            # Adam with a tiny epsilon makes whole steps of gradients that are nothing but the last bit of a sum
            "adam_epsilon": "1e-6", **PARTS,
        }  # fmt: skip
        return runs.wan_plain(self.model, self.metadata, output_dir, **{**asked, **changes})

    def variables(self, backend: str, precision: str, world_size: int) -> dict[str, str]:
        if backend == "single" or (backend, world_size) == ("ddp", 1):
            return {}
        found = test_backends.variables(backend, "wan2.1 normal", world_size)
        if backend.startswith("zero") and precision == "no":
            settings = json.loads((tiny.ROOT / found["ACCELERATE_DEEPSPEED_CONFIG_FILE"]).read_bytes())
            del settings["bf16"], settings["data_types"]
            file = self.folder / f"{backend}-float32.json"
            file.write_text(json.dumps(settings))
            found |= {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file), "ACCELERATE_MIXED_PRECISION": "no"}
        return found

    def start(
        self,
        backend: str,
        precision: str,
        world_size: int,
        output_dir: Path,
        largest_file: int = 0,
        **changes: object,
    ) -> list[forkserver.Trainer]:
        return forkserver.shared().start_ranks(
            world_size,
            self.flags(output_dir, precision, world_size, **changes),
            output_dir.with_name(f"{output_dir.name}-{time.monotonic_ns()}.log"),
            environment=self.variables(backend, precision, world_size),
            largest_file=largest_file,
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
    """Returns what each sample was given, by (step, row)."""
    found: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
    for path in sorted((output_dir / "dump").glob("step-*/*.safetensors")):
        dump = runs.read_dump(path)
        for number, row in enumerate(dump.rows):
            key = (int(path.parent.name.removeprefix("step-")), row)
            assert key not in found
            found[key] = {name: dump[name][number] for name in ("latents", "noise", "sigma", "timestep", "weight")}
    return found


def assert_same_run(output_dir: Path, whole: Path, precision: str, since: int = 0, last: int = STEPS) -> None:
    """Checks that two runs were given the same to the bit, and learned the same within the precision.

    Args:
        since: step from which on output_dir has dumps.
    """
    found, wanted = forkserver.steps(output_dir), forkserver.steps(whole)[:last]
    for name in ("step", "rows", "buckets", "lr", "tokens"):
        assert [line[name] for line in found] == [line[name] for line in wanted], name
    assert [line["step"] for line in found] == list(range(1, last + 1))
    losses, norms = ([[line[name] for line in lines] for lines in (found, wanted)] for name in ("loss", "grad_norm"))
    np.testing.assert_allclose(*losses, rtol=0, atol=TOLERANCE[precision])
    np.testing.assert_allclose(*norms, rtol=10 * TOLERANCE[precision])
    given = drawn(output_dir)
    expected = {key: value for key, value in drawn(whole).items() if since < key[0] <= last}
    assert given.keys() == expected.keys()
    for key, tensors in expected.items():
        for name, tensor in tensors.items():
            assert torch.equal(given[key][name], tensor), (key, name)


def copy_of(whole: Path, target: Path) -> Path:
    """Returns a copy of a run without its dumps."""
    return Path(shutil.copytree(whole, target, ignore=shutil.ignore_patterns("dump")))


def go_on(
    ground: Ground, backend: str, precision: str, folder: Path, worlds: Sequence[tuple[int, int]], **changes: object
) -> None:
    """Goes on with each number of processes up to a step, which lies in the middle of an epoch."""
    for world_size, last in worlds:
        resume = "latest" if (folder / "metrics.jsonl").exists() else None
        asked = {"max_train_steps": last, "resume_from_checkpoint": resume, **changes}
        ground.train(backend, precision, world_size, folder, **asked)
        state = read_state(folder / f"checkpoint-{last}")
        assert (state.epoch, state.epoch_step) == (0, last)


# ---------------------------------------------------------------------------------- another number of processes


def test_a_deepspeed_run_goes_on_alone(ground: Ground, tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "c++ [1] (a)*"  # DeepSpeed takes a path for a pattern
    ground.train("zero3", "no", 2, whole, max_train_steps=3, checkpointing_steps=HALFWAY)
    copy_of(whole, folder)
    resumed = {"resume_from_checkpoint": folder / f"checkpoint-{HALFWAY}", "max_train_steps": 3}
    said = ground.train("zero3", "no", 1, folder, **resumed)
    assert "checkpoint-2 was saved by 2 processes, here are 1: it is converted aside" in said
    assert_same_run(folder, whole, "no", since=HALFWAY, last=3)


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_processes_go_on_as_one_and_as_four(ground: Ground, tmp_path: Path, backend: str, precision: str) -> None:
    whole = ground.whole(backend, precision, 2)
    for world_size in (1, 4):
        folder = copy_of(whole, tmp_path / f"{world_size}")
        asked = {"resume_from_checkpoint": folder / f"checkpoint-{HALFWAY}"}
        ground.train(backend, precision, world_size, folder, **asked)
        assert_same_run(folder, whole, precision, since=HALFWAY)


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_four_two_one_and_four_again(ground: Ground, tmp_path: Path, backend: str, precision: str) -> None:
    go_on(ground, backend, precision, tmp_path / "run", [(4, 2), (2, 3), (1, 4), (4, STEPS)])
    assert_same_run(tmp_path / "run", ground.whole(backend, precision, 4), precision)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_three_processes_where_they_divide_the_step(ground: Ground, tmp_path: Path, backend: str) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    ground.train(backend, "no", 3, whole, gradient_accumulation_steps=2, max_train_steps=4)
    go_on(ground, backend, "no", folder, [(3, 2)], gradient_accumulation_steps=2)
    go_on(ground, backend, "no", folder, [(2, 3), (3, 4)])
    assert_same_run(folder, whole, "no", last=4)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_number_that_does_not_divide_the_step_is_refused(ground: Ground, tmp_path: Path, backend: str) -> None:
    folder = copy_of(ground.whole(backend, "no", 2), tmp_path / "run")
    ranks = ground.start(backend, "no", 3, folder, resume_from_checkpoint=folder / f"checkpoint-{HALFWAY}")
    assert [rank.wait() for rank in ranks] == [FLAGS] * 3
    assert "3 does not divide the 4 slots of an optimizer step" in ranks[0].complaint()
    assert "start one of 1, 2, 4 processes" in ranks[0].complaint()


# ---------------------------------------------------------------------------------------------- the same number


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", ["single", *BACKENDS])
def test_the_same_number_goes_on_to_the_bit(ground: Ground, tmp_path: Path, backend: str, precision: str) -> None:
    world_size = 1 if backend == "single" else 2
    whole = ground.whole(backend, precision, world_size)
    folder = copy_of(whole, tmp_path / "run")
    ground.train(backend, precision, world_size, folder, resume_from_checkpoint=folder / f"checkpoint-{HALFWAY}")
    assert_bit_equal(folder, whole)


def assert_bit_equal(folder: Path, whole: Path) -> None:
    """Checks that two runs are equal in every loss and gradient norm, in weights and in the optimizer's moments."""
    assert forkserver.steps(folder) == forkserver.steps(whole)
    found, wanted = (contents(run / f"checkpoint-{STEPS}") for run in (folder, whole))
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []
    trained = sum(t.numel() for name, t in runs.read_weights(whole / "transformer").items() if is_trained(name))
    assert sum(map(len, wanted.values())) > 12 * trained  # bytes: float32 masters and two moments


def is_trained(name: str) -> bool:
    return any(part in name for parts in PARTS.values() for part in parts)


def contents(checkpoint: Path) -> dict[str, bytes]:
    """Returns every file of a checkpoint but its manifest and torch's list of pieces, which come in any order."""
    left_out = ("manifest.json", ".metadata")
    files = (path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name not in left_out)
    return {path.relative_to(checkpoint).as_posix(): path.read_bytes() for path in files}


# ------------------------------------------------------------------------------------- DeepSpeed's conversion


def read(entries: Sequence, blocks: Blocks) -> dict[str, torch.Tensor]:
    return {entry.name: torch.cat([part.clone() for part in blocks.of(entry)]).view(entry.shape) for entry in entries}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ZERO)
def test_a_conversion_holds_the_masters_and_the_space_that_was_told(
    ground: Ground, tmp_path: Path, backend: str
) -> None:
    checkpoint = ground.whole(backend, "bf16", 2) / f"checkpoint-{HALFWAY}"
    before = contents(checkpoint)
    with Blocks() as blocks:
        wanted = read(read_zero(checkpoint / TAG, exclude_frozen=True).tensors, blocks)
    with converted(checkpoint, TAG, tmp_path, is_main=True, gather=lambda mine: [mine]) as folder:
        for name, tensor in wanted.items():
            found = torch.load(folder / TAG / "zero" / name / "fp32.pt")
            found = found["param"] if isinstance(found, dict) else found
            assert torch.equal(found.flatten(), tensor.flatten()), name
        taken = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        assert 0.3 * bytes_needed(checkpoint / TAG) < taken < bytes_needed(checkpoint / TAG)
    assert contents(checkpoint) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("backend", ZERO)
def test_what_is_saved_after_a_conversion_is_a_checkpoint_like_any(
    ground: Ground, tmp_path: Path, backend: str
) -> None:
    whole = ground.whole(backend, "bf16", 2)
    # The frozen weights are the checkpoint's, whatever the model's folder holds by now.
    model = Path(shutil.copytree(ground.model / "transformer", tmp_path / "model"))
    weights = runs.read_weights(model)
    frozen = [name for name in weights if not is_trained(name)]
    save_file({name: 2 * t if name in frozen else t for name, t in weights.items()}, next(model.glob("*.safetensors")))
    other = {"transformer_path": model}
    first = copy_of(whole, tmp_path / "first")
    before = contents(first / f"checkpoint-{HALFWAY}")
    ground.train(
        backend,
        "bf16",
        1,
        first,
        resume_from_checkpoint=first / f"checkpoint-{HALFWAY}",
        checkpointing_steps=2,
        **other,
    )
    assert_same_run(first, whole, "bf16", since=HALFWAY)
    assert contents(first / f"checkpoint-{HALFWAY}") == before
    assert not list(first.glob(".tmp-*"))

    again = copy_of(first, tmp_path / "again")
    ground.train(backend, "bf16", 1, again, resume_from_checkpoint=again / "checkpoint-4", **other)
    assert_bit_equal(again, first)

    assert (
        tiny.load_script("scripts/zero_to_bf16.py").main([str(first / f"checkpoint-{STEPS}"), str(tmp_path / "out")])
        == 0
    )
    found, exported = (runs.read_weights(folder) for folder in (tmp_path / "out", first / "transformer"))
    assert found.keys() == exported.keys() == weights.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, exported[name].bfloat16()), name
    for name in frozen:
        assert torch.equal(found[name], weights[name].bfloat16()), name


def users_of(folder: Path) -> list[str]:
    """Returns the processes that work inside a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            place = (process / "cwd").readlink()
        except OSError:
            continue
        found += [process.name] if place.is_relative_to(folder) else []
    return found


@pytest.mark.slow
def test_a_killed_conversion_leaves_nothing_that_stays(ground: Ground, tmp_path: Path) -> None:
    whole = ground.whole("zero2", "no", 2)
    folder = copy_of(whole, tmp_path / "run")
    resumed = {"resume_from_checkpoint": folder / f"checkpoint-{HALFWAY}"}
    (rank,) = ground.start("zero2", "no", 1, folder, **resumed)
    assert rank.until(lambda: users_of(folder))
    rank.signal(signal.SIGKILL)
    assert rank.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while users_of(folder):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert list(folder.glob(".tmp-universal-*"))
    assert verify(folder / f"checkpoint-{HALFWAY}", hashes=True) == []
    ground.train("zero2", "no", 1, folder, **resumed)
    assert not list(folder.glob(".tmp-*"))
    assert_same_run(folder, whole, "no", since=HALFWAY)


@pytest.mark.slow
def test_a_conversion_that_fails_is_told_and_gone(ground: Ground, tmp_path: Path) -> None:
    folder = copy_of(ground.whole("zero3", "no", 2), tmp_path / "run")
    checkpoint = folder / f"checkpoint-{HALFWAY}"
    ranks = ground.start("zero3", "no", 4, folder, largest_file=16 * 1024, resume_from_checkpoint=checkpoint)
    assert [rank.wait() for rank in ranks] == [MODEL] * 4, ranks[0].said()[-3000:]
    assert "DeepSpeed cannot convert it (" in ranks[0].complaint()
    assert "Fix: look for room on the disk and launch again, or launch 2 processes." in ranks[0].complaint()
    assert verify(checkpoint, hashes=True) == []
    assert not list(folder.glob(".tmp-*"))


@pytest.mark.slow
def test_a_conversion_without_room_is_refused_before_it_begins(ground: Ground, tmp_path: Path) -> None:
    checkpoint = copy_of(ground.whole("zero2", "no", 2), tmp_path / "run") / f"checkpoint-{HALFWAY}"
    assert announce_conversion(checkpoint, tmp_path, 2) == []
    (line,) = announce_conversion(checkpoint, tmp_path, 4)
    assert "was saved by 2 processes, here are 4: it is converted aside" in line
    with next((checkpoint / TAG).glob("*_optim_states.pt")).open("r+b") as file:
        file.truncate(10**13)  # of holes
    needs = r"to convert checkpoint-2 from 2 to 4 processes needs 3e\+04 GB, the disk has [0-9.e+]+ GB"
    with pytest.raises(UserError, match=needs) as no:
        announce_conversion(checkpoint, tmp_path, 4)
    assert no.value.exit_code == STORAGE


@pytest.mark.slow
@pytest.mark.parametrize("backend", ZERO)
def test_a_limit_given_at_a_resume_holds(ground: Ground, tmp_path: Path, backend: str) -> None:
    other = {"zero2": "ddp", "zero3": "fsdp2"}[
        backend
    ]  # whose steps are made of the same rows, and which clips itself
    losses = {}
    for name, world_size in ((other, 2), (backend, 2), (backend, 1)):
        folder = copy_of(ground.whole(name, "no", 2), tmp_path / f"{name}-{world_size}")
        asked = {"resume_from_checkpoint": folder / f"checkpoint-{HALFWAY}", "max_grad_norm": 1e-6}
        ground.train(name, "no", world_size, folder, adam_epsilon="1e-3", **asked)
        losses[name, world_size] = [line["loss"] for line in forkserver.steps(folder)]
    unlimited = [line["loss"] for line in forkserver.steps(ground.whole(other, "no", 2))]
    assert abs(losses[other, 2][-1] - unlimited[-1]) > 1e-4
    for world_size in (1, 2):
        np.testing.assert_allclose(losses[backend, world_size], losses[other, 2], rtol=0, atol=1e-6)
