"""The lines of a dry run on the host memory of a machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from videox.estimate.advice import Proposal
from videox.estimate.memory import SAFE_SHARE, Memory, MemorySetup, peak_of_host
from videox.estimate.report import GIB, LABELS, WIDTH, margin


def host_lines(memory: Memory, setup: MemorySetup, limit: float, source: str, less: Mapping[str, float]) -> list[str]:
    """Return the host memory of a machine, item by item, and whether the machine has it.

    Args:
        limit: bytes of a machine.
        source: of the limit, in words that follow it.
        less: host memory in bytes after a change, by its flags; printed where the run needs too much.
    """
    items = ", ".join(f"{LABELS.get(name, name)} {size / GIB:,.1f} GiB" for name, size in memory.host.items() if size)
    started = f"{setup.per_host} process{'es' * (setup.per_host > 1)}"
    peak = memory.host_peak()
    verdict = f"{'within' if peak <= limit else 'more than'} {limit / GIB:.4g} GiB ({source})"
    lines = [
        f"host memory per machine ({started}): {items}",
        f"  {'most at a time':>{WIDTH}} {peak / GIB:>8.2f} GiB: {verdict}{margin(peak, limit)}",
    ]
    smaller = {flags: size for flags, size in less.items() if size < peak} if peak > SAFE_SHARE * limit else {}
    width = max(map(len, smaller), default=0)
    return [*lines, *(f"    {flags:<{width}}  {size / GIB:>7.1f} GiB" for flags, size in smaller.items())]


def missing_lines(proposals: Sequence[Proposal], limit: float, source: str) -> list[str]:
    """Return a line for each proposal that needs more host memory than a machine has, with what is missing.

    Args:
        proposals: of `videox.estimate.advice.propose`.
        limit: bytes of a machine.
        source: of the limit, in words that follow it.
    """
    lines = []
    for proposal in proposals:
        peak = peak_of_host(proposal.changes[-1].host) if proposal.changes else 0.0
        if proposal.fits and peak > limit:
            lines.append(
                f"  with {proposal.flags}: {peak / GIB:.2f} GiB of host memory, more than {limit / GIB:.4g} GiB ({source})"
                f"{margin(peak, limit)}"
            )
    return lines
