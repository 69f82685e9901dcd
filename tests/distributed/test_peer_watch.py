"""Tests of videox.distributed.peer_watch: a process that ends while the group is formed is noticed by the others."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NoReturn

import forkserver
import pytest

from videox.distributed import accelerator as own_accelerator
from videox.distributed.accelerator import make_accelerator
from videox.distributed.peer_watch import PeerWatch
from videox.distributed.rendezvous import DEFAULT_TIMEOUT, VARIABLE
from videox.errors import PEER_LOST

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


def form_a_group_slowly() -> int:
    """Entry point of a rank that needs longer than a lost one is waited for."""
    fast = own_accelerator.Accelerator

    def slow(**settings: object) -> object:
        time.sleep(2 * SECONDS)
        return fast(**settings)

    own_accelerator.Accelerator = slow
    return form_a_group()


def run_two(folder: Path, *functions: str) -> list[forkserver.TrainerProcess]:
    ranks = forkserver.shared().start_ranks(
        2, [], folder / "log", [f"{HERE}:{function}" for function in functions], environment={VARIABLE: str(SECONDS)}
    )
    for rank in ranks:
        rank.wait()
    return ranks


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_ends_while_the_group_is_formed_is_noticed(tmp_path: Path, victim: int) -> None:
    functions = ["form_a_group", "form_a_group"]
    functions[victim] = "end_before_the_group"
    ranks = run_two(tmp_path, *functions)
    other = ranks[1 - victim]
    assert (ranks[victim].code, other.code) == (9, PEER_LOST), other.output()
    assert f"process {victim} of 2" in other.error_line() and "while the processes connected" in other.error_line()
    assert other.seconds < 60 and DEFAULT_TIMEOUT < 50  # the start included, and also by default


@pytest.mark.slow
def test_a_slow_process_is_waited_for(tmp_path: Path) -> None:
    ranks = run_two(tmp_path, "form_a_group", "form_a_group_slowly")
    assert [rank.code for rank in ranks] == [0, 0], ranks[0].output() + ranks[1].output()
