"""Tests of sharded training: DeepSpeed and FSDP train like one process, resume bit-identically, and export.

Each backend is started once by accelerate's launcher with the flags that users pass. Where a test only resumes or
compares, the ranks are forked with the environment variables that the launcher would set (see forkserver.py).
"""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

import diffusers
import forkserver
import launches
import pytest
import runs
import torch
from accelerate.commands.launch import launch_command_parser
from launch_checks import (
    check_checkpoint,
    check_export,
    check_launch,
    check_matches_baseline,
    check_resume,
    check_resume_repeats,
    convert_checkpoint,
    weight_change,
)
from launches import LAUNCH_FLAGS, LAYER_CLASSES, SHARDED_BACKENDS, BackendRuns, exit_codes, output_of

from videox.data.dataset import BadSample
from videox.distributed.backends import BACKENDS
from videox.errors import FLAGS, MODEL
from videox.models.compiled_blocks import compile_blocks
from videox.models.recompute import Recompute
from videox.training import optimizer, speed


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> BackendRuns:
    return BackendRuns(tmp_path_factory.mktemp("wan"), "wan2.1 normal", 4)


def check_backend(setup: BackendRuns, backend: str, folder: Path) -> None:
    check_launch(setup, backend, folder)
    check_matches_baseline(setup, folder)
    check_checkpoint(setup, backend, folder)
    check_export(setup, folder)
    check_resume(setup, backend, folder)


# -------------------------------------------------------------------------------------------- training, resume, export


SLOW_BACKENDS = ("zero2", "zero3", "fsdp1")  # test_elastic resumes one of DeepSpeed among the fast tests


@pytest.mark.parametrize(
    "backend", [pytest.param(b, marks=pytest.mark.slow if b in SLOW_BACKENDS else ()) for b in SHARDED_BACKENDS]
)
def test_a_sharded_backend_trains_like_one_process_resumes_and_exports(
    wan: BackendRuns, tmp_path: Path, backend: str
) -> None:
    check_backend(wan, backend, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["zero3", "fsdp1", "fsdp2"])
