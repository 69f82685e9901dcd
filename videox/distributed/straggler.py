"""Straggler measurement: the share of a step that most ranks wait for the slowest one, measured in the run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from accelerate import Accelerator
from torch import nn

from videox.device import DeviceEvent
from videox.distributed.backends import backend_of

HOOKED_PARAMETERS = 16  # the first trainable ones; their gradients are ready last


class BackwardTimer:
    """Records when this rank has finished its own work of a step and only waits for the other ranks from then on.

    Gradients become ready in the reverse of the order in which a model uses and lists its parameters. So the first
    trainable parameters get theirs at the end of the backward pass, shortly before DDP waits for the last reductions.

    Args:
        model: in training, with full weights on this rank.
        accelerator: of the run.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator) -> None:
        self._device = accelerator.device
        self._done: DeviceEvent | None = None
        for parameter in islice((p for p in model.parameters() if p.requires_grad), HOOKED_PARAMETERS):
            parameter.register_post_accumulate_grad_hook(self._note)

    def _note(self, parameter: nn.Parameter) -> None:
        del parameter
        self._done = DeviceEvent(self._device)

    def take(self) -> DeviceEvent | None:
        """Return the time at which the work of the step that ends now was done; None if nothing was trained in it."""
        done, self._done = self._done, None
        return done


def backward_timer(accelerator: Accelerator, model: nn.Module) -> BackwardTimer | None:
    """Return a timer of this rank's own work; None if that work cannot be told from waiting.

    A single process waits for nobody. With sharded weights or gradients ranks wait for each other in every layer, and
    a rank's own work could be measured only by stopping it.
    """
    alone, replicated = accelerator.num_processes == 1, backend_of(accelerator).engine == "replicated"
    return BackwardTimer(model, accelerator) if replicated and not alone else None


def straggler_share(busy: Sequence[float]) -> float | None:
    """Return 1 - mean / max, in [0, 1): the share of a step that ranks wait for the slowest one, on average.

    Args:
        busy: seconds of each rank's own work. If one is 0 (not known), None is returned.
    """
    if not busy or min(busy) <= 0:
        return None
    return 1 - sum(busy) / len(busy) / max(busy)
