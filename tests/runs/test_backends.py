"""Serves whoever divides a model among devices: DeepSpeed and FSDP train as one process does, resume and export.

Each backend is started by the launcher itself, with the users' own flags; where a run only goes on, its processes are
forked with the variables that the same launcher would set (see forkserver.py).
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import diffusers
import forkserver
import pytest
import runs
import tiny
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)

from videox.data.dataset import BadSample
from videox.errors import FLAGS, MODEL
from videox.run.checkpoint import read_manifest, verify
from videox.weights.safetensors_io import StoredTensors

BUILD = {
    "wan2.1 normal": tiny.build_wan_t2v,
    "wan2.1 i2v": tiny.build_wan_i2v,
    "hunyuanvideo normal": tiny.build_hunyuan_t2v,
    "hunyuanvideo i2v": tiny.build_hunyuan_i2v,
}
LAYERS = {
    "wan2.1 normal": "WanTransformerBlock",
    "wan2.1 i2v": "WanTransformerBlock",
    "hunyuanvideo normal": "HunyuanVideoTransformerBlock,HunyuanVideoSingleTransformerBlock",
    "hunyuanvideo i2v": "HunyuanVideoTokenReplaceTransformerBlock,HunyuanVideoTokenReplaceSingleTransformerBlock",
}
CLASSES = {"wan2.1": "WanTransformer3DModel", "hunyuanvideo": "HunyuanVideoTransformer3DModel"}
ZERO = ("--use_deepspeed", "--deepspeed_multinode_launcher", "standard", "--deepspeed_config_file")
# The users' own launcher flags. {layers} are the model's.
FSDP = (
    "--mixed_precision=bf16", "--use_fsdp", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP",
    "--fsdp_transformer_layer_cls_to_wrap={layers}", "--fsdp_sharding_strategy", "FULL_SHARD",
    "--fsdp_state_dict_type=SHARDED_STATE_DICT", "--fsdp_backward_prefetch", "BACKWARD_PRE",
    "--fsdp_cpu_ram_efficient_loading", "False",
)  # fmt: skip
LAUNCHER: Mapping[str, Sequence[str]] = {
    "plain": ("--mixed_precision=bf16",),
    "ddp": ("--mixed_precision=bf16", "--multi_gpu"),
    "zero2": (*ZERO, "config/zero_stage2_config.json"),
    "zero3": (
        "--zero_stage", "3", "--zero3_save_16bit_model", "true", "--zero3_init_flag", "true",
        *ZERO, "config/zero_stage2.1_config.json",
    ),
    "fsdp1": FSDP,
    "fsdp2": (*FSDP, "--fsdp_version", "2"),
}  # fmt: skip
DIVIDED = ("zero2", "zero3", "fsdp1", "fsdp2")
STORED = {  # what a checkpoint holds beside manifest, trainer state and configuration
    "plain": {"transformer", "optimizer"},
    "ddp": {"transformer", "optimizer"},
    "zero2": {"transformer", "pytorch_model", "latest", "zero_to_fp32.py", "zero_to_torch.py"},
    "zero3": {"pytorch_model", "latest", "zero_to_fp32.py", "zero_to_torch.py"},
    "fsdp1": {"pytorch_model_fsdp_0", "optimizer_0"},
    "fsdp2": {"pytorch_model_fsdp_0", "optimizer_0"},
}


def resolves_to(recipe: str) -> str:
    """Returns the backend that a launch recipe makes: its own name, but for one process."""
    return {"plain": "single"}.get(recipe, recipe)


def launcher(backend: str, kind: str, world_size: int) -> list[str]:
    flags = ["--num_processes", str(world_size), "--num_machines", "1", "--dynamo_backend", "no"]
    return [*flags, *(flag.format(layers=LAYERS[kind]) for flag in LAUNCHER[backend])]


def variables(backend: str, kind: str, world_size: int) -> dict[str, str]:
    """Returns the variables that accelerate's launcher adds for these flags."""
    asked = launch_command_parser().parse_args([*launcher(backend, kind, world_size), "train.py"])
    args = _validate_launch_command(asked)[0]
    args.deepspeed_fields_from_accelerate_config = ""  # there is no file of accelerate's own
    if backend == "plain":
        found = prepare_simple_launcher_cmd_env(args)[1]
    else:
        found = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    return {name: value for name, value in found.items() if os.environ.get(name) != value and name != "PYTHONPATH"}


