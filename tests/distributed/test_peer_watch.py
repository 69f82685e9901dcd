"""Tests of videox.distributed.peer_watch: a process that ends while the group is formed is noticed by the others."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NoReturn

import forkserver
import pytest
from torch.distributed import DistNetworkError, distributed_c10d

from videox.distributed import accelerator as own_accelerator
from videox.distributed.accelerator import make_accelerator
from videox.distributed.peer_watch import BROKEN_SECONDS, PeerWatch
from videox.distributed.rendezvous import DEFAULT_TIMEOUT, VARIABLE
from videox.errors import PEER_LOST, is_lost_connection

SECONDS = 5
HERE = "tests.distributed.test_peer_watch"


def form_a_group() -> int:
    """Entry point of a rank: join the others as a train script does."""
    with PeerWatch(os.environ) as peers:
        accelerator, _ = make_accelerator("no", peers)
    return 0 if accelerator.num_processes == 2 else 1


def end_before_the_group() -> int:
    """Entry point of a rank that ends after the rendezvous, before torch's process group exists."""

    def end(**settings: object) -> NoReturn:
        os._exit(9)

    own_accelerator.Accelerator = end
    return form_a_group()


def end_within_the_group() -> int:
    """Entry point of a rank that ends while the others connect to it."""

    def end(*arguments: object, **settings: object) -> NoReturn:
        time.sleep(1)  # the others have opened torch's store and wait there
        os._exit(9)

    distributed_c10d.ProcessGroupGloo = end
    return form_a_group()


def form_a_group_slowly() -> int:
    """Entry point of a rank that needs longer than a lost one is waited for."""
    fast = own_accelerator.Accelerator

    def slow(**settings: object) -> object:
        time.sleep(2 * SECONDS)
        return fast(**settings)

    own_accelerator.Accelerator = slow
    return form_a_group()


def run_ranks(folder: Path, *functions: str, seconds: float = SECONDS) -> list[forkserver.TrainerProcess]:
    entry_points = [f"{HERE}:{function}" for function in functions]
    environment = {VARIABLE: str(seconds)}
    ranks = forkserver.shared().start_ranks(len(functions), [], folder / "log", entry_points, environment)
    for rank in ranks:
        rank.wait()
    return ranks


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_ends_while_the_group_is_formed_is_noticed(tmp_path: Path, victim: int) -> None:
    functions = ["form_a_group", "form_a_group"]
    functions[victim] = "end_before_the_group"
    ranks = run_ranks(tmp_path, *functions)
    other = ranks[1 - victim]
    assert (ranks[victim].code, other.code) == (9, PEER_LOST), other.output()
    assert f"process {victim} of 2" in other.error_line() and "while the processes connected" in other.error_line()
    assert other.seconds < 60 and DEFAULT_TIMEOUT < 50  # the start included, and also by default


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 2])
def test_a_connection_that_breaks_while_the_group_is_formed_is_a_lost_peer(tmp_path: Path, victim: int) -> None:
    """Process 0 serves the store: without it the others fail in torch at once, and their error names nobody."""
    functions = ["form_a_group"] * 3
    functions[victim] = "end_within_the_group"
    ranks = run_ranks(tmp_path, *functions, seconds=2 * BROKEN_SECONDS)
    others = [rank for rank in ranks if rank is not ranks[victim]]
    assert [rank.code for rank in others] == [PEER_LOST] * 2, others[0].output() + others[1].output()
    lines = [line for rank in others for line in rank.output().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and f"process {victim} of 3" in lines[0]
    assert not any("Traceback" in rank.output() for rank in others)


def test_which_errors_only_say_that_a_connection_is_lost() -> None:
    assert is_lost_connection(DistNetworkError("Failed to recv, got 0 bytes"))
    assert is_lost_connection(RuntimeError("[gloo/transport/tcp/pair.cc:152] timed out connecting"))
    assert not is_lost_connection(RuntimeError("shapes do not match"))


@pytest.mark.slow
def test_a_slow_process_is_waited_for(tmp_path: Path) -> None:
    ranks = run_ranks(tmp_path, "form_a_group", "form_a_group_slowly")
    assert [rank.code for rank in ranks] == [0, 0], ranks[0].output() + ranks[1].output()