def test_save_whole_weights_adds_full_weights_to_sharded_checkpoints(
    wan: BackendRuns, tmp_path: Path, backend: str
) -> None:
    folder = tmp_path / "run"
    ranks = wan.run_ranks(backend, folder, save_whole_weights=True)
    assert exit_codes(ranks) == [0, 0], output_of(ranks)
    for step in (wan.steps // 2, wan.steps):
        full = runs.read_weights(folder / f"checkpoint-{step}" / "transformer")
        assert {tensor.dtype for tensor in full.values()} == {torch.float32}
        converted = convert_checkpoint(folder, step)
        assert "already contains the full weights" in converted.stdout
        bf16 = runs.read_weights(converted.folder)
        assert bf16.keys() == full.keys()
        assert all(torch.equal(bf16[name], full[name].bfloat16()) for name in full)
        model = diffusers.WanTransformer3DModel.from_pretrained(folder / f"checkpoint-{step}" / "transformer")
        assert all(torch.equal(full[name], value) for name, value in model.state_dict().items())
    ranks = wan.run_ranks(backend, folder, resume_from_checkpoint=folder / f"checkpoint-{wan.steps // 2}")
    assert exit_codes(ranks) == [0, 0], output_of(ranks)  # also without the flag
    check_resume_repeats(wan, folder)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", *SHARDED_BACKENDS])
def test_accelerate_configuration_files_launch_their_backend(wan: BackendRuns, tmp_path: Path, backend: str) -> None:
    file = f"config/accelerate/{backend}.yaml"
    flags = ["--config_file", file, "--num_processes", "2", "--main_process_port", "0"]
    outcome = runs.launch(wan.flags(tmp_path / "run"), flags)
    assert outcome.code == 0, outcome.stdout[-2000:] + outcome.stderr[-6000:]
    assert f"backend     {backend} (" in outcome.stdout
    assert "processes   2\n" in outcome.stdout
    check_matches_baseline(wan, tmp_path / "run")
    check_checkpoint(wan, backend, tmp_path / "run")


def test_the_typo_in_the_published_zero3_command_is_refused_by_the_launcher(
    capsys: pytest.CaptureFixture[str],
) -> None:
    misprinted = ["--deepspeed_multinode_launcherr" if "multinode" in flag else flag for flag in LAUNCH_FLAGS["zero3"]]
    with pytest.raises(SystemExit, match="2"):
        launch_command_parser().parse_args([*misprinted, "scripts/wan2.1/train.py"])
    assert "unrecognized arguments: --deepspeed_multinode_launcherr" in capsys.readouterr().err
    assert launch_command_parser().parse_args([*LAUNCH_FLAGS["zero3"], "scripts/wan2.1/train.py"]).zero_stage == 3


# --------------------------------------------------------------------------- frozen parameters, accumulation, clipping


@pytest.mark.slow
@pytest.mark.parametrize("backend", SHARDED_BACKENDS)
def test_frozen_parameters_stay_and_accumulation_follows_the_plan(
    wan: BackendRuns, tmp_path: Path, backend: str
) -> None:
    settings = {"trainable_modules": ["attn1"], "trainable_modules_low_learning_rate": ["ffn"]}
    settings |= {"balance": "none"}  # else the balancing groups samples differently for another number of ranks
    ranks = wan.run_ranks(backend, tmp_path / "run", gradient_accumulation_steps=2, **settings)
    assert exit_codes(ranks) == [0, 0], output_of(ranks)
    single = runs.train(wan.flags(tmp_path / "single", gradient_accumulation_steps=4, **settings))
    found, wanted = forkserver.read_steps(tmp_path / "run"), forkserver.read_steps(tmp_path / "single")
    assert [line["rows"] for line in found] == [line["rows"] for line in wanted]
    assert [line["loss"] for line in found] == pytest.approx(single.losses, abs=0.02)
    assert [line["grad_norm"] for line in found] == pytest.approx([line["grad_norm"] for line in wanted], rel=0.02)
    before, after = runs.read_weights(wan.model / "transformer"), runs.read_weights(tmp_path / "run" / "transformer")
    for name, tensor in after.items():
        trained = "attn1" in name or "ffn" in name
        assert torch.equal(tensor, before[name].to(tensor.dtype)) is not trained, name


def train_by_sgd() -> int:
    """Train with plain SGD, whose update is the clipped gradient times the LR."""
    script = runs.train_script()

    def sgd(groups: list[dict], learning_rate: float, **_: object) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=learning_rate)

    optimizer.make_optimizer = sgd
    return script.main()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "within"), [("ddp", 1e-5), ("fsdp1", 1e-5), ("fsdp2", 1e-5), ("zero2", 1e-2), ("zero3", 1e-2)]
)
def test_a_partly_frozen_model_is_clipped_by_the_global_norm(
    wan: BackendRuns, tmp_path: Path, backend: str, within: float
) -> None:
    # The LR is so large that the rounding of the weights is negligible compared with the update.
    settings = {"trainable_modules": ["attn1"], "max_train_steps": 1, "lr_warmup_steps": 0, "learning_rate": "10"}
    settings |= {"mixed_precision": "bf16" if backend.startswith("zero") else "no", "save_whole_weights": True}
    single = wan.run_ranks(
        "plain",
        tmp_path / "single",
        1,
        "tests.runs.test_backends:train_by_sgd",
        gradient_accumulation_steps=2,
        **settings,
    )
    ranks = wan.run_ranks(backend, tmp_path / "run", entry_point="tests.runs.test_backends:train_by_sgd", **settings)
    assert exit_codes(single) + exit_codes(ranks) == [0, 0, 0], output_of(single + ranks)
    norm, wanted = (forkserver.read_steps(tmp_path / name)[0]["grad_norm"] for name in ("run", "single"))
    assert wanted > 0.05  # so it is clipped
    assert norm == pytest.approx(wanted, rel=within)
    a, b = (weight_change(wan.model, tmp_path / name / "checkpoint-1" / "transformer") for name in ("run", "single"))
    assert float(b.norm()) == pytest.approx(0.5, rel=1e-4)
    assert float((a - b).norm()) <= within * float(b.norm())
    frozen = [name for name in runs.read_weights(wan.model / "transformer") if "attn1" not in name]
    after, before = (
        runs.read_weights(tmp_path / "run" / "checkpoint-1" / "transformer"),
        runs.read_weights(wan.model / "transformer"),
    )
    assert all(torch.equal(after[name], before[name]) for name in frozen)


# ------------------------------------------------------------------------------------------------------- skipped steps


def train_with_an_unreadable_step() -> int:
    """Train on several ranks; no rank can read a sample of step 2."""
    script = runs.train_script()
    accumulate, calls = script.accumulate_gradients, iter(range(1, 100))

    def unreadable_once(*arguments: object, **settings: object) -> torch.Tensor:
        batch = arguments[4]
        if next(calls) == 2:
            batch["weights"] = 0 * batch["weights"]
            batch["bad"] = [BadSample(int(row), "clip", "truncated", "injected") for row in batch["rows"]]
        return accumulate(*arguments, **settings)

    script.accumulate_gradients = unreadable_once
    return script.main()


