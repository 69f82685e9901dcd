"""Tests of elastic resume: a run that is resumed with another world size stays the same run.

Every backend resumes with another world size using the same rows, noise, timesteps and learning rates, and with the
losses of an uninterrupted run. With the same world size the resume is bit-identical.
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
import launches
import numpy as np
import pytest
import runs
import tiny
import torch
from safetensors.torch import save_file

from videox.engine.deepspeed_universal import TAG, announce_conversion, conversion_bytes, converted_checkpoint
from videox.engine.train_state import read_state
from videox.errors import FLAGS, MODEL, STORAGE, UserError
from videox.run.checkpoint import verify
from videox.weights.deepspeed_reader import read_zero
from videox.weights.lazy_tensor import BlockReader

STEPS = 6
BACKENDS = ("ddp", "zero2", "zero3", "fsdp1", "fsdp2")
ZERO = ("zero2", "zero3")
PRECISIONS = ("no", "bf16")
HALFWAY = 2
TOLERANCE = {"no": 1e-6, "bf16": 1e-3}  # absolute, of a loss; times ten, it is the relative one of a gradient norm
SLOTS = 4
# Two learning rates and frozen parameters at once, because DeepSpeed stores each parameter group separately.
MODULES = {"trainable_modules": ["attn1"], "trainable_modules_low_learning_rate": ["ffn"]}


@dataclass(frozen=True)
class ElasticRuns:
    """A model and a data set, and runs with four micro-batches per step at any world size."""

    folder: Path
    model: Path
    metadata: Path
    references: dict[tuple[str, str, int], Path] = field(default_factory=dict)

    def flags(self, output_dir: Path, precision: str, world_size: int, **changes: object) -> list[str]:
        settings = {
            "mixed_precision": precision, "max_train_steps": STEPS, "num_train_epochs": None, "lr_warmup_steps": 4,
            "gradient_accumulation_steps": max(SLOTS // world_size, 1), "dump_steps": list(range(1, STEPS + 1)),
            # Adam with a tiny epsilon would turn gradients that are only rounding errors into full steps
            "adam_epsilon": "1e-6", **MODULES,
        }  # fmt: skip
        return runs.wan_flags(self.model, self.metadata, output_dir, **{**settings, **changes})

    def environment(self, backend: str, precision: str, world_size: int) -> dict[str, str]:
        if backend == "single" or (backend, world_size) == ("ddp", 1):
            return {}
        environment = launches.launcher_environment(backend, "wan2.1 normal", world_size)
        if backend.startswith("zero") and precision == "no":
            settings = json.loads((tiny.ROOT / environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"]).read_bytes())
            del settings["bf16"], settings["data_types"]
            file = self.folder / f"{backend}-float32.json"
            file.write_text(json.dumps(settings))
            environment |= {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file), "ACCELERATE_MIXED_PRECISION": "no"}
        return environment

    def start(
        self,
        backend: str,
        precision: str,
        world_size: int,
        output_dir: Path,
        largest_file: int = 0,
        **changes: object,
    ) -> list[forkserver.TrainerProcess]:
        return forkserver.shared().start_ranks(
            world_size,
            self.flags(output_dir, precision, world_size, **changes),
            output_dir.with_name(f"{output_dir.name}-{time.monotonic_ns()}.log"),
            environment=self.environment(backend, precision, world_size),
            largest_file=largest_file,
        )

    def train(self, backend: str, precision: str, world_size: int, output_dir: Path, **changes: object) -> str:
        """Train to the end and return the output of rank 0."""
        ranks = self.start(backend, precision, world_size, output_dir, **changes)
        codes = [rank.wait() for rank in ranks]
        assert codes == [0] * world_size, launches.output_of(ranks)
        return ranks[0].output()

    def reference(self, backend: str, precision: str, world_size: int) -> Path:
        """Return the folder of an uninterrupted run that saves every second step."""
        key = (backend, precision, world_size)
        if key not in self.references:
            folder = self.folder / "-".join(map(str, key))
            self.train(backend, precision, world_size, folder, checkpointing_steps=2)
            self.references[key] = folder
        return self.references[key]


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> ElasticRuns:
    folder = tmp_path_factory.mktemp("setup")
    return ElasticRuns(folder, tiny.build_wan_t2v(folder / "model"), tiny.make_dataset(folder / "data", copies=8))


def dumped_inputs(output_dir: Path) -> dict[tuple[int, int], dict[str, torch.Tensor]]:
    """Return the dumped inputs of every sample, by (step, row)."""
    inputs: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
    for path in sorted((output_dir / "dump").glob("step-*/*.safetensors")):
        dump = runs.read_dump(path)
        for number, row in enumerate(dump.rows):
            key = (int(path.parent.name.removeprefix("step-")), row)
            assert key not in inputs
            inputs[key] = {name: dump[name][number] for name in ("latents", "noise", "sigma", "timestep", "weight")}
    return inputs


def assert_same_run(output_dir: Path, reference: Path, precision: str, since: int = 0, last: int = STEPS) -> None:
    """Check that two runs had bit-identical inputs, and learned the same within the tolerance of the precision.

    Args:
        since: last step before the dumps of output_dir begin.
        last: last step of output_dir.
    """
    found, wanted = forkserver.read_steps(output_dir), forkserver.read_steps(reference)[:last]
    for name in ("step", "rows", "buckets", "lr", "tokens"):
        assert [line[name] for line in found] == [line[name] for line in wanted], name
    assert [line["step"] for line in found] == list(range(1, last + 1))
    losses, norms = ([[line[name] for line in lines] for lines in (found, wanted)] for name in ("loss", "grad_norm"))
    np.testing.assert_allclose(*losses, rtol=0, atol=TOLERANCE[precision])
    corrected = [[line["loss_corrected"] for line in lines] for lines in (found, wanted)]
    np.testing.assert_allclose(*corrected, rtol=0, atol=5 * TOLERANCE[precision])
    np.testing.assert_allclose(*norms, rtol=10 * TOLERANCE[precision])
    inputs = dumped_inputs(output_dir)
    expected = {key: value for key, value in dumped_inputs(reference).items() if since < key[0] <= last}
    assert inputs.keys() == expected.keys()
    for key, tensors in expected.items():
        for name, tensor in tensors.items():
            assert torch.equal(inputs[key][name], tensor), (key, name)


def copy_of(run: Path, target: Path) -> Path:
    """Copy a run without its dumps and return the copy."""
    return Path(shutil.copytree(run, target, ignore=shutil.ignore_patterns("dump")))


def resume_each(
    setup: ElasticRuns,
    backend: str,
    precision: str,
    folder: Path,
    worlds: Sequence[tuple[int, int]],
    **changes: object,
) -> None:
    """Train or resume with each (world size, last step) in turn; every last step is inside the first epoch."""
    for world_size, last in worlds:
        resume = "latest" if (folder / "metrics.jsonl").exists() else None
        settings = {"max_train_steps": last, "resume_from_checkpoint": resume, **changes}
        setup.train(backend, precision, world_size, folder, **settings)
        state = read_state(folder / f"checkpoint-{last}")
        assert (state.epoch, state.epoch_step) == (0, last)


# -------------------------------------------------------------------------------------------------- another world size


@pytest.mark.slow
def test_a_deepspeed_run_resumes_on_one_rank(setup: ElasticRuns, tmp_path: Path) -> None:
    reference, folder = tmp_path / "reference", tmp_path / "c++ [1] (a)*"  # DeepSpeed uses the path as a glob pattern
    setup.train("zero3", "no", 2, reference, max_train_steps=3, checkpointing_steps=HALFWAY)
    copy_of(reference, folder)
    resumed = {"resume_from_checkpoint": folder / f"checkpoint-{HALFWAY}", "max_train_steps": 3}
    output = setup.train("zero3", "no", 1, folder, **resumed)
    assert "checkpoint-2 was saved by 2 processes, this launch has 1: converting it needs" in output
    assert_same_run(folder, reference, "no", since=HALFWAY, last=3)


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_on_two_ranks_resumes_on_one_and_on_four(
    setup: ElasticRuns, tmp_path: Path, backend: str, precision: str
) -> None:
    reference = setup.reference(backend, precision, 2)
    for world_size in (1, 4):
        folder = copy_of(reference, tmp_path / f"{world_size}")
        settings = {"resume_from_checkpoint": folder / f"checkpoint-{HALFWAY}"}
        setup.train(backend, precision, world_size, folder, **settings)
        assert_same_run(folder, reference, precision, since=HALFWAY)


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_resumes_on_four_two_one_and_four_ranks(
    setup: ElasticRuns, tmp_path: Path, backend: str, precision: str
) -> None:
    resume_each(setup, backend, precision, tmp_path / "run", [(4, 2), (2, 3), (1, 4), (4, STEPS)])
    assert_same_run(tmp_path / "run", setup.reference(backend, precision, 4), precision)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_on_three_ranks_resumes_on_two_and_three(setup: ElasticRuns, tmp_path: Path, backend: str) -> None:
    reference, folder = tmp_path / "reference", tmp_path / "run"
    setup.train(backend, "no", 3, reference, gradient_accumulation_steps=2, max_train_steps=4)
    resume_each(setup, backend, "no", folder, [(3, 2)], gradient_accumulation_steps=2)
    resume_each(setup, backend, "no", folder, [(2, 3), (3, 4)])
    assert_same_run(folder, reference, "no", last=4)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_world_size_that_does_not_divide_the_slots_is_refused(
    setup: ElasticRuns, tmp_path: Path, backend: str
) -> None:
    folder = copy_of(setup.reference(backend, "no", 2), tmp_path / "run")
    ranks = setup.start(backend, "no", 3, folder, resume_from_checkpoint=folder / f"checkpoint-{HALFWAY}")
    assert [rank.wait() for rank in ranks] == [FLAGS] * 3
    assert "3 does not divide the 4 slots of an optimizer step" in ranks[0].error_line()
    assert "launch one of 1, 2, 4 processes" in ranks[0].error_line()


# ------------------------------------------------------------------------------------------------- the same world size


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", ["single", *BACKENDS])
def test_resume_with_the_same_world_size_is_bit_identical(
    setup: ElasticRuns, tmp_path: Path, backend: str, precision: str
) -> None:
    world_size = 1 if backend == "single" else 2
    reference = setup.reference(backend, precision, world_size)
    folder = copy_of(reference, tmp_path / "run")
    setup.train(backend, precision, world_size, folder, resume_from_checkpoint=folder / f"checkpoint-{HALFWAY}")
    assert_bit_equal(folder, reference)


def assert_bit_equal(folder: Path, reference: Path) -> None:
    """Check that two runs have bit-identical losses, gradient norms, weights and optimizer moments."""
    assert forkserver.read_steps(folder) == forkserver.read_steps(reference)
    found, wanted = (contents(run / f"checkpoint-{STEPS}") for run in (folder, reference))
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []
    trained = sum(t.numel() for name, t in runs.read_weights(reference / "transformer").items() if is_trained(name))
    assert sum(map(len, wanted.values())) > 12 * trained  # bytes: float32 parameters and two moments


def is_trained(name: str) -> bool:
    return any(pattern in name for patterns in MODULES.values() for pattern in patterns)


def contents(checkpoint: Path) -> dict[str, bytes]:
    """Return the files of a checkpoint by path, without the manifest and torch's .metadata, whose order varies."""
    excluded = ("manifest.json", ".metadata")
    files = (path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name not in excluded)
    return {path.relative_to(checkpoint).as_posix(): path.read_bytes() for path in files}


