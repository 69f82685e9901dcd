"""Serves who starts a training by one of the shell scripts: each one is run, on one machine and on two."""

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

SCRIPTS = sorted(path.relative_to(runs.ROOT).as_posix() for path in runs.ROOT.glob("scripts/*/train_*.sh"))
BUILD = {
    ("wan2.1", "normal"): tiny.build_wan_t2v,
    ("hunyuanvideo", "normal"): tiny.build_hunyuan_t2v,
    ("hunyuanvideo", "i2v"): tiny.build_hunyuan_i2v,
}
# What the published sizes are replaced by: flags given to a script come last, and win.
SMALL = {
    "image_sample_size": 64, "video_sample_size": 64, "token_sample_size": 64, "video_sample_n_frames": 13,
    "dataloader_num_workers": 0, "max_train_steps": 2, "lr_warmup_steps": 1, "report_to": "none",
}  # fmt: skip
PLAIN = "scripts/wan2.1/train_plain.sh"
PROCESSES = 2
LIMIT = 60.0  # seconds after which a start that cannot succeed has ended


def backend(script: str) -> str:
    """Returns the backend that a script's name promises, for two processes."""
    recipe = re.search(r"zero2|zero3|fsdp|plain", Path(script).stem)[0]
    return {"fsdp": "fsdp1", "plain": "ddp"}.get(recipe, recipe)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def cluster(machines: int, rank: int, port: int, address: str = "127.0.0.1") -> dict[str, str]:
    """Returns the five variables."""
    numbers = {"MASTER_PORT": port, "WORLD_SIZE": machines, "NUM_PROCESS": PROCESSES, "RANK": rank}
    return {"MASTER_ADDR": address, **{name: str(number) for name, number in numbers.items()}}


class Recipe:
    """A launch script over a small model and data set."""

    def __init__(self, script: str, folder: Path) -> None:
        self.script, self.folder = script, folder
        family, mode = Path(script).parent.name, "i2v" if "_i2v" in script else "normal"
        model = BUILD[family, mode](folder / "model")
        metadata = tiny.make_dataset(folder / "data")
        self.names = {
            "MODEL_NAME": str(model),
            "DATASET_NAME": str(metadata.parent),
            "DATASET_META_NAME": str(metadata),
        }

    def start(self, output_dir: Path, variables: Mapping[str, str], log: Path, **changes: object) -> subprocess.Popen:
        """Starts the script as a shell would on one machine."""
        command = ["bash", self.script, *runs.to_argv({**SMALL, "output_dir": output_dir, **changes})]
        asked = runs.child_environment(GLOO_SOCKET_IFNAME="lo", **self.names, **variables)
        with log.open("wb") as out:
            return subprocess.Popen(command, cwd=runs.ROOT, env=asked, stdout=out, stderr=out, start_new_session=True)

    def run(self, output_dir: Path, machines: Sequence[Mapping[str, str]]) -> tuple[list[int], list[str]]:
        """Starts the script on each machine; returns exit codes and what was said when all have ended."""
        logs = [output_dir.with_name(f"{output_dir.name}-{number}.log") for number in range(len(machines))]
        started = [self.start(output_dir, *given) for given in zip(machines, logs, strict=True)]
        try:
            found = [launch.wait(runs.TIME_LIMIT) for launch in started]
        finally:
            for launch in started:
                if launch.poll() is None:
                    kill_tree(launch.pid)
        return found, [log.read_text(encoding="utf-8", errors="replace") for log in logs]


