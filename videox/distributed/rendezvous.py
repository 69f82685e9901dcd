"""Rendezvous of machines and processes: waits until all have joined, or reports which ones are missing.

    python -m videox.distributed.rendezvous

Run on each machine before the launcher, with MASTER_ADDR, MASTER_PORT, WORLD_SIZE (machines) and RANK (of this
machine), as scripts/machines.sh does.

torch's own rendezvous waits for ten minutes and more, and then reports how many have joined, but not which. train.py
runs the same rendezvous for its processes, in the store that the launcher serves.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from datetime import timedelta
from functools import partial
from typing import NamedTuple

from torch.distributed import DistNetworkError, DistStoreError, TCPStore

from videox.errors import FLAGS, PEER_LOST, UserError, print_once_per_machine

VARIABLE = "VIDEOX_MEETING_SECONDS"
DEFAULT_TIMEOUT = 45.0  # seconds; a minute together with the imports before it
POLL_SECONDS = 0.2
QUIET_SECONDS = 5.0  # after which a line says who is waited for
LONGER = f"{VARIABLE}=600 waits for ten minutes"


class Participant(NamedTuple):
    """One machine or process of a rendezvous: its kind (machine | process), its number from 0, and the total."""

    kind: str
    number: int
    total: int


def timeout_seconds(environment: Mapping[str, str]) -> float:
    """Return the seconds to wait, from VIDEOX_MEETING_SECONDS. Raises UserError if it is not a positive number."""
    text = environment.get(VARIABLE, str(DEFAULT_TIMEOUT))
    try:
        timeout = float(text)
    except ValueError:
        timeout = 0.0
    if not 0 < timeout < 1e6:
        raise UserError(VARIABLE, f"{text!r} is not a number of seconds", "set one, e.g. 600")
    return timeout


def _wait_for_listener(address: str, port: int, host: str, deadline: float) -> None:
    """Wait until something listens at an address. Raises UserError (PEER_LOST)."""
    while True:
        remaining = deadline - time.monotonic()
        try:
            socket.create_connection((address, port), timeout=min(max(remaining, 0.1), 5.0)).close()
            return
        except OSError as error:
            if time.monotonic() + POLL_SECONDS > deadline:
                what = f"{host} does not answer at this address ({error})"
                hint = (
                    f"start it, and set MASTER_ADDR and MASTER_PORT to its own address and port everywhere; {LONGER}"
                )
                raise UserError(f"{address}:{port}", what, hint, PEER_LOST) from error
            time.sleep(POLL_SECONDS)


def _call_with_timeout(connect: Callable[[], TCPStore], timeout: float) -> TCPStore:
    """Return the result of `connect`, which in torch may wait without a limit. Raises TimeoutError."""
    done: Future[TCPStore] = Future()

    def run() -> None:
        try:
            done.set_result(connect())
        except (DistNetworkError, DistStoreError) as error:
            done.set_exception(error)

    # A daemon thread and no executor: at exit the interpreter would wait for an executor's blocked thread.
    threading.Thread(target=run, daemon=True).start()
    return done.result(timeout + POLL_SECONDS)


def _open_store(
    address: str, port: int, member: Participant, *, hosts_store: bool, host: str, deadline: float
) -> TCPStore:
    where, remaining = f"{address}:{port}", timedelta(seconds=max(deadline - time.monotonic(), 1.0))
    if not hosts_store:
        _wait_for_listener(address, port, host, deadline)
    open_store = partial(
        TCPStore, address, port, member.total, hosts_store, remaining, wait_for_workers=False, multi_tenant=True
    )
    try:
        return _call_with_timeout(open_store, remaining.total_seconds())
    except (DistNetworkError, DistStoreError, TimeoutError) as error:
        if "EADDRINUSE" in str(error):
            what, hint = f"port {port} is used here by another program", "set another MASTER_PORT on every machine"
        elif hosts_store:
            what, hint = f"this {member.kind} cannot be reached there", "set MASTER_ADDR to an address of machine 0"
        else:
            what = f"another program than {host} answers there"
            hint = "set another MASTER_PORT on every machine, or set MASTER_ADDR to the address of machine 0"
        raise UserError(where, what, hint, PEER_LOST) from error


def wait_for_all(
    address: str, port: int, member: Participant, *, hosts_store: bool, timeout: float, prefix: str = ""
) -> TCPStore:
    """Wait until all participants have joined; the one that hosts the store must keep the returned object alive.

    Args:
        address: of the participant that hosts the store.
        port: of the store.
        member: this participant.
        hosts_store: this participant opens the store (otherwise it connects to an open one).
        timeout: seconds to wait for the others.
        prefix: part of the keys in the store, for this rendezvous alone.

    Raises:
        UserError: (PEER_LOST) the port is in use, the address is wrong, or somebody has not joined; with address, port
            and the missing numbers.
    """
    begin = time.monotonic()
    deadline, announced = begin + timeout, False
    host = f"{member.kind} 0" if member.kind == "machine" else "machine 0"
    store = _open_store(address, port, member, hosts_store=hosts_store, host=host, deadline=deadline)
    keys = [f"videox/{prefix}/{member.kind}/{number}" for number in range(member.total)]
    try:
        store.set(keys[member.number], socket.gethostname())
        while not store.check(keys):
            if time.monotonic() > deadline:
                missing = [str(number) for number, key in enumerate(keys) if not store.check([key])]
                what = f"{member.kind} {', '.join(missing)} of {member.total} has not joined within {timeout:g} s"
                hint = f"check its log, set the same MASTER_ADDR and MASTER_PORT on every machine; {LONGER}"
                raise UserError(f"{address}:{port}", what, hint, PEER_LOST)
            # Where a launcher hosts the store, it started the others, and they may take a while to import torch.
            if not announced and hosts_store and time.monotonic() - begin > QUIET_SECONDS:
                announced = True
                _announce(store, keys, member, f"{address}:{port}", timeout)
            time.sleep(POLL_SECONDS)
    except (DistNetworkError, DistStoreError) as error:
        what = f"{host} answered and then ended"
        raise UserError(
            f"{address}:{port}", what, "check its log, then start all machines again", PEER_LOST
        ) from error
    return store


def _announce(store: TCPStore, keys: list[str], member: Participant, where: str, timeout: float) -> None:
    missing = ", ".join(str(number) for number, key in enumerate(keys) if not store.check([key]))
    alone = "if this is the only one, `unset WORLD_SIZE RANK LOCAL_RANK MASTER_ADDR MASTER_PORT`"
    line = f"waiting for {member.kind} {missing} of {member.total} at {where}, for {timeout:g} s at most; {alone}"
    sys.stderr.write(f"{line}\n")


def wait_for_processes(environment: Mapping[str, str]) -> TCPStore | None:
    """Wait for all processes of a launch, before torch's own rendezvous; keep the returned store alive.

    Args:
        environment: the launcher's variables.

    Raises:
        PeerFailed: a process is missing; one process of each machine prints the line.
    """
    world = int(environment.get("WORLD_SIZE", "1"))
    if world == 1 or not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= set(environment):
        return None
    rank = int(environment["RANK"])
    launcher_hosts = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    with print_once_per_machine(environment):
        return wait_for_all(
            environment["MASTER_ADDR"],
            int(environment["MASTER_PORT"]),
            Participant("process", rank, world),
            hosts_store=rank == 0 and not launcher_hosts,
            timeout=timeout_seconds(environment),
            # A restarted launch uses the same store, with the keys of its last start still in it.
            prefix=environment.get("TORCHELASTIC_RESTART_COUNT", "0"),
        )


def read_machine(environment: Mapping[str, str]) -> tuple[str, int, Participant]:
    """Return address, port and this machine. Raises UserError for variables that are missing or do not fit."""
    required = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "NUM_PROCESS", "RANK")
    missing = [name for name in required if not environment.get(name)]
    if missing:
        hint = "export " + ", ".join(required)
        raise UserError("several machines", f"{' and '.join(missing)} not set", hint, FLAGS)
    numbers = {name: environment[name] for name in required[1:]}
    wrong = [f"{name}={text!r}" for name, text in numbers.items() if not text.isdecimal()]
    if wrong:
        raise UserError("several machines", f"{', '.join(wrong)} is not a number", "set whole numbers", FLAGS)
    port, machines, processes, rank = map(int, numbers.values())
    if rank >= machines:
        what = f"RANK={rank} with WORLD_SIZE={machines}"
        raise UserError("several machines", what, f"number the machines from 0 to {machines - 1}", FLAGS)
    if processes % machines or not processes:
        what = f"NUM_PROCESS={processes} processes on WORLD_SIZE={machines} machines"
        raise UserError(
            "several machines",
            what,
            "set NUM_PROCESS to the processes of all machines together, a multiple of WORLD_SIZE",
            FLAGS,
        )
    return environment["MASTER_ADDR"], port, Participant("machine", rank, machines)


def meet(environment: Mapping[str, str]) -> None:
    """Wait for all machines, and free the port for the launcher.

    Raises:
        UserError: a variable is missing or wrong, or a machine is missing.
    """
    address, port, machine = read_machine(environment)
    timeout, hosts_store = timeout_seconds(environment), machine.number == 0
    store = wait_for_all(address, port, machine, hosts_store=hosts_store, timeout=timeout)
    left, deadline = store.add("videox/gone", 1), time.monotonic() + timeout
    # Machine 0 ends last: with it the store closes, and a machine still polling it would report a failure.
    while hosts_store and left < machine.total and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS / 4)
        left = store.add("videox/gone", 0)


def main(environment: Mapping[str, str]) -> int:
    """Wait for all machines and free the port for the launcher; return the exit code."""
    try:
        meet(environment)
    except UserError as error:
        sys.stderr.write(f"{error.line()}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    code = main(os.environ)
    sys.stderr.flush()
    os._exit(code)  # a thread that still waits in torch (_call_with_timeout) would abort the interpreter at its exit
