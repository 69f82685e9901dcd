"""Serves whoever pays for several GPUs: how long most of them wait for the slowest, measured, not planned."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from accelerate import Accelerator
from torch import nn

from videox.device import DeviceEvent
from videox.distributed.accelerator import backend_of

LAST_TO_COME = 16  # parameters that are watched


class BackwardTimer:
    """Tells when this process has done its own work of a step and waits for the others from there on.

    Gradients come in the reverse of the order in which a model uses and lists its parameters. So the first ones that
    are trained get theirs at the backward pass's end, shortly before DDP waits for what is still being reduced.

    Args:
        model: in training, whole on this process.
        accelerator: of the run.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator) -> None:
        self._device = accelerator.device
        self._done: DeviceEvent | None = None
        for parameter in islice((p for p in model.parameters() if p.requires_grad), LAST_TO_COME):
            parameter.register_post_accumulate_grad_hook(self._note)

    def _note(self, parameter: nn.Parameter) -> None:
        del parameter
        self._done = DeviceEvent(self._device)

    def take(self) -> DeviceEvent | None:
        """Returns when the work of the step was done that ends here; None where nothing was trained in it."""
        done, self._done = self._done, None
        return done


def backward_timer(accelerator: Accelerator, model: nn.Module) -> BackwardTimer | None:
    """Returns what tells this process's own work from its waiting; None where nothing does.

    One process waits for nobody. Where weights or gradients are divided, processes wait for each other within every
    layer, and a process's own time could be told only by stopping it.
    """
    alone, whole = accelerator.num_processes == 1, backend_of(accelerator).kind == "whole"
    return BackwardTimer(model, accelerator) if whole and not alone else None


def straggler_share(busy: Sequence[float]) -> float | None:
    """Returns 1 - mean / largest, in [0, 1): the share of a step that processes wait for the slowest, on average.

    Args:
        busy: seconds of each process's own work; None is returned where one is not above 0, so not known.
    """
    if not busy or min(busy) <= 0:
        return None
    return 1 - sum(busy) / len(busy) / max(busy)
