"""Tests of videox.optim.ema: in every backend the EMA equals the one computed here from the gathered float32 weights.

The reference is computed from the weights that the engine gathers after every step.
"""

from __future__ import annotations

import errno
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import diffusers
import forkserver
import pytest
import runs
import torch
from diffusers.training_utils import EMAModel
from hypothesis import given
from hypothesis import strategies as st
from launches import LAUNCH_FLAGS, SHARDED_BACKENDS, BackendRuns, exit_codes, output_of
from safetensors.torch import load_file, save_file

import videox.optim.ema
import videox.weights.format
from videox.engine.base import Update
from videox.engine.ema import EmaEngine
from videox.optim.ema import Ema, Fp32Params, decay_at
from videox.run.checkpoint import verify

STEPS = 4
DECAY = 0.25  # the maximum, reached in the fourth update: 4 / 13 is above it
EMA = {"use_ema": True, "ema_decay": DECAY}


# ------------------------------------------------------------------------------------------------------- arithmetic


@given(st.integers(1, 10**7), st.floats(0, 1))
def test_decay_equals_diffusers(update: int, decay: float) -> None:
    reference_ema = EMAModel([torch.nn.Parameter(torch.zeros(1))], decay=decay)
    assert decay_of(update, decay) == pytest.approx(reference_ema.get_decay(update), abs=1e-15)


def decay_of(update: int, decay: float) -> float:
    return decay_at(torch.tensor(float(update), dtype=torch.float64), decay).item()


def fp32_params_of(tensors: dict[str, torch.Tensor], publish: Callable[[], object] = lambda: None) -> Fp32Params:
    return Fp32Params(
        tuple(tensors), tensors.__getitem__, lambda name, new: tensors[name].copy_(new), after_swap=publish
    )


def weights_at(step: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=draw) for name, shape in (("a", (7, 3)), ("b", (0,)), ("c", (11,)))}


