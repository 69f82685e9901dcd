"""Serves who has less memory than AdamW asks for: what each optimizer keeps, where it works, and that it resumes."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

import forkserver
import pytest
import runs
import tiny
import torch
from test_backends import Ground

import videox.optimizers
from videox.distributed import BACKENDS
from videox.errors import Refusal
from videox.optim import make_optimizer, set_learning_rate
from videox.optimizers import OPTIMIZERS, refuse_unfit

ADAM = {"betas": (0.9, 0.999), "weight_decay": 0.0, "epsilon": 1e-8}
WHOLE = [name for name in OPTIMIZERS if name != "adamw"]


# ----------------------------------------------------------------------------------------------------- what is refused


def refused(wan: Ground, folder: Path, **changes: object) -> str:
    outcome = runs.train(wan.flags(folder, **changes))
    assert outcome.code != 0 and outcome.stderr.count("\n") == 1, outcome.stderr
    return outcome.stderr


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground(tmp_path_factory.mktemp("wan"), "wan2.1 normal", 4)


def test_an_unknown_optimizer_and_two_at_once_are_refused(wan: Ground, tmp_path: Path) -> None:
    line = refused(wan, tmp_path, optimizer="adam")
    assert all(name in line for name in OPTIMIZERS)
    line = refused(wan, tmp_path, use_8bit_adam=True, use_came=True)
    assert "--use_8bit_adam and --use_came ask for two optimizers" in line
    line = refused(wan, tmp_path, use_came=True, optimizer="adamw_bf16")
    assert "--optimizer and --use_came ask for two optimizers" in line
    line = refused(wan, tmp_path, optimizer="adamw_bf16", mixed_precision="no")
    assert "--mixed_precision bf16" in line
    line = refused(wan, tmp_path, optimizer="adamw_bf16", lora_rank=4)
    assert "a LoRA's are float32" in line


def test_a_missing_package_is_named_with_the_line_that_installs_it(
    wan: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(videox.optimizers, "find_spec", lambda module: None)
    line = refused(wan, tmp_path, use_8bit_adam=True)
    assert "adamw8bit needs bitsandbytes, which is not installed. Mend: pip install bitsandbytes==" in line


def test_the_packages_are_pinned_as_an_extra() -> None:
    project = tomllib.loads((tiny.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = {optimizer.package for optimizer in OPTIMIZERS.values() if optimizer.package}
    assert set(project["optional-dependencies"]["optimizers"]) == pinned


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_backend_has_some_optimizers(name: str, backend: object) -> None:
    if backend.kind in OPTIMIZERS[name].kinds:
        refuse_unfit(name, backend.kind, "bf16", lora=False)
        return
    with pytest.raises(Refusal, match=f"{name} trains whole weights.* give adamw here") as no:
        refuse_unfit(name, backend.kind, "bf16", lora=False)
    assert no.value.exit_code == 2


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["zero2", "zero3", "fsdp1", "fsdp2"])
def test_a_launch_that_divides_the_weights_refuses_them_before_it_loads(
    wan: Ground, tmp_path: Path, backend: str
) -> None:
    ranks = wan.ranks(backend, tmp_path / "run", 1, use_8bit_adam=True)
    assert "--optimizer: adamw8bit trains whole weights" in ranks[0].complaint()


# ------------------------------------------------------------------------------------------------------ how they step


def moved(name: str, weights: torch.Tensor, steps: int, rate: float) -> torch.Tensor:
    """Returns how far each weight has gone against a gradient of 1, in float64."""
    parameter = torch.nn.Parameter(weights.clone())
    optimizer = make_optimizer([{"params": [parameter], "rate_factor": 1.0}], learning_rate=rate, name=name, **ADAM)
    parameter.grad = torch.ones_like(parameter)
    for step in range(steps):
        torch.manual_seed(step)
        set_learning_rate(optimizer, rate)
        optimizer.step()
    return (weights.double() - parameter.detach().double()) / (steps * rate)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw_bf16", "adamw8bit_bf16"])
def test_rounding_at_random_keeps_small_steps_on_average(name: str) -> None:
    weights = (0.02 * torch.randn(8192, generator=torch.Generator().manual_seed(0))).bfloat16()
    rounded = moved(name, weights, 10_000, 2e-6)
    nearest = moved("adamw", weights, 10_000, 2e-6)
    assert rounded.mean().item() == pytest.approx(1, abs=0.01)
    print("kept by rounding at random, to the nearest:", rounded.mean().item(), nearest.mean().item())
    assert nearest.mean().item() < 0.3


@pytest.mark.parametrize("name", ["adamw8bit", "came"])
def test_an_optimizer_of_float32_weights_finds_what_it_is_to_learn(name: str) -> None:
    draw = torch.Generator().manual_seed(0)
    inputs, wanted = torch.randn(256, 64, generator=draw), torch.randn(64, 128, generator=draw)
    weights = torch.nn.Parameter(torch.zeros(64, 128))
    optimizer = make_optimizer([{"params": [weights], "rate_factor": 1.0}], learning_rate=3e-2, name=name, **ADAM)
    for step in range(400):
        set_learning_rate(optimizer, 3e-2 * (1 - step / 400))
        optimizer.zero_grad()
        (inputs @ (weights - wanted)).square().mean().backward()
        optimizer.step()
    assert float((weights.detach() - wanted).norm() / wanted.norm()) < 0.1


@pytest.mark.parametrize(("flag", "name"), [("use_8bit_adam", "adamw8bit"), ("use_came", "came")])
def test_two_names_of_one_optimizer_train_alike(wan: Ground, tmp_path: Path, flag: str, name: str) -> None:
    for folder, asked in (("flag", {flag: True}), ("name", {"optimizer": name})):
        outcome = runs.train(wan.flags(tmp_path / folder, max_train_steps=3, gradient_accumulation_steps=2, **asked))
        assert outcome.code == 0, outcome.stderr
    one, other = (forkserver.steps(tmp_path / folder) for folder in ("flag", "name"))
    assert one == other != forkserver.steps(wan.alone)[:3]


# ---------------------------------------------------------------------------------------------------- and they resume

# large enough that moments are kept in eight bits, in few shapes: torchao compiles its step for each
SIZES = {"heads": 4, "head_dim": 16, "ffn_dim": 128}


def check_resumed(name: str, folder: Path, metadata: Path, model: Path) -> None:
    asked = {"optimizer": name, "max_train_steps": 4, "checkpointing_steps": 2, "num_train_epochs": None}
    asked |= {"trainable_modules": ["attn1.to_q.weight"], "learning_rate": "1e-3"}

    def train(**changes: object) -> runs.Outcome:
        outcome = runs.train(runs.plain("wan2.1", model, metadata, folder / "run", **asked, **changes))
        assert outcome.code == 0, outcome.stderr
        return outcome

    train()
    unbroken = shutil.copytree(folder / "run", folder / "unbroken")
    train(resume_from_checkpoint=folder / "run" / "checkpoint-2")
    assert forkserver.steps(folder / "run") == forkserver.steps(unbroken)
    for place in ("checkpoint-4/transformer", "checkpoint-4/optimizer", "transformer"):
        one, other = (runs.read_weights(path / place) for path in (folder / "run", unbroken))
        assert one.keys() == other.keys() and one
        assert [key for key in one if not torch.equal(one[key], other[key])] == [], place
    before = runs.read_weights(model / "transformer")
    after = runs.read_weights(unbroken / "checkpoint-4" / "transformer")
    changed = {key for key in before if not torch.equal(before[key].to(after[key].dtype), after[key])}
    assert changed == {key for key in before if "attn1.to_q.weight" in key}
    dtype = torch.float32 if OPTIMIZERS[name].masters else torch.bfloat16
    assert {after[key].dtype for key in changed} == {dtype}
    kept = runs.read_weights(unbroken / "checkpoint-4" / "optimizer").values()
    assert (torch.uint8 in {tensor.dtype for tensor in kept}) is ("8bit" in name)


@pytest.mark.parametrize(
    "name", [name if name in ("adamw8bit", "came") else pytest.param(name, marks=pytest.mark.slow) for name in WHOLE]
)
def test_a_resumed_run_goes_on_to_the_bit(tmp_path: Path, name: str) -> None:
    model = tiny.build_wan_t2v(tmp_path / "model", **SIZES)
    check_resumed(name, tmp_path, tiny.make_dataset(tmp_path / "data", copies=2), model)


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_processes_stay_alike(wan: Ground, tmp_path: Path, name: str) -> None:
    asked = {"optimizer": name, "trainable_modules": ["attn1.to_q.weight"]}
    ranks = wan.ranks("ddp", tmp_path / "run", work="test_optimizers:train_and_tell", **asked)
    assert [rank.code for rank in ranks] == [0, 0], ranks[0].said()[-3000:]
    one, other = (torch.load(tmp_path / "run" / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(one[key], other[key]) for key in one)


def train_and_tell() -> int:
    """Trains, and leaves this process's own weights in output_dir."""
    import os
    import sys

    from videox.engine import WholeEngine

    load_weights = WholeEngine.weights
    script = runs.script()
    made: list[WholeEngine] = []
    begin = WholeEngine.__init__

    def noted(self: WholeEngine, *arguments: object, **settings: object) -> None:
        begin(self, *arguments, **settings)
        made.append(self)

    WholeEngine.__init__ = noted
    code = script.main()
    folder = runs.output_dir_of(sys.argv)
    torch.save(dict(load_weights(made[0])), folder / f"rank-{os.environ['RANK']}.pt")
    return code
