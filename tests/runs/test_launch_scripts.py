"""Tests of the launch scripts: each one trains on one machine and on two, and failing starts name the cause."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import forkserver
import psutil
import pytest
import runs
import tiny
import torch
from bounded import kill_tree, process_tree, run_bounded

from videox.distributed.accelerator import make_accelerator
from videox.distributed.rendezvous import Participant, read_machine, timeout_seconds
from videox.errors import FLAGS, PEER_LOST, STOPPED, UserError
from videox.weights.expert_names import EXPERTS

SCRIPTS = sorted(path.relative_to(runs.ROOT).as_posix() for path in runs.ROOT.glob("scripts/*/train_*.sh"))
BUILD = {
    ("wan2.1", "normal"): tiny.build_wan_t2v,
    ("wan2.2", "normal"): tiny.build_wan22_t2v,
    ("wan2.2", "i2v"): tiny.build_wan22_i2v,
    ("hunyuanvideo", "normal"): tiny.build_hunyuan_t2v,
    ("hunyuanvideo", "i2v"): tiny.build_hunyuan_i2v,
}
# Small sizes instead of the published ones: flags passed to a script override its own.
SMALL = {
    "image_sample_size": 64, "video_sample_size": 64, "token_sample_size": 64, "video_sample_n_frames": 13,
    "dataloader_num_workers": 0, "max_train_steps": 2, "lr_warmup_steps": 1, "report_to": "none", "report_seconds": 0,
}  # fmt: skip
PLAIN = "scripts/wan2.1/train_plain.sh"
PROCESSES = 2
LIMIT = 60.0  # seconds within which a start that cannot succeed must end


def backend(script: str) -> str:
    """Return the backend that a script's name states, for two processes."""
    name = re.search(r"zero2|zero3|fsdp|plain", Path(script).stem)[0]
    return {"fsdp": "fsdp2", "plain": "ddp"}.get(name, name)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def cluster(machines: int, rank: int, port: int, address: str = "127.0.0.1") -> dict[str, str]:
    """Return the five variables of scripts/machines.sh."""
    numbers = {"MASTER_PORT": port, "WORLD_SIZE": machines, "NUM_PROCESS": PROCESSES, "RANK": rank}
    return {"MASTER_ADDR": address, **{name: str(number) for name, number in numbers.items()}}


class LaunchScript:
    """A launch script with a small model and data set."""

    def __init__(self, script: str, folder: Path) -> None:
        self.script, self.folder = script, folder
        family, mode = Path(script).parent.name, "i2v" if "_i2v" in script else "normal"
        model = BUILD[family, mode](folder / "model")
        metadata = tiny.make_dataset(folder / "data")
        self.variables = {
            "MODEL_NAME": str(model),
            "DATASET_NAME": str(metadata.parent),
            "DATASET_META_NAME": str(metadata),
        }

    def start(self, output_dir: Path, variables: Mapping[str, str], log: Path, **changes: object) -> subprocess.Popen:
        """Start the script as one machine of a launch, with its output in a log file."""
        command = ["bash", self.script, *runs.to_argv({**SMALL, "output_dir": output_dir, **changes})]
        env = runs.child_environment(GLOO_SOCKET_IFNAME="lo", **self.variables, **variables)
        with log.open("wb") as out:
            return subprocess.Popen(command, cwd=runs.ROOT, env=env, stdout=out, stderr=out, start_new_session=True)

    def run(self, output_dir: Path, machines: Sequence[Mapping[str, str]]) -> tuple[list[int], list[str]]:
        """Start the script once per machine, wait until all have ended, and return exit codes and logs."""
        logs = [output_dir.with_name(f"{output_dir.name}-{number}.log") for number in range(len(machines))]
        started = [self.start(output_dir, *machine) for machine in zip(machines, logs, strict=True)]
        try:
            codes = [launch.wait(runs.TIME_LIMIT) for launch in started]
        finally:
            for launch in started:
                if launch.poll() is None:
                    kill_tree(launch.pid)
        return codes, [log.read_text(encoding="utf-8", errors="replace") for log in logs]


