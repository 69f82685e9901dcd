"""Tests of videox.optim.registry: supported backends, memory, resume and stochastic rounding of each optimizer."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import forkserver
import pytest
import runs
import tiny
import torch
from launches import BackendRuns, exit_codes, output_of
from safetensors.torch import load_file
from skips import skip_missing

import videox.optim.registry
from videox.distributed.backends import BACKENDS
from videox.engine.resume import refuse_other_backend
from videox.errors import MODEL, UserError
from videox.optim.build import make_optimizer, set_learning_rate
from videox.optim.registry import OPTIMIZERS, check_supported, moments_of
from videox.optim.state import optimizer_tensors
from videox.run.checkpoint import publish_checkpoint
from videox.training.args import optimizer_of
from videox.weights.safetensors_io import save_tensors

ADAM = {"betas": (0.9, 0.999), "weight_decay": 0.0, "epsilon": 1e-8}
ALTERNATIVES = [name for name in OPTIMIZERS if name not in ("adamw", "prodigy")]  # prodigy: test_custom_class.py


# ------------------------------------------------------------------------------------------------------------- errors


def error_line(wan: BackendRuns, folder: Path, **changes: object) -> str:
    outcome = runs.train(wan.flags(folder, **changes))
    assert outcome.code != 0 and outcome.stderr.count("\n") == 1, outcome.stderr
    return outcome.stderr


class BackendRunsWithoutBaseline(BackendRuns):
    """BackendRuns without the baseline run, which these tests do not compare to."""

    def __init__(self, folder: Path, **sizes: int) -> None:
        self.folder, self.kind, self.steps, self.settings = folder, "wan2.1 normal", 4, {}
        self.family, self.mode = self.kind.split()
        self.model = tiny.build_wan_t2v(folder / "model", **sizes)
        self.metadata = tiny.make_dataset(folder / "data", copies=2)


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> BackendRuns:
    return BackendRunsWithoutBaseline(tmp_path_factory.mktemp("wan"))


def test_an_unknown_optimizer_and_two_at_once_are_errors(wan: BackendRuns, tmp_path: Path) -> None:
    line = error_line(wan, tmp_path, optimizer="adam")
    assert all(name in line for name in OPTIMIZERS)
    line = error_line(wan, tmp_path, use_8bit_adam=True, use_came=True)
    assert "--use_8bit_adam and --use_came name two optimizers" in line
    line = error_line(wan, tmp_path, use_came=True, optimizer="adamw_bf16")
    assert "--optimizer and --use_came name two optimizers" in line
    line = error_line(wan, tmp_path, optimizer="adamw_bf16", mixed_precision="no")
    assert "--mixed_precision bf16" in line
    line = error_line(wan, tmp_path, optimizer="adamw_bf16", lora_rank=4)
    assert "a LoRA's are float32" in line


def test_a_missing_package_is_named_with_its_install_command(
    wan: BackendRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(videox.optim.registry, "find_spec", lambda module: None)
    line = error_line(wan, tmp_path, use_8bit_adam=True)
    assert "adamw8bit needs bitsandbytes, which is not installed. Fix: pip install bitsandbytes==" in line


def test_a_missing_host_compiler_is_named(wan: BackendRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    line = error_line(wan, tmp_path / "run", optimizer="adamw_bf16_offload")
    assert "adamw_bf16_offload's step is compiled for the host, which has no g++. Fix: install a C++ compiler" in line


def test_the_packages_are_pinned_as_an_extra() -> None:
    project = tomllib.loads((tiny.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = {optimizer.package for optimizer in OPTIMIZERS.values() if optimizer.package}
    assert set(project["optional-dependencies"]["optimizers"]) == pinned


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_unsupported_backends_are_errors_that_name_supported_optimizers(name: str, backend: str) -> None:
    if backend in OPTIMIZERS[name].backends:
        check_supported(name, backend, "bf16", lora=False)
        return
    supported = " or ".join(second for second in OPTIMIZERS if backend in OPTIMIZERS[second].backends)
    with pytest.raises(UserError, match=f"{name} does not work under {backend}: .*Fix: use {supported} here") as no:
        check_supported(name, backend, "bf16", lora=False)
    assert no.value.exit_code == 2


@pytest.mark.parametrize("family", ["wan2.1", "hunyuanvideo"])
def test_the_readme_table_equals_the_registry(family: str) -> None:
    text = (tiny.ROOT / "scripts" / family / "README_TRAIN.md").read_text(encoding="utf-8")
    rows = [
        line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(("| `a", "| `came", "| `prod"))
    ]
    actual = {row[0].split("`")[1]: row for row in rows if row[0].split("`")[1] in OPTIMIZERS}
    assert actual.keys() == OPTIMIZERS.keys()
    words = {"single": "one process", "ddp": "DDP", "fsdp2": "FSDP2"}
    for name, row in actual.items():
        supported = OPTIMIZERS[name].backends
        assert row[2] == str(OPTIMIZERS[name].bytes_per_parameter)
        assert row[3] == (
            "everywhere" if set(supported) == set(BACKENDS) else ", ".join(words[backend] for backend in supported)
        )


def saved(folder: Path, name: str, description: dict[str, str]) -> Path:
    """Return a checkpoint with the moments of an optimizer after one step."""
    if OPTIMIZERS[name].module == "prodigyopt" and find_spec("prodigyopt") is None:
        skip_missing("prodigyopt", "that its moments are refused for other optimizers")
    dtype = torch.float32 if OPTIMIZERS[name].fp32_params else torch.bfloat16
    weight = torch.nn.Parameter(torch.ones(128, 128, dtype=dtype))
    weight.grad = torch.ones_like(weight)
    optimizer = make_optimizer([{"params": [weight], "rate_factor": 1.0}], learning_rate=1e-3, name=name, **ADAM)
    optimizer.step()
    with publish_checkpoint(
        folder, 1, is_main=True, gather=lambda value: [value], description=description
    ) as folder_made:
        assert folder_made is not None
        save_tensors(folder_made / "optimizer", optimizer_tensors(optimizer, {weight: "weight"}), stem="optimizer")
    return folder / "checkpoint-1"


@pytest.mark.parametrize(
    "name",  # torchao's optimizers are slow: their steps are compiled first
    [name if kind.fp32_params else pytest.param(name, marks=pytest.mark.slow) for name, kind in OPTIMIZERS.items()],
)
def test_the_moments_of_another_optimizer_are_an_error(tmp_path: Path, name: str) -> None:
    checkpoint = saved(tmp_path / "noted", name, {"backend": "ddp", "optimizer": name})
    old = saved(tmp_path / "older", name, {"backend": "ddp"})  # identified by the moments' names, if these are unique
    ambiguous = {"adamw", "adamw_bf16"}
    for selected in OPTIMIZERS:
        if moments_of(selected) == moments_of(name):
            refuse_other_backend(checkpoint, BACKENDS["single"], selected)
            refuse_other_backend(old, BACKENDS["single"], selected)
            continue
        with pytest.raises(UserError, match=f"--optimizer: {selected}, but checkpoint-1 was saved with {name},") as no:
            refuse_other_backend(checkpoint, BACKENDS["single"], selected)
        assert no.value.exit_code == MODEL and f"resume with --optimizer {name}" in no.value.hint
        kinds = (moments_of(name), moments_of(selected))
        if {*kinds} != ambiguous and kinds not in {(first, "adamw8bit_bf16") for first in ambiguous}:
            with pytest.raises(UserError, match=f"--optimizer: {selected}, .*{kinds[0]}"):
                refuse_other_backend(old, BACKENDS["single"], selected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "name", "reason"),
    [
        ("zero2", "adamw8bit", "DeepSpeed and FSDP1 flatten weights"),
        ("zero3", "adamw_bf16", "DeepSpeed and FSDP1 flatten weights"),
        ("fsdp1", "adamw8bit_bf16", "DeepSpeed and FSDP1 flatten weights"),
        ("fsdp2", "came", "rows and columns of complete matrices"),
    ],
)
def test_an_unsupported_launch_fails_before_loading(
    wan: BackendRuns, tmp_path: Path, backend: str, name: str, reason: str
) -> None:
    ranks = wan.run_ranks(backend, tmp_path / "run", 1, optimizer=name)
    assert f"--optimizer: {name} does not work under {backend}: " in ranks[0].error_line()
    assert reason in ranks[0].error_line()


# -------------------------------------------------------------------------------------------------------------- steps


def applied_shares(
    make: Callable[[list[dict]], torch.optim.Optimizer], weights: torch.Tensor, steps: int, lr: float
) -> tuple[float, float]:
    """Return the share of equal-sized updates that bfloat16 weights apply: of updates in one direction, of random
    ones.

    The first half of the weights has a gradient of 1, the second half 1 or -1 with equal probability. Without a first
    moment each update is then the learning rate in that direction.
    """
    parameter = torch.nn.Parameter(weights.clone())
    optimizer = make([{"params": [parameter], "rate_factor": 1.0}])
    half, draw, applied = len(weights) // 2, torch.Generator().manual_seed(1), 0.0
    sign = torch.ones(len(weights))
    for step in range(steps):
        sign[half:] = torch.randint(0, 2, (len(weights) - half,), generator=draw) * 2.0 - 1
        parameter.grad = sign.to(parameter.dtype)
        before = parameter.detach()[half:].float()
        torch.manual_seed(step)
        set_learning_rate(optimizer, lr)
        optimizer.step()
        applied += float(((before - parameter.detach()[half:].float()) * sign[half:]).mean())
    drift = (weights.double() - parameter.detach().double())[:half].mean().item()
    return drift / (steps * lr), applied / (steps * lr)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw_bf16", "adamw8bit_bf16"])
def test_stochastic_rounding_keeps_small_updates_on_average(name: str) -> None:
    """Weights of N(0, 0.02), as in a transformer, and 10,000 updates of 1e-5, below half of most weights' last digit.

    With rounding to nearest, weights below 2^-8 = 0.0039 change by one digit of at most 2^-16 = 1.5e-5, and all
    others do not change: about a fifth of the updates is applied. Updates in one direction stop as soon as a weight
    is that large.
    """
    weights = (0.02 * torch.randn(8192, generator=torch.Generator().manual_seed(0))).bfloat16()
    settings = {**ADAM, "betas": (0.0, 0.999)}
    make_stochastic = partial(make_optimizer, learning_rate=1e-5, name=name, **settings)
    # Not fused: fused AdamW's second moment is bfloat16, too, and stays below 1, so that its updates are larger.
    plain = partial(torch.optim.AdamW, lr=1e-5, betas=(0.0, 0.999), weight_decay=0.0, fused=False)
    stochastic, to_nearest = (applied_shares(make, weights, 10_000, 1e-5) for make in (make_stochastic, plain))
    print("share of one-way and random updates applied:", stochastic, "stochastic;", to_nearest, "to nearest")
    assert stochastic == pytest.approx((1, 1), abs=0.01)
    assert 0.15 < to_nearest[1] < 0.25
    assert to_nearest[0] < 0.05


@pytest.mark.parametrize("name", ["adamw8bit", "came"])
def test_float32_optimizers_converge(name: str) -> None:
    draw = torch.Generator().manual_seed(0)
    inputs, expected = torch.randn(256, 64, generator=draw), torch.randn(64, 128, generator=draw)
    weights = torch.nn.Parameter(torch.zeros(64, 128))
    optimizer = make_optimizer([{"params": [weights], "rate_factor": 1.0}], learning_rate=3e-2, name=name, **ADAM)
    for step in range(400):
        set_learning_rate(optimizer, 3e-2 * (1 - step / 400))
        optimizer.zero_grad()
        (inputs @ (weights - expected)).square().mean().backward()
        optimizer.step()
    assert float((weights.detach() - expected).norm() / expected.norm()) < 0.1


TWO_NAMES = pytest.mark.parametrize(("flag", "name"), [("use_8bit_adam", "adamw8bit"), ("use_came", "came")])


@TWO_NAMES
def test_two_flags_of_one_optimizer_are_equivalent(wan: BackendRuns, tmp_path: Path, flag: str, name: str) -> None:
    for flags in ({flag: True}, {"optimizer": name}, {flag: True, "optimizer": name}):
        assert optimizer_of(runs.train_script().parse_args(wan.flags(tmp_path, **flags))) == name
    assert optimizer_of(runs.train_script().parse_args(wan.flags(tmp_path))) == "adamw"


@pytest.mark.slow
@TWO_NAMES
def test_two_flags_of_one_optimizer_train_identically(wan: BackendRuns, tmp_path: Path, flag: str, name: str) -> None:
    for folder, flags in (("flag", {flag: True}), ("name", {"optimizer": name}), ("other", {})):
        outcome = runs.train(wan.flags(tmp_path / folder, max_train_steps=3, gradient_accumulation_steps=2, **flags))
        assert outcome.code == 0, outcome.stderr
    first, second, adamw = (forkserver.read_steps(tmp_path / folder) for folder in ("flag", "name", "other"))
    assert first == second != adamw


# ------------------------------------------------------------------------------------------------------------- resume

# Large enough for 8-bit moments, with few different shapes: torchao compiles its step for each shape.
SIZES = {"heads": 4, "head_dim": 16, "ffn_dim": 128}


def check_resumed(name: str, folder: Path, metadata: Path, model: Path) -> None:
    flags = {"optimizer": name, "max_train_steps": 4, "checkpointing_steps": 2, "num_train_epochs": None}
    flags |= {"trainable_modules": ["attn1.to_q.weight"], "learning_rate": "1e-3"}

    def train(**changes: object) -> runs.Outcome:
        outcome = runs.train(runs.train_flags("wan2.1", model, metadata, folder / "run", **flags, **changes))
        assert outcome.code == 0, outcome.stderr
        return outcome

    train()
    uninterrupted = shutil.copytree(folder / "run", folder / "unbroken")
    train(resume_from_checkpoint=folder / "run" / "checkpoint-2")
    assert forkserver.read_steps(folder / "run") == forkserver.read_steps(uninterrupted)
    for name_of_file in ("checkpoint-4/transformer", "checkpoint-4/optimizer", "transformer"):
        first, second = (runs.read_weights(path / name_of_file) for path in (folder / "run", uninterrupted))
        assert first.keys() == second.keys() and first
        assert [key for key in first if not torch.equal(first[key], second[key])] == [], name_of_file
    before = runs.read_weights(model / "transformer")
    after = runs.read_weights(uninterrupted / "checkpoint-4" / "transformer")
    changed = {key for key in before if not torch.equal(before[key].to(after[key].dtype), after[key])}
    assert changed == {key for key in before if "attn1.to_q.weight" in key}
    dtype = torch.float32 if OPTIMIZERS[name].fp32_params else torch.bfloat16
    assert {after[key].dtype for key in changed} == {dtype}
    moments = runs.read_weights(uninterrupted / "checkpoint-4" / "optimizer").values()
    assert (torch.uint8 in {tensor.dtype for tensor in moments}) is ("8bit" in name)


@pytest.mark.parametrize(
    "name",
    [name if name == "adamw8bit" else pytest.param(name, marks=pytest.mark.slow) for name in ALTERNATIVES],
)
def test_resume_is_bit_identical(tmp_path: Path, name: str) -> None:
    model = tiny.build_wan_t2v(tmp_path / "model", **SIZES)
    check_resumed(name, tmp_path, tiny.make_dataset(tmp_path / "data", copies=2), model)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALTERNATIVES)
def test_ranks_keep_identical_weights(wan: BackendRuns, tmp_path: Path, name: str) -> None:
    flags = {"optimizer": name, "trainable_modules": ["attn1.to_q.weight"]}
    ranks = wan.run_ranks(
        "ddp", tmp_path / "run", entry_point="tests.optim.test_registry:train_and_save_weights", **flags
    )
    assert [rank.code for rank in ranks] == [0, 0], ranks[0].output()[-3000:]
    first, second = (torch.load(tmp_path / "run" / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)


def train_and_save_weights() -> int:
    """Entry point of a rank: train, and save this rank's own weights in output_dir."""
    import os
    import sys

    from videox.engine.ddp import DdpEngine

    load_weights = DdpEngine.weights
    script = runs.train_script()
    folder_made: list[DdpEngine] = []
    plain_init = DdpEngine.__init__

    def recording_init(self: DdpEngine, *arguments: object, **settings: object) -> None:
        plain_init(self, *arguments, **settings)
        folder_made.append(self)

    DdpEngine.__init__ = recording_init
    code = script.main()
    folder = runs.output_dir_of(sys.argv)
    torch.save(dict(load_weights(folder_made[0])), folder / f"rank-{os.environ['RANK']}.pt")
    return code


