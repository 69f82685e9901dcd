"""Which changed settings make a run fit in a GPU's memory without more host memory than a machine has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from videox.estimate.advice import Change, Proposal, propose
from videox.estimate.memory import Memory, MemorySetup

TOO_MUCH = 2.0**60  # bytes: more than any GPU has


@dataclass(frozen=True)
class MemoryOnHost(Memory):
    """Memory that does not fit in any GPU where the host does not have what it needs.

    Attributes:
        limit: bytes of a machine's host memory.
    """

    limit: float = 0.0

    def total(self) -> float:
        """Return the peak bytes on a GPU; where the host has too little, more than any GPU has."""
        missing = self.host_peak() - self.limit
        return super().total() if missing <= 0 else TOO_MUCH + missing


def propose_on_host(
    setup: MemorySetup,
    limit: float,
    host: float,
    memory: Callable[[MemorySetup], Memory],
    changes: Sequence[Change],
) -> list[Proposal]:
    """Return proposals as `propose` does, of those that fit in host memory; all where none of these fits.

    Args:
        setup: that does not fit.
        limit: bytes of a GPU.
        host: bytes of host memory of a machine.
        memory: returns the memory of a setup.
        changes: that may be made, in order of their cost.
    """

    def on_host(changed: MemorySetup) -> Memory:
        found = memory(changed)
        return MemoryOnHost(found.states, found.phases, found.host, host)

    def plain(proposal: Proposal) -> Proposal:
        """Return a proposal with all bytes on the GPU: before its last change it may need more of the host."""
        changes = []
        for applied in proposal.changes:
            needed = memory(applied.setup)
            total = (needed.without("encoding") if proposal.filled else needed).total()
            changes.append(replace(applied, total=total))
        return replace(proposal, changes=tuple(changes))

    found = [proposal for proposal in propose(setup, limit, on_host, changes) if proposal.fits]
    return [plain(proposal) for proposal in found] or propose(setup, limit, memory, changes)
