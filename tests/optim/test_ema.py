"""Serves who samples from the averaged weights: the EMA is that of the float32 masters, exactly, in every backend.

What it should be is computed here, from the weights that the engine gathers after every step.
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
DECAY = 0.25  # reached in the fourth update: 4 / 13 is above it
EMA = {"use_ema": True, "ema_decay": DECAY}


# -------------------------------------------------------------------------------------------------- the mathematics


@given(st.integers(1, 10**7), st.floats(0, 1))
def test_the_decay_is_that_of_diffusers(update: int, decay: float) -> None:
    theirs = EMAModel([torch.nn.Parameter(torch.zeros(1))], decay=decay)
    assert decay_of(update, decay) == pytest.approx(theirs.get_decay(update), abs=1e-15)


def decay_of(update: int, decay: float) -> float:
    return decay_at(torch.tensor(float(update), dtype=torch.float64), decay).item()


def live(tensors: dict[str, torch.Tensor], publish: Callable[[], object] = lambda: None) -> Fp32Params:
    return Fp32Params(
        tuple(tensors), tensors.__getitem__, lambda name, new: tensors[name].copy_(new), after_swap=publish
    )


def weights_at(step: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=draw) for name, shape in (("a", (7, 3)), ("b", (0,)), ("c", (11,)))}


@pytest.mark.parametrize("chunk", [1, 20, 2**26])
def test_the_average_is_that_of_diffusers(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(videox.optim.ema, "CHUNK", chunk)
    weights = weights_at(0)
    ours, parameters = Ema(live(weights), decay=0.4), [torch.nn.Parameter(w.clone()) for w in weights.values()]
    theirs = EMAModel(parameters, decay=0.4)
    for step in range(1, 12):
        for name, parameter in zip(weights, parameters, strict=True):
            weights[name].copy_(weights_at(step)[name])
            parameter.data.copy_(weights[name])
        ours.update(torch.tensor(True))
        theirs.step(parameters)
        for part, shadow in zip(ours.shards.values(), theirs.shadow_params, strict=True):
            assert torch.allclose(part, shadow, atol=1e-6)
    assert ours.updates == 11


def test_steps_that_bfloat16_cannot_hold_move_the_average() -> None:
    weights = {"a": torch.ones(4)}
    ema = Ema(live(weights), decay=0.999)
    for _ in range(3000):
        weights["a"] += 1e-6
        ema.update(torch.tensor(True))
    assert torch.all(ema.shards["a"] > 1.001) and torch.equal(
        torch.ones(4).bfloat16() + 1e-6, torch.ones(4).bfloat16()
    )


def test_average_and_weights_change_places_and_back() -> None:
    published: list[torch.Tensor] = []
    weights = weights_at(0)
    ema = Ema(live(weights, lambda: published.append(weights["a"].clone())), decay=0.9)
    weights["a"].copy_(weights_at(1)["a"])
    before, average = weights_at(1)["a"], ema.shards["a"].clone()
    with ema.swapped():
        assert torch.equal(weights["a"], average) and not torch.equal(average, before)
    assert torch.equal(weights["a"], before) and torch.equal(ema.shards["a"], average)
    assert torch.equal(published[0], average) and torch.equal(published[1], before)
    with pytest.raises(ZeroDivisionError), ema.swapped():
        _ = 1 / 0
    assert torch.equal(weights["a"], before) and torch.equal(ema.shards["a"], average)
    assert len(published) == 3  # other processes may wait elsewhere: nothing collective after an exception


# --------------------------------------------------------------------------------------------------- what it should be


def train_and_gather() -> int:
    """Trains, and keeps the whole float32 weights after each step that was taken in output_dir/gathered."""
    update_alone, folder = EmaEngine.update, runs.output_dir_of(sys.argv) / "gathered"

    def update(self: EmaEngine, **settings: object) -> Update:
        made = update_alone(self, **settings)
        whole = {name: tensor.detach().clone() for name, tensor in self.weights()}
        if self.is_main and made.applied:
            folder.mkdir(exist_ok=True)
            save_file(whole, folder / f"{len(list(folder.iterdir())) + 1}.safetensors")
        return made

    EmaEngine.update = update
    return runs.train_script().main()


def expected(begin: dict[str, torch.Tensor], folder: Path, updates: range) -> dict[str, torch.Tensor]:
    """Returns the average that begins as `begin` and sees the gathered weights of these updates."""
    average = {name: tensor.clone() for name, tensor in begin.items()}
    for number, update in enumerate(updates, 1):
        weights = load_file(folder / "gathered" / f"{number}.safetensors")
        assert weights.keys() == average.keys()
        for name, tensor in average.items():
            tensor.lerp_(weights[name], 1 - decay_of(update, DECAY))
    return average


def check_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


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
def alone(wan: BackendRuns) -> runs.Outcome:
    """A run with everything that a checkpoint per step shows."""
    asked = {**EMA, "checkpointing_steps": 1, "gradient_accumulation_steps": 2, "validate_ema": True}
    outcome = runs.train(wan.flags(wan.folder / "averaged", **asked))
    assert outcome.code == 0, outcome.stderr
    return outcome


def test_one_process_averages_its_masters(wan: BackendRuns, alone: runs.Outcome) -> None:
    average = runs.read_weights(wan.model / "transformer")
    for step in range(1, STEPS + 1):
        weights = alone.weights(f"checkpoint-{step}/transformer")
        for name, tensor in average.items():
            tensor.lerp_(weights[name], 1 - decay_of(step, DECAY))
        check_equal(alone.weights(f"checkpoint-{step}/transformer_ema"), average)
    last = alone.folder / f"checkpoint-{STEPS}"
    seen = json.loads((last / "transformer_ema" / "ema.json").read_text(encoding="utf-8"))
    assert seen == {"updates": STEPS, "decay": DECAY}
    check_loads(last / "transformer_ema", torch.float32)
    exported = alone.weights("transformer_ema")
    assert all(torch.equal(exported[name], average[name].to(t.dtype)) for name, t in exported.items())
    assert {t.dtype for t in exported.values()} == {torch.float32, torch.bfloat16}
    check_loads(alone.folder / "transformer_ema", torch.bfloat16)


def test_an_average_changes_nothing_else(wan: BackendRuns, alone: runs.Outcome) -> None:
    assert forkserver.read_steps(alone.folder) == forkserver.read_steps(wan.baseline)
    plain = runs.read_lines(wan.baseline / "validation.jsonl")
    assert [(line["step"], line["loss"]) for line in alone.validation] == [
        (line["step"], line["loss"]) for line in plain
    ]
    assert alone.validation[0]["ema_loss"] == alone.validation[0]["loss"]
    assert alone.validation[-1]["ema_loss"] != alone.validation[-1]["loss"]
    assert not (wan.baseline / "transformer_ema").exists()
    one, other = (runs.read_weights(run / "transformer") for run in (wan.baseline, alone.folder))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_average_is_resumed_begun_late_and_left(wan: BackendRuns, alone: runs.Outcome, tmp_path: Path) -> None:
    folder = shutil.copytree(alone.folder, tmp_path / "run")
    asked = {"gradient_accumulation_steps": 2, "checkpointing_steps": 1}

    def resume(step: int, **changes: object) -> runs.Outcome:
        path = folder / f"checkpoint-{step}"
        outcome = runs.train(wan.flags(folder, resume_from_checkpoint=path, **asked, **changes))
        assert outcome.code == 0, outcome.stderr
        return outcome

    again = resume(2, **EMA)
    for name in ("transformer_ema", f"checkpoint-{STEPS}/transformer_ema"):
        files = {path.name: path.read_bytes() for path in (folder / name).iterdir()}
        assert files == {path.name: path.read_bytes() for path in (alone.folder / name).iterdir()}
    assert "EMA" not in again.stdout
    left = resume(2)
    assert "--use_ema is not set: the EMA of checkpoint-2 is not continued" in left.stdout
    assert not (folder / f"checkpoint-{STEPS}" / "transformer_ema").exists()
    late = resume(3, **EMA)
    assert "--use_ema: checkpoint-3 has no EMA; it starts here from the loaded weights" in late.stdout
    # its first update takes the weights as they are
    check_equal(late.weights("checkpoint-4/transformer_ema"), late.weights("checkpoint-4/transformer"))
    assert late.losses == alone.losses


def test_validation_measures_the_average_and_samples_with_it(wan: BackendRuns, tmp_path: Path) -> None:
    """A run that begins with the average measures and samples, at its first step, what the average was found to be."""
    asked = {"validation_prompts": ["a red fox"], "max_train_steps": 1, "lr_warmup_steps": 0}
    averaged = {**asked, "use_ema": True, "validate_ema": True, "max_train_steps": 2}
    one = runs.train(wan.flags(tmp_path / "one", **averaged))
    begins = {"transformer_path": one.folder / "checkpoint-2" / "transformer_ema"}
    other = runs.train(wan.flags(tmp_path / "other", **asked, **begins))
    assert (one.code, other.code) == (0, 0), one.stderr + other.stderr
    assert one.validation[-1]["ema_loss"] == other.validation[0]["loss"] != one.validation[-1]["loss"]
    assert one.validation[-1]["ema_per_sigma"] == other.validation[0]["per_sigma"]
    clips = [
        run.folder / "samples" / f"step-{step:06d}-prompt-0.mp4" for run, step in ((one, 2), (other, 0), (one, 0))
    ]
    assert clips[0].read_bytes() == clips[1].read_bytes() != clips[2].read_bytes()
    assert f"with the EMA {one.validation[-1]['ema_loss']:.4f}" in one.stdout + one.stderr


@pytest.mark.parametrize("place", ["accelerator", "cpu"])
def test_the_average_is_kept_where_it_was_asked_for(
    wan: BackendRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    asked: list[torch.device | None] = []

    class Noted(Ema):
        def __init__(self, fp32_params: Fp32Params, *, decay: float, device: torch.device | None = None) -> None:
            asked.append(device)
            super().__init__(fp32_params, decay=decay, device=device)

    monkeypatch.setattr(videox.engine.ema, "Ema", Noted)
    outcome = runs.train(wan.flags(tmp_path, use_ema=True, ema_device=place, max_train_steps=1))
    assert outcome.code == 0, outcome.stderr
    assert asked == [torch.device("cpu") if place == "cpu" else None]


def test_parts_that_are_read_as_copies_are_averaged_and_exchanged_alike() -> None:
    """As where the average lies on another device than the weights, or DeepSpeed hands out copies."""
    weights = [weights_at(0), weights_at(0)]
    copied = Fp32Params(
        tuple(weights[1]), lambda name: weights[1][name].clone(), lambda name, new: weights[1][name].copy_(new)
    )
    averages = [Ema(live(weights[0]), decay=0.4), Ema(copied, decay=0.4)]
    for step in range(1, 4):
        for tensors, average in zip(weights, averages, strict=True):
            for name, tensor in tensors.items():
                tensor.copy_(weights_at(step)[name])
            average.update(torch.tensor(True))
            with average.swapped():
                assert not torch.equal(tensors["a"], weights_at(step)["a"]) or step == 1
            assert all(torch.equal(tensor, weights_at(step)[name]) for name, tensor in tensors.items())
    assert all(torch.equal(averages[0].shards[name], part) for name, part in averages[1].shards.items())


# ----------------------------------------------------------------------------------------------------- many processes


def check_backend(ground: BackendRuns, backend: str, tmp_path: Path, **asked: object) -> None:
    """Checks average, files, validation and resume of two processes."""
    work, folder = "tests.optim.test_ema:train_and_gather", tmp_path / "run"
    averaged = {**EMA, "validate_ema": True, **asked}
    ranks = ground.run_ranks(backend, folder, entry_point=work, **averaged)
    assert exit_codes(ranks) == [0, 0], output_of(ranks)
    last, half = (f"checkpoint-{step}" for step in (STEPS, STEPS // 2))
    begin = runs.read_weights(ground.model / "transformer")
    average = runs.read_weights(folder / last / "transformer_ema")
    check_equal(average, expected(begin, folder, range(1, STEPS + 1)))
    assert verify(folder / last, hashes=True) == []
    check_loads(folder / last / "transformer_ema", torch.float32)
    exported = runs.read_weights(folder / "transformer_ema")
    assert all(torch.equal(tensor, average[name].to(tensor.dtype)) for name, tensor in exported.items())

    # training and its validation are those of a run without an average
    assert exit_codes(ground.run_ranks(backend, tmp_path / "plain", **asked)) == [0, 0]
    assert forkserver.read_steps(folder) == forkserver.read_steps(tmp_path / "plain")
    lines, plain = (runs.read_lines(run / "validation.jsonl") for run in (folder, tmp_path / "plain"))
    assert [line["loss"] for line in lines] == [line["loss"] for line in plain]
    # and what the average was measured to be is what a run that begins with it measures
    other = {**asked, "transformer_path": folder / last / "transformer_ema", "max_train_steps": 1}
    assert exit_codes(ground.run_ranks(backend, tmp_path / "other", **other)) == [0, 0]
    assert lines[-1]["ema_loss"] == runs.read_lines(tmp_path / "other" / "validation.jsonl")[0]["loss"]
    assert lines[-1]["ema_loss"] != lines[-1]["loss"]

    shutil.rmtree(folder / "gathered")
    ranks = ground.run_ranks(backend, folder, entry_point=work, resume_from_checkpoint=folder / half, **averaged)
    assert exit_codes(ranks) == [0, 0], output_of(ranks)
    check_equal(runs.read_weights(folder / last / "transformer_ema"), average)
    (superseded,) = folder.glob("superseded-*")
    assert forkserver.read_steps(superseded) == [line for line in forkserver.read_steps(folder) if line["step"] > STEPS // 2]
    again = [line for line in runs.read_lines(folder / "validation.jsonl") if line["step"] > STEPS // 2]
    assert again == runs.read_lines(superseded / "validation.jsonl")
    assert not (folder / "transformer_ema-superseded").exists()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", *SHARDED_BACKENDS])
def test_every_backend_averages_what_it_gathers(wan: BackendRuns, tmp_path: Path, backend: str) -> None:
    check_backend(wan, backend, tmp_path)


@pytest.mark.slow
def test_fsdp1_averages_what_it_keeps_whole_after_a_forward_pass(
    wan: BackendRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [flag.replace("FULL_SHARD", "SHARD_GRAD_OP") for flag in LAUNCH_FLAGS["fsdp1"]]
    monkeypatch.setitem(LAUNCH_FLAGS, "fsdp1", flags)
    check_backend(wan, "fsdp1", tmp_path)


@pytest.mark.slow
def test_zero3_averages_what_it_keeps_in_pieces(
    wan: BackendRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The small models of the tests lie below the size up to which ZeRO-3 keeps weights whole between steps."""
    used = Path(LAUNCH_FLAGS["zero3"][-1])
    settings = json.loads(used.read_text(encoding="utf-8"))
    settings["zero_optimization"] |= {"stage3_param_persistence_threshold": 0}
    (tmp_path / used.name).write_text(json.dumps(settings), encoding="utf-8")
    monkeypatch.setitem(LAUNCH_FLAGS, "zero3", [*LAUNCH_FLAGS["zero3"][:-1], str(tmp_path / used.name)])
    check_backend(wan, "zero3", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", *SHARDED_BACKENDS])
def test_frozen_weights_are_their_own_average(wan: BackendRuns, tmp_path: Path, backend: str) -> None:
    work, asked = "tests.optim.test_ema:train_and_gather", {**EMA, "trainable_modules": ["attn1"]}
    ranks = wan.run_ranks(backend, tmp_path / "run", entry_point=work, **asked)
    assert exit_codes(ranks) == [0, 0], output_of(ranks)
    begin = runs.read_weights(wan.model / "transformer")
    average = runs.read_weights(tmp_path / "run" / f"checkpoint-{STEPS}" / "transformer_ema")
    check_equal(average, expected(begin, tmp_path / "run", range(1, STEPS + 1)))
    half = tmp_path / "run" / f"checkpoint-{STEPS // 2}"
    ranks = wan.run_ranks(backend, tmp_path / "run", resume_from_checkpoint=half, **asked)
    assert exit_codes(ranks) == [0, 0], output_of(ranks)
    check_equal(runs.read_weights(tmp_path / "run" / f"checkpoint-{STEPS}" / "transformer_ema"), average)
    moved = {name for name in begin if not torch.equal(average[name], begin[name])}
    assert moved == {name for name in begin if "attn1" in name}


@pytest.mark.slow
@pytest.mark.parametrize("backend", SHARDED_BACKENDS)
@pytest.mark.parametrize("world_size", [1, 4])
def test_an_average_goes_on_at_another_number_of_processes(
    wan: BackendRuns, tmp_path: Path, backend: str, world_size: int
) -> None:
    work, folder = "tests.optim.test_ema:train_and_gather", tmp_path / "run"
    asked = {**EMA, "gradient_accumulation_steps": 2}
    assert exit_codes(wan.run_ranks(backend, folder, entry_point=work, **asked)) == [0, 0]
    half = shutil.copytree(folder / f"checkpoint-{STEPS // 2}", tmp_path / "half" / f"checkpoint-{STEPS // 2}")
    shutil.rmtree(folder / "gathered")
    ranks = wan.run_ranks(backend, folder, world_size, entry_point=work, resume_from_checkpoint=half, **asked)
    assert exit_codes(ranks) == [0] * world_size, output_of(ranks)
    begin = runs.read_weights(half / "transformer_ema")
    found = runs.read_weights(folder / f"checkpoint-{STEPS}" / "transformer_ema")
    check_equal(found, expected(begin, folder, range(STEPS // 2 + 1, STEPS + 1)))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["zero2", "fsdp2"])
def test_a_step_that_is_left_does_not_move_the_average(wan: BackendRuns, tmp_path: Path, backend: str) -> None:
    work = "launches:train_with_infinite_loss"
    ranks = wan.run_ranks(backend, tmp_path / "run", entry_point=work, **EMA)
    assert exit_codes(ranks) == [0, 0], output_of(ranks)
    text = (tmp_path / "run" / f"checkpoint-{STEPS}" / "transformer_ema" / "ema.json").read_text(encoding="utf-8")
    assert json.loads(text)["updates"] == STEPS - 1


def train_with_a_disk_that_is_full_once() -> int:
    """Trains where the first average that is saved meets a full disk, after the checkpoint's other files."""
    save, calls = videox.weights.format.save_weights, iter(range(1, 100))

    def full_once(folder: Path, weights: Iterator[tuple[str, torch.Tensor]], config: str) -> None:
        if next(calls) == 1:
            next(weights)  # one tensor is gathered by all
            raise OSError(errno.ENOSPC, "No space left on device")
        save(folder, weights, config)

    videox.weights.format.save_weights = full_once
    return runs.train_script().main()


@pytest.mark.slow
@pytest.mark.parametrize("backend", SHARDED_BACKENDS)
def test_an_average_that_cannot_be_written_disturbs_nothing(wan: BackendRuns, tmp_path: Path, backend: str) -> None:
    ranks = wan.run_ranks(
        backend, tmp_path / "run", entry_point="tests.optim.test_ema:train_with_a_disk_that_is_full_once", **EMA
    )
    assert exit_codes(ranks) == [0, 0], output_of(ranks)
    assert f"no checkpoint at step {STEPS // 2}" in ranks[0].output()
    assert exit_codes(wan.run_ranks(backend, tmp_path / "plain", **EMA)) == [0, 0]
    assert forkserver.read_steps(tmp_path / "run") == forkserver.read_steps(tmp_path / "plain")
    one, other = (run / f"checkpoint-{STEPS}" / "transformer_ema" for run in (tmp_path / "run", tmp_path / "plain"))
    check_equal(runs.read_weights(one), runs.read_weights(other))