def results(script: str, folder: Path) -> list[tuple[Path, str]]:
    """Return the run folders of a launch, with the names of their weights: of Wan2.2 one for each expert."""
    if "wan2.2" not in script:
        return [(folder, "transformer")]
    return [(folder / expert, name) for expert, name in EXPERTS.items()]


def check_trained(script: str, folder: Path, log: str) -> None:
    for run, weights in results(script, folder):
        assert [line["step"] for line in forkserver.read_steps(run)] == [1, 2]
        assert (run / weights / "config.json").is_file()
    assert log.count(f"backend     {backend(script)} (") == len(results(script, folder))
    assert log.count(f"processes   {PROCESSES}") == len(results(script, folder))
    assert "returned a view tensor" not in log, "the user cannot act on torch's warning"


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_launch_script_trains_on_one_machine_and_on_two(script: str, tmp_path: Path) -> None:
    launch_script = LaunchScript(script, tmp_path)
    one, two = tmp_path / "one", tmp_path / "two"
    # one machine, with the variables of a cluster still exported
    codes, logs = launch_script.run(one, [cluster(1, 0, free_port())])
    assert codes == [0], logs[0][-6000:]
    check_trained(script, one, logs[0])
    port = free_port()
    codes, logs = launch_script.run(two, [cluster(2, rank, port) for rank in (1, 0)])
    assert codes == [0, 0], logs[0][-4000:] + logs[1][-4000:]
    for log in logs:
        check_trained(script, two, log)
    assert ["step 2/2" in log for log in logs] == [False, True]  # only machine 0 prints the steps
    for (run, weights), (same, _) in zip(results(script, one), results(script, two), strict=True):
        assert forkserver.read_steps(same) == forkserver.read_steps(run)
        first, second = (runs.read_weights(folder / weights) for folder in (run, same))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_launch_script_is_executable_and_passes_flags(script: str) -> None:
    text = (runs.ROOT / script).read_text(encoding="utf-8")
    assert os.access(runs.ROOT / script, os.X_OK)
    assert text.endswith('"$@"\n')
    assert 'accelerate launch "${MACHINES[@]}" ' in text
    assert "--deepspeed_multinode_launcherr" not in text
    for name in ("MODEL_NAME", "DATASET_NAME", "DATASET_META_NAME", "NCCL_DEBUG"):
        empty_is_kept = name == "DATASET_NAME"  # empty: the paths of the metadata are absolute
        assert f'export {name}="${{{name}{"-" if empty_is_kept else ":-"}' in text
    assert 'NCCL_DEBUG="${NCCL_DEBUG:-WARN}"' in text  # INFO would flood the progress bar
    if "fsdp" in script:
        assert '--fsdp_version "${FSDP_VERSION:-2}"' in text
    for name in ("NCCL_IB_DISABLE", "NCCL_P2P_DISABLE"):
        assert f"\n# export {name}=1\n" in text


# -------------------------------------------------------------------------------------------- lost machines