class Ground:
    """A kind of model, a data set, and what one process makes of it with two micro-batches a step."""

    def __init__(self, folder: Path, kind: str, steps: int, **asked: object) -> None:
        self.folder, self.kind, self.steps, self.asked = folder, kind, steps, asked
        self.family, self.mode = kind.split()
        self.model = BUILD[kind](folder / "model")
        self.metadata = tiny.make_dataset(folder / "data", copies=2)
        self.alone = folder / "alone"
        found = runs.train(self.flags(self.alone, gradient_accumulation_steps=2), runs.script(self.family))
        assert found.code == 0, found.stderr

    def flags(self, output_dir: Path, **changes: object) -> list[str]:
        asked = {"train_mode": self.mode, "max_train_steps": self.steps, "checkpointing_steps": self.steps // 2}
        asked |= {"validation_rows": 1, "validation_epochs": 0, "num_train_epochs": None, **self.asked}
        return runs.plain(self.family, self.model, self.metadata, output_dir, **{**asked, **changes})

    def launch(self, backend: str, output_dir: Path, world_size: int = 2, **changes: object) -> runs.Outcome:
        flags = launcher(backend, self.kind, world_size)
        return runs.launch(self.flags(output_dir, **changes), [*flags, "--main_process_port", "0"], family=self.family)

    def ranks(
        self, backend: str, output_dir: Path, world_size: int = 2, work: str = "", **changes: object
    ) -> list[forkserver.Trainer]:
        """Forks the processes of a launch and returns them when they have ended."""
        started = self.start(backend, output_dir, world_size, work, **changes)
        for rank in started:
            rank.wait()
        return started

    def start(
        self, backend: str, output_dir: Path, world_size: int = 2, work: str = "", **changes: object
    ) -> list[forkserver.Trainer]:
        """Forks the processes of a launch."""
        return forkserver.shared().start_ranks(
            world_size,
            self.flags(output_dir, **changes),
            output_dir.with_name(f"{output_dir.name}-{time.monotonic_ns()}.log"),
            work=[work or f"tests.runs.test_backends:train_{self.family.split('.')[0]}"] * world_size,
            environment=variables(backend, self.kind, world_size),
        )


def train_wan2() -> int:
    return runs.script("wan2.1").main()


def train_hunyuanvideo() -> int:
    return runs.script("hunyuanvideo").main()


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground(tmp_path_factory.mktemp("wan"), "wan2.1 normal", 4)


def codes(ranks: list[forkserver.Trainer]) -> list[int | None]:
    return [rank.code for rank in ranks]


def said(ranks: list[forkserver.Trainer]) -> str:
    return "\n".join(rank.said()[-3000:] for rank in ranks)


def movement(model: Path, trained: Path) -> torch.Tensor:
    """Returns how far training has moved all parameters, as one vector."""
    before, after = StoredTensors(model / "transformer"), StoredTensors(trained)
    assert set(before) == set(after)
    return torch.cat([(after[name].float() - before[name].float()).flatten() for name in sorted(before)])


def check_like_alone(ground: Ground, folder: Path) -> None:
    """Checks that a divided run took the same samples, and learned the same, as one process."""
    found, wanted = forkserver.steps(folder), forkserver.steps(ground.alone)
    for name in ("step", "rows", "buckets", "lr", "tokens"):
        assert [line[name] for line in found] == [line[name] for line in wanted], name
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in wanted], abs=0.02)
    assert [line["grad_norm"] for line in found] == pytest.approx([line["grad_norm"] for line in wanted], rel=0.02)
    a, b = (movement(ground.model, run / "transformer") for run in (folder, ground.alone))
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.99
    assert float(a.norm() / b.norm()) == pytest.approx(1, abs=0.02)
    validated = [runs.read_lines(run / "validation.jsonl") for run in (folder, ground.alone)]
    assert [line["loss"] for line in validated[0]] == pytest.approx([line["loss"] for line in validated[1]], abs=0.02)


