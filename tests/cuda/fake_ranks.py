"""A peer that computes nothing: torch's fake process group, on which every collective is done at once.

Rank 0 trains, but saves and exports nothing: its checkpoint would need the peer's shards.
"""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from videox.distributed import accelerator as own_accelerator
from videox.distributed.step_sync import StepReport
from videox.run.failure import FailureMonitor
from videox.training import loop
from videox.training.checkpointing import Checkpointer

WORLD_SIZE = 2


def simulate_peer() -> None:
    """Make this process rank 0 of two. Where values of the peer count, they equal those of this rank."""
    init, new_group = dist.init_process_group, dist.new_group

    def init_fake(*args: object, timeout: Any = None, **kwargs: object) -> None:
        init(backend="fake", rank=0, world_size=WORLD_SIZE, store=FakeStore())

    def new_fake_group(*args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        return new_group(*args, backend="fake", **kwargs)

    def gather_own(values: list[Any], value: object, group: object = None) -> None:
        values[:] = [value] * len(values)

    def report_own(accelerator: object, *, stop: bool, bad_samples: int, data_wait: float, **_: object) -> StepReport:
        return StepReport(stop, bad_samples, data_wait, (1.0,) * WORLD_SIZE)

    for module in (dist, dist.distributed_c10d):
        module.init_process_group, module.new_group = init_fake, new_fake_group
        module.all_gather_object = gather_own
    own_accelerator.wait_for_processes = lambda environment: None
    loop.sync_step = report_own
    FailureMonitor.join = lambda self, *args: []
    Checkpointer.save = lambda self, **settings: None
    Checkpointer.export_and_finish = lambda self: 0
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        _answer_for_deepspeed()


def _answer_for_deepspeed() -> None:
    """Let DeepSpeed go on where a 1 that is read from the GPU would mean that ranks differ, or gradients overflow."""
    from deepspeed.runtime.zero import partitioned_param_coordinator, stage3, stage_1_and_2, utils

    for module in (partitioned_param_coordinator, utils):
        module.assert_ints_same_as_other_ranks = lambda ints: None
    for module in (stage_1_and_2, stage3):
        module.is_invalid_grad_norm = lambda norm: not norm.isfinite()
    for optimizer in (stage_1_and_2.DeepSpeedZeroOptimizer, stage3.DeepSpeedZeroOptimizer_Stage3):
        found = optimizer.has_overflow
        optimizer.has_overflow = lambda self, *args, _found=found, **kwargs: not _found(self, *args, **kwargs)
