"""Tests of videox.distributed.launcher: what is checked inside `accelerate launch`, before a process starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import runs
import tiny

from videox.distributed import gpus
from videox.distributed.launcher import check_launch
from videox.errors import UserError

environments = tiny.load_script("benchmarks/environments.py")
EIGHT_GPUS, TWO_MACHINES, FSDP_YAML = environments.EIGHT_GPUS, environments.TWO_MACHINES, environments.FSDP_YAML
ACCELERATE = "/bin/python /bin/accelerate launch"
TRAIN = "scripts/wan2.1/train.py --output_dir x"


def home(tmp_path: Path, config: str) -> dict[str, str]:
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate/default_config.yaml").write_text(config, encoding="utf-8")
    return {"HF_HOME": str(tmp_path), "VIDEOX_MEETING_SECONDS": "1"}


@pytest.fixture(autouse=True)
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "visible_gpus", lambda _: 2)


@pytest.mark.parametrize(
    ("config", "flags", "message"),
    [
        (EIGHT_GPUS, "", r"default_config\.yaml.*: 8 processes are asked for on this machine, but it has 2 GPUs"),
        (TWO_MACHINES, "", r"default_config\.yaml.*: it is for 2 machines, and 4 processes are asked for on this machine"),
        (TWO_MACHINES, "--num_processes=2", r"default_config\.yaml.*: it is for 2 machines, and machine 1 of 2 has not joined"),
        (TWO_MACHINES.replace("127.0.0.1", "null"), "--num_processes 2", "without a valid main_process_ip"),
        (FSDP_YAML, "", r"default_config\.yaml.*: no layer of diffusers' transformers is called WanAttentionBlock"),
        (EIGHT_GPUS, "--num_processes=2 --use_fsdp --fsdp_transformer_layer_cls_to_wrap=WanAttentionBlock",
         "--fsdp_transformer_layer_cls_to_wrap: no layer"),
    ],
)  # fmt: skip
def test_a_configuration_for_another_machine_is_named(tmp_path: Path, config: str, flags: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_launch(f"{ACCELERATE} {flags} {TRAIN}".split(), home(tmp_path, config))


def test_the_fix_names_the_script_that_was_launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["/lib/accelerate/commands/launch.py", "scripts/hunyuanvideo/train.py"]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(gpus, "visible_gpus", lambda _: 1)
    with pytest.raises(UserError) as error:
        check_launch(command, home(tmp_path, EIGHT_GPUS))
    assert "`python scripts/hunyuanvideo/train.py` without a launcher" in error.value.hint


@pytest.mark.parametrize(
    ("config", "command"),
    [
        (EIGHT_GPUS, f"{ACCELERATE} --num_processes=2 {TRAIN}"),
        (EIGHT_GPUS, f"{ACCELERATE} --config_file x.yaml {TRAIN}"),
        (EIGHT_GPUS, f"{ACCELERATE} --cpu {TRAIN}"),
        (EIGHT_GPUS, f"{ACCELERATE} other/train.py"),
        (EIGHT_GPUS, f"/bin/torchrun {TRAIN}"),
        (EIGHT_GPUS.replace(": 8", ": 2"), f"{ACCELERATE} {TRAIN}"),
        (TWO_MACHINES, f"{ACCELERATE} --num_machines=1 --num_processes=2 {TRAIN}"),
    ],
)
def test_what_the_command_line_says_is_obeyed(tmp_path: Path, config: str, command: str) -> None:
    check_launch(command.split(), home(tmp_path, config))


def test_a_left_over_engine_is_named_by_the_launcher(tmp_path: Path) -> None:
    variables = {"ACCELERATE_USE_DEEPSPEED": "true", "HF_HOME": str(tmp_path)}
    with pytest.raises(UserError, match=r"ACCELERATE_USE_DEEPSPEED=true: left over.*`unset ACCELERATE_USE_DEEPSPEED`"):
        check_launch(f"{ACCELERATE} --multi_gpu {TRAIN}".split(), variables)
    for flags in ("--use_deepspeed", "--config_file config/accelerate/zero2.yaml"):
        check_launch(f"{ACCELERATE} {flags} {TRAIN}".split(), variables)


@pytest.mark.slow
def test_torch_calls_the_check_in_a_launcher(tmp_path: Path) -> None:
    """A launch ends before torchrun starts a process, without a traceback, by the package's entry point."""
    site = environments.entry_points(tmp_path / "site")
    config = TWO_MACHINES.replace("127.0.0.1", "null")
    variables = {**home(tmp_path, config), "PYTHONPATH": f"{runs.ROOT}:{site}", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision=bf16", *TRAIN.split()],
        cwd=runs.ROOT, env=runs.child_environment(**variables), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "default_config.yaml" in line and "2 machines" in line and "`mv " in line
    assert "Traceback" not in done.stderr