def check_checkpoint(ground: Ground, backend: str, folder: Path, world_size: int = 2) -> None:
    checkpoint = folder / f"checkpoint-{ground.steps}"
    assert verify(checkpoint, hashes=True) == []
    manifest = read_manifest(checkpoint)
    assert (manifest["world_size"], manifest["description"]["backend"]) == (world_size, resolves_to(backend))
    common = {
        "manifest.json",
        "trainer_state.json",
        "columns.safetensors",
        *(["config.json"] if backend not in ("plain", "ddp") else []),
    }
    assert {path.name for path in checkpoint.iterdir()} == STORED[backend] | common
    if "transformer" in STORED[backend]:
        fp32_params = runs.read_weights(checkpoint / "transformer")
        exported = runs.read_weights(folder / "transformer")
        assert {tensor.dtype for tensor in fp32_params.values()} == {torch.float32}
        assert all(torch.equal(fp32_params[name].to(t.dtype), t) for name, t in exported.items())


def check_resumed(ground: Ground, folder: Path) -> None:
    """Checks that the second half, done twice, was the same to the last bit."""
    again = [line for line in forkserver.steps(folder) if line["step"] > ground.steps // 2]
    (superseded,) = folder.glob("superseded-*")
    before = forkserver.steps(superseded)
    assert [line["step"] for line in before] == list(range(ground.steps // 2 + 1, ground.steps + 1))
    assert again == before
    # the export of the run that was superseded is kept aside only where it differs
    assert not (folder / "transformer-superseded").exists()


def check_export(ground: Ground, folder: Path) -> None:
    model = getattr(diffusers, CLASSES[ground.family]).from_pretrained(folder / "transformer")
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def convert(folder: Path, step: int) -> runs.Outcome:
    """Converts a checkpoint by the published command."""
    checkpoint = folder / f"checkpoint-{step}"
    outputs = checkpoint.with_name(f"{checkpoint.name}-outputs")
    command = [sys.executable, "scripts/zero_to_bf16.py", str(checkpoint), str(outputs)]
    found = runs.run_command([*command, "--max_shard_size", "80GB", "--safe_serialization"], outputs)
    assert found.code == 0, found.stdout + found.stderr
    return found


def check_launched(ground: Ground, backend: str, folder: Path, world_size: int = 2, **changes: object) -> None:
    """Checks that the users' own launcher flags make this backend, and that it trains to the end."""
    found = ground.launch(backend, folder, world_size, **changes)
    assert found.code == 0, found.stdout[-2000:] + found.stderr[-6000:]
    assert f"backend     {resolves_to(backend)} (" in found.stdout
    assert f"processes   {world_size}\n" in found.stdout


def check_gone_on(ground: Ground, backend: str, folder: Path, world_size: int = 2, **changes: object) -> None:
    """Checks that a finished run goes on from its middle, to the same end."""
    halfway = folder / f"checkpoint-{ground.steps // 2}"
    ranks = ground.ranks(backend, folder, world_size, resume_from_checkpoint=halfway, **changes)
    assert codes(ranks) == [0] * world_size, said(ranks)
    assert f"backend     {resolves_to(backend)} (" in ranks[0].said()
    check_resumed(ground, folder)


def check_backend(ground: Ground, backend: str, folder: Path) -> None:
    check_launched(ground, backend, folder)
    check_like_alone(ground, folder)
    check_checkpoint(ground, backend, folder)
    check_export(ground, folder)
    check_gone_on(ground, backend, folder)


# ---------------------------------------------------------------------------------------- trained, resumed, exported


@pytest.mark.parametrize("backend", DIVIDED)
def test_a_backend_trains_as_one_process_resumes_and_exports(wan: Ground, tmp_path: Path, backend: str) -> None:
    check_backend(wan, backend, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["zero3", "fsdp1", "fsdp2"])
def test_sharded_checkpoints_hold_whole_weights_when_asked(wan: Ground, tmp_path: Path, backend: str) -> None:
    folder = tmp_path / "run"
    ranks = wan.ranks(backend, folder, save_whole_weights=True)
    assert codes(ranks) == [0, 0], said(ranks)
    for step in (wan.steps // 2, wan.steps):
        whole = runs.read_weights(folder / f"checkpoint-{step}" / "transformer")
        assert {tensor.dtype for tensor in whole.values()} == {torch.float32}
        converted = convert(folder, step)
        assert "already holds the weights whole" in converted.stdout
        bf16 = runs.read_weights(converted.folder)
        assert bf16.keys() == whole.keys()
        assert all(torch.equal(bf16[name], whole[name].bfloat16()) for name in whole)
        model = diffusers.WanTransformer3DModel.from_pretrained(folder / f"checkpoint-{step}" / "transformer")
        assert all(torch.equal(whole[name], value) for name, value in model.state_dict().items())
    ranks = wan.ranks(backend, folder, resume_from_checkpoint=folder / f"checkpoint-{wan.steps // 2}")
    assert codes(ranks) == [0, 0], said(ranks)  # with or without the flag
    check_resumed(wan, folder)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", *DIVIDED])
def test_accelerates_own_configuration_files_launch_their_backend(wan: Ground, tmp_path: Path, backend: str) -> None:
    file = f"config/accelerate/{backend}.yaml"
    flags = ["--config_file", file, "--num_processes", "2", "--main_process_port", "0"]
    found = runs.launch(wan.flags(tmp_path / "run"), flags)
    assert found.code == 0, found.stdout[-2000:] + found.stderr[-6000:]
    assert f"backend     {backend} (" in found.stdout
    assert "processes   2\n" in found.stdout
    check_like_alone(wan, tmp_path / "run")
    check_checkpoint(wan, backend, tmp_path / "run")


def test_the_misprint_of_the_published_zero3_line_is_refused_by_the_launcher(
    capsys: pytest.CaptureFixture[str],
) -> None:
    misprinted = ["--deepspeed_multinode_launcherr" if "multinode" in flag else flag for flag in LAUNCHER["zero3"]]
    with pytest.raises(SystemExit, match="2"):
        launch_command_parser().parse_args([*misprinted, "scripts/wan2.1/train.py"])
    assert "unrecognized arguments: --deepspeed_multinode_launcherr" in capsys.readouterr().err
    assert launch_command_parser().parse_args([*LAUNCHER["zero3"], "scripts/wan2.1/train.py"]).zero_stage == 3


# ------------------------------------------------------------------------------------------------- parts and rates


@pytest.mark.slow
@pytest.mark.parametrize("backend", DIVIDED)
def test_frozen_parts_stay_and_accumulation_is_the_plans(wan: Ground, tmp_path: Path, backend: str) -> None:
    asked = {"trainable_modules": ["attn1"], "trainable_modules_low_learning_rate": ["ffn"]}
    asked |= {"balance": "none"}  # else who waits for whom decides which samples make a step
    ranks = wan.ranks(backend, tmp_path / "run", gradient_accumulation_steps=2, **asked)
    assert codes(ranks) == [0, 0], said(ranks)
    alone = runs.train(wan.flags(tmp_path / "alone", gradient_accumulation_steps=4, **asked))
    found, wanted = forkserver.steps(tmp_path / "run"), forkserver.steps(tmp_path / "alone")
    assert [line["rows"] for line in found] == [line["rows"] for line in wanted]
    assert [line["loss"] for line in found] == pytest.approx(alone.losses, abs=0.02)
    assert [line["grad_norm"] for line in found] == pytest.approx([line["grad_norm"] for line in wanted], rel=0.02)
    before, after = runs.read_weights(wan.model / "transformer"), runs.read_weights(tmp_path / "run" / "transformer")
    for name, tensor in after.items():
        trained = "attn1" in name or "ffn" in name
        assert torch.equal(tensor, before[name].to(tensor.dtype)) is not trained, name


def train_by_sgd() -> int:
    """Trains by plain gradient descent, whose update is the clipped gradient times the rate."""
    script = runs.script()

    def sgd(groups: list[dict], learning_rate: float, **_: object) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=learning_rate)

    script.wiring.make_optimizer = sgd
    return script.main()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "within"), [("ddp", 1e-5), ("fsdp1", 1e-5), ("fsdp2", 1e-5), ("zero2", 1e-2), ("zero3", 1e-2)]
)
def test_a_partly_frozen_model_is_clipped_by_its_global_norm(
    wan: Ground, tmp_path: Path, backend: str, within: float
) -> None:
    # a step so long that the rounding of the weights is nothing beside it
    asked = {"trainable_modules": ["attn1"], "max_train_steps": 1, "lr_warmup_steps": 0, "learning_rate": "10"}
    asked |= {"mixed_precision": "bf16" if backend.startswith("zero") else "no", "save_whole_weights": True}
    alone = wan.ranks(
        "plain", tmp_path / "alone", 1, "tests.runs.test_backends:train_by_sgd", gradient_accumulation_steps=2, **asked
    )
    ranks = wan.ranks(backend, tmp_path / "run", work="tests.runs.test_backends:train_by_sgd", **asked)
    assert codes(alone) + codes(ranks) == [0, 0, 0], said(alone + ranks)
    norm, wanted = (forkserver.steps(tmp_path / name)[0]["grad_norm"] for name in ("run", "alone"))
    assert wanted > 0.05  # it is clipped
    assert norm == pytest.approx(wanted, rel=within)
    a, b = (movement(wan.model, tmp_path / name / "checkpoint-1" / "transformer") for name in ("run", "alone"))
    assert float(b.norm()) == pytest.approx(0.5, rel=1e-4)
    assert float((a - b).norm()) <= within * float(b.norm())
    frozen = [name for name in runs.read_weights(wan.model / "transformer") if "attn1" not in name]
    after, before = (
        runs.read_weights(tmp_path / "run" / "checkpoint-1" / "transformer"),
        runs.read_weights(wan.model / "transformer"),
    )
    assert all(torch.equal(after[name], before[name]) for name in frozen)


# ------------------------------------------------------------------------------------------ steps that are left


def train_with_an_infinite_loss() -> int:
    """Trains in a process of two, whose second one has an infinite loss in step 2."""
    script = runs.script()
    losses_of, calls = script.velocity_losses, iter(range(1, 100))

    def infinite_once(*arguments: torch.Tensor) -> torch.Tensor:
        losses = losses_of(*arguments)
        return losses + float("inf") if next(calls) == 2 and os.environ["RANK"] == "1" else losses

    script.velocity_losses = infinite_once
    return script.main()


def train_with_an_unreadable_step() -> int:
    """Trains in a process of several, none of which can read a sample of step 2."""
    script = runs.script()
    accumulate, calls = script.accumulate_gradients, iter(range(1, 100))

    def unreadable_once(*arguments: object) -> torch.Tensor:
        batch = arguments[4]
        if next(calls) == 2:
            batch["weights"] = 0 * batch["weights"]
            batch["bad"] = [BadSample(int(row), "clip", "truncated", "of a test") for row in batch["rows"]]
        return accumulate(*arguments)

    script.accumulate_gradients = unreadable_once
    return script.main()


@pytest.mark.parametrize(
    "backend", ["zero2", "fsdp2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero3", "fsdp1"))]
)
def test_a_loss_that_is_not_finite_leaves_the_step_on_all(wan: Ground, tmp_path: Path, backend: str) -> None:
    ranks = wan.ranks(backend, tmp_path / "run", work="tests.runs.test_backends:train_with_an_infinite_loss")
    assert codes(ranks) == [0, 0], said(ranks)
    assert "step 2 changed nothing: its loss or gradient is not finite" in ranks[0].said()
    found = forkserver.steps(tmp_path / "run")
    assert [line["loss"] is not None for line in found] == [True, False, True, True]
    # step 1 has the learning rate 0 and step 2 is left, so that step 3 sees the weights of the beginning
    assert found[2]["grad_norm"] is not None
    check_export(wan, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("backend", DIVIDED)
def test_a_step_without_a_readable_sample_leaves_the_weights(wan: Ground, tmp_path: Path, backend: str) -> None:
    work = "tests.runs.test_backends:train_with_an_unreadable_step"
    ranks = wan.ranks(backend, tmp_path / "run", work=work, lr_warmup_steps=0)
    assert codes(ranks) == [0, 0], said(ranks)
    ddp = wan.ranks("ddp", tmp_path / "ddp", work=work, lr_warmup_steps=0)
    assert codes(ddp) == [0, 0], said(ddp)
    found, wanted = forkserver.steps(tmp_path / "run"), forkserver.steps(tmp_path / "ddp")
    assert found[1]["grad_norm"] == 0
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in wanted], abs=0.02)
    assert [line["grad_norm"] for line in found] == pytest.approx([line["grad_norm"] for line in wanted], rel=0.02)


