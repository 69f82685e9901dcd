"""Tests of videox.optim.custom_class: the trial of optimizer classes, and runs with them under every backend."""

from __future__ import annotations

import importlib.util
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import forkserver
import pytest
import runs
import tiny
import torch
from launches import BackendRuns, exit_codes, output_of
from skips import skip_missing

import videox.optim.registry as registry
from videox.distributed.backends import BACKENDS
from videox.errors import UserError
from videox.optim.custom_class import check_settings, import_class, try_class
from videox.optim.registry import Optimizer, parse_settings

REPLICATED, EVERYWHERE = {"single", "ddp"}, {*BACKENDS}
FSDP = {*REPLICATED, "fsdp1", "fsdp2"}


def tried(name: str, rates: tuple[float, ...] = (1.0,), *, matrices_only: bool = False, **settings: Any) -> Optimizer:
    make = partial(import_class(name), **settings)
    return try_class(name, make, learning_rate=1e-4, rate_factors=rates, matrices_only=matrices_only)[0]


# ---------------------------------------------------------------------------------- optimizers with one peculiarity


class Plain(torch.optim.Optimizer):
    """Steps by the sign of a momentum; the classes below change one thing of it."""

    def __init__(self, params: Any, lr: float = 1e-3, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    momentum = state.setdefault("momentum", torch.zeros_like(parameter))
                    momentum.lerp_(parameter.grad, 1 - group["beta"])
                    parameter.sub_(group["lr"] * self.scale(group, parameter) * momentum.sign())

    def scale(self, group: dict[str, Any], parameter: torch.Tensor) -> float:
        return 1.0


class ByNorm(Plain):
    """Its step depends on the norm of the whole parameter, as LAMB's."""

    def scale(self, group: dict[str, Any], parameter: torch.Tensor) -> float:
        return float(parameter.norm()) + 0.1


class CountingGroups(Plain):
    """Stores the number of its steps in the groups, as Prodigy and ScheduleFree do."""

    def step(self) -> None:
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
        super().step()

    def scale(self, group: dict[str, Any], parameter: torch.Tensor) -> float:
        return 1.0 / group["k"]


class CountingSteps(CountingGroups):
    """Stores the number of its steps in an attribute, where no checkpoint can find it."""

    steps = 0

    def step(self) -> None:
        self.steps += 1
        Plain.step(self)

    def scale(self, group: dict[str, Any], parameter: torch.Tensor) -> float:
        return 1.0 / self.steps


class WithHistory(Plain):
    """Stores a list in the state."""

    def scale(self, group: dict[str, Any], parameter: torch.Tensor) -> float:
        self.state[parameter].setdefault("history", []).append(1.0)
        return 1.0


class WithRows(Plain):
    """Stores a tensor that has not the parameter's shape, and does not use it."""

    def scale(self, group: dict[str, Any], parameter: torch.Tensor) -> float:
        self.state[parameter]["quantiles"] = torch.zeros(256)
        return 1.0


class OverAll(Plain):
    """Has one step size for all parameters, estimated from all gradients, as Prodigy."""

    def step(self) -> None:
        total = sum(float(p.grad.abs().sum()) for group in self.param_groups for p in group["params"])
        for group in self.param_groups:
            group["d"] = group.get("d", 0.0) + total
        super().step()


class WithModes(Plain):
    def train(self) -> None: ...

    def eval(self) -> None: ...


class ToInfinity(Plain):
    def scale(self, group: dict[str, Any], parameter: torch.Tensor) -> float:
        return math.inf


class WithoutRate(torch.optim.SGD):
    def __init__(self, params: Any, momentum: float = 0.0) -> None:
        super().__init__(params, lr=1.0, momentum=momentum)


def of_this_file(kind: type) -> str:
    return f"{__name__}.{kind.__name__}"


# ----------------------------------------------------------------------------------------------------------- the trial


@pytest.mark.parametrize(
    ("name", "settings", "expected", "bytes_per_parameter"),
    [
        ("torch.optim.RAdam", {}, EVERYWHERE, 16),
        ("torch.optim.SGD", {"momentum": 0.9}, EVERYWHERE, 12),
        ("torch.optim.SGD", {}, EVERYWHERE, 8),
        ("torch.optim.Adafactor", {}, REPLICATED, 9),
        ("bitsandbytes.optim.LAMB", {}, REPLICATED, 17),
        (of_this_file(Plain), {}, EVERYWHERE, 12),
        (of_this_file(ByNorm), {}, REPLICATED, 12),
        (of_this_file(CountingGroups), {}, FSDP, 12),
        (of_this_file(WithRows), {}, FSDP, 13),
        (of_this_file(OverAll), {}, REPLICATED, 12),
    ],
)
def test_the_trial_finds_out_where_a_class_works(
    name: str, settings: dict[str, Any], expected: set[str], bytes_per_parameter: int
) -> None:
    kind = tried(name, **settings)
    assert {*kind.backends} == expected and bool(kind.reason) is (expected != EVERYWHERE)
    assert kind.bytes_per_parameter == bytes_per_parameter
    assert tried(name, (1.0, 16.0), **settings).backends == kind.backends


def test_values_of_groups_that_steps_change_are_saved() -> None:
    assert tried(of_this_file(Plain)).group_state == ()
    assert tried(of_this_file(CountingGroups)).group_state == ("k",)
    if importlib.util.find_spec("prodigyopt") is None:
        skip_missing("prodigyopt", "what a checkpoint contains of Prodigy")
    assert {*tried("prodigyopt.Prodigy").group_state} >= {*registry.OPTIMIZERS["prodigy"].group_state}
    assert {*tried("prodigyopt.Prodigy").backends} == REPLICATED
    with pytest.raises(UserError, match="Setting different lr values in different parameter groups"):
        tried("prodigyopt.Prodigy", (1.0, 16.0))


def test_matrices_alone_suffice_for_a_lora() -> None:
    assert {*tried("torch.optim.Muon", matrices_only=True).backends} == REPLICATED
    with pytest.raises(UserError, match=r"torch.optim.Muon fails on small parameters .*only supports 2D"):
        tried("torch.optim.Muon")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torch.optim.LBFGS", "missing 1 required positional argument: 'closure'"),
        ("torch.optim.SparseAdam", "does not support dense gradients"),
        ("torch.optim.Radam", r"torch.optim.Radam does not exist. Fix: try RAdam"),
        ("torch.nn.Linear", "is no subclass of torch.optim.Optimizer"),
        ("torch.optimizers.Adam", "torch.optimizers cannot be imported"),
        ("transformers.optimization.Adafactor", "Cannot combine manual `lr` and `relative_step=True`"),
        (of_this_file(CountingSteps), "does not resume bit-identically"),
        (of_this_file(WithHistory), "history of parameter 0 is a list"),
        (of_this_file(WithModes), "switches the weights between its train and eval modes"),
        (of_this_file(ToInfinity), "values that are not finite"),
    ],
)
def test_a_class_that_cannot_work_is_an_error_before_training(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        tried(name)
    assert refused.value.exit_code == 2 and refused.value.where == "--optimizer"


def test_settings_are_parsed_and_checked() -> None:
    words = ["betas=0.9,0.99", "eps=1e-9", "nesterov=true", "growth_rate=inf", "beta3=none", "mode=full"]
    assert parse_settings(words) == {
        "betas": (0.9, 0.99), "eps": 1e-9, "nesterov": True, "growth_rate": math.inf, "beta3": None, "mode": "full",
    }  # fmt: skip
    for words, message in (
        (["betas"], "not of the form key=value"),
        (["2=3"], "not of the form key=value"),
        (["lr=1"], "--learning_rate"),
        (["eps=1", "eps=2"], "eps is given twice"),
    ):
        with pytest.raises(UserError, match=message):
            parse_settings(words)
    with pytest.raises(UserError, match=r"beta is not a setting of torch.optim.RAdam. Fix: use betas, eps") as no:
        check_settings("torch.optim.RAdam", {"beta": 1})
    assert no.value.where == "--optimizer_args"
    with pytest.raises(UserError, match="has no learning rate lr"):
        check_settings(of_this_file(WithoutRate), {})


# ---------------------------------------------------------------------------------------------------------------- runs


def error_line(folder: Path, **changes: object) -> str:
    """Return the error line of a run, which ends before it looks for its model."""
    outcome = runs.train(runs.train_flags("wan2.1", folder / "none", folder / "none.json", folder / "run", **changes))
    assert outcome.code == 2 and outcome.stderr.count("\n") == 1, outcome.stderr
    return outcome.stderr


def test_flags_that_cannot_work_are_errors(tmp_path: Path) -> None:
    assert "use one of adamw, " in error_line(tmp_path, optimizer="radam")
    assert "there is no module lacking" in error_line(tmp_path, optimizer="lacking.Adam")
    assert "adamw has flags of its own" in error_line(tmp_path, optimizer_args=["eps=1"])
    assert "--loraplus_ratio: there is no LoRA without --lora_rank" in error_line(tmp_path, loraplus_ratio=16)
    assert "'eps' is not of the form" in error_line(tmp_path, optimizer="torch.optim.RAdam", optimizer_args=["eps"])


def require_package_of(name: str) -> None:
    if name == "prodigy" and importlib.util.find_spec("prodigyopt") is None:
        skip_missing("prodigyopt", "training with Prodigy")


SETTINGS: dict[str, dict[str, object]] = {
    "torch.optim.Adafactor": {"optimizer_args": ["weight_decay=0.1", "d=2.0"]},
    "torch.optim.RAdam": {"optimizer_args": ["betas=0.8,0.9"]},
    "prodigy": {"learning_rate": 1, "optimizer_args": ["safeguard_warmup=true", "d0=1e-4"]},
}


@pytest.mark.parametrize(
    "name",
    ["prodigy", *(pytest.param(f"torch.optim.{name}", marks=pytest.mark.slow) for name in ("Adafactor", "RAdam"))],
)
def test_resume_is_bit_identical(tmp_path: Path, name: str) -> None:
    require_package_of(name)
    model, metadata = tiny.build_wan_t2v(tmp_path / "model"), tiny.make_dataset(tmp_path / "data", copies=2)
    flags = {"optimizer": name, "max_train_steps": 4, "checkpointing_steps": 2, "num_train_epochs": None}
    flags |= {"trainable_modules": ["attn1", "norm"], "learning_rate": "1e-3", **SETTINGS[name]}
    train = partial(runs.train_flags, "wan2.1", model, metadata, tmp_path / "run", **flags)
    outcome = runs.train(train())
    assert outcome.code == 0, outcome.stderr
    assert f"optimizer   {name.replace('prodigy', 'prodigyopt.Prodigy')}(" in outcome.stdout
    unbroken = shutil.copytree(tmp_path / "run", tmp_path / "unbroken")
    resumed = runs.train(train(resume_from_checkpoint=tmp_path / "run" / "checkpoint-2"))
    assert resumed.code == 0, resumed.stderr
    assert forkserver.read_steps(tmp_path / "run") == forkserver.read_steps(unbroken)
    for part in ("checkpoint-4/transformer", "checkpoint-4/optimizer"):
        first, second = (runs.read_weights(folder / part) for folder in (tmp_path / "run", unbroken))
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first), part
    moments = runs.read_weights(unbroken / "checkpoint-4" / "optimizer")
    assert ("@group0/d:float" in moments) is (name == "prodigy")


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> BackendRuns:
    settings = {"optimizer": "torch.optim.RAdam", "learning_rate": "1e-3", "trainable_modules": ["attn1"]}
    return BackendRuns(tmp_path_factory.mktemp("wan"), "wan2.1 normal", 4, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", "zero2", "zero3", "fsdp1", "fsdp2"])
def test_a_class_trains_and_resumes_bit_identically_under_every_backend(
    wan: BackendRuns, tmp_path: Path, backend: str
) -> None:
    folder = tmp_path / "run"
    ranks = wan.run_ranks(backend, folder)
    assert exit_codes(ranks) == [0, 0], output_of(ranks)
    actual, expected = forkserver.read_steps(folder), forkserver.read_steps(wan.baseline)
    assert [line["loss"] for line in actual] == pytest.approx([line["loss"] for line in expected], abs=0.02)
    before = runs.read_weights(wan.model / "transformer")
    changes = [
        torch.cat(
            [(t.float() - before[n]).flatten() for n, t in sorted(runs.read_weights(run / "transformer").items())]
        )
        for run in (folder, wan.baseline)
    ]
    assert torch.nn.functional.cosine_similarity(*changes, dim=0) > 0.9
    last, half = runs.read_weights(folder / "transformer"), folder / "checkpoint-2"
    ranks = wan.run_ranks(backend, folder, resume_from_checkpoint=half)
    assert exit_codes(ranks) == [0, 0], output_of(ranks)
    assert forkserver.read_steps(folder) == actual
    resumed = runs.read_weights(folder / "transformer")
    assert all(torch.equal(resumed[key], tensor) for key, tensor in last.items())
    single = wan.run_ranks("plain" if backend == "ddp" else backend, folder, 1,
                           resume_from_checkpoint=half, gradient_accumulation_steps=2)  # fmt: skip
    if backend == "ddp":
        assert exit_codes(single) == [0], output_of(single)
    else:
        assert "launch 2 processes" in single[0].error_line()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "name", "reason"),
    [
        ("zero2", "torch.optim.Adafactor", "its step of a value depends on other values"),
        ("fsdp2", "prodigy", "its step size is estimated from all parameters together"),
        ("zero3", f"{__name__}.CountingGroups", "it stores more than numbers and tensors of a parameter's shape"),
    ],
)
def test_a_backend_that_a_class_does_not_support_is_an_error(
    wan: BackendRuns, tmp_path: Path, backend: str, name: str, reason: str
) -> None:
    require_package_of(name)
    ranks = wan.run_ranks(backend, tmp_path / "run", 1, optimizer=name)
    assert f"--optimizer: {name} does not work under {backend}: {reason}" in ranks[0].error_line()
