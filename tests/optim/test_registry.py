"""Serves who has less memory than AdamW asks for: what each optimizer keeps, where it works, and that it resumes."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import forkserver
import pytest
import runs
import tiny
import torch
from launches import BackendRuns, exit_codes, output_of
from safetensors.torch import load_file

import videox.optim.registry
from videox.distributed.backends import BACKENDS
from videox.engine.train_state import refuse_other_backend
from videox.errors import MODEL, UserError
from videox.optim.build import make_optimizer, set_learning_rate
from videox.optim.registry import OPTIMIZERS, check_supported, moments_of
from videox.optim.state import optimizer_tensors
from videox.run.checkpoint import publish_checkpoint
from videox.training.args import optimizer_of
from videox.weights.safetensors_io import save_tensors

ADAM = {"betas": (0.9, 0.999), "weight_decay": 0.0, "epsilon": 1e-8}
WHOLE = [name for name in OPTIMIZERS if name != "adamw"]


# ----------------------------------------------------------------------------------------------------- what is refused


def refused(wan: BackendRuns, folder: Path, **changes: object) -> str:
    outcome = runs.train(wan.flags(folder, **changes))
    assert outcome.code != 0 and outcome.stderr.count("\n") == 1, outcome.stderr
    return outcome.stderr


class Unrun(BackendRuns):
    """A ground without the run of one process, to which nothing here is compared."""

    def __init__(self, folder: Path, **sizes: int) -> None:
        self.folder, self.kind, self.steps, self.settings = folder, "wan2.1 normal", 4, {}
        self.family, self.mode = self.kind.split()
        self.model = tiny.build_wan_t2v(folder / "model", **sizes)
        self.metadata = tiny.make_dataset(folder / "data", copies=2)


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> BackendRuns:
    return Unrun(tmp_path_factory.mktemp("wan"))


def test_an_unknown_optimizer_and_two_at_once_are_refused(wan: BackendRuns, tmp_path: Path) -> None:
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
    wan: BackendRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(videox.optim.registry, "find_spec", lambda module: None)
    line = refused(wan, tmp_path, use_8bit_adam=True)
    assert "adamw8bit needs bitsandbytes, which is not installed. Fix: pip install bitsandbytes==" in line


def test_a_missing_compiler_of_the_host_is_named(
    wan: BackendRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    line = refused(wan, tmp_path / "run", optimizer="adamw_bf16_offload")
    assert "adamw_bf16_offload's step is compiled for the host, which has no g++. Fix: install a C++ compiler" in line


def test_the_packages_are_pinned_as_an_extra() -> None:
    project = tomllib.loads((tiny.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = {optimizer.package for optimizer in OPTIMIZERS.values() if optimizer.package}
    assert set(project["optional-dependencies"]["optimizers"]) == pinned


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_backend_has_some_optimizers(name: str, backend: str) -> None:
    if backend in OPTIMIZERS[name].backends:
        check_supported(name, backend, "bf16", lora=False)
        return
    can = " or ".join(other for other in OPTIMIZERS if backend in OPTIMIZERS[other].backends)
    with pytest.raises(UserError, match=f"{name} does not work under {backend}: .*Fix: use {can} here") as no:
        check_supported(name, backend, "bf16", lora=False)
    assert no.value.exit_code == 2


@pytest.mark.parametrize("family", ["wan2.1", "hunyuanvideo"])
def test_the_readme_has_the_table(family: str) -> None:
    text = (tiny.ROOT / "scripts" / family / "README_TRAIN.md").read_text(encoding="utf-8")
    rows = [
        line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `a") or "| `came" in line
    ]
    found = {row[0].split("`")[1]: row for row in rows if row[0].split("`")[1] in OPTIMIZERS}
    assert found.keys() == OPTIMIZERS.keys()
    words = {"single": "one process", "ddp": "DDP", "fsdp2": "FSDP2"}
    for name, row in found.items():
        can = OPTIMIZERS[name].backends
        assert row[2] == str(OPTIMIZERS[name].bytes_per_parameter)
        assert row[3] == ("everywhere" if set(can) == set(BACKENDS) else ", ".join(words[backend] for backend in can))


def saved(folder: Path, name: str, description: dict[str, str]) -> Path:
    """Returns a checkpoint with the moments of an optimizer after one step."""
    dtype = torch.float32 if OPTIMIZERS[name].fp32_params else torch.bfloat16
    weight = torch.nn.Parameter(torch.ones(128, 128, dtype=dtype))
    weight.grad = torch.ones_like(weight)
    optimizer = make_optimizer([{"params": [weight], "rate_factor": 1.0}], learning_rate=1e-3, name=name, **ADAM)
    optimizer.step()
    with publish_checkpoint(folder, 1, is_main=True, gather=lambda value: [value], description=description) as made:
        assert made is not None
        save_tensors(made / "optimizer", optimizer_tensors(optimizer, {weight: "weight"}), stem="optimizer")
    return folder / "checkpoint-1"


@pytest.mark.parametrize(
    "name",  # torchao's steps are compiled first
    [name if kind.fp32_params else pytest.param(name, marks=pytest.mark.slow) for name, kind in OPTIMIZERS.items()],
)
def test_the_moments_of_another_optimizer_are_refused(tmp_path: Path, name: str) -> None:
    checkpoint = saved(tmp_path / "noted", name, {"backend": "ddp", "optimizer": name})
    older = saved(tmp_path / "older", name, {"backend": "ddp"})  # told by the moments' names, as far as these tell
    alike = {"adamw", "adamw_bf16"}
    for asked in OPTIMIZERS:
        if moments_of(asked) == moments_of(name):
            refuse_other_backend(checkpoint, BACKENDS["single"], asked)
            refuse_other_backend(older, BACKENDS["single"], asked)
            continue
        with pytest.raises(UserError, match=f"--optimizer: {asked}, and checkpoint-1 was saved with {name},") as no:
            refuse_other_backend(checkpoint, BACKENDS["single"], asked)
        assert no.value.exit_code == MODEL and f"resume with --optimizer {name}" in no.value.hint
        kinds = (moments_of(name), moments_of(asked))
        if {*kinds} != alike and kinds not in {(one, "adamw8bit_bf16") for one in alike}:
            with pytest.raises(UserError, match=f"--optimizer: {asked}, .*{kinds[0]}"):
                refuse_other_backend(older, BACKENDS["single"], asked)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "name", "why"),
    [
        ("zero2", "adamw8bit", "DeepSpeed and FSDP1 flatten weights"),
        ("zero3", "adamw_bf16", "DeepSpeed and FSDP1 flatten weights"),
        ("fsdp1", "adamw8bit_bf16", "DeepSpeed and FSDP1 flatten weights"),
        ("fsdp2", "came", "rows and columns of complete matrices"),
    ],
)
def test_a_launch_that_cannot_refuses_before_it_loads(
    wan: BackendRuns, tmp_path: Path, backend: str, name: str, why: str
) -> None:
    ranks = wan.run_ranks(backend, tmp_path / "run", 1, optimizer=name)
    assert f"--optimizer: {name} does not work under {backend}: " in ranks[0].error_line()
    assert why in ranks[0].error_line()


# ------------------------------------------------------------------------------------------------------ how they step


def shares_kept(
    make: Callable[[list[dict]], torch.optim.Optimizer], weights: torch.Tensor, steps: int, rate: float
) -> tuple[float, float]:
    """Returns what a bfloat16 weight keeps of steps of one size, as a share: of those all one way, of those at random.

    The first half of the weights has a gradient of 1, the second 1 or -1 with even chances; without a first moment
    each step is then the learning rate, that way.
    """
    parameter = torch.nn.Parameter(weights.clone())
    optimizer = make([{"params": [parameter], "rate_factor": 1.0}])
    half, draw, turned = len(weights) // 2, torch.Generator().manual_seed(1), 0.0
    sign = torch.ones(len(weights))
    for step in range(steps):
        sign[half:] = torch.randint(0, 2, (len(weights) - half,), generator=draw) * 2.0 - 1
        parameter.grad = sign.to(parameter.dtype)
        before = parameter.detach()[half:].float()
        torch.manual_seed(step)
        set_learning_rate(optimizer, rate)
        optimizer.step()
        turned += float(((before - parameter.detach()[half:].float()) * sign[half:]).mean())
    onward = (weights.double() - parameter.detach().double())[:half].mean().item()
    return onward / (steps * rate), turned / (steps * rate)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw_bf16", "adamw8bit_bf16"])
def test_rounding_at_random_keeps_small_steps_on_average(name: str) -> None:
    """Weights of N(0, 0.02), as a transformer's are, and 10,000 steps of 1e-5, below half of most weights' last digit.

    To the nearest, a weight below 2^-8 = 0.0039 moves, by its digit of 2^-16 = 1.5e-5 at most, and all others stand:
    about a fifth of the movement is kept. What goes one way all the time stands as soon as it is that large.
    """
    weights = (0.02 * torch.randn(8192, generator=torch.Generator().manual_seed(0))).bfloat16()
    settings = {**ADAM, "betas": (0.0, 0.999)}
    at_random = partial(make_optimizer, learning_rate=1e-5, name=name, **settings)
    # not fused: that one's second moment, in bfloat16 too, ends below 1, and the steps are larger
    plain = partial(torch.optim.AdamW, lr=1e-5, betas=(0.0, 0.999), weight_decay=0.0, fused=False)
    rounded, nearest = (shares_kept(make, weights, 10_000, 1e-5) for make in (at_random, plain))
    print("kept, of steps one way and either way:", rounded, "at random;", nearest, "to the nearest")
    assert rounded == pytest.approx((1, 1), abs=0.01)
    assert 0.15 < nearest[1] < 0.25
    assert nearest[0] < 0.05


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


TWO_NAMES = pytest.mark.parametrize(("flag", "name"), [("use_8bit_adam", "adamw8bit"), ("use_came", "came")])


@TWO_NAMES
def test_two_names_of_one_optimizer(wan: BackendRuns, tmp_path: Path, flag: str, name: str) -> None:
    for asked in ({flag: True}, {"optimizer": name}, {flag: True, "optimizer": name}):
        assert optimizer_of(runs.train_script().parse_args(wan.flags(tmp_path, **asked))) == name
    assert optimizer_of(runs.train_script().parse_args(wan.flags(tmp_path))) == "adamw"


@pytest.mark.slow
@TWO_NAMES
def test_two_names_of_one_optimizer_train_alike(wan: BackendRuns, tmp_path: Path, flag: str, name: str) -> None:
    for folder, asked in (("flag", {flag: True}), ("name", {"optimizer": name}), ("other", {})):
        outcome = runs.train(wan.flags(tmp_path / folder, max_train_steps=3, gradient_accumulation_steps=2, **asked))
        assert outcome.code == 0, outcome.stderr
    one, other, adamw = (forkserver.read_steps(tmp_path / folder) for folder in ("flag", "name", "other"))
    assert one == other != adamw


# ---------------------------------------------------------------------------------------------------- and they resume

# large enough that moments are kept in eight bits, in few shapes: torchao compiles its step for each
SIZES = {"heads": 4, "head_dim": 16, "ffn_dim": 128}


def check_resumed(name: str, folder: Path, metadata: Path, model: Path) -> None:
    asked = {"optimizer": name, "max_train_steps": 4, "checkpointing_steps": 2, "num_train_epochs": None}
    asked |= {"trainable_modules": ["attn1.to_q.weight"], "learning_rate": "1e-3"}

    def train(**changes: object) -> runs.Outcome:
        outcome = runs.train(runs.train_flags("wan2.1", model, metadata, folder / "run", **asked, **changes))
        assert outcome.code == 0, outcome.stderr
        return outcome

    train()
    unbroken = shutil.copytree(folder / "run", folder / "unbroken")
    train(resume_from_checkpoint=folder / "run" / "checkpoint-2")
    assert forkserver.read_steps(folder / "run") == forkserver.read_steps(unbroken)
    for place in ("checkpoint-4/transformer", "checkpoint-4/optimizer", "transformer"):
        one, other = (runs.read_weights(path / place) for path in (folder / "run", unbroken))
        assert one.keys() == other.keys() and one
        assert [key for key in one if not torch.equal(one[key], other[key])] == [], place
    before = runs.read_weights(model / "transformer")
    after = runs.read_weights(unbroken / "checkpoint-4" / "transformer")
    changed = {key for key in before if not torch.equal(before[key].to(after[key].dtype), after[key])}
    assert changed == {key for key in before if "attn1.to_q.weight" in key}
    dtype = torch.float32 if OPTIMIZERS[name].fp32_params else torch.bfloat16
    assert {after[key].dtype for key in changed} == {dtype}
    kept = runs.read_weights(unbroken / "checkpoint-4" / "optimizer").values()
    assert (torch.uint8 in {tensor.dtype for tensor in kept}) is ("8bit" in name)


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("adamw8bit", "came", "adamw_offload") else pytest.param(name, marks=pytest.mark.slow)
        for name in WHOLE
    ],
)
def test_a_resumed_run_goes_on_to_the_bit(tmp_path: Path, name: str) -> None:
    model = tiny.build_wan_t2v(tmp_path / "model", **SIZES)
    check_resumed(name, tmp_path, tiny.make_dataset(tmp_path / "data", copies=2), model)


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_processes_stay_alike(wan: BackendRuns, tmp_path: Path, name: str) -> None:
    asked = {"optimizer": name, "trainable_modules": ["attn1.to_q.weight"]}
    ranks = wan.run_ranks("ddp", tmp_path / "run", entry_point="tests.optim.test_registry:train_and_tell", **asked)
    assert [rank.code for rank in ranks] == [0, 0], ranks[0].output()[-3000:]
    one, other = (torch.load(tmp_path / "run" / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(one[key], other[key]) for key in one)


def train_and_tell() -> int:
    """Trains, and leaves this process's own weights in output_dir."""
    import os
    import sys

    from videox.engine.ddp import DdpEngine

    load_weights = DdpEngine.weights
    script = runs.train_script()
    made: list[DdpEngine] = []
    begin = DdpEngine.__init__

    def noted(self: DdpEngine, *arguments: object, **settings: object) -> None:
        begin(self, *arguments, **settings)
        made.append(self)

    DdpEngine.__init__ = noted
    code = script.main()
    folder = runs.output_dir_of(sys.argv)
    torch.save(dict(load_weights(made[0])), folder / f"rank-{os.environ['RANK']}.pt")
    return code


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> BackendRuns:
    """Returns a ground whose tensors have moments in eight bits also where two processes divide them."""
    return Unrun(tmp_path_factory.mktemp("wide"), heads=8, head_dim=16, ffn_dim=128)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if OPTIMIZERS[name].by_shard])