# ------------------------------------------------------------------------------------------- other numbers, refusals


def refused(ground: Ground, backend: str, folder: Path, world_size: int = 1, **changes: object) -> str:
    ranks = ground.ranks(backend, folder, world_size, **changes)
    assert set(codes(ranks)) <= {FLAGS, MODEL}, said(ranks)
    return ranks[0].complaint()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", *DIVIDED])
def test_trying_the_largest_first_leaves_nothing(wan: Ground, tmp_path: Path, backend: str) -> None:
    for choice in ("on", "off"):
        ranks = wan.ranks(backend, tmp_path / choice, try_largest_first=choice)
        assert codes(ranks) == [0, 0], said(ranks)
    assert forkserver.steps(tmp_path / "on") == forkserver.steps(tmp_path / "off")
    mine, theirs = (runs.read_weights(tmp_path / choice / "transformer") for choice in ("on", "off"))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    stored = [tmp_path / choice / f"checkpoint-{wan.steps}" for choice in ("on", "off")]
    files = [{p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*.pt")} for root in stored]
    for name in files[0]:  # DeepSpeed's: moments, masters, counters
        one, other = (torch.load(root / name, weights_only=False) for root in stored)
        assert str(one) == str(other), name


@pytest.mark.slow
def test_what_a_backend_cannot_do_is_refused(wan: Ground, tmp_path: Path) -> None:
    whole = shutil.copytree(wan.alone, tmp_path / "whole")
    line = refused(wan, "zero2", tmp_path / "ramp", initial_grad_norm_ratio=5)
    assert "--initial_grad_norm_ratio: 5: DeepSpeed clips every step to the same norm" in line
    line = refused(wan, "fsdp2", whole, resume_from_checkpoint="latest")
    assert "was saved under single, this launch is fsdp2" in line
    assert codes(wan.ranks("fsdp2", tmp_path / "fsdp2", 1)) == [0]
    line = refused(wan, "zero3", tmp_path / "fsdp2", resume_from_checkpoint="latest")
    assert "was saved under fsdp2, this launch is zero3" in line


@pytest.mark.slow
@pytest.mark.parametrize("version", ["1", "2"])
def test_layers_that_the_model_has_not_are_refused(wan: Ground, tmp_path: Path, version: str) -> None:
    flags = [flag.format(layers=LAYERS["hunyuanvideo normal"]) for flag in LAUNCHER["fsdp1"]]
    asked = [
        *flags,
        "--fsdp_version",
        version,
        "--num_processes",
        "1",
        "--num_machines",
        "1",
        "--dynamo_backend",
        "no",
    ]
    found = runs.launch(wan.flags(tmp_path / "run"), [*asked, "--main_process_port", "0"])
    assert found.code != 0
    assert "no layer here is a HunyuanVideoTransformerBlock. Fix: give WanTransformerBlock." in found.stderr