def is_launcher(pid: int) -> bool:
    return b"accelerate" in Path(f"/proc/{pid}/cmdline").read_bytes() and len(process_tree(pid)) > 1


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["machine", "launcher"])
def test_a_lost_machine_ends_the_other_and_a_lost_launcher_saves(tmp_path: Path, lost: str) -> None:
    launch_script, folder, port = LaunchScript(PLAIN, tmp_path), tmp_path / "run", free_port()
    logs = [tmp_path / f"{rank}.log" for rank in (0, 1)]
    long = {"max_train_steps": 400, "checkpointing_steps": 400, "num_train_epochs": 1000}
    machines = [launch_script.start(folder, cluster(2, rank, port), logs[rank], **long) for rank in (0, 1)]
    try:
        deadline = time.monotonic() + runs.TIME_LIMIT
        while not (folder / "metrics.jsonl").exists() or len(forkserver.read_steps(folder)) < 2:
            assert time.monotonic() < deadline and machines[0].poll() is None, logs[0].read_text()[-3000:]
            time.sleep(0.1)
        victims = process_tree(machines[1].pid)
        for victim in victims if lost == "machine" else filter(is_launcher, victims):
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        assert machines[0].wait(30) != 0
    finally:
        for machine in machines:
            if machine.poll() is None:
                kill_tree(machine.pid)
    status = forkserver.read_status(folder)
    if lost == "machine":
        assert (status["state"], status["exit_code"]) == ("failed", PEER_LOST)
        assert "peer lost: process 1 on " in status["error"]
        assert status["error"] in logs[0].read_text(encoding="utf-8", errors="replace")
        return
    # torchrun tells the trainers that a launcher has left; all save a checkpoint and stop at the end of the step
    assert (status["state"], status["exit_code"]) == ("stopped", STOPPED)
    assert (folder / f"checkpoint-{status['step']}" / "manifest.json").is_file()


# ------------------------------------------------------------------------------------- starts that cannot succeed


def failed(script: str, tmp_path: Path, **variables: str) -> tuple[int, str, float]:
    """Return exit code, error line and duration in seconds of a start that fails before it reads a model."""
    variables = {**cluster(2, 0, free_port()), **variables}
    environment = {name: value for name, value in runs.child_environment(**variables).items() if value != "unset"}
    begin = time.monotonic()
    command = ["bash", script, "--output_dir", str(tmp_path / "run")]
    done = run_bounded(command, LIMIT, cwd=runs.ROOT, env=environment)
    lines = [line for line in done.stderr.splitlines() if line and not line.startswith("waiting for ")]
    assert len(lines) == 1, done.stderr
    return done.returncode, lines[0], time.monotonic() - begin


def test_a_machine_that_does_not_join_is_named(tmp_path: Path) -> None:
    port = str(free_port())
    code, line, _ = failed(PLAIN, tmp_path, MASTER_PORT=port, VIDEOX_MEETING_SECONDS="1")
    assert code == PEER_LOST
    assert f"error: 127.0.0.1:{port}: machine 1 of 2 has not joined within 1 s" in line
    code, line, _ = failed(PLAIN, tmp_path, MASTER_PORT=port, RANK="1", VIDEOX_MEETING_SECONDS="1")
    assert code == PEER_LOST
    assert f"error: 127.0.0.1:{port}: machine 0 does not answer at this address" in line
    assert "VIDEOX_MEETING_SECONDS=600 waits for ten minutes" in line


@pytest.mark.slow
def test_a_missing_machine_is_named_within_a_minute_by_default(tmp_path: Path) -> None:
    _, line, seconds = failed(PLAIN, tmp_path, WORLD_SIZE="3", NUM_PROCESS="3")
    assert "machine 1, 2 of 3 has not joined within 45 s" in line
    assert seconds < LIMIT


def join() -> int:
    make_accelerator("no")
    return 0


@pytest.mark.slow
def test_a_process_that_does_not_join_is_named(tmp_path: Path) -> None:
    # without a launcher that hosts the store; torch would wait for an hour
    port = str(free_port())
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "VIDEOX_MEETING_SECONDS": "1"}
    messages = ("process 1 of 2 has not joined within 1 s", "machine 0 does not answer at this address")
    for rank, message in zip(("0", "1"), messages, strict=True):
        alone = {**names, "RANK": rank, "LOCAL_RANK": "0"}
        process = forkserver.shared().run(
            [], tmp_path / f"log-{rank}", environment=alone, entry_point="tests.runs.test_launch_scripts:join"
        )
        assert process.code == PEER_LOST
        assert f"error: 127.0.0.1:{port}: {message}" in process.error_line()