def check_trained(script: str, folder: Path, said: str) -> None:
    assert f"backend     {backend(script)} (" in said
    assert f"processes   {PROCESSES}" in said
    assert [line["step"] for line in forkserver.read_steps(folder)] == [1, 2]
    assert (folder / "transformer" / "config.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_launch_script_trains_on_one_machine_and_on_two(script: str, tmp_path: Path) -> None:
    recipe = Recipe(script, tmp_path)
    one, two = tmp_path / "one", tmp_path / "two"
    # the variables of a cluster, still exported where there is but one machine
    codes, said = recipe.run(one, [cluster(1, 0, free_port())])
    assert codes == [0], said[0][-6000:]
    check_trained(script, one, said[0])
    port = free_port()
    codes, said = recipe.run(two, [cluster(2, rank, port) for rank in (1, 0)])
    assert codes == [0, 0], said[0][-4000:] + said[1][-4000:]
    for machine in said:
        check_trained(script, two, machine)
    assert ["step 2/2" in machine for machine in said] == [False, True]  # machine 0 alone tells of the steps
    assert forkserver.read_steps(two) == forkserver.read_steps(one)
    here, there = (runs.read_weights(run / "transformer") for run in (one, two))
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_launch_script_can_be_run_and_passes_flags_on(script: str) -> None:
    text = (runs.ROOT / script).read_text(encoding="utf-8")
    assert os.access(runs.ROOT / script, os.X_OK)
    assert text.endswith('"$@"\n')
    assert 'accelerate launch "${MACHINES[@]}" ' in text
    assert "--deepspeed_multinode_launcherr" not in text
    for name in ("MODEL_NAME", "DATASET_NAME", "DATASET_META_NAME", "NCCL_DEBUG"):
        assert f'export {name}="${{{name}:-' in text
    for name in ("NCCL_IB_DISABLE", "NCCL_P2P_DISABLE"):
        assert f"\n# export {name}=1\n" in text


# -------------------------------------------------------------------------------------------- a machine that is lost


def is_launcher(pid: int) -> bool:
    return b"accelerate" in Path(f"/proc/{pid}/cmdline").read_bytes() and len(process_tree(pid)) > 1


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["machine", "launcher"])
def test_a_lost_machine_ends_the_other_and_a_lost_launcher_saves(tmp_path: Path, lost: str) -> None:
    recipe, folder, port = Recipe(PLAIN, tmp_path), tmp_path / "run", free_port()
    logs = [tmp_path / f"{rank}.log" for rank in (0, 1)]
    long = {"max_train_steps": 400, "checkpointing_steps": 400, "num_train_epochs": 1000}
    machines = [recipe.start(folder, cluster(2, rank, port), logs[rank], **long) for rank in (0, 1)]
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
    # its trainer hears that its launcher has left, and all save and stop at the step's end
    assert (status["state"], status["exit_code"]) == ("stopped", STOPPED)
    assert (folder / f"checkpoint-{status['step']}" / "manifest.json").is_file()


# ------------------------------------------------------------------------------------- starts that cannot succeed


def failed(script: str, tmp_path: Path, **variables: str) -> tuple[int, str, float]:
    """Returns exit code, the one line, and the seconds that a start took; no model is looked at."""
    asked = {**cluster(2, 0, free_port()), **variables}
    environment = {name: value for name, value in runs.child_environment(**asked).items() if value != "unset"}
    begin = time.monotonic()
    command = ["bash", script, "--output_dir", str(tmp_path / "run")]
    done = run_bounded(command, LIMIT, cwd=runs.ROOT, env=environment)
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1, done.stderr
    return done.returncode, lines[0], time.monotonic() - begin


def test_a_machine_that_does_not_come_is_named(tmp_path: Path) -> None:
    port = str(free_port())
    code, line, _ = failed(PLAIN, tmp_path, MASTER_PORT=port, VIDEOX_MEETING_SECONDS="1")
    assert code == PEER_LOST
    assert f"error: 127.0.0.1:{port}: machine 1 of 2 has not joined within 1 s" in line
    code, line, _ = failed(PLAIN, tmp_path, MASTER_PORT=port, RANK="1", VIDEOX_MEETING_SECONDS="1")
    assert code == PEER_LOST
    assert f"error: 127.0.0.1:{port}: machine 0 does not answer at this address" in line
    assert "VIDEOX_MEETING_SECONDS=600 waits for ten minutes" in line


@pytest.mark.slow
def test_without_a_word_on_it_a_missing_machine_is_named_within_a_minute(tmp_path: Path) -> None:
    _, line, seconds = failed(PLAIN, tmp_path, WORLD_SIZE="3", NUM_PROCESS="3")
    assert "machine 1, 2 of 3 has not joined within 45 s" in line
    assert seconds < LIMIT


def join() -> int:
    make_accelerator("no")
    return 0


