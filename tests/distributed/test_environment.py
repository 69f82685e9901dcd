"""Tests of videox.distributed.environment and accelerate_config: left-over variables, and what is set aside."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest
import torch

from videox.distributed import environment, gpus
from videox.distributed.accelerate_config import default_config, launch_options, read_config
from videox.distributed.environment import check_environment, check_environment_once, settle_environment
from videox.errors import FLAGS, PeerFailed, UserError

WORLD = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
ONE = {**WORLD, "WORLD_SIZE": "1"}
CPU = {"ACCELERATE_USE_CPU": "true"}
WRAP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("variables", "where", "fix"),
    [
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE=8", "`unset WORLD_SIZE`"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "WORLD_SIZE=2, RANK=1", "`unset WORLD_SIZE RANK`"),
        ({**WORLD, "LOCAL_RANK": ""}, "WORLD_SIZE=2, RANK=0", "--num_machines"),
        ({**WORLD, "LOCAL_RANK": "-1"}, "WORLD_SIZE=2, RANK=0", "--num_machines"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'", "`unset WORLD_SIZE`"),
        ({"RANK": "-3"}, "RANK='-3'", "`unset RANK`"),
        ({**WORLD, "RANK": "2"}, "RANK=2", "`unset WORLD_SIZE RANK LOCAL_RANK MASTER_ADDR MASTER_PORT`"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED=true", "`unset ACCELERATE_USE_DEEPSPEED`"),
        ({"ACCELERATE_USE_FSDP": "1"}, "ACCELERATE_USE_FSDP=1", "`unset ACCELERATE_USE_FSDP`"),
        ({**WORLD, **CPU, "ACCELERATE_USE_DEEPSPEED": "True"}, "ACCELERATE_USE_DEEPSPEED=True", "`unset ACCEL"),
        ({**WORLD, **CPU, "ACCELERATE_USE_FSDP": "true"}, "ACCELERATE_USE_FSDP=true", "`unset ACCELERATE_USE_FSDP`"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE=4", "`unset OMPI_COMM_WORLD_SIZE`"),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, "PMI_SIZE=2", "`unset PMI_SIZE`"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "ACCELERATE_USE_MEGATRON_LM=true", "`unset ACCELERATE_USE_MEGATRON_LM`"),
        ({"ACCELERATE_USE_SAGEMAKER": "1"}, "ACCELERATE_USE_SAGEMAKER=1", "`unset ACCELERATE_USE_SAGEMAKER`"),
        ({"ACCELERATE_USE_CPU": "maybe"}, "ACCELERATE_USE_CPU='maybe'", "`unset ACCELERATE_USE_CPU`"),
        ({"ACCELERATE_USE_FSDP": ""}, "ACCELERATE_USE_FSDP=''", "`unset ACCELERATE_USE_FSDP`"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "x"}, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS='x'", "`unset ACCELERATE_GRADIENT"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "ACCELERATE_DYNAMO_BACKEND=INDUCTOR", "`unset ACCELERATE_DYNAMO_BACKEND`"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "ACCELERATE_MIXED_PRECISION=fp16", "`unset ACCELERATE_MIXED_PRECISION`"),
        ({"OMP_THREAD_LIMIT": "1", "OMP_NUM_THREADS": "2"}, "OMP_THREAD_LIMIT=1", "export OMP_NUM_THREADS=1"),
        ({"ACCELERATE_MIXED_PRECISION": "bfloat16"}, "ACCELERATE_MIXED_PRECISION=bfloat16", "--mixed_precision=bf16"),
        (
            {**WORLD, **CPU, **WRAP, "FSDP_TRANSFORMER_CLS_TO_WRAP": "WanAttentionBlock"},
            "--fsdp_transformer_layer_cls_to_wrap",
            "--fsdp_transformer_layer_cls_to_wrap=WanTransformerBlock ",
        ),
        (
            {**WORLD, **CPU, **WRAP, "FSDP_TRANSFORMER_CLS_TO_WRAP": "MMDoubleStreamBlock,MMSingleStreamBlock"},
            "--fsdp_transformer_layer_cls_to_wrap",
            "=HunyuanVideoTransformerBlock,HunyuanVideoSingleTransformerBlock ",
        ),
    ],
)  # fmt: skip
def test_a_left_over_variable_is_named_with_the_command(variables: dict[str, str], where: str, fix: str) -> None:
    with pytest.raises(UserError) as error:
        check_environment(variables)
    assert error.value.where == where
    assert fix in error.value.hint
    assert error.value.exit_code == FLAGS
    assert "\n" not in error.value.line()


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {**WORLD, **CPU},
        ONE,
        {"LOCAL_RANK": "0"},
        {"OMP_THREAD_LIMIT": "2", "OMP_NUM_THREADS": "2"},
        {"OMP_THREAD_LIMIT": "256"},
        {"LOCAL_RANK": "-1"},
        {"RANK": "3", "LOCAL_RANK": "3"},
        {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "192.0.2.7"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
        {**WORLD, **CPU, "OMPI_COMM_WORLD_SIZE": "2"},
        {**WORLD, "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
        {**WORLD, **WRAP, "FSDP_TRANSFORMER_CLS_TO_WRAP": "WanTransformerBlock"},
        {"ACCELERATE_USE_DEEPSPEED": "false", "ACCELERATE_MIXED_PRECISION": "bf16"},
        {"ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_CPU": "y", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
    ],
)
def test_an_environment_that_works_is_accepted(variables: dict[str, str]) -> None:
    check_environment(variables)


def test_an_empty_precision_is_none() -> None:
    variables = {"ACCELERATE_MIXED_PRECISION": ""}
    check_environment(variables)
    settle_environment(variables)
    assert variables == {}


def test_the_precision_of_the_flags_wins() -> None:
    check_environment({"ACCELERATE_MIXED_PRECISION": "fp16"}, "bf16")


@pytest.mark.parametrize(
    "variables", [{"LOCAL_RANK": "0"}, {"RANK": "3", "LOCAL_RANK": "3"}, {**ONE, "LOCAL_WORLD_SIZE": "1"}]
)
def test_one_process_needs_no_address(variables: dict[str, str]) -> None:
    left = {**variables, "HOME": "x"}
    lines = settle_environment(left)
    assert left == {"HOME": "x"}
    assert len(lines) == 1 and all(name in lines[0] for name in variables if name != "LOCAL_WORLD_SIZE")
    assert settle_environment(left) == []


def test_several_processes_keep_their_variables() -> None:
    several = {**WORLD, "LOCAL_WORLD_SIZE": "2"}
    assert settle_environment(several) == []
    assert several == {**WORLD, "LOCAL_WORLD_SIZE": "2"}


def test_a_sharded_world_of_one_meets_on_this_machine() -> None:
    with socket.create_server(("", 0)) as busy:
        port = str(busy.getsockname()[1])
        far = {**ONE, **WRAP, "MASTER_ADDR": "192.0.2.7", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "False"}
        settle_environment(far)
        assert far["MASTER_ADDR"] == "127.0.0.1" and far["MASTER_PORT"] != port
    free = closed_port()
    far = {**ONE, **WRAP, "MASTER_ADDR": "192.0.2.7", "MASTER_PORT": free}
    settle_environment(far)
    assert (far["MASTER_ADDR"], far["MASTER_PORT"], far["RANK"]) == ("127.0.0.1", free, "0")


def test_a_launcher_that_ended_is_named_and_one_that_answers_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "SECONDS_FOR_AGENT", 0.1)
    torchrun = {
        **WORLD, **CPU, "GROUP_RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "none",
        "LOCAL_WORLD_SIZE": "2",
    }  # fmt: skip
    with pytest.raises(UserError, match="does not answer") as error:
        check_environment({**torchrun, "MASTER_PORT": closed_port()})
    assert error.value.where == "TORCHELASTIC_RUN_ID=none"
    assert (
        "`unset WORLD_SIZE RANK LOCAL_RANK MASTER_ADDR MASTER_PORT LOCAL_WORLD_SIZE GROUP_RANK TORCHELASTIC_RUN_ID"
        in error.value.hint
    )
    with socket.create_server(("127.0.0.1", 0)) as store:
        check_environment({**torchrun, "MASTER_PORT": str(store.getsockname()[1])})
    # on another machine than the first the store may open later: torch's rendezvous waits for it
    check_environment({**torchrun, "MASTER_PORT": closed_port(), "GROUP_RANK": "1"})


def test_of_several_processes_the_first_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "SECONDS_FOR_FIRST", 0.0)
    wrong = {**WORLD, "ACCELERATE_USE_DEEPSPEED": "true"}
    with pytest.raises(UserError):
        check_environment_once(wrong)
    with pytest.raises(PeerFailed) as error:
        check_environment_once({**wrong, "RANK": "1", "LOCAL_RANK": "1"})
    assert not error.value.should_print and error.value.exit_code == FLAGS
    with pytest.raises(UserError):  # a left-over LOCAL_RANK silences nobody
        check_environment_once({"LOCAL_RANK": "1", "ACCELERATE_USE_DEEPSPEED": "true"})


@pytest.mark.parametrize(
    ("count", "processes", "engine", "message"),
    [
        (1, 8, {}, "8 processes are asked for on this machine, but it has 1 GPU"),
        (4, 8, WRAP, "8 processes are asked for on this machine, but it has 4 GPUs"),
        (0, 2, {}, "2 processes are asked for on this machine, but no GPU was found"),
        (0, 2, WRAP, ""),  # FSDP runs on CPUs
        (8, 8, {}, ""),
        (None, 8, {}, ""),  # not NVIDIA's: torch says so itself
        (1, 8, CPU, ""),
    ],
)
def test_more_processes_than_gpus_are_refused(
    monkeypatch: pytest.MonkeyPatch, count: int | None, processes: int, engine: dict[str, str], message: str
) -> None:
    monkeypatch.setattr(gpus, "visible_gpus", lambda _: count)
    launched = {**WORLD, "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": str(processes), **engine}
    if not message:
        return check_environment(launched)
    with pytest.raises(UserError, match=message) as error:
        check_environment(launched)
    assert f"--num_processes={max(count or 0, 1)}" in error.value.hint


def test_visible_gpus_agree_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = gpus.visible_gpus(os.environ)
    assert counted in (None, torch.cuda.device_count())
    build = gpus.torch_build()
    assert build == gpus.TorchBuild(torch.__version__, torch.version.cuda, torch.version.hip, torch.version.xpu)
    assert [gpus.count_visible({"CUDA_VISIBLE_DEVICES": text}, 4) for text in ("", "-1", "0", "2,3", "3,9,1", "GPU-5e,1")] == [
        0, 0, 1, 2, 1, 2,
    ]  # fmt: skip
    assert gpus.count_visible({}, 4) == 4


def test_a_broken_driver_is_unknown_and_not_zero(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpus, "torch_build", lambda: gpus.TorchBuild("2", "13.0", None, None))
    monkeypatch.setattr(gpus, "driver", lambda: None)
    assert gpus.visible_gpus({}, tmp_path) == 0
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    assert gpus.visible_gpus({}, tmp_path) is None


def test_windows_gets_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(UserError, match="native Windows is not supported") as error:
        check_environment({})
    assert "WSL2" in error.value.hint


# -------------------------------------------------------------------------------------------- what accelerate read


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("python -m accelerate.commands.launch --cpu x.py", {"--cpu": ""}),
        ("/bin/python /lib/accelerate/commands/launch.py --num_processes=2 x.py --lr 1", {"--num_processes": "2"}),
        (
            "/bin/python /bin/accelerate launch --multi_gpu --num-machines 2 x.py",
            {"--multi_gpu": "", "--num_machines": "2"},
        ),
        ("/bin/accelerate-launch --config_file a.yaml scripts/x.py", {"--config_file": "a.yaml"}),
        ("/bin/accelerate config", None),
        ("/bin/torchrun --nproc-per-node 2 x.py", None),
        ("/bin/python /home/me/launch.py x.py", None),
        ("", None),
    ],
)
def test_options_of_the_launcher_are_read(command: str, options: dict[str, str] | None) -> None:
    assert launch_options(command.split()) == options


def test_the_default_configuration_is_found_where_accelerate_looks(tmp_path: Path) -> None:
    variables = {"HF_HOME": str(tmp_path)}
    assert default_config(variables) is None
    (tmp_path / "accelerate").mkdir()
    path = tmp_path / "accelerate/default_config.yaml"
    path.write_text("num_machines: 2\nmain_process_ip: null\nfsdp_config:\n  fsdp_version: 2\n", encoding="utf-8")
    config = default_config(variables)
    assert (config.path, config.number("num_machines"), config.number("num_processes")) == (path, 2, 1)
    assert (config.text("main_process_ip"), config.text("fsdp_config.fsdp_version"), config.text("x.y")) == (
        "",
        "2",
        "",
    )
    for text in ("a: [", "- 1", ""):
        path.write_text(text, encoding="utf-8")
        assert read_config(path).problem
