"""Collectives: gather Python objects, sum tensors, accumulate gradients, run a function on the main rank or on all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType

from videox.device import memory_phase
from videox.errors import UserError


def gather_objects(accelerator: Accelerator) -> Callable[[Any], list[Any]]:
    """Return a function that every rank calls with its value and that returns the values of all ranks, by rank."""

    def gather(value: object) -> list[Any]:
        if accelerator.num_processes == 1:
            return [value]
        values: list[Any] = [None] * accelerator.num_processes
        dist.all_gather_object(values, value)
        return values

    return gather


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over all ranks, computed in place; the tensor itself if there is one rank."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


@contextmanager
def accumulate(accelerator: Accelerator, model: Any, last: bool) -> Iterator[None]:  # noqa: ANN401 - wrapped or an engine
    """Run the forward and backward pass of a micro-batch; gradients are reduced in the step's last one only.

    Under FSDP gradients are reduced after every micro-batch: unsharded gradients of the whole model would not fit.
    """
    with memory_phase("the forward pass"):  # `backward` names its own
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            model.set_gradient_accumulation_boundary(last)
            yield
        elif last or accelerator.num_processes == 1 or accelerator.distributed_type == DistributedType.FSDP:
            yield
        else:
            with accelerator.no_sync(model):
                yield


def backward(accelerator: Accelerator, model: Any, loss: torch.Tensor) -> None:  # noqa: ANN401 - as above
    """Add the gradients of a loss that is to be summed over ranks.

    Every backend averages gradients over ranks, so the loss is multiplied by their number first.
    """
    scaled = (loss * accelerator.num_processes).float()
    with memory_phase("the backward pass"):
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            # If the loss is not finite, every gradient must be, too: DeepSpeed skips a step only by its gradient norm.
            model.backward(scaled * (1 + 0 * scaled.detach()), scale_wrt_gas=False)
        else:
            accelerator.backward(scaled)


def run_on_main(work: Callable[[], object], *, is_main: bool, gather: Callable[[object], list[Any]]) -> None:
    """Run `work` on the main rank while the others wait; its UserError is raised on every rank."""
    failure: UserError | None = None
    if is_main:
        try:
            work()
        except UserError as error:
            failure = error
    failure = gather(failure)[0]
    if failure is not None:
        raise failure


def run_on_all(work: Callable[[], object], *, gather: Callable[[object], list[Any]]) -> None:
    """Run `work` on every rank; the first UserError of any rank is raised on all."""
    failure: UserError | None = None
    try:
        work()
    except UserError as error:
        failure = error
    failures = [error for error in gather(failure) if error is not None]
    if failures:
        raise failures[0]
