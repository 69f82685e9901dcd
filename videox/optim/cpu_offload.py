"""Serves who has memory to spare on the host and none on the GPU: an optimizer whose moments and steps are there.

Not torchao's CPUOffloadOptimizer: its hooks send each gradient to the host in the backward pass, before gradients are
clipped and before a step that is not finite is left out, and of several micro-batches the last one's alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from videox.device import DeviceEvent

STAGE_BYTES = 2**27  # of weights and gradients on the host at once, if no single parameter needs more; two such stages
ALIGNED = 64  # bytes


@dataclass(frozen=True)
class _Landed:
    """A parameter whose weight and gradient are on their way to the host."""

    parameter: nn.Parameter
    weight: Tensor
    gradient: Tensor


class CpuOffloadOptimizer(torch.optim.Optimizer):
    """Steps parameters by an optimizer of their twins in host memory.

    A step brings weights and gradients to the host, some parameters at a time, while those before them are stepped
    there, and the weights back. The twins have no memory of their own beyond that: a weight is what the model has,
    also after a resume or a change of weights from outside, and the host keeps moments alone. With a GPU the two
    stages through which all passes are pinned.

    `state` holds the moments by the model's own parameters, as other optimizers do. It lies on state_device.

    Args:
        groups: of the model's parameters, all on one device; further keys, such as rate_factor, stay.
        make: makes the inner optimizer from groups of the twins and lr.
        lr: learning rate, until the groups' own is changed.
        stage_bytes: of a stage; it is as large as the largest parameter's weight and gradient at least.
    """

    state_device = torch.device("cpu")

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        make: Callable[..., torch.optim.Optimizer],
        *,
        lr: float,
        stage_bytes: int = STAGE_BYTES,
    ) -> None:
        groups = list(groups)
        self._twins = {p: nn.Parameter(torch.empty(0, dtype=p.dtype)) for group in groups for p in group["params"]}
        inner_groups = [{**group, "params": [self._twins[p] for p in group["params"]]} for group in groups]
        self._inner = make(inner_groups, lr=lr)
        super().__init__(groups, dict(self._inner.defaults))
        self._device = next(iter(self._twins)).device
        self._stage_bytes = max(stage_bytes, *(_staged_bytes(p) for p in self._twins))
        self._stages: list[Tensor] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # noqa: ANN401 - torch's
        """Steps the parameters that have gradients; the host waits for these, and not for the weights to be back."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._set_hyperparameters()
        if not self._stages:
            pinned = self._device.type == "cuda"
            size = self._stage_bytes
            self._stages = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        before: tuple[list[_Landed], DeviceEvent] | None = None
        # Copies to a stage follow those from it in the device's one stream of work: no event is needed between them.
        for number, parameters in enumerate(self._shares()):
            coming = self._fetch(parameters, self._stages[number % 2]), DeviceEvent(self._device)
            if before is not None:
                self._step_share(*before)
            before = coming
        if before is not None:
            self._step_share(*before)
        return loss

    def _set_hyperparameters(self) -> None:
        for mine, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            for key, value in mine.items():
                if key == "params":
                    continue
                if isinstance(inner.get(key), Tensor):  # torchao's compiled step reads its rate there
                    inner[key].fill_(value)
                else:
                    inner[key] = value

    def _shares(self) -> Iterator[list[nn.Parameter]]:
        """Yields the parameters that have gradients, in order, as many at a time as a stage has room for."""
        share: list[nn.Parameter] = []
        taken = 0
        for parameter in self._twins:
            if parameter.grad is None:
                continue
            size = _staged_bytes(parameter)
            if share and taken + size > self._stage_bytes:
                yield share
                share, taken = [], 0
            share.append(parameter)
            taken += size
        if share:
            yield share

    def _fetch(self, parameters: Iterable[nn.Parameter], stage: Tensor) -> list[_Landed]:
        landed, start = [], 0
        for parameter in parameters:
            assert parameter.grad is not None
            copies = []
            for tensor in (parameter, parameter.grad):
                size = tensor.numel() * tensor.element_size()
                # .data, since torch's compiler takes what is known to be part of another tensor for another case
                copy = stage[start : start + size].view(tensor.dtype).view(tensor.shape).data
                copies.append(copy.copy_(tensor, non_blocking=self._device.type == "cuda"))
                start += _aligned(size)
            landed.append(_Landed(parameter, *copies))
        return landed

    def _step_share(self, share: Iterable[_Landed], there: DeviceEvent) -> None:
        there.wait()
        for one in share:
            twin = self._twins[one.parameter]
            twin.data, twin.grad = one.weight, one.gradient
            self._inner.state[twin] = self.state[one.parameter]
        self._inner.step()
        for one in share:
            twin = self._twins[one.parameter]
            twin.grad, twin.data = None, torch.empty(0, dtype=twin.dtype)
            one.parameter.copy_(one.weight, non_blocking=self._device.type == "cuda")


def _staged_bytes(parameter: nn.Parameter) -> int:
    return 2 * _aligned(parameter.numel() * parameter.element_size())


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def thread_notes(name: str, threads: int, cores: int, environment: Mapping[str, str]) -> list[str]:
    """Returns a line where most of the machine's cores would not step.

    Args:
        name: of the optimizer.
        threads: of this process; launchers set 1 unless told otherwise.
        cores: of the machine.
        environment: with LOCAL_WORLD_SIZE, as a launcher of several processes sets it.
    """
    share = max(cores // int(environment.get("LOCAL_WORLD_SIZE", "1")), 1)
    if 2 * threads > share:
        return []
    told = f"accelerate launch --num_cpu_threads_per_process {share}"
    return [f"{name} steps on the host with {threads} of {share} cores for each process: {told} is faster"]
