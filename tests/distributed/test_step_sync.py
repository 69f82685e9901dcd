"""Tests of videox.distributed.step_sync: the network interface of the process group for CPU tensors."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from videox.distributed.step_sync import INTERFACE, host_group


@pytest.fixture(autouse=True)
def forgotten_group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The group is made once per process; the backend here is as on a machine with GPUs, which has no group yet."""
    host_group.cache_clear()
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(dist, "new_group", lambda backend, timeout: backend)
    monkeypatch.setenv(INTERFACE, "")  # so that it is removed at the end
    monkeypatch.delenv(INTERFACE)
    yield
    host_group.cache_clear()


def launch(monkeypatch: pytest.MonkeyPatch, world: int, local: int, address: str) -> str | None:
    for name, value in (("WORLD_SIZE", str(world)), ("LOCAL_WORLD_SIZE", str(local)), ("MASTER_ADDR", address)):
        monkeypatch.setenv(name, value)
    assert host_group() == "gloo"
    return os.environ.get(INTERFACE)


def test_several_machines_use_the_interface_by_which_they_reach_the_first_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host name, by which gloo would choose, need not resolve to an address that other machines can reach."""
    assert launch(monkeypatch, 16, 8, "127.0.0.1") == "lo"


def test_one_machine_keeps_gloos_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch(monkeypatch, 8, 8, "127.0.0.1") is None


def test_the_users_interface_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INTERFACE, "ib0")
    assert launch(monkeypatch, 16, 8, "127.0.0.1") == "ib0"


def test_an_address_that_does_not_resolve_leaves_gloos_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch(monkeypatch, 16, 8, "no-such-host.invalid") is None