@pytest.fixture(scope="module")
def wide_runs(tmp_path_factory: pytest.TempPathFactory) -> BackendRuns:
    """Return BackendRuns whose tensors are large enough for 8-bit moments even if two ranks shard them."""
    return BackendRunsWithoutBaseline(tmp_path_factory.mktemp("wide"), heads=8, head_dim=16, ffn_dim=128)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if OPTIMIZERS[name].by_shard])
def test_fsdp2_steps_shards_and_resumes_bit_identically(wide_runs: BackendRuns, tmp_path: Path, name: str) -> None:
    flags = {"optimizer": name, "trainable_modules": ["attn1.to_q.weight"], "learning_rate": "1e-3"}
    folder = tmp_path / "run"
    single = runs.train(wide_runs.flags(tmp_path / "alone", gradient_accumulation_steps=2, **flags))
    assert single.code == 0, single.stderr
    ranks = wide_runs.run_ranks("fsdp2", folder, **flags)
    assert exit_codes(ranks) == [0, 0], output_of(ranks)
    actual, expected = forkserver.read_steps(folder), forkserver.read_steps(tmp_path / "alone")
    assert [line["loss"] for line in actual] == pytest.approx([line["loss"] for line in expected], abs=0.02)
    assert [line["grad_norm"] for line in actual] == pytest.approx([line["grad_norm"] for line in expected], rel=0.03)
    before = runs.read_weights(wide_runs.model / "transformer")
    changes_by_run = {run: {n: t.float() - before[n] for n, t in runs.read_weights(run / "transformer").items() if "attn1.to_q.w" in n}
             for run in (folder, tmp_path / "alone")}  # fmt: skip
    first, second = (
        torch.cat([t.flatten() for t in changes_by_run[run].values()]) for run in (folder, tmp_path / "alone")
    )
    assert torch.nn.functional.cosine_similarity(first, second, dim=0) > 0.9  # bfloat16 with stochastic rounding
    assert float(first.norm() / second.norm()) == pytest.approx(1, abs=0.1)
    moments = {
        path.name: load_file(path) for path in sorted((folder / "checkpoint-4/optimizer_0").glob("*.safetensors"))
    }
    assert list(moments) == ["rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors"]
    for tensors in moments.values():
        assert (torch.uint8 in {tensor.dtype for tensor in tensors.values()}) is ("8bit" in name)
    last = runs.read_weights(folder / "transformer")
    half = folder / "checkpoint-2"
    line = wide_runs.run_ranks("fsdp2", folder, 1, resume_from_checkpoint=half, gradient_accumulation_steps=2, **flags)
    assert "launch 2 processes" in line[0].error_line()
    line = wide_runs.run_ranks("fsdp2", folder, resume_from_checkpoint=half, **{**flags, "optimizer": "adamw"})
    assert f"adamw, but checkpoint-2 was saved with {name}" in line[0].error_line()
    ranks = wide_runs.run_ranks("fsdp2", folder, resume_from_checkpoint=half, **flags)
    assert exit_codes(ranks) == [0, 0], output_of(ranks)
    assert forkserver.read_steps(folder) == actual
    resumed = runs.read_weights(folder / "transformer")
    assert all(torch.equal(resumed[key], tensor) for key, tensor in last.items())
    for name_of_file, tensors in moments.items():
        reference = load_file(folder / "checkpoint-4/optimizer_0" / name_of_file)
        assert reference.keys() == tensors.keys() and all(torch.equal(reference[key], tensors[key]) for key in tensors)