# ---------------------------------------------------------------------------------------------- DeepSpeed's conversion


def read(entries: Sequence, blocks: BlockReader) -> dict[str, torch.Tensor]:
    return {
        entry.name: torch.cat([part.clone() for part in blocks.read_blocks(entry)]).view(entry.shape)
        for entry in entries
    }


@pytest.mark.slow
@pytest.mark.parametrize("backend", ZERO)
def test_a_conversion_has_the_fp32_params_and_the_announced_size(
    setup: ElasticRuns, tmp_path: Path, backend: str
) -> None:
    checkpoint = setup.reference(backend, "bf16", 2) / f"checkpoint-{HALFWAY}"
    before = contents(checkpoint)
    with BlockReader() as blocks:
        wanted = read(read_zero(checkpoint / TAG, exclude_frozen=True).tensors, blocks)
    with converted_checkpoint(checkpoint, TAG, tmp_path, is_main=True, gather=lambda value: [value]) as folder:
        for name, tensor in wanted.items():
            found = torch.load(folder / TAG / "zero" / name / "fp32.pt")
            found = found["param"] if isinstance(found, dict) else found
            assert torch.equal(found.flatten(), tensor.flatten()), name
        used = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        assert 0.3 * conversion_bytes(checkpoint / TAG) < used < conversion_bytes(checkpoint / TAG)
    assert contents(checkpoint) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("backend", ZERO)
