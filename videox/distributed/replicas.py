"""Comparison of the weights that all ranks have alike (DDP, ZeRO-2): a run whose replicas have drifted apart ends."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from videox.activity import ACTIVITY
from videox.device import DeviceEvent
from videox.errors import NUMERICS, UserError

SHARE = 0.001  # of a run's time that comparisons may take
LEAST_STEPS = 100  # between two comparisons that no save asks for, unless a number of steps is given
PART = 1 << 24  # elements that are converted at a time
NEVER = 0
_WORD = torch.int64
_NARROW = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: _WORD}  # integers by size in bytes


class _Report(NamedTuple):
    """What a rank sends to the others: its host, the sum of each weight, and seconds."""

    host: str
    sums: list[int]
    seconds: float  # that the sums took
    since: float  # since the comparison before; infinity at the first one


def bit_sum(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor's bits, read as whole numbers, modulo 2^64: int64 scalar on the tensor's device.

    The sum does not depend on the order of the additions, so that it is equal for equal bits. One changed bit always
    changes it. Memory that is aligned to eight bytes is read as int64, in one pass and without a copy.

    Args:
        tensor: of any shape and of a dtype of 1, 2, 4 or 8 bytes.
    """
    flat = tensor.detach().reshape(-1)
    size = flat.element_size()
    if flat.nbytes % 8 == 0 and flat.storage_offset() * size % 8 == 0:
        return flat.view(_WORD).sum()
    parts = [part.view(_NARROW[size]).sum(dtype=_WORD) for part in flat.split(PART)]
    return torch.stack(parts).sum() if parts else torch.zeros((), dtype=_WORD, device=flat.device)


class ReplicaCheck:
    """Compares the weights of all ranks after the first step of a launch, every N steps, and whenever it is asked to.

    Args:
        device: of the weights.
        gather: collective that returns every rank's value, in rank order.
        every: N; NEVER = no comparison; None = LEAST_STEPS, or as many steps as are needed so that comparisons take
            at most SHARE of the time.
        now: the clock, in seconds.
    """

    def __init__(
        self,
        device: torch.device,
        gather: Callable[[object], list[Any]],
        every: int | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._device, self._gather, self._now, self._automatic = device, gather, now, every is None
        self.every = LEAST_STEPS if every is None else every
        self._step: int | None = None  # of the last comparison
        self._ended = -math.inf
        self._reported = False

    def is_due(self, step: int) -> bool:
        """Return whether the weights should be compared after this step; equal on all ranks."""
        return self.every != NEVER and (self._step is None or step - self._step >= self.every)

    def compare(self, weights: Iterable[tuple[str, Tensor]], step: int) -> str:
        """Compare the weights of all ranks; called on each rank after the same step. Does nothing a second time.

        Args:
            weights: those that all ranks have alike, in the same order on each; none where weights are sharded.
            step: optimizer steps done.

        Returns:
            A line on what the comparisons cost, once per launch; otherwise "".

        Raises:
            UserError: (NUMERICS) on every rank, with the ranks whose weights are other ones.
        """
        if self.every == NEVER or step == self._step:
            return ""
        named = [*weights]
        if not named:
            self.every = NEVER
            return ""
        with ACTIVITY.section("the comparison of the replicas"):
            DeviceEvent(self._device).wait()  # for the step before, which is not part of the cost
            begun = self._now()
            device = named[0][1].device
            # the host waits once, for all sums
            sums: list[int] = torch.stack([bit_sum(tensor).to(device) for _, tensor in named]).cpu().tolist()
            own = _Report(socket.gethostname(), sums, self._now() - begun, begun - self._ended)
            reports: list[_Report] = self._gather(own)
        names = [name for name, _ in named]
        self._refuse_differences(names, reports, step)
        line = "" if self._step is None else self._report_cost(len(names), reports, step - self._step)
        self._step, self._ended = step, self._now()
        return line

    def _refuse_differences(self, names: list[str], reports: list[_Report], step: int) -> None:
        ranks_of: dict[tuple[int, ...], list[int]] = {}
        for rank, report in enumerate(reports):
            ranks_of.setdefault(tuple(report.sums), []).append(rank)
        if len(ranks_of) == 1:
            return
        groups = sorted(ranks_of.values(), key=lambda ranks: (-len(ranks), ranks))
        others = [rank for ranks in groups[1:] for rank in ranks]
        first, second = (reports[ranks[0]].sums for ranks in groups[:2])
        different = [name for name, a, b in zip(names, first, second, strict=True) if a != b]
        hosts = {report.host for report in reports}
        on = f" (on {', '.join(sorted({reports[rank].host for rank in others}))})" if len(hosts) > 1 else ""
        since = f"after step {self._step}" if self._step is not None else "before or in the first step of this launch"
        what = (
            f"the weights of {_named(sorted(others))}{on} are not those of {_named(groups[0])}, and should be the same "
            f"on all ranks; {len(different)} of {len(names)} tensors differ, the first one is {different[0]}; they "
            f"became different {since}"
        )
        hint = (
            "resume with --resume_from_checkpoint latest; if it happens again, check the memory of these machines and "
            "GPUs, and that all of them are of the same kind"
        )
        raise UserError(f"step {step}", what, hint, NUMERICS)

    def _report_cost(self, tensors: int, reports: list[_Report], steps: int) -> str:
        """Set the interval from what all ranks measured, equally on all; return the line on the cost."""
        seconds = max(report.seconds for report in reports)
        of_step = max(min(report.since for report in reports) / steps, 1e-9)
        if self._automatic:
            self.every = max(LEAST_STEPS, math.ceil(seconds / (SHARE * of_step)))
        if self._reported or steps < min(self.every, LEAST_STEPS):
            return ""
        self._reported = True
        share = 100 * seconds / (self.every * of_step)
        return (
            f"replicas: {tensors} weights of {len(reports)} ranks are compared in {1000 * seconds:.1f} ms, every "
            f"{self.every} steps and before each save: {share:.2g} % of the time"
        )


def _named(ranks: list[int]) -> str:
    """Return ranks as words."""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
