"""Context: the processes and the folder of a run, passed as one value to everything that builds on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from videox.distributed.backends import Backend
from videox.run.lifecycle import Run
from videox.run.watchdog import Watchdog
from videox.tracking.report.live import LiveReport
from videox.training.memory_advice import MemoryAdvice

Gather = Callable[[Any], list[Any]]


@dataclass(frozen=True)
class Context:
    """Processes and folder of a run.

    Attributes:
        accelerator: of accelerate; it is given neither the loader nor gradient accumulation, which the plan decides.
        backend: the launch mode that runs.
        run: the open run folder: where to resume, and the status file.
        gather: collective that returns the values of all ranks, in their order.
        output_dir: folder of the run.
        memory: the estimated memory of the run, once its plan is made.
        report: writes report.html.
        watchdog: ends the run if it hangs.
    """

    accelerator: Accelerator
    backend: Backend
    run: Run
    gather: Gather
    output_dir: Path
    memory: MemoryAdvice = field(default_factory=MemoryAdvice)
    report: LiveReport = field(default_factory=LiveReport.off)
    watchdog: Watchdog = field(default_factory=Watchdog.off)

    @property
    def device(self) -> torch.device:
        """Device of this rank."""
        return self.accelerator.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes the records."""
        return self.accelerator.is_main_process

    @property
    def rank(self) -> int:
        """Rank of this process."""
        return self.accelerator.process_index

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.accelerator.num_processes

    @property
    def data_group(self) -> int:
        """Index of the data group of this rank: ranks that get the same samples. Today each rank is a group of one."""
        return self.rank

    @property
    def data_groups(self) -> int:
        """Number of data groups, which the plan assigns slots to; today the number of ranks."""
        return self.world_size

    @property
    def checkpoint(self) -> Path | None:
        """Checkpoint that the run resumes from; None for a new run."""
        return self.run.resume.path

    def print(self, *lines: str) -> None:
        """Print lines on the main process, at once."""
        if lines:
            self.accelerator.print("\n".join(lines), flush=True)
