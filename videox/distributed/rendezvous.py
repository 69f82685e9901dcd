"""Serves whoever starts several machines: all of them are there before anything waits for them, or one line says who.

    python -m videox.distributed.rendezvous

Run on each machine before the launcher, with MASTER_ADDR, MASTER_PORT, WORLD_SIZE (machines) and RANK (of this
machine), as scripts/machines.sh does.

torch waits for ten minutes and more, and then says how many have come, but not which. train.py holds the same meeting
of its processes, in the store that the launcher keeps for them.
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

from videox.errors import FLAGS, PEER_LOST, UserError, told_once

LIMIT, VARIABLE = 45.0, "VIDEOX_MEETING_SECONDS"  # with the imports before it, a minute
ATTEMPT = 0.2  # seconds between two looks
LONGER = f"{VARIABLE}=600 waits for ten minutes"


class Participant(NamedTuple):
    """One of those who meet: its kind (machine | process), number from 0, and how many there are."""

    kind: str
    number: int
    total: int


def meeting_limit(environment: Mapping[str, str]) -> float:
    """Returns the seconds to wait, from VIDEOX_MEETING_SECONDS. Raises UserError for what is no positive number."""
    text = environment.get(VARIABLE, str(LIMIT))
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if not 0 < limit < 1e6:
        raise UserError(VARIABLE, f"{text!r} is no number of seconds", "give one, e.g. 600")
    return limit


def _reach(address: str, port: int, host: str, deadline: float) -> None:
    """Waits until something listens at an address. Raises UserError (PEER_LOST)."""
    while True:
        left = deadline - time.monotonic()
        try:
            socket.create_connection((address, port), timeout=min(max(left, 0.1), 5.0)).close()
            return
        except OSError as error:
            if time.monotonic() + ATTEMPT > deadline:
                what = f"{host} does not answer there ({error})"
                hint = f"start it too, with this MASTER_ADDR and MASTER_PORT, which must be its own; {LONGER}"
                raise UserError(f"{address}:{port}", what, hint, PEER_LOST) from error
            time.sleep(ATTEMPT)


def _answered(work: Callable[[], TCPStore], limit: float) -> TCPStore:
    """Returns what `work` does; torch itself waits for an answer without a limit. Raises TimeoutError after one."""
    done: Future[TCPStore] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except (DistNetworkError, DistStoreError) as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()  # no pool: the end of the process would wait for its threads
    return done.result(limit + ATTEMPT)


def _open_store(address: str, port: int, member: Participant, *, serves: bool, host: str, deadline: float) -> TCPStore:
    where, left = f"{address}:{port}", timedelta(seconds=max(deadline - time.monotonic(), 1.0))
    if not serves:
        _reach(address, port, host, deadline)
    open_store = partial(
        TCPStore, address, port, member.total, serves, left, wait_for_workers=False, multi_tenant=True
    )
    try:
        return _answered(open_store, left.total_seconds())
    except (DistNetworkError, DistStoreError, TimeoutError) as error:
        if "EADDRINUSE" in str(error):
            what, hint = f"port {port} is taken here by another program", "give another MASTER_PORT on every machine"
        elif serves:
            what, hint = f"this {member.kind} cannot be reached there", "give MASTER_ADDR an address of machine 0"
        else:
            what = f"something answers there, but not {host}"
            hint = "give another MASTER_PORT on every machine, or the address of machine 0 as MASTER_ADDR"
        raise UserError(where, what, hint, PEER_LOST) from error


def meet(address: str, port: int, member: Participant, *, serves: bool, limit: float, place: str = "") -> TCPStore:
    """Waits until all have come; whoever serves the store must keep it.

    Args:
        address: of whoever serves.
        port: there.
        member: this one.
        serves: it keeps the store, and nobody has done so yet.
        limit: seconds to wait for the others.
        place: a part of the store for this meeting alone.

    Raises:
        UserError: (PEER_LOST) the port is taken, the address is wrong, or somebody has not come: address, port and who.
    """
    deadline = time.monotonic() + limit
    host = f"{member.kind} 0" if member.kind == "machine" else "machine 0"
    store = _open_store(address, port, member, serves=serves, host=host, deadline=deadline)
    names = [f"videox/{place}/{member.kind}/{number}" for number in range(member.total)]
    try:
        store.set(names[member.number], socket.gethostname())
        while not store.check(names):
            if time.monotonic() > deadline:
                absent = [str(number) for number, name in enumerate(names) if not store.check([name])]
                what = f"{member.kind} {', '.join(absent)} of {member.total} has not come within {limit:g} s"
                hint = f"look at its log, give every machine the same MASTER_ADDR and MASTER_PORT; {LONGER}"
                raise UserError(f"{address}:{port}", what, hint, PEER_LOST)
            time.sleep(ATTEMPT)
    except (DistNetworkError, DistStoreError) as error:
        what = f"{host} answered and then left"
        raise UserError(f"{address}:{port}", what, "look at its log, then start all again", PEER_LOST) from error
    return store


def meet_processes(environment: Mapping[str, str]) -> TCPStore | None:
    """Holds the meeting of a launch's processes before torch's own; keep what it returns as long as the process lives.

    Args:
        environment: the launcher's variables.

    Raises:
        PeerFailed: somebody is missing; one process of each machine prints the line.
    """
    world = int(environment.get("WORLD_SIZE", "1"))
    if world == 1 or not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= set(environment):
        return None
    rank, kept = int(environment["RANK"]), environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    with told_once(environment):
        return meet(
            environment["MASTER_ADDR"],
            int(environment["MASTER_PORT"]),
            Participant("process", rank, world),
            serves=rank == 0 and not kept,  # else the launcher of machine 0 does
            limit=meeting_limit(environment),
            place=environment.get("TORCHELASTIC_RESTART_COUNT", "0"),
        )


def machine_of(environment: Mapping[str, str]) -> tuple[str, int, Participant]:
    """Returns address, port and this machine. Raises UserError for variables that are missing or do not fit."""
    wanted = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "NUM_PROCESS", "RANK")
    missing = [name for name in wanted if not environment.get(name)]
    if missing:
        hint = "export " + ", ".join(wanted)
        raise UserError("several machines", f"{' and '.join(missing)} not set", hint, FLAGS)
    numbers = {name: environment[name] for name in wanted[1:]}
    wrong = [f"{name}={text!r}" for name, text in numbers.items() if not text.isdecimal()]
    if wrong:
        raise UserError("several machines", f"{', '.join(wrong)} is no number", "give whole numbers", FLAGS)
    port, machines, processes, rank = map(int, numbers.values())
    if rank >= machines:
        what = f"RANK={rank} with WORLD_SIZE={machines}"
        raise UserError("several machines", what, f"number the machines from 0 to {machines - 1}", FLAGS)
    if processes % machines or not processes:
        what = f"NUM_PROCESS={processes} processes on WORLD_SIZE={machines} machines"
        raise UserError(
            "several machines", what, "give the processes of all machines together, equally many each", FLAGS
        )
    return environment["MASTER_ADDR"], port, Participant("machine", rank, machines)


def main(environment: Mapping[str, str]) -> int:
    """Holds the meeting of the machines and frees the port for the launcher; returns the exit code."""
    try:
        address, port, machine = machine_of(environment)
        limit, serves = meeting_limit(environment), machine.number == 0
        store = meet(address, port, machine, serves=serves, limit=limit)
        gone, deadline = store.add("videox/gone", 1), time.monotonic() + limit
        while serves and gone < machine.total and time.monotonic() < deadline:  # the port is freed last
            time.sleep(ATTEMPT / 4)
            gone = store.add("videox/gone", 0)
    except UserError as refusal:
        sys.stderr.write(f"{refusal.line()}\n")
        return refusal.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(os.environ))