@pytest.mark.parametrize("chunk", [1, 20, 2**26])
def test_ema_equals_diffusers(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(videox.optim.ema, "CHUNK", chunk)
    weights = weights_at(0)
    ema, parameters = (
        Ema(fp32_params_of(weights), decay=0.4),
        [torch.nn.Parameter(w.clone()) for w in weights.values()],
    )
    reference_ema = EMAModel(parameters, decay=0.4)
    for step in range(1, 12):
        for name, parameter in zip(weights, parameters, strict=True):
            weights[name].copy_(weights_at(step)[name])
            parameter.data.copy_(weights[name])
        ema.update(torch.tensor(True))
        reference_ema.step(parameters)
        for part, shadow in zip(ema.shards.values(), reference_ema.shadow_params, strict=True):
            assert torch.allclose(part, shadow, atol=1e-6)
    assert ema.updates == 11


def test_updates_below_bfloat16_precision_change_the_ema() -> None:
    weights = {"a": torch.ones(4)}
    ema = Ema(fp32_params_of(weights), decay=0.999)
    for _ in range(3000):
        weights["a"] += 1e-6
        ema.update(torch.tensor(True))
    assert torch.all(ema.shards["a"] > 1.001) and torch.equal(
        torch.ones(4).bfloat16() + 1e-6, torch.ones(4).bfloat16()
    )


def test_swapped_exchanges_ema_and_parameters_and_back() -> None:
    published: list[torch.Tensor] = []
    weights = weights_at(0)
    ema = Ema(fp32_params_of(weights, lambda: published.append(weights["a"].clone())), decay=0.9)
    weights["a"].copy_(weights_at(1)["a"])
    before, ema_weights = weights_at(1)["a"], ema.shards["a"].clone()
    with ema.swapped():
        assert torch.equal(weights["a"], ema_weights) and not torch.equal(ema_weights, before)
    assert torch.equal(weights["a"], before) and torch.equal(ema.shards["a"], ema_weights)
    assert torch.equal(published[0], ema_weights) and torch.equal(published[1], before)
    with pytest.raises(ZeroDivisionError), ema.swapped():
        _ = 1 / 0
    assert torch.equal(weights["a"], before) and torch.equal(ema.shards["a"], ema_weights)
    assert len(published) == 3  # no collective after an exception: other ranks may wait in another one


# ---------------------------------------------------------------------------------------------------------- references


def train_and_gather() -> int:
    """Entry point of a rank: train, and save the gathered float32 weights after each applied step in
    output_dir/gathered.
    """
    plain_update, folder = EmaEngine.update, runs.output_dir_of(sys.argv) / "gathered"

    def update(self: EmaEngine, **settings: object) -> Update:
        result = plain_update(self, **settings)
        gathered = {name: tensor.detach().clone() for name, tensor in self.weights()}
        if self.is_main and result.applied:
            folder.mkdir(exist_ok=True)
            save_file(gathered, folder / f"{len(list(folder.iterdir())) + 1}.safetensors")
        return result

    EmaEngine.update = update
    return runs.train_script().main()


def expected_ema(begin: dict[str, torch.Tensor], folder: Path, updates: range) -> dict[str, torch.Tensor]:
    """Return the EMA that starts at `begin` and is updated with the gathered weights of these updates."""
    ema_weights = {name: tensor.clone() for name, tensor in begin.items()}
    for number, update in enumerate(updates, 1):
        weights = load_file(folder / "gathered" / f"{number}.safetensors")
        assert weights.keys() == ema_weights.keys()
        for name, tensor in ema_weights.items():
            tensor.lerp_(weights[name], 1 - decay_of(update, DECAY))
    return ema_weights


def check_equal(actual: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == reference.keys()
    assert {tensor.dtype for tensor in actual.values()} == {torch.float32}
    assert [name for name in reference if not torch.equal(actual[name], reference[name])] == []


def check_loads(folder: Path, dtype: torch.dtype) -> None:
    model = diffusers.WanTransformer3DModel.from_pretrained(folder, torch_dtype=dtype)
    stored = runs.read_weights(folder)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items() if name in stored)
    assert stored.keys() == dict(model.named_parameters()).keys()


# ---------------------------------------------------------------------------------------------------- one process


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> BackendRuns:
    return BackendRuns(tmp_path_factory.mktemp("wan"), "wan2.1 normal", STEPS)


@pytest.fixture(scope="module")
def ema_run(wan: BackendRuns) -> runs.Outcome:
    """Return a run with EMA, a checkpoint at each step and validation of the EMA."""
    flags = {**EMA, "checkpointing_steps": 1, "gradient_accumulation_steps": 2, "validate_ema": True}
    outcome = runs.train(wan.flags(wan.folder / "averaged", **flags))
    assert outcome.code == 0, outcome.stderr
    return outcome


@pytest.mark.slow
def test_one_process_averages_its_fp32_params(wan: BackendRuns, ema_run: runs.Outcome) -> None:
    ema_weights = runs.read_weights(wan.model / "transformer")
    for step in range(1, STEPS + 1):
        weights = ema_run.weights(f"checkpoint-{step}/transformer")
        for name, tensor in ema_weights.items():
            tensor.lerp_(weights[name], 1 - decay_of(step, DECAY))
        check_equal(ema_run.weights(f"checkpoint-{step}/transformer_ema"), ema_weights)
    last = ema_run.folder / f"checkpoint-{STEPS}"
    stored_state = json.loads((last / "transformer_ema" / "ema.json").read_text(encoding="utf-8"))
    assert stored_state == {"updates": STEPS, "decay": DECAY}
    check_loads(last / "transformer_ema", torch.float32)
    exported = ema_run.weights("transformer_ema")
    assert all(torch.equal(exported[name], ema_weights[name].to(t.dtype)) for name, t in exported.items())
    assert {t.dtype for t in exported.values()} == {torch.float32, torch.bfloat16}
    check_loads(ema_run.folder / "transformer_ema", torch.bfloat16)


@pytest.mark.slow
def test_ema_does_not_change_the_training(wan: BackendRuns, ema_run: runs.Outcome) -> None:
    assert forkserver.read_steps(ema_run.folder) == forkserver.read_steps(wan.baseline)
    plain = runs.read_lines(wan.baseline / "validation.jsonl")
    assert [(line["step"], line["loss"]) for line in ema_run.validation] == [
        (line["step"], line["loss"]) for line in plain
    ]
    assert ema_run.validation[0]["ema_loss"] == ema_run.validation[0]["loss"]
    assert ema_run.validation[-1]["ema_loss"] != ema_run.validation[-1]["loss"]
    assert not (wan.baseline / "transformer_ema").exists()
    first, second = (runs.read_weights(run / "transformer") for run in (wan.baseline, ema_run.folder))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_ema_is_resumed_started_late_and_dropped(wan: BackendRuns, ema_run: runs.Outcome, tmp_path: Path) -> None:
    folder = shutil.copytree(ema_run.folder, tmp_path / "run")
    flags = {"gradient_accumulation_steps": 2, "checkpointing_steps": 1}

    def resume(step: int, **changes: object) -> runs.Outcome:
        path = folder / f"checkpoint-{step}"
        outcome = runs.train(wan.flags(folder, resume_from_checkpoint=path, **flags, **changes))
        assert outcome.code == 0, outcome.stderr
        return outcome

    resumed = resume(2, **EMA)
    for name in ("transformer_ema", f"checkpoint-{STEPS}/transformer_ema"):
        files = {path.name: path.read_bytes() for path in (folder / name).iterdir()}
        assert files == {path.name: path.read_bytes() for path in (ema_run.folder / name).iterdir()}
    assert "EMA" not in resumed.stdout
    without_ema = resume(2)
    assert "--use_ema is not set: the EMA of checkpoint-2 is not continued" in without_ema.stdout
    assert not (folder / f"checkpoint-{STEPS}" / "transformer_ema").exists()
    started_late = resume(3, **EMA)
    assert "--use_ema: checkpoint-3 has no EMA; it starts here from the loaded weights" in started_late.stdout
    # the decay of the first update is 0: the EMA equals the weights
    check_equal(started_late.weights("checkpoint-4/transformer_ema"), started_late.weights("checkpoint-4/transformer"))
    assert started_late.losses == ema_run.losses


@pytest.mark.slow
def test_validation_and_samples_use_the_ema(wan: BackendRuns, tmp_path: Path) -> None:
    """A run that starts from the saved EMA has the first run's EMA validation loss and samples at its first step."""
    flags = {"validation_prompts": ["a red fox"], "max_train_steps": 1, "lr_warmup_steps": 0}
    ema_flags = {**flags, "use_ema": True, "validate_ema": True, "max_train_steps": 2}
    first = runs.train(wan.flags(tmp_path / "one", **ema_flags))
    begins = {"transformer_path": first.folder / "checkpoint-2" / "transformer_ema"}
    second = runs.train(wan.flags(tmp_path / "other", **flags, **begins))
    assert (first.code, second.code) == (0, 0), first.stderr + second.stderr
    assert first.validation[-1]["ema_loss"] == second.validation[0]["loss"] != first.validation[-1]["loss"]
    assert first.validation[-1]["ema_per_sigma"] == second.validation[0]["per_sigma"]
    clips = [
        run.folder / "samples" / f"step-{step:06d}-prompt-0.mp4" for run, step in ((first, 2), (second, 0), (first, 0))
    ]
    assert clips[0].read_bytes() == clips[1].read_bytes() != clips[2].read_bytes()
    assert f"with the EMA {first.validation[-1]['ema_loss']:.4f}" in first.stdout + first.stderr


@pytest.mark.parametrize("device_name", ["accelerator", "cpu"])
def test_ema_device_is_the_requested_one(
    wan: BackendRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device_name: str
) -> None:
    flags: list[torch.device | None] = []

    class RecordingEma(Ema):
        def __init__(self, fp32_params: Fp32Params, *, decay: float, device: torch.device | None = None) -> None:
            flags.append(device)
            super().__init__(fp32_params, decay=decay, device=device)

    monkeypatch.setattr(videox.engine.ema, "Ema", RecordingEma)
    outcome = runs.train(wan.flags(tmp_path, use_ema=True, ema_device=device_name, max_train_steps=1))
    assert outcome.code == 0, outcome.stderr
    assert flags == [torch.device("cpu") if device_name == "cpu" else None]


def test_shards_read_as_copies_are_averaged_and_swapped_equally() -> None:
    """Copies are read if the EMA is on another device than the weights, and from DeepSpeed."""
    weights = [weights_at(0), weights_at(0)]
    copied = Fp32Params(
        tuple(weights[1]), lambda name: weights[1][name].clone(), lambda name, new: weights[1][name].copy_(new)
    )
    emas = [Ema(fp32_params_of(weights[0]), decay=0.4), Ema(copied, decay=0.4)]
    for step in range(1, 4):
        for tensors, ema_weights in zip(weights, emas, strict=True):
            for name, tensor in tensors.items():
                tensor.copy_(weights_at(step)[name])
            ema_weights.update(torch.tensor(True))
            with ema_weights.swapped():
                assert not torch.equal(tensors["a"], weights_at(step)["a"]) or step == 1
            assert all(torch.equal(tensor, weights_at(step)[name]) for name, tensor in tensors.items())
    assert all(torch.equal(emas[0].shards[name], part) for name, part in emas[1].shards.items())


# ------------------------------------------------------------------------------------------------- several processes


def check_backend(backend_runs: BackendRuns, backend: str, tmp_path: Path, **flags: object) -> None:
    """Check EMA, files, validation and resume with two processes."""
    entry_point, folder = "tests.optim.test_ema:train_and_gather", tmp_path / "run"
    ema_flags = {**EMA, "validate_ema": True, **flags}
    ranks = backend_runs.run_ranks(backend, folder, entry_point=entry_point, **ema_flags)
    assert exit_codes(ranks) == [0, 0], output_of(ranks)
    last, half = (f"checkpoint-{step}" for step in (STEPS, STEPS // 2))
    begin = runs.read_weights(backend_runs.model / "transformer")
    ema_weights = runs.read_weights(folder / last / "transformer_ema")
    check_equal(ema_weights, expected_ema(begin, folder, range(1, STEPS + 1)))
    assert verify(folder / last, hashes=True) == []
    check_loads(folder / last / "transformer_ema", torch.float32)
    exported = runs.read_weights(folder / "transformer_ema")
    assert all(torch.equal(tensor, ema_weights[name].to(tensor.dtype)) for name, tensor in exported.items())

    # training and validation are equal to a run without EMA
    assert exit_codes(backend_runs.run_ranks(backend, tmp_path / "plain", **flags)) == [0, 0]
    assert forkserver.read_steps(folder) == forkserver.read_steps(tmp_path / "plain")
    lines, plain = (runs.read_lines(run / "validation.jsonl") for run in (folder, tmp_path / "plain"))
    assert [line["loss"] for line in lines] == [line["loss"] for line in plain]
    # the EMA's validation loss is that of a run that starts from the saved EMA
    second = {**flags, "transformer_path": folder / last / "transformer_ema", "max_train_steps": 1}
    assert exit_codes(backend_runs.run_ranks(backend, tmp_path / "other", **second)) == [0, 0]
    assert lines[-1]["ema_loss"] == runs.read_lines(tmp_path / "other" / "validation.jsonl")[0]["loss"]
    assert lines[-1]["ema_loss"] != lines[-1]["loss"]

    shutil.rmtree(folder / "gathered")
    ranks = backend_runs.run_ranks(
        backend, folder, entry_point=entry_point, resume_from_checkpoint=folder / half, **ema_flags
    )
    assert exit_codes(ranks) == [0, 0], output_of(ranks)
    check_equal(runs.read_weights(folder / last / "transformer_ema"), ema_weights)
    (superseded,) = folder.glob("superseded-*")
    assert forkserver.read_steps(superseded) == [
        line for line in forkserver.read_steps(folder) if line["step"] > STEPS // 2
    ]
    resumed = [line for line in runs.read_lines(folder / "validation.jsonl") if line["step"] > STEPS // 2]
    assert resumed == runs.read_lines(superseded / "validation.jsonl")
    assert not (folder / "transformer_ema-superseded").exists()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", *SHARDED_BACKENDS])
def test_every_backends_ema_equals_that_of_the_gathered_weights(
    wan: BackendRuns, tmp_path: Path, backend: str
) -> None:
    check_backend(wan, backend, tmp_path)


@pytest.mark.slow
def test_ema_under_fsdp1_without_resharding_after_forward(
    wan: BackendRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [flag.replace("FULL_SHARD", "SHARD_GRAD_OP") for flag in LAUNCH_FLAGS["fsdp1"]]
    monkeypatch.setitem(LAUNCH_FLAGS, "fsdp1", flags)
    check_backend(wan, "fsdp1", tmp_path)


@pytest.mark.slow
def test_ema_under_zero3_without_persistent_parameters(
    wan: BackendRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests' small models are below the size up to which ZeRO-3 keeps parameters gathered between steps."""
    used = Path(LAUNCH_FLAGS["zero3"][-1])
    settings = json.loads(used.read_text(encoding="utf-8"))
    settings["zero_optimization"] |= {"stage3_param_persistence_threshold": 0}
    (tmp_path / used.name).write_text(json.dumps(settings), encoding="utf-8")
    monkeypatch.setitem(LAUNCH_FLAGS, "zero3", [*LAUNCH_FLAGS["zero3"][:-1], str(tmp_path / used.name)])
    check_backend(wan, "zero3", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", *SHARDED_BACKENDS])
def test_frozen_weights_equal_their_ema(wan: BackendRuns, tmp_path: Path, backend: str) -> None:
    entry_point, flags = "tests.optim.test_ema:train_and_gather", {**EMA, "trainable_modules": ["attn1"]}
    ranks = wan.run_ranks(backend, tmp_path / "run", entry_point=entry_point, **flags)
    assert exit_codes(ranks) == [0, 0], output_of(ranks)
    begin = runs.read_weights(wan.model / "transformer")
    ema_weights = runs.read_weights(tmp_path / "run" / f"checkpoint-{STEPS}" / "transformer_ema")
    check_equal(ema_weights, expected_ema(begin, tmp_path / "run", range(1, STEPS + 1)))
    half = tmp_path / "run" / f"checkpoint-{STEPS // 2}"
    ranks = wan.run_ranks(backend, tmp_path / "run", resume_from_checkpoint=half, **flags)
    assert exit_codes(ranks) == [0, 0], output_of(ranks)
    check_equal(runs.read_weights(tmp_path / "run" / f"checkpoint-{STEPS}" / "transformer_ema"), ema_weights)
    moved = {name for name in begin if not torch.equal(ema_weights[name], begin[name])}
    assert moved == {name for name in begin if "attn1" in name}


@pytest.mark.slow
@pytest.mark.parametrize("backend", SHARDED_BACKENDS)
@pytest.mark.parametrize("world_size", [1, 4])
def test_ema_resumes_at_another_world_size(wan: BackendRuns, tmp_path: Path, backend: str, world_size: int) -> None:
    entry_point, folder = "tests.optim.test_ema:train_and_gather", tmp_path / "run"
    flags = {**EMA, "gradient_accumulation_steps": 2}
    assert exit_codes(wan.run_ranks(backend, folder, entry_point=entry_point, **flags)) == [0, 0]
    half = shutil.copytree(folder / f"checkpoint-{STEPS // 2}", tmp_path / "half" / f"checkpoint-{STEPS // 2}")
    shutil.rmtree(folder / "gathered")
    ranks = wan.run_ranks(backend, folder, world_size, entry_point=entry_point, resume_from_checkpoint=half, **flags)
    assert exit_codes(ranks) == [0] * world_size, output_of(ranks)
    begin = runs.read_weights(half / "transformer_ema")
    actual = runs.read_weights(folder / f"checkpoint-{STEPS}" / "transformer_ema")
    check_equal(actual, expected_ema(begin, folder, range(STEPS // 2 + 1, STEPS + 1)))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["zero2", "fsdp2"])
def test_a_skipped_step_does_not_change_the_ema(wan: BackendRuns, tmp_path: Path, backend: str) -> None:
    entry_point = "launches:train_with_infinite_loss"
    ranks = wan.run_ranks(backend, tmp_path / "run", entry_point=entry_point, **EMA)
    assert exit_codes(ranks) == [0, 0], output_of(ranks)
    text = (tmp_path / "run" / f"checkpoint-{STEPS}" / "transformer_ema" / "ema.json").read_text(encoding="utf-8")
    assert json.loads(text)["updates"] == STEPS - 1


def train_with_one_full_disk_error() -> int:
    """Entry point of a rank: train; the first save of the EMA fails with a full disk, after the checkpoint's other
    files.
    """
    save, calls = videox.weights.format.save_weights, iter(range(1, 100))

    def fail_once(folder: Path, weights: Iterator[tuple[str, torch.Tensor]], config: str) -> None:
        if next(calls) == 1:
            next(weights)  # all ranks gather one tensor before the error
            raise OSError(errno.ENOSPC, "No space left on device")
        save(folder, weights, config)

    videox.weights.format.save_weights = fail_once
    return runs.train_script().main()


@pytest.mark.slow
@pytest.mark.parametrize("backend", SHARDED_BACKENDS)
def test_a_failed_ema_save_does_not_change_the_training(wan: BackendRuns, tmp_path: Path, backend: str) -> None:
    ranks = wan.run_ranks(
        backend, tmp_path / "run", entry_point="tests.optim.test_ema:train_with_one_full_disk_error", **EMA
    )
    assert exit_codes(ranks) == [0, 0], output_of(ranks)
    assert f"no checkpoint at step {STEPS // 2}" in ranks[0].output()
    assert exit_codes(wan.run_ranks(backend, tmp_path / "plain", **EMA)) == [0, 0]
    assert forkserver.read_steps(tmp_path / "run") == forkserver.read_steps(tmp_path / "plain")
    first, second = (run / f"checkpoint-{STEPS}" / "transformer_ema" for run in (tmp_path / "run", tmp_path / "plain"))
    check_equal(runs.read_weights(first), runs.read_weights(second))
