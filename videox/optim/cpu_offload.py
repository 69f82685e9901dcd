"""CPU offload of the optimizer: moments are stored and steps computed in host memory, to save GPU memory.

Not torchao's CPUOffloadOptimizer: its hooks copy each gradient to the host in the backward pass, before gradients are
clipped and before a step that is not finite is skipped, and of several micro-batches only the last one's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from videox.device import DeviceEvent

STAGE_BYTES = 2**27  # weights and gradients in one of the two staging buffers, if no single parameter needs more
ALIGNED = 64  # bytes


@dataclass(frozen=True)
class _HostCopy:
    """A parameter whose weight and gradient are being copied to the host, or are there."""

    parameter: nn.Parameter
    weight: Tensor
    gradient: Tensor


class CpuOffloadOptimizer(torch.optim.Optimizer):
    """Optimizer that steps the parameters through copies of them in host memory.

    A step copies weights and gradients to the host, a batch of parameters at a time, while the previous batch is
    stepped there, and copies the weights back. Only the moments stay on the host: between steps the copies have no
    memory, and a step always starts from the model's current weights, also after a resume or after other code changed
    them. With a GPU the two staging buffers are pinned.

    `state` contains the moments by the model's own parameters, as in other optimizers. The moments are on
    state_device.

    Parameters that are in host memory themselves can be stepped in place (step_in_place).

    Args:
        groups: groups of the model's parameters, all on one device; other keys, such as rate_factor, are kept.
        make: creates the inner optimizer from groups of the host copies and lr.
        lr: initial learning rate, until the groups' own is changed.
        stage_bytes: size of a staging buffer; it is at least the largest parameter's weight and gradient.
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
        self._host_params = {
            p: nn.Parameter(torch.empty(0, dtype=p.dtype)) for group in groups for p in group["params"]
        }
        inner_groups = [{**group, "params": [self._host_params[p] for p in group["params"]]} for group in groups]
        self._inner = make(inner_groups, lr=lr)
        super().__init__(groups, dict(self._inner.defaults))
        self._device = next(iter(self._host_params)).device
        self._stage_bytes = max(stage_bytes, *(_staged_bytes(p) for p in self._host_params))
        self._stages: list[Tensor] = []
        self._in_place: frozenset[nn.Parameter] = frozenset()

    def step_in_place(self, parameters: Iterable[nn.Parameter], device: torch.device) -> None:
        """Step some parameters, whose weights and gradients are in host memory, without copies of them.

        Args:
            parameters: some of the optimizer's.
            device: of all others.
        """
        self._in_place, self._device = frozenset(parameters), device

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # noqa: ANN401 - torch's
        """Step the parameters that have gradients; the host does not wait for the weights to be copied back."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._set_hyperparameters()
        if not self._stages:
            pinned = self._device.type == "cuda"
            size = self._stage_bytes
            self._stages = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        previous: tuple[list[_HostCopy], DeviceEvent] | None = None
        # A buffer is overwritten by the batch after next. No event protects its previous content: both copies are in
        # the device's single stream, in this order.
        for number, parameters in enumerate(self._batches()):
            current = self._copy_to_host(parameters, self._stages[number % 2]), DeviceEvent(self._device)
            if previous is not None:
                self._step_batch(*previous)
            previous = current
        if previous is not None:
            self._step_batch(*previous)
        return loss

    def _set_hyperparameters(self) -> None:
        for outer, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            for key, value in outer.items():
                if key == "params":
                    continue
                if isinstance(inner.get(key), Tensor):  # the tensor from which torchao's compiled step reads lr
                    inner[key].fill_(value)
                else:
                    inner[key] = value

    def _batches(self) -> Iterator[list[nn.Parameter]]:
        """Yield the parameters that have gradients, in order, in batches that fit into a staging buffer."""
        batch: list[nn.Parameter] = []
        used = 0
        for parameter in self._host_params:
            if parameter.grad is None:
                continue
            size = 0 if parameter in self._in_place else _staged_bytes(parameter)
            if batch and used + size > self._stage_bytes:
                yield batch
                batch, used = [], 0
            batch.append(parameter)
            used += size
        if batch:
            yield batch

    def _copy_to_host(self, parameters: Iterable[nn.Parameter], stage: Tensor) -> list[_HostCopy]:
        host_copies, start = [], 0
        for parameter in parameters:
            assert parameter.grad is not None
            if parameter in self._in_place:
                host_copies.append(_HostCopy(parameter, parameter.data, parameter.grad.data))
                continue
            copies = []
            for tensor in (parameter, parameter.grad):
                size = tensor.numel() * tensor.element_size()
                # .data: torch.compile would treat a view of another tensor as a case of its own and recompile.
                copy = stage[start : start + size].view(tensor.dtype).view(tensor.shape).data
                copies.append(copy.copy_(tensor, non_blocking=self._device.type == "cuda"))
                start += _aligned(size)
            host_copies.append(_HostCopy(parameter, *copies))
        return host_copies

    def _step_batch(self, batch: Iterable[_HostCopy], copied: DeviceEvent) -> None:
        copied.wait()
        for entry in batch:
            host_param = self._host_params[entry.parameter]
            host_param.data, host_param.grad = entry.weight, entry.gradient
            # The same dict: the inner optimizer fills it in, and the moments are found under the model's parameter.
            self._inner.state[host_param] = self.state[entry.parameter]
        # Parameters of other batches have no gradient, and the inner optimizer skips them.
        self._inner.step()
        for entry in batch:
            host_param = self._host_params[entry.parameter]
            host_param.grad, host_param.data = None, torch.empty(0, dtype=host_param.dtype)
            if entry.parameter not in self._in_place:
                entry.parameter.copy_(entry.weight, non_blocking=self._device.type == "cuda")


def _staged_bytes(parameter: nn.Parameter) -> int:
    return 2 * _aligned(parameter.numel() * parameter.element_size())


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def thread_notes(name: str, threads: int, cores: int, environment: Mapping[str, str]) -> list[str]:
    """Return a note for the user if most of the machine's cores would not take part in the steps.

    Args:
        name: the optimizer's name.
        threads: threads of this process; launchers set 1 unless configured otherwise.
        cores: cores of the machine.
        environment: environment variables, with LOCAL_WORLD_SIZE if a launcher started several processes.
    """
    available = max(cores // int(environment.get("LOCAL_WORLD_SIZE", "1")), 1)
    if 2 * threads > available:
        return []
    faster = f"accelerate launch --num_cpu_threads_per_process {available}"
    return [f"{name} steps on the host with {threads} of {available} cores per process: {faster} is faster"]
