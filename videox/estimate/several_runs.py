"""The lines of a dry run on a command that trains several runs of the same settings one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from videox.estimate.duration import Duration, format_gpu_time
from videox.estimate.report import Disk, size_words


@dataclass(frozen=True)
class SeveralRuns:
    """Runs that differ in what they train, not in its size.

    Attributes:
        names: of the runs, in their order.
        duration: of one run.
        disk: the checkpoints of one run.
    """

    names: Sequence[str]
    duration: Duration
    disk: Disk

    def seconds(self) -> float:
        """Return the time of all runs; what the first one has put into the latent cache, the others read."""
        later = replace(self.duration, encoding=0.0) if self.duration.cached else self.duration
        return self.duration.run() + (len(self.names) - 1) * later.run()

    def bytes_needed(self) -> float:
        """Return the disk space of the checkpoints of all runs, at most."""
        return (len(self.names) - 1) * self.disk.kept * self.disk.checkpoint + self.disk.needed()

    def lines(self, gpus: int, price: float | None, free: float) -> list[str]:
        """Return the time and the disk space of all runs.

        Args:
            gpus: number of GPUs.
            price: of a GPU hour; None: not stated.
            free: free bytes of the disk of the output folder.
        """
        cached = "; the second run reads the latent cache of the first" if self.duration.cached else ""
        lines = [
            f"{len(self.names)} runs, {' then '.join(self.names)}; all above is of one of them:",
            f"  together: {format_gpu_time(self.seconds(), gpus, price)}{cached}",
            f"  checkpoints of both: {size_words(self.bytes_needed())}",
        ]
        if self.disk.needed() <= free < self.bytes_needed():
            lines.append(f"  only {size_words(free)} are free there, enough for the first run")
        return lines