@pytest.mark.parametrize(
    "backend", ["zero2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero3", "fsdp1", "fsdp2"))]
)
def test_a_nonfinite_loss_skips_the_step_on_all_ranks(wan: BackendRuns, tmp_path: Path, backend: str) -> None:
    ranks = wan.run_ranks(backend, tmp_path / "run", entry_point="launches:train_with_infinite_loss")
    assert exit_codes(ranks) == [0, 0], output_of(ranks)
    assert "step 2 was skipped: its loss or gradient is not finite" in ranks[0].output()
    found = forkserver.read_steps(tmp_path / "run")
    assert [line["loss"] is not None for line in found] == [True, False, True, True]
    # step 1 has an LR of 0 and step 2 is skipped, so step 3 starts from the initial weights
    assert found[2]["grad_norm"] is not None
    check_export(wan, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("backend", SHARDED_BACKENDS)
def test_a_step_without_a_readable_sample_keeps_the_weights(wan: BackendRuns, tmp_path: Path, backend: str) -> None:
    entry_point = "tests.runs.test_backends:train_with_an_unreadable_step"
    ranks = wan.run_ranks(backend, tmp_path / "run", entry_point=entry_point, lr_warmup_steps=0)
    assert exit_codes(ranks) == [0, 0], output_of(ranks)
    ddp = wan.run_ranks("ddp", tmp_path / "ddp", entry_point=entry_point, lr_warmup_steps=0)
    assert exit_codes(ddp) == [0, 0], output_of(ddp)
    found, wanted = forkserver.read_steps(tmp_path / "run"), forkserver.read_steps(tmp_path / "ddp")
    assert found[1]["grad_norm"] == 0
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in wanted], abs=0.02)
    assert [line["grad_norm"] for line in found] == pytest.approx([line["grad_norm"] for line in wanted], rel=0.02)


# --------------------------------------------------------------------------------- largest micro-batch first, refusals


def error_line_of(setup: BackendRuns, backend: str, folder: Path, world_size: int = 1, **changes: object) -> str:
    """Return the one error line of a run that is refused."""
    ranks = setup.run_ranks(backend, folder, world_size, **changes)
    assert set(exit_codes(ranks)) <= {FLAGS, MODEL}, output_of(ranks)
    return ranks[0].error_line()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", *SHARDED_BACKENDS])