def test_checkpoints_after_a_conversion_are_regular(setup: ElasticRuns, tmp_path: Path, backend: str) -> None:
    reference = setup.reference(backend, "bf16", 2)
    # Frozen weights are read from the checkpoint, even if the model folder contains other values by now.
    model = Path(shutil.copytree(setup.model / "transformer", tmp_path / "model"))
    weights = runs.read_weights(model)
    frozen = [name for name in weights if not is_trained(name)]
    save_file({name: 2 * t if name in frozen else t for name, t in weights.items()}, next(model.glob("*.safetensors")))
    other = {"transformer_path": model}
    first = copy_of(reference, tmp_path / "first")
    before = contents(first / f"checkpoint-{HALFWAY}")
    setup.train(
        backend,
        "bf16",
        1,
        first,
        resume_from_checkpoint=first / f"checkpoint-{HALFWAY}",
        checkpointing_steps=2,
        **other,
    )
    assert_same_run(first, reference, "bf16", since=HALFWAY)
    assert contents(first / f"checkpoint-{HALFWAY}") == before
    assert not list(first.glob(".tmp-*"))

    again = copy_of(first, tmp_path / "again")
    setup.train(backend, "bf16", 1, again, resume_from_checkpoint=again / "checkpoint-4", **other)
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


def processes_in(folder: Path) -> list[str]:
    """Return the pids of processes whose working directory is inside a folder."""
    pids = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            directory = (process / "cwd").readlink()
        except OSError:
            continue
        pids += [process.name] if directory.is_relative_to(folder) else []
    return pids