def test_a_process_that_does_not_come_is_named(tmp_path: Path) -> None:
    # without a launcher that keeps the store; torch would wait for an hour
    port = str(free_port())
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "VIDEOX_MEETING_SECONDS": "1"}
    for rank, who in (("0", "process 1 of 2 has not joined within 1 s"), ("1", "machine 0 does not answer at this address")):
        alone = {**names, "RANK": rank, "LOCAL_RANK": "0"}
        found = forkserver.shared().run(
            [], tmp_path / f"log-{rank}", environment=alone, entry_point="tests.runs.test_launch_scripts:join"
        )
        assert found.code == PEER_LOST
        assert f"error: 127.0.0.1:{port}: {who}" in found.error_line()


def test_a_busy_port_is_named(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as other:
        port = str(other.getsockname()[1])
        code, line, _ = failed(PLAIN, tmp_path, MASTER_PORT=port, VIDEOX_MEETING_SECONDS="5")
        assert (code, f"error: 127.0.0.1:{port}: port {port} is used here by another program" in line) == (7, True)


@pytest.mark.slow
def test_an_address_that_is_not_machine_0_is_named(tmp_path: Path) -> None:
    for rank, host, said in (
        ("0", "203.0.113.1", "this machine cannot be reached there"),
        ("1", "machine-0.invalid", "machine 0 does not answer at this address"),
    ):
        where = {"MASTER_ADDR": host, "MASTER_PORT": "10086", "RANK": rank, "VIDEOX_MEETING_SECONDS": "4"}
        code, line, _ = failed(PLAIN, tmp_path, **where)
        assert (code, f"error: {host}:10086: {said}" in line) == (PEER_LOST, True), line
    with socket.create_server(("", 0)) as other:  # listens, and is no store
        where = {"MASTER_PORT": str(other.getsockname()[1]), "RANK": "1", "VIDEOX_MEETING_SECONDS": "4"}
        code, line, _ = failed(PLAIN, tmp_path, **where)
        assert (code, "another program than machine 0 answers there" in line) == (PEER_LOST, True)


ASKED = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "10086", "WORLD_SIZE": "2", "NUM_PROCESS": "16", "RANK": "1"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"MASTER_ADDR": ""}, "MASTER_ADDR not set"),
        ({"NUM_PROCESS": "", "RANK": ""}, "NUM_PROCESS and RANK not set"),
        ({"RANK": "2"}, "RANK=2 with WORLD_SIZE=2"),
        ({"NUM_PROCESS": "15"}, "NUM_PROCESS=15 processes on WORLD_SIZE=2 machines"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http' is not a number"),
    ],
)
def test_variables_that_do_not_fit_are_refused(changes: dict[str, str], said: str) -> None:
    assert read_machine(ASKED) == ("10.0.0.1", 10086, Participant("machine", 1, 2))
    with pytest.raises(UserError, match=said) as refused:
        read_machine({**ASKED, **changes})
    assert refused.value.exit_code == FLAGS


@pytest.mark.parametrize("text", ["", "0", "-3", "soon", "nan"])
def test_a_time_that_is_none_is_refused(text: str) -> None:
    assert timeout_seconds({"VIDEOX_MEETING_SECONDS": "2.5"}) == 2.5
    with pytest.raises(UserError, match="VIDEOX_MEETING_SECONDS"):
        timeout_seconds({"VIDEOX_MEETING_SECONDS": text})


# --------------------------------------------------------------------------------------------------- a test that hangs


def hang() -> int:
    while True:
        time.sleep(0.1)


def test_a_rank_that_hangs_is_ended_with_the_others(tmp_path: Path) -> None:
    ranks = forkserver.shared().start_ranks(3, [], tmp_path / "log", entry_points=["tests.runs.test_launch_scripts:hang"] * 3)
    with pytest.raises(AssertionError, match=r"still running after 0\.2 s"):
        ranks[1].wait(0.2)
    assert 0 not in [rank.wait(10) for rank in ranks]
    late = forkserver.shared().start([], tmp_path / "late", entry_point="tests.runs.test_launch_scripts:hang")
    with pytest.raises(AssertionError, match=r"nothing after 0\.2 s"):
        late.wait_until(lambda: False, timeout=0.2)
    assert late.wait(10) != 0


def test_a_launch_that_hangs_is_ended_with_sessions_of_its_own(tmp_path: Path) -> None:
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