def test_trying_the_largest_first_changes_no_result(wan: BackendRuns, tmp_path: Path, backend: str) -> None:
    for choice in ("on", "off"):
        ranks = wan.run_ranks(backend, tmp_path / choice, try_largest_first=choice)
        assert exit_codes(ranks) == [0, 0], output_of(ranks)
    assert forkserver.read_steps(tmp_path / "on") == forkserver.read_steps(tmp_path / "off")
    weights, expected = (runs.read_weights(tmp_path / choice / "transformer") for choice in ("on", "off"))
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in weights)
    stored = [tmp_path / choice / f"checkpoint-{wan.steps}" for choice in ("on", "off")]
    files = [{p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*.pt")} for root in stored]
    for name in files[0]:  # of DeepSpeed: moments, float32 parameters, counters
        state, expected_state = (torch.load(root / name, weights_only=False) for root in stored)
        assert str(state) == str(expected_state), name


@pytest.mark.slow
def test_unsupported_settings_of_a_backend_are_refused(wan: BackendRuns, tmp_path: Path) -> None:
    single = shutil.copytree(wan.baseline, tmp_path / "single")
    line = error_line_of(wan, "zero2", tmp_path / "ramp", initial_grad_norm_ratio=5)
    assert "--initial_grad_norm_ratio: 5: DeepSpeed clips every step to the same norm" in line
    line = error_line_of(wan, "fsdp2", single, resume_from_checkpoint="latest")
    assert "was saved under single, this launch is fsdp2" in line
    assert exit_codes(wan.run_ranks("fsdp2", tmp_path / "fsdp2", 1)) == [0]
    line = error_line_of(wan, "zero3", tmp_path / "fsdp2", resume_from_checkpoint="latest")
    assert "was saved under fsdp2, this launch is zero3" in line


@pytest.mark.slow
@pytest.mark.parametrize("version", ["1", "2"])
def test_wrong_fsdp_layer_classes_are_refused(wan: BackendRuns, tmp_path: Path, version: str) -> None:
    flags = [flag.format(layers=LAYER_CLASSES["hunyuanvideo normal"]) for flag in LAUNCH_FLAGS["fsdp1"]]
    flags += ["--fsdp_version", version, "--num_processes", "1", "--num_machines", "1", "--dynamo_backend", "no"]
    outcome = runs.launch(wan.flags(tmp_path / "run"), [*flags, "--main_process_port", "0"])
    assert outcome.code != 0
    assert (
        "the model has no layer class HunyuanVideoTransformerBlock. Fix: pass WanTransformerBlock." in outcome.stderr
    )


# ------------------------------------------------------------------------------------------- flags of speed and memory

RECOMPUTED = {"gradient_checkpointing": True, "gradient_checkpointing_keep": "attention", "offload_activations": True}
AUTOMATIC = {"gradient_checkpointing": None, "activation_memory": "auto"}


def numbers_of(folder: Path) -> list[tuple[float, float]]:
    """Return loss and gradient norm of each step."""
    return [(step["loss"], step["grad_norm"]) for step in forkserver.read_steps(folder)]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", *SHARDED_BACKENDS])
def test_what_is_recomputed_changes_no_number(wan: BackendRuns, tmp_path: Path, backend: str) -> None:
    cases = {
        "plain": {},
        "half": {"gradient_checkpointing": None, "selective_ac": 0.5},
        "kept": {**RECOMPUTED, "gradient_checkpointing_keep": None} if backend == "zero3" else RECOMPUTED,
        "auto": AUTOMATIC,
    }
    for name, changes in cases.items():
        ranks = wan.run_ranks(backend, tmp_path / name, **changes)
        assert exit_codes(ranks) == [0, 0], output_of(ranks)
    expected = numbers_of(tmp_path / "plain")
    assert len(expected) == wan.steps
    for name in cases:
        assert numbers_of(tmp_path / name) == expected, name


def train_with_a_choice_of_each_rank() -> int:
    """Train with nothing recomputed on rank 0, everything on the other ranks."""
    rank = int(os.environ["RANK"])
    speed.chooser = lambda *_, **__: lambda *_: Recompute(float(rank > 0))
    return launches.train_wan2_1()


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend", [name for name, backend in BACKENDS.items() if backend.recomputes_alone and name != "single"]
)
def test_ranks_may_recompute_different_blocks(wan: BackendRuns, tmp_path: Path, backend: str) -> None:
    alike = wan.run_ranks(backend, tmp_path / "alike", **AUTOMATIC)
    apart = wan.run_ranks(
        backend,
        tmp_path / "apart",
        entry_point="tests.runs.test_backends:train_with_a_choice_of_each_rank",
        **AUTOMATIC,
    )
    assert exit_codes(alike) == exit_codes(apart) == [0, 0], output_of(apart)
    assert numbers_of(tmp_path / "apart") == numbers_of(tmp_path / "alike")


def train_with_traced_blocks() -> int:
    """Train with --compile, whose graphs run as they are: kernels would take minutes on each rank."""
    speed.compile_blocks = partial(compile_blocks, backend="aot_eager")
    return launches.train_wan2_1()


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing_keep": "attention"}, {"lora_rank": 4}], ids=str)
@pytest.mark.parametrize("backend", [name for name, backend in BACKENDS.items() if name != "single"])
def test_compiled_blocks_train_alike_or_are_refused(
    wan: BackendRuns, tmp_path: Path, backend: str, changes: dict[str, object]
) -> None:
    entry_point = "tests.runs.test_backends:train_with_traced_blocks"
    ranks = wan.run_ranks(backend, tmp_path / "compiled", entry_point=entry_point, compile=True, **changes)
    if not BACKENDS[backend].compiles:
        assert exit_codes(ranks) == [FLAGS, FLAGS]
        assert "--compile: " in output_of(ranks)
        return
    assert exit_codes(ranks) == [0, 0], output_of(ranks)
    assert "cannot be compiled" not in output_of(ranks)
    plain = wan.run_ranks(backend, tmp_path / "plain", **changes)
    assert exit_codes(plain) == [0, 0], output_of(plain)
    for (loss, norm), (expected, wanted) in zip(
        numbers_of(tmp_path / "compiled"), numbers_of(tmp_path / "plain"), strict=True
    ):
        assert loss == pytest.approx(expected, rel=1e-3)
        assert norm == pytest.approx(wanted, rel=2e-2)
