"""Serves both train.py scripts: makes the Accelerator, names the backend, and keeps the ranks agreed on every step."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType

from videox.errors import PEER_LOST, Refusal


@dataclass(frozen=True)
class Backend:
    """What a launch mode can do: name, whether ranks meet at every layer, whether weights are whole on each rank."""

    name: str
    processes: str
    whole_weights: bool


BACKENDS = {
    DistributedType.NO: Backend("single", "one process", True),
    DistributedType.MULTI_GPU: Backend("ddp", "one process per GPU, whole weights on each", True),
    DistributedType.MULTI_CPU: Backend("ddp", "several CPU processes (gloo), whole weights on each", True),
}


def refuse_other_launch(environment: Mapping[str, str]) -> None:
    """Refuses to start when the launcher asked for what this version does not run, instead of running something else.

    Raises:
        Refusal: DeepSpeed or FSDP was asked for.
    """
    for variable, name in (("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_FSDP", "FSDP")):
        if environment.get(variable, "false").lower() in ("true", "1"):
            raise Refusal(
                "accelerate launch", f"{name} was asked for and is not supported yet", "launch without it (DDP)"
            )


def follow_launcher(environment: Mapping[str, str]) -> None:
    """Has the kernel send SIGTERM to this process when the launcher that started it dies (Linux).

    `accelerate launch` does not pass a SIGTERM on to a single process: without this the run would go on unseen.
    """
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in environment:
        parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
        ctypes.CDLL(None, use_errno=True).prctl(parent_death_signal, signal.SIGTERM)


def make_accelerator(mixed_precision: str) -> tuple[Accelerator, Backend]:
    """Returns the Accelerator and the backend that really runs.

    Gradients are accumulated by the training loop itself (it knows from the plan which micro-batch is the last), and
    batches are dealt by the plan, so the Accelerator is given neither a number of accumulation steps nor a loader.

    Args:
        mixed_precision: "no" | "bf16"; the weights stay float32, autocast computes in bfloat16.

    Raises:
        Refusal: the launcher's number of processes is not the number that runs, or the backend is unknown.
    """
    refuse_other_launch(os.environ)
    accelerator = Accelerator(mixed_precision=mixed_precision)
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != asked:
        mend = "on CPUs set ACCELERATE_USE_CPU=true and launch with --multi_gpu"
        raise Refusal("accelerate launch", f"{asked} processes asked for, {accelerator.num_processes} joined", mend)
    backend = BACKENDS.get(accelerator.distributed_type)
    if backend is None:
        raise Refusal(
            "accelerate launch", f"{accelerator.distributed_type} is not supported", "launch DDP or one process"
        )
    return accelerator, backend


def gather_objects(accelerator: Accelerator) -> Callable[[Any], list[Any]]:
    """Returns a function that every process calls with its value and that gives each the list of all, by rank."""

    def gather(value: object) -> list[Any]:
        if accelerator.num_processes == 1:
            return [value]
        values: list[Any] = [None] * accelerator.num_processes
        dist.all_gather_object(values, value)
        return values

    return gather


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the sum of a tensor over all processes; the tensor itself when there is one."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


@contextmanager
def accumulate(accelerator: Accelerator, model: torch.nn.Module, last: bool) -> Iterator[None]:
    """Leaves gradients unreduced except in a step's last micro-batch."""
    if last or accelerator.num_processes == 1:
        yield
    else:
        with accelerator.no_sync(model):
            yield


@dataclass(frozen=True)
class StepReport:
    """What all processes agree on after a step's micro-batches: sums over ranks, and the longest data wait (s)."""

    loss: float
    stop: bool
    bad_samples: int
    data_wait: float


def agree(
    accelerator: Accelerator, *, loss: torch.Tensor, stop: bool, bad_samples: int, data_wait: float, stamp: int
) -> StepReport:
    """Combines one step's small numbers over all processes by a single all-reduce.

    Args:
        loss: float64 scalar, this process's part of the step's loss.
        stop: this process was asked to stop.
        bad_samples: samples found bad in this step here.
        data_wait: seconds this process waited for data.
        stamp: a hash of (step, plan), below 2^53; it must be equal everywhere.

    Raises:
        Refusal: a process is at another step or holds another plan, so that collectives would pair wrongly.
    """
    world = accelerator.num_processes
    numbers = torch.zeros(3 + 2 * world, dtype=torch.float64, device=loss.device)
    numbers[0] = loss
    numbers[1], numbers[2] = float(stop), float(bad_samples)
    numbers[3 + accelerator.process_index] = data_wait
    numbers[3 + world + accelerator.process_index] = float(stamp)
    if world > 1:
        dist.all_reduce(numbers)
    values = numbers.tolist()
    stamps = values[3 + world :]
    if any(other != float(stamp) for other in stamps):
        ranks = [rank for rank, other in enumerate(stamps) if other != stamps[0]]
        raise Refusal(
            "step", f"ranks {ranks} are not at the step of rank 0", "restart from the last checkpoint", PEER_LOST
        )
    return StepReport(values[0], values[1] > 0, int(values[2]), max(values[3 : 3 + world]))


class StopRequest:
    """Turns a SIGTERM, SIGINT or SIGUSR1 into a wish to stop at the step's end; a second SIGINT ends at once."""

    def __init__(self) -> None:
        self.signal_name = ""
        self._before: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return bool(self.signal_name)

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.signal_name and number == signal.SIGINT:
            os._exit(128 + number)
        self.signal_name = signal.Signals(number).name
        said = f"\n{self.signal_name}: saving after this step (Ctrl-C again: leave at once, last save kept)\n"
        with contextlib.suppress(OSError):  # a lost terminal; and a buffered stream may not be entered twice
            os.write(2, said.encode())