@pytest.mark.slow
def test_the_files_of_a_killed_conversion_are_removed_later(setup: ElasticRuns, tmp_path: Path) -> None:
    reference = setup.reference("zero2", "no", 2)
    folder = copy_of(reference, tmp_path / "run")
    resumed = {"resume_from_checkpoint": folder / f"checkpoint-{HALFWAY}"}
    (rank,) = setup.start("zero2", "no", 1, folder, **resumed)
    assert rank.wait_until(lambda: processes_in(folder))
    rank.signal(signal.SIGKILL)
    assert rank.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while processes_in(folder):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert list(folder.glob(".tmp-universal-*"))
    assert verify(folder / f"checkpoint-{HALFWAY}", hashes=True) == []
    setup.train("zero2", "no", 1, folder, **resumed)
    assert not list(folder.glob(".tmp-*"))
    assert_same_run(folder, reference, "no", since=HALFWAY)


@pytest.mark.slow
def test_a_failed_conversion_is_reported_and_removed(setup: ElasticRuns, tmp_path: Path) -> None:
    folder = copy_of(setup.reference("zero3", "no", 2), tmp_path / "run")
    checkpoint = folder / f"checkpoint-{HALFWAY}"
    ranks = setup.start("zero3", "no", 4, folder, largest_file=16 * 1024, resume_from_checkpoint=checkpoint)
    assert [rank.wait() for rank in ranks] == [MODEL] * 4, ranks[0].output()[-3000:]
    assert "DeepSpeed cannot convert it (" in ranks[0].error_line()
    assert "Fix: free some disk space and launch again, or launch 2 processes." in ranks[0].error_line()
    assert verify(checkpoint, hashes=True) == []
    assert not list(folder.glob(".tmp-*"))


@pytest.mark.slow
def test_a_conversion_without_enough_disk_space_is_refused(setup: ElasticRuns, tmp_path: Path) -> None:
    checkpoint = copy_of(setup.reference("zero2", "no", 2), tmp_path / "run") / f"checkpoint-{HALFWAY}"
    assert announce_conversion(checkpoint, tmp_path, 2) == []
    (line,) = announce_conversion(checkpoint, tmp_path, 4)
    assert "was saved by 2 processes, this launch has 4: converting it needs" in line
    with next((checkpoint / TAG).glob("*_optim_states.pt")).open("r+b") as file:
        file.truncate(10**13)  # a sparse file
    needs = r"to convert checkpoint-2 from 2 to 4 processes needs 3e\+04 GB of disk space, [0-9.e+]+ GB are free"
    with pytest.raises(UserError, match=needs) as no:
        announce_conversion(checkpoint, tmp_path, 4)
    assert no.value.exit_code == STORAGE


@pytest.mark.slow
@pytest.mark.parametrize("backend", ZERO)
def test_a_new_max_grad_norm_is_used_after_a_resume(setup: ElasticRuns, tmp_path: Path, backend: str) -> None:
    other = {"zero2": "ddp", "zero3": "fsdp2"}[backend]  # same rows per step, and it clips by itself
    losses = {}
    for name, world_size in ((other, 2), (backend, 2), (backend, 1)):
        folder = copy_of(setup.reference(name, "no", 2), tmp_path / f"{name}-{world_size}")
        settings = {"resume_from_checkpoint": folder / f"checkpoint-{HALFWAY}", "max_grad_norm": 1e-6}
        setup.train(name, "no", world_size, folder, adam_epsilon="1e-3", **settings)
        losses[name, world_size] = [line["loss"] for line in forkserver.read_steps(folder)]
    unlimited = [line["loss"] for line in forkserver.read_steps(setup.reference(other, "no", 2))]
    assert abs(losses[other, 2][-1] - unlimited[-1]) > 1e-4
    for world_size in (1, 2):
        np.testing.assert_allclose(losses[backend, world_size], losses[other, 2], rtol=0, atol=1e-6)