def test_fsdp2_steps_shards_and_resumes_to_the_bit(wide: BackendRuns, tmp_path: Path, name: str) -> None:
    asked = {"optimizer": name, "trainable_modules": ["attn1.to_q.weight"], "learning_rate": "1e-3"}
    folder = tmp_path / "run"
    alone = runs.train(wide.flags(tmp_path / "alone", gradient_accumulation_steps=2, **asked))
    assert alone.code == 0, alone.stderr
    ranks = wide.run_ranks("fsdp2", folder, **asked)
    assert exit_codes(ranks) == [0, 0], output_of(ranks)
    found, wanted = forkserver.read_steps(folder), forkserver.read_steps(tmp_path / "alone")
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in wanted], abs=0.02)
    assert [line["grad_norm"] for line in found] == pytest.approx([line["grad_norm"] for line in wanted], rel=0.03)
    before = runs.read_weights(wide.model / "transformer")
    moved = {run: {n: t.float() - before[n] for n, t in runs.read_weights(run / "transformer").items() if "attn1.to_q.w" in n}
             for run in (folder, tmp_path / "alone")}  # fmt: skip
    one, other = (torch.cat([t.flatten() for t in moved[run].values()]) for run in (folder, tmp_path / "alone"))
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.9  # rounded to bf16, and in places at random
    assert float(one.norm() / other.norm()) == pytest.approx(1, abs=0.1)
    kept = {path.name: load_file(path) for path in sorted((folder / "checkpoint-4/optimizer_0").glob("*.safetensors"))}
    assert list(kept) == ["rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors"]
    for tensors in kept.values():
        assert (torch.uint8 in {tensor.dtype for tensor in tensors.values()}) is ("8bit" in name)
    last = runs.read_weights(folder / "transformer")
    half = folder / "checkpoint-2"
    line = wide.run_ranks("fsdp2", folder, 1, resume_from_checkpoint=half, gradient_accumulation_steps=2, **asked)
    assert "launch 2 processes" in line[0].error_line()
    line = wide.run_ranks("fsdp2", folder, resume_from_checkpoint=half, **{**asked, "optimizer": "adamw"})
    assert f"adamw, and checkpoint-2 was saved with {name}" in line[0].error_line()
    ranks = wide.run_ranks("fsdp2", folder, resume_from_checkpoint=half, **asked)
    assert exit_codes(ranks) == [0, 0], output_of(ranks)
    assert forkserver.read_steps(folder) == found
    again = runs.read_weights(folder / "transformer")
    assert all(torch.equal(again[key], tensor) for key, tensor in last.items())
    for place, tensors in kept.items():
        same = load_file(folder / "checkpoint-4/optimizer_0" / place)
        assert same.keys() == tensors.keys() and all(torch.equal(same[key], tensors[key]) for key in tensors)