def test_a_busy_port_is_named(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as other:
        port = str(other.getsockname()[1])
        code, line, _ = failed(PLAIN, tmp_path, MASTER_PORT=port, VIDEOX_MEETING_SECONDS="5")
        assert (code, f"error: 127.0.0.1:{port}: port {port} is used here by another program" in line) == (7, True)


@pytest.mark.slow
def test_an_address_that_is_not_machine_0_is_named(tmp_path: Path) -> None:
    for rank, host, message in (
        ("0", "203.0.113.1", "this machine cannot be reached there"),
        ("1", "machine-0.invalid", "machine 0 does not answer at this address"),
    ):
        where = {"MASTER_ADDR": host, "MASTER_PORT": "10086", "RANK": rank, "VIDEOX_MEETING_SECONDS": "4"}
        code, line, _ = failed(PLAIN, tmp_path, **where)
        assert (code, f"error: {host}:10086: {message}" in line) == (PEER_LOST, True), line
    with socket.create_server(("", 0)) as other:  # listens, but is not a store
        where = {"MASTER_PORT": str(other.getsockname()[1]), "RANK": "1", "VIDEOX_MEETING_SECONDS": "4"}
        code, line, _ = failed(PLAIN, tmp_path, **where)
        assert (code, "another program than machine 0 answers there" in line) == (PEER_LOST, True)


VARIABLES = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "10086", "WORLD_SIZE": "2", "NUM_PROCESS": "16", "RANK": "1"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MASTER_ADDR": ""}, "MASTER_ADDR not set"),
        ({"NUM_PROCESS": "", "RANK": ""}, "NUM_PROCESS and RANK not set"),
        ({"RANK": "2"}, "RANK=2 with WORLD_SIZE=2"),
        ({"NUM_PROCESS": "15"}, "NUM_PROCESS=15 processes on WORLD_SIZE=2 machines"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http' is not a number"),
    ],
)
def test_invalid_variables_are_errors(changes: dict[str, str], message: str) -> None:
    assert read_machine(VARIABLES) == ("10.0.0.1", 10086, Participant("machine", 1, 2))
    with pytest.raises(UserError, match=message) as raised:
        read_machine({**VARIABLES, **changes})
    assert raised.value.exit_code == FLAGS


@pytest.mark.parametrize("text", ["", "0", "-3", "soon", "nan"])
def test_an_invalid_timeout_is_an_error(text: str) -> None:
    assert timeout_seconds({"VIDEOX_MEETING_SECONDS": "2.5"}) == 2.5
    with pytest.raises(UserError, match="VIDEOX_MEETING_SECONDS"):
        timeout_seconds({"VIDEOX_MEETING_SECONDS": text})


# --------------------------------------------------------------------------------------------------- hanging tests


def hang() -> int:
    while True:
        time.sleep(0.1)


@pytest.mark.slow
def test_a_rank_that_hangs_is_killed_with_the_others(tmp_path: Path) -> None:
    ranks = forkserver.shared().start_ranks(
        3, [], tmp_path / "log", entry_points=["tests.runs.test_launch_scripts:hang"] * 3
    )
    with pytest.raises(AssertionError, match=r"still running after 0\.2 s"):
        ranks[1].wait(0.2)
    assert 0 not in [rank.wait(10) for rank in ranks]
    late = forkserver.shared().start([], tmp_path / "late", entry_point="tests.runs.test_launch_scripts:hang")
    with pytest.raises(AssertionError, match=r"the condition is still false after 0\.2 s"):
        late.wait_until(lambda: False, timeout=0.2)
    assert late.wait(10) != 0


def test_a_launch_that_hangs_is_killed_with_its_child_sessions(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    line = f"for i in 1 2; do setsid bash -c 'echo $$ >> {pids}; sleep 100; true' & done; echo begun; wait"
    with pytest.raises(AssertionError, match=r"still running after 1 s"):
        run_bounded(["bash", "-c", line], 1, cwd=tmp_path, env=os.environ)
    numbers = [int(number) for number in pids.read_text(encoding="ascii").split()]
    assert len(numbers) == 2
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(number) and psutil.Process(number).status() != "zombie" for number in numbers):
        assert time.monotonic() < deadline
        time.sleep(0.01)
