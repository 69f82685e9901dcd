"""Tests of videox.distributed.restart: a process becomes another one, alone and with its peers; signals stop it."""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import threading
from datetime import timedelta
from pathlib import Path

import forkserver
import torch.distributed as dist
from dispositions import default_signals

from videox.distributed import restart as module
from videox.distributed.environment import AGENT_STORE
from videox.distributed.restart import PORTS, free_port, restart
from videox.distributed.signals import StopOutsideSteps
from videox.errors import STOPPED

HERE = "tests.distributed.test_restart"
# What a process says of itself: files that are open besides the listing, how SIGTERM ends it, threads, variables.
REPORT = """
import json, os, signal, sys
names = [name for name in os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd/" + name)]
threads = len(os.listdir("/proc/self/task"))
handler = str(signal.getsignal(signal.SIGTERM)) + " " + str(signal.getsignal(signal.SIGHUP))
print("new " + json.dumps([os.getpid(), sorted(map(int, names)), handler, threads, dict(os.environ), sys.argv[1:]]))
"""
COMMAND = (sys.executable, "-S", "-c", REPORT, "--expert=low_noise")


def begin_alone() -> int:
    """Entry point: a process with a thread, an open file that its children would inherit, and work to do at exit."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    descriptor = os.open(os.devnull, os.O_RDONLY)
    os.set_inheritable(descriptor, True)
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    atexit.register(print, "at exit")
    with StopOutsideSteps() as signals:
        signals.begin()
        signals.end()
    print(f"old {os.getpid()}")
    return restart(COMMAND, {"MASTER_PORT": "1", "PATH": "/bin"})


def begin_together() -> int:
    """Entry point of a rank; rank 1 got a signal if there is a variable for it."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    StopOutsideSteps.unheeded = os.environ.get("SIGNALLED") == os.environ["RANK"]
    return restart(COMMAND, dict(os.environ))


def report_of(process: forkserver.TrainerProcess) -> list:
    (line,) = (line for line in process.output().splitlines() if line.startswith("new "))
    return json.loads(line[4:])


def test_a_process_becomes_another_one_of_which_nothing_remains(tmp_path: Path) -> None:
    process = forkserver.shared().run([], tmp_path / "log", entry_point=f"{HERE}:begin_alone")
    pid, files, handlers, threads, environment, words = report_of(process)
    assert process.code == 0
    assert process.output().splitlines()[:2] == [f"old {pid}", "at exit"]
    assert files == [0, 1, 2] and threads == 1
    assert handlers == f"{signal.SIG_DFL!s} {signal.SIG_IGN!s}"
    assert {name: environment[name] for name in ("MASTER_PORT", "PATH")} == {"MASTER_PORT": "1", "PATH": "/bin"}
    assert AGENT_STORE not in environment and words == ["--expert=low_noise"]


def test_the_processes_of_a_launch_meet_at_a_port_of_their_own(tmp_path: Path) -> None:
    ranks = forkserver.shared().run_ranks(2, [], tmp_path / "log", [f"{HERE}:begin_together"] * 2)
    found = [report_of(rank)[4] for rank in ranks]
    assert [rank.code for rank in ranks] == [0, 0]
    assert [(values["RANK"], values["WORLD_SIZE"]) for values in found] == [("0", "2"), ("1", "2")]
    (port,) = {values["MASTER_PORT"] for values in found}
    assert int(port) in range(*PORTS) and {values[AGENT_STORE] for values in found} == {"False"}


def test_a_signal_that_one_process_got_stops_all(tmp_path: Path) -> None:
    ranks = forkserver.shared().start_ranks(
        2, [], tmp_path / "log", [f"{HERE}:begin_together"] * 2, environment={"SIGNALLED": "1"}
    )
    assert [rank.wait() for rank in ranks] == [STOPPED, STOPPED]
    assert not any("new " in rank.output() for rank in ranks)


def test_a_signal_at_the_end_of_a_run_is_not_lost() -> None:
    with default_signals():
        with StopOutsideSteps() as signals:
            signals.begin()
            signals.end()  # the status says how the run ended
            assert not StopOutsideSteps.unheeded
            signal.raise_signal(signal.SIGTERM)
        assert StopOutsideSteps.unheeded
        assert restart(["/nowhere"], {}) == STOPPED
        with StopOutsideSteps():
            assert not StopOutsideSteps.unheeded


def test_a_signal_in_the_last_step_is_not_lost() -> None:
    """StopRequest noted it; the run finished all the same."""
    with default_signals():
        with StopOutsideSteps() as signals:
            signals.begin()
            signals.received_at = 1.0
        assert StopOutsideSteps.unheeded and restart(["/nowhere"], {}) == STOPPED
        StopOutsideSteps.unheeded = False


def test_a_signal_while_processes_agree_is_noted() -> None:
    with default_signals(), module._Noted() as stop:
        assert not stop
        signal.raise_signal(signal.SIGTERM)
        assert stop


def test_a_port_is_free_and_not_one_that_linux_gives_away() -> None:
    first, last = (int(word) for word in Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    for _ in range(20):
        port = free_port()
        assert port in range(*PORTS) and not first <= port <= last
