"""Serves the training loop on several processes: they agree on every step, and no device waits for that."""

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

from videox.distributed.accelerator import PATIENCE
from videox.errors import PEER_LOST, UserError

INTERFACE = "GLOO_SOCKET_IFNAME"
SIOCGIFADDR = 0x8915  # of linux/sockios.h: the address of an interface


@dataclass(frozen=True)
class StepReport:
    """What all processes agree on after a step's micro-batches.

    stop: one was asked to; bad_samples: over all of them; data_wait: the longest, seconds; busy: seconds of an earlier
    step in which each process, by rank, worked and did not wait; 0 where that is not known.
    """

    stop: bool
    bad_samples: int
    data_wait: float
    busy: tuple[float, ...] = ()


def agree(
    accelerator: Accelerator, *, stop: bool, bad_samples: int, data_wait: float, stamp: int, busy: float = 0.0
) -> StepReport:
    """Combines one step's small numbers of the host over all processes by a single all-reduce between hosts.

    Args:
        stop: this process was asked to stop.
        bad_samples: samples found bad in this step here.
        data_wait: seconds this process waited for data.
        stamp: a hash of (step, plan), below 2^53; it must be equal everywhere.
        busy: seconds of an earlier step that this process worked; 0 = not known.

    Raises:
        UserError: a process is at another step or holds another plan, so that collectives would pair wrongly.
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    numbers = torch.zeros(2 + 3 * world, dtype=torch.float64)
    numbers[0], numbers[1] = float(stop), float(bad_samples)
    numbers[2 + rank], numbers[2 + world + rank], numbers[2 + 2 * world + rank] = data_wait, busy, float(stamp)
    if world > 1:
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
    """Returns the group for tensors of the host: the processes' own (None) where that takes them, else one over gloo.

    All processes call it together the first time.
    """
    if "gloo" in dist.get_backend():
        return None
    if INTERFACE not in os.environ and os.environ.get("WORLD_SIZE") != os.environ.get("LOCAL_WORLD_SIZE"):
        # gloo would take the address that this machine's name has, which on many is that of the loopback
        name = _interface_to(os.environ["MASTER_ADDR"])
        os.environ |= {INTERFACE: name} if name else {}
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def _interface_to(address: str) -> str:
    """Returns the network interface by which this machine reaches another (IPv4, Linux); "" where none is found."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # sends nothing
        except OSError:
            return ""
        own = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:
                continue  # it has no address
            if answer[20:24] == own:
                return name
    return ""
