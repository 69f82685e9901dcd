"""Per-step agreement of all ranks by one small all-reduce on the host, for which no device waits."""

from __future__ import annotations

import fcntl
import functools
import os
import socket
import struct
from dataclasses import dataclass

import torch
import torch.distributed as dist
from accelerate import Accelerator

from videox.activity import ACTIVITY
from videox.distributed.accelerator import COLLECTIVE_TIMEOUT
from videox.errors import PEER_LOST, UserError

INTERFACE = "GLOO_SOCKET_IFNAME"
SIOCGIFADDR = 0x8915  # from linux/sockios.h: the ioctl that returns an interface's address


@dataclass(frozen=True)
class StepReport:
    """What all ranks agree on after a step's micro-batches.

    Attributes:
        stop: at least one rank was asked to stop.
        bad_samples: number of bad samples of the step, over all ranks.
        data_wait: longest time that a rank waited for data, in seconds.
        busy: time that each rank, by rank, worked in an earlier step instead of waiting, in seconds; 0 if not known.
    """

    stop: bool
    bad_samples: int
    data_wait: float
    busy: tuple[float, ...] = ()


def sync_step(
    accelerator: Accelerator, *, stop: bool, bad_samples: int, data_wait: float, stamp: int, busy: float = 0.0
) -> StepReport:
    """Combine a step's host values over all ranks by a single all-reduce between hosts.

    Args:
        accelerator: of the run.
        stop: this rank was asked to stop.
        bad_samples: bad samples that this rank found in this step.
        data_wait: seconds that this rank waited for data.
        stamp: a hash of (step, plan), below 2^53; it must be equal on all ranks.
        busy: seconds of an earlier step that this rank worked; 0 = not known.

    Raises:
        UserError: a rank is at another step or has another plan, so that collectives would be paired wrongly.
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    # A sum is the only reduction needed: each rank writes data_wait, busy and stamp into a slot of its own, all others
    # leave it 0. float64 holds a stamp below 2^53 exactly.
    numbers = torch.zeros(2 + 3 * world, dtype=torch.float64)
    numbers[0], numbers[1] = float(stop), float(bad_samples)
    numbers[2 + rank], numbers[2 + world + rank], numbers[2 + 2 * world + rank] = data_wait, busy, float(stamp)
    if world > 1:
        with ACTIVITY.section("the agreement at the end of a step"):
            dist.all_reduce(numbers, group=host_group())
    values = numbers.tolist()
    stamps = values[2 + 2 * world :]
    if any(other != float(stamp) for other in stamps):
        ranks = [rank for rank, other in enumerate(stamps) if other != stamps[0]]
        raise UserError(
            "step", f"ranks {ranks} are not at the step of rank 0", "restart from the last checkpoint", PEER_LOST
        )
    return StepReport(
        values[0] > 0, int(values[1]), max(values[2 : 2 + world]), tuple(values[2 + world : 2 + 2 * world])
    )


@functools.cache
def host_group() -> dist.ProcessGroup | None:
    """Return the process group for CPU tensors: None (the default group) if it is gloo, else a new group over gloo.

    All ranks must make the first call together.
    """
    if "gloo" in dist.get_backend():
        return None
    if INTERFACE not in os.environ and os.environ.get("WORLD_SIZE") != os.environ.get("LOCAL_WORLD_SIZE"):
        # gloo would use the address that this machine's host name resolves to, often the loopback address, which other
        # machines cannot reach.
        name = _interface_to(os.environ["MASTER_ADDR"])
        os.environ |= {INTERFACE: name} if name else {}
    return dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)


def _interface_to(address: str) -> str:
    """Return the network interface by which this machine reaches another one (IPv4, Linux); "" if none is found."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # UDP: selects the route and the own address, and sends nothing
        except OSError:
            return ""
        own = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:
                continue  # the interface has no IPv4 address
            if answer[20:24] == own:  # the address field of struct ifreq
                return name
    return ""
